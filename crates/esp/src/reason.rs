//! Why a packet was dropped, and how often. Every drop has a reason
//! (dataplane.md), and every reason has one counter.

/// Why a packet was dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Reason {
    /// Outbound: not an IPv4 or IPv6 packet, or cut short.
    MalformedInner,
    /// Outbound: sealed it would not fit its slot.
    TooLong,
    /// Outbound: no policy covers it.
    NoPolicy,
    /// Outbound: a policy covers it, but no SA is up.
    NoSa,
    /// Outbound: the SA stands at the ceiling of its lease.
    LeaseExhausted,
    /// Outbound: the SA has no sequence number, IV or term left.
    SaExhausted,
    /// The endpoint is not ours, and this is not steered.
    NotOwner,
    /// The endpoint is not ours, and the packet was steered once already.
    SteeredTwice,
    /// The fence of the endpoint had run out.
    Fenced,
    /// The endpoint's queue was full while it held packets.
    QueueFull,
    /// Inbound: too short for ESP, or not a multiple of four bytes.
    MalformedEsp,
    /// Inbound: no SA has this SPI.
    UnknownSpi,
    /// Inbound: the sequence number was seen before, or is zero.
    Replayed,
    /// Inbound: the sequence number is left of the window.
    TooOld,
    /// Inbound: the tag is wrong.
    NotAuthentic,
    /// Inbound: opened, but the padding is not RFC 4303's.
    BadPadding,
    /// Inbound: opened; a dummy packet (next header 59), as it should be.
    Dummy,
    /// Inbound: opened, but neither IPv4 nor IPv6 inside.
    NextHeader,
    /// Inbound: opened, but the inner packet is malformed or cut short.
    BadInner,
    /// Inbound: opened, but outside the SA's selectors.
    Selectors,
    /// Inbound: congestion met on the way of a packet that cannot carry it.
    Congestion,
    /// Workers handed it on to each other, without one that could deal with it.
    HandedTooOften,
    /// Nobody asked the shard about this slot; a bug in the caller.
    Unjudged,
}

impl Reason {
    /// All of them, in the order of their counters.
    pub const ALL: [Self; 23] = [
        Self::MalformedInner,
        Self::TooLong,
        Self::NoPolicy,
        Self::NoSa,
        Self::LeaseExhausted,
        Self::SaExhausted,
        Self::NotOwner,
        Self::SteeredTwice,
        Self::Fenced,
        Self::QueueFull,
        Self::MalformedEsp,
        Self::UnknownSpi,
        Self::Replayed,
        Self::TooOld,
        Self::NotAuthentic,
        Self::BadPadding,
        Self::Dummy,
        Self::NextHeader,
        Self::BadInner,
        Self::Selectors,
        Self::Congestion,
        Self::HandedTooOften,
        Self::Unjudged,
    ];

    /// A short name in snake case, for status, metrics and logs.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::MalformedInner => "malformed_inner",
            Self::TooLong => "too_long",
            Self::NoPolicy => "no_policy",
            Self::NoSa => "no_sa",
            Self::LeaseExhausted => "lease_exhausted",
            Self::SaExhausted => "sa_exhausted",
            Self::NotOwner => "not_owner",
            Self::SteeredTwice => "steered_twice",
            Self::Fenced => "fenced",
            Self::QueueFull => "queue_full",
            Self::MalformedEsp => "malformed_esp",
            Self::UnknownSpi => "unknown_spi",
            Self::Replayed => "replayed",
            Self::TooOld => "too_old",
            Self::NotAuthentic => "not_authentic",
            Self::BadPadding => "bad_padding",
            Self::Dummy => "dummy",
            Self::NextHeader => "next_header",
            Self::BadInner => "bad_inner",
            Self::Selectors => "selectors",
            Self::Congestion => "congestion",
            Self::HandedTooOften => "handed_too_often",
            Self::Unjudged => "unjudged",
        }
    }
}

/// What a shard has done since it was made. Only grows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stats {
    /// Packets sealed and to be sent.
    pub sealed: u64,
    /// Bytes of inner packets sealed.
    pub sealed_bytes: u64,
    /// Packets opened and to be delivered.
    pub opened: u64,
    /// Bytes of inner packets opened.
    pub opened_bytes: u64,
    /// Packets handed to the other instance.
    pub steered: u64,
    /// Packets put into a queue.
    pub held: u64,
    /// Packets handed to another worker.
    pub handed: u64,
    /// Calls in which at least one packet was dropped by a fence.
    pub fenced_batches: u64,
    drops: [u64; Reason::ALL.len()],
}

impl Stats {
    /// Packets dropped for one reason.
    #[must_use]
    pub fn dropped(&self, reason: Reason) -> u64 {
        self.drops.get(reason as usize).copied().unwrap_or(0)
    }

    /// Packets dropped for any reason.
    #[must_use]
    pub fn dropped_in_all(&self) -> u64 {
        self.drops.iter().sum()
    }

    /// The reasons that occurred, with their counts.
    pub fn drops(&self) -> impl Iterator<Item = (Reason, u64)> + '_ {
        Reason::ALL.into_iter().zip(self.drops).filter(|(_, count)| *count > 0)
    }

    /// Adds what another shard of the same instance has done.
    pub fn add(&mut self, other: &Self) {
        let Self {
            sealed,
            sealed_bytes,
            opened,
            opened_bytes,
            steered,
            held,
            handed,
            fenced_batches,
            drops,
        } = other;
        self.sealed += sealed;
        self.sealed_bytes += sealed_bytes;
        self.opened += opened;
        self.opened_bytes += opened_bytes;
        self.steered += steered;
        self.held += held;
        self.handed += handed;
        self.fenced_batches += fenced_batches;
        for (ours, theirs) in self.drops.iter_mut().zip(drops) {
            *ours += theirs;
        }
    }

    pub(crate) fn count_drop(&mut self, reason: Reason) {
        if let Some(count) = self.drops.get_mut(reason as usize) {
            *count += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_its_own_counter_and_name() {
        let mut stats = Stats::default();
        for (at, reason) in Reason::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, at);
            for _ in 0..=at {
                stats.count_drop(reason);
            }
        }
        for (at, reason) in Reason::ALL.into_iter().enumerate() {
            assert_eq!(stats.dropped(reason), at as u64 + 1);
            assert_eq!(Reason::ALL.iter().filter(|r| r.name() == reason.name()).count(), 1);
        }
        assert_eq!(stats.drops().count(), Reason::ALL.len());
        assert_eq!(stats.dropped_in_all(), (1..=Reason::ALL.len() as u64).sum());
    }
}
