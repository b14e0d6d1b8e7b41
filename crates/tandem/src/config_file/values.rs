//! How single values are written: addresses, durations, selectors, names of choices.
//!
//! Each function takes a text and returns a value or, in a few words, why not.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ike::config::{Encap, RemoteAddress, Start};
use wire::ike::Identity;
use wire::ts::{AddrRange, Cidr, Ports, TrafficSelector};

/// An address, with or without the prefix length of its network: `203.0.113.10`, `203.0.113.10/24`.
pub(super) fn address_in_network(text: &str) -> Result<(IpAddr, Option<u8>), String> {
    let Some((address, prefix)) = text.split_once('/') else { return Ok((address(text)?, None)) };
    let address = self::address(address)?;
    let most = if address.is_ipv4() { 32 } else { 128 };
    match prefix.parse::<u8>() {
        Ok(prefix) if (1..=most).contains(&prefix) => Ok((address, Some(prefix))),
        _ => Err(format!("the prefix length must be 1 to {most}")),
    }
}

/// An address.
pub(super) fn address(text: &str) -> Result<IpAddr, String> {
    text.parse().map_err(|_| match text.contains(|c: char| c.is_ascii_alphabetic() && c > 'f') {
        true => "names are not resolved, as a gateway must not depend on DNS".to_owned(),
        false => String::new(),
    })
}

/// `address:port`.
pub(super) fn link(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| match text.parse::<IpAddr>() {
        Ok(_) => "the port is missing".to_owned(),
        Err(_) => String::new(),
    })
}

/// An address, or `any`.
pub(super) fn remote_address(text: &str) -> Result<RemoteAddress, String> {
    match text {
        "any" | "%any" => Ok(RemoteAddress::Any),
        text => address(text).map(RemoteAddress::Ip),
    }
}

/// An identity in swanctl's spelling; `@#HEX`, `@@user@host` and `asn1dn:#HEX` are its own ways to force a
/// type, besides those that [`Identity`] reads.
pub(super) fn identity(text: &str) -> Result<Identity, String> {
    if text == "any" || text.starts_with(['%', '*']) {
        return Err("identities are compared exactly".to_owned());
    }
    if text.len() > 1024 {
        return Err("it has more than 1024 bytes".to_owned());
    }
    let forced = [
        ("@#", "keyid:0x"),
        ("@@", "email:"),
        ("asn1dn:#", "asn1dn:0x"),
        ("asn1gn:#", "asn1gn:0x"),
    ];
    let forced = forced
        .iter()
        .find_map(|(ours, theirs)| text.strip_prefix(ours).map(|rest| format!("{theirs}{rest}")));
    forced.as_deref().unwrap_or(text).parse().map_err(|e: wire::ike::IdentityError| e.to_string())
}

/// swanctl's durations: `4h`, `30m`, `90s`, `2d`, seconds without a unit; also `500ms`.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| String::new())?;
    let scale_ms = match unit.trim() {
        "ms" => 1,
        "" | "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        other => return Err(format!("`{other}` is no unit")),
    };
    // A year bounds every sum that is made of these later.
    number
        .checked_mul(scale_ms)
        .filter(|ms| *ms <= 365 * 86_400_000)
        .map(Duration::from_millis)
        .ok_or_else(|| "that is more than a year".to_owned())
}

/// `encap`.
pub(super) fn encap(text: &str) -> Result<Encap, String> {
    match text {
        "auto" => Ok(Encap::Auto),
        "always" | "yes" => Ok(Encap::Always),
        "never" | "no" => Ok(Encap::Never),
        _ => Err(String::new()),
    }
}

/// `start`, with swanctl's words for the same.
pub(super) fn start(text: &str) -> Result<Start, String> {
    match text {
        "initiate" | "start" => Ok(Start::Initiate),
        "trap" => Ok(Start::Trap),
        "respond" | "none" => Ok(Start::Respond),
        _ => Err(String::new()),
    }
}

/// swanctl's selectors: `10.1.0.0/24`, `10.1.0.7`, `10.1.0.5-10.1.0.9`, each with an optional
/// `[protocol]` or `[protocol/port]`, where a port may be a range.
pub(super) fn selector(text: &str) -> Result<TrafficSelector, String> {
    let (addresses, upper) = match text.split_once('[') {
        None => (text, None),
        Some((addresses, rest)) => {
            let upper = rest.strip_suffix(']').ok_or("the `]` is missing")?;
            (addresses, Some(upper))
        }
    };
    let range = match addresses.split_once('-') {
        Some((first, last)) => {
            AddrRange::new(address(first)?, address(last)?).map_err(|e| e.to_string())?
        }
        None => match addresses.parse::<Cidr>() {
            Ok(cidr) => cidr.into(),
            Err(wire::ts::CidrError::Syntax) => return Err(String::new()),
            Err(error) => return Err(error.to_string()),
        },
    };
    let (protocol, ports) = upper.map_or(Ok((0, Ports::Any)), upper_layer)?;
    TrafficSelector::new(range, protocol, ports).map_err(|e| e.to_string())
}

/// `tcp`, `17`, `tcp/80`, `udp/1024-2047`.
fn upper_layer(text: &str) -> Result<(u8, Ports), String> {
    let (protocol, port) = match text.split_once('/') {
        Some((protocol, port)) => (protocol, Some(port)),
        None => (text, None),
    };
    // IANA's numbers for the names that people write.
    let protocol = match protocol {
        "tcp" => 6,
        "udp" => 17,
        "icmp" => 1,
        "ipv6-icmp" | "icmpv6" => 58,
        "sctp" => 132,
        "gre" => 47,
        number => number.parse().map_err(|_| format!("`{number}` is no protocol"))?,
    };
    let Some(port) = port.filter(|port| *port != "any") else { return Ok((protocol, Ports::Any)) };
    let number = |text: &str| text.parse::<u16>().map_err(|_| format!("`{text}` is no port"));
    let (first, last) = match port.split_once('-') {
        Some((first, last)) => (number(first)?, number(last)?),
        None => (number(port)?, number(port)?),
    };
    let ports = Ports::from_wire(first, last).map_err(|e| e.to_string())?;
    Ok((protocol, ports))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_as_swanctl_writes_them() {
        for (text, ms) in [
            ("90", 90_000),
            ("90s", 90_000),
            ("4h", 14_400_000),
            ("1d", 86_400_000),
            ("500ms", 500),
        ] {
            assert_eq!(duration(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for text in ["", "h", "-1s", "1.5h", "3w", "400d", "99999999999999999999"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn selectors_as_swanctl_writes_them() {
        for (text, shown) in [
            ("10.1.0.0/24", "10.1.0.0/24"),
            ("10.1.0.7", "10.1.0.7/32"),
            ("fd00:1::/64", "fd00:1::/64"),
            ("10.1.0.0/24[tcp/80]", "10.1.0.0/24[6/80]"),
            ("10.1.0.0/24[udp/1024-2047]", "10.1.0.0/24[17/1024-2047]"),
            ("10.1.0.0/24[icmp]", "10.1.0.0/24[1]"),
        ] {
            assert_eq!(selector(text).map(|ts| ts.to_string()), Ok(shown.to_owned()), "{text}");
        }
        assert!(selector("10.1.0.5-10.1.0.9").is_ok());
        for text in [
            "",
            "10.1.0.1/24",
            "10.1.0.9-10.1.0.5",
            "10.1.0.0/33",
            "10.1.0.0/24[tcp",
            "10.1.0.0/24[x]",
        ] {
            assert!(selector(text).is_err(), "{text}");
        }
        // The likely meaning is part of the answer.
        assert!(selector("10.1.0.1/24").unwrap_err().contains("10.1.0.0/24"));
    }

    #[test]
    fn identities_that_could_never_match_exactly_are_refused() {
        assert!(identity("branch.example").is_ok());
        assert!(identity("@#deadbeef").is_ok());
        let shown = |text: &str| identity(text).unwrap().to_string();
        assert_eq!(shown("@#deadbeef"), "keyid:0xdeadbeef");
        assert_eq!(shown("@@me@gw.example"), "me@gw.example");
        assert_eq!(shown("@gw.example"), "gw.example");
        assert_eq!(shown("asn1dn:#3000"), "asn1dn:0x3000");
        for text in ["%any", "any", "*.example", "C=CH, O=strongSwan, CN=gw", ""] {
            assert!(identity(text).is_err(), "{text}");
        }
    }
}
