//! What must hold of every parser for any bytes: it returns, what it returns is consistent, and what can
//! be written again reads back as itself. Used by tests/mutations.rs and by the targets in tests/fuzz.
#![allow(dead_code, clippy::unwrap_used, reason = "shared; a failed unwrap is a finding")]

use std::hint::black_box;

use wire::ike::{Message, MessageBuilder, Sealed};
use wire::ip::{self, Packet, Sum, Tcp, Udp};
use wire::natt::{self, Datagram};
use wire::{esp, ts};

/// How many inputs got how far, so that a test can tell that it tested something.
#[derive(Default)]
pub(crate) struct Reached {
    pub(crate) messages: u32,
    pub(crate) sealed: u32,
    pub(crate) packets: u32,
    pub(crate) selectors: u32,
}

pub(crate) fn ike(bytes: &[u8], reached: &mut Reached) {
    let Ok(message) = Message::parse(bytes) else { return };
    reached.messages += 1;
    black_box(message.payloads.doubled());
    assert!(message.payloads.len() <= wire::ike::MAX_PAYLOADS);

    // What was read and can be written reads back as itself.
    let mut builder = MessageBuilder::clear(&message.header);
    message.payloads.iter().for_each(|p| {
        builder.push(p);
    });
    if let Ok(again) = builder.finish() {
        assert_eq!(Message::parse(&again).map(|m| m.payloads), Ok(message.payloads));
    }
    if let Some(sealed) = message.sealed {
        reached.sealed += 1;
        seams(&sealed, bytes);
    }
}

fn seams(sealed: &Sealed, bytes: &[u8]) {
    assert_eq!(
        (sealed.aad().end, sealed.iv().end, sealed.body().end),
        (sealed.iv().start, sealed.body().start, bytes.len())
    );
    let mut copy = bytes.to_vec();
    let parts = sealed.split(&mut copy).unwrap();
    assert_eq!(parts.aad.len() + parts.iv.len() + parts.body.len(), bytes.len());
    assert!(parts.body.len() > wire::ike::ICV_LEN);
    // As if this were what came out of decryption.
    let _ = sealed.parse_opened(parts.body);
}

pub(crate) fn selectors(bytes: &[u8], reached: &mut Reached) {
    let Ok(list) = ts::parse_payload(bytes) else { return };
    if list.is_empty() {
        return;
    }
    reached.selectors += 1;
    let mut out = Vec::new();
    ts::emit_payload(&list, &mut out).unwrap();
    assert_eq!(ts::parse_payload(&out).as_ref(), Ok(&list));
    for selector in &list {
        assert!(selector.contains(selector));
        assert!(selector.addrs().cidrs().count() <= 254);
        let _ = selector.to_string();
    }
    for found in ts::narrow(&list, &list) {
        assert!(list.contains(&found) || list.iter().any(|t| t.contains(&found)));
    }
}

pub(crate) fn packet(bytes: &[u8], reached: &mut Reached) {
    if let Ok(packet) = Packet::parse(bytes) {
        reached.packets += 1;
        assert!(packet.l4_offset <= packet.total_len && packet.total_len <= bytes.len());
        let segment = &bytes[packet.l4_offset..packet.total_len];
        black_box(packet.flow());
        black_box(ip::transport_checksum_ok(packet.src, packet.dst, packet.protocol, segment));
        if let Some(udp) = Udp::parse(segment) {
            assert!(udp.payload.len() + ip::UDP_HEADER_LEN <= segment.len());
        }
        if let Some(tcp) = Tcp::parse(segment) {
            assert_eq!(tcp.options.len() + tcp.payload.len() + ip::TCP_HEADER_LEN, segment.len());
        }
        let mut copy = bytes.to_vec();
        ip::set_traffic_class(&mut copy, !packet.traffic_class);
        let changed = Packet::parse(&copy).unwrap();
        assert_eq!((changed.traffic_class, changed.flow()), (!packet.traffic_class, packet.flow()));
    }
    black_box(ip::ipv4_header_checksum(bytes));
}

/// RFC 1071 §1, word by word, the carry brought round at once.
pub(crate) fn slow_sum(bytes: &[u8]) -> u16 {
    let mut sum = 0_u16;
    for pair in bytes.chunks(2) {
        let word = u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]);
        let (added, carry) = sum.overflowing_add(word);
        sum = added + u16::from(carry);
    }
    sum
}

/// The first byte says where the rest is cut in two, at an even place.
pub(crate) fn checksum(bytes: &[u8]) {
    let [cut, bytes @ ..] = bytes else { return };
    let slow = slow_sum(bytes);
    assert_eq!(Sum::of(bytes).folded(), slow);
    assert_eq!(ip::checksum(bytes), !slow);
    let (a, b) = bytes.split_at((usize::from(*cut) * 2).min(bytes.len() & !1));
    assert_eq!(Sum::of(b).add(Sum::of(a)).folded(), slow);
    let mut room = vec![0; bytes.len()];
    assert_eq!(ip::copy_and_sum(&mut room, bytes).folded(), slow);
    assert_eq!(room, bytes);
}

pub(crate) fn encapsulated(bytes: &[u8]) {
    match natt::classify(bytes) {
        Datagram::Esp(esp) => assert!(esp::Header::parse(esp).is_some_and(|h| h.spi.0 != 0)),
        Datagram::Ike(ike) => assert_eq!(ike.len() + 4, bytes.len()),
        Datagram::Keepalive => assert_eq!(bytes, [0xff]),
        Datagram::Short => assert!(bytes.len() < 8),
    }
    if let Some(parts) = esp::split(&mut bytes.to_vec()) {
        assert_eq!(16 + parts.body.len(), bytes.len());
    }
    if let Some((len, _)) = esp::read_trailer(bytes) {
        assert!(len + esp::TRAILER_LEN <= bytes.len());
    }
}
