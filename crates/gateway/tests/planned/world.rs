//! The pair that planned work is tested with.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use crypto::Secret;
use esp::{Batch, SLOT_LEN, Shard, Slot, Verdict};
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

/// Networks behind the gateways: 1 is ours, the tunnels' come after it.
fn network(n: usize) -> TrafficSelector {
    let [high, low] = (n as u16).to_be_bytes();
    let range = AddrRange::new([10 + high, low, 0, 0].into(), [10 + high, low, 0, 255].into());
    TrafficSelector::all(range.unwrap())
}

/// The name of one of so many tunnels, and the remote gateway's identity in it.
fn branch(of: usize, n: usize) -> (String, String) {
    match of {
        1 => ("branch".into(), "branch.example".into()),
        _ => (format!("branch-{n}"), format!("branch-{n}.example")),
    }
}

/// Two endpoints, `a` at home on the left and `b` on the right, and connections to one remote gateway.
fn config(local: usize, on_failure: OnFailure, initiates: bool, connections: usize) -> Config {
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
    let peer = RemoteAddress::Ip([198, 51, 100, 7].into());
    let ike = |n: usize| ConnectionConfig {
        name: branch(connections, n).0,
        id: ConnectionId(0),
        local_address: [203, 0, 113, 10].into(),
        remote_address: peer,
        local_id: "gw.example".parse().unwrap(),
        remote_id: branch(connections, n).1.parse().unwrap(),
        psk: Secret::from_slice(b"a long enough pre-shared key"),
        ike_proposals: ike::proposal::default_ike(),
        children: vec![ChildConfig {
            name: "net".into(),
            local_ts: vec![network(1)],
            remote_ts: vec![network(2 + n)],
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
        connections: (0..connections)
            .map(|n| ConnectionParts {
                endpoints: vec!["a".into(), "b".into()],
                remotes: Remotes::from(peer),
                ike: ike(n),
            })
            .collect(),
        limits: Limits::default(),
        keylog: false,
    };
    Config::new(parts).unwrap().0
}

/// The remote gateway: alone, with a tunnel of each connection to each of our addresses, which it begins.
fn remote(connections: usize) -> Config {
    let at = |n: u8| RemoteAddress::Ip([203, 0, 113, n].into());
    let ike = |n: usize| ConnectionConfig {
        name: if connections == 1 { "gw".into() } else { format!("gw-{n}") },
        id: ConnectionId(0),
        local_address: [198, 51, 100, 7].into(),
        remote_address: at(10),
        local_id: branch(connections, n).1.parse().unwrap(),
        remote_id: "gw.example".parse().unwrap(),
        psk: Secret::from_slice(b"a long enough pre-shared key"),
        ike_proposals: ike::proposal::default_ike(),
        children: vec![ChildConfig {
            name: "net".into(),
            local_ts: vec![network(2 + n)],
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
        connections: (0..connections)
            .map(|n| ConnectionParts {
                endpoints: vec!["p".into()],
                remotes: Remotes::Everywhere(vec![at(10), at(20)]),
                ike: ike(n),
            })
            .collect(),
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
    connections: usize,
    /// Whose process has ended.
    stopped: [bool; 2],
    tickets: u64,
}

impl Pair {
    /// Nobody answers what we initiate.
    pub(crate) fn new(on_failure: OnFailure) -> Self {
        Self::make(on_failure, false, 1)
    }

    /// The remote gateway initiates, and has both tunnels.
    pub(crate) fn with_peer(on_failure: OnFailure) -> Self {
        let mut pair = Self::make(on_failure, true, 1);
        pair.run(Duration::from_secs(12));
        assert_eq!(
            pair.believed(),
            [("gw#1", true), ("gw#2", true)].map(|(n, up)| (n.into(), up)).into()
        );
        pair
    }

    /// As [`Pair::with_peer`], but with so many connections, hence twice as many tunnels.
    pub(crate) fn with_connections(connections: usize) -> Self {
        let mut pair = Self::make(OnFailure::Adopt, true, connections);
        pair.run(Duration::from_secs(12));
        assert_eq!(pair.believed().values().filter(|up| **up).count(), connections * 2);
        pair
    }

    fn make(on_failure: OnFailure, peer: bool, connections: usize) -> Self {
        let now = Duration::from_secs(100);
        let side = |local: usize| {
            let config = match local {
                2 => remote(connections),
                _ => config(local, on_failure, !peer, connections),
            };
            Side::new(config, local, local as u64, now)
        };
        let mut pair = Self {
            now,
            sides: [side(0), side(1)],
            remote: peer.then(|| side(2)),
            connections,
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
                        ha::Transmit::Probe { link } if self.stopped[1 - at] => {
                            let ours = &mut self.sides[at];
                            ours.gateway.handle_probe_result(now, link.0, ha::Probe::Refused);
                            ours.settle(now);
                        }
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
            // Of many tunnels, a part in each turn.
            let (now, side) = (self.now, &mut self.sides[at]);
            while side.gateway.poll_timeout() < now + Duration::from_millis(1)
                && !side.answers.contains_key(&ticket)
            {
                side.gateway.handle_turn(now);
                side.settle(now);
            }
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
    fn new(config: Config, local: usize, seed: u64, now: Duration) -> Self {
        let start = Start {
            config,
            rng: Box::new(ChaCha20Rng::seed_from_u64(seed)),
            seed: seed + 1,
            terms: vec![Some(wire::id::Term(0)); 2 - local / 2],
            workers: 1,
            release: "test".into(),
            hold_format: None,
        };
        Self {
            gateway: Gateway::new(start, now).unwrap(),
            shard: Shard::new(esp::Config { endpoints: 2, ..esp::Config::default() }),
            sent: Vec::new(),
            answers: BTreeMap::new(),
            pinned: BTreeMap::new(),
            addresses: BTreeMap::new(),
            ike: Vec::new(),
            ike_sent: 0,
        }
    }

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
                        match self.shard.apply(command) {
                            // Removed a moment ago, or not yet there.
                            Ok(()) | Err(esp::CommandError::UnknownSa(_)) => {}
                            Err(error) => panic!("{error}"),
                        }
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
        for _ in 0..10 {
            remote.gateway.handle_turn(now);
            remote.settle(now);
        }
        let Some(Answer::Status(status)) = remote.answers.remove(&ticket) else { panic!() };
        let up = |t: &gateway::status::TunnelStatus| {
            t.state == gateway::status::TunnelState::Established && !t.children.is_empty()
        };
        status.tunnels.iter().map(|t| (t.connection.clone(), up(t))).collect()
    }

    /// One packet of each connection from the remote gateway to us, as ESP.
    pub(crate) fn packets(&mut self) -> Vec<Vec<u8>> {
        let now = self.now;
        let remote = self.remote.as_mut().unwrap();
        let mut batch = Batch::new(1, SLOT_LEN);
        let sealed = (0..self.connections).map(|n| {
            let [high, low] = (n as u16 + 2).to_be_bytes();
            let from = SocketAddr::from(([10 + high, low, 0, 9], 4000));
            let inner = wire::ip::udp_packet(from, "10.1.0.9:5000".parse().unwrap(), b"once");
            batch.clear();
            assert!(batch.push().unwrap().fill(&inner.unwrap()));
            remote.shard.outbound(now, &[Duration::MAX], &mut batch);
            let slot = &batch.slots()[0];
            assert!(matches!(slot.verdict(), Verdict::Send { .. }), "{slot:?}");
            slot.packet().to_vec()
        });
        sealed.collect()
    }

    /// What becomes of ESP packets that come to an instance, inside its fence.
    pub(crate) fn receive(&mut self, at: usize, packets: &[Vec<u8>]) -> Vec<Verdict> {
        let now = self.now;
        let mut batch = Batch::new(packets.len(), SLOT_LEN);
        for packet in packets {
            assert!(batch.push().unwrap().fill(packet));
        }
        let side = &mut self.sides[at];
        side.shard.inbound(now, &[Duration::MAX; 2], &mut batch);
        side.settle(now);
        batch.slots().iter().map(Slot::verdict).collect()
    }

    /// The pair's stream ends with all that is under way, and stands anew.
    pub(crate) fn break_stream(&mut self) {
        // What the shards are about to report leaves into the old one.
        self.now += Duration::from_millis(5);
        let now = self.now;
        for side in &mut self.sides {
            side.settle(now);
            side.sent.clear();
            side.gateway.handle_stream_down(now, false);
            side.settle(now);
            side.gateway.handle_stream_up(now, 0);
            side.settle(now);
        }
    }

    /// SIGKILL: the stream ends without a goodbye, and the pair port is closed.
    pub(crate) fn kill(&mut self, at: usize) {
        let now = self.now;
        self.stopped[at] = true;
        self.sides[1 - at].gateway.handle_stream_down(now, false);
        self.sides[1 - at].settle(now);
    }

    /// A process that knows nothing takes the place of one that was killed; the pair's stream stands anew.
    pub(crate) fn revive(&mut self, at: usize) {
        let now = self.now;
        let config = config(at, OnFailure::Adopt, false, self.connections);
        self.sides[at] = Side::new(config, at, 77, now);
        self.stopped[at] = false;
        for side in &mut self.sides {
            side.gateway.handle_stream_up(now, 0);
            side.settle(now);
        }
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
