//! Known answers: RFC 7634's example packet, and packets exchanged with scapy,
//! each side opening what the other sealed.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests fail by panicking")]

mod common;

use common::*;
use crypto::Secret;
use crypto::aead::AeadAlg;
use esp::{Batch, Command, Reason, Sa, Shard, Verdict};
use wire::id::{EspSpi, Term};

/// A shard with one SA as the vectors want it.
fn shard(alg: AeadAlg, keymat: &str, spi_in: u32, spi_out: u32, next_seq: u64, term: u64) -> Shard {
    let keymat = Secret::new(unhex(keymat));
    let (left, _) = sas(alg, 0);
    let mut shard = owner(term);
    let sa = Sa {
        spi_in: EspSpi(spi_in),
        spi_out: EspSpi(spi_out),
        keymat_in: keymat.duplicate(),
        keymat_out: keymat,
        local_ts: vec![ts("10.1.0.0/16"), ts("fd01::/64"), ts("192.0.2.0/24")],
        remote_ts: vec![ts("10.2.0.0/16"), ts("fd02::/64"), ts("198.51.100.0/24")],
        next_seq,
        born: Term(term),
        ..left
    };
    install(&mut shard, &sa);
    shard
}

// RFC 7634 appendix A. The packet there is 198.51.100.5 → 192.0.2.5 in UDP-less
// ESP with SPI 0x01020304 and sequence number 5.
#[test]
fn rfc7634_appendix_a() {
    let keymat = "80 81 82 83 84 85 86 87 88 89 8a 8b 8c 8d 8e 8f
                  90 91 92 93 94 95 96 97 98 99 9a 9b 9c 9d 9e 9f a0 a1 a2 a3";
    let source = "45 00 00 54 a6 f2 00 00 40 01 e7 78 c6 33 64 05
                  c0 00 02 05 08 00 5b 7a 3a 08 00 00 55 3b ec 10
                  00 07 36 27 08 09 0a 0b 0c 0d 0e 0f 10 11 12 13
                  14 15 16 17 18 19 1a 1b 1c 1d 1e 1f 20 21 22 23
                  24 25 26 27 28 29 2a 2b 2c 2d 2e 2f 30 31 32 33
                  34 35 36 37";
    let esp = "01 02 03 04 00 00 00 05 10 11 12 13
               14 15 16 17 24 03 94 28 b9 7f 41 7e 3c 13 75 3a
               4f 05 08 7b 67 c3 52 e6 a7 fa b1 b9 82 d4 66 ef
               40 7a e5 c6 14 ee 80 99 d5 28 44 eb 61 aa 95 df
               ab 4c 02 f7 2a a7 1e 7c 4c 4f 64 c9 be fe 2f ac
               c6 38 e8 f3 cb ec 16 3f ac 46 9b 50 27 73 f6 fb
               94 e6 64 da 91 65 b8 28 29 f6 41 e0 76 aa a8 26
               6b 7f b0 f7 b1 1b 36 99 07 e1 ad 43";
    let mut shard = shard(AeadAlg::ChaCha20Poly1305, keymat, 0x0102_0304, 1, 1, 2);
    let esp = unhex(esp);
    assert_eq!(hex(&opened(&mut shard, ms(1), &esp)), hex(&unhex(source)));
    assert_eq!(open(&mut shard, ms(1), &esp).0, Verdict::Drop(Reason::Replayed));
}

const KEY_128: &str = "000102030405060708090a0b0c0d0e0f a1a2a3a4";
const KEY_256: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f a1a2a3a4";

// Sealed by scapy 2.5.0 (Debian python3-scapy), with n = 16 or 32:
//   inner4 = IP(src='10.2.0.5', dst='10.1.0.9', ttl=63, id=7)/UDP(sport=4000, dport=5000)
//            /Raw(b'ping from scapy')
//   inner6 = IPv6(src='fd02::5', dst='fd01::9', hlim=63)/UDP(sport=4000, dport=5000)
//            /Raw(b'ping from scapy, v6')
//   sa = SecurityAssociation(ESP, spi=SPI, crypt_algo='AES-GCM' or 'CHACHA20-POLY1305',
//       crypt_key=bytes(range(n)) + bytes.fromhex('a1a2a3a4'),
//       tunnel_header=IP(src='198.51.100.7', dst='203.0.113.10'),
//       nat_t_header=UDP(sport=4500, dport=4500))
//   raw(sa.encrypt(inner, seq_num=77, iv=bytes.fromhex('0102030405060708'))[ESP]).hex()
#[test]
fn opens_what_scapy_sealed() {
    let inner4 = "4500002b000700003f1167ab0a0200050a0100090fa0138800179bec
                  70696e672066726f6d207363617079";
    let inner6 = "60000000001b113ffd020000000000000000000000000005
                  fd0100000000000000000000000000090fa01388001b5f40
                  70696e672066726f6d2073636170792c207636";
    let cases = [
        (
            AeadAlg::Aes128Gcm16,
            KEY_128,
            inner4,
            "001000000000004d010203040506070859c51b8cd4a8fc1feb59d6d0d87fa19c1547ec011158b45f
             9e5e784828e48db116fc4fab5afeb82038a198b676a8940eb68f1b52202b7faa2c9605328f19272c",
        ),
        (
            AeadAlg::Aes256Gcm16,
            KEY_256,
            inner6,
            "001000010000004d0102030405060708069289b027b2094f6787c3273b0bb7e9b52ad6b2ba4d227c
             f9d7aa94e7fb5e63f2055659b80514a21260543b554754ec51c52313869cd68a11a19996c821a1f1
             d8d72e1da2713f8098d87cbc41752ee7d7d3997b3794f161",
        ),
        (
            AeadAlg::ChaCha20Poly1305,
            KEY_256,
            inner4,
            "001000020000004d0102030405060708852c95551a8ded9c52ec7929079ca36c52c4dcef08979e2b
             a7a30e452e302cb7e12a86ff9dcaf273d4a0c377bc313e1ca869ecd6e6209f1acab15ff21b6ca576",
        ),
    ];
    for (at, (alg, keymat, inner, esp)) in cases.into_iter().enumerate() {
        let mut shard = shard(alg, keymat, 0x0010_0000 + at as u32, 1, 1, 2);
        let got = opened(&mut shard, ms(1), &unhex(esp));
        assert_eq!(hex(&got), hex(&unhex(inner)), "{alg:?}");
    }
}

// What scapy 2.5.0 opened, with the SA as above but spi=0xc0ffee01 and the
// outer header that a receiver would see in front:
//   outer = IP(src='198.51.100.7', dst='203.0.113.10')/UDP(sport=4500, dport=4500)
//   raw(sa.decrypt(IP(raw(outer/bytes.fromhex(SEALED)))))
// gave the inner packet, byte by byte, for all three.
#[test]
fn seals_what_scapy_opened() {
    let inner4 = "4500002b000700003f1167ab0a0100090a0200050fa0138800179bec
                  70696e672066726f6d207363617079";
    let inner6 = "60000000001b113ffd010000000000000000000000000009
                  fd0200000000000000000000000000050fa01388001b5f40
                  70696e672066726f6d2073636170792c207636";
    let cases = [
        (AeadAlg::Aes128Gcm16, KEY_128, inner4, SEALED[0]),
        (AeadAlg::Aes256Gcm16, KEY_256, inner6, SEALED[1]),
        (AeadAlg::ChaCha20Poly1305, KEY_256, inner4, SEALED[2]),
    ];
    for (alg, keymat, inner, esp) in cases {
        let mut shard = shard(alg, keymat, 0x0010_0000, 0xc0ff_ee01, 0x0001_0203, 0x1234_5678);
        assert_eq!(hex(&sealed(&mut shard, ms(1), &unhex(inner))), hex(&unhex(esp)), "{alg:?}");
    }
}

const SEALED: [&str; 3] = [
    "c0ffee01000102035678000000000000f5137e97f0db9dd28882c022a034aca7c64d6440a9e66f82
     bc10fe80a537f94628acadc1ef75217974d404e1bcc1fb5867630b87636b3eb1afa2ff1bb60d24de",
    "c0ffee010001020356780000000000007ab9404859c6e06c01454e0868f5ac319088f3835846cc5a
     97feae193c32a22dccf7a50a316c6737da617e3ed3da2c4a44c68936c98f18621c13d9457dddfba6
     2693ecd5ab3e3607fe1a7aef44b0d700ec0d9bf1666bffdf",
    "c0ffee010001020356780000000000003f6fba02b27a9efb12b8f963e98faefad26cfa37652fdab7
     6ef00fbbca09c1760006bdec065b0deaf3cabe677a6ae018f0758213f822a4df00664b0e63fd1f15",
];

// RFC 4303 §2.6, §2.7: dummy packets are dropped in silence; padding for
// traffic flow confidentiality is taken off by the inner header's length.
#[test]
fn dummy_packets_and_tfc_padding() {
    let key = crypto::aead::AeadKey::new(AeadAlg::Aes128Gcm16, &unhex(KEY_128)).unwrap();
    let esp = |seq: u32, plain: &[u8]| {
        let header = wire::esp::Header { spi: EspSpi(0x0010_0000), seq }.to_bytes();
        let mut body = plain.to_vec();
        let iv = [9; 8];
        let tag = key.seal_in_place(iv, &header, &mut body).unwrap();
        [&header[..], &iv, &body, &tag].concat()
    };
    let inner = udp("10.2.0.5:4000", "10.1.0.9:5000", b"abcd");
    let with = |tail: &[u8]| [inner.as_slice(), tail].concat();
    let good = [vec![0; 28], vec![1, 2, 2, 4]].concat();
    let cases: [(Vec<u8>, Verdict); 9] = [
        (with(&[1, 2, 2, 4]), Verdict::Deliver { endpoint: MAIN }),
        (with(&good), Verdict::Deliver { endpoint: MAIN }),
        (with(&[1, 2, 2, 59]), Verdict::Drop(Reason::Dummy)),
        (vec![0xff; 30].into_iter().chain([0, 59]).collect(), Verdict::Drop(Reason::Dummy)),
        (with(&[1, 2, 2, 6]), Verdict::Drop(Reason::NextHeader)),
        (with(&[1, 2, 2, 41]), Verdict::Drop(Reason::BadInner)),
        (with(&[1, 3, 2, 4]), Verdict::Drop(Reason::BadPadding)),
        (with(&[1, 2, 200, 4]), Verdict::Drop(Reason::BadPadding)),
        (inner[..inner.len() - 4].iter().copied().chain([1, 2, 2, 4]).collect(), {
            Verdict::Drop(Reason::BadInner)
        }),
    ];
    let mut shard = shard(AeadAlg::Aes128Gcm16, KEY_128, 0x0010_0000, 1, 1, 2);
    for (seq, (plain, want)) in (1..).zip(cases) {
        let (verdict, packet) = open(&mut shard, ms(1), &esp(seq, &plain));
        assert_eq!(verdict, want, "packet {seq}");
        if want == (Verdict::Deliver { endpoint: MAIN }) {
            assert_eq!(hex(&packet), hex(&inner));
        }
        // Its tag was right, so it counts as seen, whatever was inside.
        let again = open(&mut shard, ms(1), &esp(seq, &plain)).0;
        assert_eq!(again, Verdict::Drop(Reason::Replayed), "packet {seq}");
    }
}

// RFC 6040 §4.2: the outer mark arrives inside, checksum and all.
#[test]
fn congestion_marks_cross_the_tunnel() {
    let (mut left, mut right, ..) = pair(AeadAlg::Aes256Gcm16);
    for (inner_ecn, outer_ecn, want) in [
        (0b10, wire::ip::Ecn::Ce, Some(0b11)),
        (0b10, wire::ip::Ecn::NotEct, Some(0b10)),
        (0b00, wire::ip::Ecn::Ect0, Some(0b00)),
        (0b00, wire::ip::Ecn::Ce, None),
    ] {
        for mut inner in [numbered(1), udp("[fd01::1]:1", "[fd02::2]:2", b"six")] {
            wire::ip::set_traffic_class(&mut inner, 0xb8 | inner_ecn);
            let mut batch = batch_of(&[&inner]);
            left.outbound(ms(1), OPEN, &mut batch);
            let slot = &batch.slots()[0];
            // RFC 6040 §4.1, RFC 4301 §5.1.2.1: copied to the outer header.
            assert_eq!(slot.outer_traffic_class(), 0xb8 | inner_ecn);
            let mut there = batch_of(&[slot.packet()]);
            there.slots_mut()[0].ecn = outer_ecn;
            right.inbound(ms(1), OPEN, &mut there);
            let slot = &there.slots()[0];
            let Some(ecn) = want else {
                assert_eq!(slot.verdict(), Verdict::Drop(Reason::Congestion));
                continue;
            };
            assert_eq!(slot.verdict(), Verdict::Deliver { endpoint: MAIN });
            wire::ip::set_traffic_class(&mut inner, 0xb8 | ecn);
            assert_eq!(hex(slot.packet()), hex(&inner));
            if inner[0] >> 4 == 4 {
                assert_eq!(wire::ip::checksum(&inner[..20]), 0);
            }
        }
    }
}

// RFC 4301 §5.2: what comes out of an SA must be what the SA is for.
#[test]
fn what_the_selectors_do_not_cover_is_dropped() {
    let (left_sa, right_sa) = sas(AeadAlg::Aes256Gcm16, 0);
    let (mut left, mut right) = (owner(2), owner(2));
    // A peer that seals more than was agreed.
    install(
        &mut left,
        &Sa {
            local_ts: vec![ts("0.0.0.0/0"), ts("::/0")],
            remote_ts: vec![ts("0.0.0.0/0"), ts("::/0")],
            ..left_sa
        },
    );
    install(&mut right, &right_sa);
    let good = ("10.1.0.1:1", "10.2.0.1:1");
    for (from, to, want) in [
        (good.0, good.1, true),
        ("10.3.0.1:1", good.1, false),
        (good.0, "10.3.0.1:1", false),
        (good.1, good.0, false),
        ("[fd01::1]:1", "[fd02::2]:1", true),
        ("[fd01:1::1]:1", "[fd02::2]:1", false),
        ("[fd01::1]:1", "[fd02:1::2]:1", false),
    ] {
        let esp = sealed(&mut left, ms(1), &udp(from, to, b"x"));
        let verdict = open(&mut right, ms(1), &esp).0;
        let deliver = Verdict::Deliver { endpoint: MAIN };
        assert_eq!(verdict, if want { deliver } else { Verdict::Drop(Reason::Selectors) });
    }
}

// security.md, statement 1: no datagram does anything but be counted and
// dropped; nor does one that was cut, lengthened or changed on the way.
#[test]
fn bad_datagrams_change_nothing() {
    let (mut left, mut right, ..) = pair(AeadAlg::Aes256Gcm16);
    let esp = sealed(&mut left, ms(1), &numbered(1));
    let mut batch = Batch::new(1, 2048);
    let mut try_one = |right: &mut Shard, packet: &[u8]| {
        batch.clear();
        assert!(batch.push().unwrap().fill(packet));
        right.inbound(ms(1), OPEN, &mut batch);
        batch.slots()[0].verdict()
    };
    for len in 0..esp.len() {
        assert!(matches!(try_one(&mut right, &esp[..len]), Verdict::Drop(_)), "{len}");
    }
    for tail in 1..20 {
        let long = [esp.as_slice(), &vec![0; tail]].concat();
        assert!(matches!(try_one(&mut right, &long), Verdict::Drop(_)), "{tail}");
    }
    for bit in 0..esp.len() * 8 {
        let mut bad = esp.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        assert!(matches!(try_one(&mut right, &bad), Verdict::Drop(_)), "{bit}");
    }
    let count = esp.len() + 19 + esp.len() * 8;
    assert_eq!(right.stats().dropped_in_all(), count as u64);
    // The window did not move: the true one still comes through, once.
    assert_eq!(try_one(&mut right, &esp), Verdict::Deliver { endpoint: MAIN });
    assert_eq!(try_one(&mut right, &esp), Verdict::Drop(Reason::Replayed));
}

#[test]
fn an_unknown_generation_of_a_slot_is_unknown() {
    let (mut left, mut right, _, right_sa) = pair(AeadAlg::Aes256Gcm16);
    let mut esp = sealed(&mut left, ms(1), &numbered(1));
    let next = wire::id::SpiLayout::of(right_sa.spi_in).unwrap().next_generation().spi();
    esp[..4].copy_from_slice(&next.to_bytes());
    assert_eq!(open(&mut right, ms(1), &esp).0, Verdict::Drop(Reason::UnknownSpi));
    let taken = Command::Install(Box::new(Sa { spi_in: next, ..copy(&right_sa) }));
    assert_eq!(
        right.apply(taken),
        Err(esp::CommandError::SlotTaken(next, right_sa.spi_in)),
        "a slot is not reused before its SA is removed"
    );
}

#[test]
fn a_shadow_gives_the_slot_of_another_endpoints_past_to_what_its_owner_chose_anew() {
    let config = esp::Config { endpoints: 2, ..esp::Config::default() };
    let (_, _, _, sa) = pair(AeadAlg::Aes256Gcm16);
    let next = wire::id::SpiLayout::of(sa.spi_in).unwrap().next_generation().spi();
    let of = |spi_in, endpoint| {
        let endpoint = wire::id::EndpointId(endpoint);
        Command::Install(Box::new(Sa { spi_in, endpoint, ..copy(&sa) }))
    };
    let mut shadow = Shard::new(config);
    shadow.apply(of(sa.spi_in, 1)).unwrap();
    shadow.apply(of(next, 0)).unwrap();
    // The other endpoint's records say so a moment later.
    let gone = shadow.apply(Command::Remove { spi_in: sa.spi_in });
    assert_eq!(gone, Err(esp::CommandError::UnknownSa(sa.spi_in)));
    // What is owned here lives.
    let endpoint = wire::id::EndpointId(0);
    let own = Command::Own { endpoint, term: Term(9), seq_jump: 0, obey_leases: false };
    shadow.apply(own).unwrap();
    let taken = shadow.apply(of(sa.spi_in, 1));
    assert_eq!(taken, Err(esp::CommandError::SlotTaken(sa.spi_in, next)));
}
