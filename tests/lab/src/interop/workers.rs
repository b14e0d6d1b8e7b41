//! `workers = 2`: two connections to a strongSwan, one for each worker, through rekeys and through every fault.

use super::stage::{Single, TICK, conn, single};
use super::{Lab, Scenario};
use crate::capture::Capture;
use crate::charon::Conn;
use crate::check::{self, IvChecker};
use crate::error::{Result, ensure};
use crate::probe::{Measure, UdpProbes, Way};
use crate::scene::{PATIENCE, Scene, Setup};
use crate::tandem::{Config, Connection, Status, branch, offloads_off};
use crate::trial::{Kind, run_trial};
use crate::{clock, net, wait};
use std::collections::BTreeSet;
use std::time::Duration;

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "workers-traffic",
        about: "two workers, a tunnel each: traffic both ways, rekeys by both sides, nothing lost",
        play: workers,
    },
    Scenario {
        name: "workers-faults",
        about: "a pair with two workers each, a tunnel for each: trials (see trial::Kind)",
        play: faults,
    },
];

/// Two workers, and the second connection for IPv6.
fn config(base: Config) -> Config {
    let mut config = base;
    config.daemon_settings.push(("workers".into(), "2".into()));
    config.connections = vec![branch(), six()];
    config
}

fn six() -> Connection {
    let mut six = branch();
    six.name = "six".into();
    six.remote_id = "six.example".into();
    six.children[0].name = "six".into();
    six.children[0].local_ts = vec![net::LOCAL_TS6.into()];
    six.children[0].remote_ts = vec![net::REMOTE_TS6.into()];
    six
}

/// Both as the peer speaks them.
fn conns() -> [Conn; 2] {
    let mut six = conn();
    six.name = "six".into();
    six.local_id = "six.example".into();
    six.children[0].name = "six".into();
    six.children[0].local_ts = vec![net::REMOTE_TS6.into()];
    six.children[0].remote_ts = vec![net::LOCAL_TS6.into()];
    [conn(), six]
}

/// The worker that a connection's SAs belong to, by their SPIs (`wire::id::SpiLayout`, with two workers).
fn worker_of(status: &Status, connection: &str) -> Result<u32> {
    let tunnel = status.tunnel(connection);
    let spis = tunnel.children.iter().map(|child| u32::from_str_radix(&child.spi_in, 16));
    let workers: BTreeSet<u32> =
        spis.map(|spi| spi.map_or(u32::MAX, |spi| (spi >> 16 & 0xf) % 2)).collect();
    ensure(workers.len() == 1, || format!("{connection}: workers {workers:?}"))?;
    Ok(workers.into_iter().next().unwrap_or(u32::MAX))
}

fn workers(lab: &Lab<'_>) -> Result<String> {
    let mut stage = single(lab, &config(Config::single()), &conns())?;
    let capture = Capture::start(lab.run, &stage.net.wan, "br0", "", 2048)?;
    stage.peer_up()?;
    stage.peer.initiate("six", PATIENCE).map_err(|error| stage.with_log(error))?;
    wait::until("both tunnels", PATIENCE, TICK, || {
        let status = stage.daemon.status()?;
        Ok((status.is_up("branch", 1) && status.is_up("six", 1)).then_some(()))
    })?;
    let workers = |stage: &Single| -> Result<[u32; 2]> {
        let status = stage.daemon.status()?;
        Ok([worker_of(&status, "branch")?, worker_of(&status, "six")?])
    };
    let before = workers(&stage)?;
    ensure(before == [0, 1] || before == [1, 0], || format!("workers {before:?}"))?;
    stage.ping_both()?;
    let ends = [(net::LHOST, net::RHOST), (net::LHOST6, net::RHOST6)];
    let (lhost, rhost) = (&stage.net.lhost, &stage.net.rhost);
    let mut probes = Vec::new();
    // Flows enough that the kernel's hash would spread them over both queues.
    for port in 7000..7004 {
        for (near, far) in ends {
            probes.push(UdpProbes::on_port(lab.run, (lhost, near), (rhost, far), 250, port)?);
        }
    }
    for probes in &probes {
        probes.wait_flowing(PATIENCE)?;
    }
    let handed = stage.daemon.status()?.counters.handed;
    let from = clock::now();
    let mut rekeyed = 0;
    for connection in ["branch", "six"] {
        let child = if connection == "six" { "six" } else { "net" };
        for by_us in [true, false, true] {
            let old = stage.peer.spis()?;
            if by_us {
                stage.daemon.tandem(&["rekey", connection, "--child"])?;
            } else {
                stage.peer.rekey_child(child)?;
            }
            wait::until("the rekeyed child", PATIENCE, TICK, || {
                let new = stage.peer.spis()?;
                Ok((new.count() == old.count() && old.changed(&new) > 0).then_some(()))
            })?;
            rekeyed += 1;
        }
    }
    std::thread::sleep(Duration::from_secs(1));
    let to = clock::now();
    let mut sent = 0;
    for probes in &probes {
        probes.settle(to)?;
        for way in Way::BOTH {
            let Measure { reordered, duplicates, .. } = probes.measure(way, from, to);
            let lost = probes.measure(way, from, to).lost();
            sent += probes.measure(way, from, to).sent;
            ensure(lost + reordered + duplicates == 0, || {
                format!("{lost} lost, {reordered} reordered, {duplicates} twice ({way:?})")
            })?;
        }
    }
    ensure(workers(&stage)? == before, || "a rekeyed SA changed its worker".into())?;
    let status = stage.daemon.status()?;
    let handed = status.counters.handed - handed;
    // The kernel has learned by the answers. Without offloads there is one queue to read, and one worker reads it for all.
    let most = if offloads_off() { sent / 2 } else { sent / 100 };
    ensure(handed <= most, || format!("{handed} of {sent} packets were handed on"))?;
    // What the kernel itself says on an interface, to all IPv6 routers, has no policy.
    let drops = status.counters.drops.iter().filter(|(why, n)| *why != "no_policy" && **n > 0);
    let drops: Vec<_> = drops.collect();
    ensure(drops.is_empty(), || format!("drops: {drops:?}"))?;
    stage.check_clean()?;
    drop(probes);
    let seen = capture.stop()?;
    let clear = check::clear_text(&seen);
    ensure(clear == 0, || format!("{clear} packets in clear on the WAN"))?;
    let mut ivs = IvChecker::default();
    ivs.feed(&seen);
    ensure(ivs.iv_repeats + ivs.sequence_repeats == 0, || format!("repeats: {:?}", ivs.examples))?;
    Ok(format!(
        "{rekeyed} rekeys, {sent} packets: none lost, reordered or twice, {handed} handed on; {} IVs, 0 repeats",
        ivs.checked
    ))
}

fn faults(lab: &Lab<'_>) -> Result<String> {
    let setup = Setup { config: config(Config::pair()), ..Setup::default() };
    let mut scene = Scene::build(lab.run, lab.bins, &setup, &mut |_| {})?;
    let charon = scene.remote.charon()?;
    charon.load(&conns())?;
    charon.initiate("six", PATIENCE)?;
    let (lhost, rhost) = (scene.net.lhost.clone(), scene.net.rhost.clone());
    lhost.ping_until(net::RHOST6, PATIENCE)?;
    let owner = scene.wait_synced(PATIENCE)?;
    let status = scene.instances[owner].status()?;
    let workers = [worker_of(&status, "branch")?, worker_of(&status, "six")?];
    ensure(workers == [0, 1] || workers == [1, 0], || format!("workers {workers:?}"))?;
    let six = UdpProbes::on_port(lab.run, (&lhost, net::LHOST6), (&rhost, net::RHOST6), 500, 7006)?;
    six.wait_flowing(PATIENCE)?;
    let mut found = Vec::new();
    let few = [Kind::Kill, Kind::Stop, Kind::Switchover, Kind::Rejoin];
    for &kind in if lab.full { &Kind::ALL[..] } else { &few } {
        six.wait_flowing(PATIENCE)?;
        let outcome = run_trial(lab.run, &mut scene, kind, 0.3, &mut |_, _| {})?;
        outcome.judge()?;
        // The other worker's tunnel, by the same bars.
        six.settle(outcome.end)?;
        let both = Way::BOTH.map(|way| six.measure(way, outcome.event, outcome.end));
        let lost: u64 = both.iter().map(Measure::lost).sum();
        let reordered: u64 = both.iter().map(|measure| measure.reordered).sum();
        let gap = both.iter().map(|measure| measure.gap).max().unwrap_or_default();
        let (may_lose, bar_ms) = match kind {
            Kind::Kill => (true, 150.0),
            Kind::Stop => (true, 400.0),
            _ => (false, f64::INFINITY),
        };
        ensure((may_lose || lost == 0) && clock::millis(gap) <= bar_ms, || {
            format!("{}: IPv6 gap {:.1} ms, {lost} lost", kind.title(), clock::millis(gap))
        })?;
        ensure(kind != Kind::Switchover || reordered == 0, || {
            format!("{}: {reordered} IPv6 packets reordered", kind.title())
        })?;
        found.push(format!(
            "{} {:.1} and {:.1} ms/{} and {lost} lost",
            kind.key(),
            clock::millis(outcome.gap()),
            clock::millis(gap),
            outcome.lost()
        ));
    }
    let seen = scene.look(lab.run)?;
    ensure(seen.clear_text() == 0, || {
        format!("{} packets in clear on the WAN", seen.clear_text())
    })?;
    seen.discard();
    scene.check_clean()?;
    Ok(format!("{}; {} IVs checked", found.join(", "), scene.ivs.checked))
}
