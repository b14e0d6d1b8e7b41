//! Two shards back to back, and what happens to packets while an endpoint
//! changes hands.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests fail by panicking")]

mod common;

use common::*;
use core::time::Duration;
use crypto::aead::AeadAlg;
use esp::pin::Pin;
use esp::replay::WINDOW;
use esp::{
    Batch, Command, CommandError, Config, Direction, Policy, Reason, Report, SLOT_LEN, Sa, Shard,
    Steered, Verdict,
};
use proptest::prelude::*;
use wire::id::{ConnectionId, EndpointId, Term};
use wire::ts::{Ports, TrafficSelector};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    // Every packet arrives exactly once, in any order within the window;
    // duplicates are refused, whenever they come.
    #[test]
    fn exactly_once_in_any_order(
        which in 0..3usize,
        count in 1..400u32,
        sizes in prop::collection::vec(0..1400usize, 8),
        order in any::<u64>(),
        block in 1..WINDOW as usize,
        batch_len in 1..64usize,
    ) {
        let (mut left, mut right, ..) = pair(AeadAlg::ALL[which]);
        let inner: Vec<Vec<u8>> = (0..count)
            .map(|i| {
                let mut payload = vec![i as u8; sizes[i as usize % sizes.len()]];
                payload.extend(i.to_be_bytes());
                if i % 3 == 0 {
                    udp("[fd01::9]:5000", "[fd02::5]:4000", &payload)
                } else {
                    udp("10.1.0.9:5000", "10.2.0.5:4000", &payload)
                }
            })
            .collect();
        let mut esp = Vec::new();
        for some in inner.chunks(batch_len) {
            let mut batch = batch_of(some);
            left.outbound(ms(1), OPEN, &mut batch);
            for slot in batch.slots() {
                let sends = matches!(slot.verdict(), Verdict::Send { .. });
                prop_assert!(sends);
                esp.push(slot.packet().to_vec());
            }
        }
        // Shuffled within blocks no wider than the window; each sent twice.
        let mut arriving: Vec<usize> = (0..esp.len()).flat_map(|i| [i, i]).collect();
        let mut state = order | 1;
        for some in arriving.chunks_mut(block) {
            for i in (1..some.len()).rev() {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                some.swap(i, (state >> 33) as usize % (i + 1));
            }
        }
        let mut got = vec![0; esp.len()];
        for some in arriving.chunks(batch_len) {
            let packets: Vec<&[u8]> = some.iter().map(|i| esp[*i].as_slice()).collect();
            let mut batch = batch_of(&packets);
            right.inbound(ms(1), OPEN, &mut batch);
            for (slot, i) in batch.slots().iter().zip(some) {
                match slot.verdict() {
                    Verdict::Deliver { .. } => {
                        prop_assert_eq!(slot.packet(), inner[*i].as_slice());
                        got[*i] += 1;
                    }
                    other => prop_assert_eq!(other, Verdict::Drop(Reason::Replayed)),
                }
            }
        }
        prop_assert!(got.iter().all(|n| *n == 1), "{:?}", got);
        prop_assert_eq!(right.stats().opened, u64::from(count));
        prop_assert_eq!(right.stats().dropped(Reason::Replayed), u64::from(count));
    }

    // security.md, statement 1.
    #[test]
    fn noise_is_counted_and_dropped(packets in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 1..20)) {
        let (_, mut right, _, right_sa) = pair(AeadAlg::Aes256Gcm16);
        let packets: Vec<Vec<u8>> = packets
            .into_iter()
            .enumerate()
            .map(|(i, p)| if i % 2 == 0 { p } else { [&right_sa.spi_in.to_bytes(), &p[..]].concat() })
            .collect();
        for direction in [Direction::Inbound, Direction::Outbound] {
            let before = right.stats().dropped_in_all();
            let mut batch = batch_of(&packets);
            match direction {
                Direction::Inbound => right.inbound(ms(1), OPEN, &mut batch),
                Direction::Outbound => right.outbound(ms(1), OPEN, &mut batch),
            }
            for slot in batch.slots() {
                let dropped = matches!(slot.verdict(), Verdict::Drop(_));
                prop_assert!(dropped);
            }
            prop_assert_eq!(right.stats().dropped_in_all() - before, packets.len() as u64);
        }
    }
}

#[test]
fn trailing_bytes_behind_the_inner_packet_do_not_travel() {
    let (mut left, mut right, ..) = pair(AeadAlg::Aes128Gcm16);
    let inner = numbered(5);
    let padded = [inner.as_slice(), &[0xee; 9]].concat();
    let esp = sealed(&mut left, ms(1), &padded);
    assert_eq!(esp.len(), wire::esp::sealed_len(inner.len()));
    assert_eq!(opened(&mut right, ms(1), &esp), inner);
    assert_eq!(seal(&mut left, ms(1), &inner[..27]).0, Verdict::Drop(Reason::MalformedInner));
}

#[test]
fn send_says_where_to() {
    let (mut left, _, sa, _) = pair(AeadAlg::Aes128Gcm16);
    let (verdict, esp) = seal(&mut left, ms(1), &numbered(0));
    let want =
        Verdict::Send { endpoint: MAIN, from: sa.local, to: sa.remote, udp_encap: sa.udp_encap };
    assert_eq!(verdict, want);
    assert_eq!(wire::esp::Header::parse(&esp).unwrap().spi, sa.spi_out);
}

// --- policies ---

fn policy(connection: u16, child: u16, local: &str, remote: &str) -> Policy {
    Policy {
        endpoint: MAIN,
        connection: ConnectionId(connection),
        group: ConnectionId(connection),
        child,
        local_ts: vec![ts(local)],
        remote_ts: vec![ts(remote)],
        pin: Pin { id: 1, weight: 1 },
    }
}

// ha.md, invariant 8: no SA, no packet; and control hears of it, not too often.
#[test]
fn without_an_sa_nothing_leaves_and_control_is_told_once_a_second() {
    let mut left = owner(2);
    let policies = vec![
        policy(3, 1, "10.1.0.0/16", "10.2.0.0/16"),
        policy(4, 0, "10.1.0.0/16", "10.3.0.0/16"),
    ];
    left.apply(Command::Policies(policies)).unwrap();
    let told = |shard: &mut Shard, at| {
        reports(shard, at)
            .into_iter()
            .map(|report| match report {
                Report::NoSa { endpoint: MAIN, connection, child } => (connection.0, child),
                other => panic!("{other:?}"),
            })
            .collect::<Vec<_>>()
    };
    let to = |n: u8| udp("10.1.0.9:1", &format!("10.{n}.0.5:1"), b"");
    for at in 0..1500 {
        assert_eq!(seal(&mut left, ms(at), &to(2)).0, Verdict::Drop(Reason::NoSa));
        assert_eq!(seal(&mut left, ms(at), &to(4)).0, Verdict::Drop(Reason::NoPolicy));
        let want = if at == 0 || at == 1000 { vec![(3, 1)] } else { vec![] };
        assert_eq!(told(&mut left, ms(at)), want, "{at}");
    }
    assert_eq!(seal(&mut left, ms(1500), &to(3)).0, Verdict::Drop(Reason::NoSa));
    assert_eq!(left.next_wakeup(), Some(Duration::ZERO));
    assert_eq!(told(&mut left, ms(1500)), [(4, 0)]);

    // Installed is not in use yet.
    let (sa, _) = sas(AeadAlg::Aes128Gcm16, 0);
    left.apply(Command::Install(Box::new(copy(&sa)))).unwrap();
    assert_eq!(seal(&mut left, ms(1501), &to(2)).0, Verdict::Drop(Reason::NoSa));
    left.apply(Command::UseOutbound { spi_in: sa.spi_in }).unwrap();
    sealed(&mut left, ms(1501), &to(2));
    left.apply(Command::Remove { spi_in: sa.spi_in }).unwrap();
    assert_eq!(seal(&mut left, ms(1501), &to(2)).0, Verdict::Drop(Reason::NoSa));
}

#[test]
fn the_most_specific_selector_wins_then_the_newest() {
    let mut shard = owner(2);
    let narrow = TrafficSelector::new(ts("10.2.0.0/24").addrs(), 17, Ports::Range(53, 53)).unwrap();
    let nets = [
        vec![ts("0.0.0.0/0")],
        vec![narrow],
        vec![ts("10.2.0.0/24")],
        vec![ts("10.2.0.0/16")],
        vec![ts("10.2.0.0/16")],
    ];
    let mut spis = Vec::new();
    for (slot, remote_ts) in (0..).zip(nets) {
        let (sa, _) = sas(AeadAlg::Aes128Gcm16, slot);
        let sa = Sa { remote_ts, ..sa };
        install(&mut shard, &sa);
        spis.push((sa.spi_in, sa.spi_out));
    }
    let chosen = |shard: &mut Shard, to: &str| {
        let esp = sealed(shard, ms(1), &udp("10.1.0.9:1", to, b""));
        let spi = wire::esp::Header::parse(&esp).unwrap().spi;
        spis.iter().position(|(_, spi_out)| *spi_out == spi).unwrap()
    };
    for _ in 0..2 {
        assert_eq!(chosen(&mut shard, "10.2.0.5:53"), 1);
        assert_eq!(chosen(&mut shard, "10.2.0.5:54"), 2);
        assert_eq!(chosen(&mut shard, "10.2.1.5:53"), 4);
        assert_eq!(chosen(&mut shard, "10.9.0.5:53"), 0);
    }
    // A rekey: the newest SA is gone again, the older one takes over.
    let newest = spis[4].0;
    shard.apply(Command::Remove { spi_in: newest }).unwrap();
    assert_eq!(chosen(&mut shard, "10.2.1.5:53"), 3);
    let first = spis[0].0;
    shard.apply(Command::UseOutbound { spi_in: first }).unwrap();
    assert_eq!(chosen(&mut shard, "10.2.1.5:53"), 3, "newer, but less specific");
}

// --- the fence ---

#[test]
fn outside_the_fence_nothing_is_sent_or_delivered() {
    let (mut left, mut right, ..) = pair(AeadAlg::Aes128Gcm16);
    let esp = sealed(&mut left, ms(1), &numbered(1));
    for fences in [&[][..], &[ms(0)], &[ms(9)], &[ms(10)]] {
        let mut batch = batch_of(&[numbered(2), numbered(3)]);
        left.outbound(ms(10), fences, &mut batch);
        let mut there = batch_of(&[&esp, &esp]);
        right.inbound(ms(10), fences, &mut there);
        for slot in batch.slots().iter().chain(there.slots()) {
            assert_eq!(slot.verdict(), Verdict::Drop(Reason::Fenced));
        }
    }
    assert_eq!((left.stats().fenced_batches, right.stats().fenced_batches), (4, 4));
    assert_eq!(left.stats().dropped(Reason::Fenced), 8);
    // It used no number, and moved no window.
    let mut batch = batch_of(&[numbered(2)]);
    left.outbound(ms(10), &[ms(11)], &mut batch);
    assert_eq!(seq_of(batch.slots()[0].packet()), 2);
    assert_eq!(number_of(&opened(&mut right, ms(10), &esp)), 1);
}

// --- changing hands ---

#[test]
fn not_owned_is_dropped_or_steered_but_never_twice() {
    let (sa, _) = sas(AeadAlg::Aes128Gcm16, 0);
    let mut shard = Shard::new(config());
    install(&mut shard, &sa);
    let esp = [&sa.spi_in.to_bytes()[..], &[0; 60]].concat();
    assert_eq!(seal(&mut shard, ms(1), &numbered(1)).0, Verdict::Drop(Reason::NotOwner));
    assert_eq!(open(&mut shard, ms(1), &esp).0, Verdict::Drop(Reason::NotOwner));
    shard.apply(Command::Disown { endpoint: MAIN, steer: true }).unwrap();
    let (verdict, packet) = seal(&mut shard, ms(1), &numbered(1));
    assert_eq!((verdict, packet), (Verdict::Steer { endpoint: MAIN }, numbered(1)));
    let (verdict, packet) = open(&mut shard, ms(1), &esp);
    assert_eq!((verdict, packet), (Verdict::Steer { endpoint: MAIN }, esp.clone()));
    for (direction, packet) in
        [(Direction::Outbound, numbered(1)), (Direction::Inbound, esp.clone())]
    {
        let mut batch = batch_of(&[packet]);
        batch.slots_mut()[0].steered = Some(Steered { endpoint: MAIN, back: false });
        match direction {
            Direction::Outbound => shard.outbound(ms(1), OPEN, &mut batch),
            Direction::Inbound => shard.inbound(ms(1), OPEN, &mut batch),
        }
        assert_eq!(batch.slots()[0].verdict(), Verdict::Drop(Reason::SteeredTwice));
    }
    // Also where a policy has no SA.
    shard.apply(Command::Remove { spi_in: sa.spi_in }).unwrap();
    shard.apply(Command::Policies(vec![policy(0, 0, "10.1.0.0/16", "10.2.0.0/16")])).unwrap();
    assert_eq!(seal(&mut shard, ms(1), &numbered(1)).0, Verdict::Steer { endpoint: MAIN });
    shard.apply(Command::Disown { endpoint: MAIN, steer: false }).unwrap();
    assert_eq!(seal(&mut shard, ms(1), &numbered(1)).0, Verdict::Drop(Reason::NotOwner));
    assert!(reports(&mut shard, ms(1)).iter().all(
        |r| matches!(r, Report::Disowned { term: None, counters, .. } if counters.is_empty())
    ));
}

fn flush_all(shard: &mut Shard, now: Duration) -> Vec<(Direction, Verdict, Vec<u8>)> {
    let mut out = Vec::new();
    let mut batch = Batch::new(7, SLOT_LEN);
    while shard.flush(now, OPEN, &mut batch) > 0 {
        out.extend(batch.slots().iter().map(|s| (s.direction(), s.verdict(), s.packet().to_vec())));
    }
    out
}

/// A planned switchover of the left side's endpoint from one shard to another,
/// step by step; every packet in both directions arrives once and in order.
#[test]
fn switchover_loses_and_reorders_nothing() {
    let (left_sa, right_sa) = sas(AeadAlg::Aes256Gcm16, 0);
    let mut peer = owner(2);
    install(&mut peer, &right_sa);
    let (mut old, mut new) = (owner(2), Shard::new(config()));
    own(&mut old, 2, 0, true);
    install(&mut old, &left_sa);
    install(&mut new, &left_sa);
    let back = |n: u32| udp("10.2.0.5:4000", "10.1.0.9:5000", &n.to_be_bytes());

    // Before: two packets each way; two more of the peer's are late.
    for n in [0, 1] {
        let esp = sealed(&mut old, ms(1), &numbered(n));
        assert_eq!(number_of(&opened(&mut peer, ms(1), &esp)), n);
    }
    let from_peer: Vec<Vec<u8>> = (0..8).map(|n| sealed(&mut peer, ms(1), &back(n))).collect();
    for n in [1, 3] {
        assert_eq!(number_of(&opened(&mut old, ms(1), &from_peer[n])), n as u32);
    }
    // Window tops are streamed, so the shadow would refuse all up to 4.
    let said = reports(&mut old, ms(10));
    let tops = said.iter().find_map(|report| match report {
        Report::Windows(tops) => Some(tops.as_slice()),
        _ => None,
    });
    assert_eq!(tops, Some(&[(left_sa.spi_in, 4)][..]));
    new.apply(Command::Window { spi_in: left_sa.spi_in, top: 4 }).unwrap();

    old.apply(Command::Hold { endpoint: MAIN }).unwrap();
    let held = reports(&mut old, ms(10));
    let [Report::Held { endpoint: MAIN, term: Term(2), counters, .. }] = held.as_slice() else {
        panic!("{held:?}");
    };
    assert_eq!(counters[0].next_seq, 3);
    assert_eq!(counters[0].window.top(), 4);
    for n in [2, 3] {
        assert_eq!(seal(&mut old, ms(11), &numbered(n)).0, Verdict::Held);
    }
    for n in [4, 2] {
        assert_eq!(open(&mut old, ms(11), &from_peer[n]).0, Verdict::Held);
    }
    assert_eq!(old.next_wakeup(), None, "nothing can be done before a command comes");
    assert!(flush_all(&mut old, ms(11)).is_empty());

    // The grant reaches the other instance.
    for counters in counters {
        let counters = Box::new(counters.clone());
        new.apply(Command::Resume { term: Term(3), counters }).unwrap();
    }
    own(&mut new, 3, 0, true);
    new.apply(Command::HoldDirect { endpoint: MAIN, until: ms(14) }).unwrap();

    // The old owner hands out its queue, and what still arrives.
    old.apply(Command::Disown { endpoint: MAIN, steer: true }).unwrap();
    assert_eq!(seal(&mut old, ms(12), &numbered(4)).0, Verdict::Held, "behind the queue");
    assert_eq!(old.next_wakeup(), Some(Duration::ZERO));
    let mut steered = flush_all(&mut old, ms(12));
    assert!(steered.iter().all(|(_, v, _)| *v == Verdict::Steer { endpoint: MAIN }));
    let (verdict, packet) = open(&mut old, ms(12), &from_peer[0]);
    steered.push((Direction::Inbound, verdict, packet));
    assert_eq!(steered.len(), 6);

    // Meanwhile later packets reach the new owner directly, and wait.
    assert_eq!(seal(&mut new, ms(12), &numbered(5)).0, Verdict::Held);
    assert_eq!(open(&mut new, ms(12), &from_peer[5]).0, Verdict::Held);
    assert_eq!(new.next_wakeup(), Some(ms(14)));
    let mut sent = Vec::new();
    let mut delivered = Vec::new();
    for (direction, _, packet) in steered {
        let mut batch = batch_of(&[packet]);
        batch.slots_mut()[0].steered = Some(Steered { endpoint: MAIN, back: false });
        match direction {
            Direction::Outbound => new.outbound(ms(13), OPEN, &mut batch),
            Direction::Inbound => new.inbound(ms(13), OPEN, &mut batch),
        }
        let slot = &batch.slots()[0];
        match slot.verdict() {
            Verdict::Send { .. } => sent.push(slot.packet().to_vec()),
            Verdict::Deliver { .. } => delivered.push(number_of(slot.packet())),
            other => panic!("{other:?}"),
        }
    }
    assert!(flush_all(&mut new, ms(13)).is_empty());
    // The time is over, but those who waited go first.
    assert_eq!(seal(&mut new, ms(14), &numbered(6)).0, Verdict::Held);
    for (_, verdict, packet) in flush_all(&mut new, ms(14)) {
        match verdict {
            Verdict::Send { .. } => sent.push(packet),
            Verdict::Deliver { .. } => delivered.push(number_of(&packet)),
            other => panic!("{other:?}"),
        }
    }
    sent.push(sealed(&mut new, ms(14), &numbered(7)));
    delivered.push(number_of(&opened(&mut new, ms(14), &from_peer[6])));

    assert_eq!(sent.iter().map(|p| seq_of(p)).collect::<Vec<_>>(), [3, 4, 5, 6, 7, 8]);
    let arrived: Vec<u32> = sent.iter().map(|p| number_of(&opened(&mut peer, ms(14), p))).collect();
    assert_eq!(arrived, [2, 3, 4, 5, 6, 7]);
    assert_eq!(delivered, [4, 2, 0, 5, 6]);
    // What the old owner had delivered is refused by the new one.
    for n in [1, 3] {
        assert_eq!(open(&mut new, ms(14), &from_peer[n]).0, Verdict::Drop(Reason::Replayed));
    }
    for shard in [&old, &new, &peer] {
        assert_eq!(shard.stats().dropped_in_all(), shard.stats().dropped(Reason::Replayed));
    }
}

// "The old owner resumes on refusal at its exact counters."
#[test]
fn a_refused_switchover_goes_on_where_it_stopped() {
    for by_own in [false, true] {
        let (mut left, mut right, ..) = pair(AeadAlg::Aes256Gcm16);
        let first = sealed(&mut left, ms(1), &numbered(0));
        left.apply(Command::Hold { endpoint: MAIN }).unwrap();
        for n in 1..4 {
            assert_eq!(seal(&mut left, ms(2), &numbered(n)).0, Verdict::Held);
        }
        if by_own {
            // It had begun to steer already, and takes its term up again.
            left.apply(Command::Disown { endpoint: MAIN, steer: true }).unwrap();
            own(&mut left, 2, 0, false);
        } else {
            left.apply(Command::Release { endpoint: MAIN }).unwrap();
        }
        let mut all = vec![first];
        all.extend(flush_all(&mut left, ms(3)).into_iter().map(|(_, _, packet)| packet));
        all.push(sealed(&mut left, ms(3), &numbered(4)));
        assert_eq!(all.iter().map(|p| seq_of(p)).collect::<Vec<_>>(), [1, 2, 3, 4, 5]);
        let ivs: std::collections::BTreeSet<_> = all.iter().map(|p| iv_of(p)).collect();
        assert_eq!(ivs.len(), 5);
        let got: Vec<u32> = all.iter().map(|p| number_of(&opened(&mut right, ms(3), p))).collect();
        assert_eq!(got, [0, 1, 2, 3, 4]);
    }
}

#[test]
fn a_grant_for_a_term_that_never_came_is_not_used_later() {
    let (sa, _) = sas(AeadAlg::Aes256Gcm16, 0);
    let (mut old, mut new) = (owner(2), Shard::new(config()));
    install(&mut old, &sa);
    install(&mut new, &sa);
    sealed(&mut old, ms(1), &numbered(0));
    old.apply(Command::Hold { endpoint: MAIN }).unwrap();
    let Some(Report::Held { counters, .. }) = old.poll_report(ms(1)) else { panic!() };
    let counters = Box::new(counters[0].clone());
    new.apply(Command::Resume { term: Term(3), counters }).unwrap();
    // Refused; the old owner goes on, sends more, and dies.
    old.apply(Command::Release { endpoint: MAIN }).unwrap();
    let last = sealed(&mut old, ms(1), &numbered(1));
    own(&mut new, 5, 0, false);
    let next = sealed(&mut new, ms(2), &numbered(2));
    assert!(seq_of(&next) > seq_of(&last));
    assert_eq!(u64::from(seq_of(&next)), sa.ceiling);
}

#[test]
fn a_full_queue_drops_the_newest() {
    let (mut left, ..) = pair(AeadAlg::Aes256Gcm16);
    left.apply(Command::Hold { endpoint: MAIN }).unwrap();
    let len = config().queue_len as u32;
    for n in 0..len {
        assert_eq!(seal(&mut left, ms(1), &numbered(n)).0, Verdict::Held);
    }
    assert_eq!(seal(&mut left, ms(1), &numbered(len)).0, Verdict::Drop(Reason::QueueFull));
    left.apply(Command::Release { endpoint: MAIN }).unwrap();
    assert_eq!(flush_all(&mut left, ms(1)).len(), len as usize);
}

#[test]
fn a_queue_of_an_endpoint_that_was_lost_is_dropped() {
    let (mut left, ..) = pair(AeadAlg::Aes256Gcm16);
    left.apply(Command::Hold { endpoint: MAIN }).unwrap();
    seal(&mut left, ms(1), &numbered(0));
    left.apply(Command::Disown { endpoint: MAIN, steer: false }).unwrap();
    let out = flush_all(&mut left, ms(1));
    assert_eq!(out.len(), 1);
    assert_eq!(out[0].1, Verdict::Drop(Reason::NotOwner));
}

#[test]
fn a_released_queue_obeys_the_fence() {
    let (mut left, ..) = pair(AeadAlg::Aes256Gcm16);
    left.apply(Command::Hold { endpoint: MAIN }).unwrap();
    seal(&mut left, ms(1), &numbered(0));
    left.apply(Command::Release { endpoint: MAIN }).unwrap();
    let mut batch = Batch::new(1, SLOT_LEN);
    assert_eq!(left.flush(ms(5), &[ms(5)], &mut batch), 1);
    assert_eq!(batch.slots()[0].verdict(), Verdict::Drop(Reason::Fenced));
    assert_eq!(left.stats().fenced_batches, 1);
}

// "After an unplanned takeover everything at or below the last streamed top is
// refused", also what was never seen.
#[test]
fn takeover_refuses_all_up_to_the_streamed_top() {
    let (left_sa, right_sa) = sas(AeadAlg::Aes256Gcm16, 0);
    let mut peer = owner(2);
    install(&mut peer, &right_sa);
    let mut new = Shard::new(config());
    install(&mut new, &left_sa);
    let back = |n: u32| udp("10.2.0.5:4000", "10.1.0.9:5000", &n.to_be_bytes());
    let esp: Vec<Vec<u8>> = (0..10).map(|n| sealed(&mut peer, ms(1), &back(n))).collect();
    new.apply(Command::Window { spi_in: left_sa.spi_in, top: 7 }).unwrap();
    new.apply(Command::Window { spi_in: left_sa.spi_in, top: 6 }).unwrap();
    own(&mut new, 3, 0, false);
    // Too late to mean anything.
    new.apply(Command::Window { spi_in: left_sa.spi_in, top: 9 }).unwrap();
    for (n, esp) in esp.iter().enumerate() {
        let want = if n < 7 {
            Verdict::Drop(Reason::Replayed)
        } else {
            Verdict::Deliver { endpoint: MAIN }
        };
        assert_eq!(open(&mut new, ms(2), esp).0, want, "{n}");
    }
}

#[test]
fn tops_are_streamed_for_moved_windows_alone_a_little_later() {
    let (mut left, mut right) = (owner(2), owner(2));
    let count = 40;
    for slot in 0..count {
        let (mut left_sa, mut right_sa) = sas(AeadAlg::Aes128Gcm16, slot);
        let net = format!("10.2.{slot}.0/24");
        left_sa.remote_ts = vec![ts(&net)];
        right_sa.local_ts = vec![ts(&net)];
        install(&mut left, &left_sa);
        install(&mut right, &right_sa);
    }
    let mut go = |right: &mut Shard, at: u64, slot: u16| {
        let inner = udp("10.1.0.9:1", &format!("10.2.{slot}.5:1"), b"");
        let esp = sealed(&mut left, ms(at), &inner);
        opened(right, ms(at), &esp);
    };
    let tops = |right: &mut Shard, at: u64| {
        reports(right, ms(at))
            .into_iter()
            .flat_map(|report| match report {
                Report::Windows(tops) => tops.as_slice().to_vec(),
                other => panic!("{other:?}"),
            })
            .collect::<Vec<_>>()
    };
    let all = |top| (0..count).map(|slot| (spi(1, slot), top)).collect::<Vec<_>>();
    let a_shadow_comes = |right: &mut Shard, at: u64| {
        right.apply(Command::ObeyLeases { endpoint: MAIN, on: true }).unwrap();
        let report = right.poll_report(ms(at));
        assert!(matches!(report, Some(Report::Obeying { endpoint: MAIN, .. })));
    };
    for slot in 0..count {
        go(&mut right, 10, slot);
    }
    assert_eq!(right.next_wakeup(), None, "there is nobody to tell");
    assert_eq!(tops(&mut right, 20), []);
    a_shadow_comes(&mut right, 20);
    let mut got = tops(&mut right, 20);
    got.sort();
    assert_eq!(got, all(1), "it needs them all");
    for slot in 0..count {
        go(&mut right, 30, slot);
    }
    assert_eq!(tops(&mut right, 34), [], "whoever waits for the packet comes first");
    assert_eq!(right.next_wakeup(), Some(ms(35)));
    let mut got = tops(&mut right, 35);
    got.sort();
    assert_eq!(got, all(2));
    assert_eq!(right.next_wakeup(), None);
    for _ in 0..5 {
        go(&mut right, 40, 3);
    }
    assert_eq!(tops(&mut right, 44), []);
    assert_eq!(right.next_wakeup(), Some(ms(45)));
    assert_eq!(tops(&mut right, 45), [(spi(1, 3), 7)]);
    // Another shadow.
    a_shadow_comes(&mut right, 50);
    assert_eq!(tops(&mut right, 50).len(), usize::from(count));
}

// RFC 7296 §2.23: follow a peer behind a NAT, by its newest authentic packet.
#[test]
fn a_peer_that_moved_is_reported_once_a_second() {
    let (mut left, mut right, left_sa, right_sa) = pair(AeadAlg::Aes128Gcm16);
    let esp: Vec<Vec<u8>> = (0..9).map(|n| sealed(&mut left, ms(1), &numbered(n))).collect();
    let (elsewhere, third) = (sock("198.51.100.99:1234"), sock("198.51.100.98:1"));
    let arrive = |right: &mut esp::Shard, at, packet: &[u8], from| {
        let mut batch = batch_of(&[packet]);
        batch.slots_mut()[0].peer = Some(from);
        right.inbound(ms(at), OPEN, &mut batch);
        reports(right, ms(at))
            .into_iter()
            .filter_map(|r| match r {
                Report::PeerMoved { from, .. } => Some(from),
                _ => None,
            })
            .collect::<Vec<_>>()
    };
    assert_eq!(arrive(&mut right, 1, &esp[0], left_sa.local), []);
    let mut forged = esp[1].clone();
    forged[30] ^= 1;
    assert_eq!(arrive(&mut right, 1, &forged, elsewhere), [], "not authentic");
    assert_eq!(arrive(&mut right, 1, &esp[2], elsewhere), [elsewhere]);
    assert_eq!(arrive(&mut right, 2000, &esp[1], third), [], "not the newest");
    // Whatever comes within a second; then what is still so.
    assert_eq!(arrive(&mut right, 1000, &esp[3], third), []);
    assert_eq!(arrive(&mut right, 1001, &esp[4], elsewhere), [elsewhere]);
    assert_eq!(arrive(&mut right, 2001, &esp[5], left_sa.local), []);
    // Once it is followed, it is elsewhere no more.
    let (spi_in, local) = (right_sa.spi_in, right_sa.local);
    let command = Command::Move { spi_in, local, remote: elsewhere, udp_encap: true };
    right.apply(command).unwrap();
    assert_eq!(arrive(&mut right, 4000, &esp[6], elsewhere), []);
    assert_eq!(arrive(&mut right, 4000, &esp[7], left_sa.local), [left_sa.local]);
}

#[test]
fn reinstalling_the_same_keys_keeps_the_counters() {
    let (mut left, mut right, left_sa, _) = pair(AeadAlg::Aes256Gcm16);
    let first = sealed(&mut left, ms(1), &numbered(0));
    let moved = Sa { remote: sock("198.51.100.8:4501"), ..copy(&left_sa) };
    left.apply(Command::Install(Box::new(moved))).unwrap();
    let (verdict, second) = seal(&mut left, ms(1), &numbered(1));
    assert!(matches!(verdict, Verdict::Send { to, .. } if to == sock("198.51.100.8:4501")));
    assert_eq!((seq_of(&second), seq_of(&first)), (2, 1));
    assert_ne!(iv_of(&first), iv_of(&second));
    opened(&mut right, ms(1), &first);
    opened(&mut right, ms(1), &second);
}

#[test]
fn commands_that_make_no_sense_change_nothing() {
    let (mut left, _, sa, _) = pair(AeadAlg::Aes256Gcm16);
    let other = spi(0, 9);
    let unknown = Err(CommandError::UnknownSa(other));
    assert_eq!(left.apply(Command::UseOutbound { spi_in: other }), unknown);
    assert_eq!(left.apply(Command::Remove { spi_in: other }), unknown);
    assert_eq!(left.apply(Command::Lease { spi_in: other, ceiling: 1 }), unknown);
    assert_eq!(left.apply(Command::Window { spi_in: other, top: 1 }), unknown);
    let nowhere = EndpointId(1);
    let hold = Command::Hold { endpoint: nowhere };
    assert_eq!(left.apply(hold), Err(CommandError::UnknownEndpoint(nowhere)));
    let stale = Command::Own { endpoint: MAIN, term: Term(1), seq_jump: 0, obey_leases: false };
    assert!(matches!(left.apply(stale), Err(CommandError::StaleTerm { .. })));
    let bad_spi = wire::id::EspSpi(255);
    let install = |sa: Sa| Command::Install(Box::new(sa));
    let reserved = Sa { spi_in: bad_spi, ..copy(&sa) };
    assert_eq!(left.apply(install(reserved)), Err(CommandError::BadSpi(bad_spi)));
    let short = Sa { spi_in: other, keymat_in: crypto::Secret::new(vec![1; 35]), ..copy(&sa) };
    assert!(matches!(left.apply(install(short)), Err(CommandError::Key(..))));
    let mut shadow = Shard::new(Config { max_slots: 9, ..config() });
    let far = Sa { spi_in: other, ..copy(&sa) };
    assert_eq!(shadow.apply(install(far)), Err(CommandError::BadSpi(other)));
    assert_eq!(shadow.apply(Command::Hold { endpoint: MAIN }), Err(CommandError::NotOwner(MAIN)));
    assert_eq!(
        shadow.apply(Command::Release { endpoint: MAIN }),
        Err(CommandError::NotOwner(MAIN))
    );
    assert_eq!(
        shadow.apply(Command::ObeyLeases { endpoint: MAIN, on: true }),
        Err(CommandError::NotOwner(MAIN))
    );
    assert_eq!(seq_of(&sealed(&mut left, ms(1), &numbered(0))), 1);
}

#[test]
fn a_query_tells_what_each_sa_did() {
    let (mut left, mut right, left_sa, right_sa) = pair(AeadAlg::Aes256Gcm16);
    for n in 0..3 {
        let esp = sealed(&mut left, ms(5 + u64::from(n)), &numbered(n));
        opened(&mut right, ms(9), &esp);
    }
    let ask = |shard: &mut Shard| {
        shard.apply(Command::Query { token: 77 }).unwrap();
        match shard.poll_report(ms(9)) {
            Some(Report::Snapshot(snapshot)) => *snapshot,
            other => panic!("{other:?}"),
        }
    };
    let (left, right) = (ask(&mut left), ask(&mut right));
    assert_eq!((left.token, left.sas.len()), (77, 1));
    let (l, r) = (left.sas[0], right.sas[0]);
    assert_eq!((l.spi_in, l.spi_out), (left_sa.spi_in, right_sa.spi_in));
    assert!(l.outbound && r.outbound);
    assert_eq!((l.packets_out, l.bytes_out, l.last_out), (3, 96, Some(ms(7))));
    assert_eq!((l.packets_in, l.last_in, l.next_seq, l.top), (0, None, 4, 0));
    assert_eq!((r.packets_in, r.bytes_in, r.last_in, r.top), (3, 96, Some(ms(9)), 3));
    assert_eq!((left.stats.sealed, right.stats.opened), (3, 3));
}

// An instance that is owner here and shadow there installs SAs all the time: the cache of flows outlives that.
#[test]
fn an_sa_that_was_never_in_use_leaves_the_flows_of_others_alone() {
    let (mut left, ..) = pair(AeadAlg::Aes128Gcm16);
    sealed(&mut left, ms(1), &numbered(1));
    let shown = |left: &mut Shard| {
        left.apply(Command::Flows { token: 1, now: ms(2) }).unwrap();
        let mut reports = core::iter::from_fn(|| left.poll_report(ms(2)));
        reports.find_map(|report| match report {
            Report::Flows { flows, .. } => Some(flows.len()),
            _ => None,
        })
    };
    assert_eq!(shown(&mut left), Some(1));
    let (other, _) = sas(AeadAlg::Aes128Gcm16, 1);
    left.apply(Command::Install(Box::new(copy(&other)))).unwrap();
    assert_eq!(shown(&mut left), Some(1));
    left.apply(Command::Remove { spi_in: other.spi_in }).unwrap();
    assert_eq!(shown(&mut left), Some(1));
    // Put into use, it may be what those packets belong to now.
    install(&mut left, &other);
    assert_eq!(shown(&mut left), Some(0));
}
