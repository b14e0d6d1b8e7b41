//! Every cross-check of `gateway::config`, one small change to the sample each: what is said, where, and that
//! the sample alone says nothing. What a check must let pass stands right beside what it must not.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking, its helpers too")]

use std::path::Path;

use crypto::Secret;
use tandem::config_file::{KeyFileError, Options, Severity, parse};

const SAMPLE: &str = include_str!("../../../config/tandem.toml");

fn keys(path: &Path) -> Result<Secret, KeyFileError> {
    match path.file_name().and_then(|name| name.to_str()) {
        Some("pair.key") => Ok(Secret::from_slice(&[b'a'; 64])),
        Some("empty.psk") => Ok(Secret::from_slice(b"")),
        _ => Ok(Secret::from_slice(b"a long enough pre-shared key")),
    }
}

/// `severity offending-text: message` of each problem in the sample after the changes.
fn problems(changes: &[(&str, &str)], more: &str) -> Vec<String> {
    let mut text = SAMPLE.to_owned();
    for (from, to) in changes {
        assert!(text.contains(from), "the sample has no {from}");
        text = text.replace(from, to);
    }
    text += more;
    let options = Options { instance: Some("left".into()), ..Options::default() };
    let report = match parse("t.toml", &text, &options, &keys) {
        Ok(loaded) => loaded.report,
        Err(report) => report,
    };
    let level = |severity| if severity == Severity::Error { "error" } else { "warning" };
    report
        .rows()
        .iter()
        .map(|r| format!("{} {}: {}", level(r.severity), r.text, r.message))
        .collect()
}

#[test]
fn the_sample_has_no_problems() {
    assert_eq!(problems(&[], ""), Vec::<String>::new());
}

#[test]
fn each_rule_speaks_up() {
    let second = |at: &str, extra: &str| {
        format!(
            "\n[connections.second]\nendpoints = [\"{at}\"]\nremote_address = \"198.51.100.7\"\n\
             local_id = \"gw.example\"\nauth = {{ psk_file = \"s.psk\" }}\n{extra}\n\
             children.net = {{ local_ts = [\"10.9.0.0/24\"], remote_ts = [\"10.8.0.0/24\"] }}\n"
        )
    };
    let same = second("main", "remote_id = \"branch.example\"");
    let child = |local: &str, remote: &str| {
        format!(
            "\n[connections.branch.children.more]\nlocal_ts = [{local}]\nremote_ts = [{remote}]\n"
        )
    };
    /// Replacements in the sample, text to append, and the first lines of the report.
    type Case<'a> = (Vec<(&'a str, &'a str)>, String, &'a str);
    #[rustfmt::skip]
    let cases: Vec<Case<'_>> = vec![
        // The pair.
        (vec![("[instances.right]\nindex = 1\nlinks = [\"172.31.0.2:4600\", \"10.1.0.3:4600\"]", "")], String::new(),
            "error instances: a pair has two instances, this file has 1"),
        (vec![("[pair]\n", "# "), ("secret_file = ", "# ")], String::new(),
            "error instances: several instances, but no [pair]"),
        (vec![("# heartbeat_ms = 20 ", "heartbeat_ms = 4 ")], String::new(),
            "error 4: heartbeats every 4 ms"),
        (vec![("# fence_after_ms = 80 ", "fence_after_ms = 59 ")], String::new(),
            "error 59: fence_after_ms 59 is less than three heartbeats of 20 ms"),
        (vec![("# fence_after_ms = 80 ", "fence_after_ms = 81 ")], String::new(),
            "error 81: fence_after_ms 81 + heartbeat_ms 20 is more than dead_after_ms 100"),
        (vec![("172.31.0.1:4600", "172.31.0.1:0")], String::new(),
            "error \"172.31.0.1:0\": `172.31.0.1:0` cannot be reached by the other instance"),
        (vec![("172.31.0.1:4600", "0.0.0.0:4600")], String::new(),
            "error \"0.0.0.0:4600\": `0.0.0.0:4600` cannot be reached by the other instance"),
        (vec![("172.31.0.1:4600", "172.31.0.2:4600")], String::new(),
            "error \"172.31.0.2:4600\": link `172.31.0.2:4600` of `right` is taken by `left`"),
        (vec![("172.31.0.1:4600", "[fd00::1]:4600")], String::new(),
            "error \"172.31.0.2:4600\": path 1 runs from [fd00::1]:4600 to 172.31.0.2:4600"),
        (vec![("\"172.31.0.1:4600\", ", "\"172.31.0.1:1\", \"172.31.0.1:2\", \"172.31.0.1:3\", \"172.31.0.1:4\", \"172.31.0.1:5\", \"172.31.0.1:6\", \"172.31.0.1:7\", \"172.31.0.1:8\", ")], String::new(),
            "9 links"),
        // Endpoints.
        (vec![("203.0.113.10\"", "224.0.0.1\"")], String::new(),
            "error \"224.0.0.1\": `224.0.0.1` is not an address that peers can reach"),
        (vec![("gateway = \"203.0.113.1\"", "gateway = \"203.0.113.10\"")], String::new(),
            "error \"203.0.113.10\": the gateway is the virtual address itself"),
        (vec![("gateway = \"203.0.113.1\"", "gateway = \"fd00::1\"")], String::new(),
            "error \"fd00::1\": gateway fd00::1 cannot serve 203.0.113.10"),
        (vec![("address = \"203.0.113.10\"", "address = \"203.0.113.130/25\"")], String::new(),
            "error \"203.0.113.1\": gateway 203.0.113.1 is not in the network of 203.0.113.130/25"),
        (vec![("address = \"10.1.0.1\"", "address = \"203.0.113.10\"")], String::new(),
            "error \"203.0.113.10\": 203.0.113.10 is a virtual address of endpoint `main` already"),
        (vec![("right = \"ens3\"", "rigth = \"ens3\"")], String::new(),
            "error \"ens3\": `rigth` is no instance"),
        (vec![("\"ens3\"", "\"a-name-that-is-too-long\"")], String::new(),
            "is no name of an interface"),
        (vec![("lan = { address = \"10.1.0.1\", interface = \"eth1\" }", "lan = { address = \"10.1.0.1\" }")], String::new(),
            "error lan: endpoint `main`: `left` is its home, but has no LAN interface"),
        // Connections.
        (vec![("endpoints = [\"main\"]", "endpoints = [\"main\", \"main\"]")], String::new(),
            "error \"main\": endpoint `main` is named twice"),
        (vec![("endpoints = [\"main\"]", "endpoints = []")], String::new(),
            "error []: no endpoint serves this connection"),
        (vec![("\"198.51.100.7\"", "\"203.0.113.10\"")], String::new(),
            "error \"203.0.113.10\": 203.0.113.10 is our own endpoint `main`"),
        (vec![("\"198.51.100.7\"", "\"2001:db8::7\"")], String::new(),
            "error \"2001:db8::7\": IPv6 address 2001:db8::7 of a remote gateway"),
        (vec![("\"198.51.100.7\"", "[\"198.51.100.7\", \"198.51.100.7\"]")], String::new(),
            "198.51.100.7 is named twice"),
        (vec![("\"198.51.100.7\"", "[]")], String::new(),
            "error []: 0 addresses of a remote gateway"),
        (vec![("\"198.51.100.7\"", "[\"198.51.100.7\", \"any\"]")], String::new(),
            "\"any\" beside an address"),
        (vec![("\"198.51.100.7\"", "{ mian = \"198.51.100.7\" }")], String::new(),
            "error \"198.51.100.7\": endpoint `mian` does not serve this connection"),
        (vec![("\"198.51.100.7\"", "{ }")], String::new(),
            "error remote_address: no address of the remote gateway for endpoint `main`"),
        (vec![("remote_id = \"branch.example\"", "remote_id = \"gw.example\"")], String::new(),
            "error \"gw.example\": both sides are called `gw.example`"),
        (vec![("branch.psk\" }", "empty.psk\" }")], String::new(),
            "error \"/etc/tandem/empty.psk\": the pre-shared key is empty"),
        (vec![("# rekey_time = \"4h\"", "rekey_time = \"4s\"")], String::new(),
            "error \"4s\": the IKE SA would be rekeyed all the time"),
        (vec![("# rekey_time = \"1h\"", "rekey_time = \"0\"")], String::new(),
            "error \"0\": the Child SA would be rekeyed all the time"),
        (vec![], same, "are both from `gw.example` to `branch.example` at endpoint `main`"),
        (vec![], child("\"10.1.5.0/24\"", "\"10.2.5.0/24\"") + "encap = \"always\"\n",
            "error \"auto\": `connections.branch.children.net.encap` and `connections.branch.children.more.encap` differ"),
        // Children.
        (vec![], child("\"10.1.5.0/24\"", "\"fd00::/64\""),
            "10.1.5.0/24 has no selector of its address family on the other side"),
        (vec![], child("", "\"10.2.5.0/24\""), "error []: no selectors"),
        (vec![], child("\"172.31.0.1/32\"", "\"172.31.0.0/24\""),
            "the pair link between 172.31.0.1 and 172.31.0.2 would go into this tunnel"),
        (vec![], child("\"10.1.0.128/25\"", "\"10.2.0.0/16\""),
            "both cover traffic between 10.1.0.128/25 and 10.2.0.0/24"),
        (vec![("[connections.branch.children.net]", "[connections.branch.children.\"a b\"]")], String::new(),
            "error \"a b\": \"a b\" is no name"),
    ];
    for (changes, more, expected) in &cases {
        let found = problems(changes, more);
        assert!(found.iter().any(|p| p.contains(expected)), "{expected}\nfound only {found:#?}");
    }
}

/// The other side of the rules above: values at the limit, and look-alikes that are right.
#[test]
fn what_is_right_passes() {
    let second = "\n[connections.second]\nremote_address = \"198.51.100.7\"\nlocal_id = \"gw.example\"\n\
        remote_id = \"other.example\"\nauth = { psk_file = \"s.psk\" }\n\
        children.net = { local_ts = [\"10.1.0.0/24\"], remote_ts = [\"10.3.0.0/24\"] }\n";
    let dual = "\n[connections.branch.children.dual]\nlocal_ts = [\"10.1.5.0/24\", \"fd00:1::/64\"]\n\
        remote_ts = [\"fd00:2::/64\", \"10.2.5.0/24\"]\nencap = \"auto\"\n";
    for (changes, more) in [
        (vec![("# fence_after_ms = 80 ", "fence_after_ms = 60 ")], ""),
        (vec![("# heartbeat_ms = 20 ", "heartbeat_ms = 5 ")], ""),
        (vec![("address = \"203.0.113.10\"", "address = \"203.0.113.10/24\"")], ""),
        (vec![("# rekey_time = \"4h\"", "rekey_time = \"5s\"")], ""),
        (vec![], second),
        (vec![], dual),
        (
            vec![
                (
                    "interface = { left = \"eth0\", right = \"ens3\" }",
                    "interface = { left = \"eth0\" }",
                ),
                ("lan = {", "on_failure = \"withdraw\"\nlan = {"),
            ],
            "",
        ),
    ] {
        assert_eq!(problems(&changes, more), Vec::<String>::new(), "{changes:?}{more}");
    }
}
