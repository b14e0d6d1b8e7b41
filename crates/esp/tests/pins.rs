//! Two shards, two endpoints, two tunnels of one connection: which packet leaves where.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests fail by panicking")]

mod common;

use common::*;
use core::time::Duration;
use crypto::aead::AeadAlg;
use esp::pin::Pin;
use esp::{Command, Config, Policy, Reason, Report, Sa, Shard, Steered, Verdict};
use wire::id::{ConnectionId, EndpointId, EspSpi, Term};

const A: EndpointId = EndpointId(0);
const B: EndpointId = EndpointId(1);
const BOTH_OPEN: &[Duration] = &[Duration::MAX, Duration::MAX];

/// The tunnels at A and B, as one side holds them.
fn tunnels() -> [Sa; 2] {
    let (a, _) = sas(AeadAlg::Aes128Gcm16, 0);
    let (b, _) = sas(AeadAlg::Aes128Gcm16, 1);
    let b = Sa { endpoint: B, local: sock("203.0.113.20:4500"), ..b };
    [a, b]
}

fn policies() -> Command {
    let at = |endpoint, n| Policy {
        endpoint,
        connection: ConnectionId(0),
        group: ConnectionId(0),
        child: 0,
        local_ts: vec![ts("10.1.0.0/16"), ts("fd01::/64")],
        remote_ts: vec![ts("10.2.0.0/16"), ts("fd02::/64")],
        pin: Pin::of([203, 0, 113, n].into(), [198, 51, 100, 7].into(), 1),
    };
    Command::Policies(vec![at(A, 10), at(B, 20)])
}

/// Left owns A, right owns B, and each knows that the other lives.
fn pair() -> [Shard; 2] {
    let mut shards = [(A, B), (B, A)].map(|(own, other)| {
        let mut shard = Shard::new(Config { endpoints: 2, ..config() });
        shard.apply(policies()).unwrap();
        for sa in tunnels() {
            install(&mut shard, &sa);
        }
        let owns = Command::Own { endpoint: own, term: Term(2), seq_jump: 0, obey_leases: false };
        shard.apply(owns).unwrap();
        shard.apply(Command::Steer { endpoint: other, on: true }).unwrap();
        shard
    });
    // The age of an SA differs between instances, and must not matter.
    shards[1].apply(Command::UseOutbound { spi_in: tunnels()[0].spi_in }).unwrap();
    shards
}

/// What a shard does with a packet, and the packet then.
fn judge(shard: &mut Shard, packet: &[u8], steered: Option<Steered>) -> (Verdict, Vec<u8>) {
    let mut batch = batch_of(&[packet]);
    batch.slots_mut()[0].steered = steered;
    shard.outbound(ms(5), BOTH_OPEN, &mut batch);
    (batch.slots()[0].verdict(), batch.slots()[0].packet().to_vec())
}

/// Where a packet that arrives here leaves, be it here or there.
fn place(shard: &mut Shard, packet: &[u8]) -> EndpointId {
    match judge(shard, packet, None).0 {
        Verdict::Send { endpoint, .. } | Verdict::Steer { endpoint } => endpoint,
        other => panic!("{other:?}"),
    }
}

fn flow(n: u16) -> Vec<u8> {
    udp(&format!("10.1.0.9:{}", 10_000 + n), "10.2.0.5:4000", b"x")
}

fn remove(shard: &mut Shard, spi_in: EspSpi) {
    shard.apply(Command::Remove { spi_in }).unwrap();
}

#[test]
fn both_instances_choose_alike_and_hand_over_what_is_not_theirs() {
    let [mut left, mut right] = pair();
    let mut at_a = 0;
    for n in 0..1000 {
        let chosen = place(&mut left, &flow(n));
        assert_eq!(chosen, place(&mut right, &flow(n)), "flow {n}");
        at_a += u32::from(chosen == A);
        let (verdict, packet) = judge(&mut left, &flow(n), None);
        match verdict {
            Verdict::Send { endpoint: A, from, .. } => assert_eq!(from, tunnels()[0].local),
            Verdict::Steer { endpoint: B } => {
                // As it was read, and sealed where it is owned.
                assert_eq!(packet, flow(n));
                let (verdict, _) =
                    judge(&mut right, &packet, Some(Steered { endpoint: B, back: false }));
                assert!(matches!(verdict, Verdict::Send { endpoint: B, .. }), "{verdict:?}");
            }
            other => panic!("{other:?}"),
        }
    }
    assert!((450..550).contains(&at_a), "{at_a} of 1000 flows at A");
}

#[test]
fn only_flows_of_a_lost_tunnel_move_and_they_come_back() {
    let [mut left, _] = pair();
    let before: Vec<_> = (0..300).map(|n| place(&mut left, &flow(n))).collect();
    remove(&mut left, tunnels()[1].spi_in);
    for n in 0..300 {
        assert_eq!(place(&mut left, &flow(n)), A, "flow {n}");
    }
    install(&mut left, &tunnels()[1]);
    let after: Vec<_> = (0..300).map(|n| place(&mut left, &flow(n))).collect();
    assert_eq!(before, after);
}

#[test]
fn nothing_new_is_pinned_to_a_tunnel_that_is_not_in_use() {
    let [mut left, _] = pair();
    let before: Vec<_> = (0..300).map(|n| place(&mut left, &flow(n))).collect();
    left.apply(Command::Pin { endpoint: B, on: false }).unwrap();
    for n in 0..300 {
        assert_eq!(place(&mut left, &flow(n)), A, "flow {n}");
    }
    left.apply(Command::Pin { endpoint: A, on: false }).unwrap();
    let (verdict, _) = judge(&mut left, &flow(0), None);
    assert_eq!(verdict, Verdict::Drop(Reason::NoSa), "none is in use");
    // What the other instance pinned before it heard of that is sent.
    let (verdict, _) = judge(&mut left, &flow(0), Some(Steered { endpoint: A, back: false }));
    assert!(matches!(verdict, Verdict::Send { endpoint: A, .. }), "{verdict:?}");
    for endpoint in [A, B] {
        left.apply(Command::Pin { endpoint, on: true }).unwrap();
    }
    let after: Vec<_> = (0..300).map(|n| place(&mut left, &flow(n))).collect();
    assert_eq!(before, after);
}

#[test]
fn a_rekey_moves_nothing() {
    let [mut left, _] = pair();
    let before: Vec<_> = (0..300).map(|n| place(&mut left, &flow(n))).collect();
    let (fresh, _) = sas(AeadAlg::Aes128Gcm16, 2);
    install(&mut left, &fresh);
    for (n, at) in (0..300).zip(&before) {
        assert_eq!(place(&mut left, &flow(n)), *at, "flow {n}");
        if *at == A {
            let (_, esp) = judge(&mut left, &flow(n), None);
            assert_eq!(wire::esp::Header::parse(&esp).unwrap().spi, fresh.spi_out, "the newest");
        }
    }
}

#[test]
fn weights_share_out_flows() {
    let [mut left, _] = pair();
    let Command::Policies(mut policies) = policies() else { unreachable!() };
    policies[0].pin.weight = 3;
    left.apply(Command::Policies(policies)).unwrap();
    let at_a = (0..2000).filter(|n| place(&mut left, &flow(*n)) == A).count();
    assert!((1400..1600).contains(&at_a), "{at_a} of 2000 flows at A, not three quarters");
}

#[test]
fn what_was_handed_over_stays_where_the_other_pinned_it() {
    let [mut left, _] = pair();
    // A flow that would be pinned to B, but the other instance, which knows more or less, chose A.
    let n = (0..100).find(|n| place(&mut left, &flow(*n)) == B).unwrap();
    let (verdict, _) = judge(&mut left, &flow(n), Some(Steered { endpoint: A, back: false }));
    assert!(matches!(verdict, Verdict::Send { endpoint: A, .. }), "{verdict:?}");
    // The cache did not learn that from it.
    assert_eq!(place(&mut left, &flow(n)), B);
    // Never twice, whoever chose.
    let (verdict, _) = judge(&mut left, &flow(n), Some(Steered { endpoint: B, back: false }));
    assert_eq!(verdict, Verdict::Drop(Reason::SteeredTwice));
}

#[test]
fn tunnels_of_one_group_share_flows_also_at_one_endpoint() {
    let Command::Policies(mut policies) = policies() else { unreachable!() };
    // Two addresses of the remote gateway at A: two connections there.
    policies[1].endpoint = A;
    policies[1].connection = ConnectionId(1);
    let [a, b] = tunnels();
    let b = Sa { endpoint: A, connection: ConnectionId(1), ..b };
    let mut shard = Shard::new(Config { endpoints: 2, ..config() });
    shard.apply(Command::Policies(policies.clone())).unwrap();
    install(&mut shard, &a);
    install(&mut shard, &b);
    shard
        .apply(Command::Own { endpoint: A, term: Term(2), seq_jump: 0, obey_leases: false })
        .unwrap();
    let by_a = |shard: &mut Shard| {
        let esp = (0..1000).map(|n| judge(shard, &flow(n), None).1);
        esp.filter(|esp| wire::esp::Header::parse(esp).unwrap().spi == a.spi_out).count()
    };
    let shared = by_a(&mut shard);
    assert!((450..550).contains(&shared), "{shared} of 1000 flows");
    // Alone, the first connection takes all.
    policies[1].group = ConnectionId(1);
    shard.apply(Command::Policies(policies)).unwrap();
    assert_eq!(by_a(&mut shard), 1000);
}

#[test]
fn fragments_stay_together_and_errors_go_with_what_they_are_about() {
    let [mut left, _] = pair();
    for n in 0..200 {
        let whole = flow(n);
        let mut first = whole.clone();
        first[6] = 0x20;
        let mut later = whole.clone();
        later[7] = 3;
        assert_eq!(place(&mut left, &first), place(&mut left, &later), "fragments of {n}");
        // The other side's packet of the same flow, and an error about it from our host: RFC 792.
        let theirs = udp("10.2.0.5:4000", &format!("10.1.0.9:{}", 10_000 + n), &[7; 600]);
        let mut error = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, 1, 0, 0, 10, 1, 0, 9, 10, 2, 0, 5];
        error.extend([3, 3, 0, 0, 0, 0, 0, 0]);
        error.extend(&theirs[..28]);
        error[3] = error.len() as u8;
        let expected = place(&mut left, &whole);
        assert_eq!(place(&mut left, &error), expected, "an error about {n}");
        assert_eq!(place(&mut left, &error), expected, "and again");
    }
}

// All fragments of one datagram take one tunnel, whatever other fragments with the same ports came before.
#[test]
fn fragments_stay_together_beside_others_with_the_same_ports() {
    let [mut left, _] = pair();
    // RFC 8200: fixed header, fragment header, destination options if `options`, ports.
    let fragment = |n: u8, options: bool, first: bool| {
        let next = if options { 60 } else { 17 };
        let mut body = vec![next, 0, 0, if first { 1 } else { 8 }, 0, 0, 0, 1];
        if options && first {
            body.extend([17, 0, 1, 4, 0, 0, 0, 0]);
        }
        body.extend([0x30, 0x39, 0x0f, 0xa0, 0, 16, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]);
        let mut packet = vec![0x60, 0, 0, 0, 0, body.len() as u8, 44, 64];
        packet.extend([0xfd, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, n]);
        packet.extend([0xfd, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5]);
        packet.extend(body);
        packet
    };
    for n in 0..100 {
        place(&mut left, &fragment(n, false, true));
        let first = place(&mut left, &fragment(n, true, true));
        assert_eq!(first, place(&mut left, &fragment(n, true, false)), "fragments of {n}");
    }
}

#[test]
fn a_switchover_hands_back_what_was_handed_over_meanwhile() {
    let [mut left, mut right] = pair();
    let n = (0..100).find(|n| place(&mut right, &flow(*n)) == A).unwrap();
    let over = Steered { endpoint: A, back: false };
    // A goes from left to right, while right still hands over.
    left.apply(Command::Hold { endpoint: A }).unwrap();
    assert_eq!(judge(&mut left, &flow(n), Some(over)).0, Verdict::Held);
    left.apply(Command::Disown { endpoint: A, steer: true }).unwrap();
    left.apply(Command::HandBack { endpoint: A, until: ms(50) }).unwrap();
    let mut batch = batch_of::<&[u8]>(&[]);
    assert_eq!(left.flush(ms(5), BOTH_OPEN, &mut batch), 1);
    assert_eq!(batch.slots()[0].verdict(), Verdict::Steer { endpoint: A });
    assert_eq!(batch.slots()[0].steered, Some(over), "the worker marks it");
    assert_eq!(judge(&mut left, &flow(n), Some(over)).0, Verdict::Steer { endpoint: A });
    // It went once each way: that is the end.
    let back = Steered { endpoint: A, back: true };
    assert_eq!(judge(&mut left, &flow(n), Some(back)).0, Verdict::Drop(Reason::SteeredTwice));
    right.apply(Command::Steer { endpoint: A, on: false }).unwrap();
    let own = Command::Own { endpoint: A, term: Term(3), seq_jump: 0, obey_leases: false };
    right.apply(own).unwrap();
    let (verdict, _) = judge(&mut right, &flow(n), Some(back));
    assert!(matches!(verdict, Verdict::Send { endpoint: A, .. }), "{verdict:?}");
    // Later there is nothing on its way any more.
    let mut batch = batch_of(&[flow(n)]);
    batch.slots_mut()[0].steered = Some(over);
    left.outbound(ms(51), BOTH_OPEN, &mut batch);
    assert_eq!(batch.slots()[0].verdict(), Verdict::Drop(Reason::SteeredTwice));
}

#[test]
fn nobody_to_hand_over_to() {
    let [mut left, _] = pair();
    let n = (0..100).find(|n| place(&mut left, &flow(*n)) == B).unwrap();
    left.apply(Command::Steer { endpoint: B, on: false }).unwrap();
    assert_eq!(judge(&mut left, &flow(n), None).0, Verdict::Drop(Reason::NotOwner));
}

#[test]
fn flows_are_listed_with_their_tunnels() {
    let [mut left, _] = pair();
    for n in 0..50 {
        place(&mut left, &flow(n));
    }
    left.apply(Command::Flows { token: 7, now: ms(1005) }).unwrap();
    let listed = reports(&mut left, ms(1005)).into_iter().find_map(|report| match report {
        Report::Flows { token: 7, flows } => Some(flows),
        _ => None,
    });
    let listed = listed.unwrap();
    // Two flows may share a line of the cache.
    assert!((45..=50).contains(&listed.len()), "{} listed", listed.len());
    for seen in &listed {
        let (src, dst) = seen.ports.unwrap();
        assert_eq!((seen.protocol, dst, seen.idle), (17, 4000, ms(1000)));
        assert_eq!(seen.endpoint, place(&mut left, &flow(src - 10_000)));
    }
    left.apply(Command::Flows { token: 8, now: ms(70_000) }).unwrap();
    let late = reports(&mut left, ms(70_000));
    assert!(late.contains(&Report::Flows { token: 8, flows: vec![] }), "a minute is over");
}

#[test]
fn a_tunnel_that_is_down_is_asked_for_while_another_carries_its_packets() {
    let [mut left, _] = pair();
    remove(&mut left, tunnels()[0].spi_in);
    let asked = |shard: &mut Shard, at| {
        reports(shard, at).iter().filter(|r| matches!(r, Report::NoSa { endpoint: A, .. })).count()
    };
    let mut batch = batch_of(&[flow(1)]);
    left.outbound(ms(2000), BOTH_OPEN, &mut batch);
    assert_eq!(batch.slots()[0].verdict(), Verdict::Steer { endpoint: B });
    assert_eq!(asked(&mut left, ms(2000)), 1);
    let mut batch = batch_of(&[flow(2)]);
    left.outbound(ms(4000), BOTH_OPEN, &mut batch);
    assert_eq!(asked(&mut left, ms(4000)), 0, "not that often");
}

// Also by a flow that goes on: packets of long flows are all that some tunnels ever see.
#[test]
fn a_tunnel_that_stays_down_is_asked_for_again_by_the_same_flow() {
    let [mut left, _] = pair();
    remove(&mut left, tunnels()[0].spi_in);
    let mut asked = 0;
    for second in 2..60 {
        let mut batch = batch_of(&[flow(1)]);
        left.outbound(ms(second * 1000), BOTH_OPEN, &mut batch);
        let reports = reports(&mut left, ms(second * 1000));
        asked += reports.iter().filter(|r| matches!(r, Report::NoSa { endpoint: A, .. })).count();
    }
    assert!(asked >= 5, "asked for {asked} times in a minute");
}
