//! A scene: a pair that serves a remote gateway, probes running through the tunnel, captures on: ready to be hurt.

use crate::baseline::peer_conn;
use crate::capture::{Capture, Recording};
use crate::charon::{Charon, Conn, Spis};
use crate::check::{self, IvChecker};
use crate::error::{Error, Result, ensure};
use crate::net::{self, Net};
use crate::probe::{TcpProbes, UdpProbes};
use crate::run::Run;
use crate::tandem::{Bins, Config, Daemon, PSK, Status};
use crate::uml::UmlPeer;
use crate::wait;
use std::collections::BTreeMap;
use std::time::Duration;

/// How long anything that should take a moment may take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Who plays the remote gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerKind {
    /// strongSwan with its own ESP.
    Strongswan,
    /// strongSwan on a real kernel's ESP, in user-mode-linux.
    Kernel,
    /// Tandem.
    Tandem,
}

/// The remote gateway.
#[derive(Debug)]
pub enum Remote {
    /// strongSwan.
    Strongswan(Box<Charon>),
    /// strongSwan on a real kernel.
    Kernel(Box<UmlPeer>),
    /// Tandem.
    Tandem(Box<Daemon>),
}

impl Remote {
    /// What it is: `strongSwan 5.9.8`.
    pub fn describe(&self) -> Result<String> {
        match self {
            Remote::Strongswan(charon) => charon.version(),
            Remote::Kernel(peer) => peer.describe(),
            Remote::Tandem(_) => Ok("Tandem".into()),
        }
    }

    /// The SPIs of all that is established there.
    pub fn spis(&self) -> Result<Spis> {
        match self {
            Remote::Strongswan(charon) => charon.spis(),
            Remote::Kernel(peer) => peer.spis(),
            Remote::Tandem(daemon) => Ok(tandem_spis(&daemon.status()?)),
        }
    }

    /// strongSwan, if it is the plain one.
    pub fn charon(&self) -> Result<&Charon> {
        match self {
            Remote::Strongswan(charon) => Ok(charon),
            _ => Err(Error::check("this needs the plain strongSwan peer")),
        }
    }
}

/// The SPIs of all that is established at an instance.
pub(crate) fn tandem_spis(status: &Status) -> Spis {
    let long = |text: &str| u64::from_str_radix(text, 16).unwrap_or(0);
    let short = |text: &str| u32::from_str_radix(text, 16).unwrap_or(0);
    let mut list = Vec::new();
    for tunnel in &status.tunnels {
        let Some(ike) = &tunnel.ike else { continue };
        let mut children: Vec<_> = tunnel
            .children
            .iter()
            .filter(|child| child.state == "installed")
            .map(|child| (short(&child.spi_in), short(&child.spi_out)))
            .collect();
        children.sort_unstable();
        list.push((long(&ike.spi_i), long(&ike.spi_r), children));
    }
    list.sort();
    Spis(list)
}

/// What a scene is made of.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Who plays the remote gateway.
    pub peer: PeerKind,
    /// Rate of the bulk TCP stream, bytes a second; `None`: no bulk stream.
    pub bulk: Option<u64>,
    /// The pair's configuration.
    pub config: Config,
    /// Further arguments of both daemons.
    pub args: &'static [&'static str],
}

impl Setup {
    /// Whether ESP goes in UDP.
    fn in_udp(&self) -> bool {
        self.config.connections.iter().all(|connection| connection.encap != "never")
    }
}

impl Default for Setup {
    fn default() -> Self {
        // 20 Mb/s: enough to keep every queue moving, little enough that a probe is never lost to congestion.
        Setup {
            peer: PeerKind::Strongswan,
            bulk: Some(2_500_000),
            config: Config::pair(),
            args: &[],
        }
    }
}

/// The scene. Fields are open: scenarios do to them what they like.
#[derive(Debug)]
pub struct Scene {
    /// Numbered UDP packets.
    pub udp: UdpProbes,
    /// TCP connections.
    pub tcp: TcpProbes,
    /// The two instances: left, right.
    pub instances: [Daemon; 2],
    /// The remote gateway.
    pub remote: Remote,
    /// The network.
    pub net: Net,
    /// Looks at every protected datagram on the WAN, over the whole life of the scene.
    pub ivs: IvChecker,
    wan: Option<Capture>,
    lan_arp: Option<Capture>,
    peer_ike: Option<Capture>,
}

/// What was captured since the last look.
#[derive(Debug)]
pub struct Seen {
    /// Everything on the WAN's switch.
    pub wan: Recording,
    /// ARP, and what comes out of the tunnel, on the LAN's switch.
    pub lan: Recording,
    /// IKE at the remote gateway.
    pub peer_ike: Recording,
}

impl Scene {
    /// Builds it. `say` is told each step.
    pub fn build(
        run: &Run,
        bins: &Bins,
        setup: &Setup,
        say: &mut dyn FnMut(&str),
    ) -> Result<Scene> {
        let net = Net::build(run)?;
        say("virtual network: two instance hosts, a LAN, a WAN, a router, a remote gateway");
        net.split_sends()?;
        let wan = start_wan(run, &net)?;
        let lan_arp = start_lan(run, &net)?;
        let peer_ike = start_peer(run, &net)?;
        let mut instances = start_pair_with(run, bins, &net, &setup.config, setup.args)?;
        let first = wait_pair_synced(&mut instances, PATIENCE)?;
        say(&format!(
            "instances left and right: {} owns, the other's shadow is in sync",
            instances[first].name
        ));
        let remote = start_remote(run, bins, &net, setup.peer, setup.in_udp())?;
        say(&format!("{} initiated: tunnel up", remote.describe()?));
        net.lhost.ping_until(net::RHOST, PATIENCE)?;
        let udp = UdpProbes::start(run, (&net.lhost, net::LHOST), (&net.rhost, net::RHOST), 1000)?;
        udp.wait_flowing(PATIENCE)?;
        let tcp = TcpProbes::start(run, &net.lhost, (&net.rhost, net::RHOST), setup.bulk)?;
        say(
            "traffic: 1,000 numbered UDP packets a second each way, a bulk TCP stream, an idle TCP connection",
        );
        Ok(Scene {
            udp,
            tcp,
            instances,
            remote,
            net,
            ivs: IvChecker::default(),
            wan: Some(wan),
            lan_arp: Some(lan_arp),
            peer_ike: Some(peer_ike),
        })
    }

    /// Ends the running captures, after new ones have started (so nothing on the WAN escapes the IV checker),
    /// and hands over what they saw.
    pub fn look(&mut self, run: &Run) -> Result<Seen> {
        let next =
            (start_wan(run, &self.net)?, start_lan(run, &self.net)?, start_peer(run, &self.net)?);
        let missing = || Error::check("a capture is not running");
        let wan = self.wan.replace(next.0).ok_or_else(missing)?.stop()?;
        let lan = self.lan_arp.replace(next.1).ok_or_else(missing)?.stop()?;
        let peer_ike = self.peer_ike.replace(next.2).ok_or_else(missing)?.stop()?;
        self.ivs.feed_esp(&wan);
        self.ivs.feed_ike(&peer_ike);
        Ok(Seen { wan, lan, peer_ike })
    }

    /// Waits until one instance owns and the other is in sync; returns the owner's index.
    pub fn wait_synced(&mut self, within: Duration) -> Result<usize> {
        wait_pair_synced(&mut self.instances, within)
    }

    /// What each instance that answers says it dropped, steered and carried so far, by instance and reason.
    pub fn drops(&self) -> BTreeMap<String, u64> {
        let mut all = BTreeMap::new();
        for instance in &self.instances {
            let Ok(status) = instance.status() else { continue };
            let counters = status.counters;
            for (reason, count) in counters.drops {
                all.insert(format!("{} {reason}", instance.name), count);
            }
            for (what, count) in [
                ("steered_out", counters.steered_out),
                ("steered_in", counters.steered_in),
                ("packets_in", counters.packets_in),
                ("packets_out", counters.packets_out),
            ] {
                all.insert(format!("{} {what}", instance.name), count);
            }
        }
        all
    }

    /// Writes what the kernels of both instance hosts know to `dump-NAME.txt` in the run's folder: for a person who
    /// asks why a trial failed.
    pub fn dump(&self, run: &Run) {
        for instance in &self.instances {
            let script = "ip addr; ip rule; ip -6 rule; ip route show table all; ip neigh; ss -anup; ss -antp";
            let text = instance.ns.cmd("sh").args(["-c", script]).run(PATIENCE).unwrap_or_default();
            let status = instance.tandem(&["status", "--json"]).unwrap_or_default();
            let path = run.dir().join(format!("dump-{}.txt", instance.name));
            let _ = std::fs::write(path, format!("{text}\n{status}\n"));
        }
    }

    /// Fails if either instance has logged an ERROR, or anything was seen that must never be.
    pub fn check_clean(&self) -> Result<()> {
        for instance in &self.instances {
            let errors = instance.log_errors();
            ensure(errors.is_empty(), || {
                format!("{} logged: {}", instance.name, errors.join(" / "))
            })?;
        }
        ensure(self.ivs.merged_frames == 0, || {
            format!("{} frames hide packets from the IV check", self.ivs.merged_frames)
        })?;
        ensure(self.ivs.iv_repeats == 0, || format!("IV repeats: {:?}", self.ivs.examples))?;
        ensure(self.ivs.sequence_repeats == 0, || {
            format!("sequence repeats: {:?}", self.ivs.examples)
        })?;
        ensure(self.ivs.message_id_repeats == 0, || {
            format!("message id repeats: {:?}", self.ivs.examples)
        })
    }
}

/// What grew between two readings of [`Scene::drops`].
pub fn grown(
    before: &BTreeMap<String, u64>,
    after: &BTreeMap<String, u64>,
) -> BTreeMap<String, u64> {
    after
        .iter()
        .map(|(reason, count)| {
            (reason.clone(), count.saturating_sub(before.get(reason).copied().unwrap_or(0)))
        })
        .filter(|(_, count)| *count > 0)
        .collect()
}

impl Seen {
    /// Removes the files.
    pub fn discard(self) {
        self.wan.discard();
        self.lan.discard();
        self.peer_ike.discard();
    }

    /// Packets between protected networks, unprotected on the WAN.
    pub fn clear_text(&self) -> u64 {
        check::clear_text(&self.wan)
    }
}

fn start_wan(run: &Run, net: &Net) -> Result<Capture> {
    // IKE is judged from the peer's capture, whole; of ESP the headers and all of a probe are enough.
    Capture::start(run, &net.wan, "br0", "", 256)
}

fn start_lan(run: &Run, net: &Net) -> Result<Capture> {
    // Headers are enough: who claims an address, and who delivers what came out of the tunnel.
    Capture::start(run, &net.lan, "br0", "arp or src net 10.2.0.0/24", 64)
}

fn start_peer(run: &Run, net: &Net) -> Result<Capture> {
    Capture::start(
        run,
        &net.peer,
        "eth0",
        "udp port 500 or (udp port 4500 and udp[8:4] = 0)",
        65_535,
    )
}

/// Starts both instances of a pair on the same configuration.
pub fn start_pair(run: &Run, bins: &Bins, net: &Net, config: &Config) -> Result<[Daemon; 2]> {
    start_pair_with(run, bins, net, config, &[])
}

/// The same with further arguments for both daemons; `%i` in one stands for the instance's name.
pub fn start_pair_with(
    run: &Run,
    bins: &Bins,
    net: &Net,
    config: &Config,
    args: &[&str],
) -> Result<[Daemon; 2]> {
    let prepare = |ns: &crate::ns::Ns, name: &str| -> Result<Daemon> {
        let args: Vec<String> = args.iter().map(|arg| arg.replace("%i", name)).collect();
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        Ok(Daemon::prepare(run, bins, ns, name, config)?.with_args(&args))
    };
    let mut left = prepare(&net.left, "left")?;
    let mut right = prepare(&net.right, "right")?;
    left.spawn()?;
    right.spawn()?;
    left.wait_ready(PATIENCE)?;
    right.wait_ready(PATIENCE)?;
    Ok([left, right])
}

/// Waits until one instance owns, says `synced`, and the other is its shadow; returns the owner's index.
pub fn wait_pair_synced(instances: &mut [Daemon; 2], within: Duration) -> Result<usize> {
    let mut last = String::new();
    wait::until_ok("owner and shadow in sync", within, Duration::from_millis(20), || {
        for instance in instances.iter_mut() {
            instance.proc()?.check_alive()?;
        }
        let states = [instances[0].status()?.main(), instances[1].status()?.main()];
        last = format!(
            "left is {} ({}), right is {} ({})",
            states[0].role, states[0].mode, states[1].role, states[1].mode
        );
        for owner in [0, 1] {
            if states[owner].role == "owner"
                && states[owner].mode == "synced"
                && states[1 - owner].role == "shadow"
            {
                return Ok(owner);
            }
        }
        Err(Error::check(last.clone()))
    })
}

/// Starts the remote gateway and lets it bring its tunnel up. `in_udp`: it claims a NAT.
pub fn start_remote(
    run: &Run,
    bins: &Bins,
    net: &Net,
    kind: PeerKind,
    in_udp: bool,
) -> Result<Remote> {
    let conn = Conn { encap: in_udp, ..peer_conn(PSK) };
    match kind {
        PeerKind::Strongswan => {
            let charon = Charon::start(run, &net.peer)?;
            charon.load(&[conn])?;
            charon.initiate("net", PATIENCE)?;
            charon.wait_established(1, PATIENCE)?;
            Ok(Remote::Strongswan(Box::new(charon)))
        }
        PeerKind::Kernel => {
            let peer = UmlPeer::start(run, &net.peer, &[conn])?;
            peer.initiate("net", PATIENCE)?;
            Ok(Remote::Kernel(Box::new(peer)))
        }
        PeerKind::Tandem => {
            let mut config = Config::remote();
            if !in_udp {
                config.branch().encap = "never".into();
            }
            Ok(Remote::Tandem(Box::new(start_tandem(run, bins, net, &config)?)))
        }
    }
}

/// A Tandem in the remote gateway's place, its tunnel up.
pub fn start_tandem(run: &Run, bins: &Bins, net: &Net, config: &Config) -> Result<Daemon> {
    net.virtual_peer()?;
    let mut daemon = Daemon::prepare(run, bins, &net.peer, "peer", config)?;
    daemon.start()?;
    wait::until("the remote Tandem's tunnel", PATIENCE, Duration::from_millis(20), || {
        Ok(daemon.status()?.is_up("gw", 1).then_some(()))
    })?;
    Ok(daemon)
}
