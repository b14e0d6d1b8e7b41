//! The validated configuration: what the sans-IO gateway is told once, at its start.
//!
//! [`Config::new`] takes [`Parts`], names and all, as an operator wrote them, and either refuses them with
//! every [`Finding`] at once or returns a value whose cross-references are resolved to dense ids that are
//! the same on both hosts (names sorted). Nothing here reads a file: `tandem::config_file` does, and uses
//! the findings' paths to point at the text.
//!
//! The pair's secret is not in here; the link that needs it gets it separately.

mod check;
mod digest;
mod remotes;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use crypto::Secret;
use ike::config::{ConnectionConfig, EndpointConfig, Limits, RemoteAddress};
use wire::id::{ConnectionId, EndpointId};
use wire::ts::Cidr;

pub use remotes::{MAX_REMOTES, Remotes};

/// Most endpoints of a pair.
pub const MAX_ENDPOINTS: usize = 32;
/// Most connections of a pair.
pub const MAX_CONNECTIONS: usize = 10_000;

/// What an operator wrote, parsed but not yet checked against itself.
#[derive(Debug)]
pub struct Parts {
    /// Name of the instance that this daemon is.
    pub local: String,
    /// The pair's settings; `None` for a gateway on its own.
    pub pair: Option<PairParts>,
    /// One instance, or two for a pair.
    pub instances: Vec<Instance>,
    /// In any order.
    pub endpoints: Vec<EndpointParts>,
    /// In any order. The id and the addresses within `ike` are ignored: [`Config::new`] sets them.
    pub connections: Vec<ConnectionParts>,
    /// Bounds under attack.
    pub limits: Limits,
    /// Whether IKE hands out lines for a key log (gives every key away).
    pub keylog: bool,
}

/// The settings of the pair as a whole.
#[derive(Debug)]
pub struct PairParts {
    /// The protocol's times.
    pub timers: PairTimers,
    /// Keys the hashes by which pre-shared keys enter the digest, so that the digest is no oracle for
    /// guessing them: 32 bytes derived from the pair's secret.
    pub digest_key: Secret,
}

/// One instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instance {
    /// Its name: `left`.
    pub name: String,
    /// 0 takes even terms, 1 takes odd ones.
    pub index: u8,
    /// Its end of every heartbeat path, in an order both instances share.
    pub links: Vec<SocketAddr>,
}

/// An endpoint by names.
#[derive(Clone, Debug)]
pub struct EndpointParts {
    /// Its name: `main`.
    pub name: String,
    /// Instance that serves it when both are well.
    pub home: String,
    /// The side that peers see.
    pub wan: WanParts,
    /// The side that our hosts see.
    pub lan: Option<LanParts>,
    /// What becomes of it when its owner dies.
    pub on_failure: OnFailure,
    /// Its tunnels' share of their connections' flows.
    pub weight: u32,
    /// How it comes home.
    pub home_coming: HomeComing,
}

/// How an endpoint that the other instance owns comes back to its home.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HomeComing {
    /// By itself, or only when an operator asks.
    pub preempt: bool,
    /// How long its home must have been ready before.
    pub hold_down: Duration,
}

impl Default for HomeComing {
    fn default() -> Self {
        Self { preempt: true, hold_down: Duration::from_secs(30) }
    }
}

/// WAN side of an endpoint by names.
#[derive(Clone, Debug)]
pub struct WanParts {
    /// The virtual address.
    pub address: IpAddr,
    /// Length of its network's prefix, if the operator gave it.
    pub prefix: Option<u8>,
    /// Next hop for everything that leaves from the address.
    pub gateway: Option<IpAddr>,
    /// The interface on this segment, by instance.
    pub interface: BTreeMap<String, String>,
}

/// LAN side of an endpoint by names.
#[derive(Clone, Debug)]
pub struct LanParts {
    /// The virtual addresses, next hops of our hosts: one of each family at most.
    pub addresses: Vec<IpAddr>,
    /// The interface on this segment, by instance.
    pub interface: BTreeMap<String, String>,
}

/// A connection with its endpoints by name.
#[derive(Debug)]
pub struct ConnectionParts {
    /// Endpoints where it is served.
    pub endpoints: Vec<String>,
    /// Where the remote gateway is.
    pub remotes: Remotes,
    /// Everything else that IKE has to know.
    pub ike: ConnectionConfig,
}

/// The pair protocol's times (ha.md).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PairTimers {
    /// Between two heartbeats.
    pub heartbeat: Duration,
    /// Silence on every link after which the other instance counts as dead.
    pub dead_after: Duration,
    /// For how long an owner may send after its newest echoed heartbeat.
    pub fence_after: Duration,
    /// How long a starting instance without state waits for contact.
    pub boot_wait: Duration,
}

impl Default for PairTimers {
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_millis(20),
            dead_after: Duration::from_millis(100),
            fence_after: Duration::from_millis(80),
            boot_wait: Duration::from_secs(10),
        }
    }
}

/// What becomes of an endpoint when its owner dies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnFailure {
    /// The other instance takes it over, addresses and all.
    #[default]
    Adopt,
    /// Its tunnels go down and its flows move to other endpoints.
    Withdraw,
}

/// The configuration, checked.
///
/// Read freely; only [`Config::new`] makes one.
#[derive(Debug)]
#[non_exhaustive]
pub struct Config {
    /// Index of the instance that this daemon is: 0 or 1.
    pub local: u8,
    /// The pair, if there is one.
    pub pair: Option<Pair>,
    /// Sorted by index.
    pub instances: Vec<Instance>,
    /// Sorted by name; the position is the [`EndpointId`].
    pub endpoints: Vec<Endpoint>,
    /// Sorted by the operator's name; the position is the [`ConnectionId`].
    pub connections: Vec<Connection>,
    /// Bounds under attack.
    pub limits: Limits,
    /// Whether IKE hands out lines for a key log.
    pub keylog: bool,
    digest: [u8; 32],
}

/// The other instance and the ways to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pair {
    /// Index of the other instance.
    pub peer: u8,
    /// The protocol's times.
    pub timers: PairTimers,
    /// Heartbeat paths: at least one.
    pub links: Vec<Link>,
}

/// One heartbeat path, as seen from this instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// Where we bind.
    pub local: SocketAddr,
    /// Where the other instance is.
    pub remote: SocketAddr,
}

/// One endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Position among the sorted names.
    pub id: EndpointId,
    /// Its name.
    pub name: String,
    /// Index of its home instance.
    pub home: u8,
    /// The side that peers see.
    pub wan: Wan,
    /// The side that our hosts see.
    pub lan: Option<Lan>,
    /// What becomes of it when its owner dies.
    pub on_failure: OnFailure,
    /// Its tunnels' share of their connections' flows.
    pub weight: u32,
    /// How it comes home.
    pub home_coming: HomeComing,
}

/// WAN side of an endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wan {
    /// The virtual address.
    pub address: IpAddr,
    /// Length of its network's prefix in bits, if known: then neighbours are reached directly.
    pub prefix: Option<u8>,
    /// Next hop for everything else that leaves from the address; `None`: everybody is on this segment.
    pub gateway: Option<IpAddr>,
    /// The interface on this segment, by instance index.
    pub interface: [Option<String>; 2],
}

/// LAN side of an endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lan {
    /// The virtual addresses: one of each family at most.
    pub addresses: Vec<IpAddr>,
    /// The interface on this segment, by instance index.
    pub interface: [Option<String>; 2],
}

/// One connection.
#[derive(Debug)]
pub struct Connection {
    /// As the operator calls it: several share a name where a remote gateway has several addresses ([`Remotes`]).
    pub name: String,
    /// The first of those that share the name: flows are pinned to the tunnels of all.
    pub group: ConnectionId,
    /// Endpoints where it is served, sorted, at least one.
    pub endpoints: Vec<EndpointId>,
    /// Where the remote gateway is, for each of them.
    pub remotes: Vec<RemoteAddress>,
    /// Everything that IKE has to know, with the addresses of the first endpoint ([`Config::ike_endpoint`] puts in the
    /// right ones for each) and a name of its own.
    pub ike: ConnectionConfig,
}

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// The configuration is refused.
    Error,
    /// It is taken, but something will not work as well as it could.
    Warning,
}

/// One thing that is wrong with a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// How bad.
    pub severity: Severity,
    /// Dotted path of the setting, by names: `endpoints.main.wan.address`.
    pub at: String,
    /// What is wrong, one line.
    pub text: String,
    /// What was expected there.
    pub expected: String,
    /// What to do about it.
    pub hint: Option<String>,
}

impl Config {
    /// Checks the parts against each other and resolves their names.
    ///
    /// Returns the configuration with what is worth a warning.
    ///
    /// # Errors
    /// Every finding, warnings included, when at least one of them is an error.
    pub fn new(mut parts: Parts) -> Result<(Self, Vec<Finding>), Vec<Finding>> {
        parts.instances.sort_by_key(|i| i.index);
        parts.endpoints.sort_by(|a, b| a.name.cmp(&b.name));
        parts.connections.sort_by(|a, b| a.ike.name.cmp(&b.ike.name));
        let findings = check::all(&parts);
        if findings.iter().any(|f| f.severity == Severity::Error) {
            return Err(findings);
        }
        match Self::resolve(parts) {
            Some(config) => Ok((config, findings)),
            // Every name was checked above; a miss here would be a gap in `check`, so it must be loud.
            None => Err(vec![Finding {
                severity: Severity::Error,
                at: String::new(),
                text: "a name passed the checks but cannot be resolved".into(),
                expected: "please report this configuration as a bug".into(),
                hint: None,
            }]),
        }
    }

    fn resolve(parts: Parts) -> Option<Self> {
        let digest = digest::of(&parts);
        let index_of =
            |name: &str| parts.instances.iter().find(|i| i.name == name).map(|i| i.index);
        let by_index = |map: &BTreeMap<String, String>| {
            let mut interface = [None, None];
            for (name, device) in map {
                *interface.get_mut(usize::from(index_of(name)?))? = Some(device.clone());
            }
            Some(interface)
        };
        let local = index_of(&parts.local)?;
        let pair = match parts.pair {
            None => None,
            Some(pair) => {
                let us = parts.instances.iter().find(|i| i.index == local)?;
                let them = parts.instances.iter().find(|i| i.index != local)?;
                let ends = us.links.iter().zip(&them.links);
                let links = ends.map(|(l, r)| Link { local: *l, remote: *r }).collect();
                Some(Pair { peer: them.index, timers: pair.timers, links })
            }
        };
        let mut endpoints = Vec::new();
        for (position, part) in parts.endpoints.iter().enumerate() {
            let lan = match &part.lan {
                Some(lan) => Some(Lan {
                    addresses: lan.addresses.clone(),
                    interface: by_index(&lan.interface)?,
                }),
                None => None,
            };
            endpoints.push(Endpoint {
                id: EndpointId(u8::try_from(position).ok()?),
                name: part.name.clone(),
                home: index_of(&part.home)?,
                wan: Wan {
                    address: part.wan.address,
                    prefix: part.wan.prefix,
                    gateway: part.wan.gateway,
                    interface: by_index(&part.wan.interface)?,
                },
                lan,
                on_failure: part.on_failure,
                weight: part.weight,
                home_coming: part.home_coming,
            });
        }
        // peers.md 7: INITIAL_CONTACT deletes every SA of an identity pair, at any address.
        let mut seats: BTreeMap<_, BTreeSet<(&str, String)>> = BTreeMap::new();
        for part in &parts.connections {
            let ids = (part.ike.local_id.clone(), part.ike.remote_id.clone());
            let tunnels = part.endpoints.iter().flat_map(|endpoint| {
                part.remotes
                    .at(endpoint)
                    .iter()
                    .map(|remote| (endpoint.as_str(), remote.to_string()))
            });
            seats.entry(ids).or_default().extend(tunnels);
        }
        let shared: BTreeSet<_> =
            seats.into_iter().filter(|(_, at)| at.len() > 1).map(|(ids, _)| ids).collect();
        let mut connections = Vec::new();
        for mut part in parts.connections {
            let find = |name: &String| endpoints.iter().find(|e| &e.name == name);
            let mut at: Vec<&Endpoint> = part.endpoints.iter().map(find).collect::<Option<_>>()?;
            at.sort_by_key(|e| e.id);
            at.dedup_by_key(|e| e.id);
            let ids = (part.ike.local_id.clone(), part.ike.remote_id.clone());
            part.ike.initial_contact = !shared.contains(&ids);
            connections.extend(remotes::expand(&part, &at, connections.len())?);
        }
        let (instances, limits, keylog) = (parts.instances, parts.limits, parts.keylog);
        Some(Self { local, pair, instances, endpoints, connections, limits, keylog, digest })
    }

    /// SHA-256 over what must agree on both hosts: instances, links, times, endpoints' addresses and homes,
    /// connections. Interfaces, gateways and limits may differ. Pre-shared keys enter hashed under a key
    /// that only the pair has.
    #[must_use]
    pub fn digest(&self) -> [u8; 32] {
        self.digest
    }

    /// This instance.
    #[must_use]
    pub fn local_instance(&self) -> Option<&Instance> {
        self.instance(self.local)
    }

    /// The instance with an index.
    #[must_use]
    pub fn instance(&self, index: u8) -> Option<&Instance> {
        self.instances.iter().find(|i| i.index == index)
    }

    /// Name of the instance with an index; `?` for none, which only a message can ask for.
    #[must_use]
    pub fn instance_name(&self, index: u8) -> &str {
        self.instance(index).map_or("?", |i| &i.name)
    }

    /// The endpoint with an id.
    #[must_use]
    pub fn endpoint(&self, id: EndpointId) -> Option<&Endpoint> {
        self.endpoints.get(usize::from(id.0))
    }

    /// The endpoint with a name.
    #[must_use]
    pub fn endpoint_named(&self, name: &str) -> Option<&Endpoint> {
        self.endpoints.iter().find(|e| e.name == name)
    }

    /// The connection with an id.
    #[must_use]
    pub fn connection(&self, id: ConnectionId) -> Option<&Connection> {
        self.connections.get(usize::from(id.0))
    }

    /// The connection with a name, of those that IKE knows.
    #[must_use]
    pub fn connection_named(&self, name: &str) -> Option<&Connection> {
        self.connections.iter().find(|c| c.ike.name == name)
    }

    /// What a name stands for, an operator's or one that IKE knows; none for an unknown name.
    pub fn connections_named(&self, name: &str) -> impl Iterator<Item = &Connection> {
        self.connections.iter().filter(move |c| c.is_named(name))
    }

    /// What IKE at one endpoint is told: its address and its connections, each with a copy of its key.
    #[must_use]
    pub fn ike_endpoint(&self, id: EndpointId) -> Option<EndpointConfig> {
        let endpoint = self.endpoint(id)?;
        let address = endpoint.wan.address;
        let here = self.connections.iter().filter_map(|c| Some((c, c.remote_at(id)?)));
        Some(EndpointConfig {
            id,
            addresses: vec![address],
            connections: here.map(|(c, remote)| copy(&c.ike, address, remote)).collect(),
            limits: self.limits,
            keylog: self.keylog,
        })
    }

    /// Every pair of networks, ours and theirs, between which nothing may pass in clear: sorted, each once.
    #[must_use]
    pub fn protected_pairs(&self) -> Vec<(Cidr, Cidr)> {
        let pairs: BTreeSet<_> = self.connections.iter().flat_map(Connection::pairs).collect();
        pairs.into_iter().collect()
    }
}

impl Connection {
    /// Where the remote gateway is for one of our endpoints; `None` if that does not serve it.
    #[must_use]
    pub fn remote_at(&self, endpoint: EndpointId) -> Option<RemoteAddress> {
        let seats = self.endpoints.iter().zip(&self.remotes);
        seats.into_iter().find(|(id, _)| **id == endpoint).map(|(_, remote)| *remote)
    }

    /// The pairs of networks between which nothing of it may pass in clear.
    #[must_use]
    pub fn pairs(&self) -> BTreeSet<(Cidr, Cidr)> {
        let mut pairs = BTreeSet::new();
        for child in &self.ike.children {
            for local in child.local_ts.iter().flat_map(|ts| ts.addrs().cidrs()) {
                for remote in child.remote_ts.iter().flat_map(|ts| ts.addrs().cidrs()) {
                    if local.addr().is_ipv4() == remote.addr().is_ipv4() {
                        pairs.insert((local, remote));
                    }
                }
            }
        }
        pairs
    }

    /// Whether a name means it, alone or among others.
    #[must_use]
    pub fn is_named(&self, name: &str) -> bool {
        self.name == name || self.ike.name == name
    }
}

impl Endpoint {
    /// Whether an instance has an interface on the WAN segment, and so can serve this endpoint.
    #[must_use]
    pub fn servable_by(&self, index: u8) -> bool {
        self.wan.interface.get(usize::from(index)).is_some_and(Option::is_some)
    }
}

/// A connection as it is served at one address, towards one.
fn copy(
    ike: &ConnectionConfig,
    local_address: IpAddr,
    remote_address: RemoteAddress,
) -> ConnectionConfig {
    ConnectionConfig {
        name: ike.name.clone(),
        id: ike.id,
        local_address,
        remote_address,
        local_id: ike.local_id.clone(),
        remote_id: ike.remote_id.clone(),
        psk: ike.psk.duplicate(),
        ike_proposals: ike.ike_proposals.clone(),
        children: ike.children.clone(),
        encap: ike.encap,
        timers: ike.timers,
        initial_contact: ike.initial_contact,
    }
}
