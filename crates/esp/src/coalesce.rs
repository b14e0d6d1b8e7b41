//! Merging what came out of a tunnel: consecutive TCP segments of one flow become one large packet, which
//! the rest of the host then carries once instead of many times. The kernel, or a network card, splits it
//! again where it leaves, into the very segments it was made of.
//!
//! Nothing is merged that TCP would see differently: headers must agree in all but length, sequence number
//! and IPv4 identification (which means nothing in a packet that may not be fragmented, RFC 6864 §4.1), the
//! sequence numbers must follow each other, every checksum must be right, and a segment with PSH, or shorter
//! than the first, is the last one. Segments with any other flag, IPv4 options, IPv6 extension headers, or
//! without payload pass as they are.
//!
//! ```text
//!   first:   | IP | TCP seq=S    | payload 1 |        head, changed by `Run::finish`
//!   second:  | IP | TCP seq=S+n  |   payload 2 |      its payload alone: packet[run.header_len()..]
//!   last:    | IP | TCP seq=S+2n |   payload 3 | PSH
//! ```
//! Pure functions over borrowed bytes: no I/O, no copy, no allocation.

use core::net::{Ipv4Addr, Ipv6Addr};

use wire::ip::{self, IPV4_HEADER_LEN, IPV6_HEADER_LEN, TCP_HEADER_LEN, Tcp, protocol};
use wire::vnet::{Carried, Segmented};

/// What an IP packet can hold: its length field has 16 bits.
const MOST_BYTES: usize = 65_535;

/// Shorter segments are not worth a split, and some network cards refuse to make them.
const LEAST_PAYLOAD: usize = 128;

/// A TCP segment in a form that may be merged.
#[derive(Clone, Copy, Debug)]
struct Segment {
    ipv6: bool,
    tcp_at: usize,
    payload_at: usize,
    payload_len: usize,
    seq: u32,
    push: bool,
}

impl Segment {
    /// `None` for every packet that passes as it is. Checksums are not looked at yet.
    fn parse(packet: &[u8]) -> Option<Self> {
        let ipv6 = match packet.first()? {
            // No options.
            0x45 => false,
            first if first >> 4 == 6 => true,
            _ => return None,
        };
        let word = |at: usize| Some(u16::from_be_bytes(packet.get(at..at + 2)?.try_into().ok()?));
        let tcp_at = if ipv6 {
            // RFC 8200 §3: payload length, next header.
            let whole = usize::from(word(4)?) + IPV6_HEADER_LEN == packet.len();
            (whole && *packet.get(6)? == protocol::TCP).then_some(IPV6_HEADER_LEN)?
        } else {
            // RFC 791 §3.1: total length; DF alone of flags and fragment offset; protocol.
            let whole = usize::from(word(2)?) == packet.len() && word(6)? == 0x4000;
            (whole && *packet.get(9)? == protocol::TCP).then_some(IPV4_HEADER_LEN)?
        };
        let tcp = Tcp::parse(packet.get(tcp_at..)?)?;
        let plain = tcp.flags & !Tcp::PSH == Tcp::ACK && !tcp.payload.is_empty();
        plain.then_some(Self {
            ipv6,
            tcp_at,
            payload_at: tcp_at + TCP_HEADER_LEN + tcp.options.len(),
            payload_len: tcp.payload.len(),
            seq: tcp.seq,
            push: tcp.flags & Tcp::PSH != 0,
        })
    }

    /// Whether both checksums are right: the kernel will compute new ones, which must not make a broken
    /// packet whole.
    fn intact(&self, packet: &[u8]) -> bool {
        let Some(tcp) = packet.get(self.tcp_at..) else { return false };
        let Some((src, dst)) = addresses(packet, self.ipv6) else { return false };
        let header = packet.get(..self.tcp_at).unwrap_or_default();
        (self.ipv6 || ip::checksum(header) == 0)
            && ip::transport_checksum_ok(src, dst, protocol::TCP, tcp)
    }
}

fn addresses(packet: &[u8], ipv6: bool) -> Option<(core::net::IpAddr, core::net::IpAddr)> {
    Some(if ipv6 {
        let at =
            |at: usize| Some(Ipv6Addr::from(<[u8; 16]>::try_from(packet.get(at..at + 16)?).ok()?));
        (at(8)?.into(), at(24)?.into())
    } else {
        let at =
            |at: usize| Some(Ipv4Addr::from(<[u8; 4]>::try_from(packet.get(at..at + 4)?).ok()?));
        (at(12)?.into(), at(16)?.into())
    })
}

/// Whether two segments of equal form agree in every header byte that a split would copy.
fn same_headers(a: &[u8], b: &[u8], form: &Segment) -> bool {
    let same =
        |from: usize, to: usize| a.get(from..to).zip(b.get(from..to)).is_some_and(|(a, b)| a == b);
    let ip = if form.ipv6 {
        // All but the payload length.
        same(0, 4) && same(6, IPV6_HEADER_LEN)
    } else {
        // All but total length, identification and checksum.
        same(0, 2) && same(6, 10) && same(12, IPV4_HEADER_LEN)
    };
    let tcp = form.tcp_at;
    // All but sequence number, flags (checked by the parser) and checksum.
    ip && same(tcp, tcp + 4)
        && same(tcp + 8, tcp + 13)
        && same(tcp + 14, tcp + 16)
        && same(tcp + 18, form.payload_at)
}

/// Segments that belong together so far.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    first: Segment,
    /// Sequence number that the next one must have.
    next: u32,
    /// Bytes of the merged packet.
    total: usize,
    count: usize,
    /// More may come.
    open: bool,
    /// The last one had PSH.
    push: bool,
}

impl Run {
    /// A run of one, if `packet` is of a kind that can be merged.
    #[must_use]
    pub fn start(packet: &[u8]) -> Option<Self> {
        let long = |segment: &Segment| segment.payload_len >= LEAST_PAYLOAD;
        let first = Segment::parse(packet).filter(|segment| !segment.push && long(segment))?;
        Some(Self {
            first,
            next: first.seq.wrapping_add(first.payload_len as u32),
            total: packet.len(),
            count: 1,
            open: true,
            push: false,
        })
    }

    /// Takes `packet` in if it continues the run that `first` began; `false`, and nothing changed but
    /// perhaps that the run is closed, if not.
    pub fn add(&mut self, first: &[u8], packet: &[u8]) -> bool {
        if !self.open {
            return false;
        }
        let Some(segment) = Segment::parse(packet) else { return false };
        let follows = segment.ipv6 == self.first.ipv6
            && segment.payload_at == self.first.payload_at
            && segment.seq == self.next
            && segment.payload_len <= self.first.payload_len
            && self.total + segment.payload_len <= MOST_BYTES
            && same_headers(first, packet, &self.first);
        if !follows {
            return false;
        }
        if self.count == 1 && !self.first.intact(first) {
            self.open = false;
            return false;
        }
        if !segment.intact(packet) {
            return false;
        }
        self.next = self.next.wrapping_add(segment.payload_len as u32);
        self.total += segment.payload_len;
        self.count += 1;
        self.push = segment.push;
        self.open = !segment.push && segment.payload_len == self.first.payload_len;
        true
    }

    /// Packets in the run.
    #[must_use]
    pub fn count(&self) -> usize {
        self.count
    }

    /// Bytes in front of each packet's payload.
    #[must_use]
    pub fn header_len(&self) -> usize {
        self.first.payload_at
    }

    /// Makes the first packet's headers those of the whole, and says how it is to be split. `None`, and
    /// nothing changed, for a run of one, or if `first` is not the packet that the run began with.
    pub fn finish(&self, first: &mut [u8]) -> Option<Segmented> {
        let Segment { ipv6, tcp_at, payload_at, payload_len, .. } = self.first;
        if self.count < 2 || first.len() != payload_at + payload_len {
            return None;
        }
        let (src, dst) = addresses(first, ipv6)?;
        let sum = ip::partial_checksum(src, dst, protocol::TCP, self.total - tcp_at)?;
        let header = Segmented {
            carried: Carried::Tcp,
            ipv6,
            header_len: u16::try_from(payload_at).ok()?,
            segment_len: u16::try_from(payload_len).ok()?,
            transport_at: u16::try_from(tcp_at).ok()?,
        };
        let length = if ipv6 { self.total - IPV6_HEADER_LEN } else { self.total };
        let length = u16::try_from(length).ok()?.to_be_bytes();
        let length_at = if ipv6 { 4 } else { 2 };
        first.get_mut(length_at..length_at + 2)?.copy_from_slice(&length);
        if !ipv6 {
            let sum = ip::ipv4_header_checksum(first)?;
            first.get_mut(10..12)?.copy_from_slice(&sum.to_be_bytes());
        }
        if self.push {
            *first.get_mut(tcp_at + 13)? |= Tcp::PSH;
        }
        first.get_mut(tcp_at + 16..tcp_at + 18)?.copy_from_slice(&sum.to_be_bytes());
        Some(header)
    }
}
