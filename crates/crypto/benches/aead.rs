//! Sealing and opening one packet by this crate, and by ring beside it: why `crypto::aead` is not ring's.
//! `cargo bench -p crypto`.

#![allow(clippy::unwrap_used, reason = "a bench may panic")]

use std::hint::black_box;
use std::time::Duration;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput};
use crypto::aead::{AeadAlg, AeadKey, IvSequence};
use ring::aead::{AES_256_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};

/// SPI and sequence number, as ESP authenticates them.
const AAD: [u8; 8] = [1; 8];

fn main() {
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .configure_from_args();
    for (alg, other, name) in [
        (AeadAlg::Aes256Gcm16, &AES_256_GCM, "aes-256-gcm"),
        (AeadAlg::ChaCha20Poly1305, &CHACHA20_POLY1305, "chacha20-poly1305"),
    ] {
        let mut group = criterion.benchmark_group(name);
        let keymat = vec![7; alg.keymat_len()];
        let key = AeadKey::new(alg, &keymat).unwrap();
        let ring = LessSafeKey::new(UnboundKey::new(other, &keymat[..alg.key_len()]).unwrap());
        let nonce = |iv: [u8; 8]| {
            let mut bytes = [0; 12];
            bytes[..4].copy_from_slice(&keymat[alg.key_len()..]);
            bytes[4..].copy_from_slice(&iv);
            Nonce::assume_unique_for_key(bytes)
        };
        let mut ivs = IvSequence::new(0);
        for len in [64, 512, 1400] {
            group.throughput(Throughput::Bytes(len as u64));
            let mut packet = vec![0x5a; len];
            group.bench_function(BenchmarkId::new("seal", len), |b| {
                b.iter(|| key.seal_in_place(ivs.next_iv(0).unwrap(), &AAD, black_box(&mut packet)));
            });
            group.bench_function(BenchmarkId::new("seal, ring", len), |b| {
                b.iter(|| {
                    let nonce = nonce(ivs.next_iv(0).unwrap());
                    ring.seal_in_place_separate_tag(nonce, Aad::from(AAD), black_box(&mut packet))
                });
            });
            let iv = ivs.next_iv(0).unwrap();
            let tag = key.seal_in_place(iv, &AAD, &mut packet).unwrap();
            let sealed = [&packet[..], &tag].concat();
            let fresh = || sealed.clone();
            group.bench_function(BenchmarkId::new("open", len), |b| {
                let open = |buf: &mut Vec<u8>| key.open_in_place(iv, &AAD, buf).unwrap().len();
                b.iter_batched_ref(fresh, open, BatchSize::SmallInput);
            });
            group.bench_function(BenchmarkId::new("open, ring", len), |b| {
                let open = |buf: &mut Vec<u8>| {
                    ring.open_in_place(nonce(iv), Aad::from(AAD), buf).unwrap().len()
                };
                b.iter_batched_ref(fresh, open, BatchSize::SmallInput);
            });
        }
        group.finish();
    }
    criterion.final_summary();
}
