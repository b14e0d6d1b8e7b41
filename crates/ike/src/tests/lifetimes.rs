//! What time brings: rekeys, liveness checks, expiry, retries, keepalives, and
//! peers that move.

use super::*;

// Two days in virtual time: both sides rekey by their lifetimes; the tunnel
// works in every minute.
#[test]
fn two_days_of_rekeying() {
    let mut w = World::established();
    let (mut children, mut ikes) = (BTreeSet::new(), BTreeSet::new());
    for minute in 0..2 * 24 * 60 {
        w.run(Duration::from_secs(60));
        assert!(w.works("net"), "minute {minute}");
        children.insert(w.child(A));
        ikes.insert(w.sides[A].ike.status(w.now).ike_sas.iter().map(|s| s.spi).max().unwrap());
        w.sent.clear();
    }
    w.run(Duration::from_secs(40));
    w.assert_tidy();
    // A child an hour (less the jitter), an IKE SA every four.
    assert!((48..=60).contains(&children.len()), "{}", children.len());
    assert!((12..=16).contains(&ikes.len()), "{}", ikes.len());
}

// ha.md: the old inbound SA stays 5 s after its delete.
#[test]
fn a_rekeyed_child_lingers_to_receive() {
    let mut w = World::established();
    let old = (w.child(A), w.child(B));
    w.rekey(A, Target::Child(old.0));
    w.settle();
    for (n, old) in [(A, old.0), (B, old.1)] {
        assert!(w.sides[n].plane.sas.contains_key(&old));
        assert_ne!(w.child(n), old, "it no longer sends");
    }
    w.run(Duration::from_millis(4900));
    assert!(w.sides[A].plane.sas.contains_key(&old.0));
    w.run(Duration::from_millis(200));
    assert!(!w.sides[A].plane.sas.contains_key(&old.0));
    assert!(!w.sides[B].plane.sas.contains_key(&old.1));
}

// RFC 7296 §2.8: the responder of a rekeying goes on sending on the old SA until
// the Delete, or the first packet on the new one.
#[test]
fn the_first_packet_switches_the_responder() {
    let mut w = World::established();
    let old = w.child(B);
    w.rekey(A, Target::Child(w.child(A)));
    w.pass(B);
    assert_eq!(w.child(B), old, "A may not have the new one yet");
    let new = *w.sides[B].plane.sas.keys().find(|s| **s != old).unwrap();
    w.with_side(B, |ike, cx| ike.note_inbound(cx, new));
    assert_eq!(w.child(B), new);
    w.settle();
    w.assert_tunnel();
    assert_eq!(w.child(B), new);
}

// A                                   B
// (nothing heard for 30 s) HDR, SK {} ──►    × dead
//   repeated 8 times, given up, initiated again
#[test]
fn a_dead_peer_is_noticed_and_called_again() {
    let mut w = World::tuned(|n, c| {
        c.connections[0].children[0].start = if n == A { Start::Initiate } else { Start::Respond };
    });
    w.run(Duration::from_secs(1));
    w.assert_tidy();
    // B is gone for five minutes, and comes back with nothing.
    let end = w.now + Duration::from_secs(300);
    while w.now < end {
        w.now = (w.now + Duration::from_secs(1)).min(end);
        w.with_side(A, |ike, cx| ike.handle_timeout(cx));
        w.wire.clear();
    }
    assert!(!w.works("net"));
    let dead =
        |e: &Event| matches!(e, Event::Deleted { reason: crate::DeleteReason::PeerDead, .. });
    assert_eq!(w.sides[A].events.iter().filter(|e| dead(e)).count(), 1);
    assert!(w.failure(A).contains("we sent IKE_SA_INIT to 192.0.2.2"), "{}", w.failure(A));
    let (spis, rng) = (Spis { next: 77, ..Spis::default() }, rng(5));
    w.sides[B].ike = Endpoint::new(config(B));
    w.sides[B].shadow = Endpoint::new(config(B));
    w.sides[B].plane = Plane::default();
    w.sides[B].shadow_plane = Plane::default();
    (w.sides[B].spis, w.sides[B].rng) = (spis, rng);
    w.with_side(B, |ike, cx| ike.activate(cx, Term(9), Doubt::None).unwrap());
    w.run(Duration::from_secs(61));
    w.assert_tidy();
}

// Traffic is a sign of life: no liveness check while it lasts.
#[test]
fn traffic_suppresses_liveness_checks() {
    let mut w = World::established();
    let sent = w.sent.len();
    for _ in 0..100 {
        w.run(Duration::from_secs(10));
        for n in [A, B] {
            let spi = w.child(n);
            w.with_side(n, |ike, cx| ike.note_inbound(cx, spi));
        }
    }
    assert_eq!(w.sent.len(), sent);
    w.run(Duration::from_secs(31));
    assert!(w.sent.len() > sent);
}

// A host that restarted with nothing: its INITIAL_CONTACT ends the old SAs.
#[test]
fn initial_contact_ends_old_sas() {
    let mut w = World::established();
    let old = w.ike(B);
    w.sides[A].ike = Endpoint::new(config(A));
    w.sides[A].shadow = Endpoint::new(config(A));
    w.sides[A].plane = Plane::default();
    w.sides[A].shadow_plane = Plane::default();
    w.sides[A].spis = Spis { next: 99, ..Spis::default() };
    w.with_side(A, |ike, cx| ike.activate(cx, Term(5), Doubt::None).unwrap());
    w.initiate(A);
    w.settle();
    w.assert_tidy();
    assert_ne!(w.ike(B), old);
    assert!(w.sides[B].events.iter().any(|e| matches!(e, Event::Deleted {
        reason: crate::DeleteReason::InitialContact, spi, ..
    } if *spi == old)));
}

// The same without INITIAL_CONTACT (peers.md 8: reauthentication is
// make-before-break): a second IKE SA with the same identities is accepted, and
// the newest Child SA sends: not at once, for the peer may not have processed our
// answer (RFC 7296 §2.8), but after a packet on it, after a while, or when the
// older one goes. When it goes itself, the older one sends again.
#[test]
fn a_second_ike_sa_is_accepted() {
    for when in [When::Heard, When::Later, When::OtherGone] {
        second_ike_sa(when);
    }
}

/// When the newer Child SA sends.
enum When {
    Heard,
    Later,
    OtherGone,
}

fn second_ike_sa(when: When) {
    let mut w = World::established();
    let first = w.sides[B].plane.sender("net").unwrap().spi_in;
    let mut config = config(A);
    config.connections[0].initial_contact = false;
    let mut other = Endpoint::new(config);
    let (mut r, mut spis) = (rng(77), Spis { next: 500, ..Spis::default() });
    let mut cx = Context { now: w.now, rng: &mut r, spis: &mut spis };
    other.activate(&mut cx, Term(3), Doubt::None).unwrap();
    assert!(other.initiate(&mut cx, ConnectionId(0)));
    let mut talk = |w: &mut World, other: &mut Endpoint, spis: &mut Spis| {
        for _ in 0..4 {
            while let Some(t) = other.poll_transition() {
                for p in t.transmits {
                    w.with_side(B, |ike, cx| ike.handle_datagram(cx, p.from, p.to, &p.bytes));
                }
            }
            while let Some(f) = w.wire.pop_front() {
                let p = f.packet;
                let mut cx = Context { now: w.now, rng: &mut r, spis };
                other.handle_datagram(&mut cx, p.from, p.to, &p.bytes);
            }
        }
    };
    talk(&mut w, &mut other, &mut spis);
    assert_eq!(w.sides[B].ike.status(w.now).ike_sas.len(), 2);
    let second = *w.sides[B].plane.sas.keys().find(|spi| **spi != first).unwrap();
    let sender = |w: &World| w.sides[B].plane.sender("net").unwrap().spi_in;
    assert_eq!(sender(&w), first, "not at once");
    match when {
        When::Heard => w.with_side(B, |ike, cx| ike.note_inbound(cx, second)),
        When::Later => {
            w.run(Duration::from_millis(190));
            assert_eq!(sender(&w), first);
            w.run(Duration::from_millis(20));
        }
        When::OtherGone => {
            w.terminate(A, Target::Connection(ConnectionId(0)));
            w.settle();
            assert_eq!(sender(&w), second);
            return;
        }
    }
    assert_eq!(sender(&w), second);
    let mut cx_rng = rng(78);
    let mut cx = Context { now: w.now, rng: &mut cx_rng, spis: &mut spis };
    other.terminate(&mut cx, Target::Connection(ConnectionId(0)));
    talk(&mut w, &mut other, &mut spis);
    assert_eq!(w.sides[B].plane.sender("net").unwrap().spi_in, first);
    w.assert_tunnel();
}

// Deleted by command: down on both sides, and it stays down.
#[test]
fn a_command_takes_it_down_for_good() {
    let mut w = World::tuned(|n, c| {
        c.connections[0].children[0].start = if n == A { Start::Initiate } else { Start::Respond };
    });
    w.run(Duration::from_secs(1));
    w.assert_tidy();
    w.terminate(A, Target::Connection(ConnectionId(0)));
    w.run(Duration::from_secs(600));
    for n in [A, B] {
        assert!(w.snapshot(n).is_empty());
        assert!(w.sides[n].plane.sas.is_empty());
    }
    w.initiate(A);
    w.run(Duration::from_secs(1));
    w.assert_tidy();
    // Deleted by the peer: we call again.
    w.terminate(B, Target::Connection(ConnectionId(0)));
    w.run(Duration::from_secs(5));
    w.assert_tidy();
}

// start = trap: nothing before a packet; then at once.
#[test]
fn a_packet_brings_a_trap_up() {
    let mut w = World::new();
    w.run(Duration::from_secs(60));
    assert!(w.sent.is_empty());
    assert!(w.with_side(A, |ike, cx| ike.acquire(cx, ConnectionId(0), "net")));
    assert!(w.with_side(A, |ike, cx| ike.acquire(cx, ConnectionId(0), "net")), "once is enough");
    assert!(!w.with_side(A, |ike, cx| ike.acquire(cx, ConnectionId(0), "none")));
    assert_eq!(w.wire.len(), 1);
    w.settle();
    w.assert_tidy();
}

// Several children: the first in IKE_AUTH, the others in CREATE_CHILD_SA.
#[test]
fn further_children_follow() {
    let mut w = World::tuned(|n, c| {
        let c = &mut c.connections[0];
        for k in 0..3 {
            let mut child = net(n);
            child.name = format!("more{k}");
            child.local_ts = ts(&format!("10.{}.{}.0/24", n + 1, k + 1));
            child.remote_ts = ts(&format!("10.{}.{}.0/24", 2 - n, k + 1));
            c.children.push(child);
        }
        for child in &mut c.children {
            child.start = if n == A { Start::Initiate } else { Start::Respond };
        }
    });
    w.run(Duration::from_secs(2));
    for child in ["net", "more0", "more1", "more2"] {
        assert!(w.works(child), "{child}");
    }
    assert_eq!(w.sides[B].plane.sas.len(), 4);
    // They all move with a rekeyed IKE SA.
    w.rekey(B, Target::Ike(w.ike(B)));
    w.run(Duration::from_secs(2));
    for child in ["net", "more0", "more1", "more2"] {
        assert!(w.works(child), "{child}");
    }
}

// A real NAT before A: it floats, sends keepalives, and B follows its port.
#[test]
fn a_peer_behind_a_nat_is_followed() {
    let mut w = World::tuned(|_, c| c.connections[0].encap = Encap::Never);
    w.nat_port = Some(20_000);
    w.initiate(A);
    w.settle();
    w.assert_tunnel();
    let status = w.sides[A].ike.status(w.now);
    assert_eq!(status.ike_sas[0].nat, (true, false));
    assert_eq!(status.ike_sas[0].local.port(), 4500);
    assert_eq!(w.sides[B].plane.sender("net").unwrap().remote.port(), 20_000);
    w.run(Duration::from_secs(65));
    assert_eq!(w.sides[A].keepalives.len(), 3, "every 20 s (RFC 3948 §4)");
    assert!(w.sides[B].keepalives.is_empty());
    // The NAT forgets; the next authentic request comes from elsewhere. The Child
    // SA stays what it is and moves.
    w.nat_port = Some(30_000);
    let child = w.child(B);
    w.now += Duration::from_secs(31);
    w.with_side(A, |ike, cx| ike.handle_timeout(cx));
    w.settle();
    w.assert_tunnel();
    assert_eq!(w.child(B), child);
    assert_eq!(w.sides[B].plane.sender("net").unwrap().remote.port(), 30_000);
    assert!(w.sides[B].events.iter().any(|e| matches!(e, Event::Moved { .. })));
}

// The same, seen by ESP alone, which is all that comes from an idle peer with a chatty host behind it. Not for a peer
// that is behind no NAT, nor to another address than the configured one: whoever repeats its packets from elsewhere,
// faster than the network, moves nothing.
#[test]
fn esp_from_a_new_mapping_moves_the_peer() {
    for nat in [true, false] {
        let mut w = World::tuned(|_, c| c.connections[0].encap = Encap::Never);
        w.nat_port = nat.then_some(20_000);
        w.initiate(A);
        w.settle();
        w.assert_tunnel();
        assert!(w.wire.is_empty());
        let (child, before) = (w.child(B), w.sides[B].plane.sender("net").unwrap().remote);
        let from = SocketAddr::new(before.ip(), 30_000);
        let foreign = SocketAddr::new("198.51.100.66".parse().unwrap(), 30_000);
        let records = w.sides[B].records;
        w.with_side(B, |ike, cx| assert!(ike.note_moved(cx, child, foreign)));
        assert_eq!(w.sides[B].plane.sender("net").unwrap().remote, before);
        assert_eq!(w.sides[B].records, records, "nothing to replicate");
        w.with_side(B, |ike, cx| assert!(ike.note_moved(cx, child, from)));
        let after = w.sides[B].plane.sender("net").unwrap().remote;
        assert_eq!(after, if nat { from } else { before });
        // And IKE goes there as well.
        w.rekey(B, Target::Child(child));
        assert_eq!(w.take(A).packet.to.port() == 30_000, nat);
    }
}

// Nobody behind a NAT, nobody claims one: ESP without UDP, IKE on 500, and a
// datagram from elsewhere moves nothing.
#[test]
fn honest_sides_need_no_encapsulation() {
    let mut w = World::tuned(|_, c| c.connections[0].encap = Encap::Never);
    w.initiate(A);
    w.settle();
    w.assert_tidy();
    assert!(!w.sides[A].plane.sender("net").unwrap().udp_encap);
    assert!(w.sent.iter().all(|(_, t)| t.from.port() == 500));
    w.rekey(A, Target::Child(w.child(A)));
    let mut flight = w.take(B);
    flight.packet.from = "198.51.100.66:4500".parse().unwrap();
    w.deliver(flight);
    w.settle();
    let remote = w.sides[B].plane.sender("net").unwrap().remote;
    assert_eq!(remote.ip(), ip(A));
}

// A replay from elsewhere does not move the peer.
#[test]
fn a_replay_does_not_move_a_peer() {
    let mut w = World::established();
    w.rekey(A, Target::Child(w.child(A)));
    w.settle();
    for (side, mut packet) in w.sent.clone() {
        if side == A && packet.to.port() == 4500 {
            packet.from = "198.51.100.66:4500".parse().unwrap();
            w.deliver(Flight { at: w.now, to_side: B, packet });
        }
    }
    assert_eq!(w.sides[B].plane.sender("net").unwrap().remote.ip(), ip(A));
}

// Mass initiation is paced: never more unfinished ones to a peer than allowed.
#[test]
fn mass_initiation_is_paced() {
    let mut w = World::tuned(|n, c| {
        for k in 1..40u16 {
            let mut conn = connection(n);
            conn.name = format!("c{k:02}");
            conn.id = ConnectionId(k);
            conn.local_id = format!("gw{n}.{k}").parse().unwrap();
            conn.remote_id = format!("gw{}.{k}", 1 - n).parse().unwrap();
            c.connections.push(conn);
        }
        for conn in &mut c.connections {
            conn.children[0].start = if n == A { Start::Initiate } else { Start::Respond };
        }
    });
    let limit = Limits::default().initiations_per_peer;
    for _ in 0..2000 {
        let half =
            w.sides[A].ike.status(w.now).ike_sas.iter().filter(|s| s.state == "connecting").count();
        assert!(half <= limit);
        w.run(Duration::from_millis(5));
    }
    assert_eq!(w.sides[B].ike.status(w.now).ike_sas.len(), 40);
    assert!(!w.sent.iter().any(|(_, t)| t.bytes.len() < 100 && t.bytes[18] == 34), "no cookies");
}

// A peer that refuses to authenticate us is asked again after 1, 2, 4, 8 s, not at once.
#[test]
fn who_refuses_is_asked_ever_more_rarely() {
    let mut w = World::tuned(|n, c| {
        c.connections[0].children[0].start = if n == A { Start::Initiate } else { Start::Respond };
        if n == B {
            c.connections[0].psk = Secret::from_slice(b"another secret");
        }
    });
    w.run(Duration::from_secs(20));
    let asked = w.sent.iter().filter(|(n, t)| *n == A && t.bytes[18] == 34);
    // By our SPI: with a cookie it is the same attempt.
    let asked: BTreeSet<&[u8]> = asked.map(|(_, t)| &t.bytes[..8]).collect();
    assert_eq!(asked.len(), 5, "at 0, 1, 3, 7 and 15 s");
}

// ha.md, split brain: no exchange of ours in the first seconds, but answers.
#[test]
fn initiations_can_be_held_back() {
    let mut w = World::established();
    let until = w.now + Duration::from_secs(10);
    w.sides[A].ike.hold_initiations(until);
    let child = w.child(A);
    w.rekey(A, Target::Child(child));
    assert!(w.wire.is_empty());
    w.rekey(B, Target::Ike(w.ike(B)));
    w.settle();
    w.assert_tunnel();
    assert_eq!(w.child(A), child);
    w.run(Duration::from_secs(12));
    assert_ne!(w.child(A), child);
}

// Keys are given away only when asked for.
#[test]
fn the_key_log_is_off_by_default() {
    let w = World::established();
    let lines =
        |w: &World| w.sides[A].events.iter().filter(|e| matches!(e, Event::KeyLog(_))).count();
    assert_eq!(lines(&w), 0);
    let mut w = World::tuned(|_, c| c.keylog = true);
    w.initiate(A);
    w.settle();
    assert_eq!(lines(&w), 3, "one IKE SA, two directions of ESP");
    for event in &w.sides[A].events {
        if let Event::KeyLog(line) = event {
            assert!(!format!("{event:?}").contains(line.line.as_str()));
        }
    }
}

// strongSwan derives a rekeyed IKE SA's keys with the old PRF, the RFC with the
// new one: so the PRF stays, whatever else changes.
#[test]
fn rekeying_keeps_the_prf() {
    let mut w = World::tuned(|n, c| {
        let list = if n == A {
            "aes256gcm16-prfsha512-prfsha256-x25519-ecp256"
        } else {
            "chacha20poly1305-aes256gcm16-prfsha256-prfsha512-ecp256-x25519"
        };
        c.connections[0].ike_proposals = proposal::parse_ike(&[list]).unwrap();
    });
    w.initiate(A);
    w.settle();
    for n in [A, B, A] {
        w.rekey(n, Target::Ike(w.ike(n)));
        w.settle();
        let suite = w.sides[A].ike.status(w.now).ike_sas[0].suite.clone().unwrap();
        assert!(suite.contains("prfsha256"), "{suite}");
    }
    w.run(Duration::from_secs(40));
    w.assert_tidy();
}

// security.md 16: nothing that prints shows a key.
#[test]
fn debug_output_shows_no_keys() {
    let mut w = World::new();
    let now = w.now;
    let side = &mut w.sides[A];
    let mut cx = Context { now, rng: &mut side.rng, spis: &mut side.spis };
    side.ike.initiate(&mut cx, ConnectionId(0));
    let mut transition = side.ike.poll_transition().unwrap();
    transition.transmits.clear();
    let record = &transition.puts[0].1;
    let part = format!("{:?}", &record[record.len() - 40..record.len() - 30]);
    assert!(!format!("{transition:?}").contains(part.trim_matches(['[', ']'])));
    let w = World::established();
    let sa = w.sides[A].plane.sender("net").unwrap();
    let text = format!("{sa:?} {:?} {:?}", w.sides[A].ike, w.sides[A].ike.config());
    let key = format!("{:?}", &sa.keymat_in.expose()[..6]);
    assert!(!text.contains(key.trim_matches(['[', ']'])));
    assert!(text.contains('…') && !text.contains("the secret of both"));
}

// security.md, statement 11: a peer that rekeys without end and never deletes fills no memory. Refused for now, and
// served again when time has ended what it left.
#[test]
fn ike_sas_that_rekeying_leaves_are_bounded() {
    let mut w = World::established();
    let limit = Limits::default().ike_per_connection;
    let newest = |w: &World| {
        w.sides[A]
            .ike
            .status(w.now)
            .ike_sas
            .into_iter()
            .max_by_key(|sa| sa.children.len())
            .unwrap()
            .spi
    };
    let held = |w: &World| w.sides[B].ike.status(w.now).ike_sas.len();
    for _ in 0..3 * limit {
        w.rekey(A, Target::Ike(newest(&w)));
        while let Some(n) = w.wire.iter().position(|f| f.packet.bytes[18] == 36) {
            let flight = w.wire.remove(n).unwrap();
            w.deliver(flight);
        }
        // Its Deletes are lost.
        w.wire.clear();
        assert!(held(&w) <= limit + 1, "{}", held(&w));
    }
    assert_eq!(held(&w), limit + 1);
    w.run(Duration::from_secs(120));
    w.assert_tidy();
    let old = w.ike(A);
    w.rekey(A, Target::Ike(old));
    w.settle();
    assert_ne!(w.ike(A), old);
}
