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

/// What a receiver must know of a packet that stands for several TCP segments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentedTcp {
    /// The packets are IPv6, else IPv4.
    pub ipv6: bool,
    /// Bytes of IP and TCP headers.
    pub header_len: u16,
    /// Payload bytes of every segment but the last, which may be shorter.
    pub segment_len: u16,
    /// Where the TCP header begins. Its checksum field holds the sum of the pseudo-header alone, and
    /// whoever splits the packet completes it.
    pub tcp_at: u16,
}

impl SegmentedTcp {
    const NEEDS_CHECKSUM: u8 = 1;
    const TCP_IPV4: u8 = 1;
    const TCP_IPV6: u8 = 4;
    /// Of the checksum in a TCP header (RFC 9293 §3.1).
    const CHECKSUM_AT: u16 = 16;

    /// The header in front of such a packet. In front of any other stand zeros.
    #[must_use]
    pub fn encode(&self) -> [u8; VNET_HEADER_LEN] {
        let kind = if self.ipv6 { Self::TCP_IPV6 } else { Self::TCP_IPV4 };
        let [a, b] = self.header_len.to_ne_bytes();
        let [c, d] = self.segment_len.to_ne_bytes();
        let [e, f] = self.tcp_at.to_ne_bytes();
        let [g, h] = Self::CHECKSUM_AT.to_ne_bytes();
        [Self::NEEDS_CHECKSUM, kind, a, b, c, d, e, f, g, h]
    }
}
