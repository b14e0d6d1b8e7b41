//! Packets by their fields, written to bytes in the slow and obvious way; and which of them may be merged, by rules
//! that look at these fields and never at bytes.
#![allow(dead_code, reason = "each user takes a part")]
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "helpers of tests")]

pub(crate) const ACK: u8 = 0x10;
pub(crate) const PSH: u8 = 0x08;

/// A TCP segment or UDP datagram in an IP packet.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Made {
    pub(crate) udp: bool,
    pub(crate) ipv6: bool,
    pub(crate) host: u8,
    pub(crate) port: u16,
    pub(crate) traffic_class: u8,
    pub(crate) hop_limit: u8,
    /// IPv6 alone.
    pub(crate) label: u16,
    /// IPv4 alone, these two.
    pub(crate) id: u16,
    pub(crate) fragment_word: u16,
    /// IPv4 options, or an IPv6 header with destination options.
    pub(crate) ip_options: bool,
    /// TCP alone, up to the options.
    pub(crate) seq: u32,
    pub(crate) ack: u32,
    pub(crate) reserved: u8,
    pub(crate) flags: u8,
    pub(crate) window: u16,
    pub(crate) urgent: u16,
    pub(crate) options: Vec<u8>,
    pub(crate) payload: Vec<u8>,
    /// The checksum is wrong.
    pub(crate) broken: bool,
    /// UDP: there is none.
    pub(crate) unsummed: bool,
}

impl Made {
    pub(crate) fn tcp(ipv6: bool, seq: u32, payload: Vec<u8>) -> Self {
        Self {
            udp: false,
            ipv6,
            host: 9,
            port: 4000,
            traffic_class: 0,
            hop_limit: 64,
            label: 7,
            id: 0,
            fragment_word: 0x4000,
            ip_options: false,
            seq,
            ack: 77,
            reserved: 0,
            flags: ACK,
            window: 500,
            urgent: 0,
            options: vec![1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2],
            payload,
            broken: false,
            unsummed: false,
        }
    }

    pub(crate) fn udp(ipv6: bool, payload: Vec<u8>) -> Self {
        Self { udp: true, options: Vec::new(), ..Self::tcp(ipv6, 0, payload) }
    }

    /// TCP and UDP over IPv4 and IPv6: the flows 0 to 3, each with its next sequence number.
    pub(crate) fn of_flow(flow: usize, seq: &mut u32, id: usize, length: usize) -> Self {
        let payload = (0..length).map(|at| (at * 7 + id) as u8).collect();
        let made = match flow {
            0 | 1 => Made::tcp(flow == 1, *seq, payload),
            _ => Made::udp(flow == 3, payload),
        };
        *seq = seq.wrapping_add(length as u32);
        Made { id: id as u16, ..made }
    }

    fn addresses(&self) -> Vec<u8> {
        let (src, dst) = (5, self.host);
        if self.ipv6 {
            let of = |last| [0xfd, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last];
            [of(src), of(dst)].concat()
        } else {
            vec![10, 2, 0, src, 10, 1, 0, dst]
        }
    }

    fn protocol(&self) -> u8 {
        if self.udp { 17 } else { 6 }
    }

    /// The packet.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut part = Vec::new();
        part.extend(5000_u16.to_be_bytes());
        part.extend(self.port.to_be_bytes());
        let at = if self.udp {
            part.extend((8 + self.payload.len() as u16).to_be_bytes());
            part.extend([0, 0]);
            6
        } else {
            part.extend(self.seq.to_be_bytes());
            part.extend(self.ack.to_be_bytes());
            part.extend([
                (5 + self.options.len() as u8 / 4) << 4 | self.reserved & 0xf,
                self.flags,
            ]);
            part.extend(self.window.to_be_bytes());
            part.extend([0, 0]);
            part.extend(self.urgent.to_be_bytes());
            part.extend(&self.options);
            16
        };
        part.extend(&self.payload);
        let sum = transport_sum(&self.addresses(), self.protocol(), &part);
        let sum = match !sum {
            0 if self.udp => 0xffff,
            sum => sum,
        };
        let sum = if self.broken { sum ^ 0x0101 } else { sum };
        let sum = if self.unsummed { 0 } else { sum };
        part[at..at + 2].copy_from_slice(&sum.to_be_bytes());

        let mut packet = Vec::new();
        if self.ipv6 {
            let word = 6 << 28 | u32::from(self.traffic_class) << 20 | u32::from(self.label);
            packet.extend(word.to_be_bytes());
            let options: &[u8] =
                if self.ip_options { &[self.protocol(), 0, 1, 4, 0, 0, 0, 0] } else { &[] };
            packet.extend(((options.len() + part.len()) as u16).to_be_bytes());
            packet.extend([if self.ip_options { 60 } else { self.protocol() }, self.hop_limit]);
            packet.extend(self.addresses());
            packet.extend(options);
        } else {
            let words: u8 = if self.ip_options { 6 } else { 5 };
            packet.extend([0x40 | words, self.traffic_class]);
            packet.extend((u16::from(words) * 4 + part.len() as u16).to_be_bytes());
            packet.extend(self.id.to_be_bytes());
            packet.extend(self.fragment_word.to_be_bytes());
            packet.extend([self.hop_limit, self.protocol(), 0, 0]);
            packet.extend(self.addresses());
            packet.extend(vec![1; usize::from(words) * 4 - 20]);
            let sum = !slow_sum(&packet);
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        packet.extend(part);
        packet
    }

    /// Bytes of the IP packet in front of the payload.
    fn header_len(&self) -> usize {
        let ip = if self.ipv6 { 40 } else { 20 };
        ip + if self.udp { 8 } else { 20 + self.options.len() }
    }

    /// Whether its ports are not where they usually are, or not to be trusted.
    fn odd(&self) -> bool {
        self.ip_options || !self.ipv6 && self.fragment_word & 0x3fff != 0
    }

    /// Whether the order between both must be kept.
    fn may_be_of_one_flow_with(&self, other: &Made) -> bool {
        let addresses = self.ipv6 == other.ipv6 && self.host == other.host;
        let ports = self.udp == other.udp && self.port == other.port;
        addresses && (ports || self.odd() || other.odd())
    }

    /// Whether it may stand in a merged packet, at the front if `leads`.
    fn may_be_merged(&self, leads: bool) -> bool {
        let least = match (leads, self.udp) {
            (true, false) => 128,
            (true, true) => 16,
            (false, _) => 1,
        };
        let flags = if self.udp { ACK } else { self.flags };
        self.payload.len() >= least
            && (flags == ACK || flags == ACK | PSH && !leads)
            && !self.ip_options
            && (self.ipv6 || self.fragment_word == 0x4000)
            && !self.broken
            && !self.unsummed
    }

    /// Everything that must agree within a merged packet; the rest is put to the same value.
    fn frame(&self) -> Made {
        let mut frame = Made { id: 0, payload: Vec::new(), ..self.clone() };
        if self.udp {
            (frame.ack, frame.reserved, frame.window, frame.urgent) = (0, 0, 0, 0);
            frame.options.clear();
        }
        if self.ipv6 {
            frame.fragment_word = 0;
        } else {
            frame.label = 0;
        }
        Made { seq: 0, flags: 0, ..frame }
    }

    /// Whether it continues the merged packet that consists of these so far.
    fn continues(&self, group: &[&Made]) -> bool {
        let (first, last) = (group[0], group[group.len() - 1]);
        let length = |made: &Made| made.payload.len();
        let total: usize = group.iter().map(|made| length(made)).sum();
        first.may_be_merged(true)
            && self.may_be_merged(false)
            && self.frame() == first.frame()
            && group
                .iter()
                .all(|made| length(made) == length(first) && (made.udp || made.flags == ACK))
            && length(self) <= length(first)
            && (self.udp || self.seq == last.seq.wrapping_add(length(last) as u32))
            && first.header_len() + total + length(self) <= 65_535
    }
}

/// Who goes with whom, and in which order, of packets with what the caller says of each. Looks at all groups there are,
/// for every packet anew.
pub(crate) fn reference(packets: &[(Made, u8)], most: usize) -> Vec<Vec<usize>> {
    let mut groups: Vec<Vec<usize>> = Vec::new();
    for (n, (made, origin)) in packets.iter().enumerate() {
        let one_flow = |at: &usize| packets[*at].0.may_be_of_one_flow_with(made);
        let newest = groups
            .iter_mut()
            .filter(|group| group.iter().any(one_flow))
            .max_by_key(|group| group.iter().copied().filter(one_flow).max());
        if let Some(group) = newest
            && group.len() < most
            && packets[group[0]].1 == *origin
            && made.continues(&group.iter().map(|at| &packets[*at].0).collect::<Vec<_>>())
        {
            group.push(n);
        } else {
            groups.push(vec![n]);
        }
    }
    groups
}

/// RFC 1071 §1, word by word, the carry brought round at once.
pub(crate) fn slow_sum(bytes: &[u8]) -> u16 {
    let mut sum = 0_u16;
    for pair in bytes.chunks(2) {
        let word = u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]);
        let (added, carry) = sum.overflowing_add(word);
        sum = added + u16::from(carry);
    }
    sum
}

/// The sum of a TCP or UDP part with its pseudo-header: source and destination address, then the rest (RFC 9293 §3.1,
/// RFC 8200 §8.1, whose zeros add nothing).
pub(crate) fn transport_sum(addresses: &[u8], protocol: u8, part: &[u8]) -> u16 {
    let mut bytes = addresses.to_vec();
    bytes.extend((part.len() as u32).to_be_bytes());
    bytes.extend([0, 0, 0, protocol]);
    bytes.extend(part);
    slow_sum(&bytes)
}
