//! IP packets: what a selector, a pin and a tunnel need to know about them, and checksums.
//!
//! [`Packet::parse`] checks a packet's own lengths once and gives its addresses, protocol, ports and
//! traffic class. It accepts what it cannot see into (fragments, unknown protocols) and says so, because
//! such packets are forwarded where a selector allows any port (RFC 4301 §4.4.1.1, §7).

mod checksum;
mod l4;

pub use checksum::{
    Sum, checksum, copy_and_sum, ipv4_header_checksum, partial_checksum, transport_checksum,
    transport_checksum_ok,
};
pub use l4::{TCP_HEADER_LEN, Tcp, UDP_HEADER_LEN, Udp, udp_packet};

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::read::Reader;
use crate::ts::TrafficSelector;

/// IP protocol numbers that are looked into.
pub mod protocol {
    /// IPv6 hop-by-hop options.
    pub const HOP_BY_HOP: u8 = 0;
    /// ICMP for IPv4.
    pub const ICMP: u8 = 1;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// DCCP.
    pub const DCCP: u8 = 33;
    /// IPv6 routing header.
    pub const ROUTING: u8 = 43;
    /// IPv6 fragment header.
    pub const FRAGMENT: u8 = 44;
    /// ESP.
    pub const ESP: u8 = 50;
    /// ICMP for IPv6.
    pub const ICMPV6: u8 = 58;
    /// Nothing follows.
    pub const NO_NEXT_HEADER: u8 = 59;
    /// IPv6 destination options.
    pub const DESTINATION: u8 = 60;
    /// SCTP.
    pub const SCTP: u8 = 132;
    /// IPv6 mobility header.
    pub const MOBILITY: u8 = 135;
    /// UDP-Lite.
    pub const UDP_LITE: u8 = 136;
}

/// Length of an IPv4 header without options.
pub const IPV4_HEADER_LEN: usize = 20;
/// Length of the fixed IPv6 header.
pub const IPV6_HEADER_LEN: usize = 40;
/// Most IPv6 extension headers walked. Packets with more are refused, so that nobody can make a worker
/// walk a packet of 64 KB eight bytes at a time.
pub const MAX_EXTENSION_HEADERS: usize = 8;

/// Why bytes are not an IP packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum IpError {
    /// No bytes, or a version other than 4 and 6.
    #[error("neither IPv4 nor IPv6")]
    Version,
    /// Fewer bytes than the header or its length fields say.
    #[error("packet cut short")]
    Truncated,
    /// A header length that is too small or beyond the packet.
    #[error("wrong header length")]
    HeaderLength,
    /// More than [`MAX_EXTENSION_HEADERS`].
    #[error("too many extension headers")]
    ExtensionHeaders,
}

/// Which part of a datagram a packet is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Fragment {
    /// All of it; an IPv6 fragment that is both first and last counts (RFC 6946).
    Whole,
    /// The first fragment.
    First,
    /// One without the transport header.
    Later,
}

/// What can be seen of ports.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum L4 {
    /// Source and destination port.
    Ports {
        /// Source.
        src: u16,
        /// Destination.
        dst: u16,
    },
    /// One number for both ends: type << 8 | code of ICMP, type << 8 of a mobility header.
    Single(u16),
    /// A later fragment, a protocol without ports, or too few bytes.
    Hidden,
}

/// A packet whose lengths were checked, by its facts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Packet {
    /// Source address.
    pub src: IpAddr,
    /// Destination address.
    pub dst: IpAddr,
    /// Protocol after all IPv6 extension headers that can be seen.
    pub protocol: u8,
    /// Ports.
    pub l4: L4,
    /// Which fragment.
    pub fragment: Fragment,
    /// Traffic class: DSCP and ECN.
    pub traffic_class: u8,
    /// TTL or hop limit.
    pub hop_limit: u8,
    /// Where the protocol's header begins.
    pub l4_offset: usize,
    /// Length of the packet by its own header, at most the bytes given. Anything after is padding.
    pub total_len: usize,
    /// The protocol that all fragments of a datagram carry; see [`Packet::flow`].
    fragment_protocol: u8,
}

/// What names a flow: the 5-tuple; for fragments, all of them, the 3-tuple, so that they stay together.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Flow {
    /// Source address.
    pub src: IpAddr,
    /// Destination address.
    pub dst: IpAddr,
    /// Protocol.
    pub protocol: u8,
    /// Source and destination port, 0 where there are none. ICMP has 0: an echo's reply and the errors
    /// about it take the same path.
    pub ports: (u16, u16),
}

/// Length of an ICMP error's header, before the packet that it quotes.
const ICMP_HEADER_LEN: usize = 8;

/// How much of a packet there must be.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Extent {
    /// All that its header says.
    Whole,
    /// What an ICMP error quotes of it.
    Quoted,
}

impl Extent {
    fn of(self, total_len: usize, bytes: &[u8]) -> usize {
        match self {
            Extent::Whole => total_len,
            Extent::Quoted => total_len.min(bytes.len()),
        }
    }
}

impl Packet {
    /// Reads the headers of a packet; bytes after its own length are allowed.
    #[inline]
    pub fn parse(bytes: &[u8]) -> Result<Packet, IpError> {
        Packet::parse_up_to(bytes, Extent::Whole)
    }

    fn parse_up_to(bytes: &[u8], extent: Extent) -> Result<Packet, IpError> {
        match bytes.first().map(|b| b >> 4) {
            Some(4) => Packet::parse_v4(bytes, extent),
            Some(6) => Packet::parse_v6(bytes, extent),
            _ => Err(IpError::Version),
        }
    }

    fn parse_v4(bytes: &[u8], extent: Extent) -> Result<Packet, IpError> {
        let header = bytes.first_chunk::<IPV4_HEADER_LEN>().ok_or(IpError::Truncated)?;
        let &[
            vihl,
            traffic_class,
            l0,
            l1,
            _,
            _,
            f0,
            f1,
            hop_limit,
            protocol,
            _,
            _,
            s0,
            s1,
            s2,
            s3,
            d0,
            d1,
            d2,
            d3,
        ] = header;
        let header_len = usize::from(vihl & 0xf) * 4;
        let total_len = extent.of(usize::from(u16::from_be_bytes([l0, l1])), bytes);
        if header_len < IPV4_HEADER_LEN || header_len > total_len {
            return Err(IpError::HeaderLength);
        }
        if total_len > bytes.len() {
            return Err(IpError::Truncated);
        }
        let flags_and_offset = u16::from_be_bytes([f0, f1]);
        let (offset, more) = (flags_and_offset & 0x1fff, flags_and_offset & 0x2000 != 0);
        let fragment = match (offset, more) {
            (0, false) => Fragment::Whole,
            (0, true) => Fragment::First,
            _ => Fragment::Later,
        };
        let payload = bytes.get(header_len..total_len).unwrap_or_default();
        Ok(Packet {
            src: Ipv4Addr::new(s0, s1, s2, s3).into(),
            dst: Ipv4Addr::new(d0, d1, d2, d3).into(),
            protocol,
            l4: L4::read(protocol, fragment, payload),
            fragment,
            traffic_class,
            hop_limit,
            l4_offset: header_len,
            total_len,
            fragment_protocol: protocol,
        })
    }

    fn parse_v6(bytes: &[u8], extent: Extent) -> Result<Packet, IpError> {
        let mut r = Reader::new(bytes);
        let fixed =
            (|| Some((r.u32()?, r.u16()?, r.u8()?, r.u8()?, r.array::<16>()?, r.array::<16>()?)))();
        let (word, payload_len, mut next, hop_limit, src, dst) = fixed.ok_or(IpError::Truncated)?;
        // RFC 8200 §3: version 4 bits, traffic class 8, flow label 20.
        let traffic_class = (word >> 20) as u8;
        let total_len = extent.of(IPV6_HEADER_LEN + usize::from(payload_len), bytes);
        let payload_len = total_len.saturating_sub(IPV6_HEADER_LEN);
        let mut r = Reader::new(r.take(payload_len).ok_or(IpError::Truncated)?);

        let mut fragment = Fragment::Whole;
        let mut fragment_protocol = None;
        for walked in 0.. {
            let is_extension = matches!(
                next,
                protocol::HOP_BY_HOP
                    | protocol::ROUTING
                    | protocol::DESTINATION
                    | protocol::FRAGMENT
            );
            // What follows in a later fragment is payload, whatever `next` says.
            if !is_extension || fragment == Fragment::Later {
                break;
            }
            if walked == MAX_EXTENSION_HEADERS {
                return Err(IpError::ExtensionHeaders);
            }
            let (following, len) = (|| Some((r.u8()?, r.u8()?)))().ok_or(IpError::Truncated)?;
            if next == protocol::FRAGMENT {
                let (field, _id) = (|| Some((r.u16()?, r.u32()?)))().ok_or(IpError::Truncated)?;
                let (offset, more) = (field >> 3, field & 1 != 0);
                fragment = match (offset, more) {
                    (0, false) => fragment,
                    (0, true) => Fragment::First,
                    _ => Fragment::Later,
                };
                if fragment != Fragment::Whole {
                    // RFC 8200 §4.5: the next header of the original's fragmentable part, the same in each.
                    fragment_protocol.get_or_insert(following);
                }
            } else {
                // RFC 8200 §4.2: in units of eight bytes, the first not counted; two are read already.
                r.take(usize::from(len) * 8 + 6).ok_or(IpError::HeaderLength)?;
            }
            next = following;
        }
        let l4_offset = total_len - r.len();
        Ok(Packet {
            src: Ipv6Addr::from(src).into(),
            dst: Ipv6Addr::from(dst).into(),
            protocol: next,
            l4: L4::read(next, fragment, r.rest()),
            fragment,
            traffic_class,
            hop_limit,
            l4_offset,
            total_len,
            fragment_protocol: fragment_protocol.unwrap_or(next),
        })
    }

    /// What names the packet's flow.
    #[must_use]
    #[inline]
    pub fn flow(&self) -> Flow {
        let whole = self.fragment == Fragment::Whole;
        let ports = match self.l4 {
            L4::Ports { src, dst } if whole => (src, dst),
            _ => (0, 0),
        };
        let protocol = if whole { self.protocol } else { self.fragment_protocol };
        Flow { src: self.src, dst: self.dst, protocol, ports }
    }

    /// What the packet is pinned by: its flow, or for an ICMP error the flow of the packet that it
    /// quotes (RFC 792, RFC 4443 §2.4 c), so that it travels with what it is about. `bytes` are those
    /// that were parsed. The flow of a quoted packet points the other way.
    #[must_use]
    pub fn pinned_flow(&self, bytes: &[u8]) -> Flow {
        let quoted = self.is_icmp_error().then(|| bytes.get(self.l4_offset + ICMP_HEADER_LEN..));
        let quoted = quoted.flatten().map(|bytes| Packet::parse_up_to(bytes, Extent::Quoted));
        match quoted {
            Some(Ok(about)) => about.flow(),
            _ => self.flow(),
        }
    }

    /// Whether it is an ICMP message that quotes another packet.
    #[must_use]
    #[inline]
    pub fn is_icmp_error(&self) -> bool {
        let L4::Single(type_and_code) = self.l4 else { return false };
        let kind = type_and_code >> 8;
        self.fragment == Fragment::Whole
            && match self.protocol {
                // RFC 792: unreachable, source quench, redirect, time exceeded, parameter problem.
                protocol::ICMP => matches!(kind, 3 | 4 | 5 | 11 | 12),
                // RFC 4443 §2.1: error messages have a zero in the high bit of their type.
                protocol::ICMPV6 => kind < 128,
                _ => false,
            }
    }

    /// Whether the packet may travel from an end with these selectors to an end with those: its source
    /// side matches one of `from`, its destination side one of `to` (RFC 7296 §3.13).
    ///
    /// ICMP and mobility headers have one number, which belongs to the sending side; the receiving
    /// side's ports are not compared (RFC 4301 §4.4.1.3 B to D).
    #[must_use]
    #[inline]
    pub fn matches(&self, from: &[TrafficSelector], to: &[TrafficSelector]) -> bool {
        let (src_port, dst_port) = match self.l4 {
            L4::Ports { src, dst } => (Some(src), Some(Some(dst))),
            L4::Single(value) => (Some(value), None),
            L4::Hidden => (None, Some(None)),
        };
        from.iter().any(|ts| ts.matches(self.src, self.protocol, src_port))
            && to.iter().any(|ts| match dst_port {
                Some(port) => ts.matches(self.dst, self.protocol, port),
                None => {
                    ts.addrs().matches(self.dst)
                        && (ts.protocol() == 0 || ts.protocol() == self.protocol)
                }
            })
    }

    /// Whether it is IPv4.
    #[must_use]
    pub fn is_ipv4(&self) -> bool {
        self.src.is_ipv4()
    }
}

impl L4 {
    fn read(protocol: u8, fragment: Fragment, payload: &[u8]) -> L4 {
        if fragment == Fragment::Later {
            return L4::Hidden;
        }
        let mut r = Reader::new(payload);
        let seen = match protocol {
            protocol::TCP
            | protocol::UDP
            | protocol::SCTP
            | protocol::DCCP
            | protocol::UDP_LITE => (|| Some(L4::Ports { src: r.u16()?, dst: r.u16()? }))(),
            protocol::ICMP | protocol::ICMPV6 => r.u16().map(L4::Single),
            // RFC 6275 §6.1.1: next header, length, type.
            protocol::MOBILITY => {
                (|| Some((r.u16()?, r.u8()?)))().map(|(_, kind)| L4::Single(u16::from(kind) << 8))
            }
            _ => None,
        };
        seen.unwrap_or(L4::Hidden)
    }
}

/// Explicit congestion notification: the low two bits of the traffic class (RFC 3168 §5).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Ecn {
    /// Not capable.
    NotEct,
    /// Capable, codepoint 1.
    Ect1,
    /// Capable, codepoint 0.
    Ect0,
    /// Congestion experienced.
    Ce,
}

impl Ecn {
    /// From a traffic class.
    #[must_use]
    #[inline]
    pub fn of(traffic_class: u8) -> Ecn {
        match traffic_class & 3 {
            0 => Ecn::NotEct,
            1 => Ecn::Ect1,
            2 => Ecn::Ect0,
            _ => Ecn::Ce,
        }
    }

    /// The traffic class with its low bits replaced by this.
    #[must_use]
    #[inline]
    pub fn apply(self, traffic_class: u8) -> u8 {
        traffic_class & !3 | self as u8
    }
}

/// The DSCP of a traffic class: 0 to 63.
#[must_use]
#[inline]
pub fn dscp(traffic_class: u8) -> u8 {
    traffic_class >> 2
}

/// Replaces the traffic class of a packet, keeping an IPv4 header checksum right (RFC 1624). Does nothing
/// to what is neither IPv4 nor IPv6.
#[inline]
pub fn set_traffic_class(packet: &mut [u8], traffic_class: u8) {
    if let [first @ 0x40..=0x4f, old, rest @ ..] = packet {
        if let Some(sum) = rest.get_mut(8..).and_then(|r| r.first_chunk_mut::<2>()) {
            let before = u16::from_be_bytes([*first, *old]);
            let after = u16::from_be_bytes([*first, traffic_class]);
            *sum = checksum::update(u16::from_be_bytes(*sum), before, after).to_be_bytes();
            *old = traffic_class;
        }
    } else if let [b0 @ 0x60..=0x6f, b1, ..] = packet {
        *b0 = 0x60 | traffic_class >> 4;
        *b1 = traffic_class << 4 | *b1 & 0xf;
    }
}

#[cfg(test)]
mod tests;
