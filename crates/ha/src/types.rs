//! The small words of the pair protocol: ids, terms, positions, batches.
//!
//! Nothing here has behaviour beyond arithmetic and redaction. Values hold keys of established
//! SAs, so [`Batch`] wipes its memory and prints only counts.

use core::fmt;
use minicbor::{Decode, Encode};
use zeroize::Zeroizing;

/// One replicated value: the serialised state of one key, wiped when dropped.
pub type Value = Zeroizing<Vec<u8>>;

/// A dense index into [`crate::Config::endpoints`] (the same order on both instances).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EndpointId(pub u8);

/// A dense index into the configured pair links (the same order on both instances).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LinkId(pub u8);

/// The number of one acquisition of an endpoint. Its lowest bit names the instance that may take
/// it (`Term % 2 == index`), so two instances never take the same one. 0 means "none yet".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
#[cbor(transparent)]
pub struct Term(#[n(0)] pub u64);

impl Term {
    /// No term at all: nothing was ever acquired.
    pub const NONE: Term = Term(0);

    /// The index of the instance this term may belong to (0 or 1).
    #[must_use]
    pub fn index(self) -> u8 {
        (self.0 & 1) as u8
    }

    /// The lowest term above `self` that instance `index` may take. Never 0.
    #[must_use]
    pub fn next_of(self, index: u8) -> Term {
        let next = self.0.saturating_add(1);
        if (next & 1) as u8 == (index & 1) { Term(next) } else { Term(next.saturating_add(1)) }
    }
}

/// Drawn when an endpoint starts empty; two states of different lineage share no history.
/// 0 means "no state".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
#[cbor(transparent)]
pub struct Lineage(#[n(0)] pub u64);

impl Lineage {
    /// No state at all.
    pub const NONE: Lineage = Lineage(0);
}

/// How many records the log of an endpoint holds since its lineage began. Grows by one per record,
/// goes on across terms.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
#[cbor(transparent)]
pub struct Position(#[n(0)] pub u64);

/// Names one acknowledged side message; answered by [`crate::Event::SideAcked`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SideId(pub u64);

/// Names one [`crate::Event::Apply`]; given back to [`crate::Pair::applied`]. Grows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ApplyId(pub u64);

/// Names one attempt to bring the shadow in sync; given back to
/// [`crate::Pair::confirm_ceilings`], so that a late confirmation of an earlier attempt counts
/// for nothing. Grows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SyncId(pub u64);

/// One atomic record: what it sets, then what it removes. Every prefix of the log is a legal state.
#[derive(Default, PartialEq, Eq, Clone)]
pub struct Batch {
    /// Keys set, each with its whole new value.
    pub puts: Vec<(u64, Value)>,
    /// Keys removed. Removing what is absent is legal.
    pub deletes: Vec<u64>,
}

impl Batch {
    /// Nothing set and nothing removed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.puts.is_empty() && self.deletes.is_empty()
    }
}

impl fmt::Debug for Batch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let keys: Vec<u64> = self.puts.iter().map(|(key, _)| *key).collect();
        f.debug_struct("Batch")
            .field("puts", &format_args!("{keys:x?} → …"))
            .field("deletes", &format_args!("{:x?}", self.deletes))
            .finish()
    }
}

/// Bytes that only the gateway understands (final counters, windows): printed as their length.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Opaque(pub Vec<u8>);

impl fmt::Debug for Opaque {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "…{} bytes", self.0.len())
    }
}
