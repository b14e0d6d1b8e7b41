//! How soon the kernel closes a descriptor of a process that was killed.
//!
//! A table of descriptors is closed when the last thread that uses it has run its exit, which takes an ordinary thread on a
//! busy machine tens of milliseconds. Then they are closed one by one, the highest number first, and the next one waits: a
//! TUN interface or a packet socket takes long, since its removal waits for every core. Who watches for a death by a closed
//! socket waits just as long, unless that socket comes first ([`close_first`]) and a single thread of high priority has it
//! ([`own_table`] in all the others).

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::sys::check;

/// Above whatever a daemon opens otherwise; below the usual limit of 1,024.
pub const HIGH: i32 = 512;

/// Gives a descriptor a number so high that it is closed before all others when the process dies. Close-on-exec. Where the
/// limit of open files does not allow that, it keeps its number.
#[must_use]
pub fn close_first(fd: OwnedFd) -> OwnedFd {
    // SAFETY: F_DUPFD_CLOEXEC takes an open descriptor, which `fd` is, and a number; it touches no memory of ours.
    let high = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, HIGH) };
    if high < 0 {
        return fd;
    }
    // SAFETY: the kernel has just made this descriptor, and nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(high) }
}

/// Gives the calling thread, and those it starts, a table of descriptors of its own, with a copy of all but what
/// [`close_first`] has raised. For the start of a thread, and before whoever starts it opens anything more: what others open
/// from now on is not known in it, nor the reverse, so nothing that owns a younger descriptor may pass between them. A
/// descriptor that one of them closes stays open in the other's table until that thread ends.
pub fn own_table() -> io::Result<()> {
    let unshare = libc::CLOSE_RANGE_UNSHARE as libc::c_int;
    // SAFETY: integers only. The descriptors are closed in this thread's table alone, where nobody uses them: their owners
    // live in threads that keep the old one.
    check(unsafe { libc::close_range(HIGH.unsigned_abs(), u32::MAX, unshare) }).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    #[test]
    fn it_is_the_same_socket_with_a_high_number() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let high = close_first(ours.into());
        assert!(high.as_raw_fd() >= HIGH);
        let mut ours = UnixStream::from(high);
        theirs.write_all(b"x").unwrap();
        let mut byte = [0];
        ours.read_exact(&mut byte).unwrap();
        drop(ours);
        // The low number is gone as well, or this would wait for ever.
        assert_eq!(theirs.read(&mut byte).unwrap(), 0);
    }

    #[test]
    fn a_thread_with_its_own_table_holds_nothing_up() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let (low, mut peer_of_low) = UnixStream::pair().unwrap();
        let high = close_first(ours.into());
        let number = high.as_raw_fd();
        let (ready, begun) = std::sync::mpsc::channel();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let other = std::thread::spawn(move || {
            own_table().unwrap();
            // SAFETY: takes no pointer.
            let open = unsafe { libc::fcntl(number, libc::F_GETFD) } >= 0;
            (&low).write_all(b"x").unwrap();
            ready.send(open).unwrap();
            ended.recv().unwrap_err();
            drop(low);
        });
        assert!(!begun.recv().unwrap(), "it has what is to be closed first");
        peer_of_low.read_exact(&mut [0]).unwrap();
        drop(high);
        // At once, while the other thread lives.
        assert_eq!(theirs.read(&mut [0]).unwrap(), 0);
        drop(end);
        other.join().unwrap();
    }
}
