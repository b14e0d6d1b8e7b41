//! Traffic selectors (RFC 7296 §3.13) and the address arithmetic that narrowing needs.
//!
//! A selector is a protocol (0 is any), a port range and an address range. For ICMP the "port" is
//! type << 8 | code (RFC 7296 §3.13.1). Two port values are special: ANY is 0–65535 and includes OPAQUE;
//! OPAQUE, written 65535–0, stands for packets whose ports cannot be seen (fragments; RFC 4301 §4.4.1.1).
//!
//! Values that contradict themselves (first above last, ports without a protocol) cannot be built
//! (security.md, statement 14).

use core::fmt;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use core::str::FromStr;

use crate::read::Reader;

/// Why bytes or arguments are not a traffic selector.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum TsError {
    /// The substructure is cut short or its length field does not fit its type.
    #[error("traffic selector with a wrong length")]
    Length,
    /// The first address is above the last.
    #[error("traffic selector whose first address is above its last")]
    Addresses,
    /// The first port is above the last, and they are not OPAQUE.
    #[error("traffic selector whose first port is above its last")]
    Ports,
    /// Ports are given although the protocol is 0, any (RFC 7296 §3.13.1 asks for 0–65535).
    #[error("traffic selector with ports but without a protocol")]
    PortsWithoutProtocol,
    /// First and last address are of different families.
    #[error("traffic selector that mixes address families")]
    Family,
    /// A number of selectors other than the payload announced, or none.
    #[error("traffic selector payload with a wrong count")]
    Count,
}

/// Ports that a selector allows.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Ports {
    /// Every port, and packets whose port cannot be seen.
    Any,
    /// Only packets whose port cannot be seen.
    Opaque,
    /// Visible ports from the first to the last, inclusive. Never 0–65535: that is `Any`.
    Range(u16, u16),
}

impl Ports {
    /// From the two fields on the wire.
    pub fn from_wire(start: u16, end: u16) -> Result<Ports, TsError> {
        match (start, end) {
            (0, u16::MAX) => Ok(Ports::Any),
            (u16::MAX, 0) => Ok(Ports::Opaque),
            (start, end) if start <= end => Ok(Ports::Range(start, end)),
            _ => Err(TsError::Ports),
        }
    }

    /// The two fields on the wire: start port, end port.
    #[must_use]
    pub fn to_wire(self) -> (u16, u16) {
        match self {
            Ports::Any => (0, u16::MAX),
            Ports::Opaque => (u16::MAX, 0),
            Ports::Range(start, end) => (start, end),
        }
    }

    /// Whether a packet's port is allowed; `None` is a port that cannot be seen.
    #[must_use]
    #[inline]
    pub fn matches(self, port: Option<u16>) -> bool {
        match (self, port) {
            (Ports::Any, _) | (Ports::Opaque, None) => true,
            (Ports::Range(start, end), Some(port)) => (start..=end).contains(&port),
            _ => false,
        }
    }

    /// Whether every port that `other` allows is allowed here.
    #[must_use]
    pub fn contains(self, other: Ports) -> bool {
        self.intersect(other) == Some(other)
    }

    /// The ports that both allow.
    #[must_use]
    pub fn intersect(self, other: Ports) -> Option<Ports> {
        match (self, other) {
            (Ports::Any, x) | (x, Ports::Any) => Some(x),
            (Ports::Opaque, Ports::Opaque) => Some(Ports::Opaque),
            (Ports::Range(a, b), Ports::Range(c, d)) => {
                let (start, end) = (a.max(c), b.min(d));
                (start <= end).then_some(Ports::Range(start, end))
            }
            _ => None,
        }
    }
}

/// Addresses from a first to a last, inclusive, of one family. The first is never above the last.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AddrRange(Range);

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Range {
    V4(Ipv4Addr, Ipv4Addr),
    V6(Ipv6Addr, Ipv6Addr),
}

impl AddrRange {
    /// Every IPv4 address.
    pub const ALL_V4: AddrRange = AddrRange(Range::V4(Ipv4Addr::UNSPECIFIED, Ipv4Addr::BROADCAST));
    /// Every IPv6 address.
    pub const ALL_V6: AddrRange =
        AddrRange(Range::V6(Ipv6Addr::UNSPECIFIED, Ipv6Addr::from_bits(u128::MAX)));

    /// From the first to the last address. Fails on mixed families and on first above last.
    pub fn new(first: IpAddr, last: IpAddr) -> Result<AddrRange, TsError> {
        match (first, last) {
            (IpAddr::V4(a), IpAddr::V4(b)) if a <= b => Ok(AddrRange(Range::V4(a, b))),
            (IpAddr::V6(a), IpAddr::V6(b)) if a <= b => Ok(AddrRange(Range::V6(a, b))),
            (IpAddr::V4(_), IpAddr::V4(_)) | (IpAddr::V6(_), IpAddr::V6(_)) => {
                Err(TsError::Addresses)
            }
            _ => Err(TsError::Family),
        }
    }

    /// One address.
    #[must_use]
    pub fn host(addr: IpAddr) -> AddrRange {
        match addr {
            IpAddr::V4(a) => AddrRange(Range::V4(a, a)),
            IpAddr::V6(a) => AddrRange(Range::V6(a, a)),
        }
    }

    /// The lowest address.
    #[must_use]
    pub fn first(&self) -> IpAddr {
        match self.0 {
            Range::V4(a, _) => a.into(),
            Range::V6(a, _) => a.into(),
        }
    }

    /// The highest address.
    #[must_use]
    pub fn last(&self) -> IpAddr {
        match self.0 {
            Range::V4(_, b) => b.into(),
            Range::V6(_, b) => b.into(),
        }
    }

    /// Whether the range is of IPv4 addresses.
    #[must_use]
    pub fn is_ipv4(&self) -> bool {
        matches!(self.0, Range::V4(..))
    }

    /// Whether the address lies in the range; never across families.
    #[must_use]
    #[inline]
    pub fn matches(&self, addr: IpAddr) -> bool {
        match (self.0, addr) {
            (Range::V4(a, b), IpAddr::V4(x)) => a <= x && x <= b,
            (Range::V6(a, b), IpAddr::V6(x)) => a <= x && x <= b,
            _ => false,
        }
    }

    /// Whether every address of `other` lies in this range.
    #[must_use]
    pub fn contains(&self, other: &AddrRange) -> bool {
        self.matches(other.first()) && self.matches(other.last())
    }

    /// The addresses in both; `None` if there are none.
    #[must_use]
    pub fn intersect(&self, other: &AddrRange) -> Option<AddrRange> {
        match (self.0, other.0) {
            (Range::V4(a, b), Range::V4(c, d)) => {
                let (first, last) = (a.max(c), b.min(d));
                (first <= last).then_some(AddrRange(Range::V4(first, last)))
            }
            (Range::V6(a, b), Range::V6(c, d)) => {
                let (first, last) = (a.max(c), b.min(d));
                (first <= last).then_some(AddrRange(Range::V6(first, last)))
            }
            _ => None,
        }
    }

    /// The range as one network, if it is one.
    #[must_use]
    pub fn as_cidr(&self) -> Option<Cidr> {
        let mut blocks = self.cidrs();
        let first = blocks.next()?;
        blocks.next().is_none().then_some(first)
    }

    /// The fewest networks that make up the range, in order: at most 62 for IPv4, 254 for IPv6.
    pub fn cidrs(&self) -> impl Iterator<Item = Cidr> + use<> {
        let (width, first, last) = match self.0 {
            Range::V4(a, b) => (32u8, u128::from(a.to_bits()), u128::from(b.to_bits())),
            Range::V6(a, b) => (128u8, a.to_bits(), b.to_bits()),
        };
        let mut next = Some(first);
        core::iter::from_fn(move || {
            let start = next.filter(|&start| start <= last)?;
            // The largest block that is aligned at `start` and ends no later than `last`.
            let aligned = start.trailing_zeros().min(u32::from(width));
            let span = last - start;
            let fitting = match span.checked_add(1) {
                Some(count) => count.ilog2(),
                None => 128,
            };
            let host_bits = aligned.min(fitting);
            next = 1u128.checked_shl(host_bits).and_then(|size| start.checked_add(size));
            let addr = if width == 32 {
                // `start` is at most `last`, which came from 32 bits.
                IpAddr::V4(Ipv4Addr::from_bits(start as u32))
            } else {
                IpAddr::V6(Ipv6Addr::from_bits(start))
            };
            // host_bits is at most width.
            Some(Cidr { addr, prefix: width - host_bits as u8 })
        })
    }
}

impl From<Cidr> for AddrRange {
    fn from(cidr: Cidr) -> AddrRange {
        match cidr.addr {
            IpAddr::V4(a) => {
                let host = u32::MAX.checked_shr(u32::from(cidr.prefix)).unwrap_or(0);
                AddrRange(Range::V4(a, Ipv4Addr::from_bits(a.to_bits() | host)))
            }
            IpAddr::V6(a) => {
                let host = u128::MAX.checked_shr(u32::from(cidr.prefix)).unwrap_or(0);
                AddrRange(Range::V6(a, Ipv6Addr::from_bits(a.to_bits() | host)))
            }
        }
    }
}

impl fmt::Display for AddrRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.as_cidr() {
            Some(cidr) => cidr.fmt(f),
            None => write!(f, "{}-{}", self.first(), self.last()),
        }
    }
}

impl fmt::Debug for AddrRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A network: an address whose host bits are zero, and the length of its prefix in bits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cidr {
    addr: IpAddr,
    prefix: u8,
}

/// Why a text is not a network.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum CidrError {
    /// Not `ADDRESS/PREFIX` nor an address.
    #[error("expected a network such as 10.1.0.0/24 or fd00::/64")]
    Syntax,
    /// The prefix is longer than the address.
    #[error("the prefix is longer than the address")]
    Prefix,
    /// Bits after the prefix are set; holds the network that was probably meant.
    #[error("host bits are set after the prefix; did you mean {0}?")]
    HostBits(Cidr),
}

impl Cidr {
    /// Fails if the prefix is too long or host bits are set.
    pub fn new(addr: IpAddr, prefix: u8) -> Result<Cidr, CidrError> {
        let masked = match addr {
            IpAddr::V4(a) if prefix <= 32 => {
                let mask = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
                IpAddr::V4(Ipv4Addr::from_bits(a.to_bits() & mask))
            }
            IpAddr::V6(a) if prefix <= 128 => {
                let mask = u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0);
                IpAddr::V6(Ipv6Addr::from_bits(a.to_bits() & mask))
            }
            _ => return Err(CidrError::Prefix),
        };
        let cidr = Cidr { addr: masked, prefix };
        if masked == addr { Ok(cidr) } else { Err(CidrError::HostBits(cidr)) }
    }

    /// The first address.
    #[must_use]
    pub fn addr(&self) -> IpAddr {
        self.addr
    }

    /// Length of the prefix in bits.
    #[must_use]
    pub fn prefix(&self) -> u8 {
        self.prefix
    }

    /// Whether the address is in the network.
    #[must_use]
    pub fn matches(&self, addr: IpAddr) -> bool {
        AddrRange::from(*self).matches(addr)
    }
}

impl FromStr for Cidr {
    type Err = CidrError;

    /// `10.1.0.0/24`, `fd00::/64`; an address alone is a network of one.
    fn from_str(text: &str) -> Result<Cidr, CidrError> {
        let (addr, prefix) = match text.split_once('/') {
            Some((addr, prefix)) => (addr, Some(prefix)),
            None => (text, None),
        };
        let addr: IpAddr = addr.parse().map_err(|_| CidrError::Syntax)?;
        let prefix = match prefix {
            // u8::from_str would take "+8"; a network in a config should be written one way.
            Some(digits) if digits.bytes().all(|b| b.is_ascii_digit()) => {
                digits.parse().map_err(|_| {
                    if digits.is_empty() { CidrError::Syntax } else { CidrError::Prefix }
                })?
            }
            Some(_) => return Err(CidrError::Syntax),
            None if addr.is_ipv4() => 32,
            None => 128,
        };
        Cidr::new(addr, prefix)
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.addr, self.prefix)
    }
}

impl fmt::Debug for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// One traffic selector.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TrafficSelector {
    addrs: AddrRange,
    protocol: u8,
    ports: Ports,
}

/// TS_IPV4_ADDR_RANGE (RFC 7296 §3.13.1).
const TS_IPV4_ADDR_RANGE: u8 = 7;
/// TS_IPV6_ADDR_RANGE.
const TS_IPV6_ADDR_RANGE: u8 = 8;
/// Type, protocol, length, ports.
const TS_HEAD_LEN: usize = 8;

impl TrafficSelector {
    /// Protocol 0 is any, and then `ports` must be [`Ports::Any`].
    pub fn new(addrs: AddrRange, protocol: u8, ports: Ports) -> Result<TrafficSelector, TsError> {
        let ports = match ports {
            Ports::Range(start, end) => Ports::from_wire(start, end)?,
            other => other,
        };
        // RFC 7296 §3.13.1: ports MUST be 0–65535 where the protocol has none, protocol 0 included.
        // OPAQUE is let through: RFC 4301 §4.4.1.1 uses it beside any protocol.
        if protocol == 0 && matches!(ports, Ports::Range(..)) {
            return Err(TsError::PortsWithoutProtocol);
        }
        Ok(TrafficSelector { addrs, protocol, ports })
    }

    /// All protocols and ports of these addresses.
    #[must_use]
    pub fn all(addrs: AddrRange) -> TrafficSelector {
        TrafficSelector { addrs, protocol: 0, ports: Ports::Any }
    }

    /// The addresses.
    #[must_use]
    pub fn addrs(&self) -> AddrRange {
        self.addrs
    }

    /// The IP protocol number; 0 is any.
    #[must_use]
    pub fn protocol(&self) -> u8 {
        self.protocol
    }

    /// The ports.
    #[must_use]
    pub fn ports(&self) -> Ports {
        self.ports
    }

    /// Whether this end of a packet matches. `port` is `None` where it cannot be seen.
    #[must_use]
    #[inline]
    pub fn matches(&self, addr: IpAddr, protocol: u8, port: Option<u16>) -> bool {
        self.addrs.matches(addr)
            && (self.protocol == 0 || self.protocol == protocol)
            && self.ports.matches(port)
    }

    /// Whether every packet that `other` matches is matched here.
    #[must_use]
    pub fn contains(&self, other: &TrafficSelector) -> bool {
        self.addrs.contains(&other.addrs)
            && (self.protocol == 0 || self.protocol == other.protocol)
            && self.ports.contains(other.ports)
    }

    /// The selector that matches exactly what both match; `None` if nothing can.
    #[must_use]
    pub fn intersect(&self, other: &TrafficSelector) -> Option<TrafficSelector> {
        let protocol = match (self.protocol, other.protocol) {
            (a, b) if a == b => a,
            (0, b) => b,
            (a, 0) => a,
            _ => return None,
        };
        let addrs = self.addrs.intersect(&other.addrs)?;
        let ports = self.ports.intersect(other.ports)?;
        Some(TrafficSelector { addrs, protocol, ports })
    }

    /// Reads one selector. `Ok(None)` is one of an unknown type, skipped by its length: it can match
    /// nothing, so narrowing drops it (RFC 7296 §2.9).
    fn parse(r: &mut Reader<'_>) -> Result<Option<TrafficSelector>, TsError> {
        let (kind, protocol, len) =
            (|| Some((r.u8()?, r.u8()?, r.u16()?)))().ok_or(TsError::Length)?;
        // A length below the four bytes just read cannot loop: it is refused here.
        let body_len = usize::from(len).checked_sub(4).ok_or(TsError::Length)?;
        let mut body = Reader::new(r.take(body_len).ok_or(TsError::Length)?);
        if !matches!(kind, TS_IPV4_ADDR_RANGE | TS_IPV6_ADDR_RANGE) {
            return Ok(None);
        }
        let ports = (|| Some((body.u16()?, body.u16()?)))().ok_or(TsError::Length)?;
        let addrs = if kind == TS_IPV4_ADDR_RANGE {
            (|| Some((body.array::<4>()?.into(), body.array::<4>()?.into())))()
        } else {
            (|| Some((body.array::<16>()?.into(), body.array::<16>()?.into())))()
        };
        let (first, last) = addrs.ok_or(TsError::Length)?;
        if !body.is_empty() {
            return Err(TsError::Length);
        }
        TrafficSelector::new(
            AddrRange::new(first, last)?,
            protocol,
            Ports::from_wire(ports.0, ports.1)?,
        )
        .map(Some)
    }

    fn emit(&self, out: &mut Vec<u8>) {
        let (start, end) = self.ports.to_wire();
        let (kind, len) = match self.addrs.0 {
            Range::V4(..) => (TS_IPV4_ADDR_RANGE, TS_HEAD_LEN + 8),
            Range::V6(..) => (TS_IPV6_ADDR_RANGE, TS_HEAD_LEN + 32),
        };
        out.extend([kind, self.protocol]);
        out.extend((len as u16).to_be_bytes());
        out.extend(start.to_be_bytes());
        out.extend(end.to_be_bytes());
        match self.addrs.0 {
            Range::V4(a, b) => {
                out.extend(a.octets());
                out.extend(b.octets());
            }
            Range::V6(a, b) => {
                out.extend(a.octets());
                out.extend(b.octets());
            }
        }
    }
}

impl From<Cidr> for TrafficSelector {
    fn from(cidr: Cidr) -> TrafficSelector {
        TrafficSelector::all(cidr.into())
    }
}

impl fmt::Display for TrafficSelector {
    /// As strongSwan writes it: `10.1.0.0/24`, `10.1.0.0/24[6/80]`, `10.1.0.0/24[17/1024-2047]`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.addrs.fmt(f)?;
        match (self.protocol, self.ports) {
            (0, Ports::Any) => Ok(()),
            (p, Ports::Any) => write!(f, "[{p}]"),
            (p, Ports::Opaque) => write!(f, "[{p}/OPAQUE]"),
            (p, Ports::Range(a, b)) if a == b => write!(f, "[{p}/{a}]"),
            (p, Ports::Range(a, b)) => write!(f, "[{p}/{a}-{b}]"),
        }
    }
}

impl fmt::Debug for TrafficSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Reads the body of a TSi or TSr payload (after the generic header). Selectors of unknown type are
/// left out, so the result may be empty; a payload with a count of zero is an error. At most 255, by
/// the size of the count.
pub fn parse_payload(body: &[u8]) -> Result<Vec<TrafficSelector>, TsError> {
    let mut r = Reader::new(body);
    let [count, _, _, _] = r.array::<4>().ok_or(TsError::Length)?;
    if count == 0 {
        return Err(TsError::Count);
    }
    let mut selectors = Vec::new();
    for _ in 0..count {
        if r.is_empty() {
            return Err(TsError::Count);
        }
        selectors.extend(TrafficSelector::parse(&mut r)?);
    }
    if r.is_empty() { Ok(selectors) } else { Err(TsError::Count) }
}

/// Writes the body of a TSi or TSr payload: 1 to 255 selectors, else [`TsError::Count`].
pub fn emit_payload(selectors: &[TrafficSelector], out: &mut Vec<u8>) -> Result<(), TsError> {
    let count = u8::try_from(selectors.len()).map_err(|_| TsError::Count)?;
    if count == 0 {
        return Err(TsError::Count);
    }
    out.extend([count, 0, 0, 0]);
    for selector in selectors {
        selector.emit(out);
    }
    Ok(())
}

/// What remains of `offered` under the policy `allowed` (RFC 7296 §2.9): all non-empty pairwise
/// intersections, in the order of `offered`, without those that another one contains, at most 255.
/// Empty means TS_UNACCEPTABLE.
#[must_use]
pub fn narrow(offered: &[TrafficSelector], allowed: &[TrafficSelector]) -> Vec<TrafficSelector> {
    let mut kept: Vec<TrafficSelector> = Vec::new();
    for a in offered {
        for found in allowed.iter().filter_map(|b| a.intersect(b)) {
            if kept.iter().any(|k| k.contains(&found)) {
                continue;
            }
            kept.retain(|k| !found.contains(k));
            if kept.len() < usize::from(u8::MAX) {
                kept.push(found);
            }
        }
    }
    kept
}

#[cfg(test)]
mod tests;
