//! No allocation per packet: none over 100,000 packets sealed and 100,000
//! opened, reports polled and leases renewed in between.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests fail by panicking")]

mod common;

use common::*;
use crypto::aead::AeadAlg;
use esp::{Batch, Command, Report, SLOT_LEN, Shard, Verdict, ceiling_for};

const PACKETS: usize = 100_000;
const BATCH: usize = 32;

fn drain(shard: &mut Shard, now: core::time::Duration) {
    while let Some(report) = shard.poll_report(now) {
        if let Report::LeaseLow { spi_in, next_seq, rate_per_s, .. } = report {
            let ceiling = ceiling_for(next_seq, rate_per_s);
            shard.apply(Command::Lease { spi_in, ceiling }).unwrap();
        }
    }
}

#[test]
fn none_over_100_000_packets() {
    let (mut left_sa, mut right_sa) = sas(AeadAlg::Aes256Gcm16, 0);
    // So small that leases are renewed often.
    (left_sa.ceiling, right_sa.ceiling) = (500, 500);
    let (mut left, mut right) = (owner(2), owner(2));
    install(&mut left, &left_sa);
    install(&mut right, &right_sa);
    for shard in [&mut left, &mut right] {
        own(shard, 2, 0, true);
    }
    let inner4 = udp("10.1.0.9:5000", "10.2.0.5:4000", &[7; 1300]);
    let inner6 = udp("[fd01::9]:5000", "[fd02::5]:4000", &[7; 64]);
    let (mut there, mut batch) = (Batch::new(BATCH, SLOT_LEN), Batch::new(BATCH, SLOT_LEN));

    let (mut sent, mut delivered) = (0, 0);
    let mut turn = |turn: usize, left: &mut Shard, right: &mut Shard| {
        let now = ms(1000 + turn as u64);
        batch.clear();
        there.clear();
        for n in 0..BATCH {
            let inner = if n % 2 == 0 { &inner4 } else { &inner6 };
            assert!(batch.push().unwrap().fill(inner));
        }
        left.outbound(now, OPEN, &mut batch);
        for slot in batch.slots() {
            if let Verdict::Send { .. } = slot.verdict() {
                sent += 1;
                assert!(there.push().unwrap().fill(slot.packet()));
            }
        }
        right.inbound(now, OPEN, &mut there);
        delivered +=
            there.slots().iter().filter(|s| matches!(s.verdict(), Verdict::Deliver { .. })).count();
        // A packet of noise, and one that nobody has an SA for.
        batch.clear();
        assert!(batch.push().unwrap().fill(&[turn as u8; 100]));
        right.inbound(now, OPEN, &mut batch);
        left.outbound(now, OPEN, &mut batch);
        drain(left, now);
        drain(right, now);
        sent
    };
    // Not counted: the first turns, which may grow a cache.
    turn(0, &mut left, &mut right);
    let counted = allocation_counter::measure(|| {
        let mut at = 1;
        while turn(at, &mut left, &mut right) < PACKETS + BATCH {
            at += 1;
        }
    });
    assert!(sent >= PACKETS + BATCH && sent == delivered, "{sent} sent, {delivered} delivered");
    assert_eq!(counted.count_total, 0, "allocations");

    // Nor while packets are held, released and steered.
    let counted = allocation_counter::measure(|| {
        // The answer to this command allocates: a list of counters, a report.
        left.apply(Command::Hold { endpoint: MAIN }).unwrap();
    });
    assert!(counted.count_total > 0, "the counter counts nothing");
    drain(&mut left, ms(5000));
    let counted = allocation_counter::measure(|| {
        for steer in [false, true] {
            if steer {
                batch.clear();
            }
            batch.clear();
            for _ in 0..BATCH {
                assert!(batch.push().unwrap().fill(&inner4));
            }
            left.outbound(ms(5000), OPEN, &mut batch);
            assert!(batch.slots().iter().all(|s| s.verdict() == Verdict::Held));
        }
        left.apply(Command::Release { endpoint: MAIN }).unwrap();
        let mut flushed = 0;
        loop {
            match left.flush(ms(5000), OPEN, &mut batch) {
                0 => break,
                n => flushed += n,
            }
        }
        assert_eq!(flushed, 2 * BATCH);
    });
    assert_eq!(counted.count_total, 0, "allocations while holding");
}
