//! IPv6 inside the tunnel, with a next hop of its own that moves with the endpoint.

use super::{Lab, Scenario};
use crate::baseline::peer_conn;
use crate::clock;
use crate::error::{Result, ensure};
use crate::faults;
use crate::net;
use crate::probe::{UdpProbes, Way};
use crate::scene::{PATIENCE, Scene, Setup};
use crate::tandem::{Config, PSK};
use std::time::Duration;

pub(super) const SCENARIOS: &[Scenario] = &[Scenario {
    name: "pair-ipv6",
    about: "SIGKILL with IPv6 inside, then every neighbour cache flushed",
    play: takeover,
}];

fn takeover(lab: &Lab<'_>) -> Result<String> {
    let mut config = Config::pair();
    let mut second = config.branch().children[0].clone();
    second.name = "six".into();
    second.local_ts = vec![net::LOCAL_TS6.into()];
    second.remote_ts = vec![net::REMOTE_TS6.into()];
    config.branch().children.push(second);
    let setup = Setup { config, ..Setup::default() };
    let mut scene = Scene::build(lab.run, lab.bins, &setup, &mut |_| {})?;

    let mut conn = peer_conn(PSK);
    let mut second = conn.children[0].clone();
    second.name = "six".into();
    second.local_ts = vec![net::REMOTE_TS6.into()];
    second.remote_ts = vec![net::LOCAL_TS6.into()];
    conn.children.push(second);
    let charon = scene.remote.charon()?;
    charon.load(&[conn])?;
    charon.initiate("six", PATIENCE)?;
    charon.wait_established(2, PATIENCE)?;
    let (lhost, rhost) = (scene.net.lhost.clone(), scene.net.rhost.clone());
    lhost.ping_until(net::RHOST6, PATIENCE)?;
    let probes = UdpProbes::start(lab.run, (&lhost, net::LHOST6), (&rhost, net::RHOST6), 1000)?;
    probes.wait_flowing(PATIENCE)?;

    let owner = scene.wait_synced(PATIENCE)?;
    let before = scene.remote.spis()?;
    let event = clock::now();
    scene.instances[owner].kill9()?;
    probes.wait_arrivals_since(event + Duration::from_millis(20), Duration::from_secs(10))?;
    // Whoever asks for the next hop now is answered by the survivor.
    faults::flush_neighbours(&[&lhost])?;
    let flushed = clock::now();
    clock::sleep_until(flushed + Duration::from_secs(1));
    let to = clock::now();
    probes.settle(to)?;
    let gap = Way::BOTH.map(|way| probes.measure(way, event, to).gap).into_iter().max();
    let gap = gap.unwrap_or_default();
    ensure(gap <= Duration::from_millis(150), || {
        format!("silence of {:.1} ms", clock::millis(gap))
    })?;
    let after: u64 = Way::BOTH.iter().map(|way| probes.measure(*way, flushed, to).sent).sum();
    ensure(after > 1000, || format!("only {after} probes after the flush"))?;
    ensure(before.changed(&scene.remote.spis()?) == 0, || "SPIs changed".into())?;
    scene.instances[owner].bury()?;
    scene.instances[owner].start()?;
    scene.wait_synced(PATIENCE)?;
    let seen = scene.look(lab.run)?;
    ensure(seen.clear_text() == 0, || "clear text".into())?;
    seen.discard();
    scene.check_clean()?;
    Ok(format!("gap {:.1} ms, same SPIs; {} IVs, 0 repeats", clock::millis(gap), scene.ivs.checked))
}
