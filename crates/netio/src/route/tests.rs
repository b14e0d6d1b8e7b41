use super::*;
use crate::sys::{in_new_namespace, ip, stub};
use crate::tun::Tun;
use std::time::{Duration, Instant};

fn run<F: Future<Output = ()>>(body: impl FnOnce() -> F + Send + 'static) {
    in_new_namespace(|| {
        ip("link set lo up");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(body());
    });
}

fn prefix(text: &str) -> Prefix {
    let (address, length) = text.split_once('/').unwrap();
    Prefix::new(address.parse().unwrap(), length.parse().unwrap()).unwrap()
}

#[test]
fn prefixes_clear_host_bits_and_bound_lengths() {
    assert_eq!(prefix("10.1.2.3/8").to_string(), "10.0.0.0/8");
    assert_eq!(prefix("10.1.2.3/0").to_string(), "0.0.0.0/0");
    assert_eq!(prefix("10.1.2.3/32").to_string(), "10.1.2.3/32");
    assert_eq!(prefix("2001:db8:ffff::1/32").to_string(), "2001:db8::/32");
    assert_eq!(prefix("2001:db8::1/0").to_string(), "::/0");
    assert_eq!(Prefix::new("10.0.0.1".parse().unwrap(), 33), None);
    assert_eq!(Prefix::new("::1".parse().unwrap(), 129), None);
}

#[test]
fn addresses_come_quickly_and_go() {
    run(|| async {
        let tun = Tun::open_plain("tdm0").unwrap();
        tun.configure(1400, 500).unwrap();
        let netlink = Netlink::open().unwrap();
        let addresses: [IpAddr; 2] =
            ["203.0.113.10".parse().unwrap(), "2001:db8::10".parse().unwrap()];
        let mut slowest = Duration::ZERO;
        for _ in 0..20 {
            for address in addresses {
                let start = Instant::now();
                netlink.add_address(tun.index(), address).await.unwrap();
                slowest = slowest.max(start.elapsed());
                netlink.add_address(tun.index(), address).await.unwrap();
            }
            assert_eq!(netlink.addresses(tun.index()).await.unwrap(), addresses);
            // Usable at once.
            std::net::UdpSocket::bind("203.0.113.10:4500").unwrap();
            std::net::UdpSocket::bind("[2001:db8::10]:4500").unwrap();
            for address in addresses {
                netlink.remove_address(tun.index(), address).await.unwrap();
                netlink.remove_address(tun.index(), address).await.unwrap();
            }
        }
        assert!(netlink.addresses(tun.index()).await.unwrap().is_empty());
        // A takeover waits for this; normally far below a millisecond.
        assert!(slowest < Duration::from_millis(50), "{slowest:?}");
    });
}

/// A link that came up has its own IPv6 routes some time later.
fn without_link_routes(shown: &str) -> String {
    let ours = |line: &&str| !line.contains("fe80::") && !line.contains("ff00::");
    shown.lines().filter(ours).flat_map(|line| [line, "\n"]).collect()
}

#[test]
fn blackholes_and_rules_outlive_the_tun_and_purge_removes_them() {
    run(|| async {
        stub("lan0");
        ip("address add 10.1.0.2/24 dev lan0");
        ip("route add default via 10.1.0.254");
        ip("route add 10.77.0.0/24 via 10.1.0.253");
        let all_routes = || without_link_routes(&ip("route show table all"));
        let before = (all_routes(), ip("rule show"), ip("-6 rule show"));
        let netlink = Netlink::open().unwrap();
        let tun = Tun::open_plain("tdm0").unwrap();
        tun.configure(1400, 500).unwrap();
        let routes = |target, table, metric| {
            ["10.2.0.0/24", "2001:db8:2::/64"].map(|destination| Route {
                destination: prefix(destination),
                table,
                target,
                metric,
                source: None,
            })
        };
        let mut all = Vec::new();
        all.extend(routes(Target::Device(tun.index()), 1160, 10));
        all.extend(routes(Target::Blackhole, 1160, LAST_METRIC));
        all.extend(routes(Target::Device(tun.index()), MAIN_TABLE, 10));
        let rules = ["10.1.0.0/24 10.2.0.0/24", "2001:db8:1::/64 2001:db8:2::/64"].map(|pair| {
            let (local, remote) = pair.split_once(' ').unwrap();
            let lookup = Rule {
                priority: 900,
                from: Some(prefix(local)),
                to: Some(prefix(remote)),
                input: None,
                traffic: None,
                action: Action::Lookup(1160),
            };
            let drop = Rule {
                priority: 901,
                from: Some(prefix(remote)),
                to: Some(prefix(local)),
                input: Some("wan0".to_owned()),
                traffic: None,
                action: Action::Blackhole,
            };
            [lookup, drop]
        });
        let rules = rules.as_flattened();
        for _ in 0..2 {
            for route in &all {
                netlink.set_route(route).await.unwrap();
            }
            for rule in rules {
                netlink.add_rule(rule).await.unwrap();
            }
        }
        let shown = ip("rule show");
        assert!(
            shown.contains("900:\tfrom 10.1.0.0/24 to 10.2.0.0/24 lookup 1160 proto 116"),
            "{shown}"
        );
        assert!(
            shown.contains("from 10.2.0.0/24 to 10.1.0.0/24 iif wan0 [detached] blackhole"),
            "{shown}"
        );
        assert_eq!(shown.matches("proto 116").count(), 2, "adding twice adds once: {shown}");
        let choice = "route get 10.2.0.7 from 10.1.0.2";
        assert!(ip(choice).contains("dev tdm0"));
        assert!(ip("route show").contains("10.2.0.0/24 dev tdm0 proto 116"));

        // The process is killed: the kernel drops the TUN, and the traffic must go nowhere.
        drop(tun);
        let got = std::process::Command::new("ip").args(choice.split(' ')).output().unwrap();
        assert!(!got.status.success(), "in clear: {}", String::from_utf8_lossy(&got.stdout));
        assert!(!ip("route show").contains("10.2.0.0"));

        // Removing one by one and purging are both complete and repeatable.
        netlink.remove_rule(&rules[0]).await.unwrap();
        netlink.remove_rule(&rules[0]).await.unwrap();
        netlink.remove_route(&all[2]).await.unwrap();
        netlink.remove_route(&all[2]).await.unwrap();
        assert_eq!(netlink.purge().await.unwrap(), (1, 3));
        assert_eq!(netlink.purge().await.unwrap(), (0, 0));
        assert_eq!((all_routes(), ip("rule show"), ip("-6 rule show")), before);
    });
}

#[test]
fn uplink_table_with_a_gateway_follows_the_source_address() {
    run(|| async {
        for (name, address) in [("up0", "198.51.100.2/24"), ("up1", "203.0.113.2/24")] {
            stub(name);
            ip(&format!("address add {address} dev {name}"));
        }
        ip("route add default via 198.51.100.1");
        ip("address add 203.0.113.10/32 dev lo");
        let netlink = Netlink::open().unwrap();
        let interface = index_of("up1").unwrap();
        let gateway = "203.0.113.1".parse().unwrap();
        let route = Route {
            destination: prefix("0.0.0.0/0"),
            table: 1161,
            target: Target::Gateway { gateway, interface, onlink: true },
            metric: 0,
            source: None,
        };
        netlink.set_route(&route).await.unwrap();
        let rule = Rule {
            priority: 1000,
            from: Some(prefix("203.0.113.10/32")),
            to: None,
            input: None,
            traffic: None,
            action: Action::Lookup(1161),
        };
        netlink.add_rule(&rule).await.unwrap();
        assert!(ip("route get 8.8.8.8 from 203.0.113.10").contains("via 203.0.113.1 dev up1"));
        assert!(ip("route get 8.8.8.8").contains("via 198.51.100.1 dev up0"));
    });
}

#[test]
fn link_state_is_read_and_watched() {
    run(|| async {
        let netlink = Netlink::open().unwrap();
        assert_eq!(netlink.link("v0").await.unwrap(), None);
        assert!(index_of("v0").is_err());
        let mut monitor = LinkMonitor::open().unwrap();
        ip("link add v0 mtu 1450 address 02:00:00:00:00:05 type veth peer name v1");
        ip("link set v0 up");
        let state = netlink.link("v0").await.unwrap().unwrap();
        assert_eq!(
            (state.mtu, state.mac, state.up, state.running),
            (1450, Some([2, 0, 0, 0, 0, 5]), true, false)
        );
        ip("link set v1 up");
        ip("link delete v0");
        let mut running = false;
        tokio::time::timeout(Duration::from_secs(3), async {
            loop {
                match monitor.next().await.unwrap() {
                    LinkEvent::Changed(state) if state.name == "v0" => running |= state.running,
                    LinkEvent::Removed { name } if name == "v0" => break,
                    _ => {}
                }
            }
        })
        .await
        .unwrap();
        assert!(running, "the carrier was seen in between");
    });
}

fn rule(priority: u32, from: &str, to: &str, action: Action) -> Rule {
    let side = |text: &str| (text != "any").then(|| prefix(text));
    Rule { priority, from: side(from), to: side(to), input: None, traffic: None, action }
}

#[test]
fn what_a_new_configuration_does_not_want_goes_and_the_rest_stays() {
    run(|| async {
        stub("lan0");
        let netlink = Netlink::open().unwrap();
        let from_wan = |from: &str, to: &str| Rule {
            input: Some("wan0".to_owned()),
            ..rule(90, from, to, Action::Blackhole)
        };
        let wanted = [
            rule(100, "10.1.0.0/24", "10.2.0.0/24", Action::Lookup(1160)),
            rule(100, "10.1.0.0/24", "10.3.0.0/24", Action::Lookup(1160)),
            rule(100, "2001:db8:1::/64", "2001:db8:2::/64", Action::Lookup(1160)),
            rule(101, "10.1.0.0/24", "0.0.0.0/0", Action::Lookup(1160)),
            rule(95, "10.1.0.0/24", "10.1.0.0/24", Action::LookupNoDefault(MAIN_TABLE)),
            rule(110, "203.0.113.10/32", "any", Action::Lookup(1161)),
            from_wan("10.2.0.0/24", "10.1.0.0/24"),
            Rule {
                input: Some("lo".to_owned()),
                traffic: Some(Traffic::UdpFrom(4500)),
                ..rule(94, "203.0.113.10/32", "any", Action::Lookup(1161))
            },
            Rule {
                input: Some("lo".to_owned()),
                traffic: Some(Traffic::Esp),
                ..rule(94, "203.0.113.10/32", "any", Action::Lookup(1161))
            },
        ];
        let stale = [
            rule(100, "10.1.0.0/24", "10.9.0.0/24", Action::Lookup(1160)),
            rule(100, "2001:db8:1::/64", "2001:db8:9::/64", Action::Lookup(1160)),
            // The request to delete this one fits every other rule from 10.1.0.0/24 to somewhere.
            rule(102, "10.1.0.0/24", "any", Action::Lookup(1160)),
            from_wan("10.9.0.0/24", "10.1.0.0/24"),
            rule(110, "203.0.113.99/32", "any", Action::Lookup(1162)),
            Rule {
                traffic: Some(Traffic::Esp),
                ..rule(94, "203.0.113.99/32", "any", Action::Lookup(1162))
            },
        ];
        let blackhole = |to: &str| Route {
            destination: prefix(to),
            table: 1160,
            target: Target::Blackhole,
            metric: LAST_METRIC,
            source: None,
        };
        let kept_routes = ["10.2.0.0/24", "0.0.0.0/0", "2001:db8:2::/64"].map(blackhole);
        ip("rule add priority 100 from 10.7.0.0/24 to 10.8.0.0/24 lookup 77");
        ip("route add 10.7.0.0/24 dev lan0");
        for rule in &wanted {
            netlink.add_rule(rule).await.unwrap();
        }
        for route in &kept_routes {
            netlink.set_route(route).await.unwrap();
        }
        let shown = || {
            ["rule show", "-6 rule show", "route show table all", "-6 route show table all"]
                .map(|what| without_link_routes(&ip(what)))
        };
        let before = shown();
        assert!(before[0].contains("ipproto esp"), "{}", before[0]);
        assert_eq!(netlink.remove_all_but(&wanted, &kept_routes).await.unwrap(), (0, 0));
        for rule in &stale {
            netlink.add_rule(rule).await.unwrap();
        }
        for to in ["10.9.0.0/24", "2001:db8:9::/64"] {
            netlink.set_route(&blackhole(to)).await.unwrap();
        }
        assert_ne!(shown(), before);
        // Whoever removed a wanted rule and set it again would be heard here.
        let mut monitor = std::process::Command::new("ip")
            .args(["-d", "monitor", "rule"])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        tokio::time::sleep(Duration::from_millis(300)).await;
        let gone = netlink.remove_all_but(&wanted, &kept_routes).await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        // Before anything that may fail: it would outlive the test.
        monitor.kill().unwrap();
        let heard = monitor.wait_with_output().unwrap();
        assert_eq!(gone.unwrap(), (2, stale.len()));
        assert_eq!(shown(), before);
        let heard = String::from_utf8_lossy(&heard.stdout);
        assert!(heard.lines().count() >= 4, "{heard}");
        assert!(
            heard.lines().filter(|line| line.contains("from")).all(|line| line.contains("Deleted")),
            "{heard}"
        );
        assert!(!heard.contains("10.2.0.0/24"), "{heard}");
    });
}

#[test]
fn a_side_that_is_any_needs_a_priority_of_its_own() {
    run(|| async {
        let netlink = Netlink::open().unwrap();
        let narrow = rule(100, "10.1.0.0/24", "10.2.0.0/24", Action::Lookup(1160));
        let vague = |priority| rule(priority, "10.1.0.0/24", "0.0.0.0/0", Action::Lookup(1160));
        netlink.add_rule(&narrow).await.unwrap();
        // The kernel does not compare a /0: it takes the narrow rule for this one, and would delete it for this one.
        assert!(vague(100).deletes(&narrow) && !vague(101).deletes(&narrow));
        netlink.add_rule(&vague(100)).await.unwrap();
        assert!(
            !ip("rule show").contains("from 10.1.0.0/24 lookup"),
            "then the note in add_rule is old"
        );
        netlink.add_rule(&vague(101)).await.unwrap();
        assert!(ip("rule show").contains("from 10.1.0.0/24 lookup"));
        let wanted = [narrow];
        assert_eq!(netlink.remove_all_but(&wanted, &[]).await.unwrap(), (0, 1));
        // Where the vague one is first, its deletion hits itself.
        netlink.purge().await.unwrap();
        netlink.add_rule(&vague(100)).await.unwrap();
        netlink.add_rule(&wanted[0]).await.unwrap();
        assert_eq!(netlink.remove_all_but(&wanted, &[]).await.unwrap(), (0, 1));
        assert!(ip("rule show").contains("from 10.1.0.0/24 to 10.2.0.0/24"));
    });
}
