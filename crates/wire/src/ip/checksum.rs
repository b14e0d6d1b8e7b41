//! The Internet checksum (RFC 1071), whole and incremental (RFC 1624).

use core::net::IpAddr;

use super::protocol;

/// A one's-complement sum under way: of one piece of what a checksum covers, to be added to the sums of the
/// others. Every piece but the last must have an even length; an odd last byte counts as if a zero followed.
///
/// It is kept in the host's byte order and in 64 bits: the sum depends neither on the word size nor, but for a
/// swap at the end, on the byte order (RFC 1071 §2 (B), (C)).
#[derive(Clone, Copy, Debug, Default)]
pub struct Sum(u64);

/// Words of eight bytes that are summed side by side, so that the compiler uses vector registers. Of 2 to 16 this is the
/// fastest by far with SSE2, and faster than chains of additions with carry (`cargo bench -p esp --bench checksum`).
const LANES: usize = 8;

impl Sum {
    /// Of nothing.
    pub const ZERO: Sum = Sum(0);

    /// Of these bytes, at any alignment.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Sum {
        let (words, last) = bytes.as_chunks::<8>();
        let (rows, words) = words.as_chunks::<LANES>();
        let mut lanes = Lanes::default();
        for row in rows {
            lanes.take(row);
        }
        lanes.finish(words, last)
    }

    /// Of both.
    #[must_use]
    #[expect(clippy::should_implement_trait, reason = "a chain of calls reads like the sum")]
    pub fn add(self, other: Sum) -> Sum {
        let (sum, carry) = self.0.overflowing_add(other.0);
        // After a carry the sum is at most 2^64 - 2.
        Sum(sum + u64::from(carry))
    }

    /// With one more 16-bit word.
    #[must_use]
    pub fn add_u16(self, word: u16) -> Sum {
        self.add(Sum(u64::from(word.to_be())))
    }

    /// The sum in 16 bits, not complemented: what stands in a checksum field that somebody else completes.
    #[must_use]
    pub fn folded(self) -> u16 {
        u16::from_be(fold(self.0))
    }

    /// The checksum: the complement of the sum.
    #[must_use]
    pub fn finish(self) -> u16 {
        !self.folded()
    }
}

/// Copies as much as both hold, and sums it up. The sum is a pass of its own over what was just read: in safe code
/// that is no slower than one loop that does both, because the C library's copy uses wider registers.
pub fn copy_and_sum(to: &mut [u8], from: &[u8]) -> Sum {
    let n = to.len().min(from.len());
    let (to, from) = (to.get_mut(..n).unwrap_or_default(), from.get(..n).unwrap_or_default());
    to.copy_from_slice(from);
    // Not of `to`: what was just written cannot be read at once in words of another size.
    Sum::of(from)
}

/// Per lane the sum of all words modulo 2^64, and of their upper halves, which together give that of the lower
/// halves: two additions and a shift a word, and no carry to look after.
#[derive(Default)]
struct Lanes {
    all: [u64; LANES],
    upper: [u64; LANES],
}

impl Lanes {
    #[inline(always)]
    fn take(&mut self, row: &[[u8; 8]; LANES]) {
        for ((all, upper), word) in self.all.iter_mut().zip(&mut self.upper).zip(row) {
            let word = u64::from_ne_bytes(*word);
            *all = all.wrapping_add(word);
            *upper += word >> 32;
        }
    }

    /// With what is left after the last whole row.
    #[inline(always)]
    fn finish(self, words: &[[u8; 8]], rest: &[u8]) -> Sum {
        let (mut all, mut upper) = (0_u64, 0_u64);
        for (lane_all, lane_upper) in self.all.into_iter().zip(self.upper) {
            all = all.wrapping_add(lane_all);
            upper += lane_upper;
        }
        for word in words {
            let word = u64::from_ne_bytes(*word);
            all = all.wrapping_add(word);
            upper += word >> 32;
        }
        // Of less than 2^31 words (an IP packet has 2^13) neither sum of halves overflows, so the lower one is exact
        // in spite of the modulus.
        let mut sum = all.wrapping_sub(upper << 32) + upper;
        let (four, rest) = rest.as_chunks::<4>();
        let (two, rest) = rest.as_chunks::<2>();
        sum += four.iter().map(|word| u64::from(u32::from_ne_bytes(*word))).sum::<u64>();
        sum += two.iter().map(|word| u64::from(u16::from_ne_bytes(*word))).sum::<u64>();
        sum += rest.iter().map(|last| u64::from(u16::from_ne_bytes([*last, 0]))).sum::<u64>();
        Sum(sum)
    }
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
    Sum::of(bytes).finish()
}

/// The checksum an IPv4 header should carry: over the header, options included, with the field itself
/// taken as zero. `None` if the bytes are shorter than the header says.
#[must_use]
pub fn ipv4_header_checksum(packet: &[u8]) -> Option<u16> {
    let header_len = usize::from(packet.first()? & 0xf) * 4;
    let header = packet.get(..header_len)?;
    let field: [u8; 2] = header.get(10..12)?.try_into().ok()?;
    // Subtracting in one's complement is adding the complement.
    Some(Sum::of(header).add_u16(!u16::from_be_bytes(field)).finish())
}

/// The checksum a TCP, UDP or ICMP segment should carry, pseudo-header included (RFC 9293 §3.1, RFC 8200
/// §8.1), when its own field is zero. For UDP, 0 becomes 0xffff (RFC 768). ICMP for IPv4 has no
/// pseudo-header. `None` on mixed address families or a segment beyond 32 bits of length.
#[must_use]
pub fn transport_checksum(src: IpAddr, dst: IpAddr, protocol: u8, segment: &[u8]) -> Option<u16> {
    let total = pseudo_header(src, dst, protocol, segment.len())?.add(Sum::of(segment));
    match total.finish() {
        0 if protocol == protocol::UDP => Some(0xffff),
        value => Some(value),
    }
}

/// Whether a segment carries its right checksum. The absent checksum of UDP over IPv4 is the caller's to
/// judge: such a segment is not right here.
#[must_use]
pub fn transport_checksum_ok(src: IpAddr, dst: IpAddr, protocol: u8, segment: &[u8]) -> bool {
    pseudo_header(src, dst, protocol, segment.len())
        .is_some_and(|pseudo| pseudo.add(Sum::of(segment)).finish() == 0)
}

/// What the checksum field of a segment holds while somebody else is to complete it: the sum of the
/// pseudo-header, not complemented, for a segment of `len` bytes. `None` as for [`transport_checksum`].
#[must_use]
pub fn partial_checksum(src: IpAddr, dst: IpAddr, protocol: u8, len: usize) -> Option<u16> {
    pseudo_header(src, dst, protocol, len).map(Sum::folded)
}

fn pseudo_header(src: IpAddr, dst: IpAddr, protocol: u8, len: usize) -> Option<Sum> {
    let len = u32::try_from(len).ok()?;
    let rest = Sum::of(&len.to_be_bytes()).add_u16(u16::from(protocol));
    match (src, dst) {
        (IpAddr::V4(_), IpAddr::V4(_)) if protocol == protocol::ICMP => Some(Sum::ZERO),
        (IpAddr::V4(a), IpAddr::V4(b)) => {
            Some(rest.add(Sum::of(&a.octets())).add(Sum::of(&b.octets())))
        }
        (IpAddr::V6(a), IpAddr::V6(b)) => {
            Some(rest.add(Sum::of(&a.octets())).add(Sum::of(&b.octets())))
        }
        _ => None,
    }
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

    /// The carry comes round, and 0xffff times anything stays what it is.
    #[test]
    fn sums_never_overflow() {
        let most = Sum(u64::MAX);
        assert_eq!(most.add(Sum(1)).folded(), Sum(1).folded());
        assert_eq!(most.add(most).folded(), 0xffff);
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
