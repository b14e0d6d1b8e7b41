//! Nothing that a selector covers passes in clear (security.md, statement 18): not before the daemon's first start, not
//! through the standby, not after both were killed, in neither direction. Each count of zero stands beside the same
//! packets without the rules, which do pass: else the zeros would prove nothing.

use super::{Lab, Scenario};
use crate::capture::{Capture, Recording};
use crate::clock;
use crate::error::{Result, ensure};
use crate::net::{self, Net};
use crate::scene::{PATIENCE, start_pair, start_remote, wait_pair_synced};
use crate::tandem::{Config, Daemon};
use std::net::IpAddr;
use std::time::Duration;

pub(super) const SCENARIOS: &[Scenario] = &[Scenario {
    name: "protection",
    about: "nothing in clear: before the start, through the standby, after both died, from the WAN",
    play: protection,
}];

/// A stranger on the WAN that claims an address behind the remote gateway.
const STRANGER: &str = "10.2.0.77";
/// What is sent each way in each leg.
const PINGS: u32 = 5;

/// Packets that passed in clear.
#[derive(Debug, PartialEq, Eq)]
struct Passed {
    /// From the LAN host to the remote network, seen on the WAN.
    out: u64,
    /// From the stranger to the LAN host, seen on the LAN.
    back: u64,
}

fn count(recording: &Recording, source: &str) -> u64 {
    let source: Option<IpAddr> = source.parse().ok();
    recording.packets().filter(|packet| packet.source == source && source.is_some()).count() as u64
}

/// Sends protected traffic by way of one host's own addresses, from the LAN and from the WAN.
fn passed(lab: &Lab<'_>, net: &Net, lan_hop: &str, wan_hop: &str) -> Result<Passed> {
    net.lhost.ip(&format!("route replace 10.2.0.0/24 via {lan_hop}\n"))?;
    net.router.ip(&format!("route replace 10.1.0.0/24 via {wan_hop}\n"))?;
    let wan = Capture::start(lab.run, &net.wan, "br0", "icmp", 256)?;
    let lan = Capture::start(lab.run, &net.lan, "br0", "icmp", 256)?;
    let pings = PINGS.to_string();
    for (host, from, to) in
        [(&net.lhost, net::LHOST, net::RHOST), (&net.router, STRANGER, net::LHOST)]
    {
        // Nobody is to answer.
        host.cmd("ping")
            .args(["-n", "-q", "-c", &pings, "-i", "0.05", "-W", "0.2", "-I", from, to])
            .finish(PATIENCE)?;
    }
    let (wan, lan) = (wan.stop()?, lan.stop()?);
    let passed = Passed { out: count(&wan, net::LHOST), back: count(&lan, STRANGER) };
    // The packets went out at all: on the LAN to the host, on the WAN from the stranger.
    let sent = (count(&lan, net::LHOST), count(&wan, STRANGER));
    ensure(sent.0 >= u64::from(PINGS) && sent.1 >= u64::from(PINGS), || {
        format!("{sent:?} of {PINGS} pings were sent")
    })?;
    wan.discard();
    lan.discard();
    Ok(passed)
}

fn protection(lab: &Lab<'_>) -> Result<String> {
    let net = Net::build(lab.run)?;
    net.router.ip(&format!("link set lo up\naddr add {STRANGER}/32 dev lo\n"))?;
    let config = Config::pair();
    let left = Daemon::prepare(lab.run, lab.bins, &net.left, "left", &config)?;
    let by_left = |lab: &Lab<'_>| passed(lab, &net, "10.1.0.2", "203.0.113.11");
    let none = Passed { out: 0, back: 0 };
    let expect = |what: &str, seen: Passed| {
        ensure(seen == none, || format!("{what}: {seen:?} passed in clear"))
    };
    let control = |what: &str, seen: Passed| {
        ensure(seen.out > 0 && seen.back > 0, || {
            format!("{what}: {seen:?} passed, so a zero would prove nothing")
        })
    };

    control("with no rules at all", by_left(lab)?)?;
    let protect = |arguments: &[&str]| {
        net.left
            .cmd(&lab.bins.tandem)
            .arg("--config")
            .arg(left.config_path())
            .args(arguments)
            .run(PATIENCE)
    };
    protect(&["protect", "--instance", "left"])?;
    expect("before the first start", by_left(lab)?)?;

    let mut instances = start_pair(lab.run, lab.bins, &net, &config)?;
    let owner = wait_pair_synced(&mut instances, PATIENCE)?;
    expect("while no tunnel is up", by_left(lab)?)?;
    let _remote = start_remote(lab.run, lab.bins, &net, crate::scene::PeerKind::Strongswan, true)?;
    let standby = [("10.1.0.3", "203.0.113.12"), ("10.1.0.2", "203.0.113.11")][owner];
    expect("through the standby", passed(lab, &net, standby.0, standby.1)?)?;
    for instance in &mut instances {
        instance.kill9()?;
        instance.bury()?;
    }
    clock::sleep_until(clock::now() + Duration::from_millis(100));
    expect("after both were killed", by_left(lab)?)?;
    protect(&["protect", "--remove"])?;
    control("after the rules were taken away", by_left(lab)?)?;
    Ok("0 of 5 packets each way before the start, without a tunnel, through the standby, after both died; without the rules they pass".into())
}
