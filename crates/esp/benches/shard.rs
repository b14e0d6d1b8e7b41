//! Sealing and opening a batch of 64 packets through a shard, AES-256-GCM, without system calls, by one SA, and each by
//! the next of ten thousand: `cargo bench -p esp --bench shard`. For other ciphers see the example `throughput`.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a bench may panic")]

#[path = "../tests/common/mod.rs"]
mod common;

use std::cell::RefCell;
use std::net::Ipv4Addr;
use std::time::Duration;

use common::*;
use criterion::measurement::WallTime;
use criterion::{BatchSize, BenchmarkGroup, BenchmarkId, Criterion, Throughput};
use crypto::aead::AeadAlg;
use esp::pin::Pin;
use esp::{Batch, Command, Policy, SLOT_LEN, Shard};

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
        let one = || {
            let (left, right, ..) = pair(AeadAlg::Aes256Gcm16);
            (left, right)
        };
        seal_and_open(&mut group, len, one, &[inner]);
    }
    group.finish();
    let mut group = criterion.benchmark_group("shard, 10,000 SAs");
    let len = 64;
    let to = |slot: u16| format!("{}:4000", host(slot));
    let packets = (0..MANY).map(|slot| udp("10.1.0.9:5000", &to(slot), &vec![7; len - 28]));
    seal_and_open(&mut group, len, many, &packets.collect::<Vec<_>>());
    group.finish();
    criterion.final_summary();
}

/// Batches of these packets of `len` bytes, in turn, from the left shard to the right one.
fn seal_and_open(
    group: &mut BenchmarkGroup<'_, WallTime>,
    len: usize,
    shards: impl Fn() -> (Shard, Shard),
    packets: &[Vec<u8>],
) {
    group.throughput(Throughput::Bytes((BATCH * len) as u64));
    let mut turns = packets.iter().map(|packet| &packet[..]).cycle();

    let (mut left, _) = shards();
    let batch = RefCell::new(Batch::new(BATCH, SLOT_LEN));
    group.bench_function(BenchmarkId::new("seal 64", len), |b| {
        b.iter_batched(
            || refill(&mut batch.borrow_mut(), turns.by_ref().take(BATCH)),
            |()| left.outbound(ms(1), OPEN, &mut batch.borrow_mut()),
            BatchSize::PerIteration,
        );
    });
    assert_eq!(left.stats().sealed % BATCH as u64, 0);

    let (mut left, mut right) = shards();
    let (batch, mut out) = (RefCell::new(Batch::new(BATCH, SLOT_LEN)), Batch::new(BATCH, SLOT_LEN));
    group.bench_function(BenchmarkId::new("open 64", len), |b| {
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
}

const MANY: u16 = 10_000;

/// What lies behind an SA of [`many`].
fn host(slot: u16) -> Ipv4Addr {
    Ipv4Addr::new(10, 2, (slot >> 8) as u8, slot as u8)
}

/// Two owners with [`MANY`] SA pairs between them, each for a host on the right and with its policy on the left.
fn many() -> (Shard, Shard) {
    let (mut left, mut right) = (owner(2), owner(2));
    let mut policies = Vec::new();
    for slot in 0..MANY {
        let (mut left_sa, mut right_sa) = sas(AeadAlg::Aes256Gcm16, slot);
        let behind = vec![ts(&format!("{}/32", host(slot)))];
        left_sa.local_ts.truncate(1);
        right_sa.remote_ts.truncate(1);
        left_sa.remote_ts = behind.clone();
        right_sa.local_ts = behind.clone();
        policies.push(Policy {
            endpoint: MAIN,
            connection: left_sa.connection,
            group: left_sa.connection,
            child: slot,
            local_ts: left_sa.local_ts.clone(),
            remote_ts: behind,
            pin: Pin { id: 1, weight: 1 },
        });
        install(&mut left, &left_sa);
        install(&mut right, &right_sa);
    }
    left.apply(Command::Policies(policies)).unwrap();
    (left, right)
}
