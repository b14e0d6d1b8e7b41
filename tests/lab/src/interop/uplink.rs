//! Networks that fail instead of instances: an uplink goes, or one direction of every pair link.

use super::{Lab, Scenario};
use crate::check;
use crate::clock;
use crate::error::{Result, ensure};
use crate::faults::{self, Impairment};
use crate::net;
use crate::pcap::Content;
use crate::probe::Way;
use crate::scene::{PATIENCE, Scene, Setup};
use crate::wait;
use std::net::IpAddr;
use std::time::Duration;

use super::stage::TICK;

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "pair-uplink",
        about: "the owner's WAN goes down: a change of owner, at most once in 10 s, and back",
        play: uplink,
    },
    Scenario {
        name: "pair-one-way",
        about: "the other hears the owner no more, on any link: one takeover, never two senders",
        play: one_way,
    },
];

/// Between two changes of owner for an uplink's sake (ha.md, "Uplink").
const HOLD: Duration = Duration::from_secs(10);

fn owner_is(scene: &Scene, index: usize) -> Result<bool> {
    Ok(scene.instances[index].status()?.main().role == "owner")
}

fn wait_owner(scene: &Scene, index: usize, within: Duration) -> Result<()> {
    let name = scene.instances[index].name.clone();
    wait::until(&format!("{name} to own"), within, TICK, || {
        Ok(owner_is(scene, index)?.then_some(()))
    })
}

/// The host's own default route goes with its interface; whoever manages the network brings it back.
fn wan_up(scene: &Scene, index: usize) -> Result<()> {
    let host = &scene.instances[index].ns;
    faults::link_up(host, "eth0")?;
    host.ip("route replace default via 203.0.113.1\n")
}

fn uplink(lab: &Lab<'_>) -> Result<String> {
    let mut scene = Scene::build(lab.run, lab.bins, &Setup::default(), &mut |_| {})?;
    let first = scene.wait_synced(PATIENCE)?;
    let second = 1 - first;
    let before = scene.remote.spis()?;

    let event = clock::now();
    faults::link_down(&scene.instances[first].ns, "eth0")?;
    wait_owner(&scene, second, PATIENCE)?;
    let moved = clock::now();
    scene.udp.wait_arrivals_since(moved, PATIENCE)?;
    let to = clock::now();
    scene.udp.settle(to)?;
    let gap = Way::BOTH.map(|way| scene.udp.measure(way, event, to).gap).into_iter().max();
    let gap = gap.unwrap_or_default();
    ensure(gap < Duration::from_millis(400), || {
        format!("silence of {:.0} ms", clock::millis(gap))
    })?;

    // The first is whole again; now the second's uplink goes, too soon: nobody moves until 10 s have passed.
    wan_up(&scene, first)?;
    scene.wait_synced(PATIENCE)?;
    ensure(owner_is(&scene, second)?, || "it went back by itself".into())?;
    faults::link_down(&scene.instances[second].ns, "eth0")?;
    wait_owner(&scene, first, HOLD + PATIENCE)?;
    let held = clock::now() - moved;
    ensure(held > HOLD - Duration::from_millis(500), || {
        format!("it moved again after {:.1} s", held.as_secs_f64())
    })?;
    // What leaves from the virtual address finds its way by the table that was lost with the interface.
    scene.udp.wait_arrivals_since(clock::now(), PATIENCE)?;

    // Back home, in order, over an uplink that was down in between.
    wan_up(&scene, second)?;
    let owner = scene.wait_synced(PATIENCE)?;
    ensure(owner == first, || "the endpoint moved when the uplink came back".into())?;
    scene.udp.wait_flowing(PATIENCE)?;
    let from = clock::now();
    scene.instances[first].tandem(&["failover"])?;
    wait_owner(&scene, second, PATIENCE)?;
    let to = clock::now() + Duration::from_secs(1);
    scene.udp.settle(to)?;
    let lost: u64 = Way::BOTH.iter().map(|way| scene.udp.measure(*way, from, to).lost()).sum();
    ensure(lost == 0, || format!("{lost} packets lost by the planned switchover"))?;
    scene.wait_synced(PATIENCE)?;
    ensure(before.changed(&scene.remote.spis()?) == 0, || "SPIs changed".into())?;
    ensure(scene.tcp.broken(Duration::from_secs(20))? == 0, || "a TCP connection broke".into())?;
    let seen = scene.look(lab.run)?;
    ensure(seen.clear_text() == 0, || "clear text".into())?;
    seen.discard();
    scene.check_clean()?;
    Ok(format!(
        "gap {:.1} ms when the WAN went; the second change after {:.1} s; same SPIs, no TCP broken; switchover back lost 0",
        clock::millis(gap),
        held.as_secs_f64()
    ))
}

fn one_way(lab: &Lab<'_>) -> Result<String> {
    let mut scene = Scene::build(lab.run, lab.bins, &Setup::default(), &mut |_| {})?;
    let owner = scene.wait_synced(PATIENCE)?;
    let other = 1 - owner;
    let before = scene.remote.spis()?;
    scene.look(lab.run)?.discard();
    let host = scene.instances[other].ns.clone();
    let from_owner = ["10.1.0.2", "10.1.0.3"][owner];
    let event = clock::now();
    // Of the LAN only the pair's own traffic is cut: the probes go on.
    let cuts = [
        Impairment::cut(&host, "eth2")?,
        Impairment::matching(&host, "eth1", &format!("ip saddr {from_owner} th dport 4600"))?,
        Impairment::matching(&host, "eth1", &format!("ip saddr {from_owner} th sport 4600"))?,
    ];
    wait_owner(&scene, other, PATIENCE)?;
    scene.udp.wait_arrivals_since(clock::now(), PATIENCE)?;
    clock::sleep_until(event + Duration::from_secs(3));
    ensure(owner_is(&scene, other)?, || "it was taken back over a cut link".into())?;
    let to = clock::now();
    drop(cuts);
    scene.wait_synced(PATIENCE)?;
    scene.udp.settle(to)?;
    let gap = Way::BOTH.map(|way| scene.udp.measure(way, event, to).gap).into_iter().max();
    let seen = scene.look(lab.run)?;
    // Who sends for the virtual address: the old owner's last packet comes before the new one's first.
    let virtual_wan: Option<IpAddr> = net::VIRTUAL_WAN.parse().ok();
    let sent_by = |index: usize| -> Result<Vec<Duration>> {
        let mac = scene.instances[index].ns.mac("eth0")?;
        Ok(seen
            .wan
            .packets()
            .filter(|packet| {
                packet.source == virtual_wan
                    && packet.source_mac == mac
                    && matches!(packet.content, Content::Esp { .. })
            })
            .map(|packet| seen.wan.boot_time(packet.at))
            .filter(|at| (event..to).contains(at))
            .collect())
    };
    let (old, new) = (sent_by(owner)?, sent_by(other)?);
    let (last, first) = (old.last().copied(), new.first().copied());
    ensure(last.is_some() && first.is_some() && last < first, || {
        format!("two senders: the old owner until {last:?}, the new one from {first:?}")
    })?;
    ensure(check::clear_text(&seen.wan) == 0, || "clear text".into())?;
    seen.discard();
    ensure(before.changed(&scene.remote.spis()?) == 0, || "SPIs changed".into())?;
    ensure(scene.tcp.broken(Duration::from_secs(20))? == 0, || "a TCP connection broke".into())?;
    scene.check_clean()?;
    Ok(format!(
        "one takeover, gap {:.1} ms; the old owner fell silent {:.1} ms before the new one spoke; {} IVs, 0 repeats",
        clock::millis(gap.unwrap_or_default()),
        clock::millis(first.unwrap_or_default().saturating_sub(last.unwrap_or_default())),
        scene.ivs.checked
    ))
}
