//! Identities: the ID payloads (RFC 7296 §3.5) and how they are written in a config.

use core::fmt;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use core::str::FromStr;

use super::error::Fault;
use super::registry::IdType;
use crate::read::Reader;

/// An identity. Compares exactly: type and bytes, no case folding (security.md, statement 15).
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Identity {
    kind: IdType,
    data: Vec<u8>,
}

impl Identity {
    /// Fails if an address type has the wrong number of bytes, or there are none.
    pub fn new(kind: IdType, data: impl Into<Vec<u8>>) -> Result<Identity, Fault> {
        let data = data.into();
        check(kind, &data)?;
        Ok(Identity { kind, data })
    }

    /// ID_IPV4_ADDR or ID_IPV6_ADDR.
    #[must_use]
    pub fn address(addr: IpAddr) -> Identity {
        match addr {
            IpAddr::V4(a) => Identity { kind: IdType::IPV4_ADDR, data: a.octets().to_vec() },
            IpAddr::V6(a) => Identity { kind: IdType::IPV6_ADDR, data: a.octets().to_vec() },
        }
    }

    /// Which kind.
    #[must_use]
    pub fn kind(&self) -> IdType {
        self.kind
    }

    /// The bytes after type and reserved field.
    #[must_use]
    pub fn data(&self) -> &[u8] {
        &self.data
    }

    /// The payload that carries this identity.
    #[must_use]
    pub fn payload(&self) -> IdPayload<'_> {
        IdPayload { kind: self.kind, reserved: [0; 3], data: &self.data }
    }
}

fn check(kind: IdType, data: &[u8]) -> Result<(), Fault> {
    let ok = match kind {
        IdType::IPV4_ADDR => data.len() == 4,
        IdType::IPV6_ADDR => data.len() == 16,
        _ => !data.is_empty(),
    };
    if ok { Ok(()) } else { Err(Fault::Value) }
}

/// Why a text is not an identity.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum IdentityError {
    /// Nothing was given.
    #[error("empty identity")]
    Empty,
    /// `keyid:0x…` or `asn1dn:0x…` with something that is not pairs of hex digits.
    #[error("expected pairs of hexadecimal digits after 0x")]
    Hex,
    /// A distinguished name as text; only its DER is taken.
    #[error("a distinguished name is written asn1dn:0x… with its DER in hexadecimal")]
    DnText,
    /// `ipv4:` or `ipv6:` without such an address.
    #[error("expected an address of that family")]
    Address,
}

impl FromStr for Identity {
    type Err = IdentityError;

    /// swanctl's rules, as far as they need no ASN.1: an address is ID_IPV4_ADDR or ID_IPV6_ADDR, text
    /// with an `@` inside ID_RFC822_ADDR, other text ID_FQDN; a leading `@` forces FQDN. Prefixes force
    /// a type: `ipv4:`, `ipv6:`, `fqdn:` (also `dns:`), `email:` (also `rfc822:`), `keyid:`, `asn1dn:0x…`,
    /// `asn1gn:0x…` (both in DER).
    /// After `keyid:`, `0x…` is hexadecimal and anything else text.
    fn from_str(text: &str) -> Result<Identity, IdentityError> {
        let made = |kind, data: &[u8]| {
            Identity::new(kind, data).map_err(|_| {
                if data.is_empty() { IdentityError::Empty } else { IdentityError::Address }
            })
        };
        if let Some((prefix, value)) = text.split_once(':') {
            match prefix {
                "ipv4" => {
                    let addr: Ipv4Addr = value.parse().map_err(|_| IdentityError::Address)?;
                    return Ok(Identity::address(addr.into()));
                }
                "ipv6" => {
                    let addr: Ipv6Addr = value.parse().map_err(|_| IdentityError::Address)?;
                    return Ok(Identity::address(addr.into()));
                }
                "fqdn" | "dns" => return made(IdType::FQDN, value.as_bytes()),
                "email" | "rfc822" => return made(IdType::RFC822_ADDR, value.as_bytes()),
                "keyid" => {
                    return match value.strip_prefix("0x") {
                        Some(hex) => made(IdType::KEY_ID, &from_hex(hex)?),
                        None => made(IdType::KEY_ID, value.as_bytes()),
                    };
                }
                "asn1dn" => {
                    let hex = value.strip_prefix("0x").ok_or(IdentityError::DnText)?;
                    return made(IdType::DER_ASN1_DN, &from_hex(hex)?);
                }
                // RFC 7296 §3.5: a GeneralName (RFC 5280). It compares as bytes, like every other kind.
                "asn1gn" => {
                    let hex = value.strip_prefix("0x").ok_or(IdentityError::DnText)?;
                    return made(IdType::DER_ASN1_GN, &from_hex(hex)?);
                }
                _ => {}
            }
        }
        if let Ok(addr) = text.parse::<IpAddr>() {
            return Ok(Identity::address(addr));
        }
        if text.contains('=') {
            return Err(IdentityError::DnText);
        }
        match text.strip_prefix('@') {
            Some(name) => made(IdType::FQDN, name.as_bytes()),
            None if text.contains('@') => made(IdType::RFC822_ADDR, text.as_bytes()),
            None => made(IdType::FQDN, text.as_bytes()),
        }
    }
}

fn from_hex(hex: &str) -> Result<Vec<u8>, IdentityError> {
    let digits: Option<Vec<u8>> = hex.chars().map(|c| c.to_digit(16).map(|d| d as u8)).collect();
    let digits = digits.ok_or(IdentityError::Hex)?;
    let pairs = digits.chunks_exact(2);
    if digits.is_empty() || !pairs.remainder().is_empty() {
        return Err(IdentityError::Hex);
    }
    Ok(pairs.map(|pair| pair.iter().fold(0, |byte, digit| byte << 4 | digit)).collect())
}

impl fmt::Display for Identity {
    /// Readable and safe to log: what a peer chose is escaped. Parses back to the same identity for
    /// all kinds but unknown ones, as long as names are printable ASCII without `\`,
    /// `'` and `"`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            IdType::IPV4_ADDR => match <[u8; 4]>::try_from(self.data.as_slice()) {
                Ok(octets) => Ipv4Addr::from(octets).fmt(f),
                Err(_) => write_hex(f, "ipv4:", &self.data),
            },
            IdType::IPV6_ADDR => match <[u8; 16]>::try_from(self.data.as_slice()) {
                Ok(octets) => Ipv6Addr::from(octets).fmt(f),
                Err(_) => write_hex(f, "ipv6:", &self.data),
            },
            IdType::FQDN => {
                // A name that looks like something else needs its prefix to read back.
                let plain = !self.data.iter().any(|b| matches!(b, b'@' | b':' | b'='))
                    && !self.looks_like_address();
                write!(f, "{}{}", if plain { "" } else { "fqdn:" }, self.data.escape_ascii())
            }
            IdType::RFC822_ADDR => {
                let plain = self.data.contains(&b'@')
                    && !self.data.starts_with(b"@")
                    && !self.data.iter().any(|b| matches!(b, b':' | b'='));
                write!(f, "{}{}", if plain { "" } else { "email:" }, self.data.escape_ascii())
            }
            IdType::KEY_ID => {
                let text =
                    self.data.iter().all(u8::is_ascii_graphic) && !self.data.starts_with(b"0x");
                if text {
                    write!(f, "keyid:{}", self.data.escape_ascii())
                } else {
                    write_hex(f, "keyid:0x", &self.data)
                }
            }
            IdType::DER_ASN1_DN => write_hex(f, "asn1dn:0x", &self.data),
            IdType::DER_ASN1_GN => write_hex(f, "asn1gn:0x", &self.data),
            IdType(other) => {
                write!(f, "id{other}:")?;
                write_hex(f, "0x", &self.data)
            }
        }
    }
}

impl Identity {
    fn looks_like_address(&self) -> bool {
        core::str::from_utf8(&self.data).is_ok_and(|text| text.parse::<IpAddr>().is_ok())
    }
}

fn write_hex(f: &mut fmt::Formatter<'_>, prefix: &str, data: &[u8]) -> fmt::Result {
    f.write_str(prefix)?;
    data.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Body of an IDi or IDr payload. Keeps the reserved bytes, because AUTH covers the body as it was sent
/// (RFC 7296 §2.15: `RestOfInitIDPayload`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct IdPayload<'a> {
    /// Which kind.
    pub kind: IdType,
    /// Ignored on receipt, but authenticated.
    pub reserved: [u8; 3],
    /// The identity's bytes.
    pub data: &'a [u8],
}

impl<'a> IdPayload<'a> {
    pub(super) fn parse(body: &'a [u8]) -> Result<IdPayload<'a>, Fault> {
        let mut r = Reader::new(body);
        let (kind, reserved) = (|| Some((r.u8()?, r.array::<3>()?)))().ok_or(Fault::Truncated)?;
        let data = r.rest();
        check(IdType(kind), data)?;
        Ok(IdPayload { kind: IdType(kind), reserved, data })
    }

    /// The identity, owned.
    #[must_use]
    pub fn identity(&self) -> Identity {
        Identity { kind: self.kind, data: self.data.to_vec() }
    }

    /// The body as sent: what AUTH covers.
    #[must_use]
    pub fn body(&self) -> Vec<u8> {
        let mut body = Vec::with_capacity(4 + self.data.len());
        self.emit(&mut body);
        body
    }

    pub(super) fn emit(&self, out: &mut Vec<u8>) {
        out.push(self.kind.0);
        out.extend(self.reserved);
        out.extend(self.data);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(text: &str) -> Identity {
        text.parse().unwrap()
    }

    #[test]
    fn texts_become_the_types_swanctl_gives_them() {
        let cases: &[(&str, IdType, &[u8])] = &[
            ("gw.example", IdType::FQDN, b"gw.example"),
            ("@gw.example", IdType::FQDN, b"gw.example"),
            ("fqdn:a@b", IdType::FQDN, b"a@b"),
            ("ops@example.org", IdType::RFC822_ADDR, b"ops@example.org"),
            ("email:ops@example.org", IdType::RFC822_ADDR, b"ops@example.org"),
            ("203.0.113.10", IdType::IPV4_ADDR, &[203, 0, 113, 10]),
            ("ipv4:203.0.113.10", IdType::IPV4_ADDR, &[203, 0, 113, 10]),
            ("::1", IdType::IPV6_ADDR, &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]),
            ("keyid:office", IdType::KEY_ID, b"office"),
            ("keyid:0x00FF", IdType::KEY_ID, &[0, 255]),
            ("asn1dn:0x3000", IdType::DER_ASN1_DN, &[0x30, 0]),
            ("asn1gn:0x82026777", IdType::DER_ASN1_GN, &[0x82, 2, b'g', b'w']),
        ];
        for (text, kind, data) in cases {
            let id = id(text);
            assert_eq!((id.kind(), id.data()), (*kind, *data), "{text}");
            assert_eq!(id.to_string().parse::<Identity>(), Ok(id), "{text}");
        }
    }

    #[test]
    fn other_texts_are_refused_with_a_reason() {
        let cases = [
            ("", IdentityError::Empty),
            ("@", IdentityError::Empty),
            ("fqdn:", IdentityError::Empty),
            ("keyid:0x", IdentityError::Hex),
            ("keyid:0x123", IdentityError::Hex),
            ("keyid:0xzz", IdentityError::Hex),
            ("C=CH, O=strongSwan", IdentityError::DnText),
            ("asn1dn:C=CH", IdentityError::DnText),
            ("ipv4:gw.example", IdentityError::Address),
            ("ipv6:10.0.0.1", IdentityError::Address),
        ];
        for (text, error) in cases {
            assert_eq!(text.parse::<Identity>(), Err(error), "{text}");
        }
    }

    /// security.md, statement 15: no folding, no type confusion.
    #[test]
    fn identities_compare_exactly() {
        assert_ne!(id("gw.example"), id("GW.example"));
        assert_ne!(id("fqdn:10.0.0.1"), id("10.0.0.1"));
        assert_ne!(id("fqdn:a@b"), id("a@b"));
        assert_ne!(id("gw.example"), Identity::new(IdType::FQDN, *b"gw.example\0").unwrap());
    }

    #[test]
    fn what_a_peer_chose_is_escaped() {
        let hostile = Identity::new(IdType::FQDN, *b"a\nb\x1b[0m").unwrap();
        assert_eq!(hostile.to_string(), "a\\nb\\x1b[0m");
        assert_eq!(format!("{hostile:?}"), "a\\nb\\x1b[0m");
        assert_eq!(id("fqdn:10.0.0.1").to_string(), "fqdn:10.0.0.1");
    }

    #[test]
    fn addresses_have_their_length() {
        assert_eq!(Identity::new(IdType::IPV4_ADDR, [1, 2, 3]), Err(Fault::Value));
        assert_eq!(Identity::new(IdType::IPV6_ADDR, [0; 4]), Err(Fault::Value));
        assert_eq!(IdPayload::parse(&[1, 0, 0, 0, 9, 9, 9, 9, 9]), Err(Fault::Value));
        assert_eq!(IdPayload::parse(&[2, 0, 0, 0]), Err(Fault::Value));
        assert_eq!(IdPayload::parse(&[2, 0, 0]), Err(Fault::Truncated));
    }

    /// RFC 7296 §2.15: AUTH covers the body as sent, so the reserved bytes must survive.
    #[test]
    fn reserved_bytes_survive_but_do_not_count() {
        let body = [2, 7, 8, 9, b'g', b'w'];
        let payload = IdPayload::parse(&body).unwrap();
        assert_eq!(payload.body(), body);
        assert_eq!(payload.identity(), id("gw"));
        assert_eq!(payload.identity().payload().body(), [2, 0, 0, 0, b'g', b'w']);
    }
}
