//! Plans for batches of mixed flows, against a slow reference that knows packets by their fields; and whatever the
//! packets are, what must hold of every plan.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests fail by panicking")]
#![allow(clippy::indexing_slicing, reason = "tests fail by panicking")]

#[path = "../common/made.rs"]
mod made;
#[path = "../common/merging.rs"]
mod merging;

use esp::coalesce::{FLOWS, Merge, Plan};
use made::{ACK, Made, PSH, reference};
use merging::{Reached, check, mend};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{Index, select};

type Spoil = (&'static str, fn(&mut Made));

/// What may be unusual about one packet.
const SPOILS: &[Spoil] = &[
    ("PSH", |made| made.flags |= PSH),
    ("another port", |made| made.port = 4001),
    ("a gap", |made| made.seq = made.seq.wrapping_add(1)),
    ("a repetition", |made| made.seq = made.seq.wrapping_sub(1)),
    ("another acknowledgement", |made| made.ack += 1),
    ("another window", |made| made.window += 1),
    ("FIN", |made| made.flags |= 0x01),
    ("SYN", |made| made.flags |= 0x02),
    ("RST", |made| made.flags |= 0x04),
    ("URG", |made| made.flags |= 0x20),
    ("ECE", |made| made.flags |= 0x40),
    ("CWR", |made| made.flags |= 0x80),
    ("no ACK", |made| made.flags &= !ACK),
    ("a reserved bit", |made| made.reserved = 1),
    ("an urgent pointer", |made| made.urgent = 1),
    ("another time stamp", |made| *made.options.last_mut().unwrap_or(&mut 0) ^= 1),
    ("no options", |made| made.options.clear()),
    ("congestion experienced", |made| made.traffic_class = 3),
    ("another DSCP", |made| made.traffic_class = 0x20),
    ("another hop limit", |made| made.hop_limit -= 1),
    ("another flow label", |made| made.label += 1),
    ("more fragments", |made| made.fragment_word = 0x6000),
    ("a later fragment", |made| made.fragment_word = 0x4001),
    ("no DF", |made| made.fragment_word = 0),
    ("the reserved flag", |made| made.fragment_word = 0xc000),
    ("IPv4 options", |made| made.ip_options = true),
    ("a wrong checksum", |made| made.broken = true),
    ("no checksum", |made| made.unsummed = made.udp),
    ("a longer payload", |made| made.payload.push(1)),
    ("no payload", |made| made.payload.clear()),
];

/// TCP and UDP over IPv4 and IPv6: at most eight flows, with another port for each.
fn flow(flow: usize, seq: &mut u32, id: usize, length: usize) -> Made {
    let payload = (0..length).map(|at| (at * 7 + id) as u8).collect();
    let made = match flow {
        0 | 1 => Made::tcp(flow == 1, *seq, payload),
        _ => Made::udp(flow == 3, payload),
    };
    *seq = seq.wrapping_add(length as u32);
    Made { id: id as u16, ..made }
}

/// Of a packet: flow, length, perhaps a spoil, and what the caller says of it.
type Drawn = (usize, usize, Option<&'static Spoil>, u8);

fn drawn() -> impl Strategy<Value = Vec<Drawn>> {
    let length = prop_oneof![
        12 => Just(600_usize),
        3 => select(vec![300, 599, 601]),
        1 => select(vec![0, 1, 15, 16, 127, 128, 1400, 9000]),
    ];
    let spoil =
        prop_oneof![8 => Just(None), 1 => select(SPOILS.iter().map(Some).collect::<Vec<_>>())];
    let origin = prop_oneof![12 => Just(0_u8), 1 => Just(1)];
    vec((0_usize..4, length, spoil, origin), 1..64)
}

fn made(drawn: &[Drawn]) -> Vec<(Made, u8)> {
    let mut seqs = [u32::MAX - 3000; 4];
    let one = |(id, (which, length, spoil, origin)): (usize, &Drawn)| {
        let mut made = flow(*which, &mut seqs[*which], id, *length);
        if let Some((_, spoil)) = spoil {
            spoil(&mut made);
        }
        (made, *origin)
    };
    drawn.iter().enumerate().map(one).collect()
}

fn bytes(packets: &[(Made, u8)]) -> Vec<(Vec<u8>, u8)> {
    packets.iter().map(|(made, origin)| (made.bytes(), *origin)).collect()
}

proptest! {
    /// Whatever may be merged is, nothing else is, and all in the right order.
    #[test]
    fn as_the_slow_reference_says(drawn in drawn(), most in prop_oneof![3 => Just(64), 1 => 1_usize..5]) {
        let packets = made(&drawn);
        let got = check(&bytes(&packets), most, &mut Reached::default());
        prop_assert_eq!(got, reference(&packets, most));
    }

    /// One byte of the headers changed, checksums right: not merged, or the split brings it back.
    #[test]
    fn any_header_byte_may_change(
        drawn in drawn(),
        changes in vec((any::<Index>(), 0_usize..100, any::<u8>()), 1..12),
    ) {
        let mut packets = bytes(&made(&drawn));
        for (which, at, value) in changes {
            let packet = &mut which.get_mut(&mut packets).0;
            if let Some(byte) = packet.get_mut(at) {
                *byte = value;
            }
            mend(packet);
        }
        check(&packets, 64, &mut Reached::default());
    }

    #[test]
    fn any_bytes(packets in vec((vec(any::<u8>(), 0..120), 0_u8..2), 0..20), ip: bool) {
        let mut packets = packets;
        for (packet, _) in &mut packets {
            if ip && let [first, ..] = &mut packet[..] {
                *first = if *first & 1 == 0 { 0x45 } else { 0x60 };
            }
            mend(packet);
        }
        check(&packets, 64, &mut Reached::default());
    }
}

/// Each byte of each header in turn, each of its bits, in the middle of a run of TCP and of UDP.
#[test]
fn every_bit_of_every_header() {
    let mut reached = Reached::default();
    for which in 0..4 {
        let mut seq = 1000;
        let packets: Vec<_> = (0..3).map(|id| (flow(which, &mut seq, id, 200), 0)).collect();
        let packets = bytes(&packets);
        assert_eq!(check(&packets, 64, &mut reached), [[0, 1, 2]]);
        let header_len = packets[0].0.len() - 200;
        for bit in 0..header_len * 8 {
            for mended in [false, true] {
                let mut packets = packets.clone();
                packets[1].0[bit / 8] ^= 1 << (bit % 8);
                if mended {
                    mend(&mut packets[1].0);
                }
                let groups = check(&packets, 64, &mut reached);
                // Alone the identification, once the checksum covers it, may differ; PSH ends the run; and a change
                // of a field that is mended is none.
                let at = bit / 8;
                let (v4, tcp) = (which % 2 == 0, which < 2);
                let transport = if v4 { 20 } else { 40 };
                let sum_at = transport + if tcp { 16 } else { 6 };
                let mended_away = mended && (at / 2 == sum_at / 2 || v4 && at / 2 == 5);
                if mended_away || mended && v4 && at / 2 == 2 {
                    assert_eq!(groups, [[0, 1, 2]], "bit {bit} of flow {which}");
                } else if mended && tcp && at == transport + 13 && bit % 8 == 3 {
                    assert_eq!(groups, [vec![0, 1], vec![2]]);
                } else {
                    assert!(
                        groups.contains(&vec![1]),
                        "bit {bit} of flow {which}, mended {mended}: {groups:?}"
                    );
                }
            }
        }
    }
    assert!(reached.merged > 4 && reached.merged_udp > 2);
}

/// Bounded fuzzing for every run of the tests; tests/fuzz holds the unbounded kind.
#[test]
fn seeded_mutations() {
    let mut state = 0x7a4d_e311_u64;
    let mut random = |bound: usize| {
        // SplitMix64.
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % bound as u64) as usize
    };
    let mut reached = Reached::default();
    for _ in 0..3000 {
        let mut seqs = [0; 4];
        let mut packets: Vec<(Vec<u8>, u8)> = (0..12)
            .map(|id| {
                let which = random(4);
                let length = [200, 200, 200, 150][random(4)];
                (flow(which, &mut seqs[which], id, length).bytes(), 0)
            })
            .collect();
        for _ in 0..random(6) {
            let which = random(packets.len());
            let packet = &mut packets[which].0;
            let at = random(packet.len().min(100));
            match random(5) {
                0 => packet[at] ^= 1 << random(8),
                1 => {
                    packet[at] = [0, 1, 4, 5, 6, 17, 0x40, 0x45, 0x60, 0x7f, 0x80, 0xff][random(12)]
                }
                2 => packet.truncate(at),
                3 => packet.insert(at, random(256) as u8),
                _ => packets.swap(which, (which + 1) % 12),
            }
            if random(4) != 0 {
                mend(&mut packets[which].0);
            }
        }
        check(&packets, 64, &mut reached);
    }
    assert!(reached.merged > 5000 && reached.merged_udp > 2000, "it tests little: {reached:?}");
}

/// With more flows than can be kept open merging suffers, order does not.
#[test]
fn more_flows_than_places() {
    let round = |flows: u16, rounds: u32| -> Vec<(Vec<u8>, u8)> {
        (0..rounds)
            .flat_map(|round| (0..flows).map(move |port| (round, port)))
            .map(|(round, port)| {
                (Made { port, ..Made::tcp(false, round * 200, vec![port as u8; 200]) }.bytes(), 0)
            })
            .collect()
    };
    let most = FLOWS as u16;
    assert_eq!(check(&round(most, 4), 64, &mut Reached::default()).len(), FLOWS);
    let groups = check(&round(most + 1, 4), 64, &mut Reached::default());
    assert!(groups.len() > FLOWS + 1, "{groups:?}");
    // Those that keep their place still grow.
    assert!(groups.iter().any(|group| group.len() > 1), "{groups:?}");
}

#[test]
fn a_plan_is_made_anew_without_allocating() {
    let mut seq = 0;
    let packets: Vec<_> = (0..64).map(|id| flow(id % 2, &mut seq, id, 300).bytes()).collect();
    let mut plan = Plan::new(64, 64);
    let numbered = || packets.iter().enumerate().map(|(n, bytes)| (n, &bytes[..], ()));
    let counted = allocation_counter::measure(|| {
        for _ in 0..3 {
            plan.make(Merge::ALL, numbered());
            assert_eq!(plan.iter().map(|planned| planned.numbers().count()).sum::<usize>(), 64);
        }
    });
    assert_eq!(counted.count_total, 0, "allocations");
    // A batch that is larger than said is planned all the same.
    let mut small = Plan::new(1, 64);
    small.make(Merge::ALL, numbered());
    assert_eq!(small.iter().map(|planned| planned.count()).sum::<usize>(), 64);
}
