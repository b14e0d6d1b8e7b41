//! Sequence leases of one endpoint's Child SAs (ha.md, "ESP counters").
//!
//! ```text
//!  owner                                         shadow
//!  shard: half of the lease is used
//!    LeaseLow ──► ask(next) ── Side::Ceilings ──► heard(): kept, told to the shard, which would
//!                                                 start there if it became owner
//!  shard ◄── Lease{ceiling} ◄── SideAcked ◄───── acknowledged by `ha`
//! ```
//!
//! A ceiling never goes down, and means "first number not to be used". When an owner comes to depend on a shadow
//! again (syncing), every ceiling it holds is said anew, and the shard asks for more where it has outrun its own.
//!
//! A shadow also keeps the window tops that it heard: they too may overtake the record that brings their SA, and an SA
//! that stays idle has its top said once.

use std::collections::BTreeMap;

use wire::id::EspSpi;

use crate::peer_message::{Ceiling, MAX_ENTRIES};

#[derive(Debug, Clone, Copy)]
struct Lease {
    /// Acknowledged by the shadow (owner), or heard from the owner (shadow).
    ceiling: u64,
    /// On its way to the shadow.
    asked: u64,
    /// Shadow: the highest window top heard from the owner.
    top: u32,
}

/// Leases by our inbound SPI, and what is on its way.
#[derive(Debug, Default)]
pub(crate) struct Leases {
    sas: BTreeMap<EspSpi, Lease>,
    outstanding: BTreeMap<ha::SideId, Vec<Ceiling>>,
}

impl Leases {
    /// A new Child SA: both instances derive its first lease from its record, so it needs no message.
    /// Returns its ceiling, which is higher if a later lease overtook the record.
    pub(crate) fn install(&mut self, spi_in: EspSpi) -> u64 {
        self.raise(spi_in, esp::INITIAL_CEILING)
    }

    /// A Child SA is gone.
    pub(crate) fn remove(&mut self, spi_in: EspSpi) {
        self.sas.remove(&spi_in);
    }

    /// The ceiling is at least this (heard from the owner, granted, or taken over). Returns it.
    pub(crate) fn raise(&mut self, spi_in: EspSpi, ceiling: u64) -> u64 {
        let lease = self.sas.entry(spi_in).or_insert(Lease { ceiling, asked: 0, top: 0 });
        lease.ceiling = lease.ceiling.max(ceiling);
        lease.ceiling
    }

    /// Shadow: the owner has accepted numbers up to this one.
    pub(crate) fn heard_top(&mut self, spi_in: EspSpi, top: u32) {
        let lease = self.sas.entry(spi_in).or_insert(Lease { ceiling: 0, asked: 0, top });
        lease.top = lease.top.max(top);
    }

    /// Shadow: the highest top heard so far; 0 if none was.
    pub(crate) fn top(&self, spi_in: EspSpi) -> u32 {
        self.sas.get(&spi_in).map_or(0, |lease| lease.top)
    }

    /// Owner: the next lease of an SA whose shard has this ceiling, unless one as good is on its way. What was heard as
    /// a shadow may be higher than what a grant allows: the former owner had no acknowledgement, and does not count on it.
    pub(crate) fn ask(
        &mut self,
        spi_in: EspSpi,
        next_seq: u64,
        has: u64,
        rate_per_s: u64,
    ) -> Option<Ceiling> {
        let lease = self.sas.get_mut(&spi_in)?;
        let ceiling = esp::ceiling_for(next_seq, rate_per_s);
        let enough = next_seq.saturating_add((ceiling - next_seq.min(ceiling)) / 2);
        if lease.asked > enough || ceiling <= has {
            return None;
        }
        lease.asked = ceiling;
        Some(Ceiling { spi_in: spi_in.0, ceiling })
    }

    /// Owner, syncing: every ceiling as it stands, in messages of bounded size.
    pub(crate) fn say_all(&mut self) -> Vec<Vec<Ceiling>> {
        self.void();
        let all: Vec<Ceiling> = self
            .sas
            .iter()
            .map(|(spi_in, lease)| Ceiling { spi_in: spi_in.0, ceiling: lease.ceiling })
            .collect();
        all.chunks(MAX_ENTRIES).map(<[Ceiling]>::to_vec).collect()
    }

    /// A message with these ceilings left.
    pub(crate) fn sent(&mut self, id: ha::SideId, ceilings: Vec<Ceiling>) {
        self.outstanding.insert(id, ceilings);
    }

    /// A message with these ceilings could not leave: they may be asked for again.
    pub(crate) fn unsaid(&mut self, ceilings: &[Ceiling]) {
        for ceiling in ceilings {
            if let Some(lease) = self.sas.get_mut(&EspSpi(ceiling.spi_in)) {
                lease.asked = 0;
            }
        }
    }

    /// The shadow holds a message: its ceilings may be used from now on.
    pub(crate) fn acked(&mut self, id: ha::SideId) -> Vec<Ceiling> {
        let ceilings = self.outstanding.remove(&id).unwrap_or_default();
        for acked in &ceilings {
            if self.sas.contains_key(&EspSpi(acked.spi_in)) {
                self.raise(EspSpi(acked.spi_in), acked.ceiling);
            }
        }
        ceilings
    }

    /// Whether an SA is this endpoint's.
    pub(crate) fn knows(&self, spi_in: EspSpi) -> bool {
        self.sas.contains_key(&spi_in)
    }

    /// Whether every asked lease was acknowledged.
    pub(crate) fn settled(&self) -> bool {
        self.outstanding.is_empty()
    }

    /// Nobody will acknowledge what is on its way.
    pub(crate) fn void(&mut self) {
        self.outstanding.clear();
        for lease in self.sas.values_mut() {
            lease.asked = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPI: EspSpi = EspSpi(0x0010_0001);
    const HALF: u64 = esp::INITIAL_CEILING / 2;

    #[test]
    fn a_lease_is_asked_once_and_used_when_acknowledged() {
        let mut leases = Leases::default();
        assert_eq!(leases.install(SPI), esp::INITIAL_CEILING);
        let asked = leases.ask(SPI, HALF, esp::INITIAL_CEILING, 0).unwrap();
        assert!(asked.ceiling > esp::INITIAL_CEILING);
        assert!(leases.ask(SPI, HALF + 10, esp::INITIAL_CEILING, 0).is_none(), "one is on its way");
        leases.sent(ha::SideId(1), vec![asked]);
        assert!(!leases.settled());
        assert_eq!(leases.acked(ha::SideId(1)), [asked]);
        assert!(leases.settled());
        assert!(leases.acked(ha::SideId(1)).is_empty(), "an acknowledgement counts once");
        assert_eq!(leases.say_all(), [[asked]]);
    }

    #[test]
    fn a_lease_may_overtake_its_record_and_never_goes_down() {
        let mut leases = Leases::default();
        leases.raise(SPI, 3 * esp::INITIAL_CEILING);
        assert_eq!(leases.install(SPI), 3 * esp::INITIAL_CEILING);
        assert_eq!(leases.raise(SPI, 5), 3 * esp::INITIAL_CEILING);
    }

    #[test]
    fn a_top_may_overtake_its_record_and_goes_with_its_sa() {
        let mut leases = Leases::default();
        assert_eq!(leases.top(SPI), 0);
        leases.heard_top(SPI, 40);
        leases.heard_top(SPI, 7);
        assert_eq!(leases.install(SPI), esp::INITIAL_CEILING);
        assert_eq!(leases.top(SPI), 40);
        leases.remove(SPI);
        leases.install(SPI);
        assert_eq!(leases.top(SPI), 0);
    }

    #[test]
    fn a_void_request_is_asked_again() {
        let mut leases = Leases::default();
        leases.install(SPI);
        let asked = leases.ask(SPI, HALF, esp::INITIAL_CEILING, 0).unwrap();
        leases.sent(ha::SideId(1), vec![asked]);
        leases.void();
        assert!(leases.settled());
        assert!(leases.acked(ha::SideId(1)).is_empty(), "the link it was sent on is gone");
        assert_eq!(leases.ask(SPI, HALF, esp::INITIAL_CEILING, 0), Some(asked));
    }

    #[test]
    fn what_could_not_be_said_is_asked_again() {
        let mut leases = Leases::default();
        leases.install(SPI);
        let asked = leases.ask(SPI, HALF, esp::INITIAL_CEILING, 0).unwrap();
        leases.unsaid(&[asked]);
        assert_eq!(leases.ask(SPI, HALF, esp::INITIAL_CEILING, 0), Some(asked));
        leases.unsaid(&[Ceiling { spi_in: 7, ceiling: 1 }]);
        assert!(
            leases.ask(SPI, HALF, esp::INITIAL_CEILING, 0).is_none(),
            "another's word changes nothing"
        );
    }

    // Simulation, seed 524 of its time: the grant came while a lease was on its way, and the new owner never sent again.
    #[test]
    fn what_was_heard_and_not_granted_is_asked_for() {
        let mut leases = Leases::default();
        leases.install(SPI);
        leases.raise(SPI, 2 * esp::INITIAL_CEILING);
        let granted = esp::INITIAL_CEILING;
        let asked = leases.ask(SPI, granted, granted, 0).unwrap();
        assert_eq!(asked.ceiling, esp::ceiling_for(granted, 0));
        assert!(leases.ask(SPI, granted, granted, 0).is_none(), "one is on its way");
    }

    #[test]
    fn the_end_of_the_numbers_is_never_passed() {
        let mut leases = Leases::default();
        leases.install(SPI);
        let end = leases.ask(SPI, u64::from(u32::MAX) - 5, HALF, 1 << 40).unwrap().ceiling;
        assert_eq!(end, 1 << 32);
    }
}
