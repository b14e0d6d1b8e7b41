//! Bounded fuzzing for every run of the tests: truncations, bit flips and seeded mutations of valid
//! messages through every parser (security.md, statement 1). tests/fuzz holds the unbounded kind.
//! A failure prints the input in hexadecimal.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

mod common;

use common::checks::{self, Reached};
use common::{Seeded, vectors};
use wire::ike::{Message, PayloadType, parse_inner, strip_padding};
use wire::ts;

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

fn exercise(bytes: &[u8], reached: &mut Reached) {
    let _shown = Shown(bytes);
    checks::ike(bytes, reached);
    checks::selectors(bytes, reached);
    checks::packet(bytes, reached);
    checks::encapsulated(bytes);
    checks::checksum(bytes);
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
