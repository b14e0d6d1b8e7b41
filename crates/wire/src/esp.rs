//! ESP packets (RFC 4303 §2) as AEADs with an 8-byte explicit IV and a 16-byte ICV lay them out
//! (RFC 4106, RFC 7634):
//!
//! ```text
//! SPI 4 ‖ sequence number 4 ‖ IV 8 ‖ payload ‖ padding 0..=3 ‖ pad length 1 ‖ next header 1 ‖ ICV 16
//! └──── additional data ───┘        └────────────────── encrypted ────────────────────────┘
//! ```

use crate::id::EspSpi;
use crate::read::Reader;

/// SPI and sequence number.
pub const HEADER_LEN: usize = 8;
/// Explicit IV of AES-GCM and ChaCha20-Poly1305.
pub const IV_LEN: usize = 8;
/// Pad length and next header.
pub const TRAILER_LEN: usize = 2;
/// Integrity check value at the end.
pub const ICV_LEN: usize = 16;
/// What surrounds the inner packet, without padding.
pub const OVERHEAD: usize = HEADER_LEN + IV_LEN + TRAILER_LEN + ICV_LEN;
/// Shortest packet that can hold anything: header, IV, one padded word with the trailer, ICV.
pub const MIN_LEN: usize = HEADER_LEN + IV_LEN + 4 + ICV_LEN;
/// Payload and trailer together end on a multiple of this (RFC 4303 §2.4; RFC 4106 §4 asks no more).
pub const ALIGN: usize = 4;

/// Next-header values that tunnel mode knows (RFC 4303 §2.6).
pub mod next_header {
    /// An IPv4 packet inside.
    pub const IPV4: u8 = 4;
    /// An IPv6 packet inside.
    pub const IPV6: u8 = 41;
    /// A dummy packet, dropped in silence (RFC 4303 §2.6).
    pub const DUMMY: u8 = 59;
}

/// The clear part of an ESP packet, which is also its additional authenticated data without ESN.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// The receiver's name for the SA.
    pub spi: EspSpi,
    /// Low 32 bits of the sequence number.
    pub seq: u32,
}

impl Header {
    /// Reads the first eight bytes; `None` if there are fewer.
    #[must_use]
    #[inline]
    pub fn parse(packet: &[u8]) -> Option<Header> {
        let mut r = Reader::new(packet);
        Some(Header { spi: EspSpi(r.u32()?), seq: r.u32()? })
    }

    /// The eight bytes as sent.
    #[must_use]
    #[inline]
    pub fn to_bytes(self) -> [u8; HEADER_LEN] {
        (u64::from(self.spi.0) << 32 | u64::from(self.seq)).to_be_bytes()
    }
}

/// A checked packet split at its seams; see the drawing at the top.
#[derive(Debug)]
pub struct Parts<'a> {
    /// SPI and sequence number.
    pub header: Header,
    /// The eight header bytes: additional authenticated data when ESN is off.
    pub aad: [u8; HEADER_LEN],
    /// The explicit IV.
    pub iv: [u8; IV_LEN],
    /// Ciphertext followed by the ICV, to be opened in place.
    pub body: &'a mut [u8],
}

/// Splits a received packet; `None` if it is shorter than [`MIN_LEN`] or not a multiple of four
/// (RFC 4303 §2.4: the ICV starts on a four-byte boundary).
#[must_use]
#[inline]
pub fn split(packet: &mut [u8]) -> Option<Parts<'_>> {
    if packet.len() < MIN_LEN || !packet.len().is_multiple_of(ALIGN) {
        return None;
    }
    let (aad, rest) = packet.split_first_chunk_mut::<HEADER_LEN>()?;
    let (iv, body) = rest.split_first_chunk_mut::<IV_LEN>()?;
    let aad = *aad;
    Some(Parts { header: Header::parse(&aad)?, aad, iv: *iv, body })
}

/// Bytes of padding before the pad-length byte, for an inner packet of this length: 0 to 3.
#[must_use]
#[inline]
pub fn padding_len(inner_len: usize) -> usize {
    (ALIGN - (inner_len + TRAILER_LEN) % ALIGN) % ALIGN
}

/// Length of the ESP packet that carries an inner packet of this length.
#[must_use]
#[inline]
pub fn sealed_len(inner_len: usize) -> usize {
    OVERHEAD + inner_len + padding_len(inner_len)
}

/// The longest inner packet whose ESP packet fits in `room` bytes; 0 if none does.
#[must_use]
pub fn max_inner_len(room: usize) -> usize {
    let aligned = room - room % ALIGN;
    aligned.saturating_sub(OVERHEAD)
}

/// Writes padding 1, 2, 3, …, pad length and next header (RFC 4303 §2.4) into the bytes that follow an
/// inner packet of `inner_len` bytes, and returns how many it wrote. `None` if `room` is too short.
#[must_use]
#[inline]
pub fn write_trailer(inner_len: usize, next_header: u8, room: &mut [u8]) -> Option<usize> {
    let padding = padding_len(inner_len);
    let room = room.get_mut(..padding + TRAILER_LEN)?;
    let (pad, trailer) = room.split_at_mut_checked(padding)?;
    for (value, byte) in (1..=u8::MAX).zip(pad) {
        *byte = value;
    }
    // padding_len is at most 3.
    trailer.copy_from_slice(&[padding as u8, next_header]);
    Some(padding + TRAILER_LEN)
}

/// Takes an opened plaintext apart: the length of the inner packet at its start, and the next header.
/// `None` if the pad length exceeds what is there, or the padding is not 1, 2, 3, … (RFC 4303 §2.4:
/// the receiver should check it). Traffic-flow-confidentiality padding stays in the inner length; the
/// inner IP header's own length removes it (RFC 4303 §2.7).
#[must_use]
#[inline]
pub fn read_trailer(plaintext: &[u8]) -> Option<(usize, u8)> {
    let (rest, &[pad_len, next_header]) = plaintext.split_last_chunk::<TRAILER_LEN>()?;
    let inner_len = rest.len().checked_sub(usize::from(pad_len))?;
    let padding = rest.get(inner_len..)?;
    let as_counted = padding.iter().zip(1..=u8::MAX).all(|(&byte, value)| byte == value);
    as_counted.then_some((inner_len, next_header))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_round_trips() {
        let bytes = [0x43, 0x45, 0x7e, 0x46, 0, 0, 0, 9, 1];
        let header = Header::parse(&bytes).unwrap();
        assert_eq!(header, Header { spi: EspSpi(0x4345_7e46), seq: 9 });
        assert_eq!(header.to_bytes(), bytes[..8]);
        assert_eq!(Header::parse(&bytes[..7]), None);
    }

    #[test]
    fn every_length_is_padded_to_four_and_read_back() {
        for inner_len in 0..300 {
            let mut plain = vec![0xaa; inner_len + 8];
            let wrote =
                write_trailer(inner_len, next_header::IPV4, &mut plain[inner_len..]).unwrap();
            assert_eq!((inner_len + wrote) % ALIGN, 0);
            assert!(wrote < ALIGN + TRAILER_LEN);
            assert_eq!(sealed_len(inner_len), HEADER_LEN + IV_LEN + inner_len + wrote + ICV_LEN);
            assert_eq!(
                read_trailer(&plain[..inner_len + wrote]),
                Some((inner_len, next_header::IPV4))
            );
        }
    }

    #[test]
    fn max_inner_is_exact() {
        for room in 0..400 {
            let inner = max_inner_len(room);
            assert!(inner == 0 || sealed_len(inner) <= room, "{room}");
            assert!(sealed_len(inner + 1) > room, "{room}");
        }
    }

    #[test]
    fn lying_trailers_are_refused() {
        assert_eq!(read_trailer(&[]), None);
        assert_eq!(read_trailer(&[4]), None);
        assert_eq!(read_trailer(&[0, 4]), Some((0, 4)));
        assert_eq!(read_trailer(&[1, 4]), None);
        assert_eq!(read_trailer(&[1, 1, 4]), Some((0, 4)));
        assert_eq!(read_trailer(&[2, 1, 4]), None);
        let mut long: Vec<u8> = (1..=255).collect();
        long.extend([255, 41]);
        assert_eq!(read_trailer(&long), Some((0, 41)));
        assert_eq!(read_trailer(&long[1..]), None);
    }

    #[test]
    fn split_checks_length_and_alignment() {
        let mut packet: Vec<u8> = (0..40).collect();
        let parts = split(&mut packet).unwrap();
        assert_eq!(parts.header.spi, EspSpi(0x0001_0203));
        assert_eq!(parts.aad, [0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(parts.iv, [8, 9, 10, 11, 12, 13, 14, 15]);
        assert_eq!(parts.body.len(), 24);
        assert!(split(&mut packet[..39]).is_none());
        assert!(split(&mut packet[..36]).is_some());
        assert!(split(&mut packet[..32]).is_none());
    }

    #[test]
    fn short_room_for_the_trailer_is_an_error() {
        assert_eq!(write_trailer(1, 4, &mut [0; 2]), None);
        assert_eq!(write_trailer(1, 4, &mut [0; 3]), Some(3));
    }
}
