//! Whether runs of datagrams leave as one UDP_SEGMENT send: the rules, without a socket.

use std::io;

/// Refusals of one size in a row after which datagrams of that size are no longer joined. More than one, as the
/// address may have come between a refused run and its datagrams that then went one by one.
pub(super) const STRIKES: u8 = 3;

/// Batches that a verdict holds at first; each confirmation of it doubles that, up to [`LONGEST`].
const FIRST: u32 = 1 << 10;
/// About 7 s at 10,000 batches a second. A trial costs a system call or, for a size, very few.
const LONGEST: u32 = 1 << 16;

/// Whether runs are sent as one, and up to which size of datagram.
///
/// The kernel's words (net/ipv4/udp.c, udp_send_skb): EIO, no checksum offload on the way out, or IPsec of its own
/// there; EINVAL, later EMSGSIZE, a datagram that would not fit the interface's MTU, which by itself is sent in
/// fragments. EINVAL also stands for an address that is not on the host. So a refusal counts only when the same
/// datagram went by itself right after. Every other error (ENOBUFS, EAGAIN, EPERM …) is about the datagrams or the
/// moment, and says nothing about segmentation.
///
/// A verdict is about the way out as it was: offloads are switched on again, an MTU grows, a route moves. So it lapses
/// after a number of batches (no clock is read for it), and the next run that it forbade is its trial:
///
/// ```text
///           refused (a size: STRIKES times)           `hold` batches went by
///   no verdict ─────────────────────► held ◄─────────────────────────► on trial
///       ▲                                       refused once: hold × 2     │
///       └──────────────────────────────────────────────────────────────────┘ such a run went
/// ```
#[derive(Debug)]
pub(super) struct Segmenting {
    /// Datagrams shorter than this are joined; 0: none.
    pub(super) below: usize,
    refused_size: usize,
    pub(super) strikes: u8,
    /// What `below` is, or was until it lapsed: no run of datagrams as long as this goes.
    verdict: Option<usize>,
    /// For how many batches a verdict holds; without one, how many must go well until that is forgotten.
    hold: u32,
    /// Batches since the verdict, or since it ended.
    batches: u32,
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
    /// `known`: the kernel knows UDP_SEGMENT. Where it does not, nothing is ever joined.
    pub(super) fn new(known: bool) -> Self {
        Self {
            below: if known { usize::MAX } else { 0 },
            refused_size: 0,
            strikes: 0,
            verdict: None,
            hold: FIRST,
            batches: 0,
        }
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

    fn on_trial(&self) -> bool {
        self.verdict.is_some() && self.below == usize::MAX
    }

    /// A batch is about to be sent.
    pub(super) fn batch(&mut self) {
        self.batches = self.batches.saturating_add(1);
        if self.batches < self.hold {
            return;
        }
        match self.verdict {
            Some(_) => self.below = usize::MAX,
            // So long without a verdict: the next one begins anew. Until then a way out that changes to and fro is
            // judged, and spoken of, ever more seldom.
            None => self.hold = FIRST,
        }
    }

    /// A run went. True when that ends a verdict.
    pub(super) fn went(&mut self, size: usize) -> bool {
        if size >= self.refused_size {
            self.strikes = 0;
        }
        let ends = self.on_trial() && self.verdict.is_some_and(|verdict| size >= verdict);
        if ends {
            self.verdict = None;
            self.hold = self.hold.saturating_mul(2).min(LONGEST);
            self.batches = 0;
        }
        ends
    }

    /// A run was refused, and its first datagram, of `size` bytes, went by itself. True when that changes what is
    /// joined from now on.
    pub(super) fn refused(&mut self, doubt: Doubt, size: usize) -> bool {
        let (verdict, strikes) = match doubt {
            Doubt::Support => (0, 1),
            Doubt::Size => (size, STRIKES),
        };
        if self.verdict.is_some_and(|held| held <= verdict) {
            // What is known. Runs that were made up before the verdict, of the same batch, are no trial of it.
            if self.on_trial() {
                self.hold = self.hold.saturating_mul(2).min(LONGEST);
                self.pronounce(self.verdict);
            }
            return false;
        }
        if size != self.refused_size {
            self.refused_size = size;
            self.strikes = 0;
        }
        self.strikes += 1;
        if self.strikes < strikes {
            return false;
        }
        self.pronounce(Some(verdict));
        true
    }

    fn pronounce(&mut self, verdict: Option<usize>) {
        self.strikes = 0;
        self.batches = 0;
        self.verdict = verdict;
        self.below = verdict.unwrap_or(usize::MAX);
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
    /// So many batches, none of which had a run.
    fn pass(segmenting: &mut Segmenting, batches: u32) {
        (0..batches).for_each(|_| segmenting.batch());
    }

    #[test]
    fn a_verdict_lapses_and_is_confirmed_by_one_trial_or_ends() {
        let mut segmenting = Segmenting::new(true);
        assert!(segmenting.refused(Doubt::Support, 1400));
        assert!(!segmenting.refused(Doubt::Support, 1400), "the same batch: said once");
        let mut hold = FIRST;
        for _ in 0..8 {
            pass(&mut segmenting, hold - 1);
            assert!(!segmenting.takes(1), "held for {hold} batches");
            pass(&mut segmenting, 1);
            assert!(segmenting.takes(1400), "on trial after {hold} batches");
            assert!(!segmenting.refused(Doubt::Support, 1400), "no news");
            assert!(!segmenting.takes(1));
            hold = (2 * hold).min(LONGEST);
        }
        assert_eq!(hold, LONGEST);
        pass(&mut segmenting, LONGEST);
        assert!(segmenting.went(1400), "it works again, and that is news");
        assert!(!segmenting.went(1400), "once");
        pass(&mut segmenting, 3 * LONGEST);
        assert!(segmenting.takes(1400));
        // After so long a time the next verdict begins with a short hold.
        assert!(segmenting.refused(Doubt::Support, 1400));
        pass(&mut segmenting, FIRST);
        assert!(segmenting.takes(1400));
    }

    #[test]
    fn a_size_is_tried_again_by_runs_of_that_size_only() {
        let mut segmenting = Segmenting::new(true);
        for last in [false, false, true] {
            assert_eq!(segmenting.refused(Doubt::Size, 1480), last);
        }
        pass(&mut segmenting, FIRST);
        assert!(segmenting.takes(1500));
        assert!(!segmenting.went(1400), "says nothing of 1480");
        assert!(!segmenting.refused(Doubt::Size, 1500));
        assert!(segmenting.takes(1479) && !segmenting.takes(1480), "one refusal was enough");
        pass(&mut segmenting, 2 * FIRST);
        assert!(segmenting.went(1480));
        // A way that changes to and fro is spoken of ever more seldom.
        assert!(segmenting.refused(Doubt::Support, 1480));
        pass(&mut segmenting, 4 * FIRST - 1);
        assert!(!segmenting.takes(1));
        pass(&mut segmenting, 1);
        assert!(segmenting.went(1) && segmenting.takes(1480));
    }

    #[test]
    fn what_the_kernel_does_not_know_is_never_tried() {
        let mut segmenting = Segmenting::new(false);
        pass(&mut segmenting, 2 * LONGEST);
        assert!(!segmenting.takes(1));
    }
}
