//! What the host must be like, set where that is ours to set and reported where it is not.
//!
//! `tandem check` calls [`check`], the daemon calls [`prepare`] at its start and reports what is
//! left. Only files under /proc are read and written; nothing is run.

use std::fmt;
use std::path::Path;

/// How bad a problem is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Something may go wrong, depending on what else the host does.
    Advice,
    /// Tunnels or takeovers will not work.
    Breaks,
}

/// Something on the host that stands in the way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostProblem {
    /// How bad.
    pub severity: Severity,
    /// What is wrong and what it would do.
    pub what: String,
    /// Where: a sysctl, an interface, a device.
    pub place: String,
    /// A command or a sentence that mends it.
    pub fix: String,
}

impl fmt::Display for HostProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}; to fix: {}", self.place, self.what, self.fix)
    }
}

/// What the configuration wants of the host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// Interfaces with virtual addresses (WAN and LAN), each once.
    pub interfaces: Vec<String>,
    /// The TUN, once it exists.
    pub tun: Option<String>,
    /// IPv4 packets pass through this host.
    pub forward_v4: bool,
    /// IPv6 packets pass through this host.
    pub forward_v6: bool,
}

/// A sysctl that must hold on an interface. The kernel combines it with the value for "all".
struct InterfaceRule {
    name: &'static str,
    wanted: i64,
    combine: Combine,
    why: &'static str,
}

#[derive(Clone, Copy)]
enum Combine {
    /// The larger of the two counts and must be at least the wanted value.
    LargerAtLeast,
    /// Either switches it on, so both must be 0.
    BothZero,
}

const INTERFACE_RULES: [InterfaceRule; 3] = [
    InterfaceRule {
        name: "arp_ignore",
        wanted: 1,
        combine: Combine::LargerAtLeast,
        why: "the kernel would answer ARP for the virtual address, also when the daemon is stopped",
    },
    InterfaceRule {
        name: "arp_announce",
        wanted: 2,
        combine: Combine::LargerAtLeast,
        why: "the host's own ARP requests would claim the virtual address",
    },
    InterfaceRule {
        name: "send_redirects",
        wanted: 0,
        combine: Combine::BothZero,
        why: "the host would redirect LAN clients past the tunnel",
    },
];

/// Says what is wrong, changes nothing.
#[must_use]
pub fn check(needs: &Needs) -> Vec<HostProblem> {
    check_under(Path::new("/proc/sys/net"), needs)
}

/// Sets what is ours to set (ARP and redirect behaviour of the WAN and LAN interfaces), then
/// says what is left. Forwarding and filtering are the operator's decisions: reported only.
#[must_use]
pub fn prepare(needs: &Needs) -> Vec<HostProblem> {
    let root = Path::new("/proc/sys/net");
    for interface in &needs.interfaces {
        for rule in &INTERFACE_RULES {
            if holds(root, interface, rule) {
                continue;
            }
            let mut places = vec![interface.as_str()];
            if matches!(rule.combine, Combine::BothZero) {
                places.push("all");
            }
            for place in places {
                let path = root.join("ipv4/conf").join(place).join(rule.name);
                match std::fs::write(&path, rule.wanted.to_string()) {
                    Ok(()) => {
                        tracing::info!(path = %path.display(), value = rule.wanted, "sysctl set")
                    }
                    Err(error) => tracing::debug!(path = %path.display(), %error, "sysctl not set"),
                }
            }
        }
    }
    check(needs)
}

fn read(root: &Path, name: &str) -> Option<i64> {
    std::fs::read_to_string(root.join(name)).ok()?.trim().parse().ok()
}

fn holds(root: &Path, interface: &str, rule: &InterfaceRule) -> bool {
    let value = |place: &str| read(root, &format!("ipv4/conf/{place}/{}", rule.name)).unwrap_or(0);
    match rule.combine {
        Combine::LargerAtLeast => value("all").max(value(interface)) >= rule.wanted,
        Combine::BothZero => value("all") == 0 && value(interface) == 0,
    }
}

fn check_under(root: &Path, needs: &Needs) -> Vec<HostProblem> {
    let mut problems = Vec::new();
    let mut report = |severity, place: String, what: &str, fix: String| {
        problems.push(HostProblem { severity, what: what.to_owned(), place, fix });
    };
    if !Path::new("/dev/net/tun").exists() {
        let fix = "modprobe tun, or give the container the device".to_owned();
        report(Severity::Breaks, "/dev/net/tun".to_owned(), "no TUN device", fix);
    }
    for interface in &needs.interfaces {
        if !root.join("ipv4/conf").join(interface).exists() {
            let fix = "name the interface as `ip -br link` shows it".to_owned();
            report(Severity::Breaks, interface.clone(), "no such interface", fix);
            continue;
        }
        for rule in &INTERFACE_RULES {
            if !holds(root, interface, rule) {
                let mut fix =
                    format!("sysctl -w net.ipv4.conf.{interface}.{}={}", rule.name, rule.wanted);
                if matches!(rule.combine, Combine::BothZero) {
                    fix += &format!(" net.ipv4.conf.all.{}=0", rule.name);
                }
                let place = format!("net.ipv4.conf.{interface}.{}", rule.name);
                report(Severity::Breaks, place, rule.why, fix);
            }
        }
    }
    if let Some(tun) = &needs.tun {
        let value = |place: &str| read(root, &format!("ipv4/conf/{place}/rp_filter")).unwrap_or(0);
        // The larger of the two counts; 1 is strict, 2 loose.
        if value("all").max(value(tun)) == 1 {
            report(
                Severity::Breaks,
                format!("net.ipv4.conf.{tun}.rp_filter"),
                "strict reverse-path filtering drops what comes out of tunnels",
                format!("sysctl -w net.ipv4.conf.{tun}.rp_filter=2"),
            );
        }
    }
    for (wanted, name) in [
        (needs.forward_v4, "net.ipv4.ip_forward"),
        (needs.forward_v6, "net.ipv6.conf.all.forwarding"),
    ] {
        let path = name.trim_start_matches("net.").replace('.', "/");
        if wanted && read(root, &path) != Some(1) {
            report(
                Severity::Breaks,
                name.to_owned(),
                "forwarding is off: packets between LAN and tunnels are dropped",
                format!("sysctl -w {name}=1"),
            );
        }
    }
    let tracked = read(root, "netfilter/nf_conntrack_count").unwrap_or(0) > 0;
    if tracked && read(root, "netfilter/nf_conntrack_tcp_loose") == Some(0) {
        report(
            Severity::Breaks,
            "net.netfilter.nf_conntrack_tcp_loose".to_owned(),
            "connection tracking refuses TCP flows that appear mid-stream, as after a takeover",
            "sysctl -w net.netfilter.nf_conntrack_tcp_loose=1, or a notrack rule".to_owned(),
        );
    } else if tracked {
        report(
            Severity::Advice,
            "connection tracking".to_owned(),
            "a rule that drops `ct state invalid`, or accepts only `new` from the LAN, would cut \
             flows that appear mid-stream after a takeover",
            "exempt tunnelled selectors: nft add rule inet raw prerouting ip saddr LOCAL ip daddr \
             REMOTE notrack, and the reverse"
                .to_owned(),
        );
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::{in_new_namespace, stub};

    fn set(name: &str, value: &str) {
        std::fs::write(format!("/proc/sys/net/{name}"), value).unwrap();
    }

    #[test]
    fn problems_are_found_and_ours_are_mended() {
        in_new_namespace(|| {
            stub("wan0");
            stub("tdm0");
            set("ipv4/conf/all/arp_ignore", "0");
            set("ipv4/conf/wan0/send_redirects", "1");
            set("ipv4/conf/all/rp_filter", "1");
            set("ipv4/conf/tdm0/rp_filter", "0");
            set("ipv4/ip_forward", "0");
            let needs = Needs {
                interfaces: vec!["wan0".to_owned(), "gone0".to_owned()],
                tun: Some("tdm0".to_owned()),
                forward_v4: true,
                forward_v6: false,
            };
            let places = |problems: &[HostProblem]| {
                let mut places: Vec<_> = problems.iter().map(|p| p.place.clone()).collect();
                places.sort();
                places
            };
            assert_eq!(
                places(&check(&needs)),
                [
                    "gone0",
                    "net.ipv4.conf.tdm0.rp_filter",
                    "net.ipv4.conf.wan0.arp_announce",
                    "net.ipv4.conf.wan0.arp_ignore",
                    "net.ipv4.conf.wan0.send_redirects",
                    "net.ipv4.ip_forward",
                ]
            );
            let left = places(&prepare(&needs));
            assert_eq!(left, ["gone0", "net.ipv4.conf.tdm0.rp_filter", "net.ipv4.ip_forward"]);
            // Each fix does what it says.
            for problem in check(&needs) {
                if let Some(assignment) = problem.fix.strip_prefix("sysctl -w ") {
                    let (name, value) = assignment.split_once('=').unwrap();
                    set(&name.replacen("net.", "", 1).replace('.', "/"), value);
                }
            }
            assert_eq!(places(&check(&needs)), ["gone0"]);
        });
    }
}
