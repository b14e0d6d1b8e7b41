//! The world: hosts, what lies between them, and the queue of what happens next. One seed, one course of events.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::net::IpAddr;

use wire::id::Term;
use wire::natt;

use crate::bugs::Bug;
use crate::checks::{Checks, Kind};
use crate::clock::{MS, Nanos, S};
use crate::dice::Dice;
use crate::director::Director;
use crate::faults::Fault;
use crate::host::{Host, Input, Packet, Process};
use crate::log;
use crate::network::{Datagram, Item, Network, Stream};
use crate::scene::{Scene, VIRTUAL, name_of, peer_of};
use crate::traffic::Traffic;
use crate::turns::MAIN;

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
    Address { host: usize, life: u64, present: Option<bool> },
    /// A term is on disk.
    Disk { host: usize, life: u64, term: Term },
    /// The instances try to connect.
    Connect,
    /// Neighbours ask for the virtual address.
    Ask,
    /// Inner packets set out.
    Traffic,
    /// Somebody rekeys, now and then, or just once.
    Rekey { again: bool },
    /// A fault begins.
    Fault(Fault),
    /// It ends.
    End(Fault),
    /// A process that said goodbye is gone.
    Exit { host: usize, life: u64, down: Nanos },
    /// The director looks around.
    Direct,
}

/// What is steered.
#[derive(Debug, Clone)]
pub(crate) enum Steered {
    /// An inner packet, and whether it is handed back.
    Plain(Vec<u8>, bool),
    /// The same for an ESP packet.
    Esp(Vec<u8>, bool),
    Ike(std::net::SocketAddr, std::net::SocketAddr, Vec<u8>),
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
        let hosts = (0..2 + scene.peers).map(|index| Host::new(index, 0, &mut dice)).collect();
        let director = Director::new(&mut dice);
        let mut world = Self {
            seed,
            now: 0,
            order: 0,
            queue: BinaryHeap::new(),
            traffic: Traffic::new(scene.peers),
            scene,
            hosts,
            net,
            checks: Checks::default(),
            dice,
            bug,
            director,
            batch: esp::Batch::new(64, 512),
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
        if self.hosts[0].passes(self.now) && self.hosts[1].passes(self.now) {
            self.overlap();
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

    /// Both instances pass the fence now.
    fn overlap(&mut self) {
        let stopped = self.hosts.iter().take(2).any(|host| self.now < host.stopped_until);
        let cut = self.now < self.partition_until;
        for (count, excuse) in self.excuses.iter_mut().zip([cut, stopped]) {
            *count += u64::from(excuse);
        }
        self.checks.fences(self.now, stopped || cut);
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
        log::say(&format!("starts with term file {:?}", self.hosts[host].disk));
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
            Event::Tell { host, life, input } => {
                if let Some(p) = self.reads(host)
                    && p.life == life
                {
                    p.inbox.push_back(input);
                    self.wake_soon(host);
                }
            }
            Event::Address { host, life, present } => self.address(host, life, present),
            Event::Disk { host, life, term } => self.written(host, life, term),
            Event::Connect => {
                self.connect();
                self.at(self.now + RETRY, Event::Connect);
            }
            Event::Ask => {
                self.ask();
                self.at(self.now + ASK, Event::Ask);
            }
            Event::Traffic => self.traffic_tick(),
            Event::Rekey { again } => self.rekey(again),
            Event::Fault(fault) => self.begin(fault),
            Event::End(fault) => self.end(fault),
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

    /// A datagram leaves a host: everything on the wire passes here.
    pub(crate) fn send_wan(&mut self, host: usize, p: &Process, datagram: Datagram) {
        self.must_pass(host, p);
        let kind =
            self.checks.wan(self.now, &datagram, |spi| p.outbound.get(&spi).map(|out| out.key));
        if let Kind::Ike(exchange, id, response) = kind
            && log::verbose()
        {
            log::set_turn(self.now, host);
            let spi = datagram.bytes.get(4..12).unwrap_or_default();
            let what = if response { "response" } else { "request" };
            log::say(&format!("  IKE {exchange} {what} {id} ({spi:02x?}) to {}", datagram.to));
        }
        if !self.hosts[host].wan_up {
            return;
        }
        for delay in self.net.wan.copies(&mut self.dice).into_iter().flatten() {
            self.at(self.now + delay, Event::Wan(datagram.clone()));
        }
    }

    /// Whoever sends for the pair, or delivers, passes the fence.
    pub(crate) fn must_pass(&mut self, host: usize, p: &Process) {
        if host < 2 && self.hosts[host].local(self.now) >= p.fence {
            self.checks.violate(3, "something left outside the fence".into());
        } else if host < 2 && self.hosts[1 - host].passes(self.now) {
            self.overlap();
        }
    }

    fn wan_arrives(&mut self, datagram: Datagram) {
        let to = if datagram.to.ip() == IpAddr::V4(VIRTUAL) {
            self.net.switch
        } else {
            peer_of(datagram.to.ip(), self.scene.peers).map(|peer| peer + 2)
        };
        let Some(to) = to.filter(|to| self.hosts[*to].wan_up) else { return };
        let Some(p) = self.reads(to).filter(|p| p.present) else { return };
        let ike = if datagram.to.port() == 500 {
            datagram.bytes.as_slice()
        } else {
            match natt::classify(&datagram.bytes) {
                natt::Datagram::Ike(ike) => ike,
                natt::Datagram::Esp(_) => {
                    if p.sealed.len() < SOCKET {
                        let packet = Packet {
                            bytes: datagram.bytes,
                            peer: Some(datagram.from),
                            steered: None,
                        };
                        p.sealed.push_back(packet);
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
                from: datagram.from,
                to: datagram.to,
                bytes,
                steered: false,
            });
            self.wake_soon(to);
        }
    }

    fn address(&mut self, host: usize, life: u64, present: Option<bool>) {
        let open = self.hosts[host].passes(self.now);
        if self.hosts[host].paused {
            return self.at(self.now + 5 * MS, Event::Address { host, life, present });
        }
        let Some(p) = self.reads(host).filter(|p| p.life == life) else { return };
        match present {
            Some(present) => p.present = present,
            // The fence is compared before ARP leaves, too.
            None if host < 2
                && open
                && self.hosts[host].wan_up
                && !self.dice.chance(self.net.deaf) =>
            {
                self.net.switch = Some(host);
            }
            None => {}
        }
    }

    /// Neighbours whose entry does not answer ask everybody.
    fn ask(&mut self) {
        let answers = |host: &Host| {
            host.runs()
                && host.wan_up
                && host.passes(self.now)
                && host.process.as_ref().is_some_and(|p| p.present)
        };
        if self.net.switch.is_some_and(|host| answers(&self.hosts[host])) {
            self.net.unanswered = 0;
            return;
        }
        // An entry is given up after several questions without an answer.
        self.net.unanswered += 1;
        if self.net.switch.is_none() || self.net.unanswered >= 3 {
            self.net.switch = (0..2).find(|host| answers(&self.hosts[*host]));
        }
    }

    fn traffic_tick(&mut self) {
        for flow in 0..self.traffic.flows.len() {
            let outward = self.traffic.flows[flow].outward;
            let to =
                if outward { self.net.switch } else { Some(2 + self.traffic.flows[flow].peer) };
            for _ in 0..self.dice.between(1, 2) {
                let Some(bytes) = self.traffic.packet(flow) else { continue };
                let Some(to) = to else { continue };
                if let Some(p) = self.reads(to).filter(|p| p.present && p.plain.len() < SOCKET) {
                    p.plain.push_back(Packet { bytes, peer: None, steered: None });
                    self.wake_worker_soon(to);
                }
            }
        }
        let pause = self.dice.ms(8, 32);
        self.at(self.now + pause, Event::Traffic);
    }

    fn rekey(&mut self, again: bool) {
        let host = self.dice.below(self.hosts.len() as u64) as usize;
        let peer =
            if host >= 2 { host - 2 } else { self.dice.below(self.scene.peers as u64) as usize };
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

    fn written(&mut self, host: usize, life: u64, term: Term) {
        if self.hosts[host].suspended {
            return self.at(self.now + 20 * MS, Event::Disk { host, life, term });
        }
        let alive = self.hosts[host].process.as_ref().is_some_and(|p| p.life == life);
        // A write that was under way when the process died may or may not have happened.
        if !self.hosts[host].up || !(alive || self.dice.chance(500)) {
            return;
        }
        self.hosts[host].disk = self.hosts[host].disk.max(Some(term));
        if let Some(p) = self.reads(host).filter(|p| p.life == life) {
            p.inbox.push_back(Input::Reserved(term));
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

    fn steered_arrives(&mut self, to: usize, keys: u64, what: Steered) {
        let Some(p) = self.reads(to).filter(|p| p.keys == keys) else { return };
        match what {
            Steered::Ike(from, at, bytes) => {
                p.inbox.push_back(Input::Ike { from, to: at, bytes, steered: true });
                self.wake_soon(to);
            }
            Steered::Plain(bytes, back) => {
                let steered = Some(esp::Steered { endpoint: MAIN, back });
                p.plain.push_back(Packet { bytes, peer: None, steered });
                self.wake_worker_soon(to);
            }
            Steered::Esp(bytes, back) => {
                let steered = Some(esp::Steered { endpoint: MAIN, back });
                p.sealed.push_back(Packet { bytes, peer: None, steered });
                self.wake_worker_soon(to);
            }
        }
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

    /// What an instance is for the endpoint, by its own pair protocol.
    pub(crate) fn pair_status(&self, host: usize) -> Option<ha::EndpointStatus> {
        let host = self.hosts.get(host)?;
        let p = host.process.as_ref()?;
        p.gateway.pair().status(host.local(self.now)).endpoints.into_iter().next()
    }

    /// Both logs are compared where they can be.
    pub(crate) fn compare_logs(&mut self) {
        let (Some(a), Some(b)) = (self.pair_status(0), self.pair_status(1)) else { return };
        self.checks.healed([&a, &b]);
        if let (Some(left), Some(right)) = (&self.hosts[0].process, &self.hosts[1].process) {
            self.checks.logs([left.gateway.pair(), right.gateway.pair()], [&a, &b]);
            for (host, p, status) in [(0, left, &a), (1, right, &b)] {
                if status.role == (ha::Role::Shadow { synced: true }) {
                    let now = self.hosts[host].local(self.now);
                    let held = p.gateway.held_records(now, wire::id::EndpointId(0));
                    let log = p.gateway.pair().values(ha::EndpointId(0)).map(|(key, _)| key);
                    self.checks.installed(held, log.collect());
                }
            }
        }
    }

    /// One line about both instances.
    pub(crate) fn describe(&self) -> String {
        let of = |host: usize| match self.pair_status(host) {
            Some(s) => {
                format!("{} {:?} term {} pos {}", name_of(host), s.role, s.term.0, s.position.0)
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
