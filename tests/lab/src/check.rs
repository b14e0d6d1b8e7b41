//! What must never be seen on the wire, looked for in captures.

use crate::capture::Recording;
use crate::pcap::{Content, Packet};
use std::collections::hash_map::{DefaultHasher, Entry};
use std::collections::{BTreeSet, HashMap};
use std::hash::{Hash, Hasher};
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

/// Counts (key, IV) pairs that protect two different datagrams (ha.md, invariant 1), ESP sequence numbers used
/// twice (2), and IKE message ids that stand for two different messages (4). Feed it as many captures as you
/// like, overlapping or not: the same datagram seen twice is not a repeat.
#[derive(Debug, Default)]
pub struct IvChecker {
    esp_ivs: HashMap<(Option<IpAddr>, u32, u64), u64>,
    esp_sequences: HashMap<(Option<IpAddr>, u32, u32), u64>,
    ike_ivs: HashMap<(u64, u64, bool, u64), u64>,
    ike_messages: HashMap<(u64, u64, bool, bool, u32), u64>,
    /// Protected datagrams looked at.
    pub checked: u64,
    /// (key, IV) pairs that protect two different datagrams.
    pub iv_repeats: u64,
    /// ESP sequence numbers used for two different packets of one SA.
    pub sequence_repeats: u64,
    /// IKE message ids used for two different messages in one direction.
    pub message_id_repeats: u64,
    /// Frames that carry several ESP packets (a segmented send that no card has split yet): all but the first are
    /// hidden from this check, so there must be none. See [`crate::net::Net::split_sends`].
    pub merged_frames: u64,
    /// The first repeats, in words.
    pub examples: Vec<String>,
}

/// An Ethernet frame of the lab's networks: header and 1,500 bytes.
const LARGEST_FRAME: u32 = 14 + 1500;

fn digest(bytes: &[u8], length: u32) -> u64 {
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    length.hash(&mut hasher);
    hasher.finish()
}

/// Whether `key` was seen with another digest before.
fn repeats<K: Hash + Eq>(map: &mut HashMap<K, u64>, key: K, digest: u64) -> bool {
    match map.entry(key) {
        Entry::Occupied(entry) => *entry.get() != digest,
        Entry::Vacant(entry) => {
            entry.insert(digest);
            false
        }
    }
}

impl IvChecker {
    /// Looks at every packet of a recording. Recordings of the same packets with different `snap` do not mix: use
    /// [`IvChecker::feed_esp`] and [`IvChecker::feed_ike`] then.
    pub fn feed(&mut self, recording: &Recording) {
        self.feed_esp(recording);
        self.feed_ike(recording);
    }

    /// Looks at the ESP packets of a recording.
    pub fn feed_esp(&mut self, recording: &Recording) {
        for packet in
            recording.packets().filter(|packet| matches!(packet.content, Content::Esp { .. }))
        {
            self.look(&packet);
        }
    }

    /// Looks at the IKE messages of a recording.
    pub fn feed_ike(&mut self, recording: &Recording) {
        for packet in
            recording.packets().filter(|packet| matches!(packet.content, Content::Ike { .. }))
        {
            self.look(&packet);
        }
    }

    /// Looks at one packet.
    pub fn look(&mut self, packet: &Packet<'_>) {
        match packet.content {
            Content::Esp { spi, sequence, iv, bytes, .. } => {
                self.checked += 1;
                self.merged_frames += u64::from(packet.full_length > LARGEST_FRAME);
                let digest = digest(bytes, packet.full_length);
                if repeats(&mut self.esp_ivs, (packet.target, spi, iv), digest) {
                    self.iv_repeats += 1;
                    self.tell(format!("ESP SPI {spi:08x} IV {iv:016x} seq {sequence}"));
                }
                if repeats(&mut self.esp_sequences, (packet.target, spi, sequence), digest) {
                    self.sequence_repeats += 1;
                    self.tell(format!("ESP SPI {spi:08x} seq {sequence}"));
                }
            }
            Content::Ike { header, iv, bytes } => {
                // A key belongs to a pair of SPIs and a direction (RFC 7296 §2.14: SK_ei, SK_er).
                let digest = digest(bytes, header.length);
                let (i, r) = (header.initiator_spi, header.responder_spi);
                if let Some(iv) = iv {
                    self.checked += 1;
                    if repeats(&mut self.ike_ivs, (i, r, header.from_initiator, iv), digest) {
                        self.iv_repeats += 1;
                        self.tell(format!(
                            "IKE {i:016x} {r:016x} IV {iv:016x} id {}",
                            header.message_id
                        ));
                    }
                    let id = (i, r, header.from_initiator, header.is_response, header.message_id);
                    if repeats(&mut self.ike_messages, id, digest) {
                        self.message_id_repeats += 1;
                        self.tell(format!("IKE {i:016x} {r:016x} id {}", header.message_id));
                    }
                }
            }
            _ => {}
        }
    }

    fn tell(&mut self, what: String) {
        if self.examples.len() < 8 {
            self.examples.push(what);
        }
    }
}

/// Whether an address is one that policies protect: 10.1/16, 10.2/16, fd01::/16, fd02::/16.
pub fn is_inner(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => matches!(address.octets(), [10, 1 | 2, ..]),
        IpAddr::V6(address) => matches!(address.segments(), [0xfd01 | 0xfd02, ..]),
    }
}

/// Packets between protected networks that are seen unprotected (invariant 8). Feed it the WAN.
pub fn clear_text(recording: &Recording) -> u64 {
    let inner = |packet: &Packet<'_>| match (packet.source, packet.target) {
        (Some(source), Some(target)) => is_inner(source) && is_inner(target),
        _ => false,
    };
    recording.packets().filter(inner).count() as u64
}

/// Exchanges whose request was seen by `at` (CLOCK_BOOTTIME) and whose response was not: they were open then.
pub fn open_exchanges(recording: &Recording, at: Duration) -> u64 {
    let mut open = BTreeSet::new();
    for packet in recording.packets().filter(|packet| recording.boot_time(packet.at) <= at) {
        let Content::Ike { header, .. } = packet.content else { continue };
        // A response comes from the other side than its request did.
        let asked_by_initiator = header.from_initiator != header.is_response;
        let key =
            (header.initiator_spi, header.responder_spi, asked_by_initiator, header.message_id);
        if header.is_response {
            open.remove(&key);
        } else {
            open.insert(key);
        }
    }
    open.len() as u64
}

/// IKE exchanges that began within `[from, to)` (CLOCK_BOOTTIME): different requests, retransmissions once.
pub fn ike_exchanges(recording: &Recording, from: Duration, to: Duration) -> u64 {
    let mut seen = BTreeSet::new();
    for packet in recording.packets() {
        let at = recording.boot_time(packet.at);
        if let Content::Ike { header, .. } = packet.content
            && !header.is_response
            && (from..to).contains(&at)
        {
            seen.insert((
                header.initiator_spi,
                header.responder_spi,
                header.from_initiator,
                header.message_id,
            ));
        }
    }
    seen.len() as u64
}

/// A request: the IKE SA's SPIs, whether its original initiator asks, and the message id.
pub type Request = (u64, u64, bool, u32);

/// Requests of CREATE_CHILD_SA (RFC 7296 §1.3: rekeys, too), and those of them whose response was seen.
fn rekeys(recording: &Recording) -> (BTreeSet<Request>, BTreeSet<Request>) {
    const CREATE_CHILD_SA: u8 = 36;
    let (mut asked, mut answered) = (BTreeSet::new(), BTreeSet::new());
    for packet in recording.packets() {
        let Content::Ike { header, .. } = packet.content else { continue };
        if header.exchange == CREATE_CHILD_SA {
            // A response comes from the other side than its request did.
            let initiator_asks = header.from_initiator != header.is_response;
            let list = if header.is_response { &mut answered } else { &mut asked };
            list.insert((
                header.initiator_spi,
                header.responder_spi,
                initiator_asks,
                header.message_id,
            ));
        }
    }
    (asked, answered)
}

/// The requests of CREATE_CHILD_SA.
pub fn asked_rekeys(recording: &Recording) -> BTreeSet<Request> {
    rekeys(recording).0
}

/// The requests of CREATE_CHILD_SA without a response.
pub fn open_rekeys(recording: &Recording) -> BTreeSet<Request> {
    let (asked, answered) = rekeys(recording);
    asked.difference(&answered).copied().collect()
}

/// Whether both sides of one IKE SA have a request among these.
pub fn crossed(open: &BTreeSet<Request>) -> bool {
    open.iter().any(|(i, r, asks, _)| {
        open.iter().any(|(other_i, other_r, other_asks, _)| {
            (i, r) == (other_i, other_r) && asks != other_asks
        })
    })
}

/// ARP packets that claim `address` from hardware address `mac` within `[from, to)`: replies, and announcements.
pub fn arp_claims(
    recording: &Recording,
    mac: [u8; 6],
    address: Ipv4Addr,
    from: Duration,
    to: Duration,
) -> u64 {
    recording
        .packets()
        .filter(|packet| (from..to).contains(&recording.boot_time(packet.at)))
        .filter(|packet| match packet.content {
            Content::Arp { sender_mac, sender, .. } => {
                sender == address && (sender_mac == mac || packet.source_mac == mac)
            }
            _ => false,
        })
        .count() as u64
}

/// Packets that came from an outer address, whoever sent them.
pub fn sent_by(recording: &Recording, address: &str, from: Duration, to: Duration) -> u64 {
    let address = address.parse().ok();
    recording
        .packets()
        .filter(|packet| packet.source.is_some() && packet.source == address)
        .filter(|packet| (from..to).contains(&recording.boot_time(packet.at)))
        .count() as u64
}

/// ESP packets in UDP, and as protocol 50, with later fragments of such.
pub fn esp_forms(recording: &Recording) -> (u64, u64, u64) {
    let (mut in_udp, mut bare, mut fragments) = (0, 0, 0);
    for packet in recording.packets() {
        match packet.content {
            Content::Esp { in_udp: true, .. } => in_udp += 1,
            Content::Esp { in_udp: false, .. } => bare += 1,
            Content::Ip { protocol: 50, .. } => fragments += 1,
            _ => {}
        }
    }
    (in_udp, bare, fragments)
}

/// ESP packets that came from an outer address.
pub fn sent_by_esp(recording: &Recording, address: &str) -> u64 {
    let address: Option<IpAddr> = address.parse().ok();
    let esp = |packet: &Packet<'_>| matches!(packet.content, Content::Esp { .. });
    recording.packets().filter(|packet| packet.source == address && esp(packet)).count() as u64
}

/// Frames from hardware address `mac` with IP source `address` within `[from, to)`.
pub fn sent_as(
    recording: &Recording,
    mac: [u8; 6],
    address: IpAddr,
    from: Duration,
    to: Duration,
) -> u64 {
    recording
        .packets()
        .filter(|packet| packet.source_mac == mac && packet.source == Some(address))
        .filter(|packet| (from..to).contains(&recording.boot_time(packet.at)))
        .count() as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pcap::{dissect, frames, samples, write};

    fn check(list: Vec<Vec<u8>>) -> IvChecker {
        let file =
            write(&list.into_iter().map(|frame| (Duration::ZERO, frame)).collect::<Vec<_>>());
        let mut checker = IvChecker::default();
        for frame in frames(&file).unwrap() {
            checker.look(&dissect(&frame));
        }
        checker
    }

    #[test]
    fn a_planted_esp_repeat_is_found() {
        let found = check(vec![
            samples::esp(0x300, 1, 10, b"one-packet-here-"),
            samples::esp(0x300, 2, 11, b"two-packet-here-"),
            samples::esp(0x300, 3, 10, b"three-packet-her"),
            samples::esp(0x301, 1, 10, b"another key's IV"),
        ]);
        assert_eq!((found.checked, found.iv_repeats, found.sequence_repeats), (4, 1, 0));
    }

    #[test]
    fn a_planted_sequence_repeat_is_found() {
        let found =
            check(vec![samples::esp(0x300, 1, 10, &[1; 16]), samples::esp(0x300, 1, 11, &[2; 16])]);
        assert_eq!((found.iv_repeats, found.sequence_repeats), (0, 1));
    }

    #[test]
    fn ike_retransmissions_pass_and_reencryption_does_not() {
        let same = check(vec![samples::ike(4, 8, 99, b"same"), samples::ike(4, 8, 99, b"same")]);
        assert_eq!((same.iv_repeats, same.message_id_repeats), (0, 0));
        let other = check(vec![samples::ike(4, 8, 99, b"same"), samples::ike(5, 8, 99, b"else")]);
        assert_eq!((other.iv_repeats, other.message_id_repeats), (1, 0));
        let resealed =
            check(vec![samples::ike(4, 8, 99, b"same"), samples::ike(4, 8, 100, b"else")]);
        assert_eq!((resealed.iv_repeats, resealed.message_id_repeats), (0, 1));
        // The other direction has another key.
        let reply =
            check(vec![samples::ike(4, 8, 99, b"same"), samples::ike(4, 0x20, 99, b"else")]);
        assert_eq!((reply.iv_repeats, reply.message_id_repeats), (0, 0));
    }

    #[test]
    fn a_repeat_without_udp_is_found_as_well() {
        let list = [(1, 10), (2, 11), (2, 12), (3, 10)];
        let list: Vec<_> = list
            .map(|(seq, iv)| samples::esp(0x300, seq, iv, &[seq as u8; 16]))
            .iter()
            .map(|frame| samples::unwrapped(frame))
            .collect();
        let mut later = list[0].clone();
        later[20..22].copy_from_slice(&[0, 100]);
        let recording = Recording::from_frames(&[list.as_slice(), &[later]].concat());
        assert_eq!(esp_forms(&recording), (0, 4, 1));
        let found = check(list);
        assert_eq!((found.checked, found.iv_repeats, found.sequence_repeats), (4, 1, 1));
    }

    #[test]
    fn clear_text_is_found() {
        let recording = Recording::from_frames(&[
            samples::udp([10, 1, 0, 9], [10, 2, 0, 9], (7000, 7000), &[0; 64]),
            samples::udp([203, 0, 113, 11], [198, 51, 100, 7], (53, 53), &[0; 64]),
            samples::esp(0x300, 1, 10, &[1; 16]),
        ]);
        assert_eq!(clear_text(&recording), 1);
    }

    /// A CREATE_CHILD_SA message: `flags` 8 from the initiator, 0x20 a response.
    fn rekey(message_id: u32, flags: u8) -> Vec<u8> {
        let mut frame = samples::ike(message_id, flags, 99, b"rekey");
        // Ethernet, IPv4, UDP, non-ESP marker, then the exchange type after 18 bytes.
        frame[14 + 20 + 8 + 4 + 18] = 36;
        frame
    }

    #[test]
    fn crossing_requests_are_told_from_a_sequence() {
        let open = |frames: &[Vec<u8>]| open_rekeys(&Recording::from_frames(frames));
        // Both out, one of them twice; the responder's has the same message id, which is its own count.
        let both = open(&[rekey(4, 8), rekey(4, 0), rekey(4, 8)]);
        assert_eq!(both, BTreeSet::from([(1, 2, true, 4), (1, 2, false, 4)]));
        assert!(crossed(&both));
        // One after the other: each response comes from the side that was asked.
        let first = open(&[rekey(4, 8), rekey(4, 0x20), rekey(4, 0)]);
        assert_eq!(first, BTreeSet::from([(1, 2, false, 4)]));
        assert!(!crossed(&first));
        assert!(open(&[rekey(4, 8), rekey(4, 0), rekey(4, 0x28), rekey(4, 0x20)]).is_empty());
        // Two of one side do not cross, and other exchanges are none.
        assert!(!crossed(&open(&[rekey(4, 8), rekey(5, 8)])));
        assert!(open(&[samples::ike(4, 8, 99, b"else")]).is_empty());
    }

    #[test]
    fn open_exchanges_lack_their_response() {
        // At 1 s: the initiator's request 4 and the responder's own 4; at 2 s the responder answers; at 3 s 5 is asked.
        let frames = [(1, 4, 8), (1, 4, 0), (2, 4, 0x20), (3, 5, 8)];
        let frames: Vec<_> = frames
            .iter()
            .map(|(at, id, flags)| (Duration::from_secs(*at), samples::ike(*id, *flags, *at, b"x")))
            .collect();
        let recording = Recording::from_timed(&frames);
        let open = |at| open_exchanges(&recording, Duration::from_secs(at));
        assert_eq!([0, 1, 2, 3].map(open), [0, 2, 1, 2]);
    }

    #[test]
    fn exchanges_are_counted_once() {
        let recording = Recording::from_frames(&[
            samples::ike(4, 8, 99, b"same"),
            samples::ike(4, 8, 99, b"same"),
            samples::ike(4, 0x20, 5, b"reply"),
            samples::ike(0, 0, 6, b"from the responder"),
        ]);
        assert_eq!(ike_exchanges(&recording, Duration::ZERO, Duration::MAX), 2);
    }
}
