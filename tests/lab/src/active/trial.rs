//! One fault of an active-active pair, measured: what happens to the flows of the instance that is hurt, and to the others.
//!
//! A trial has two legs: from the event on, and from the moment when the instance may come back until its endpoint has been
//! at home for a second. A flow meets the hurt instance if it is pinned to its endpoint or arrives there. Which tunnel each
//! flow is in, tshark says, with the daemons' key log.
//!
//! Where a dead instance's endpoint is withdrawn, its LAN address goes too: the lab then changes the next hop of the host
//! that used it, as a LAN's routing would, and judges only flows that arrive at the other. What the peer sends is only
//! reported there: it goes on sending into the dead tunnel until it notices.

use super::outcome::{Event, Leg, Outcome, Part};
use super::{Active, ENDPOINTS, Flow, NEXT_HOPS, RATE};
use crate::capture::{self, Recording};
use crate::charon::Spis;
use crate::check;
use crate::clock;
use crate::error::{Error, Result, ensure};
use crate::probe::Way;
use crate::run::Run;
use crate::scene::PATIENCE;
use crate::wait;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

/// How long the first leg of a trial is, where the instance does not come back by itself.
pub const OBSERVE: Duration = Duration::from_secs(5);
/// When a stopped instance goes on: the end of that trial's first leg.
pub(super) const THAW_AFTER: Duration = Duration::from_secs(2);
/// How long an endpoint has been at home when a trial ends.
const AT_HOME: Duration = Duration::from_secs(1);
/// A flow that leaves by a dead tunnel so long after the event has not been moved.
const WITHDRAWN: Duration = Duration::from_secs(1);
/// An instance that has just woken waits at least so long before its endpoint goes home (`hold_down_s` is 2 here).
const STILL_AWAY: Duration = Duration::from_secs(1);

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
