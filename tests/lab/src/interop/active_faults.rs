//! Active-active where more goes wrong than an instance: both pair links, a peer that refuses one tunnel, two uplinks.

use super::stage::TICK;
use super::{Lab, Scenario};
use crate::active::{Active, ENDPOINTS, Flow, OnFailure, peer_conns};
use crate::capture::{Capture, Recording};
use crate::charon::Conn;
use crate::check::{self, IvChecker};
use crate::clock;
use crate::error::{Error, Result, ensure};
use crate::faults::Impairment;
use crate::net::{self, Net};
use crate::ns::Ns;
use crate::pcap::Content;
use crate::probe::{UdpProbes, Way};
use crate::scene::PATIENCE;
use crate::tandem::{Config, Daemon, TunnelStatus};
use crate::wait;
use std::net::IpAddr;
use std::time::Duration;

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "active-links-cut",
        about: "both pair links cut under traffic, no witness, then healed: no IV twice, one owner each",
        play: links_cut,
    },
    Scenario {
        name: "active-refused",
        about: "the peer refuses the second tunnel: said plainly, the first carries everything",
        play: refused,
    },
    Scenario {
        name: "active-uplinks",
        about: "an uplink for each endpoint: its traffic uses no other, adopted or not",
        play: uplinks,
    },
];

const SECOND: Duration = Duration::from_secs(1);

/// Nothing of the pair's own arrives on any link; the LAN goes on. Both ways at once: one that could still speak while it
/// hears nothing would take over before the other is alone, which then is in doubt and has every Child SA rekeyed.
fn cut_links(scene: &Active) -> Result<Vec<Impairment>> {
    let own = |port: &str| format!("ip saddr {{ 10.1.0.2, 10.1.0.3 }} th {port} 4600 drop");
    let (to, from) = (own("dport"), own("sport"));
    let rules = [("eth2", "drop"), ("eth1", to.as_str()), ("eth1", from.as_str())];
    std::thread::scope(|scope| {
        let hosts = [&scene.net.left, &scene.net.right];
        let cuts = hosts.map(|host| scope.spawn(move || Impairment::several(host, &rules)));
        let done = cuts.map(|cut| cut.join().map_err(|_| Error::check("a cut panicked"))?);
        done.into_iter().collect()
    })
}

/// Who owns an endpoint, by each instance's own word.
fn owners(scene: &Active, endpoint: &str) -> Result<[bool; 2]> {
    let owns = |instance: &Daemon| -> Result<bool> {
        Ok(instance.status()?.endpoint(endpoint).role == "owner")
    };
    Ok([owns(&scene.instances[0])?, owns(&scene.instances[1])?])
}

/// Whether each endpoint has one owner, and both instances name the same.
fn agreed(scene: &Active) -> Result<bool> {
    let said = [scene.instances[0].status()?, scene.instances[1].status()?];
    Ok(ENDPOINTS.iter().all(|(endpoint, ..)| {
        let [left, right] = said.each_ref().map(|status| status.endpoint(endpoint));
        (left.role == "owner") != (right.role == "owner")
            && left.owner.is_some()
            && left.owner == right.owner
    }))
}

fn links_cut(lab: &Lab<'_>) -> Result<String> {
    let mut scene = Active::stage(lab.run, lab.bins, OnFailure::Adopt, &mut |_| {})?;
    let before = scene.peer.spis()?;
    scene.look(lab.run)?.discard();
    let mut clear_text = 0;
    let cuts = cut_links(&scene)?;
    let cut = clock::now();
    wait::until("both instances to own both endpoints", PATIENCE, TICK, || {
        let all = [owners(&scene, "a")?, owners(&scene, "b")?];
        Ok((all == [[true; 2]; 2]).then_some(()))
    })?;
    let until = cut + if lab.full { 60 } else { 10 } * SECOND;
    while clock::now() < until {
        clock::sleep_until(until.min(clock::now() + 10 * SECOND));
        // Captures of a minute would be large.
        let seen = scene.look(lab.run)?;
        clear_text += check::clear_text(&seen);
        seen.discard();
    }
    drop(cuts);
    let healed = clock::now();
    wait::until("one owner for each endpoint", PATIENCE, Duration::from_millis(5), || {
        Ok(agreed(&scene)?.then_some(()))
    })?;
    let converged = clock::now() - healed;
    scene.wait_home(PATIENCE)?;
    let at_home = clock::now() - healed;
    scene.flows.iter().try_for_each(|flow| flow.udp.wait_flowing(PATIENCE))?;
    let changed = before.changed(&scene.peer.spis()?);
    ensure(changed == 0, || format!("{changed} SPIs changed"))?;
    let tcp = scene.tcp.as_mut().ok_or_else(|| Error::check("no TCP"))?;
    // Whoever waited in vain for so long tries again after as long once more (RFC 6298 §5.5).
    let patience = (healed - cut) + 20 * SECOND;
    ensure(tcp.broken(patience)? == 0, || "a TCP connection broke".into())?;
    let lost: Vec<String> = scene.flows.iter().map(|flow| told_loss(flow, cut, healed)).collect();
    let seen = scene.look(lab.run)?;
    clear_text += check::clear_text(&seen);
    seen.discard();
    ensure(clear_text == 0, || format!("{clear_text} packets in clear"))?;
    // Sequence numbers may repeat after a split (ha.md, invariant 2); IVs never.
    ensure(scene.ivs.iv_repeats == 0, || format!("IV repeats: {:?}", scene.ivs.examples))?;
    no_errors(&scene)?;
    // The figure is the bar's, so it is judged after everything that may never be.
    ensure(converged <= SECOND, || {
        format!("one owner each only {:.2} s after healing", converged.as_secs_f64())
    })?;
    Ok(format!(
        "both owned both for {:.0} s; one owner each {:.2} s after healing, at home and in sync after {:.1} s; {} IVs, 0 repeats, \
         {} numbers twice, 0 in clear, same SPIs; lost meanwhile (out, back): {}",
        (healed - cut).as_secs_f64(),
        converged.as_secs_f64(),
        at_home.as_secs_f64(),
        scene.ivs.checked,
        scene.ivs.sequence_repeats,
        lost.join(", ")
    ))
}

fn told_loss(flow: &Flow, from: Duration, to: Duration) -> String {
    let [out, back] = Way::BOTH.map(|way| flow.udp.measure(way, from, to));
    format!("{}: {}+{} of {}", flow.name(), out.lost(), back.lost(), out.sent + back.sent)
}

fn no_errors(scene: &Active) -> Result<()> {
    for instance in &scene.instances {
        let errors = instance.log_errors();
        ensure(errors.is_empty(), || format!("{} logged: {}", instance.name, errors.join(" / ")))?;
    }
    Ok(())
}

/// What an instance says of an endpoint's tunnel.
fn tunnel_at(instance: &Daemon, endpoint: &str) -> Result<TunnelStatus> {
    let tunnels = instance.status()?.tunnels;
    let found = tunnels.into_iter().find(|tunnel| tunnel.endpoint == endpoint);
    found.ok_or_else(|| Error::check(format!("{} has no tunnel at {endpoint}", instance.name)))
}

/// Requests of IKE_SA_INIT (RFC 7296 §3.1: exchange type 34) that an address has sent, retransmissions and all.
fn asked(seen: &Recording, address: &str) -> u64 {
    let address: Option<IpAddr> = address.parse().ok();
    let requests = seen.packets().filter(|packet| {
        packet.source == address
            && matches!(&packet.content, Content::Ike { header, .. }
                if header.exchange == 34 && !header.is_response)
    });
    requests.count() as u64
}

/// For so long each refusal is watched.
const REFUSED: Duration = Duration::from_secs(10);
/// Requests that may be seen meanwhile: pauses double from a second on, so there are about five.
const ASKED_AT_MOST: u64 = 10;

fn refused(lab: &Lab<'_>) -> Result<String> {
    let mut config = Config::active_active();
    config.branch().children[0].start = "initiate".into();
    let good = peer_conns();
    let first_only = good.get(..1).unwrap_or_default();
    let mut wrong: Vec<Conn> = good.clone();
    wrong[1].remote_id = "other.example".into();
    let net = Net::build(lab.run)?;
    let mut scene = Active::on(lab.run, lab.bins, net, &config, &[], first_only)?;
    wait::until("the first tunnel", PATIENCE, TICK, || {
        let up = |instance: &Daemon| -> Result<bool> {
            Ok(crate::active::is_up(&instance.status()?, "a"))
        };
        Ok((up(&scene.instances[0])? && up(&scene.instances[1])?).then_some(()))
    })?;
    let mut udp = Vec::new();
    for (source, port) in [(net::LHOST, 7100), (net::LHOST_SECOND, 7101)] {
        let ends = ((&scene.net.lhost, source), (&scene.net.rhost, net::RHOST));
        udp.push(UdpProbes::on_port(lab.run, ends.0, ends.1, 500, port)?);
    }
    udp.iter().try_for_each(|udp| udp.wait_flowing(PATIENCE))?;

    let mut told = Vec::new();
    let rounds: &[(&str, &[Conn])] =
        &[("NO_PROPOSAL_CHOSEN", first_only), ("AUTHENTICATION_FAILED", &wrong)];
    for (word, conns) in rounds {
        scene.peer.load(conns)?;
        // With `owner` of b at home, the right one tries.
        let what = format!("`{word}` in b's status");
        wait::until_ok(&what, 70 * SECOND, TICK, || {
            let at_b = tunnel_at(&scene.instances[1], "b")?;
            let text = at_b.last_error.map(|error| error.text).unwrap_or_default();
            ensure(text.contains(word) && at_b.state != "established", || {
                format!("{}: {text:?}", at_b.state)
            })
        })?;
        scene.look(lab.run)?.discard();
        let from = clock::now();
        clock::sleep_until(from + REFUSED);
        let to = clock::now();
        let seen = scene.look(lab.run)?;
        let requests = asked(&seen, net::SECOND_WAN);
        let stray = check::sent_by_esp(&seen, net::SECOND_WAN);
        seen.discard();
        ensure(requests <= ASKED_AT_MOST, || format!("{requests} requests in 10 s"))?;
        ensure(stray == 0, || format!("{stray} ESP packets from an address without a tunnel"))?;
        for (index, udp) in udp.iter().enumerate() {
            udp.settle(to)?;
            for way in Way::BOTH {
                let measure = udp.measure(way, from, to);
                ensure(measure.lost() == 0 && measure.sent > 0, || {
                    format!("flow {index}, {way:?}: {} of {} lost", measure.lost(), measure.sent)
                })?;
            }
        }
        let line = plain_words(&scene.instances[1], word)?;
        told.push(format!("{line:?} ({requests} requests in 10 s)"));
    }
    for instance in &scene.instances {
        let warnings = instance.log().lines().filter(|line| line.contains(" WARN ")).count();
        ensure(warnings < 40, || format!("{} logged {warnings} warnings", instance.name))?;
    }

    // The operator of the other side mends it: nobody needs to ask us.
    scene.peer.load(&good)?;
    let mended = clock::now();
    scene.wait_tunnels(70 * SECOND)?;
    let up = clock::now() - mended;
    udp.iter().try_for_each(|udp| udp.wait_flowing(PATIENCE))?;
    scene.check_clean()?;
    Ok(format!(
        "{}; 0 lost by the first tunnel; the second up {:.0} s after it was mended",
        told.join("; "),
        up.as_secs_f64()
    ))
}

/// The line of `tandem status`, as people read it, with the reason; it must name connection and endpoint.
fn plain_words(instance: &Daemon, word: &str) -> Result<String> {
    let text = instance.tandem(&["status"])?;
    let named = |line: &&str| {
        let words: Vec<&str> = line.split(|c: char| !c.is_alphanumeric()).collect();
        line.contains(word) && words.contains(&"branch") && words.contains(&"b")
    };
    let line = text.lines().find(named).map(|line| line.trim().to_owned());
    line.ok_or_else(|| Error::check(format!("no line has {word}, branch and b in:\n{text}")))
}

/// What one uplink saw.
struct Uplink {
    wan: Ns,
    interface: &'static str,
    address: &'static str,
}

fn uplinks(lab: &Lab<'_>) -> Result<String> {
    let mut config = Config::active_active();
    config.endpoints[1].wan = net::OTHER_WAN.into();
    config.endpoints[1].gateway = net::OTHER_GATEWAY.into();
    config.endpoints[1].uplink = "eth3".into();
    let mut conns = peer_conns();
    conns[1].remote_addr = net::OTHER_WAN.into();
    let net = Net::build(lab.run)?;
    let second = net.second_uplink(lab.run)?;
    let ways = [
        Uplink { wan: net.wan.clone(), interface: "eth0", address: net::VIRTUAL_WAN },
        Uplink { wan: second, interface: "eth3", address: net::OTHER_WAN },
    ];
    let mut scene = Active::on(lab.run, lab.bins, net, &config, &[], &conns)?;
    scene.bring_up()?;
    scene.add_flows(lab.run)?;
    let before = scene.peer.spis()?;
    let mut ivs = IvChecker::default();
    let mut told = Vec::new();

    // Each at home, then each adopted by the other.
    for dead in [None, Some(0), Some(1)] {
        scene.wait_home(PATIENCE)?;
        scene.flows.iter().try_for_each(|flow| flow.udp.wait_flowing(PATIENCE))?;
        let captures = ways.each_ref().map(|way| Capture::start(lab.run, &way.wan, "br0", "", 256));
        let from = clock::now();
        if let Some(dead) = dead {
            scene.instances[dead].kill9()?;
        }
        clock::sleep_until(from + 3 * SECOND);
        let to = clock::now();
        let mut gap = Duration::ZERO;
        for flow in &scene.flows {
            flow.udp.settle(to)?;
            gap = gap.max(flow.udp.measure(Way::Out, from, to).gap);
        }
        ensure(clock::millis(gap) <= 150.0, || format!("gap {:.1} ms", clock::millis(gap)))?;
        let mut sent = Vec::new();
        for (index, (way, capture)) in ways.iter().zip(captures).enumerate() {
            let seen = capture?.stop()?;
            ivs.feed_esp(&seen);
            sent.push(judge_uplink(&scene, &ways, (index, way), dead, &seen, from)?.to_string());
            seen.discard();
        }
        let name = dead.map_or("at home", |dead| ["left dead", "right dead"][dead]);
        told.push(format!(
            "{name}: {} packets, gap {:.1} ms",
            sent.join(" and "),
            clock::millis(gap)
        ));
        if let Some(dead) = dead {
            scene.instances[dead].bury()?;
            scene.instances[dead].start()?;
        }
    }
    scene.wait_home(PATIENCE)?;
    ensure(before.changed(&scene.peer.spis()?) == 0, || "SPIs changed".into())?;
    ensure(ivs.iv_repeats == 0, || format!("IV repeats: {:?}", ivs.examples))?;
    scene.check_clean()?;
    Ok(format!("{}; nothing of one endpoint on the other's uplink", told.join("; ")))
}

/// One uplink has what its own endpoint sends, from its owner's interface there, and nothing of the other's. Returns how
/// many packets that was.
fn judge_uplink(
    scene: &Active,
    ways: &[Uplink; 2],
    (index, way): (usize, &Uplink),
    dead: Option<usize>,
    seen: &Recording,
    from: Duration,
) -> Result<u64> {
    let clear_text = check::clear_text(seen);
    ensure(clear_text == 0, || format!("{clear_text} packets in clear"))?;
    let addresses = ways.each_ref().map(|way| way.address.parse::<IpAddr>().ok());
    let other = addresses[1 - index];
    let strays = seen.packets().filter(|packet| packet.source == other || packet.target == other);
    let strays = strays.count();
    ensure(strays == 0, || {
        format!("{strays} packets of {} on {}'s uplink", ways[1 - index].address, way.address)
    })?;
    // The endpoint's own instance, or the one that is left.
    let owner = dead.map_or(index, |dead| 1 - dead);
    let mac = scene.instances[owner].ns.mac(way.interface)?;
    let settled = from + SECOND;
    let Some(address) = addresses[index] else { return Err(Error::check("an address")) };
    let all = check::sent_by(seen, way.address, settled, Duration::MAX);
    let by_owner = check::sent_as(seen, mac, address, settled, Duration::MAX);
    ensure(by_owner == all && all > 0, || {
        format!("{all} packets from {}, {by_owner} of them by its owner", way.address)
    })?;
    Ok(all)
}
