//! The validated configuration in the words of `ha` and `esp`.

use std::net::Ipv4Addr;

use ike::config::RemoteAddress;
use wire::id::{ConnectionId, EndpointId};

use crate::config::{Config, Connection, OnFailure};

/// What `ha` is told.
pub(crate) fn of(config: &Config) -> ha::Config {
    let local = config.instance_name(config.local);
    let peer = config.pair.as_ref().map_or("", |pair| config.instance_name(pair.peer));
    let mut out = ha::Config::new(local, config.local, peer);
    out.endpoints = config
        .endpoints
        .iter()
        .map(|e| ha::EndpointConfig {
            name: e.name.clone(),
            home_is_me: e.home == config.local,
            adopted: e.on_failure == OnFailure::Adopt,
        })
        .collect();
    let digest = config.digest();
    out.config_digest = u64::from_be_bytes(*digest.first_chunk().unwrap_or(&[0; 8]));
    match &config.pair {
        None => {
            out.lone = true;
            out.links = 0;
        }
        Some(pair) => {
            out.links = u8::try_from(pair.links.len()).unwrap_or(u8::MAX);
            out.heartbeat = pair.timers.heartbeat;
            out.dead_after = pair.timers.dead_after;
            out.fence_after = pair.timers.fence_after;
            out.boot_wait = pair.timers.boot_wait;
        }
    }
    out
}

/// What flows are pinned by: the addresses of the tunnel as both sides configure them.
fn pin(config: &Config, id: EndpointId, connection: &Connection) -> esp::pin::Pin {
    let endpoint = config.endpoint(id);
    let local = endpoint.map_or(Ipv4Addr::UNSPECIFIED.into(), |e| e.wan.address);
    let remote = match connection.remote_at(id) {
        Some(RemoteAddress::Ip(address)) => address,
        Some(RemoteAddress::Any) | None => Ipv4Addr::UNSPECIFIED.into(),
    };
    esp::pin::Pin::of(local, remote, endpoint.map_or(1, |e| e.weight))
}

/// What must never leave in clear, whether a tunnel is up or not: every child of every connection at its endpoints.
pub(crate) fn policies(config: &Config) -> Vec<esp::Policy> {
    let mut policies = Vec::new();
    for (index, connection) in config.connections.iter().enumerate() {
        for endpoint in &connection.endpoints {
            for (child, spec) in connection.ike.children.iter().enumerate() {
                policies.push(esp::Policy {
                    endpoint: *endpoint,
                    connection: ConnectionId(index as u16),
                    group: connection.group,
                    child: child as u16,
                    local_ts: spec.local_ts.clone(),
                    remote_ts: spec.remote_ts.clone(),
                    pin: pin(config, *endpoint, connection),
                });
            }
        }
    }
    policies
}
