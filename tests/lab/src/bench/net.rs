//! The benchmark's network: every contender stands in the same places of it.
//!
//! ```text
//!            left    203.0.113.11, 10.1.0.2                        203.0.113.13, 10.2.0.2
//!   lhost ───┤ ═══  pair link 172.31.0.1 ── .2     ├─── peer ──── rhost
//!   10.1.0.9 right   203.0.113.12, 10.1.0.3                          10.2.0.9
//! ```
//! The near gateway is 203.0.113.10 and 10.1.0.1, the far one 203.0.113.70 and 10.2.0.1: virtual for Tandem, plain
//! addresses for the others. Where the standby joins a segment, the host at its end is the switch itself (`eth0` of
//! `lhost` and of `peer`): so a packet crosses three virtual wires, as if there were no standby.

use crate::error::Result;
use crate::net::{self, INSTANCE_SYSCTLS};
use crate::ns::{self, BRIEF, Ns};
use crate::run::Run;

/// The far gateway's outer address.
pub const FAR_WAN: &str = "203.0.113.70";
/// The far gateway's address inside.
pub const FAR_LAN: &str = "10.2.0.1";

/// The namespaces of the drawing.
#[derive(Clone, Debug)]
pub struct BenchNet {
    /// The near client.
    pub lhost: Ns,
    /// The near gateway.
    pub left: Ns,
    /// Its standby; without a pair, nothing runs there.
    pub right: Ns,
    /// The far gateway.
    pub peer: Ns,
    /// The far client.
    pub rhost: Ns,
}

impl BenchNet {
    /// Builds it; nobody holds the gateways' addresses yet.
    pub fn build(run: &Run) -> Result<BenchNet> {
        let add = |name: &str| Ns::add(run, name);
        let net = BenchNet {
            lhost: add("lhost")?,
            left: add("left")?,
            right: add("right")?,
            peer: add("peer")?,
            rhost: add("rhost")?,
        };
        for gateway in [&net.left, &net.right, &net.peer] {
            gateway.sysctl(INSTANCE_SYSCTLS)?;
        }
        for (host, name) in [(&net.left, "left"), (&net.right, "right")] {
            ns::veth(host, "eth0", &net.peer, name)?;
            ns::veth(host, "eth1", &net.lhost, name)?;
        }
        ns::veth(&net.left, "eth2", &net.right, "eth2")?;
        ns::veth(&net.peer, "eth1", &net.rhost, "eth0")?;
        ns::bridge(&net.peer, "eth0", &["left", "right"])?;
        ns::bridge(&net.lhost, "eth0", &["left", "right"])?;
        for (n, host) in [(1, &net.left), (2, &net.right)] {
            host.ip(&format!(
                "addr add 203.0.113.1{n}/24 dev eth0\n\
                 addr add 10.1.0.{}/24 dev eth1\n\
                 addr add 172.31.0.{n}/24 dev eth2\n",
                n + 1
            ))?;
        }
        net.peer.ip("addr add 203.0.113.13/24 dev eth0\naddr add 10.2.0.2/24 dev eth1\n")?;
        for (host, address, via) in
            [(&net.lhost, net::LHOST, net::VIRTUAL_LAN), (&net.rhost, net::RHOST, FAR_LAN)]
        {
            host.ip(&format!("addr add {address}/24 dev eth0\nroute add default via {via}\n"))?;
        }
        Ok(net)
    }

    /// The gateways' addresses as plain ones.
    pub fn plain_gateways(&self) -> Result<()> {
        let both =
            [(&self.left, net::VIRTUAL_WAN, net::VIRTUAL_LAN), (&self.peer, FAR_WAN, FAR_LAN)];
        for (host, wan, lan) in both {
            host.ip(&format!("addr add {wan}/24 dev eth0\naddr add {lan}/24 dev eth1\n"))?;
        }
        Ok(())
    }

    /// The way to what is behind the other gateway: `via` at the near one, `back` at the far one, in `ip route`'s words.
    pub fn routes(&self, via: &str, back: &str) -> Result<()> {
        self.left.ip(&format!("route add {} {via}\n", net::REMOTE_TS))?;
        self.peer.ip(&format!("route add {} {back}\n", net::LOCAL_TS))
    }

    /// Whether a segmented UDP send crosses the WAN as one buffer, or is split where it enters the wire.
    pub fn segmentation_on_wire(&self, on: bool) -> Result<()> {
        let value = if on { "on" } else { "off" };
        let ends = [
            (&self.left, "eth0"),
            (&self.right, "eth0"),
            (&self.peer, "left"),
            (&self.peer, "right"),
        ];
        for (host, interface) in ends {
            host.cmd("ethtool").args(["-K", interface, "tx-udp-segmentation", value]).run(BRIEF)?;
        }
        Ok(())
    }
}
