//! When faults come, and what must be true afterwards.
//!
//! ```text
//!   Boot ──settled──► Calm ──► Fault ──► Settle ──settled──► Calm … ──► Final ──settled──► Done
//!                       careful seeds: one fault at a time, nothing may be lost
//!   Boot ──settled──► Chaos (faults as they come) ──► Final ──settled──► Done
//! ```
//! In a careful seed a single fault must lose no SA (invariant 5), the traffic may pause for no longer than
//! [`GAP`], and the pair must be synced again within [`BOUND`]. In a chaotic one only safety counts, and that in the
//! end, with everything whole again, traffic flows.

use crate::clock::{MS, Nanos, S};
use crate::dice::Dice;
use crate::faults::Fault;
use crate::log;
use crate::network::Weather;
use crate::world::{Event, World};

/// Longest pause in traffic by a single fault.
pub const GAP: Nanos = 1_500 * MS;
/// From the end of faults to one owner, synced, with traffic both ways.
pub const BOUND: Nanos = 40 * S;
const LOOK: Nanos = 10 * MS;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Boot,
    Calm { until: Nanos },
    Fault { fault: Fault, until: Nanos },
    Settle { fault: Fault, since: Nanos },
    Chaos { until: Nanos },
    Final { since: Nanos },
    Done,
}

/// Where a seed stands.
#[derive(Debug)]
pub struct Director {
    careful: bool,
    faults_left: u64,
    phase: Phase,
    settled_since: Option<Nanos>,
    /// Traffic counts from here on.
    whole_since: Nanos,
    last_uplink: Option<Nanos>,
    /// There was a split: what the two sides made of their SAs shows later.
    split: bool,
    /// By flow: the first packet that must not be lost by the fault under way.
    lossless: Vec<u64>,
    dice: Dice2,
    weather: Option<(Weather, Weather)>,
    /// Faults so far.
    pub faults: u64,
}

/// Its own chance, so that times of faults do not depend on packets.
struct Dice2(Dice);

impl std::fmt::Debug for Dice2 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Dice")
    }
}

impl Director {
    /// Draws the course of a seed.
    #[must_use]
    pub fn new(dice: &mut Dice) -> Self {
        let careful = dice.chance(600);
        let faults_left = if careful { dice.between(3, 6) } else { dice.between(6, 16) };
        Self {
            careful,
            faults_left,
            phase: Phase::Boot,
            settled_since: None,
            whole_since: 0,
            last_uplink: None,
            split: false,
            lossless: Vec::new(),
            dice: Dice2(Dice::new(dice.any(), 7)),
            weather: None,
            faults: 0,
        }
    }

    /// Whether everything was seen.
    #[must_use]
    pub fn done(&self) -> bool {
        self.phase == Phase::Done
    }

    /// How long a process stays away.
    pub fn downtime(&mut self) -> Nanos {
        self.dice.0.ms(20, 2_000)
    }

    /// The weather between the instances when nothing is wrong.
    #[must_use]
    pub fn pair_weather(&self, now: Weather) -> Weather {
        self.weather.map_or(now, |(pair, _)| pair)
    }

    /// The same for the WAN.
    #[must_use]
    pub fn wan_weather(&self, now: Weather) -> Weather {
        self.weather.map_or(now, |(_, wan)| wan)
    }
}

impl World {
    /// One owner, synced, its shadow exact, traffic both ways.
    fn settled(&self) -> bool {
        if self.hosts.iter().any(|host| !host.runs() || !host.wan_up)
            || !self.flowing(self.director.whole_since.max(self.now.saturating_sub(300 * MS)))
        {
            return false;
        }
        let (Some(a), Some(b)) = (self.pair_status(0), self.pair_status(1)) else { return false };
        let owns = |s: &ha::EndpointStatus| s.role == ha::Role::Owner(ha::Mode::Synced);
        let follows = |s: &ha::EndpointStatus| s.role == ha::Role::Shadow { synced: true };
        a.position == b.position && ((owns(&a) && follows(&b)) || (owns(&b) && follows(&a)))
    }

    pub(crate) fn direct(&mut self) {
        let now = self.now;
        self.at(now + LOOK, Event::Direct);
        if self.director.weather.is_none() {
            self.director.weather = Some((self.net.pair, self.net.wan));
        }
        let settled = self.settled();
        self.director.settled_since = match (settled, self.director.settled_since) {
            (true, since) => since.or(Some(now)),
            (false, _) => None,
        };
        let steady = self.director.settled_since.is_some_and(|since| now >= since + 100 * MS);
        let (links, peers) = (self.scene.links, self.scene.peers);
        let owner =
            usize::from(self.pair_status(1).is_some_and(|s| matches!(s.role, ha::Role::Owner(_))));
        let d = &mut self.director;
        let next = match d.phase {
            Phase::Boot if steady && d.careful => calm(d, now),
            Phase::Boot if steady => {
                let mut until = now + d.dice.0.ms(6_000, 15_000);
                let mut events = Vec::new();
                if d.dice.0.chance(400) {
                    for (after, fault) in Fault::course(&mut d.dice.0, owner) {
                        events.push((now + after, fault));
                        until = until.max(now + after + fault.lasts());
                    }
                } else {
                    for _ in 0..d.faults_left {
                        let at = now + d.dice.0.below(until - now);
                        events.push((at, Fault::draw(&mut d.dice.0, links, peers)));
                    }
                }
                d.faults = events.len() as u64;
                for (at, fault) in events {
                    self.at(at, Event::Fault(fault));
                }
                Phase::Chaos { until: until + 2 * S }
            }
            Phase::Boot => self.overdue(0, Phase::Boot),
            Phase::Calm { until } if now >= until && steady => {
                if d.faults_left == 0 {
                    Phase::Final { since: now }
                } else {
                    d.faults_left -= 1;
                    d.faults += 1;
                    let mut fault = Fault::draw(&mut d.dice.0, links, peers);
                    if let Fault::Uplink { .. } = fault {
                        // ha.md: for the uplink's sake at most once in ten seconds.
                        if d.last_uplink.is_some_and(|last| now < last + 15 * S) {
                            fault = Fault::Switchover;
                        } else {
                            d.last_uplink = Some(now);
                        }
                    }
                    d.split |= fault.splits(links);
                    self.checks.strict = !fault.may_lose_sas(links) && !d.split;
                    let calm_weather = [self.net.pair, self.net.wan].iter().all(|w| w.loss == 0);
                    let exact = calm_weather
                        && !self.scene.tight_leases
                        && !d.split
                        // A neighbour that was deaf to every announcement so far still sends to the other, which
                        // steers: that one is no mere standby yet.
                        && self.net.switch == Some(owner)
                        && fault.costs_nothing(owner);
                    let next = self.traffic.flows.iter().map(|flow| flow.next);
                    d.lossless = if exact { next.collect() } else { Vec::new() };
                    self.at(now, Event::Fault(fault));
                    Phase::Fault { fault, until: now + fault.lasts() + 200 * MS }
                }
            }
            Phase::Calm { until } => self.overdue(until, Phase::Calm { until }),
            Phase::Fault { fault, until } if now >= until => {
                d.whole_since = now;
                d.settled_since = None;
                Phase::Settle { fault, since: now }
            }
            Phase::Settle { fault, .. } if steady => {
                self.checks.strict = !self.director.split;
                self.check_lossless(fault);
                let next = calm(&mut self.director, now);
                log::set_turn(now, usize::MAX);
                log::say(&format!("settled [{}]", self.describe()));
                next
            }
            Phase::Settle { since, .. } => self.overdue(since, self.director.phase),
            Phase::Chaos { until } if now >= until => {
                log::set_turn(now, usize::MAX);
                log::say("everything is whole again");
                self.end_all();
                self.director.whole_since = now;
                self.director.settled_since = None;
                Phase::Final { since: now }
            }
            Phase::Final { since } if steady => {
                let _ = since;
                Phase::Done
            }
            Phase::Final { since } => self.overdue(since, self.director.phase),
            phase @ (Phase::Fault { .. } | Phase::Chaos { .. } | Phase::Done) => phase,
        };
        self.director.phase = next;
        let watched = match next {
            Phase::Calm { .. } => true,
            Phase::Fault { fault, .. } | Phase::Settle { fault, .. } => {
                !fault.may_lose_sas(links) && !matches!(fault, Fault::WanWeather { .. })
            }
            _ => false,
        };
        if watched && self.director.careful && !self.director.split && self.silence() > GAP {
            self.checks.violate(
                5,
                format!("no traffic for {} ms   [{}]", self.silence() / MS, self.describe()),
            );
        }
    }

    /// After a fault that costs nothing, every packet arrived but those still under way.
    fn check_lossless(&mut self, fault: Fault) {
        let first = std::mem::take(&mut self.director.lossless);
        for (flow, first) in self.traffic.flows.iter().zip(first) {
            let missing = flow.missing(first, flow.next.saturating_sub(8));
            if !missing.is_empty() {
                let way = if flow.outward { "to" } else { "from" };
                let text = format!(
                    "{} packets {way} peer {} were lost by {fault:?}, from number {:?} of {}",
                    missing.len(),
                    flow.peer,
                    missing.first(),
                    flow.next
                );
                return self.checks.violate(5, text);
            }
        }
    }

    fn overdue(&mut self, since: Nanos, phase: Phase) -> Phase {
        if self.now > since + BOUND {
            let text = format!("not settled after {} s   [{}]", BOUND / S, self.describe());
            self.checks.violate(0, text);
        }
        phase
    }
}

fn calm(d: &mut Director, now: Nanos) -> Phase {
    let short = d.dice.0.chance(500);
    let pause = if short { d.dice.0.ms(100, 500) } else { d.dice.0.ms(500, 4_000) };
    Phase::Calm { until: now + pause }
}
