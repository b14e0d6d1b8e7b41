//! The header that a TUN with IFF_VNET_HDR puts in front of every packet: `struct virtio_net_hdr`
//! of the Virtual I/O Device (VIRTIO) specification, §5.1.6, in the host's byte order, as Linux
//! keeps it for TUN unless told otherwise.
//!
//! ```text
//!  0      1          2         4          6            8             10
//!  | flags | gso type | hdr len | gso size | csum start | csum offset |
//! ```

/// Bytes of the header.
pub const VNET_HEADER_LEN: usize = 10;

const NEEDS_CHECKSUM: u8 = 1;
const TCP_IPV4: u8 = 1;
const TCP_IPV6: u8 = 4;
const UDP: u8 = 5;
/// Beside a TCP type: the first segment carries CWR.
const ECN: u8 = 0x80;

/// What a packet that stands for several carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carried {
    /// One TCP stream's bytes.
    Tcp,
    /// UDP datagrams of equal length.
    Udp,
}

impl Carried {
    /// Where in the header of TCP (RFC 9293 §3.1) or UDP (RFC 768) the checksum stands.
    #[must_use]
    pub fn checksum_at(self) -> usize {
        match self {
            Carried::Tcp => 16,
            Carried::Udp => 6,
        }
    }
}

/// What a receiver must know of a packet that stands for several segments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segmented {
    /// TCP or UDP.
    pub carried: Carried,
    /// The packets are IPv6, else IPv4.
    pub ipv6: bool,
    /// Bytes of IP and TCP or UDP headers.
    pub header_len: u16,
    /// Payload bytes of every segment but the last, which may be shorter.
    pub segment_len: u16,
    /// Where the TCP or UDP header begins. Its checksum field holds the sum of the pseudo-header alone, and
    /// whoever splits the packet completes it.
    pub transport_at: u16,
}

impl Segmented {
    /// The header in front of such a packet. In front of any other stand zeros.
    #[must_use]
    pub fn encode(&self) -> [u8; VNET_HEADER_LEN] {
        let kind = match (self.carried, self.ipv6) {
            (Carried::Tcp, false) => TCP_IPV4,
            (Carried::Tcp, true) => TCP_IPV6,
            (Carried::Udp, _) => UDP,
        };
        let [a, b] = self.header_len.to_ne_bytes();
        let [c, d] = self.segment_len.to_ne_bytes();
        let [e, f] = self.transport_at.to_ne_bytes();
        let [g, h] = (self.carried.checksum_at() as u16).to_ne_bytes();
        [NEEDS_CHECKSUM, kind, a, b, c, d, e, f, g, h]
    }
}

/// What is left to do for a packet that was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offload {
    /// Nothing: it is as it will be sent.
    None,
    /// Its checksum is that of the bytes from `from` on, and is to be written at `at`. Its field holds the sum
    /// of the pseudo-header.
    Checksum {
        /// First byte that it covers.
        from: usize,
        /// Where it stands.
        at: usize,
    },
    /// To be split into segments of so many bytes of payload.
    Segments {
        /// TCP or UDP.
        carried: Carried,
        /// Payload bytes of every segment but the last.
        segment_len: usize,
        /// Where the TCP or UDP header begins.
        transport_at: usize,
    },
    /// Something that was never asked for.
    Unknown,
}

impl Offload {
    /// Reads the header in front of a packet.
    #[must_use]
    pub fn decode(header: &[u8; VNET_HEADER_LEN]) -> Self {
        let [flags, kind, _, _, c, d, e, f, g, h] = *header;
        let word = |a, b| usize::from(u16::from_ne_bytes([a, b]));
        let (segment_len, from, offset) = (word(c, d), word(e, f), word(g, h));
        let needs_checksum = flags & NEEDS_CHECKSUM != 0;
        let carried = match kind & !ECN {
            0 if needs_checksum => return Self::Checksum { from, at: from + offset },
            0 => return Self::None,
            TCP_IPV4 | TCP_IPV6 => Carried::Tcp,
            UDP if kind == UDP => Carried::Udp,
            _ => return Self::Unknown,
        };
        if needs_checksum && segment_len > 0 && offset == carried.checksum_at() {
            Self::Segments { carried, segment_len, transport_at: from }
        } else {
            Self::Unknown
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_reads_back() {
        for (carried, ipv6) in
            [Carried::Tcp, Carried::Udp].into_iter().flat_map(|c| [(c, false), (c, true)])
        {
            let form = Segmented {
                carried,
                ipv6,
                header_len: 52,
                segment_len: 1368,
                transport_at: if ipv6 { 40 } else { 20 },
            };
            let read = Offload::decode(&form.encode());
            let transport_at = usize::from(form.transport_at);
            assert_eq!(read, Offload::Segments { carried, segment_len: 1368, transport_at });
        }
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let tcp = Segmented {
            carried: Carried::Tcp,
            ipv6: false,
            header_len: 40,
            segment_len: 1400,
            transport_at: 20,
        };
        let good = tcp.encode();
        let with = |at: usize, value: u8| {
            let mut header = good;
            header[at] = value;
            Offload::decode(&header)
        };
        assert_eq!(with(1, TCP_IPV4 | ECN), with(1, TCP_IPV4));
        assert_eq!(with(1, 3), Offload::Unknown, "UDP fragments");
        assert_eq!(with(1, UDP), Offload::Unknown, "the checksum is not UDP's");
        assert_eq!(with(0, 0), Offload::Unknown, "no checksum to complete");
        assert_eq!(with(1, 0), Offload::Checksum { from: 20, at: 36 });
        let mut empty = good;
        empty[4..6].fill(0);
        assert_eq!(Offload::decode(&empty), Offload::Unknown);
        assert_eq!(Offload::decode(&[0; VNET_HEADER_LEN]), Offload::None);
    }
}
