//! The modelled hosts and network.
//!
//! True time is in microseconds. Each host has a clock with its own zero and rate, a process that
//! may be dead or stopped, sockets that hold what arrives meanwhile, and a disk with term files.
//! Two links carry heartbeats; the stream runs over one of them, in order, and stalls while that
//! link is cut. A killed process's kernel sends FIN and refuses connections; a host without power
//! does neither.

use super::gateway::{Gateway, Ledger};
use crate::*;
use core::time::Duration;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};

pub(super) type Us = u64;
pub(super) const MS: Us = 1000;

pub(super) struct Rng(pub(super) u64);

impl Rng {
    pub(super) fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(super) fn below(&mut self, n: u64) -> u64 {
        self.draw() % n.max(1)
    }

    pub(super) fn chance(&mut self, percent: u64) -> bool {
        self.below(1000) < percent * 10
    }
}

pub(super) enum Input {
    /// The stream whose keys protect it, the link, the bytes.
    Heartbeat(usize, u8, Vec<u8>),
    Frame(usize, Vec<u8>),
    StreamUp(usize, u8),
    StreamDown(usize, bool),
    Probe(u8, Probe),
    Act(Act),
}

/// What a host does to itself, a little later.
#[derive(Debug)]
pub(super) enum Act {
    Reserved(u8, Term),
    Applied(u8, ApplyId),
    Confirm(u8, SyncId),
    Counters(u8),
    Tick(u8),
    Uplink(u8, bool),
    Switchover(u8),
    Goodbye,
}

enum Happening {
    Wake(usize, u64),
    Timer(usize, u64),
    Heartbeat { to: usize, keys: usize, link: u8, bytes: Vec<u8> },
    Pump { stream: usize, to: usize },
    ProbeArrives { from: usize, link: u8 },
    Act { host: usize, run: u64, act: Act },
    Input { host: usize, run: u64, input: Input },
    Fin { stream: usize, to: usize },
    Connect,
    Fault(Fault),
}

#[derive(Clone, Debug)]
pub(super) enum Fault {
    Kill(usize),
    PowerOff(usize),
    Start {
        host: usize,
        lose_terms: bool,
    },
    Pause(usize, Us),
    Resume(usize),
    /// Both links, or one; both directions, or one (the direction towards a host).
    Cut {
        link: Option<u8>,
        towards: Option<usize>,
        cut: bool,
    },
    Loss(u64),
    Delay(Us, Us),
    /// The stream alone is slow, by up to this.
    Stall(Us),
    Duplicate(u64),
    SlowShadow(Us),
    Busy(usize, Us),
    Uplink(usize, u8, bool),
    Switchover(u8),
    Goodbye(usize),
}

enum Item {
    Frame(Vec<u8>),
    Fin(bool),
}

struct Stream {
    link: u8,
    runs: [u64; 2],
    queues: [VecDeque<Item>; 2],
}

pub(super) struct Host {
    pub(super) pair: Option<Pair>,
    pub(super) gateway: Vec<Gateway>,
    /// Counts starts; what belongs to an earlier run is dropped.
    pub(super) run: u64,
    pub(super) paused: bool,
    powered: bool,
    listener_until: Us,
    zero: Us,
    /// Clock rate in per mille.
    pub(super) rate: u64,
    pub(super) disk: Vec<Option<Term>>,
    pub(super) lost_terms: bool,
    inbox: VecDeque<Input>,
    stream: Option<usize>,
    /// The newest stream, whose keys protect heartbeats.
    keys: Option<usize>,
    keys_in: Option<usize>,
    timer: u64,
    busy: Us,
}

pub(super) struct World {
    pub(super) now: Us,
    pub(super) rng: Rng,
    heap: BinaryHeap<Reverse<(Us, u64)>>,
    happenings: BTreeMap<(Us, u64), Happening>,
    serial: u64,
    pub(super) hosts: [Host; 2],
    streams: Vec<Stream>,
    /// `cut[link][towards]`.
    cut: [[bool; 2]; 2],
    loss: u64,
    delay: (Us, Us),
    duplicate: u64,
    stall: Us,
    pub(super) slow: Us,
    pub(super) ledger: Ledger,
    /// Last arrival of a heartbeat towards a host, and the last longer gaps that ended: when, how
    /// long.
    arrival: [Us; 2],
    gaps: [VecDeque<(Us, Us)>; 2],
    pub(super) endpoints: u8,
    bug: Bug,
    pub(super) verbose: bool,
    pub(super) boot_wait: Us,
    pub(super) workload: bool,
    /// Percent of switchovers whose counters come too late.
    pub(super) slow_counters: u64,
    pub(super) tweak: fn(usize, &mut Config),
}

impl World {
    pub(super) fn new(seed: u64, endpoints: u8, bug: Bug) -> World {
        let mut rng = Rng(seed);
        let host = |rng: &mut Rng| Host {
            pair: None,
            gateway: Vec::new(),
            run: 0,
            paused: false,
            powered: true,
            listener_until: 0,
            zero: 1_000_000 + rng.below(1_000_000_000),
            rate: 1000,
            disk: vec![Some(Term(0)); usize::from(endpoints)],
            lost_terms: false,
            inbox: VecDeque::new(),
            stream: None,
            keys: None,
            keys_in: None,
            timer: 0,
            busy: 0,
        };
        let hosts = [host(&mut rng), host(&mut rng)];
        let mut world = World {
            now: 1_000_000,
            rng,
            heap: BinaryHeap::new(),
            happenings: BTreeMap::new(),
            serial: 0,
            hosts,
            streams: Vec::new(),
            cut: [[false; 2]; 2],
            loss: 0,
            delay: (300, 200),
            duplicate: 0,
            stall: 0,
            slow: 0,
            ledger: Ledger::default(),
            arrival: [0; 2],
            gaps: [VecDeque::new(), VecDeque::new()],
            endpoints,
            bug,
            verbose: false,
            boot_wait: 1000 * MS,
            workload: true,
            slow_counters: 0,
            tweak: |_, _| {},
        };
        world.at(world.now, Happening::Connect);
        world
    }

    fn at(&mut self, at: Us, happening: Happening) {
        self.serial += 1;
        self.heap.push(Reverse((at, self.serial)));
        self.happenings.insert((at, self.serial), happening);
    }

    pub(super) fn fault_at(&mut self, at: Us, fault: Fault) {
        self.at(at, Happening::Fault(fault));
    }

    pub(super) fn fault(&mut self, fault: Fault) {
        let now = self.now;
        self.fault_at(now, fault);
        self.run_until(now);
    }

    pub(super) fn act(&mut self, host: usize, after: Us, act: Act) {
        let run = self.hosts[host].run;
        self.at(self.now + after, Happening::Act { host, run, act });
    }

    pub(super) fn local(&self, host: usize) -> Duration {
        let host = &self.hosts[host];
        Duration::from_micros(host.zero + self.now * host.rate / 1000)
    }

    fn true_time(&self, host: usize, local: Duration) -> Us {
        let host = &self.hosts[host];
        let local = u64::try_from(local.as_micros()).unwrap() + 1;
        (local.saturating_sub(host.zero) * 1000).div_ceil(host.rate)
    }

    pub(super) fn note(&mut self, host: usize, text: String) {
        if self.verbose {
            let now = self.now;
            println!("{:>9.3} ms  {}  {text}", now as f64 / 1000.0, ["left ", "right"][host]);
        }
    }

    pub(super) fn fail(&self, what: &str) -> ! {
        let mut text = format!("at {} µs: {what}", self.now);
        for (n, host) in self.hosts.iter().enumerate() {
            if let Some(pair) = &host.pair {
                let status = pair.status(self.local(n));
                text += &format!(
                    "\n  host {n} paused {} contact {} joined {}: {:?}",
                    host.paused, status.contact, status.joined, status.endpoints
                );
            } else {
                text += &format!("\n  host {n} dead");
            }
        }
        // Not a panic: the hook would print what the search for deliberate bugs finds.
        std::panic::resume_unwind(Box::new(text))
    }

    pub(super) fn config(&self, host: usize) -> Config {
        let names = ["left", "right"];
        let mut config = Config {
            links: 2,
            boot_wait: Duration::from_micros(self.boot_wait),
            endpoints: (0..self.endpoints)
                .map(|n| EndpointConfig {
                    name: format!("endpoint{n}"),
                    home_is_me: usize::from(n) % 2 == host,
                    adopted: true,
                })
                .collect(),
            ..Config::new(names[host], host as u8, names[1 - host])
        };
        (self.tweak)(host, &mut config);
        config
    }

    pub(super) fn start(&mut self, host: usize, lose_terms: bool) {
        if self.hosts[host].pair.is_some() {
            return;
        }
        if lose_terms {
            self.hosts[host].disk.fill(None);
            self.hosts[host].lost_terms = true;
        }
        let seed = self.rng.draw();
        let config = self.config(host);
        let local = self.local(host);
        let h = &mut self.hosts[host];
        let mut pair = Pair::new(config, local, seed, &h.disk).unwrap();
        pair.set_bug(self.bug);
        h.pair = Some(pair);
        h.gateway = (0..self.endpoints).map(|_| Gateway::default()).collect();
        h.run += 1;
        h.paused = false;
        h.powered = true;
        h.inbox.clear();
        h.stream = None;
        h.keys = None;
        h.keys_in = None;
        h.listener_until = Us::MAX;
        let run = h.run;
        self.ledger.matched(host);
        // While one was dead there was nobody to hear: that is no partition.
        self.arrival = [self.now; 2];
        self.gaps.iter_mut().for_each(VecDeque::clear);
        self.note(host, "start".into());
        for n in 0..self.endpoints {
            self.act(host, 5 * MS, Act::Tick(n));
        }
        self.at(self.now, Happening::Wake(host, run));
    }

    fn die(&mut self, host: usize, power: bool) {
        if self.hosts[host].pair.take().is_none() {
            return;
        }
        self.note(host, format!("dies (power: {power})"));
        let (fin, refuse) = (1 + self.rng.below(6 * MS), 1 + self.rng.below(6 * MS));
        let now = self.now;
        let h = &mut self.hosts[host];
        h.powered = !power;
        h.paused = false;
        h.gateway.clear();
        h.listener_until = now + refuse;
        if let Some(stream) = h.stream.take()
            && !power
        {
            self.at(now + fin, Happening::Fin { stream, to: 1 - host });
        }
    }

    pub(super) fn run_for(&mut self, us: Us) {
        self.run_until(self.now + us);
    }

    pub(super) fn run_until(&mut self, until: Us) {
        while let Some(Reverse((at, serial))) = self.heap.peek().copied() {
            if at > until {
                break;
            }
            self.heap.pop();
            self.now = self.now.max(at);
            let happening = self.happenings.remove(&(at, serial)).unwrap();
            self.step(happening);
            self.check();
        }
        self.now = self.now.max(until);
        self.check();
    }

    fn step(&mut self, happening: Happening) {
        match happening {
            Happening::Wake(host, run) => {
                let h = &self.hosts[host];
                if h.run == run && h.pair.is_some() && !h.paused {
                    self.turn(host);
                }
            }
            Happening::Timer(host, token) => {
                let h = &self.hosts[host];
                if h.timer == token && h.pair.is_some() && !h.paused {
                    self.turn(host);
                }
            }
            Happening::Heartbeat { to, keys, link, bytes } => {
                if !self.hosts[to].powered || self.hosts[to].pair.is_none() {
                    return;
                }
                // Without the first frame of that stream the receiver lacks the keys.
                if self.hosts[to].keys_in != Some(keys) {
                    return;
                }
                let gap = self.now - self.arrival[to];
                if gap > 30 * MS {
                    let now = self.now;
                    self.gaps[to].push_back((now, gap));
                }
                self.arrival[to] = self.now;
                self.input(to, Input::Heartbeat(keys, link, bytes));
            }
            Happening::Pump { stream, to } => self.pump(stream, to),
            Happening::Fin { stream, to } => {
                self.streams[stream].queues[to].push_back(Item::Fin(false));
                self.pump(stream, to);
            }
            Happening::ProbeArrives { from, link } => {
                let to = 1 - from;
                let h = &self.hosts[to];
                let cut = self.cut[usize::from(link)].contains(&true);
                let (result, after) = if cut || !h.powered {
                    (Probe::Unknown, 50 * MS)
                } else if h.pair.is_some() || self.now < h.listener_until {
                    (Probe::Accepted, self.latency())
                } else {
                    (Probe::Refused, self.latency())
                };
                let run = self.hosts[from].run;
                let input = Input::Probe(link, result);
                self.at(self.now + after, Happening::Input { host: from, run, input });
            }
            Happening::Act { host, run, act } => {
                if self.hosts[host].run == run && self.hosts[host].pair.is_some() {
                    self.input(host, Input::Act(act));
                }
            }
            Happening::Input { host, run, input } => {
                if self.hosts[host].run == run && self.hosts[host].pair.is_some() {
                    self.input(host, input);
                }
            }
            Happening::Connect => {
                self.connect();
                self.at(self.now + 200 * MS, Happening::Connect);
            }
            Happening::Fault(fault) => self.do_fault(fault),
        }
    }

    fn do_fault(&mut self, fault: Fault) {
        if self.verbose {
            println!("{:>9.3} ms  ----- {fault:?}", self.now as f64 / 1000.0);
        }
        match fault {
            Fault::Kill(host) => self.die(host, false),
            Fault::PowerOff(host) => self.die(host, true),
            Fault::Start { host, lose_terms } => self.start(host, lose_terms),
            Fault::Pause(host, us) => {
                if self.hosts[host].pair.is_some() {
                    self.hosts[host].paused = true;
                    self.fault_at(self.now + us, Fault::Resume(host));
                }
            }
            Fault::Resume(host) => {
                self.hosts[host].paused = false;
                let run = self.hosts[host].run;
                self.at(self.now, Happening::Wake(host, run));
            }
            Fault::Cut { link, towards, cut } => {
                for (n, directions) in self.cut.iter_mut().enumerate() {
                    for (to, state) in directions.iter_mut().enumerate() {
                        if link.is_none_or(|l| usize::from(l) == n)
                            && towards.is_none_or(|t| t == to)
                        {
                            *state = cut;
                        }
                    }
                }
            }
            Fault::Loss(percent) => self.loss = percent,
            Fault::Delay(base, jitter) => self.delay = (base, jitter),
            Fault::Stall(us) => self.stall = us,
            Fault::Duplicate(percent) => self.duplicate = percent,
            Fault::SlowShadow(us) => self.slow = us,
            Fault::Busy(host, us) => self.hosts[host].busy = us,
            Fault::Uplink(host, endpoint, up) => self.act(host, 0, Act::Uplink(endpoint, up)),
            Fault::Switchover(endpoint) => {
                for host in 0..2 {
                    self.act(host, 0, Act::Switchover(endpoint));
                }
            }
            Fault::Goodbye(host) => self.act(host, 0, Act::Goodbye),
        }
    }

    fn latency(&mut self) -> Us {
        self.delay.0 + self.rng.below(self.delay.1)
    }

    fn connect(&mut self) {
        if self.hosts.iter().any(|h| h.pair.is_none() || h.paused) {
            return;
        }
        let shared = self.hosts[0].stream.is_some() && self.hosts[0].stream == self.hosts[1].stream;
        let link = (0..2u8).find(|link| !self.cut[usize::from(*link)].contains(&true));
        let Some(link) = link.filter(|_| !shared) else { return };
        let stream = self.streams.len();
        let runs = [self.hosts[0].run, self.hosts[1].run];
        self.streams.push(Stream { link, runs, queues: Default::default() });
        let after = self.latency() * 2;
        for (host, run) in runs.into_iter().enumerate() {
            let input = Input::StreamUp(stream, link);
            self.at(self.now + after, Happening::Input { host, run, input });
            // Until then an old one may still be in use; this one replaces it.
        }
    }

    fn pump(&mut self, stream: usize, to: usize) {
        let link = usize::from(self.streams[stream].link);
        if self.cut[link].contains(&true) {
            return self.at(self.now + 30 * MS, Happening::Pump { stream, to });
        }
        while let Some(item) = self.streams[stream].queues[to].pop_front() {
            let h = &self.hosts[to];
            let listening = h.pair.is_some() && h.run == self.streams[stream].runs[to];
            match item {
                _ if !h.powered => {}
                _ if !listening => {
                    // The kernel answers with a reset.
                    let from = 1 - to;
                    if self.hosts[from].run == self.streams[stream].runs[from] {
                        self.input(from, Input::StreamDown(stream, false));
                    }
                }
                Item::Frame(bytes) => self.input(to, Input::Frame(stream, bytes)),
                Item::Fin(goodbye) => self.input(to, Input::StreamDown(stream, goodbye)),
            }
        }
    }

    fn input(&mut self, host: usize, input: Input) {
        self.hosts[host].inbox.push_back(input);
        let run = self.hosts[host].run;
        let busy = self.hosts[host].busy;
        let after = 20 + self.rng.below(100) + self.rng.below(busy);
        self.at(self.now + after, Happening::Wake(host, run));
    }

    /// One turn of a host's control loop.
    fn turn(&mut self, host: usize) {
        while let Some(input) = self.hosts[host].inbox.pop_front() {
            let now = self.local(host);
            let h = &mut self.hosts[host];
            let Some(pair) = h.pair.as_mut() else { return };
            match input {
                Input::Heartbeat(keys, link, bytes) if h.keys_in == Some(keys) => {
                    pair.handle_heartbeat(now, LinkId(link), &bytes);
                }
                Input::Heartbeat(..) => {}
                Input::Frame(stream, bytes) if h.stream == Some(stream) => {
                    h.keys_in = Some(stream);
                    pair.handle_frame(now, &bytes);
                }
                Input::Frame(..) => {}
                Input::StreamUp(stream, link) => {
                    h.stream = Some(stream);
                    h.keys = Some(stream);
                    pair.handle_stream_up(now, LinkId(link));
                }
                Input::StreamDown(stream, goodbye) if h.stream == Some(stream) => {
                    h.stream = None;
                    pair.handle_stream_down(now, goodbye);
                }
                Input::StreamDown(..) => {}
                Input::Probe(link, result) => pair.handle_probe_result(now, LinkId(link), result),
                Input::Act(act) => self.perform(host, act),
            }
            self.drain_events(host);
            self.drain_transmits(host);
        }
        let now = self.local(host);
        if let Some(pair) = self.hosts[host].pair.as_mut() {
            pair.handle_turn(now);
        }
        self.drain_events(host);
        self.drain_transmits(host);
        let Some(pair) = &self.hosts[host].pair else { return };
        let wake = self.true_time(host, pair.poll_timeout()).max(self.now + 1);
        let busy = self.hosts[host].busy;
        let late = self.rng.below(500) + self.rng.below(busy);
        let token = self.serial + 1;
        self.hosts[host].timer = token;
        self.at(wake + late, Happening::Timer(host, token));
    }

    pub(super) fn drain_transmits(&mut self, host: usize) {
        let to = 1 - host;
        while let Some(transmit) = self.hosts[host].pair.as_mut().and_then(Pair::poll_transmit) {
            match transmit {
                Transmit::Heartbeat { link, bytes } => {
                    let Some(keys) = self.hosts[host].keys else { continue };
                    let copies = 1 + u64::from(self.rng.chance(self.duplicate));
                    for _ in 0..copies {
                        if self.cut[usize::from(link.0)][to] || self.rng.chance(self.loss) {
                            continue;
                        }
                        let at = self.now + self.latency();
                        let bytes = bytes.clone();
                        self.at(at, Happening::Heartbeat { to, keys, link: link.0, bytes });
                    }
                }
                Transmit::Frame(bytes) => {
                    let Some(stream) = self.hosts[host].stream else { continue };
                    self.streams[stream].queues[to].push_back(Item::Frame(bytes.to_vec()));
                    let lost = if self.rng.chance(self.loss) { 30 * MS } else { 0 };
                    let lost = lost + self.rng.below(self.stall);
                    let at = self.now + self.latency() + lost;
                    self.at(at, Happening::Pump { stream, to });
                }
                Transmit::Probe { link } => {
                    let at = self.now + self.latency();
                    self.at(at, Happening::ProbeArrives { from: host, link: link.0 });
                }
                Transmit::CloseStream { goodbye } => {
                    if let Some(stream) = self.hosts[host].stream.take() {
                        self.streams[stream].queues[to].push_back(Item::Fin(goodbye));
                        let at = self.now + self.latency();
                        self.at(at, Happening::Pump { stream, to });
                    }
                    if goodbye {
                        // The process ends; what it sent is on its way.
                        self.note(host, "goodbye".into());
                        let h = &mut self.hosts[host];
                        h.pair = None;
                        h.gateway.clear();
                        h.listener_until = self.now;
                        return;
                    }
                }
            }
        }
    }

    /// Whether heartbeats towards `host` were silent for `us`, now or within the last 300 ms.
    fn silent(&self, host: usize, us: Us) -> bool {
        self.now - self.arrival[host] >= us
            || self.gaps[host]
                .iter()
                .rev()
                .take(8)
                .any(|(end, gap)| *gap >= us && self.now - *end < 300 * MS)
    }

    /// Whether the pair was, or just now was, in what amounts to a full partition.
    pub(super) fn partitioned(&self) -> bool {
        let (long, short) = (80 * MS, 33 * MS);
        (self.silent(0, long) && self.silent(1, short))
            || (self.silent(1, long) && self.silent(0, short))
    }
}
