//! Invariant 6: which tunnels an instance's shard uses, by the commands it was given, and whether a flow may change its
//! tunnel. All of it from outside: packets are opened with the keys that were installed, the shard is asked nothing.
//!
//! A move is allowed if the tunnel left is lost or the one taken is new, as the instances see it that the packet passed.
//! A tunnel counts as lost or new for [`SURE`] after each change: so long a packet may be under way between the choice
//! and the wire.

use std::collections::{BTreeMap, HashMap};

use crypto::aead::AeadKey;
use esp::Command;
use wire::id::{EspSpi, SpiLayout};

use crate::checks::hash;
use crate::clock::{MS, Nanos};
use crate::scene::ENDPOINTS;
use crate::traffic::{self, Inner};

/// Longer than any packet waits inside an instance or between two that may still send.
pub const SURE: Nanos = 150 * MS;

/// A tunnel: peer and endpoint.
pub type Tunnel = (usize, usize);

#[derive(Debug)]
struct Known {
    key: u64,
    tunnel: Tunnel,
    used: bool,
}

/// What a command changes in a view.
#[derive(Debug)]
pub enum Change {
    /// An SA is there.
    Install(u32, u64, Tunnel),
    /// It is in outbound use.
    Use(u32),
    /// It is gone.
    Remove(u32),
}

impl Change {
    /// What a command to an instance's shard changes, if anything.
    #[must_use]
    pub fn of(command: &Command) -> Option<Self> {
        match command {
            Command::Install(sa) => {
                let tunnel = (usize::from(sa.connection.0), usize::from(sa.endpoint.0));
                Some(Self::Install(sa.spi_in.0, hash(sa.keymat_out.expose()), tunnel))
            }
            Command::UseOutbound { spi_in } => Some(Self::Use(spi_in.0)),
            Command::Remove { spi_in } => Some(Self::Remove(spi_in.0)),
            _ => None,
        }
    }
}

/// The tunnels that one shard uses.
#[derive(Debug, Default)]
pub struct View {
    sas: BTreeMap<u32, Known>,
    changed: BTreeMap<Tunnel, Nanos>,
}

impl View {
    /// A command was carried out. The tunnel that came to life thereby, or was lost.
    pub fn note(&mut self, now: Nanos, change: Change) -> Option<(Tunnel, bool)> {
        let (spi, tunnel) = match &change {
            Change::Install(spi, _, tunnel) => (*spi, Some(*tunnel)),
            Change::Use(spi) | Change::Remove(spi) => (*spi, None),
        };
        let tunnel = tunnel.or(self.sas.get(&spi).map(|known| known.tunnel))?;
        let lived = self.lives(tunnel);
        match change {
            Change::Install(spi, key, tunnel) => {
                let place = |spi| {
                    let at = SpiLayout::of(EspSpi(spi))?;
                    Some((at.instance(), at.worker(), at.slot()))
                };
                // The shard took it, so what another life chose there is gone.
                let gone: Vec<u32> = self
                    .sas
                    .keys()
                    .copied()
                    .filter(|s| *s != spi && place(*s).is_some_and(|at| Some(at) == place(spi)))
                    .collect();
                for spi in gone {
                    self.note(now, Change::Remove(spi));
                }
                if self.sas.get(&spi).is_none_or(|known| known.key != key) {
                    self.sas.insert(spi, Known { key, tunnel, used: false });
                }
            }
            Change::Use(spi) => {
                if let Some(known) = self.sas.get_mut(&spi) {
                    known.used = true;
                }
            }
            Change::Remove(spi) => {
                self.sas.remove(&spi);
            }
        }
        let lives = self.lives(tunnel);
        (lives != lived).then(|| {
            self.changed.insert(tunnel, now);
            (tunnel, lives)
        })
    }

    /// Whether an SA may seal.
    #[must_use]
    pub fn uses(&self, spi_in: u32) -> bool {
        self.sas.get(&spi_in).is_some_and(|known| known.used)
    }

    /// Whether some SA of a tunnel may seal.
    #[must_use]
    pub fn lives(&self, tunnel: Tunnel) -> bool {
        self.sas.values().any(|known| known.used && known.tunnel == tunnel)
    }

    /// Whether that has been so for [`SURE`].
    #[must_use]
    pub fn is_sure(&self, now: Nanos, tunnel: Tunnel) -> bool {
        self.lives(tunnel) && self.is_steady(now, tunnel)
    }

    /// Whether it has not changed for [`SURE`].
    #[must_use]
    pub fn is_steady(&self, now: Nanos, tunnel: Tunnel) -> bool {
        self.changed.get(&tunnel).is_none_or(|at| now > at + SURE)
    }

    /// The tunnels of a peer that were sure to live.
    #[must_use]
    pub fn sure(&self, now: Nanos, peer: usize) -> [bool; ENDPOINTS] {
        std::array::from_fn(|endpoint| self.is_sure(now, (peer, endpoint)))
    }
}

/// Every key that was installed for sending, by its hash.
#[derive(Debug, Default)]
pub struct Keys(HashMap<u64, AeadKey>);

impl Keys {
    /// An SA is installed.
    pub fn note(&mut self, sa: &esp::Sa) {
        let keymat = sa.keymat_out.expose();
        if let Ok(key) = AeadKey::new(sa.alg, keymat) {
            self.0.entry(hash(keymat)).or_insert(key);
        }
    }

    /// What is inside an ESP packet; `None` if it is none of our inner packets.
    #[must_use]
    pub fn open(&self, key: u64, packet: &[u8]) -> Option<Inner> {
        let (head, body) = packet.split_at_checked(16)?;
        let (aad, iv) = head.split_at_checked(8)?;
        let mut body = body.to_vec();
        let plain = self.0.get(&key)?.open_in_place(iv.try_into().ok()?, aad, &mut body).ok()?;
        traffic::inner(plain)
    }
}

/// The tunnel of a flow's newest packet, and which tunnels were sure to live then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pinned {
    /// The endpoint of its tunnel.
    pub endpoint: usize,
    /// By endpoint.
    pub sure: [bool; ENDPOINTS],
}

impl Pinned {
    /// Whether the next packet may be where it is.
    #[must_use]
    pub fn may_become(&self, next: &Self) -> bool {
        let still_there = next.sure[self.endpoint];
        let was_there = self.sure[next.endpoint];
        self.endpoint == next.endpoint || !(still_there && was_there)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tunnel_lives_while_one_of_its_sas_is_used() {
        let mut view = View::default();
        view.note(1, Change::Install(7, 1, (0, 1)));
        assert!(!view.lives((0, 1)));
        view.note(2, Change::Use(7));
        assert!(view.lives((0, 1)) && view.uses(7) && !view.lives((0, 0)));
        assert!(!view.is_sure(2 + SURE, (0, 1)) && view.is_sure(3 + SURE, (0, 1)));
        view.note(4 + SURE, Change::Install(9, 2, (0, 1)));
        view.note(4 + SURE, Change::Use(9));
        view.note(4 + SURE, Change::Remove(7));
        assert!(view.is_sure(4 + SURE, (0, 1)), "a rekey changes nothing");
        view.note(5 + SURE, Change::Install(9, 2, (0, 1)));
        assert!(view.lives((0, 1)), "an update changes nothing");
        view.note(5 + SURE, Change::Install(9, 3, (0, 1)));
        assert!(!view.lives((0, 1)), "other keys do");
        let old = SpiLayout::new(1, 5, 0, 3).unwrap();
        view.note(9, Change::Install(old.spi().0, 1, (0, 0)));
        view.note(9, Change::Use(old.spi().0));
        view.note(9, Change::Install(old.next_generation().spi().0, 2, (0, 1)));
        assert!(!view.lives((0, 0)), "its place is taken");
    }

    #[test]
    fn a_flow_moves_from_a_lost_tunnel_or_to_a_new_one() {
        let at = |endpoint, sure| Pinned { endpoint, sure };
        assert!(at(0, [true, true]).may_become(&at(0, [true, true])));
        assert!(!at(0, [true, true]).may_become(&at(1, [true, true])));
        assert!(at(0, [true, true]).may_become(&at(1, [false, true])), "it is lost");
        assert!(at(0, [true, false]).may_become(&at(1, [true, true])), "the other is new");
        assert!(at(0, [true, false]).may_become(&at(1, [true, false])), "the other came just now");
    }
}
