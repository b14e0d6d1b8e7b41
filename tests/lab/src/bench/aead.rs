//! What an AEAD by ring costs by itself: the yardstick for the workers' own share.

use crate::clock;
use crate::error::{Error, Result};
use ring::aead::{AES_256_GCM, Aad, Algorithm, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use serde::Serialize;
use std::time::Duration;

/// As many packets as a gateway handles at once, so that the caches see about as much.
const BATCH: usize = 44;

/// Which AEAD.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aead {
    /// AES-256-GCM.
    Aes256Gcm,
    /// ChaCha20-Poly1305.
    Chacha20Poly1305,
}

impl Aead {
    fn algorithm(self) -> &'static Algorithm {
        match self {
            Aead::Aes256Gcm => &AES_256_GCM,
            Aead::Chacha20Poly1305 => &CHACHA20_POLY1305,
        }
    }
}

/// The cost of one packet, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Cost {
    /// To seal it.
    pub seal_ns: f64,
    /// To open it.
    pub open_ns: f64,
}

impl Cost {
    /// Both.
    pub fn both_ns(&self) -> f64 {
        self.seal_ns + self.open_ns
    }
}

/// Seals and opens packets of `length` bytes for about `time` on `threads` threads at once (a machine whose processors
/// share cores is slower with all of them at work, and the gateways are at work at once). The mean over the threads.
pub fn measure(aead: Aead, length: usize, threads: usize, time: Duration) -> Result<Cost> {
    let failed = || Error::check("ring refused its own packet");
    let workers: Vec<_> = (0..threads.max(1))
        .map(|_| std::thread::spawn(move || one_thread(aead, length, time).ok_or(())))
        .collect();
    let count = workers.len() as f64;
    let mut sum = Cost::default();
    for worker in workers {
        let cost = worker.join().map_err(|_| failed())?.map_err(|()| failed())?;
        sum.seal_ns += cost.seal_ns / count;
        sum.open_ns += cost.open_ns / count;
    }
    Ok(sum)
}

fn one_thread(aead: Aead, length: usize, time: Duration) -> Option<Cost> {
    let key = LessSafeKey::new(UnboundKey::new(aead.algorithm(), &[7; 32]).ok()?);
    let tag_len = aead.algorithm().tag_len();
    let mut packets = vec![vec![0x5a_u8; length + tag_len]; BATCH];
    // SPI and sequence number, as ESP authenticates them.
    let aad = [1_u8; 8];
    let nonce = |number: u64| {
        let mut bytes = [0; 12];
        bytes[4..].copy_from_slice(&number.to_be_bytes());
        Nonce::assume_unique_for_key(bytes)
    };
    let (mut number, mut count) = (0_u64, 0_u64);
    let (mut sealing, mut opening) = (Duration::ZERO, Duration::ZERO);
    let started = clock::now();
    while clock::now() < started + time {
        let before = clock::now();
        for (n, packet) in (number..).zip(&mut packets) {
            let (payload, room) = packet.split_at_mut(length);
            let tag = key.seal_in_place_separate_tag(nonce(n), Aad::from(&aad), payload).ok()?;
            room.copy_from_slice(tag.as_ref());
        }
        let between = clock::now();
        for (n, packet) in (number..).zip(&mut packets) {
            let opened = key.open_in_place(nonce(n), Aad::from(&aad), packet).ok()?;
            std::hint::black_box(opened.len());
        }
        sealing += between - before;
        opening += clock::now() - between;
        number += BATCH as u64;
        count += BATCH as u64;
    }
    let per_packet = |span: Duration| span.as_nanos() as f64 / count.max(1) as f64;
    Some(Cost { seal_ns: per_packet(sealing), open_ns: per_packet(opening) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_sealed_opens_again_with_either() {
        for aead in [Aead::Aes256Gcm, Aead::Chacha20Poly1305] {
            let cost = measure(aead, 1400, 2, Duration::from_millis(5)).unwrap();
            assert!(cost.seal_ns > 0.0 && cost.open_ns > 0.0, "{aead:?}: {cost:?}");
        }
    }
}
