//! UDP datagrams that may be merged (RFC 768). Each stays a datagram of its own: whoever splits them makes the
//! boundaries from the one length that all have, and only the last may be shorter.

use wire::ip::{UDP_HEADER_LEN, Udp};

use super::ip::same;
use crate::bytes::put;

/// Shorter ones are hardly more than headers.
pub(super) const LEAST_PAYLOAD: usize = 16;

/// Payload length of a datagram; `None` for one that passes as it is: empty, without checksum (a split would give it
/// one), or with bytes behind it. The checksum is not verified.
pub(super) fn parse(datagram: &[u8]) -> Option<usize> {
    let udp = Udp::parse(datagram)?;
    let len = udp.payload.len();
    let plain = udp.checksum != 0 && len > 0 && UDP_HEADER_LEN + len == datagram.len();
    plain.then_some(len)
}

/// Whether the headers of two datagrams agree in all that a split copies: the ports.
pub(super) fn same_ports(a: &[u8], b: &[u8]) -> bool {
    same(a, b, 0, 4)
}

/// Makes a header that of a datagram of `len` bytes.
pub(super) fn set_len(header: &mut [u8], len: usize) -> Option<()> {
    put(header, 4, u16::try_from(len).ok()?)
}
