//! One instance: tunnels come up from both sides, with every algorithm, identity and start.

use super::stage::{TICK, conn, single, single_with};
use super::{Lab, Scenario};
use crate::baseline;
use crate::capture::Capture;
use crate::check::{self, IvChecker};
use crate::error::{Result, ensure};
use crate::net;
use crate::scene::PATIENCE;
use crate::tandem::Config;
use crate::wait;
use std::time::Duration;

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "peer-initiates",
        about: "strongSwan initiates; ping both ways",
        play: peer_initiates,
    },
    Scenario { name: "we-initiate", about: "we initiate; ping both ways", play: we_initiate },
    Scenario { name: "trap", about: "the first packet brings the tunnel up", play: trap },
    Scenario {
        name: "any-address",
        about: "a responder-only connection for a peer anywhere",
        play: any_address,
    },
    Scenario { name: "ipv6-inside", about: "IPv6 through the same tunnel", play: ipv6_inside },
    Scenario {
        name: "every-algorithm",
        about: "each AEAD, PRF and group, both roles",
        play: every_algorithm,
    },
    Scenario { name: "invalid-ke", about: "INVALID_KE_PAYLOAD in both roles", play: invalid_ke },
    Scenario {
        name: "invalid-ke-rekey",
        about: "INVALID_KE_PAYLOAD when a Child SA is rekeyed, by both sides",
        play: invalid_ke_rekey,
    },
    Scenario { name: "cookie", about: "cookies in both roles", play: cookie },
    Scenario { name: "identities", about: "identities of every type", play: identities },
    Scenario {
        name: "mobike-peer",
        about: "a peer with MOBIKE on, its default",
        play: mobike_peer,
    },
    Scenario { name: "two-children", about: "two Child SAs in one IKE SA", play: two_children },
    Scenario { name: "narrowing", about: "selectors narrowed in both roles", play: narrowing },
    Scenario {
        name: "port-selectors",
        about: "selectors of one UDP port: nothing else is carried, nor sent in clear",
        play: port_selectors,
    },
    Scenario {
        name: "large-packets",
        about: "TCP and full-size packets pass",
        play: large_packets,
    },
    Scenario {
        name: "independent-eye",
        about: "tshark decrypts IKE and ESP with our key log",
        play: independent_eye,
    },
    Scenario { name: "plain-tun", about: "the TUN without offloads, by tun-tap", play: plain_tun },
    Scenario {
        name: "wan-is-clean",
        about: "captures: no IV repeats, nothing in clear",
        play: wan_is_clean,
    },
];

/// A configuration in which we initiate.
fn initiating() -> Config {
    let mut config = Config::single();
    config.branch().children[0].start = "initiate".into();
    config
}

fn peer_initiates(lab: &Lab<'_>) -> Result<String> {
    let mut stage = single(lab, &Config::single(), &[conn()])?;
    stage.peer_up()?;
    stage.ping_both()?;
    let sa = stage.peer.wait_established(1, PATIENCE)?;
    ensure(sa.is_initiator && sa.children[0].encap, || format!("odd SA: {sa:?}"))?;
    let tunnel = stage.daemon.status()?.tunnel("branch");
    let ike = tunnel.ike.unwrap_or_default();
    ensure(ike.role == "responder", || format!("our role: {}", ike.role))?;
    ensure(ike.spi_i == format!("{:016x}", sa.initiator_spi), || {
        format!("our SPI {}, theirs {sa:?}", ike.spi_i)
    })?;
    stage.check_clean()?;
    Ok(format!("{} initiated, pings both ways", stage.peer.version()?))
}

fn we_initiate(lab: &Lab<'_>) -> Result<String> {
    let mut stage = single(lab, &initiating(), &[conn()])?;
    stage.both_up()?;
    stage.ping_both()?;
    let sa = stage.peer.wait_established(1, PATIENCE)?;
    ensure(!sa.is_initiator, || format!("odd SA: {sa:?}"))?;
    stage.check_clean()?;
    Ok("we initiated, pings both ways".into())
}

fn trap(lab: &Lab<'_>) -> Result<String> {
    let mut config = Config::single();
    config.branch().children[0].start = "trap".into();
    let mut stage = single(lab, &config, &[conn()])?;
    let tunnel = stage.daemon.status()?.tunnel("branch");
    ensure(tunnel.state == "down", || format!("it is {} before any packet", tunnel.state))?;
    stage.net.lhost.ping_until(net::RHOST, PATIENCE).map_err(|error| stage.with_log(error))?;
    stage.both_up()?;
    stage.check_clean()?;
    Ok("down before, up after the first packet".into())
}

fn any_address(lab: &Lab<'_>) -> Result<String> {
    let mut config = Config::single();
    config.branch().remote_address = "any".into();
    let mut stage = single(lab, &config, &[conn()])?;
    stage.peer_up()?;
    stage.ping_both()?;
    stage.check_clean()?;
    Ok("accepted from an address that is not configured".into())
}

fn ipv6_inside(lab: &Lab<'_>) -> Result<String> {
    let mut config = Config::single();
    let child = &mut config.branch().children[0];
    child.local_ts.push(net::LOCAL_TS6.into());
    child.remote_ts.push(net::REMOTE_TS6.into());
    let mut peer = conn();
    peer.children[0].local_ts.push(net::REMOTE_TS6.into());
    peer.children[0].remote_ts.push(net::LOCAL_TS6.into());
    let mut stage = single(lab, &config, &[peer])?;
    stage.peer_up()?;
    stage.ping_both()?;
    stage.net.lhost.ping_until(net::RHOST6, PATIENCE).map_err(|error| stage.with_log(error))?;
    stage.net.rhost.ping_until(net::LHOST6, PATIENCE).map_err(|error| stage.with_log(error))?;
    stage.check_clean()?;
    Ok("IPv4 and IPv6 pings both ways in one Child SA".into())
}

fn every_algorithm(lab: &Lab<'_>) -> Result<String> {
    let list = [
        ("aes128gcm16-prfsha256-ecp256", "aes128gcm16-ecp256"),
        ("aes256gcm16-prfsha384-ecp384", "aes256gcm16-ecp384"),
        ("chacha20poly1305-prfsha512-x25519", "chacha20poly1305-x25519"),
        ("aes256gcm16-prfsha512-x25519", "aes256gcm16"),
    ];
    for (ike, esp) in list {
        for we_start in [false, true] {
            let mut config = if we_start { initiating() } else { Config::single() };
            config.branch().ike_proposals = vec![ike.into()];
            config.branch().children[0].esp_proposals = vec![esp.into()];
            let mut peer = conn();
            peer.proposals = vec![ike.into()];
            peer.children[0].esp_proposals = vec![esp.into()];
            let mut stage = single(lab, &config, &[peer])?;
            let name =
                |error| crate::Error::check(format!("{ike}, {esp}, we start: {we_start}: {error}"));
            if we_start { stage.both_up() } else { stage.peer_up() }.map_err(name)?;
            stage.ping_both().map_err(name)?;
            // A rekey uses the group once more: for the Child SA by both sides, and for the IKE SA by us.
            let rekey = |start: &dyn Fn() -> Result<()>| {
                let before = stage.peer.spis()?;
                start()?;
                wait::until("a rekeyed SA", PATIENCE, TICK, || {
                    let after = stage.peer.spis()?;
                    Ok((after.count() == before.count() && before.changed(&after) >= 4)
                        .then_some(()))
                })
                .map_err(|error| stage.with_log(error))?;
                stage.ping_both()
            };
            let by_us = |what| stage.daemon.tandem(&["rekey", "branch", what]).map(drop);
            rekey(&|| stage.peer.rekey_child("net")).map_err(name)?;
            rekey(&|| by_us("--child")).map_err(name)?;
            rekey(&|| by_us("--ike")).map_err(name)?;
            stage.check_clean()?;
            drop(stage);
            lab.run.clear_namespaces();
        }
    }
    Ok(format!(
        "{} suites, each initiated by both sides; Child SA rekeyed by both, IKE SA by us",
        list.len()
    ))
}

fn invalid_ke(lab: &Lab<'_>) -> Result<String> {
    // The peer guesses x25519, we take only P-256; then the other way round.
    let both = "aes256gcm16-prfsha384-x25519-ecp256";
    let only = "aes256gcm16-prfsha384-ecp256";
    for we_start in [false, true] {
        let mut config = if we_start { initiating() } else { Config::single() };
        let mut peer = conn();
        let (first, second) = if we_start { (both, only) } else { (only, both) };
        config.branch().ike_proposals = vec![first.into()];
        peer.proposals = vec![second.into()];
        let mut stage = single(lab, &config, &[peer])?;
        if we_start {
            stage.both_up()?
        } else {
            stage.peer_up()?
        }
        stage.ping_both()?;
        let log = stage.peer.log();
        ensure(log.contains("INVAL_KE") || log.contains("INVALID_KE"), || {
            "no INVALID_KE_PAYLOAD was seen".into()
        })?;
        stage.check_clean()?;
        drop(stage);
        lab.run.clear_namespaces();
    }
    Ok("the other group was taken in both roles".into())
}

/// RFC 7296 §1.2: the first Child SA has no exchange of its own, so that the guess of a group (§2.17) comes with its rekey.
fn invalid_ke_rekey(lab: &Lab<'_>) -> Result<String> {
    let both = "aes256gcm16-x25519-ecp256";
    let only = "aes256gcm16-ecp256";
    for we_start in [false, true] {
        let (mut config, mut peer) = (Config::single(), conn());
        let (first, second) = if we_start { (both, only) } else { (only, both) };
        config.branch().children[0].esp_proposals = vec![first.into()];
        peer.children[0].esp_proposals = vec![second.into()];
        let mut stage = single(lab, &config, &[peer])?;
        stage.peer_up()?;
        let (before, skip) = (stage.peer.spis()?, stage.peer.log().len());
        if we_start {
            stage.daemon.tandem(&["rekey", "branch", "--child"])?;
        } else {
            stage.peer.rekey_child("net")?;
        }
        wait::until("a rekeyed child", PATIENCE, TICK, || {
            Ok((before.changed(&stage.peer.spis()?) == 4).then_some(()))
        })
        .map_err(|error| stage.with_log(error))?;
        let log = stage.peer.log();
        let verb = if we_start { "generating" } else { "parsed" };
        ensure(
            log.get(skip..).unwrap_or_default().lines().any(|line| {
                line.contains(verb) && line.contains("CREATE_CHILD_SA") && line.contains("INVAL_KE")
            }),
            || "no INVALID_KE_PAYLOAD was seen".into(),
        )?;
        stage.ping_both()?;
        stage.check_clean()?;
        drop(stage);
        lab.run.clear_namespaces();
    }
    Ok("the Child SA was rekeyed with the other group, by both sides".into())
}

/// An IKE_SA_INIT that goes nowhere: it leaves the responder with a half-open IKE SA.
/// RFC 7296 §3.1 header, then SA, KE, Nonce, NAT detection.
pub(super) const HALF_OPEN: &str = r#"
import os, socket, struct, sys
def payload(next_type, body): return struct.pack('>BBH', next_type, 0, 4 + len(body)) + body
def transform(last, kind, number, attribute=b''):
    return struct.pack('>BBHBBH', 0 if last else 3, 0, 8 + len(attribute), kind, 0, number) + attribute
def init():
    transforms = transform(False, 1, 20, struct.pack('>HH', 0x800e, 256)) + transform(False, 2, 6) + transform(True, 4, 31)
    proposal = struct.pack('>BBHBBBB', 0, 0, 8 + len(transforms), 1, 1, 0, 3) + transforms
    body = payload(34, proposal) + payload(40, struct.pack('>HH', 31, 0) + os.urandom(32)) + payload(41, os.urandom(32))
    # NAT_DETECTION_SOURCE_IP and _DESTINATION_IP
    body += payload(41, struct.pack('>BBH', 0, 0, 16388) + bytes(20)) + payload(0, struct.pack('>BBH', 0, 0, 16389) + bytes(20))
    return os.urandom(8) + bytes(8) + struct.pack('>BBBBII', 33, 0x20, 34, 8, 0, 28 + len(body)) + body
target, count = sys.argv[1], int(sys.argv[2])
cookies = answers = 0
for _ in range(count):
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(1.0)
    s.sendto(init(), (target, 500))
    try:
        reply = s.recv(4096); answers += 1
        # notify COOKIE is 16390
        cookies += reply[16] == 41 and struct.unpack('>H', reply[34:36])[0] == 16390
    except socket.timeout: pass
print(answers, cookies)
"#;

fn cookie(lab: &Lab<'_>) -> Result<String> {
    // Us as responder: the fourth half-open SA from one source is asked for a cookie.
    let mut stage = single(lab, &Config::single(), &[conn()])?;
    let printed = stage
        .net
        .peer
        .cmd("python3")
        .args(["-c", HALF_OPEN, net::VIRTUAL_WAN, "6"])
        .run(PATIENCE)
        .map_err(|error| stage.with_log(error))?;
    let numbers: Vec<u32> =
        printed.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    ensure(matches!(numbers[..], [6, cookies] if cookies >= 1), || {
        format!("answers and cookies: {printed}")
    })?;
    // The real peer, from the same source, has to bring a cookie, and does.
    stage.peer_up()?;
    stage.ping_both()?;
    ensure(stage.peer.log().contains("COOKIE"), || "strongSwan was not asked for a cookie".into())?;
    stage.check_clean()?;
    drop(stage);
    lab.run.clear_namespaces();

    // Us as initiator: strongSwan wants cookies as soon as there is a half-open SA.
    let extra = "cookie_threshold = 1\n  cookie_threshold_ip = 1\n  block_threshold = 0\n  half_open_timeout = 300";
    let mut config = initiating();
    config.branch().children[0].start = "respond".into();
    let mut stage = single_with(lab, &config, &[conn()], extra, &[])?;
    let printed = stage
        .net
        .router
        .cmd("python3")
        .args(["-c", HALF_OPEN, net::PEER_WAN, "1"])
        .run(PATIENCE)?;
    ensure(printed.trim() == "1 0", || {
        format!("strongSwan should have answered without a cookie: {printed}")
    })?;
    stage.daemon.tandem(&["up", "branch"]).map_err(|error| stage.with_log(error))?;
    stage.both_up()?;
    ensure(stage.peer.log().contains("COOKIE"), || "strongSwan did not ask for a cookie".into())?;
    stage.check_clean()?;
    Ok(format!("as responder {} of 6 were asked for one; as initiator we brought one", numbers[1]))
}

/// ID_DER_ASN1_DN: CN=gw and CN=branch, in DER, spelled alike by both sides.
const OUR_NAME: &str = "asn1dn:#300d310b300906035504030c026777";
const THEIR_NAME: &str = "asn1dn:#3011310f300d06035504030c066272616e6368";

/// ID_DER_ASN1_GN: the general names "DNS:gw" and "DNS:branch" in DER.
const OUR_GENERAL_NAME: &str = "asn1gn:#82026777";
const THEIR_GENERAL_NAME: &str = "asn1gn:#82066272616e6368";

fn identities(lab: &Lab<'_>) -> Result<String> {
    let list = [
        ("gw.example", "branch.example"),
        ("203.0.113.10", "198.51.100.7"),
        ("gw@example.org", "branch@example.org"),
        ("@#6777206f6e65", "@#6272616e6368"),
        ("fd00::1", "fd00::2"),
        (OUR_NAME, THEIR_NAME),
        (OUR_GENERAL_NAME, THEIR_GENERAL_NAME),
    ];
    for (ours, theirs, we_start) in
        list.into_iter().flat_map(|(ours, theirs)| [(ours, theirs, false), (ours, theirs, true)])
    {
        let mut config = if we_start { initiating() } else { Config::single() };
        config.branch().local_id = ours.into();
        config.branch().remote_id = theirs.into();
        let mut peer = conn();
        peer.local_id = theirs.into();
        peer.remote_id = ours.into();
        let mut stage = single(lab, &config, &[peer])?;
        if we_start { stage.both_up() } else { stage.peer_up() }.map_err(|error| {
            crate::Error::check(format!("{ours} and {theirs}, we start: {we_start}: {error}"))
        })?;
        stage.ping_both()?;
        stage.check_clean()?;
        drop(stage);
        lab.run.clear_namespaces();
    }
    Ok(format!(
        "{} kinds, each initiated by both sides: name, IPv4, e-mail, key id, IPv6, distinguished name, general name",
        list.len()
    ))
}

fn mobike_peer(lab: &Lab<'_>) -> Result<String> {
    let mut peer = conn();
    peer.mobike = true;
    let mut stage = single(lab, &Config::single(), &[peer])?;
    stage.peer_up()?;
    stage.ping_both()?;
    stage.check_clean()?;
    Ok("up and pinging".into())
}

fn two_children(lab: &Lab<'_>) -> Result<String> {
    let mut config = Config::single();
    let mut second = config.branch().children[0].clone();
    second.name = "six".into();
    second.local_ts = vec![net::LOCAL_TS6.into()];
    second.remote_ts = vec![net::REMOTE_TS6.into()];
    config.branch().children.push(second);
    let mut peer = conn();
    let mut second = peer.children[0].clone();
    second.name = "six".into();
    second.local_ts = vec![net::REMOTE_TS6.into()];
    second.remote_ts = vec![net::LOCAL_TS6.into()];
    peer.children.push(second);
    let mut stage = single(lab, &config, &[peer])?;
    stage.peer_up()?;
    stage.peer.initiate("six", PATIENCE).map_err(|error| stage.with_log(error))?;
    stage.peer.wait_established(2, PATIENCE)?;
    stage.ping_both()?;
    stage.net.lhost.ping_until(net::RHOST6, PATIENCE).map_err(|error| stage.with_log(error))?;
    stage.peer.terminate_child("six")?;
    wait::until("one child to be gone", PATIENCE, TICK, || {
        let tunnel = stage.daemon.status()?.tunnel("branch");
        Ok((tunnel.children.iter().all(|child| child.name != "six" || child.state != "installed"))
            .then_some(()))
    })?;
    stage.ping_both()?;
    stage.check_clean()?;
    Ok("second child made, used and deleted; the first went on".into())
}

fn narrowing(lab: &Lab<'_>) -> Result<String> {
    // The peer asks for more than we grant, then we ask for more than it grants.
    let mut peer = conn();
    peer.children[0].remote_ts = vec!["10.0.0.0/8".into()];
    let mut stage = single(lab, &Config::single(), &[peer])?;
    stage.peer_up()?;
    let sa = stage.peer.wait_established(1, PATIENCE)?;
    ensure(sa.children[0].remote_ts == [net::LOCAL_TS], || {
        format!("as responder: {:?}", sa.children[0].remote_ts)
    })?;
    stage.ping_both()?;
    stage.check_clean()?;
    drop(stage);
    lab.run.clear_namespaces();

    let mut config = initiating();
    config.branch().children[0].remote_ts = vec!["10.2.0.0/16".into()];
    let mut stage = single(lab, &config, &[conn()])?;
    stage.both_up()?;
    let tunnel = stage.daemon.status()?.tunnel("branch");
    ensure(tunnel.children[0].remote_ts == [net::REMOTE_TS], || {
        format!("as initiator: {:?}", tunnel.children[0])
    })?;
    stage.ping_both()?;
    stage.check_clean()?;
    Ok("10.0.0.0/8 to 10.1.0.0/24 as responder, 10.2.0.0/16 to 10.2.0.0/24 as initiator".into())
}

/// Answers UDP at two ports; says when it listens.
const ECHO: &str = r#"
import select, socket, sys
sockets = []
for port in (5001, 5002):
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind((sys.argv[1], port)); sockets.append(s)
print('listening', flush=True)
while True:
    for s in select.select(sockets, [], [])[0]:
        data, source = s.recvfrom(100); s.sendto(data, source)
"#;

/// Asks each of the two ports, from port 5001, ten times; prints how many were answered.
const ASK: &str = r#"
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind((sys.argv[1], 5001)); s.settimeout(0.3)
for port in (5001, 5002):
    count = 0
    for i in range(10):
        s.sendto(b'%d %d' % (port, i), (sys.argv[2], port))
        try: count += s.recv(100) == b'%d %d' % (port, i)
        except socket.timeout: pass
    print(count)
"#;

fn port_selectors(lab: &Lab<'_>) -> Result<String> {
    // Whole networks first, where everything passes: else the zeros would prove nothing.
    for (upper, other_pass) in [("", true), ("[udp/5001]", false)] {
        let (mut config, mut peer) = (Config::single(), conn());
        let (left, right) =
            (format!("{}{upper}", net::LOCAL_TS), format!("{}{upper}", net::REMOTE_TS));
        let ours = &mut config.branch().children[0];
        (ours.local_ts, ours.remote_ts) = (vec![left.clone()], vec![right.clone()]);
        let theirs = &mut peer.children[0];
        (theirs.local_ts, theirs.remote_ts) = (vec![right], vec![left]);
        let mut stage = single(lab, &config, &[peer])?;
        stage.peer_up()?;
        let log = lab.run.dir().join("echo.log");
        let mut echo = stage.net.rhost.cmd("python3").args(["-c", ECHO, net::RHOST]).spawn(&log)?;
        wait::until("the echo to listen", PATIENCE, TICK, || {
            echo.check_alive()?;
            let text = std::fs::read_to_string(&log).unwrap_or_default();
            Ok(text.contains("listening").then_some(()))
        })?;
        let wan = Capture::start(lab.run, &stage.net.wan, "br0", "", 256)?;
        let before = stage.daemon.status()?.counters.packets_out;
        let printed = stage
            .net
            .lhost
            .cmd("python3")
            .args(["-c", ASK, net::LHOST, net::RHOST])
            .run(PATIENCE)?;
        let ping = stage.net.lhost.ping(net::RHOST, 3, Duration::from_millis(300));
        let carried = stage.daemon.status()?.counters.packets_out - before;
        let answers: Vec<u32> =
            printed.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        let wan = wan.stop()?;
        let clear = check::clear_text(&wan);
        wan.discard();
        ensure(clear == 0, || format!("{clear} packets in clear on the WAN"))?;
        // A first packet may go while the neighbour is still being looked for.
        let expected = matches!(answers[..], [chosen, other]
            if chosen >= 8 && other == if other_pass { 10 } else { 0 })
            && ping.is_ok() == other_pass
            && (carried > 10) == other_pass;
        ensure(expected, || {
            stage
                .with_log(crate::Error::check(format!(
                    "{upper:?}: answers from ports 5001 and 5002 {answers:?}, ping {ping:?}, {carried} packets carried"
                )))
                .to_string()
        })?;
        stage.check_clean()?;
        drop(stage);
        lab.run.clear_namespaces();
    }
    Ok("only udp/5001 was carried; udp/5002 and pings neither carried nor sent in clear, and both pass without the selector".into())
}

fn large_packets(lab: &Lab<'_>) -> Result<String> {
    let mut stage = single(lab, &Config::single(), &[conn()])?;
    stage.peer_up()?;
    stage.ping_both()?;
    for (host, target) in [(&stage.net.lhost, net::RHOST), (&stage.net.rhost, net::LHOST)] {
        // Larger than the tunnel's MTU, fragmentable: fragments inside the tunnel.
        host.cmd("ping")
            .args([
                "-n", "-q", "-c", "5", "-i", "0.05", "-W", "2", "-M", "dont", "-s", "3000", target,
            ])
            .run(PATIENCE)
            .map_err(|error| stage.with_log(error))?;
    }
    let rate = baseline::iperf(lab.run, &stage.net, 2).map_err(|error| stage.with_log(error))?;
    ensure(rate > 0.005, || format!("one TCP stream: {:.1} Mb/s", rate * 1000.0))?;
    stage.check_clean()?;
    Ok(format!("3,000-byte pings pass, one TCP stream {rate:.2} Gb/s"))
}

/// `offload = false`: the TUN by tun-tap, one packet a system call.
fn plain_tun(lab: &Lab<'_>) -> Result<String> {
    let mut config = Config::single();
    config.offload = false;
    let mut stage = single(lab, &config, &[conn()])?;
    stage.peer_up()?;
    stage.ping_both()?;
    let probes = stage.probes(lab.run)?;
    let found = super::stage::without_loss(&probes, || {
        std::thread::sleep(Duration::from_secs(1));
        Ok(())
    })?;
    let rate = baseline::iperf(lab.run, &stage.net, 2).map_err(|error| stage.with_log(error))?;
    ensure(rate > 0.005, || format!("one TCP stream: {:.1} Mb/s", rate * 1000.0))?;
    stage.check_clean()?;
    Ok(format!("{found}; one TCP stream {rate:.2} Gb/s"))
}

fn wan_is_clean(lab: &Lab<'_>) -> Result<String> {
    let net_capture = {
        let mut stage = single(lab, &Config::single(), &[conn()])?;
        let capture = Capture::start(lab.run, &stage.net.wan, "br0", "", 2048)?;
        // Before the tunnel is there, nothing may leave in clear.
        let _ = stage
            .net
            .lhost
            .cmd("ping")
            .args(["-n", "-c", "5", "-i", "0.05", "-W", "0.2", net::RHOST])
            .finish(PATIENCE)?;
        stage.peer_up()?;
        let probes = stage.probes(lab.run)?;
        let (sent, lost, _) = super::stage::under_traffic(&probes, || {
            std::thread::sleep(Duration::from_secs(2));
            Ok(())
        })?;
        ensure(lost == 0, || format!("{lost} of {sent} lost on a quiet network"))?;
        // Nor after the daemon's death.
        stage.check_clean()?;
        stage.daemon.kill9()?;
        std::thread::sleep(Duration::from_secs(1));
        capture.stop()?
    };
    let clear = check::clear_text(&net_capture);
    ensure(clear == 0, || format!("{clear} packets in clear on the WAN"))?;
    let mut ivs = IvChecker::default();
    ivs.feed(&net_capture);
    ensure(ivs.iv_repeats + ivs.sequence_repeats == 0, || format!("repeats: {:?}", ivs.examples))?;
    ensure(ivs.checked > 4000, || format!("only {} datagrams seen", ivs.checked))?;
    Ok(format!(
        "{} protected datagrams: 0 IV repeats; 0 in clear, also before the tunnel and after SIGKILL",
        ivs.checked
    ))
}

fn independent_eye(lab: &Lab<'_>) -> Result<String> {
    let keylog = lab.run.subdir("keylog")?;
    let folder = keylog.to_string_lossy().into_owned();
    let mut stage = single_with(lab, &Config::single(), &[conn()], "", &["--keylog", &folder])?;
    let capture = Capture::start(lab.run, &stage.net.wan, "br0", "udp", 2048)?;
    stage.peer_up()?;
    stage.ping_both()?;
    let before = stage.peer.spis()?;
    stage.peer.rekey_child("net")?;
    wait::until("a rekeyed child", PATIENCE, TICK, || {
        Ok((before.changed(&stage.peer.spis()?) >= 2).then_some(()))
    })?;
    stage.ping_both()?;
    stage.daemon.tandem(&["rekey", "branch", "--ike"])?;
    stage.net.lhost.ping(net::RHOST, 20, PATIENCE)?;
    let recording = capture.stop()?;
    let seen = crate::capture::tshark(recording.path(), &keylog)?;
    ensure(seen.esp >= 40 && seen.esp_opened == seen.esp, || format!("tshark: {seen:?}"))?;
    ensure(
        ["gw.example", "branch.example"]
            .iter()
            .all(|id| seen.identities.iter().any(|seen| seen == id)),
        || format!("tshark read these identities in IKE_AUTH: {:?}", seen.identities),
    )?;
    stage.check_clean()?;
    Ok(format!(
        "{} of {} ESP packets opened, identities {}",
        seen.esp_opened,
        seen.esp,
        seen.identities.join(", ")
    ))
}
