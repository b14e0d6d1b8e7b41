//! ESP directly in IP, protocol 50: against a real kernel's ESP, and between two Tandems.

use super::stage::{TICK, conn};
use super::{Lab, Scenario};
use crate::capture::{Capture, tshark};
use crate::charon::Conn;
use crate::check::{self, IvChecker};
use crate::clock;
use crate::error::{Error, Result, ensure};
use crate::net::{self, Net};
use crate::probe::UdpProbes;
use crate::scene::{PATIENCE, PeerKind, Scene, Setup};
use crate::tandem::{Config, Daemon};
use crate::trial::{Kind, run_trial};
use crate::uml::UmlPeer;
use crate::wait;

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "kernel-esp-50",
        about: "protocol 50 with a real kernel: both ways, full size, rekeys by both sides",
        play: kernel,
    },
    Scenario {
        name: "esp50-pair-kernel",
        about: "SIGKILL with protocol 50 to a real kernel",
        play: |lab| pair(lab, PeerKind::Kernel, &[Kind::Kill]),
    },
    Scenario {
        name: "esp50-pair",
        about: "SIGKILL, return and switchover with protocol 50 between Tandems",
        play: |lab| pair(lab, PeerKind::Tandem, &[Kind::Kill, Kind::Switchover]),
    },
];

/// Inner bytes of a packet that fills an Ethernet frame: 1,500 less IPv4 20, ESP 8, IV 8, padding 3, trailer 2, tag 16.
const FULL: u32 = 1443;

fn never(mut config: Config) -> Config {
    config.branch().encap = "never".into();
    config
}

/// With MOBIKE, strongSwan's default, IKE moves to port 4500 although there is no NAT (peers.md 10).
fn kernel(lab: &Lab<'_>) -> Result<String> {
    let keylog = lab.run.subdir("keylog")?;
    let net = Net::build(lab.run)?;
    let wan = Capture::start(lab.run, &net.wan, "br0", "", 2048)?;
    let args = ["--keylog", &keylog.to_string_lossy()];
    let mut daemon =
        Daemon::prepare(lab.run, lab.bins, &net.left, "left", &never(Config::single()))?
            .with_args(&args);
    daemon.start()?;
    let peer =
        UmlPeer::start(lab.run, &net.peer, &[Conn { encap: false, mobike: true, ..conn() }])?;
    let with_log = |error: Error, daemon: &Daemon| {
        Error::check(format!("{error}; daemon: {}", crate::proc::last_lines(&daemon.log(), 4)))
    };
    peer.initiate("net", PATIENCE).map_err(|error| with_log(error, &daemon))?;
    for (host, address) in [(&net.lhost, net::RHOST), (&net.rhost, net::LHOST)] {
        host.ping_until(address, PATIENCE).map_err(|error| with_log(error, &daemon))?;
        // One that is not cut anywhere: with UDP it would not fit.
        let size = (FULL - 28).to_string();
        let ping = ["-n", "-q", "-c", "3", "-i", "0.05", "-W", "2", "-M", "do", "-s", &size];
        host.cmd("ping").args(ping).arg(address).run(PATIENCE)?;
    }
    let kernel = peer.kernel_spis()?;
    let known = |spis: &crate::charon::Spis| {
        spis.0.iter().flat_map(|(.., list)| list).flat_map(|(a, b)| [*a, *b]).collect::<Vec<_>>()
    };
    let charon = known(&peer.spis()?);
    ensure(charon.len() == 2 && charon.iter().all(|spi| kernel.contains(spi)), || {
        format!("the kernel has {kernel:x?}, charon {charon:x?}")
    })?;

    let probes =
        UdpProbes::start(lab.run, (&net.lhost, net::LHOST), (&net.rhost, net::RHOST), 1000)?;
    probes.wait_flowing(PATIENCE)?;
    let traffic = super::stage::without_loss(&probes, || {
        for (what, ours) in [("child", false), ("child", true), ("ike", false), ("ike", true)] {
            let before = peer.spis()?;
            match (what, ours) {
                (_, true) => drop(daemon.tandem(&["rekey", "branch", &format!("--{what}")])?),
                ("child", false) => peer.rekey("child", "net")?,
                (_, false) => peer.rekey("ike", "gw")?,
            }
            wait::until("a rekeyed SA", PATIENCE, TICK, || {
                let after = peer.spis()?;
                let changed = before.changed(&after);
                Ok((after.count() == before.count() && changed >= 2).then_some(()))
            })
            .map_err(|error| with_log(error, &daemon))?;
        }
        Ok(())
    })
    .map_err(|error| with_log(error, &daemon))?;
    drop(probes);
    let errors = daemon.log_errors();
    ensure(errors.is_empty(), || format!("the daemon logged: {}", errors.join(" / ")))?;
    let drops = daemon.status()?.counters.drops;
    let wan = wan.stop()?;
    let seen = tshark(wan.path(), &keylog)?;
    ensure(seen.esp > 1000 && seen.esp_in_udp == 0 && seen.esp_opened == seen.esp, || {
        format!("tshark: {seen:?}")
    })?;
    let (in_udp, bare, fragments) = check::esp_forms(&wan);
    ensure((in_udp, bare, fragments) == (0, seen.esp, 0), || {
        format!("{in_udp} in UDP, {bare} as protocol 50, {fragments} later fragments")
    })?;
    let clear = check::clear_text(&wan);
    ensure(clear == 0, || format!("{clear} packets in clear on the WAN"))?;
    let mut ivs = IvChecker::default();
    ivs.feed(&wan);
    ensure(ivs.iv_repeats + ivs.sequence_repeats + ivs.message_id_repeats == 0, || {
        format!("repeats: {:?}", ivs.examples)
    })?;
    wan.discard();
    Ok(format!(
        "{}: {traffic} in 4 rekeys (Child SA and IKE SA, by both sides); tshark opened {} packets of protocol 50, none in \
         UDP, none in fragments; {} IVs, 0 repeats; drops {drops:?}",
        peer.describe()?,
        seen.esp_opened,
        ivs.checked
    ))
}

fn pair(lab: &Lab<'_>, peer: PeerKind, kinds: &[Kind]) -> Result<String> {
    let setup = Setup { peer, config: never(Config::pair()), ..Setup::default() };
    let mut scene = Scene::build(lab.run, lab.bins, &setup, &mut |_| {})?;
    let mut found = Vec::new();
    for kind in kinds {
        let outcome = run_trial(lab.run, &mut scene, *kind, 0.6, &mut |_, _| {})?;
        // A whole kernel in one process stands still now and then: with such a peer gaps are told, not judged.
        if peer == PeerKind::Kernel { outcome.judge_safety() } else { outcome.judge() }?;
        found.push(format!(
            "{} gap {:.1} ms, {} lost",
            kind.key(),
            clock::millis(outcome.gap()),
            outcome.lost()
        ));
    }
    // After all that the tunnel still is what it was: a second of it.
    scene.look(lab.run)?.discard();
    clock::sleep_until(clock::now() + std::time::Duration::from_secs(1));
    let seen = scene.look(lab.run)?;
    let (in_udp, bare, fragments) = check::esp_forms(&seen.wan);
    ensure(seen.clear_text() == 0, || "clear text on the WAN".into())?;
    seen.discard();
    ensure(in_udp == 0 && bare > 1500 && fragments == 0, || {
        format!("{in_udp} in UDP, {bare} as protocol 50, {fragments} later fragments")
    })?;
    scene.check_clean()?;
    Ok(format!(
        "{}: {}; same SPIs; {bare} packets of protocol 50 in a second, 0 in UDP; {} IVs, 0 repeats",
        scene.remote.describe()?,
        found.join(", "),
        scene.ivs.checked
    ))
}
