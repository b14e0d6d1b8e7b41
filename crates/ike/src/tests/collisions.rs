//! Exchanges that cross (RFC 7296 §2.8.1, §2.8.2, §2.25). In every one the
//! tunnel works at every moment at which nothing is on the wire, and in the end
//! one IKE SA and one Child SA are left on each side.
//!
//! Nonces are random, so every collision is played with many seeds: each side
//! wins in some of them.

use super::*;

/// Establishes with a seed of its own.
fn seeded(seed: u64) -> World {
    let mut w = World::new();
    w.sides[A].rng = rng(2 * seed + 100);
    w.sides[B].rng = rng(2 * seed + 101);
    w.initiate(A);
    w.settle();
    w
}

/// Lets the dust settle: redundant SAs go within a minute.
fn tidy(w: &mut World) {
    w.run(Duration::from_secs(60));
    w.assert_tidy();
}

/// Runs `f` with seeds until both orders of the nonces have been seen.
fn with_seeds(f: impl Fn(&mut World) -> bool) {
    let (mut won, mut lost) = (0, 0);
    for seed in 0..16 {
        let mut w = seeded(seed);
        if f(&mut w) { won += 1 } else { lost += 1 }
    }
    assert!(won > 0 && lost > 0, "one order of nonces was never drawn: {won} {lost}");
}

// A                                     B
// REKEY_SA, Ni1 ──►                    ◄── REKEY_SA, Ni2
//         ◄───────────── × ─────────────►
// Nr1 ──►                              ◄── Nr2
//   the SA with the lowest nonce is deleted by its creator,
//   the old one by the other side
#[test]
fn both_rekey_a_child() {
    with_seeds(|w| {
        let old = (w.child(A), w.child(B));
        w.rekey(A, Target::Child(old.0));
        w.rekey(B, Target::Child(old.1));
        w.settle();
        w.assert_tunnel();
        assert_ne!(w.child(A), old.0);
        tidy(w);
        // Who won? The survivor was asked for by A if A's SPI was allocated
        // for its request, before it answered B's.
        w.child(A).0 == old.0.0 + 1
    });
}

// A                                     B
// req1: REKEY_SA ──► (lost)
//                                 ◄── req2: REKEY_SA
// resp2 ──►
//                                 ◄── req3: D(old)
// resp3: D(old) ──►
// req1 again ──►
//                                 ◄── resp1: N(CHILD_SA_NOT_FOUND)
// (RFC 7296 §2.8.1, second sequence)
#[test]
fn both_rekey_a_child_and_one_request_is_lost() {
    let mut w = World::established();
    w.rekey(A, Target::Child(w.child(A)));
    w.lose();
    w.rekey(B, Target::Child(w.child(B)));
    w.settle();
    w.assert_tunnel();
    let children = w.sides[A].plane.sas.len();
    w.run(Duration::from_secs(2));
    w.assert_tunnel();
    assert!(children <= 2);
    tidy(&mut w);
}

// A                                     B
// req1: REKEY_SA ──►              ◄── req2: REKEY_SA
//                    (req2 arrives first)
// resp2 ──►                            (both at B: resp2, then req1)
#[test]
fn both_rekey_a_child_in_every_order_of_arrival() {
    for order in 0..24 {
        for seed in 0..6 {
            let mut w = seeded(seed);
            w.rekey(A, Target::Child(w.child(A)));
            w.rekey(B, Target::Child(w.child(B)));
            // Deliver by a permutation drawn from `order`: which side next.
            let mut bits = order;
            while !w.wire.is_empty() {
                let side = bits % 2;
                bits /= 2;
                let side = if w.wire.iter().any(|f| f.to_side == side) { side } else { 1 - side };
                w.pass(side);
                assert!(w.sent.len() < 60);
            }
            w.assert_tunnel();
            tidy(&mut w);
        }
    }
}

// A                                     B
// REKEY_SA(old) ──►               ◄── D(old)
//      ──► N(TEMPORARY_FAILURE): B is closing it (§2.25.1)
//      D(old) ◄── as usual
// A wants the child (start = initiate) and makes it anew.
#[test]
fn one_rekeys_a_child_that_the_other_deletes() {
    let mut w = World::tuned(|n, c| {
        if n == A {
            c.connections[0].children[0].start = Start::Initiate;
        }
    });
    w.initiate(A);
    w.settle();
    w.rekey(A, Target::Child(w.child(A)));
    w.terminate(B, Target::Child(w.child(B)));
    w.settle();
    assert!(w.sides[A].plane.sas.is_empty());
    tidy(&mut w);
}

// A                                     B
// REKEY_SA(old) ──►
//                        (lost) × ◄── SA, Nr: B has the new one, A does not
//   B wants to rekey as well: not the new one, which A would not know
#[test]
fn an_unconfirmed_child_is_not_rekeyed() {
    let mut w = World::established();
    w.rekey(A, Target::Child(w.child(A)));
    w.pass(B);
    w.lose();
    let sent = w.sent.len();
    w.with_side(B, |ike, cx| ike.rekey(cx, Target::Children(ConnectionId(0))));
    assert_eq!(w.sent.len(), sent);
    w.run(Duration::from_secs(60));
    w.assert_tidy();
}

// A                                     B
// D(old) ──►                      ◄── D(old)
//   each answers without a Delete payload (§1.4.1)
#[test]
fn both_delete_a_child() {
    let mut w = World::established();
    w.terminate(A, Target::Child(w.child(A)));
    w.terminate(B, Target::Child(w.child(B)));
    let before = w.sent.len();
    w.settle();
    let answers: Vec<usize> = w.sent[before..].iter().map(|(_, t)| t.bytes.len()).collect();
    // Header, SK header, IV, pad length, ICV: nothing inside.
    assert_eq!(answers, [28 + 4 + 8 + 1 + 16; 2], "each answers once, without a Delete");
    for n in [A, B] {
        assert!(w.sides[n].plane.sas.is_empty());
        assert_eq!(w.sides[n].ike.status(w.now).ike_sas.len(), 1);
    }
}

// A                                     B
// SA(SPIa), Ni1 ──►               ◄── SA(SPIb), Ni2
//         ◄───────────── × ─────────────►
// SA, Nr1 ──►                     ◄── SA, Nr2
//   the IKE SA with the lowest nonce is deleted by its creator, the other one
//   inherits the children, its creator deletes the old one (§2.8.2)
#[test]
fn both_rekey_the_ike_sa() {
    with_seeds(|w| {
        let child = (w.child(A), w.child(B));
        w.rekey(A, Target::Ike(w.ike(A)));
        w.rekey(B, Target::Ike(w.ike(B)));
        w.settle();
        w.assert_tunnel();
        assert_eq!((w.child(A), w.child(B)), child, "children move, they do not change");
        tidy(w);
        w.sides[A].ike.status(w.now).ike_sas[0].initiator
    });
}

// A                                     B
// req1: SA, Ni ──► (late)
//                                 ◄── req2: SA, Ni
// resp2 ──►
//                                 ◄── req3: D()   B has not seen req1
// resp3 ──►                            A forgets req1
//    ──► req1                          unknown SPI or closed: silence
// (§2.8.2, the special case)
#[test]
fn both_rekey_the_ike_sa_and_one_finishes_first() {
    let mut w = World::established();
    w.rekey(A, Target::Ike(w.ike(A)));
    let late = w.lose();
    w.rekey(B, Target::Ike(w.ike(B)));
    w.settle();
    w.assert_tunnel();
    w.deliver(late);
    w.settle();
    tidy(&mut w);
    assert!(!w.sides[A].ike.status(w.now).ike_sas[0].initiator, "B's new IKE SA lives on");
}

// A                                     B
// req1: SA, Ni ──► (late)
//                                 ◄── req2: SA, Ni
// resp2 ──►                            B: new IKE SA; is about to send D
//    ──► req1
//                                 ◄── N(TEMPORARY_FAILURE)
#[test]
fn an_ike_rekeying_that_comes_late_is_refused() {
    let mut w = World::established();
    w.rekey(A, Target::Ike(w.ike(A)));
    let late = w.lose();
    w.rekey(B, Target::Ike(w.ike(B)));
    w.pass(A); // req2
    w.pass(B); // resp2: B sends D
    w.deliver(late); // B: TEMPORARY_FAILURE
    // A sees the refusal before the Delete.
    let delete = w.take(A);
    w.pass(A);
    w.assert_tunnel();
    w.deliver(delete);
    w.settle();
    tidy(&mut w);
}

#[test]
fn both_rekey_the_ike_sa_in_every_order_of_arrival() {
    for order in 0..64 {
        for seed in 0..4 {
            let mut w = seeded(seed);
            w.rekey(A, Target::Ike(w.ike(A)));
            w.rekey(B, Target::Ike(w.ike(B)));
            let mut bits = order;
            while !w.wire.is_empty() {
                let side = bits % 2;
                bits /= 2;
                let side = if w.wire.iter().any(|f| f.to_side == side) { side } else { 1 - side };
                w.pass(side);
                assert!(w.sent.len() < 60);
            }
            w.assert_tunnel();
            tidy(&mut w);
        }
    }
}

// A                                     B
// D() ──►                         ◄── D()
//   both answer and forget (§2.25.2)
#[test]
fn both_delete_the_ike_sa() {
    let mut w = World::established();
    w.terminate(A, Target::Connection(ConnectionId(0)));
    w.terminate(B, Target::Connection(ConnectionId(0)));
    w.settle();
    for n in [A, B] {
        assert!(w.sides[n].ike.status(w.now).ike_sas.is_empty());
        assert!(w.sides[n].plane.sas.is_empty());
    }
    w.run(Duration::from_secs(60));
    assert!(w.snapshot(A).is_empty() && w.snapshot(B).is_empty());
}

// A                                     B
// SA(SPIa), Ni ──►                ◄── D()
//   A answers and forgets its own rekeying (§2.25.2)
#[test]
fn one_rekeys_the_ike_sa_that_the_other_deletes() {
    let mut w = World::established();
    w.rekey(A, Target::Ike(w.ike(A)));
    w.terminate(B, Target::Connection(ConnectionId(0)));
    w.settle();
    w.run(Duration::from_secs(60));
    assert!(w.snapshot(A).is_empty() && w.snapshot(B).is_empty());
}

// A                                     B
// SA(SPIa), Ni ──►                ◄── REKEY_SA(child)
//   N(TEMPORARY_FAILURE) both ways (§2.25.1, §2.25.2); the tunnel stays, and
//   both try again later
#[test]
fn one_rekeys_the_ike_sa_and_the_other_a_child() {
    let mut w = World::established();
    let (ike, child) = (w.ike(A), w.child(B));
    w.rekey(A, Target::Ike(ike));
    w.rekey(B, Target::Child(child));
    w.settle();
    assert_eq!((w.ike(A), w.child(B)), (ike, child), "nothing happened yet");
    w.assert_tunnel();
    tidy(&mut w);
    assert_ne!(w.ike(A), ike);
    assert_ne!(w.child(B), child);
}

// A                                     B
// SA(SPIa), Ni ──►                ◄── D(child)
//   the Delete is answered as usual (§2.25.2), the rekeying with
//   TEMPORARY_FAILURE (§2.25.1)
#[test]
fn one_rekeys_the_ike_sa_and_the_other_deletes_a_child() {
    let mut w = World::established();
    let ike = w.ike(A);
    w.rekey(A, Target::Ike(ike));
    w.terminate(B, Target::Child(w.child(B)));
    w.settle();
    assert!(w.sides[A].plane.sas.is_empty() && w.sides[B].plane.sas.is_empty());
    w.run(Duration::from_secs(60));
    assert_ne!(w.ike(A), ike);
}

// Liveness checks cross everything.
#[test]
fn liveness_checks_cross_rekeyings() {
    for side in [A, B] {
        let mut w = World::established();
        // B's liveness check is on its way when A begins to rekey.
        w.now += Duration::from_secs(31);
        w.with_side(B, |ike, cx| ike.handle_timeout(cx));
        assert_eq!(w.wire.len(), 1);
        w.rekey(A, Target::Ike(w.ike(A)));
        w.pass(side);
        w.settle();
        w.assert_tunnel();
        tidy(&mut w);
    }
}

// A                                     B
// SA_INIT ──►                     ◄── SA_INIT     both initiate at once
//   two IKE SAs; the tunnel works, and goes on working
#[test]
fn both_initiate() {
    let mut w = World::new();
    w.initiate(A);
    w.initiate(B);
    w.settle();
    w.assert_tunnel();
    w.run(Duration::from_secs(300));
    w.assert_tunnel();
}

// Both rekey everything, again and again, with datagrams lost, doubled and
// reordered: the tunnel works whenever things are quiet.
#[test]
fn collisions_on_a_bad_network() {
    use rand_chacha::rand_core::RngCore;
    for seed in 0..150 {
        let mut w = seeded(1000 + seed);
        let mut dice = rng(seed);
        for round in 0..8 {
            for n in [A, B] {
                match dice.next_u32() % 4 {
                    0 => w.rekey(n, Target::Ike(w.ike(n))),
                    1 => w.rekey(n, Target::Child(w.child(n))),
                    2 => w.rekey(n, Target::Children(ConnectionId(0))),
                    _ => {}
                }
            }
            // A bad second.
            for _ in 0..40 {
                if w.wire.is_empty() {
                    break;
                }
                let n = dice.next_u32() as usize % w.wire.len();
                let flight = w.wire.remove(n).unwrap();
                match dice.next_u32() % 10 {
                    0 | 1 => {}
                    2 | 3 => {
                        w.deliver(flight.clone());
                        w.deliver(flight);
                    }
                    _ => w.deliver(flight),
                }
            }
            w.run(Duration::from_secs(45));
            assert!(
                w.works("net"),
                "seed {seed} round {round}\n{:#?}\n{:#?}",
                w.sides[A].ike.status(w.now),
                w.sides[B].ike.status(w.now)
            );
        }
        w.run(Duration::from_secs(90));
        w.assert_tidy();
    }
}
