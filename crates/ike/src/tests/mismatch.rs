//! Two sides that are configured differently: each says in one line which side
//! sent what and what would have matched, and the peer gets the right notify.

use super::*;

fn play(f: impl Fn(usize, &mut ConnectionConfig)) -> World {
    let mut w = World::tuned(|n, c| f(n, &mut c.connections[0]));
    w.initiate(A);
    w.settle();
    w
}

fn nothing_up(w: &World) {
    for n in [A, B] {
        let status = w.sides[n].ike.status(w.now);
        assert!(status.ike_sas.iter().all(|s| s.state == "connecting"), "{status:#?}");
        assert!(w.sides[n].plane.sas.is_empty());
    }
}

#[test]
fn another_secret() {
    let mut w = play(|n, c| {
        if n == B {
            c.psk = Secret::from_slice(b"another secret");
        }
    });
    nothing_up(&w);
    assert_eq!(
        w.failure(B),
        "c: authentication failed: the peer (192.0.2.1) sent an AUTH for IDi gw0.example made with \
         another pre-shared key; would have matched: the same pre-shared key on both sides"
    );
    assert!(w.failure(A).contains(
        "we sent IDi gw0.example asking for IDr gw1.example from 192.0.2.1 to 192.0.2.2"
    ));
    assert!(w.failure(A).contains("AUTHENTICATION_FAILED"));
    // The half-open remains of it go away.
    w.run(Duration::from_secs(31));
    assert!(w.snapshot(B).is_empty());
    for n in [A, B] {
        for event in &w.sides[n].events {
            let text = format!("{event} {event:?}");
            assert!(!text.contains("secret of both") && !text.contains("another secret"));
        }
    }
}

// The answer to IKE_AUTH is lost: the refusal is repeated byte for byte.
#[test]
fn a_refusal_is_repeated() {
    let mut w = World::tuned(|n, c| {
        if n == B {
            c.connections[0].psk = Secret::from_slice(b"another secret");
        }
    });
    w.initiate(A);
    w.pass(B);
    w.pass(A);
    w.pass(B);
    let lost = w.lose();
    w.run(Duration::from_millis(1500));
    let again: Vec<_> = w.sent.iter().filter(|(n, t)| *n == B && *t == lost.packet).collect();
    assert_eq!(again.len(), 2);
    assert!(w.failure(A).contains("AUTHENTICATION_FAILED"));
}

#[test]
fn another_identity_of_the_initiator() {
    let w = play(|n, c| {
        if n == A {
            c.local_id = "stranger.example".parse().unwrap();
        }
    });
    nothing_up(&w);
    assert_eq!(
        w.failure(B),
        "identity mismatch: the peer (192.0.2.1) sent IDi stranger.example, asking for IDr \
         gw1.example; would have matched: remote_id gw0.example with local_id gw1.example (c)"
    );
}

#[test]
fn another_identity_is_asked_for() {
    let w = play(|n, c| {
        if n == A {
            c.remote_id = "other.example".parse().unwrap();
        }
    });
    nothing_up(&w);
    assert!(w.failure(B).contains("asking for IDr other.example"));
}

/// A responder that proves itself with what A does not expect: played by giving A
/// another configuration while its IKE_AUTH is on its way.
fn changed_under_way(f: impl Fn(&mut ConnectionConfig)) -> World {
    let mut w = World::new();
    w.initiate(A);
    w.pass(B);
    w.pass(A);
    w.pass(B);
    assert_eq!(w.sides[B].ike.status(w.now).ike_sas[0].state, "established");
    let snapshot = w.sides[A].ike.snapshot(w.now);
    let mut other = super::config(A);
    f(&mut other.connections[0]);
    let mut ike = Endpoint::new(other);
    ike.apply(w.now, &snapshot, &[]).unwrap();
    w.sides[A].ike = ike;
    w.with_side(A, |ike, cx| ike.activate(cx, Term(2), Doubt::None).unwrap());
    w.settle();
    nothing_up(&w);
    // RFC 7296 §2.21.2: it is told, and forgets the IKE SA it believed in.
    assert!(w.failure(B).contains("AUTHENTICATION_FAILED"));
    w
}

#[test]
fn another_identity_on_the_way_back() {
    let w = changed_under_way(|c| c.remote_id = "someone.else".parse().unwrap());
    let line = w.failure(A);
    assert!(
        line.contains(
            "the peer (192.0.2.2) sent IDr gw1.example; would have matched: remote_id someone.else"
        ),
        "{line}"
    );
}

#[test]
fn another_secret_on_the_way_back() {
    let w = changed_under_way(|c| c.psk = Secret::from_slice(b"another secret"));
    let line = w.failure(A);
    assert!(
        line.contains(
            "the peer (192.0.2.2) sent an AUTH for IDr gw1.example made with another pre-shared key"
        ),
        "{line}"
    );
}

#[test]
fn no_common_ike_proposal() {
    let mut w = play(|n, c| {
        if n == A {
            c.ike_proposals = proposal::parse_ike(&["chacha20poly1305-prfsha256-ecp256"]).unwrap();
        }
    });
    nothing_up(&w);
    assert_eq!(
        w.failure(B),
        "c: no common IKE proposal: the peer (192.0.2.1) sent ike_proposals \
         chacha20poly1305-prfsha256-ecp256; would have matched: any of aes256gcm16-prfsha384-x25519"
    );
    assert!(w.failure(A).contains("NO_PROPOSAL_CHOSEN"));
    // RFC 7296 §2.21.1: not authentic, so we go on asking.
    assert_eq!(w.sides[A].ike.status(w.now).ike_sas.len(), 1);
    assert!(w.snapshot(B).is_empty(), "no state for a refused request");
    // Which is no silence. Who asks again is told again, while the attempt goes on and afterwards.
    let told = |w: &World| {
        let silent = |e: &Event| matches!(e, Event::Retransmitting { .. });
        assert!(!w.sides[A].events.iter().any(silent));
        assert!(w.failure(A).contains("NO_PROPOSAL_CHOSEN"), "{}", w.failure(A));
        w.sides[A].events.iter().filter(|e| matches!(e, Event::Failed(_))).count()
    };
    w.run(Duration::from_secs(3));
    assert_eq!(told(&w), 1);
    for count in [2, 3] {
        w.initiate(A);
        w.settle();
        assert_eq!(told(&w), count);
    }
    w.run(Duration::from_secs(120));
    assert_eq!(told(&w), 3);
    assert!(w.sides[A].ike.status(w.now).ike_sas.is_empty());
}

#[test]
fn no_connection_for_the_address() {
    let w = play(|n, c| {
        if n == B {
            c.remote_address = RemoteAddress::Ip("198.51.100.9".parse().unwrap());
        }
    });
    nothing_up(&w);
    assert_eq!(
        w.failure(B),
        "no connection for the peer's address: the peer (192.0.2.1) sent IKE_SA_INIT to 192.0.2.2 \
         from 192.0.2.1; would have matched: remote_address 198.51.100.9"
    );
}

// RFC 7296 §2.21.2: the IKE SA stays without its child.
#[test]
fn no_common_esp_proposal() {
    let mut w = play(|n, c| {
        if n == B {
            c.children[0].esp_proposals = proposal::parse_esp(&["chacha20poly1305"]).unwrap();
        }
    });
    assert_eq!(
        w.failure(B),
        "c/net: no common ESP proposal: the peer (192.0.2.1) sent esp_proposals aes256gcm16-noesn; \
         would have matched: chacha20poly1305"
    );
    assert!(w.failure(A).contains("we sent esp_proposals aes256gcm16-x25519"));
    for n in [A, B] {
        assert_eq!(w.sides[n].ike.status(w.now).ike_sas[0].state, "established");
        assert!(w.sides[n].plane.sas.is_empty());
    }
    // Asked again as a CREATE_CHILD_SA, it fails the same way, and no more.
    assert!(w.with_side(A, |ike, cx| ike.initiate(cx, ConnectionId(0))));
    w.settle();
    assert!(w.sides[A].plane.sas.is_empty());
    assert_eq!(w.sides[A].ike.status(w.now).ike_sas.len(), 1);
}

#[test]
fn selectors_do_not_meet() {
    let w = play(|n, c| {
        if n == B {
            c.children[0].remote_ts = ts("10.9.0.0/24");
        }
    });
    assert_eq!(
        w.failure(B),
        "c: traffic selectors do not match: the peer (192.0.2.1) sent TSi 10.1.0.0/24 === TSr \
         10.2.0.0/24; would have matched: part of 10.9.0.0/24 === 10.2.0.0/24"
    );
    assert!(w.failure(A).contains("TS_UNACCEPTABLE"));
    assert_eq!(w.sides[B].ike.status(w.now).ike_sas[0].state, "established");
}

// A start = initiate child that is refused is asked for again, ever more seldom.
#[test]
fn a_refused_child_is_asked_for_again() {
    let mut w = play(|n, c| {
        c.children[0].start = Start::Initiate;
        if n == B {
            c.children[0].start = Start::Respond;
            c.children[0].remote_ts = ts("10.9.0.0/24");
        }
    });
    let count =
        |w: &World| w.sides[B].events.iter().filter(|e| matches!(e, Event::Failed(_))).count();
    w.run(Duration::from_secs(120));
    assert!((4..12).contains(&count(&w)), "{}", count(&w));
}

// RFC 7296 §2.9: the responder narrows, both sides install the same.
#[test]
fn narrowing() {
    let w = play(|n, c| {
        if n == A {
            c.children[0].local_ts = ts("10.1.0.0/16 172.16.0.0/12");
            c.children[0].remote_ts = ts("0.0.0.0/0");
        }
    });
    w.assert_tidy();
    let sa = w.sides[A].plane.sender("net").unwrap();
    assert_eq!((&sa.local_ts, &sa.remote_ts), (&ts("10.1.0.0/24"), &ts("10.2.0.0/24")));

    // And the other way: the initiator's are the narrower ones.
    let w = play(|n, c| {
        if n == B {
            c.children[0].local_ts = ts("0.0.0.0/0");
            c.children[0].remote_ts = ts("10.1.0.128/25 10.1.0.0/25");
        }
    });
    w.assert_tidy();
    let sa = w.sides[B].plane.sender("net").unwrap();
    assert_eq!(
        (&sa.local_ts, &sa.remote_ts),
        (&ts("10.2.0.0/24"), &ts("10.1.0.128/25 10.1.0.0/25"))
    );
}

// RFC 7296 §2.9: first selectors that come from a packet choose among children.
#[test]
fn selectors_of_a_packet_choose_the_child() {
    let w = play(|n, c| {
        if n == B {
            let mut other = c.children[0].clone();
            other.name = "other".to_owned();
            other.local_ts = ts("10.2.0.128/25");
            c.children[0].local_ts = ts("10.2.0.0/25");
            c.children.push(other);
        } else {
            c.children[0].remote_ts = ts("10.2.0.200/32 10.2.0.0/24");
        }
    });
    let sa = w.sides[B].plane.sas.values().next().unwrap();
    assert_eq!((sa.child.as_str(), &sa.local_ts), ("other", &ts("10.2.0.128/25")));
}

// A                                   B
// INIT, KE(x25519) ──►
//                 ◄── N(INVALID_KE_PAYLOAD: ecp384)
// INIT, KE(ecp384) ──►
#[test]
fn another_group_is_wanted() {
    let w = play(|n, c| {
        let (ike, esp) = if n == A {
            ("aes256gcm16-prfsha384-x25519-ecp384", "aes256gcm16-x25519-ecp256")
        } else {
            ("aes256gcm16-prfsha384-ecp384", "aes256gcm16-ecp256")
        };
        c.ike_proposals = proposal::parse_ike(&[ike]).unwrap();
        c.children[0].esp_proposals = proposal::parse_esp(&[esp]).unwrap();
    });
    assert_eq!(w.sent.len(), 6);
    w.assert_tidy();
    // The same in CREATE_CHILD_SA, for the child and for the IKE SA.
    let mut w = w;
    w.rekey(A, Target::Child(w.child(A)));
    w.settle();
    w.rekey(A, Target::Ike(w.ike(A)));
    w.settle();
    w.run(Duration::from_secs(10));
    w.assert_tidy();
    let status = w.sides[A].ike.status(w.now);
    assert_eq!(status.ike_sas[0].suite.as_deref(), Some("aes256gcm16-prfsha384-ecp384"));
    assert_eq!(status.ike_sas[0].children[0].suite, "aes256gcm16-ecp256");
}

// A group that was not offered, or the same again, is not obeyed.
#[test]
fn a_wrong_invalid_ke_payload_is_ignored() {
    use wire::ike::{Header, MessageBuilder, Notify, NotifyType, Payload};
    let mut w = World::new();
    w.initiate(A);
    let request = w.take(B);
    let header = Header::parse(&request.packet.bytes).unwrap().to_response();
    for data in [&[0, 31][..], &[0, 19], &[0, 14], &[0], &[]] {
        let mut forged = MessageBuilder::clear(&header);
        forged.push(&Payload::Notify(Notify::new(NotifyType::INVALID_KE_PAYLOAD, data)));
        let before = w.snapshot(A);
        let (from, to) = (request.packet.to, request.packet.from);
        let bytes = forged.finish().unwrap();
        w.with_side(A, |ike, cx| ike.handle_datagram(cx, from, to, &bytes));
        assert_eq!(w.snapshot(A), before);
        assert!(w.wire.is_empty());
    }
    w.deliver(request);
    w.settle();
    w.assert_tidy();
}

// RFC 7296 §2.6: under load a cookie is asked for, and nothing kept before.
// A                                   B
// INIT ──►
//                 ◄── N(COOKIE)
// N(COOKIE), the same INIT ──►
#[test]
fn cookies() {
    for with_ke in [false, true] {
        let mut w = World::tuned(|n, c| {
            c.limits.cookie_total = 0;
            if with_ke {
                // RFC 7296 §2.6.1: both reasons to ask again, one after the other.
                let list = if n == A { "aes256gcm16-x25519-ecp256" } else { "aes256gcm16-ecp256" };
                c.connections[0].ike_proposals = proposal::parse_ike(&[list]).unwrap();
            }
        });
        w.initiate(A);
        let first = w.wire[0].packet.bytes.clone();
        w.pass(B);
        assert!(w.snapshot(B).is_empty(), "no state before the cookie");
        assert!(w.wire[0].packet.bytes.len() <= first.len(), "no amplification");
        w.pass(A);
        let second = w.wire[0].packet.bytes.clone();
        // RFC 7296 §2.6: all else unchanged: the old payloads are the tail.
        assert_eq!(&second[second.len() - (first.len() - 28)..], &first[28..]);
        w.settle();
        w.assert_tidy();
        assert_eq!(w.sent.len(), if with_ke { 8 } else { 6 });
    }
}

#[test]
fn limits_of_half_open_sas() {
    let mut w = World::new();
    w.initiate(A);
    let request = w.take(B).packet;
    // Each with another SPI is another half-open SA.
    let flood = |w: &mut World, from: &str, n: u64| {
        let mut bytes = request.bytes.clone();
        bytes[..8].copy_from_slice(&(n + 1).to_be_bytes());
        let (from, to) = (SocketAddr::new(from.parse().unwrap(), 500), request.to);
        let before = w.sent.len();
        w.with_side(B, |ike, cx| ike.handle_datagram(cx, from, to, &bytes));
        w.sent[before..].iter().map(|(_, t)| t.bytes.clone()).next()
    };
    let is_cookie = |answer: &Option<Vec<u8>>| {
        wire::ike::Message::parse(answer.as_ref().unwrap())
            .unwrap()
            .payloads
            .notify(wire::ike::NotifyType::COOKIE)
            .is_some()
    };
    for n in 0..3 {
        assert!(!is_cookie(&flood(&mut w, "192.0.2.1", n)), "{n}");
    }
    // security.md: cookies from 3 per source.
    assert!(is_cookie(&flood(&mut w, "192.0.2.1", 3)));
    assert_eq!(w.sides[B].ike.status(w.now).half_open, 3);
    // With their cookies two more get in, which makes five; no more of that source.
    for n in 3..8 {
        let cookie = flood(&mut w, "192.0.2.1", n).unwrap();
        let cookie = cookie[28 + 8..].to_vec();
        let mut bytes = request.bytes[..28].to_vec();
        bytes[..8].copy_from_slice(&(n + 1).to_be_bytes());
        let notify_len = 8 + cookie.len();
        // Notify: next payload SA, no protocol, no SPI, COOKIE.
        bytes.extend([33, 0, 0, notify_len as u8, 0, 0, 0x40, 0x06]);
        bytes.extend(&cookie);
        bytes.extend(&request.bytes[28..]);
        bytes[16] = 41;
        let len = bytes.len() as u32;
        bytes[24..28].copy_from_slice(&len.to_be_bytes());
        let (from, to) = (request.from, request.to);
        w.with_side(B, |ike, cx| ike.handle_datagram(cx, from, to, &bytes));
        assert_eq!(w.sides[B].ike.status(w.now).half_open, 5.min(n as usize + 1), "{n}");
    }
    assert_eq!(w.sides[B].ike.counters().over_limit, 3);
    w.wire.clear();
    w.run(Duration::from_secs(31));
    w.wire.clear();
    // Established tunnels and honest clients get through: A returns its cookie.
    for n in 0..3 {
        flood(&mut w, "192.0.2.1", n);
    }
    w.wire.clear();
    w.deliver(Flight { at: w.now, to_side: B, packet: request.clone() });
    w.settle();
    w.assert_tunnel();
    // Half-open ones expire.
    w.run(Duration::from_secs(31));
    assert_eq!(w.sides[B].ike.status(w.now).half_open, 0);
}

// security.md, statements 2 and 4: IKE_AUTH without a mandatory payload, or in clear.
#[test]
fn an_ike_auth_request_in_the_wrong_state_establishes_nothing() {
    let mut w = World::new();
    w.initiate(A);
    w.pass(B);
    w.pass(A);
    let auth = w.take(B);
    // To a responder that never saw IKE_SA_INIT.
    let mut other = World::new();
    other.deliver(auth.clone());
    assert!(other.snapshot(B).is_empty() && other.wire.is_empty());
    w.deliver(auth.clone());
    w.settle();
    w.assert_tidy();
    // Again, after it is established: the same answer, no second SA.
    let (before, sent) = (w.snapshot(B), w.sent.len());
    w.deliver(auth);
    assert_eq!(w.snapshot(B), before);
    assert_eq!(w.sent.len(), sent + 1);
    assert_eq!(w.sent[sent].1, w.sent[3].1, "byte for byte");
}

#[test]
fn every_kind_of_identity() {
    for (a, b) in [
        ("192.0.2.1", "192.0.2.2"),
        ("2001:db8::1", "2001:db8::2"),
        ("me@left.example", "you@right.example"),
        ("keyid:one", "keyid:0x00ff"),
        ("asn1dn:0x3000", "gw.example"),
    ] {
        let w = play(|n, c| {
            let (own, other) = if n == A { (a, b) } else { (b, a) };
            c.local_id = own.parse().unwrap();
            c.remote_id = other.parse().unwrap();
        });
        w.assert_tidy();
    }
}

// security.md, statement 13: an IKE_AUTH that fails leaves neither side's IKE SA, nor the SPI of the Child SA that came
// with it.
#[test]
fn a_failed_ike_auth_leaves_nothing() {
    let mut w = World::tuned(|n, c| {
        if n == B {
            c.connections[0].psk = Secret::from_slice(b"another secret");
        }
    });
    w.initiate(A);
    w.pass(B);
    w.pass(A);
    assert!(!w.sides[A].spis.taken.is_empty(), "the offer holds an SPI");
    w.settle();
    assert!(w.sides[A].spis.taken.is_empty() && w.snapshot(A).is_empty());
    w.run(Limits::default().half_open_timeout);
    for n in [A, B] {
        assert!(w.sides[n].spis.taken.is_empty() && w.snapshot(n).is_empty(), "side {n}");
    }
}

// security.md, statement 13: a rekeying of a Child SA that is refused frees the SPI of its half-built successor.
#[test]
fn a_failed_child_rekeying_leaves_nothing() {
    let mut w = World::established();
    let old = [w.sides[A].spis.taken.clone(), w.sides[B].spis.taken.clone()];
    w.sides[B].spis.empty = true;
    w.rekey(A, Target::Children(ConnectionId(0)));
    assert_eq!(w.sides[A].spis.taken.len(), old[A].len() + 1, "the offer holds an SPI");
    w.settle();
    for n in [A, B] {
        assert_eq!(w.sides[n].spis.taken, old[n], "side {n}");
    }
    w.assert_tidy();
}

/// An IKE_SA_INIT message of somebody who knows no NAT detection: its notifies are of a kind that nobody knows.
fn without_nat_detection(bytes: &mut [u8]) {
    let kinds = [[28, 0, 0, 0x40, 0x04], [28, 0, 0, 0x40, 0x05]];
    for kind in kinds {
        let at = bytes.windows(5).position(|w| *w == kind).expect("a NAT detection notify");
        bytes[at + 3] = 0x5f;
    }
}

// RFC 7296 §2.23 leaves NAT traversal out of what everybody must do: who knows nothing of NATs is no reason to refuse, and
// IKE stays on port 500.
#[test]
fn a_peer_without_nat_traversal_is_taken() {
    let mut w = World::new();
    w.initiate(A);
    let mut request = w.take(B);
    without_nat_detection(&mut request.packet.bytes);
    w.deliver(request);
    assert_eq!(w.snapshot(B).len(), 1);

    let mut w = World::new();
    w.initiate(A);
    w.pass(B);
    let mut response = w.take(A);
    without_nat_detection(&mut response.packet.bytes);
    w.deliver(response);
    let auth = w.take(B);
    assert_eq!((auth.packet.from.port(), auth.packet.bytes[18]), (500, 35));
    for side in &w.sides {
        assert!(side.events.iter().all(|e| !matches!(e, Event::Failed(_))));
    }
}

// Which connection it is becomes known with IKE_AUTH; whether a NAT is claimed is said before, by the first that fits the
// address. Both sides must come to the same form.
#[test]
fn both_sides_agree_on_the_form_of_esp() {
    let both = [Encap::Auto, Encap::Never];
    let all = both.iter().flat_map(|a| both.iter().flat_map(move |b| both.map(|c| [*a, *b, c])));
    for [first, ours, theirs] in all {
        let mut w = World::tuned(|n, c| {
            if n == A {
                c.connections[0].encap = theirs;
                return;
            }
            c.connections[0].encap = ours;
            let mut other = connection(n);
            (other.name, other.encap) = ("other".to_owned(), first);
            other.remote_id = "other.example".parse().unwrap();
            other.id = ConnectionId(1);
            c.connections.insert(0, other);
        });
        w.initiate(A);
        w.settle();
        let udp =
            [A, B].map(|n| w.sides[n].plane.sas.values().map(|sa| sa.udp_encap).next().unwrap());
        let expected = first == Encap::Auto || theirs == Encap::Auto;
        assert_eq!(udp, [expected; 2], "{first:?} {ours:?} {theirs:?}");
    }
}

// What anybody can send is complained of once in ten seconds for each address, and for 256 addresses in all; what
// fails of our own is said whenever it happens.
#[test]
fn complaints_about_strangers_are_limited() {
    let count = |w: &World, n: usize| {
        w.sides[n].events.iter().filter(|e| matches!(e, Event::Failed(_))).count()
    };
    let mut w = World::tuned(|n, c| {
        if n == A {
            c.connections[0].ike_proposals =
                proposal::parse_ike(&["chacha20poly1305-prfsha256-ecp256"]).unwrap();
        } else {
            c.connections[0].remote_address = RemoteAddress::Any;
        }
    });
    w.initiate(A);
    let request = w.take(B);
    let from = |w: &mut World, last: u32| {
        let mut flight = request.clone();
        let ip = std::net::Ipv4Addr::from(0xc633_6400 + last);
        flight.packet.from.set_ip(ip.into());
        w.deliver(flight);
    };
    for _ in 0..5 {
        from(&mut w, 0);
    }
    assert_eq!(count(&w, B), 1);
    for last in 1..600 {
        from(&mut w, last);
    }
    assert_eq!(count(&w, B), 256);
    w.wire.clear();
    let lapse = w.now + Duration::from_secs(10);
    w.now = lapse - Duration::from_millis(500);
    from(&mut w, 0);
    assert_eq!(count(&w, B), 256, "ten seconds are not over");
    w.now = lapse + Duration::from_millis(500);
    for _ in 0..5 {
        from(&mut w, 0);
    }
    assert_eq!(count(&w, B), 257);

    // Ours: each attempt is refused, and each refusal said.
    w.wire.clear();
    for attempt in 1..=3 {
        w.with_side(A, |ike, cx| ike.terminate(cx, Target::Connection(ConnectionId(0))));
        w.initiate(A);
        w.settle();
        assert_eq!(count(&w, A), attempt);
    }
}
