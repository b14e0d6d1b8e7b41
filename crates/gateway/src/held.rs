//! Commit before send (ha.md): what waits for the record it depends on.
//!
//! ```text
//!   ike step ──► record appended at position P ──► [ P | datagrams, SAs to switch to ] ──► released when the
//!                                                    shadow has acknowledged P, or the owner is solo
//! ```
//!
//! The queue is ordered: a step that changed nothing (a retransmission of committed bytes) still waits for every
//! record before it, so the peer sees our datagrams in the order in which they were decided. Its length is bounded by
//! time, since `ha` goes solo when acknowledgements lag 500 ms, and for what needs no record also by number.

use std::collections::VecDeque;

use wire::id::EspSpi;

/// Steps that wait, from which on those without a record (answers that are repeated, cookies, refusals) are dropped: who
/// asked will ask again, and a flood of such requests fills no memory.
const WITHOUT_RECORD_MAX: usize = 1024;

/// What one committed step sets free.
#[derive(Debug, Default)]
pub(crate) struct Release {
    /// Datagrams, in order.
    pub(crate) transmits: Vec<ike::Transmit>,
    /// Child SAs (by our inbound SPI) whose outbound half may now be used.
    pub(crate) use_outbound: Vec<EspSpi>,
}

/// Steps of one endpoint that wait for their records.
#[derive(Debug, Default)]
pub(crate) struct Held {
    queue: VecDeque<(u64, Release)>,
}

impl Held {
    /// Queues a step behind `position`, the newest record that it or an earlier step appended.
    pub(crate) fn push(&mut self, position: u64, release: Release) {
        debug_assert!(
            self.queue.back().is_none_or(|(last, _)| *last <= position),
            "positions only grow"
        );
        let has_record = self.queue.back().is_none_or(|(last, _)| *last < position);
        if has_record || !release.use_outbound.is_empty() || self.queue.len() < WITHOUT_RECORD_MAX {
            self.queue.push_back((position, release));
        }
    }

    /// The next step whose record is committed.
    pub(crate) fn pop(&mut self, committed: u64) -> Option<Release> {
        match self.queue.front() {
            Some((position, _)) if *position <= committed => {
                self.queue.pop_front().map(|(_, release)| release)
            }
            _ => None,
        }
    }

    /// Whether nothing waits: what a grant and `synced` need.
    pub(crate) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Ownership was lost: the new owner answers for itself. Returns the Child SAs whose outbound half our state says is
    /// in use, since a shadow's shard needs no commitment for that.
    pub(crate) fn abandon(&mut self) -> Vec<EspSpi> {
        self.queue.drain(..).flat_map(|(_, release)| release.use_outbound).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(spi: u32) -> Release {
        Release { use_outbound: vec![EspSpi(spi)], ..Release::default() }
    }

    #[test]
    fn nothing_leaves_before_its_record() {
        let mut held = Held::default();
        held.push(3, step(1));
        held.push(3, step(2));
        held.push(4, step(3));
        assert!(held.pop(2).is_none());
        assert_eq!(held.pop(3).unwrap().use_outbound, [EspSpi(1)]);
        assert_eq!(held.pop(3).unwrap().use_outbound, [EspSpi(2)]);
        assert!(held.pop(3).is_none(), "position 4 is not committed");
        assert!(!held.is_empty());
        assert_eq!(held.abandon(), [EspSpi(3)]);
        assert!(held.is_empty() && held.pop(9).is_none());
    }

    // security.md, statement 11.
    #[test]
    fn what_needs_no_record_is_bounded() {
        let mut held = Held::default();
        held.push(3, Release::default());
        for _ in 0..2 * WITHOUT_RECORD_MAX {
            held.push(3, Release::default());
        }
        assert_eq!(held.queue.len(), WITHOUT_RECORD_MAX);
        // A record's own step always waits, and so does what the shards wait for.
        held.push(4, Release::default());
        held.push(4, step(1));
        assert_eq!(held.queue.len(), WITHOUT_RECORD_MAX + 2);
    }
}
