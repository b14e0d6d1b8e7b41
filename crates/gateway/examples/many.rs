//! What many tunnels cost a pair's control planes, without any network:
//! `cargo run --release -p gateway --example many -- 10000`.
//!
//! A lone gateway brings N tunnels up with one instance of a pair, the other follows; a fresh process takes the
//! follower's place; the owner dies. Of each kind of step: how often, how long in all, how long at most. A control loop
//! does nothing else meanwhile, so what takes longer than a heartbeat interval (20 ms) keeps heartbeats waiting.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a bench may panic")]
#![allow(clippy::disallowed_methods, reason = "a bench reads the clock; the crate does not")]

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

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

const MAIN: EndpointId = EndpointId(0);
const OURS: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
const THEIRS: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);

fn network(first: u32) -> TrafficSelector {
    let of = |bits: u32| Ipv4Addr::from_bits(bits).into();
    TrafficSelector::all(AddrRange::new(of(first), of(first + 255)).unwrap())
}

/// Connection `n`, as the pair has it, or as its peer has it.
fn connection(n: u32, peer: bool) -> ConnectionParts {
    let ids = ["gw.example".to_owned(), format!("t{n:05}.example")];
    let networks = [network(0x0a01_0000), network(0x0a40_0000 + n * 256)];
    let [near, far] = if peer { [1, 0] } else { [0, 1] };
    let (ours, remote) = if peer { (THEIRS, OURS) } else { (OURS, THEIRS) };
    let remote = RemoteAddress::Ip(remote.into());
    let start = if peer { ike::config::Start::Initiate } else { ike::config::Start::Respond };
    let ike = ConnectionConfig {
        name: format!("t{n:05}"),
        id: ConnectionId(0),
        local_address: ours.into(),
        remote_address: remote,
        local_id: ids[near].parse().unwrap(),
        remote_id: ids[far].parse().unwrap(),
        psk: Secret::from_slice(format!("the shared secret of tunnel {n}").as_bytes()),
        ike_proposals: ike::proposal::default_ike(),
        children: vec![ChildConfig {
            name: "net".into(),
            local_ts: vec![networks[near]],
            remote_ts: vec![networks[far]],
            esp_proposals: ike::proposal::default_esp(),
            start,
        }],
        encap: Encap::Auto,
        timers: Timers::default(),
        initial_contact: true,
    };
    ConnectionParts { endpoints: vec!["main".into()], remotes: Remotes::from(remote), ike }
}

/// Instance 0 or 1 of the pair, or (2) the peer.
fn config(many: u32, who: usize) -> Config {
    let names: &[&str] = if who == 2 { &["peer"] } else { &["left", "right"] };
    let instance = |index: usize| Instance {
        name: names[index].into(),
        index: index as u8,
        links: vec![format!("172.31.0.{}:4600", index + 1).parse().unwrap()],
    };
    let parts = Parts {
        local: names[who % 2].into(),
        pair: (who < 2).then(|| PairParts {
            timers: PairTimers::default(),
            digest_key: Secret::from_slice(&[7; 32]),
        }),
        instances: (0..names.len()).map(instance).collect(),
        endpoints: vec![EndpointParts {
            name: "main".into(),
            home: names[0].into(),
            wan: WanParts {
                address: if who == 2 { THEIRS } else { OURS }.into(),
                prefix: None,
                gateway: None,
                interface: names.iter().map(|name| ((*name).to_owned(), "eth0".into())).collect(),
            },
            lan: None,
            on_failure: OnFailure::Adopt,
            weight: 1,
            home_coming: HomeComing::default(),
        }],
        connections: (0..many).map(|n| connection(n, who == 2)).collect(),
        limits: Limits::default(),
        keylog: false,
    };
    Config::new(parts).unwrap_or_else(|findings| panic!("{findings:?}")).0
}

/// Calls of one kind.
#[derive(Default, Clone, Copy)]
struct Took {
    calls: u64,
    all: Duration,
    most: Duration,
}

type Times = BTreeMap<(&'static str, &'static str), Took>;

struct Side {
    name: &'static str,
    gateway: Gateway,
    shard: Shard,
    sent: Vec<ha::Transmit>,
    ike: Vec<(SocketAddr, SocketAddr, Vec<u8>)>,
    answers: Vec<Answer>,
}

impl Side {
    fn new(many: u32, who: usize, now: Duration) -> Self {
        let start = Start {
            config: config(many, who),
            rng: Box::new(ChaCha20Rng::seed_from_u64(who as u64)),
            seed: now.as_secs() + who as u64 + 1,
            terms: vec![Some(wire::id::Term(0))],
            workers: 1,
            release: "bench".into(),
            hold_format: None,
        };
        Self {
            name: ["left", "right", "peer"][who],
            gateway: Gateway::new(start, now).unwrap(),
            shard: Shard::new(esp::Config::default()),
            sent: Vec::new(),
            ike: Vec::new(),
            answers: Vec::new(),
        }
    }

    /// One step of the control plane, timed, and what follows from it at the shard, timed apart.
    fn step(
        &mut self,
        times: &mut Times,
        what: &'static str,
        now: Duration,
        f: impl FnOnce(&mut Gateway),
    ) {
        let began = Instant::now();
        f(&mut self.gateway);
        note(times, (self.name, what), began.elapsed());
        loop {
            let began = Instant::now();
            while let Some(output) = self.gateway.poll_output() {
                match output {
                    Output::Pair(transmit) => self.sent.push(transmit),
                    Output::Shard(command) => match self.shard.apply(command) {
                        // A lease for an SA whose record is still on its way.
                        Ok(()) | Err(esp::CommandError::UnknownSa(_)) => {}
                        Err(error) => panic!("{error}"),
                    },
                    Output::Reserve { endpoint, up_to } => {
                        self.gateway.handle_reserved(now, endpoint, up_to)
                    }
                    Output::Answer { answer, .. } => self.answers.push(answer),
                    Output::Ike { from, to, bytes, .. } => self.ike.push((from, to, bytes)),
                    _ => {}
                }
            }
            let Some(report) = self.shard.poll_report(now) else { break };
            note(times, (self.name, "shard"), began.elapsed());
            let began = Instant::now();
            self.gateway.handle_report(now, report);
            note(times, (self.name, "report"), began.elapsed());
        }
    }

    fn summary(
        &mut self,
        times: &mut Times,
        request: &Request,
        what: &'static str,
        now: Duration,
    ) -> gateway::status::Status {
        self.step(times, what, now, |gateway| gateway.handle_request(now, 1, request));
        match self.answers.pop() {
            Some(Answer::Status(status)) => *status,
            other => panic!("{other:?}"),
        }
    }
}

fn note(times: &mut Times, what: (&'static str, &'static str), took: Duration) {
    let entry = times.entry(what).or_default();
    entry.calls += 1;
    entry.all += took;
    entry.most = entry.most.max(took);
}

struct World {
    now: Duration,
    sides: [Side; 2],
    peer: Side,
    /// Who of the pair is dead.
    dead: Option<usize>,
    times: Times,
}

impl World {
    /// A millisecond: turns, and everything on its way arrives.
    fn tick(&mut self) {
        self.now += Duration::from_millis(1);
        let (now, times) = (self.now, &mut self.times);
        let alive = |at: &usize| self.dead != Some(*at);
        for at in [0, 1].into_iter().filter(alive) {
            self.sides[at].step(times, "turn", now, |gateway| gateway.handle_turn(now));
            for transmit in std::mem::take(&mut self.sides[at].sent) {
                let other = &mut self.sides[1 - at];
                match transmit {
                    _ if self.dead.is_some() => {}
                    ha::Transmit::Heartbeat { link, bytes } => {
                        other.step(times, "heartbeat", now, |g| {
                            g.handle_heartbeat(now, link.0, &bytes)
                        });
                    }
                    ha::Transmit::Frame(bytes) => {
                        other.step(times, "frame", now, |g| g.handle_frame(now, &bytes));
                    }
                    ha::Transmit::Probe { .. } | ha::Transmit::CloseStream { .. } => {}
                }
            }
        }
        let ours = [0, 1].map(|at: usize| std::mem::take(&mut self.sides[at].ike));
        self.peer.step(times, "turn", now, |gateway| gateway.handle_turn(now));
        for (from, to, bytes) in ours.into_iter().flatten() {
            self.peer.step(times, "ike", now, |g| g.handle_ike(now, MAIN, from, to, &bytes, false));
        }
        for (from, to, bytes) in std::mem::take(&mut self.peer.ike) {
            for at in [0, 1].into_iter().filter(|at| self.dead != Some(*at)) {
                let side = &mut self.sides[at];
                if !side.gateway.owns_nothing() {
                    side.step(times, "ike", now, |g| {
                        g.handle_ike(now, MAIN, from, to, &bytes, false)
                    });
                }
            }
        }
    }

    fn print(&mut self, title: &str) {
        println!("\n{title} ({:.1} s of the pair's time)", self.now.as_secs_f64() - 100.0);
        for ((who, what), Took { calls, all, most }) in std::mem::take(&mut self.times) {
            let ms = |time: Duration| time.as_secs_f64() * 1e3;
            println!(
                "  {who:<6} {what:<14} {calls:>8} calls {:>10.1} ms, at most {:>8.2} ms",
                ms(all),
                ms(most)
            );
        }
    }
}

fn main() {
    let many: u32 = std::env::args().nth(1).map_or(10_000, |arg| arg.parse().unwrap());
    let now = Duration::from_secs(100);
    let began = Instant::now();
    drop(config(many, 0));
    println!(
        "{many} tunnels; the configuration is checked in {:.1} ms",
        began.elapsed().as_secs_f64() * 1e3
    );
    let sides = [Side::new(many, 0, now), Side::new(many, 1, now)];
    let mut world =
        World { now, sides, peer: Side::new(many, 2, now), dead: None, times: Times::new() };
    for side in &mut world.sides {
        side.gateway.handle_stream_up(now, 0);
    }
    while world.sides[0].gateway.owns_nothing() {
        world.tick();
    }
    world.times.clear();
    let up = |world: &mut World, at: usize| {
        let mut unnoted = Times::new();
        let now = world.now;
        world.sides[at].summary(&mut unnoted, &Request::Summary, "", now).tunnel_counts.children
    };
    while up(&mut world, 0) < u64::from(many) || up(&mut world, 1) < u64::from(many) {
        (0..250).for_each(|_| world.tick());
    }
    world.print("establishment");

    let now = world.now;
    world.sides[0].summary(&mut world.times, &Request::Summary, "summary", now);
    world.sides[0].step(&mut world.times, "status", now, |g| {
        g.handle_request(now, 1, &Request::Status);
    });
    while world.sides[0].answers.pop().is_none() {
        world.tick();
    }
    for _ in 0..3000 {
        world.tick();
    }
    world.print("asked for status, then 3 s of rest");

    // The other's process ends, and a new one comes.
    let now = world.now;
    world.sides[0].step(&mut world.times, "stream", now, |g| g.handle_stream_down(now, false));
    world.sides[1] = Side::new(many, 1, now);
    for at in [0, 1] {
        world.sides[at].step(&mut world.times, "stream", now, |g| g.handle_stream_up(now, 0));
    }
    world.dead = None;
    let synced = |world: &mut World| {
        let mut unnoted = Times::new();
        let now = world.now;
        let status = world.sides[0].summary(&mut unnoted, &Request::Summary, "", now);
        status.endpoints[0].mode == gateway::status::Mode::Synced
    };
    for _ in 0..100 {
        (0..100).for_each(|_| world.tick());
        if synced(&mut world) && up(&mut world, 1) == u64::from(many) {
            break;
        }
    }
    assert!(synced(&mut world), "a fresh follower is never in sync");
    world.print("a fresh follower");

    world.dead = Some(0);
    let now = world.now;
    world.sides[1].step(&mut world.times, "stream", now, |g| g.handle_stream_down(now, false));
    world.sides[1].step(&mut world.times, "probe", now, |g| {
        g.handle_probe_result(now, 0, ha::Probe::Refused)
    });
    while world.sides[1].gateway.owns_nothing() {
        world.tick();
    }
    for _ in 0..1000 {
        world.tick();
    }
    assert_eq!(up(&mut world, 1), u64::from(many));
    world.print("takeover, and a second");
}
