//! Sending: grouping datagrams into runs, sendmmsg, and what a refusal says.

use std::io;
use std::iter::Peekable;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;

use socket2::Socket;

use super::batcher::{Batcher, Run, Scratch};
use super::headers::{SPACE, write_address, write_segment, write_tos};
use super::segmenting::{Doubt, Segmenting};
use super::{BatchSocket, SendCounters, SendItem};

/// Most bytes of one segmented send: a UDP datagram over IPv4 (RFC 768, RFC 791).
const MOST_BYTES: usize = 65_507;

/// Most datagrams of one segmented send: UDP_MAX_SEGMENTS, which is 128 only since Linux 6.9.
const MOST_SEGMENTS: usize = 64;

impl BatchSocket {
    /// Sends datagrams in order, in system calls of up to [`BATCH`](super::BATCH); gives how many the kernel
    /// took. A datagram it refuses is counted by reason and skipped; a full socket buffer drops
    /// the rest of the batch. Never blocks, never allocates.
    pub fn send<'a>(&mut self, items: impl Iterator<Item = SendItem<'a>>) -> usize {
        self.batcher.send(&self.socket, self.local, items)
    }
}

impl Batcher {
    /// See [`BatchSocket::send`]. `local` is for the log.
    pub(crate) fn send<'a>(
        &mut self,
        socket: &Socket,
        local: SocketAddr,
        items: impl Iterator<Item = SendItem<'a>>,
    ) -> usize {
        let mut items = items.peekable();
        let before = self.counters.sent;
        while items.peek().is_some() {
            self.segmenting.batch();
            let count = self.fill(&mut items);
            self.send_filled(socket, local, count);
        }
        (self.counters.sent - before) as usize
    }

    /// Fills headers from the iterator, equal datagrams into as few as hold them; gives their number (1..=BATCH).
    ///
    /// Of those that do not fit one message, the first takes the odd ones. So the receiver, woken by a small message, finds
    /// the others as well, and may join again what one read of the TUN gave.
    fn fill<'a>(&mut self, items: &mut Peekable<impl Iterator<Item = SendItem<'a>>>) -> usize {
        let segmenting = &self.segmenting;
        let Scratch { names, vectors, controls, messages, runs } = &mut *self.scratch;
        let mut headers =
            names.iter_mut().zip(controls).zip(messages.iter_mut()).zip(runs.iter_mut());
        let mut vectors = &mut vectors[..];
        let mut first = 0;
        let mut count = 0;
        while !vectors.is_empty()
            && let Some(head) = items.next()
        {
            let size = head.bytes.len();
            let joins = segmenting.takes(size);
            let room = vectors.len();
            let mut equal = 0;
            let mut next = Some(head);
            for vector in vectors.iter_mut() {
                let Some(item) = next.take() else { break };
                *vector = vector_of(&item);
                let last = item.bytes.len();
                equal += 1;
                // The last segment may be shorter, and then it is the last.
                next = items.next_if(|item| {
                    joins
                        && last == size
                        && equal < room
                        && (1..=size).contains(&item.bytes.len())
                        && (item.to, item.tos) == (head.to, head.tos)
                });
            }
            let most = (MOST_BYTES / size.max(1)).clamp(1, MOST_SEGMENTS);
            let mut take = if equal % most == 0 { most } else { equal % most };
            let (mut run_of, rest) = std::mem::take(&mut vectors).split_at_mut(equal);
            vectors = rest;
            while !run_of.is_empty() {
                let (these, others) = run_of.split_at_mut(take.min(run_of.len()));
                run_of = others;
                take = most;
                // There are as many headers as vectors.
                let Some((((name, control), message), run)) = headers.next() else { break };
                *run = Run { first, count: these.len() };
                first += these.len();
                let header = &mut message.msg_hdr;
                header.msg_iov = these.as_mut_ptr();
                header.msg_iovlen = these.len() as _;
                header.msg_namelen = write_address(name, head.to);
                header.msg_name = std::ptr::from_mut(name).cast();
                let mut length = 0;
                if head.tos != 0 {
                    write_tos(control, head.tos, head.to.is_ipv4());
                    length += SPACE;
                }
                if these.len() > 1 {
                    write_segment(control, length, size);
                    length += SPACE;
                }
                header.msg_control =
                    if length == 0 { std::ptr::null_mut() } else { control.0.as_mut_ptr().cast() };
                header.msg_controllen = length as _;
                header.msg_flags = 0;
                message.msg_len = 0;
                count += 1;
            }
        }
        count
    }

    fn send_filled(&mut self, socket: &Socket, local: SocketAddr, count: usize) {
        let mut next = 0;
        let mut retried = false;
        while next < count {
            let Some(rest) = self.scratch.messages.get_mut(next..count) else { return };
            // SAFETY: these headers were filled by `fill`, whose items outlive `send`; the kernel
            // only reads what they point to.
            let sent = unsafe {
                libc::sendmmsg(
                    socket.as_raw_fd(),
                    rest.as_mut_ptr(),
                    rest.len() as libc::c_uint,
                    libc::MSG_DONTWAIT as _,
                )
            };
            let runs = &self.scratch.runs;
            if let Ok(sent @ 1..) = usize::try_from(sent) {
                for run in runs.iter().skip(next).take(sent) {
                    self.counters.sent += run.count as u64;
                    let head = self.scratch.vectors.get(run.first);
                    if run.count > 1
                        && let Some(head) = head
                        && self.segmenting.went(head.iov_len)
                    {
                        tracing::info!(%local, size = head.iov_len, "runs of such datagrams go at once again");
                    }
                }
                next += sent;
                retried = false;
                continue;
            }
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::Interrupted {
                continue;
            }
            let run = runs.get(next).copied().unwrap_or(Run { first: 0, count: 0 });
            if run.count > 1
                && let Some(doubt) = Segmenting::doubt(&error)
            {
                self.send_singly((socket, local), (next, run), doubt, &error);
                next += 1;
                continue;
            }
            let left = runs.iter().take(count).skip(next).map(|run| run.count as u64).sum();
            let failure = count_error(&mut self.counters, &error, left, run.count as u64);
            match failure {
                Failure::Batch => return,
                Failure::Datagram => next += 1,
                Failure::Pending if retried => next += 1,
                // The error belonged to an earlier datagram: this one has not been tried yet.
                Failure::Pending => retried = true,
            }
        }
    }

    /// Sends the datagrams of a refused run one by one, each in the run's class.
    fn send_singly(
        &mut self,
        (socket, local): (&Socket, SocketAddr),
        (message, run): (usize, Run),
        doubt: Doubt,
        refusal: &io::Error,
    ) {
        let Scratch { vectors, messages, .. } = &mut *self.scratch;
        let Some(message) = messages.get_mut(message) else { return };
        let header = &mut message.msg_hdr;
        // UDP_SEGMENT stands last, behind the class where there is one.
        header.msg_controllen = header.msg_controllen.saturating_sub(SPACE);
        if header.msg_controllen == 0 {
            header.msg_control = std::ptr::null_mut();
        }
        for (place, vector) in vectors.iter_mut().skip(run.first).take(run.count).enumerate() {
            let size = vector.iov_len;
            header.msg_iov = vector;
            header.msg_iovlen = 1;
            // SAFETY: as in `send_filled`: one header, its name, class and one vector, all alive and filled.
            let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), header, libc::MSG_DONTWAIT) };
            if sent < 0 {
                count_error(&mut self.counters, &io::Error::last_os_error(), 1, 1);
                continue;
            }
            self.counters.sent += 1;
            if place == 0 && self.segmenting.refused(doubt, size) {
                match doubt {
                    Doubt::Support => {
                        tracing::info!(%local, problem = %refusal, "the host cannot send runs of datagrams at once (UDP_SEGMENT; checksum offload may be off): each is sent by itself, which costs throughput; runs are tried again from time to time");
                    }
                    Doubt::Size => {
                        tracing::info!(%local, size, problem = %refusal, "datagrams of this size do not fit the interface whole: they are sent one by one, in fragments, which costs throughput (is the TUN's MTU too large?); tried again from time to time");
                    }
                }
            }
        }
    }
}

fn vector_of(item: &SendItem<'_>) -> libc::iovec {
    libc::iovec { iov_base: item.bytes.as_ptr().cast_mut().cast(), iov_len: item.bytes.len() }
}

/// What a failed send says about the datagrams.
enum Failure {
    /// This and all that follow are lost.
    Batch,
    /// This one is lost.
    Datagram,
    /// An old error was reported: try again.
    Pending,
}

/// `remaining` datagrams would follow in the call that failed, the first `these` of them in one message.
fn count_error(
    counters: &mut SendCounters,
    error: &io::Error,
    remaining: u64,
    these: u64,
) -> Failure {
    match error.raw_os_error().unwrap_or(0) {
        libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM => {
            counters.full += remaining;
            return Failure::Batch;
        }
        libc::ECONNREFUSED | libc::EPROTO | libc::ENOPROTOOPT => {
            counters.icmp_errors += 1;
            return Failure::Pending;
        }
        libc::ENETUNREACH | libc::EHOSTUNREACH | libc::ENETDOWN | libc::EHOSTDOWN => {
            counters.unreachable += these;
        }
        libc::EPERM | libc::EACCES => counters.refused_by_host += these,
        libc::EINVAL | libc::EADDRNOTAVAIL => counters.not_local += these,
        libc::EMSGSIZE => counters.too_large += these,
        _ => counters.other += these,
    }
    Failure::Datagram
}
