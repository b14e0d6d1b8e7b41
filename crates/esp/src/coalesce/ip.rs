//! IP headers: whether a split could copy one, whether two agree, and which flow a packet may be of.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use wire::ip::{self, IPV4_HEADER_LEN, IPV6_HEADER_LEN, protocol};

use crate::bytes::{put, word};

/// Of IPv4's flags and fragment offset: DF alone.
const DONT_FRAGMENT: u16 = 0x4000;
/// All of them but DF and the reserved bit: more fragments, or an offset.
const IS_FRAGMENT: u16 = 0x3fff;

/// A header that a split can copy, in front of the whole packet: IPv4 without options and with DF alone, or IPv6
/// without extension headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Outer {
    pub(super) ipv6: bool,
    pub(super) protocol: u8,
}

impl Outer {
    pub(super) fn parse(packet: &[u8]) -> Option<Self> {
        match packet.first()? {
            0x45 => {
                // RFC 791 §3.1: total length, flags, protocol.
                let plain = usize::from(word(packet, 2)?) == packet.len()
                    && word(packet, 6)? == DONT_FRAGMENT;
                let protocol = *packet.get(9)?;
                (plain && packet.len() >= IPV4_HEADER_LEN).then_some(Self { ipv6: false, protocol })
            }
            first if first >> 4 == 6 => {
                // RFC 8200 §3: payload length, next header.
                let whole = usize::from(word(packet, 4)?) + IPV6_HEADER_LEN == packet.len();
                let protocol = *packet.get(6)?;
                whole.then_some(Self { ipv6: true, protocol })
            }
            _ => None,
        }
    }

    /// Bytes of the header.
    pub(super) fn len(self) -> usize {
        if self.ipv6 { IPV6_HEADER_LEN } else { IPV4_HEADER_LEN }
    }

    /// Whether two such headers agree in all that a split copies.
    pub(super) fn same(self, a: &[u8], b: &[u8]) -> bool {
        if self.ipv6 {
            // All but the payload length.
            same(a, b, 0, 4) && same(a, b, 6, IPV6_HEADER_LEN)
        } else {
            // All but total length, identification and checksum.
            same(a, b, 0, 2) && same(a, b, 6, 10) && same(a, b, 12, IPV4_HEADER_LEN)
        }
    }

    /// Whether the header's checksum and that of the segment behind it are right: whoever splits computes new ones,
    /// which must not make a broken packet whole.
    pub(super) fn intact(self, packet: &[u8]) -> bool {
        let Some((header, segment)) = packet.split_at_checked(self.len()) else { return false };
        (self.ipv6 || ip::checksum(header) == 0)
            && self.addresses(packet).is_some_and(|(src, dst)| {
                ip::transport_checksum_ok(src, dst, self.protocol, segment)
            })
    }

    /// Makes `header` that of a packet of `total` bytes. `None` if no such packet can be.
    pub(super) fn set_total(self, header: &mut [u8], total: usize) -> Option<()> {
        if self.ipv6 {
            put(header, 4, u16::try_from(total.checked_sub(IPV6_HEADER_LEN)?).ok()?)
        } else {
            put(header, 2, u16::try_from(total).ok()?)?;
            let sum = ip::ipv4_header_checksum(header)?;
            put(header, 10, sum)
        }
    }

    /// What the checksum field of a segment of `len` bytes holds while somebody else is to complete it.
    pub(super) fn partial_checksum(self, header: &[u8], len: usize) -> Option<u16> {
        let (src, dst) = self.addresses(header)?;
        ip::partial_checksum(src, dst, self.protocol, len)
    }

    fn addresses(self, packet: &[u8]) -> Option<(IpAddr, IpAddr)> {
        Some(if self.ipv6 {
            let at = |at: usize| Some(Ipv6Addr::from(*packet.get(at..)?.first_chunk::<16>()?));
            (at(8)?.into(), at(24)?.into())
        } else {
            let at = |at: usize| Some(Ipv4Addr::from(*packet.get(at..)?.first_chunk::<4>()?));
            (at(12)?.into(), at(16)?.into())
        })
    }
}

/// Which flow a packet may be of. Borrows the packet.
#[derive(Clone, Copy, Debug)]
pub(super) enum Flow<'a> {
    /// Of this one: protocol, and addresses and ports as they stand in the packet.
    One(u8, &'a [u8]),
    /// Of any between these two addresses: a fragment, or one with options or extension headers.
    Any(&'a [u8]),
    /// Neither TCP nor UDP.
    Other,
}

impl<'a> Flow<'a> {
    pub(super) fn of(packet: &'a [u8]) -> Self {
        Self::seen(packet).unwrap_or(Flow::Other)
    }

    fn seen(packet: &'a [u8]) -> Option<Self> {
        let has_ports = |number: u8| matches!(number, protocol::TCP | protocol::UDP);
        let first = *packet.first()?;
        let (number, addresses, ports_at, bare) = match first >> 4 {
            4 => {
                let number = *packet.get(9)?;
                if !has_ports(number) {
                    return None;
                }
                let bare = first == 0x45 && word(packet, 6)? & IS_FRAGMENT == 0;
                (number, packet.get(12..20)?, IPV4_HEADER_LEN, bare)
            }
            6 => {
                let number = *packet.get(6)?;
                if number == protocol::ICMPV6 {
                    return None;
                }
                (number, packet.get(8..40)?, IPV6_HEADER_LEN, has_ports(number))
            }
            _ => return None,
        };
        // The ports follow the addresses at once.
        let ends = packet.get(ports_at - addresses.len()..ports_at + 4);
        Some(match ends {
            Some(ends) if bare => Flow::One(number, ends),
            _ => Flow::Any(addresses),
        })
    }

    /// Whether the packet may be of the flow that a run is of, which is always known.
    pub(super) fn may_be(&self, run: &Flow<'_>) -> bool {
        match (self, run) {
            (Flow::One(a, ends_a), Flow::One(b, ends_b)) => a == b && ends_a == ends_b,
            (Flow::Any(addresses), Flow::One(_, ends)) => {
                ends.len() == addresses.len() + 4 && ends.starts_with(addresses)
            }
            _ => false,
        }
    }
}

/// Whether both have the same bytes there.
pub(super) fn same(a: &[u8], b: &[u8], from: usize, to: usize) -> bool {
    a.get(from..to).zip(b.get(from..to)).is_some_and(|(a, b)| a == b)
}
