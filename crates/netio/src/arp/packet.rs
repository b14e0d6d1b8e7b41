//! ARP and neighbour-discovery packets, without the Ethernet header: parse, judge, build.
//! Pure; every parser is total and gives `None` for what is not exactly as the RFCs say.

use std::net::{Ipv4Addr, Ipv6Addr};

use super::Mac;

/// Bytes of an ARP packet for Ethernet and IPv4 (RFC 826).
pub const ARP_LEN: usize = 28;

/// Bytes of a neighbour advertisement with its one option, IPv6 header included.
pub const NA_LEN: usize = 40 + 24 + 8;

/// An ARP packet for Ethernet and IPv4.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arp {
    /// 1 request, 2 reply.
    pub operation: u16,
    /// Sender's hardware address.
    pub sender_mac: Mac,
    /// Sender's address; 0.0.0.0 in a probe (RFC 5227 §1.1).
    pub sender: Ipv4Addr,
    /// Target's hardware address; not meaningful in a request.
    pub target_mac: Mac,
    /// The address asked for.
    pub target: Ipv4Addr,
}

/// ARP request.
pub const REQUEST: u16 = 1;
/// ARP reply.
pub const REPLY: u16 = 2;

impl Arp {
    /// Reads a packet; padding after it is allowed.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let (head, rest) = bytes.split_first_chunk::<8>()?;
        let [hw0, hw1, proto0, proto1, hw_len, proto_len, op0, op1] = *head;
        // Ethernet, IPv4, and the lengths that go with them.
        if [hw0, hw1, proto0, proto1, hw_len, proto_len] != [0, 1, 0x08, 0x00, 6, 4] {
            return None;
        }
        let (sender_mac, rest) = rest.split_first_chunk::<6>()?;
        let (sender, rest) = rest.split_first_chunk::<4>()?;
        let (target_mac, rest) = rest.split_first_chunk::<6>()?;
        let (target, _) = rest.split_first_chunk::<4>()?;
        Some(Self {
            operation: u16::from_be_bytes([op0, op1]),
            sender_mac: Mac(*sender_mac),
            sender: Ipv4Addr::from(*sender),
            target_mac: Mac(*target_mac),
            target: Ipv4Addr::from(*target),
        })
    }

    /// The bytes to send.
    #[must_use]
    pub fn emit(&self) -> [u8; ARP_LEN] {
        let mut out = [0; ARP_LEN];
        let [op0, op1] = self.operation.to_be_bytes();
        let fields: [&[u8]; 5] = [
            &[0, 1, 0x08, 0x00, 6, 4, op0, op1],
            &self.sender_mac.0,
            &self.sender.octets(),
            &self.target_mac.0,
            &self.target.octets(),
        ];
        for (to, from) in out.iter_mut().zip(fields.into_iter().flatten()) {
            *to = *from;
        }
        out
    }

    /// An announcement in request form: sender and target are the address itself
    /// (RFC 5227 §3). Receivers update an entry at once on a request, while a broadcast reply is
    /// ignored within their locktime (ha.md, "Takeover, in order").
    #[must_use]
    pub fn announcement(mac: Mac, address: Ipv4Addr) -> Self {
        Self {
            operation: REQUEST,
            sender_mac: mac,
            sender: address,
            target_mac: Mac([0; 6]),
            target: address,
        }
    }

    /// The answer to a request for our address.
    #[must_use]
    pub fn answer(&self, mac: Mac, address: Ipv4Addr) -> Self {
        Self {
            operation: REPLY,
            sender_mac: mac,
            sender: address,
            target_mac: self.sender_mac,
            target: self.sender,
        }
    }
}

/// What an incoming packet means for an address that we may answer for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard<Q> {
    /// Nothing to us.
    Nothing,
    /// Somebody asks for the address.
    Question(Q),
    /// Somebody else says that he has the address.
    Conflict(Mac),
}

/// Judges an ARP packet.
#[must_use]
pub fn judge_arp(arp: &Arp, own: Mac, address: Ipv4Addr) -> Heard<Arp> {
    if arp.sender_mac == own {
        return Heard::Nothing;
    }
    // RFC 5227 §2.4: any packet, request or reply, from another with our address as its sender.
    if arp.sender == address {
        return Heard::Conflict(arp.sender_mac);
    }
    // Requests by broadcast or unicast, from hosts, gateways' probes of a stale entry (RFC 1122
    // §2.3.2.1) and address probes with sender 0.0.0.0 alike.
    if arp.operation == REQUEST && arp.target == address {
        return Heard::Question(*arp);
    }
    Heard::Nothing
}

/// A neighbour solicitation or advertisement, reduced to what an answer needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Neighbor {
    /// True: solicitation (type 135); false: advertisement (136).
    pub solicitation: bool,
    /// IPv6 source; unspecified while the asker checks for duplicates.
    pub source: Ipv6Addr,
    /// IPv6 destination.
    pub destination: Ipv6Addr,
    /// The address asked for or advertised.
    pub target: Ipv6Addr,
    /// Source (solicitation) or target (advertisement) link-layer address option.
    pub mac: Option<Mac>,
}

const NEXT_HEADER_ICMPV6: u8 = 58;
const SOLICITATION: u8 = 135;
const ADVERTISEMENT: u8 = 136;
const OPTION_SOURCE: u8 = 1;
const OPTION_TARGET: u8 = 2;

/// All nodes on the link.
pub const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// The solicited-node multicast group of an address (RFC 4291 §2.7.1).
#[must_use]
pub fn solicited_node(address: Ipv6Addr) -> Ipv6Addr {
    let [.., a, b, c] = address.octets();
    Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00 | u16::from(a), u16::from(b) << 8 | u16::from(c))
}

/// The Ethernet address of a multicast group (RFC 2464 §7).
#[must_use]
pub fn multicast_mac(group: Ipv6Addr) -> Mac {
    let [.., a, b, c, d] = group.octets();
    Mac([0x33, 0x33, a, b, c, d])
}

impl Neighbor {
    /// Reads an IPv6 packet that holds a neighbour solicitation or advertisement, with every
    /// check of RFC 4861 §7.1.1 and §7.1.2.
    #[must_use]
    pub fn parse(packet: &[u8]) -> Option<Self> {
        let (header, rest) = packet.split_first_chunk::<40>()?;
        let [first, _, _, _, len0, len1, next, hop_limit, addresses @ ..] = header;
        // A hop limit of 255 proves that the packet comes from this link.
        if first >> 4 != 6 || *next != NEXT_HEADER_ICMPV6 || *hop_limit != 255 {
            return None;
        }
        let icmp = rest.get(..usize::from(u16::from_be_bytes([*len0, *len1])))?;
        let (source, destination) = addresses.split_first_chunk::<16>()?;
        let source = Ipv6Addr::from(*source);
        let destination = Ipv6Addr::from(*destination.first_chunk::<16>()?);
        if checksum(source, destination, icmp) != 0 {
            return None;
        }
        let (fixed, mut options) = icmp.split_first_chunk::<24>()?;
        let [kind, code, _, _, flags, _, _, _, target @ ..] = fixed;
        let target = Ipv6Addr::from(*target);
        let solicitation = match *kind {
            SOLICITATION => true,
            ADVERTISEMENT => false,
            _ => return None,
        };
        if *code != 0 || target.is_multicast() {
            return None;
        }
        let mut mac = None;
        while !options.is_empty() {
            let [kind, units, ..] = options else { return None };
            // An option of length 0 would never end.
            let length = match usize::from(*units) {
                0 => return None,
                units => units * 8,
            };
            let body = options.get(2..length)?;
            if *kind == if solicitation { OPTION_SOURCE } else { OPTION_TARGET } {
                mac = body.first_chunk::<6>().map(|bytes| Mac(*bytes));
            }
            options = options.get(length..)?;
        }
        let unspecified = source.is_unspecified();
        let malformed = if solicitation {
            // A duplicate check goes to the solicited-node group and names no link-layer address.
            unspecified && (mac.is_some() || destination != solicited_node(target))
        } else {
            // A solicited advertisement (flag S, 0x40) never goes to a group.
            unspecified || (destination.is_multicast() && flags & 0x40 != 0)
        };
        if malformed {
            return None;
        }
        Some(Self { solicitation, source, destination, target, mac })
    }
}

/// Judges a neighbour packet.
#[must_use]
pub fn judge_neighbor(packet: &Neighbor, own: Mac, address: Ipv6Addr) -> Heard<Neighbor> {
    if packet.target != address || packet.mac == Some(own) {
        return Heard::Nothing;
    }
    match (packet.solicitation, packet.mac) {
        (true, _) => Heard::Question(*packet),
        (false, Some(other)) => Heard::Conflict(other),
        (false, None) => Heard::Nothing,
    }
}

/// An advertisement of our address: the answer to a solicitation, or unsolicited for `None`.
/// Gives the packet and the IPv6 destination (to look up the Ethernet one from).
/// RFC 4861 §7.2.4, §7.2.6: override is set; solicited is set unless the asker has no address
/// yet; router is set because a gateway forwards.
#[must_use]
pub fn advertisement(
    mac: Mac,
    address: Ipv6Addr,
    question: Option<&Neighbor>,
) -> ([u8; NA_LEN], Ipv6Addr) {
    let asker = question.map(|question| question.source).filter(|source| !source.is_unspecified());
    let destination = asker.unwrap_or(ALL_NODES);
    let flags = 0x80 | 0x20 | if asker.is_some() { 0x40 } else { 0 };
    let mut icmp = [0; NA_LEN - 40];
    let fields: [&[u8]; 4] =
        [&[ADVERTISEMENT, 0, 0, 0, flags, 0, 0, 0], &address.octets(), &[OPTION_TARGET, 1], &mac.0];
    for (to, from) in icmp.iter_mut().zip(fields.into_iter().flatten()) {
        *to = *from;
    }
    let sum = checksum(address, destination, &icmp).to_be_bytes();
    for (to, from) in icmp.iter_mut().skip(2).zip(sum) {
        *to = from;
    }
    let mut out = [0; NA_LEN];
    let [len0, len1] = ((NA_LEN - 40) as u16).to_be_bytes();
    let fields: [&[u8]; 4] = [
        &[0x60, 0, 0, 0, len0, len1, NEXT_HEADER_ICMPV6, 255],
        &address.octets(),
        &destination.octets(),
        &icmp,
    ];
    for (to, from) in out.iter_mut().zip(fields.into_iter().flatten()) {
        *to = *from;
    }
    (out, destination)
}

/// The ICMPv6 checksum over its pseudo-header (RFC 4443 §2.3); 0 over a packet that is intact.
fn checksum(source: Ipv6Addr, destination: Ipv6Addr, icmp: &[u8]) -> u16 {
    let length = icmp.len() as u32;
    let mut sum = (length >> 16) + (length & 0xffff) + u32::from(NEXT_HEADER_ICMPV6);
    for word in source.segments().into_iter().chain(destination.segments()) {
        sum += u32::from(word);
    }
    for pair in icmp.chunks(2) {
        let word = match pair {
            [high, low] => u16::from_be_bytes([*high, *low]),
            [high] => u16::from_be_bytes([*high, 0]),
            _ => 0,
        };
        // At most 64 KB of 16-bit words: the sum stays below 2^32.
        sum += u32::from(word);
    }
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const OURS: Mac = Mac([2, 0, 0, 0, 0, 1]);
    const THEIRS: Mac = Mac([2, 0, 0, 0, 0, 2]);
    const VIRTUAL: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);

    fn hex(text: &str) -> Vec<u8> {
        let digits: Vec<char> = text.chars().filter(|c| !c.is_whitespace()).collect();
        digits
            .chunks(2)
            .map(|pair| u8::from_str_radix(&pair.iter().collect::<String>(), 16).unwrap())
            .collect()
    }

    // Made with scapy: ARP(op=1, hwsrc="02:00:00:00:00:02", psrc="203.0.113.1", pdst="203.0.113.10").
    const SCAPY_REQUEST: &str = "0001 0800 06 04 0001 020000000002 cb007101 000000000000 cb00710a";

    #[test]
    fn a_request_is_answered_to_the_asker() {
        let mut bytes = hex(SCAPY_REQUEST);
        bytes.extend([0; 18]);
        let request = Arp::parse(&bytes).unwrap();
        assert_eq!(request.emit(), bytes[..ARP_LEN]);
        let Heard::Question(question) = judge_arp(&request, OURS, VIRTUAL) else { panic!() };
        let expected = "0001 0800 06 04 0002 020000000001 cb00710a 020000000002 cb007101";
        assert_eq!(question.answer(OURS, VIRTUAL).emit().to_vec(), hex(expected));
    }

    #[test]
    fn probes_are_answered_announcements_of_others_are_conflicts() {
        let probe =
            Arp { sender: Ipv4Addr::UNSPECIFIED, ..Arp::parse(&hex(SCAPY_REQUEST)).unwrap() };
        assert_eq!(judge_arp(&probe, OURS, VIRTUAL), Heard::Question(probe));
        let announced = Arp::announcement(THEIRS, VIRTUAL);
        assert_eq!(judge_arp(&announced, OURS, VIRTUAL), Heard::Conflict(THEIRS));
        assert_eq!(judge_arp(&Arp::announcement(OURS, VIRTUAL), OURS, VIRTUAL), Heard::Nothing);
        let other = Arp { target: Ipv4Addr::new(203, 0, 113, 11), ..probe };
        assert_eq!(judge_arp(&other, OURS, VIRTUAL), Heard::Nothing);
        let reply = Arp { operation: REPLY, ..probe };
        assert_eq!(judge_arp(&reply, OURS, VIRTUAL), Heard::Nothing);
        let expected = "0001 0800 06 04 0001 020000000001 cb00710a 000000000000 cb00710a";
        assert_eq!(Arp::announcement(OURS, VIRTUAL).emit().to_vec(), hex(expected));
    }

    // Made with scapy 2.5: IPv6(src="2001:db8::2", dst="ff02::1:ff00:10", hlim=255) /
    // ICMPv6ND_NS(tgt="2001:db8::10") / ICMPv6NDOptSrcLLAddr(lladdr="02:00:00:00:00:02").
    const SCAPY_SOLICITATION: &str = "6000000000203aff20010db8000000000000000000000002ff0200000000000000000001ff00001087001c090000000020010db80000000000000000000000100101020000000002";
    // Made with scapy 2.5: IPv6(src="2001:db8::10", dst="2001:db8::2", hlim=255) /
    // ICMPv6ND_NA(R=1, S=1, O=1, tgt="2001:db8::10") / ICMPv6NDOptDstLLAddr(lladdr="02:00:00:00:00:01").
    const SCAPY_ADVERTISEMENT: &str = "6000000000203aff20010db800000000000000000000001020010db800000000000000000000000288000a55e000000020010db80000000000000000000000100201020000000001";
    const VIRTUAL6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x10);

    #[test]
    fn a_solicitation_is_answered_as_scapy_would() {
        let solicitation = Neighbor::parse(&hex(SCAPY_SOLICITATION)).unwrap();
        assert_eq!(solicitation.mac, Some(THEIRS));
        let Heard::Question(question) = judge_neighbor(&solicitation, OURS, VIRTUAL6) else {
            panic!()
        };
        let (packet, to) = advertisement(OURS, VIRTUAL6, Some(&question));
        assert_eq!(packet.to_vec(), hex(SCAPY_ADVERTISEMENT));
        assert_eq!(to, Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 2));
        // The other instance's advertisement of the same address is a conflict to us.
        let theirs = Neighbor::parse(&advertisement(THEIRS, VIRTUAL6, None).0).unwrap();
        assert_eq!(judge_neighbor(&theirs, OURS, VIRTUAL6), Heard::Conflict(THEIRS));
        assert_eq!(judge_neighbor(&theirs, THEIRS, VIRTUAL6), Heard::Nothing);
    }

    #[test]
    fn every_flipped_bit_of_a_solicitation_is_noticed() {
        let good = hex(SCAPY_SOLICITATION);
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            // Traffic class and flow label are not checked by anyone.
            if (4..32).contains(&(bit ^ 7)) {
                continue;
            }
            assert_eq!(Neighbor::parse(&bad), None, "bit {bit}");
        }
        for length in 0..good.len() {
            assert_eq!(Neighbor::parse(&good[..length]), None);
        }
    }

    #[test]
    fn groups_and_their_addresses() {
        let group = solicited_node("2001:db8::1:2233:4455".parse().unwrap());
        assert_eq!(group, "ff02::1:ff33:4455".parse::<Ipv6Addr>().unwrap());
        assert_eq!(multicast_mac(group), Mac([0x33, 0x33, 0xff, 0x33, 0x44, 0x55]));
    }

    proptest! {
        #[test]
        fn parsers_take_anything(bytes in proptest::collection::vec(any::<u8>(), 0..128)) {
            let _ = Arp::parse(&bytes);
            let _ = Neighbor::parse(&bytes);
        }

        // Option areas with a right checksum, so that the option walk is reached.
        #[test]
        fn option_walk_ends(options in proptest::collection::vec(any::<u8>(), 0..80)) {
            let mut packet = hex(SCAPY_SOLICITATION);
            packet.truncate(64);
            packet.extend(&options);
            let length = (packet.len() - 40) as u16;
            packet[4..6].copy_from_slice(&length.to_be_bytes());
            packet[42..44].fill(0);
            let source: [u8; 16] = packet[8..24].try_into().unwrap();
            let destination: [u8; 16] = packet[24..40].try_into().unwrap();
            let sum = checksum(source.into(), destination.into(), &packet[40..]);
            packet[42..44].copy_from_slice(&sum.to_be_bytes());
            if let Some(parsed) = Neighbor::parse(&packet) {
                prop_assert_eq!(parsed.target, VIRTUAL6);
            }
        }
    }
}
