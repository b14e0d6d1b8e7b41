//! Planned work between two gateways over a perfect wire, with real shards and a peer that never answers: who owns what
//! after `drain`, `undrain`, a hold-down; what is said to shards and operators. Packets are the simulation's business.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests fail by panicking")]

use std::collections::BTreeMap;
use std::time::Duration;

use crypto::Secret;
use esp::Shard;
use gateway::config::{
    Config, ConnectionParts, EndpointParts, HomeComing, Instance, OnFailure, PairParts, PairTimers,
    Parts, Remotes, WanParts,
};
use gateway::{Answer, Gateway, Moved, Output, Refusal, Request, Start};
use ike::config::{ChildConfig, ConnectionConfig, Encap, Limits, RemoteAddress, Timers};
use rand_chacha::{ChaCha20Rng, rand_core::SeedableRng};
use wire::id::{ConnectionId, EndpointId};
use wire::ts::{AddrRange, TrafficSelector};

const HOLD_DOWN: Duration = Duration::from_secs(3);

/// Two endpoints, `a` at home on the left and `b` on the right.
fn config(local: usize, on_failure: [OnFailure; 2]) -> Config {
    let names = ["left", "right"];
    let instance = |index: usize| Instance {
        name: names[index].into(),
        index: index as u8,
        links: vec![format!("172.31.0.{}:4600", index + 1).parse().unwrap()],
    };
    let endpoint = |name: &str, home: usize, n: u8| EndpointParts {
        name: name.into(),
        home: names[home].into(),
        wan: WanParts {
            address: [203, 0, 113, n].into(),
            prefix: None,
            gateway: None,
            interface: names.map(|name| (name.to_owned(), "eth0".to_owned())).into(),
        },
        lan: None,
        on_failure: on_failure[home],
        weight: 1,
        home_coming: HomeComing { preempt: true, hold_down: HOLD_DOWN },
    };
    let network = |n: u8| {
        let range = AddrRange::new([10, n, 0, 0].into(), [10, n, 0, 255].into());
        TrafficSelector::all(range.unwrap())
    };
    let peer = RemoteAddress::Ip([198, 51, 100, 7].into());
    let ike = ConnectionConfig {
        name: "branch".into(),
        id: ConnectionId(0),
        local_address: [203, 0, 113, 10].into(),
        remote_address: peer,
        local_id: "gw.example".parse().unwrap(),
        remote_id: "branch.example".parse().unwrap(),
        psk: Secret::from_slice(b"a long enough pre-shared key"),
        ike_proposals: ike::proposal::default_ike(),
        children: vec![ChildConfig {
            name: "net".into(),
            local_ts: vec![network(1)],
            remote_ts: vec![network(2)],
            esp_proposals: ike::proposal::default_esp(),
            start: ike::config::Start::Initiate,
        }],
        encap: Encap::Auto,
        timers: Timers::default(),
        initial_contact: true,
    };
    let parts = Parts {
        local: names[local].into(),
        pair: Some(PairParts {
            timers: PairTimers::default(),
            digest_key: Secret::from_slice(&[7; 32]),
        }),
        instances: vec![instance(0), instance(1)],
        endpoints: vec![endpoint("a", 0, 10), endpoint("b", 1, 20)],
        connections: vec![ConnectionParts {
            endpoints: vec!["a".into(), "b".into()],
            remotes: Remotes::from(peer),
            ike,
        }],
        limits: Limits::default(),
        keylog: false,
    };
    Config::new(parts).unwrap().0
}

const A: EndpointId = EndpointId(0);
const B: EndpointId = EndpointId(1);

struct Side {
    gateway: Gateway,
    shard: Shard,
    /// What left for the other.
    sent: Vec<ha::Transmit>,
    answers: BTreeMap<u64, Answer>,
    /// As the shard was told last.
    pinned: BTreeMap<EndpointId, bool>,
    addresses: BTreeMap<EndpointId, bool>,
    /// IKE datagrams that left.
    ike: usize,
}

struct Pair {
    now: Duration,
    sides: [Side; 2],
    tickets: u64,
}

impl Pair {
    fn new(on_failure: OnFailure) -> Self {
        Self::mixed([on_failure; 2])
    }

    /// `a` and `b` differ.
    fn mixed(on_failure: [OnFailure; 2]) -> Self {
        let now = Duration::from_secs(100);
        let side = |local| {
            let start = Start {
                config: config(local, on_failure),
                rng: Box::new(ChaCha20Rng::seed_from_u64(local as u64)),
                seed: local as u64 + 1,
                terms: vec![None, None],
                release: "test".into(),
                hold_format: None,
            };
            Side {
                gateway: Gateway::new(start, now).unwrap(),
                shard: Shard::new(esp::Config { endpoints: 2, ..esp::Config::default() }),
                sent: Vec::new(),
                answers: BTreeMap::new(),
                pinned: BTreeMap::new(),
                addresses: BTreeMap::new(),
                ike: 0,
            }
        };
        let mut pair = Self { now, sides: [side(0), side(1)], tickets: 0 };
        for side in &mut pair.sides {
            side.gateway.handle_stream_up(now, 0);
        }
        pair.run(Duration::from_secs(2));
        assert_eq!(pair.owners(), ["left", "right"]);
        pair
    }

    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.now += Duration::from_millis(1);
            let now = self.now;
            for at in [0, 1] {
                self.sides[at].gateway.handle_turn(now);
                self.sides[at].settle(now);
                for transmit in std::mem::take(&mut self.sides[at].sent) {
                    let other = &mut self.sides[1 - at].gateway;
                    match transmit {
                        ha::Transmit::Heartbeat { link, bytes } => {
                            other.handle_heartbeat(now, link.0, &bytes)
                        }
                        ha::Transmit::Frame(bytes) => other.handle_frame(now, &bytes),
                        ha::Transmit::Probe { .. } | ha::Transmit::CloseStream { .. } => {}
                    }
                    self.sides[1 - at].settle(now);
                }
            }
        }
    }

    /// Who owns `a` and `b`, as both agree.
    fn owners(&mut self) -> [String; 2] {
        let of = |status: gateway::status::Status| {
            status.endpoints.into_iter().map(|e| e.owner.unwrap_or_default()).collect::<Vec<_>>()
        };
        let [left, right] = [0, 1].map(|at| self.status(at)).map(of);
        assert_eq!(left, right);
        left.try_into().unwrap()
    }

    fn status(&mut self, at: usize) -> gateway::status::Status {
        let ticket = self.ask(at, &Request::Status);
        match self.sides[at].answers.remove(&ticket) {
            Some(Answer::Status(status)) => *status,
            other => panic!("{other:?}"),
        }
    }

    fn ask(&mut self, at: usize, request: &Request) -> u64 {
        self.tickets += 1;
        let (now, ticket) = (self.now, self.tickets);
        self.sides[at].gateway.handle_request(now, ticket, request);
        self.sides[at].settle(now);
        ticket
    }

    fn answer(&mut self, at: usize, ticket: u64) -> Option<Answer> {
        self.sides[at].answers.remove(&ticket)
    }

    /// What each was last told about pinning to an endpoint's tunnels.
    fn pinned(&self, endpoint: EndpointId) -> [bool; 2] {
        [0, 1].map(|at: usize| self.sides[at].pinned.get(&endpoint).copied().unwrap_or(true))
    }
}

impl Side {
    /// Outputs and reports, until nothing is left.
    fn settle(&mut self, now: Duration) {
        loop {
            while let Some(output) = self.gateway.poll_output() {
                match output {
                    Output::Pair(transmit) => self.sent.push(transmit),
                    Output::Shard(command) => {
                        if let esp::Command::Pin { endpoint, on } = command {
                            self.pinned.insert(endpoint, on);
                        }
                        self.shard.apply(command).unwrap();
                    }
                    Output::Reserve { endpoint, up_to } => {
                        self.gateway.handle_reserved(now, endpoint, up_to)
                    }
                    Output::Addresses { endpoint, present } => {
                        self.addresses.insert(endpoint, present);
                    }
                    Output::Answer { ticket, answer } => {
                        self.answers.insert(ticket, answer);
                    }
                    Output::Ike { .. } => self.ike += 1,
                    _ => {}
                }
            }
            let Some(report) = self.shard.poll_report(now) else { return };
            self.gateway.handle_report(now, report);
        }
    }
}

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
    let sent = pair.sides[0].ike;
    pair.ask(0, &Request::Undrain);
    pair.run(Duration::from_millis(200));
    assert_eq!(pair.pinned(A), [true; 2]);
    assert_eq!(tunnels(&mut pair), [Connecting]);
    assert!(pair.sides[0].ike > sent);
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
