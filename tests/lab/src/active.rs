//! Active-active in the lab: two endpoints, a tunnel at each to one strongSwan, and flows of every kind.
//!
//! ```text
//!   lhost 10.1.0.9  ──► 10.1.0.1 (endpoint a, at home on the left)  ─┐ pinned to a: by 203.0.113.10
//!   lhost 10.1.0.19 ──► 10.1.0.4 (endpoint b, at home on the right) ─┴ pinned to b: by 203.0.113.20
//! ```
//! A flow arrives where its host's next hop leads, and leaves by the tunnel that it is pinned to: where these differ, it
//! crosses the pair link. A scene has one flow of each of the four kinds. What the peer sends where is its own choice:
//! strongSwan with kernel-libipsec uses its newest tunnel for all.

use crate::baseline::peer_conn;
use crate::capture::{Capture, Recording};
use crate::charon::{Backend, Charon, Conn, Spis};
use crate::check::IvChecker;
use crate::clock;
use crate::error::{Error, Result, ensure};
use crate::net::{self, Net};
use crate::probe::{Measure, UdpProbes, Way};
use crate::run::Run;
use crate::scene::{PATIENCE, start_pair_with};
use crate::tandem::{Bins, Config, Daemon, PSK};
use crate::wait;
use std::time::Duration;

/// Packets a second of each flow, each way.
const RATE: u32 = 500;
/// Ports are tried from here on until each kind of flow has one.
const PORTS_FROM: u16 = 7100;
/// How long a trial watches after its event.
pub const OBSERVE: Duration = Duration::from_secs(5);

/// Name, home, WAN address of the two endpoints.
pub const ENDPOINTS: [(&str, usize, &str); 2] =
    [("a", 0, net::VIRTUAL_WAN), ("b", 1, net::SECOND_WAN)];

/// A flow, and where it goes.
#[derive(Debug)]
pub struct Flow {
    /// Its packets.
    pub udp: UdpProbes,
    /// Index of the endpoint that its host sends to.
    pub arrives: usize,
    /// Index of the endpoint that it is pinned to.
    pub pinned: usize,
}

impl Flow {
    /// For people.
    pub fn name(&self) -> String {
        let name = |index: usize| ENDPOINTS.get(index).map_or("?", |(name, ..)| name);
        format!("arrives at {}, pinned to {}", name(self.arrives), name(self.pinned))
    }
}

/// The scene.
#[derive(Debug)]
pub struct Active {
    /// One of each kind.
    pub flows: Vec<Flow>,
    /// Left and right.
    pub instances: [Daemon; 2],
    /// The remote gateway.
    pub peer: Charon,
    /// The network.
    pub net: Net,
    /// Looks at every protected datagram on the WAN.
    pub ivs: IvChecker,
    wan: Option<Capture>,
}

/// The peer's two connections: the same gateway and networks by two addresses.
pub fn peer_conns() -> Vec<Conn> {
    let at = |(name, _, address): (&str, usize, &str)| {
        // One identity twice: uniqueness would take the first tunnel for replaced (peers.md).
        let mut conn = peer_conn(PSK).with("unique", "never");
        conn.name = format!("gw-{name}");
        conn.remote_addr = address.into();
        for child in &mut conn.children {
            child.name = format!("net-{name}");
        }
        conn
    };
    ENDPOINTS.map(at).into()
}

impl Active {
    /// Network, pair and peer, both tunnels up, no traffic yet. `args` go to the daemons.
    pub fn quiet(run: &Run, bins: &Bins, config: &Config, args: &[&str]) -> Result<Active> {
        let net = Net::build(run)?;
        net.split_sends()?;
        net.second_next_hop()?;
        let wan = start_wan(run, &net)?;
        let mut instances = start_pair_with(run, bins, &net, config, args)?;
        wait_home(&mut instances, PATIENCE)?;
        let peer = Charon::start_with(run, &net.peer, Backend::Libipsec, "")?;
        peer.load(&peer_conns())?;
        for (name, ..) in ENDPOINTS {
            peer.initiate(&format!("net-{name}"), PATIENCE)?;
        }
        wait::until("both tunnels at both instances", PATIENCE, Duration::from_millis(20), || {
            let up = |instance: &Daemon| -> Result<bool> {
                let tunnels = instance.status()?.tunnels;
                Ok(tunnels.len() == 2 && tunnels.iter().all(|t| t.state == "established"))
            };
            Ok((up(&instances[0])? && up(&instances[1])?).then_some(()))
        })?;
        let ivs = IvChecker::default();
        Ok(Active { flows: Vec::new(), instances, peer, net, ivs, wan: Some(wan) })
    }

    /// The same with traffic.
    pub fn build(run: &Run, bins: &Bins, config: &Config, args: &[&str]) -> Result<Active> {
        let mut scene = Active::quiet(run, bins, config, args)?;
        let hosts = [net::LHOST, net::LHOST_SECOND];
        for (arrives, source) in hosts.into_iter().enumerate() {
            // One host answers for both, so no port twice.
            let first = PORTS_FROM + 64 * arrives as u16;
            for port in first..first + 64 {
                if scene.flows.iter().filter(|flow| flow.arrives == arrives).count() == 2 {
                    break;
                }
                let ends = ((&scene.net.lhost, source), (&scene.net.rhost, net::RHOST));
                let udp = UdpProbes::on_port(run, ends.0, ends.1, RATE, port)?;
                udp.wait_flowing(PATIENCE)?;
                let filters = ["--address", source, "--port", &port.to_string()];
                let seen = scene.instances[arrives].flows(&filters)?;
                let pinned = seen.iter().find(|flow| flow.source == source).and_then(|flow| {
                    ENDPOINTS.iter().position(|(name, ..)| *name == flow.endpoint)
                });
                let pinned = pinned
                    .ok_or_else(|| Error::check(format!("{source}:{port} is not in {seen:?}")))?;
                let known = |flow: &Flow| (flow.arrives, flow.pinned) == (arrives, pinned);
                if !scene.flows.iter().any(known) {
                    scene.flows.push(Flow { udp, arrives, pinned });
                }
            }
        }
        ensure(scene.flows.len() == 4, || format!("{} kinds of flow found", scene.flows.len()))?;
        Ok(scene)
    }

    /// Ends the running capture after a new one has started, and hands over what it saw.
    pub fn look(&mut self, run: &Run) -> Result<Recording> {
        let next = start_wan(run, &self.net)?;
        let wan = self.wan.replace(next).ok_or_else(|| Error::check("no capture is running"))?;
        let seen = wan.stop()?;
        self.ivs.feed_esp(&seen);
        Ok(seen)
    }

    /// Waits until each endpoint is owned at home and both instances are in sync.
    pub fn wait_home(&mut self, within: Duration) -> Result<()> {
        wait_home(&mut self.instances, within)
    }

    /// Fails if an instance has logged an ERROR, or anything was seen that must never be.
    pub fn check_clean(&self) -> Result<()> {
        for instance in &self.instances {
            let errors = instance.log_errors();
            ensure(errors.is_empty(), || {
                format!("{} logged: {}", instance.name, errors.join(" / "))
            })?;
        }
        ensure(self.ivs.iv_repeats + self.ivs.sequence_repeats == 0, || {
            format!("IV or sequence repeats: {:?}", self.ivs.examples)
        })
    }

    /// What each flow met within a window, out and back.
    pub fn measure(&self, from: Duration, to: Duration) -> Result<Vec<[Measure; 2]>> {
        let mut all = Vec::new();
        for flow in &self.flows {
            flow.udp.settle(to)?;
            all.push(Way::BOTH.map(|way| flow.udp.measure(way, from, to)));
        }
        Ok(all)
    }
}

fn start_wan(run: &Run, net: &Net) -> Result<Capture> {
    Capture::start(run, &net.wan, "br0", "", 256)
}

/// Waits until each endpoint is owned at home and both instances are in sync.
pub fn wait_home(instances: &mut [Daemon; 2], within: Duration) -> Result<()> {
    wait::until_ok("each endpoint at home, in sync", within, Duration::from_millis(20), || {
        for (name, home, _) in ENDPOINTS {
            let here = instances[home].status()?.endpoint(name);
            let there = instances[1 - home].status()?.endpoint(name);
            ensure(
                here.role == "owner" && here.mode == "synced" && there.role == "shadow",
                || {
                    format!(
                        "{name} is {} ({}) at home and {} away from it",
                        here.role, here.mode, there.role
                    )
                },
            )?;
        }
        Ok(())
    })
}

/// What is done to an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// SIGKILL, and a new start when all was watched.
    Kill,
    /// `tandem drain`, then `tandem undrain`.
    Drain,
    /// `tandem drain`, an orderly stop, and a new start: an upgrade.
    Restart,
}

/// What a trial found.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// The longest silence of a flow that met the hurt instance: it is pinned there, or arrives there.
    pub gap: Duration,
    /// Packets lost of such flows.
    pub lost: u64,
    /// Packets lost of flows that arrive and stay at the other.
    pub others_lost: u64,
    /// Packets lost on the way home.
    pub home_lost: u64,
    /// Packets out of order within a flow, of all flows until all is at home.
    pub reordered: u64,
    /// Packets sent by all flows, both ways.
    pub sent: u64,
    /// Flows whose packets were seen in another tunnel than theirs.
    pub flows_moved: u64,
    /// SPIs that are not the same at the peer.
    pub spis_changed: u64,
    /// Unprotected packets between protected networks.
    pub clear_text: u64,
}

impl Outcome {
    /// Whether the trial kept every bar of the issue's table.
    pub fn judge(&self, event: Event) -> Result<()> {
        let gap = clock::millis(self.gap);
        let bar = if event == Event::Kill { 150.0 } else { f64::INFINITY };
        ensure(gap <= bar, || format!("gap {gap:.1} ms, bar {bar} ms"))?;
        let planned = event != Event::Kill;
        let zeros = [
            ("packets of planned work lost", if planned { self.lost } else { 0 }),
            ("packets reordered", if planned { self.reordered } else { 0 }),
            ("packets of the other's flows lost", self.others_lost),
            ("packets lost on the way home", self.home_lost),
            ("flows moved to another tunnel", self.flows_moved),
            ("SPIs changed", self.spis_changed),
            ("packets in clear", self.clear_text),
        ];
        for (what, count) in zeros {
            ensure(count == 0, || format!("{count} {what}: {self:?}"))?;
        }
        Ok(())
    }
}

/// Hurts one instance and waits until all is at home again.
pub fn trial(run: &Run, scene: &mut Active, event: Event, hurt: usize) -> Result<Outcome> {
    scene.wait_home(PATIENCE)?;
    for flow in &scene.flows {
        flow.udp.wait_flowing(PATIENCE)?;
    }
    let before: Spis = scene.peer.spis()?;
    scene.look(run)?.discard();
    let start = clock::now();
    match event {
        Event::Kill => scene.instances[hurt].kill9()?,
        Event::Drain => scene.instances[hurt].tandem(&["drain"]).map(drop)?,
        Event::Restart => {
            scene.instances[hurt].tandem(&["drain"])?;
            scene.instances[hurt].stop()?;
        }
    }
    clock::sleep_until(start + OBSERVE);
    let end = clock::now();
    let met = scene.measure(start, end)?;
    // Half the flows are pinned to each endpoint, so a flow that changed its tunnel shows in the shares.
    let settled = start + Duration::from_secs(1);
    let shares = shares(&scene.look(run)?, settled, end);
    let home_from = clock::now();
    match event {
        Event::Kill | Event::Restart => {
            scene.instances[hurt].bury()?;
            scene.instances[hurt].start()?;
        }
        Event::Drain => scene.instances[hurt].tandem(&["undrain"]).map(drop)?,
    }
    scene.wait_home(PATIENCE)?;
    let home_to = clock::now() + Duration::from_secs(1);
    clock::sleep_until(home_to);
    let home = scene.measure(home_from, home_to)?;
    let after = scene.peer.spis()?;
    let seen = scene.look(run)?;

    let mut outcome = Outcome {
        flows_moved: moved(shares, settled, end),
        spis_changed: if before.0.is_empty() { u64::MAX } else { before.changed(&after) },
        clear_text: crate::check::clear_text(&seen),
        ..Outcome::default()
    };
    seen.discard();
    // The peer sends everything through one tunnel, so one instance meets all that comes back.
    let back_meets = back_arrives(scene)? == hurt;
    for (flow, (met, home)) in scene.flows.iter().zip(met.iter().zip(&home)) {
        let meets = [flow.arrives == hurt || flow.pinned == hurt, back_meets];
        for ((met, home), meets) in met.iter().zip(home).zip(meets) {
            outcome.sent += met.sent + home.sent;
            outcome.reordered += met.reordered + home.reordered;
            outcome.home_lost += home.lost();
            if meets {
                outcome.gap = outcome.gap.max(met.gap);
                outcome.lost += met.lost();
            } else {
                outcome.others_lost += met.lost();
            }
        }
    }
    for flow in &scene.flows {
        flow.udp.forget(start);
    }
    Ok(outcome)
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

/// A probe in ESP is no longer; a bulk stream's segments are.
const PROBE_MAX: u32 = 512;

/// ESP packets of probes that left from each endpoint's address within a window.
fn shares(seen: &Recording, from: Duration, to: Duration) -> [u64; 2] {
    ENDPOINTS.map(|(_, _, address)| crate::check::sent_by(seen, address, PROBE_MAX, from, to))
}

/// How many flows left by another tunnel than theirs, given that half of them are pinned to each.
fn moved(shares: [u64; 2], from: Duration, to: Duration) -> u64 {
    let flow = (to - from).as_secs_f64() * f64::from(RATE);
    let off = shares.iter().map(|count| (*count as f64 / flow - 2.0).abs().round() as u64);
    off.max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flow_in_the_wrong_tunnel_shows_in_the_shares() {
        let (from, to) = (Duration::ZERO, Duration::from_secs(4));
        assert_eq!(moved([4000, 4000], from, to), 0);
        assert_eq!(moved([3900, 4050], from, to), 0);
        assert_eq!(moved([6000, 2000], from, to), 1);
        assert_eq!(moved([0, 8000], from, to), 2);
    }
}
