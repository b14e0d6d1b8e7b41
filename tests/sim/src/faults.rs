//! What goes wrong: every fault, how it begins and how it ends.
//!
//! | the issue asks for | here |
//! | --- | --- |
//! | crash | [`Fault::Crash`], [`Fault::PowerCut`]; also between any two outputs of a turn |
//! | restart with empty state | after each of these: a process starts with nothing but its term file |
//! | with stale state | [`Fault::Suspend`], [`Fault::ClockStop`], [`Fault::Pause`]: state lives in memory alone, so only who was away can come back with old state (a term file goes back no further than a write that was under way) |
//! | with a lost term file | `lost_file` |
//! | pause | [`Fault::Pause`] |
//! | cut, one-way cut | [`Fault::Cut`], [`Fault::CutAll`], with or without `from`; [`Fault::Uplink`] on the WAN |
//! | loss, duplication, reordering, delay | [`Fault::PairWeather`], [`Fault::WanWeather`] (each copy draws its own delay), and calm weather's share of it |
//! | clock rates within 10 % | always: `host` draws one at each boot |
//! | slow shadow | [`Fault::Lag`], [`Fault::Slow`] |
//! | rekeys by both sides throughout | always: lifetimes of seconds on both sides, `Event::Rekey`, and more at each fault |
//!
//! Beyond that: records that cannot be decoded, planned work of every kind, tunnels that peers close, peers that restart.

use gateway::Request;

use crate::clock::{MS, Nanos, S};
use crate::dice::Dice;
use crate::host::{Input, Process};
use crate::log;
use crate::network::Weather;
use crate::scene::{ENDPOINTS, Scene, connection_name, endpoint_name};
use crate::world::{Event, World};

/// After a partition healed, how long the instances may take to notice each other.
const HEAL: Nanos = 3 * S;

/// One fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The daemon is killed, at once or after so many more outputs; later it starts again, empty, perhaps without its
    /// term file.
    Crash {
        /// Where.
        host: usize,
        /// For how long it stays down.
        down: Nanos,
        /// Carried out before it dies, of the next turn's outputs.
        outputs: Option<u64>,
        /// The term file is lost with it.
        lost_file: bool,
    },
    /// The machine loses power, then boots.
    PowerCut {
        /// Where.
        host: usize,
        /// For how long.
        down: Nanos,
        /// The term file is lost with it.
        lost_file: bool,
    },
    /// The daemon is stopped (SIGSTOP) and goes on later.
    Pause {
        /// Where.
        host: usize,
        /// For how long.
        time: Nanos,
    },
    /// The machine is suspended: as a pause, but what arrives meanwhile is lost.
    Suspend {
        /// Where.
        host: usize,
        /// For how long.
        time: Nanos,
    },
    /// The hypervisor stops the machine, and its clock with it.
    ClockStop {
        /// Where.
        host: usize,
        /// For how long.
        time: Nanos,
    },
    /// A pair link is cut, in one direction (by sender) or both.
    Cut {
        /// Which.
        link: usize,
        /// What this instance sends is lost; both's if none is named.
        from: Option<usize>,
        /// For how long.
        time: Nanos,
    },
    /// All pair links are cut, in one direction or both.
    CutAll {
        /// As for one link.
        from: Option<usize>,
        /// For how long.
        time: Nanos,
    },
    /// An instance's WAN interface goes down: that of one endpoint, or all.
    Uplink {
        /// Where.
        host: usize,
        /// Whose.
        endpoint: Option<usize>,
        /// For how long.
        time: Nanos,
    },
    /// Loss, duplication and delay on the pair links.
    PairWeather {
        /// In a thousand.
        loss: u64,
        /// In a thousand.
        duplicate: u64,
        /// At most.
        jitter: Nanos,
        /// For how long.
        time: Nanos,
    },
    /// The same on the WAN.
    WanWeather {
        /// In a thousand.
        loss: u64,
        /// In a thousand.
        duplicate: u64,
        /// At most.
        jitter: Nanos,
        /// For how long.
        time: Nanos,
    },
    /// Frames of one instance lag: a slow shadow, or a slow owner.
    Lag {
        /// Whose frames.
        from: usize,
        /// By how much.
        by: Nanos,
        /// For how long.
        time: Nanos,
    },
    /// The next so many records that reach an instance as shadow cannot be decoded there.
    Spoil {
        /// Where.
        host: usize,
        /// How many; a snapshot counts as one.
        records: u32,
        /// For how long at most.
        time: Nanos,
    },
    /// Threads wake up late, and batches wait between decision and system call.
    Slow {
        /// Where.
        host: usize,
        /// For how long.
        time: Nanos,
    },
    /// Operators have both instances hand over all that they own.
    Switchover,
    /// An operator has an endpoint handed over.
    Failover {
        /// Which.
        endpoint: usize,
    },
    /// An operator drains an instance, and takes that back later.
    Drain {
        /// Where.
        host: usize,
        /// For how long.
        time: Nanos,
    },
    /// A planned stop that waits for nothing, and a start later.
    Stop {
        /// Where.
        host: usize,
    },
    /// A planned stop as `tandemd` does it, and a start later: half of a rolling restart.
    Restart {
        /// Where.
        host: usize,
        /// Drained before.
        drain: bool,
    },
    /// A peer's gateway loses everything and starts again.
    PeerRestart {
        /// Which host.
        host: usize,
        /// For how long it is away.
        down: Nanos,
    },
    /// A peer's gateway closes its tunnel and goes, and starts again.
    PeerLeave {
        /// Which host.
        host: usize,
        /// For how long it is away.
        down: Nanos,
    },
}

/// When a peer has left, nothing of its tunnel is left at the pair after so long.
pub(crate) const FAREWELL: Nanos = 300 * MS;
/// A drained instance is stopped after so long.
const DRAINED: Nanos = 300 * MS;

impl Fault {
    /// Draws one that may come alone.
    pub(crate) fn draw(dice: &mut Dice, scene: &Scene) -> Self {
        let (links, endpoints) = (scene.links, scene.endpoints.len());
        let peer = |dice: &mut Dice| 2 + dice.below(scene.hosts() as u64 - 2) as usize;
        let host = dice.below(2) as usize;
        let time = if dice.chance(500) { dice.ms(20, 400) } else { dice.ms(400, 3_000) };
        let down = if dice.chance(300) { dice.ms(20, 200) } else { dice.ms(200, 3_000) };
        let from = dice.chance(600).then_some(dice.below(2) as usize);
        match dice.below(40) {
            0..=4 => Self::Crash {
                host,
                down,
                outputs: dice.chance(400).then_some(dice.below(12)),
                lost_file: dice.chance(250),
            },
            5 => Self::PowerCut { host, down: down + 200 * MS, lost_file: dice.chance(250) },
            6 | 7 => Self::Pause { host, time },
            8 => Self::Suspend { host, time },
            9 => Self::ClockStop { host, time },
            10 | 11 => Self::Cut { link: dice.below(links as u64) as usize, from, time },
            12 | 13 => Self::CutAll { from: Some(dice.below(2) as usize), time },
            14 => Self::CutAll { from: None, time },
            15 | 16 => {
                let one = dice.chance(500).then_some(dice.below(endpoints as u64) as usize);
                Self::Uplink { host, endpoint: one, time }
            }
            17 => Self::PairWeather {
                loss: dice.below(200),
                duplicate: dice.below(200),
                jitter: dice.us(100, 15_000),
                time,
            },
            18 => Self::WanWeather {
                loss: dice.below(200),
                duplicate: dice.below(200),
                jitter: dice.us(100, 20_000),
                time,
            },
            19..=21 => Self::Lag { from: host, by: dice.ms(1, 900), time },
            22 => Self::Slow { host, time },
            23..=26 => Self::Switchover,
            27 => Self::Stop { host },
            28 => Self::PeerRestart { host: peer(dice), down: dice.ms(10, 1_000) },
            29 | 30 => {
                let records = if dice.chance(700) { 1 } else { u32::MAX };
                Self::Spoil { host, records, time }
            }
            31 | 32 => Self::Failover { endpoint: dice.below(endpoints as u64) as usize },
            33 | 34 => Self::Drain { host, time: time + 100 * MS },
            35 | 36 => Self::Restart { host, drain: dice.chance(500) },
            37 | 38 => Self::PeerLeave { host: peer(dice), down: FAREWELL + dice.ms(300, 3_000) },
            _ => Self::Crash { host, down, outputs: None, lost_file: false },
        }
    }

    /// Draws a course of faults that is unlikely to come about by chance: when each begins, from now. `owner` owns.
    pub(crate) fn course(dice: &mut Dice, owner: usize) -> Vec<(Nanos, Self)> {
        let other = 1 - owner;
        let mut ms = |about: u64| dice.ms(about * 8 / 10, about * 12 / 10);
        let crash = |host, down, lost_file| Self::Crash { host, down, outputs: None, lost_file };
        match ms(1_000) % 8 {
            // A term taken beyond a cut and forgotten, keys known again, then a takeover with the same keys.
            0 => vec![
                (0, Self::CutAll { from: None, time: ms(1_500) }),
                (ms(700), crash(other, ms(2_000), false)),
                (ms(6_500), crash(owner, ms(1_000), false)),
            ],
            // The shadow cannot take over at once, and does so when what it knows is old.
            1 => vec![
                (0, Self::Uplink { host: other, endpoint: None, time: ms(3_500) }),
                (ms(200), Self::CutAll { from: Some(owner), time: ms(6_000) }),
                (ms(900), Self::Slow { host: owner, time: ms(100) }),
                (ms(1_800), Self::Slow { host: owner, time: ms(100) }),
            ],
            // The shadow falls behind, the owner goes on alone, exchanges happen, the owner dies.
            2 => vec![
                (0, Self::Lag { from: other, by: ms(850), time: ms(4_000) }),
                (ms(800), Self::Slow { host: owner, time: ms(100) }),
                (ms(1_300), Self::Slow { host: owner, time: ms(100) }),
                (ms(1_800), Self::Slow { host: owner, time: ms(100) }),
                (ms(2_300), crash(owner, ms(2_000), false)),
            ],
            // New SAs and their leases travel slowly; then the owner dies.
            3 => vec![
                (0, Self::Lag { from: owner, by: ms(250), time: ms(4_000) }),
                (ms(500), Self::Slow { host: other, time: ms(100) }),
                (ms(1_000), Self::Slow { host: other, time: ms(100) }),
                (ms(2_000), crash(owner, ms(2_000), false)),
            ],
            // The other restarts beyond a cut, waits in vain, and owns as empty.
            4 => vec![
                (0, Self::CutAll { from: None, time: ms(6_000) }),
                (ms(300), crash(other, ms(300), false)),
            ],
            // An endpoint is moved away and back; later its home loses it.
            5 => vec![
                (0, Self::Failover { endpoint: 0 }),
                (ms(1_500), Self::Failover { endpoint: 0 }),
                (ms(3_000), Self::Pause { host: owner, time: ms(400) }),
            ],
            // The other cannot follow; then the owner is drained, and must stay for so long.
            6 => vec![
                (0, Self::Spoil { host: other, records: u32::MAX, time: ms(3_000) }),
                (ms(300), Self::Slow { host: other, time: ms(100) }),
                (ms(700), Self::Slow { host: other, time: ms(100) }),
                (ms(1_200), Self::Drain { host: owner, time: ms(2_500) }),
            ],
            // The owner is suspended again and again.
            _ => vec![
                (0, Self::Suspend { host: owner, time: ms(300) }),
                (ms(1_500), Self::Suspend { host: other, time: ms(300) }),
                (ms(3_000), Self::Pause { host: owner, time: ms(150) }),
                (ms(4_500), Self::ClockStop { host: other, time: ms(250) }),
            ],
        }
    }

    /// Whether established SAs may be lost by this one: the peer threw them away, or both instances went on alone.
    pub(crate) fn may_lose_sas(self, links: usize) -> bool {
        match self {
            Self::PeerRestart { .. } | Self::PeerLeave { .. } | Self::CutAll { from: None, .. } => {
                true
            }
            Self::Cut { from: None, .. } => links == 1,
            _ => false,
        }
    }

    /// Whether both instances went on alone: some SAs may fall apart much later.
    pub(crate) fn splits(self, links: usize) -> bool {
        self.may_lose_sas(links)
            && !matches!(self, Self::PeerRestart { .. } | Self::PeerLeave { .. })
    }

    /// Whether not one packet may be lost by it: a planned move, or a mishap of the standby alone (ha.md, "What we
    /// promise"). `idle`: instances that own nothing, and will not soon.
    pub(crate) fn costs_nothing(self, idle: [bool; 2]) -> bool {
        match self {
            Self::Switchover
            | Self::Failover { .. }
            | Self::Drain { .. }
            | Self::Restart { .. } => true,
            Self::Crash { host, .. }
            | Self::PowerCut { host, .. }
            | Self::Pause { host, .. }
            | Self::Suspend { host, .. }
            | Self::ClockStop { host, .. }
            | Self::Stop { host } => idle.get(host).copied().unwrap_or(false),
            _ => false,
        }
    }

    /// How long it lasts, until the world is whole again.
    pub(crate) fn lasts(self) -> Nanos {
        match self {
            Self::Crash { down, .. }
            | Self::PowerCut { down, .. }
            | Self::PeerRestart { down, .. }
            | Self::PeerLeave { down, .. } => down,
            Self::Pause { time, .. }
            | Self::Suspend { time, .. }
            | Self::ClockStop { time, .. }
            | Self::Cut { time, .. }
            | Self::CutAll { time, .. }
            | Self::Uplink { time, .. }
            | Self::PairWeather { time, .. }
            | Self::WanWeather { time, .. }
            | Self::Lag { time, .. }
            | Self::Spoil { time, .. }
            | Self::Slow { time, .. }
            | Self::Drain { time, .. } => time,
            Self::Switchover | Self::Failover { .. } => 100 * MS,
            Self::Stop { .. } => 3 * S,
            Self::Restart { .. } => 5 * S,
        }
    }
}

impl World {
    pub(crate) fn begin(&mut self, fault: Fault) {
        log::set_turn(self.now, usize::MAX);
        log::say(&format!("FAULT {fault:?}   [{}]", self.describe()));
        // Exchanges under way are what faults hurt most.
        for _ in 0..self.dice.below(3) {
            let about = self.dice.us(0, 60_000);
            self.at(self.now + about, Event::Rekey { again: false });
        }
        match fault {
            Fault::Crash { host, outputs, .. } => {
                let paused = self.hosts[host].paused;
                let Some(p) = self.hosts[host].process.as_mut() else { return };
                if let (Some(n), false) = (outputs, paused) {
                    p.dies_after = Some(n);
                    // Restarted when it has died: see `control_turn`.
                    return self.forget_file(fault);
                }
                if let Some(p) = self.hosts[host].process.take() {
                    self.gone(host, &p, false);
                }
                self.forget_file(fault);
                return self.at(self.now + fault.lasts(), Event::End(fault));
            }
            Fault::PowerCut { host, .. } => {
                self.hosts[host].up = false;
                if let Some(p) = self.hosts[host].process.take() {
                    self.gone(host, &p, false);
                }
                self.forget_file(fault);
            }
            Fault::Pause { host, .. } => self.hosts[host].paused = true,
            Fault::Suspend { host, .. } => {
                self.hosts[host].paused = true;
                self.hosts[host].suspended = true;
            }
            Fault::ClockStop { host, .. } => {
                self.hosts[host].paused = true;
                self.hosts[host].clock.freeze(self.now);
                self.hosts[host].stopped_until = Nanos::MAX;
            }
            Fault::Cut { link, from, .. } => self.cut(link..link + 1, from, false),
            Fault::CutAll { from, .. } => self.cut(0..self.scene.links, from, false),
            Fault::Uplink { host, endpoint, .. } => self.uplink(host, endpoint, false),
            Fault::PairWeather { loss, duplicate, jitter, .. } => {
                self.net.pair = Weather { loss, duplicate, jitter, ..self.net.pair };
            }
            Fault::WanWeather { loss, duplicate, jitter, .. } => {
                self.net.wan = Weather { loss, duplicate, jitter, ..self.net.wan };
            }
            Fault::Lag { from, by, .. } => self.net.lag[from] = by,
            Fault::Spoil { host, records, .. } => self.spoil(host, records),
            Fault::Slow { host, .. } => self.hosts[host].slow = true,
            Fault::Switchover => {
                for host in 0..2 {
                    self.tell(host, Input::Request(Request::Failover { endpoint: None }));
                }
                return;
            }
            Fault::Failover { endpoint } => {
                let endpoint = Some(endpoint_name(endpoint).to_owned());
                for host in 0..2 {
                    let request = Request::Failover { endpoint: endpoint.clone() };
                    self.tell(host, Input::Request(request));
                }
                return;
            }
            Fault::Drain { host, .. } => self.tell(host, Input::Request(Request::Drain)),
            Fault::Stop { host } => {
                self.tell(host, Input::Goodbye);
                return;
            }
            Fault::Restart { host, drain } => {
                if drain {
                    self.tell(host, Input::Request(Request::Drain));
                }
                self.tell_later(host, if drain { DRAINED } else { 0 }, Input::Leave);
                return;
            }
            Fault::PeerRestart { host, .. } => self.hosts[host].process = None,
            Fault::PeerLeave { host, .. } => {
                let connection = connection_name(self.scene.tunnel_of(host).0);
                self.tell(host, Input::Request(Request::Down { connection, purge: false }));
                if let Some(p) = &self.hosts[host].process {
                    let life = p.life;
                    // Its word is there, and nothing new can come of it.
                    let gone = self.now + self.net.wan.delay + self.net.wan.jitter + MS;
                    self.at(gone, Event::Vanish { host, life });
                }
            }
        }
        self.at(self.now + fault.lasts(), Event::End(fault));
    }

    pub(crate) fn end(&mut self, fault: Fault) {
        log::set_turn(self.now, usize::MAX);
        log::say(&format!("END of {fault:?}"));
        match fault {
            Fault::Crash { host, .. }
            | Fault::PeerRestart { host, .. }
            | Fault::PeerLeave { host, .. } => self.restart(host),
            Fault::PowerCut { host, .. } => {
                if !self.hosts[host].up {
                    self.hosts[host].reboot(self.now, &mut self.dice);
                }
                self.restart(host);
            }
            Fault::Pause { host, .. }
            | Fault::Suspend { host, .. }
            | Fault::ClockStop { host, .. } => self.resume(host),
            Fault::Cut { link, from, .. } => self.cut(link..link + 1, from, true),
            Fault::CutAll { from, .. } => self.cut(0..self.scene.links, from, true),
            Fault::Uplink { host, endpoint, .. } => self.uplink(host, endpoint, true),
            Fault::Drain { host, .. } => self.tell(host, Input::Request(Request::Undrain)),
            Fault::PairWeather { .. } => {
                self.net.pair = self.director.pair_weather(self.net.pair);
            }
            Fault::WanWeather { .. } => self.net.wan = self.director.wan_weather(self.net.wan),
            Fault::Lag { from, .. } => self.net.lag[from] = 0,
            Fault::Spoil { host, .. } => self.spoil(host, 0),
            Fault::Slow { host, .. } => self.hosts[host].slow = false,
            Fault::Switchover
            | Fault::Failover { .. }
            | Fault::Stop { .. }
            | Fault::Restart { .. } => {}
        }
    }

    fn spoil(&mut self, host: usize, records: u32) {
        self.spoiled |= records > 0;
        if let Some(p) = self.hosts[host].process.as_mut() {
            p.gateway.spoil_records(records);
        }
    }

    /// Ends everything that may still go on.
    pub(crate) fn end_all(&mut self) {
        for host in 0..self.hosts.len() {
            if !self.hosts[host].up {
                self.hosts[host].reboot(self.now, &mut self.dice);
            }
            self.hosts[host].slow = false;
            self.spoil(host, 0);
            self.resume(host);
            self.restart(host);
            if let Some(p) = &mut self.hosts[host].process {
                p.dies_after = None;
            }
            self.uplink(host, None, true);
            if host < 2 {
                self.tell(host, Input::Request(Request::Undrain));
            }
        }
        self.net.lag = [0; 2];
        self.net.pair = self.director.pair_weather(self.net.pair);
        self.net.wan = self.director.wan_weather(self.net.wan);
        self.cut(0..self.scene.links, None, true);
        self.settle_partition();
    }

    fn tell(&mut self, host: usize, input: Input) {
        self.tell_later(host, 0, input);
    }

    fn tell_later(&mut self, host: usize, after: Nanos, input: Input) {
        if let Some(p) = self.reads(host) {
            let life = p.life;
            self.at(self.now + after, Event::Tell { host, life, input });
        }
    }

    /// A peer's gateway ends.
    pub(crate) fn vanish(&mut self, host: usize, life: u64) {
        if self.hosts[host].process.as_ref().is_some_and(|p| p.life == life) {
            self.hosts[host].process = None;
        }
    }

    fn forget_file(&mut self, fault: Fault) {
        if let Fault::Crash { host, lost_file: true, .. }
        | Fault::PowerCut { host, lost_file: true, .. } = fault
        {
            self.hosts[host].disk = [None; ENDPOINTS];
        }
    }

    fn restart(&mut self, host: usize) {
        if self.hosts[host].process.is_none()
            && self.hosts[host].up
            && let Err(why) = self.start(host)
        {
            self.checks.violate(0, why);
        }
    }

    fn resume(&mut self, host: usize) {
        if !self.hosts[host].paused {
            return;
        }
        if self.net.two_way().is_none() {
            // Who was away and hears nothing now cannot know what became of its endpoint.
            self.excuse_partition(Nanos::MAX);
        }
        let streams: Vec<Option<u64>> =
            self.hosts.iter().take(2).map(|h| h.process.as_ref().and_then(|p| p.stream)).collect();
        let h = &mut self.hosts[host];
        h.paused = false;
        h.suspended = false;
        if h.stopped_until == Nanos::MAX {
            h.clock.thaw(self.now);
            // ha.md: until it drains its sockets, at most `fence_after` (on a clock that may be slow). A process that
            // started meanwhile is heard only over a new stream; so long it may also take itself for alone.
            let met =
                |p: &Process| streams.iter().all(|other| *other == p.stream && p.stream.is_some());
            let heard = h.process.as_deref().is_some_and(met);
            h.stopped_until = self.now + if heard { 100 * MS } else { S };
        }
        let Some(p) = h.process.as_mut() else { return };
        let (life, in_gap) = (p.life, p.in_gap);
        p.control_due = Nanos::MAX;
        p.worker_due = Nanos::MAX;
        if in_gap {
            // The system call that it was about to make may come before the control loop's first turn, or after.
            let gap = self.dice.us(0, 200);
            self.at(self.now + gap, Event::Leave { host, life });
        }
        self.wake_soon(host);
        self.wake_worker_soon(host);
    }

    fn cut(&mut self, links: std::ops::Range<usize>, from: Option<usize>, works: bool) {
        let before = self.net.partitioned();
        for link in links {
            for sender in 0..2 {
                if from.is_none_or(|from| from == sender)
                    && let Some(link) = self.net.links.get_mut(link)
                {
                    link[sender] = works;
                }
            }
        }
        let two_way = self.net.two_way().is_some();
        self.deaf_since = if two_way { None } else { self.deaf_since.or(Some(self.now)) };
        // Who has never been in contact cannot come into it now.
        let strangers = (0..2).any(|host| self.is_stranger(host));
        if self.net.partitioned() || (!two_way && strangers) {
            self.excuse_partition(Nanos::MAX);
        } else if before || two_way {
            self.settle_partition();
        }
        if works {
            self.thaw_stream();
        }
    }

    /// Its process has not met the other's.
    fn is_stranger(&self, host: usize) -> bool {
        let h = &self.hosts[host];
        h.process.as_ref().is_none_or(|p| !p.gateway.pair().status(h.local(self.now)).joined)
    }

    fn settle_partition(&mut self) {
        if self.net.two_way().is_some() && self.partition_until > self.now {
            self.partition_until = self.now + HEAL;
        }
    }

    fn uplink(&mut self, host: usize, endpoint: Option<usize>, up: bool) {
        for n in 0..ENDPOINTS {
            if endpoint.is_some_and(|endpoint| endpoint != n) || self.hosts[host].wan_up[n] == up {
                continue;
            }
            self.hosts[host].wan_up[n] = up;
            if up {
                self.hosts[host].wan_back[n] = Some(self.now);
            }
            if let (Some(p), true) = (&self.hosts[host].process, host < 2) {
                let life = p.life;
                let notice = self.dice.ms(1, 20);
                let input = Input::Uplink(n, up);
                self.at(self.now + notice, Event::Tell { host, life, input });
            }
        }
    }
}
