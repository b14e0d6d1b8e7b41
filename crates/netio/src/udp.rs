//! UDP in batches: recvmmsg and sendmmsg over buffers of the caller, without allocation per call.
//!
//! A socket is bound to a virtual address before the address is present (IP_FREEBIND), so that a
//! takeover opens nothing. While the address is absent the kernel refuses to send from it
//! (EINVAL, newer ones ENETUNREACH): one more fence, counted in [`SendCounters`].
//!
//! Datagrams that follow each other with one length, destination and TOS leave as one UDP_SEGMENT send,
//! which the kernel splits as late as it can: most of what sending costs is then paid once a run. What the
//! kernel's refusal of such a send means for the next ones is decided in one place, `segmenting.rs`.
//!
//! Likewise UDP_GRO: the kernel may hand over a run of datagrams in one buffer of 64 KB, and [`BatchSocket::recv`]
//! deals them out to the caller's buffers. What is longer than such a buffer is cut, or given to the caller whole:
//! [`BatchSocket::recv_or_give`].
//!
//! Outer datagrams leave with DF clear and without path-MTU discovery (IP_PMTUDISC_DONT;
//! RFC 4301 §8.1 leaves the choice to us): fragmentation is kept rare by the TUN's MTU, a forged
//! ICMP cannot shrink a path, and a peer behind a silent small-MTU hop stays reachable.

mod batcher;
mod group;
mod headers;
mod receive;
mod segmenting;
mod send;
mod shared;

use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;

use socket2::{Domain, Protocol, Socket, Type};

use crate::sys::{check, set_option};
use receive::Incoming;
use segmenting::Segmenting;

pub(crate) use batcher::Batcher;
pub use group::Group;
pub use shared::{SharedPort, path_mtu};

/// Most datagrams in one system call.
pub const BATCH: usize = 192;

/// Socket buffers asked for, in bytes (dataplane.md).
pub const SOCKET_BUFFER: usize = 7 << 20;

/// What is known of one received datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecvMeta {
    /// Who sent it.
    pub from: SocketAddr,
    /// Where in its buffer it begins: behind the IP header where the kernel hands that over ([`crate::esp`]), else 0.
    pub start: usize,
    /// Its bytes in the buffer.
    pub len: usize,
    /// The outer IPv4 TOS or IPv6 traffic class byte (DSCP ‖ ECN); 0 unless asked for.
    pub tos: u8,
    /// The datagram was longer than its buffer.
    pub truncated: bool,
}

impl RecvMeta {
    /// A place holder to fill arrays with.
    pub const EMPTY: Self = Self {
        from: SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0)),
        start: 0,
        len: 0,
        tos: 0,
        truncated: false,
    };
}

/// One datagram to send.
#[derive(Clone, Copy, Debug)]
pub struct SendItem<'a> {
    /// Destination, of the socket's family.
    pub to: SocketAddr,
    /// The UDP payload.
    pub bytes: &'a [u8],
    /// Outer TOS or traffic class byte.
    pub tos: u8,
}

/// What became of datagrams that were to be sent. All but `sent` are drops.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SendCounters {
    /// Taken by the kernel.
    pub sent: u64,
    /// The socket buffer was full (EAGAIN, ENOBUFS, ENOMEM).
    pub full: u64,
    /// No route or the network is down (ENETUNREACH, EHOSTUNREACH, ENETDOWN).
    pub unreachable: u64,
    /// A firewall refused (EPERM, EACCES).
    pub refused_by_host: u64,
    /// The address is not (yet, or any more) on this host (EINVAL, EADDRNOTAVAIL).
    pub not_local: u64,
    /// Larger than the kernel takes (EMSGSIZE).
    pub too_large: u64,
    /// A pending ICMP error consumed (ECONNREFUSED and other); the datagram was tried once more.
    pub icmp_errors: u64,
    /// Everything else.
    pub other: u64,
}

/// How to open a [`BatchSocket`].
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Report the outer TOS byte of received datagrams (needed to copy ECN, RFC 6040).
    pub recv_tos: bool,
    /// Receive and send buffer in bytes; needs CAP_NET_ADMIN above the host's limit.
    pub buffer_bytes: usize,
    /// Other sockets of this user may have the same address and port ([`SharedPort`], [`Group`]).
    pub shared: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { recv_tos: false, buffer_bytes: SOCKET_BUFFER, shared: false }
    }
}

/// What the kernel takes and gives by the run; where it does not, each datagram goes and comes by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offloads {
    /// UDP_GRO (Linux 5.0).
    pub receive: bool,
    /// UDP_SEGMENT (Linux 4.18). Whether a way out takes it is another matter, see `segmenting.rs`.
    pub send: bool,
}

/// A UDP socket that reads and writes in batches; owned by one worker.
#[derive(Debug)]
pub struct BatchSocket {
    socket: Arc<Socket>,
    local: SocketAddr,
    recv_tos: bool,
    offloads: Offloads,
    batcher: Batcher,
    incoming: Incoming,
    /// Receive errors other than "nothing there" (pending ICMP errors, mostly).
    receive_errors: u64,
}

/// The same socket for the control thread's few datagrams.
#[derive(Clone, Debug)]
pub struct UdpSender {
    socket: Arc<Socket>,
    local: SocketAddr,
}

/// Opens a UDP socket bound to `local`, which need not be an address of this host yet.
/// The socket is non-blocking. Errors: EADDRINUSE when another process holds the port without
/// sharing it; EACCES below port 1024 without CAP_NET_BIND_SERVICE.
fn open(local: SocketAddr, options: Options) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(local), Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_nonblocking(true)?;
    // Beside an IKE daemon that holds the wildcard port and shares it, the more specific bind wins.
    socket.set_reuse_address(true)?;
    if options.shared {
        socket.set_reuse_port(true)?;
    }
    if local.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    bind_outer(&socket, local, options.recv_tos, options.buffer_bytes)?;
    Ok(socket)
}

/// Binds a socket for outer packets, whose address need not be there: see the module's head.
pub(crate) fn bind_outer(
    socket: &Socket,
    local: SocketAddr,
    recv_tos: bool,
    buffer_bytes: usize,
) -> io::Result<()> {
    enlarge_buffers(socket, buffer_bytes)?;
    let tos = libc::c_int::from(recv_tos);
    if local.is_ipv4() {
        set_option(socket, libc::IPPROTO_IP, libc::IP_FREEBIND, 1)?;
        set_option(socket, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DONT)?;
        set_option(socket, libc::IPPROTO_IP, libc::IP_RECVTOS, tos)?;
    } else {
        set_option(socket, libc::IPPROTO_IPV6, libc::IPV6_FREEBIND, 1)?;
        set_option(socket, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_DONT)?;
        set_option(socket, libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS, tos)?;
    }
    socket.bind(&local.into())
}

/// Asks for socket buffers of so many bytes each way: beyond the host's limit with CAP_NET_ADMIN,
/// else up to it.
pub fn enlarge_buffers(socket: &impl AsFd, bytes: usize) -> io::Result<()> {
    let bytes = libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX);
    for (force, plain) in
        [(libc::SO_RCVBUFFORCE, libc::SO_RCVBUF), (libc::SO_SNDBUFFORCE, libc::SO_SNDBUF)]
    {
        if set_option(socket, libc::SOL_SOCKET, force, bytes).is_err() {
            set_option(socket, libc::SOL_SOCKET, plain, bytes)?;
        }
    }
    Ok(())
}

/// Opens a plain non-blocking socket with the same options and binding, for the control loop
/// (IKE on port 500): wrap it in tokio's `UdpSocket::from_std`.
pub fn control_socket(local: SocketAddr) -> io::Result<std::net::UdpSocket> {
    Ok(open(local, Options { buffer_bytes: 1 << 20, ..Options::default() })?.into())
}

impl BatchSocket {
    /// Opens and binds; see [`Options`] and the module's head.
    pub fn bind(local: SocketAddr, options: Options) -> io::Result<Self> {
        let socket = open(local, options)?;
        let offloads = Offloads {
            receive: set_option(&socket, libc::SOL_UDP, libc::UDP_GRO, 1).is_ok(),
            // Kernels that do not know it would send a run as one long datagram.
            send: set_option(&socket, libc::SOL_UDP, libc::UDP_SEGMENT, 0).is_ok(),
        };
        let segmenting = Segmenting::new(offloads.send);
        let local = socket.local_addr()?.as_socket().unwrap_or(local);
        Ok(Self {
            socket: Arc::new(socket),
            local,
            recv_tos: options.recv_tos,
            offloads,
            batcher: Batcher::new(segmenting),
            incoming: Incoming::new(),
            receive_errors: 0,
        })
    }

    /// The bound address.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// A handle for another thread that sends single datagrams from the same address and port.
    #[must_use]
    pub fn sender(&self) -> UdpSender {
        UdpSender { socket: Arc::clone(&self.socket), local: self.local }
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

    /// Datagrams that the kernel dropped here, mostly because the receive buffer was full; as of the last receive that
    /// found more than one call takes.
    #[must_use]
    pub fn receive_dropped(&self) -> u64 {
        self.batcher.receive_dropped
    }

    /// What the kernel does by the run.
    #[must_use]
    pub fn offloads(&self) -> Offloads {
        self.offloads
    }
}

impl AsFd for BatchSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for BatchSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl UdpSender {
    /// The address datagrams leave from.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// Sends one datagram without blocking. A pending ICMP error is passed over once.
    pub fn send_to(&self, bytes: &[u8], to: SocketAddr) -> io::Result<()> {
        let to = to.into();
        match self.socket.send_to(bytes, &to) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                self.socket.send_to(bytes, &to).map(drop)
            }
            other => other.map(drop),
        }
    }
}

/// Waits up to `millis` for one descriptor to become readable; for tests and probes.
pub fn wait_readable(file: &impl AsFd, millis: i32) -> io::Result<bool> {
    let mut poll = libc::pollfd { fd: file.as_fd().as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one valid pollfd.
    let ready = check(unsafe { libc::poll(&raw mut poll, 1, millis) })?;
    Ok(ready > 0)
}

#[cfg(test)]
mod tests;
