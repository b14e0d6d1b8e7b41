//! Whether runs of datagrams leave as one UDP_SEGMENT send: the rules, without a socket.

use std::io;

/// Refusals of one size in a row after which datagrams of that size are no longer joined. More than one, as the
/// address may have come between a refused run and its datagrams that then went one by one.
pub(super) const STRIKES: u8 = 3;

/// Whether runs are sent as one, and up to which size of datagram.
///
/// The kernel's words (net/ipv4/udp.c, udp_send_skb): EIO, no checksum offload on the way out, or IPsec of its own
/// there; EINVAL, later EMSGSIZE, a datagram that would not fit the interface's MTU, which by itself is sent in
/// fragments. EINVAL also stands for an address that is not on the host. So a refusal counts only when the same
/// datagram went by itself right after. Every other error (ENOBUFS, EAGAIN, EPERM …) is about the datagrams or the
/// moment, and says nothing about segmentation.
#[derive(Debug)]
pub(super) struct Segmenting {
    /// Datagrams shorter than this are joined; 0: none.
    pub(super) below: usize,
    refused_size: usize,
    pub(super) strikes: u8,
}

/// What a refused run may mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Doubt {
    /// Segmentation is not supported here.
    Support,
    /// Datagrams of this size cannot be segments here.
    Size,
}

impl Segmenting {
    pub(super) fn new(known: bool) -> Self {
        Self { below: if known { usize::MAX } else { 0 }, refused_size: 0, strikes: 0 }
    }

    pub(super) fn takes(&self, size: usize) -> bool {
        size < self.below
    }

    /// What an error of a run makes doubtful; `None` when it says nothing about runs.
    pub(super) fn doubt(error: &io::Error) -> Option<Doubt> {
        match error.raw_os_error() {
            Some(libc::EIO | libc::EOPNOTSUPP | libc::ENOPROTOOPT) => Some(Doubt::Support),
            Some(libc::EINVAL | libc::EMSGSIZE) => Some(Doubt::Size),
            _ => None,
        }
    }

    /// A run went.
    pub(super) fn went(&mut self, size: usize) {
        if size >= self.refused_size {
            self.strikes = 0;
        }
    }

    /// A run was refused, and its first datagram, of `size` bytes, went by itself. True when that changes what is
    /// joined from now on.
    pub(super) fn refused(&mut self, doubt: Doubt, size: usize) -> bool {
        match doubt {
            Doubt::Support => {
                self.below = 0;
                true
            }
            Doubt::Size => {
                if size != self.refused_size {
                    self.refused_size = size;
                    self.strikes = 0;
                }
                self.strikes += 1;
                if self.strikes < STRIKES {
                    return false;
                }
                self.strikes = 0;
                self.below = self.below.min(size);
                true
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_says_unsupported_ends_segmentation() {
        let doubt = |code| Segmenting::doubt(&io::Error::from_raw_os_error(code));
        for code in [libc::EIO, libc::EOPNOTSUPP, libc::ENOPROTOOPT] {
            assert_eq!(doubt(code), Some(Doubt::Support));
        }
        for code in [libc::EINVAL, libc::EMSGSIZE] {
            assert_eq!(doubt(code), Some(Doubt::Size));
        }
        for code in [
            libc::EAGAIN,
            libc::ENOBUFS,
            libc::ENOMEM,
            libc::ECONNREFUSED,
            libc::EPERM,
            libc::EACCES,
            libc::ENETUNREACH,
            libc::ENETDOWN,
        ] {
            assert_eq!(doubt(code), None, "{}", io::Error::from_raw_os_error(code));
        }
        let mut segmenting = Segmenting::new(true);
        // An address that came late: one refusal, then it works.
        for _ in 0..10 {
            assert!(!segmenting.refused(Doubt::Size, 1400));
            segmenting.went(1400);
        }
        assert!(segmenting.takes(1400));
        // Smaller runs that work meanwhile do not speak for the larger.
        for last in [false, false, true] {
            assert_eq!(segmenting.refused(Doubt::Size, 1480), last);
            segmenting.went(1400);
        }
        assert!(segmenting.takes(1479) && !segmenting.takes(1480));
        assert!(segmenting.refused(Doubt::Support, 100));
        assert!(!segmenting.takes(1));
    }
}
