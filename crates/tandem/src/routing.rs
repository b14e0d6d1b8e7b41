//! Routes and rules: what must outlive the process, what must die with it (architecture.md, "Addresses live and die
//! with the process").
//!
//! ```text
//!  priority  rule                                  lives
//!   90       iif WAN from REMOTE to LOCAL drop     beyond the process   no protected packet comes in clear
//!  100       from LOCAL to REMOTE lookup T         beyond the process   no protected packet leaves in clear:
//!              T: REMOTE dev TUN                   with the TUN           while the daemon runs
//!              T: REMOTE blackhole, last metric    beyond the process     when it does not
//!  110       from VIP lookup U                     with the daemon      each endpoint leaves by its own uplink
//! ```
//!
//! `tandem protect` sets what outlives the process before the network comes up (deploy/install), the daemon repeats it
//! at its start, `tandem down --purge` takes all of it away.

use std::io;

use gateway::config::{Config, Endpoint};
use netio::route::{Action, LAST_METRIC, MAIN_TABLE, Netlink, Prefix, Route, Rule, Target};

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

/// The pairs of networks between which nothing may pass in clear.
fn pairs(config: &Config) -> Vec<(Prefix, Prefix)> {
    let prefix = |cidr: &wire::ts::Cidr| Prefix::new(cidr.addr(), cidr.prefix());
    config
        .protected_pairs()
        .iter()
        .filter_map(|(local, remote)| Some((prefix(local)?, prefix(remote)?)))
        .collect()
}

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

/// Sets the rules and blackholes that keep protected traffic from passing in clear, daemon or no daemon. Idempotent.
pub async fn protect(netlink: &Netlink, config: &Config) -> io::Result<()> {
    for (local, remote) in pairs(config) {
        let blackhole = Route {
            destination: remote,
            table: TABLE,
            target: Target::Blackhole,
            metric: LAST_METRIC,
            source: None,
        };
        netlink.set_route(&blackhole).await?;
        let into_table = Rule {
            priority: PROTECTED,
            from: Some(local),
            to: Some(remote),
            input: None,
            action: Action::Lookup(TABLE),
        };
        netlink.add_rule(&into_table).await?;
        for interface in wan_interfaces(config) {
            let from_wan = Rule {
                priority: FROM_WAN,
                from: Some(remote),
                to: Some(local),
                input: Some(interface),
                action: Action::Blackhole,
            };
            netlink.add_rule(&from_wan).await?;
        }
    }
    Ok(())
}

/// Leads the protected networks into the TUN: in table T for forwarding, and in `main` for redistribution.
pub async fn lead_into_tun(netlink: &Netlink, config: &Config, tun: u32) -> io::Result<()> {
    for (_, remote) in pairs(config) {
        for table in [TABLE, MAIN_TABLE] {
            let route = Route {
                destination: remote,
                table,
                target: Target::Device(tun),
                metric: METRIC,
                source: None,
            };
            netlink.set_route(&route).await?;
        }
    }
    Ok(())
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
