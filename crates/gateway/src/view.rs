//! `tandem status`: what the machines know, in the stable shape of [`crate::status`].

use std::time::Duration;

use wire::id::EspSpi;

use crate::endpoint::{Endpoint, Part};
use crate::machine::Gateway;
use crate::parts::PART;
use crate::requests::Pending;
use crate::status::{
    ChildState, ChildStatus, Contact, Counters, EndpointStatus, FlowStatus, IkeStatus, LastError,
    LinkStatus, Mode, Nat, PairStatus, Role, Status, TunnelCounts, TunnelState, TunnelStatus,
};

/// A `tandem status` that is not answered yet: its rows are written in parts.
#[derive(Debug)]
pub(crate) struct Showing {
    pub(crate) ticket: u64,
    /// The shards' counters are there.
    counted: bool,
    rows: Vec<TunnelStatus>,
    /// Connections that have their rows.
    connections: usize,
}

impl Showing {
    pub(crate) fn new(ticket: u64) -> Self {
        Self { ticket, counted: false, rows: Vec::new(), connections: 0 }
    }

    /// The whole status, once all rows are written; the first part of them is as soon as it can be.
    pub(crate) fn settle(&mut self, gateway: &Gateway, now: Duration) -> Option<Status> {
        let news = gateway.snapshot.as_ref().is_some_and(|s| s.token == self.ticket);
        if news && !self.counted {
            self.counted = true;
            self.go_on(gateway, now);
        }
        let done = self.counted && self.connections >= gateway.config.connections.len();
        done.then(|| Status { tunnels: std::mem::take(&mut self.rows), ..summary(gateway, now) })
    }

    fn go_on(&mut self, gateway: &Gateway, now: Duration) {
        let left = gateway.config.connections.get(self.connections..).unwrap_or_default();
        for connection in left.iter().take(PART) {
            self.rows.extend(tunnels(gateway, connection, now));
            self.connections += 1;
        }
    }
}

impl Gateway {
    /// Whether rows are still to be written.
    pub(crate) fn is_showing(&self) -> bool {
        self.pending.iter().any(|p| matches!(p, Pending::Status(Showing { counted: true, .. })))
    }

    /// The next of them.
    pub(crate) fn go_on_showing(&mut self, now: Duration) {
        let mut pending = std::mem::take(&mut self.pending);
        for pending in &mut pending {
            if let Pending::Status(showing) = pending
                && showing.counted
            {
                showing.go_on(self, now);
            }
        }
        self.pending = pending;
    }
}

/// The same, with the tunnels only counted: cheap, however many there are.
pub(crate) fn summary(gateway: &Gateway, now: Duration) -> Status {
    let config = &gateway.config;
    let pair = gateway.pair.status(now);
    let digest = config.digest();
    Status {
        instance: config.instance_name(config.local).to_owned(),
        index: config.local,
        release: gateway.release.clone(),
        uptime_s: now.saturating_sub(gateway.started).as_secs(),
        workers: gateway.spis.workers(),
        draining: gateway.draining,
        config_digest: digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect(),
        pair: config.pair.as_ref().map(|_| pair_status(gateway, &pair)),
        endpoints: gateway
            .endpoints
            .iter()
            .map(|e| endpoint_status(gateway, e, &pair, now))
            .collect(),
        tunnels: Vec::new(),
        tunnel_counts: tunnel_counts(gateway),
        counters: counters(gateway),
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn pair_status(gateway: &Gateway, pair: &ha::Status) -> PairStatus {
    let Some(config) = &gateway.config.pair else { return PairStatus::default() };
    let dead_after = config.timers.dead_after;
    let contact = match (pair.contact, pair.heard_ago) {
        (true, _) => Contact::TwoWay,
        (false, Some(ago)) if ago < dead_after => Contact::OneWay,
        _ => Contact::None,
    };
    PairStatus {
        peer: gateway.config.instance_name(config.peer).to_owned(),
        peer_release: pair.peer_build.clone(),
        format: pair.release,
        newest_format: Some(gateway.newest_format),
        peer_newest_format: pair.peer_newest,
        contact,
        refused: (pair.joined && !pair.compatible).then(|| {
            "the configurations or releases do not agree: nothing is replicated (see the log)"
                .to_owned()
        }),
        links: config
            .links
            .iter()
            .enumerate()
            .map(|(index, link)| {
                let seen = pair.links.iter().find(|seen| usize::from(seen.link.0) == index);
                let heard = seen.and_then(|seen| seen.heard_ago);
                LinkStatus {
                    local: link.local.to_string(),
                    remote: link.remote.to_string(),
                    up: heard.is_some_and(|ago| ago < dead_after),
                    stream: gateway.stream_link.is_some_and(|stream| usize::from(stream) == index),
                    rtt_us: pair.rtt.map(|rtt| u64::try_from(rtt.as_micros()).unwrap_or(u64::MAX)),
                    last_heard_ms: heard.map(millis),
                }
            })
            .collect(),
    }
}

fn endpoint_status(
    gateway: &Gateway,
    e: &Endpoint,
    pair: &ha::Status,
    now: Duration,
) -> EndpointStatus {
    let config = &gateway.config;
    let spec = config.endpoint(e.id);
    let seen = pair.endpoints.iter().find(|seen| seen.endpoint == e.ha_id());
    let local = config.instance_name(config.local).to_owned();
    let role = match (&e.part, seen.map(|seen| seen.role)) {
        (Part::Owner { .. } | Part::Holding { .. }, _) => Role::Owner,
        (Part::Steering { .. }, _) => Role::Steering,
        (Part::Shadow, Some(ha::Role::Shadow { .. } | ha::Role::Yielding)) => Role::Shadow,
        (Part::Shadow, _) => Role::None,
    };
    let mode = match seen.map(|seen| seen.role) {
        Some(
            ha::Role::Owner(ha::Mode::Synced)
            | ha::Role::Offering
            | ha::Role::Shadow { synced: true },
        ) => Mode::Synced,
        Some(ha::Role::Owner(ha::Mode::Syncing(_)) | ha::Role::Shadow { synced: false }) => {
            Mode::Syncing
        }
        _ => Mode::Solo,
    };
    let owner = if role == Role::Owner {
        Some(local)
    } else {
        let peer = config.pair.as_ref().map(|pair| config.instance_name(pair.peer).to_owned());
        peer.filter(|_| seen.is_some_and(|seen| seen.peer_owns))
    };
    EndpointStatus {
        name: e.name.clone(),
        address: spec.map(|spec| spec.wan.address.to_string()).unwrap_or_default(),
        home: spec.map(|spec| config.instance_name(spec.home).to_owned()).unwrap_or_default(),
        owner,
        role,
        term: seen.map_or(0, |seen| seen.term.0),
        mode,
        position: seen.map_or(0, |seen| seen.position.0),
        acked_position: seen.filter(|_| role == Role::Owner).map(|seen| seen.acked.0),
        fence_ms_left: (role == Role::Owner).then(|| millis(e.valid_until.saturating_sub(now))),
        uplink: seen.map(|seen| seen.uplink),
        pinned: e.in_use,
        home_in_s: gateway.home_in(now, usize::from(e.id.0)).map(|left| left.as_secs()),
    }
}

/// What the shards know of flows, by names.
pub(crate) fn flows(gateway: &Gateway, flows: &[esp::Flow]) -> Vec<FlowStatus> {
    let mut out: Vec<FlowStatus> = flows
        .iter()
        .map(|flow| {
            let child = gateway.endpoints.iter().find_map(|e| e.ike.child(flow.spi_in));
            let (connection, child, spi_out) = child.map_or((None, None, None), |child| {
                let ike::ChildName { connection, child, spi_out } = child;
                let name = |name: &str| Some(name.to_owned());
                (connection.and_then(name), name(child), Some(format!("{:08x}", spi_out.0)))
            });
            let e = gateway.endpoints.get(usize::from(flow.endpoint.0));
            FlowStatus {
                source: flow.src.to_string(),
                destination: flow.dst.to_string(),
                protocol: flow.protocol,
                source_port: flow.ports.map(|ports| ports.0),
                destination_port: flow.ports.map(|ports| ports.1),
                connection,
                child,
                endpoint: e.map(|e| e.name.clone()).unwrap_or_default(),
                steered: e.is_some_and(|e| !e.owns()),
                spi_out,
                idle_ms: millis(flow.idle),
            }
        })
        .collect();
    out.sort_by_cached_key(|f| {
        (f.source.clone(), f.destination.clone(), f.protocol, f.source_port, f.destination_port)
    });
    out
}

/// The tunnels of one connection.
fn tunnels(
    gateway: &Gateway,
    connection: &crate::config::Connection,
    now: Duration,
) -> impl Iterator<Item = TunnelStatus> {
    let name = &connection.ike.name;
    connection.endpoints.iter().filter_map(move |endpoint| {
        let e = gateway.endpoints.get(usize::from(endpoint.0))?;
        // The newest SA that is furthest stands for the tunnel; the children of all are listed.
        let mut sas = e.ike.status_of(name, now);
        sas.sort_by_key(|sa| (state_of(sa.state) != TunnelState::Established, sa.age, sa.spi));
        let first = sas.first();
        Some(TunnelStatus {
            connection: name.clone(),
            endpoint: e.name.clone(),
            state: first.map_or(TunnelState::Down, |sa| state_of(sa.state)),
            ike: first.map(ike_status),
            children: sas
                .iter()
                .flat_map(|sa| &sa.children)
                .map(|child| child_status(gateway, child))
                .collect(),
            last_error: e
                .ike
                .last_failure(name, now)
                .map(|(text, age)| LastError { text: text.to_owned(), age_s: age.as_secs() }),
            taken_down: e.ike.is_held(name),
        })
    })
}

fn tunnel_counts(gateway: &Gateway) -> TunnelCounts {
    let mut counts = TunnelCounts::default();
    let seats = gateway.config.connections.iter().flat_map(|c| &c.endpoints);
    counts.down = seats.count() as u64;
    for e in &gateway.endpoints {
        for ike::Progress { state, children } in e.ike.progress() {
            let of_state = match state.map_or(TunnelState::Down, state_of) {
                TunnelState::Down => continue,
                TunnelState::Connecting => &mut counts.connecting,
                TunnelState::Established => &mut counts.established,
                TunnelState::Closing => &mut counts.closing,
            };
            *of_state += 1;
            counts.down = counts.down.saturating_sub(1);
            counts.children += children as u64;
        }
    }
    counts
}

fn state_of(state: &str) -> TunnelState {
    match state {
        "connecting" => TunnelState::Connecting,
        "established" | "rekeying" => TunnelState::Established,
        "deleting" | "closed" => TunnelState::Closing,
        _ => TunnelState::Down,
    }
}

fn ike_status(sa: &ike::IkeStatus) -> IkeStatus {
    let (spi_i, spi_r) = if sa.initiator { (sa.spi, sa.peer_spi) } else { (sa.peer_spi, sa.spi) };
    IkeStatus {
        spi_i: spi_i.to_string(),
        spi_r: spi_r.to_string(),
        role: if sa.initiator { "initiator" } else { "responder" }.to_owned(),
        age_s: sa.age.as_secs(),
        rekey_in_s: sa.rekey_in.map(|left| left.as_secs()),
        algs: sa.suite.clone().unwrap_or_default(),
        local: sa.local.to_string(),
        local_id: sa.local_id.clone().unwrap_or_default(),
        remote: sa.remote.to_string(),
        remote_id: sa.remote_id.clone().unwrap_or_default(),
        nat: match sa.nat {
            (false, false) => Nat::None,
            (true, false) => Nat::Local,
            (false, true) => Nat::Remote,
            (true, true) => Nat::Both,
        },
    }
}

fn child_status(gateway: &Gateway, child: &ike::ChildStatus) -> ChildStatus {
    let stats = stats_of(gateway, child.spi_in);
    ChildStatus {
        name: child.name.clone(),
        spi_in: child.spi_in.to_string(),
        spi_out: child.spi_out.to_string(),
        state: match child.state {
            "installed" => ChildState::Installed,
            "rekeying" => ChildState::Rekeying,
            "retired" => ChildState::Rekeyed,
            "deleting" => ChildState::Closing,
            _ => ChildState::Installing,
        },
        udp_encap: child.udp_encap,
        algs: child.suite.clone(),
        age_s: child.age.as_secs(),
        rekey_in_s: child.rekey_in.map(|left| left.as_secs()),
        bytes_in: stats.map_or(0, |s| s.bytes_in),
        bytes_out: stats.map_or(0, |s| s.bytes_out),
        packets_in: stats.map_or(0, |s| s.packets_in),
        packets_out: stats.map_or(0, |s| s.packets_out),
        seq_out: stats.map(|s| s.next_seq),
        seq_ceiling: stats.map(|s| s.ceiling),
        seq_in: stats.map(|s| u64::from(s.top)),
        local_ts: child.local_ts.iter().map(ToString::to_string).collect(),
        remote_ts: child.remote_ts.iter().map(ToString::to_string).collect(),
    }
}

fn stats_of(gateway: &Gateway, spi_in: EspSpi) -> Option<&esp::SaStats> {
    let sas = &gateway.snapshot.as_ref()?.sas;
    sas.get(sas.binary_search_by_key(&spi_in, |sa| sa.spi_in).ok()?)
}

fn counters(gateway: &Gateway) -> Counters {
    let mut out = Counters {
        changes: gateway
            .counters
            .changes
            .iter()
            .map(|(kind, n)| ((*kind).to_owned(), *n))
            .collect(),
        ike_drops: ike_drops(gateway),
        ..Counters::default()
    };
    if let Some(snapshot) = &gateway.snapshot {
        let stats = &snapshot.stats;
        out.packets_in = stats.opened;
        out.packets_out = stats.sealed;
        out.bytes_in = stats.opened_bytes;
        out.bytes_out = stats.sealed_bytes;
        out.steered_out = stats.steered;
        out.handed = stats.handed;
        out.drops = stats.drops().map(|(why, n)| (why.name().to_owned(), n)).collect();
    }
    out
}

fn ike_drops(gateway: &Gateway) -> std::collections::BTreeMap<String, u64> {
    let mut drops: std::collections::BTreeMap<String, u64> =
        gateway.counters.ike_drops.iter().map(|(why, n)| ((*why).to_owned(), *n)).collect();
    for e in &gateway.endpoints {
        let c = e.ike.counters();
        let reasons = [
            ("malformed", c.malformed),
            ("not_authentic", c.not_authentic),
            ("not_expected", c.not_expected),
            ("over_limit", c.over_limit),
            ("bad_crypto", c.bad_crypto),
            ("not_owner", c.not_owner),
        ];
        for (why, n) in reasons.into_iter().filter(|(_, n)| *n > 0) {
            *drops.entry(why.to_owned()).or_default() += n;
        }
    }
    drops
}
