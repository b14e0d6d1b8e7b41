//! The world: hosts, what lies between them, and the queue of what happens next. One seed, one course of events.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use wire::id::Term;
use wire::natt;

use crate::bugs::Bug;
use crate::checks::{Checks, Kind, esp_of, hash};
use crate::clock::{MS, Nanos, S, US};
use crate::dice::Dice;
use crate::director::Director;
use crate::faults::Fault;
use crate::host::{Handed, Host, Input, Packet, Process};
use crate::log;
use crate::network::{Datagram, Item, Network, Stream};
use crate::pins::{Keys, Pinned};
use crate::planned::Homes;
use crate::scene::{Scene, endpoint_at, name_of, peer_of};
use crate::traffic::Traffic;

/// Packets that a socket or the TUN holds for a daemon that does not read.
const SOCKET: usize = 512;
/// How often the instances try to connect (ha.md, "Pair link").
const RETRY: Nanos = 200 * MS;
/// The neighbours ask for an address that does not answer this often.
const ASK: Nanos = 400 * MS;

/// What happens next.
#[derive(Debug)]
pub(crate) enum Event {
    /// A control loop's turn.
    Control { host: usize, life: u64 },
    /// A worker's turn.
    Worker { host: usize, life: u64 },
    /// A worker's system calls, after its turn.
    Leave { host: usize, life: u64 },
    /// A datagram reaches the other end of the WAN.
    Wan(Datagram),
    /// A heartbeat arrives.
    Heartbeat { to: usize, link: usize, keys: u64, bytes: Vec<u8> },
    /// A steered packet arrives.
    Steered { to: usize, keys: u64, what: Steered },
    /// Something on the stream arrives.
    Stream { to: usize, id: u64, sent: Nanos, item: Item },
    /// A stream stands, at this end.
    StreamUp { to: usize, life: u64, id: u64, link: usize },
    /// A probe reaches the other kernel.
    Probed { from: usize, life: u64, link: usize },
    /// Something for a control loop, if that process still lives.
    Tell { host: usize, life: u64, input: Input },
    /// An address is set (or removed), or announced.
    Address { host: usize, life: u64, endpoint: usize, present: Option<bool> },
    /// A term is on disk.
    Disk { host: usize, life: u64, endpoint: usize, term: Term },
    /// The instances try to connect.
    Connect,
    /// Neighbours ask for the virtual addresses.
    Ask,
    /// Inner packets set out.
    Traffic,
    /// A few more of them, about something that concerns packets under way.
    Burst,
    /// Somebody rekeys, now and then, or just once.
    Rekey { again: bool },
    /// A fault begins.
    Fault(Fault),
    /// It ends.
    End(Fault),
    /// A peer's gateway ends.
    Vanish { host: usize, life: u64 },
    /// A process that said goodbye is gone.
    Exit { host: usize, life: u64, down: Nanos },
    /// The director looks around.
    Direct,
}

/// What is steered.
#[derive(Debug, Clone)]
pub(crate) enum Steered {
    Packet(Handed),
    /// What came to an endpoint, from whom, to which address.
    Ike(usize, std::net::SocketAddr, std::net::SocketAddr, Vec<u8>),
}

struct Next {
    at: Nanos,
    order: u64,
    event: Event,
}

impl PartialEq for Next {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.order) == (other.at, other.order)
    }
}
impl Eq for Next {}
impl PartialOrd for Next {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Next {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

/// One simulation.
pub struct World {
    pub(crate) seed: u64,
    pub(crate) now: Nanos,
    order: u64,
    queue: BinaryHeap<Reverse<Next>>,
    pub(crate) scene: Scene,
    pub(crate) hosts: Vec<Host>,
    pub(crate) net: Network,
    pub(crate) traffic: Traffic,
    /// The invariants.
    pub checks: Checks,
    pub(crate) dice: Dice,
    pub(crate) bug: Option<Bug>,
    pub(crate) director: Director,
    pub(crate) batch: esp::Batch,
    pub(crate) keys: Keys,
    pub(crate) homes: Homes,
    /// How often a packet crossed the pair link, by its hash.
    crossings: HashMap<u64, u8>,
    /// Until when two senders are allowed: a full partition and its aftermath.
    pub(crate) partition_until: Nanos,
    /// Steps in which two senders were excused by a cut, by a clock that stood still.
    pub(crate) excuses: [u64; 2],
    /// Since when no link works both ways: no stream can come up.
    pub(crate) deaf_since: Option<Nanos>,
    /// Records were spoilt: the ERROR about it is what must be said.
    pub(crate) spoiled: bool,
    /// Events handled.
    pub steps: u64,
}

impl World {
    /// The world of a seed.
    ///
    /// # Errors
    /// A configuration that the gateway refuses: a fault of the simulation.
    pub fn new(seed: u64, bug: Option<Bug>) -> Result<Self, String> {
        let mut dice = Dice::new(seed, 0);
        let scene = Scene::draw(&mut dice);
        let net = Network::draw(&mut dice, scene.links);
        let hosts = (0..scene.hosts()).map(|index| Host::new(index, 0, &mut dice)).collect();
        let director = Director::new(&mut dice);
        let mut world = Self {
            seed,
            now: 0,
            order: 0,
            queue: BinaryHeap::new(),
            traffic: Traffic::new(&scene, &mut dice),
            scene,
            hosts,
            net,
            checks: Checks::default(),
            dice,
            bug,
            director,
            batch: esp::Batch::new(64, 512),
            keys: Keys::default(),
            homes: Homes::default(),
            crossings: HashMap::new(),
            partition_until: 0,
            excuses: [0; 2],
            deaf_since: None,
            spoiled: false,
            steps: 0,
        };
        log::set_turn(0, usize::MAX);
        log::say(&format!("{:?}", world.scene));
        log::say(&format!("{:?}", world.net));
        for host in 0..world.hosts.len() {
            world.start(host)?;
        }
        for event in [
            Event::Connect,
            Event::Ask,
            Event::Traffic,
            Event::Rekey { again: true },
            Event::Direct,
        ] {
            let at = world.dice.us(10, 5_000);
            world.at(at, event);
        }
        Ok(world)
    }

    /// Runs to the end, or to the first violation.
    ///
    /// # Errors
    /// The violation: the number of its invariant (0: none of ha.md's) and what happened.
    pub fn run(&mut self) -> Result<(), (u8, String)> {
        while !self.director.done() {
            let Some(Reverse(next)) = self.queue.pop() else { break };
            self.now = next.at;
            self.steps += 1;
            log::set_turn(self.now, usize::MAX);
            self.step(next.event);
            self.check();
            if let Some(violation) = self.checks.violation.take() {
                return Err((
                    violation.0,
                    format!("at {:.6} s: {}", self.now as f64 / 1e9, violation.1),
                ));
            }
        }
        Ok(())
    }

    fn check(&mut self) {
        for endpoint in 0..self.scene.endpoints.len() {
            if self.hosts.iter().take(2).all(|host| host.passes(self.now, endpoint)) {
                self.overlap(endpoint);
            }
        }
        for error in log::take_errors() {
            let told = error.contains("cannot be used") || error.contains("unusable, and not");
            if self.spoiled && told {
                continue;
            }
            self.checks.violate(
                if error.contains("digests differ") { 7 } else { 0 },
                format!("ERROR in the log: {error}"),
            );
        }
    }

    /// The clock of an instance stands still, or did so until a moment ago.
    pub(crate) fn is_stopped(&self) -> bool {
        self.hosts.iter().take(2).any(|host| self.now < host.stopped_until)
    }

    /// Nothing delays what the instances tell each other.
    pub(crate) fn is_calm(&self) -> bool {
        let well = |host: &Host| host.up && !host.paused && !host.slow;
        self.net.lag == [0; 2]
            && self.net.pair.loss == 0
            && self.net.pair.jitter < MS
            && self.net.links.iter().flatten().all(|works| *works)
            && self.hosts.iter().take(2).all(well)
    }

    /// Both instances pass the fence of an endpoint now.
    fn overlap(&mut self, endpoint: usize) {
        let stopped = self.is_stopped();
        let cut = self.now < self.partition_until;
        for (count, excuse) in self.excuses.iter_mut().zip([cut, stopped]) {
            *count += u64::from(excuse);
        }
        self.checks.fences(self.now, endpoint, stopped || cut);
    }

    pub(crate) fn at(&mut self, at: Nanos, event: Event) {
        self.order += 1;
        self.queue.push(Reverse(Next { at: at.max(self.now), order: self.order, event }));
    }

    pub(crate) fn start(&mut self, host: usize) -> Result<(), String> {
        let seed = self.seed;
        if host < 2 {
            self.checks.forget_rivals();
        }
        if host < 2 && self.deaf_since.is_some() {
            // Without a two-way link it can never come into contact: a partition for who starts now.
            self.excuse_partition(Nanos::MAX);
        }
        self.hosts[host].start(self.now, seed, &self.scene, self.bug)?;
        log::set_turn(self.now, host);
        log::say(&format!("starts with term files {:?}", self.hosts[host].disk));
        for (endpoint, up) in self.hosts[host].wan_up.into_iter().enumerate() {
            if let (Some(p), false, 0..=1) = (self.hosts[host].process.as_mut(), up, host) {
                p.inbox.push_back(Input::Uplink(endpoint, up));
            }
        }
        self.wake_control(host, self.now);
        Ok(())
    }

    fn step(&mut self, event: Event) {
        match event {
            Event::Control { host, life } => self.control_turn(host, life),
            Event::Worker { host, life } => self.worker_turn(host, life),
            Event::Leave { host, life } => self.leave(host, life),
            Event::Wan(datagram) => self.wan_arrives(datagram),
            Event::Heartbeat { to, link, keys, bytes } => {
                if let Some(p) = self.reads(to)
                    && p.keys == keys
                {
                    p.inbox.push_back(Input::Heartbeat(link as u8, bytes));
                    self.wake_soon(to);
                }
            }
            Event::Steered { to, keys, what } => self.steered_arrives(to, keys, what),
            Event::Stream { to, id, sent, item } => self.stream_arrives(to, id, sent, item),
            Event::StreamUp { to, life, id, link } if self.hosts[to].suspended => {
                self.at(self.now + 50 * MS, Event::StreamUp { to, life, id, link });
            }
            Event::StreamUp { to, life, id, link } => {
                if let Some(p) = self.reads(to)
                    && p.life == life
                {
                    if p.stream.is_some() {
                        p.inbox.push_back(Input::StreamDown(false));
                    }
                    p.stream = Some(id);
                    p.keys = id;
                    p.inbox.push_back(Input::StreamUp(link as u8));
                    self.wake_soon(to);
                }
            }
            Event::Probed { from, life, link } => self.probed(from, life, link),
            Event::Tell { host, life, input } if self.hosts[host].suspended => {
                self.at(self.now + 20 * MS, Event::Tell { host, life, input });
            }
            Event::Tell { host, life, mut input } => {
                if let Input::Uplink(endpoint, up) = &mut input {
                    // However late it is told: as it is now.
                    *up = self.hosts[host].wan_up[*endpoint];
                }
                if let Some(p) = self.reads(host)
                    && p.life == life
                {
                    p.inbox.push_back(input);
                    self.wake_soon(host);
                }
            }
            Event::Address { host, life, endpoint, present } => {
                self.address(host, life, endpoint, present)
            }
            Event::Disk { host, life, endpoint, term } => self.written(host, life, endpoint, term),
            Event::Connect => {
                self.connect();
                self.at(self.now + RETRY, Event::Connect);
            }
            Event::Ask => {
                self.ask();
                self.at(self.now + ASK, Event::Ask);
            }
            Event::Traffic => {
                self.traffic_tick();
                let pause = self.dice.ms(8, 32);
                self.at(self.now + pause, Event::Traffic);
            }
            Event::Burst => self.traffic_tick(),
            Event::Rekey { again } => self.rekey(again),
            Event::Fault(fault) => self.begin(fault),
            Event::End(fault) => self.end(fault),
            Event::Vanish { host, life } => self.vanish(host, life),
            Event::Exit { host, life, down } => self.exit(host, life, down),
            Event::Direct => self.direct(),
        }
    }

    /// The process on a host, if the kernel there can put something into its sockets.
    pub(crate) fn reads(&mut self, host: usize) -> Option<&mut Process> {
        let host = &mut self.hosts[host];
        host.process.as_deref_mut().filter(|_| host.up && !host.suspended)
    }

    /// The control loop wakes up for an input.
    pub(crate) fn wake_soon(&mut self, host: usize) {
        let wake = self.hosts[host].wake(&mut self.dice);
        self.wake_control(host, self.now + wake);
    }

    pub(crate) fn wake_control(&mut self, host: usize, at: Nanos) {
        if let Some(p) = self.hosts[host].process.as_deref_mut()
            && at < p.control_due
        {
            p.control_due = at;
            let life = p.life;
            self.at(at, Event::Control { host, life });
        }
    }

    pub(crate) fn wake_worker(&mut self, host: usize, at: Nanos) {
        if let Some(p) = self.hosts[host].process.as_deref_mut()
            && at < p.worker_due
        {
            p.worker_due = at;
            let life = p.life;
            self.at(at, Event::Worker { host, life });
        }
    }

    pub(crate) fn wake_worker_soon(&mut self, host: usize) {
        let wake = self.hosts[host].wake(&mut self.dice);
        self.wake_worker(host, self.now + wake);
    }

    // ---- the WAN

    /// A datagram leaves a host from one of its endpoints: everything on the wire passes here.
    pub(crate) fn send_wan(
        &mut self,
        host: usize,
        p: &Process,
        endpoint: usize,
        mut datagram: Datagram,
    ) {
        self.must_pass(host, p, endpoint);
        let tunnel = if host < 2 { endpoint } else { self.scene.tunnel_of(host).1 };
        let kind = self
            .checks
            .wan(self.now, &datagram, tunnel, |spi| p.outbound.get(&spi).map(|out| out.key));
        match kind {
            Kind::Esp => self.look_inside(host, p, &mut datagram),
            Kind::Ike(exchange, id, response) if log::verbose() => {
                log::set_turn(self.now, host);
                let spi = datagram.bytes.get(4..12).unwrap_or_default();
                let what = if response { "response" } else { "request" };
                log::say(&format!("  IKE {exchange} {what} {id} ({spi:02x?}) to {}", datagram.to));
            }
            Kind::Ike(..) | Kind::Keepalive => {}
        }
        if !self.hosts[host].wan_up[endpoint] {
            return;
        }
        for delay in self.net.wan.copies(&mut self.dice).into_iter().flatten() {
            self.at(self.now + delay, Event::Wan(datagram.clone()));
        }
    }

    /// Opens an ESP packet on the wire. What leaves the pair must keep to its flow's tunnel.
    fn look_inside(&mut self, host: usize, p: &Process, datagram: &mut Datagram) {
        let Some(packet) = esp_of(datagram) else { return };
        let out = wire::esp::Header::parse(packet).and_then(|head| p.outbound.get(&head.spi.0));
        let Some(out) = out else { return };
        datagram.inner = self.keys.open(out.key, packet);
        let Some(inner) = datagram.inner.filter(|_| host < 2) else { return };
        let Some(flow) = self.traffic.flows.get_mut(inner.flow) else { return };
        if log::verbose() {
            log::set_turn(self.now, host);
            log::say(&format!("  sends {inner} through {}", out.endpoint));
        }
        let mut sure = p.view.sure(self.now, flow.peer);
        let entry = flow.entry_of(inner.number).filter(|entry| *entry != host);
        if let Some(entry) = entry {
            let view = self.hosts[entry].process.as_deref().map(|p| &p.view);
            for (n, sure) in sure.iter_mut().enumerate() {
                *sure &= view.is_some_and(|view| view.is_sure(self.now, (flow.peer, n)));
            }
        }
        let left = flow.leaves(inner.number, Pinned { endpoint: out.endpoint, sure });
        if let Err(why) = left
            && !self.is_stopped()
        {
            self.checks.violate(6, why);
        }
    }

    /// Whoever sends for an endpoint of the pair, or delivers, passes its fence.
    pub(crate) fn must_pass(&mut self, host: usize, p: &Process, endpoint: usize) {
        if host < 2 && self.hosts[host].local(self.now) >= p.fence[endpoint] {
            self.checks.violate(3, "something left outside the fence".into());
        } else if host < 2 && self.hosts[1 - host].passes(self.now, endpoint) {
            self.overlap(endpoint);
        }
    }

    fn wan_arrives(&mut self, datagram: Datagram) {
        let (to, endpoint) = match (endpoint_at(datagram.to.ip()), endpoint_at(datagram.from.ip()))
        {
            (Some(endpoint), _) => (self.net.switch[endpoint], endpoint),
            (None, Some(endpoint)) => {
                let peer = peer_of(datagram.to.ip(), self.scene.peers);
                (peer.map(|peer| self.scene.far_end(peer, endpoint)), 0)
            }
            (None, None) => return,
        };
        let Some(to) = to.filter(|to| self.hosts[*to].wan_up[endpoint]) else { return };
        if let (Some(inner), 0..=1) = (datagram.inner, to)
            && let Some(flow) = self.traffic.flows.get_mut(inner.flow)
        {
            flow.reaches(inner.number);
        }
        let Some(p) = self.reads(to).filter(|p| p.present[endpoint]) else { return };
        let ike = if datagram.to.port() == 500 {
            datagram.bytes.as_slice()
        } else {
            match natt::classify(&datagram.bytes) {
                natt::Datagram::Ike(ike) => ike,
                natt::Datagram::Esp(_) => {
                    if p.sealed.len() < SOCKET {
                        let peer = Some(datagram.from);
                        p.sealed.push_back(Packet { bytes: datagram.bytes, peer });
                        self.wake_worker_soon(to);
                    }
                    return;
                }
                natt::Datagram::Keepalive | natt::Datagram::Short => return,
            }
        };
        if p.inbox.len() < 4 * SOCKET {
            let bytes = ike.to_vec();
            p.inbox.push_back(Input::Ike {
                endpoint,
                from: datagram.from,
                to: datagram.to,
                bytes,
                steered: false,
            });
            self.wake_soon(to);
        }
    }

    fn address(&mut self, host: usize, life: u64, endpoint: usize, present: Option<bool>) {
        let open = self.hosts[host].passes(self.now, endpoint);
        if self.hosts[host].paused {
            let again = Event::Address { host, life, endpoint, present };
            return self.at(self.now + 5 * MS, again);
        }
        let Some(p) = self.reads(host).filter(|p| p.life == life) else { return };
        match present {
            Some(present) => p.present[endpoint] = present,
            // The fence is compared before ARP leaves, too.
            None if host < 2
                && open
                && self.hosts[host].wan_up[endpoint]
                && !self.dice.chance(self.net.deaf) =>
            {
                let before = self.net.switch[endpoint].replace(host);
                if before != Some(host) {
                    self.note_switched(host, endpoint);
                }
            }
            None => {}
        }
    }

    /// Neighbours send to another instance from now on. Direct arrivals wait there for steered packets, but not for ever:
    /// where neighbours learn of it so late that what they sent before may still be under way then, order is not kept.
    fn note_switched(&mut self, host: usize, endpoint: usize) {
        let steering = self.net.pair.delay + self.net.pair.jitter + 500 * US;
        let then = self.hosts[host].local(self.now + steering);
        let held = self.hosts[host].process.as_ref().map(|p| p.held_until[endpoint]);
        self.director.unordered |= held.is_none_or(|held| then >= held);
        for flow in &mut self.traffic.flows {
            flow.next_hop_moves(endpoint);
        }
    }

    /// Neighbours whose entry does not answer ask everybody.
    fn ask(&mut self) {
        for endpoint in 0..self.scene.endpoints.len() {
            let answers = |host: &Host| {
                host.runs()
                    && host.wan_up[endpoint]
                    && host.passes(self.now, endpoint)
                    && host.process.as_ref().is_some_and(|p| p.present[endpoint])
            };
            if self.net.switch[endpoint].is_some_and(|host| answers(&self.hosts[host])) {
                self.net.unanswered[endpoint] = 0;
                continue;
            }
            // An entry is given up after several questions without an answer.
            self.net.unanswered[endpoint] += 1;
            if self.net.switch[endpoint].is_none() || self.net.unanswered[endpoint] >= 3 {
                self.net.switch[endpoint] = (0..2).find(|host| answers(&self.hosts[*host]));
            }
        }
    }

    fn traffic_tick(&mut self) {
        let several = self.scene.endpoints.len() > 1;
        for flow in 0..self.traffic.flows.len() {
            let f = &mut self.traffic.flows[flow];
            if several && f.outward && self.dice.chance(10) {
                // Its host, or a router there, takes the other next hop from now on.
                f.via = 1 - f.via;
                f.rests_until = self.now + 3 * MS;
            }
            if self.now < f.rests_until {
                continue;
            }
            let (to, place) = if f.outward {
                (self.net.switch[f.via], f.via)
            } else {
                (Some(self.scene.far_end(f.peer, f.via)), 0)
            };
            // About as many packets in all, however many flows.
            let (low, high) = if several { (0, 2) } else { (1, 2) };
            for _ in 0..self.dice.between(low, high) {
                let Some(bytes) = self.traffic.packet(flow) else { continue };
                let Some(to) = to else { continue };
                let reads = |p: &&mut Process| p.present[place] && p.plain.len() < SOCKET;
                if let Some(p) = self.reads(to).filter(reads) {
                    p.plain.push_back(Packet { bytes, peer: None });
                    if to < 2 {
                        self.traffic.flows[flow].enters_at(to);
                    }
                    self.wake_worker_soon(to);
                }
            }
        }
    }

    /// Packets set out now and every moment for a few milliseconds.
    pub(crate) fn burst(&mut self) {
        let mut at = self.now;
        for _ in 0..12 {
            self.at(at, Event::Burst);
            at += self.dice.us(20, 400);
        }
    }

    fn rekey(&mut self, again: bool) {
        let host = self.dice.below(self.hosts.len() as u64) as usize;
        let peer = if host >= 2 {
            self.scene.tunnel_of(host).0
        } else {
            self.dice.below(self.scene.peers as u64) as usize
        };
        let (ike, children) = (self.dice.chance(400), self.dice.chance(600));
        if let Some(p) = self.reads(host) {
            let connection = crate::scene::connection_name(peer);
            p.inbox.push_back(Input::Request(gateway::Request::Rekey {
                connection,
                ike,
                children,
            }));
            self.wake_soon(host);
        }
        if again {
            let pause = self.dice.ms(300, 3_000);
            self.at(self.now + pause, Event::Rekey { again });
        }
    }

    fn written(&mut self, host: usize, life: u64, endpoint: usize, term: Term) {
        if self.hosts[host].suspended {
            return self.at(self.now + 20 * MS, Event::Disk { host, life, endpoint, term });
        }
        let alive = self.hosts[host].process.as_ref().is_some_and(|p| p.life == life);
        // A write that was under way when the process died may or may not have happened.
        if !self.hosts[host].up || !(alive || self.dice.chance(500)) {
            return;
        }
        let file = &mut self.hosts[host].disk[endpoint];
        *file = (*file).max(Some(term));
        if let Some(p) = self.reads(host).filter(|p| p.life == life) {
            p.inbox.push_back(Input::Reserved(endpoint, term));
            self.wake_soon(host);
        }
    }

    // ---- the pair link

    /// A datagram to the other instance over one link.
    pub(crate) fn send_link(&mut self, from: usize, link: usize, event: impl Fn() -> Event) {
        if !self.net.carries(link, from) || !self.hosts[from].up {
            return;
        }
        for delay in self.net.pair.copies(&mut self.dice).into_iter().flatten() {
            self.at(self.now + delay, event());
        }
    }

    pub(crate) fn send_item(&mut self, from: usize, p: &Process, item: Item) {
        let Some(id) = p.stream else { return };
        if self.net.stream.as_ref().is_none_or(|stream| stream.id != id) {
            return;
        }
        if let Some(at) = self.net.stream_at(self.now, from, &item, &mut self.dice) {
            self.at(at, Event::Stream { to: 1 - from, id, sent: self.now, item });
        }
    }

    fn stream_arrives(&mut self, to: usize, id: u64, sent: Nanos, item: Item) {
        let from = 1 - to;
        if self.hosts[to].suspended {
            // TCP tries again.
            return self.at(self.now + 100 * MS, Event::Stream { to, id, sent, item });
        }
        let newest = self.net.stream.as_ref().filter(|stream| stream.id == id);
        let lost = newest.is_some_and(|stream| sent > stream.lost_after[from])
            && matches!(item, Item::Frame(_));
        let up = self.hosts[to].up;
        match self.reads(to) {
            Some(p) if p.stream == Some(id) => {
                match item {
                    Item::Frame(_) if lost => return,
                    Item::Frame(bytes) => p.inbox.push_back(Input::Frame(bytes)),
                    Item::End { goodbye } => {
                        p.stream = None;
                        p.inbox.push_back(Input::StreamDown(goodbye));
                    }
                }
                self.wake_soon(to);
            }
            // Nobody there knows it: the kernel resets it.
            _ if up => {
                let answers = newest_is(&self.net.stream, id) && self.net.carries_stream(to);
                if answers && matches!(item, Item::Frame(_)) {
                    let at = self.now + self.net.pair.delay(&mut self.dice);
                    let item = Item::End { goodbye: false };
                    self.at(at, Event::Stream { to: from, id, sent: self.now, item });
                }
            }
            _ => {}
        }
    }

    /// Something for the other instance sets out.
    pub(crate) fn steer(&mut self, host: usize, keys: u64, what: &Steered) {
        if host >= 2 {
            return;
        }
        let link = self.net.two_way().unwrap_or(0);
        if !self.net.carries(link, host) || !self.hosts[host].up {
            return;
        }
        if let Steered::Packet(packet) = what {
            self.crosses(packet);
            if log::verbose() {
                log::set_turn(self.now, host);
                let Handed { endpoint, plain, back, .. } = packet;
                let inner = crate::traffic::inner(&packet.bytes).filter(|_| *plain);
                let what = inner.map_or("ESP".into(), |inner| inner.to_string());
                let back = if *back { ", back" } else { "" };
                log::say(&format!("  steers {what} for {endpoint}{back}"));
            }
        }
        // The link refuses a second copy.
        let Some(delay) = self.net.pair.copies(&mut self.dice)[0] else { return };
        let mut at = self.now + delay;
        if self.net.pair.loss == 0 {
            at = at.max(self.net.steered_at[host] + 1);
            self.net.steered_at[host] = at;
        }
        self.at(at, Event::Steered { to: 1 - host, keys, what: what.clone() });
    }

    /// ha.md, "Switchover": steered packets are never steered again, but back, once, while an endpoint moves. Seen on
    /// inner packets, of which there is one copy of each.
    fn crosses(&mut self, packet: &Handed) {
        if !packet.plain {
            return;
        }
        let before = self.crossings.entry(hash(&packet.bytes)).or_default();
        *before = before.saturating_add(1);
        let times = *before;
        if times > 2 || (times == 2) != packet.back {
            let text =
                format!("a packet crossed the pair link {times} times (back: {})", packet.back);
            self.checks.violate(0, text);
        }
    }

    fn steered_arrives(&mut self, to: usize, keys: u64, what: Steered) {
        let Some(p) = self.reads(to).filter(|p| p.keys == keys) else { return };
        p.inbox.push_back(match what {
            Steered::Ike(endpoint, from, to, bytes) => {
                Input::Ike { endpoint, from, to, bytes, steered: true }
            }
            Steered::Packet(packet) if p.inbox.len() < 4 * SOCKET => Input::Handed(packet),
            Steered::Packet(_) => return,
        });
        self.wake_soon(to);
    }

    fn probed(&mut self, from: usize, life: u64, link: usize) {
        let to = 1 - from;
        let there = self.net.carries(link, from) && self.net.carries(link, to) && self.hosts[to].up;
        let open = self.hosts[to].process.is_some() || self.now < self.hosts[to].closing_until;
        let result = match (there, open) {
            (false, _) => ha::Probe::Unknown,
            (true, true) => ha::Probe::Accepted,
            (true, false) => ha::Probe::Refused,
        };
        let delay = if there { self.net.pair.delay(&mut self.dice) } else { 100 * MS };
        self.at(
            self.now + delay,
            Event::Tell { host: from, life, input: Input::Probe(link as u8, result) },
        );
    }

    fn connect(&mut self) {
        if !self.hosts[0].runs() || !self.hosts[1].runs() {
            return;
        }
        let (Some(left), Some(right)) = (&self.hosts[0].process, &self.hosts[1].process) else {
            return;
        };
        if left.stream.is_some() || left.stopping || right.stopping {
            return;
        }
        let lives = [left.life, right.life];
        let Some(link) = self.net.two_way() else { return };
        self.net.streams += 1;
        let id = self.net.streams;
        self.net.stream = Some(Stream {
            id,
            link,
            next_at: [self.now; 2],
            lost_after: [Nanos::MAX; 2],
            stalled: [Vec::new(), Vec::new()],
        });
        for (to, life) in lives.into_iter().enumerate() {
            let delay = self.net.pair.delay(&mut self.dice) * 2 + self.dice.us(100, 1_500);
            let at = self.now + delay;
            if let Some(stream) = &mut self.net.stream {
                // What is said arrives after the other end stands, too.
                stream.next_at[1 - to] = stream.next_at[1 - to].max(at + 1);
            }
            self.at(at, Event::StreamUp { to, life, id, link });
        }
    }

    /// A link works again: what TCP still holds is sent anew.
    pub(crate) fn thaw_stream(&mut self) {
        for from in 0..2 {
            let Some(stream) = &mut self.net.stream else { return };
            if !self.net.links.get(stream.link).is_some_and(|link| link[from]) {
                continue;
            }
            let id = stream.id;
            let waiting = std::mem::take(&mut stream.stalled[from]);
            let mut at = self.now + self.dice.ms(1, 200);
            for (sent, item) in waiting {
                at += 1_000;
                if let Some(stream) = &mut self.net.stream {
                    at = at.max(stream.next_at[from] + 1);
                    stream.next_at[from] = at;
                }
                self.at(at, Event::Stream { to: 1 - from, id, sent, item });
            }
        }
    }

    // ---- the end of processes

    /// The process is gone at once; the kernel closes its sockets if the machine lives.
    pub(crate) fn gone(&mut self, host: usize, p: &Process, goodbye: bool) {
        log::set_turn(self.now, host);
        log::say("is gone");
        if host < 2 {
            self.checks.forget_rivals();
        }
        if host >= 2 || !self.hosts[host].up {
            return;
        }
        let teardown = self.dice.us(500, 15_000);
        self.hosts[host].closing_until = self.now + teardown;
        let Some(id) = p.stream else { return };
        let reset = self.dice.chance(500).then(|| self.now.saturating_sub(self.dice.us(0, 1_000)));
        let item = Item::End { goodbye };
        let at = self.net.stream_at(self.now + teardown, host, &item, &mut self.dice);
        if let Some(stream) = self.net.stream.as_mut().filter(|stream| stream.id == id) {
            if let Some(reset) = reset {
                stream.lost_after[host] = reset;
            }
            if let Some(at) = at {
                self.at(at, Event::Stream { to: 1 - host, id, sent: self.now, item });
            }
        }
    }

    fn exit(&mut self, host: usize, life: u64, down: Nanos) {
        if self.hosts[host].process.as_ref().is_some_and(|p| p.life == life)
            && let Some(p) = self.hosts[host].process.take()
        {
            self.gone(host, &p, true);
            self.at(
                self.now + down,
                Event::End(Fault::Crash { host, down, outputs: None, lost_file: false }),
            );
        }
    }

    /// What an instance is for its endpoints, by its own pair protocol.
    pub(crate) fn pair_status(&self, host: usize) -> Option<Vec<ha::EndpointStatus>> {
        let host = self.hosts.get(host)?;
        let p = host.process.as_ref()?;
        Some(p.gateway.pair().status(host.local(self.now)).endpoints)
    }

    /// The same for one endpoint.
    pub(crate) fn endpoint_status(
        &self,
        host: usize,
        endpoint: usize,
    ) -> Option<ha::EndpointStatus> {
        self.pair_status(host)?.into_iter().nth(endpoint)
    }

    /// An instance had its turn: both logs are compared where they can be.
    pub(crate) fn compare_logs(&mut self, turned: usize) {
        let status = [self.pair_status(0), self.pair_status(1)];
        if let (Some(p), Some(status)) = (&mut self.hosts[turned].process, &status[turned]) {
            for (synced, status) in p.synced.iter_mut().zip(status) {
                *synced =
                    matches!(status.role, ha::Role::Owner(ha::Mode::Synced) | ha::Role::Offering);
            }
        }
        let [Some(a), Some(b)] = status else { return };
        let (Some(left), Some(right)) = (&self.hosts[0].process, &self.hosts[1].process) else {
            return;
        };
        for (n, (a, b)) in a.iter().zip(&b).enumerate() {
            self.checks.healed(n, [a, b]);
            self.checks.logs(n, [left.gateway.pair(), right.gateway.pair()], [a, b]);
            for (host, p, status) in [(0, left, a), (1, right, b)] {
                if status.role == (ha::Role::Shadow { synced: true })
                    && self.checks.is_new_to_look_at(p.life, status)
                {
                    let now = self.hosts[host].local(self.now);
                    let held = p.gateway.held_records(now, wire::id::EndpointId(n as u8));
                    let log = p.gateway.pair().values(status.endpoint).map(|(key, _)| key);
                    self.checks.installed(held, log.collect());
                }
            }
        }
    }

    /// One line about both instances.
    pub(crate) fn describe(&self) -> String {
        let one =
            |s: &ha::EndpointStatus| format!("{:?} term {} pos {}", s.role, s.term.0, s.position.0);
        let of = |host: usize| match self.pair_status(host) {
            Some(status) => {
                let list: Vec<String> = status.iter().map(one).collect();
                format!("{} {}", name_of(host), list.join(" and "))
            }
            None => format!("{} dead", name_of(host)),
        };
        let flows: Vec<String> = self
            .traffic
            .flows
            .iter()
            .map(|f| {
                format!("{}/{} ({} ms)", f.arrived, f.next, self.now.saturating_sub(f.last) / MS)
            })
            .collect();
        format!("{}; {}; switch {:?}; flows {}", of(0), of(1), self.net.switch, flows.join(" "))
    }

    /// Whether packets of every flow arrived since then.
    pub(crate) fn flowing(&self, since: Nanos) -> bool {
        self.traffic.flows.iter().all(|flow| flow.last > since)
    }

    /// The longest silence of any flow.
    pub(crate) fn silence(&self) -> Nanos {
        self.traffic.flows.iter().map(|flow| self.now.saturating_sub(flow.last)).max().unwrap_or(0)
    }

    /// A moment after which nothing excuses an overlap.
    pub(crate) fn excuse_partition(&mut self, until: Nanos) {
        self.partition_until = self.partition_until.max(until.min(Nanos::MAX - S));
    }
}

fn newest_is(stream: &Option<Stream>, id: u64) -> bool {
    stream.as_ref().is_some_and(|stream| stream.id == id)
}
