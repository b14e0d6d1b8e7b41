//! The pair that planned work is tested with.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use crypto::Secret;
use esp::Shard;
use gateway::config::{
    Config, ConnectionParts, EndpointParts, HomeComing, Instance, OnFailure, PairParts, PairTimers,
    Parts, Remotes, WanParts,
};
use gateway::{Answer, Gateway, Output, Request, Start};
use ike::config::{ChildConfig, ConnectionConfig, Encap, Limits, RemoteAddress, Timers};
use rand_chacha::{ChaCha20Rng, rand_core::SeedableRng};
use wire::id::{ConnectionId, EndpointId};
use wire::ts::{AddrRange, TrafficSelector};

pub(crate) const HOLD_DOWN: Duration = Duration::from_secs(3);

/// Two endpoints, `a` at home on the left and `b` on the right.
fn config(local: usize, on_failure: OnFailure, initiates: bool) -> Config {
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
        on_failure,
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
            start: if initiates {
                ike::config::Start::Initiate
            } else {
                ike::config::Start::Respond
            },
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

/// The remote gateway: alone, with a tunnel to each of our addresses, which it begins.
fn remote() -> Config {
    let network = |n: u8| {
        let range = AddrRange::new([10, n, 0, 0].into(), [10, n, 0, 255].into());
        TrafficSelector::all(range.unwrap())
    };
    let at = |n: u8| RemoteAddress::Ip([203, 0, 113, n].into());
    let ike = ConnectionConfig {
        name: "gw".into(),
        id: ConnectionId(0),
        local_address: [198, 51, 100, 7].into(),
        remote_address: at(10),
        local_id: "branch.example".parse().unwrap(),
        remote_id: "gw.example".parse().unwrap(),
        psk: Secret::from_slice(b"a long enough pre-shared key"),
        ike_proposals: ike::proposal::default_ike(),
        children: vec![ChildConfig {
            name: "net".into(),
            local_ts: vec![network(2)],
            remote_ts: vec![network(1)],
            esp_proposals: ike::proposal::default_esp(),
            start: ike::config::Start::Initiate,
        }],
        encap: Encap::Auto,
        timers: Timers::default(),
        initial_contact: true,
    };
    let parts = Parts {
        local: "remote".into(),
        pair: None,
        instances: vec![Instance { name: "remote".into(), index: 0, links: Vec::new() }],
        endpoints: vec![EndpointParts {
            name: "p".into(),
            home: "remote".into(),
            wan: WanParts {
                address: [198, 51, 100, 7].into(),
                prefix: None,
                gateway: None,
                interface: [("remote".to_owned(), "eth0".to_owned())].into(),
            },
            lan: None,
            on_failure: OnFailure::Adopt,
            weight: 1,
            home_coming: HomeComing::default(),
        }],
        connections: vec![ConnectionParts {
            endpoints: vec!["p".into()],
            remotes: Remotes::Everywhere(vec![at(10), at(20)]),
            ike,
        }],
        limits: Limits::default(),
        keylog: false,
    };
    Config::new(parts).unwrap().0
}

pub(crate) const A: EndpointId = EndpointId(0);
pub(crate) const B: EndpointId = EndpointId(1);

pub(crate) struct Side {
    pub(crate) gateway: Gateway,
    shard: Shard,
    /// What left for the other.
    sent: Vec<ha::Transmit>,
    answers: BTreeMap<u64, Answer>,
    /// As the shard was told last.
    pinned: BTreeMap<EndpointId, bool>,
    pub(crate) addresses: BTreeMap<EndpointId, bool>,
    /// IKE datagrams under way: from, to.
    ike: Vec<(SocketAddr, SocketAddr, Vec<u8>)>,
    /// How many left.
    pub(crate) ike_sent: usize,
}

/// Two gateways over a perfect wire, with real shards, and their peer.
pub(crate) struct Pair {
    pub(crate) now: Duration,
    pub(crate) sides: [Side; 2],
    /// A remote gateway that lives and begins anew when its tunnel ends; without, nobody answers.
    remote: Option<Side>,
    /// Whose process has ended.
    stopped: [bool; 2],
    tickets: u64,
}

impl Pair {
    /// Nobody answers what we initiate.
    pub(crate) fn new(on_failure: OnFailure) -> Self {
        Self::make(on_failure, false)
    }

    /// The remote gateway initiates, and has both tunnels.
    pub(crate) fn with_peer(on_failure: OnFailure) -> Self {
        let mut pair = Self::make(on_failure, true);
        pair.run(Duration::from_secs(12));
        assert_eq!(
            pair.believed(),
            [("gw#1", true), ("gw#2", true)].map(|(n, up)| (n.into(), up)).into()
        );
        pair
    }

    fn make(on_failure: OnFailure, peer: bool) -> Self {
        let now = Duration::from_secs(100);
        let side = |local: usize| {
            let start = Start {
                config: if local == 2 { remote() } else { config(local, on_failure, !peer) },
                rng: Box::new(ChaCha20Rng::seed_from_u64(local as u64)),
                seed: local as u64 + 1,
                terms: vec![Some(wire::id::Term(0)); 2 - local / 2],
                workers: 1,
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
                ike: Vec::new(),
                ike_sent: 0,
            }
        };
        let mut pair = Self {
            now,
            sides: [side(0), side(1)],
            remote: peer.then(|| side(2)),
            stopped: [false; 2],
            tickets: 0,
        };
        for side in &mut pair.sides {
            side.gateway.handle_stream_up(now, 0);
        }
        pair.run(Duration::from_secs(2));
        assert_eq!(pair.owners(), ["left", "right"]);
        pair
    }

    pub(crate) fn run(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.now += Duration::from_millis(1);
            let now = self.now;
            for at in [0, 1] {
                if self.stopped[at] {
                    continue;
                }
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
            let ours = [0, 1].map(|at: usize| std::mem::take(&mut self.sides[at].ike));
            let Some(remote) = &mut self.remote else { continue };
            remote.gateway.handle_turn(now);
            remote.settle(now);
            for (from, to, bytes) in ours.into_iter().flatten() {
                remote.gateway.handle_ike(now, EndpointId(0), from, to, &bytes, false);
                remote.settle(now);
            }
            for (from, to, bytes) in std::mem::take(&mut remote.ike) {
                let endpoint = if to.ip() == IpAddr::from([203, 0, 113, 10]) { A } else { B };
                let at = usize::from(endpoint.0);
                if !self.stopped[at] {
                    self.sides[at].gateway.handle_ike(now, endpoint, from, to, &bytes, false);
                    self.sides[at].settle(now);
                }
            }
        }
    }

    /// Who owns `a` and `b`, as both agree.
    pub(crate) fn owners(&mut self) -> [String; 2] {
        let of = |status: gateway::status::Status| {
            status.endpoints.into_iter().map(|e| e.owner.unwrap_or_default()).collect::<Vec<_>>()
        };
        let [left, right] = [0, 1].map(|at| self.status(at)).map(of);
        assert_eq!(left, right);
        left.try_into().unwrap()
    }

    /// Everything; and the summary agrees with it.
    pub(crate) fn status(&mut self, at: usize) -> gateway::status::Status {
        use gateway::status::{ChildState, Status, TunnelCounts, TunnelState};
        let [full, summary] = [Request::Status, Request::Summary].map(|request| {
            let ticket = self.ask(at, &request);
            match self.sides[at].answers.remove(&ticket) {
                Some(Answer::Status(status)) => *status,
                other => panic!("{other:?}"),
            }
        });
        let of = |state| full.tunnels.iter().filter(|t| t.state == state).count() as u64;
        let children = full.tunnels.iter().flat_map(|t| &t.children);
        let installed =
            children.filter(|c| matches!(c.state, ChildState::Installed | ChildState::Rekeying));
        let counts = TunnelCounts {
            down: of(TunnelState::Down),
            connecting: of(TunnelState::Connecting),
            established: of(TunnelState::Established),
            closing: of(TunnelState::Closing),
            children: installed.count() as u64,
        };
        assert_eq!(counts, full.tunnel_counts);
        assert_eq!(summary, Status { tunnels: Vec::new(), ..full.clone() });
        full
    }

    pub(crate) fn ask(&mut self, at: usize, request: &Request) -> u64 {
        self.tickets += 1;
        let (now, ticket) = (self.now, self.tickets);
        self.sides[at].gateway.handle_request(now, ticket, request);
        self.sides[at].settle(now);
        ticket
    }

    pub(crate) fn answer(&mut self, at: usize, ticket: u64) -> Option<Answer> {
        self.sides[at].answers.remove(&ticket)
    }

    /// What each was last told about pinning to an endpoint's tunnels.
    pub(crate) fn pinned(&self, endpoint: EndpointId) -> [bool; 2] {
        [0, 1].map(|at: usize| self.sides[at].pinned.get(&endpoint).copied().unwrap_or(true))
    }
}

impl Side {
    /// Outputs and reports, until nothing is left.
    pub(crate) fn settle(&mut self, now: Duration) {
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
                    Output::Ike { from, to, bytes, .. } => {
                        self.ike_sent += 1;
                        self.ike.push((from, to, bytes));
                    }
                    _ => {}
                }
            }
            let Some(report) = self.shard.poll_report(now) else { return };
            self.gateway.handle_report(now, report);
        }
    }
}

impl Pair {
    /// What the remote gateway believes of its tunnels, by our addresses.
    pub(crate) fn believed(&mut self) -> BTreeMap<String, bool> {
        self.tickets += 1;
        let (now, ticket) = (self.now, self.tickets);
        let remote = self.remote.as_mut().unwrap();
        remote.gateway.handle_request(now, ticket, &Request::Status);
        remote.settle(now);
        let Some(Answer::Status(status)) = remote.answers.remove(&ticket) else { panic!() };
        let up = |t: &gateway::status::TunnelStatus| {
            t.state == gateway::status::TunnelState::Established && !t.children.is_empty()
        };
        status.tunnels.iter().map(|t| (t.connection.clone(), up(t))).collect()
    }

    /// As the daemon stops: `tandem::daemon::control::Control::stopped`.
    pub(crate) fn stop(&mut self, at: usize) {
        let deadline = self.now + Duration::from_millis(1_500);
        loop {
            let now = self.now;
            let gateway = &mut self.sides[at].gateway;
            gateway.leave(now);
            self.sides[at].settle(now);
            let gateway = &self.sides[at].gateway;
            if now >= deadline || !(gateway.hands_on() || gateway.has_tunnels()) {
                break;
            }
            self.run(Duration::from_millis(20));
        }
        let now = self.now;
        self.sides[at].gateway.goodbye(now);
        self.sides[at].settle(now);
        // What had left before is still delivered.
        self.stopped[at] = true;
        self.run(Duration::from_millis(50));
    }
}
