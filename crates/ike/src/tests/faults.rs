//! Bad datagrams change nothing; lost, doubled and reordered ones lose nothing
//! (security.md 1 to 5, statement 17's part for IKE).

use rand_chacha::rand_core::RngCore;

use super::*;

/// Hands side `n` a datagram and checks that it changed nothing and was not
/// answered, unless `answered` allows the answer.
#[track_caller]
fn must_not_matter(w: &mut World, n: usize, from: SocketAddr, to: SocketAddr, bytes: &[u8]) {
    let before = w.snapshot(n);
    let sent = w.sent.len();
    w.with_side(n, |ike, cx| ike.handle_datagram(cx, from, to, bytes));
    assert_eq!(w.snapshot(n), before, "{bytes:02x?}");
    for (_, answer) in &w.sent[sent..] {
        assert!(answer.bytes.len() <= bytes.len().max(1), "amplified");
    }
}

/// One established world and every datagram of its life: establishment, rekeys
/// of both kinds, deletes.
fn life() -> (World, Vec<(usize, Transmit)>) {
    let mut w = World::established();
    w.rekey(A, Target::Child(w.child(A)));
    w.settle();
    w.rekey(B, Target::Ike(w.ike(B)));
    w.settle();
    w.run(Duration::from_secs(40));
    w.assert_tidy();
    let all = w.sent.clone();
    (w, all)
}

#[test]
fn truncated_and_flipped_datagrams_change_nothing() {
    let (mut w, all) = life();
    let mut dice = rng(7);
    for (side, t) in &all {
        let to_side = 1 - side;
        for len in 0..t.bytes.len() {
            must_not_matter(&mut w, to_side, t.from, t.to, &t.bytes[..len]);
        }
        for _ in 0..200 {
            let mut bytes = t.bytes.clone();
            let at = dice.next_u32() as usize % bytes.len();
            // An IKE_SA_INIT request is not authentic: any one is welcome.
            if at < 28 || bytes[18] != 34 {
                bytes[at] ^= 1 << (dice.next_u32() % 8);
                if bytes[18] == 34 && bytes[8..16] == [0; 8] {
                    continue;
                }
                must_not_matter(&mut w, to_side, t.from, t.to, &bytes);
            }
        }
    }
    // And after all that the SAs still work.
    w.rekey(A, Target::Child(w.child(A)));
    w.settle();
    w.run(Duration::from_secs(10));
    w.assert_tidy();
}

#[test]
fn random_datagrams_change_nothing() {
    let (mut w, all) = life();
    let mut dice = rng(8);
    for n in 0..5_000u32 {
        let mut bytes = vec![0; dice.next_u32() as usize % 400];
        dice.fill_bytes(&mut bytes);
        // Half of them with a header that finds an SA.
        if n % 2 == 0 && bytes.len() > 28 {
            let (_, model) = &all[n as usize % all.len()];
            let len = bytes.len() as u32;
            bytes[..24].copy_from_slice(&model.bytes[..24]);
            bytes[24..28].copy_from_slice(&len.to_be_bytes());
            if bytes[18] == 34 && bytes[8..16] == [0; 8] {
                continue;
            }
        }
        let side = n as usize % 2;
        let from = SocketAddr::new(ip(1 - side), 500);
        must_not_matter(&mut w, side, from, SocketAddr::new(ip(side), 500), &bytes);
    }
    w.assert_tidy();
}

// Every datagram ever sent is sent again, in a drawn order: at most a cached
// answer comes back, byte for byte, and no state changes.
#[test]
fn replays_change_nothing() {
    let (mut w, all) = life();
    let mut dice = rng(9);
    for _ in 0..2_000 {
        let (side, t) = &all[dice.next_u32() as usize % all.len()];
        if t.bytes[18] == 34 && t.bytes[8..16] == [0; 8] {
            // A first message may begin a half-open SA: see below.
            continue;
        }
        let before = w.snapshot(1 - side);
        let sent = w.sent.len();
        w.with_side(1 - side, |ike, cx| ike.handle_datagram(cx, t.from, t.to, &t.bytes));
        assert_eq!(w.snapshot(1 - side), before);
        for (_, answer) in &w.sent[sent..] {
            assert!(
                all.iter().any(|(_, old)| old.bytes == answer.bytes),
                "a new answer to a replay"
            );
        }
    }
}

// A replayed first message is recognised while its IKE SA lives.
#[test]
fn a_replayed_first_message_begins_nothing() {
    let mut w = World::established();
    let first = w.sent[0].1.clone();
    must_not_matter(&mut w, B, first.from, first.to, &first.bytes);
}

// The header lies about lengths, versions and flags.
#[test]
fn lying_headers() {
    let mut w = World::established();
    let (_, t) = w.sent[2].clone();
    for (at, values) in [
        (16, vec![0, 33, 46, 53, 200, 255]), // first payload
        (17, vec![0x10, 0x30, 0x00, 0xff]),  // version
        (18, vec![0, 34, 35, 36, 37, 38, 255]),
        (19, vec![0, 0x20, 0x28, 0x08, 0xff]),
        (24, vec![0xff]),
        (27, vec![0, 1, 27, 28]),
    ] {
        for value in values {
            let mut bytes = t.bytes.clone();
            if bytes[at] == value {
                continue;
            }
            bytes[at] = value;
            must_not_matter(&mut w, B, t.from, t.to, &bytes);
        }
    }
}

// security.md, statement 5.
#[test]
fn a_newer_major_version_is_named() {
    let mut w = World::new();
    w.initiate(A);
    let mut t = w.take(B).packet;
    t.bytes[17] = 0x30;
    w.with_side(B, |ike, cx| ike.handle_datagram(cx, t.from, t.to, &t.bytes));
    let answer = w.take(A).packet.bytes;
    let message = wire::ike::Message::parse(&answer).unwrap();
    assert!(message.payloads.notify(wire::ike::NotifyType::INVALID_MAJOR_VERSION).is_some());
    assert!(w.snapshot(B).is_empty());
}

// RFC 7296 §2.5: an unknown critical payload in a first message is named.
// security.md, statement 5.
#[test]
fn a_critical_unknown_payload_in_a_first_message_is_named() {
    let mut w = World::new();
    w.initiate(A);
    let mut t = w.take(B).packet;
    // In front of the others: critical, four bytes, of type 200.
    let first = t.bytes[16];
    t.bytes[16] = 200;
    t.bytes.splice(28..28, [first, 0x80, 0, 4]);
    let len = t.bytes.len() as u32;
    t.bytes[24..28].copy_from_slice(&len.to_be_bytes());
    w.with_side(B, |ike, cx| ike.handle_datagram(cx, t.from, t.to, &t.bytes));
    let answer = w.take(A).packet.bytes;
    let message = wire::ike::Message::parse(&answer).unwrap();
    let notify = message.payloads.notify(wire::ike::NotifyType::UNSUPPORTED_CRITICAL_PAYLOAD);
    assert_eq!(notify.unwrap().data, [200]);
    assert!(w.snapshot(B).is_empty());
    // Without the critical bit it is passed over.
    t.bytes[29] = 0;
    w.with_side(B, |ike, cx| ike.handle_datagram(cx, t.from, t.to, &t.bytes));
    assert_eq!(w.sides[B].ike.status(w.now).half_open, 1);
}

// RFC 7296 §2.4, §2.21.4: notifies without protection change nothing.
#[test]
fn unprotected_notifies_are_not_believed() {
    use wire::ike::{ExchangeType, Header, MessageBuilder, Notify, NotifyType, Payload};
    let mut w = World::established();
    let (_, t) = w.sent[3].clone();
    let base = Header::parse(&t.bytes).unwrap();
    for kind in [
        NotifyType::INVALID_IKE_SPI,
        NotifyType::INVALID_SYNTAX,
        NotifyType::AUTHENTICATION_FAILED,
        NotifyType::INVALID_SPI,
        NotifyType::INITIAL_CONTACT,
    ] {
        for response in [false, true] {
            let header = Header { exchange: ExchangeType::INFORMATIONAL, response, ..base };
            let mut forged = MessageBuilder::clear(&header);
            forged.push(&Payload::Notify(Notify::new(kind, &[])));
            let bytes = forged.finish().unwrap();
            must_not_matter(&mut w, A, t.from, t.to, &bytes);
        }
    }
}

// Establishment and a life of rekeys while one datagram in seven is lost, a
// fifth doubled, all reordered.
#[test]
fn a_bad_network_only_delays() {
    for seed in 0..100 {
        let mut w = World::tuned(|n, c| {
            c.connections[0].children[0].start =
                if n == A { Start::Initiate } else { Start::Respond };
        });
        let mut dice = rng(seed);
        let mut up = 0;
        for _ in 0..300 {
            // One second of a bad network.
            let end = w.now + Duration::from_secs(1);
            while let Some(n) =
                (!w.wire.is_empty()).then(|| dice.next_u32() as usize % w.wire.len())
            {
                let flight = w.wire.remove(n).unwrap();
                match dice.next_u32() % 15 {
                    0 | 1 => {}
                    2..5 => {
                        w.deliver(flight.clone());
                        w.deliver(flight);
                    }
                    _ => w.deliver(flight),
                }
            }
            w.now = end;
            for n in [A, B] {
                w.with_side(n, |ike, cx| ike.handle_timeout(cx));
            }
            up += usize::from(w.works("net"));
            if dice.next_u32().is_multiple_of(20) && w.works("net") {
                let n = dice.next_u32() as usize % 2;
                w.rekey(n, Target::Children(ConnectionId(0)));
            }
        }
        assert!(
            up > 250,
            "seed {seed}: up for {up} of 300 s {:#?} {:#?}",
            w.sides[A].events.iter().map(ToString::to_string).collect::<Vec<_>>(),
            w.sides[B].events.iter().map(ToString::to_string).collect::<Vec<_>>()
        );
        // On a good network it comes to rest.
        w.run(Duration::from_secs(120));
        w.assert_tunnel();
    }
}

// No free SPI, then some: nothing spins, nothing is lost.
#[test]
fn without_spis_it_waits() {
    let mut w = World::established();
    w.sides[A].spis.empty = true;
    let child = w.child(A);
    w.with_side(A, |ike, cx| ike.rekey(cx, Target::Child(child)));
    w.run(Duration::from_secs(20));
    w.assert_tidy();
    w.sides[B].spis.empty = true;
    w.rekey(B, Target::Child(w.child(B)));
    w.run(Duration::from_secs(20));
    w.assert_tunnel();
    for n in [A, B] {
        w.sides[n].spis.empty = false;
    }
    w.rekey(A, Target::Child(w.child(A)));
    w.run(Duration::from_secs(60));
    w.assert_tidy();
    assert_ne!(w.child(A), child);
}
