//! Merging a batch of 64 packets of 1400 bytes, and splitting what the TUN gives in one piece:
//! `cargo bench -p esp --bench merging`.

#![allow(clippy::unwrap_used, reason = "a bench may panic")]

#[path = "../tests/common/made.rs"]
mod made;

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, Throughput};
use esp::coalesce::{Merge, Plan};
use esp::segment::Segments;
use made::Made;
use wire::vnet::{Carried, Offload};

const BATCH: usize = 64;
const PACKET: usize = 1400;
/// Bytes of IPv4 and TCP headers, with time stamps.
const HEADER: usize = 52;

/// A batch of so many flows, packet by packet in turn.
fn batch(flows: usize, udp: bool) -> Vec<Vec<u8>> {
    let payload = PACKET - if udp { 28 } else { HEADER };
    let one = |n: usize| {
        let (flow, round) = (n % flows, n / flows);
        let payload = vec![n as u8; payload];
        let made = if udp {
            Made::udp(false, payload)
        } else {
            let seq = (round * payload.len()) as u32;
            Made::tcp(false, seq, payload)
        };
        Made { port: flow as u16, ..made }.bytes()
    };
    (0..BATCH).map(one).collect()
}

fn main() {
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .configure_from_args();

    let mut group = criterion.benchmark_group("merge");
    group.throughput(Throughput::Bytes((BATCH * PACKET) as u64));
    let cases =
        [("tcp, 1 flow", 1, false), ("tcp, 8 flows", 8, false), ("tcp, 64 flows", 64, false)];
    for (name, flows, udp) in cases.into_iter().chain([("udp, 1 flow", 1, true)]) {
        let packets = batch(flows, udp);
        let mut plan = Plan::new(BATCH, BATCH);
        group.bench_function(name, |b| {
            b.iter(|| {
                let numbered = packets.iter().enumerate();
                plan.make(Merge::ALL, numbered.map(|(n, packet)| (n, black_box(&packet[..]), ())));
                let mut merged = 0;
                for planned in plan.iter() {
                    let Some(first) = packets.get(planned.first()) else { continue };
                    let head = planned.run().and_then(|run| run.head(first));
                    merged += usize::from(black_box(head).is_some());
                }
                merged
            });
        });
    }
    group.finish();

    let mut group = criterion.benchmark_group("split");
    for (name, carried) in [("tcp", Carried::Tcp), ("udp", Carried::Udp)] {
        let udp = carried == Carried::Udp;
        let header = if udp { 28 } else { HEADER };
        let payload = vec![7; 46 * (PACKET - HEADER)];
        let whole = if udp { Made::udp(false, payload) } else { Made::tcp(false, 1, payload) };
        let whole = whole.bytes();
        let segment_len = PACKET - header;
        let offload = Offload::Segments { carried, segment_len, transport_at: 20 };
        let mut rooms = vec![vec![0; 2048]; BATCH];
        group.throughput(Throughput::Bytes(whole.len() as u64));
        group.bench_function(name, |b| {
            b.iter(|| {
                let mut segments = Segments::new(black_box(&whole), offload).unwrap();
                let mut rooms = rooms.iter_mut();
                while !segments.is_done() {
                    segments.next_into(&whole, rooms.next().unwrap()).unwrap();
                }
            });
        });
    }
    group.finish();
    criterion.final_summary();
}
