//! Two endpoints in one process and in virtual time. Exchanges are drawn in the
//! comment above the test that plays them.
//!
//! Every transition is applied to a shadow at once: its operations for the data
//! plane must equal the owner's, and its state must be what the owner has.

mod collisions;
mod establish;
mod faults;
mod golden;
mod lifetimes;
mod mismatch;
mod notes;
mod parts;
mod puppet;
mod takeover;

use core::{net::SocketAddr, time::Duration};
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::IpAddr,
};

use crypto::Secret;
use rand_chacha::{ChaCha20Rng, rand_core::SeedableRng};
use wire::{
    id::{ConnectionId, EndpointId, EspSpi, IkeSpi, Term},
    ts::{Cidr, TrafficSelector},
};

use crate::{
    ChildConfig, ChildOp, ChildSa, ConnectionConfig, Context, Doubt, Encap, Endpoint,
    EndpointConfig, Event, Identity, Keepalive, Limits, RemoteAddress, SpiAllocator, Start, Target,
    Timers, Transition, Transmit, proposal,
};

pub(crate) fn rng(seed: u64) -> ChaCha20Rng {
    ChaCha20Rng::seed_from_u64(seed)
}

/// Hands out SPIs in order; knows which are taken.
#[derive(Default)]
pub(crate) struct Spis {
    next: u32,
    pub(crate) taken: BTreeSet<EspSpi>,
    pub(crate) empty: bool,
}

impl SpiAllocator for Spis {
    fn allocate(&mut self, _: Option<EspSpi>) -> Option<EspSpi> {
        if self.empty {
            return None;
        }
        self.next += 1;
        let spi = EspSpi(0x0010_0000 + self.next);
        self.taken.insert(spi);
        Some(spi)
    }

    fn release(&mut self, spi: EspSpi) {
        assert!(self.taken.remove(&spi), "released twice or never taken: {spi}");
    }
}

pub(crate) const A: usize = 0;
pub(crate) const B: usize = 1;

pub(crate) fn ip(n: usize) -> IpAddr {
    IpAddr::from([192, 0, 2, n as u8 + 1])
}

pub(crate) fn ts(text: &str) -> Vec<TrafficSelector> {
    text.split_whitespace().map(|t| TrafficSelector::from(t.parse::<Cidr>().unwrap())).collect()
}

/// A child `net` between 10.(1+n).0.0/24 on side n.
pub(crate) fn net(n: usize) -> ChildConfig {
    ChildConfig {
        name: "net".to_owned(),
        local_ts: ts(&format!("10.{}.0.0/24", n + 1)),
        remote_ts: ts(&format!("10.{}.0.0/24", 2 - n)),
        esp_proposals: proposal::parse_esp(&["aes256gcm16-x25519"]).unwrap(),
        start: Start::Trap,
    }
}

/// Side `n`'s view of the one connection.
pub(crate) fn connection(n: usize) -> ConnectionConfig {
    let id = |n: usize| format!("gw{n}.example").parse::<Identity>().unwrap();
    ConnectionConfig {
        name: "c".to_owned(),
        id: ConnectionId(0),
        local_address: ip(n),
        remote_address: RemoteAddress::Ip(ip(1 - n)),
        local_id: id(n),
        remote_id: id(1 - n),
        psk: Secret::from_slice(b"the secret of both"),
        ike_proposals: proposal::parse_ike(&["aes256gcm16-prfsha384-x25519"]).unwrap(),
        children: vec![net(n)],
        encap: Encap::Auto,
        timers: Timers::default(),
        initial_contact: true,
    }
}

pub(crate) fn config(n: usize) -> EndpointConfig {
    EndpointConfig {
        id: EndpointId(0),
        addresses: vec![ip(n)],
        connections: vec![connection(n)],
        limits: Limits::default(),
        keylog: false,
    }
}

/// What the workers hold.
#[derive(Default)]
pub(crate) struct Plane {
    pub(crate) sas: BTreeMap<EspSpi, ChildSa>,
    pub(crate) sends: BTreeMap<(u16, String), EspSpi>,
}

impl Plane {
    pub(crate) fn apply(&mut self, ops: Vec<ChildOp>) {
        for op in ops {
            match op {
                ChildOp::Install(sa) => {
                    assert!(self.sas.insert(sa.spi_in, *sa).is_none(), "installed twice");
                }
                ChildOp::UseOutbound { spi_in } => {
                    let sa = &self.sas[&spi_in];
                    self.sends.insert((sa.connection.0, sa.child.clone()), spi_in);
                }
                ChildOp::Move { spi_in, local, remote, udp_encap } => {
                    let sa = self.sas.get_mut(&spi_in).unwrap();
                    (sa.local, sa.remote, sa.udp_encap) = (local, remote, udp_encap);
                }
                ChildOp::Remove { spi_in } => {
                    self.sas.remove(&spi_in).expect("removed what was not there");
                    self.sends.retain(|_, s| *s != spi_in);
                }
            }
        }
    }

    pub(crate) fn sender(&self, child: &str) -> Option<&ChildSa> {
        self.sends.get(&(0, child.to_owned())).map(|spi| &self.sas[spi])
    }
}

/// One side: the owner, its shadow, and their data planes.
pub(crate) struct Side {
    pub(crate) ike: Endpoint,
    pub(crate) shadow: Endpoint,
    pub(crate) spis: Spis,
    pub(crate) rng: ChaCha20Rng,
    pub(crate) plane: Plane,
    pub(crate) shadow_plane: Plane,
    pub(crate) events: Vec<Event>,
    pub(crate) keepalives: Vec<Keepalive>,
    pub(crate) term: u64,
    pub(crate) records: usize,
}

/// A datagram on its way.
#[derive(Clone)]
pub(crate) struct Flight {
    pub(crate) at: Duration,
    pub(crate) to_side: usize,
    pub(crate) packet: Transmit,
}

pub(crate) struct World {
    pub(crate) now: Duration,
    pub(crate) sides: [Side; 2],
    pub(crate) wire: VecDeque<Flight>,
    /// Every datagram ever sent, with the side it left.
    pub(crate) sent: Vec<(usize, Transmit)>,
    /// (side, IV, bytes) of sealed messages, to prove that no IV repeats.
    ivs: BTreeMap<(IkeSpi, IkeSpi, bool, [u8; 8]), Vec<u8>>,
    pub(crate) delay: Duration,
    /// What happened, for a failing test to show.
    pub(crate) log: Vec<String>,
    /// Translates what side A sends, as a NAT does: A's port as B sees it.
    pub(crate) nat_port: Option<u16>,
}

fn describe(ops: &[ChildOp]) -> Vec<String> {
    ops.iter()
        .map(|op| match op {
            ChildOp::Install(sa) => {
                format!("{op:?} {:x?} {:x?}", sa.keymat_in.expose(), sa.keymat_out.expose())
            }
            op => format!("{op:?}"),
        })
        .collect()
}

impl World {
    pub(crate) fn new() -> Self {
        Self::with(config(A), config(A), config(B), config(B))
    }

    /// Applies `f` to the configurations of both sides and of their shadows.
    pub(crate) fn tuned(f: impl Fn(usize, &mut EndpointConfig)) -> Self {
        let make = |n| {
            let mut c = config(n);
            f(n, &mut c);
            c
        };
        Self::with(make(A), make(A), make(B), make(B))
    }

    fn with(a: EndpointConfig, sa: EndpointConfig, b: EndpointConfig, sb: EndpointConfig) -> Self {
        let side = |config, shadow, seed| Side {
            ike: Endpoint::new(config),
            shadow: Endpoint::new(shadow),
            spis: Spis::default(),
            rng: rng(seed),
            plane: Plane::default(),
            shadow_plane: Plane::default(),
            events: Vec::new(),
            keepalives: Vec::new(),
            term: 1,
            records: 0,
        };
        let mut world = Self {
            now: Duration::from_secs(1000),
            sides: [side(a, sa, 1), side(b, sb, 2)],
            wire: VecDeque::new(),
            sent: Vec::new(),
            ivs: BTreeMap::new(),
            delay: Duration::from_millis(10),
            log: Vec::new(),
            nat_port: None,
        };
        for n in [A, B] {
            world.with_side(n, |ike, cx| ike.activate(cx, Term(1), Doubt::None).unwrap());
        }
        world
    }

    /// Calls into one side, then drains it.
    pub(crate) fn with_side<R>(
        &mut self,
        n: usize,
        f: impl FnOnce(&mut Endpoint, &mut Context<'_>) -> R,
    ) -> R {
        let now = self.now;
        let side = &mut self.sides[n];
        let mut cx = Context { now, rng: &mut side.rng, spis: &mut side.spis };
        let result = f(&mut side.ike, &mut cx);
        self.drain(n);
        result
    }

    fn drain(&mut self, n: usize) {
        let now = self.now;
        while let Some(t) = self.sides[n].ike.poll_transition() {
            let side = &mut self.sides[n];
            side.records += usize::from(t.is_record());
            let Transition { puts, deletes, children, transmits } = t;
            let shadow = side.shadow.apply(now, &puts, &deletes).unwrap();
            assert_eq!(describe(&shadow), describe(&children), "owner and shadow differ");
            side.shadow_plane.apply(shadow);
            side.plane.apply(children);
            for packet in transmits {
                self.send(n, packet);
            }
        }
        let side = &mut self.sides[n];
        while let Some(event) = side.ike.poll_event() {
            self.log.push(format!("{now:?} {}: {event}", ["A", "B"][n]));
            side.events.push(event);
        }
        while let Some(keepalive) = side.ike.poll_keepalive() {
            side.keepalives.push(keepalive);
        }
        let in_use: BTreeSet<EspSpi> = side.ike.esp_spis().collect();
        assert_eq!(in_use, side.spis.taken, "SPIs leak or are lost");
    }

    fn send(&mut self, n: usize, packet: Transmit) {
        self.check_iv(&packet.bytes);
        self.note(n, "sends", &packet.bytes);
        self.sent.push((n, packet.clone()));
        let at = self.now + self.delay;
        self.wire.push_back(Flight { at, to_side: 1 - n, packet });
    }

    fn note(&mut self, n: usize, what: &str, bytes: &[u8]) {
        if let Ok(h) = wire::ike::Header::parse(bytes) {
            self.log.push(format!(
                "{:?} {} {what} {} {} {}{} {:x}",
                self.now,
                ["A", "B"][n],
                h.exchange,
                h.message_id,
                if h.response { "response" } else { "request" },
                if h.from_initiator { "" } else { " (from the responder)" },
                h.initiator_spi.0 >> 48,
            ));
        }
    }

    /// ha.md, invariant 1: no (key, IV) pair protects two datagrams.
    fn check_iv(&mut self, bytes: &[u8]) {
        let message = wire::ike::Message::parse(bytes).expect("we send what does not parse");
        let Some(sealed) = message.sealed else { return };
        let h = message.header;
        let iv: [u8; 8] = bytes[sealed.iv()].try_into().unwrap();
        let key = (h.initiator_spi, h.responder_spi, h.from_initiator, iv);
        let first = self.ivs.entry(key).or_insert_with(|| bytes.to_vec());
        assert_eq!(first, bytes, "an IV protects two datagrams");
    }

    /// Takes the next datagram off the wire without delivering it.
    pub(crate) fn lose(&mut self) -> Flight {
        self.wire.pop_front().expect("nothing on the wire")
    }

    /// Takes the next datagram to a side off the wire.
    pub(crate) fn take(&mut self, to_side: usize) -> Flight {
        let n = self.wire.iter().position(|f| f.to_side == to_side).expect("nothing for that side");
        self.wire.remove(n).unwrap()
    }

    /// Delivers one datagram now.
    pub(crate) fn deliver(&mut self, flight: Flight) {
        let n = flight.to_side;
        let Transmit { from, to, bytes } = flight.packet;
        let (from, to) = self.translate(n, from, to);
        self.note(n, "gets", &bytes);
        self.with_side(n, |ike, cx| ike.handle_datagram(cx, from, to, &bytes));
    }

    fn translate(
        &self,
        to_side: usize,
        from: SocketAddr,
        to: SocketAddr,
    ) -> (SocketAddr, SocketAddr) {
        match (self.nat_port, to_side) {
            (Some(port), B) => (SocketAddr::new(from.ip(), port + from.port() % 2), to),
            (Some(port), _) => {
                // Back to where the translated port belongs; an old mapping is gone.
                let own = if to.port() % 2 == port % 2 { 4500 } else { 500 };
                (from, SocketAddr::new(to.ip(), own))
            }
            (None, _) => (from, to),
        }
    }

    /// Delivers the next datagram to a side, letting time pass for it.
    pub(crate) fn pass(&mut self, to_side: usize) {
        let flight = self.take(to_side);
        self.now = self.now.max(flight.at);
        self.deliver(flight);
    }

    /// Delivers until nothing is on the wire; no timer fires.
    pub(crate) fn settle(&mut self) {
        for _ in 0..200 {
            let Some(flight) = self.wire.pop_front() else { return };
            self.now = self.now.max(flight.at);
            self.deliver(flight);
        }
        panic!("the two sides never stop talking");
    }

    /// Lets time pass, delivering and firing timers in order.
    pub(crate) fn run(&mut self, time: Duration) {
        let end = self.now + time;
        for _ in 0..200_000 {
            let flight = self.wire.iter().map(|f| f.at).min();
            let timers: Vec<Option<Duration>> =
                self.sides.iter().map(|s| s.ike.poll_timeout()).collect();
            let timer = timers.iter().flatten().min().copied();
            let Some(next) = flight.into_iter().chain(timer).min().filter(|t| *t <= end) else {
                self.now = end;
                return;
            };
            self.now = self.now.max(next);
            if flight.is_some_and(|at| at <= self.now) {
                let n = self.wire.iter().position(|f| Some(f.at) == flight).unwrap();
                let flight = self.wire.remove(n).unwrap();
                self.deliver(flight);
            } else {
                for n in [A, B] {
                    if timers[n].is_some_and(|t| t <= self.now) {
                        self.with_side(n, |ike, cx| ike.handle_timeout(cx));
                    }
                }
            }
        }
        panic!("time does not pass: a timer spins");
    }

    pub(crate) fn initiate(&mut self, n: usize) {
        assert!(self.with_side(n, |ike, cx| ike.initiate(cx, ConnectionId(0))));
    }

    pub(crate) fn rekey(&mut self, n: usize, target: Target) {
        assert!(self.with_side(n, |ike, cx| ike.rekey(cx, target)));
    }

    pub(crate) fn terminate(&mut self, n: usize, target: Target) {
        assert!(self.with_side(n, |ike, cx| ike.terminate(cx, target)));
    }

    /// Up, by A's initiation, nothing on the wire.
    pub(crate) fn established() -> Self {
        let mut world = Self::new();
        world.initiate(A);
        world.settle();
        world.assert_tunnel();
        world
    }

    /// Both directions: who sends on `child` sends what the other receives.
    pub(crate) fn works(&self, child: &str) -> bool {
        [(A, B), (B, A)].into_iter().all(|(from, to)| {
            let Some(out) = self.sides[from].plane.sender(child) else { return false };
            self.sides[to].plane.sas.get(&out.spi_out).is_some_and(|inn| {
                inn.spi_out == out.spi_in
                    && inn.aead == out.aead
                    && inn.keymat_in.ct_eq(&out.keymat_out)
                    && inn.keymat_out.ct_eq(&out.keymat_in)
                    && inn.local_ts == out.remote_ts
                    && inn.remote_ts == out.local_ts
                    && inn.udp_encap == out.udp_encap
            })
        })
    }

    #[track_caller]
    pub(crate) fn assert_tunnel(&self) {
        if !self.works("net") {
            let from = self.log.len().saturating_sub(120);
            panic!(
                "the tunnel does not carry traffic\n{}\n{:#?}\n{:#?}",
                self.log[from..].join("\n"),
                self.sides[A].ike.status(self.now),
                self.sides[B].ike.status(self.now)
            );
        }
    }

    /// Exactly one IKE SA and one Child SA on each side, and they match.
    #[track_caller]
    pub(crate) fn assert_tidy(&self) {
        self.assert_tunnel();
        for n in [A, B] {
            let status = self.sides[n].ike.status(self.now);
            assert_eq!(status.ike_sas.len(), 1, "side {n}: {status:#?}");
            assert_eq!(self.sides[n].plane.sas.len(), 1, "side {n}: {status:#?}");
        }
    }

    pub(crate) fn ike(&self, n: usize) -> IkeSpi {
        let status = self.sides[n].ike.status(self.now);
        status.ike_sas.iter().find(|s| s.state == "established").expect("an IKE SA").spi
    }

    pub(crate) fn child(&self, n: usize) -> EspSpi {
        self.sides[n].plane.sender("net").expect("a Child SA").spi_in
    }

    /// The records of SAs, without notes.
    pub(crate) fn snapshot(&self, n: usize) -> Vec<(IkeSpi, Vec<u8>)> {
        let all = self.sides[n].ike.snapshot(self.now);
        let sas = all.into_iter().filter(|(key, _)| *key != crate::record::note_key("c"));
        sas.map(|(spi, bytes)| (spi, bytes.to_vec())).collect()
    }

    pub(crate) fn failure(&self, n: usize) -> String {
        let mut failed = self.sides[n].events.iter().filter_map(|e| match e {
            Event::Failed(failure) => Some(failure.to_string()),
            _ => None,
        });
        failed.next_back().unwrap_or_default()
    }

    /// The owner of a side dies; its shadow takes over, with a new empty shadow
    /// behind it that gets a snapshot.
    pub(crate) fn take_over(&mut self, n: usize, doubt: Doubt) {
        let now = self.now;
        let fresh = || Endpoint::new(duplicate(self.sides[n].ike.config()));
        let mut shadow = fresh();
        let side = &mut self.sides[n];
        let mut shadow_plane = Plane::default();
        shadow_plane.apply(shadow.apply(now, &side.shadow.snapshot(now), &[]).unwrap());
        side.ike = core::mem::replace(&mut side.shadow, shadow);
        side.plane = core::mem::replace(&mut side.shadow_plane, shadow_plane);
        // The survivor hands out SPIs of its own.
        side.spis.taken = side.ike.esp_spis().collect();
        side.spis.next += 0x1000;
        // Never the other side's stream: equal nonces would be no collision.
        side.rng = rng(10_000 * (n as u64 + 1) + side.term);
        side.term += 1;
        let term = Term(side.term);
        self.with_side(n, |ike, cx| ike.activate(cx, term, doubt).unwrap());
    }
}

pub(crate) fn duplicate(config: &EndpointConfig) -> EndpointConfig {
    EndpointConfig {
        id: config.id,
        addresses: config.addresses.clone(),
        connections: config
            .connections
            .iter()
            .map(|c| ConnectionConfig {
                name: c.name.clone(),
                id: c.id,
                local_address: c.local_address,
                remote_address: c.remote_address,
                local_id: c.local_id.clone(),
                remote_id: c.remote_id.clone(),
                psk: c.psk.duplicate(),
                ike_proposals: c.ike_proposals.clone(),
                children: c.children.clone(),
                encap: c.encap,
                timers: c.timers,
                initial_contact: c.initial_contact,
            })
            .collect(),
        limits: config.limits,
        keylog: config.keylog,
    }
}
