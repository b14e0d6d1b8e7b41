//! The cross-checks: what no single setting can tell about itself.
//!
//! Each check looks at one thing and notes every case of it, so that an operator sees all at once. A
//! setting's path is by names, as in the file.

mod overlaps;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use ike::config::{ChildConfig, RemoteAddress, Start};
use wire::ts::TrafficSelector;

use super::{
    ConnectionParts, EndpointParts, Finding, Instance, MAX_CONNECTIONS, MAX_ENDPOINTS, MAX_REMOTES,
    OnFailure, Parts, Remotes, Severity,
};

/// Most links of a pair (as in `ha::config`).
const MAX_LINKS: usize = 8;
/// A pre-shared key below this many bytes is worth a warning.
const SHORT_PSK: usize = 20;
/// Shortest heartbeat interval: below, two cores cannot keep it.
const MIN_HEARTBEAT: Duration = Duration::from_millis(5);
/// Shortest key lifetime: below, rekeying would never end.
const MIN_REKEY: Duration = Duration::from_secs(5);

/// Everything that is wrong, errors and warnings, in the order found.
pub(super) fn all(parts: &Parts) -> Vec<Finding> {
    let mut notes = Notes(Vec::new());
    instances(parts, &mut notes);
    links(parts, &mut notes);
    timers(parts, &mut notes);
    endpoints(parts, &mut notes);
    endpoint_addresses(parts, &mut notes);
    connections(parts, &mut notes);
    confusable_peers(parts, &mut notes);
    overlaps::find(parts, &mut notes);
    notes.0
}

struct Notes(Vec<Finding>);

impl Notes {
    fn error(
        &mut self,
        at: impl Into<String>,
        text: impl Into<String>,
        expected: impl Into<String>,
    ) {
        self.push(Severity::Error, at, text, expected, None);
    }

    fn warn(
        &mut self,
        at: impl Into<String>,
        text: impl Into<String>,
        expected: impl Into<String>,
        hint: &str,
    ) {
        self.push(Severity::Warning, at, text, expected, Some(hint.to_owned()));
    }

    fn push(
        &mut self,
        severity: Severity,
        at: impl Into<String>,
        text: impl Into<String>,
        expected: impl Into<String>,
        hint: Option<String>,
    ) {
        let (at, text, expected) = (at.into(), text.into(), expected.into());
        self.0.push(Finding { severity, at, text, expected, hint });
    }
}

/// `left, right`
fn names<'a>(names: impl Iterator<Item = &'a str>) -> String {
    names.collect::<Vec<_>>().join(", ")
}

fn instance_names(parts: &Parts) -> String {
    names(parts.instances.iter().map(|i| i.name.as_str()))
}

fn instances(parts: &Parts, notes: &mut Notes) {
    if parts.pair.is_some() && parts.instances.len() != 2 {
        let text = format!("a pair has two instances, this file has {}", parts.instances.len());
        notes.error("instances", text, "expected [instances.NAME] twice");
    }
    if parts.pair.is_none() && parts.instances.len() > 1 {
        notes.error(
            "instances",
            "several instances, but no [pair]",
            "expected [pair] with secret_file, or one instance",
        );
    }
    if !parts.instances.iter().any(|i| i.name == parts.local) {
        notes.push(
            Severity::Error,
            "instances",
            format!("there is no instance `{}` in this file", parts.local),
            format!("expected --instance to be one of {}", instance_names(parts)),
            Some("without --instance, the host name is taken".into()),
        );
    }
    for (i, instance) in parts.instances.iter().enumerate() {
        let at = format!("instances.{}.index", instance.name);
        if instance.index > 1 {
            notes.error(&at, format!("index {}", instance.index), "expected 0 or 1");
        }
        // Equal indices would let both instances take the same terms, and so repeat IVs (ha.md).
        if let Some(other) = parts.instances.iter().take(i).find(|o| o.index == instance.index) {
            let text = format!(
                "instances `{}` and `{}` both have index {}",
                other.name, instance.name, instance.index
            );
            notes.error(&at, text, "expected 0 for one and 1 for the other");
        }
    }
}

fn links(parts: &Parts, notes: &mut Notes) {
    if parts.pair.is_none() {
        return;
    }
    let mut seen = BTreeMap::new();
    for instance in &parts.instances {
        let at = format!("instances.{}.links", instance.name);
        match instance.links.len() {
            0 => notes.error(&at, "no links", "expected at least one \"ADDRESS:PORT\", better two"),
            1 => notes.warn(
                &at,
                format!(
                    "`{}` has one link: its failure looks like the death of the other instance",
                    instance.name
                ),
                "better two links, one of them over the LAN or WAN segment",
                "without a second path both instances may come to own the same endpoint",
            ),
            2..=MAX_LINKS => {}
            many => {
                notes.error(&at, format!("{many} links"), format!("expected at most {MAX_LINKS}"))
            }
        }
        for (i, link) in instance.links.iter().enumerate() {
            let at = format!("{at}[{i}]");
            if link.port() == 0 || !usable(link.ip()) {
                let text = format!("`{link}` cannot be reached by the other instance");
                notes.error(&at, text, "expected an address of this host and a port");
            }
            if let Some(other) = seen.insert(*link, &instance.name) {
                let text = format!("link `{link}` of `{}` is taken by `{other}`", instance.name);
                notes.error(&at, text, "expected an address and port of its own");
            }
            // A link over the address that moves would be cut by the very event it has to report.
            for endpoint in &parts.endpoints {
                if addresses(endpoint).any(|(_, address)| address == link.ip()) {
                    let text = format!(
                        "link `{link}` uses a virtual address of endpoint `{}`",
                        endpoint.name
                    );
                    notes.error(&at, text, "expected an address that stays with its host");
                }
            }
        }
    }
    if let [a, b] = parts.instances.as_slice() {
        let at = format!("instances.{}.links", b.name);
        if a.links.len() != b.links.len() {
            let text = format!(
                "`{}` has {} links and `{}` has {}",
                a.name,
                a.links.len(),
                b.name,
                b.links.len()
            );
            notes.error(&at, text, "expected the two ends of each path, in the same order");
        }
        for (i, (x, y)) in a.links.iter().zip(&b.links).enumerate() {
            if x.is_ipv4() != y.is_ipv4() {
                let text = format!("path {} runs from {x} to {y}", i + 1);
                notes.error(format!("{at}[{i}]"), text, "expected two addresses of one family");
            }
        }
    }
}

fn timers(parts: &Parts, notes: &mut Notes) {
    let Some(pair) = &parts.pair else { return };
    let t = &pair.timers;
    let ms = |time: Duration| time.as_millis();
    if t.heartbeat < MIN_HEARTBEAT {
        let text = format!("heartbeats every {} ms", ms(t.heartbeat));
        notes.error("pair.heartbeat_ms", text, format!("expected at least {}", ms(MIN_HEARTBEAT)));
    }
    // ha.md, "The fence": the old owner must have stopped before the new one starts.
    if t.fence_after + t.heartbeat > t.dead_after {
        let text = format!(
            "fence_after_ms {} + heartbeat_ms {} is more than dead_after_ms {}",
            ms(t.fence_after),
            ms(t.heartbeat),
            ms(t.dead_after)
        );
        let room = t.dead_after.saturating_sub(t.heartbeat);
        notes.push(
            Severity::Error,
            "pair.fence_after_ms",
            text,
            format!("expected at most {}", ms(room)),
            Some("the old owner must stop sending before the other one may start".into()),
        );
    }
    if t.fence_after < t.heartbeat * 3 {
        let text = format!(
            "fence_after_ms {} is less than three heartbeats of {} ms",
            ms(t.fence_after),
            ms(t.heartbeat)
        );
        let expected = format!("expected at least {}", ms(t.heartbeat * 3));
        let hint = "one lost heartbeat would stop a healthy owner".to_owned();
        notes.push(Severity::Error, "pair.fence_after_ms", text, expected, Some(hint));
    }
}

/// Whether an address can stand for one host.
fn usable(address: IpAddr) -> bool {
    let broadcast = matches!(address, IpAddr::V4(a) if a.is_broadcast());
    !(address.is_unspecified() || address.is_multicast() || broadcast)
}

/// The virtual addresses of an endpoint, with their paths.
fn addresses(endpoint: &EndpointParts) -> impl Iterator<Item = (String, IpAddr)> {
    let name = &endpoint.name;
    let wan = (format!("endpoints.{name}.wan.address"), endpoint.wan.address);
    let lan = endpoint.lan.iter().flat_map(|lan| &lan.addresses);
    [wan].into_iter().chain(lan.map(move |a| (format!("endpoints.{name}.lan.address"), *a)))
}

fn endpoints(parts: &Parts, notes: &mut Notes) {
    if parts.endpoints.is_empty() {
        notes.error("endpoints", "no endpoints", "expected at least one [endpoints.NAME]");
    }
    if parts.endpoints.len() > MAX_ENDPOINTS {
        let text = format!("{} endpoints", parts.endpoints.len());
        notes.error("endpoints", text, format!("expected at most {MAX_ENDPOINTS}"));
    }
    for endpoint in &parts.endpoints {
        let at = |key: &str| format!("endpoints.{}.{key}", endpoint.name);
        if !parts.instances.iter().any(|i| i.name == endpoint.home) {
            let text = format!("home `{}` is no instance", endpoint.home);
            notes.error(at("home"), text, format!("expected one of {}", instance_names(parts)));
        }
        wan(endpoint, notes);
        interfaces(parts, endpoint, &at("wan.interface"), &endpoint.wan.interface, true, notes);
        if let Some(lan) = &endpoint.lan {
            for address in &lan.addresses {
                if !usable(*address) {
                    let text = format!("`{address}` is not the address of a host");
                    notes.error(at("lan.address"), text, "expected a unicast address");
                }
            }
            let of_v4 = lan.addresses.iter().filter(|address| address.is_ipv4()).count();
            if of_v4 > 1 || lan.addresses.len() - of_v4 > 1 {
                let text = format!("{} addresses", lan.addresses.len());
                notes.error(
                    at("lan.address"),
                    text,
                    "expected one IPv4 and one IPv6 address at most",
                );
            }
            interfaces(parts, endpoint, &at("lan.interface"), &lan.interface, false, notes);
        }
    }
}

fn wan(endpoint: &EndpointParts, notes: &mut Notes) {
    let (wan, name) = (&endpoint.wan, &endpoint.name);
    let at = format!("endpoints.{name}.wan.address");
    match wan.address {
        IpAddr::V6(address) => notes.push(
            Severity::Error,
            &at,
            format!("IPv6 address {address} on the WAN side"),
            "expected an IPv4 address",
            Some("this release carries IPv6 inside its tunnels, but not yet outside".into()),
        ),
        address if !usable(address) || address.is_loopback() => {
            let text = format!("`{address}` is not an address that peers can reach");
            notes.error(&at, text, "expected a unicast address");
        }
        _ => {}
    }
    let Some(gateway) = wan.gateway else { return };
    let at = format!("endpoints.{name}.wan.gateway");
    if gateway.is_ipv4() != wan.address.is_ipv4() || !usable(gateway) {
        let text = format!("gateway {gateway} cannot serve {}", wan.address);
        notes.error(&at, text, "expected a unicast address of the same family");
    } else if gateway == wan.address {
        notes.error(&at, "the gateway is the virtual address itself", "expected the next hop");
    } else if let Some(prefix) = wan.prefix
        && !same_network(wan.address, gateway, prefix)
    {
        let text = format!("gateway {gateway} is not in the network of {}/{prefix}", wan.address);
        notes.error(&at, text, "expected a next hop on this segment");
    }
}

/// Whether two addresses agree in their first `prefix` bits.
fn same_network(a: IpAddr, b: IpAddr, prefix: u8) -> bool {
    let shift = |width: u32| width.saturating_sub(u32::from(prefix));
    match (a, b) {
        (IpAddr::V4(a), IpAddr::V4(b)) => {
            (a.to_bits() ^ b.to_bits()).checked_shr(shift(32)).unwrap_or(0) == 0
        }
        (IpAddr::V6(a), IpAddr::V6(b)) => {
            (a.to_bits() ^ b.to_bits()).checked_shr(shift(128)).unwrap_or(0) == 0
        }
        _ => false,
    }
}

/// Every instance that may own an endpoint needs an interface on its segment.
fn interfaces(
    parts: &Parts,
    endpoint: &EndpointParts,
    at: &str,
    interface: &BTreeMap<String, String>,
    is_wan: bool,
    notes: &mut Notes,
) {
    let segment = if is_wan { "WAN" } else { "LAN" };
    for (name, device) in interface {
        if !parts.instances.iter().any(|i| &i.name == name) {
            let text = format!("`{name}` is no instance");
            let expected = format!("expected one of {}", instance_names(parts));
            notes.error(format!("{at}.{name}"), text, expected);
        }
        // IFNAMSIZ is 16 with the closing zero.
        if device.is_empty() || device.len() > 15 || device.contains(['/', ' ', ':']) {
            let text = format!("{device:?} is no name of an interface");
            notes.error(
                format!("{at}.{name}"),
                text,
                "expected 1 to 15 characters, as `ip link` shows them",
            );
        }
    }
    for Instance { name, .. } in &parts.instances {
        if interface.contains_key(name) {
            continue;
        }
        let is_home = name == &endpoint.home;
        if is_home || endpoint.on_failure == OnFailure::Adopt {
            let what = if is_home { "is its home" } else { "has to adopt it on failure" };
            notes.push(
                Severity::Error,
                at,
                format!(
                    "endpoint `{}`: `{name}` {what}, but has no {segment} interface",
                    endpoint.name
                ),
                format!("expected {{ {name} = \"INTERFACE\", … }}"),
                (!is_home).then(|| "or set on_failure = \"withdraw\"".into()),
            );
        }
    }
}

fn endpoint_addresses(parts: &Parts, notes: &mut Notes) {
    let mut seen: BTreeMap<IpAddr, String> = BTreeMap::new();
    for endpoint in &parts.endpoints {
        for (at, address) in addresses(endpoint) {
            if let Some(owner) = seen.insert(address, endpoint.name.clone()) {
                let text = format!("{address} is a virtual address of endpoint `{owner}` already");
                notes.error(at, text, "expected an address that no other endpoint has");
            }
        }
    }
}

fn connections(parts: &Parts, notes: &mut Notes) {
    if parts.connections.is_empty() {
        notes.warn(
            "connections",
            "no connections: nobody can set up a tunnel",
            "expected [connections.NAME]",
            "config/tandem.toml shows one",
        );
    }
    if parts.connections.len() > MAX_CONNECTIONS {
        let text = format!("{} connections", parts.connections.len());
        notes.error("connections", text, format!("expected at most {MAX_CONNECTIONS}"));
    }
    for connection in &parts.connections {
        connection_endpoints(parts, connection, notes);
        connection_peer(parts, connection, notes);
        connection_keys(connection, notes);
        children(parts, connection, notes);
    }
}

fn path(connection: &ConnectionParts, key: &str) -> String {
    format!("connections.{}.{key}", connection.ike.name)
}

fn connection_endpoints(parts: &Parts, connection: &ConnectionParts, notes: &mut Notes) {
    let at = path(connection, "endpoints");
    if connection.endpoints.is_empty() {
        notes.error(&at, "no endpoint serves this connection", "expected the name of an endpoint");
    }
    for (i, name) in connection.endpoints.iter().enumerate() {
        if !parts.endpoints.iter().any(|e| &e.name == name) {
            let known = names(parts.endpoints.iter().map(|e| e.name.as_str()));
            let text = format!("there is no endpoint `{name}`");
            notes.error(format!("{at}[{i}]"), text, format!("expected one of {known}"));
        }
        if connection.endpoints.iter().take(i).any(|earlier| earlier == name) {
            let text = format!("endpoint `{name}` is named twice");
            notes.error(format!("{at}[{i}]"), text, "expected each endpoint once");
        }
    }
}

fn connection_peer(parts: &Parts, connection: &ConnectionParts, notes: &mut Notes) {
    let ike = &connection.ike;
    remotes(parts, connection, notes);
    if ike.local_id == ike.remote_id {
        notes.error(
            path(connection, "remote_id"),
            format!("both sides are called `{}`", ike.remote_id),
            "expected the remote gateway's own identity",
        );
    }
}

/// Where the remote gateway is.
fn remotes(parts: &Parts, connection: &ConnectionParts, notes: &mut Notes) {
    let at = path(connection, "remote_address");
    if let Remotes::ByEndpoint(map) = &connection.remotes {
        for name in map.keys().filter(|name| !connection.endpoints.contains(name)) {
            let known = names(connection.endpoints.iter().map(String::as_str));
            let text = format!("endpoint `{name}` does not serve this connection");
            notes.error(format!("{at}.{name}"), text, format!("expected one of {known}"));
        }
        for name in connection.endpoints.iter().filter(|name| !map.contains_key(*name)) {
            let text = format!("no address of the remote gateway for endpoint `{name}`");
            notes.error(&at, text, format!("expected {{ {name} = \"ADDRESS\", … }}"));
        }
    }
    let lists = match &connection.remotes {
        Remotes::Everywhere(all) => vec![(at.clone(), all)],
        Remotes::ByEndpoint(map) => {
            map.iter().map(|(name, list)| (format!("{at}.{name}"), list)).collect()
        }
    };
    for (at, list) in lists {
        if list.is_empty() || list.len() > MAX_REMOTES {
            let text = format!("{} addresses of a remote gateway", list.len());
            notes.error(&at, text, format!("expected 1 to {MAX_REMOTES}"));
        }
        for (n, remote) in list.iter().enumerate() {
            if list.iter().take(n).any(|earlier| earlier == remote) {
                notes.error(&at, format!("{remote} is named twice"), "expected each address once");
            }
            match remote {
                RemoteAddress::Ip(address) => remote_address(parts, *address, &at, notes),
                RemoteAddress::Any => anywhere(connection, list, &at, notes),
            }
        }
    }
}

fn remote_address(parts: &Parts, address: IpAddr, at: &str, notes: &mut Notes) {
    if address.is_ipv6() {
        notes.push(
            Severity::Error,
            at,
            format!("IPv6 address {address} of a remote gateway"),
            "expected an IPv4 address, or \"any\"",
            Some("this release carries IPv6 inside its tunnels, but not yet outside".into()),
        );
    } else if !usable(address) {
        let text = format!("`{address}` is not the address of a gateway");
        notes.error(at, text, "expected a unicast address, or \"any\"");
    }
    for endpoint in &parts.endpoints {
        if addresses(endpoint).any(|(_, own)| own == address) {
            let text = format!("{address} is our own endpoint `{}`", endpoint.name);
            notes.error(at, text, "expected the remote gateway's address");
        }
    }
}

fn anywhere(connection: &ConnectionParts, list: &[RemoteAddress], at: &str, notes: &mut Notes) {
    if list.len() > 1 {
        notes.error(at, "\"any\" beside an address", "expected addresses, or \"any\" alone");
    }
    for child in connection.ike.children.iter().filter(|c| c.start != Start::Respond) {
        notes.error(
            format!("{}.start", path(connection, &format!("children.{}", child.name))),
            "remote_address is \"any\": there is nobody to initiate to",
            "expected start = \"respond\", or an address above",
        );
    }
}

fn connection_keys(connection: &ConnectionParts, notes: &mut Notes) {
    let ike = &connection.ike;
    let at = path(connection, "auth.psk_file");
    match ike.psk.len() {
        0 => notes.error(&at, "the pre-shared key is empty", "expected a file with a key"),
        len if len < SHORT_PSK => notes.warn(
            &at,
            format!("the pre-shared key has only {len} characters"),
            format!("better {SHORT_PSK} or more, drawn at random"),
            "whoever answers in the peer's place can try words against it; `tandem genkey` draws one",
        ),
        _ => {}
    }
    let (timers, name) = (&ike.timers, &ike.name);
    if timers.ike_rekey < MIN_REKEY {
        let expected = format!("expected at least {} s", MIN_REKEY.as_secs());
        notes.error(
            path(connection, "rekey_time"),
            "the IKE SA would be rekeyed all the time",
            expected,
        );
    }
    if timers.child_rekey < MIN_REKEY
        && let Some(child) = ike.children.first()
    {
        let at = format!("connections.{name}.children.{}.rekey_time", child.name);
        let expected = format!("expected at least {} s", MIN_REKEY.as_secs());
        notes.error(at, "the Child SA would be rekeyed all the time", expected);
    }
}

fn children(parts: &Parts, connection: &ConnectionParts, notes: &mut Notes) {
    let children = &connection.ike.children;
    if children.is_empty() {
        notes.error(
            path(connection, "children"),
            "no children: the tunnel would carry nothing",
            "expected [connections.NAME.children.NAME] with local_ts and remote_ts",
        );
    }
    if children.len() > parts.limits.children_per_ike {
        let text = format!("{} children", children.len());
        let expected = format!("expected at most {}", parts.limits.children_per_ike);
        notes.error(path(connection, "children"), text, expected);
    }
    for child in children {
        let at = path(connection, &format!("children.{}", child.name));
        for (key, list) in [("local_ts", &child.local_ts), ("remote_ts", &child.remote_ts)] {
            if list.is_empty() {
                notes.error(
                    format!("{at}.{key}"),
                    "no selectors",
                    "expected networks: [\"10.1.0.0/24\"]",
                );
            }
            if list.len() > 255 {
                // RFC 7296 §3.13: the count of selectors is one byte.
                notes.error(format!("{at}.{key}"), "too many selectors", "expected at most 255");
            }
        }
        let lonely = |list: &[TrafficSelector], other: &[TrafficSelector]| {
            let v4 = |ts: &TrafficSelector| ts.addrs().is_ipv4();
            list.iter().find(|ts| !other.iter().any(|o| v4(o) == v4(ts))).copied()
        };
        let lonely = lonely(&child.local_ts, &child.remote_ts)
            .map(|ts| ("local_ts", ts))
            .or_else(|| lonely(&child.remote_ts, &child.local_ts).map(|ts| ("remote_ts", ts)));
        if let Some((key, ts)) =
            lonely.filter(|_| !child.local_ts.is_empty() && !child.remote_ts.is_empty())
        {
            let text = format!("{ts} has no selector of its address family on the other side");
            notes.error(
                format!("{at}.{key}"),
                text,
                "expected both sides in IPv4, in IPv6, or both",
            );
        }
        swallowed_links(parts, child, &at, notes);
    }
}

/// A tunnel that takes the pair's own link in would cut it whenever it goes down.
fn swallowed_links(parts: &Parts, child: &ChildConfig, at: &str, notes: &mut Notes) {
    let [a, b] = parts.instances.as_slice() else { return };
    for (x, y) in a.links.iter().zip(&b.links).map(|(x, y)| (x.ip(), y.ip())) {
        let covers =
            |list: &[TrafficSelector], address| list.iter().any(|ts| ts.addrs().matches(address));
        let (local, remote) = (&child.local_ts, &child.remote_ts);
        if covers(local, x) && covers(remote, y) || covers(local, y) && covers(remote, x) {
            let text = format!("the pair link between {x} and {y} would go into this tunnel");
            notes.error(
                format!("{at}.remote_ts"),
                text,
                "expected networks without the pair's links",
            );
        }
    }
}

/// Two connections that a responder could not tell apart.
fn confusable_peers(parts: &Parts, notes: &mut Notes) {
    // Only those with the same identities can be, and mostly there are none.
    let mut alike: BTreeMap<_, Vec<&ConnectionParts>> = BTreeMap::new();
    let pairs = parts.connections.iter().flat_map(|later| {
        let ids = (&later.ike.local_id, &later.ike.remote_id);
        let earlier = alike.entry(ids).or_default();
        let pairs: Vec<_> = earlier.iter().map(|earlier| (*earlier, later)).collect();
        earlier.push(later);
        pairs
    });
    for (earlier, later) in pairs {
        let (a, b) = (&earlier.ike, &later.ike);
        let same_place = |endpoint: &str| {
            let (theirs, ours) = (earlier.remotes.at(endpoint), later.remotes.at(endpoint));
            ours.iter().any(|one| {
                theirs
                    .iter()
                    .any(|other| one == other || [one, other].contains(&&RemoteAddress::Any))
            })
        };
        let shared =
            later.endpoints.iter().find(|e| earlier.endpoints.contains(e) && same_place(e));
        if let Some(endpoint) = shared {
            notes.error(
                path(later, "remote_id"),
                format!(
                    "connections `{}` and `{}` are both from `{}` to `{}` at endpoint `{endpoint}`",
                    a.name, b.name, b.local_id, b.remote_id
                ),
                "expected another identity, or one connection with several children",
            );
        }
    }
}
