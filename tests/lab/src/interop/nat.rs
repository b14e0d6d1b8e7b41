//! A peer behind a real address translator (RFC 7296 §2.23, RFC 3948): found by NAT detection, encapsulated, and
//! followed when its mapping changes.

use super::stage::{Single, TICK, conn, single_with};
use super::{Lab, Scenario};
use crate::capture::Capture;
use crate::clock;
use crate::error::{Result, ensure};
use crate::net;
use crate::pcap::Content;
use crate::scene::PATIENCE;
use crate::tandem::Config;
use crate::wait;
use std::net::IpAddr;
use std::time::Duration;

pub(super) const SCENARIOS: &[Scenario] = &[Scenario {
    name: "nat",
    about: "a peer behind a translator whose mapping changes",
    play: translated,
}];

/// What the translator makes of the peer's address.
const OUTSIDE: &str = "203.0.113.1";

/// The router translates what the peer sends, to source ports of this range.
fn translate(stage: &Single, ports: &str) -> Result<()> {
    stage.net.router.nft(&format!(
        "table ip lab_nat\ndelete table ip lab_nat\ntable ip lab_nat {{\n chain out {{\n  type nat hook postrouting priority 100;\n  \
         ip saddr {} oifname \"eth0\" ip protocol udp masquerade to :{ports}\n }}\n}}\n",
        net::PEER_WAN
    ))
}

/// How long the router keeps an idle mapping.
fn forget_after(stage: &Single, seconds: u32) -> Result<()> {
    stage.net.router.sysctl(&[
        &format!("net.netfilter.nf_conntrack_udp_timeout={seconds}"),
        &format!("net.netfilter.nf_conntrack_udp_timeout_stream={seconds}"),
    ])
}

fn translated(lab: &Lab<'_>) -> Result<String> {
    let mut config = Config::single();
    config.branch().remote_address = "any".into();
    config.branch().settings.push(("keepalive".into(), "\"1s\"".into()));
    let mut peer = conn();
    // Nobody claims a NAT: it has to be found.
    peer.encap = false;
    // Its keepalives stand beside ours, which must not be: only the side behind the NAT sends them (RFC 3948 §4).
    let mut stage = single_with(lab, &config, &[peer], "keep_alive = 2s", &[])?;
    translate(&stage, "20000-20999")?;
    let wan = Capture::start(lab.run, &stage.net.wan, "br0", "udp", 256)?;
    stage.peer_up()?;
    stage.ping_both()?;
    let seen_as = |stage: &Single| -> Result<String> {
        Ok(stage.daemon.status()?.tunnel("branch").ike.unwrap_or_default().remote)
    };
    let first = seen_as(&stage)?;
    ensure(first.starts_with(&format!("{OUTSIDE}:20")), || format!("the peer is seen as {first}"))?;

    translate(&stage, "30000-30999")?;
    // An idle mapping is forgotten after a second from now on, and the next packet gets another.
    forget_after(&stage, 1)?;
    stage.ping_both()?;
    clock::sleep_until(clock::now() + Duration::from_secs(3));
    forget_after(&stage, 60)?;
    // The peer speaks first through the new mapping; we follow and answer there.
    stage.net.rhost.ping_until(net::LHOST, PATIENCE).map_err(|error| stage.with_log(error))?;
    wait::until("the new mapping to be followed", PATIENCE, TICK, || {
        Ok(seen_as(&stage)?.starts_with(&format!("{OUTSIDE}:30")).then_some(()))
    })
    .map_err(|error| stage.with_log(error))?;
    stage.net.lhost.ping(net::RHOST, 3, PATIENCE).map_err(|error| stage.with_log(error))?;
    // What we ask by ourselves goes there, too.
    let before = stage.peer.spis()?;
    stage.daemon.tandem(&["rekey", "branch", "--child"]).map_err(|error| stage.with_log(error))?;
    wait::until("a rekeyed child", PATIENCE, TICK, || {
        Ok((before.changed(&stage.peer.spis()?) >= 4).then_some(()))
    })
    .map_err(|error| stage.with_log(error))?;
    stage.ping_both()?;
    let second = seen_as(&stage)?;
    let wan = wan.stop()?;
    let outside: Option<IpAddr> = OUTSIDE.parse().ok();
    let esp = |packet: &crate::pcap::Packet<'_>| matches!(packet.content, Content::Esp { .. });
    let sent = wan.packets().filter(|p| esp(p) && p.target == outside).count();
    ensure(sent > 0, || "no ESP went to the translator".into())?;
    let keepalives = |ours: bool| {
        let from_us = |p: &crate::pcap::Packet<'_>| p.source == net::VIRTUAL_WAN.parse().ok();
        wan.packets()
            .filter(|p| matches!(p.content, Content::Keepalive) && from_us(p) == ours)
            .count()
    };
    let (ours, theirs) = (keepalives(true), keepalives(false));
    ensure(ours == 0 && theirs > 0, || format!("{ours} keepalives by us, {theirs} by the peer"))?;
    wan.discard();
    stage.check_clean()?;
    Ok(format!(
        "found by detection; {first}, then {second}, followed, also by our rekey; {theirs} keepalives, all the peer's"
    ))
}
