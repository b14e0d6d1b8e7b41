//! Packets of one flow that follow each other, and the headers of the packet that stands for them.

use wire::ip::{UDP_HEADER_LEN, protocol};
use wire::vnet::{Carried, Segmented};

use super::ip::Outer;
use super::{tcp, udp};
use crate::bytes::put;

/// What an IP packet can hold: its length field has 16 bits.
const MOST_BYTES: usize = 65_535;

/// Bytes of the longest headers in front of a payload that is merged: IPv6, TCP with all options.
pub const MOST_HEADER: usize = 40 + 60;

/// What is merged at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Merge {
    /// TCP segments.
    pub tcp: bool,
    /// UDP datagrams.
    pub udp: bool,
}

impl Merge {
    /// All kinds.
    pub const ALL: Merge = Merge { tcp: true, udp: true };

    /// Whether this kind is.
    #[must_use]
    pub fn takes(self, carried: Carried) -> bool {
        match carried {
            Carried::Tcp => self.tcp,
            Carried::Udp => self.udp,
        }
    }
}

/// A packet in a form that may be merged.
#[derive(Clone, Copy, Debug)]
struct Part {
    outer: Outer,
    /// Bytes in front of the payload.
    header_len: usize,
    payload_len: usize,
    kind: Kind,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Tcp(tcp::Segment),
    Udp,
}

impl Part {
    /// `None` for every packet that passes as it is. Checksums are not verified yet.
    fn parse(packet: &[u8], merge: Merge) -> Option<Self> {
        let outer = Outer::parse(packet)?;
        let at = outer.len();
        match outer.protocol {
            protocol::TCP if merge.tcp => {
                let segment = tcp::Segment::parse(packet.get(at..)?)?;
                let (header_len, payload_len) = (at + segment.header_len, segment.payload_len);
                Some(Self { outer, header_len, payload_len, kind: Kind::Tcp(segment) })
            }
            protocol::UDP if merge.udp => {
                let payload_len = udp::parse(packet.get(at..)?)?;
                let header_len = at + UDP_HEADER_LEN;
                Some(Self { outer, header_len, payload_len, kind: Kind::Udp })
            }
            _ => None,
        }
    }

    /// Whether a run may begin with it.
    fn may_lead(&self) -> bool {
        match self.kind {
            Kind::Tcp(segment) => !segment.push && self.payload_len >= tcp::LEAST_PAYLOAD,
            Kind::Udp => self.payload_len >= udp::LEAST_PAYLOAD,
        }
    }

    fn carried(&self) -> Carried {
        match self.kind {
            Kind::Tcp(_) => Carried::Tcp,
            Kind::Udp => Carried::Udp,
        }
    }

    /// Whether two packets, the first of this form, agree in every header byte that a split copies: so also in
    /// version, protocol and the length of their headers.
    fn same_headers(&self, a: &[u8], b: &[u8]) -> bool {
        let at = self.outer.len();
        let (Some(transport_a), Some(transport_b)) = (a.get(at..), b.get(at..)) else {
            return false;
        };
        self.outer.same(a, b)
            && match self.kind {
                Kind::Tcp(segment) => segment.same(transport_a, transport_b),
                Kind::Udp => udp::same_ports(transport_a, transport_b),
            }
    }
}

/// Packets that belong together so far. The bytes of the first are given to every call.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    first: Part,
    /// Bytes of the merged packet.
    total: usize,
    count: usize,
    /// More may come.
    open: bool,
    /// TCP: the last one had PSH.
    push: bool,
}

impl Run {
    /// A run of one, if `packet` is of a kind that can be merged.
    #[must_use]
    pub fn start(packet: &[u8], merge: Merge) -> Option<Self> {
        let first = Part::parse(packet, merge).filter(Part::may_lead)?;
        Some(Self { first, total: packet.len(), count: 1, open: true, push: false })
    }

    /// Takes `packet` in if it continues the run that `first` began; `false`, and nothing changed but
    /// perhaps that the run is closed, if not.
    pub fn add(&mut self, first: &[u8], packet: &[u8]) -> bool {
        let merge = match self.first.carried() {
            Carried::Tcp => Merge { tcp: true, udp: false },
            Carried::Udp => Merge { tcp: false, udp: true },
        };
        if !self.open {
            return false;
        }
        let Some(part) = Part::parse(packet, merge) else { return false };
        let next_in_order = match (self.first.kind, part.kind) {
            (Kind::Tcp(first), Kind::Tcp(next)) => {
                // Modulo 2^32 (RFC 9293 §3.4). The payloads of a run fit into 16 bits.
                next.seq == first.seq.wrapping_add((self.total - self.first.header_len) as u32)
            }
            (Kind::Udp, Kind::Udp) => true,
            (Kind::Tcp(_), Kind::Udp) | (Kind::Udp, Kind::Tcp(_)) => false,
        };
        let follows = next_in_order
            && part.payload_len <= self.first.payload_len
            && self.total + part.payload_len <= MOST_BYTES
            && self.first.same_headers(first, packet);
        if !follows {
            return false;
        }
        if self.count == 1 && !self.first.outer.intact(first) {
            self.open = false;
            return false;
        }
        if !part.outer.intact(packet) {
            return false;
        }
        self.total += part.payload_len;
        self.count += 1;
        self.push = matches!(part.kind, Kind::Tcp(segment) if segment.push);
        self.open = !self.push && part.payload_len == self.first.payload_len;
        true
    }

    /// Packets in the run.
    #[must_use]
    pub fn count(&self) -> usize {
        self.count
    }

    /// Whether more packets may be added.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.open
    }

    /// Bytes in front of each packet's payload.
    #[must_use]
    pub fn header_len(&self) -> usize {
        self.first.header_len
    }

    /// TCP or UDP.
    #[must_use]
    pub fn carried(&self) -> Carried {
        self.first.carried()
    }

    /// The headers of the whole, and how it is to be split. `None` for a run of one, or if `first` is not the packet
    /// that the run began with.
    #[must_use]
    pub fn head(&self, first: &[u8]) -> Option<Head> {
        let Part { outer, header_len, payload_len, kind } = self.first;
        if self.count < 2 || first.len() != header_len + payload_len {
            return None;
        }
        let transport_at = outer.len();
        let transport_len = self.total - transport_at;
        let form = Segmented {
            carried: self.carried(),
            ipv6: outer.ipv6,
            header_len: u16::try_from(header_len).ok()?,
            segment_len: u16::try_from(payload_len).ok()?,
            transport_at: u16::try_from(transport_at).ok()?,
        };
        let mut head = Head { bytes: [0; MOST_HEADER], form };
        let bytes = head.bytes.get_mut(..header_len)?;
        bytes.copy_from_slice(first.get(..header_len)?);
        outer.set_total(bytes, self.total)?;
        let sum = outer.partial_checksum(bytes, transport_len)?;
        let transport = bytes.get_mut(transport_at..)?;
        put(transport, form.carried.checksum_at(), sum)?;
        match kind {
            Kind::Tcp(_) if self.push => tcp::push(transport)?,
            Kind::Tcp(_) => {}
            Kind::Udp => udp::set_len(transport, transport_len)?,
        }
        Some(head)
    }
}

/// The headers of a merged packet. All payloads of the run follow, the first's too.
#[derive(Clone, Copy, Debug)]
pub struct Head {
    bytes: [u8; MOST_HEADER],
    /// How it is to be split.
    pub form: Segmented,
}

impl Head {
    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        self.bytes.get(..usize::from(self.form.header_len)).unwrap_or_default()
    }
}
