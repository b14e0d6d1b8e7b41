//! A shadow takes over at every message boundary, and the peer notices nothing
//! (ha.md: commit before send, exact message ids, byte-identical answers).

use crypto::{
    aead::{AeadAlg, IvSequence},
    prf::PrfAlg,
};
use rand_chacha::rand_core::RngCore;

use super::*;
use crate::{
    error::Error,
    keys::{IkeKeys, Key},
    step::{Collected, Step},
    table::{Registry, Table},
};

/// A script: what happens besides the delivery of datagrams.
type Script = fn(&mut World);

const SCRIPTS: [(&str, Script); 9] = [
    ("establish from A", |w| w.initiate(A)),
    ("establish from B", |w| w.initiate(B)),
    ("A rekeys the child", |w| {
        up(w);
        w.rekey(A, Target::Child(w.child(A)));
    }),
    ("B rekeys the child", |w| {
        up(w);
        w.rekey(B, Target::Child(w.child(B)));
    }),
    ("A rekeys the IKE SA", |w| {
        up(w);
        w.rekey(A, Target::Ike(w.ike(A)));
    }),
    ("B rekeys the IKE SA", |w| {
        up(w);
        w.rekey(B, Target::Ike(w.ike(B)));
    }),
    ("both rekey the child", |w| {
        up(w);
        w.rekey(A, Target::Child(w.child(A)));
        w.rekey(B, Target::Child(w.child(B)));
    }),
    ("both rekey the IKE SA", |w| {
        up(w);
        w.rekey(A, Target::Ike(w.ike(A)));
        w.rekey(B, Target::Ike(w.ike(B)));
    }),
    ("a liveness check each", |w| {
        up(w);
        w.now += Duration::from_secs(31);
        for n in [A, B] {
            w.with_side(n, |ike, cx| ike.handle_timeout(cx));
        }
    }),
];

fn up(w: &mut World) {
    w.initiate(A);
    w.settle();
}

// The owner of A dies after the k-th delivery, for every k; everything on the
// wire from it is lost or not, for both.
#[test]
fn a_takeover_at_every_message_boundary() {
    for (name, script) in SCRIPTS {
        for side in [A, B] {
            for lossy in [false, true] {
                for boundary in 0..12 {
                    let mut w = World::new();
                    script(&mut w);
                    let mut passed = 0;
                    while passed < boundary && !w.wire.is_empty() {
                        let flight = w.lose();
                        w.now = w.now.max(flight.at);
                        w.deliver(flight);
                        passed += 1;
                    }
                    if passed < boundary {
                        break;
                    }
                    let spis: Vec<EspSpi> = w.sides[1 - side].plane.sas.keys().copied().collect();
                    if lossy {
                        w.wire.retain(|f| f.to_side == side);
                    }
                    w.take_over(side, Doubt::None);
                    w.settle();
                    w.run(Duration::from_secs(60));
                    assert!(w.works("net"), "{name}, side {side}, boundary {boundary}, {lossy}");
                    // No establishment began anew: the peer's SAs of that moment
                    // went only by rekeying.
                    let failed = w.sides[1 - side].events.iter().any(|e| {
                        matches!(e, Event::Failed(_))
                            || matches!(
                                e,
                                Event::Deleted {
                                    reason: crate::DeleteReason::PeerDead
                                        | crate::DeleteReason::InitialContact,
                                    ..
                                }
                            )
                    });
                    assert!(!failed, "{name}, side {side}, boundary {boundary}: {spis:?}");
                    w.assert_tidy();
                }
            }
        }
    }
}

// The answer of the old owner is lost; the new owner repeats it byte for byte.
#[test]
fn a_new_owner_repeats_the_old_answer() {
    let mut w = World::established();
    w.rekey(A, Target::Child(w.child(A)));
    let request = w.take(B);
    w.deliver(request.clone());
    let answer = w.take(A);
    w.take_over(B, Doubt::None);
    w.deliver(request);
    assert_eq!(w.take(A).packet, answer.packet);
    w.deliver(answer);
    w.settle();
    w.assert_tunnel();
}

// The request of the old owner is repeated byte for byte, at once, and its
// response processed with the secrets that were replicated.
#[test]
fn a_new_owner_repeats_the_old_request() {
    let mut w = World::established();
    w.rekey(A, Target::Child(w.child(A)));
    let lost = w.lose();
    w.take_over(A, Doubt::None);
    assert_eq!(w.wire.len(), 1);
    assert_eq!(w.wire[0].packet, lost.packet);
    w.settle();
    w.assert_tunnel();
}

// A new term is a new space of IVs; the same term again is refused.
#[test]
fn terms_never_repeat() {
    let mut w = World::established();
    w.sides[A].ike.deactivate();
    let term = Term(w.sides[A].term);
    let now = w.now;
    let side = &mut w.sides[A];
    let mut cx = Context { now, rng: &mut side.rng, spis: &mut side.spis };
    assert_eq!(side.ike.activate(&mut cx, term, Doubt::None), Err(crate::ActivateError::OldTerm));
    assert!(!side.ike.is_active());
    side.ike.activate(&mut cx, Term(term.0 + 2), Doubt::None).unwrap();
    // The IV of the next message shows the term.
    w.rekey(A, Target::Child(w.child(A)));
    let bytes = &w.wire[0].packet.bytes;
    let sealed = wire::ike::Message::parse(bytes).unwrap().sealed.unwrap();
    assert_eq!(bytes[sealed.iv()], [0, 3, 0, 0, 0, 0, 0, 0]);
}

// ha.md: a key is replaced long before its terms wrap the IV's 16 bits. Where it was not (the peer refused, say),
// its IKE SA says nothing more, not even that it ends: it goes, and what is to be up begins anew.
#[test]
fn a_key_whose_terms_wrap_is_never_used_again() {
    let mut w = World::tuned(|n, c| {
        if n == A {
            c.connections[0].children[0].start = Start::Initiate;
        }
    });
    w.with_side(A, |ike, cx| ike.handle_timeout(cx));
    w.settle();
    w.assert_tunnel();
    let (old, last) = (w.ike(A), 1 + (1 << 16));
    w.sides[A].term = last - 2;
    w.take_over(A, Doubt::None);
    // In its last term it still speaks: the rekeying that was due 2^14 terms after its birth.
    assert_eq!(w.ike(A), old);
    w.rekey(A, Target::Child(w.child(A)));
    assert!(!w.wire.is_empty());
    w.wire.clear();
    w.take_over(A, Doubt::None);
    assert_eq!(w.sides[A].term, last);
    assert!(!w.sides[A].ike.status(w.now).ike_sas.iter().any(|sa| sa.spi == old));
    let said = w.wire.iter().filter(|f| f.to_side == B);
    assert!(
        said.clone().count() > 0 && said.clone().all(|f| f.packet.bytes[18] == 34),
        "IKE_SA_INIT"
    );
    w.settle();
    w.run(Duration::from_secs(180));
    w.assert_tidy();
}

// The same, at the one place where messages are sealed.
#[test]
fn sealing_refuses_a_key_whose_terms_wrap() {
    let (mut r, mut spis) = (rng(1), Spis::default());
    let mut cx = Context { now: Duration::ZERO, rng: &mut r, spis: &mut spis };
    let (registry, table) = (Registry::new(config(A)), Table::default());
    let secret = |len: usize| Key::new(Secret::from_slice(&vec![7; len]));
    let keys = IkeKeys {
        aead: AeadAlg::Aes256Gcm16,
        prf: PrfAlg::HmacSha384,
        sk_d: secret(48),
        sk_ei: secret(36),
        sk_er: secret(36),
    };
    for (born, term, works) in
        [(3, 3, true), (3, 2 + (1 << 16), true), (3, 3 + (1 << 16), false), (3, 2, false)]
    {
        let mut ivs = IvSequence::new(term);
        let mut step = Step {
            cx: &mut cx,
            registry: &registry,
            table: &table,
            term,
            quiet: false,
            ivs: &mut ivs,
            done: Collected::default(),
        };
        let header = wire::ike::Header {
            initiator_spi: IkeSpi(1),
            responder_spi: IkeSpi(2),
            exchange: wire::ike::ExchangeType::INFORMATIONAL,
            from_initiator: true,
            response: false,
            message_id: wire::id::MessageId(2),
        };
        let builder = wire::ike::MessageBuilder::sealed(&header);
        let sealed = step.seal(true, &keys, born, builder);
        assert_eq!(sealed.is_ok(), works, "{born} {term}");
        assert!(works || matches!(sealed, Err(Error::Internal(_))));
    }
}

// A shadow neither answers nor times out.
#[test]
fn a_shadow_is_silent() {
    let mut w = World::established();
    w.rekey(A, Target::Child(w.child(A)));
    let request = w.take(B);
    let shadow = &mut w.sides[B].shadow;
    let mut rng = rng(1);
    let mut spis = Spis::default();
    let mut cx = Context { now: w.now, rng: &mut rng, spis: &mut spis };
    let packet = request.packet.clone();
    shadow.handle_datagram(&mut cx, packet.from, packet.to, &packet.bytes);
    shadow.handle_timeout(&mut cx);
    assert!(shadow.poll_transition().is_none() && shadow.poll_timeout().is_none());
    assert_eq!(shadow.counters().not_owner, 1);
}

// A takes over in doubt: ids are agreed anew (RFC 6311).
// A'                                   B
// id 0, N(IKEV2_MESSAGE_ID_SYNC) ──►
//                                  ◄── id 0, N(IKEV2_MESSAGE_ID_SYNC)
#[test]
fn in_doubt_message_ids_are_agreed() {
    for side in [A, B] {
        let mut w = World::established();
        let (spi, ike) = (w.child(side), w.ike(side));
        w.take_over(side, Doubt::InDoubt);
        let sync = wire::ike::Header::parse(&w.wire[0].packet.bytes).unwrap();
        assert_eq!(sync.message_id.0, 0);
        let copy = w.wire[0].clone();
        w.settle();
        w.run(Duration::from_secs(6));
        w.assert_tidy();
        assert_eq!(w.ike(side), ike, "nothing was re-established");
        assert_ne!(w.child(side), spi, "Child SAs are rekeyed first");
        // A replay of it does nothing.
        let before = w.snapshot(1 - side);
        w.deliver(copy);
        assert_eq!(w.snapshot(1 - side), before);
        w.wire.clear();
        // (`before` was taken at the same time: ages are equal.)
        // Both sides can go on.
        let child = w.child(side);
        w.rekey(side, Target::Child(child));
        assert_eq!(w.wire.len(), 1, "{:?} {:#?}", w.log, w.sides[side].ike.status(w.now));
        let id = wire::ike::Header::parse(&w.wire[0].packet.bytes).unwrap().message_id.0;
        assert!(id >= 256, "{id}");
        w.settle();
        w.rekey(1 - side, Target::Ike(w.ike(1 - side)));
        w.settle();
        w.run(Duration::from_secs(40));
        w.assert_tidy();
    }
}

// B takes over in doubt. A initiated and is behind no NAT, so it may be a
// strongSwan, which a synchronisation would kill (see sync.rs): B calls it.
// A                                   B'
//                                 ◄── SA_INIT ... AUTH (no INITIAL_CONTACT)
#[test]
fn in_doubt_a_new_ike_sa_is_made_before_the_old_one_goes() {
    let mut w = World::tuned(|_, c| c.connections[0].encap = Encap::Never);
    w.initiate(A);
    w.settle();
    let old = w.child(B);
    w.take_over(B, Doubt::InDoubt);
    while !w.wire.is_empty() {
        // (A sends on the new one as soon as it answers IKE_AUTH, one flight
        // before B can receive: RFC 7296 §2.8 allows it.)
        assert!(
            w.sides.iter().all(|s| s.plane.sas.contains_key(&EspSpi(0x0010_0001)))
                || w.works("net")
        );
        let flight = w.lose();
        w.deliver(flight);
    }
    // B forgets the old one in silence; A notices by its liveness check.
    w.run(Duration::from_secs(10));
    assert_eq!(w.sides[B].ike.status(w.now).ike_sas.len(), 1);
    w.run(Duration::from_secs(180));
    w.assert_tidy();
    assert_ne!(w.child(B), old);
    let ids =
        w.sent.iter().filter(|(n, t)| *n == B && t.bytes[18] == 37).map(|(_, t)| &t.bytes[..24]);
    assert_eq!(ids.clone().count(), ids.collect::<BTreeSet<_>>().len(), "no id is used twice");
    for n in [A, B] {
        assert!(!w.sides[n].events.iter().any(|e| matches!(
            e,
            Event::Deleted { reason: crate::DeleteReason::InitialContact, .. }
        )));
    }
}

// In doubt with a request outstanding that the peer may or may not have seen.
#[test]
fn in_doubt_with_a_rekeying_under_way() {
    for seen in [false, true] {
        let mut w = World::established();
        w.rekey(A, Target::Child(w.child(A)));
        let request = w.take(B);
        if seen {
            w.deliver(request);
            w.wire.clear();
        }
        w.take_over(A, Doubt::InDoubt);
        w.settle();
        w.run(Duration::from_secs(90));
        w.assert_tidy();
    }
}

// RFC 6311 §5.1: an answer with another nonce is dropped: played by answering the
// second sync with the answer to the first.
#[test]
fn an_answer_to_another_sync_is_dropped() {
    let mut w = World::established();
    w.take_over(A, Doubt::InDoubt);
    w.pass(B);
    let answer = w.lose();
    w.take_over(A, Doubt::InDoubt);
    let before = w.snapshot(A);
    w.deliver(answer);
    assert_eq!(w.snapshot(A), before);
    w.settle();
    w.run(Duration::from_secs(6));
    w.assert_tidy();
}

// A sync that is not answered is never sent again by a later owner.
#[test]
fn a_later_owner_makes_a_sync_of_its_own() {
    let mut w = World::established();
    w.take_over(A, Doubt::InDoubt);
    let first = w.lose();
    w.take_over(A, Doubt::InDoubt);
    assert_ne!(w.wire[0].packet.bytes, first.packet.bytes);
    w.settle();
    w.deliver(first); // late: dropped, M1 is not above what B has seen
    w.settle();
    w.run(Duration::from_secs(6));
    w.assert_tidy();
}

// Establishment in doubt: begun anew, without INITIAL_CONTACT.
#[test]
fn in_doubt_while_connecting() {
    let mut w = World::tuned(|n, c| {
        if n == A {
            c.connections[0].children[0].start = Start::Initiate;
        }
    });
    w.with_side(A, |ike, cx| ike.handle_timeout(cx));
    w.pass(B);
    w.pass(A);
    w.wire.clear();
    w.take_over(A, Doubt::InDoubt);
    w.settle();
    w.run(Duration::from_secs(40));
    w.assert_tidy();
}

// Takeovers at random moments through a life of rekeys by both sides.
#[test]
fn a_life_of_takeovers() {
    for seed in 0..100 {
        let mut w = World::established();
        let mut dice = rng(seed);
        for round in 0..60 {
            let n = dice.next_u32() as usize % 2;
            match dice.next_u32() % 5 {
                0 => {
                    w.with_side(n, |ike, cx| ike.rekey(cx, Target::Connection(ConnectionId(0))));
                }
                1 | 2 => {
                    w.with_side(n, |ike, cx| ike.rekey(cx, Target::Children(ConnectionId(0))));
                }
                3 => w.take_over(n, Doubt::None),
                _ => w.run(Duration::from_secs(u64::from(dice.next_u32() % 40))),
            }
            for _ in 0..dice.next_u32() % 4 {
                if let Some(flight) = w.wire.pop_front() {
                    w.deliver(flight);
                }
            }
            w.log.push(format!("seed {seed} round {round}"));
        }
        w.run(Duration::from_secs(120));
        w.assert_tidy();
    }
}

// An exchange outstanding for long: ages travel, clocks differ.
#[test]
fn ages_survive_a_move_to_another_clock() {
    let mut w = World::established();
    w.run(Duration::from_secs(1800));
    let old = w.sides[A].ike.status(w.now);
    let records = w.sides[A].ike.snapshot(w.now);
    // A host that booted five seconds ago.
    let mut other = Endpoint::new(config(A));
    let boot = Duration::from_secs(5);
    other.apply(boot, &records, &[]).unwrap();
    let new = other.status(boot);
    let (old, new) = (&old.ike_sas[0], &new.ike_sas[0]);
    assert_eq!(old.age.as_secs(), new.age.as_secs());
    assert_eq!(old.rekey_in.unwrap().as_secs(), new.rekey_in.unwrap().as_secs());
    assert_eq!(old.children[0].age.as_secs(), new.children[0].age.as_secs());
}

#[test]
fn bad_records_are_refused_whole() {
    let w = World::established();
    let records = w.sides[A].ike.snapshot(w.now);
    let (spi, bytes) = &records[0];
    let mut other = Endpoint::new(config(A));
    let zero = Duration::ZERO;
    let mut refuse = |spi: IkeSpi, bytes: &[u8], why: crate::RecordError| {
        let puts = [(spi, zeroize::Zeroizing::new(bytes.to_vec()))];
        assert_eq!(other.apply(zero, &puts, &[]).unwrap_err(), why);
        assert!(other.snapshot(zero).is_empty());
    };
    refuse(IkeSpi(1), bytes, crate::RecordError::Key);
    refuse(*spi, &[], crate::RecordError::Malformed);
    let mut newer = bytes.to_vec();
    newer[0] = 9;
    refuse(*spi, &newer, crate::RecordError::Format(9));
    for len in 1..bytes.len() {
        refuse(*spi, &bytes[..len], crate::RecordError::Malformed);
    }
    let mut renamed = config(A);
    renamed.connections[0].name = "d".to_owned();
    let mut other = Endpoint::new(renamed);
    assert_eq!(other.apply(zero, &records, &[]).unwrap_err(), crate::RecordError::Connection);
    let mut own = w;
    assert_eq!(own.sides[A].ike.apply(zero, &records, &[]).unwrap_err(), crate::RecordError::Owner);
}

// ha.md, split brain: nobody begins an exchange for ten seconds. In doubt nobody
// answers one either, but for committed bytes: the old owner may have used the
// message id for something else. ESP goes on.
// A'                                   B
//                                  ◄── id n (the last one, once more)
// id n, the committed answer ──►
//                                  ◄── id n + 1
// ... 10 s ...
// id 0, N(IKEV2_MESSAGE_ID_SYNC) ──►
#[test]
fn in_doubt_nothing_new_is_said_before_the_quiet_time_is_over() {
    for second in [None, Some(Doubt::None), Some(Doubt::InDoubt)] {
        let mut w = World::established();
        w.rekey(B, Target::Child(w.child(B)));
        w.settle();
        // B's Delete of the old one, and the answer.
        let newest = |n: usize| w.sent.iter().rfind(|(by, _)| *by == n).unwrap().1.clone();
        let answer = newest(A);
        let last = Flight { at: w.now, to_side: A, packet: newest(B) };
        let child = w.child(A);
        // A request of A's that the old owner sent, and perhaps others after it.
        w.rekey(A, Target::Child(child));
        let asked = w.take(B);
        w.deliver(asked);
        let response = w.take(A);
        w.wire.clear();

        let until = w.now + Duration::from_secs(10);
        w.sides[A].shadow.hold_initiations(until);
        w.take_over(A, Doubt::InDoubt);
        assert!(w.wire.is_empty(), "its request is not repeated");
        w.run(Duration::from_secs(5));
        if let Some(doubt) = second {
            // The doubt came with the records; only the second owner's word does not.
            w.sides[A].shadow.hold_initiations(until);
            w.take_over(A, doubt);
        }
        w.deliver(last);
        assert_eq!(w.take(B).packet, answer, "committed bytes");
        w.deliver(response);
        assert!(w.wire.is_empty(), "the response comes too late");
        assert_eq!(w.child(A), child, "ESP goes on");
        w.with_side(B, |ike, cx| ike.handle_timeout(cx));
        w.rekey(B, Target::Ike(w.ike(B)));
        w.wire.retain(|f| f.to_side == A);
        assert!(!w.wire.is_empty());
        while let Some(request) = w.wire.pop_front() {
            w.deliver(request);
            assert!(w.wire.iter().all(|f| f.to_side == A), "an answer in doubt");
        }
        let sent = w.sent.iter().filter(|(n, _)| *n == A).count();
        let now = w.now;
        while w.now < until - Duration::from_millis(1) {
            w.run((until - w.now).min(Duration::from_millis(500)) - Duration::from_millis(1));
        }
        assert_eq!(w.sent.iter().filter(|(n, _)| *n == A).count(), sent, "since {now:?}");
        w.run(Duration::from_millis(10));
        let (_, sync) = w.sent.iter().rfind(|(n, _)| *n == A).unwrap();
        assert_eq!(wire::ike::Header::parse(&sync.bytes).unwrap().message_id.0, 0);
        w.run(Duration::from_secs(120));
        w.assert_tidy();
        assert_eq!(unique_ids(&w), Ok(()));
    }
}

/// ha.md, invariant 4: no two requests, and no two responses, of one id (but for
/// synchronisations, which all have 0).
fn unique_ids(w: &World) -> Result<(), String> {
    let mut seen = BTreeMap::new();
    for (n, t) in &w.sent {
        let h = wire::ike::Header::parse(&t.bytes).unwrap();
        if h.exchange == wire::ike::ExchangeType::INFORMATIONAL && h.message_id.0 == 0 {
            continue;
        }
        let key = (*n, h.initiator_spi, h.responder_spi, h.response, h.message_id);
        let first = seen.entry(key).or_insert_with(|| t.bytes.clone());
        if *first != t.bytes {
            return Err(format!("{key:?}"));
        }
    }
    Ok(())
}

// A later owner that is synced inherits the doubt: the first one's synchronisation
// is not sent again, M1 lies above it, and INITIAL_CONTACT is never sent.
#[test]
fn a_doubt_outlives_its_owner() {
    let mut w = World::established();
    w.take_over(A, Doubt::InDoubt);
    let first = w.lose();
    w.take_over(A, Doubt::None);
    let again = w.take(B);
    assert_ne!(again.packet.bytes, first.packet.bytes);
    w.deliver(again);
    w.settle();
    w.deliver(first);
    w.settle();
    w.run(Duration::from_secs(6));
    w.assert_tidy();
    w.run(Duration::from_secs(40));
    let mut ids = w.sent.iter().filter(|(n, _)| *n == A).map(|(_, t)| {
        let h = wire::ike::Header::parse(&t.bytes).unwrap();
        (h.response, h.message_id.0)
    });
    assert!(ids.any(|(response, id)| !response && id >= 512), "M1 above the first one's");
    assert_eq!(unique_ids(&w), Ok(()));
}

// Both ends take over in doubt at once, and each answers the other.
#[test]
fn two_clusters_in_doubt_agree() {
    for first in [A, B] {
        let mut w = World::established();
        w.take_over(A, Doubt::InDoubt);
        w.take_over(B, Doubt::InDoubt);
        w.pass(first);
        w.settle();
        w.run(Duration::from_secs(120));
        w.assert_tidy();
        assert_eq!(unique_ids(&w), Ok(()));
    }
}

// What is half-open in doubt is dropped at once: the other side begins anew.
#[test]
fn what_is_half_open_in_doubt_is_answered_no_more() {
    for passed in 1..4 {
        let mut w = World::new();
        w.initiate(A);
        for n in 0..passed {
            w.pass([B, A][n % 2]);
        }
        let side = 1 - passed % 2;
        let next = w.wire.clone();
        w.wire.clear();
        let until = w.now + Duration::from_secs(10);
        w.sides[side].shadow.hold_initiations(until);
        w.take_over(side, Doubt::InDoubt);
        for flight in next {
            w.deliver(flight);
        }
        assert!(!w.wire.iter().any(|f| f.to_side != side), "passed {passed}");
    }
}

// ha.md, healing: A' took over by silence while A lived on and rekeyed with B.
// A' has not used the IKE SA, so it takes A's records, and with them ends its doubt
// if it was not synced.
#[test]
fn the_winner_takes_what_it_has_not_used() {
    the_winner_takes(Doubt::None);
    the_winner_takes(Doubt::InDoubt);
}

fn the_winner_takes(doubt: Doubt) {
    let mut w = World::established();
    let split = w.now;
    let old = w.sides[A].shadow.snapshot(split);
    let mut winner = Endpoint::new(config(A));
    winner.apply(split, &old, &[]).unwrap();
    let (mut r, mut spis) = (rng(3), Spis::default());
    spis.taken = winner.esp_spis().collect();
    let mut plane = Plane::default();
    plane.apply(winner.install_all());
    let mut cx = Context { now: split, rng: &mut r, spis: &mut spis };
    winner.hold_initiations(split + Duration::from_secs(10));
    winner.activate(&mut cx, Term(2), doubt).unwrap();

    // The loser goes on: both rekeyings, and the old IKE SA is gone.
    w.rekey(A, Target::Child(w.child(A)));
    w.settle();
    w.rekey(A, Target::Ike(w.ike(A)));
    w.settle();
    let tail = w.sides[A].ike.snapshot(w.now);
    let deletes: Vec<IkeSpi> = old.iter().map(|(spi, _)| *spi).collect();

    let mut cx = Context { now: w.now, rng: &mut r, spis: &mut spis };
    while winner.poll_transition().is_some() {}
    cx.spis.release(*plane.sas.keys().next().unwrap());
    cx.spis.allocate(None);
    assert_eq!(winner.adopt(&mut cx, split, &tail, &deletes).unwrap(), tail.len() + 1);
    let transition = winner.poll_transition().unwrap();
    plane.apply(transition.children);
    assert_eq!(
        plane.sender("net").unwrap().spi_out,
        w.sides[A].plane.sender("net").unwrap().spi_out
    );
    assert!(!tail.iter().any(|(spi, _)| winner.is_waiting_in_doubt(*spi)));
    // What changed here since the split is not taken.
    let (spi, _) = tail[0];
    assert!(winner.rekey(&mut cx, Target::Ike(spi)));
    while winner.poll_transition().is_some() {}
    let before: Vec<Vec<u8>> = winner.snapshot(cx.now).iter().map(|r| r.1.to_vec()).collect();
    assert_eq!(winner.adopt(&mut cx, split, &tail[..1], &[spi]).unwrap(), 0);
    let after: Vec<Vec<u8>> = winner.snapshot(cx.now).iter().map(|r| r.1.to_vec()).collect();
    assert_eq!(before, after);
    assert_eq!(winner.adopt(&mut cx, split, &old, &[]).unwrap(), 0);
}

/// Another owner of A's side since now, in a split: it has A's state, and plays for itself.
struct Winner {
    ike: Endpoint,
    rng: rand_chacha::ChaCha20Rng,
    spis: Spis,
    plane: Plane,
    split: Duration,
    /// The IKE SAs at the split.
    old: Vec<IkeSpi>,
}

impl Winner {
    fn of(w: &World, doubt: Doubt) -> Self {
        let split = w.now;
        let records = w.sides[A].shadow.snapshot(split);
        let mut ike = Endpoint::new(config(A));
        ike.apply(split, &records, &[]).unwrap();
        let mut plane = Plane::default();
        plane.apply(ike.install_all());
        let spis = Spis { taken: ike.esp_spis().collect(), ..Spis::default() };
        let old = records.iter().map(|(spi, _)| *spi).collect();
        let mut winner = Self { ike, rng: rng(3), spis, plane, split, old };
        // (ha.md says 10 s; longer, since B waits 30 s before it does what A should have done.)
        winner.ike.hold_initiations(split + Duration::from_secs(60));
        winner.with(split, |ike, cx| ike.activate(cx, Term(2), doubt).unwrap());
        winner
    }

    /// Calls into it and drains it; gives what it says.
    fn with(
        &mut self,
        now: Duration,
        f: impl FnOnce(&mut Endpoint, &mut Context<'_>),
    ) -> Vec<Transmit> {
        f(&mut self.ike, &mut Context { now, rng: &mut self.rng, spis: &mut self.spis });
        let mut said = Vec::new();
        while let Some(transition) = self.ike.poll_transition() {
            self.plane.apply(transition.children);
            said.extend(transition.transmits);
        }
        said
    }

    fn hear(&mut self, now: Duration, packet: &Transmit) -> Vec<Transmit> {
        self.with(now, |ike, cx| ike.handle_datagram(cx, packet.from, packet.to, &packet.bytes))
    }

    /// ha.md: the winner takes a new term, and what the loser did.
    fn heal(&mut self, w: &World) {
        self.with(w.now, |ike, cx| ike.activate(cx, Term(4), Doubt::None).unwrap());
        let (tail, split, old) = (w.sides[A].ike.snapshot(w.now), self.split, self.old.clone());
        // The real allocator knows again what comes back.
        self.spis.taken.extend(w.sides[A].ike.esp_spis());
        self.with(w.now, |ike, cx| {
            ike.adopt(cx, split, &tail, &old).unwrap();
        });
    }
}

/// B's Delete of the Child SA of an established world, and that world a second later.
fn child_deleted() -> (World, Transmit) {
    let mut w = World::established();
    w.now += Duration::from_secs(1);
    w.terminate(B, Target::Child(w.child(B)));
    let packet = w.take(A).packet;
    (w, packet)
}

// The peer took the Child SA down, and only the winner heard of it; the loser had carried it into a new IKE SA
// meanwhile. Healing does not bring it back, also in the further term that it begins with.
// A (loser)            B                 A' (winner)
//                      Delete(child) ──►
//                                   ◄── Delete(child)
// rekeys the IKE SA ──►
#[test]
fn healing_keeps_an_ended_child_ended() {
    for heard in [true, false] {
        // Two worlds with one past: one in which the loser rekeyed, one in which the peer deleted.
        let mut w = World::established();
        let mut winner = Winner::of(&w, Doubt::None);
        let (_, delete) = child_deleted();
        w.now += Duration::from_secs(1);
        if heard {
            assert_eq!(winner.hear(w.now, &delete).len(), 1, "the answer");
            assert!(winner.plane.sas.is_empty());
        }
        w.rekey(A, Target::Ike(w.ike(A)));
        w.settle();
        winner.heal(&w);
        assert_eq!(winner.plane.sas.is_empty(), heard, "what ended stays ended, and nothing else");
    }
}

/// A rekeyed the IKE SA, and then was cut off: B ends the old one, which A should have done. B's Delete.
fn rekeyed_and_deleted(w: &mut World) -> Transmit {
    let old = w.ike(A);
    w.rekey(A, Target::Ike(old));
    w.pass(B);
    w.pass(A);
    w.wire.clear();
    for _ in 0..60 {
        w.now += Duration::from_secs(1);
        w.with_side(B, |ike, cx| ike.handle_timeout(cx));
        let delete = w.wire.iter().find(|f| {
            let head = wire::ike::Header::parse(&f.packet.bytes).unwrap();
            f.to_side == A && head.initiator_spi == old && !head.response
        });
        if let Some(delete) = delete {
            return delete.packet.clone();
        }
        w.wire.clear();
    }
    panic!("B never deletes the old IKE SA");
}

// The Child SAs that went with an IKE SA, because the loser had rekeyed that, live on at the peer: healing brings them
// back in the IKE SA that they are in now.
// A (loser)                  B                       A' (winner)
// rekeys the IKE SA ──►
//                            Delete(old IKE SA) ──►
//                                               ◄── (empty)
#[test]
fn healing_brings_back_what_went_with_a_rekeyed_ike_sa() {
    let mut w = World::established();
    let mut winner = Winner::of(&w, Doubt::None);
    let delete = rekeyed_and_deleted(&mut w);
    assert_eq!(winner.hear(w.now, &delete).len(), 1);
    assert!(winner.plane.sas.is_empty());
    winner.heal(&w);
    assert!(winner.plane.sas.contains_key(&w.child(A)));
    assert!(winner.ike.status(w.now).ike_sas.iter().any(|sa| sa.spi == w.ike(A)));
}

// An IKE SA that healing puts in the place of itself, within one term, goes on with the IVs of that term, as do all
// others: no (key, IV) pair protects two messages (ha.md, invariant 1).
#[test]
fn an_ike_sa_that_comes_back_within_a_term_repeats_no_iv() {
    let w = World::established();
    let (spi, records) = (w.ike(A), w.sides[A].ike.snapshot(w.now));
    let mut winner = Winner::of(&w, Doubt::None);
    let mut now = w.now + Duration::from_secs(70);
    let mut ivs = BTreeSet::new();
    for round in 1..=3 {
        let said = winner.with(now, |ike, cx| assert!(ike.rekey(cx, Target::Ike(spi))));
        assert_eq!(said.len(), 1);
        let sealed = wire::ike::Message::parse(&said[0].bytes).unwrap().sealed.unwrap();
        ivs.insert(said[0].bytes[sealed.iv()].to_vec());
        assert_eq!(ivs.len(), round, "{ivs:02x?}");
        // Its state before that, by the word of another, who saw no use of it either.
        now += Duration::from_secs(1);
        let mut taken = 0;
        winner.with(now, |ike, cx| taken = ike.adopt(cx, now, &records, &[]).unwrap());
        assert_eq!(taken, 1);
    }
}

// The peer took the whole IKE SA down, and only the winner heard of it.
#[test]
fn healing_keeps_an_ended_ike_sa_ended() {
    let mut w = World::established();
    let mut winner = Winner::of(&w, Doubt::None);
    let mut other = World::established();
    other.terminate(B, Target::Ike(other.ike(B)));
    w.now += Duration::from_secs(1);
    assert_eq!(winner.hear(w.now, &other.take(A).packet).len(), 1);
    // It has also forgotten the answer.
    w.now += Duration::from_secs(20);
    winner.with(w.now, |ike, cx| ike.handle_timeout(cx));
    winner.heal(&w);
    assert!(winner.plane.sas.is_empty());
    assert!(winner.ike.status(w.now).ike_sas.is_empty());
}

// In doubt a Delete is not obeyed (see `on_request`): neither that of an IKE SA whose rekeying was not heard of, with
// which the peer's Child SAs would go, nor that of a Child SA. Nothing is said, ESP goes on, and healing gets it right.
#[test]
fn a_delete_in_doubt_takes_nothing_down() {
    let mut w = World::established();
    let mut winner = Winner::of(&w, Doubt::InDoubt);
    let (_, of_child) = child_deleted();
    let of_ike = rekeyed_and_deleted(&mut w);
    for delete in [of_child, of_ike] {
        assert!(winner.hear(w.now, &delete).is_empty());
        assert!(winner.plane.sas.contains_key(&w.child(A)), "ESP goes on");
    }
    winner.heal(&w);
    assert!(winner.plane.sas.contains_key(&w.child(A)));
    assert!(!winner.old.contains(&w.ike(A)));
    assert!(winner.ike.status(w.now).ike_sas.iter().any(|sa| sa.spi == w.ike(A)));
}

// What the peer did delete in the time of doubt is gone when the doubt is: the Child SA on both sides, or, with the IKE
// SA, all that was.
#[test]
fn what_was_deleted_in_doubt_goes_with_the_doubt() {
    for whole in [false, true] {
        let mut w = World::established();
        let (ike, child) = (w.ike(A), w.child(A));
        let until = w.now + Duration::from_secs(10);
        w.sides[A].shadow.hold_initiations(until);
        w.take_over(A, Doubt::InDoubt);
        let target = if whole { Target::Ike(w.ike(B)) } else { Target::Child(w.child(B)) };
        w.terminate(B, target);
        w.run(Duration::from_secs(5));
        assert!(w.sides[A].plane.sas.contains_key(&child));
        w.run(Duration::from_secs(300));
        assert!(w.sides.iter().all(|side| !side.plane.sas.contains_key(&child)));
        assert_eq!(w.sides[A].ike.status(w.now).ike_sas.iter().any(|sa| sa.spi == ike), !whole);
        assert_eq!(w.sides[A].plane.sas.len(), w.sides[B].plane.sas.len());
        assert_eq!(unique_ids(&w), Ok(()));
    }
}
