//! Terms of one endpoint: which one may be taken next, and what must be on disk before.
//!
//! ```text
//!   file says 40          next own term    reserved on disk
//!   ──────────┤·····│·····│·····│····· … ·····┤
//!            40    42    44    46            74      index 0: even terms, 16 ahead
//! ```
//! A term is taken only if it is at or below what the disk holds, so that a restart, which starts
//! above what the disk holds, never repeats one. Reserving runs ahead of use: no disk write lies on
//! the takeover path. Without a file the instance cannot know what it used before, so it waits
//! until it has heard the other (or has waited long enough) and starts 1,024 above the highest
//! number heard.

use crate::config::{TERM_BLOCK, TERM_FILE_LOST};
use crate::types::Term;

#[derive(Debug)]
pub(crate) struct Terms {
    index: u8,
    /// The highest term that was used, heard, or may have been used before our start.
    top: Term,
    /// The highest term of the other's knowledge; only counts while `lost`.
    theirs: Term,
    /// On disk.
    reserved: Term,
    /// Asked to be written.
    asked: Term,
    /// There was no file, and nothing has been decided yet.
    lost: bool,
}

impl Terms {
    pub(crate) fn new(index: u8, file: Option<Term>) -> Terms {
        let top = file.unwrap_or(Term::NONE);
        Terms { index, top, theirs: Term::NONE, reserved: top, asked: top, lost: file.is_none() }
    }

    /// A term in use or offered was heard.
    pub(crate) fn heard(&mut self, term: Term) {
        self.top = self.top.max(term);
    }

    /// The other's highest known term was heard.
    pub(crate) fn heard_top(&mut self, term: Term) {
        self.theirs = self.theirs.max(term);
    }

    /// There was contact, or enough waiting: an instance without a file now fixes where it starts.
    pub(crate) fn settle(&mut self) {
        if self.lost {
            self.lost = false;
            self.top = Term(self.top.max(self.theirs).0.saturating_add(TERM_FILE_LOST));
        }
    }

    /// What to write to disk now, if anything.
    pub(crate) fn reserve(&mut self) -> Option<Term> {
        if self.lost {
            return None;
        }
        let next = self.top.next_of(self.index).0;
        if self.asked.0 >= next.saturating_add(TERM_BLOCK) {
            return None;
        }
        // Our terms are every other number: a block of 16 spans 32.
        self.asked = Term(next.saturating_add(2 * TERM_BLOCK));
        Some(self.asked)
    }

    /// The disk holds this.
    pub(crate) fn reserved(&mut self, up_to: Term) {
        self.reserved = self.reserved.max(up_to.min(self.asked));
    }

    /// The next term, if it may be taken now.
    pub(crate) fn next(&self) -> Option<Term> {
        let next = self.top.next_of(self.index);
        self.may_take(next).then_some(next)
    }

    /// Whether a granted term may be taken now.
    pub(crate) fn may_take(&self, term: Term) -> bool {
        !self.lost && term > self.top && term <= self.reserved && term.index() == self.index
    }

    /// The highest number that this instance knows of, for the other to start above should it have
    /// lost its file.
    pub(crate) fn known(&self) -> Term {
        self.top.max(self.asked)
    }

    pub(crate) fn index(&self) -> u8 {
        self.index
    }

    pub(crate) fn top(&self) -> Term {
        self.top
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn never_above_the_disk_and_of_our_parity() {
        let mut terms = Terms::new(0, Some(Term(40)));
        assert_eq!(terms.next(), None, "40 may have been used, 42 is not on disk");
        assert_eq!(terms.reserve(), Some(Term(74)));
        assert_eq!(terms.reserve(), None, "asked once");
        assert_eq!(terms.next(), None);
        terms.reserved(Term(74));
        assert_eq!(terms.next(), Some(Term(42)));
        terms.heard(Term(57));
        assert_eq!(terms.next(), Some(Term(58)));
        assert_eq!(terms.reserve(), None, "half a block is left");
        terms.heard(Term(59));
        assert_eq!(terms.reserve(), Some(Term(92)));
        assert!(terms.may_take(Term(74)));
        assert!(!terms.may_take(Term(76)), "not on disk yet");
        assert!(!terms.may_take(Term(61)), "the other's parity");
        assert!(!terms.may_take(Term(58)), "not above what was heard");
    }

    #[test]
    fn a_lost_file_starts_1024_above_the_highest_heard() {
        let mut terms = Terms::new(1, None);
        terms.heard(Term(6));
        terms.heard_top(Term(40));
        assert_eq!(terms.reserve(), None, "nothing before contact");
        terms.settle();
        terms.settle();
        let up_to = terms.reserve().unwrap();
        terms.reserved(up_to);
        assert_eq!(terms.next(), Some(Term(1065)));
    }
}
