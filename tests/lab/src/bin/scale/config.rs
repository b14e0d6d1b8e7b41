//! The configurations: N connections of a pair, the same N seen from the peer, and which address lies behind which.
//!
//! The networks behind the peer are equal parts of 10.64.0.0/10: all of it behind one tunnel, a /24 behind each of ten
//! thousand.

use lab::charon::{ChildConf, Conn};
use lab::net;
use lab::tandem::{Child, Config, Connection};
use std::net::Ipv4Addr;

/// What lies behind the peer.
pub(crate) const BEHIND: &str = "10.64.0.0/10";
const FIRST: u32 = 0x0a40_0000;
const FIRST_BITS: u32 = 10;
/// As many as a configuration may have.
pub(crate) const MAX_TUNNELS: u32 = 10_000;
/// Flows that are sent, whatever the number of tunnels.
pub(crate) const FLOWS: u32 = 10_000;
/// Flows that are sent through one tunnel alone: a /24 has no more hosts.
pub(crate) const FLOWS_OF_ONE: u32 = 254;

/// Bits of a tunnel's network, of so many.
fn prefix(tunnels: u32) -> u32 {
    FIRST_BITS + tunnels.next_power_of_two().trailing_zeros()
}

fn network(tunnels: u32, tunnel: u32) -> String {
    let bits = prefix(tunnels);
    format!("{}/{bits}", Ipv4Addr::from(FIRST + (tunnel << (32 - bits))))
}

/// Where a flow goes: to the tunnels in turn, in each to its hosts in turn.
pub(crate) fn address(tunnels: u32, flow: u32) -> Ipv4Addr {
    let (tunnel, host) = (flow % tunnels, flow / tunnels);
    let size = 1_u32 << (32 - prefix(tunnels));
    Ipv4Addr::from(FIRST + tunnel * size + 1 + host % (size - 2))
}

/// The gateway's own address in a tunnel's network, where no flow goes.
pub(crate) fn gateway(tunnels: u32, tunnel: u32) -> Ipv4Addr {
    let size = 1_u32 << (32 - prefix(tunnels));
    Ipv4Addr::from(FIRST + tunnel * size + size - 1)
}

/// The destinations over all tunnels.
pub(crate) fn over_all(tunnels: u32) -> Vec<Ipv4Addr> {
    (0..FLOWS.max(tunnels)).map(|flow| address(tunnels, flow)).collect()
}

/// The destinations over the first tunnel alone.
pub(crate) fn over_one(tunnels: u32) -> Vec<Ipv4Addr> {
    (0..FLOWS_OF_ONE).map(|host| address(tunnels, host * tunnels)).collect()
}

/// A destination of each tunnel.
pub(crate) fn one_each(tunnels: u32) -> Vec<Ipv4Addr> {
    (0..tunnels).map(|tunnel| address(tunnels, tunnel)).collect()
}

fn name(tunnel: u32) -> String {
    format!("t{tunnel:05}")
}

fn peer_id(tunnel: u32) -> String {
    format!("{}.example", name(tunnel))
}

fn psk(tunnel: u32) -> String {
    format!("the shared secret of tunnel {tunnel:05}")
}

fn connection(tunnels: u32, tunnel: u32) -> Connection {
    let branch = lab::tandem::branch();
    let of_branch = branch.children.into_iter().next();
    let children =
        of_branch.map(|child| Child { remote_ts: vec![network(tunnels, tunnel)], ..child });
    Connection {
        name: name(tunnel),
        remote_id: peer_id(tunnel),
        psk: psk(tunnel),
        children: children.into_iter().collect(),
        ..lab::tandem::branch()
    }
}

/// The pair's.
pub(crate) fn pair(tunnels: u32) -> Config {
    let connections = (0..tunnels).map(|tunnel| connection(tunnels, tunnel)).collect();
    Config { connections, ..Config::pair() }
}

/// The lone peer's: it initiates all of them.
pub(crate) fn peer(tunnels: u32) -> Config {
    let mirrored = |tunnel| {
        let mut connection = connection(tunnels, tunnel);
        std::mem::swap(&mut connection.local_id, &mut connection.remote_id);
        connection.remote_address = net::VIRTUAL_WAN.into();
        for child in &mut connection.children {
            std::mem::swap(&mut child.local_ts, &mut child.remote_ts);
            child.start = "initiate".into();
        }
        connection
    };
    Config { connections: (0..tunnels).map(mirrored).collect(), ..Config::remote() }
}

/// The same for strongSwan.
pub(crate) fn strongswan(tunnels: u32) -> Vec<Conn> {
    let mirrored = |tunnel| {
        let base = lab::baseline::peer_conn(&psk(tunnel));
        let children = base.children.iter().map(|child| ChildConf {
            name: name(tunnel),
            local_ts: vec![network(tunnels, tunnel)],
            ..child.clone()
        });
        Conn { name: name(tunnel), local_id: peer_id(tunnel), children: children.collect(), ..base }
    };
    (0..tunnels).map(mirrored).collect()
}

/// The name of a tunnel's child at strongSwan.
pub(crate) fn child_name(tunnel: u32) -> String {
    name(tunnel)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn inside(address: Ipv4Addr, network: &str) -> bool {
        let (base, bits) = network.split_once('/').unwrap();
        let base: Ipv4Addr = base.parse().unwrap();
        let shift = 32 - bits.parse::<u32>().unwrap();
        u32::from(address) >> shift == u32::from(base) >> shift
    }

    #[test]
    fn each_flow_lies_behind_its_tunnel_and_no_other() {
        for tunnels in [1, 3, 100, 1000, 10_000] {
            let all = over_all(tunnels);
            assert_eq!(all.len(), 10_000);
            let of = |tunnel| gateway(tunnels, tunnel);
            assert!((0..tunnels).all(|tunnel| inside(of(tunnel), &network(tunnels, tunnel))));
            let flows: BTreeSet<_> = all.iter().collect();
            assert!((0..tunnels).all(|tunnel| !flows.contains(&of(tunnel))));
            assert_eq!(flows.len(), all.len(), "{tunnels}");
            for (flow, address) in (0..).zip(&all) {
                assert!(
                    inside(*address, BEHIND) && inside(*address, &network(tunnels, flow % tunnels))
                );
            }
            let one = over_one(tunnels);
            assert!(one.iter().all(|address| inside(*address, &network(tunnels, 0))));
            assert_eq!(one.iter().collect::<BTreeSet<_>>().len(), one.len(), "{tunnels}");
            assert_eq!(one_each(tunnels).len(), tunnels as usize);
        }
        assert_eq!(network(10_000, 9_999), "10.103.15.0/24");
    }
}
