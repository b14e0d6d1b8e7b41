//! The invariants of ha.md, watched on everything that leaves to the WAN and on the state of both instances.
//!
//! | invariant | where |
//! | --- | --- |
//! | 1 (key, IV) | [`Checks::wan`]: every ESP packet by key, every IKE message by SA and direction |
//! | 2 sequence numbers, leases | [`Checks::wan`], [`Checks::sealed`] |
//! | 3 fence | [`Checks::fences`], after every step |
//! | 4 message ids | [`Checks::wan`] |
//! | 5 no SA lost | [`Checks::wan`] (a new IKE_SA_INIT), [`Checks::healed`], and the gap in traffic (`director`) |
//! | 6 pinning | `pins`, on every packet that leaves the pair, opened |
//! | 7 digests | [`Checks::logs`], byte by byte, [`Checks::installed`]; `ha`'s own comparison is an ERROR |
//! | 8 nothing in clear | [`Checks::wan`] |

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap, HashSet};

use wire::id::EspSpi;
use wire::natt;

use crate::clock::{Nanos, S};
use crate::host::Outbound;
use crate::network::Datagram;
use crate::scene::{ENDPOINTS, endpoint_name};
use crate::traffic;

/// SAs that were there during a partition may be used by both sides of it: for this long after it, too.
const AFTERMATH: Nanos = 2 * S;

/// What a datagram was, for the trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// ESP.
    Esp,
    /// An IKE message: exchange type, message id, response.
    Ike(u8, u32, bool),
    /// A NAT keepalive.
    Keepalive,
}

/// Which end of an IKE SA sent, and whether it answered.
type Sender = (u64, u64, bool, bool);

#[derive(Debug, Default)]
struct Ids {
    highest: u32,
    hashes: BTreeMap<u32, u64>,
}

/// What was seen, and what was wrong with it.
#[derive(Debug, Default)]
pub struct Checks {
    /// The first violation, with the number of its invariant (0: none of ha.md's).
    pub violation: Option<(u8, String)>,
    /// A new IKE_SA_INIT now means that an SA was lost.
    pub strict: bool,
    /// Somebody took over in doubt: RFC 6311 messages may come, whose message id is 0.
    pub doubt: bool,
    /// The newest moment of an allowed overlap: IKE SAs that were there then are excused from invariant 4 for their
    /// lives, since both sides may have used one message id, and the winner repeats its own request whenever it must.
    pub split_at: Option<Nanos>,
    /// The same by endpoint, until it is healed: then the winner numbers its packets above both, so that Child SAs have
    /// no further excuse.
    pub unhealed: [Option<Nanos>; ENDPOINTS],
    /// The same, for their lives, where a side of it died before they met: nobody knows what that one used.
    unknown: [Option<Nanos>; ENDPOINTS],
    /// IKE SAs that were made.
    pub ike_sas: u64,
    /// ESP packets checked.
    pub esp_packets: u64,
    /// IKE messages checked.
    pub ike_messages: u64,
    /// A running hash of everything sent: equal runs have equal traces.
    pub trace: u64,
    born: HashMap<u64, Nanos>,
    esp_ivs: HashMap<(u64, [u8; 8]), u64>,
    esp_seqs: HashSet<(u64, u32)>,
    ike_ivs: HashMap<(u64, u64, bool, [u8; 8]), u64>,
    ids: HashMap<Sender, Ids>,
    /// By instance: the ceilings it knows, by inbound SPI.
    ceilings: [HashMap<u32, u64>; 2],
    /// By endpoint: term and position where logs were compared.
    compared: [(u64, u64); ENDPOINTS],
    /// By endpoint: life, term and position of the shadow that was looked at.
    looked: [(u64, u64, u64); ENDPOINTS],
    /// By endpoint and instance: the highest term of a rival that it has heard of as an owner while it owned itself.
    rivals: [[u64; 2]; ENDPOINTS],
}

/// A hash for comparison of datagrams and keys (FNV-1a, then a finisher).
#[must_use]
pub fn hash(bytes: &[u8]) -> u64 {
    let mut h = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| {
        (h ^ u64::from(*b)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    h ^= h >> 29;
    h.wrapping_mul(0xbf58_476d_1ce4_e5b9)
}

fn word(bytes: &[u8], at: usize) -> Option<[u8; 8]> {
    bytes.get(at..at + 8)?.try_into().ok()
}

/// The ESP packet in a datagram, if it is one.
#[must_use]
pub fn esp_of(datagram: &Datagram) -> Option<&[u8]> {
    match natt::classify(&datagram.bytes) {
        natt::Datagram::Esp(packet) if datagram.from.port() != 500 => Some(packet),
        _ => None,
    }
}

/// The term of an acknowledgement on the pair's stream, if the frame is one: in release 1, `[4, [id, term, …]]` in
/// CBOR (RFC 8949 §3).
#[must_use]
pub fn acked_term(frame: &[u8]) -> Option<u64> {
    fn number(bytes: &[u8]) -> Option<(u64, &[u8])> {
        let (head, rest) = bytes.split_first()?;
        let len = match head {
            0..=23 => return Some((u64::from(*head), rest)),
            24..=27 => 1_usize << (head - 24),
            _ => return None,
        };
        let (word, rest) = rest.split_at_checked(len)?;
        Some((word.iter().fold(0, |n, byte| n << 8 | u64::from(*byte)), rest))
    }
    let (_, rest) = number(frame.strip_prefix(&[0x82, 4, 0x84])?)?;
    number(rest).map(|(term, _)| term)
}

impl Checks {
    /// Notes a violation; the first counts.
    pub fn violate(&mut self, invariant: u8, text: String) {
        crate::log::say(&format!("VIOLATION of {invariant}: {text}"));
        self.violation.get_or_insert((invariant, text));
    }

    /// A datagram leaves, through a tunnel at `endpoint` if it is ESP. `key` finds the sender's key of an outbound SPI.
    pub fn wan(
        &mut self,
        now: Nanos,
        datagram: &Datagram,
        endpoint: usize,
        key: impl Fn(u32) -> Option<u64>,
    ) -> Kind {
        self.trace =
            hash(&[&self.trace.to_be_bytes()[..], &now.to_be_bytes(), &datagram.bytes].concat());
        if traffic::in_clear(&datagram.bytes) {
            self.violate(8, "an inner packet left in clear".into());
        }
        let ike = if datagram.from.port() == 500 {
            datagram.bytes.as_slice()
        } else {
            match natt::classify(&datagram.bytes) {
                natt::Datagram::Esp(packet) => {
                    self.esp(now, packet, endpoint, key);
                    return Kind::Esp;
                }
                natt::Datagram::Ike(ike) => ike,
                natt::Datagram::Keepalive => return Kind::Keepalive,
                natt::Datagram::Short => {
                    self.violate(0, "a short datagram left from port 4500".into());
                    return Kind::Keepalive;
                }
            }
        };
        self.ike(now, ike)
    }

    fn esp(
        &mut self,
        now: Nanos,
        packet: &[u8],
        endpoint: usize,
        key: impl Fn(u32) -> Option<u64>,
    ) {
        self.esp_packets += 1;
        let head = wire::esp::Header::parse(packet);
        let (Some(head), Some(iv)) = (head, word(packet, 8)) else {
            return self.violate(0, "an ESP packet left cut short".into());
        };
        let Some(key) = key(head.spi.0) else {
            return self.violate(
                0,
                format!("an ESP packet left with SPI {} that was never installed", head.spi),
            );
        };
        self.born.entry(key).or_insert(now);
        let seq = u32::from_be_bytes(
            packet.get(4..8).and_then(|b| b.try_into().ok()).unwrap_or_default(),
        );
        match self.esp_ivs.entry((key, iv)) {
            Entry::Vacant(free) => {
                free.insert(hash(packet));
            }
            Entry::Occupied(taken) if *taken.get() != hash(packet) => {
                self.violate(
                    1,
                    format!("SPI {}: IV {iv:02x?} protects two datagrams (seq {seq})", head.spi),
                );
            }
            Entry::Occupied(_) => {}
        }
        if !self.esp_seqs.insert((key, seq)) && !self.excused_numbers(endpoint, key) {
            self.violate(2, format!("SPI {}: sequence number {seq} was sent twice", head.spi));
        }
    }

    fn ike(&mut self, now: Nanos, message: &[u8]) -> Kind {
        self.ike_messages += 1;
        let Ok(head) = wire::ike::Header::parse(message) else {
            self.violate(0, "a malformed IKE message left".into());
            return Kind::Keepalive;
        };
        let (i, r, id) = (head.initiator_spi.0, head.responder_spi.0, head.message_id.0);
        let kind = Kind::Ike(head.exchange.0, id, head.response);
        if head.exchange.0 == 34 {
            if self.strict && !head.response && !self.born.contains_key(&i) {
                self.violate(5, format!("an IKE SA was lost: {i:016x} begins a new one"));
            }
            if let Entry::Vacant(new) = self.born.entry(i) {
                new.insert(now);
                self.ike_sas += 1;
            }
            return kind;
        }
        self.born.entry(i).or_insert(now);
        // RFC 7296 §3.14: the IV follows the generic header of the encrypted payload, which comes first.
        if message.get(16) == Some(&46)
            && let Some(iv) = word(message, 32)
        {
            match self.ike_ivs.entry((i, r, head.from_initiator, iv)) {
                Entry::Vacant(free) => {
                    free.insert(hash(message));
                }
                Entry::Occupied(taken) if *taken.get() != hash(message) => {
                    self.violate(
                        1,
                        format!("IKE SA {i:016x}: IV {iv:02x?} protects two messages (id {id})"),
                    );
                }
                Entry::Occupied(_) => {}
            }
        }
        // RFC 6311 §5.1: message id synchronisation is an INFORMATIONAL exchange with message id 0 at any time.
        let excused =
            self.excused(i, self.split_at) || (self.doubt && head.exchange.0 == 37 && id == 0);
        if excused {
            return kind;
        }
        let ids = self.ids.entry((i, r, head.from_initiator, head.response)).or_default();
        let before = ids.hashes.insert(id, hash(message));
        let highest = ids.highest;
        ids.highest = highest.max(id);
        let what = if head.response { "response" } else { "request" };
        if before.is_some_and(|before| before != hash(message)) {
            self.violate(4, format!("IKE SA {i:016x}: two different {what}s with message id {id}"));
        } else if id < highest {
            self.violate(4, format!("IKE SA {i:016x}: {what} {id} after {highest}"));
        }
        kind
    }

    /// Whether an SA (by key, or by the initiator's SPI) was there during a partition, when both sides may use it.
    fn excused(&self, sa: u64, split: Option<Nanos>) -> bool {
        let born = self.born.get(&sa).copied().unwrap_or(0);
        split.is_some_and(|split| born <= split + AFTERMATH)
    }

    /// The same of a Child SA's key and its numbers.
    fn excused_numbers(&self, endpoint: usize, key: u64) -> bool {
        self.excused(key, self.unhealed[endpoint].max(self.unknown[endpoint]))
    }

    /// An instance knows of a ceiling.
    pub fn ceiling(&mut self, instance: usize, spi_in: EspSpi, ceiling: u64) {
        let known = self.ceilings[instance].entry(spi_in.0).or_default();
        *known = (*known).max(ceiling);
    }

    /// The ceiling that an instance knows.
    #[must_use]
    pub fn ceiling_of(&self, instance: usize, spi_in: EspSpi) -> Option<u64> {
        self.ceilings[instance].get(&spi_in.0).copied()
    }

    /// The shard of a synced owner sealed a packet.
    pub fn sealed(&mut self, instance: usize, out: &Outbound, seq: u32) {
        let spi_in = out.spi_in;
        let known = self.ceiling_of(1 - instance, spi_in).unwrap_or(0);
        if u64::from(seq) >= known && !self.excused_numbers(out.endpoint, out.key) {
            let text = format!(
                "SA {spi_in}: sequence number {seq} is not below the acknowledged lease {known}"
            );
            self.violate(2, text);
        }
    }

    /// Both instances pass the fence of an endpoint now.
    pub fn fences(&mut self, now: Nanos, endpoint: usize, allowed: bool) {
        if !allowed {
            let name = endpoint_name(endpoint);
            self.violate(3, format!("two instances pass the fence of endpoint {name}"));
        }
        self.split_at = Some(now);
        self.unhealed[endpoint] = Some(now);
    }

    /// A process came or went: what it knew of its rival is gone.
    pub fn forget_rivals(&mut self) {
        self.rivals = [[0; 2]; ENDPOINTS];
        for (unknown, unhealed) in self.unknown.iter_mut().zip(self.unhealed) {
            *unknown = (*unknown).max(unhealed);
        }
    }

    /// ha.md, "Terms": after a split the winner's term is above both, as soon as it has heard of its rival.
    pub fn healed(&mut self, endpoint: usize, status: [&ha::EndpointStatus; 2]) {
        let rivals = &mut self.rivals[endpoint];
        let owns = |s: &ha::EndpointStatus| matches!(s.role, ha::Role::Owner(_));
        let synced = status.iter().any(|s| s.role == ha::Role::Shadow { synced: true });
        let [a, b] = status;
        for (mine, theirs, at) in [(a, b, 0), (b, a, 1)] {
            if owns(mine) && owns(theirs) && mine.peer_owns {
                rivals[at] = rivals[at].max(theirs.term.0);
            } else if owns(mine) && synced {
                let rival = rivals[at];
                *rivals = [0; 2];
                if mine.term.0 < rival {
                    let text = format!("term {} won a split against term {rival}", mine.term.0);
                    return self.violate(5, text);
                }
            }
        }
    }

    /// ha.md: acknowledged means installed. What a synced shadow's IKE holds is what its log says.
    pub fn installed(&mut self, held: Vec<u64>, log: Vec<u64>) {
        if held != log {
            self.violate(
                7,
                format!("a synced shadow holds IKE SAs {held:x?}, and its log has {log:x?}"),
            );
        }
    }

    /// Whether what a synced shadow holds has not been looked at since its log moved.
    pub fn is_new_to_look_at(&mut self, life: u64, status: &ha::EndpointStatus) -> bool {
        let at = (life, status.term.0, status.position.0);
        let looked = &mut self.looked[usize::from(status.endpoint.0)];
        std::mem::replace(looked, at) != at
    }

    /// Compares the logs of owner and shadow, where they stand at the same place.
    pub fn logs(
        &mut self,
        endpoint: usize,
        pairs: [&ha::Pair; 2],
        status: [&ha::EndpointStatus; 2],
    ) {
        let [a, b] = status;
        let owners = status.iter().filter(|s| matches!(s.role, ha::Role::Owner(_))).count();
        let synced = status.iter().any(|s| matches!(s.role, ha::Role::Owner(ha::Mode::Synced)));
        let shadows = status.iter().filter(|s| matches!(s.role, ha::Role::Shadow { .. })).count();
        let alike = (a.term, a.lineage, a.position) == (b.term, b.lineage, b.position);
        if owners == 1 && shadows == 1 && synced && alike {
            // Healed: from here on the winner goes on above both, and nobody else sends.
            self.unhealed[endpoint] = None;
        }
        if owners != 1
            || shadows != 1
            || !synced
            || !alike
            || self.compared[endpoint] == (a.term.0, a.position.0)
        {
            return;
        }
        self.compared[endpoint] = (a.term.0, a.position.0);
        let id = a.endpoint;
        if a.digest != b.digest || !pairs[0].values(id).eq(pairs[1].values(id)) {
            self.violate(
                7,
                format!("the logs differ at position {} of term {}", a.position.0, a.term.0),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::SocketAddr;

    fn esp(seq: u32, iv: u8, body: u8) -> Datagram {
        let at = SocketAddr::from(([1, 2, 3, 4], 4500));
        let bytes = [&[0, 16, 0, 1][..], &seq.to_be_bytes(), &[iv; 8], &[body; 32]].concat();
        Datagram { from: at, to: at, bytes, inner: None }
    }

    fn ike(id: u8, iv: u8, body: u8, exchange: u8) -> Datagram {
        let at = SocketAddr::from(([1, 2, 3, 4], 500));
        let mut bytes =
            [&[1; 16][..], &[46, 0x20, exchange, 0x08, 0, 0, 0, id, 0, 0, 0, 0]].concat();
        bytes.extend([0, 0, 0, 44]);
        bytes.extend([iv; 8]);
        bytes.extend([body; 32]);
        let len = bytes.len() as u32;
        bytes[24..28].copy_from_slice(&len.to_be_bytes());
        Datagram { from: at, to: at, bytes, inner: None }
    }

    fn run(datagrams: &[Datagram], split: bool) -> Option<u8> {
        let mut checks = Checks::default();
        for datagram in datagrams {
            checks.wan(5, datagram, 0, |_| Some(9));
            (checks.split_at, checks.unhealed[0]) = (split.then_some(5), split.then_some(5));
        }
        checks.violation.map(|(number, _)| number)
    }

    #[test]
    fn planted_violations_are_found() {
        assert_eq!(run(&[esp(1, 1, 1), esp(2, 2, 2)], false), None);
        assert_eq!(run(&[esp(1, 1, 1), esp(2, 1, 2)], true), Some(1), "IVs have no excuse");
        assert_eq!(run(&[esp(1, 1, 1), esp(1, 2, 2)], false), Some(2));
        assert_eq!(run(&[esp(1, 1, 1), esp(1, 2, 2)], true), None);
        assert_eq!(
            run(&[ike(1, 1, 1, 37), ike(1, 1, 1, 37), ike(2, 2, 2, 37)], false),
            None,
            "a retransmission"
        );
        assert_eq!(run(&[ike(1, 1, 1, 37), ike(1, 2, 1, 37)], false), Some(4));
        assert_eq!(run(&[ike(1, 1, 1, 37), ike(2, 2, 1, 37), ike(1, 1, 1, 37)], false), Some(4));
        assert_eq!(run(&[ike(1, 1, 1, 37), ike(2, 1, 1, 37)], true), Some(1));
    }

    #[test]
    fn a_split_excuses_numbers_until_it_is_healed_or_for_life() {
        for (died, healed, found) in
            [(false, false, None), (false, true, Some(2)), (true, true, None)]
        {
            let mut checks = Checks::default();
            checks.wan(5, &esp(1, 1, 1), 0, |_| Some(9));
            checks.fences(5, 0, true);
            checks.fences(5, 1, true);
            if died {
                checks.forget_rivals();
            }
            if healed {
                checks.unhealed[0] = None;
            }
            checks.wan(6, &esp(1, 2, 2), 0, |_| Some(9));
            assert_eq!(checks.violation.map(|(number, _)| number), found);
        }
    }

    #[test]
    fn a_seal_above_the_other_sides_ceiling_is_found() {
        let mut checks = Checks::default();
        checks.ceiling(1, EspSpi(7), 100);
        let out = Outbound { key: 1, spi_in: EspSpi(7), endpoint: 0 };
        checks.sealed(0, &out, 99);
        assert!(checks.violation.is_none());
        checks.sealed(0, &out, 100);
        assert_eq!(checks.violation.map(|(number, _)| number), Some(2));
    }

    #[test]
    fn acknowledgements_are_told_from_other_frames() {
        let ack = [0x82, 4, 0x84, 0x19, 1, 2, 0x19, 0x04, 0x03, 7, 0];
        assert_eq!(acked_term(&ack), Some(0x0403));
        assert_eq!(acked_term(&[0x82, 6, 0x83, 1, 2, 3]), None);
        assert_eq!(acked_term(&ack[..6]), None);
    }

    #[test]
    fn a_winner_with_the_lower_term_is_found() {
        let status = |role, term| ha::EndpointStatus {
            endpoint: ha::EndpointId(0),
            role,
            term: ha::Term(term),
            lineage: ha::Lineage(1),
            position: ha::Position(1),
            acked: ha::Position(1),
            digest: 0,
            keys: 0,
            uplink: true,
            valid_until: std::time::Duration::ZERO,
            peer_owns: true,
            peer_uplink: None,
        };
        let owner = |term| status(ha::Role::Owner(ha::Mode::Synced), term);
        let shadow = |term| status(ha::Role::Shadow { synced: true }, term);
        for (winner, found) in [(9, None), (5, Some(5))] {
            let mut checks = Checks::default();
            checks.healed(0, [&owner(5), &owner(8)]);
            checks.healed(0, [&owner(winner), &shadow(winner)]);
            assert_eq!(checks.violation.map(|(number, _)| number), found);
        }
    }

    #[test]
    fn inner_packets_in_clear_are_found() {
        let mut datagram = esp(1, 1, 1);
        datagram.bytes.extend(traffic::MARKER);
        assert_eq!(run(&[datagram], true), Some(8));
    }
}
