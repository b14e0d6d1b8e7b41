//! Where a connection's remote gateway is: one address, several, or others for each of our endpoints.
//!
//! A tunnel runs from one of our endpoints to one address of the remote gateway. With several addresses at an endpoint
//! there are several tunnels, which flows are pinned to like those of several endpoints. IKE knows each as a connection
//! of its own, `NAME#1`, `NAME#2` …: the first address of each endpoint, the second of each, and so on.

use std::collections::BTreeMap;
use std::fmt;

use ike::config::{ConnectionConfig, RemoteAddress};
use wire::id::{ConnectionId, EndpointId};

use super::{Connection, ConnectionParts, Endpoint, copy};

/// Most addresses of a remote gateway at one endpoint.
pub const MAX_REMOTES: usize = 4;

/// As an operator wrote it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Remotes {
    /// These, at every endpoint.
    Everywhere(Vec<RemoteAddress>),
    /// By the name of the endpoint.
    ByEndpoint(BTreeMap<String, Vec<RemoteAddress>>),
}

impl Remotes {
    /// Those at one endpoint.
    #[must_use]
    pub fn at(&self, endpoint: &str) -> &[RemoteAddress] {
        match self {
            Self::Everywhere(all) => all,
            Self::ByEndpoint(map) => map.get(endpoint).map(Vec::as_slice).unwrap_or_default(),
        }
    }

    /// All of them.
    pub fn all(&self) -> impl Iterator<Item = RemoteAddress> + '_ {
        let lists: Vec<&Vec<RemoteAddress>> = match self {
            Self::Everywhere(all) => vec![all],
            Self::ByEndpoint(map) => map.values().collect(),
        };
        lists.into_iter().flatten().copied()
    }
}

impl From<RemoteAddress> for Remotes {
    fn from(address: RemoteAddress) -> Self {
        Self::Everywhere(vec![address])
    }
}

/// Canonical: part of the digest.
impl fmt::Display for Remotes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |list: &[RemoteAddress]| {
            list.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
        };
        match self {
            Self::Everywhere(all) => f.write_str(&list(all)),
            Self::ByEndpoint(map) => {
                let items: Vec<String> =
                    map.iter().map(|(endpoint, all)| format!("{endpoint}={}", list(all))).collect();
                f.write_str(&items.join(" "))
            }
        }
    }
}

/// The connections that one of an operator's becomes. `at`: its endpoints, sorted.
pub(super) fn expand(
    part: &ConnectionParts,
    at: &[&Endpoint],
    first: usize,
) -> Option<Vec<Connection>> {
    let most = at.iter().map(|e| part.remotes.at(&e.name).len()).max()?;
    let group = ConnectionId(u16::try_from(first).ok()?);
    let mut out = Vec::new();
    for n in 0..most {
        let seats = at.iter().filter_map(|e| Some((e, *part.remotes.at(&e.name).get(n)?)));
        let (endpoints, remotes): (Vec<EndpointId>, Vec<RemoteAddress>) =
            seats.map(|(endpoint, remote)| (endpoint.id, remote)).unzip();
        let seat = at.iter().find(|e| endpoints.first() == Some(&e.id))?;
        let ike = ConnectionConfig {
            name: match most {
                1 => part.ike.name.clone(),
                _ => format!("{}#{}", part.ike.name, n + 1),
            },
            id: ConnectionId(u16::try_from(first + n).ok()?),
            ..copy(&part.ike, seat.wan.address, *remotes.first()?)
        };
        out.push(Connection { name: part.ike.name.clone(), group, endpoints, remotes, ike });
    }
    Some(out)
}
