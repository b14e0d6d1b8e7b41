//! One fault of an active-active pair, measured: what happens to the flows of the instance that is hurt, and to the others.
//!
//! A trial has two legs: from the event on, and from the moment when the instance may come back until its endpoint has been
//! at home for a second. A flow meets the hurt instance if it is pinned to its endpoint or arrives there. Which tunnel each
//! flow is in, tshark says, with the daemons' key log.
//!
//! Where a dead instance's endpoint is withdrawn, its LAN address goes too: the lab then changes the next hop of the host
//! that used it, as a LAN's routing would, and judges only flows that arrive at the other. What the peer sends is only
//! reported there: it goes on sending into the dead tunnel until it notices.

use super::{Active, ENDPOINTS, Flow, NEXT_HOPS, RATE};
use crate::capture::{self, Recording};
use crate::charon::Spis;
use crate::check;
use crate::clock;
use crate::error::{Error, Result, ensure};
use crate::probe::{Measure, Way};
use crate::run::Run;
use crate::scene::PATIENCE;
use crate::stall::StallWatch;
use crate::wait;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

/// How long the first leg of a trial is, where the instance does not come back by itself.
pub const OBSERVE: Duration = Duration::from_secs(5);
/// When a stopped instance goes on: the end of that trial's first leg.
const THAW_AFTER: Duration = Duration::from_secs(2);
/// How long an endpoint has been at home when a trial ends.
const AT_HOME: Duration = Duration::from_secs(1);
/// A flow that leaves by a dead tunnel so long after the event has not been moved.
const WITHDRAWN: Duration = Duration::from_secs(1);
/// An instance that has just woken waits at least so long before its endpoint goes home (`hold_down_s` is 2 here).
const STILL_AWAY: Duration = Duration::from_secs(1);

/// What is done to an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Event {
    /// SIGKILL, and a new start when all was watched.
    Kill,
    /// SIGSTOP, SIGCONT two seconds later.
    Stop,
    /// `tandem drain`, then `tandem undrain`.
    Drain,
    /// `tandem drain`, an orderly stop, and a new start: an upgrade.
    Restart,
    /// A dead instance comes back; its death is no part of the trial.
    Rejoin,
}

impl Event {
    /// All.
    pub const ALL: [Event; 5] =
        [Event::Kill, Event::Stop, Event::Drain, Event::Restart, Event::Rejoin];

    /// The key in JSON: the spelling of `tests/failover --kind`.
    pub fn key(self) -> &'static str {
        match self {
            Event::Kill => "kill",
            Event::Stop => "stop",
            Event::Drain => "switchover",
            Event::Restart => "restart",
            Event::Rejoin => "rejoin",
        }
    }

    /// For people.
    pub fn title(self) -> &'static str {
        match self {
            Event::Kill => "kill -9 of an instance",
            Event::Stop => "SIGSTOP of an instance",
            Event::Drain => "drain, and back",
            Event::Restart => "drained, restarted, back",
            Event::Rejoin => "the dead instance returns",
        }
    }

    /// Whether an operator does it on purpose: then nothing may be lost.
    pub fn is_planned(self) -> bool {
        matches!(self, Event::Drain | Event::Restart)
    }

    fn first_leg(self) -> Duration {
        match self {
            Event::Kill | Event::Drain | Event::Restart => OBSERVE,
            Event::Stop => THAW_AFTER,
            Event::Rejoin => Duration::ZERO,
        }
    }

    /// The longest silence that its bar allows, milliseconds.
    fn bar_ms(self, withdraws: bool) -> f64 {
        match self {
            Event::Kill if withdraws => 200.0,
            Event::Kill => 150.0,
            Event::Stop => 400.0,
            Event::Drain | Event::Restart | Event::Rejoin => f64::INFINITY,
        }
    }
}

/// What a flow is to a trial, one way, in one leg.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// It meets the instance that is hurt.
    Met,
    /// It does not.
    Other,
    /// It is not ours to judge.
    Reported,
}

/// One leg of a trial.
#[derive(Clone, Debug, Default)]
pub struct Leg {
    /// Its beginning.
    pub from: Duration,
    /// Its end.
    pub to: Duration,
    /// What each flow met, out, and those that are judged, back.
    pub parts: Vec<(Part, Measure)>,
    /// What came back from the peer, judged or not.
    pub back: Vec<Measure>,
    /// Flows of the hurt endpoint of which packets were seen in the other tunnel.
    pub flows_moved: u64,
    /// The same of the other endpoint.
    pub others_moved: u64,
    /// IKE exchanges that began.
    pub ike_exchanges: u64,
    /// TCP segments that came out of order (or after a lost one) at the bulk stream's receiver.
    pub tcp_reordered: u64,
}

impl Leg {
    fn of(&self, part: Part) -> impl Iterator<Item = &Measure> {
        self.parts.iter().filter(move |(own, _)| *own == part).map(|(_, measure)| measure)
    }

    /// The longest silence of a flow that meets the hurt instance.
    pub fn gap(&self) -> Duration {
        self.of(Part::Met).map(|measure| measure.gap).max().unwrap_or_default()
    }

    /// Packets lost of such flows.
    pub fn lost(&self) -> u64 {
        self.of(Part::Met).map(Measure::lost).sum()
    }

    /// Packets lost of flows that do not meet it.
    pub fn others_lost(&self) -> u64 {
        self.of(Part::Other).map(Measure::lost).sum()
    }

    /// Packets sent of flows that do not meet it.
    pub fn others_sent(&self) -> u64 {
        self.of(Part::Other).map(|measure| measure.sent).sum()
    }

    /// Packets sent of all that is judged.
    pub fn sent(&self) -> u64 {
        [Part::Met, Part::Other].iter().flat_map(|part| self.of(*part)).map(|m| m.sent).sum()
    }

    /// Packets out of order within a flow, of all that is judged.
    pub fn reordered(&self) -> u64 {
        let judged = [Part::Met, Part::Other];
        judged.iter().flat_map(|part| self.of(*part)).map(|measure| measure.reordered).sum()
    }

    /// The longest silence of what the peer sends.
    pub fn back_gap(&self) -> Duration {
        self.back.iter().map(|measure| measure.gap).max().unwrap_or_default()
    }

    /// Packets lost of what the peer sends.
    pub fn back_lost(&self) -> u64 {
        self.back.iter().map(Measure::lost).sum()
    }
}

/// What a trial found.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// What was done.
    pub event: Event,
    /// To which instance.
    pub hurt: usize,
    /// Whether a dead instance's endpoint is withdrawn.
    pub withdraws: bool,
    /// From the event on.
    pub away: Leg,
    /// From the moment on when the instance may come back.
    pub home: Leg,
    /// How long its endpoint took to be at home again.
    pub home_after: Duration,
    /// Flows of a withdrawn endpoint that were not in the other's tunnel a second after the event.
    pub unmoved: u64,
    /// Flows that were not in their own tunnel at the end.
    pub strayed: u64,
    /// SPIs that are not the same at the peer; of a withdrawn endpoint they may differ.
    pub spis_changed: u64,
    /// SPIs there were to compare.
    pub spis_compared: u64,
    /// TCP connections that did not survive.
    pub tcp_broken: u64,
    /// TCP connections there were.
    pub tcp_connections: u64,
    /// Unprotected packets between protected networks on the WAN.
    pub clear_text: u64,
    /// ARP packets on the WAN in which the hurt host claimed its endpoint's address although it did not own it.
    pub arp_claims: u64,
    /// Packets that a stopped instance sent on the WAN after SIGCONT for an endpoint that it did not own.
    pub sent_after_thaw: u64,
    /// Packets of flows that tshark opened, and placed in a tunnel.
    pub placed: u64,
    /// Frames on the WAN that these counts looked at.
    pub frames: u64,
}

impl Outcome {
    /// Whether the trial kept every bar of the table.
    pub fn judge(&self) -> Result<()> {
        self.judge_safety()?;
        let (gap, bar) = (clock::millis(self.away.gap()), self.event.bar_ms(self.withdraws));
        ensure(gap <= bar, || format!("{}: gap {gap:.1} ms, bar {bar} ms", self.event.title()))?;
        let planned = |count: u64| if self.event.is_planned() { count } else { 0 };
        // A withdrawn endpoint's return is a new tunnel, as its drain is the other's: what moves is not held to order.
        let adopted = |count: u64| if self.withdraws { 0 } else { count };
        self.all_zero(&[
            ("packets of planned work lost", planned(self.away.lost())),
            ("packets reordered by planned work", adopted(planned(self.away.reordered()))),
            ("packets of the other's flows lost", self.away.others_lost()),
            ("packets lost on the way home", adopted(self.home.lost())),
            ("packets of the other's flows lost on the way home", self.home.others_lost()),
            ("packets reordered on the way home", adopted(self.home.reordered())),
        ])
    }

    /// The part of [`Outcome::judge`] that no slow machine excuses.
    pub fn judge_safety(&self) -> Result<()> {
        let adopted = |count: u64| if self.withdraws { 0 } else { count };
        self.all_zero(&[
            ("flows moved to another tunnel", adopted(self.flows_moved())),
            ("flows of the other moved to another tunnel", self.others_moved()),
            ("flows that stayed in the withdrawn tunnel", self.unmoved),
            ("flows not in their own tunnel at the end", self.strayed),
            ("SPIs changed", self.spis_changed),
            ("IKE exchanges", adopted(self.ike_exchanges())),
            ("TCP connections broken", self.tcp_broken),
            ("packets in clear", self.clear_text),
            ("ARP claims of the hurt host", self.arp_claims),
            ("packets sent after SIGCONT", self.sent_after_thaw),
        ])
    }

    fn all_zero(&self, counts: &[(&str, u64)]) -> Result<()> {
        for (what, count) in counts {
            ensure(*count == 0, || format!("{}: {count} {what}", self.event.title()))?;
        }
        Ok(())
    }

    /// The longest pause of the machine itself, if pauses explain every silence that broke a bar (see
    /// [`crate::trial::Outcome::stood_still`]).
    pub fn stood_still(&self, stalls: &StallWatch) -> Option<Duration> {
        self.judge_safety().ok()?;
        let planned = self.event.is_planned();
        let bar = self.event.bar_ms(self.withdraws);
        let broke = |(part, measure): &(Part, Measure), strict: bool| match part {
            Part::Met => clock::millis(measure.gap) > bar || (strict && measure.lost() > 0),
            Part::Other => measure.lost() > 0,
            Part::Reported => false,
        };
        let away = self.away.parts.iter().filter(|part| broke(part, planned));
        let home = self.home.parts.iter().filter(|part| broke(part, !self.withdraws));
        let mut longest = None;
        for (_, measure) in away.chain(home) {
            longest = longest.max(Some(stalls.explains(measure.gap_start, measure.gap)?));
        }
        longest
    }

    /// Flows of the hurt endpoint that were seen in the other tunnel: in the worse leg, since both see the same ones.
    pub fn flows_moved(&self) -> u64 {
        self.away.flows_moved.max(self.home.flows_moved)
    }

    /// The same of the other endpoint.
    pub fn others_moved(&self) -> u64 {
        self.away.others_moved.max(self.home.others_moved)
    }

    /// IKE exchanges of the whole trial.
    pub fn ike_exchanges(&self) -> u64 {
        self.away.ike_exchanges + self.home.ike_exchanges
    }

    /// Packets sent of all that is judged.
    pub fn sent(&self) -> u64 {
        self.away.sent() + self.home.sent()
    }

    /// Which flows lost packets or got them out of order, and where.
    pub fn tell_flows(&self, flows: &[Flow]) -> String {
        let mut told = Vec::new();
        for (when, leg) in [("away", &self.away), ("on the way home", &self.home)] {
            // Out and back, flow by flow.
            for (index, (part, measure)) in leg.parts.iter().enumerate() {
                if measure.lost() + measure.reordered > 0 && *part != Part::Reported {
                    let name = flows.get(index / 2).map(Flow::name).unwrap_or_default();
                    told.push(format!(
                        "{when}: {name}, {}: {} lost, {} reordered, gap {:.1} ms from {} on",
                        ["out", "back"][index % 2],
                        measure.lost(),
                        measure.reordered,
                        clock::millis(measure.gap),
                        clock::time_of_day(measure.gap_start)
                    ));
                }
            }
        }
        told.join("; ")
    }

    /// One line.
    pub fn tell(&self) -> String {
        let (away, home) = (&self.away, &self.home);
        format!(
            "gap {:.1} ms, lost {} and {} of the other's, reordered {}; home after {:.1} s: lost {}, reordered {}; \
             {} flows moved, {} of the other's; SPIs changed {}, exchanges {}, TCP broken {}, TCP segments reordered {}; \
             from the peer: gap {:.1} ms, lost {}",
            clock::millis(away.gap()),
            away.lost(),
            away.others_lost(),
            away.reordered(),
            self.home_after.as_secs_f64(),
            home.lost() + home.others_lost(),
            home.reordered(),
            self.flows_moved(),
            self.others_moved(),
            self.spis_changed,
            self.ike_exchanges(),
            self.tcp_broken,
            away.tcp_reordered + home.tcp_reordered,
            clock::millis(away.back_gap().max(home.back_gap())),
            away.back_lost() + home.back_lost(),
        )
    }
}

/// Where a trial is, for who watches.
#[derive(Clone, Copy, Debug)]
pub enum Moment {
    /// The instance was hurt just now.
    Hurt,
    /// It may come back from now on.
    Home,
    /// Time passes.
    Tick,
}

/// A hook that is called while a trial watches.
pub type Watch<'a> = &'a mut dyn FnMut(&Active, Moment);

/// Hurts one instance and waits until all is at home again.
pub fn trial(run: &Run, scene: &mut Active, event: Event, hurt: usize) -> Result<Outcome> {
    let outcome = watched(run, scene, event, hurt, 0.3, &mut |_, _| {})?;
    scene.forget(outcome.away.from);
    Ok(outcome)
}

/// The same, `phase` (0 to 1) being where in the pair's rhythm the event falls.
pub fn watched(
    run: &Run,
    scene: &mut Active,
    event: Event,
    hurt: usize,
    phase: f64,
    watch: Watch<'_>,
) -> Result<Outcome> {
    prepare(scene, event, hurt)?;
    let before = kept_spis(scene, hurt)?;
    scene.look(run)?.discard();
    let tcp = [tcp_out_of_order(scene)?];
    let start = clock::now()
        + Duration::from_secs(1)
        + Duration::from_millis(100).mul_f64(phase.clamp(0.0, 1.0));
    clock::sleep_until(start);
    let from = clock::now();
    hit(scene, event, hurt)?;
    watch(scene, Moment::Hurt);
    ticks(scene, from + event.first_leg(), watch);
    let survivor = &scene.instances[1 - hurt];
    if scene.withdraws {
        let there = survivor.status()?.endpoint(ENDPOINTS[hurt].0);
        ensure(there.role != "owner", || {
            format!("{} owns {}, which is withdrawn", survivor.name, there.name)
        })?;
    }
    // The peer sends everything through one tunnel, so one instance meets all that comes back.
    let back_meets = back_arrives(scene)? == hurt;
    let tcp = [tcp[0], tcp_out_of_order(scene)?];

    let home_from = clock::now();
    watch(scene, Moment::Home);
    bring_home(scene, event, hurt, watch)?;
    let at_home = clock::now();
    ticks(scene, at_home + AT_HOME, watch);
    let to = clock::now();
    let tcp = [tcp[0], tcp[1], tcp_out_of_order(scene)?];

    let mut away = Leg { from, to: home_from, tcp_reordered: tcp[1] - tcp[0], ..Leg::default() };
    let mut home = Leg { from: home_from, to, tcp_reordered: tcp[2] - tcp[1], ..Leg::default() };
    for flow in &scene.flows {
        flow.udp.settle(to)?;
        for (leg, is_home) in [(&mut away, false), (&mut home, true)] {
            for way in Way::BOTH {
                let measure = flow.udp.measure(way, leg.from, leg.to);
                if way == Way::In {
                    leg.back.push(measure);
                }
                let part = part_of(
                    (flow.arrives, flow.pinned),
                    way,
                    hurt,
                    scene.withdraws,
                    back_meets,
                    is_home,
                );
                leg.parts.push((part, measure));
            }
        }
    }
    let (tcp_broken, tcp_connections) = match &mut scene.tcp {
        Some(tcp) => (tcp.broken(Duration::from_secs(10))?, tcp.connections()),
        None => (0, 0),
    };
    let after = kept_spis(scene, hurt)?;
    let mut outcome = Outcome {
        event,
        hurt,
        withdraws: scene.withdraws,
        away,
        home,
        home_after: at_home - home_from,
        unmoved: 0,
        strayed: 0,
        spis_changed: if before.0.is_empty() { u64::MAX } else { before.changed(&after) },
        spis_compared: before.count(),
        tcp_broken,
        tcp_connections,
        clear_text: 0,
        arp_claims: 0,
        sent_after_thaw: 0,
        placed: 0,
        frames: 0,
    };
    let seen = scene.look(run)?;
    look_at(run, scene, &seen, &mut outcome)?;
    seen.discard();
    Ok(outcome)
}

/// All at home, in both tunnels, flowing; for a rejoin without the instance that is to return.
fn prepare(scene: &mut Active, event: Event, hurt: usize) -> Result<()> {
    scene.wait_home(PATIENCE)?;
    scene.wait_tunnels(PATIENCE)?;
    flowing(scene)?;
    if event == Event::Rejoin {
        hit(scene, Event::Kill, hurt)?;
        let killed = clock::now();
        for flow in &scene.flows {
            let tick = Duration::from_millis(20);
            let after = killed + Duration::from_millis(500);
            wait::for_true("each flow to arrive at the peer's host", PATIENCE, tick, || {
                !flow.udp.arrivals(Way::Out, after, Duration::MAX).is_empty()
            })?;
        }
        if !scene.withdraws {
            flowing(scene)?;
        }
    }
    Ok(())
}

fn flowing(scene: &Active) -> Result<()> {
    scene.flows.iter().try_for_each(|flow| flow.udp.wait_flowing(PATIENCE))
}

/// Lets time pass.
fn ticks(scene: &Active, until: Duration, watch: Watch<'_>) {
    while clock::now() < until {
        watch(scene, Moment::Tick);
        clock::sleep_until((clock::now() + Duration::from_millis(50)).min(until));
    }
}

fn hit(scene: &mut Active, event: Event, hurt: usize) -> Result<()> {
    let instance = &mut scene.instances[hurt];
    match event {
        Event::Kill => instance.kill9()?,
        Event::Stop => instance.freeze()?,
        Event::Drain => instance.tandem(&["drain"]).map(drop)?,
        Event::Restart => {
            instance.tandem(&["drain"])?;
            instance.stop()?;
        }
        Event::Rejoin => {}
    }
    if scene.withdraws && event != Event::Rejoin {
        scene.net.next_hop(hurt, NEXT_HOPS[1 - hurt])?;
    }
    Ok(())
}

fn bring_home(scene: &mut Active, event: Event, hurt: usize, watch: Watch<'_>) -> Result<()> {
    let instance = &mut scene.instances[hurt];
    match event {
        Event::Kill | Event::Restart | Event::Rejoin => {
            instance.bury()?;
            instance.start()?;
        }
        Event::Stop => instance.thaw()?,
        Event::Drain => instance.tandem(&["undrain"]).map(drop)?,
    }
    let deadline = clock::now() + PATIENCE;
    loop {
        match scene.wait_home(Duration::ZERO) {
            Ok(()) => break,
            Err(error) if clock::now() > deadline => return Err(error),
            Err(_) => watch(scene, Moment::Tick),
        }
    }
    if scene.withdraws {
        scene.wait_tunnels(PATIENCE)?;
        scene.net.next_hop(hurt, NEXT_HOPS[hurt])?;
        flowing(scene)?;
    }
    Ok(())
}

/// What a flow that arrives at one endpoint and is pinned to one is to a trial.
fn part_of(
    (arrives, pinned): (usize, usize),
    way: Way,
    hurt: usize,
    withdraws: bool,
    back_meets: bool,
    is_home: bool,
) -> Part {
    let meets = arrives == hurt || pinned == hurt;
    match (withdraws, way) {
        (true, Way::In) => Part::Reported,
        (true, Way::Out) if arrives == hurt => Part::Reported,
        (true, Way::Out) if meets => Part::Met,
        (true, Way::Out) => Part::Other,
        // Nothing excuses a loss on the way home.
        (false, _) if is_home => Part::Met,
        (false, Way::Out) if meets => Part::Met,
        (false, Way::In) if back_meets => Part::Met,
        (false, _) => Part::Other,
    }
}

/// The peer's SPIs that must stay: all, or without the withdrawn endpoint's.
fn kept_spis(scene: &Active, hurt: usize) -> Result<Spis> {
    let mut sas = scene.peer.sas()?;
    if scene.withdraws {
        let stays = format!("gw-{}", ENDPOINTS[1 - hurt].0);
        sas.retain(|sa| sa.name == stays);
    }
    Ok(Spis::of(sas))
}

/// Home of the endpoint whose tunnel the peer sends through: of its Child SAs the one that sent most.
fn back_arrives(scene: &Active) -> Result<usize> {
    let sas = scene.peer.sas()?;
    let busiest = sas
        .iter()
        .max_by_key(|sa| sa.children.iter().map(|child| child.packets_out).sum::<u64>())
        .ok_or_else(|| Error::check("the peer has no tunnel"))?;
    let at = ENDPOINTS.iter().find(|(name, ..)| busiest.name == format!("gw-{name}"));
    at.map(|(_, home, _)| *home).ok_or_else(|| Error::check(format!("what is {}?", busiest.name)))
}

/// TCP segments that the host behind the peer has had to put in order so far (the kernel's `TCPOFOQueue`).
fn tcp_out_of_order(scene: &Active) -> Result<u64> {
    let text = scene.net.rhost.cmd("cat").arg("/proc/net/netstat").run(PATIENCE)?;
    let mut lines = text.lines().filter(|line| line.starts_with("TcpExt:"));
    let mut words = || lines.next().unwrap_or_default().split(' ').collect::<Vec<_>>();
    let (names, values) = (words(), words());
    let at = names.iter().position(|name| *name == "TCPOFOQueue");
    at.and_then(|at| values.get(at)?.parse().ok())
        .ok_or_else(|| Error::parse("/proc/net/netstat", "no TCPOFOQueue in it"))
}

/// Everything that captures say.
fn look_at(run: &Run, scene: &Active, seen: &Recording, outcome: &mut Outcome) -> Result<()> {
    let (event, hurt) = (outcome.event, outcome.hurt);
    let (from, home_from, to) = (outcome.away.from, outcome.home.from, outcome.home.to);
    for (leg, lead) in
        [(&mut outcome.away, Duration::from_secs(1)), (&mut outcome.home, Duration::ZERO)]
    {
        leg.ike_exchanges = check::ike_exchanges(seen, leg.from.saturating_sub(lead), leg.to);
    }
    outcome.clear_text = check::clear_text(seen);
    outcome.frames = seen.packets().count() as u64;
    let mac = scene.instances[hurt].ns.mac("eth0")?;
    let address: Ipv4Addr = ENDPOINTS[hurt].2.parse().unwrap_or(Ipv4Addr::UNSPECIFIED);
    // An owner may still have answered a moment before it died: a frame on its way counts as before.
    let quiet = from + Duration::from_millis(if event.is_planned() { 1000 } else { 5 });
    if event != Event::Rejoin {
        outcome.arp_claims = check::arp_claims(seen, mac, address, quiet, home_from);
    }
    if event == Event::Stop && !outcome.withdraws {
        let listens = home_from + STILL_AWAY;
        outcome.sent_after_thaw =
            check::sent_as(seen, mac, IpAddr::V4(address), home_from, listens);
    }
    if scene.keylog.is_some() {
        let placed = place(run, scene, seen)?;
        outcome.placed = placed.iter().filter(|(_, at, _)| (from..to).contains(at)).count() as u64;
        let pinned: Vec<usize> = scene.flows.iter().map(|flow| flow.pinned).collect();
        for leg in [&mut outcome.away, &mut outcome.home] {
            let span = (leg.to - leg.from).as_secs_f64();
            let strays = strays(&placed, &pinned, leg.from, leg.to);
            for (index, (seen, stray)) in strays.into_iter().enumerate() {
                // A flow that tshark does not see would never be seen to move.
                let least = (span * f64::from(RATE) * 0.5) as u64;
                ensure(seen >= least, || {
                    format!("{}: tshark sees {seen} packets", scene.flows[index].name())
                })?;
                let moved = if pinned[index] == hurt {
                    &mut leg.flows_moved
                } else {
                    &mut leg.others_moved
                };
                *moved += u64::from(stray > 0);
            }
        }
        if outcome.withdraws && event != Event::Rejoin {
            let late = strays(&placed, &pinned, from + WITHDRAWN, home_from);
            let unmoved = |(flow, (seen, stray)): &(&Flow, (u64, u64))| {
                flow.pinned == hurt && (*stray == 0 || stray < seen)
            };
            outcome.unmoved = scene.flows.iter().zip(late).filter(unmoved).count() as u64;
        }
        let end = strays(&placed, &pinned, to.saturating_sub(AT_HOME / 2), to);
        outcome.strayed = end.iter().filter(|(_, stray)| *stray > 0).count() as u64;
    }
    Ok(())
}

/// A packet's flow, when it left, and the endpoint whose tunnel it left by.
type Placed = (usize, Duration, usize);

/// Lets tshark open what our side sent.
fn place(run: &Run, scene: &Active, seen: &Recording) -> Result<Vec<Placed>> {
    let sources = ENDPOINTS.map(|(_, _, address)| address.parse::<IpAddr>().ok());
    let path = run.dir().join("flows.pcap");
    // The bulk stream's segments are larger than what was kept of them, so nobody could open them.
    seen.select(&path, |packet| packet.full_length <= 200 && sources.contains(&packet.source))?;
    let inner: Vec<String> = scene.flows.iter().map(Flow::inner).collect();
    let mut placed = Vec::new();
    for packet in capture::tshark_flows(&path, scene.keylog()?)? {
        let flow = inner.iter().position(|inner| *inner == packet.flow);
        let tunnel = ENDPOINTS.iter().position(|(_, _, address)| *address == packet.outer);
        if let (Some(flow), Some(tunnel)) = (flow, tunnel) {
            placed.push((flow, seen.boot_time(packet.at), tunnel));
        }
    }
    Ok(placed)
}

/// Of each flow, within a window: packets, and those of them that left by another tunnel than its own.
fn strays(placed: &[Placed], pinned: &[usize], from: Duration, to: Duration) -> Vec<(u64, u64)> {
    let mut counts = vec![(0, 0); pinned.len()];
    for (flow, _, tunnel) in placed.iter().filter(|(_, at, _)| (from..to).contains(at)) {
        counts[*flow].0 += 1;
        counts[*flow].1 += u64::from(pinned[*flow] != *tunnel);
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_packet_in_the_wrong_tunnel_is_seen_in_its_window_only() {
        let placed = [(0, MS, 0), (1, MS, 1), (0, 2 * MS, 1), (1, 3 * MS, 1)];
        assert_eq!(strays(&placed, &[0, 1], MS, 2 * MS), [(1, 0), (1, 0)]);
        assert_eq!(strays(&placed, &[0, 1], MS, 4 * MS), [(2, 1), (2, 0)]);
    }

    fn measure(sent: u64, received: u64, gap_ms: u32) -> Measure {
        let gap = gap_ms * MS;
        Measure { sent, received, gap, gap_start: 1000 * MS, ..Measure::default() }
    }

    fn outcome(event: Event, withdraws: bool, parts: &[(Part, Measure)]) -> Outcome {
        Outcome {
            event,
            hurt: 0,
            withdraws,
            away: Leg { parts: parts.to_vec(), ..Leg::default() },
            home: Leg::default(),
            home_after: Duration::ZERO,
            unmoved: 0,
            strayed: 0,
            spis_changed: 0,
            spis_compared: 8,
            tcp_broken: 0,
            tcp_connections: 2,
            clear_text: 0,
            arp_claims: 0,
            sent_after_thaw: 0,
            placed: 1,
            frames: 1,
        }
    }

    #[test]
    fn each_flow_is_held_to_its_own_bar() {
        let parts = [
            (Part::Met, measure(100, 90, 140)),
            (Part::Other, measure(100, 100, 3)),
            (Part::Reported, measure(100, 0, 5000)),
        ];
        let kill = outcome(Event::Kill, false, &parts);
        kill.judge().unwrap();
        assert_eq!((kill.away.lost(), kill.away.others_lost(), kill.sent()), (10, 0, 200));
        assert!(
            outcome(Event::Drain, false, &parts).judge().is_err(),
            "planned work loses nothing"
        );
        let slow = [(Part::Met, measure(100, 90, 180))];
        assert!(outcome(Event::Kill, false, &slow).judge().is_err());
        outcome(Event::Kill, true, &slow).judge().unwrap();
        let other = [(Part::Other, measure(100, 99, 3))];
        assert!(outcome(Event::Kill, true, &other).judge().is_err());
        let mut home = outcome(Event::Kill, false, &[]);
        home.home.parts = vec![(Part::Met, measure(100, 99, 3))];
        assert!(home.judge().is_err(), "nothing is lost on the way home");
    }

    #[test]
    fn only_a_withdrawn_endpoints_flows_may_move() {
        let spoil = |withdraws, change: fn(&mut Outcome)| {
            let mut spoilt = outcome(Event::Kill, withdraws, &[]);
            change(&mut spoilt);
            spoilt.judge().is_err()
        };
        assert!(spoil(false, |o| o.away.flows_moved = 1));
        assert!(!spoil(true, |o| o.away.flows_moved = 2));
        assert!(spoil(true, |o| o.home.others_moved = 1));
        assert!(spoil(true, |o| o.unmoved = 1), "a flow that still goes into the dead tunnel");
        assert!(spoil(true, |o| o.strayed = 1), "a flow that did not come back");
        assert!(spoil(true, |o| o.spis_changed = 2));
        assert!(spoil(false, |o| o.home.ike_exchanges = 1));
        assert!(!spoil(true, |o| o.home.ike_exchanges = 1));
    }

    #[test]
    fn a_pause_must_explain_every_silence() {
        let slow = (Part::Met, measure(100, 60, 180));
        let elsewhere = (Part::Other, Measure { gap_start: 9000 * MS, ..measure(100, 99, 4) });
        let watch = StallWatch::saw(&[(1010 * MS, 80 * MS)]);
        let kill = |parts: &[_]| outcome(Event::Kill, false, parts).stood_still(&watch);
        assert_eq!(kill(&[slow]), Some(80 * MS));
        assert_eq!(kill(&[slow, elsewhere]), None);
        assert_eq!(kill(&[]), None, "nothing broke a bar");
        let unsafe_ = Outcome { clear_text: 1, ..outcome(Event::Kill, false, &[slow]) };
        assert_eq!(unsafe_.stood_still(&watch), None);
    }

    #[test]
    fn what_a_flow_is_to_a_trial() {
        let part = |arrives: usize, pinned: usize, way, withdraws, home| {
            part_of((arrives, pinned), way, 0, withdraws, false, home)
        };
        assert_eq!(part(1, 1, Way::Out, false, false), Part::Other);
        assert_eq!(part(0, 1, Way::Out, false, false), Part::Met, "steered by the hurt one");
        assert_eq!(part(1, 0, Way::Out, true, false), Part::Met);
        assert_eq!(part(0, 0, Way::Out, true, false), Part::Reported, "its next hop is gone");
        assert_eq!(part(1, 1, Way::In, true, false), Part::Reported);
        assert_eq!(part(1, 1, Way::In, false, true), Part::Met);
    }
}
