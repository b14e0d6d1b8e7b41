//! One instance: rekeys by both sides, liveness, deletes, peers that come and go.

use super::stage::{Single, TICK, conn, single, without_loss};
use super::{Lab, Scenario};
use crate::capture::Capture;
use crate::error::{Result, ensure};
use crate::scene::PATIENCE;
use crate::tandem::Config;
use crate::{check, clock, wait};
use nix::sys::signal::Signal;
use std::time::Duration;

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "rekey-child-by-peer",
        about: "strongSwan rekeys the Child SA under traffic",
        play: child_by_peer,
    },
    Scenario {
        name: "rekey-child-by-us",
        about: "we rekey the Child SA under traffic",
        play: child_by_us,
    },
    Scenario {
        name: "rekey-ike-by-peer",
        about: "strongSwan rekeys the IKE SA under traffic",
        play: ike_by_peer,
    },
    Scenario {
        name: "rekey-ike-by-us",
        about: "we rekey the IKE SA under traffic",
        play: ike_by_us,
    },
    Scenario {
        name: "rekey-collisions",
        about: "both sides rekey at the same moment",
        play: collisions,
    },
    Scenario {
        name: "rekey-by-time",
        about: "lifetimes on both sides, seconds long",
        play: by_time,
    },
    Scenario {
        name: "reauthentication",
        about: "strongSwan reauthenticates, make before break",
        play: reauthentication,
    },
    Scenario { name: "dpd-by-peer", about: "we answer its liveness checks", play: dpd_by_peer },
    Scenario {
        name: "dpd-by-us",
        about: "we notice a dead peer and come back when it does",
        play: dpd_by_us,
    },
    Scenario {
        name: "delete-by-peer",
        about: "strongSwan deletes Child and IKE SA",
        play: delete_by_peer,
    },
    Scenario { name: "delete-by-us", about: "tandem down, then up", play: delete_by_us },
    Scenario {
        name: "peer-restarts",
        about: "strongSwan dies and initiates again",
        play: peer_restarts,
    },
    Scenario { name: "orderly-stop", about: "SIGTERM tells the peer", play: orderly_stop },
];

/// Waits until SPIs changed: `wanted` at least, both ends agreeing on the new ones.
fn rekeyed(stage: &Single, before: &crate::charon::Spis, wanted: u64) -> Result<()> {
    wait::until("other SPIs at the peer", PATIENCE, TICK, || {
        let after = stage.peer.spis()?;
        Ok((after.0.len() == 1 && before.changed(&after) >= wanted).then_some(()))
    })
    .map_err(|error| stage.with_log(error))?;
    agree(stage)
}

/// Both ends show the same SPIs, one child each.
fn agree(stage: &Single) -> Result<()> {
    wait::until("both ends to agree on SPIs", PATIENCE, TICK, || {
        let theirs = stage.peer.spis()?;
        let tunnel = stage.daemon.status()?.tunnel("branch");
        let ours = tunnel.ike.unwrap_or_default();
        let [(i, r, children)] = &theirs.0[..] else { return Ok(None) };
        let same_ike = ours.spi_i == format!("{i:016x}") && ours.spi_r == format!("{r:016x}");
        let installed: Vec<_> =
            tunnel.children.iter().filter(|child| child.state == "installed").collect();
        let same_child = matches!((&installed[..], &children[..]), ([mine], [(spi_in, spi_out)])
            if mine.spi_out == format!("{spi_in:08x}") && mine.spi_in == format!("{spi_out:08x}"));
        Ok((same_ike && same_child).then_some(()))
    })
    .map_err(|error| stage.with_log(error))
}

fn up(lab: &Lab<'_>) -> Result<Single> {
    let stage = single(lab, &Config::single(), &[conn()])?;
    stage.peer_up()?;
    Ok(stage)
}

fn rekeys(
    lab: &Lab<'_>,
    count: u32,
    wanted: u64,
    start: impl Fn(&Single) -> Result<()>,
) -> Result<String> {
    let mut stage = up(lab)?;
    let probes = stage.probes(lab.run)?;
    let found = without_loss(&probes, || {
        for _ in 0..count {
            let before = stage.peer.spis()?;
            start(&stage).map_err(|error| stage.with_log(error))?;
            rekeyed(&stage, &before, wanted)?;
        }
        // The old inbound SA is kept for late packets; then it goes.
        clock::sleep_until(clock::now() + Duration::from_secs(1));
        Ok(())
    })?;
    stage.check_clean()?;
    Ok(format!("{count} rekeys, {found}"))
}

fn child_by_peer(lab: &Lab<'_>) -> Result<String> {
    rekeys(lab, 3, 4, |stage| stage.peer.rekey_child("net"))
}

fn child_by_us(lab: &Lab<'_>) -> Result<String> {
    rekeys(lab, 3, 4, |stage| stage.daemon.tandem(&["rekey", "branch", "--child"]).map(drop))
}

fn ike_by_peer(lab: &Lab<'_>) -> Result<String> {
    rekeys(lab, 3, 4, |stage| stage.peer.rekey_ike("gw"))
}

fn ike_by_us(lab: &Lab<'_>) -> Result<String> {
    rekeys(lab, 3, 4, |stage| stage.daemon.tandem(&["rekey", "branch", "--ike"]).map(drop))
}

/// What of IKE the router keeps from both gateways. ESP always passes.
#[derive(Clone, Copy)]
enum Hold {
    /// Everything.
    All,
    /// Responses.
    Responses,
    /// Nothing.
    Nothing,
}

fn hold_ike(stage: &Single, hold: Hold) -> Result<()> {
    // IKE on port 4500 has four zero bytes where ESP has its SPI (RFC 3948 §2.2), then the header with its flags at byte
    // 19 (RFC 7296 §3.1).
    let rule = match hold {
        Hold::All => "udp dport 4500 @th,64,32 0 drop",
        Hold::Responses => "udp dport 4500 @th,64,32 0 @th,248,8 & 0x20 == 0x20 drop",
        Hold::Nothing => "",
    };
    stage.net.router.nft(&format!(
        "table ip lab_hold\ndelete table ip lab_hold\ntable ip lab_hold {{\n chain pass {{\n  \
         type filter hook forward priority 0;\n  {rule}\n }}\n}}\n"
    ))
}

fn collisions(lab: &Lab<'_>) -> Result<String> {
    // Repetitions follow soon, so that a round is short.
    let mut config = Config::single();
    config.branch().settings.push(("retransmit_timeout".into(), "\"1s\"".into()));
    let charon = "retransmit_timeout = 1.0\n  retransmit_base = 1.2";
    let mut stage = super::stage::single_with(lab, &config, &[conn()], charon, &[])?;
    stage.peer_up()?;
    let probes = stage.probes(lab.run)?;
    let rounds = if lab.full { 5 } else { 2 };
    let kinds = [("child", "child"), ("ike", "ike"), ("child", "ike"), ("ike", "child")];
    let mut found = Vec::new();
    for (ours, theirs) in kinds {
        let name = |error| crate::Error::check(format!("our {ours}, their {theirs}: {error}"));
        for round in 0..rounds {
            let lost = without_loss(&probes, || collide(lab, &stage, ours, theirs, round % 2 == 0))
                .map_err(name)?;
            found.push(lost);
        }
    }
    stage.ping_both()?;
    stage.check_clean()?;
    Ok(format!(
        "{rounds} each of Child/Child, IKE/IKE, Child/IKE, IKE/Child, both requests out at once; one IKE SA and one child left; the last: {}",
        found.last().map_or("", String::as_str)
    ))
}

/// Lets the two rekeys cross, and waits for what they leave. With `noticed`, each end gets the other's request before
/// the response to its own; else one of them may never learn of the other's (RFC 7296 §2.8.2).
fn collide(lab: &Lab<'_>, stage: &Single, ours: &str, theirs: &str, noticed: bool) -> Result<()> {
    let before = stage.peer.spis()?;
    let at_us = Capture::start(lab.run, &stage.net.wan, "br0", "udp", 256)?;
    let at_peer = Capture::start(lab.run, &stage.net.peer, "eth0", "udp", 256)?;
    hold_ike(stage, Hold::All)?;
    std::thread::scope(|scope| {
        let flag = format!("--{ours}");
        let mine = scope.spawn(move || stage.daemon.tandem(&["rekey", "branch", &flag]).map(drop));
        let out = match theirs {
            "child" => stage.peer.rekey_child("net"),
            _ => stage.peer.rekey_ike("gw"),
        }
        .and_then(|()| {
            wait::until("both requests to be out", PATIENCE, TICK, || {
                let mut open = check::open_rekeys(&at_us.peek()?);
                open.append(&mut check::open_rekeys(&at_peer.peek()?));
                Ok(check::crossed(&open).then_some(()))
            })
        })
        .and_then(|()| {
            if !noticed {
                return Ok(());
            }
            hold_ike(stage, Hold::Responses)?;
            wait::until("both requests to arrive", PATIENCE, TICK, || {
                let arrived = |at: &Capture| Ok(check::crossed(&check::asked_rekeys(&at.peek()?)));
                Ok((arrived(&at_us)? && arrived(&at_peer)?).then_some(()))
            })
        });
        // Whatever happened: nobody is left waiting.
        hold_ike(stage, Hold::Nothing)?;
        // A loser of the collision may say so; what counts is what is left.
        let _ = mine.join();
        out
    })
    .map_err(|error| stage.with_log(error))?;
    wait::until("both requests to be answered, or their IKE SA gone", PATIENCE, TICK, || {
        let sas = stage.peer.sas()?;
        let lives = |(i, r, ..): &check::Request| {
            sas.iter().any(|sa| (sa.initiator_spi, sa.responder_spi) == (*i, *r))
        };
        Ok((!check::open_rekeys(&at_peer.peek()?).iter().any(lives)).then_some(()))
    })
    .map_err(|error| stage.with_log(error))?;
    // The peer's half of a redundant IKE SA stays when its winning rekey ends the old SA before we had its response: we
    // never learn what to delete. charon drops it by itself after 30 s (HALF_OPEN_IKE_SA_TIMEOUT).
    let patience = PATIENCE + Duration::from_secs(15);
    wait::until("one IKE SA with one child at both ends", patience, TICK, || {
        let sas = stage.peer.sas()?;
        let tunnels = stage.daemon.status()?.tunnels;
        Ok((matches!(&sas[..], [sa] if sa.children.len() == 1)
            && matches!(&tunnels[..], [tunnel] if tunnel.children.len() == 1))
        .then_some(()))
    })
    .map_err(|error| {
        let states = (stage.peer.sas(), stage.daemon.status().map(|status| status.tunnels));
        crate::Error::check(format!("{}: {states:?}", stage.with_log(error)))
    })?;
    agree(stage)?;
    let changed = before.changed(&stage.peer.spis()?);
    // Rekeys of one kind end in one that counts (RFC 7296 §2.8.1, §2.8.2); of two kinds, both may be put off (§2.25).
    ensure(ours != theirs || changed >= 2, || "nothing was rekeyed".into())?;
    at_us.stop()?.discard();
    at_peer.stop()?.discard();
    Ok(())
}

fn by_time(lab: &Lab<'_>) -> Result<String> {
    let mut config = Config::single();
    config.branch().settings.push(("rekey_time".into(), "\"13s\"".into()));
    config.branch().children[0].settings.push(("rekey_time".into(), "\"7s\"".into()));
    let peer = conn()
        .with("rekey_time", "11s")
        .with("over_time", "10s")
        .with_child("rekey_time", "6s")
        .with_child("life_time", "12s");
    let mut stage = single(lab, &config, &[peer])?;
    stage.peer_up()?;
    let probes = stage.probes(lab.run)?;
    let before = stage.peer.spis()?;
    let found = without_loss(&probes, || {
        clock::sleep_until(clock::now() + Duration::from_secs(20));
        Ok(())
    })?;
    ensure(before.changed(&stage.peer.spis()?) == 8, || {
        "not everything was rekeyed in 20 s".into()
    })?;
    stage.check_clean()?;
    Ok(format!("20 s of lifetimes between 6 and 13 s: {found}"))
}

fn reauthentication(lab: &Lab<'_>) -> Result<String> {
    let extra = "make_before_break = yes";
    let mut stage = super::stage::single_with(lab, &Config::single(), &[conn()], extra, &[])?;
    stage.peer_up()?;
    let probes = stage.probes(lab.run)?;
    let before = stage.peer.spis()?;
    let found = without_loss(&probes, || {
        stage.peer.swanctl(&["--rekey", "--reauth", "--ike", "gw"], PATIENCE)?;
        wait::until("a new IKE SA alone", PATIENCE, TICK, || {
            let after = stage.peer.spis()?;
            Ok((after.0.len() == 1 && before.changed(&after) >= 4 && stage.peer.sas()?.len() == 1)
                .then_some(()))
        })
        .map_err(|error| stage.with_log(error))?;
        agree(&stage)
    })?;
    stage.ping_both()?;
    stage.check_clean()?;
    Ok(found)
}

fn dpd_by_peer(lab: &Lab<'_>) -> Result<String> {
    let mut stage = single(lab, &Config::single(), &[conn().with("dpd_delay", "1s")])?;
    stage.peer_up()?;
    let before = stage.peer.spis()?;
    let skip = stage.peer.log().len();
    stage.peer.wait_log(skip, &["sending DPD request"], PATIENCE)?;
    stage.peer.wait_log(skip, &["parsed INFORMATIONAL response"], PATIENCE)?;
    ensure(before.changed(&stage.peer.spis()?) == 0, || "SAs changed".into())?;
    stage.check_clean()?;
    Ok("asked and answered".into())
}

fn dpd_by_us(lab: &Lab<'_>) -> Result<String> {
    let mut config = Config::single();
    config.branch().children[0].start = "initiate".into();
    config.branch().settings.push(("dpd_delay".into(), "\"2s\"".into()));
    config.branch().settings.push(("retransmit_timeout".into(), "\"1s\"".into()));
    config.branch().settings.push(("retransmit_tries".into(), "2".into()));
    let mut stage = single(lab, &config, &[conn()])?;
    stage.both_up()?;
    stage.ping_both()?;
    stage.peer.proc().signal(Signal::SIGSTOP)?;
    wait::until("the instance to notice a dead peer", Duration::from_secs(60), TICK, || {
        Ok((!stage.daemon.status()?.is_up("branch", 1)).then_some(()))
    })?;
    stage.peer.proc().signal(Signal::SIGCONT)?;
    wait::until("the tunnel to come back", Duration::from_secs(60), TICK, || {
        Ok(stage.daemon.status()?.is_up("branch", 1).then_some(()))
    })
    .map_err(|error| stage.with_log(error))?;
    stage.ping_both()?;
    stage.check_clean()?;
    Ok("down when the peer was silent, up again when it answered".into())
}

fn delete_by_peer(lab: &Lab<'_>) -> Result<String> {
    let mut stage = up(lab)?;
    stage.ping_both()?;
    stage.peer.terminate_child("net")?;
    wait::until("the child to be gone", PATIENCE, TICK, || {
        Ok((!stage.daemon.status()?.is_up("branch", 1)).then_some(()))
    })?;
    stage.peer_up()?;
    stage.ping_both()?;
    stage.peer.terminate("gw")?;
    wait::until("the IKE SA to be gone", PATIENCE, TICK, || {
        Ok((stage.daemon.status()?.tunnel("branch").state == "down").then_some(()))
    })?;
    stage.peer_up()?;
    stage.ping_both()?;
    stage.check_clean()?;
    Ok("Child SA, then IKE SA deleted; each time up again".into())
}

fn delete_by_us(lab: &Lab<'_>) -> Result<String> {
    let mut stage = up(lab)?;
    stage.ping_both()?;
    stage.daemon.tandem(&["down", "branch"]).map_err(|error| stage.with_log(error))?;
    wait::until("the peer to have none", PATIENCE, TICK, || {
        Ok(stage.peer.sas()?.is_empty().then_some(()))
    })?;
    stage.daemon.tandem(&["up", "branch"]).map_err(|error| stage.with_log(error))?;
    stage.both_up()?;
    stage.ping_both()?;
    stage.check_clean()?;
    Ok("down: nothing left at the peer; up: pings both ways".into())
}

fn peer_restarts(lab: &Lab<'_>) -> Result<String> {
    let mut stage = up(lab)?;
    stage.ping_both()?;
    let before = stage.peer.spis()?;
    stage.peer.proc().kill9()?;
    stage.peer.proc().bury(PATIENCE)?;
    stage.peer = crate::charon::Charon::start(lab.run, &stage.net.peer)?;
    stage.peer.load(&[conn()])?;
    stage.peer_up()?;
    stage.ping_both()?;
    ensure(before.changed(&stage.peer.spis()?) == 8, || "the new life has SPIs of the old".into())?;
    // INITIAL_CONTACT: the old life's SAs are gone here.
    wait::until("one tunnel alone", PATIENCE, TICK, || {
        let status = stage.daemon.status()?;
        let children: usize = status.tunnels.iter().map(|tunnel| tunnel.children.len()).sum();
        Ok((status.tunnels.len() == 1 && children == 1).then_some(()))
    })
    .map_err(|error| stage.with_log(error))?;
    stage.check_clean()?;
    Ok("its new life replaced the old one's SAs".into())
}

fn orderly_stop(lab: &Lab<'_>) -> Result<String> {
    let mut stage = up(lab)?;
    stage.ping_both()?;
    stage.check_clean()?;
    stage.daemon.stop()?;
    wait::until("the peer to have none", PATIENCE, TICK, || {
        Ok(stage.peer.sas()?.is_empty().then_some(()))
    })
    .map_err(|error| stage.with_log(error))?;
    stage.daemon.start()?;
    stage.peer_up()?;
    stage.ping_both()?;
    Ok("the peer was told; a new life works".into())
}
