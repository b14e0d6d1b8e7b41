//! What sockets that work in batches share: the headers of one sendmmsg or recvmmsg, and what became of what was sent.

use std::io;
use std::os::fd::AsRawFd;

use socket2::Socket;

use super::headers::{CONTROL, Control, address_of, notes_of};
use super::segmenting::Segmenting;
use super::{BATCH, RecvMeta, SendCounters};
use crate::sys::{dropped_at, is_transient};

/// One socket's batches: sending is in `send.rs`.
#[derive(Debug)]
pub(crate) struct Batcher {
    pub(super) scratch: Box<Scratch>,
    pub(super) segmenting: Segmenting,
    pub(crate) counters: SendCounters,
    /// What the kernel dropped on its way in, when last looked at.
    pub(crate) receive_dropped: u64,
}

/// The headers of a batch. The pointers inside are set and used within one call only.
pub(super) struct Scratch {
    pub(super) names: [libc::sockaddr_storage; BATCH],
    pub(super) vectors: [libc::iovec; BATCH],
    pub(super) controls: [Control; BATCH],
    pub(super) messages: [libc::mmsghdr; BATCH],
    /// Datagrams in each message, and where the first one's vector stands.
    pub(super) runs: [Run; BATCH],
}

/// Which datagrams make up one message.
#[derive(Clone, Copy)]
pub(super) struct Run {
    pub(super) first: usize,
    pub(super) count: usize,
}

// SAFETY: the raw pointers in `vectors` and `messages` are rewritten at the start of every call
// and never read by anything but that call's system call; between calls they are dead.
unsafe impl Send for Scratch {}

impl std::fmt::Debug for Scratch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Scratch")
    }
}

impl Scratch {
    fn new() -> Box<Self> {
        // SAFETY: all fields are plain C data for which all zeros is a valid value.
        Box::new(unsafe { std::mem::zeroed() })
    }
}

impl Batcher {
    pub(super) fn new(segmenting: Segmenting) -> Self {
        Self {
            scratch: Scratch::new(),
            segmenting,
            counters: SendCounters::default(),
            receive_dropped: 0,
        }
    }

    /// For sockets that send no runs.
    pub(crate) fn without_runs() -> Self {
        Self::new(Segmenting::new(false))
    }

    /// One recvmmsg, the i-th datagram into the i-th room, up to [`BATCH`]. `each` is told i, what is known of that
    /// datagram, the size of those that it is a run of, or 0, and its bytes. Gives their number: 0 when nothing is there.
    pub(crate) fn receive<'a>(
        &mut self,
        socket: &Socket,
        rooms: impl Iterator<Item = &'a mut [u8]>,
        mut each: impl FnMut(usize, RecvMeta, usize, &[u8]),
    ) -> io::Result<usize> {
        let Scratch { names, vectors, controls, messages, .. } = &mut *self.scratch;
        let slots = names.iter_mut().zip(vectors.iter_mut()).zip(controls).zip(messages.iter_mut());
        let mut count = 0;
        for ((((name, vector), control), message), room) in slots.zip(rooms) {
            vector.iov_base = room.as_mut_ptr().cast();
            vector.iov_len = room.len();
            let header = &mut message.msg_hdr;
            header.msg_name = std::ptr::from_mut(name).cast();
            header.msg_namelen = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
            header.msg_iov = vector;
            header.msg_iovlen = 1;
            header.msg_control = control.0.as_mut_ptr().cast();
            header.msg_controllen = CONTROL as _;
            header.msg_flags = 0;
            message.msg_len = 0;
            count += 1;
        }
        // SAFETY: the first `count` headers were filled above with pointers into arrays of `self` and into rooms that are
        // borrowed for longer than this call; lengths match.
        let got = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                messages.as_mut_ptr(),
                count,
                libc::MSG_DONTWAIT as _,
                std::ptr::null_mut(),
            )
        };
        let Ok(got) = usize::try_from(got) else {
            let error = io::Error::last_os_error();
            return if is_transient(&error) { Ok(0) } else { Err(error) };
        };
        let filled = messages.iter().zip(names.iter()).zip(vectors.iter());
        for (i, ((message, name), vector)) in filled.enumerate().take(got) {
            let header = &message.msg_hdr;
            let (tos, size) = notes_of(header);
            let meta = RecvMeta {
                from: address_of(name).unwrap_or(RecvMeta::EMPTY.from),
                start: 0,
                len: message.msg_len as usize,
                truncated: header.msg_flags & libc::MSG_TRUNC != 0,
                tos,
            };
            // SAFETY: a room of this length, see above, whose borrow outlives the call and which nobody else holds.
            let room =
                unsafe { std::slice::from_raw_parts(vector.iov_base.cast::<u8>(), vector.iov_len) };
            each(i, meta, size, room.get(..meta.len).unwrap_or(room));
        }
        // What overflowed did so behind datagrams that filled all rooms.
        if got == count as usize {
            let dropped = dropped_at(socket);
            self.receive_dropped += u64::from(dropped.wrapping_sub(self.receive_dropped as u32));
        }
        Ok(got)
    }
}
