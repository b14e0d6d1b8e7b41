//! Who is there: the pair `left` and `right` with one endpoint, and lone gateways as its peers; their configurations.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use crypto::Secret;
use gateway::config::{
    Config, ConnectionParts, EndpointParts, HomeComing, Instance, OnFailure, PairParts, PairTimers,
    Parts, WanParts,
};
use ike::config::{
    ChildConfig, ConnectionConfig, Encap, Limits, RemoteAddress, Retransmit, Start, Timers,
};
use wire::id::ConnectionId;
use wire::ts::{AddrRange, TrafficSelector};

use crate::dice::Dice;

/// The pair's virtual address.
pub const VIRTUAL: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);

/// WAN address of a peer.
#[must_use]
pub fn peer_address(peer: usize) -> Ipv4Addr {
    Ipv4Addr::new(198, 51, 100, 7 + peer as u8)
}

/// Which peer has an address.
#[must_use]
pub fn peer_of(address: IpAddr, peers: usize) -> Option<usize> {
    (0..peers).find(|peer| IpAddr::V4(peer_address(*peer)) == address)
}

/// A host behind the pair.
pub const INSIDE: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 5);

/// A host behind a peer.
#[must_use]
pub fn beyond(peer: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 2 + peer as u8, 0, 5)
}

/// What a seed decides about the scene.
#[derive(Debug, Clone)]
pub struct Scene {
    /// How many peers.
    pub peers: usize,
    /// Pair links.
    pub links: usize,
    /// The instance that is the endpoint's home.
    pub home: u8,
    /// Per peer: whether the pair initiates, or else the peer.
    pub pair_initiates: Vec<bool>,
    /// New SAs begin close to the end of their first lease, as if after a burst: so that leases matter at this rate of
    /// packets. Then packets may be lost while the lease waits for a shadow that is gone.
    pub tight_leases: bool,
    /// Times of the pair protocol.
    pub timers: PairTimers,
    pair_ike: Timers,
    peer_ike: Timers,
    ike_proposal: &'static str,
    esp_proposal: &'static str,
}

const IKE_PROPOSALS: [&str; 3] = [
    "aes128gcm16-prfsha256-x25519",
    "aes256gcm16-prfsha384-x25519",
    "chacha20poly1305-prfsha512-x25519",
];
const ESP_PROPOSALS: [&str; 4] =
    ["aes128gcm16-x25519", "aes256gcm16", "chacha20poly1305-x25519", "aes128gcm16"];

fn lifetimes(dice: &mut Dice) -> Timers {
    Timers {
        ike_rekey: Duration::from_millis(dice.between(8_000, 25_000)),
        child_rekey: Duration::from_millis(dice.between(6_000, 20_000)),
        jitter_percent: 30,
        // After a takeover by silence nobody rekeys for ten seconds (ha.md): the SAs must live through that.
        overtime_percent: 250,
        dpd: Duration::from_millis(dice.between(2_000, 8_000)),
        keepalive: Duration::from_secs(5),
        retransmit: Retransmit {
            // Dead after 10 to 16 s: longer than any single fault lasts, shorter than the simulation waits.
            initial: Duration::from_millis(dice.between(300, 600)),
            factor_percent: 150,
            max: Duration::from_secs(4),
            tries: 6,
        },
        retry: Duration::from_millis(500),
        retry_max: Duration::from_secs(2),
    }
}

impl Scene {
    /// Draws one.
    #[must_use]
    pub fn draw(dice: &mut Dice) -> Self {
        let peers = if dice.chance(300) { 2 } else { 1 };
        Self {
            peers,
            links: if dice.chance(850) { 2 } else { 1 },
            home: dice.below(2) as u8,
            tight_leases: dice.chance(600),
            pair_initiates: (0..peers).map(|_| dice.chance(500)).collect(),
            timers: PairTimers {
                boot_wait: Duration::from_millis(dice.between(1_500, 3_500)),
                ..PairTimers::default()
            },
            pair_ike: lifetimes(dice),
            peer_ike: lifetimes(dice),
            ike_proposal: dice.pick(&IKE_PROPOSALS).unwrap_or(IKE_PROPOSALS[0]),
            esp_proposal: dice.pick(&ESP_PROPOSALS).unwrap_or(ESP_PROPOSALS[0]),
        }
    }

    /// Whether the peer sees one instance only as long as this link works.
    #[must_use]
    pub fn single_link(&self) -> bool {
        self.links == 1
    }

    /// The configuration of an instance of the pair, 0 or 1.
    ///
    /// # Errors
    /// What the gateway's own checks found.
    pub fn instance(&self, index: u8) -> Result<Config, String> {
        let link = |host: u8, n: usize| SocketAddr::from(([172, 31, n as u8, host + 1], 4600));
        let instance = |index: u8| Instance {
            name: name_of(usize::from(index)),
            index,
            links: (0..self.links).map(|n| link(index, n)).collect(),
        };
        let instances = vec![instance(0), instance(1)];
        let interface = instances.iter().map(|i| (i.name.clone(), "eth0".to_owned())).collect();
        let connections = (0..self.peers)
            .map(|peer| ConnectionParts {
                endpoints: vec!["main".into()],
                remotes: RemoteAddress::Ip(peer_address(peer).into()).into(),
                ike: self.connection(peer, true),
            })
            .collect();
        made(Parts {
            local: name_of(usize::from(index)),
            pair: Some(PairParts { timers: self.timers, digest_key: Secret::from_slice(&[7; 32]) }),
            instances,
            endpoints: vec![endpoint(&name_of(usize::from(self.home)), VIRTUAL, interface)],
            connections,
            limits: limits(),
            keylog: false,
        })
    }

    /// The configuration of a peer.
    ///
    /// # Errors
    /// What the gateway's own checks found.
    pub fn peer(&self, peer: usize) -> Result<Config, String> {
        let name = name_of(2 + peer);
        made(Parts {
            local: name.clone(),
            pair: None,
            instances: vec![Instance { name: name.clone(), index: 0, links: Vec::new() }],
            endpoints: vec![endpoint(
                &name,
                peer_address(peer),
                BTreeMap::from([(name.clone(), "eth0".to_owned())]),
            )],
            connections: vec![ConnectionParts {
                endpoints: vec!["main".into()],
                remotes: RemoteAddress::Ip(VIRTUAL.into()).into(),
                ike: self.connection(peer, false),
            }],
            limits: limits(),
            keylog: false,
        })
    }

    fn connection(&self, peer: usize, of_pair: bool) -> ConnectionConfig {
        let ours = fqdn("gw.example");
        let theirs = fqdn(&format!("peer{peer}.example"));
        let (local, remote) = (ts(INSIDE), ts(beyond(peer)));
        let (local_id, remote_id) = if of_pair { (ours, theirs) } else { (theirs, ours) };
        let (local_ts, remote_ts) = if of_pair { (local, remote) } else { (remote, local) };
        let initiates = self.pair_initiates.get(peer).copied().unwrap_or(false) == of_pair;
        let remote_address = if of_pair { peer_address(peer) } else { VIRTUAL };
        ConnectionConfig {
            name: connection_name(peer),
            id: ConnectionId(0),
            local_address: IpAddr::V4(if of_pair { VIRTUAL } else { peer_address(peer) }),
            remote_address: RemoteAddress::Ip(remote_address.into()),
            local_id,
            remote_id,
            psk: Secret::from_slice(format!("a long pre-shared key for peer {peer}").as_bytes()),
            ike_proposals: ike::proposal::parse_ike(&[self.ike_proposal]).unwrap_or_default(),
            children: vec![ChildConfig {
                name: "net".into(),
                local_ts: vec![local_ts],
                remote_ts: vec![remote_ts],
                esp_proposals: ike::proposal::parse_esp(&[self.esp_proposal]).unwrap_or_default(),
                start: if initiates { Start::Initiate } else { Start::Respond },
            }],
            encap: Encap::Auto,
            timers: if of_pair { self.pair_ike } else { self.peer_ike },
            initial_contact: true,
        }
    }
}

/// The name of a connection, the same on both sides.
#[must_use]
pub fn connection_name(peer: usize) -> String {
    format!("branch{peer}")
}

/// The name of a host: two instances, then peers.
#[must_use]
pub fn name_of(host: usize) -> String {
    match host {
        0 => "left".into(),
        1 => "right".into(),
        peer => format!("peer{}", peer - 2),
    }
}

fn fqdn(name: &str) -> ike::Identity {
    // A name with a dot and nothing else is always an FQDN.
    name.parse().unwrap_or_else(|_| ike::Identity::address(VIRTUAL.into()))
}

/// The /24 around a host.
fn ts(host: Ipv4Addr) -> TrafficSelector {
    let [a, b, c, _] = host.octets();
    let range =
        AddrRange::new(Ipv4Addr::new(a, b, c, 0).into(), Ipv4Addr::new(a, b, c, 255).into());
    TrafficSelector::all(range.unwrap_or(AddrRange::ALL_V4))
}

fn endpoint(home: &str, address: Ipv4Addr, interface: BTreeMap<String, String>) -> EndpointParts {
    EndpointParts {
        name: "main".into(),
        home: home.into(),
        wan: WanParts { address: address.into(), prefix: Some(24), gateway: None, interface },
        lan: None,
        on_failure: OnFailure::Adopt,
        weight: 1,
        // The simulation moves endpoints by its own plan.
        home_coming: HomeComing { preempt: false, ..HomeComing::default() },
    }
}

fn limits() -> Limits {
    // A restarting pair is no attacker to its peers, but looks like one.
    Limits { cookie_per_source: 3, ..Limits::default() }
}

fn made(parts: Parts) -> Result<Config, String> {
    match Config::new(parts) {
        Ok((config, _)) => Ok(config),
        Err(findings) => Err(format!("{findings:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_scene_passes_the_gateways_own_checks() {
        for seed in 0..50 {
            let scene = Scene::draw(&mut Dice::new(seed, 1));
            for index in 0..2 {
                scene.instance(index).unwrap();
            }
            for peer in 0..scene.peers {
                scene.peer(peer).unwrap();
            }
        }
    }
}
