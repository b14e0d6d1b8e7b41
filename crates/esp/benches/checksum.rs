//! The Internet checksum and the copy that goes with it, beside a bare copy:
//! `cargo bench -p esp --bench checksum`.

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput};
use wire::ip::{Sum, copy_and_sum};

/// An IPv4 header, a short packet, a full one, and all that one read of the TUN gives.
const LENGTHS: [usize; 4] = [20, 64, 1400, 65_000];

fn main() {
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .configure_from_args();
    let bytes: Vec<u8> = (0..70_000_usize).map(|at| (at.wrapping_mul(40_503) >> 7) as u8).collect();
    let mut room = vec![0; bytes.len()];
    let mut group = criterion.benchmark_group("checksum");
    for len in LENGTHS {
        // As payloads stand in packets: at an even address, but at no multiple of eight.
        let from = bytes.get(2..2 + len).unwrap_or_default();
        let to = room.get_mut(4..4 + len).unwrap_or_default();
        group.throughput(Throughput::Bytes(len as u64));
        group.bench_function(BenchmarkId::new("sum", len), |b| {
            b.iter(|| Sum::of(black_box(from)).finish());
        });
        group.bench_function(BenchmarkId::new("copy_and_sum", len), |b| {
            b.iter(|| copy_and_sum(black_box(&mut *to), black_box(from)).finish());
        });
        group.bench_function(BenchmarkId::new("copy", len), |b| {
            b.iter(|| black_box(&mut *to).copy_from_slice(black_box(from)));
        });
    }
    group.finish();
    criterion.final_summary();
}
