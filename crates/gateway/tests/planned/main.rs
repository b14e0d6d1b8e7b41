//! Planned work between two gateways over a perfect wire, with real shards: who owns what after `drain`, `undrain`, a
//! hold-down, a stop; what is said to shards, operators and peers. Packets are the simulation's business.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests fail by panicking")]

mod rejoin;
mod world;

use std::time::Duration;

use gateway::config::OnFailure;
use gateway::{Answer, Moved, Refusal, Request};

use world::{A, B, HOLD_DOWN, Pair};

#[test]
fn a_drained_instance_serves_nothing_until_it_is_taken_back() {
    let mut pair = Pair::new(OnFailure::Adopt);
    let ticket = pair.ask(0, &Request::Drain);
    pair.run(Duration::from_millis(200));
    let Some(Answer::Drained { moved, withdrawn }) = pair.answer(0, ticket) else { panic!() };
    let names: Vec<&str> = moved.iter().map(|Moved { endpoint, .. }| endpoint.as_str()).collect();
    assert_eq!((names.as_slice(), withdrawn.as_slice()), (&["a"][..], &[][..]));
    // Not after any hold-down.
    pair.run(HOLD_DOWN * 4);
    assert_eq!(pair.owners(), ["right", "right"]);
    assert!(pair.status(0).draining && pair.status(1).endpoints[0].home_in_s.is_none());
    let ticket = pair.ask(0, &Request::Undrain);
    assert_eq!(pair.answer(0, ticket), Some(Answer::Undrained));
    // Not before it.
    pair.run(HOLD_DOWN - Duration::from_millis(100));
    assert_eq!(pair.owners(), ["right", "right"]);
    assert_eq!(pair.status(1).endpoints[0].home_in_s, Some(0));
    pair.run(Duration::from_millis(400));
    assert_eq!(pair.owners(), ["left", "right"]);
    assert_eq!(pair.pinned(A), [true; 2], "where addresses move, tunnels are always in use");
}

#[test]
fn what_an_operator_moved_stays_until_it_is_moved_back() {
    let mut pair = Pair::new(OnFailure::Adopt);
    let failover = Request::Failover { endpoint: Some("a".into()) };
    let ticket = pair.ask(0, &failover);
    pair.run(Duration::from_millis(200));
    assert!(matches!(pair.answer(0, ticket), Some(Answer::Moved(moved)) if moved.len() == 1));
    pair.run(HOLD_DOWN * 4);
    assert_eq!(pair.owners(), ["right", "right"]);
    pair.ask(1, &failover);
    pair.run(Duration::from_millis(200));
    assert_eq!(pair.owners(), ["left", "right"]);
    // And from now on it comes home again by itself.
    pair.ask(0, &Request::Drain);
    pair.run(Duration::from_millis(200));
    pair.ask(0, &Request::Undrain);
    pair.run(HOLD_DOWN + Duration::from_millis(400));
    assert_eq!(pair.owners(), ["left", "right"]);
}

// Moved away and back, the endpoint can be drained. (The instance that handed it home went on declining it.)
#[test]
fn what_was_moved_away_and_back_can_be_drained() {
    let mut pair = Pair::new(OnFailure::Adopt);
    let failover = Request::Failover { endpoint: Some("a".into()) };
    pair.ask(0, &failover);
    pair.run(Duration::from_millis(200));
    pair.ask(1, &failover);
    pair.run(Duration::from_millis(200));
    assert_eq!(pair.owners(), ["left", "right"]);
    pair.ask(0, &Request::Drain);
    pair.run(Duration::from_millis(500));
    assert_eq!(pair.owners(), ["right", "right"]);
}

// What an operator took down stays down when its endpoint moves.
#[test]
fn what_was_taken_down_stays_down_where_its_endpoint_goes() {
    let mut pair = Pair::new(OnFailure::Adopt);
    let state = |pair: &mut Pair, at| {
        let tunnels = pair.status(at).tunnels;
        tunnels.into_iter().find(|t| t.endpoint == "a").map(|t| t.state)
    };
    use gateway::status::TunnelState::Down;
    pair.ask(0, &Request::Down { connection: "branch".into(), purge: false });
    pair.run(Duration::from_millis(200));
    assert_eq!(state(&mut pair, 0), Some(Down));
    pair.ask(0, &Request::Drain);
    pair.run(Duration::from_millis(500));
    assert_eq!(pair.owners(), ["right", "right"]);
    assert_eq!(state(&mut pair, 1), Some(Down));
}

// Tunnels that flows can be pinned to are left.
#[test]
fn one_instance_drains_at_a_time() {
    let mut pair = Pair::new(OnFailure::Withdraw);
    pair.ask(0, &Request::Drain);
    pair.run(Duration::from_millis(500));
    assert_eq!((pair.pinned(A), pair.pinned(B)), ([false; 2], [true; 2]));
    let ticket = pair.ask(1, &Request::Drain);
    let answer = pair.answer(1, ticket);
    assert!(matches!(answer, Some(Answer::Refused { why: Refusal::NotReady, .. })), "{answer:?}");
    pair.run(Duration::from_millis(500));
    assert_eq!((pair.pinned(A), pair.pinned(B)), ([false; 2], [true; 2]));
    pair.ask(0, &Request::Undrain);
    pair.run(Duration::from_millis(100));
    pair.ask(1, &Request::Drain);
    pair.run(Duration::from_millis(500));
    assert_eq!((pair.pinned(A), pair.pinned(B)), ([true; 2], [false; 2]));
}

// What an operator took down stays down when a drain is taken back.
#[test]
fn an_undrain_brings_up_nothing_that_was_taken_down() {
    let mut pair = Pair::new(OnFailure::Withdraw);
    let state = |pair: &mut Pair| {
        let tunnels = pair.status(0).tunnels;
        tunnels.into_iter().find(|t| t.endpoint == "a").map(|t| t.state)
    };
    use gateway::status::TunnelState::Down;
    pair.ask(0, &Request::Down { connection: "branch".into(), purge: false });
    pair.run(Duration::from_millis(200));
    assert_eq!(state(&mut pair), Some(Down));
    pair.ask(0, &Request::Drain);
    pair.run(Duration::from_millis(300));
    pair.ask(0, &Request::Undrain);
    pair.run(Duration::from_millis(300));
    assert_eq!(state(&mut pair), Some(Down));
}

#[test]
fn a_drain_ends_the_tunnels_of_what_cannot_move_when_nothing_is_pinned_to_them() {
    let mut pair = Pair::new(OnFailure::Withdraw);
    let tunnels = |pair: &mut Pair| {
        let tunnels = pair.status(0).tunnels;
        tunnels.into_iter().filter(|t| t.endpoint == "a").map(|t| t.state).collect::<Vec<_>>()
    };
    use gateway::status::TunnelState::{Connecting, Down};
    assert_eq!(tunnels(&mut pair), [Connecting]);
    let ticket = pair.ask(0, &Request::Drain);
    pair.run(Duration::from_millis(50));
    assert_eq!((pair.pinned(A), pair.pinned(B)), ([false; 2], [true; 2]));
    assert_eq!(tunnels(&mut pair), [Connecting], "not at once");
    assert_eq!(pair.answer(0, ticket), None);
    pair.run(Duration::from_millis(100));
    assert_eq!(tunnels(&mut pair), [Down]);
    let Some(Answer::Drained { moved, withdrawn }) = pair.answer(0, ticket) else { panic!() };
    assert_eq!((moved.len(), withdrawn), (0, vec!["a".to_owned()]));
    // It stays with its home, and down.
    pair.run(HOLD_DOWN * 4);
    assert_eq!(pair.owners(), ["left", "right"]);
    assert_eq!(tunnels(&mut pair), [Down]);
    let sent = pair.sides[0].ike_sent;
    pair.ask(0, &Request::Undrain);
    pair.run(Duration::from_millis(200));
    assert_eq!(pair.pinned(A), [true; 2]);
    assert_eq!(tunnels(&mut pair), [Connecting]);
    assert!(pair.sides[0].ike_sent > sent);
}

#[test]
fn what_cannot_move_is_not_moved() {
    let mut pair = Pair::new(OnFailure::Withdraw);
    let ticket = pair.ask(0, &Request::Failover { endpoint: Some("a".into()) });
    match pair.answer(0, ticket) {
        Some(Answer::Refused { why: Refusal::NotReady, text, .. }) => {
            assert!(text.contains("never leaves its home"), "{text}");
        }
        other => panic!("{other:?}"),
    }
    // The right hears no more of the left: it removes what it had of `a`, and takes no address.
    for _ in 0..300 {
        pair.now += Duration::from_millis(1);
        pair.sides[1].gateway.handle_turn(pair.now);
        pair.sides[1].settle(pair.now);
    }
    assert!(!pair.pinned(A)[1]);
    let status = pair.status(1);
    let a = &status.endpoints[0];
    assert_eq!((a.role, a.pinned, a.owner.as_deref()), (gateway::status::Role::None, false, None));
    assert_eq!(pair.sides[1].addresses.get(&A), None);
    assert_eq!(pair.sides[1].addresses.get(&B), Some(&true));
}

#[test]
fn rules_stay_while_the_other_instance_serves_a_tunnel_of_the_connection() {
    let mut pair = Pair::new(OnFailure::Adopt);
    let purge = Request::Down { connection: "branch".into(), purge: true };
    let ticket = pair.ask(0, &purge);
    let answer = pair.answer(0, ticket);
    assert!(matches!(answer, Some(Answer::Refused { why: Refusal::NotReady, .. })), "{answer:?}");
    pair.ask(1, &Request::Drain);
    pair.run(Duration::from_millis(300));
    assert_eq!(pair.owners(), ["left", "left"]);
    let ticket = pair.ask(0, &purge);
    let answer = pair.answer(0, ticket);
    assert!(matches!(answer, Some(Answer::Down { .. })), "{answer:?}");
}

// Whoever initiates does so again as soon as it is told that its tunnel ended; the process that ends then must not take the
// new one with it in silence: the remote gateway would send half of its flows into it until DPD.
#[test]
fn a_stop_leaves_no_peer_with_a_dead_tunnel() {
    let mut pair = Pair::with_peer(OnFailure::Withdraw);
    pair.stop(0);
    assert!(!pair.believed()["gw#1"], "it was not told");
}

#[test]
fn a_drain_and_then_a_stop_leave_no_peer_with_a_dead_tunnel() {
    let mut pair = Pair::with_peer(OnFailure::Withdraw);
    let ticket = pair.ask(0, &Request::Drain);
    pair.run(Duration::from_millis(500));
    assert!(matches!(pair.answer(0, ticket), Some(Answer::Drained { .. })));
    pair.run(Duration::from_secs(20));
    pair.stop(0);
    assert!(!pair.believed()["gw#1"], "it was not told");
}
