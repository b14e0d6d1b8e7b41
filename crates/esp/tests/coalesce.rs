//! Merging of neighbours against a slow reference (plans: `plan`): what is merged and split again, by rules written down a second time
//! here, is what was there; and nothing is merged that must not be.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests fail by panicking")]
#![allow(clippy::indexing_slicing, reason = "tests fail by panicking")]

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use esp::coalesce::{Merge, Run};
use proptest::prelude::*;
use wire::ip::{ipv4_header_checksum, protocol, transport_checksum, udp_packet};
use wire::vnet::{Carried, Segmented};

const ACK: u8 = 0x10;
const PSH: u8 = 0x08;

/// What a TCP segment is made of.
#[derive(Clone, Debug, PartialEq)]
struct Tcp {
    ipv6: bool,
    seq: u32,
    ack: u32,
    flags: u8,
    window: u16,
    urgent: u16,
    port: u16,
    options: Vec<u8>,
    payload: Vec<u8>,
    traffic_class: u8,
    hop_limit: u8,
    /// IPv4 alone.
    id: u16,
    fragment_word: u16,
}

impl Tcp {
    fn new(ipv6: bool, seq: u32, payload: &[u8]) -> Self {
        Self {
            ipv6,
            seq,
            ack: 77,
            flags: ACK,
            window: 500,
            urgent: 0,
            port: 4000,
            options: vec![1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2],
            payload: payload.to_vec(),
            traffic_class: 0,
            hop_limit: 64,
            id: 0,
            fragment_word: 0x4000,
        }
    }

    fn addresses(&self) -> (IpAddr, IpAddr) {
        if self.ipv6 {
            let at = |n| IpAddr::V6(Ipv6Addr::new(0xfd02, 0, 0, 0, 0, 0, 0, n));
            (at(5), at(9))
        } else {
            (Ipv4Addr::new(10, 2, 0, 5).into(), Ipv4Addr::new(10, 1, 0, 9).into())
        }
    }

    fn packet(&self) -> Vec<u8> {
        let mut tcp = Vec::new();
        tcp.extend(5000_u16.to_be_bytes());
        tcp.extend(self.port.to_be_bytes());
        tcp.extend(self.seq.to_be_bytes());
        tcp.extend(self.ack.to_be_bytes());
        tcp.extend([(5 + self.options.len() as u8 / 4) << 4, self.flags]);
        tcp.extend(self.window.to_be_bytes());
        tcp.extend([0, 0]);
        tcp.extend(self.urgent.to_be_bytes());
        tcp.extend(&self.options);
        tcp.extend(&self.payload);
        let (src, dst) = self.addresses();
        let sum = transport_checksum(src, dst, protocol::TCP, &tcp).unwrap();
        tcp[16..18].copy_from_slice(&sum.to_be_bytes());
        let mut packet = Vec::new();
        match (src, dst) {
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                let word = 0x6000_0000_u32 | u32::from(self.traffic_class) << 20;
                packet.extend(word.to_be_bytes());
                packet.extend((tcp.len() as u16).to_be_bytes());
                packet.extend([protocol::TCP, self.hop_limit]);
                packet.extend(src.octets());
                packet.extend(dst.octets());
            }
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                packet.extend([0x45, self.traffic_class]);
                packet.extend((20 + tcp.len() as u16).to_be_bytes());
                packet.extend(self.id.to_be_bytes());
                packet.extend(self.fragment_word.to_be_bytes());
                packet.extend([self.hop_limit, protocol::TCP, 0, 0]);
                packet.extend(src.octets());
                packet.extend(dst.octets());
                let sum = ipv4_header_checksum(&packet).unwrap();
                packet[10..12].copy_from_slice(&sum.to_be_bytes());
            }
            _ => unreachable!(),
        }
        packet.extend(tcp);
        packet
    }
}

/// A merged packet as it is written: the headers of the whole and all payloads.
fn whole(run: &Run, packets: &[&Vec<u8>]) -> (Vec<u8>, Segmented) {
    let head = run.head(packets[0]).unwrap();
    let mut whole = head.bytes().to_vec();
    packets.iter().for_each(|packet| whole.extend(&packet[run.header_len()..]));
    (whole, head.form)
}

/// A list of packets, neighbours merged: each that leaves with how it is to be split.
fn merge(packets: &[Vec<u8>]) -> Vec<(Vec<u8>, Option<Segmented>)> {
    let mut written = Vec::new();
    let mut rest = packets;
    while let Some((first, more)) = rest.split_first() {
        let Some(mut run) = Run::start(first, Merge::ALL) else {
            written.push((first.clone(), None));
            rest = more;
            continue;
        };
        let count = 1 + more.iter().take_while(|packet| run.add(first, packet)).count();
        assert_eq!(run.count(), count);
        if count == 1 {
            assert!(run.head(first).is_none());
            written.push((first.clone(), None));
        } else {
            let (bytes, form) = whole(&run, &rest[..count].iter().collect::<Vec<_>>());
            written.push((bytes, Some(form)));
        }
        rest = &rest[count..];
    }
    written
}

fn split_all(written: &[(Vec<u8>, Option<Segmented>)]) -> Vec<Vec<u8>> {
    let parts = |(whole, form): &(Vec<u8>, Option<Segmented>)| {
        form.map_or(vec![whole.clone()], |form| split(whole, &form))
    };
    written.iter().flat_map(parts).collect()
}

/// What a network card does with a merged packet, byte by byte and with no regard to speed.
fn split(packet: &[u8], form: &Segmented) -> Vec<Vec<u8>> {
    let (tcp_at, header_len) = (usize::from(form.transport_at), usize::from(form.header_len));
    let (src, dst): (IpAddr, IpAddr) = if form.ipv6 {
        let at = |at: usize| IpAddr::from(<[u8; 16]>::try_from(&packet[at..at + 16]).unwrap());
        (at(8), at(24))
    } else {
        let at = |at: usize| IpAddr::from(<[u8; 4]>::try_from(&packet[at..at + 4]).unwrap());
        (at(12), at(16))
    };
    let length_says = usize::from(u16::from_be_bytes(
        packet[if form.ipv6 { 4..6 } else { 2..4 }].try_into().unwrap(),
    ));
    assert_eq!(length_says + if form.ipv6 { 40 } else { 0 }, packet.len());
    let chunks: Vec<&[u8]> = packet[header_len..].chunks(usize::from(form.segment_len)).collect();
    let mut offset = 0;
    let mut all = Vec::new();
    for (n, chunk) in chunks.iter().enumerate() {
        let mut one = packet[..header_len].to_vec();
        one.extend(*chunk);
        let length = if form.ipv6 { one.len() - 40 } else { one.len() } as u16;
        let length_at = if form.ipv6 { 4 } else { 2 };
        one[length_at..length_at + 2].copy_from_slice(&length.to_be_bytes());
        match form.carried {
            Carried::Tcp => {
                let seq = u32::from_be_bytes(packet[tcp_at + 4..tcp_at + 8].try_into().unwrap());
                one[tcp_at + 4..tcp_at + 8]
                    .copy_from_slice(&seq.wrapping_add(offset).to_be_bytes());
                if n + 1 < chunks.len() {
                    one[tcp_at + 13] &= !PSH;
                }
            }
            Carried::Udp => {
                let length = (8 + chunk.len()) as u16;
                one[tcp_at + 4..tcp_at + 6].copy_from_slice(&length.to_be_bytes());
            }
        }
        if !form.ipv6 {
            let sum = ipv4_header_checksum(&one).unwrap();
            one[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        let (number, at) = match form.carried {
            Carried::Tcp => (protocol::TCP, tcp_at + 16),
            Carried::Udp => (protocol::UDP, tcp_at + 6),
        };
        // From the checksum of the pseudo-header that the merged packet must hold: it is the complement of an empty
        // segment's, but for the length.
        one[at..at + 2].fill(0);
        let sum = transport_checksum(src, dst, number, &one[tcp_at..]).unwrap();
        one[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        offset += chunk.len() as u32;
        all.push(one);
    }
    all
}

/// IPv4 identification means nothing where DF is set, and a split makes its own.
fn without_id(mut packet: Vec<u8>) -> Vec<u8> {
    if packet[0] >> 4 == 4 && packet[6] & 0x40 != 0 {
        packet[4..6].fill(0);
        let sum = ipv4_header_checksum(&packet).unwrap();
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
    }
    packet
}

fn stream(ipv6: bool, lengths: &[usize]) -> Vec<Tcp> {
    let mut seq = u32::MAX - 3000;
    lengths
        .iter()
        .enumerate()
        .map(|(n, &length)| {
            let payload: Vec<u8> = (0..length).map(|at| (at * 7 + n) as u8).collect();
            let segment = Tcp { id: n as u16, ..Tcp::new(ipv6, seq, &payload) };
            seq = seq.wrapping_add(length as u32);
            segment
        })
        .collect()
}

fn packets(stream: &[Tcp]) -> Vec<Vec<u8>> {
    stream.iter().map(Tcp::packet).collect()
}

#[test]
fn a_bulk_transfer_becomes_one_packet_and_the_same_segments_again() {
    for ipv6 in [false, true] {
        let mut stream = stream(ipv6, &[1388; 40]);
        stream[39].payload.truncate(100);
        stream[39].flags |= PSH;
        let packets = packets(&stream);
        let written = merge(&packets);
        assert_eq!(written.len(), 1);
        let (whole, form) = &written[0];
        let form = form.unwrap();
        assert_eq!((form.ipv6, form.segment_len), (ipv6, 1388));
        let again: Vec<_> = split(whole, &form).into_iter().map(without_id).collect();
        assert_eq!(again, packets.into_iter().map(without_id).collect::<Vec<_>>());
    }
}

#[test]
fn the_merged_packet_holds_the_sum_of_the_pseudo_header() {
    // RFC 9293 §3.1, by hand: 10.2.0.5, 10.1.0.9, protocol 6, 32 bytes of header and 2000 of payload.
    let written = merge(&packets(&stream(false, &[1000, 1000])));
    let sum = 0x0a02 + 0x0005 + 0x0a01 + 0x0009 + 6 + 2032;
    assert_eq!(u16::from_be_bytes(written[0].0[36..38].try_into().unwrap()), sum);
}

#[test]
fn a_packet_never_outgrows_its_length_field() {
    for ipv6 in [false, true] {
        let packets = packets(&stream(ipv6, &[1400; 60]));
        let written = merge(&packets);
        assert_eq!(written.len(), 2);
        let again: Vec<_> =
            written.iter().flat_map(|(whole, form)| split(whole, &form.unwrap())).collect();
        assert_eq!(again.len(), 60);
        assert!(again.into_iter().map(without_id).eq(packets.into_iter().map(without_id)));
    }
}

type Spoil = (&'static str, fn(&mut Tcp));

/// What makes the second of three segments one that must not join the first.
const APART: &[Spoil] = &[
    ("another port", |tcp| tcp.port += 1),
    ("a gap", |tcp| tcp.seq = tcp.seq.wrapping_add(1)),
    ("a repetition", |tcp| tcp.seq = tcp.seq.wrapping_sub(1)),
    ("another acknowledgement", |tcp| tcp.ack = tcp.ack.wrapping_add(1)),
    ("another window", |tcp| tcp.window = tcp.window.wrapping_add(1)),
    ("FIN", |tcp| tcp.flags |= 0x01),
    ("SYN", |tcp| tcp.flags |= 0x02),
    ("RST", |tcp| tcp.flags |= 0x04),
    ("URG", |tcp| tcp.flags |= 0x20),
    ("ECE", |tcp| tcp.flags |= 0x40),
    ("CWR", |tcp| tcp.flags |= 0x80),
    ("no ACK", |tcp| tcp.flags = 0),
    ("an urgent pointer", |tcp| tcp.urgent = 1),
    ("another time stamp", |tcp| tcp.options[7] = tcp.options[7].wrapping_add(1)),
    ("fewer options", |tcp| tcp.options.clear()),
    ("a longer payload", |tcp| tcp.payload.push(1)),
    ("no payload", |tcp| tcp.payload.clear()),
    ("congestion experienced", |tcp| tcp.traffic_class = 3),
    ("another DSCP", |tcp| tcp.traffic_class = 0x20),
    ("another hop limit", |tcp| tcp.hop_limit -= 1),
];

#[test]
fn what_tcp_would_see_differently_stays_apart() {
    for ipv6 in [false, true] {
        for (what, spoil) in APART {
            let mut stream = stream(ipv6, &[500, 500, 500]);
            spoil(&mut stream[1]);
            let packets = packets(&stream);
            let written = merge(&packets);
            assert_eq!(written[0], (packets[0].clone(), None), "{what}, IPv6 {ipv6}");
        }
        let written = merge(&packets(&stream(ipv6, &[500, 500, 500])));
        assert_eq!(written.len(), 1, "without a reason they are one");
    }
}

#[test]
fn fragments_and_packets_that_may_become_some_stay_apart() {
    // No DF; DF with more fragments; an offset.
    for word in [0, 0x6000, 0x4001] {
        let mut stream = stream(false, &[500, 500]);
        for tcp in &mut stream {
            tcp.fragment_word = word;
        }
        assert_eq!(merge(&packets(&stream)).len(), 2, "{word:#x}");
    }
}

#[test]
fn a_wrong_checksum_stays_wrong() {
    for ipv6 in [false, true] {
        for spoiled in 0..2 {
            let mut packets = packets(&stream(ipv6, &[500, 500]));
            let last = packets[spoiled].len() - 1;
            packets[spoiled][last] ^= 1;
            let written = merge(&packets);
            assert!(written.iter().map(|(whole, _)| whole).eq(&packets), "{spoiled}");
        }
    }
    let mut packets = packets(&stream(false, &[500, 500]));
    packets[1][10] ^= 1;
    assert_eq!(merge(&packets).len(), 2, "of the IPv4 header");
}

#[test]
fn push_and_a_short_segment_end_a_packet() {
    for ipv6 in [false, true] {
        let mut pushed = stream(ipv6, &[500; 4]);
        pushed[1].flags |= PSH;
        let written = merge(&packets(&pushed));
        assert_eq!(written.len(), 2);
        assert_eq!(written[0].0[usize::from(written[0].1.unwrap().transport_at) + 13], ACK | PSH);
        assert_eq!(written[1].0[usize::from(written[1].1.unwrap().transport_at) + 13], ACK);
        assert_eq!(merge(&packets(&stream(ipv6, &[500, 400, 400, 400]))).len(), 2);
    }
}

proptest! {
    /// Streams with faults anywhere: merged and split, they are what they were.
    #[test]
    fn what_is_split_again_is_what_was_there(
        ipv6: bool,
        lengths in prop::collection::vec(prop_oneof![Just(600), Just(300), 0_usize..700], 1..40),
        spoils in prop::collection::vec((0_usize..40, 0..APART.len()), 0..4),
        flips in prop::collection::vec((0_usize..40, any::<prop::sample::Index>(), 1_u8..=255), 0..3),
        pushes in prop::collection::vec(0_usize..40, 0..4),
    ) {
        let mut stream = stream(ipv6, &lengths);
        for (at, which) in spoils {
            if let Some(tcp) = stream.get_mut(at) && !tcp.options.is_empty() {
                APART[which].1(tcp);
            }
        }
        for at in pushes {
            if let Some(tcp) = stream.get_mut(at) {
                tcp.flags |= PSH;
            }
        }
        let mut packets = packets(&stream);
        for (at, byte, mask) in flips {
            if let Some(packet) = packets.get_mut(at) {
                let byte = byte.index(packet.len());
                packet[byte] ^= mask;
            }
        }
        let again = split_all(&merge(&packets));
        prop_assert_eq!(again.len(), packets.len());
        for (again, packet) in again.into_iter().zip(packets) {
            // Where nothing was merged not even the identification may have changed.
            prop_assert!(again == packet || without_id(again) == without_id(packet));
        }
    }

    /// No bytes whatever are read beyond their end, or make a packet of another size.
    #[test]
    fn any_bytes_pass(a in prop::collection::vec(any::<u8>(), 0..120), b in prop::collection::vec(any::<u8>(), 0..120)) {
        let written = merge(&[a.clone(), b.clone()]);
        prop_assert_eq!(written.iter().map(|(whole, _)| whole.len()).sum::<usize>(), a.len() + b.len());
    }
}

fn datagrams(lengths: &[usize]) -> Vec<Vec<u8>> {
    let ends = ("10.2.0.5:5000".parse().unwrap(), "10.1.0.9:4000".parse().unwrap());
    lengths.iter().map(|n| udp_packet(ends.0, ends.1, &vec![*n as u8; *n]).unwrap()).collect()
}

#[test]
fn datagrams_of_one_length_become_one_packet_and_the_same_datagrams_again() {
    let packets = datagrams(&[1300, 1300, 1300, 77]);
    let written = merge(&packets);
    assert_eq!(written.len(), 1);
    let form = written[0].1.unwrap();
    assert_eq!((form.carried, form.segment_len, form.header_len), (Carried::Udp, 1300, 28));
    let again: Vec<_> = split_all(&written).into_iter().map(without_id).collect();
    assert_eq!(again, packets.into_iter().map(without_id).collect::<Vec<_>>());
}

#[test]
fn datagrams_that_a_split_would_change_stay_apart() {
    assert_eq!(merge(&datagrams(&[300, 301])).len(), 2, "a longer one");
    assert_eq!(merge(&datagrams(&[300, 200, 200])).len(), 2, "a shorter one is the last");
    assert_eq!(merge(&datagrams(&[300, 0])).len(), 2, "an empty one");
    assert_eq!(merge(&datagrams(&[15, 15])).len(), 2, "not worth it");
    let spoiled = |at: usize, to: &[u8]| {
        let mut packets = datagrams(&[300, 300]);
        packets[1][at..at + to.len()].copy_from_slice(to);
        merge(&packets).len()
    };
    assert_eq!(spoiled(26, &[0, 0]), 2, "without a checksum");
    assert_eq!(spoiled(40, &[1]), 2, "with a wrong one");
    assert_eq!(spoiled(28, &[(300_usize % 256) as u8]), 1, "as it was");
}
