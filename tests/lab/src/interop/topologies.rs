//! Two Tandem pairs towards each other, with the files of `config/`: pins both ways, and SIGKILL of each instance.

use super::{Lab, Scenario};
use crate::capture::{self, InnerFlow};
use crate::error::{Result, ensure};
use crate::scene::PATIENCE;
use crate::two_pairs::trial::{self, Outcome};
use crate::two_pairs::{self, HOSTS, Shape, TwoPairs};
use crate::{clock, net, probe, wait};
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "pairs-active-active",
        about: "two pairs, two endpoints each: pins agree; SIGKILL of each of four instances",
        play: active_active,
    },
    Scenario {
        name: "pairs-active-standby",
        about: "two pairs, two endpoints towards one: pins agree; SIGKILL of each of four instances",
        play: active_standby,
    },
];

/// Flows of each protocol from each address of a host; four times that each way.
const FLOWS: u16 = 250;

fn active_active(lab: &Lab<'_>) -> Result<String> {
    play(lab, two_pairs::ACTIVE_ACTIVE)
}

fn active_standby(lab: &Lab<'_>) -> Result<String> {
    play(lab, two_pairs::ACTIVE_STANDBY)
}

fn play(lab: &Lab<'_>, shape: Shape) -> Result<String> {
    let keylog = lab.run.subdir("keylog")?;
    for table in ["esp_sa", "ikev2_decryption_table"] {
        let _ = std::fs::remove_file(keylog.join(table));
    }
    let mut scene = TwoPairs::build(lab.run, lab.bins, shape, &keylog)?;
    let pinned = pins(lab, &mut scene, &keylog)?;
    let killed = kills(lab, &mut scene)?;
    scene.check_clean()?;
    Ok(format!("{pinned}; {killed}; {} IVs checked, 0 repeats", scene.ivs.checked))
}

/// Many flows from each side, both protocols, all of them answered: in which tunnel tshark sees them.
fn pins(lab: &Lab<'_>, scene: &mut TwoPairs, keylog: &Path) -> Result<String> {
    let server = probe::program()?;
    // They serve as long as their standard input is open.
    let mut serving = Vec::new();
    for (side, host) in [net::LHOST, net::RHOST].into_iter().enumerate() {
        let log = lab.run.dir().join(format!("serve-{side}.log"));
        let args = ["serve", "--bind", host];
        serving.push(scene.nets[side].inner.cmd(&server).args(args).converse(&log)?);
    }
    let count = FLOWS.to_string();
    for side in [0, 1] {
        let to = HOSTS[1 - side][0];
        for source in HOSTS[side] {
            let args = ["many", "--bind", source, "--to", to, "--udp", &count, "--tcp", &count];
            let ns = &scene.nets[side].inner;
            let run = || ns.cmd(&server).args(args).run(Duration::from_secs(60));
            wait::until_ok("a server for the flows", PATIENCE, Duration::from_millis(100), run)?;
        }
    }
    for (proc, ..) in &mut serving {
        proc.check_alive()?;
    }
    let seen = scene.look(lab.run)?;
    let packets = capture::tshark_flows(seen.near.path(), keylog)?;
    ensure(seen.clear_text() == 0, || "flows in clear".into())?;
    seen.discard();
    let many = usize::from(FLOWS) * 4;
    let mut shares = Vec::new();
    for (side, hosts) in HOSTS.iter().enumerate() {
        let found = Pinned::among(&packets, scene.shape, hosts);
        ensure(found.flows == many, || {
            format!("{} of {many} flows from side {side}", found.flows)
        })?;
        ensure(found.answered == many, || format!("{} of {many} flows answered", found.answered))?;
        ensure(found.strayed.is_empty(), || {
            let few = found.strayed.get(..3).unwrap_or(&found.strayed);
            format!("{} flows in both tunnels: {few:?}", found.strayed.len())
        })?;
        let share = found.in_first as f64 * 100.0 / many as f64;
        ensure((45.0..=55.0).contains(&share), || format!("{share:.1} % in the first tunnel"))?;
        shares.push(format!("{share:.1}"));
    }
    Ok(format!(
        "{many} TCP and UDP flows from each side, with their replies: {} % in the first tunnel, 0 in both",
        shares.join(" and ")
    ))
}

/// In which tunnel the flows of one side's hosts are.
#[derive(Debug, Default)]
struct Pinned {
    flows: usize,
    /// Those with packets both ways.
    answered: usize,
    in_first: usize,
    strayed: Vec<String>,
}

impl Pinned {
    /// Of all flows that hosts with these addresses began.
    fn among(packets: &[InnerFlow], shape: Shape, hosts: &[&str; 2]) -> Pinned {
        /// Packets in each tunnel, away from the hosts and towards them.
        type Count = BTreeMap<Option<usize>, [u64; 2]>;
        let mut flows: BTreeMap<String, Count> = BTreeMap::new();
        for packet in packets {
            let Some((name, way)) = began_by(&packet.flow, hosts) else { continue };
            let tunnel = shape.tunnel_of(&packet.outer, &packet.target);
            flows.entry(name).or_default().entry(tunnel).or_default()[way] += 1;
        }
        let mut found = Pinned { flows: flows.len(), ..Pinned::default() };
        for (name, tunnels) in flows {
            let ways = [0, 1].map(|way| tunnels.values().any(|count| count[way] > 0));
            found.answered += usize::from(ways == [true, true]);
            found.in_first += usize::from(tunnels.contains_key(&Some(0)));
            // One that no tunnel of ours has is elsewhere, too.
            if tunnels.len() > 1 || tunnels.contains_key(&None) {
                found.strayed.push(format!("{name}: {tunnels:?}"));
            }
        }
        found
    }
}

/// The flow that a packet belongs to, by the host that began it, and whether it goes away from it (0) or towards it (1);
/// `None`: none that began at these hosts. Whoever has the server's port did not begin it.
fn began_by(flow: &str, hosts: &[&str; 2]) -> Option<(String, usize)> {
    let mut words = flow.split(' ');
    let (protocol, from, to) = (words.next()?, words.next()?, words.next()?);
    let begins = |end: &str| {
        let (host, port) = end.split_once(':')?;
        let port: u16 = port.parse().ok()?;
        (hosts.contains(&host) && port >= 10_000).then_some(())
    };
    if begins(from).is_some() {
        Some((format!("{protocol} {from} {to}"), 0))
    } else {
        begins(to)?;
        Some((format!("{protocol} {to} {from}"), 1))
    }
}

/// Each instance in turn; at full count, one of each side at once; then a whole pair.
fn kills(lab: &Lab<'_>, scene: &mut TwoPairs) -> Result<String> {
    trial::start_flows(lab.run, scene)?;
    let (rounds, observe) =
        if lab.full { (5, Duration::from_secs(3)) } else { (1, Duration::from_secs(1)) };
    let mut events: Vec<Vec<(usize, usize)>> =
        [(0, 0), (0, 1), (1, 0), (1, 1)].map(|one| vec![one]).into();
    if lab.full {
        events.extend([vec![(0, 0), (1, 0)], vec![(0, 1), (1, 0)]]);
    }
    let mut told = Vec::new();
    for event in &events {
        let mut outcomes = Vec::new();
        for _ in 0..rounds {
            let outcome = trial::kill(lab.run, scene, event, observe)?;
            outcome.judge()?;
            outcomes.push(outcome);
        }
        told.push(tell(&outcomes));
    }
    for (side, name) in [(0, "near"), (1, "far")] {
        let took = trial::lose_pair(lab.run, scene, side)?;
        told.push(format!(
            "all of the {name} side killed: flows {:.1} s after",
            took.as_secs_f64()
        ));
    }
    Ok(told.join("; "))
}

/// What trials of one kind found, in a line.
fn tell(outcomes: &[Outcome]) -> String {
    let worst = |value: fn(&Outcome) -> Duration| {
        clock::millis(outcomes.iter().map(value).max().unwrap_or_default())
    };
    let sum = |value: fn(&Outcome) -> u64| outcomes.iter().map(value).sum::<u64>();
    format!(
        "kill -9 of {}: gap at most {:.1} ms ({:.1} elsewhere), {} lost, {} elsewhere, {} on the way home of {}, {} reordered",
        outcomes.first().map_or("nobody", |o| o.killed.as_str()),
        worst(|o| o.gap),
        worst(|o| o.others_gap),
        sum(|o| o.lost),
        sum(|o| o.others_lost),
        sum(|o| o.home_lost),
        sum(|o| o.sent),
        sum(|o| o.reordered)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(outer: &str, target: &str, flow: &str) -> InnerFlow {
        InnerFlow {
            at: Duration::ZERO,
            outer: outer.into(),
            target: target.into(),
            flow: flow.into(),
        }
    }

    #[test]
    fn a_reply_in_the_other_tunnel_strays() {
        let shape = two_pairs::ACTIVE_STANDBY;
        let (a, b, far) = ("203.0.113.10", "203.0.113.20", "198.51.100.10");
        let (out, back) = ("17 10.1.0.9:20000 10.2.0.9:7002", "17 10.2.0.9:7002 10.1.0.9:20000");
        let of = |packets: &[InnerFlow]| {
            let found = Pinned::among(packets, shape, &HOSTS[0]);
            (found.flows, found.answered, found.in_first, found.strayed.len())
        };
        assert_eq!(of(&[packet(a, far, out), packet(far, a, back)]), (1, 1, 1, 0));
        assert_eq!(of(&[packet(b, far, out), packet(far, b, back)]), (1, 1, 0, 0));
        assert_eq!(of(&[packet(a, far, out), packet(far, b, back)]), (1, 1, 1, 1));
        assert_eq!(of(&[packet(a, far, out)]), (1, 0, 1, 0));
        assert_eq!(of(&[packet("203.0.113.30", far, out)]), (1, 0, 0, 1));
        // One that the far side began.
        let theirs = "6 10.2.0.9:40000 10.1.0.9:7001";
        assert_eq!(of(&[packet(far, a, theirs)]), (0, 0, 0, 0));
    }
}
