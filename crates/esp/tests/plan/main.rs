//! Plans for batches of mixed flows, against a slow reference that knows packets by their fields; and whatever the
//! packets are, what must hold of every plan.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests fail by panicking")]
#![allow(clippy::indexing_slicing, reason = "tests fail by panicking")]

#[path = "../common/made.rs"]
mod made;
#[path = "../common/merging.rs"]
mod merging;

use esp::coalesce::{FLOWS, Merge, Plan, Run};
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
    ("IP options", |made| made.ip_options = true),
    ("a wrong checksum", |made| made.broken = true),
    ("no checksum", |made| made.unsummed = made.udp),
    ("a longer payload", |made| made.payload.push(1)),
    ("no payload", |made| made.payload.clear()),
];

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

/// The packets: four flows, which another port makes eight. Perhaps all have one spoil.
fn made(drawn: &[Drawn], all: Option<&Spoil>) -> Vec<(Made, u8)> {
    let mut seqs = [u32::MAX - 3000; 4];
    let one = |(id, (which, length, spoil, origin)): (usize, &Drawn)| {
        let mut made = Made::of_flow(*which, &mut seqs[*which], id, *length);
        for (_, spoil) in [all, *spoil].into_iter().flatten() {
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
    fn as_the_slow_reference_says(
        drawn in drawn(),
        all in prop_oneof![3 => Just(None), 1 => select(SPOILS.iter().map(Some).collect::<Vec<_>>())],
        most in prop_oneof![3 => Just(64), 1 => 1_usize..5],
    ) {
        let packets = made(&drawn, all);
        let got = check(&bytes(&packets), most, &mut Reached::default());
        prop_assert_eq!(got, reference(&packets, most));
    }

    /// Bytes of the headers changed, checksums right: not merged, or the split brings them back.
    #[test]
    fn any_header_byte_may_change(
        drawn in drawn(),
        changes in vec((any::<Index>(), 0_usize..100, any::<u8>()), 1..12),
    ) {
        let mut packets = bytes(&made(&drawn, None));
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

/// Each bit of each header in the middle of a run, with the checksums as they were and with right ones.
#[test]
fn every_bit_of_every_header() {
    let mut reached = Reached::default();
    for which in 0..4 {
        let mut seq = 1000;
        let packets: Vec<_> =
            (0..3).map(|id| (Made::of_flow(which, &mut seq, id, 200), 0)).collect();
        let packets = bytes(&packets);
        assert_eq!(check(&packets, 64, &mut reached), [[0, 1, 2]]);
        let (v4, tcp) = (which % 2 == 0, which < 2);
        let transport = if v4 { 20 } else { 40 };
        let sum_at = transport + if tcp { 16 } else { 6 };
        for bit in 0..(packets[0].0.len() - 200) * 8 {
            for mended in [false, true] {
                let mut packets = packets.clone();
                packets[1].0[bit / 8] ^= 1 << (bit % 8);
                if mended {
                    mend(&mut packets[1].0);
                }
                let groups = check(&packets, 64, &mut reached);
                let case = format!("bit {bit} of flow {which}, mended {mended}: {groups:?}");
                // The identification means nothing, and a checksum that is mended is as it was.
                let word = bit / 16;
                let same = word == sum_at / 2 || v4 && (word == 2 || word == 5);
                let pushed = tcp && bit == (transport + 13) * 8 + 3;
                let joins = mended && (same || pushed);
                match (joins, pushed) {
                    (true, true) => assert_eq!(groups, [vec![0, 1], vec![2]], "{case}"),
                    (true, false) => assert_eq!(groups, [[0, 1, 2]], "{case}"),
                    (false, _) => assert!(groups.contains(&vec![1]), "{case}"),
                }
                // A run by itself says the same.
                let mut run = Run::start(&packets[0].0, Merge::ALL).unwrap();
                assert_eq!(run.add(&packets[0].0, &packets[1].0), joins, "{case}");
            }
        }
    }
    assert!(reached.merged > 4 && reached.merged_udp > 2);
}

/// Bounded fuzzing for every run of the tests; tests/fuzz holds the unbounded kind.
#[test]
fn seeded_mutations() {
    let mut state = 0x7a4d_e311_u64;
    let mut random = || {
        // SplitMix64.
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) as u8
    };
    let mut reached = Reached::default();
    for _ in 0..20_000 {
        let bytes: Vec<u8> = (0..1 + 5 * (random() % 20)).map(|_| random()).collect();
        let (packets, most) = merging::drawn(&bytes);
        check(&packets, most, &mut reached);
    }
    assert!(reached.merged > 5000 && reached.merged_udp > 2000, "it tests little: {reached:?}");
}

#[test]
fn at_the_limits() {
    let mut reached = Reached::default();
    let mut groups = |packets: &[Made]| {
        let packets: Vec<_> = packets.iter().map(|made| (made.clone(), 0)).collect();
        let groups = check(&bytes(&packets), 64, &mut reached);
        assert_eq!(groups, reference(&packets, 64));
        groups.len()
    };
    let mut of = |flow: usize, lengths: &[usize]| {
        let mut seq = 5;
        let made: Vec<_> = lengths
            .iter()
            .enumerate()
            .map(|(n, len)| Made::of_flow(flow, &mut seq, n, *len))
            .collect();
        groups(&made)
    };
    for (flow, header) in [(0, 52), (1, 72), (2, 28), (3, 48)] {
        // The length field of IPv4; IPv6 is held to the same.
        let left = 65_535 - header - 7 * 9000;
        let most = [[9000; 7].as_slice(), &[left]].concat();
        let more = [[9000; 7].as_slice(), &[left + 1]].concat();
        assert_eq!((of(flow, &most), of(flow, &more)), (1, 2), "flow {flow}");
        let least = if flow < 2 { 128 } else { 16 };
        assert_eq!((of(flow, &[least, least, 1]), of(flow, &[least - 1, least - 1])), (1, 2));
    }
    // A datagram whose sum is what a zero would make right: without checksum it is without checksum.
    let mut odd = Made::udp(false, vec![0; 100]);
    let sum = odd.bytes()[26..28].to_vec();
    odd.payload[..2].copy_from_slice(&sum);
    assert_eq!(odd.bytes()[26..28], [0xff, 0xff]);
    let unsummed = Made { unsummed: true, ..odd.clone() };
    assert_eq!(groups(&[odd.clone(), odd.clone()]), 1);
    assert_eq!(groups(&[odd, unsummed]), 2);
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
    check(&round(most + 1, 4), 64, &mut Reached::default());
    // A run that has ended gives its place free: here that of the eighth flow.
    let second = |port: u16, length| {
        (Made { port, ..Made::tcp(false, 200, vec![port as u8; length]) }.bytes(), 0)
    };
    let mut packets = round(most, 1);
    packets.push(second(most - 1, 100));
    packets.push(round(most + 1, 1).remove(FLOWS));
    packets.extend((0..most - 1).chain([most]).map(|port| second(port, 200)));
    let groups = check(&packets, 64, &mut Reached::default());
    assert!(groups.iter().all(|group| group.len() == 2), "{groups:?}");
    // The ninth flow takes the place of the first, the only one whose next packet does not find its run.
    let mut packets = round(most + 1, 2);
    let of_first = packets.remove(FLOWS + 1);
    packets.push(of_first);
    let groups = check(&packets, 64, &mut Reached::default());
    let runs = (1..=FLOWS).map(|flow| vec![flow, flow + FLOWS]);
    let wanted: Vec<_> = [vec![0]].into_iter().chain(runs).chain([vec![2 * FLOWS + 1]]).collect();
    assert_eq!(groups, wanted);
}

#[test]
fn a_plan_is_made_anew_without_allocating() {
    let mut seq = 0;
    let packets: Vec<_> =
        (0..64).map(|id| Made::of_flow(id % 2, &mut seq, id, 300).bytes()).collect();
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
