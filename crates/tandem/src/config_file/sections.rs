//! The file's tables, one function each: [`daemon`], [`pair`], [`instances`], [`endpoints`],
//! [`connections`], [`limits`]. What a table means on its own is decided here; what tables mean to each
//! other is the gateway's to check.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crypto::Secret;
use crypto::hash::sha256;
use gateway::config::{
    ConnectionParts, EndpointParts, HomeComing, Instance, LanParts, OnFailure, PairParts,
    PairTimers, Parts, Remotes, WanParts,
};
use ike::config::{ChildConfig, ConnectionConfig, Encap, Limits, RemoteAddress, Start, Timers};
use ike::proposal::{default_esp, default_ike, parse_esp, parse_ike};
use wire::id::ConnectionId;
use wire::ike::Identity;

use super::keyfile::{KeyFileError, decode_pair_secret};
use super::reader::{Placed, Reader, Table};
use super::report::Severity;
use super::{DaemonSettings, Options, values};

/// How key files are fetched.
type Keys<'k> = &'k dyn Fn(&Path) -> Result<Secret, KeyFileError>;

/// Everything in the file.
pub(super) struct Sections {
    pub(super) parts: Parts,
    pub(super) daemon: DaemonSettings,
    pub(super) pair_secret: Option<Secret>,
}

/// Reads the whole document. `None`, or a value that must not be used, when the reader has errors.
pub(super) fn read<'r>(root: &Table<'r>, options: &Options, keys: Keys<'_>) -> Option<Sections> {
    let root = Section { table: root, keys };
    let daemon = root.table.table("daemon").map(daemon).unwrap_or_default();
    let pair = root.table.table("pair").map(|table| pair(table, keys));
    let is_pair = pair.is_some();
    let mut instances = instances(root.table.tables("instances"), is_pair);
    let is_here = instances.iter().any(|i| i.name == options.host);
    let local = match (&options.instance, instances.as_slice()) {
        (Some(name), _) => name.clone(),
        (None, [only]) if !is_pair => only.name.clone(),
        (None, [first, ..]) if options.any_instance && !is_here => first.name.clone(),
        (None, _) => options.host.clone(),
    };
    if instances.is_empty() && !is_pair {
        instances.push(Instance { name: local.clone(), index: 0, links: Vec::new() });
    }
    let limits = root.table.table("limits").map(limits).unwrap_or_default();
    let endpoints = root.endpoints(&instances, is_pair, &local);
    let connections = root.connections(&endpoints);
    root.table.unknown_keys();
    let (pair, pair_secret) = match pair {
        None => (None, None),
        Some(None) => return None,
        Some(Some((parts, secret))) => (Some(parts), Some(secret)),
    };
    let keylog = options.keylog;
    let parts = Parts { local, pair, instances, endpoints, connections, limits, keylog };
    Some(Sections { parts, daemon, pair_secret })
}

struct Section<'t, 'r, 'k> {
    table: &'t Table<'r>,
    keys: Keys<'k>,
}

/// `[daemon]`: may differ between hosts.
fn daemon(table: Table<'_>) -> DaemonSettings {
    let defaults = DaemonSettings::default();
    let path = |key| {
        let read = table.text(key, "an absolute path", |text| match Path::new(text) {
            path if path.is_absolute() => Ok(path.to_owned()),
            _ => Err("it depends on where the daemon is started".to_owned()),
        });
        read.map(|path: Placed<PathBuf>| path.value)
    };
    let tun = table.text("tun", "a name for the TUN interface, 1 to 15 characters", |text| {
        let fits = (1..=15).contains(&text.len())
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
        fits.then(|| text.to_owned()).ok_or_else(String::new)
    });
    let settings = DaemonSettings {
        socket: path("socket").unwrap_or(defaults.socket),
        state_dir: path("state_dir").unwrap_or(defaults.state_dir),
        tun: tun.map_or(defaults.tun, |tun| tun.value),
        // RFC 8200 §5: an interface that carries IPv6 has at least 1280.
        mtu: table.number("mtu", "bytes", 1280..=9000).and_then(|n| u16::try_from(n.value).ok()),
        offload: table.switch("offload", defaults.offload),
        low_latency: table.switch("low_latency", defaults.low_latency),
        workers: table
            .number("workers", "workers", 1..=16)
            .and_then(|n| u8::try_from(n.value).ok())
            .unwrap_or(defaults.workers),
        notify: path("notify"),
    };
    table.done();
    settings
}

/// `[pair]`: the secret and the protocol's times.
fn pair(table: Table<'_>, keys: Keys<'_>) -> Option<(PairParts, Secret)> {
    let defaults = PairTimers::default();
    let ms = |key, most, default| {
        table
            .number(key, "milliseconds", 1..=most)
            .map_or(default, |n| Duration::from_millis(n.value))
    };
    let timers = PairTimers {
        heartbeat: ms("heartbeat_ms", 1000, defaults.heartbeat),
        dead_after: ms("dead_after_ms", 60_000, defaults.dead_after),
        fence_after: ms("fence_after_ms", 60_000, defaults.fence_after),
        boot_wait: table
            .number("boot_wait_s", "seconds", 0..=600)
            .map_or(defaults.boot_wait, |n| Duration::from_secs(n.value)),
    };
    inline_secret(&table, &["secret", "psk", "key"], "secret_file", "/etc/tandem/pair.key");
    let secret = key_file(&table, "secret_file", "\"/etc/tandem/pair.key\"", keys);
    let secret = secret.and_then(|placed| {
        let decoded = decode_pair_secret(&placed.value);
        if decoded.is_none() {
            table.reader().note(
                Severity::Error,
                &placed.span,
                "the file does not hold a pair secret".into(),
                "expected a file with 64 hexadecimal digits".into(),
                Some("`tandem genkey FILE` writes one; copy it to both hosts".into()),
            );
        }
        decoded
    });
    table.done();
    let secret = secret?;
    let digest_key = sha256(&[b"tandem config digest", secret.expose()]);
    Some((PairParts { timers, digest_key: Secret::from_slice(&digest_key) }, secret))
}

/// A key file by its path, relative to the configuration's folder.
fn key_file(table: &Table<'_>, key: &str, example: &str, keys: Keys<'_>) -> Option<Placed<Secret>> {
    let path = table.need(key, example, |text| match text {
        "" => Err(String::new()),
        text => Ok(PathBuf::from(text)),
    })?;
    match keys(&path.value) {
        Ok(value) => Some(Placed { value, span: path.span }),
        Err(error) => {
            table.reader().note(
                Severity::Error,
                &path.span,
                format!("key file {error}"),
                "expected a key file that only its owner can read (mode 0600)".into(),
                error.hint(),
            );
            None
        }
    }
}

/// Refuses secrets in the file itself, which is made to be copied, mailed and kept in version control.
fn inline_secret(table: &Table<'_>, keys: &[&str], instead: &str, example: &str) {
    for key in keys {
        if let Some(span) = table.refused(key) {
            table.reader().note(
                Severity::Error,
                &span,
                format!("`{}`: secrets do not stand in this file", table.path(key)),
                format!("expected {instead} = \"{example}\""),
                Some(
                    "put it on one line of a file with mode 0600; `tandem genkey FILE` draws one"
                        .into(),
                ),
            );
        }
    }
}

/// `[instances.NAME]`.
fn instances(tables: Vec<(String, Table<'_>)>, is_pair: bool) -> Vec<Instance> {
    let mut instances = Vec::new();
    for (name, table) in tables {
        let index = table.number("index", "", 0..=1).and_then(|n| u8::try_from(n.value).ok());
        if is_pair && index.is_none() && !table.contains("index") {
            table.missing("index", "0 or 1");
        }
        let links = table.list("links", "\"ADDRESS:PORT\"", values::link);
        if is_pair && links.is_none() && !table.contains("links") {
            table.missing("links", "[\"172.31.0.1:4600\", \"10.1.0.2:4600\"]");
        }
        let links = links.unwrap_or_default().into_iter().map(|link| link.value).collect();
        table.done();
        instances.push(Instance { name, index: index.unwrap_or(0), links });
    }
    instances
}

/// `[limits]`: bounds under attack (security.md).
fn limits(table: Table<'_>) -> Limits {
    let d = Limits::default();
    let at_least = |key, least: u64, most: u64, default: usize| {
        table
            .number(key, "", least..=most)
            .and_then(|n| usize::try_from(n.value).ok())
            .unwrap_or(default)
    };
    let count = |key, most, default| at_least(key, 1, most, default);
    let secs = |key, most, default| {
        table.number(key, "seconds", 1..=most).map_or(default, |n| Duration::from_secs(n.value))
    };
    let limits = Limits {
        cookie_total: count("cookie_total", 100_000, d.cookie_total),
        cookie_per_source: count("cookie_per_source", 1000, d.cookie_per_source),
        half_open_per_source: count("half_open_per_source", 1000, d.half_open_per_source),
        half_open_total: count("half_open_total", 100_000, d.half_open_total),
        half_open_timeout: secs("half_open_timeout_s", 600, d.half_open_timeout),
        cookie_rotation: secs("cookie_rotation_s", 3600, d.cookie_rotation),
        cookie_lifetime: secs("cookie_lifetime_s", 600, d.cookie_lifetime),
        message_len: table
            .number("message_len", "bytes", 1280..=65_535)
            .and_then(|n| usize::try_from(n.value).ok())
            .unwrap_or(d.message_len),
        children_per_ike: count("children_per_ike", 1000, d.children_per_ike),
        ike_per_connection: at_least("ike_per_connection", 3, 1000, d.ike_per_connection),
        initiations_per_peer: count("initiations_per_peer", 100, d.initiations_per_peer),
        initiations_total: count("initiations_total", 10_000, d.initiations_total),
    };
    table.done();
    limits
}

/// `interface = "eth0"` (the same everywhere) or `{ left = "eth0", right = "ens3" }`.
fn interface(table: &Table<'_>, instances: &[Instance]) -> BTreeMap<String, String> {
    let expected = "the name of an interface, or { INSTANCE = \"NAME\", … }";
    if table.is_table("interface") {
        let Some(by_name) = table.table("interface") else { return BTreeMap::new() };
        let names = by_name.names();
        let read = |name: String| {
            let device = by_name.text(&name, "the name of an interface", |t| Ok(t.to_owned()))?;
            Some((name, device.value))
        };
        return names.into_iter().filter_map(read).collect();
    }
    let device = table.text("interface", expected, |text| Ok(text.to_owned()));
    let everywhere = |device: Placed<String>| {
        instances.iter().map(|i| (i.name.clone(), device.value.clone())).collect()
    };
    device.map(everywhere).unwrap_or_default()
}

/// `remote_address`: an address, a list of them, or for each of our endpoints one or a list.
fn remotes(table: &Table<'_>) -> Option<Remotes> {
    const KEY: &str = "remote_address";
    let some = |table: &Table<'_>, key: &str, expected: &str| match table.is_list(key) {
        true => {
            let list = table.list(key, "an IPv4 address", values::remote_address)?;
            Some(list.into_iter().map(|remote| remote.value).collect())
        }
        false => table.need(key, expected, values::remote_address).map(|one| vec![one.value]),
    };
    if table.is_table(KEY) {
        let by_name = table.table(KEY)?;
        let read = |name: String| {
            let list = some(&by_name, &name, "an IPv4 address, or a list of them")?;
            Some((name, list))
        };
        return Some(Remotes::ByEndpoint(by_name.names().into_iter().filter_map(read).collect()));
    }
    some(table, KEY, "an IPv4 address, a list of them, or \"any\"").map(Remotes::Everywhere)
}

impl Section<'_, '_, '_> {
    /// `[endpoints.NAME]`.
    fn endpoints(&self, instances: &[Instance], is_pair: bool, local: &str) -> Vec<EndpointParts> {
        let mut endpoints = Vec::new();
        for (name, table) in self.table.tables("endpoints") {
            let take = |text: &str| Ok(text.to_owned());
            let home = match is_pair {
                true => table.need("home", "the name of an instance", take),
                false => table.text("home", "the name of an instance", take),
            };
            let on_failure =
                table.text("on_failure", "\"adopt\" or \"withdraw\"", |text| match text {
                    "adopt" => Ok(OnFailure::Adopt),
                    "withdraw" => Ok(OnFailure::Withdraw),
                    _ => Err(String::new()),
                });
            let example = "{ address = \"203.0.113.10\", interface = \"eth0\" }";
            if !table.contains("wan") {
                table.missing("wan", example);
            }
            let wan = table.table("wan").and_then(|wan| {
                let expected =
                    "an address of this segment that no host has, such as \"203.0.113.10\"";
                let address = wan.need("address", expected, values::address_in_network);
                let gateway = wan.text("gateway", "the next hop's address", values::address);
                let interface = interface(&wan, instances);
                wan.done();
                let (address, prefix) = address?.value;
                Some(WanParts { address, prefix, gateway: gateway.map(|g| g.value), interface })
            });
            let lan = table.table("lan").and_then(|lan| {
                let expected = "an address of this segment that no host has, such as \"10.1.0.1\"";
                let addresses = if lan.is_list("address") {
                    lan.list("address", expected, values::address).unwrap_or_default()
                } else {
                    lan.need("address", expected, values::address).into_iter().collect()
                };
                let interface = interface(&lan, instances);
                lan.done();
                let addresses: Vec<IpAddr> = addresses.into_iter().map(|a| a.value).collect();
                (!addresses.is_empty()).then_some(LanParts { addresses, interface })
            });
            let weight = table.number("weight", "shares of the flows", 1..=1000);
            let mut home_coming =
                HomeComing { preempt: table.switch("preempt", true), ..HomeComing::default() };
            if let Some(hold_down) = table.number("hold_down_s", "seconds", 0..=86_400) {
                home_coming.hold_down = Duration::from_secs(hold_down.value);
            }
            table.done();
            let Some(wan) = wan else { continue };
            endpoints.push(EndpointParts {
                name,
                home: home.map_or_else(|| local.to_owned(), |home| home.value),
                wan,
                lan,
                on_failure: on_failure.map_or(OnFailure::default(), |o| o.value),
                weight: weight.and_then(|w| u32::try_from(w.value).ok()).unwrap_or(1),
                home_coming,
            });
        }
        endpoints
    }

    /// `[connections.NAME]`.
    fn connections(&self, endpoints: &[EndpointParts]) -> Vec<ConnectionParts> {
        let tables = self.table.tables("connections");
        tables
            .into_iter()
            .filter_map(|(name, table)| self.connection(name, table, endpoints))
            .collect()
    }

    fn connection(
        &self,
        name: String,
        table: Table<'_>,
        endpoints: &[EndpointParts],
    ) -> Option<ConnectionParts> {
        let served = table.list("endpoints", "the name of an endpoint", |text| Ok(text.to_owned()));
        let served = match (served, endpoints) {
            (Some(names), _) => Some(names.into_iter().map(|n| n.value).collect::<Vec<_>>()),
            // With one endpoint there is nothing to choose.
            (None, [only]) if !table.contains("endpoints") => Some(vec![only.name.clone()]),
            (None, _) => {
                if !table.contains("endpoints") {
                    table.missing("endpoints", "[\"NAME\"]");
                }
                None
            }
        };
        let remotes = remotes(&table);
        let example = "an identity: \"gw.example\", \"user@example\", an address or \"@#HEX\"";
        let local_id = table.text("local_id", example, values::identity).map(|id| id.value);
        let remote_id = table.text("remote_id", example, values::identity).map(|id| id.value);
        // swanctl's default: the address.
        let first = served.as_ref().and_then(|names| names.first());
        let seat = first.and_then(|name| endpoints.iter().find(|e| &e.name == name));
        // The gateway's checks report a name without an endpoint; nothing is ever made of this address.
        let seat = seat.map_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED), |e| e.wan.address);
        let local_id = local_id.or_else(|| {
            if table.contains("local_id") { None } else { Some(Identity::address(seat)) }
        });
        let known = remotes.iter().flat_map(Remotes::all).map(|remote| match remote {
            RemoteAddress::Ip(address) => Some(address),
            RemoteAddress::Any => None,
        });
        let known: BTreeSet<_> = known.collect();
        let remote_id = remote_id.or_else(|| {
            match (table.contains("remote_id"), Vec::from_iter(known).as_slice()) {
                (true, _) | (false, []) => None,
                (false, [Some(address)]) => Some(Identity::address(*address)),
                (false, _) => {
                    table.missing("remote_id", "\"branch.example\"");
                    None
                }
            }
        });
        let psk = self.auth(&table);
        let ike_proposals =
            proposals(&table, "ike_proposals", "aes256gcm16-prfsha384-x25519", |text| {
                parse_ike(&[text]).map_err(|e| e.to_string())
            });
        let mut timers = Timers::default();
        set_duration(&table, "rekey_time", &mut timers.ike_rekey);
        set_duration(&table, "dpd_delay", &mut timers.dpd);
        set_duration(&table, "keepalive", &mut timers.keepalive);
        set_duration(&table, "retransmit_timeout", &mut timers.retransmit.initial);
        if let Some(tries) = table.number("retransmit_tries", "repetitions", 1..=20) {
            timers.retransmit.tries = u8::try_from(tries.value).unwrap_or(timers.retransmit.tries);
        }
        let mut shared =
            Shared { encap: encap(&table).map(|e| (table.path("encap"), e)), child_rekey: None };
        let children: Vec<_> = table
            .tables("children")
            .into_iter()
            .filter_map(|(name, child)| shared.child(name, child))
            .collect();
        table.done();
        timers.child_rekey = shared.child_rekey.map_or(timers.child_rekey, |(_, value)| value);
        Some(ConnectionParts {
            endpoints: served?,
            remotes: remotes?,
            ike: ConnectionConfig {
                name,
                id: ConnectionId(0),
                local_address: seat,
                remote_address: RemoteAddress::Any,
                local_id: local_id?,
                remote_id: remote_id?,
                psk: psk?,
                ike_proposals: ike_proposals.unwrap_or_else(default_ike),
                children,
                encap: shared.encap.map_or(Encap::Auto, |(_, encap)| encap),
                timers,
                initial_contact: true,
            },
        })
    }

    /// `auth = { psk_file = "…" }`.
    fn auth(&self, table: &Table<'_>) -> Option<Secret> {
        if !table.contains("auth") {
            table.missing("auth", "{ psk_file = \"/etc/tandem/NAME.psk\" }");
        }
        let auth = table.table("auth")?;
        for key in [
            "certs",
            "cert",
            "cert_file",
            "cacerts",
            "cacert_file",
            "private_key_file",
            "eap",
            "eap_id",
        ] {
            if let Some(span) = auth.refused(key) {
                auth.reader().error(
                    &span,
                    format!("`{}`: certificates and EAP are not in this release", auth.path(key)),
                    "expected psk_file = \"/etc/tandem/NAME.psk\"",
                );
            }
        }
        let refused = ["psk", "secret", "key", "password", "private_key"];
        inline_secret(&auth, &refused, "psk_file", "/etc/tandem/NAME.psk");
        let wants_other = auth.found_refused();
        let key = if wants_other && !auth.contains("psk_file") {
            None
        } else {
            key_file(&auth, "psk_file", "\"/etc/tandem/NAME.psk\"", self.keys)
        };
        auth.done();
        Some(key?.value)
    }
}

/// `encap`, on a connection or on one of its children.
fn encap(table: &Table<'_>) -> Option<Encap> {
    table.text("encap", "\"auto\", \"always\" or \"never\"", values::encap).map(|e| e.value)
}

/// A list of proposals; `None` when the key is missing or every entry is wrong (and noted).
fn proposals<T>(
    table: &Table<'_>,
    key: &str,
    example: &str,
    parse: impl Fn(&str) -> Result<Vec<T>, String>,
) -> Option<Vec<T>> {
    let list = table.list(key, &format!("a proposal such as \"{example}\""), parse)?;
    if list.is_empty()
        && let Some(span) = table.has(key)
        && !table.reader().failed()
    {
        let text = format!("`{}` is empty", table.path(key));
        table.reader().error(
            &span,
            text,
            format!("expected [\"{example}\"], or leave the key out"),
        );
    }
    Some(list.into_iter().flat_map(|p| p.value).collect())
}

fn set_duration(table: &Table<'_>, key: &str, into: &mut Duration) {
    let expected = "a duration such as \"4h\", \"30m\" or \"90s\"";
    if let Some(read) = table.text_or_number(key, expected, values::duration) {
        *into = read.value;
    }
}

/// What is written at a child but belongs to the IKE SA that all children share: written more than once,
/// it must be the same.
struct Shared {
    encap: Option<(String, Encap)>,
    child_rekey: Option<(String, Duration)>,
}

impl Shared {
    fn child(&mut self, name: String, table: Table<'_>) -> Option<ChildConfig> {
        let networks = "a network such as \"10.1.0.0/24\"";
        let selectors = |key: &str| {
            if !table.contains(key) {
                table.missing(key, "[\"10.1.0.0/24\"]");
            }
            let list = table.list(key, networks, values::selector)?;
            Some(list.into_iter().map(|ts| ts.value).collect::<Vec<_>>())
        };
        let (local_ts, remote_ts) = (selectors("local_ts"), selectors("remote_ts"));
        let esp_proposals = proposals(&table, "esp_proposals", "aes256gcm16-x25519", |text| {
            parse_esp(&[text]).map_err(|e| e.to_string())
        });
        let expected = "\"initiate\", \"trap\" or \"respond\"";
        let start =
            table.text("start", expected, values::start).map_or(Start::Respond, |s| s.value);
        if let Some(value) = encap(&table) {
            agree(&table, "encap", value, &mut self.encap);
        }
        let mut rekey = None;
        let expected = "a duration such as \"1h\" or \"90s\"";
        if let Some(read) = table.text_or_number("rekey_time", expected, values::duration) {
            rekey = Some(read.value);
        }
        if let Some(value) = rekey {
            agree(&table, "rekey_time", value, &mut self.child_rekey);
        }
        table.done();
        Some(ChildConfig {
            name,
            local_ts: local_ts?,
            remote_ts: remote_ts?,
            esp_proposals: esp_proposals.unwrap_or_else(default_esp),
            start,
        })
    }
}

/// Notes a value that contradicts the one an earlier place gave.
fn agree<T: PartialEq>(table: &Table<'_>, key: &str, value: T, known: &mut Option<(String, T)>) {
    match known {
        None => *known = Some((table.path(key), value)),
        Some((_, same)) if *same == value => {}
        Some((at, _)) => {
            let span: std::ops::Range<usize> = Reader::place(table.reader(), &table.path(key));
            table.reader().error(
                &span,
                format!("`{}` and `{at}` differ", table.path(key)),
                "expected one value: the children of a connection share it in this release",
            );
        }
    }
}
