//! Wrong secrets, identities, proposals, selectors; junk; bad configurations: the right notify, one clear line,
//! nothing else changes.

use super::stage::{HasLog, Single, conn, single, wait_log, without_loss};
use super::{Lab, Scenario};
use crate::capture::Capture;
use crate::charon::Conn;
use crate::error::{Result, ensure, write_file};
use crate::net;
use crate::scene::PATIENCE;
use crate::tandem::{self, Config, Daemon};
use crate::{clock, wait};
use std::time::Duration;

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "wrong-secret",
        about: "differing pre-shared keys, both roles",
        play: wrong_secret,
    },
    Scenario {
        name: "wrong-identity",
        about: "differing identities, both roles",
        play: wrong_identity,
    },
    Scenario {
        name: "wrong-ike-proposal",
        about: "no IKE proposal in common, both roles",
        play: wrong_ike_proposal,
    },
    Scenario {
        name: "wrong-esp-proposal",
        about: "no ESP proposal in common, both roles",
        play: wrong_esp_proposal,
    },
    Scenario {
        name: "wrong-selectors",
        about: "selectors that do not meet, both roles",
        play: wrong_selectors,
    },
    Scenario {
        name: "junk-on-the-wan",
        about: "random, truncated, replayed, reordered datagrams",
        play: junk,
    },
    Scenario {
        name: "config-errors",
        about: "a bad configuration names file, line and text",
        play: config_errors,
    },
    Scenario {
        name: "port-taken",
        about: "a port that is taken: reason and hint",
        play: port_taken,
    },
];

/// One mistake, in both roles.
struct Mistake {
    /// Makes the two ends disagree.
    spoil: fn(&mut Config, &mut Conn),
    /// The notify, as charon spells it in its log.
    notify: &'static str,
    /// Words of the daemon's line as responder, which sees the mistake itself, and as initiator, which is told.
    lines: [&'static [&'static str]; 2],
}

fn play(lab: &Lab<'_>, mistake: &Mistake) -> Result<String> {
    let mut lines = Vec::new();
    for we_start in [false, true] {
        let (mut config, mut peer) = (Config::single(), conn());
        (mistake.spoil)(&mut config, &mut peer);
        let mut stage = single(lab, &config, &[peer])?;
        let skip = stage.daemon.log().len();
        if we_start {
            let finished =
                stage.daemon.tandem_cmd(&["up", "branch"]).finish(Duration::from_secs(80))?;
            ensure(!finished.status.success(), || "`tandem up` claims success".into())?;
        } else {
            let result = stage.peer.initiate("net", Duration::from_secs(10));
            ensure(result.is_err(), || "strongSwan claims success".into())?;
        }
        // charon names short forms in message lists (N(AUTH_FAILED)) and long ones in sentences.
        wait::until(
            &format!("{} in charon's log", mistake.notify),
            PATIENCE,
            super::stage::TICK,
            || {
                let log = stage.peer.log();
                let short = mistake
                    .notify
                    .replace("AUTHENTICATION", "AUTH")
                    .replace("NO_PROPOSAL_CHOSEN", "NO_PROP");
                let short = short.replace("TS_UNACCEPTABLE", "TS_UNACCEPT");
                Ok((log.contains(mistake.notify) || log.contains(&short)).then_some(()))
            },
        )
        .map_err(|error| stage.with_log(error))?;
        let line = wait_log(&stage.daemon, skip, mistake.lines[usize::from(we_start)])?;
        let again = stage.daemon.new_log(skip);
        let count = again.lines().filter(|other| other.contains("WARN")).count();
        ensure(count == 1, || format!("{count} warnings for one attempt: {again}"))?;
        lines.push(line);
        stage.check_clean()?;
        drop(stage);
        lab.run.clear_namespaces();
    }
    let brief: Vec<&str> = lines
        .iter()
        .map(|line| line.split_once("WARN").map_or(line.as_str(), |(_, text)| text.trim()))
        .collect();
    Ok(format!("{}: {}", mistake.notify, brief.join(" | ")))
}

fn wrong_secret(lab: &Lab<'_>) -> Result<String> {
    play(
        lab,
        &Mistake {
            spoil: |_, peer| peer.psk = "another-secret-than-ours".into(),
            notify: "AUTHENTICATION_FAILED",
            lines: [
                &[
                    "branch",
                    net::PEER_WAN,
                    "branch.example",
                    "would have matched: the same pre-shared key",
                ],
                &["branch", net::PEER_WAN, "AUTHENTICATION_FAILED"],
            ],
        },
    )
}

fn wrong_identity(lab: &Lab<'_>) -> Result<String> {
    play(
        lab,
        &Mistake {
            spoil: |_, peer| {
                peer.local_id = "somebody.else".into();
                peer.remote_id = "gw.example".into();
            },
            notify: "AUTHENTICATION_FAILED",
            lines: [
                &[net::PEER_WAN, "somebody.else", "would have matched: remote_id branch.example"],
                &["branch", net::PEER_WAN, "AUTHENTICATION_FAILED"],
            ],
        },
    )
}

fn wrong_ike_proposal(lab: &Lab<'_>) -> Result<String> {
    play(
        lab,
        &Mistake {
            spoil: |_, peer| peer.proposals = vec!["aes128gcm16-prfsha256-ecp256".into()],
            notify: "NO_PROPOSAL_CHOSEN",
            lines: [
                &[
                    "branch",
                    net::PEER_WAN,
                    "aes128gcm16-prfsha256-ecp256",
                    "would have matched: any of aes256gcm16-prfsha384-x25519",
                ],
                &["branch", net::PEER_WAN, "NO_PROPOSAL_CHOSEN", "aes256gcm16-prfsha384-x25519"],
            ],
        },
    )
}

fn wrong_esp_proposal(lab: &Lab<'_>) -> Result<String> {
    play(
        lab,
        &Mistake {
            spoil: |_, peer| peer.children[0].esp_proposals = vec!["aes128gcm16-ecp256".into()],
            notify: "NO_PROPOSAL_CHOSEN",
            lines: [
                &["branch", net::PEER_WAN, "aes128gcm16", "would have matched: aes256gcm16"],
                &["branch", net::PEER_WAN, "NO_PROPOSAL_CHOSEN", "aes256gcm16"],
            ],
        },
    )
}

fn wrong_selectors(lab: &Lab<'_>) -> Result<String> {
    play(
        lab,
        &Mistake {
            spoil: |_, peer| peer.children[0].remote_ts = vec!["10.99.0.0/24".into()],
            notify: "TS_UNACCEPTABLE",
            lines: [
                &[
                    "branch",
                    net::PEER_WAN,
                    "10.99.0.0/24",
                    "would have matched: part of 10.2.0.0/24 === 10.1.0.0/24",
                ],
                &["branch", net::PEER_WAN, "TS_UNACCEPTABLE", "10.1.0.0/24"],
            ],
        },
    )
}

/// Sends variations of the peer's own datagrams, from its address and port, and pure noise.
const JUNK: &str = r#"
import os, random, socket, struct, sys
random.seed(7)
path, target = sys.argv[1], sys.argv[2]
data = open(path, 'rb').read()
real, at = [], 24
while at + 16 <= len(data):
    kept = struct.unpack('<I', data[at + 8:at + 12])[0]
    frame = data[at + 16:at + 16 + kept]; at += 16 + kept
    if frame[12:14] == b'\x08\x00' and frame[23] == 17 and socket.inet_ntoa(frame[30:34]) == target:
        sport, dport = struct.unpack('>HH', frame[34:38])
        length = struct.unpack('>H', frame[38:40])[0]
        real.append((sport, dport, frame[42:34 + length]))
raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
def send(sport, dport, body):
    udp = struct.pack('>HHHH', sport, dport, 8 + len(body), 0) + body
    ip = struct.pack('>BBHHHBBH4s4s', 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0, socket.inet_aton(sys.argv[3]), socket.inet_aton(target))
    raw.sendto(ip + udp, (target, 0))
count = 0
def go(sport, dport, body):
    global count
    try: send(sport, dport, body[:1400]); count += 1
    except OSError: pass
for sport, dport, body in real: go(sport, dport, body)                      # replayed
for sport, dport, body in reversed(real): go(sport, dport, body)            # reordered
for sport, dport, body in real: go(sport, dport, body[:random.randrange(len(body) + 1)])  # truncated
for sport, dport, body in real:                                            # altered
    if body:
        changed = bytearray(body); changed[random.randrange(len(body))] ^= 1 << random.randrange(8)
        go(sport, dport, bytes(changed))
for _ in range(2000):                                                      # noise
    go(random.choice([500, 4500, 40000]), random.choice([500, 4500]), os.urandom(random.randrange(0, 200)))
for _ in range(500):                                                       # noise that looks like IKE
    header = os.urandom(16) + bytes([random.choice([33, 34, 35, 41, 46, 53, 0, 255]), 0x20, random.choice([34, 35, 36, 37]), random.choice([0, 8, 0x20, 0x28])]) + struct.pack('>I', random.choice([0, 1, 2, 2**32 - 1]))
    body = os.urandom(random.randrange(0, 300))
    go(500, 500, header + struct.pack('>I', 28 + len(body)) + body)
print(count)
"#;

fn junk(lab: &Lab<'_>) -> Result<String> {
    let mut stage = single(lab, &Config::single(), &[conn()])?;
    let capture = Capture::start(lab.run, &stage.net.wan, "br0", "udp", 2048)?;
    stage.peer_up()?;
    stage.ping_both()?;
    let before = stage.peer.spis()?;
    stage.peer.rekey_child("net")?;
    wait::until("a rekeyed child", PATIENCE, super::stage::TICK, || {
        Ok((before.changed(&stage.peer.spis()?) >= 2).then_some(()))
    })?;
    let probes = stage.probes(lab.run)?;
    let recording = capture.stop()?;
    let before = stage.peer.spis()?;
    let memory = stage.daemon.resident_bytes()?;
    let drops = |stage: &Single| -> Result<u64> {
        let counters = stage.daemon.status()?.counters;
        Ok(counters.drops.values().sum::<u64>() + counters.ike_drops.values().sum::<u64>())
    };
    let dropped = drops(&stage)?;
    let printed = stage
        .net
        .peer
        .cmd("python3")
        .args(["-c", JUNK])
        .arg(recording.path())
        .args([net::VIRTUAL_WAN, net::PEER_WAN])
        .run(Duration::from_secs(60))?;
    let sent: u64 = printed.trim().parse().unwrap_or(0);
    ensure(sent > 3000, || format!("only {sent} junk datagrams went out"))?;
    // Junk and probes share queues while it rains; afterwards not a packet may be missing.
    let found = without_loss(&probes, || {
        clock::sleep_until(clock::now() + Duration::from_secs(1));
        Ok(())
    })
    .map_err(|error| stage.with_log(error))?;
    ensure(before.changed(&stage.peer.spis()?) == 0, || "SPIs changed".into())?;
    let counted = drops(&stage)? - dropped;
    ensure(counted > sent / 2, || {
        format!("{sent} junk datagrams, only {counted} counted as dropped")
    })?;
    let grown = stage.daemon.resident_bytes()?.saturating_sub(memory);
    ensure(grown < 8 << 20, || format!("memory grew by {grown} bytes"))?;
    stage.check_clean()?;
    let lines = stage.daemon.log().lines().count();
    ensure(lines < 500, || format!("the log has {lines} lines"))?;
    Ok(format!("{sent} junk datagrams, {counted} counted drops; then {found}"))
}

fn config_errors(lab: &Lab<'_>) -> Result<String> {
    let net = crate::net::Net::build(lab.run)?;
    let daemon = Daemon::prepare(lab.run, lab.bins, &net.left, "left", &Config::single())?;
    let path = daemon.config_path().to_owned();
    let text = std::fs::read_to_string(&path).unwrap_or_default();
    let spoiled = text.replace("local_ts", "local_tss").replace("198.51.100.7", "198.51.100.777");
    write_file(&path, &spoiled)?;
    let line_of =
        |word: &str| spoiled.lines().position(|line| line.contains(word)).map_or(0, |at| at + 1);
    let finished = tandem::check(lab.bins, &net.left, &path, "left")?;
    let said = format!("{}{}", finished.stdout, finished.stderr);
    ensure(!finished.status.success(), || format!("`tandem check` likes it: {said}"))?;
    for word in ["local_tss", "198.51.100.777"] {
        let place = line_of(word).to_string();
        ensure(said.contains(word) && said.contains(&place), || {
            format!("{word} at line {place} is not named: {said}")
        })?;
    }
    ensure(said.contains("tandem.toml"), || format!("the file is not named: {said}"))?;
    let mut daemon = daemon;
    daemon.spawn()?;
    let status = daemon.proc()?.bury(PATIENCE)?;
    ensure(!status.success(), || "the daemon started on it".into())?;
    ensure(daemon.log().contains("local_tss"), || format!("the daemon said: {}", daemon.log()))?;
    Ok("file, lines and texts are named; the daemon refuses to start".into())
}

fn port_taken(lab: &Lab<'_>) -> Result<String> {
    let net = crate::net::Net::build(lab.run)?;
    // strongSwan on the same host has 500 and 4500 at every address.
    let squatter = crate::charon::Charon::start(lab.run, &net.left)?;
    let mut daemon = Daemon::prepare(lab.run, lab.bins, &net.left, "left", &Config::single())?;
    daemon.spawn()?;
    let status = daemon.proc()?.bury(PATIENCE)?;
    let log = daemon.log();
    ensure(!status.success(), || format!("it runs all the same: {log}"))?;
    for words in ["203.0.113.10:500 cannot be opened", "ss -lunp"] {
        ensure(log.contains(words), || format!("{words:?} is not said: {log}"))?;
    }
    let said = crate::proc::last_lines(&log, 1);
    drop(squatter);

    // Somebody else has the port of the pair link.
    let taken = lab.run.dir().join("taken.log");
    let script = "import socket, time; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); \
                  s.bind(('172.31.0.1', 4600)); print('bound', flush=True); time.sleep(600)";
    let mut squatter = net.left.cmd("python3").args(["-c", script]).spawn(&taken)?;
    wait::until("the port to be taken", PATIENCE, super::stage::TICK, || {
        squatter.check_alive()?;
        let text = std::fs::read_to_string(&taken).unwrap_or_default();
        Ok(text.contains("bound").then_some(()))
    })?;
    let mut paired = Daemon::prepare(lab.run, lab.bins, &net.left, "left", &Config::pair())?;
    paired.spawn()?;
    let status = paired.proc()?.bury(PATIENCE)?;
    let log = paired.log();
    ensure(!status.success(), || format!("it runs without its pair link: {log}"))?;
    for words in ["cannot open UDP 172.31.0.1:4600", "another process has the port", "ss -lntup"] {
        ensure(log.contains(words), || format!("{words:?} is not said: {log}"))?;
    }
    drop(squatter);
    let mut daemon = Daemon::prepare(lab.run, lab.bins, &net.left, "left", &Config::single())?;

    // The TUN of the configuration belongs to somebody else.
    net.left.ip("tuntap add dev tandem0 mode tun\n")?;
    daemon.spawn()?;
    let status = daemon.proc()?.bury(PATIENCE)?;
    let log = daemon.log();
    ensure(!status.success() && log.contains("the TUN \"tandem0\" cannot be opened"), || {
        format!("it did not stop at the TUN: {log}")
    })?;
    Ok(said)
}
