//! Splitting against a slow reference: each part is built anew from what it should carry, field by field, and
//! compared byte by byte.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests fail by panicking")]
#![allow(clippy::indexing_slicing, reason = "tests fail by panicking")]

use core::net::IpAddr;

use esp::segment::Segments;
use proptest::prelude::*;
use wire::ip::{
    ipv4_header_checksum, partial_checksum, protocol, transport_checksum, transport_checksum_ok,
};
use wire::vnet::{Carried, Offload};

const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const CWR: u8 = 0x80;

/// What a host's stack made, or a part of it.
#[derive(Clone, Debug)]
struct Sent {
    carried: Carried,
    ipv6: bool,
    traffic_class: u8,
    id: u16,
    ip_options: usize,
    seq: u32,
    flags: u8,
    tcp_options: usize,
    payload: Vec<u8>,
}

impl Sent {
    fn addresses(&self) -> (IpAddr, IpAddr) {
        let [src, dst] =
            if self.ipv6 { ["fd02::5", "fd01::9"] } else { ["10.2.255.255", "10.1.0.9"] };
        (src.parse().unwrap(), dst.parse().unwrap())
    }

    fn protocol(&self) -> u8 {
        if self.carried == Carried::Tcp { protocol::TCP } else { protocol::UDP }
    }

    fn transport_at(&self) -> usize {
        if self.ipv6 { 40 } else { 20 + self.ip_options * 4 }
    }

    /// The packet, its checksum filled in by the function, which sees the TCP or UDP part.
    fn bytes(&self, checksum: impl Fn(IpAddr, IpAddr, u8, &[u8]) -> u16) -> Vec<u8> {
        let mut part = Vec::from([0x13, 0x88, 0x0f, 0xa0]);
        match self.carried {
            Carried::Tcp => {
                part.extend(self.seq.to_be_bytes());
                part.extend([0, 0, 0, 7, (5 + self.tcp_options as u8) << 4, self.flags]);
                part.extend([1, 2, 0, 0, 0, 0]);
                part.extend((0..self.tcp_options * 4).map(|n| n as u8));
            }
            Carried::Udp => {
                part.extend((8 + self.payload.len() as u16).to_be_bytes());
                part.extend([0, 0]);
            }
        }
        part.extend(&self.payload);
        let (src, dst) = self.addresses();
        let at = self.carried.checksum_at();
        let sum = checksum(src, dst, self.protocol(), &part);
        part[at..at + 2].copy_from_slice(&sum.to_be_bytes());

        let mut packet = Vec::new();
        match (src, dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                packet.extend([0x45 + self.ip_options as u8, self.traffic_class]);
                packet.extend(((self.transport_at() + part.len()) as u16).to_be_bytes());
                packet.extend(self.id.to_be_bytes());
                packet.extend([0x40, 0, 64, self.protocol(), 0, 0]);
                packet.extend(src.octets());
                packet.extend(dst.octets());
                packet.extend(vec![1; self.ip_options * 4]);
                let sum = ipv4_header_checksum(&packet).unwrap();
                packet[10..12].copy_from_slice(&sum.to_be_bytes());
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                packet.extend([0x60 | self.traffic_class >> 4, self.traffic_class << 4, 0, 0]);
                packet.extend((part.len() as u16).to_be_bytes());
                packet.extend([self.protocol(), 64]);
                packet.extend(src.octets());
                packet.extend(dst.octets());
            }
            _ => unreachable!(),
        }
        packet.extend(part);
        packet
    }

    /// As the kernel hands it over: the checksum field holds the pseudo-header's sum.
    fn unfinished(&self) -> Vec<u8> {
        self.bytes(|src, dst, number, part| partial_checksum(src, dst, number, part.len()).unwrap())
    }

    fn finished(&self) -> Vec<u8> {
        self.bytes(|src, dst, number, part| match transport_checksum(src, dst, number, part) {
            Some(0) => 0xffff,
            sum => sum.unwrap(),
        })
    }

    /// The packets that it stands for, slowly.
    fn parts(&self, segment_len: usize) -> Vec<Sent> {
        let chunks: Vec<&[u8]> = self.payload.chunks(segment_len).collect();
        let mut parts = Vec::new();
        for (n, chunk) in chunks.iter().enumerate() {
            let mut part = Sent { payload: chunk.to_vec(), ..self.clone() };
            part.id = self.id.wrapping_add(n as u16);
            part.seq = self.seq.wrapping_add((n * segment_len) as u32);
            if n + 1 < chunks.len() {
                part.flags &= !(FIN | PSH);
            }
            if n > 0 {
                part.flags &= !CWR;
            }
            parts.push(part);
        }
        parts
    }
}

fn split(packet: &[u8], offload: Offload) -> Option<Vec<Vec<u8>>> {
    let mut segments = Segments::new(packet, offload)?;
    let mut out = Vec::new();
    while !segments.is_done() {
        let mut room = [0xaa; 2048];
        let length = segments.next_into(packet, &mut room)?;
        assert!(room[length..].iter().all(|byte| *byte == 0xaa), "nothing beyond the part");
        out.push(room[..length].to_vec());
    }
    Some(out)
}

prop_compose! {
    fn sent()(
        udp in any::<bool>(),
        ipv6 in any::<bool>(),
        traffic_class in any::<u8>(),
        id in prop_oneof![any::<u16>(), 0xfff0_u16..],
        ip_options in 0_usize..=2,
        seq in prop_oneof![any::<u32>(), 0xffff_0000_u32..],
        flags in any::<u8>(),
        tcp_options in 0_usize..=10,
        payload in prop::collection::vec(any::<u8>(), 1..5000),
    ) -> Sent {
        let carried = if udp { Carried::Udp } else { Carried::Tcp };
        Sent { carried, ipv6, traffic_class, id, ip_options, seq, flags, tcp_options, payload }
    }
}

proptest! {
    #[test]
    fn each_part_is_what_it_would_be_if_it_had_been_sent_alone(
        sent in sent(),
        segment_len in prop_oneof![Just(1_usize), 1..1400_usize],
    ) {
        // A part must fit a slot, and the reference builds thousands otherwise.
        let segment_len = segment_len.max(sent.payload.len() / 60);
        let offload = Offload::Segments {
            carried: sent.carried,
            segment_len,
            transport_at: sent.transport_at(),
        };
        let whole = sent.unfinished();
        let got = split(&whole, offload).unwrap();
        prop_assert_eq!(Segments::new(&whole, offload).unwrap().packets(), got.len());
        let wanted: Vec<Vec<u8>> = sent.parts(segment_len).iter().map(Sent::finished).collect();
        prop_assert_eq!(&got, &wanted);
        let (src, dst) = sent.addresses();
        for part in got {
            let transport = &part[sent.transport_at()..];
            prop_assert!(transport_checksum_ok(src, dst, sent.protocol(), transport));
        }
    }

    #[test]
    fn a_checksum_that_was_left_to_us_is_completed(sent in sent()) {
        let sent = Sent { payload: sent.payload[..sent.payload.len().min(1400)].to_vec(), ..sent };
        let from = sent.transport_at();
        let offload = Offload::Checksum { from, at: from + sent.carried.checksum_at() };
        prop_assert_eq!(split(&sent.unfinished(), offload), Some(vec![sent.finished()]));
        let whole = sent.finished();
        prop_assert_eq!(split(&whole, Offload::None), Some(vec![whole.clone()]));
    }

    /// Whatever the header in front says of whatever bytes: no panic, an end, and nothing beyond the room.
    #[test]
    fn any_bytes_with_any_header(
        bytes in prop::collection::vec(any::<u8>(), 0..300),
        version in prop_oneof![Just(0x45_u8), Just(0x46), Just(0x60), any::<u8>()],
        header in any::<[u8; 10]>(),
        kind in prop_oneof![Just(0_u8), Just(1), Just(4), Just(5), any::<u8>()],
        at in prop_oneof![Just(20_u16), Just(24), Just(40), any::<u16>()],
        room in 0_usize..200,
    ) {
        let mut bytes = bytes;
        if let Some(first) = bytes.first_mut() {
            *first = version;
        }
        let mut header = header;
        header[0] = 1;
        header[1] = kind;
        header[6..8].copy_from_slice(&at.to_ne_bytes());
        let offset = if kind == 5 { 6_u16 } else { 16 };
        header[8..10].copy_from_slice(&offset.to_ne_bytes());
        if let Some(mut segments) = Segments::new(&bytes, Offload::decode(&header)) {
            let mut steps = 0;
            while !segments.is_done() {
                let _ = segments.next_into(&bytes, &mut vec![0; room]);
                steps += 1;
                prop_assert!(steps <= bytes.len() + 1, "it ends");
            }
        }
    }
}

/// RFC 8200 §8.1: with a routing header, the checksum's destination is the last one, not the header's.
#[test]
fn a_routing_header_does_not_mislead() {
    for carried in [Carried::Tcp, Carried::Udp] {
        let sent = Sent {
            carried,
            ipv6: true,
            traffic_class: 0,
            id: 0,
            ip_options: 0,
            seq: 7,
            flags: 0x10,
            tcp_options: 3,
            payload: (0..3001_u16).map(|n| n as u8).collect(),
        };
        let (src, last) = sent.addresses();
        let next: core::net::Ipv6Addr = "fd03::1".parse().unwrap();
        let mut packet = sent.unfinished();
        let IpAddr::V6(address) = last else { unreachable!() };
        // One segment is left (RFC 8754 §2).
        let mut routing = vec![sent.protocol(), 2, 4, 1, 0, 0, 0, 0];
        routing.extend(address.octets());
        let len = u16::from_be_bytes([packet[4], packet[5]]) + routing.len() as u16;
        packet[4..6].copy_from_slice(&len.to_be_bytes());
        packet[6] = 43;
        packet[24..40].copy_from_slice(&next.octets());
        packet.splice(40..40, routing);
        let offload = Offload::Segments { carried, segment_len: 1000, transport_at: 64 };
        let parts = split(&packet, offload).unwrap();
        assert_eq!(parts.len(), 4);
        for part in parts {
            assert!(transport_checksum_ok(src, last, sent.protocol(), &part[64..]));
        }
    }
}

/// RFC 768: a computed zero is sent as all ones, since zero says that there is none.
#[test]
fn no_datagram_says_that_it_has_no_checksum() {
    let mut sent = Sent {
        carried: Carried::Udp,
        ipv6: false,
        traffic_class: 0,
        id: 1,
        ip_options: 0,
        seq: 0,
        flags: 0,
        tcp_options: 0,
        payload: vec![0; 2],
    };
    let udp = |packet: &[u8]| [packet[26], packet[27]];
    let sum = udp(&sent.finished());
    sent.payload = sum.to_vec();
    let whole = sent.unfinished();
    let got = split(&whole, Offload::Checksum { from: 20, at: 26 }).unwrap();
    assert_eq!(udp(&got[0]), [0xff, 0xff]);
    let one = Offload::Segments { carried: Carried::Udp, segment_len: 2, transport_at: 20 };
    assert_eq!(udp(&split(&whole, one).unwrap()[0]), [0xff, 0xff]);
}

#[test]
fn what_is_not_so_is_refused() {
    let sent = Sent {
        carried: Carried::Tcp,
        ipv6: false,
        traffic_class: 0,
        id: 1,
        ip_options: 0,
        seq: 1,
        flags: 0x10,
        tcp_options: 3,
        payload: vec![1; 3000],
    };
    let packet = sent.unfinished();
    let offload = |transport_at, segment_len, carried| Offload::Segments {
        carried,
        segment_len,
        transport_at,
    };
    let tcp = Carried::Tcp;
    assert!(Segments::new(&packet, offload(20, 1400, tcp)).is_some());
    assert!(Segments::new(&packet, offload(24, 1400, tcp)).is_none(), "no options are there");
    assert!(Segments::new(&packet, offload(20, 0, tcp)).is_none());
    assert!(Segments::new(&packet[..52], offload(20, 1400, tcp)).is_none(), "nothing to carry");
    assert!(Segments::new(&packet, offload(4000, 1400, tcp)).is_none());
    assert!(Segments::new(&packet, Offload::Unknown).is_none());
    assert!(Segments::new(&packet, Offload::Checksum { from: 20, at: 3051 }).is_none());
    assert!(Segments::new(&packet, Offload::Checksum { from: 20, at: 19 }).is_none());
    let mut short = packet.clone();
    short[20 + 12] = 0x40;
    assert!(Segments::new(&short, offload(20, 1400, tcp)).is_none(), "a header below 20 bytes");
    // A part longer than the room ends it.
    let mut segments = Segments::new(&packet, offload(20, 2900, tcp)).unwrap();
    assert_eq!(segments.next_into(&packet, &mut [0; 2048]), None);
    assert!(segments.is_done());
    // Another packet than it began with.
    let mut segments = Segments::new(&packet, offload(20, 1400, tcp)).unwrap();
    assert_eq!(segments.next_into(&packet[1..], &mut [0; 2048]), None);
}
