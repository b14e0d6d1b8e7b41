//! Active-active in the lab: two endpoints, a tunnel at each to one strongSwan, and flows of every kind.
//!
//! ```text
//!   lhost 10.1.0.9  ──► 10.1.0.1 (endpoint a, at home on the left)  ─┐ pinned to a: by 203.0.113.10
//!   lhost 10.1.0.19 ──► 10.1.0.4 (endpoint b, at home on the right) ─┴ pinned to b: by 203.0.113.20
//! ```
//! A flow arrives where its host's next hop leads, and leaves by the tunnel that it is pinned to: where these differ, it
//! crosses the pair link. A scene has one flow of each of the four kinds. What the peer sends where is its own choice:
//! strongSwan with kernel-libipsec uses its newest tunnel for all. [`mod@trial`] hurts it and measures.

pub mod outcome;
pub mod trial;

use crate::baseline::peer_conn;
use crate::capture::{Capture, Recording};
use crate::charon::{Backend, Charon, Conn};
use crate::check::IvChecker;
use crate::clock;
use crate::error::{Error, Result, ensure, write_file};
use crate::net::{self, Net};
use crate::probe::{Measure, TcpProbes, UdpProbes, Way};
use crate::run::Run;
use crate::scene::{PATIENCE, start_pair_with};
use crate::tandem::{Bins, Config, Daemon, PSK, Status};
use crate::wait;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use outcome::{Event, Outcome};
pub use trial::trial;

/// Packets a second of each flow, each way.
pub const RATE: u32 = 500;
/// Ports are tried from here on until each kind of flow has one.
const PORTS_FROM: u16 = 7100;
/// Rate of the bulk TCP stream, bytes a second: as in a scene of one endpoint.
const BULK: u64 = 2_500_000;

/// Name, home, WAN address of the two endpoints.
pub const ENDPOINTS: [(&str, usize, &str); 2] =
    [("a", 0, net::VIRTUAL_WAN), ("b", 1, net::SECOND_WAN)];

/// Virtual LAN addresses of the two.
pub const NEXT_HOPS: [&str; 2] = [net::VIRTUAL_LAN, net::SECOND_LAN];
/// Addresses that the flows come from, by the endpoint that they are sent to.
pub const SOURCES: [&str; 2] = [net::LHOST, net::LHOST_SECOND];

/// What becomes of an endpoint whose home has failed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum OnFailure {
    /// The other instance carries it on, addresses and all.
    #[default]
    Adopt,
    /// Its tunnels go down, and their flows go to the other endpoint's.
    Withdraw,
}

impl OnFailure {
    /// A pair of this kind.
    pub fn config(self) -> Config {
        let mut config = match self {
            OnFailure::Adopt => Config::active_active(),
            OnFailure::Withdraw => Config::withdrawing(),
        };
        // Through one of its tunnels the peer sends nothing, so every 30 s a liveness check is due there. Now and then
        // it would fall into a trial, and none of what a trial does needs one.
        config.branch().settings.push(("dpd_delay".into(), "0".into()));
        config
    }
}

/// A flow, and where it goes.
#[derive(Debug)]
pub struct Flow {
    /// Its packets.
    pub udp: UdpProbes,
    /// Its ports, at both ends.
    pub port: u16,
    /// Index of the endpoint that its host sends to.
    pub arrives: usize,
    /// Index of the endpoint that it is pinned to.
    pub pinned: usize,
}

impl Flow {
    /// What tshark calls its packets to the peer's side (see [`crate::capture::InnerFlow`]).
    pub fn inner(&self) -> String {
        let (source, port) = (SOURCES.get(self.arrives).unwrap_or(&"?"), self.port);
        format!("17 {source}:{port} {}:{port}", net::RHOST)
    }

    /// For people.
    pub fn name(&self) -> String {
        let name = |index: usize| ENDPOINTS.get(index).map_or("?", |(name, ..)| name);
        format!("arrives at {}, pinned to {}", name(self.arrives), name(self.pinned))
    }
}

/// The scene.
#[derive(Debug)]
pub struct Active {
    /// One of each kind.
    pub flows: Vec<Flow>,
    /// A bulk TCP stream and an idle connection, where there is a trial to see them.
    pub tcp: Option<TcpProbes>,
    /// Left and right.
    pub instances: [Daemon; 2],
    /// The remote gateway.
    pub peer: Charon,
    /// The network.
    pub net: Net,
    /// Looks at every protected datagram on the WAN.
    pub ivs: IvChecker,
    /// Whether a dead instance's endpoint is withdrawn instead of adopted.
    pub withdraws: bool,
    /// Where the daemons log keys for tshark.
    keylog: Option<PathBuf>,
    wan: Option<Capture>,
}

/// The peer's two connections: the same gateway and networks by two addresses.
pub fn peer_conns() -> Vec<Conn> {
    let at = |(name, _, address): (&str, usize, &str)| {
        // One identity twice: uniqueness would take the first tunnel for replaced (peers.md).
        let mut conn = peer_conn(PSK).with("unique", "never");
        conn.name = format!("gw-{name}");
        conn.remote_addr = address.into();
        for child in &mut conn.children {
            child.name = format!("net-{name}");
        }
        conn
    };
    ENDPOINTS.map(at).into()
}

impl Active {
    /// Network, pair and peer, both tunnels up, no traffic yet. `args` go to the daemons.
    pub fn quiet(run: &Run, bins: &Bins, config: &Config, args: &[&str]) -> Result<Active> {
        let net = Net::build(run)?;
        let scene = Active::on(run, bins, net, config, args, &peer_conns())?;
        scene.bring_up()?;
        Ok(scene)
    }

    /// On a given network, the peer having these connections: each endpoint at home, nothing negotiated yet, unless we
    /// initiate.
    pub fn on(
        run: &Run,
        bins: &Bins,
        net: Net,
        config: &Config,
        args: &[&str],
        conns: &[Conn],
    ) -> Result<Active> {
        net.split_sends()?;
        net.second_next_hop()?;
        let wan = Some(start_wan(run, &net)?);
        let withdraws = config.withdraws();
        // First, because who is not there when the pair begins is asked again only after a while.
        let peer = start_peer(run, &net, conns, withdraws)?;
        let instances = start_pair_with(run, bins, &net, config, args)?;
        let (flows, tcp, keylog) = (Vec::new(), None, None);
        let ivs = IvChecker::default();
        let mut scene = Active { flows, tcp, instances, peer, net, ivs, withdraws, keylog, wan };
        scene.wait_home(PATIENCE)?;
        Ok(scene)
    }

    /// Lets the peer initiate, unless we do, and waits for both tunnels.
    pub fn bring_up(&self) -> Result<()> {
        if !self.withdraws {
            for (name, ..) in ENDPOINTS {
                self.peer.initiate(&format!("net-{name}"), PATIENCE)?;
            }
        }
        self.wait_tunnels(PATIENCE)
    }

    /// The same with a flow of each kind, and keys for tshark: ready for trials.
    pub fn build(run: &Run, bins: &Bins, config: &Config, args: &[&str]) -> Result<Active> {
        // A folder for this scene (keys of an earlier one are of no use), and in it one for each instance: what two processes
        // add to one file at once may be mixed.
        let keylog = run.subdir(&format!("keylog-{}", clock::nanos(clock::now())))?;
        for instance in ["left", "right"] {
            run.subdir(&keylog.join(instance).to_string_lossy())?;
        }
        let folder = keylog.join("%i").to_string_lossy().into_owned();
        let args = [&["--keylog", folder.as_str()], args].concat();
        let mut scene = Active::quiet(run, bins, config, &args)?;
        scene.keylog = Some(keylog);
        scene.add_flows(run)?;
        Ok(scene)
    }

    /// The same with TCP connections. `say` is told each step.
    pub fn stage(
        run: &Run,
        bins: &Bins,
        on_failure: OnFailure,
        say: &mut dyn FnMut(&str),
    ) -> Result<Active> {
        let mut scene = Active::build(run, bins, &on_failure.config(), &[])?;
        say("virtual network; left at home with endpoint a, right with endpoint b, in sync");
        say(&format!("{}: two tunnels up, one at each endpoint", scene.peer.version()?));
        let (client, server) = (&scene.net.lhost, (&scene.net.rhost, net::RHOST));
        scene.tcp = Some(TcpProbes::start(run, client, server, Some(BULK))?);
        say(&format!(
            "traffic: four UDP flows of {RATE} numbered packets a second each way, two pinned to each tunnel; a bulk TCP \
             stream, an idle TCP connection"
        ));
        Ok(scene)
    }

    /// Starts flows until there is one of each kind.
    pub fn add_flows(&mut self, run: &Run) -> Result<()> {
        let scene = self;
        for (arrives, source) in SOURCES.into_iter().enumerate() {
            // One host answers for both, so no port twice.
            let first = PORTS_FROM + 64 * arrives as u16;
            for port in first..first + 64 {
                if scene.flows.iter().filter(|flow| flow.arrives == arrives).count() == 2 {
                    break;
                }
                let ends = ((&scene.net.lhost, source), (&scene.net.rhost, net::RHOST));
                let udp = UdpProbes::on_port(run, ends.0, ends.1, RATE, port)?;
                udp.wait_flowing(PATIENCE)?;
                let filters = ["--address", source, "--port", &port.to_string()];
                let seen = scene.instances[arrives].flows(&filters)?;
                let pinned = seen.iter().find(|flow| flow.source == source).and_then(|flow| {
                    ENDPOINTS.iter().position(|(name, ..)| *name == flow.endpoint)
                });
                let pinned = pinned
                    .ok_or_else(|| Error::check(format!("{source}:{port} is not in {seen:?}")))?;
                let known = |flow: &Flow| (flow.arrives, flow.pinned) == (arrives, pinned);
                if !scene.flows.iter().any(known) {
                    scene.flows.push(Flow { udp, port, arrives, pinned });
                }
            }
        }
        ensure(scene.flows.len() == 4, || format!("{} kinds of flow found", scene.flows.len()))
    }

    /// Ends the running capture after a new one has started, and hands over what it saw.
    pub fn look(&mut self, run: &Run) -> Result<Recording> {
        let next = start_wan(run, &self.net)?;
        let wan = self.wan.replace(next).ok_or_else(|| Error::check("no capture is running"))?;
        let seen = wan.stop()?;
        self.ivs.feed_esp(&seen);
        Ok(seen)
    }

    /// Waits until each endpoint is owned at home and both instances are in sync.
    pub fn wait_home(&mut self, within: Duration) -> Result<()> {
        wait_where_home(&self.instances, self.withdraws, within)
    }

    /// Waits until both tunnels are up, and both instances know it.
    pub fn wait_tunnels(&self, within: Duration) -> Result<()> {
        let tick = Duration::from_millis(20);
        wait::until_ok("both tunnels at both instances", within, tick, || {
            for instance in &self.instances {
                let status = instance.status()?;
                for (endpoint, ..) in ENDPOINTS {
                    ensure(is_up(&status, endpoint), || {
                        format!("{endpoint}'s is not up at {}", instance.name)
                    })?;
                }
            }
            Ok(())
        })
    }

    /// Forgets packets that arrived before, so that long runs stay small.
    pub fn forget(&self, before: Duration) {
        for flow in &self.flows {
            flow.udp.forget(before);
        }
    }

    /// The keys that both daemons have logged so far, for tshark, in a scene made by [`Active::stage`].
    pub fn keylog(&self) -> Result<&Path> {
        let Some(folder) = self.keylog.as_deref() else {
            return Err(Error::check("this scene logs no keys"));
        };
        for table in ["esp_sa", "ikev2_decryption_table"] {
            let read = |instance: &Daemon| {
                let path = folder.join(&instance.name).join(table);
                std::fs::read_to_string(path).unwrap_or_default()
            };
            let text = self.instances.each_ref().map(read).concat();
            write_file(&folder.join(table), text)?;
        }
        Ok(folder)
    }

    /// Fails if an instance has logged an ERROR, or anything was seen that must never be.
    pub fn check_clean(&self) -> Result<()> {
        for instance in &self.instances {
            let errors = instance.log_errors();
            ensure(errors.is_empty(), || {
                format!("{} logged: {}", instance.name, errors.join(" / "))
            })?;
        }
        ensure(self.ivs.iv_repeats + self.ivs.sequence_repeats == 0, || {
            format!("IV or sequence repeats: {:?}", self.ivs.examples)
        })
    }

    /// What each flow met within a window, out and back.
    pub fn measure(&self, from: Duration, to: Duration) -> Result<Vec<[Measure; 2]>> {
        let mut all = Vec::new();
        for flow in &self.flows {
            flow.udp.settle(to)?;
            all.push(Way::BOTH.map(|way| flow.udp.measure(way, from, to)));
        }
        Ok(all)
    }
}

/// Waits until each endpoint is owned at home and both instances are in sync.
pub fn wait_home(instances: &[Daemon; 2], within: Duration) -> Result<()> {
    wait_where_home(instances, false, within)
}

fn wait_where_home(instances: &[Daemon; 2], withdraws: bool, within: Duration) -> Result<()> {
    let tick = Duration::from_millis(20);
    wait::until_ok("each endpoint at home, in sync", within, tick, || {
        for (name, home, _) in ENDPOINTS {
            let here = instances[home].status()?.endpoint(name);
            let there = instances[1 - home].status()?.endpoint(name);
            let away = there.role == "shadow" || (withdraws && there.role != "owner");
            ensure(here.role == "owner" && here.mode == "synced" && away, || {
                format!(
                    "{name} is {} ({}) at home and {} away from it",
                    here.role, here.mode, there.role
                )
            })?;
        }
        Ok(())
    })
}

fn start_wan(run: &Run, net: &Net) -> Result<Capture> {
    Capture::start(run, &net.wan, "br0", "", 256)
}

/// The remote gateway, its connections loaded. Where tunnels are withdrawn it looks for itself whether one is dead, as
/// whoever runs such a pair would have it.
fn start_peer(run: &Run, net: &Net, conns: &[Conn], withdraws: bool) -> Result<Charon> {
    let (mut conns, mut settings) = (conns.to_vec(), "");
    if withdraws {
        conns = conns.into_iter().map(|conn| conn.with("dpd_delay", "1s")).collect();
        settings = "retransmit_tries = 2\n  retransmit_timeout = 0.5\n  retransmit_base = 1.5";
    }
    let peer = Charon::start_with(run, &net.peer, Backend::Libipsec, settings)?;
    peer.load(&conns)?;
    Ok(peer)
}

/// Whether an endpoint's tunnel is established, with a child.
pub fn is_up(status: &Status, endpoint: &str) -> bool {
    status.tunnels.iter().any(|tunnel| {
        tunnel.endpoint == endpoint
            && tunnel.state == "established"
            && tunnel.children.iter().any(|child| child.state == "installed")
    })
}
