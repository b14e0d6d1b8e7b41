//! Two Tandem pairs that face each other, network to network: four instances, a router between their WANs.
//!
//! ```text
//!     lhost 10.1.0.9, .19                               rhost 10.2.0.9, .19
//!       │                                                 │
//!     lan ── 10.1.0.1, .4 (virtual)                     far-lan ── 10.2.0.1, .4 (virtual)
//!       │             │                                   │             │
//!     left ════════ right  172.31.0.1 ── .2             north ═══════ south  172.31.1.1 ── .2
//!       │             │                                   │             │
//!     wan ── 203.0.113.10, .20 (virtual)                far-wan ── 198.51.100.10, .20 (virtual)
//!       └── 203.0.113.1 ──────────── router ──────────── 198.51.100.1 ──┘
//! ```
//! What a host sends from .9 goes to its side's first endpoint, from .19 to the second, where there is one. The instances
//! run the files that stand in `config/`, with shorter times and with paths of their own.

pub mod trial;

use crate::capture::{Capture, Recording};
use crate::charon::Spis;
use crate::check::{self, IvChecker};
use crate::error::{Error, Result, ensure, write_file};
use crate::net::{self, INSTANCE_SYSCTLS};
use crate::ns::{self, Ns};
use crate::pcap::{Content, Packet};
use crate::run::Run;
use crate::scene::{PATIENCE, tandem_spis};
use crate::tandem::{Bins, Daemon, PSK, secret_file};
use crate::wait;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Another address of the far host: what it sends from there goes to the second endpoint of its side, if there is one.
pub const RHOST_SECOND: &str = "10.2.0.19";
/// The addresses of the near and of the far host.
pub const HOSTS: [[&str; 2]; 2] = [[net::LHOST, net::LHOST_SECOND], [net::RHOST, RHOST_SECOND]];
const TICK: Duration = Duration::from_millis(20);

/// A pair's configuration, and what of it the lab must know.
#[derive(Clone, Copy, Debug)]
pub struct SideShape {
    /// The file in `config/`.
    pub config: &'static str,
    /// Names of the endpoints, with the index of the home of each.
    pub endpoints: &'static [(&'static str, usize)],
}

/// Two pairs.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Near and far side.
    pub sides: [SideShape; 2],
    /// The two tunnels: name of the near endpoint, and the outer address at each side.
    pub tunnels: [(&'static str, [&'static str; 2]); 2],
}

const BOTH: &[(&str, usize)] = &[("a", 0), ("b", 1)];

/// Active-active on both sides.
pub const ACTIVE_ACTIVE: Shape = Shape {
    sides: [
        SideShape {
            config: include_str!("../../../config/pairs-active-active/hq.toml"),
            endpoints: BOTH,
        },
        SideShape {
            config: include_str!("../../../config/pairs-active-active/branch.toml"),
            endpoints: BOTH,
        },
    ],
    tunnels: [("a", ["203.0.113.10", "198.51.100.10"]), ("b", ["203.0.113.20", "198.51.100.20"])],
};

/// Active-active towards active-standby.
pub const ACTIVE_STANDBY: Shape = Shape {
    sides: [
        SideShape {
            config: include_str!("../../../config/pairs-active-standby/hq.toml"),
            endpoints: BOTH,
        },
        SideShape {
            config: include_str!("../../../config/pairs-active-standby/branch.toml"),
            endpoints: &[("main", 0)],
        },
    ],
    tunnels: [("a", ["203.0.113.10", "198.51.100.10"]), ("b", ["203.0.113.20", "198.51.100.10"])],
};

impl Shape {
    /// The tunnel between two outer addresses, in either order.
    #[must_use]
    pub fn tunnel_of(&self, one: &str, other: &str) -> Option<usize> {
        self.tunnels.iter().position(|(_, ends)| *ends == [one, other] || *ends == [other, one])
    }

    /// Index of the instance, at a side, where tunnel `at` ends and where packets from the host's address `at` arrive,
    /// while all is at home.
    #[must_use]
    pub fn home(&self, side: usize, at: usize) -> usize {
        let endpoints = self.sides[side].endpoints;
        endpoints.get(at).or(endpoints.first()).map_or(0, |(_, home)| *home)
    }
}

/// One side of the drawing. `wan` and `lan` are switches.
#[derive(Clone, Debug)]
pub struct SideNet {
    /// The WAN's switch (`br0`).
    pub wan: Ns,
    /// The LAN's switch (`br0`).
    pub lan: Ns,
    /// The instances' hosts.
    pub hosts: [Ns; 2],
    /// The host behind the endpoints.
    pub inner: Ns,
}

/// Names and numbers of a side.
struct Plan {
    names: [&'static str; 2],
    switches: [&'static str; 2],
    inner: &'static str,
    wan: &'static str,
    lan: &'static str,
    link: &'static str,
    secret: &'static str,
}

const PLANS: [Plan; 2] = [
    Plan {
        names: ["left", "right"],
        switches: ["wan", "lan"],
        inner: "lhost",
        wan: "203.0.113",
        lan: "10.1.0",
        link: "172.31.0",
        // 64 hexadecimal digits, as `tandem genkey` prints.
        secret: "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff",
    },
    Plan {
        names: ["north", "south"],
        switches: ["far-wan", "far-lan"],
        inner: "rhost",
        wan: "198.51.100",
        lan: "10.2.0",
        link: "172.31.1",
        secret: "ffeeddccbbaa99887766554433221100ffeeddccbbaa99887766554433221100",
    },
];

fn side_net(run: &Run, plan: &Plan, endpoints: usize) -> Result<SideNet> {
    let Plan { names, switches, inner, wan, lan, link, .. } = plan;
    let add = |name: &str| Ns::add(run, name);
    let side = SideNet {
        wan: add(switches[0])?,
        lan: add(switches[1])?,
        hosts: [add(names[0])?, add(names[1])?],
        inner: add(inner)?,
    };
    for (host, name) in side.hosts.iter().zip(names) {
        host.sysctl(INSTANCE_SYSCTLS)?;
        ns::veth(host, "eth0", &side.wan, name)?;
        ns::veth(host, "eth1", &side.lan, name)?;
    }
    ns::veth(&side.hosts[0], "eth2", &side.hosts[1], "eth2")?;
    ns::veth(&side.inner, "eth0", &side.lan, inner)?;
    ns::bridge(&side.wan, "br0", names)?;
    ns::bridge(&side.lan, "br0", &[names[0], names[1], inner])?;
    for (n, host) in side.hosts.iter().enumerate() {
        let (outside, inside, linked) = (11 + n, 2 + n, 1 + n);
        // A segmented send is split before it reaches the WAN: see `Net::split_sends`.
        host.ip(&format!(
            "addr add {wan}.{outside}/24 dev eth0\n\
             addr add {lan}.{inside}/24 dev eth1\n\
             addr add {link}.{linked}/24 dev eth2\n\
             route add default via {wan}.1\n\
             link set eth0 gso_max_segs 1\n"
        ))?;
    }
    let second = if endpoints > 1 { 4 } else { 1 };
    side.inner.ip(&format!(
        "addr add {lan}.9/24 dev eth0\n\
         addr add {lan}.19/24 dev eth0\n\
         route add default via {lan}.1\n\
         route add default via {lan}.{second} table 20\n\
         rule add from {lan}.19 lookup 20\n"
    ))?;
    Ok(side)
}

/// The scene.
#[derive(Debug)]
pub struct TwoPairs {
    /// Probes; none at first.
    pub flows: Vec<trial::Flow>,
    /// The instances of the near and of the far side.
    pub instances: [[Daemon; 2]; 2],
    /// The networks of both sides.
    pub nets: [SideNet; 2],
    /// The router between them.
    pub router: Ns,
    /// What it is.
    pub shape: Shape,
    /// Looks at every protected datagram that crosses the near WAN, so at all.
    pub ivs: IvChecker,
    captures: Option<[Capture; 2]>,
}

/// What was captured since the last look.
#[derive(Debug)]
pub struct Seen {
    /// Everything on the near WAN.
    pub near: Recording,
    /// On the far WAN all but what is in UDP 4500.
    pub far: Recording,
}

impl Seen {
    /// Packets between protected networks, unprotected on either WAN.
    pub fn clear_text(&self) -> u64 {
        check::clear_text(&self.near) + check::clear_text(&self.far)
    }

    /// Removes the files.
    pub fn discard(self) {
        self.near.discard();
        self.far.discard();
    }
}

impl TwoPairs {
    /// Networks and pairs, all tunnels up, no traffic yet. The near instances log their keys to `keylog`.
    pub fn build(run: &Run, bins: &Bins, shape: Shape, keylog: &Path) -> Result<TwoPairs> {
        let side = |n: usize| side_net(run, &PLANS[n], shape.sides[n].endpoints.len());
        let nets = [side(0)?, side(1)?];
        let router = Ns::add(run, "router")?;
        router.sysctl(&["net.ipv4.ip_forward=1"])?;
        for (side, (net, plan)) in nets.iter().zip(&PLANS).enumerate() {
            let interface = format!("eth{side}");
            ns::veth(&router, &interface, &net.wan, "router")?;
            net.wan.ip("link set router master br0\n")?;
            router.ip(&format!("addr add {}.1/24 dev {interface}\n", plan.wan))?;
        }
        let captures = start_captures(run, &nets)?;
        let folder = keylog.to_string_lossy();
        let start = |side: usize, n: usize| -> Result<Daemon> {
            let (host, plan) = (&nets[side].hosts[n], &PLANS[side]);
            let name = plan.names[n];
            let write = |dir: &Path| write_config(dir, shape.sides[side].config, plan.secret);
            let args: &[&str] = if side == 0 { &["--keylog", &folder] } else { &[] };
            let daemon = Daemon::prepare_with(run, bins, host, name, write)?;
            let mut daemon = daemon.with_args(args);
            daemon.spawn()?;
            Ok(daemon)
        };
        let mut instances = [[start(0, 0)?, start(0, 1)?], [start(1, 0)?, start(1, 1)?]];
        for instance in instances.iter_mut().flatten() {
            instance.wait_ready(PATIENCE)?;
        }
        let (flows, ivs) = (Vec::new(), IvChecker::default());
        let captures = Some(captures);
        let mut scene = TwoPairs { flows, instances, nets, router, shape, ivs, captures };
        scene.wait_home(PATIENCE)?;
        scene.wait_tunnels()?;
        let [near, far] = &scene.nets;
        near.inner.ping_until(net::RHOST, PATIENCE)?;
        far.inner.ping_until(net::LHOST, PATIENCE)?;
        Ok(scene)
    }

    /// Waits until every instance shows both tunnels, once each.
    fn wait_tunnels(&mut self) -> Result<()> {
        wait::until_ok("both tunnels at all four instances", PATIENCE, TICK, || {
            for instance in self.instances.iter().flatten() {
                let tunnels = instance.status()?.tunnels;
                let up = tunnels.iter().filter(|t| t.state == "established").count();
                ensure((up, tunnels.len()) == (2, 2), || {
                    format!("{}: {tunnels:?}", instance.name)
                })?;
            }
            Ok(())
        })
    }

    /// Waits until each endpoint is owned at home and all instances are in sync. An instance that has just handed one
    /// over still steers what arrives late: it is the shadow all the same.
    pub fn wait_home(&mut self, within: Duration) -> Result<()> {
        wait::until_ok("each endpoint at home, in sync", within, TICK, || {
            for (side, instances) in self.shape.sides.iter().zip(&self.instances) {
                let status = [instances[0].status()?, instances[1].status()?];
                for (name, home) in side.endpoints {
                    let here = status[*home].endpoint(name);
                    let there = status[1 - *home].endpoint(name);
                    let well = here.role == "owner" && here.mode == "synced";
                    ensure(well && ["shadow", "steering"].contains(&there.role.as_str()), || {
                        format!(
                            "{name} is {} ({}) at home, {} away",
                            here.role, here.mode, there.role
                        )
                    })?;
                }
            }
            Ok(())
        })
    }

    /// The SPIs that each side knows, as its first instance tells.
    pub fn spis(&self) -> Result<[Spis; 2]> {
        let of =
            |side: usize| -> Result<Spis> { Ok(tandem_spis(&self.instances[side][0].status()?)) };
        Ok([of(0)?, of(1)?])
    }

    /// Ends the running captures after new ones have started, and hands over what they saw.
    pub fn look(&mut self, run: &Run) -> Result<Seen> {
        // Something that both show: a capture that shows nothing would find no clear text either.
        for plan in &PLANS {
            let mark = format!("printf mark > /dev/udp/{}.11/9", plan.wan);
            self.router.cmd("bash").args(["-c", &mark]).run(PATIENCE)?;
        }
        let next = start_captures(run, &self.nets)?;
        let none = || Error::check("no capture is running");
        let [near, far] = self.captures.replace(next).ok_or_else(none)?;
        let seen = Seen { near: near.stop()?, far: far.stop()? };
        self.ivs.feed(&seen.near);
        for (side, recording) in [("near", &seen.near), ("far", &seen.far)] {
            let shown = recording.packets().any(|packet| is_mark(&packet));
            ensure(shown, || format!("the capture on the {side} WAN showed nothing"))?;
        }
        Ok(seen)
    }

    /// Fails if an instance has logged an ERROR, or anything was seen that must never be.
    pub fn check_clean(&self) -> Result<()> {
        for instance in self.instances.iter().flatten() {
            let errors = instance.log_errors();
            ensure(errors.is_empty(), || {
                format!("{} logged: {}", instance.name, errors.join(" / "))
            })?;
        }
        let ivs = &self.ivs;
        ensure(ivs.merged_frames == 0, || {
            format!("{} frames hide packets from the IV check", ivs.merged_frames)
        })?;
        ensure(ivs.iv_repeats + ivs.sequence_repeats + ivs.message_id_repeats == 0, || {
            format!("IV, sequence or message id repeats: {:?}", ivs.examples)
        })
    }
}

fn is_mark(packet: &Packet<'_>) -> bool {
    matches!(packet.content, Content::Ip { ports: (_, 9), .. })
}

fn start_captures(run: &Run, nets: &[SideNet; 2]) -> Result<[Capture; 2]> {
    let near = Capture::start(run, &nets[0].wan, "br0", "", 256)?;
    // What leaves in clear there, the router knows no way for: it would not reach the near WAN.
    let far = Capture::start(run, &nets[1].wan, "br0", "not udp port 4500", 128)?;
    Ok([near, far])
}

/// A file of `config/`, with this daemon's paths, and endpoints that go home soon.
fn write_config(dir: &Path, sample: &str, secret: &str) -> Result<PathBuf> {
    let at = dir.display();
    let mut text =
        format!("[daemon]\nsocket = \"{at}/control.sock\"\nstate_dir = \"{at}/state\"\n");
    for line in sample.lines() {
        text.push_str(&line.replace("/etc/tandem/", &format!("{at}/")));
        text.push('\n');
        if line.starts_with("[endpoints.") {
            text.push_str("hold_down_s = 1\n");
        }
    }
    std::fs::create_dir_all(dir.join("state"))
        .map_err(|error| Error::check(format!("create {at}/state: {error}")))?;
    secret_file(&dir.join("pair.key"), secret)?;
    secret_file(&dir.join("hq-branch.psk"), PSK)?;
    let path = dir.join("tandem.toml");
    write_file(&path, text)?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tunnel_is_known_by_its_two_addresses_in_either_order() {
        let shape = ACTIVE_STANDBY;
        assert_eq!(shape.tunnel_of("203.0.113.10", "198.51.100.10"), Some(0));
        assert_eq!(shape.tunnel_of("198.51.100.10", "203.0.113.20"), Some(1));
        assert_eq!(ACTIVE_ACTIVE.tunnel_of("198.51.100.10", "203.0.113.20"), None);
    }

    #[test]
    fn with_one_endpoint_all_meets_its_home() {
        let of = |shape: Shape| [0, 1].map(|side| [0, 1].map(|at| shape.home(side, at)));
        assert_eq!(of(ACTIVE_ACTIVE), [[0, 1], [0, 1]]);
        assert_eq!(of(ACTIVE_STANDBY), [[0, 1], [0, 0]]);
    }
}
