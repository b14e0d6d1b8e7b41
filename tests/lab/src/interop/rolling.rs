//! A rolling upgrade under traffic, and the way back: two builds that speak neighbouring formats.
//!
//! The older build is today's, held back (`tandemd --hold-format 1`): it says, writes and reads what format 1 is, and
//! refuses what is newer, as a real one does. Whether today's format 1 is the real one's, golden records prove
//! (crates/ike/src/tests/golden.rs, crates/ha/src/codec/tests.rs).

use super::active::tell;
use super::{Lab, Scenario};
use crate::active::{Active, Event, trial};
use crate::clock;
use crate::error::{Error, Result, ensure};
use crate::net;
use crate::ns::Ns;
use crate::probe::{TcpProbes, Way};
use crate::scene::{PATIENCE, Scene, Setup};
use crate::tandem::{Config, Daemon};
use crate::wait;
use std::time::Duration;

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "active-rolling",
        about: "both instances upgraded in turn under traffic, then one goes back",
        play: active,
    },
    Scenario {
        name: "pair-rolling",
        about: "the same with one endpoint; what was taken down stays down",
        play: standby,
    },
];

/// The older build.
const OLD: &[&str] = &["--hold-format", "1"];
/// The newer one.
const NEW: &[&str] = &[];
/// The bulk TCP stream, bytes a second.
const BULK: u64 = 1_000_000;

/// Which instance starts as which build, and the format that both then settle on.
const STEPS: [(usize, &[&str], u32); 3] = [(0, NEW, 1), (1, NEW, 2), (0, OLD, 1)];

/// Both say that this format is in use, and in sync.
fn settled(instances: &[Daemon; 2], format: u32) -> Result<()> {
    wait::until_ok("a settled format", PATIENCE, Duration::from_millis(20), || {
        for instance in instances {
            let status = instance.status()?;
            let pair = status.pair.unwrap_or_default();
            ensure(pair.format == Some(format), || {
                format!("{}: {pair:?}, expected format {format}", instance.name)
            })?;
            ensure(status.endpoints.iter().all(|e| e.mode == "synced"), || {
                format!("{}: not in sync", instance.name)
            })?;
        }
        Ok(())
    })
}

/// TCP segments that came out of order at a host so far.
fn out_of_order(host: &Ns) -> Result<u64> {
    let text = host.cmd("cat").arg("/proc/net/netstat").run(PATIENCE)?;
    let lines: Vec<Vec<&str>> = text
        .lines()
        .filter_map(|line| Some(line.strip_prefix("TcpExt:")?.split_whitespace().collect()))
        .collect();
    let [names, values] = lines.as_slice() else {
        return Err(Error::parse("/proc/net/netstat", "no two lines of TcpExt"));
    };
    let at = names.iter().position(|name| *name == "TCPOFOQueue");
    at.and_then(|at| values.get(at)?.parse().ok())
        .ok_or_else(|| Error::parse("/proc/net/netstat", "no TCPOFOQueue"))
}

fn active(lab: &Lab<'_>) -> Result<String> {
    let mut scene = Active::build(lab.run, lab.bins, &Config::active_active(), OLD)?;
    settled(&scene.instances, 1)?;
    let mut tcp =
        TcpProbes::start(lab.run, &scene.net.lhost, (&scene.net.rhost, net::RHOST), Some(BULK))?;
    let keylog = scene.keylog()?.to_owned();
    let late = out_of_order(&scene.net.rhost)?;
    let mut outcomes = Vec::new();
    for (hurt, build, format) in STEPS {
        let instance = &mut scene.instances[hurt];
        let folder = keylog.join(&instance.name).to_string_lossy().into_owned();
        instance.set_args(&[build, &["--keylog", &folder]].concat());
        let outcome = trial(lab.run, &mut scene, Event::Restart, hurt)?;
        outcome.judge()?;
        outcomes.push(outcome);
        settled(&scene.instances, format)?;
    }
    let broken = tcp.broken(PATIENCE)?;
    ensure(broken == 0, || format!("{broken} of {} TCP connections broken", tcp.connections()))?;
    let late = out_of_order(&scene.net.rhost)?.saturating_sub(late);
    scene.check_clean()?;
    Ok(format!(
        "formats 1, 1+2, 2, 2+1: {}; bulk TCP: {late} segments out of order, 0 connections broken; {} IVs checked",
        tell("restart", &outcomes),
        scene.ivs.checked
    ))
}

fn standby(lab: &Lab<'_>) -> Result<String> {
    let setup = Setup { args: OLD, bulk: Some(BULK), ..Setup::default() };
    let mut scene = Scene::build(lab.run, lab.bins, &setup, &mut |_| {})?;
    scene.wait_synced(PATIENCE)?;
    settled(&scene.instances, 1)?;
    let spis = scene.remote.spis()?;
    scene.look(lab.run)?.discard();
    let start = clock::now();
    for (hurt, build, format) in STEPS {
        let instance = &mut scene.instances[hurt];
        instance.tandem(&["drain"])?;
        instance.stop()?;
        instance.set_args(build);
        instance.start()?;
        scene.wait_synced(PATIENCE)?;
        settled(&scene.instances, format)?;
    }
    let end = clock::now() + Duration::from_secs(1);
    clock::sleep_until(end);
    scene.udp.settle(end)?;
    let ways = Way::BOTH.map(|way| scene.udp.measure(way, start, end));
    let sum = |value: fn(&crate::probe::Measure) -> u64| ways.iter().map(value).sum::<u64>();
    let (sent, lost, reordered) = (sum(|w| w.sent), sum(|w| w.lost()), sum(|w| w.reordered));
    ensure(sent > 0 && lost + reordered == 0, || {
        format!(
            "{lost} lost, {reordered} reordered of {sent}: {}",
            scene.udp.tell_losses(start, end)
        )
    })?;
    let broken = scene.tcp.broken(PATIENCE)?;
    ensure(broken == 0, || format!("{broken} TCP connections broken"))?;
    let changed = if spis.0.is_empty() { u64::MAX } else { spis.changed(&scene.remote.spis()?) };
    ensure(changed == 0, || format!("{changed} SPIs changed"))?;
    let clear = scene.look(lab.run)?;
    ensure(clear.clear_text() == 0, || "packets in clear on the WAN".into())?;
    clear.discard();

    // What format 2 has and format 1 lacks: an operator's word outlives a change of owner.
    let mut kept = Vec::new();
    for (build, format, stays) in [(OLD, 1, false), (NEW, 2, true)] {
        scene.instances[0].stop()?;
        scene.instances[0].set_args(build);
        scene.instances[0].start()?;
        let owner = scene.wait_synced(PATIENCE)?;
        settled(&scene.instances, format)?;
        scene.instances[owner].tandem(&["down", "branch"])?;
        scene.instances[owner].tandem(&["failover"])?;
        let next = scene.wait_synced(PATIENCE)?;
        ensure(next != owner, || "failover moved nothing".into())?;
        let tunnel = scene.instances[next].status()?.tunnel("branch");
        ensure(tunnel.taken_down == stays, || format!("format {format}: {tunnel:?}"))?;
        kept.push(format!("format {format} {}", if stays { "kept" } else { "forgotten" }));
        scene.instances[next].tandem(&["up", "branch"])?;
    }
    scene.check_clean()?;
    Ok(format!(
        "formats 1, 1+2, 2, 2+1: {lost} lost, {reordered} reordered of {sent}, SPIs the same; `down` over a failover: {}; \
         {} IVs checked",
        kept.join(", "),
        scene.ivs.checked
    ))
}
