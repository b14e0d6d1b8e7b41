//! Bounded fuzzing for every run of the tests: truncations, bit flips and seeded mutations of valid
//! messages through every parser (security.md, statement 1). tests/fuzz holds the unbounded kind.
//! A failure prints the input in hexadecimal.

mod common;

use std::hint::black_box;

use common::{Seeded, vectors};
use wire::ike::{Message, MessageBuilder, PayloadType, Sealed, parse_inner, strip_padding};
use wire::ip::{self, Packet, Tcp, Udp};
use wire::natt::{self, Datagram};
use wire::{esp, ts};

/// Prints the input if its owner is dropped by a panic.
struct Shown<'a>(&'a [u8]);

impl Drop for Shown<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let hex: String = self.0.iter().map(|b| format!("{b:02x}")).collect();
            eprintln!("input: {hex}");
        }
    }
}

/// How many inputs got how far, so that a test can tell that it tested something.
#[derive(Default)]
struct Reached {
    messages: u32,
    sealed: u32,
    packets: u32,
    selectors: u32,
}

fn exercise(bytes: &[u8], reached: &mut Reached) {
    let _shown = Shown(bytes);
    ike(bytes, reached);
    selectors(bytes, reached);
    packet(bytes, reached);
    encapsulated(bytes);
}

fn ike(bytes: &[u8], reached: &mut Reached) {
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

fn selectors(bytes: &[u8], reached: &mut Reached) {
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

fn packet(bytes: &[u8], reached: &mut Reached) {
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

fn encapsulated(bytes: &[u8]) {
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

/// The vectors, and the selector payloads inside one of them.
fn seeds() -> Vec<Vec<u8>> {
    let mut seeds: Vec<Vec<u8>> = vectors().into_iter().map(|(_, bytes)| bytes).collect();
    let auth = common::vector("ike_auth_opened");
    let message = Message::parse(&auth).unwrap();
    for list in [message.payloads.ts_i().unwrap(), message.payloads.ts_r().unwrap()] {
        let mut body = Vec::new();
        ts::emit_payload(list, &mut body).unwrap();
        seeds.push(body);
    }
    seeds
}

#[test]
fn truncations_and_bit_flips_of_valid_input() {
    let mut reached = Reached::default();
    for seed in seeds() {
        for len in 0..=seed.len() {
            exercise(&seed[..len], &mut reached);
            // With a length field that agrees, the cut reaches the payloads.
            if len >= 28 {
                exercise(&with_length(&seed[..len]), &mut reached);
            }
        }
        for bit in 0..seed.len() * 8 {
            let mut bytes = seed.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            exercise(&bytes, &mut reached);
        }
    }
    assert!(
        reached.messages > 1000 && reached.packets > 1000 && reached.selectors > 100,
        "it tests little"
    );
}

/// The bytes with the IKE header's length field made right.
fn with_length(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let len = bytes.len() as u32;
    bytes[24..28].copy_from_slice(&len.to_be_bytes());
    bytes
}

#[test]
fn seeded_mutations() {
    const ROUNDS: u32 = 1_000_000;
    let mut random = Seeded(0x7a4d_e311);
    let (seeds, mut reached) = (seeds(), Reached::default());
    for _ in 0..ROUNDS {
        let mut bytes = seeds[random.below(seeds.len())].clone();
        for _ in 0..=random.below(3) {
            mutate(&mut bytes, &seeds, &mut random);
        }
        if bytes.len() >= 28 && random.below(4) != 0 {
            bytes = with_length(&bytes);
        }
        exercise(&bytes, &mut reached);
    }
    assert!(reached.messages > 10_000 && reached.sealed > 1000, "it tests little");
    assert!(reached.packets > 10_000 && reached.selectors > 1000, "it tests little");
}

fn mutate(bytes: &mut Vec<u8>, seeds: &[Vec<u8>], random: &mut Seeded) {
    let at = random.below(bytes.len());
    match random.below(7) {
        _ if bytes.is_empty() => bytes.push(random.next() as u8),
        0 => bytes[at] ^= 1 << random.below(8),
        1 => bytes[at] = random.next() as u8,
        // Values that length and count fields break at.
        2 => bytes[at] = [0, 1, 3, 4, 7, 8, 0x7f, 0x80, 0xff][random.below(9)],
        3 => bytes.truncate(at),
        4 => bytes.insert(at, random.next() as u8),
        5 => {
            bytes.remove(at);
        }
        // A piece of another input.
        _ => {
            let other = &seeds[random.below(seeds.len())];
            let from = random.below(other.len());
            let len = random.below(40).min(other.len() - from).min(bytes.len() - at);
            bytes[at..at + len].copy_from_slice(&other[from..from + len]);
        }
    }
}

#[test]
fn noise() {
    let mut random = Seeded(1);
    for _ in 0..50_000 {
        let bytes: Vec<u8> = (0..random.below(80)).map(|_| random.next() as u8).collect();
        exercise(&bytes, &mut Reached::default());
        let _ = parse_inner(PayloadType(33 + random.below(24) as u8), &bytes);
        let _ = strip_padding(&bytes);
    }
}
