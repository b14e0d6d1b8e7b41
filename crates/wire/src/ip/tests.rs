use super::*;
use crate::ts::{Cidr, Ports};

/// An IPv6 packet with this next header and payload.
fn v6(next: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend((payload.len() as u16).to_be_bytes());
    packet.extend([next, 64]);
    packet.extend([0xfd; 16]);
    packet.extend([0xfe; 16]);
    packet.extend(payload);
    packet
}

/// An extension header of eight bytes.
fn options(next: u8) -> [u8; 8] {
    [next, 0, 1, 4, 0, 0, 0, 0]
}

/// A fragment header: offset in units of eight bytes.
fn fragment(next: u8, offset: u16, more: bool) -> [u8; 8] {
    let field = (offset << 3 | u16::from(more)).to_be_bytes();
    [next, 0, field[0], field[1], 0, 0, 0, 9]
}

/// An IPv4 packet with this flags-and-offset field, protocol and payload; the checksum is not set.
fn v4(flags_and_offset: u16, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x45, 0];
    packet.extend((20 + payload.len() as u16).to_be_bytes());
    packet.extend([0, 0]);
    packet.extend(flags_and_offset.to_be_bytes());
    packet.extend([64, protocol, 0, 0, 10, 1, 0, 2, 10, 2, 0, 3]);
    packet.extend(payload);
    packet
}

const PORTS: [u8; 8] = [0, 9, 0, 10, 0, 8, 0, 0];

#[test]
fn extension_headers_at_the_limit() {
    let chain = |count: usize| {
        let mut payload = Vec::new();
        for i in 1..=count {
            payload.extend(options(if i == count { protocol::UDP } else { protocol::DESTINATION }));
        }
        payload.extend(PORTS);
        v6(protocol::DESTINATION, &payload)
    };
    for count in [1, MAX_EXTENSION_HEADERS - 1, MAX_EXTENSION_HEADERS] {
        let bytes = chain(count);
        let packet = Packet::parse(&bytes).unwrap();
        assert_eq!((packet.protocol, packet.l4_offset), (protocol::UDP, 40 + 8 * count));
        assert_eq!(packet.l4, L4::Ports { src: 9, dst: 10 });
    }
    assert_eq!(Packet::parse(&chain(MAX_EXTENSION_HEADERS + 1)), Err(IpError::ExtensionHeaders));
}

#[test]
fn extension_headers_stay_inside_the_packet() {
    let mut long = options(protocol::UDP);
    long[1] = 1;
    assert_eq!(Packet::parse(&v6(protocol::ROUTING, &long)), Err(IpError::HeaderLength));
    assert_eq!(Packet::parse(&v6(protocol::ROUTING, &long[..1])), Err(IpError::Truncated));
    assert_eq!(
        Packet::parse(&v6(protocol::FRAGMENT, &fragment(17, 0, true)[..7])),
        Err(IpError::Truncated)
    );
    // The payload length ends the walk, not the bytes that follow it.
    let mut padded = v6(protocol::DESTINATION, &options(protocol::UDP));
    padded.extend(PORTS);
    let packet = Packet::parse(&padded).unwrap();
    assert_eq!((packet.l4, packet.total_len), (L4::Hidden, 48));
}

/// Options between fragment header and transport header are seen in the first fragment alone; both
/// fragments must be one flow nevertheless.
#[test]
fn fragments_with_options_inside_are_one_flow() {
    let first =
        [fragment(protocol::DESTINATION, 0, true).as_slice(), &options(protocol::UDP), &PORTS]
            .concat();
    let first = Packet::parse(&v6(protocol::FRAGMENT, &first)).unwrap();
    // What follows looks like another options header of 2,048 bytes, but it is payload.
    let later = [fragment(protocol::DESTINATION, 2, false).as_slice(), &[255; 8]].concat();
    let later = Packet::parse(&v6(protocol::FRAGMENT, &later)).unwrap();
    assert_eq!((first.fragment, first.protocol), (Fragment::First, protocol::UDP));
    assert_eq!((later.fragment, later.l4), (Fragment::Later, L4::Hidden));
    assert_eq!(first.flow(), later.flow());
}

/// RFC 6946: a fragment that is both first and last is a whole datagram.
#[test]
fn atomic_fragments_are_whole() {
    let bytes = [fragment(protocol::UDP, 0, false).as_slice(), &PORTS].concat();
    let packet = Packet::parse(&v6(protocol::FRAGMENT, &bytes)).unwrap();
    assert_eq!((packet.fragment, packet.flow().ports), (Fragment::Whole, (9, 10)));
}

#[test]
fn ipv4_fragments() {
    let kind = |flags| Packet::parse(&v4(flags, 17, &PORTS)).map(|p| (p.fragment, p.l4));
    let seen = L4::Ports { src: 9, dst: 10 };
    assert_eq!(kind(0x4000), Ok((Fragment::Whole, seen)));
    assert_eq!(kind(0x2000), Ok((Fragment::First, seen)));
    assert_eq!(kind(0x2001), Ok((Fragment::Later, L4::Hidden)));
    assert_eq!(kind(0x0001), Ok((Fragment::Later, L4::Hidden)));
}

#[test]
fn lengths_that_lie() {
    let good = v4(0, 17, &PORTS);
    let changed = |at: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[at] = value;
        Packet::parse(&bytes)
    };
    assert!(Packet::parse(&good).is_ok());
    assert_eq!(Packet::parse(&[]), Err(IpError::Version));
    assert_eq!(changed(0, 0x55), Err(IpError::Version));
    assert_eq!(changed(0, 0x44), Err(IpError::HeaderLength));
    assert_eq!(changed(0, 0x48), Err(IpError::HeaderLength));
    assert_eq!(changed(3, 19), Err(IpError::HeaderLength));
    assert_eq!(changed(3, 29), Err(IpError::Truncated));
    assert_eq!(changed(3, 20).map(|p| (p.l4, p.total_len)), Ok((L4::Hidden, 20)));
    assert_eq!(Packet::parse(&good[..19]), Err(IpError::Truncated));
    assert_eq!(Packet::parse(&v6(17, &PORTS)[..39]), Err(IpError::Truncated));
    assert_eq!(Packet::parse(&v6(17, &PORTS)[..47]), Err(IpError::Truncated));
}

fn ts(net: &str, protocol: u8, ports: Ports) -> TrafficSelector {
    let net: Cidr = net.parse().unwrap();
    TrafficSelector::new(net.into(), protocol, ports).unwrap()
}

/// RFC 7296 §3.13: one of TSi and one of TSr must match; its example's four combinations and no fifth.
#[test]
fn packets_match_one_selector_of_each_side() {
    let port = |p| Ports::Range(p, p);
    let from = [ts("198.51.100.66/32", 17, port(100)), ts("198.51.100.66/32", 17, port(200))];
    let to = [ts("0.0.0.0/0", 17, port(300)), ts("0.0.0.0/0", 17, port(400))];
    let matches = |src_port: u16, dst_port: u16, src: &str| {
        let src = std::net::SocketAddr::new(src.parse().unwrap(), src_port);
        let dst = std::net::SocketAddr::new([203, 0, 113, 9].into(), dst_port);
        Packet::parse(&udp_packet(src, dst, b"").unwrap()).unwrap().matches(&from, &to)
    };
    for (src, dst) in [(100, 300), (100, 400), (200, 300), (200, 400)] {
        assert!(matches(src, dst, "198.51.100.66"));
        assert!(!matches(src, dst, "198.51.100.67"));
        assert!(!matches(dst, src, "198.51.100.66"));
    }
    assert!(!matches(100, 500, "198.51.100.66"));
    assert!(!Packet::parse(&v4(0, 17, &PORTS)).unwrap().matches(&[], &to));
}

/// RFC 4301 §4.4.1.3: an ICMP type and code is compared on the sending side only, its addresses and
/// protocol on both.
#[test]
fn icmp_is_matched_by_its_sender() {
    let packet = Packet::parse(&v4(0, protocol::ICMP, &[8, 0, 0, 0])).unwrap();
    let echo = Ports::Range(0x0800, 0x08ff);
    let from = |ports| [ts("10.1.0.0/24", protocol::ICMP, ports)];
    let to = |net, protocol, ports| [ts(net, protocol, ports)];
    assert!(packet.matches(&from(echo), &to("10.2.0.0/24", protocol::ICMP, Ports::Opaque)));
    assert!(packet.matches(&from(echo), &to("10.2.0.0/24", protocol::ICMP, Ports::Range(0, 1))));
    assert!(packet.matches(&from(echo), &to("10.2.0.0/24", 0, Ports::Any)));
    assert!(!packet.matches(&from(Ports::Range(0, 0x7ff)), &to("10.2.0.0/24", 0, Ports::Any)));
    assert!(!packet.matches(&from(Ports::Opaque), &to("10.2.0.0/24", 0, Ports::Any)));
    assert!(!packet.matches(&from(echo), &to("10.3.0.0/24", 0, Ports::Any)));
    assert!(!packet.matches(&from(echo), &to("10.2.0.0/24", protocol::UDP, Ports::Any)));
    // No port to see is not type 0, code 0.
    let empty = Packet::parse(&v4(0, protocol::ICMP, &[8])).unwrap();
    assert_eq!(empty.l4, L4::Hidden);
}

/// RFC 4301 §7: a later fragment goes where any port may, not where some may.
#[test]
fn later_fragments_match_any_and_opaque_only() {
    let packet = Packet::parse(&v4(1, protocol::UDP, &PORTS)).unwrap();
    let side = |net, ports| [ts(net, protocol::UDP, ports)];
    let matches = |ports| packet.matches(&side("10.1.0.0/24", ports), &side("10.2.0.0/24", ports));
    assert!(matches(Ports::Any) && matches(Ports::Opaque));
    assert!(!matches(Ports::Range(9, 10)) && !matches(Ports::Range(0, 65534)));
}

#[test]
fn ecn_and_dscp_share_a_byte() {
    for class in 0..=255u8 {
        let ecn = Ecn::of(class);
        assert_eq!(ecn.apply(class), class);
        assert_eq!(dscp(ecn.apply(0xfc)), 63);
        assert_eq!(Ecn::of(ecn.apply(0)), ecn);
    }
    // RFC 3168 §5: the codepoints.
    let all = [Ecn::NotEct, Ecn::Ect1, Ecn::Ect0, Ecn::Ce];
    assert_eq!(all, [0, 1, 2, 3].map(Ecn::of));
}
