//! The virtual network of every scenario: two hosts for instances, a LAN, a WAN, a router, a remote gateway.
//!
//! ```text
//!            lhost 10.1.0.9 / fd01::9
//!              │
//!         lan (switch) ──────── second pair link runs here too
//!      eth1 │        │ eth1
//!         left ════ right        pair link eth2: 172.31.0.1 ── 172.31.0.2
//!      eth0 │        │ eth0      203.0.113.11, .12; LAN 10.1.0.2, .3
//!         wan (switch)           virtual: 203.0.113.10, LAN 10.1.0.1
//!              │ 203.0.113.1
//!            router
//!              │ 198.51.100.1
//!            peer 198.51.100.7   the remote gateway
//!              │ 10.2.0.1
//!            rhost 10.2.0.9 / fd02::9
//! ```

use crate::error::Result;
use crate::ns::{self, Ns};
use crate::run::Run;

/// The endpoint's virtual WAN address.
pub const VIRTUAL_WAN: &str = "203.0.113.10";
/// The endpoint's virtual LAN address.
pub const VIRTUAL_LAN: &str = "10.1.0.1";
/// The endpoint's virtual LAN address for IPv6.
pub const VIRTUAL_LAN6: &str = "fd01::1";
/// The second endpoint's virtual WAN address.
pub const SECOND_WAN: &str = "203.0.113.20";
/// The second endpoint's virtual LAN address.
pub const SECOND_LAN: &str = "10.1.0.4";
/// The second endpoint's WAN address where it has an uplink of its own, see [`Net::second_uplink`].
pub const OTHER_WAN: &str = "192.0.2.20";
/// Its gateway there.
pub const OTHER_GATEWAY: &str = "192.0.2.1";
/// Another address of the host behind the endpoints: what it sends from there goes to the second endpoint.
pub const LHOST_SECOND: &str = "10.1.0.19";
/// The remote gateway's outer address.
pub const PEER_WAN: &str = "198.51.100.7";
/// The host behind the endpoint.
pub const LHOST: &str = "10.1.0.9";
/// The host behind the remote gateway.
pub const RHOST: &str = "10.2.0.9";
/// The host behind the endpoint, IPv6.
pub const LHOST6: &str = "fd01::9";
/// The host behind the remote gateway, IPv6.
pub const RHOST6: &str = "fd02::9";
/// Selectors on the endpoint's side.
pub const LOCAL_TS: &str = "10.1.0.0/24";
/// Selectors on the remote side.
pub const REMOTE_TS: &str = "10.2.0.0/24";
/// IPv6 selectors on the endpoint's side.
pub const LOCAL_TS6: &str = "fd01::/64";
/// IPv6 selectors on the remote side.
pub const REMOTE_TS6: &str = "fd02::/64";

/// What a host that runs an instance sets (as `deploy/install` does): nothing but the daemon may answer ARP
/// for virtual addresses, packets are forwarded, nobody is redirected.
pub const INSTANCE_SYSCTLS: &[&str] = &[
    "net.ipv4.ip_forward=1",
    "net.ipv6.conf.all.forwarding=1",
    "net.ipv4.conf.all.rp_filter=0",
    "net.ipv4.conf.default.rp_filter=0",
    "net.ipv4.conf.all.arp_ignore=1",
    "net.ipv4.conf.all.arp_announce=2",
    "net.ipv4.conf.all.send_redirects=0",
    "net.ipv4.conf.default.send_redirects=0",
];

/// The namespaces of the drawing above. `wan` and `lan` are switches; they hold no address.
#[derive(Clone, Debug)]
pub struct Net {
    /// The WAN's switch (`br0`).
    pub wan: Ns,
    /// The LAN's switch (`br0`).
    pub lan: Ns,
    /// The first instance's host.
    pub left: Ns,
    /// The second instance's host.
    pub right: Ns,
    /// Between the WAN and the remote gateway.
    pub router: Ns,
    /// The remote gateway.
    pub peer: Ns,
    /// The host behind the endpoint.
    pub lhost: Ns,
    /// The host behind the remote gateway.
    pub rhost: Ns,
}

impl Net {
    /// Builds the whole network. An unused `right` costs nothing.
    pub fn build(run: &Run) -> Result<Net> {
        let net = Net {
            wan: Ns::add(run, "wan")?,
            lan: Ns::add(run, "lan")?,
            left: Ns::add(run, "left")?,
            right: Ns::add(run, "right")?,
            router: Ns::add(run, "router")?,
            peer: Ns::add(run, "peer")?,
            lhost: Ns::add(run, "lhost")?,
            rhost: Ns::add(run, "rhost")?,
        };
        // Before any interface exists, so that every one of them inherits it: addresses are usable at once.
        for ns in [&net.left, &net.right, &net.router, &net.peer, &net.lhost, &net.rhost] {
            ns.sysctl(&["net.ipv6.conf.all.accept_dad=0", "net.ipv6.conf.default.accept_dad=0"])?;
        }
        for host in [&net.left, &net.right] {
            host.sysctl(INSTANCE_SYSCTLS)?;
        }
        net.router.sysctl(&["net.ipv4.ip_forward=1"])?;
        net.peer.sysctl(&[
            "net.ipv4.ip_forward=1",
            "net.ipv6.conf.all.forwarding=1",
            "net.ipv4.conf.all.rp_filter=0",
            "net.ipv4.conf.default.rp_filter=0",
            "net.ipv4.conf.all.send_redirects=0",
            "net.ipv4.conf.default.send_redirects=0",
        ])?;

        ns::veth(&net.left, "eth0", &net.wan, "left")?;
        ns::veth(&net.right, "eth0", &net.wan, "right")?;
        ns::veth(&net.router, "eth0", &net.wan, "router")?;
        ns::bridge(&net.wan, "br0", &["left", "right", "router"])?;
        ns::veth(&net.left, "eth1", &net.lan, "left")?;
        ns::veth(&net.right, "eth1", &net.lan, "right")?;
        ns::veth(&net.lhost, "eth0", &net.lan, "lhost")?;
        ns::bridge(&net.lan, "br0", &["left", "right", "lhost"])?;
        ns::veth(&net.left, "eth2", &net.right, "eth2")?;
        ns::veth(&net.router, "eth1", &net.peer, "eth0")?;
        ns::veth(&net.peer, "eth1", &net.rhost, "eth0")?;

        net.left.ip("addr add 203.0.113.11/24 dev eth0\n\
             addr add 10.1.0.2/24 dev eth1\n\
             addr add fd01::2/64 dev eth1\n\
             addr add 172.31.0.1/24 dev eth2\n\
             route add default via 203.0.113.1\n")?;
        net.right.ip("addr add 203.0.113.12/24 dev eth0\n\
             addr add 10.1.0.3/24 dev eth1\n\
             addr add fd01::3/64 dev eth1\n\
             addr add 172.31.0.2/24 dev eth2\n\
             route add default via 203.0.113.1\n")?;
        net.router.ip("addr add 203.0.113.1/24 dev eth0\naddr add 198.51.100.1/24 dev eth1\n")?;
        net.peer.ip("addr add 198.51.100.7/24 dev eth0\n\
             addr add 10.2.0.1/24 dev eth1\n\
             addr add fd02::1/64 dev eth1\n\
             route add default via 198.51.100.1\n")?;
        net.lhost.ip("addr add 10.1.0.9/24 dev eth0\n\
             addr add fd01::9/64 dev eth0\n\
             route add default via 10.1.0.1\n\
             route add default via fd01::1\n")?;
        net.rhost.ip("addr add 10.2.0.9/24 dev eth0\n\
             addr add fd02::9/64 dev eth0\n\
             route add default via 10.2.0.1\n\
             route add default via fd02::1\n")?;
        Ok(net)
    }

    /// Gives `left` the virtual addresses as plain ones: for strongSwan in the endpoint's place.
    pub fn plain_endpoint(&self) -> Result<()> {
        self.left.ip("addr add 203.0.113.10/24 dev eth0\n\
             addr add 10.1.0.1/24 dev eth1\n\
             addr add fd01::1/64 dev eth1\n")
    }

    /// Gives the host behind the endpoints an address whose packets go to the second endpoint.
    pub fn second_next_hop(&self) -> Result<()> {
        self.lhost.ip(&format!(
            "addr add {LHOST_SECOND}/24 dev eth0\n\
             route add default via {SECOND_LAN} table 20\n\
             rule add from {LHOST_SECOND} lookup 20\n"
        ))
    }

    /// A second WAN with a router of its own, on eth3 of both instances' hosts. The routers know each other by a link that
    /// is on neither WAN; the remote gateway is behind the first one. Returns the second WAN's switch (`br0`).
    pub fn second_uplink(&self, run: &Run) -> Result<Ns> {
        let (wan, router) = (Ns::add(run, "wan2")?, Ns::add(run, "router2")?);
        router.sysctl(&["net.ipv4.ip_forward=1"])?;
        ns::veth(&self.left, "eth3", &wan, "left")?;
        ns::veth(&self.right, "eth3", &wan, "right")?;
        ns::veth(&router, "eth0", &wan, "router")?;
        ns::bridge(&wan, "br0", &["left", "right", "router"])?;
        ns::veth(&router, "eth1", &self.router, "eth2")?;
        for (host, address) in [(&self.left, "192.0.2.11"), (&self.right, "192.0.2.12")] {
            host.ip(&format!("addr add {address}/24 dev eth3\nlink set eth3 gso_max_segs 1\n"))?;
        }
        router.ip(&format!(
            "addr add {OTHER_GATEWAY}/24 dev eth0\n\
             addr add 172.31.9.2/24 dev eth1\n\
             route add default via 172.31.9.1\n"
        ))?;
        self.router
            .ip("addr add 172.31.9.1/24 dev eth2\nroute add 192.0.2.0/24 via 172.31.9.2\n")?;
        Ok(wan)
    }

    /// Where packets of the host behind the endpoints go, by its address (0: [`LHOST`], 1: [`LHOST_SECOND`]), as a
    /// LAN's own routing would decide.
    pub fn next_hop(&self, source: usize, via: &str) -> Result<()> {
        let table = if source == 0 { "main" } else { "20" };
        self.lhost.ip(&format!("route replace default via {via} table {table}\n"))
    }

    /// Gives the remote gateway's host addresses of its own, so that 198.51.100.7 and 10.2.0.1 can be virtual:
    /// for a Tandem in the remote gateway's place.
    pub fn virtual_peer(&self) -> Result<()> {
        self.peer.sysctl(INSTANCE_SYSCTLS)?;
        self.peer.ip("addr del 198.51.100.7/24 dev eth0\n\
             addr add 198.51.100.8/24 dev eth0\n\
             addr del 10.2.0.1/24 dev eth1\n\
             addr add 10.2.0.2/24 dev eth1\n\
             route replace default via 198.51.100.1\n")
    }

    /// Segmented sends are split before they reach the WAN, as a network card would, so that a capture there shows
    /// every packet. (A virtual Ethernet passes them on whole.)
    pub fn split_sends(&self) -> Result<()> {
        for host in [&self.left, &self.right, &self.peer] {
            host.ip("link set eth0 gso_max_segs 1\n")?;
        }
        Ok(())
    }

    /// The host of an instance by its name.
    pub fn host(&self, instance: &str) -> &Ns {
        if instance == "right" { &self.right } else { &self.left }
    }
}
