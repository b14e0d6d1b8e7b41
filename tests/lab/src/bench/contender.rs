//! Who can stand in the gateways' places, and how each gets there.

use crate::baseline::{mirrored, peer_conn};
use crate::bench::net::{BenchNet, FAR_LAN, FAR_WAN};
use crate::bench::uapi;
use crate::charon::{Charon, tool};
use crate::error::{Error, Result};
use crate::ns::{BRIEF, Ns};
use crate::proc::{Cmd, Proc, last_lines};
use crate::run::Run;
use crate::scene::{PATIENCE, wait_pair_synced};
use crate::tandem::{self, Bins, Config, Daemon, PSK};
use crate::{net, wait};
use std::path::{Path, PathBuf};
use std::time::Duration;

const TICK: Duration = Duration::from_millis(20);

/// A contender. Those after [`Contender::Gotatun`] are measured in one cell only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Contender {
    /// Both gateways just route.
    Plain,
    /// Tandem as it comes, the near gateway a pair.
    Tandem,
    /// strongSwan with its own ESP.
    Libipsec,
    /// wireguard-go.
    WireguardGo,
    /// gotatun.
    Gotatun,
    /// boringtun.
    Boringtun,
    /// Tandem without a pair.
    HaOff,
    /// Tandem with `offload = false`.
    OffloadOff,
    /// Tandem with protocol 50.
    Esp50,
    /// Tandem with ChaCha20-Poly1305.
    Chacha,
    /// Tandem with two workers.
    TwoWorkers,
    /// Tandem with `low_latency = true`.
    LowLatency,
}

impl Contender {
    /// All.
    pub const ALL: [Contender; 12] = [
        Contender::Plain,
        Contender::Tandem,
        Contender::Libipsec,
        Contender::WireguardGo,
        Contender::Gotatun,
        Contender::Boringtun,
        Contender::HaOff,
        Contender::OffloadOff,
        Contender::Esp50,
        Contender::Chacha,
        Contender::TwoWorkers,
        Contender::LowLatency,
    ];

    /// Its name on the command line and in the document.
    pub fn name(self) -> &'static str {
        match self {
            Contender::Plain => "plain",
            Contender::Tandem => "tandem",
            Contender::Libipsec => "libipsec",
            Contender::WireguardGo => "wireguard-go",
            Contender::Gotatun => "gotatun",
            Contender::Boringtun => "boringtun",
            Contender::HaOff => "tandem-ha-off",
            Contender::OffloadOff => "tandem-offload-off",
            Contender::Esp50 => "tandem-esp50",
            Contender::Chacha => "tandem-chacha20",
            Contender::TwoWorkers => "tandem-2-workers",
            Contender::LowLatency => "tandem-low-latency",
        }
    }

    /// What it is.
    pub fn about(self) -> &'static str {
        match self {
            Contender::Plain => "plain routing",
            Contender::Tandem => "Tandem, AES-256-GCM, UDP encapsulation, HA on",
            Contender::Libipsec => "strongSwan kernel-libipsec, AES-256-GCM",
            Contender::WireguardGo => "wireguard-go with TUN offload",
            Contender::Gotatun => "gotatun",
            Contender::Boringtun => "boringtun",
            Contender::HaOff => "Tandem without a second instance",
            Contender::OffloadOff => "Tandem, offload = false",
            Contender::Esp50 => "Tandem, encap = \"never\" (protocol 50)",
            Contender::Chacha => "Tandem, ChaCha20-Poly1305",
            Contender::TwoWorkers => "Tandem, workers = 2",
            Contender::LowLatency => "Tandem, low_latency = true (small requests only)",
        }
    }

    /// Whether every cell is measured, or one TCP stream only.
    pub fn is_full(self) -> bool {
        self <= Contender::Gotatun
    }

    /// Whether it is Tandem, in one of its forms.
    pub fn is_tandem(self) -> bool {
        self == Contender::Tandem || self >= Contender::HaOff
    }

    /// Finds it by its name.
    pub fn parse(name: &str) -> std::result::Result<Contender, String> {
        Contender::ALL.into_iter().find(|contender| contender.name() == name).ok_or_else(|| {
            let names: Vec<&str> = Contender::ALL.iter().map(|one| one.name()).collect();
            format!("there is no contender {name}; there are {}", names.join(", "))
        })
    }
}

/// Where programs are.
#[derive(Clone, Debug)]
pub struct Programs {
    /// Tandem's.
    pub bins: Bins,
    /// The folder with what `tests/bench` fetched: `bin/gotatun`, `bin/wireguard-go`, …
    pub tools: PathBuf,
}

/// A contender in place, its tunnel up.
#[derive(Debug)]
pub struct Scene {
    /// The network.
    pub net: BenchNet,
    /// Its version, in its own words.
    pub version: String,
    /// Tandem's gateways: near owner, far one.
    pub gateways: Vec<u32>,
    /// Lives as long as the scene.
    keep: Keep,
}

#[derive(Debug)]
enum Keep {
    Nothing,
    Charons(Vec<Charon>),
    Procs(Vec<Proc>),
    Daemons(Vec<Daemon>),
}

/// What became of the wish to start one.
#[derive(Debug)]
pub enum Start {
    /// It stands.
    Up(Box<Scene>),
    /// It cannot be had here, and why.
    Skipped(String),
}

/// Builds the network with `contender` in it, and waits until both clients reach each other.
pub fn start(run: &Run, programs: &Programs, contender: Contender) -> Result<Start> {
    let net = BenchNet::build(run)?;
    let (keep, version, gateways) = match contender {
        Contender::Plain => {
            net.plain_gateways()?;
            let far = format!("via {FAR_WAN}");
            net.routes(&far, &format!("via {}", net::VIRTUAL_WAN))?;
            let version = Cmd::new("uname").arg("-r").run(BRIEF)?;
            (Keep::Nothing, format!("Linux {}", version.trim()), Vec::new())
        }
        Contender::Libipsec => {
            let charons = charons(run, &net)?;
            let version = charons.first().map_or(Ok(String::new()), Charon::version)?;
            (Keep::Charons(charons), version, Vec::new())
        }
        Contender::WireguardGo | Contender::Gotatun | Contender::Boringtun => {
            match wireguards(run, &net, programs, contender)? {
                Ok((procs, version)) => (Keep::Procs(procs), version, Vec::new()),
                Err(reason) => return Ok(Start::Skipped(reason)),
            }
        }
        _ => match tandems(run, &net, programs, contender)? {
            Ok((mut daemons, far)) => {
                let version = Cmd::new(&programs.bins.tandem).arg("--version").run(BRIEF)?;
                let mut pids = Vec::new();
                for at in [0, far] {
                    pids.extend(daemons.get_mut(at).map(Daemon::pid).transpose()?);
                }
                (Keep::Daemons(daemons), version.trim().to_owned(), pids)
            }
            Err(reason) => return Ok(Start::Skipped(reason)),
        },
    };
    net.lhost.ping_until(net::RHOST, PATIENCE)?;
    net.rhost.ping_until(net::LHOST, PATIENCE)?;
    Ok(Start::Up(Box::new(Scene { net, version, gateways, keep })))
}

impl Scene {
    /// Fails if a process of the contender has ended, or Tandem logged an ERROR.
    pub fn check_alive(&mut self) -> Result<()> {
        match &mut self.keep {
            Keep::Nothing => Ok(()),
            Keep::Charons(charons) => charons.iter_mut().try_for_each(|c| c.proc().check_alive()),
            Keep::Procs(procs) => procs.iter_mut().try_for_each(Proc::check_alive),
            Keep::Daemons(daemons) => daemons.iter_mut().try_for_each(|daemon| {
                daemon.proc()?.check_alive()?;
                let errors = daemon.log_errors();
                crate::error::ensure(errors.is_empty(), || {
                    format!("{} logged: {}", daemon.name, errors.join(" / "))
                })
            }),
        }
    }

    /// The MTU of Tandem's TUN, bytes.
    pub fn tunnel_mtu(&self) -> Result<u32> {
        let text = self.net.left.cmd("cat").arg("/sys/class/net/tandem0/mtu").run(BRIEF)?;
        text.trim().parse().map_err(|_| Error::parse("the TUN's MTU", text))
    }

    /// Tandem's drops so far, by instance and reason: for a person who asks where packets went.
    pub fn drops(&self) -> Vec<(String, u64)> {
        let Keep::Daemons(daemons) = &self.keep else { return Vec::new() };
        let of = |daemon: &Daemon| {
            let drops = daemon.status().map(|status| status.counters.drops).unwrap_or_default();
            let name = daemon.name.clone();
            drops
                .into_iter()
                .filter(|(_, n)| *n > 0)
                .map(move |(why, n)| (format!("{name} {why}"), n))
        };
        daemons.iter().flat_map(of).collect()
    }
}

fn charons(run: &Run, net: &BenchNet) -> Result<Vec<Charon>> {
    net.plain_gateways()?;
    let (near, far) = (Charon::start(run, &net.left)?, Charon::start(run, &net.peer)?);
    let mut conn = peer_conn(PSK);
    conn.local_addr = FAR_WAN.into();
    near.load(&[mirrored(&conn)])?;
    far.load(&[conn])?;
    far.initiate("net", PATIENCE)?;
    Ok(vec![near, far])
}

/// The outcome, or why it cannot be had.
type Maybe<T> = std::result::Result<T, String>;

fn wireguards(
    run: &Run,
    net: &BenchNet,
    programs: &Programs,
    contender: Contender,
) -> Result<Maybe<(Vec<Proc>, String)>> {
    let (name, args, version): (_, &[&str], _) = match contender {
        Contender::WireguardGo => ("wireguard-go", &["-f"], &["--version"]),
        Contender::Gotatun => ("gotatun", &["-f", "--disable-drop-privileges"], &["--version"]),
        _ => ("boringtun-cli", &["-f", "--disable-drop-privileges"], &["--version"]),
    };
    let program = programs.tools.join("bin").join(name);
    if !program.exists() {
        return Ok(Err(format!("there is no {} (tests/bench fetches it)", program.display())));
    }
    let program = tool(run, &program.to_string_lossy())?;
    let version = Cmd::new(&program).args(version).run(BRIEF)?;
    net.plain_gateways()?;
    let near = uapi::Side {
        secret: [1; 32],
        other_secret: [2; 32],
        endpoint: FAR_WAN,
        allowed: net::REMOTE_TS,
    };
    let far = uapi::Side {
        secret: near.other_secret,
        other_secret: near.secret,
        endpoint: net::VIRTUAL_WAN,
        allowed: net::LOCAL_TS,
    };
    let mut procs = Vec::new();
    for (host, side) in [(&net.left, near), (&net.peer, far)] {
        procs.push(wireguard(run, host, &program, args, &side)?);
    }
    net.routes("dev wg0", "dev wg0")?;
    let mut version = version.lines().next().unwrap_or_default().to_owned();
    // wireguard-go's own number has stood still since before its releases that count here.
    if let Ok(package) = std::fs::read_to_string(programs.tools.join(format!("{name}.version"))) {
        version = format!("{version} (package {})", package.trim());
    }
    Ok(Ok((procs, version)))
}

/// Starts one, tells it its side and brings its interface up.
fn wireguard(
    run: &Run,
    host: &Ns,
    program: &Path,
    args: &[&str],
    side: &uapi::Side<'_>,
) -> Result<Proc> {
    let private = run.subdir(&format!("wireguard-{}", host.short()))?;
    let dir = run.subdir(&format!("wireguard-{}/wireguard", host.short()))?;
    let socket = dir.join("wg0.sock");
    let _ = std::fs::remove_file(&socket);
    let log = run.dir().join(format!("wireguard-{}.log", host.short()));
    let mut proc = host
        .cmd(program)
        .args(args)
        .arg("wg0")
        .env("LOG_LEVEL", "error")
        .env("WG_LOG_LEVEL", "error")
        .private_run(&private)
        .spawn(&log)?;
    wait::until("a WireGuard to take its configuration", PATIENCE, TICK, || {
        proc.check_alive()?;
        Ok(if socket.exists() { side.tell(&socket).ok() } else { None })
    })
    .map_err(|error| Error::check(format!("{error}: {}", proc.log_tail())))?;
    host.ip("link set wg0 mtu 1420 up\n")?;
    Ok(proc)
}

/// The two configurations of a form of Tandem.
fn configs(contender: Contender) -> (Config, Config) {
    let (mut near, mut far) = (Config::pair(), Config::remote());
    if contender == Contender::HaOff {
        near = Config::single();
    }
    near.branch().remote_address = FAR_WAN.into();
    for (config, wan) in [(&mut near, net::VIRTUAL_WAN), (&mut far, FAR_WAN)] {
        for endpoint in &mut config.endpoints {
            endpoint.wan = format!("{wan}/24");
            endpoint.gateway = String::new();
        }
        match contender {
            Contender::OffloadOff => config.offload = false,
            Contender::Esp50 => config.branch().encap = "never".into(),
            Contender::Chacha => {
                for child in &mut config.branch().children {
                    child.esp_proposals = vec!["chacha20poly1305-x25519".into()];
                }
            }
            Contender::TwoWorkers => config.daemon_settings.push(("workers".into(), "2".into())),
            Contender::LowLatency => {
                config.daemon_settings.push(("low_latency".into(), "true".into()));
            }
            _ => {}
        }
    }
    if let Some(endpoint) = near.endpoints.first_mut() {
        endpoint.lan = vec![net::VIRTUAL_LAN.into()];
    }
    if let Some(endpoint) = far.endpoints.first_mut() {
        endpoint.lan = vec![FAR_LAN.into()];
    }
    (near, far)
}

/// The daemons, the near owner first, and the far one's place in the list.
fn tandems(
    run: &Run,
    net: &BenchNet,
    programs: &Programs,
    contender: Contender,
) -> Result<Maybe<(Vec<Daemon>, usize)>> {
    let bins = &programs.bins;
    let (near, far) = configs(contender);
    let mut left = Daemon::prepare(run, bins, &net.left, "left", &near)?;
    let mut peer = Daemon::prepare(run, bins, &net.peer, "peer", &far)?;
    for daemon in [&left, &peer] {
        let checked = tandem::check(bins, &daemon.ns, daemon.config_path(), &daemon.name)?;
        if !checked.status.success() {
            let said = format!("{}\n{}", checked.stdout, checked.stderr);
            let reason = said.lines().find(|line| line.starts_with("error"));
            let reason = reason.map_or_else(|| last_lines(&said, 3), str::to_owned);
            return Ok(Err(format!("tandem check says: {reason}")));
        }
    }
    let mut daemons = Vec::new();
    if contender == Contender::HaOff {
        left.start()?;
        wait::until("the instance to own its endpoint", PATIENCE, TICK, || {
            left.proc()?.check_alive()?;
            Ok((left.status()?.main().role == "owner").then_some(()))
        })?;
        daemons.push(left);
    } else {
        let mut right = Daemon::prepare(run, bins, &net.right, "right", &near)?;
        left.spawn()?;
        right.spawn()?;
        left.wait_ready(PATIENCE)?;
        right.wait_ready(PATIENCE)?;
        let mut pair = [left, right];
        let owner = wait_pair_synced(&mut pair, PATIENCE)?;
        if owner != 0 {
            return Err(Error::check("the endpoint is not at home"));
        }
        daemons.extend(pair);
    }
    peer.start()?;
    wait::until("the tunnel at both ends", PATIENCE, TICK, || {
        peer.proc()?.check_alive()?;
        let near_up = daemons.first().map(Daemon::status).transpose()?;
        let near_up = near_up.is_some_and(|status| status.is_up("branch", 1));
        Ok((near_up && peer.status()?.is_up("gw", 1)).then_some(()))
    })
    .map_err(|error| Error::check(format!("{error}; far: {}", last_lines(&peer.log(), 3))))?;
    daemons.push(peer);
    let far = daemons.len() - 1;
    Ok(Ok((daemons, far)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_contender_is_found_by_its_name_and_no_other_is() {
        for contender in Contender::ALL {
            assert_eq!(Contender::parse(contender.name()), Ok(contender));
        }
        assert!(Contender::parse("tandem-").unwrap_err().contains("libipsec"));
    }

    #[test]
    fn each_form_of_tandem_differs_at_both_gateways() {
        let dir = std::env::temp_dir().join(format!("bench-configs-{}", std::process::id()));
        let texts = |contender| {
            let (near, far) = configs(contender);
            [near, far].map(|config| {
                let text = std::fs::read_to_string(config.write(&dir).unwrap()).unwrap();
                assert!(!text.contains("gateway = \""), "{text}");
                text
            })
        };
        let usual = texts(Contender::Tandem);
        for contender in Contender::ALL.into_iter().filter(|c| c.is_tandem()) {
            let [near, far] = texts(contender);
            assert_eq!(near == usual[0], contender == Contender::Tandem, "{contender:?}");
            let same_far = [Contender::Tandem, Contender::HaOff].contains(&contender);
            assert_eq!(far == usual[1], same_far, "{contender:?}");
        }
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
