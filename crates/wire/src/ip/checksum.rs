//! The Internet checksum (RFC 1071), whole and incremental (RFC 1624).

use core::net::IpAddr;

use super::protocol;

/// One's-complement sum of big-endian 16-bit words, folded; an odd last byte is padded with zero.
fn sum(bytes: &[u8]) -> u64 {
    // Wider words in the host's own order are summed first: the one's-complement sum depends neither on
    // the word size nor, but for a swap at the end, on the byte order (RFC 1071 §2 (B), (C)).
    // 64 bits hold the sum of any slice that fits in memory.
    let (words, rest) = bytes.as_chunks::<4>();
    let wide: u64 = words.iter().map(|w| u64::from(u32::from_ne_bytes(*w))).sum();
    let mut last = [0u8; 4];
    for (to, from) in last.iter_mut().zip(rest) {
        *to = *from;
    }
    u64::from(u16::from_be(fold(wide + u64::from(u32::from_ne_bytes(last)))))
}

fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    // At most 16 bits are left.
    sum as u16
}

/// The checksum of some bytes: the complement of their one's-complement sum. Over bytes that contain
/// their own correct checksum it is 0.
#[must_use]
pub fn checksum(bytes: &[u8]) -> u16 {
    !fold(sum(bytes))
}

/// The checksum an IPv4 header should carry: over the header, options included, with the field itself
/// taken as zero. `None` if the bytes are shorter than the header says.
#[must_use]
pub fn ipv4_header_checksum(packet: &[u8]) -> Option<u16> {
    let header_len = usize::from(packet.first()? & 0xf) * 4;
    let header = packet.get(..header_len)?;
    let field: [u8; 2] = header.get(10..12)?.try_into().ok()?;
    // Subtracting in one's complement is adding the complement.
    Some(!fold(sum(header) + u64::from(!u16::from_be_bytes(field))))
}

/// The checksum a TCP, UDP or ICMP segment should carry, pseudo-header included (RFC 9293 §3.1, RFC 8200
/// §8.1), when its own field is zero. For UDP, 0 becomes 0xffff (RFC 768). ICMP for IPv4 has no
/// pseudo-header. `None` on mixed address families or a segment beyond 32 bits of length.
#[must_use]
pub fn transport_checksum(src: IpAddr, dst: IpAddr, protocol: u8, segment: &[u8]) -> Option<u16> {
    let total = pseudo_header(src, dst, protocol, segment.len())? + sum(segment);
    match !fold(total) {
        0 if protocol == protocol::UDP => Some(0xffff),
        value => Some(value),
    }
}

/// Whether a segment carries its right checksum. The absent checksum of UDP over IPv4 is the caller's to
/// judge: such a segment is not right here.
#[must_use]
pub fn transport_checksum_ok(src: IpAddr, dst: IpAddr, protocol: u8, segment: &[u8]) -> bool {
    pseudo_header(src, dst, protocol, segment.len())
        .is_some_and(|pseudo| fold(pseudo + sum(segment)) == 0xffff)
}

/// What the checksum field of a segment holds while somebody else is to complete it: the sum of the
/// pseudo-header, not complemented, for a segment of `len` bytes. `None` as for [`transport_checksum`].
#[must_use]
pub fn partial_checksum(src: IpAddr, dst: IpAddr, protocol: u8, len: usize) -> Option<u16> {
    pseudo_header(src, dst, protocol, len).map(fold)
}

fn pseudo_header(src: IpAddr, dst: IpAddr, protocol: u8, len: usize) -> Option<u64> {
    let len = u32::try_from(len).ok()?;
    let rest = u64::from(len) + u64::from(protocol);
    match (src, dst) {
        (IpAddr::V4(_), IpAddr::V4(_)) if protocol == protocol::ICMP => Some(0),
        (IpAddr::V4(a), IpAddr::V4(b)) => Some(sum(&a.octets()) + sum(&b.octets()) + rest),
        (IpAddr::V6(a), IpAddr::V6(b)) => Some(sum(&a.octets()) + sum(&b.octets()) + rest),
        _ => None,
    }
}

/// A one's-complement sum under way.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sum(u64);

impl Sum {
    /// Of some bytes; an odd last one is padded with zero.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Sum {
        Sum(sum(bytes))
    }

    /// Of both; what stands behind begins at an even place.
    #[must_use]
    #[expect(clippy::should_implement_trait, reason = "a chain of calls reads like the sum")]
    pub fn add(self, other: Sum) -> Sum {
        Sum(self.0 + other.0)
    }

    /// With one more word.
    #[must_use]
    pub fn add_u16(self, word: u16) -> Sum {
        Sum(self.0 + u64::from(word))
    }

    /// The checksum: its complement.
    #[must_use]
    pub fn finish(self) -> u16 {
        !fold(self.0)
    }
}

/// Copies as much as both hold, and sums it up.
pub fn copy_and_sum(to: &mut [u8], from: &[u8]) -> Sum {
    let n = to.len().min(from.len());
    let (to, from) = (to.get_mut(..n).unwrap_or_default(), from.get(..n).unwrap_or_default());
    to.copy_from_slice(from);
    Sum::of(to)
}

/// A checksum after one 16-bit word under it changed (RFC 1624 §3, equation 3).
pub(super) fn update(checksum: u16, before: u16, after: u16) -> u16 {
    !fold(u64::from(!checksum) + u64::from(!before) + u64::from(after))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 1071 §3: the worked example.
    #[test]
    fn rfc_1071_example() {
        assert_eq!(checksum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), !0xddf2);
    }

    #[test]
    fn word_size_does_not_matter() {
        let bytes: Vec<u8> = (0..=255u8).cycle().map(|b| b.wrapping_mul(37)).take(1501).collect();
        for len in 0..bytes.len() {
            let slow = bytes[..len].chunks(2).fold(0u32, |sum, w| {
                sum + u32::from(u16::from_be_bytes([w[0], w.get(1).copied().unwrap_or(0)]))
            });
            let slow = (slow >> 16) + (slow & 0xffff);
            let slow = (slow >> 16) + (slow & 0xffff);
            assert_eq!(checksum(&bytes[..len]), !(slow as u16), "{len}");
        }
    }

    /// RFC 1624 §4: the example whose answer equation 2 gets wrong.
    #[test]
    fn rfc_1624_example() {
        assert_eq!(update(0xdd2f, 0x5555, 0x3285), 0x0000);
    }

    #[test]
    fn udp_never_says_absent() {
        let addr: IpAddr = [0, 0, 0, 0].into();
        // Words 0xffee + 17 + 12 + ... chosen so that the sum folds to 0xffff.
        let mut segment = [0u8; 8];
        let value = 0xffff - 17 - 8;
        segment[..2].copy_from_slice(&u16::to_be_bytes(value));
        assert_eq!(transport_checksum(addr, addr, protocol::UDP, &segment), Some(0xffff));
        assert_eq!(transport_checksum(addr, addr, protocol::TCP, &segment), Some(17 - 6));
    }
}
