//! TCP and UDP headers, and a maker of UDP packets.

use core::net::{IpAddr, SocketAddr};

use super::{IPV4_HEADER_LEN, IPV6_HEADER_LEN, ipv4_header_checksum, protocol, transport_checksum};
use crate::read::Reader;

/// Length of a UDP header.
pub const UDP_HEADER_LEN: usize = 8;
/// Length of a TCP header without options.
pub const TCP_HEADER_LEN: usize = 20;

/// A UDP datagram (RFC 768).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Udp<'a> {
    /// Source port.
    pub src: u16,
    /// Destination port.
    pub dst: u16,
    /// Checksum as sent; 0 is none.
    pub checksum: u16,
    /// Payload, cut to the length in the header.
    pub payload: &'a [u8],
}

impl<'a> Udp<'a> {
    /// Reads a datagram; `None` if it is shorter than its header or than the length in it.
    #[must_use]
    pub fn parse(segment: &'a [u8]) -> Option<Udp<'a>> {
        let mut r = Reader::new(segment);
        let (src, dst, len, checksum) = (r.u16()?, r.u16()?, r.u16()?, r.u16()?);
        let payload = r.take(usize::from(len).checked_sub(UDP_HEADER_LEN)?)?;
        Some(Udp { src, dst, checksum, payload })
    }
}

/// A TCP segment (RFC 9293 §3.1).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tcp<'a> {
    /// Source port.
    pub src: u16,
    /// Destination port.
    pub dst: u16,
    /// Sequence number.
    pub seq: u32,
    /// Acknowledgement number.
    pub ack: u32,
    /// Flags from FIN (1) to CWR (128).
    pub flags: u8,
    /// Receive window, unscaled.
    pub window: u16,
    /// Options, a multiple of four bytes, up to 40.
    pub options: &'a [u8],
    /// Payload.
    pub payload: &'a [u8],
}

impl<'a> Tcp<'a> {
    /// FIN.
    pub const FIN: u8 = 0x01;
    /// SYN.
    pub const SYN: u8 = 0x02;
    /// RST.
    pub const RST: u8 = 0x04;
    /// PSH.
    pub const PSH: u8 = 0x08;
    /// ACK.
    pub const ACK: u8 = 0x10;
    /// CWR (RFC 3168 §6.1).
    pub const CWR: u8 = 0x80;

    /// Reads a segment; `None` if its header length is below 20 or beyond the bytes.
    #[must_use]
    pub fn parse(segment: &'a [u8]) -> Option<Tcp<'a>> {
        let mut r = Reader::new(segment);
        let (src, dst, seq, ack) = (r.u16()?, r.u16()?, r.u32()?, r.u32()?);
        let (offset, flags, window) = (r.u8()?, r.u8()?, r.u16()?);
        r.u32()?; // checksum, urgent pointer
        let options = r.take((usize::from(offset >> 4) * 4).checked_sub(TCP_HEADER_LEN)?)?;
        Some(Tcp { src, dst, seq, ack, flags, window, options, payload: r.rest() })
    }
}

/// A whole UDP packet, checksums right, hop limit 64, DF set. `None` on mixed address families or a
/// payload that does not fit.
#[must_use]
pub fn udp_packet(src: SocketAddr, dst: SocketAddr, payload: &[u8]) -> Option<Vec<u8>> {
    let udp_len = u16::try_from(UDP_HEADER_LEN + payload.len()).ok()?;
    let mut segment = Vec::with_capacity(usize::from(udp_len));
    segment.extend(src.port().to_be_bytes());
    segment.extend(dst.port().to_be_bytes());
    segment.extend(udp_len.to_be_bytes());
    segment.extend([0, 0]);
    segment.extend(payload);
    let sum = transport_checksum(src.ip(), dst.ip(), protocol::UDP, &segment)?;
    segment.get_mut(6..8)?.copy_from_slice(&sum.to_be_bytes());

    let mut packet = Vec::with_capacity(IPV6_HEADER_LEN + segment.len());
    match (src.ip(), dst.ip()) {
        (IpAddr::V4(a), IpAddr::V4(b)) => {
            let total = u16::try_from(IPV4_HEADER_LEN + segment.len()).ok()?;
            packet.extend([0x45, 0]);
            packet.extend(total.to_be_bytes());
            packet.extend([0, 0, 0x40, 0, 64, protocol::UDP, 0, 0]);
            packet.extend(a.octets());
            packet.extend(b.octets());
            let sum = ipv4_header_checksum(&packet)?;
            packet.get_mut(10..12)?.copy_from_slice(&sum.to_be_bytes());
        }
        (IpAddr::V6(a), IpAddr::V6(b)) => {
            packet.extend([0x60, 0, 0, 0]);
            packet.extend(udp_len.to_be_bytes());
            packet.extend([protocol::UDP, 64]);
            packet.extend(a.octets());
            packet.extend(b.octets());
        }
        _ => return None,
    }
    packet.extend(segment);
    Some(packet)
}
