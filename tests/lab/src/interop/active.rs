//! Active-active against strongSwan: shares, adoption, drain, restart.

use super::{Lab, Scenario};
use crate::active::{Active, ENDPOINTS, Event, OnFailure, Outcome, trial};
use crate::error::{Error, Result, ensure};
use crate::scene::PATIENCE;
use crate::tandem::Config;
use crate::{capture, clock, net, probe, wait};
use std::collections::BTreeMap;
use std::time::Duration;

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "active-pins",
        about: "1,000 flows over two tunnels, where tshark sees each",
        play: pins,
    },
    Scenario {
        name: "active-adopt",
        about: "SIGKILL of either instance: the other carries both endpoints, then one goes home",
        play: adopt,
    },
    Scenario {
        name: "active-withdraw",
        about: "SIGKILL of an instance whose addresses stay: its tunnel goes down, its flows move, and come back",
        play: withdraw,
    },
    Scenario {
        name: "active-drain",
        about: "drain and undrain, and an upgrade of both instances, under traffic",
        play: planned,
    },
];

/// Flows of each protocol and next hop; four times that in all.
const FLOWS: u16 = 250;

fn pins(lab: &Lab<'_>) -> Result<String> {
    let keylog = lab.run.subdir("keylog")?;
    for table in ["esp_sa", "ikev2_decryption_table"] {
        let _ = std::fs::remove_file(keylog.join(table));
    }
    let folder = keylog.to_string_lossy().into_owned();
    let config = Config::active_active();
    let mut scene = Active::quiet(lab.run, lab.bins, &config, &["--keylog", &folder])?;
    let server = probe::program()?;
    // It serves as long as its standard input is open.
    let (mut serving, _open, _records) = scene
        .net
        .rhost
        .cmd(&server)
        .args(["serve", "--bind", net::RHOST])
        .converse(&lab.run.dir().join("serve.log"))?;
    scene.net.lhost.ping_until(net::RHOST, PATIENCE)?;
    let count = FLOWS.to_string();
    for source in [net::LHOST, net::LHOST_SECOND] {
        let args = ["many", "--bind", source, "--to", net::RHOST, "--udp", &count, "--tcp", &count];
        let run = || scene.net.lhost.cmd(&server).args(args).run(Duration::from_secs(60));
        wait::until_ok("a server for the flows", PATIENCE, Duration::from_millis(100), run)?;
    }
    serving.check_alive()?;
    let steered: Vec<u64> = scene
        .instances
        .iter()
        .map(|instance| Ok(instance.status()?.counters.steered_out))
        .collect::<Result<_>>()?;
    let seen = scene.look(lab.run)?;
    // By flow, packets by the outer address that they left from.
    let mut flows: BTreeMap<String, BTreeMap<String, u64>> = BTreeMap::new();
    for packet in capture::tshark_flows(seen.path(), &keylog)? {
        if ENDPOINTS.iter().any(|(_, _, address)| *address == packet.outer) {
            *flows.entry(packet.flow).or_default().entry(packet.outer).or_default() += 1;
        }
    }
    seen.discard();
    let many = usize::from(FLOWS) * 4;
    ensure(flows.len() >= many, || format!("tshark sees {} of {many} flows", flows.len()))?;
    let strayed: Vec<_> = flows.iter().filter(|(_, tunnels)| tunnels.len() > 1).collect();
    ensure(strayed.is_empty(), || format!("flows in both tunnels: {strayed:?}"))?;
    let at_a = flows.values().filter(|tunnels| tunnels.contains_key(net::VIRTUAL_WAN)).count();
    let share = at_a as f64 * 100.0 / flows.len() as f64;
    ensure((45.0..=55.0).contains(&share), || format!("{share:.1} % of the flows at a"))?;
    ensure(steered.iter().all(|count| *count > 0), || format!("steered: {steered:?}"))?;
    scene.check_clean()?;
    Ok(format!(
        "{} TCP and UDP flows: {share:.1} % at a, {:.1} % at b, 0 in both; steered {steered:?} packets; {} IVs checked",
        flows.len(),
        100.0 - share,
        scene.ivs.checked
    ))
}

/// What trials found, in a line.
pub(super) fn tell(event: &str, outcomes: &[Outcome]) -> String {
    let worst = outcomes.iter().map(|o| o.away.gap()).max().unwrap_or_default();
    let sum = |value: fn(&Outcome) -> u64| outcomes.iter().map(value).sum::<u64>();
    format!(
        "{event}: gap at most {:.1} ms, {} lost, {} of the other's flows, {} on the way home of {} sent, {} reordered, \
         {} flows moved",
        clock::millis(worst),
        sum(|o| o.away.lost()),
        sum(|o| o.away.others_lost()),
        sum(|o| o.home.lost()),
        sum(Outcome::sent),
        sum(|o| o.away.reordered() + o.home.reordered()),
        sum(Outcome::flows_moved)
    )
}

/// These instances, in turn; with `--full` both, five times.
fn each(lab: &Lab<'_>, scene: &mut Active, event: Event, few: &[usize]) -> Result<Vec<Outcome>> {
    let all = [0, 1].repeat(5);
    let mut outcomes = Vec::new();
    for hurt in if lab.full { all } else { few.to_vec() } {
        let outcome = trial(lab.run, scene, event, hurt)?;
        outcome.judge().map_err(|error| {
            Error::check(format!("{error}: {}", outcome.tell_flows(&scene.flows)))
        })?;
        outcomes.push(outcome);
    }
    Ok(outcomes)
}

fn adopt(lab: &Lab<'_>) -> Result<String> {
    let mut scene = Active::stage(lab.run, lab.bins, OnFailure::Adopt, &mut |_| {})?;
    let outcomes = each(lab, &mut scene, Event::Kill, &[0, 1])?;
    scene.check_clean()?;
    Ok(tell("kill -9", &outcomes))
}

fn withdraw(lab: &Lab<'_>) -> Result<String> {
    let mut scene = Active::stage(lab.run, lab.bins, OnFailure::Withdraw, &mut |_| {})?;
    let outcomes = each(lab, &mut scene, Event::Kill, &[0])?;
    scene.check_clean()?;
    let back = outcomes.iter().map(|o| o.away.back_gap().max(o.home.back_gap())).max();
    Ok(format!(
        "{}; silence from the peer at most {:.1} s",
        tell("kill -9", &outcomes),
        back.unwrap_or_default().as_secs_f64()
    ))
}

fn planned(lab: &Lab<'_>) -> Result<String> {
    let mut scene = Active::stage(lab.run, lab.bins, OnFailure::Adopt, &mut |_| {})?;
    let drained = each(lab, &mut scene, Event::Drain, &[0])?;
    let restarted = each(lab, &mut scene, Event::Restart, &[1])?;
    scene.check_clean()?;
    Ok(format!("{}; {}", tell("drain", &drained), tell("restart", &restarted)))
}
