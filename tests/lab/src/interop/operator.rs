//! What an operator's `tandem up` says of a tunnel that cannot come up, and when.

use super::stage::{TICK, conn, single, wait_log};
use super::{Lab, Scenario};
use crate::error::{Result, ensure};
use crate::net::{self, Net};
use crate::proc::Cmd;
use crate::scene::PATIENCE;
use crate::tandem::{Config, Daemon};
use crate::{clock, wait};
use std::time::Duration;

pub(super) const SCENARIOS: &[Scenario] = &[Scenario {
    name: "up-refused",
    about: "`tandem up` that cannot succeed says why, each time, and strangers do not end it",
    play: up_refused,
}];

/// An answer that waits for nobody.
const AT_ONCE: Duration = Duration::from_secs(5);

/// What a refused `tandem up` says, all of it.
fn refusal(up: &Cmd) -> Result<String> {
    let finished = up.clone().finish(AT_ONCE)?;
    ensure(!finished.status.success(), || "`tandem up` claims success".into())?;
    Ok(finished.stderr)
}

/// An IKE_SA_INIT that nobody can agree to: AES-CBC with a 2048-bit MODP group.
const STRANGER: &str = r#"
import os, socket, struct, sys
def payload(following, body): return struct.pack('>BBH', following, 0, 4 + len(body)) + body
def transform(more, kind, id, attributes=b''):
    return struct.pack('>BBHBBH', more, 0, 8 + len(attributes), kind, 0, id) + attributes
transforms = (transform(3, 1, 12, struct.pack('>HH', 0x800e, 256)) + transform(3, 2, 5) +
              transform(3, 3, 12) + transform(0, 4, 14))
proposal = struct.pack('>BBHBBBB', 0, 0, 8 + len(transforms), 1, 1, 0, 4) + transforms
body = (payload(34, proposal) + payload(40, struct.pack('>HH', 14, 0) + os.urandom(256)) +
        payload(0, os.urandom(32)))
header = os.urandom(8) + bytes(8) + struct.pack('>BBBBII', 33, 0x20, 34, 8, 0, 28 + len(body))
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.bind((sys.argv[1], 500))
udp.sendto(header + body, (sys.argv[2], 500))
"#;

fn up_refused(lab: &Lab<'_>) -> Result<String> {
    // Nobody knows where the peer is.
    let mut config = Config::single();
    config.branch().remote_address = "any".into();
    let mut stage = single(lab, &config, &[conn()])?;
    let anywhere = refusal(&stage.daemon.tandem_cmd(&["up", "branch"]))?;
    ensure(anywhere.contains("only the peer can initiate"), || anywhere.clone())?;
    // Once it has, there is something to bring up: the Child SA alone.
    stage.peer_up()?;
    stage.peer.terminate_child("net")?;
    wait::until("the Child SA to be gone", PATIENCE, TICK, || {
        Ok((!stage.daemon.status()?.is_up("branch", 1)).then_some(()))
    })?;
    stage.daemon.tandem(&["up", "branch"])?;
    stage.both_up()?;
    stage.check_clean()?;
    drop(stage);
    lab.run.clear_namespaces();

    // The same refusal twice within the time in which a stranger's would be kept quiet.
    let mut peer = conn();
    peer.proposals = vec!["aes128gcm16-prfsha256-ecp256".into()];
    let mut stage = single(lab, &Config::single(), &[peer])?;
    for attempt in 1..=2 {
        let text = refusal(&stage.daemon.tandem_cmd(&["up", "branch"]))?;
        ensure(text.contains("NO_PROPOSAL_CHOSEN"), || format!("attempt {attempt}: {text}"))?;
    }
    // The attempt goes on asking, which is no silence, and the reason stays.
    clock::sleep_until(clock::now() + Duration::from_secs(5));
    let log = stage.daemon.log();
    ensure(!log.contains("no answer"), || format!("an answer is called silence: {log}"))?;
    let status = stage.daemon.tandem(&["status"])?;
    ensure(status.contains("NO_PROPOSAL_CHOSEN"), || format!("status: {status}"))?;
    stage.check_clean()?;
    drop(stage);
    lab.run.clear_namespaces();

    // The peer is silent, and somebody speaks in its name.
    let network = Net::build(lab.run)?;
    let mut daemon = Daemon::prepare(lab.run, lab.bins, &network.left, "left", &Config::single())?;
    daemon.start()?;
    wait::until("the instance to own its endpoint", PATIENCE, TICK, || {
        Ok((daemon.status()?.main().role == "owner").then_some(()))
    })?;
    let mut up = daemon.tandem_cmd(&["up", "branch"]).spawn(&lab.run.dir().join("up.log"))?;
    wait::until("our attempt", PATIENCE, TICK, || {
        Ok(daemon.log().contains("no answer, request sent").then_some(()))
    })?;
    let skip = daemon.log().len();
    network
        .peer
        .cmd("python3")
        .args(["-c", STRANGER, net::PEER_WAN, net::VIRTUAL_WAN])
        .run(PATIENCE)?;
    wait_log(&daemon, skip, &["no common IKE proposal", net::PEER_WAN])?;
    clock::sleep_until(clock::now() + Duration::from_millis(500));
    up.check_alive()?;
    let status = daemon.tandem(&["status"])?;
    ensure(status.contains("no common IKE proposal"), || format!("status is silent: {status}"))?;
    Ok("refused at once for remote_address any; the reason each time; a stranger's IKE_SA_INIT ends nothing".into())
}
