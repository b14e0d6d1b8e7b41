//! The lab proves itself, strongSwan against strongSwan: what a failing test means must not be in doubt.

use crate::capture::Capture;
use crate::charon::{Charon, ChildConf, Conn};
use crate::check::{self, IvChecker};
use crate::error::{Result, ensure};
use crate::faults::{Impairment, Saturation};
use crate::net::{self, Net};
use crate::probe::{TcpProbes, UdpProbes, Way};
use crate::proc::Proc;
use crate::run::Run;
use crate::uml::UmlPeer;
use crate::{clock, wait};
use std::time::Duration;

const SHORT: Duration = Duration::from_secs(20);

/// The remote gateway's connection to the endpoint, as strongSwan speaks it.
pub fn peer_conn(psk: &str) -> Conn {
    Conn {
        name: "gw".into(),
        local_addr: net::PEER_WAN.into(),
        remote_addr: net::VIRTUAL_WAN.into(),
        local_id: "branch.example".into(),
        remote_id: "gw.example".into(),
        psk: psk.into(),
        proposals: vec!["aes256gcm16-prfsha384-x25519".into()],
        encap: true,
        mobike: false,
        settings: Vec::new(),
        children: vec![ChildConf {
            name: "net".into(),
            local_ts: vec![net::REMOTE_TS.into()],
            remote_ts: vec![net::LOCAL_TS.into()],
            esp_proposals: vec!["aes256gcm16-x25519".into()],
            start_action: "none".into(),
            settings: Vec::new(),
        }],
    }
}

/// The same connection seen from the other end: for a strongSwan in the endpoint's place.
pub fn mirrored(conn: &Conn) -> Conn {
    let mut other = conn.clone();
    std::mem::swap(&mut other.local_addr, &mut other.remote_addr);
    std::mem::swap(&mut other.local_id, &mut other.remote_id);
    for child in &mut other.children {
        std::mem::swap(&mut child.local_ts, &mut child.remote_ts);
    }
    other
}

/// One TCP stream by iperf3 from the host behind the endpoint to the one behind the gateway, in Gb/s.
pub fn iperf(run: &Run, net: &Net, seconds: u32) -> Result<f64> {
    let log = run.dir().join("iperf3-server.log");
    let mut server: Proc =
        net.rhost.cmd("iperf3").args(["-s", "-1", "-B", net::RHOST]).spawn(&log)?;
    wait::until("iperf3 to listen", SHORT, Duration::from_millis(20), || {
        server.check_alive()?;
        let listening = net.rhost.cmd("ss").args(["-Htln", "sport", "=", ":5201"]).run(SHORT)?;
        Ok((!listening.trim().is_empty()).then_some(()))
    })?;
    let json = net
        .lhost
        .cmd("iperf3")
        .args(["-c", net::RHOST, "-J", "-O", "1", "-t", &seconds.to_string()])
        .run(Duration::from_secs(u64::from(seconds) + 30))?;
    let value: serde_json::Value = serde_json::from_str(&json)
        .map_err(|error| crate::Error::parse("iperf3's answer", error.to_string()))?;
    let bits =
        value.pointer("/end/sum_received/bits_per_second").and_then(serde_json::Value::as_f64);
    bits.map(|bits| bits / 1e9)
        .ok_or_else(|| crate::Error::parse("iperf3's answer", "no rate in it"))
}

/// libipsec against libipsec on a fresh network: Gb/s of one TCP stream. The yardstick for Tandem's throughput.
pub fn libipsec_gbps(run: &Run, seconds: u32) -> Result<f64> {
    let net = Net::build(run)?;
    let (_left, _peer) = strongswan_pair(run, &net)?;
    net.lhost.ping_until(net::RHOST, SHORT)?;
    let rate = iperf(run, &net, seconds)?;
    run.clear_namespaces();
    Ok(rate)
}

/// strongSwan at both ends, tunnel up.
pub fn strongswan_pair(run: &Run, net: &Net) -> Result<(Charon, Charon)> {
    net.plain_endpoint()?;
    let left = Charon::start(run, &net.left)?;
    let peer = Charon::start(run, &net.peer)?;
    let conn = peer_conn("baseline-secret");
    left.load(&[mirrored(&conn)])?;
    peer.load(&[conn])?;
    peer.initiate("net", SHORT)?;
    Ok((left, peer))
}

/// Runs the whole baseline and tells each step to `say`.
pub fn prove(run: &Run, say: &mut dyn FnMut(&str)) -> Result<()> {
    let net = Net::build(run)?;
    let wan = Capture::start(run, &net.wan, "br0", "", 2048)?;
    let (left, peer) = strongswan_pair(run, &net)?;
    say(&format!("{} on both sides, tunnel up", peer.version()?));
    net.lhost.ping_until(net::RHOST, SHORT)?;
    net.rhost.ping_until(net::LHOST, SHORT)?;
    say("pings both ways");

    let mut udp = UdpProbes::start(run, (&net.lhost, net::LHOST), (&net.rhost, net::RHOST), 1000)?;
    udp.wait_flowing(SHORT)?;
    let mut tcp = TcpProbes::start(run, &net.lhost, (&net.rhost, net::RHOST), Some(2_500_000))?;
    let before = peer.spis()?;
    let from = clock::now();
    clock::sleep_until(from + Duration::from_secs(2));
    let to = clock::now();
    udp.settle(to)?;
    udp.check_alive()?;
    for way in Way::BOTH {
        let measure = udp.measure(way, from, to);
        say(&format!("{way:?}: {measure:?}"));
        ensure((1900..2100).contains(&measure.sent), || format!("pacing is off: {measure:?}"))?;
        ensure(measure.lost() == 0, || format!("packets lost on a quiet network: {measure:?}"))?;
        ensure(measure.gap < Duration::from_millis(500), || format!("odd silence: {measure:?}"))?;
    }
    say(&format!("bulk TCP {:.1} Mb/s", tcp.rate(from, to) / 1e6));
    ensure(tcp.broken(SHORT)? == 0, || "a TCP connection is broken on a quiet network".into())?;

    // Pacing on saturated cores: the probes' own clock must not be what a trial measures.
    let load = Saturation::start(run)?;
    let from = clock::now();
    clock::sleep_until(from + Duration::from_secs(2));
    let to = clock::now();
    drop(load);
    udp.settle(to)?;
    for way in Way::BOTH {
        let measure = udp.measure(way, from, to);
        say(&format!("{way:?} on saturated cores: {measure:?}"));
        ensure((1900..2100).contains(&measure.sent), || {
            format!("pacing under load is off: {measure:?}")
        })?;
    }

    // The probes must see a hole of a known length, and the SPIs must notice a rekey.
    let cut_at = clock::now();
    let cut = Impairment::cut(&net.peer, "eth0")?;
    clock::sleep_until(cut_at + Duration::from_millis(300));
    drop(cut);
    let healed = clock::now();
    udp.wait_flowing(SHORT)?;
    let to = clock::now();
    udp.settle(to)?;
    let measure = udp.measure(Way::Out, cut_at, to);
    say(&format!("one-way cut of {:.0} ms seen as {measure:?}", clock::millis(healed - cut_at)));
    ensure(
        measure.gap > Duration::from_millis(200)
            && measure.gap <= healed - cut_at + Duration::from_millis(50),
        || format!("a cut was measured wrongly: {measure:?}"),
    )?;
    ensure(udp.measure(Way::In, cut_at, to).lost() == 0, || "a one-way cut cut both ways".into())?;
    ensure(tcp.broken(SHORT)? == 0, || "a TCP connection did not survive 300 ms".into())?;

    let rekeyed = clock::now();
    peer.rekey_child("net")?;
    wait::until("other SPIs after a rekey", SHORT, Duration::from_millis(20), || {
        Ok((before.changed(&peer.spis()?) > 0).then_some(()))
    })?;
    say(&format!("a Child rekey is seen: {} SPIs changed", before.changed(&peer.spis()?)));

    let recording = wan.stop()?;
    let exchanges = check::ike_exchanges(&recording, rekeyed, clock::now());
    ensure(exchanges >= 1, || "the rekey's exchange was not captured".into())?;
    let mut ivs = IvChecker::default();
    ivs.feed(&recording);
    say(&format!(
        "{} protected datagrams captured, {} IV repeats, {} sequence repeats, {} exchanges in the rekey",
        ivs.checked, ivs.iv_repeats, ivs.sequence_repeats, exchanges
    ));
    ensure(ivs.checked > 4000 && ivs.iv_repeats == 0, || format!("IV check: {:?}", ivs.examples))?;
    ensure(check::clear_text(&recording) == 0, || "clear text through the tunnel?".into())?;

    let rate = iperf(run, &net, 3)?;
    say(&format!("one TCP stream, libipsec to libipsec: {rate:.2} Gb/s"));

    // The clear-text detector must find clear text when the tunnel is not there.
    let wan = Capture::start(run, &net.wan, "br0", "", 2048)?;
    left.stop()?;
    peer.stop()?;
    drop((udp, tcp));
    let _ = net
        .lhost
        .cmd("ping")
        .args(["-n", "-c", "2", "-i", "0.05", "-W", "0.2", net::RHOST])
        .finish(SHORT)?;
    let clear = check::clear_text(&wan.stop()?);
    say(&format!("without a tunnel {clear} packets in clear were found"));
    ensure(clear >= 1, || "the clear-text detector is blind".into())?;
    run.clear_namespaces();
    Ok(())
}

/// A real kernel's ESP in user-mode-linux against libipsec: proves that guest before Tandem meets it.
pub fn prove_kernel(run: &Run, say: &mut dyn FnMut(&str)) -> Result<()> {
    let net = Net::build(run)?;
    net.plain_endpoint()?;
    let left = Charon::start(run, &net.left)?;
    let conn = peer_conn("baseline-secret");
    left.load(&[mirrored(&conn)])?;
    let started = clock::now();
    let peer = UmlPeer::start(run, &net.peer, &[conn])?;
    say(&format!(
        "{} ready after {:.1} s",
        peer.describe()?,
        (clock::now() - started).as_secs_f64()
    ));
    peer.initiate("net", SHORT)?;
    net.lhost.ping_until(net::RHOST, SHORT)?;
    net.rhost.ping_until(net::LHOST, SHORT)?;
    let kernel = peer.kernel_spis()?;
    let charon = peer.spis()?;
    let known = charon
        .0
        .iter()
        .flat_map(|(_, _, list)| list)
        .all(|(a, b)| kernel.contains(a) && kernel.contains(b));
    ensure(known && kernel.len() == 2, || format!("kernel has {kernel:x?}, charon {charon:x?}"))?;
    say(&format!("pings both ways; the guest's kernel holds SPIs {kernel:08x?}"));
    let udp = UdpProbes::start(run, (&net.lhost, net::LHOST), (&net.rhost, net::RHOST), 1000)?;
    udp.wait_flowing(SHORT)?;
    let from = clock::now();
    clock::sleep_until(from + Duration::from_secs(2));
    let to = clock::now();
    udp.settle(to)?;
    for way in Way::BOTH {
        let measure = udp.measure(way, from, to);
        say(&format!("{way:?}: {measure:?}"));
        ensure(measure.lost() == 0, || format!("packets lost on a quiet network: {measure:?}"))?;
    }
    say(&format!("one TCP stream: {:.2} Gb/s", iperf(run, &net, 2)?));
    peer.stop()?;
    say("the guest powered off");
    run.clear_namespaces();
    Ok(())
}
