//! The order in which the kernel closes the descriptors of a process that was killed.
//!
//! It closes them one by one, the highest number first, and does not go on before one is done. A TUN interface or a packet
//! socket takes long, since its removal waits for every core. Who watches for a death by a closed socket waits just as
//! long, unless that socket comes first.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Above whatever a daemon opens otherwise; below the usual limit of 1,024.
const HIGH: i32 = 512;

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
}
