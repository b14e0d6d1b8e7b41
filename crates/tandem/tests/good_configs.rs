//! Configurations that are right: what they are read as, and what their digest does and does not see.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking, its helpers too")]

use std::path::Path;
use std::time::Duration;

use crypto::Secret;
use gateway::config::{Config, HomeComing, OnFailure, PairTimers};
use ike::config::{Encap, RemoteAddress, Start};
use tandem::config_file::{KeyFileError, Loaded, Options, Severity, host_needs, parse};
use wire::id::{ConnectionId, EndpointId};

const SAMPLE: &str = include_str!("../../../config/tandem.toml");
const ACTIVE: &str = include_str!("../../../config/active-active.toml");
const LONE: &str = include_str!("../../../config/lone.toml");
const PAIR_KEY: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";
const PSK: &str = "a long enough pre-shared key";

fn keys(path: &Path) -> Result<Secret, KeyFileError> {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let text = if name == "pair.key" { PAIR_KEY } else { PSK };
    Ok(Secret::from_slice(text.as_bytes()))
}

fn options(instance: &str) -> Options {
    Options { instance: Some(instance.into()), host: "host".into(), ..Options::default() }
}

fn read(text: &str, instance: &str) -> Loaded {
    parse("test.toml", text, &options(instance), &keys).unwrap_or_else(|report| panic!("{report}"))
}

#[test]
fn the_active_active_sample_is_read_as_it_says() {
    let loaded = read(ACTIVE, "left");
    assert!(loaded.report.is_empty(), "{}", loaded.report);
    let config = &loaded.config;
    let homes: Vec<_> =
        config.endpoints.iter().map(|e| (e.name.as_str(), e.home, e.weight)).collect();
    assert_eq!(homes, [("a", 0, 1), ("b", 1, 1)]);
    assert_eq!(config.connections[0].endpoints, [EndpointId(0), EndpointId(1)]);
    // peers.md 7: it would delete the tunnel at the other endpoint.
    assert!(!config.connections[0].ike.initial_contact);
}

/// Two pairs that face each other: near and far file, and the names of their instances.
const PAIRS: [([&str; 2], usize); 2] = [
    (
        [
            include_str!("../../../config/pairs-active-active/hq.toml"),
            include_str!("../../../config/pairs-active-active/branch.toml"),
        ],
        2,
    ),
    (
        [
            include_str!("../../../config/pairs-active-standby/hq.toml"),
            include_str!("../../../config/pairs-active-standby/branch.toml"),
        ],
        1,
    ),
];

#[test]
fn the_samples_of_two_pairs_fit_each_other() {
    for (texts, far_endpoints) in PAIRS {
        let instances = [["left", "right"], ["north", "south"]];
        let configs = [0, 1].map(|side| {
            let both = instances[side].map(|instance| read(texts[side], instance));
            for loaded in &both {
                assert!(loaded.report.is_empty(), "{}", loaded.report);
            }
            assert_eq!(both[0].config.digest(), both[1].config.digest());
            let [first, _] = both;
            first.config
        });
        assert_eq!(configs.each_ref().map(|c| c.endpoints.len()), [2, far_endpoints]);
        // Each tunnel of one side is one of the other's, seen from its end.
        let tunnels = |config: &Config| {
            let ike = config.endpoints.iter().flat_map(|e| {
                config.ike_endpoint(e.id).unwrap().connections.into_iter().map(|c| {
                    let RemoteAddress::Ip(remote) = c.remote_address else { panic!("{}", c.name) };
                    // peers.md 7: it would delete the other tunnel.
                    assert!(!c.initial_contact);
                    ([c.local_address, remote], [c.local_id.to_string(), c.remote_id.to_string()])
                })
            });
            ike.collect::<Vec<_>>()
        };
        let [near, far] = configs.each_ref().map(tunnels);
        let mut turned = far;
        turned.iter_mut().for_each(|(addresses, ids)| {
            addresses.reverse();
            ids.reverse();
        });
        turned.sort();
        assert_eq!((near.len(), &near), (2, &turned));
        let children = configs.each_ref().map(|c| c.connections[0].ike.children[0].clone());
        assert_eq!(children.each_ref().map(|c| c.start), [Start::Trap, Start::Initiate]);
        assert_eq!(children[0].local_ts, children[1].remote_ts);
        assert_eq!(children[0].remote_ts, children[1].local_ts);
    }
}

#[test]
fn how_an_endpoint_comes_home() {
    let of = |text: &str| read(text, "left").config.endpoints[0].clone();
    let usual = of(SAMPLE);
    assert_eq!(usual.home_coming, HomeComing::default());
    assert_eq!((usual.weight, usual.home_coming.hold_down), (1, Duration::from_secs(30)));
    let text = SAMPLE
        .replace("# weight = 1 ", "weight = 3 ")
        .replace("# preempt = true ", "preempt = false ")
        .replace("# hold_down_s = 30 ", "hold_down_s = 0 ");
    let changed = of(&text);
    let home_coming = HomeComing { preempt: false, hold_down: Duration::ZERO };
    assert_eq!((changed.weight, changed.home_coming), (3, home_coming));
    assert_ne!(read(SAMPLE, "left").config.digest(), read(&text, "left").config.digest());
}

#[test]
fn the_sample_is_read_as_it_says() {
    let loaded = read(SAMPLE, "right");
    assert!(loaded.report.is_empty(), "{}", loaded.report);
    let config = &loaded.config;
    assert_eq!(
        (config.local, config.instance_name(0), config.instance_name(1)),
        (1, "left", "right")
    );
    let pair = config.pair.as_ref().unwrap();
    assert_eq!(pair.peer, 0);
    assert_eq!(pair.timers, PairTimers::default());
    let links: Vec<String> =
        pair.links.iter().map(|l| format!("{}>{}", l.local, l.remote)).collect();
    assert_eq!(links, ["172.31.0.2:4600>172.31.0.1:4600", "10.1.0.3:4600>10.1.0.2:4600"]);
    assert_eq!(loaded.pair_secret.unwrap().expose(), (0..32).collect::<Vec<u8>>());

    let endpoint = config.endpoint_named("main").unwrap();
    assert_eq!(
        (endpoint.id, endpoint.home, endpoint.on_failure),
        (EndpointId(0), 0, OnFailure::Adopt)
    );
    assert_eq!(endpoint.wan.address.to_string(), "203.0.113.10");
    assert_eq!(endpoint.wan.gateway.unwrap().to_string(), "203.0.113.1");
    assert_eq!(endpoint.wan.interface, [Some("eth0".into()), Some("ens3".into())]);
    let lan = endpoint.lan.as_ref().unwrap();
    assert_eq!(lan.interface, [Some("eth1".into()), Some("eth1".into())]);

    let connection = config.connection_named("branch").unwrap();
    let ike = &connection.ike;
    assert_eq!((ike.id, connection.endpoints.as_slice()), (ConnectionId(0), &[EndpointId(0)][..]));
    assert_eq!(ike.remote_address, RemoteAddress::Ip("198.51.100.7".parse().unwrap()));
    assert_eq!(
        [ike.local_id.to_string(), ike.remote_id.to_string()],
        ["gw.example", "branch.example"]
    );
    assert_eq!(ike.psk.expose(), PSK.as_bytes());
    assert_eq!(ike.ike_proposals[0].to_string(), "aes256gcm16-prfsha384-x25519");
    assert_eq!((ike.encap, ike.initial_contact), (Encap::Auto, true));
    let child = &ike.children[0];
    assert_eq!((child.name.as_str(), child.start), ("net", Start::Initiate));
    assert_eq!(
        [child.local_ts[0].to_string(), child.remote_ts[0].to_string()],
        ["10.1.0.0/24", "10.2.0.0/24"]
    );
    assert_eq!(child.esp_proposals[0].to_string(), "aes256gcm16-x25519");

    let at_main = config.ike_endpoint(EndpointId(0)).unwrap();
    assert_eq!(at_main.addresses, ["203.0.113.10".parse::<std::net::IpAddr>().unwrap()]);
    assert_eq!(at_main.connections[0].local_address, at_main.addresses[0]);
    assert_eq!(host_needs(config).interfaces, ["ens3", "eth1"]);
    assert!(host_needs(config).forward_v4 && !host_needs(config).forward_v6);
}

/// Every key that the sample shows commented out exists, and the value shown is the default: with all of them
/// switched on the configuration is the same.
#[test]
fn the_defaults_that_the_sample_shows_are_the_defaults() {
    let on: Vec<String> = SAMPLE
        .lines()
        .map(|line| match line.strip_prefix("# ") {
            Some(rest) if !rest.contains("(example)") && is_setting(rest) => rest.to_owned(),
            _ => line.to_owned(),
        })
        .collect();
    assert!(on.iter().filter(|l| is_setting(l)).count() >= 28, "settings were not switched on");
    let (with, without) = (read(&on.join("\n"), "left"), read(SAMPLE, "left"));
    assert_eq!(format!("{:?}", with.config), format!("{:?}", without.config));
    assert_eq!(with.daemon, without.daemon);
}

fn is_setting(line: &str) -> bool {
    let key = line.split(" = ").next().unwrap_or_default();
    line.contains(" = ") && key.bytes().all(|b| b.is_ascii_lowercase() || b == b'_')
}

#[test]
fn examples_in_the_sample_are_taken_too() {
    let on = SAMPLE.replace("# mtu = ", "mtu = ").replace("# notify = ", "notify = ");
    let on = on.replace("# workers = 1 ", "workers = 16 ");
    let loaded = read(&on, "left");
    assert_eq!((loaded.daemon.mtu, loaded.daemon.workers), (Some(1400), 16));
    assert_eq!(loaded.daemon.notify.as_deref(), Some(Path::new("/etc/tandem/notify")));
}

#[test]
fn a_lone_gateway_needs_neither_pair_nor_instances() {
    let alone = Options { host: "alpha".into(), ..Options::default() };
    let loaded =
        parse("lone.toml", LONE, &alone, &keys).unwrap_or_else(|report| panic!("{report}"));
    assert!(loaded.report.is_empty(), "{}", loaded.report);
    let config = &loaded.config;
    assert!(config.pair.is_none() && loaded.pair_secret.is_none());
    assert_eq!((config.local, config.instance_name(0)), (0, "alpha"));
    let connection = &config.connections[0];
    assert_eq!(connection.ike.remote_address, RemoteAddress::Any);
    assert_eq!(connection.ike.children[0].start, Start::Respond);
    let pairs: Vec<String> =
        config.protected_pairs().iter().map(|(l, r)| format!("{l} {r}")).collect();
    assert_eq!(pairs, ["10.1.0.0/24 10.2.0.0/24", "fd00:1::/64 fd00:2::/64"]);
}

#[test]
fn durations_timers_and_limits_are_taken() {
    let text = SAMPLE
        .replace("# heartbeat_ms = 20 ", "heartbeat_ms = 10 ")
        .replace("# rekey_time = \"4h\"", "rekey_time = 7200")
        .replace("# rekey_time = \"1h\"", "rekey_time = \"90s\"")
        .replace("# dpd_delay = \"30s\"", "dpd_delay = \"0\"")
        .replace("# cookie_total = 30", "cookie_total = 31");
    let config = read(&text, "left").config;
    assert_eq!(config.pair.unwrap().timers.heartbeat, Duration::from_millis(10));
    let timers = config.connections[0].ike.timers;
    assert_eq!(timers.ike_rekey, Duration::from_secs(7200));
    assert_eq!(timers.child_rekey, Duration::from_secs(90));
    assert_eq!(timers.dpd, Duration::ZERO);
    assert_eq!(config.limits.cookie_total, 31);
}

#[test]
fn ids_follow_names_not_the_order_in_the_file() {
    let second = r#"
[endpoints.aux]
home = "right"
wan = { address = "203.0.113.11", interface = "eth0" }
[connections.alpha]
endpoints = ["main", "aux"]
remote_address = "198.51.100.8"
local_id = "gw.example"
remote_id = "alpha.example"
auth = { psk_file = "alpha.psk" }
children.net = { local_ts = ["10.1.0.0/24"], remote_ts = ["10.3.0.0/24"] }
"#;
    let config = read(&format!("{SAMPLE}{second}"), "left").config;
    let names: Vec<&str> = config.endpoints.iter().map(|e| e.name.as_str()).collect();
    assert_eq!(names, ["aux", "main"]);
    let names: Vec<&str> = config.connections.iter().map(|c| c.ike.name.as_str()).collect();
    assert_eq!(names, ["alpha", "branch"]);
    let alpha = config.connection_named("alpha").unwrap();
    assert_eq!(alpha.endpoints, [EndpointId(0), EndpointId(1)]);
    // peers.md 7: with the same identities at two endpoints INITIAL_CONTACT would delete the other tunnel.
    assert!(!alpha.ike.initial_contact);
    assert!(config.connection_named("branch").unwrap().ike.initial_contact);
    let at_main = config.ike_endpoint(EndpointId(1)).unwrap();
    assert_eq!(at_main.connections.len(), 2);
    assert!(at_main.connections.iter().all(|c| c.local_address.to_string() == "203.0.113.10"));
}

const REMOTE: &str = "remote_address = \"198.51.100.7\"";

/// The sample with a second endpoint and another remote_address.
fn with_remotes(endpoints: &str, remotes: &str) -> String {
    let aux = r#"
[endpoints.aux]
home = "right"
wan = { address = "203.0.113.11", interface = "eth0" }
"#;
    let both = format!("endpoints = [{endpoints}]\nremote_address = {remotes}");
    let text = SAMPLE.replace("endpoints = [\"main\"]\n", "").replace(REMOTE, &both);
    assert!(text.contains(&both));
    text + aux
}

#[test]
fn a_remote_gateway_has_an_address_for_each_endpoint_or_several() {
    let seats = |text: &str| {
        let config = read(text, "left").config;
        let seats = config.connections.iter().map(|c| {
            let remotes: Vec<String> = c.remotes.iter().map(ToString::to_string).collect();
            let at: Vec<u8> = c.endpoints.iter().map(|e| e.0).collect();
            assert!(c.is_named("branch") && !c.ike.initial_contact, "peers.md 7");
            (c.ike.name.clone(), c.group.0, at, remotes.join(" "))
        });
        let seats: Vec<_> = seats.collect();
        // IKE at an endpoint is told the address that belongs there.
        for id in [0, 1] {
            let ike = config.ike_endpoint(EndpointId(id)).unwrap();
            for connection in &ike.connections {
                let own = config.connection(connection.id).unwrap();
                assert_eq!(Some(connection.remote_address), own.remote_at(EndpointId(id)));
                assert_eq!(connection.name, own.ike.name);
            }
        }
        seats
    };
    let both = "\"main\", \"aux\"";
    let of_each = "{ main = \"198.51.100.7\", aux = \"198.51.100.8\" }";
    assert_eq!(
        seats(&with_remotes(both, of_each)),
        [("branch".into(), 0, vec![0, 1], "198.51.100.8 198.51.100.7".into())]
    );
    let list = "[\"198.51.100.7\", \"198.51.100.8\"]";
    assert_eq!(
        seats(&with_remotes("\"main\"", list)),
        [
            ("branch#1".into(), 0, vec![1], "198.51.100.7".into()),
            ("branch#2".into(), 0, vec![1], "198.51.100.8".into()),
        ]
    );
    let mixed = "{ main = [\"198.51.100.7\", \"198.51.100.8\"], aux = \"198.51.100.9\" }";
    assert_eq!(
        seats(&with_remotes(both, mixed)),
        [
            ("branch#1".into(), 0, vec![0, 1], "198.51.100.9 198.51.100.7".into()),
            ("branch#2".into(), 0, vec![1], "198.51.100.8".into()),
        ]
    );
    // The same written otherwise is the same, and one that differs is not.
    let digest = |remotes: &str| digest_of(&with_remotes("\"main\"", remotes), "left");
    assert_eq!(digest("\"198.51.100.7\""), digest("[\"198.51.100.7\"]"));
    assert_ne!(digest(list), digest("[\"198.51.100.8\", \"198.51.100.7\"]"));
    assert_ne!(digest(list), digest("\"198.51.100.7\""));
}

fn digest_of(text: &str, instance: &str) -> [u8; 32] {
    read(text, instance).config.digest()
}

#[test]
fn the_digest_is_that_of_what_must_agree() {
    let digest = digest_of(SAMPLE, "left");
    assert_eq!(digest, digest_of(SAMPLE, "right"), "both hosts compute the same");
    for (from, to) in [
        ("# mtu = 1400", "mtu = 1500"),
        ("right = \"ens3\"", "right = \"ens4\""),
        ("# cookie_total = 30", "cookie_total = 40"),
        ("gateway = \"203.0.113.1\", ", ""),
    ] {
        let changed = SAMPLE.replace(from, to);
        assert_ne!(changed, SAMPLE);
        assert_eq!(digest, digest_of(&changed, "left"), "{from} may differ between hosts");
    }
    for (from, to) in [
        ("# heartbeat_ms = 20 ", "heartbeat_ms = 19 "),
        ("172.31.0.1:4600", "172.31.0.9:4600"),
        ("home = \"left\"", "home = \"right\""),
        ("\"203.0.113.10\"", "\"203.0.113.20\""),
        ("\"10.1.0.1\"", "\"10.1.0.9\""),
        ("# on_failure = \"adopt\" ", "on_failure = \"withdraw\" "),
        ("\"198.51.100.7\"", "\"198.51.100.8\""),
        ("\"branch.example\"", "\"other.example\""),
        ("aes256gcm16-prfsha384", "aes128gcm16-prfsha384"),
        ("[\"10.2.0.0/24\"]", "[\"10.2.0.0/23\"]"),
        ("start = \"initiate\"", "start = \"trap\""),
        ("encap = \"auto\"", "encap = \"always\""),
        ("encap = \"auto\"", "encap = \"never\""),
        ("# rekey_time = \"1h\"", "rekey_time = \"2h\""),
        ("[connections.branch.children.net]", "[connections.branch.children.lan]"),
    ] {
        let changed = SAMPLE.replace(from, to);
        assert_ne!(changed, SAMPLE);
        assert_ne!(digest, digest_of(&changed, "left"), "{from} must agree");
    }
}

#[test]
fn another_key_gives_another_digest_and_none_is_ever_shown() {
    let other = |path: &Path| match path.ends_with("pair.key") {
        true => keys(path),
        false => Ok(Secret::from_slice(b"another long enough pre-shared key")),
    };
    let config: Config = read(SAMPLE, "left").config;
    let changed = parse("t", SAMPLE, &options("left"), &other).unwrap_or_else(|r| panic!("{r}"));
    assert_ne!(config.digest(), changed.config.digest());
    let shown = format!("{config:?} {:?}", changed.pair_secret);
    assert!(!shown.contains("pre-shared key") && !shown.contains(&format!("{:?}", PSK.as_bytes())));
}

#[test]
fn what_is_weak_is_warned_about_and_taken() {
    let one_link = SAMPLE.replace(", \"10.1.0.2:4600\"", "").replace(", \"10.1.0.3:4600\"", "");
    let loaded = read(&one_link, "left");
    let rows = loaded.report.rows();
    assert_eq!(rows.len(), 2, "{}", loaded.report);
    assert!(rows.iter().all(|r| r.severity == Severity::Warning && r.message.contains("one link")));

    let short = |_: &Path| Ok(Secret::from_slice(b"short"));
    let loaded =
        parse("lone.toml", LONE, &Options { host: "a".into(), ..Options::default() }, &short)
            .unwrap_or_else(|report| panic!("{report}"));
    assert!(loaded.report.to_string().contains("only 5 characters"), "{}", loaded.report);

    let twice = format!(
        "{SAMPLE}\n[connections.branch.children.wide]\nlocal_ts = [\"10.1.0.0/16\"]\nremote_ts = [\"10.2.0.0/16\"]\n"
    );
    let twice = twice.replace("[limits]", "[limits] #");
    let loaded = read(&twice, "left");
    let report = loaded.report.to_string();
    assert!(report.contains("`branch.net` and `branch.wide` both cover"), "{report}");
}
