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
//!
//! A careful seed whose pair links lose nothing has stretches in which no packet may be lost, nor turned around within
//! its flow: when nothing happens, during planned work, and while a tunnel comes up beside another.

use crate::clock::{MS, Nanos, S};
use crate::dice::Dice;
use crate::faults::{FAREWELL, Fault};
use crate::log;
use crate::network::Weather;
use crate::scene::ENDPOINTS;
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
    Fault { fault: Fault, since: Nanos, until: Nanos },
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
    /// By flow: the first packet that must not be lost; empty outside of such a stretch.
    lossless: Vec<u64>,
    /// Neighbours were told too late of a switchover in the stretch for order to be kept.
    pub(crate) unordered: bool,
    /// A tunnel comes up in the stretch.
    begins: bool,
    /// What happens in the stretch, for the report.
    course: Option<Fault>,
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
            unordered: false,
            begins: false,
            course: None,
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
    /// One owner for each endpoint, synced, its shadow exact, traffic both ways through every tunnel.
    fn settled(&self) -> bool {
        if self.hosts.iter().any(|host| !host.runs() || host.wan_up.contains(&false))
            || !self.flowing(self.director.whole_since.max(self.now.saturating_sub(300 * MS)))
        {
            return false;
        }
        let (Some(a), Some(b)) = (self.pair_status(0), self.pair_status(1)) else { return false };
        let owns = |s: &ha::EndpointStatus| s.role == ha::Role::Owner(ha::Mode::Synced);
        let follows = |s: &ha::EndpointStatus| s.role == ha::Role::Shadow { synced: true };
        a.iter().zip(&b).all(|(a, b)| {
            a.position == b.position && ((owns(a) && follows(b)) || (owns(b) && follows(a)))
        })
    }

    /// By endpoint: which instance owns it.
    fn owners(&self) -> Vec<usize> {
        let owns = |s: &ha::EndpointStatus| matches!(s.role, ha::Role::Owner(_));
        let second = self.pair_status(1).unwrap_or_default();
        let at = |n: usize| usize::from(second.get(n).is_some_and(owns));
        (0..self.scene.endpoints.len()).map(at).collect()
    }

    /// Instances that own nothing, and that no endpoint goes home to.
    fn idle(&self, owners: &[usize]) -> [bool; 2] {
        std::array::from_fn(|host| {
            let quiet =
                |place: &crate::scene::Place| !place.home_coming.preempt || place.home != host;
            owners.iter().all(|owner| *owner != host) && self.scene.endpoints.iter().all(quiet)
        })
    }

    /// Whether nothing may be lost while nothing goes wrong.
    fn may_be_exact(&self, owners: &[usize]) -> bool {
        self.net.pair.loss == 0
            && self.director.careful
            && !self.scene.tight_leases
            && !self.director.split
            // A neighbour that was deaf to every announcement so far still sends to the other, which steers: that one
            // is no mere standby yet.
            && self.net.switch.iter().zip(owners).all(|(switch, owner)| *switch == Some(*owner))
    }

    /// No instance uses a tunnel any more.
    fn is_gone(&self, tunnel: (usize, usize)) -> bool {
        let here =
            |host: &crate::host::Host| host.process.as_ref().is_some_and(|p| !p.view.lives(tunnel));
        self.hosts.iter().take(2).all(here)
    }

    /// From here on nothing may be lost, nor turned around: of all flows, or of those not through one tunnel.
    fn begin_stretch(&mut self, but: Option<(usize, usize)>) {
        for flow in &mut self.traffic.flows {
            flow.late.clear();
            flow.unordered = false;
        }
        let first = self.traffic.flows.iter().map(|flow| {
            let out = !flow.outward && but == Some((flow.peer, flow.via));
            if out { u64::MAX } else { flow.next }
        });
        self.director.lossless = first.collect();
        self.director.unordered = false;
        self.director.begins = false;
        self.director.course = None;
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
        self.watch_homes(steady);
        if steady {
            self.compare_views();
        }
        let links = self.scene.links;
        let owners = self.owners();
        let exact = self.may_be_exact(&owners);
        let next = match self.director.phase {
            Phase::Boot if steady && self.director.careful => self.calm(exact),
            Phase::Boot if steady => self.chaos(owners[0]),
            Phase::Boot => self.overdue(0, Phase::Boot),
            Phase::Calm { until } if now >= until && steady => self.next_fault(&owners, exact),
            Phase::Calm { until } => self.overdue(until, Phase::Calm { until }),
            Phase::Fault { until, fault, .. } if now >= until => {
                self.director.whole_since = now;
                self.director.settled_since = None;
                Phase::Settle { fault, since: now }
            }
            Phase::Fault { fault: Fault::PeerLeave { host, .. }, since, .. }
                if exact
                    && owners.len() > 1
                    && self.director.lossless.is_empty()
                    && now >= since + FAREWELL
                    && self.is_gone(self.scene.tunnel_of(host)) =>
            {
                // It is gone for the pair; when it comes back, nothing that goes through the others may be lost.
                // Flows that move to it may overtake what they sent through another, and what they send may overtake the
                // last message of its negotiation.
                self.begin_stretch(Some(self.scene.tunnel_of(host)));
                self.director.unordered = true;
                self.director.begins = true;
                self.director.phase
            }
            Phase::Settle { .. } if steady => {
                self.checks.strict = !self.director.split;
                log::set_turn(now, usize::MAX);
                log::say(&format!("settled [{}]", self.describe()));
                self.calm(exact)
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
            Phase::Final { .. } if steady && !self.somebody_goes_home() => Phase::Done,
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

    /// Everything is well, for a while.
    fn calm(&mut self, exact: bool) -> Phase {
        self.end_stretch();
        if exact {
            self.begin_stretch(None);
        }
        let d = &mut self.director;
        let short = d.dice.0.chance(500);
        let pause = if short { d.dice.0.ms(100, 500) } else { d.dice.0.ms(500, 4_000) };
        Phase::Calm { until: self.now + pause }
    }

    /// A careful seed's next fault.
    fn next_fault(&mut self, owners: &[usize], exact: bool) -> Phase {
        let (now, links) = (self.now, self.scene.links);
        let idle = self.idle(owners);
        let d = &mut self.director;
        if d.faults_left == 0 {
            self.end_stretch();
            return Phase::Final { since: now };
        }
        d.faults_left -= 1;
        d.faults += 1;
        let mut fault = Fault::draw(&mut d.dice.0, &self.scene);
        if let Fault::Uplink { .. } = fault {
            // ha.md: for the uplink's sake at most once in ten seconds.
            if d.last_uplink.is_some_and(|last| now < last + 15 * S) {
                fault = Fault::Switchover;
            } else {
                d.last_uplink = Some(now);
            }
        }
        d.split |= fault.splits(links);
        d.course = Some(fault);
        self.checks.strict = !fault.may_lose_sas(links) && !self.director.split;
        if !exact || !fault.costs_nothing(idle) {
            self.end_stretch();
        }
        self.at(now, Event::Fault(fault));
        Phase::Fault { fault, since: now, until: now + fault.lasts() + 200 * MS }
    }

    /// A chaotic seed's faults, all at once.
    fn chaos(&mut self, owner: usize) -> Phase {
        let now = self.now;
        let d = &mut self.director;
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
                events.push((at, Fault::draw(&mut d.dice.0, &self.scene)));
            }
        }
        d.faults = events.len() as u64;
        for (at, fault) in events {
            self.at(at, Event::Fault(fault));
        }
        Phase::Chaos { until: until + 2 * S }
    }

    /// In a stretch that costs nothing every packet arrived, but those still under way, and in order.
    fn end_stretch(&mut self) {
        let first = std::mem::take(&mut self.director.lossless);
        let course = self.director.course.take();
        for (n, (flow, first)) in self.traffic.flows.iter().zip(first).enumerate() {
            let end = flow.next.saturating_sub(8);
            let missing = match self.net.wan.loss {
                0 if !self.director.begins => flow.missing(first, end),
                _ => flow.missing_at_pair(first, end),
            };
            let late: Vec<u64> = flow.late.iter().copied().filter(|n| *n >= first).collect();
            let turned = !late.is_empty() && !self.director.unordered && !flow.unordered;
            if missing.is_empty() && !turned {
                continue;
            }
            let way = if flow.outward { "to" } else { "from" };
            let (what, which) = match missing.is_empty() {
                true => ("were overtaken", late),
                false => ("were lost", missing),
            };
            let text = format!(
                "{} packets {way} peer {} (flow {n}) {what} by {course:?}, from number {:?} of {}",
                which.len(),
                flow.peer,
                which.first(),
                flow.next
            );
            return self.checks.violate(5, text);
        }
    }

    /// Invariant 6 needs that both instances take the same tunnels for alive.
    fn compare_views(&mut self) {
        let (Some(left), Some(right)) = (&self.hosts[0].process, &self.hosts[1].process) else {
            return;
        };
        for peer in 0..self.scene.peers {
            for endpoint in 0..ENDPOINTS {
                let of = (peer, endpoint);
                let views = [&left.view, &right.view];
                let steady = views.iter().all(|view| view.is_steady(self.now, of));
                if steady && left.view.lives(of) != right.view.lives(of) {
                    let text = format!(
                        "the instances differ about the tunnel of peer {peer} at endpoint {endpoint}"
                    );
                    return self.checks.violate(6, text);
                }
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
