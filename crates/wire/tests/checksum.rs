//! Checksums against a slow reference that adds one 16-bit word after the other, and against numbers of others.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests fail by panicking")]

mod common;

use core::net::IpAddr;

use common::checks::slow_sum;
use proptest::collection::vec;
use proptest::prelude::*;
use wire::ip::{self, Sum, copy_and_sum, protocol};

/// The pseudo-header as bytes: RFC 9293 §3.1, RFC 8200 §8.1.
fn slow_pseudo(src: IpAddr, dst: IpAddr, protocol: u8, len: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            bytes.extend(src.octets());
            bytes.extend(dst.octets());
            bytes.extend([0, protocol]);
            bytes.extend((len as u16).to_be_bytes());
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            bytes.extend(src.octets());
            bytes.extend(dst.octets());
            bytes.extend((len as u32).to_be_bytes());
            bytes.extend([0, 0, 0, protocol]);
        }
        _ => unreachable!(),
    }
    bytes
}

/// Bytes with runs of zeros and ones, where carries and the two zeros of the sum are.
fn bytes(most: usize) -> impl Strategy<Value = Vec<u8>> {
    let byte = prop_oneof![3 => any::<u8>(), 1 => Just(0xff), 1 => Just(0)];
    let long = |(piece, len): (Vec<u8>, usize)| piece.into_iter().cycle().take(len).collect();
    prop_oneof![
        vec(byte.clone(), 0..200),
        (vec(byte, 1..300), 0..most).prop_map(long),
        (vec(Just(0xff), 1..2), 0..most).prop_map(long),
        (vec(Just(0), 1..2), 0..200_usize).prop_map(long),
    ]
}

/// RFC 1071 §3: the worked example, by words and by bytes swapped.
#[test]
fn rfc_1071_numbers() {
    let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
    assert_eq!(Sum::of(&bytes).folded(), 0xddf2);
    assert_eq!(Sum::of(&bytes).finish(), 0x220d);
    assert_eq!(ip::checksum(&[0x01, 0x00, 0x03, 0xf2, 0xf5, 0xf4, 0xf7, 0xf6]), !0xf2dd);
    // §2 (A): in any order and grouping, at even offsets.
    let (a, b) = bytes.split_at(2);
    assert_eq!(Sum::of(b).add(Sum::of(a)).folded(), 0xddf2);
    assert_eq!(Sum::of(a).add(Sum::of(b)).folded(), 0xddf2);
    assert_eq!(Sum::of(b).add_u16(0x0001).folded(), 0xddf2);
}

/// An IPv4 header (UDP, 192.168.0.1 to 192.168.0.199) whose checksum tshark calls good.
#[test]
fn a_header_that_tshark_calls_good() {
    let header = common::unhex("45000073000040004011b861c0a80001c0a800c7");
    assert_eq!(ip::checksum(&header), 0);
    assert_eq!(ip::ipv4_header_checksum(&header), Some(0xb861));
}

/// Both zeros: nothing but zeros sums to +0, everything else that is 0 modulo 0xffff to -0.
#[test]
fn the_two_zeros() {
    assert_eq!((Sum::ZERO.folded(), Sum::ZERO.finish()), (0, 0xffff));
    assert_eq!(Sum::of(&[0; 100]).folded(), 0);
    assert_eq!(Sum::of(&[0xff; 100]).folded(), 0xffff);
    assert_eq!(Sum::of(&[0xff; 100]).add(Sum::ZERO).finish(), 0);
    assert_eq!(Sum::of(&[0x12, 0x34]).add_u16(!0x1234).folded(), 0xffff);
}

proptest! {
    #[test]
    fn any_length_and_alignment(bytes in bytes(70_000), skip in 0_usize..9) {
        let bytes = bytes.get(skip..).unwrap_or_default();
        prop_assert_eq!(Sum::of(bytes).folded(), slow_sum(bytes));
        prop_assert_eq!(ip::checksum(bytes), !slow_sum(bytes));
    }

    #[test]
    fn a_copy_is_a_copy_and_its_sum(bytes in bytes(70_000), skip in 0_usize..9, to_skip in 0_usize..9) {
        let bytes = bytes.get(skip..).unwrap_or_default();
        let mut room = vec![0xa5; to_skip + bytes.len() + 9];
        let sum = copy_and_sum(&mut room[to_skip..to_skip + bytes.len()], bytes);
        prop_assert_eq!(sum.folded(), slow_sum(bytes));
        prop_assert_eq!(&room[to_skip..to_skip + bytes.len()], bytes);
        prop_assert!(room[..to_skip].iter().chain(&room[to_skip + bytes.len()..]).all(|b| *b == 0xa5));
    }

    #[test]
    fn pieces_at_even_offsets_add_up(bytes in bytes(3000), cuts in vec(0_usize..1500, 0..6), word: u16) {
        let mut cuts: Vec<usize> = cuts.into_iter().map(|at| (at * 2).min(bytes.len() & !1)).collect();
        cuts.sort_unstable();
        let (mut from, mut sum) = (0, Sum::ZERO.add_u16(word));
        for cut in cuts {
            sum = sum.add(Sum::of(&bytes[from..cut]));
            from = cut;
        }
        sum = Sum::of(&bytes[from..]).add(sum);
        let whole = [&word.to_be_bytes()[..], &bytes].concat();
        prop_assert_eq!(sum.folded(), slow_sum(&whole));
    }

    #[test]
    fn segments_with_their_pseudo_header(
        v4: Option<([u8; 4], [u8; 4])>,
        v6: ([u8; 16], [u8; 16]),
        tcp: bool,
        segment in vec(any::<u8>(), 20..2000),
        flip in any::<prop::sample::Index>(),
        mask in 1_u8..=255,
    ) {
        let (src, dst): (IpAddr, IpAddr) =
            v4.map_or((v6.0.into(), v6.1.into()), |(src, dst)| (src.into(), dst.into()));
        let (protocol, at) = if tcp { (protocol::TCP, 16) } else { (protocol::UDP, 6) };
        let mut segment = segment;
        segment[at..at + 2].fill(0);
        let pseudo = slow_pseudo(src, dst, protocol, segment.len());
        let partial = ip::partial_checksum(src, dst, protocol, segment.len()).unwrap();
        prop_assert_eq!(partial, slow_sum(&pseudo));
        let slow = !slow_sum(&[&pseudo[..], &segment].concat());
        let sum = ip::transport_checksum(src, dst, protocol, &segment).unwrap();
        prop_assert_eq!(sum, if slow == 0 && !tcp { 0xffff } else { slow });
        segment[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        prop_assert!(ip::transport_checksum_ok(src, dst, protocol, &segment));
        let at = flip.index(segment.len());
        segment[at] ^= mask;
        let still = slow_sum(&[&pseudo[..], &segment].concat()) == 0xffff;
        prop_assert_eq!(ip::transport_checksum_ok(src, dst, protocol, &segment), still);
        // One bit is never missed.
        prop_assert!(!still || !mask.is_power_of_two());
    }

    #[test]
    fn headers_of_ipv4(header in vec(any::<u8>(), 60), words in 5_u8..=15, rest in vec(any::<u8>(), 0..40)) {
        let mut packet = header[..usize::from(words) * 4].to_vec();
        packet[0] = 0x40 | words;
        let len = packet.len();
        packet.extend(&rest);
        // Whatever stands in the field.
        let sum = ip::ipv4_header_checksum(&packet).unwrap();
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
        prop_assert_eq!(slow_sum(&packet[..len]), 0xffff);
        prop_assert_eq!(ip::ipv4_header_checksum(&packet), Some(sum));
    }
}
