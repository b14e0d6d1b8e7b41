//! The other side of a connection, as a swanctl.conf for strongSwan.
//!
//! Everything is seen from the peer: identities and selectors are swapped, our endpoint is its remote
//! gateway. Written from swanctl.conf(5) of strongSwan 5.9 and its page on identity parsing.

use std::fmt::Write;

use gateway::config::Config;
use ike::config::{Encap, RemoteAddress, Start};
use wire::ike::Identity;
use wire::ts::{Ports, TrafficSelector};

/// The text for a connection: one section per tunnel. With `secrets`, the pre-shared key is in it; without, a
/// placeholder that strongSwan would take for a (wrong) key. `None` if there is no such connection.
#[must_use]
pub fn peer_config(config: &Config, name: &str, secrets: bool) -> Option<String> {
    let ike = &config.connections_named(name).next()?.ike;
    let file = plain(name);
    let mut text = String::new();
    let mut out = Lines { text: &mut text, depth: 0 };
    out.line(format!("# The other side of Tandem's connection `{name}`, for strongSwan."));
    out.line(format!(
        "# Put it into /etc/swanctl/conf.d/tandem-{file}.conf, then: swanctl --load-all",
    ));
    if !secrets {
        out.line(
            "# The pre-shared key is left out: put it in below, or print this with --secrets.",
        );
    }
    out.open("connections");
    let tunnels = config.connections_named(name).flat_map(|connection| {
        let seats = connection.endpoints.iter().zip(&connection.remotes);
        seats.map(move |(id, remote)| (connection, id, remote))
    });
    for (connection, id, remote) in tunnels {
        let Some(endpoint) = config.endpoint(*id) else { continue };
        let own = plain(&connection.ike.name);
        out.open(&match connection.endpoints.as_slice() {
            [_] => format!("tandem-{own}"),
            _ => format!("tandem-{own}-{}", endpoint.name),
        });
        out.line("version = 2");
        if let RemoteAddress::Ip(address) = remote {
            out.line(format!("local_addrs = {address}"));
        }
        out.line(format!("remote_addrs = {}", endpoint.wan.address));
        out.line(format!("proposals = {}", list(&ike.ike_proposals)));
        if ike.encap == Encap::Never {
            out.line(
                "# ESP as protocol 50 unless there is a NAT, and no moving to other addresses.",
            );
            out.line("encap = no");
        } else {
            out.line(
                "# ESP in UDP 4500 from the first packet on, and no moving to other addresses.",
            );
            out.line("encap = yes");
        }
        out.line("mobike = no");
        // Off by default (peers.md 2); without it a peer that initiates never notices a lost tunnel.
        out.line("dpd_delay = 30s");
        if !ike.initial_contact {
            out.line(
                "# The same identities have several tunnels: a new one does not replace another.",
            );
            out.line("unique = never");
        }
        for (section, identity) in [("local", &ike.remote_id), ("remote", &ike.local_id)] {
            out.open(section);
            out.line("auth = psk");
            out.line(format!("id = {}", quoted(&id_text(identity))));
            out.close();
        }
        out.open("children");
        for child in &ike.children {
            out.open(&child.name);
            out.line(format!("local_ts = {}", selectors(&child.remote_ts)));
            out.line(format!("remote_ts = {}", selectors(&child.local_ts)));
            out.line(format!("esp_proposals = {}", list(&child.esp_proposals)));
            match child.start {
                // The side that initiates is also the one that has to try again.
                Start::Initiate => out.line("start_action = none"),
                Start::Trap => out.line("start_action = trap"),
                Start::Respond => {
                    out.line("start_action = start");
                    out.line("close_action = start");
                    out.line("dpd_action = restart");
                }
            }
            out.close();
        }
        out.close();
        out.close();
    }
    out.close();
    out.open("secrets");
    out.open(&format!("ike-tandem-{file}"));
    out.line(format!("id-1 = {}", quoted(&id_text(&ike.local_id))));
    out.line(format!("id-2 = {}", quoted(&id_text(&ike.remote_id))));
    match secrets {
        true => out.line(format!("secret = {}", secret_text(ike.psk.expose()))),
        false => out.line("secret = \"PUT-THE-PRE-SHARED-KEY-HERE\""),
    }
    out.close();
    out.close();
    Some(text)
}

/// A name without what begins a comment in strongSwan's files.
fn plain(name: &str) -> String {
    name.replace('#', "-")
}

/// Indented lines.
struct Lines<'t> {
    text: &'t mut String,
    depth: usize,
}

impl Lines<'_> {
    fn line(&mut self, line: impl AsRef<str>) {
        // Writing to a String cannot fail.
        let _ = writeln!(self.text, "{:width$}{}", "", line.as_ref(), width = 4 * self.depth);
    }

    fn open(&mut self, name: &str) {
        self.line(format!("{name} {{"));
        self.depth += 1;
    }

    fn close(&mut self) {
        self.depth = self.depth.saturating_sub(1);
        self.line("}");
    }
}

fn list<T: ToString>(values: &[T]) -> String {
    values.iter().map(T::to_string).collect::<Vec<_>>().join(", ")
}

/// strongSwan takes networks, addresses and ranges, each with `[protocol/ports]`.
fn selectors(list: &[TrafficSelector]) -> String {
    let text = |ts: &TrafficSelector| {
        let upper = match (ts.protocol(), ts.ports()) {
            (0, _) => String::new(),
            (protocol, Ports::Any) => format!("[{protocol}]"),
            (protocol, Ports::Opaque) => format!("[{protocol}/opaque]"),
            (protocol, Ports::Range(a, b)) if a == b => format!("[{protocol}/{a}]"),
            (protocol, Ports::Range(a, b)) => format!("[{protocol}/{a}-{b}]"),
        };
        match ts.addrs().as_cidr() {
            Some(cidr) => format!("{cidr}{upper}"),
            None => format!("{}-{}{upper}", ts.addrs().first(), ts.addrs().last()),
        }
    };
    list.iter().map(text).collect::<Vec<_>>().join(", ")
}

/// An identity such that strongSwan gives it the same type and bytes.
fn id_text(identity: &Identity) -> String {
    use wire::ike::IdType;
    let data = identity.data();
    let hex = || data.iter().fold(String::new(), |text, byte| format!("{text}{byte:02x}"));
    let plain = std::str::from_utf8(data).ok().filter(|text| {
        text.chars()
            .all(|c| c.is_ascii_graphic() && !matches!(c, '"' | '\\' | '#' | '=' | '%' | '*'))
    });
    match (identity.kind(), plain) {
        // `@` forces FQDN, `@@` a mail address, whatever the rest looks like.
        (IdType::FQDN, Some(name)) if !name.contains(['@', ':', '/']) && name.contains('.') => {
            match name.parse::<std::net::IpAddr>() {
                Ok(_) => format!("@{name}"),
                Err(_) => name.to_owned(),
            }
        }
        (IdType::FQDN, Some(name)) => format!("@{name}"),
        (IdType::RFC822_ADDR, Some(name)) => format!("@@{name}"),
        (IdType::IPV4_ADDR | IdType::IPV6_ADDR, _) => identity.to_string(),
        (IdType::KEY_ID, _) => format!("@#{}", hex()),
        (IdType::FQDN, None) => format!("fqdn:#{}", hex()),
        (IdType::RFC822_ADDR, None) => format!("email:#{}", hex()),
        (IdType::DER_ASN1_DN, _) => format!("asn1dn:#{}", hex()),
        (IdType::DER_ASN1_GN, _) => format!("asn1gn:#{}", hex()),
        (IdType(other), _) => format!("{{{other}}}:#{}", hex()),
    }
}

/// Quotes are always right in swanctl.conf, and `#` would begin a comment without them.
fn quoted(text: &str) -> String {
    format!("\"{text}\"")
}

/// The key's bytes: as text where that is unmistakable, else in hexadecimal, which strongSwan decodes.
fn secret_text(key: &[u8]) -> String {
    let safe = |byte: &u8| byte.is_ascii_alphanumeric() || b"+/=_.,:;!?@-".contains(byte);
    let prefixed = key.starts_with(b"0x") || key.starts_with(b"0s");
    match std::str::from_utf8(key) {
        Ok(text) if key.iter().all(safe) && !prefixed => quoted(text),
        _ => key.iter().fold("0x".to_owned(), |text, byte| format!("{text}{byte:02x}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identities_keep_their_type() {
        for (ours, theirs) in [
            ("gw.example", "gw.example"),
            ("gw", "@gw"),
            ("fqdn:10.0.0.1", "@10.0.0.1"),
            ("me@gw.example", "@@me@gw.example"),
            ("10.0.0.1", "10.0.0.1"),
            ("2001:db8::1", "2001:db8::1"),
            ("keyid:ab", "@#6162"),
            ("asn1dn:0x3000", "asn1dn:#3000"),
        ] {
            assert_eq!(id_text(&ours.parse().unwrap()), theirs, "{ours}");
        }
    }

    #[test]
    fn keys_keep_their_bytes() {
        assert_eq!(secret_text(b"correct-horse"), "\"correct-horse\"");
        // strongSwan would decode these two; as hexadecimal it gets the bytes that we use.
        assert_eq!(secret_text(b"0xab"), "0x30786162");
        assert_eq!(secret_text(b"0sYWI="), "0x30735957493d");
        assert_eq!(secret_text(b"a\"b#c"), "0x6122622363");
    }
}
