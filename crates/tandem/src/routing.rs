//! Routes and rules: what must outlive the process, what must die with it (architecture.md, "Addresses live and die
//! with the process").
//!
//! ```text
//!  priority  rule                                  lives
//!   90+n     iif WAN from REMOTE to LOCAL drop     beyond the process   no protected packet comes in clear
//!   94       iif lo from VIP, UDP 500/4500: U      beyond the process   IKE and ESP themselves, never into a tunnel
//!            iif lo from VIP, ESP: U               beyond the process   likewise
//!            iif lo from LINK to LINK: main        beyond the process   the pair link, likewise
//!   95+n     as 100, for a REMOTE inside a LOCAL   beyond the process
//!   97+n     from LOCAL to LOCAL main, no default  beyond the process   where REMOTE covers LOCAL (0.0.0.0/0)
//!  100+n     from LOCAL to REMOTE lookup T         beyond the process   no protected packet leaves in clear:
//!              T: REMOTE dev TUN                   with the TUN           while the daemon runs
//!              T: REMOTE blackhole, last metric    beyond the process     when it does not
//!  110       from VIP lookup U                     beyond the process   each endpoint leaves by its own uplink
//!              U: default via the gateway             with the interface
//!              U: blackhole, last metric            beyond the process     while it is down
//! ```
//! n is the number of /0 sides: the kernel confuses such rules with others of their priority ([`Netlink::add_rule`]).
//! LOCAL and REMOTE in rules and in table T are what the networks of all connections make up together, in few pieces
//! (`merge`): every packet of the host passes the rules one by one. In `main` each REMOTE has a route of its own.
//!
//! **A REMOTE as wide as 0.0.0.0/0** means "everywhere but here". Traffic from LOCAL to a LOCAL that REMOTE covers stays
//! outside tunnels and takes the host's own routes, all but its default route: neighbours on the LAN, the gateway's own
//! LAN address, the pair link over the LAN. (Where a narrower REMOTE lies inside that LOCAL, that one still goes
//! into its tunnel.) What the host sends from addresses outside LOCAL is not touched at all: a REMOTE that covers a WAN
//! address, its gateway or a peer stands in table T only, not in `main`.
//!
//! `tandem protect` sets what outlives the process before the network comes up (deploy/install), the daemon repeats it
//! at its start, and takes away what an earlier configuration left and this one does not want. `tandem down CONNECTION
//! --purge` takes away what no other connection needs, `tandem protect --remove` all of it. All rules and routes with
//! our protocol number are one daemon's: a second one in the same network namespace is refused ([`claim`]).

mod keeper;
mod merge;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;

use gateway::config::{Config, Endpoint};
use ike::RemoteAddress;
use netio::route::{
    Action, LAST_METRIC, MAIN_TABLE, Netlink, Prefix, Route, Rule, Target, Traffic,
};
use wire::ts::Cidr;

pub use keeper::Keeper;

/// Table T: the protected networks.
pub const TABLE: u32 = 4116;
/// Table U of endpoint 0; the others follow.
pub const UPLINK_TABLE: u32 = 4200;
/// Rules against clear text from the WAN.
const FROM_WAN: u32 = 90;
/// Rules for the daemon's own packets.
const OWN: u32 = 94;
/// Rules into table T for networks inside an exempt one.
const INSIDE: u32 = 95;
/// Rules past the tunnels, from LOCAL to LOCAL.
const EXEMPT: u32 = 97;
/// Rules into table T.
const PROTECTED: u32 = 100;
/// Rules into the uplink tables.
const UPLINK: u32 = 110;
/// Metric of the routes into the TUN.
const METRIC: u32 = 64;

/// WAN interfaces of this instance, each once.
fn wan_interfaces(config: &Config) -> BTreeSet<String> {
    let here = usize::from(config.local);
    config.endpoints.iter().filter_map(|e| e.wan.interface.get(here)?.clone()).collect()
}

/// How many sides of a rule are everywhere.
fn wide(from: &Prefix, to: &Prefix) -> u32 {
    u32::from(from.length() == 0) + u32::from(to.length() == 0)
}

type Pairs = BTreeSet<(Prefix, Prefix)>;

fn prefixes(pairs: impl IntoIterator<Item = (Cidr, Cidr)>) -> Pairs {
    let prefix = |cidr: Cidr| Prefix::new(cidr.addr(), cidr.prefix());
    pairs
        .into_iter()
        .filter_map(|(local, remote)| Some((prefix(local)?, prefix(remote)?)))
        .collect()
}

/// Those of `networks` that lie in `wide`: they follow it in their order.
fn inside<'a>(
    networks: &'a BTreeSet<Prefix>,
    wide: &'a Prefix,
) -> impl Iterator<Item = &'a Prefix> {
    networks.range(*wide..).take_while(|network| wide.covers(network))
}

/// Which traffic of these pairs stays outside tunnels: from a local network to one that the remote side covers too.
fn exemptions(pairs: &Pairs, all: &Pairs) -> Pairs {
    let locals: BTreeSet<Prefix> = all.iter().map(|(local, _)| *local).collect();
    let covered = |local: Prefix, remote| {
        inside(&locals, remote).filter(move |to| *to != remote).map(move |to| (local, *to))
    };
    let exempt = pairs.iter().flat_map(|(local, remote)| covered(*local, remote));
    // What a connection names itself is no exemption.
    exempt.filter(|pair| !all.contains(pair)).collect()
}

/// Claims this network namespace's rules and routes, for as long as the result lives. Errors: `AddrInUse` while another
/// daemon holds them.
pub fn claim() -> io::Result<std::os::unix::net::UnixListener> {
    use std::os::linux::net::SocketAddrExt;
    // An abstract name belongs to the network namespace and goes with the process.
    let name = std::os::unix::net::SocketAddr::from_abstract_name("tandemd")?;
    std::os::unix::net::UnixListener::bind_addr(&name)
}

/// What a configuration says of networks.
#[derive(Debug)]
pub struct Networks {
    /// By connection.
    pairs: BTreeMap<String, Pairs>,
    wans: BTreeSet<String>,
    links: Pairs,
    /// Addresses that this host reaches, or is reached by, outside any tunnel.
    outside: BTreeSet<IpAddr>,
}

impl Networks {
    /// Of the whole configuration.
    #[must_use]
    pub fn of(config: &Config) -> Self {
        let mut pairs: BTreeMap<String, Pairs> = BTreeMap::new();
        for connection in &config.connections {
            pairs.entry(connection.name.clone()).or_default().extend(prefixes(connection.pairs()));
        }
        let links = config.pair.iter().flat_map(|pair| &pair.links);
        let ends =
            links.map(|link| (Prefix::host(link.local.ip()), Prefix::host(link.remote.ip())));
        Self {
            pairs,
            wans: wan_interfaces(config),
            links: ends.collect(),
            outside: outside_tunnels(config),
        }
    }

    /// What protects all connections but these.
    #[must_use]
    pub fn protection(&self, without: &BTreeSet<String>) -> Protection {
        let all: Pairs = self.pairs.values().flatten().copied().collect();
        let stays = |(name, _): &(&String, _)| !without.contains(*name);
        let pairs: Pairs =
            self.pairs.iter().filter(stays).flat_map(|(_, pairs)| pairs).copied().collect();
        // Judged by the whole configuration, so that a pair's rule is the same whatever else is protected.
        let exempt: BTreeSet<Prefix> = exemptions(&all, &all).iter().map(|(_, to)| *to).collect();
        let within = |to: &Prefix| exempt.iter().any(|wide| wide != to && wide.covers(to));

        let mut kinds: BTreeMap<Kind<'_>, Pairs> = BTreeMap::new();
        let mut add = |priority, input, action, pair: (Prefix, Prefix)| {
            let priority = priority + wide(&pair.0, &pair.1);
            kinds.entry((priority, input, action)).or_default().insert(pair);
        };
        for (from, to) in &pairs {
            let priority = if within(to) { INSIDE } else { PROTECTED };
            add(priority, None, Action::Lookup(TABLE), (*from, *to));
            for interface in &self.wans {
                add(FROM_WAN, Some(interface.as_str()), Action::Blackhole, (*to, *from));
            }
        }
        for pair in exemptions(&pairs, &all) {
            add(EXEMPT, None, Action::LookupNoDefault(MAIN_TABLE), pair);
        }
        let mut rules = BTreeSet::new();
        for ((priority, input, action), pairs) in kinds {
            rules.extend(merge::pairs(pairs).into_iter().map(|(from, to)| Rule {
                priority,
                from: Some(from),
                to: Some(to),
                input: input.map(str::to_owned),
                traffic: None,
                action,
            }));
        }
        for (from, to) in &self.links {
            if pairs.iter().any(|(local, remote)| local.covers(from) && remote.covers(to)) {
                rules.insert(Rule {
                    priority: OWN,
                    from: Some(*from),
                    to: Some(*to),
                    input: Some("lo".to_owned()),
                    traffic: None,
                    action: Action::Lookup(MAIN_TABLE),
                });
            }
        }
        let remotes: BTreeSet<Prefix> = pairs.iter().map(|(_, remote)| *remote).collect();
        let meets_outside = |remote: &&Prefix| {
            let next = self.outside.range(remote.address()..).next();
            next.is_some_and(|address| remote.covers(&Prefix::host(*address)))
        };
        let shown = remotes.iter().filter(|remote| !meets_outside(remote)).copied().collect();
        Protection { rules, remotes: merge::union(remotes), shown }
    }
}

/// Rules that differ in nothing but their networks.
type Kind<'a> = (u32, Option<&'a str>, Action);

/// The rules and routes of a set of pairs of networks between which nothing may pass in clear.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Protection {
    rules: BTreeSet<Rule>,
    /// In table T, few.
    remotes: Vec<Prefix>,
    /// In `main`, each by itself.
    shown: Vec<Prefix>,
}

impl Protection {
    /// Of the whole configuration.
    #[must_use]
    pub fn of(config: &Config) -> Self {
        Networks::of(config).protection(&BTreeSet::new())
    }

    /// Sets the rules and blackholes that keep protected traffic from passing in clear, daemon or no daemon.
    /// Idempotent. The blackholes come first: a rule never leads to where nothing stops.
    pub async fn set(&self, netlink: &Netlink) -> io::Result<()> {
        for route in self.blackholes() {
            netlink.set_route(&route).await?;
        }
        for rule in &self.rules {
            netlink.add_rule(rule).await?;
        }
        Ok(())
    }

    /// Leads the networks into the TUN: in table T for forwarding, and in `main` for redistribution.
    pub async fn lead_into(&self, netlink: &Netlink, tun: u32) -> io::Result<()> {
        for route in self.leads(tun) {
            netlink.set_route(&route).await?;
        }
        Ok(())
    }

    /// Makes it hold where `there` does for certain, and perhaps `perhaps`, and nothing else: what is new comes first,
    /// so what stays protected is so at every moment.
    async fn replace(
        &self,
        there: &Self,
        perhaps: &Self,
        netlink: &Netlink,
        tun: u32,
    ) -> io::Result<()> {
        let routes =
            |of: &Self| -> BTreeSet<Route> { of.leads(tun).chain(of.blackholes()).collect() };
        let wanted = routes(self);
        for route in wanted.difference(&routes(there)) {
            netlink.set_route(route).await?;
        }
        for rule in self.rules.difference(&there.rules) {
            netlink.add_rule(rule).await?;
        }
        for rule in perhaps.rules.difference(&self.rules) {
            netlink.remove_rule(rule).await?;
        }
        for route in routes(perhaps).difference(&wanted) {
            netlink.remove_route(route).await?;
        }
        Ok(())
    }

    /// Both.
    fn extend(&mut self, other: Self) {
        self.rules.extend(other.rules);
        self.remotes.extend(other.remotes);
        self.shown.extend(other.shown);
    }

    fn blackholes(&self) -> impl Iterator<Item = Route> {
        self.remotes.iter().map(|remote| Route {
            destination: *remote,
            table: TABLE,
            target: Target::Blackhole,
            metric: LAST_METRIC,
            source: None,
        })
    }

    fn leads(&self, tun: u32) -> impl Iterator<Item = Route> {
        let lead = move |remote: &Prefix, table| Route {
            destination: *remote,
            table,
            target: Target::Device(tun),
            metric: METRIC,
            source: None,
        };
        let shown = self.shown.iter().map(move |remote| lead(remote, MAIN_TABLE));
        self.remotes.iter().map(move |remote| lead(remote, TABLE)).chain(shown)
    }
}

/// Addresses that this host reaches, or is reached by, outside any tunnel.
fn outside_tunnels(config: &Config) -> BTreeSet<IpAddr> {
    let wans = config.endpoints.iter().flat_map(|endpoint| {
        [Some(endpoint.wan.address), endpoint.wan.gateway].into_iter().flatten()
    });
    let remotes = config.connections.iter().flat_map(|c| &c.remotes);
    let peers = remotes.filter_map(|remote| match remote {
        RemoteAddress::Ip(address) => Some(*address),
        RemoteAddress::Any => None,
    });
    wans.chain(peers).collect()
}

/// Removes what an earlier configuration left and this one does not want: rules and routes with our number. Gives how
/// many routes and rules are gone. Whoever has set what is wanted first never takes a wanted one away, not for a moment.
pub async fn remove_stale(netlink: &Netlink, config: &Config) -> io::Result<(usize, usize)> {
    let protection = Protection::of(config);
    // A route is known by table, destination and metric: the interface does not matter.
    let mut routes: Vec<Route> = protection.leads(0).chain(protection.blackholes()).collect();
    let mut rules: Vec<Rule> = protection.rules.into_iter().collect();
    for endpoint in &config.endpoints {
        if matches!(endpoint.wan.interface.get(usize::from(config.local)), Some(Some(_))) {
            let uplink = uplink(endpoint, 0);
            routes.extend(uplink.0);
            rules.extend(uplink.1);
        }
    }
    netlink.remove_all_but(&rules, &routes).await
}

/// Makes an endpoint's own packets leave by its own uplink.
pub async fn set_uplink(netlink: &Netlink, endpoint: &Endpoint, interface: u32) -> io::Result<()> {
    let (routes, rules) = uplink(endpoint, interface);
    for route in &routes {
        netlink.set_route(route).await?;
    }
    for rule in &rules {
        netlink.add_rule(rule).await?;
    }
    Ok(())
}

/// Whether an uplink works. The kernel takes an interface's routes away when it goes down: who manages the host brings
/// back its own, those of the uplink table are ours. Until they stand the uplink does not work.
pub async fn look_at_uplink(netlink: Netlink, endpoint: Endpoint, interface: String) -> bool {
    let link = match netlink.link(&interface).await {
        Ok(Some(link)) if link.running => link,
        _ => return false,
    };
    match set_uplink(&netlink, &endpoint, link.index).await {
        Ok(()) => true,
        Err(problem) => {
            tracing::warn!(endpoint = endpoint.name, interface, %problem, "the uplink's routes cannot be set");
            false
        }
    }
}

fn uplink(endpoint: &Endpoint, interface: u32) -> (Vec<Route>, Vec<Rule>) {
    let table = UPLINK_TABLE + u32::from(endpoint.id.0);
    let address = endpoint.wan.address;
    let any = if address.is_ipv4() { [0_u8; 4].into() } else { [0_u8; 16].into() };
    let everything = Prefix::new(any, 0);
    let route =
        |destination, target| Route { destination, table, target, metric: METRIC, source: None };
    let mut routes = Vec::new();
    let on_link = match endpoint.wan.gateway {
        Some(gateway) => {
            let target = Target::Gateway { gateway, interface, onlink: true };
            routes.extend(everything.map(|destination| route(destination, target)));
            endpoint.wan.prefix.and_then(|length| Prefix::new(address, length))
        }
        None => everything,
    };
    routes.extend(on_link.map(|destination| route(destination, Target::Device(interface))));
    // The kernel takes the routes above away when the interface goes down. Then nothing leaves from the address, neither
    // by another uplink nor into a tunnel.
    let nowhere =
        |destination| Route { metric: LAST_METRIC, ..route(destination, Target::Blackhole) };
    routes.extend(everything.map(nowhere));
    let rule = Rule {
        priority: UPLINK,
        from: Some(Prefix::host(address)),
        to: None,
        input: None,
        traffic: None,
        action: Action::Lookup(table),
    };
    let own = [Traffic::UdpFrom(500), Traffic::UdpFrom(4500), Traffic::Esp].map(|traffic| Rule {
        priority: OWN,
        input: Some("lo".to_owned()),
        traffic: Some(traffic),
        ..rule.clone()
    });
    (routes, own.into_iter().chain([rule]).collect())
}

#[cfg(test)]
mod tests;
