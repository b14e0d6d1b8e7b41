//! What the kernel decides with our rules and routes, in a namespace of the test's own. Needs root.

use super::*;
use crate::config_file::{KeyFileError, Options, parse};
use crypto::Secret;
use std::path::Path;
use std::process::Command;

const SAMPLE: &str = include_str!("../../../../config/tandem.toml");

fn keys(path: &Path) -> Result<Secret, KeyFileError> {
    let pair = path.ends_with("pair.key");
    Ok(Secret::from_slice(if pair { &[b'a'; 64] } else { b"a long enough pre-shared key" }))
}

/// The sample as instance left, with these children.
fn config(children: &str) -> Config {
    let (head, rest) = SAMPLE.split_once("[connections.branch.children.net]").unwrap();
    let (_, tail) = rest.split_once("\n[").unwrap();
    let text = format!("{head}{children}\n[{tail}");
    let options = Options { instance: Some("left".into()), ..Options::default() };
    parse("test.toml", &text, &options, &keys).unwrap_or_else(|report| panic!("{report}")).config
}

const NET: &str = r#"
[connections.branch.children.net]
local_ts = ["10.1.0.0/24"]
remote_ts = ["10.2.0.0/24"]
"#;

fn run<F: Future<Output = ()>>(body: impl FnOnce(Netlink) -> F + Send + 'static) {
    crate::worker::tests::isolated(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async { body(Netlink::open().unwrap()).await });
    });
}

fn ip(arguments: &str) {
    let done = Command::new("ip").args(arguments.split(' ')).status().unwrap();
    assert!(done.success(), "ip {arguments}");
}

/// An interface with an address, up.
fn interface(name: &str, address: &str) -> u32 {
    ip(&format!("link add {name} type veth peer name {name}p"));
    ip(&format!("link set {name}p up"));
    ip(&format!("link set {name} up"));
    ip(&format!("address add {address} dev {name}"));
    netio::route::index_of(name).unwrap()
}

/// Where a packet of ours goes: the interface, or nothing when it is dropped.
fn way(from: &str, to: &str) -> Option<String> {
    let got = Command::new("ip").args(["route", "get", to, "from", from]).output().unwrap();
    let text = String::from_utf8(got.stdout).unwrap();
    let mut words = text.split_whitespace().skip_while(|word| *word != "dev");
    got.status.success().then(|| words.nth(1).unwrap().to_owned())
}

#[test]
fn an_uplink_that_is_down_sends_nothing_by_another_and_comes_back() {
    run(|netlink| async move {
        let config = config(NET);
        let endpoint = config.endpoint_named("main").unwrap();
        let uplink = interface("eth0", "203.0.113.2/24");
        interface("other", "198.51.100.2/24");
        ip("route add default via 198.51.100.1");
        ip("address add 203.0.113.10/32 dev lo");
        let from_virtual = || way("203.0.113.10", "8.8.8.8");
        assert_eq!(from_virtual().as_deref(), Some("other"), "the host's own default");
        set_uplink(&netlink, endpoint, uplink).await.unwrap();
        for _ in 0..2 {
            assert_eq!(from_virtual().as_deref(), Some("eth0"));
            assert_eq!(way("198.51.100.2", "8.8.8.8").as_deref(), Some("other"));
            ip("link set eth0 down");
            assert_eq!(from_virtual(), None, "not by another uplink");
            let look = || look_at_uplink(netlink.clone(), endpoint.clone(), "eth0".to_owned());
            assert!(!look().await, "it works although it is down");
            ip("link set eth0 up");
            assert_eq!(from_virtual(), None, "the kernel brings no route back");
            // The interface is up before it runs.
            while !look().await {
                tokio::task::yield_now().await;
            }
        }
        // What is wanted is not stale, the blackhole neither.
        remove_stale(&netlink, &config).await.unwrap();
        ip("link set eth0 down");
        assert_eq!(from_virtual(), None);
    });
}

#[test]
fn an_exemption_never_beats_a_named_pair() {
    let children = r#"
[connections.branch.children.everything]
local_ts = ["10.7.0.0/24", "10.3.0.0/24"]
remote_ts = ["0.0.0.0/0"]
[connections.branch.children.named]
local_ts = ["10.7.0.0/24"]
remote_ts = ["10.3.0.0/24"]
[connections.branch.children.inside]
local_ts = ["10.3.0.0/24"]
remote_ts = ["10.7.0.128/25"]
"#;
    run(move |netlink| async move {
        let config = config(children);
        interface("eth1", "10.7.0.2/24");
        interface("lan3", "10.3.0.2/24");
        let all = prefixes(config.protected_pairs());
        let exempt = exemptions(&all, &all);
        assert!(exempt.iter().all(|pair| !all.contains(pair)), "{exempt:?}");
        let protection = Protection::of(&config);
        protection.set(&netlink).await.unwrap();
        // There is no TUN: what belongs into a tunnel is dropped.
        assert_eq!(way("10.3.0.2", "10.7.0.7").as_deref(), Some("eth1"), "exempt");
        assert_eq!(way("10.7.0.2", "10.3.0.7"), None, "named, though everything covers it");
        assert_eq!(way("10.3.0.2", "10.7.0.200"), None, "named, inside an exempt network");
        assert_eq!(way("10.7.0.2", "192.0.2.1"), None, "everything");
        let nothing = Protection::default();
        nothing.replace(&protection, &protection, &netlink, 0).await.unwrap();
        assert_eq!(way("10.7.0.2", "10.3.0.7").as_deref(), Some("lan3"));
    });
}

/// Three branches side by side, whose rules are one.
const BRANCHES: &str = r#"
[connections.branch.children.net]
local_ts = ["10.1.0.0/24"]
remote_ts = ["10.2.0.0/24"]
[connections.second]
endpoints = ["main"]
remote_address = "198.51.100.8"
local_id = "gw.example"
remote_id = "second.example"
auth = { psk_file = "second.psk" }
[connections.second.children.net]
local_ts = ["10.1.0.0/24"]
remote_ts = ["10.2.1.0/24"]
[connections.third]
endpoints = ["main"]
remote_address = "198.51.100.9"
local_id = "gw.example"
remote_id = "third.example"
auth = { psk_file = "third.psk" }
[connections.third.children.net]
local_ts = ["10.1.0.0/24"]
remote_ts = ["10.2.2.0/23"]
"#;

#[test]
fn one_of_many_that_share_a_rule_is_purged_and_comes_back() {
    run(|netlink| async move {
        let config = config(BRANCHES);
        interface("eth0", "203.0.113.2/24");
        interface("lan", "10.1.0.2/24");
        ip("route add default via 203.0.113.1");
        let tun = interface("tun", "169.254.7.1/32");
        let keeper = Keeper::start(netlink.clone(), tun, &config).await.unwrap();
        let rules = Networks::of(&config).protection(&BTreeSet::new()).rules;
        assert_eq!(rules.len(), 2, "one out, one in: {rules:?}");
        let ways = || {
            let to = |net: u8| way("10.1.0.2", &format!("10.2.{net}.7"));
            [to(0), to(1), to(2), to(3), to(4)]
        };
        let of = |names: [&str; 5]| names.map(|name| Some(name.to_owned()));
        assert_eq!(ways(), of(["tun", "tun", "tun", "tun", "eth0"]));
        keeper.keep("second", false).await.unwrap();
        assert_eq!(ways(), of(["tun", "eth0", "tun", "tun", "eth0"]), "that alone may pass");
        keeper.keep("third", false).await.unwrap();
        assert_eq!(ways(), of(["tun", "eth0", "eth0", "eth0", "eth0"]));
        keeper.keep("second", true).await.unwrap();
        assert_eq!(ways(), of(["tun", "tun", "eth0", "eth0", "eth0"]));
        keeper.keep("second", true).await.unwrap();
        keeper.keep("third", true).await.unwrap();
        assert_eq!(ways(), of(["tun", "tun", "tun", "tun", "eth0"]));
        // Without the TUN nothing passes.
        ip("link del tun");
        assert_eq!(ways(), [None, None, None, None, Some("eth0".to_owned())]);
        assert_eq!(remove_stale(&netlink, &config).await.unwrap(), (0, 0), "all of it is wanted");
    });
}
