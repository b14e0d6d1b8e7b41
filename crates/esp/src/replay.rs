//! The anti-replay window of one inbound SA: RFC 6479's ring of blocks, with
//! one owner and no atomics.
//!
//! The ring holds [`RING_BITS`] bits; one block of them is always being
//! cleared, so the window proper is [`WINDOW`] numbers wide, the highest
//! included. Sequence numbers are 32 bits and never wrap (RFC 4303 §3.3.3).

use crate::reason::Reason;

const BLOCKS: usize = 32;
const BLOCK_BITS: u32 = 64;

/// Bits in the ring.
pub const RING_BITS: u32 = BLOCKS as u32 * BLOCK_BITS;

/// Width of the window: the highest number seen and those below it that can
/// still be told apart.
pub const WINDOW: u32 = RING_BITS - BLOCK_BITS;

/// Length of [`Window::to_bytes`].
pub const WINDOW_BYTES: usize = 4 + BLOCKS * 8;

/// An anti-replay window. Two are equal when they accept the same numbers.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    /// The highest number seen; 0 if none.
    top: u32,
    /// Bit `s % RING_BITS` says whether `s` was seen, for the numbers that the
    /// ring reaches.
    ring: [u64; BLOCKS],
}

impl Default for Window {
    fn default() -> Self {
        Self::new()
    }
}

impl PartialEq for Window {
    fn eq(&self, other: &Self) -> bool {
        // Bits left of the window are leftovers and mean nothing.
        self.top == other.top
            && (0..WINDOW.min(self.top))
                .all(|back| self.check(self.top - back) == other.check(other.top - back))
    }
}

impl Eq for Window {}

impl Window {
    /// A window that has seen nothing.
    #[must_use]
    pub const fn new() -> Self {
        Self { top: 0, ring: [0; BLOCKS] }
    }

    /// The highest number seen; 0 if none.
    #[must_use]
    pub const fn top(&self) -> u32 {
        self.top
    }

    /// Whether `seq` may still be accepted. Changes nothing: only a verified
    /// tag may (RFC 4303 §3.4.3), by [`Window::commit`].
    ///
    /// # Errors
    /// [`Reason::Replayed`] (also for 0, which is never sent: RFC 4303
    /// §3.3.3), or [`Reason::TooOld`].
    #[inline]
    pub fn check(&self, seq: u32) -> Result<(), Reason> {
        if seq == 0 {
            return Err(Reason::Replayed);
        }
        if seq > self.top {
            return Ok(());
        }
        if self.top - seq >= WINDOW {
            return Err(Reason::TooOld);
        }
        let (block, bit) = place(seq);
        match self.ring.get(block) {
            Some(block) if block & bit == 0 => Ok(()),
            _ => Err(Reason::Replayed),
        }
    }

    /// Marks `seq` as seen. To be called only after [`Window::check`] passed
    /// and the tag was verified.
    #[inline]
    pub fn commit(&mut self, seq: u32) {
        if seq > self.top {
            self.advance(seq);
        } else if self.top - seq >= WINDOW {
            // Its bit belongs to another number by now.
            return;
        }
        self.mark(seq);
    }

    /// Refuses everything at or below `top` from now on, whatever was seen:
    /// the rule after an unplanned takeover (ha.md, "Inbound windows").
    pub fn refuse_through(&mut self, top: u32) {
        if top >= self.top {
            self.top = top;
            self.ring = [u64::MAX; BLOCKS];
            // The block of `top` holds bits above `top`, which must be clear.
            // (Later blocks are cleared as the window reaches them.)
            let (block, bit) = place(top);
            if let Some(block) = self.ring.get_mut(block) {
                *block = bit | (bit - 1);
            }
            return;
        }
        for seq in self.left()..=top {
            self.mark(seq);
        }
    }

    /// Refuses from now on what either of the two refuses: after a split brain
    /// both instances may have accepted packets.
    pub fn merge(&mut self, other: &Self) {
        let mine = *self;
        if other.top > self.top {
            self.advance(other.top);
        }
        for seq in self.left()..=self.top {
            if mine.check(seq).is_err() || other.check(seq).is_err() {
                self.mark(seq);
            }
        }
    }

    /// The lowest number in the window, but not 0.
    fn left(&self) -> u32 {
        self.top.saturating_sub(WINDOW - 1).max(1)
    }

    /// Sets the bit of a number in the window.
    #[inline]
    fn mark(&mut self, seq: u32) {
        let (block, bit) = place(seq);
        if let Some(block) = self.ring.get_mut(block) {
            *block |= bit;
        }
    }

    /// The exact window, for the grant of a switchover: top and ring, big
    /// endian.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; WINDOW_BYTES] {
        let mut out = [0; WINDOW_BYTES];
        let (top, ring) = out.split_at_mut(4);
        top.copy_from_slice(&self.top.to_be_bytes());
        for (to, block) in ring.chunks_exact_mut(8).zip(&self.ring) {
            to.copy_from_slice(&block.to_be_bytes());
        }
        out
    }

    /// The window of [`Window::to_bytes`]; `None` for any other length.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; WINDOW_BYTES] = bytes.try_into().ok()?;
        let (top, ring) = bytes.split_first_chunk::<4>()?;
        let mut window = Self { top: u32::from_be_bytes(*top), ring: [0; BLOCKS] };
        for (block, from) in window.ring.iter_mut().zip(ring.chunks_exact(8)) {
            *block = u64::from_be_bytes(from.try_into().ok()?);
        }
        Some(window)
    }

    /// Moves the window up to `seq`, clearing the blocks it enters.
    #[inline]
    fn advance(&mut self, seq: u32) {
        let from = self.top / BLOCK_BITS;
        let entered = (seq / BLOCK_BITS - from).min(BLOCKS as u32);
        for step in 1..=entered {
            if let Some(block) = self.ring.get_mut(from.wrapping_add(step) as usize % BLOCKS) {
                *block = 0;
            }
        }
        self.top = seq;
    }
}

/// Block and bit of a number. The block is below `BLOCKS` by the modulus.
#[inline]
const fn place(seq: u32) -> (usize, u64) {
    ((seq / BLOCK_BITS) as usize % BLOCKS, 1 << (seq % BLOCK_BITS))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    /// The obvious window: remember everything.
    #[derive(Default)]
    struct Model {
        seen: BTreeSet<u32>,
        top: u32,
        refused: u32,
    }

    impl Model {
        fn check(&self, seq: u32) -> Result<(), Reason> {
            if seq == 0 {
                Err(Reason::Replayed)
            } else if seq <= self.top && self.top - seq >= WINDOW {
                Err(Reason::TooOld)
            } else if self.seen.contains(&seq) || seq <= self.refused {
                Err(Reason::Replayed)
            } else {
                Ok(())
            }
        }

        fn commit(&mut self, seq: u32) {
            self.seen.insert(seq);
            self.top = self.top.max(seq);
        }

        fn refuse_through(&mut self, top: u32) {
            self.refused = self.refused.max(top);
            self.top = self.top.max(top);
        }
    }

    #[derive(Debug, Clone)]
    enum Step {
        Near(i64),
        Far(u32),
        Refuse(i64),
        Transfer,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let w = i64::from(WINDOW);
        let step = prop_oneof![
            12 => (-w - 130..300i64).prop_map(Step::Near),
            6 => (-130..70i64).prop_map(Step::Near),
            1 => any::<u32>().prop_map(Step::Far),
            1 => (-w - 10..200i64).prop_map(Step::Refuse),
            1 => Just(Step::Transfer),
        ];
        prop::collection::vec(step, 0..400)
    }

    proptest! {
        #[test]
        fn agrees_with_a_set(start in prop_oneof![Just(0u32), 0..5000u32, u32::MAX - 5000..=u32::MAX], steps in steps()) {
            let mut window = Window::new();
            let mut model = Model::default();
            window.refuse_through(start);
            model.refuse_through(start);
            let near = |top: u32, d: i64| {
                u32::try_from((i64::from(top) + d).clamp(0, i64::from(u32::MAX))).unwrap()
            };
            for step in steps {
                match step {
                    Step::Near(_) | Step::Far(_) => {
                        let seq = match step {
                            Step::Near(d) => near(window.top(), d),
                            Step::Far(seq) => seq,
                            _ => unreachable!(),
                        };
                        let got = window.check(seq);
                        prop_assert_eq!(got, model.check(seq), "seq {}", seq);
                        if got.is_ok() {
                            window.commit(seq);
                            model.commit(seq);
                        }
                    }
                    Step::Refuse(d) => {
                        let top = near(window.top(), d);
                        window.refuse_through(top);
                        model.refuse_through(top);
                    }
                    Step::Transfer => {
                        let moved = Window::from_bytes(&window.to_bytes()).unwrap();
                        prop_assert_eq!(moved, window);
                        window = moved;
                    }
                }
                prop_assert_eq!(window.top(), model.top);
            }
        }
    }

    proptest! {
        #[test]
        fn merged_refuses_what_either_refuses(
            a in prop::collection::vec(1..5000u32, 0..200),
            b in prop::collection::vec(1..9000u32, 0..200),
        ) {
            let window = |seqs: &[u32]| {
                let mut window = Window::new();
                for seq in seqs {
                    window.commit(*seq);
                }
                window
            };
            let (a, b) = (window(&a), window(&b));
            for (mut merged, other) in [(a, b), (b, a)] {
                merged.merge(&other);
                for seq in 0..10_000 {
                    let want = a.check(seq).is_ok() && b.check(seq).is_ok();
                    prop_assert_eq!(merged.check(seq).is_ok(), want, "seq {}", seq);
                }
            }
        }
    }

    #[test]
    fn at_least_1024_wide_and_edges() {
        const { assert!(WINDOW >= 1024) };
        let mut window = Window::new();
        assert_eq!(window.check(0), Err(Reason::Replayed));
        window.commit(WINDOW);
        assert_eq!(window.check(1), Ok(()));
        window.commit(WINDOW + 1);
        assert_eq!(window.check(1), Err(Reason::TooOld));
        assert_eq!(window.check(2), Ok(()));
        window.commit(2);
        assert_eq!(window.check(2), Err(Reason::Replayed));
        window.commit(u32::MAX);
        assert_eq!(window.check(u32::MAX), Err(Reason::Replayed));
        assert_eq!(window.check(u32::MAX - WINDOW + 1), Ok(()));
        assert_eq!(window.check(u32::MAX - WINDOW), Err(Reason::TooOld));
    }

    #[test]
    fn other_lengths_are_no_window() {
        assert_eq!(Window::from_bytes(&[]), None);
        assert_eq!(Window::from_bytes(&[0; WINDOW_BYTES - 1]), None);
        assert_eq!(Window::from_bytes(&[0; WINDOW_BYTES + 1]), None);
        assert_eq!(Window::from_bytes(&Window::new().to_bytes()), Some(Window::new()));
    }

    #[test]
    fn different_windows_differ() {
        let mut a = Window::new();
        a.commit(70);
        let mut b = a;
        assert_eq!(a, b);
        b.commit(3);
        assert_ne!(a, b);
    }
}
