//! Network namespaces and what connects them.

use crate::error::Result;
use crate::proc::Cmd;
use crate::run::{self, Run};
use std::path::Path;
use std::time::Duration;

/// How long any configuration command may take, generously, for a busy machine.
pub const BRIEF: Duration = Duration::from_secs(20);

/// A namespace. It lives as long as its [`Run`].
#[derive(Clone, Debug)]
pub struct Ns {
    name: String,
    short: String,
}

impl Ns {
    /// Makes namespace `short` with its loopback up.
    pub fn add(run: &Run, short: &str) -> Result<Ns> {
        let name = run.ns_name(short);
        run::register_namespace(&name);
        Cmd::new("ip").args(["netns", "add", &name]).run(BRIEF)?;
        let ns = Ns { name, short: short.to_owned() };
        ns.ip("link set lo up\n")?;
        Ok(ns)
    }

    /// The full name, as `ip netns` knows it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The short name: `left`, `peer`.
    pub fn short(&self) -> &str {
        &self.short
    }

    /// A command that will run in here.
    pub fn cmd(&self, program: impl AsRef<std::ffi::OsStr>) -> Cmd {
        Cmd::new(program).in_ns(&self.name)
    }

    /// Runs `ip` commands, one a line, without the word `ip`.
    pub fn ip(&self, batch: &str) -> Result<()> {
        Cmd::new("ip")
            .args(["-n", &self.name, "-batch", "-"])
            .run_with(Some(batch), BRIEF)
            .map(drop)
    }

    /// Sets sysctls, written `key=value`.
    pub fn sysctl(&self, settings: &[&str]) -> Result<()> {
        self.cmd("sysctl").args(["-q", "-w"]).args(settings).run(BRIEF).map(drop)
    }

    /// Loads an nft script.
    pub fn nft(&self, script: &str) -> Result<()> {
        self.cmd("nft").args(["-f", "-"]).run_with(Some(script), BRIEF).map(drop)
    }

    /// The MAC address of an interface.
    pub fn mac(&self, interface: &str) -> Result<[u8; 6]> {
        let text = self.cmd("cat").arg(format!("/sys/class/net/{interface}/address")).run(BRIEF)?;
        parse_mac(text.trim())
            .ok_or_else(|| crate::Error::parse(format!("MAC of {interface}"), text))
    }

    /// Pings `address` until it answers once, or fails after `within`.
    pub fn ping_until(&self, address: &str, within: Duration) -> Result<()> {
        crate::wait::until_ok(
            &format!("{} to reach {address}", self.short),
            within,
            Duration::from_millis(20),
            || self.ping(address, 1, Duration::from_millis(500)),
        )
    }

    /// Sends `count` pings 20 ms apart; fails unless every one is answered within `wait`.
    pub fn ping(&self, address: &str, count: u32, wait: Duration) -> Result<()> {
        self.cmd("ping")
            .args(["-n", "-q", "-i", "0.02", "-c", &count.to_string()])
            .args(["-W", &format!("{:.2}", wait.as_secs_f64()), address])
            .run(BRIEF + wait)
            .map(drop)
    }
}

/// Connects two namespaces by a pair of virtual Ethernet interfaces, both up.
pub fn veth(a: &Ns, a_if: &str, b: &Ns, b_if: &str) -> Result<()> {
    Cmd::new("ip")
        .args(["link", "add", a_if, "netns", a.name(), "type", "veth", "peer", "name", b_if])
        .args(["netns", b.name()])
        .run(BRIEF)?;
    a.ip(&format!("link set {a_if} up\n"))?;
    b.ip(&format!("link set {b_if} up\n"))
}

/// Makes `bridge` a switch over `ports`, all up. It forwards at once (no spanning tree), and what it forwards meets no rule
/// of the host's (br_netfilter, where the kernel has it): a switch looks at no IP header.
pub fn bridge(ns: &Ns, bridge: &str, ports: &[&str]) -> Result<()> {
    let mut batch =
        format!("link add {bridge} type bridge stp_state 0 forward_delay 0 mcast_snooping 0\n");
    for port in ports {
        batch.push_str(&format!("link set {port} master {bridge} up\n"));
    }
    batch.push_str(&format!("link set {bridge} up\n"));
    ns.ip(&batch)?;
    let rules = ["iptables", "ip6tables", "arptables"]
        .map(|family| format!("net/bridge/bridge-nf-call-{family}"))
        .into_iter()
        .filter(|name| Path::new("/proc/sys").join(name).exists())
        .map(|name| format!("{}=0", name.replace('/', ".")));
    let rules: Vec<String> = rules.collect();
    match rules.is_empty() {
        true => Ok(()),
        false => ns.sysctl(&rules.iter().map(String::as_str).collect::<Vec<_>>()),
    }
}

/// Reads `aa:bb:cc:dd:ee:ff`.
pub fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut words = text.split(':');
    for byte in &mut mac {
        *byte = u8::from_str_radix(words.next()?, 16).ok()?;
    }
    words.next().is_none().then_some(mac)
}
