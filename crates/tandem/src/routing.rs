//! Routes and rules: what must outlive the process, what must die with it (architecture.md, "Addresses live and die
//! with the process").
//!
//! ```text
//!  priority  rule                                  lives
//!   90       iif WAN from REMOTE to LOCAL drop     beyond the process   no protected packet comes in clear
//!  100       from LOCAL to REMOTE lookup T         beyond the process   no protected packet leaves in clear:
//!              T: REMOTE dev TUN                   with the TUN           while the daemon runs
//!              T: REMOTE blackhole, last metric    beyond the process     when it does not
//!  110       from VIP lookup U                     beyond the process   each endpoint leaves by its own uplink
//! ```
//!
//! `tandem protect` sets what outlives the process before the network comes up (deploy/install), the daemon repeats it
//! at its start. `tandem down CONNECTION --purge` takes away what no other connection needs, `tandem protect --remove`
//! all of it.

use std::io;

use gateway::config::{Config, Endpoint};
use netio::route::{Action, LAST_METRIC, MAIN_TABLE, Netlink, Prefix, Route, Rule, Target};
use wire::ts::Cidr;

/// Table T: the protected networks.
pub const TABLE: u32 = 4116;
/// Table U of endpoint 0; the others follow.
pub const UPLINK_TABLE: u32 = 4200;
/// Rules against clear text from the WAN.
const FROM_WAN: u32 = 90;
/// Rules into table T.
const PROTECTED: u32 = 100;
/// Rules into the uplink tables.
const UPLINK: u32 = 110;
/// Metric of the routes into the TUN.
const METRIC: u32 = 64;

/// WAN interfaces of this instance, each once.
fn wan_interfaces(config: &Config) -> Vec<String> {
    let mut names: Vec<String> = config
        .endpoints
        .iter()
        .filter_map(|e| e.wan.interface.get(usize::from(config.local))?.clone())
        .collect();
    names.sort();
    names.dedup();
    names
}

/// The rules and routes of a set of pairs of networks between which nothing may pass in clear.
#[derive(Debug, Clone)]
pub struct Protection {
    rules: Vec<Rule>,
    remotes: Vec<Prefix>,
}

impl Protection {
    /// Of the whole configuration.
    #[must_use]
    pub fn of(config: &Config) -> Self {
        Self::of_pairs(config, &config.protected_pairs(), &[])
    }

    /// What one connection has to itself: taking it away leaves every other connection protected.
    #[must_use]
    pub fn of_connection(config: &Config, name: &str) -> Self {
        let own = config.own_pairs(name);
        let rest: Vec<(Cidr, Cidr)> =
            config.protected_pairs().into_iter().filter(|pair| !own.contains(pair)).collect();
        Self::of_pairs(config, &own, &rest)
    }

    /// `others`: pairs whose remote networks keep their routes.
    fn of_pairs(config: &Config, pairs: &[(Cidr, Cidr)], others: &[(Cidr, Cidr)]) -> Self {
        let prefix = |cidr: &Cidr| Prefix::new(cidr.addr(), cidr.prefix());
        let wans = wan_interfaces(config);
        let (mut rules, mut remotes) = (Vec::new(), Vec::new());
        for (local, remote) in pairs {
            let (Some(from), Some(to)) = (prefix(local), prefix(remote)) else { continue };
            rules.push(Rule {
                priority: PROTECTED,
                from: Some(from),
                to: Some(to),
                input: None,
                action: Action::Lookup(TABLE),
            });
            rules.extend(wans.iter().map(|interface| Rule {
                priority: FROM_WAN,
                from: Some(to),
                to: Some(from),
                input: Some(interface.clone()),
                action: Action::Blackhole,
            }));
            if !remotes.contains(&to) && !others.iter().any(|(_, other)| other == remote) {
                remotes.push(to);
            }
        }
        Self { rules, remotes }
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

    /// Takes away what [`Protection::set`] and [`Protection::lead_into`] set.
    pub async fn remove(&self, netlink: &Netlink, tun: u32) -> io::Result<()> {
        for rule in &self.rules {
            netlink.remove_rule(rule).await?;
        }
        for route in self.leads(tun).chain(self.blackholes()) {
            netlink.remove_route(&route).await?;
        }
        Ok(())
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
        self.remotes.iter().flat_map(move |remote| {
            [TABLE, MAIN_TABLE].map(|table| Route {
                destination: *remote,
                table,
                target: Target::Device(tun),
                metric: METRIC,
                source: None,
            })
        })
    }
}

/// Makes an endpoint's own packets leave by its own uplink.
pub async fn set_uplink(netlink: &Netlink, endpoint: &Endpoint, interface: u32) -> io::Result<()> {
    let table = UPLINK_TABLE + u32::from(endpoint.id.0);
    let address = endpoint.wan.address;
    let any = if address.is_ipv4() { [0_u8; 4].into() } else { [0_u8; 16].into() };
    let everything = Prefix::new(any, 0);
    let on_link = match endpoint.wan.gateway {
        Some(gateway) => {
            if let Some(destination) = everything {
                let target = Target::Gateway { gateway, interface, onlink: true };
                netlink
                    .set_route(&Route { destination, table, target, metric: METRIC, source: None })
                    .await?;
            }
            endpoint.wan.prefix.and_then(|length| Prefix::new(address, length))
        }
        None => everything,
    };
    if let Some(destination) = on_link {
        let target = Target::Device(interface);
        netlink
            .set_route(&Route { destination, table, target, metric: METRIC, source: None })
            .await?;
    }
    let rule = Rule {
        priority: UPLINK,
        from: Some(Prefix::host(address)),
        to: None,
        input: None,
        action: Action::Lookup(table),
    };
    netlink.add_rule(&rule).await
}
