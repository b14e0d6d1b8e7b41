//! Sealing and opening a batch of 64 packets through a shard, AES-256-GCM, without system calls, by one SA, and each by
//! the next of ten thousand: `cargo bench -p esp --bench shard`. For other ciphers see the example `throughput`.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a bench may panic")]

#[path = "../tests/common/mod.rs"]
mod common;

use std::cell::RefCell;
use std::time::Duration;

use common::*;
use criterion::{BatchSize, BenchmarkId, Criterion, Throughput};
use crypto::aead::AeadAlg;
use esp::{Batch, SLOT_LEN, Shard};

const BATCH: usize = 64;

/// Puts the packets into an emptied batch.
fn refill<'a>(batch: &mut Batch, packets: impl Iterator<Item = &'a [u8]>) {
    batch.clear();
    for packet in packets {
        assert!(batch.push().unwrap().fill(packet));
    }
}

fn main() {
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .configure_from_args();
    let mut group = criterion.benchmark_group("shard");
    for len in [64, 1400] {
        let inner = udp("10.1.0.9:5000", "10.2.0.5:4000", &vec![7; len - 28]);
        let plain = || std::iter::repeat_n(&inner[..], BATCH);
        group.throughput(Throughput::Bytes((BATCH * len) as u64));

        let (mut left, ..) = pair(AeadAlg::Aes256Gcm16);
        let batch = RefCell::new(Batch::new(BATCH, SLOT_LEN));
        group.bench_function(BenchmarkId::new("seal 64", len), |b| {
            b.iter_batched(
                || refill(&mut batch.borrow_mut(), plain()),
                |()| left.outbound(ms(1), OPEN, &mut batch.borrow_mut()),
                BatchSize::PerIteration,
            );
        });
        assert_eq!(left.stats().sealed % BATCH as u64, 0);

        let (mut left, mut right, ..) = pair(AeadAlg::Aes256Gcm16);
        let (batch, mut out) =
            (RefCell::new(Batch::new(BATCH, SLOT_LEN)), Batch::new(BATCH, SLOT_LEN));
        group.bench_function(BenchmarkId::new("open 64", len), |b| {
            b.iter_batched(
                || {
                    refill(&mut out, plain());
                    left.outbound(ms(1), OPEN, &mut out);
                    refill(&mut batch.borrow_mut(), out.slots().iter().map(|slot| slot.packet()));
                },
                |()| right.inbound(ms(1), OPEN, &mut batch.borrow_mut()),
                BatchSize::PerIteration,
            );
        });
        assert_eq!(left.stats().sealed, right.stats().opened);
    }
    group.finish();
    by_turns(&mut criterion);
    criterion.final_summary();
}

const MANY: u16 = 10_000;

/// Two owners with [`MANY`] SA pairs between them, each for a host on the right.
fn many() -> (Shard, Shard) {
    let (mut left, mut right) = (owner(2), owner(2));
    for slot in 0..MANY {
        let (mut left_sa, mut right_sa) = sas(AeadAlg::Aes256Gcm16, slot);
        let host = vec![ts(&format!("10.2.{}.{}/32", slot >> 8, slot & 0xff))];
        left_sa.remote_ts = host.clone();
        right_sa.local_ts = host;
        for (shard, sa) in [(&mut left, &mut left_sa), (&mut right, &mut right_sa)] {
            sa.local_ts.truncate(1);
            sa.remote_ts.truncate(1);
            install(shard, sa);
        }
    }
    (left, right)
}

fn by_turns(criterion: &mut Criterion) {
    const LEN: usize = 64;
    let mut group = criterion.benchmark_group("shard, 10,000 SAs");
    group.throughput(Throughput::Bytes((BATCH * LEN) as u64));
    let packets: Vec<Vec<u8>> = (0..MANY)
        .map(|slot| {
            let to = format!("10.2.{}.{}:4000", slot >> 8, slot & 0xff);
            udp("10.1.0.9:5000", &to, &[7; LEN - 28])
        })
        .collect();
    let mut turns = packets.iter().map(|packet| &packet[..]).cycle();

    let (mut left, _) = many();
    let batch = RefCell::new(Batch::new(BATCH, SLOT_LEN));
    group.bench_function(BenchmarkId::new("seal 64", LEN), |b| {
        b.iter_batched(
            || refill(&mut batch.borrow_mut(), turns.by_ref().take(BATCH)),
            |()| left.outbound(ms(1), OPEN, &mut batch.borrow_mut()),
            BatchSize::PerIteration,
        );
    });
    assert_eq!(left.stats().sealed % BATCH as u64, 0);

    let (mut left, mut right) = many();
    let (batch, mut out) = (RefCell::new(Batch::new(BATCH, SLOT_LEN)), Batch::new(BATCH, SLOT_LEN));
    group.bench_function(BenchmarkId::new("open 64", LEN), |b| {
        b.iter_batched(
            || {
                refill(&mut out, turns.by_ref().take(BATCH));
                left.outbound(ms(1), OPEN, &mut out);
                refill(&mut batch.borrow_mut(), out.slots().iter().map(|slot| slot.packet()));
            },
            |()| right.inbound(ms(1), OPEN, &mut batch.borrow_mut()),
            BatchSize::PerIteration,
        );
    });
    assert_eq!(left.stats().sealed, right.stats().opened);
    group.finish();
}
