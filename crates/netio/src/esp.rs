//! ESP directly in IP, protocol 50 (RFC 4303), by a raw socket of an endpoint's WAN address: recvmmsg and sendmmsg over
//! buffers of the caller, without allocation per call and without a copy. There is neither GSO nor GRO for it.
//!
//! A raw socket bound to an address gets packets to that address alone, each whole (the kernel puts fragments together).
//! Over IPv4 they come with their IP header in front, over IPv6 without. As long as there is such a socket the kernel
//! sends no "protocol unreachable" for them.
//!
//! Each raw socket of an address gets every packet to it. Where several workers have one each, a filter leaves a packet
//! to the socket of its SA's worker alone (SO_ATTACH_FILTER): none may come twice.
//!
//! What `udp.rs` says of absent addresses, of DF and of path-MTU discovery holds here as well. Binding a raw socket to an
//! address that is not there needs Linux 5.17, opening one CAP_NET_RAW.

use std::io;
use std::mem::MaybeUninit;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};

use socket2::{Domain, Protocol, Socket, Type};

use crate::filter::{ALL_OF_IT, Line, attach, by_worker, line, ret};
use crate::udp::{Batcher, RecvMeta, SendCounters, SendItem, bind_outer};

/// IP protocol number of ESP.
const ESP: i32 = 50;

/// Shortest IPv4 header in bytes.
const IPV4_HEADER: usize = 20;

/// A raw socket for ESP; owned by one worker.
#[derive(Debug)]
pub struct EspSocket {
    socket: Socket,
    local: SocketAddr,
    batcher: Batcher,
    receive_errors: u64,
}

impl EspSocket {
    /// Opens and binds; non-blocking. `buffer_bytes` each way need CAP_NET_ADMIN above the host's limit. Errors: EPERM
    /// without CAP_NET_RAW; EADDRNOTAVAIL where the kernel is too old for an address that is not there.
    pub fn bind(local: IpAddr, buffer_bytes: usize) -> io::Result<Self> {
        Self::bind_share(local, buffer_bytes, 0, 1)
    }

    /// The same for one of so many workers: it gets the packets of that worker's SAs alone. Errors: also ENOMEM or EPERM
    /// where the filter cannot be had.
    pub fn bind_share(
        local: IpAddr,
        buffer_bytes: usize,
        worker: u8,
        workers: u8,
    ) -> io::Result<Self> {
        let local = SocketAddr::new(local, 0);
        let socket = Socket::new(Domain::for_address(local), Type::RAW, Some(Protocol::from(ESP)))?;
        socket.set_nonblocking(true)?;
        let filtered = workers > 1;
        if filtered {
            // It gets packets from its first moment on, and before it is bound for whatever address. So first none at
            // all, and away with what came before that.
            attach(&socket, libc::SO_ATTACH_FILTER, &mut [ret(0)])?;
            while socket.recv(&mut [MaybeUninit::uninit()]).is_ok() {}
        }
        // Over IPv4 the header says it.
        bind_outer(&socket, local, local.is_ipv6(), buffer_bytes)?;
        if filtered {
            attach(&socket, libc::SO_ATTACH_FILTER, &mut share(local.is_ipv4(), worker, workers))?;
        }
        Ok(Self { socket, local, batcher: Batcher::without_runs(), receive_errors: 0 })
    }

    /// The bound address.
    #[must_use]
    pub fn local_addr(&self) -> IpAddr {
        self.local.ip()
    }

    /// Receives up to `min(buffers, metas, BATCH)` packets, the i-th into the i-th buffer and described by `metas[i]`: the
    /// ESP packet begins at its `start`, behind the IP header. 0 when nothing is there. Never blocks, never allocates.
    /// Errors of the socket are counted, not returned.
    pub fn recv<'a>(
        &mut self,
        buffers: impl Iterator<Item = &'a mut [u8]>,
        metas: &mut [RecvMeta],
    ) -> usize {
        let v4 = self.local.is_ipv4();
        let rooms = buffers.take(metas.len());
        let got = self.batcher.receive(&self.socket, rooms, |i, meta, _, bytes| {
            if let Some(to) = metas.get_mut(i) {
                *to = if v4 { behind_header(meta, bytes) } else { meta };
            }
        });
        got.unwrap_or_else(|_| {
            self.receive_errors += 1;
            0
        })
    }

    /// Sends ESP packets in order; gives how many the kernel took. The destinations' ports mean nothing. A packet that it
    /// refuses is counted by reason and skipped; a full socket buffer drops the rest. Never blocks, never allocates.
    pub fn send<'a>(&mut self, items: impl Iterator<Item = SendItem<'a>>) -> usize {
        // Over IPv6 a port would be taken for a protocol.
        let items = items.map(|item| SendItem { to: SocketAddr::new(item.to.ip(), 0), ..item });
        self.batcher.send(&self.socket, self.local, items)
    }

    /// What became of everything sent so far.
    #[must_use]
    pub fn counters(&self) -> SendCounters {
        self.batcher.counters
    }

    /// Receive calls that failed with a real error so far.
    #[must_use]
    pub fn receive_errors(&self) -> u64 {
        self.receive_errors
    }

    /// Packets that the kernel dropped here, mostly because the receive buffer was full; as of the last receive that
    /// found more than one call takes.
    #[must_use]
    pub fn receive_dropped(&self) -> u64 {
        self.batcher.receive_dropped
    }
}

impl AsFd for EspSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Takes the packets of one worker's SAs. Over IPv4 the filter sees the IP header as well (X = its length), over IPv6 it
/// begins where ESP does (net/ipv4/raw.c, raw_rcv; net/ipv6/raw.c, rawv6_rcv).
fn share(v4: bool, worker: u8, workers: u8) -> [Line; 8] {
    let [shift, mask, modulo] = by_worker(workers);
    let (behind, load) = if v4 {
        (line(libc::BPF_LDX | libc::BPF_B | libc::BPF_MSH, 0, 0, 0), libc::BPF_IND)
    } else {
        (line(libc::BPF_LDX | libc::BPF_W | libc::BPF_IMM, 0, 0, 0), libc::BPF_ABS)
    };
    [
        behind,
        line(libc::BPF_LD | libc::BPF_W | load, 0, 0, 0),
        shift,
        mask,
        modulo,
        line(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, worker.into()),
        ret(ALL_OF_IT),
        ret(0),
    ]
}

/// Where the packet lies behind its IPv4 header (RFC 791 §3.1), options included, and its TOS byte. What has no whole
/// header is an empty packet.
fn behind_header(meta: RecvMeta, bytes: &[u8]) -> RecvMeta {
    let nothing = RecvMeta { start: 0, len: 0, ..meta };
    let [first, tos, ..] = *bytes else { return nothing };
    let start = usize::from(first & 0x0f) * 4;
    match bytes.len().checked_sub(start) {
        Some(len) if first >> 4 == 4 && start >= IPV4_HEADER => {
            RecvMeta { start, len, tos, ..meta }
        }
        _ => nothing,
    }
}

#[cfg(test)]
mod tests;
