//! Nanoseconds per packet of sealing and opening, on one core:
//! `cargo run --release -p esp --example throughput`.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a bench may panic")]
#![allow(clippy::disallowed_methods, reason = "a bench reads the clock; the crate does not")]

#[path = "../tests/common/mod.rs"]
mod common;

use common::*;
use crypto::aead::AeadAlg;
use esp::{Batch, SLOT_LEN};
use std::time::Instant;

const BATCH: usize = 32;
const ROUNDS: usize = 20_000;

fn main() {
    println!(
        "{:<18} {:>6} {:>12} {:>12} {:>12}",
        "alg", "bytes", "seal ns", "open ns", "open Gb/s"
    );
    for alg in AeadAlg::ALL {
        for len in [64, 512, 1400] {
            let (mut left, mut right, ..) = pair(alg);
            let inner = udp("10.1.0.9:5000", "10.2.0.5:4000", &vec![7; len - 28]);
            let (mut out, mut back) = (Batch::new(BATCH, SLOT_LEN), Batch::new(BATCH, SLOT_LEN));
            let (mut seal, mut open) = (0u128, 0u128);
            for _ in 0..ROUNDS {
                out.clear();
                back.clear();
                for _ in 0..BATCH {
                    assert!(out.push().unwrap().fill(&inner));
                }
                let at = Instant::now();
                left.outbound(ms(1), OPEN, &mut out);
                seal += at.elapsed().as_nanos();
                for slot in out.slots() {
                    assert!(back.push().unwrap().fill(slot.packet()));
                }
                let at = Instant::now();
                right.inbound(ms(1), OPEN, &mut back);
                open += at.elapsed().as_nanos();
            }
            let packets = (ROUNDS * BATCH) as u128;
            assert_eq!(u128::from(right.stats().opened), packets);
            let (seal, open) = (seal / packets, open / packets);
            let gbps = len as f64 * 8.0 / open as f64;
            println!("{:<18} {len:>6} {seal:>12} {open:>12} {gbps:>12.1}", format!("{alg:?}"));
        }
    }
}
