//! The world: hosts, what lies between them, and the queue of what happens next. One seed, one course of events.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use wire::id::Term;

use crate::bugs::Bug;
use crate::checks::Checks;
use crate::clock::{MS, Nanos, S};
use crate::dice::Dice;
use crate::director::Director;
use crate::faults::Fault;
use crate::host::{Handed, Host, Input, Process};
use crate::log;
use crate::network::{Datagram, Item, Network};
use crate::pins::Keys;
use crate::planned::Homes;
use crate::scene::{Scene, name_of};
use crate::traffic::Traffic;

/// Packets that a socket or the TUN holds for a daemon that does not read.
pub(crate) const SOCKET: usize = 512;
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
    pub(crate) crossings: HashMap<u64, u8>,
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
    pub(crate) fn overlap(&mut self, endpoint: usize) {
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
