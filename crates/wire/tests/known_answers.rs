//! Messages and packets made by scapy (tests/data/vectors.py) mean here what they meant there, and the
//! same values written by us are the same bytes.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

mod common;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use common::vector;
use wire::id::{EspSpi, IkeSpi, MessageId};
use wire::ike::*;
use wire::ip::{self, Fragment as IpFragment, L4, Packet, Tcp, Udp};
use wire::ts::{AddrRange, Cidr, Ports, TrafficSelector};

const I: IkeSpi = IkeSpi(0x1122_3344_5566_7788);
const R: IkeSpi = IkeSpi(0x99aa_bbcc_ddee_ff00);

fn header(
    responder_spi: IkeSpi,
    exchange: ExchangeType,
    from_initiator: bool,
    response: bool,
    id: u32,
) -> Header {
    Header {
        initiator_spi: I,
        responder_spi,
        exchange,
        from_initiator,
        response,
        message_id: MessageId(id),
    }
}

/// Reads the vector, compares it with what it must mean, and writes that again.
fn same_both_ways(name: &str, header: Header, payloads: &[Payload<'_>]) {
    let bytes = vector(name);
    let message = Message::parse(&bytes).unwrap();
    assert_eq!(message.header, header, "{name}");
    assert_eq!(message.payloads.iter().cloned().collect::<Vec<_>>(), payloads, "{name}");
    assert_eq!(message.sealed, None, "{name}");
    assert_eq!(message.payloads.doubled(), None, "{name}");

    let mut builder = MessageBuilder::clear(&header);
    payloads.iter().for_each(|p| {
        builder.push(p);
    });
    assert_eq!(builder.finish().unwrap(), bytes, "{name}");
}

#[test]
fn ike_sa_init_request() {
    let proposals = vec![
        Proposal {
            number: 1,
            protocol: ProtocolId::IKE,
            spi: Spi::None,
            transforms: vec![
                Transform::encr(EncrId::AES_GCM_16, Some(256)),
                Transform::prf(PrfId::HMAC_SHA2_384),
                Transform::ke(GroupId::X25519),
                Transform::ke(GroupId::P256),
            ],
        },
        Proposal {
            number: 2,
            protocol: ProtocolId::IKE,
            spi: Spi::None,
            transforms: vec![
                Transform::encr(EncrId::CHACHA20_POLY1305, None),
                Transform::prf(PrfId::HMAC_SHA2_256),
                Transform::prf(PrfId::HMAC_SHA2_512),
                Transform::ke(GroupId::P384),
            ],
        },
    ];
    assert_eq!(proposals[0].groups().collect::<Vec<_>>(), [GroupId::X25519, GroupId::P256]);
    let public: Vec<u8> = (0..32).collect();
    let nonce: Vec<u8> = (100..132).collect();
    same_both_ways(
        "ike_sa_init_request",
        header(IkeSpi::ZERO, ExchangeType::IKE_SA_INIT, true, false, 0),
        &[
            Payload::Sa(proposals),
            Payload::Ke(KeyExchange { group: GroupId::X25519, data: &public }),
            Payload::Nonce(&nonce),
            Payload::Notify(Notify::new(NotifyType::NAT_DETECTION_SOURCE_IP, &[0xa1; 20])),
            Payload::Notify(Notify::new(NotifyType::NAT_DETECTION_DESTINATION_IP, &[0xa2; 20])),
            Payload::Notify(Notify::new(
                NotifyType::SIGNATURE_HASH_ALGORITHMS,
                &[0, 2, 0, 3, 0, 4, 0, 5],
            )),
            Payload::VendorId(b"tandem test"),
        ],
    );
}

#[test]
fn invalid_ke_response() {
    same_both_ways(
        "ike_sa_init_invalid_ke",
        header(IkeSpi::ZERO, ExchangeType::IKE_SA_INIT, false, true, 0),
        &[Payload::Notify(Notify::new(NotifyType::INVALID_KE_PAYLOAD, &[0, 20]))],
    );
    let bytes = vector("ike_sa_init_invalid_ke");
    let message = Message::parse(&bytes).unwrap();
    assert_eq!(message.payloads.error().map(|n| n.kind), Some(NotifyType::INVALID_KE_PAYLOAD));
    let request = header(IkeSpi::ZERO, ExchangeType::IKE_SA_INIT, true, false, 0);
    assert_eq!(message.header, request.to_response());
}

fn v4(first: [u8; 4], last: [u8; 4]) -> AddrRange {
    AddrRange::new(first.into(), last.into()).unwrap()
}

#[test]
fn ike_auth_opened() {
    let local: Cidr = "10.1.0.0/24".parse().unwrap();
    let remote: Cidr = "fd00::/64".parse().unwrap();
    let id_i: Identity = "branch.example".parse().unwrap();
    let id_r: Identity = "203.0.113.10".parse().unwrap();
    same_both_ways(
        "ike_auth_opened",
        header(R, ExchangeType::IKE_AUTH, true, false, 1),
        &[
            Payload::IdI(id_i.payload()),
            Payload::Cert(Certificate {
                encoding: CertEncoding::X509_SIGNATURE,
                data: &[0x30, 3, 2, 1, 1],
            }),
            Payload::CertReq(Certificate {
                encoding: CertEncoding::X509_SIGNATURE,
                data: &[0xcc; 20],
            }),
            Payload::IdR(id_r.payload()),
            Payload::Auth(Auth { method: AuthMethod::SHARED_KEY, data: &[0xbb; 48] }),
            Payload::Cp(Configuration {
                kind: CfgType::REQUEST,
                attributes: vec![
                    CfgAttribute { kind: CfgAttributeType::INTERNAL_IP4_ADDRESS, value: &[] },
                    CfgAttribute {
                        kind: CfgAttributeType::INTERNAL_IP4_DNS,
                        value: &[10, 1, 0, 53],
                    },
                ],
            }),
            Payload::Sa(vec![Proposal {
                number: 1,
                protocol: ProtocolId::ESP,
                spi: Spi::Esp(EspSpi(0xc0ff_ee01)),
                transforms: vec![
                    Transform::encr(EncrId::AES_GCM_16, Some(256)),
                    Transform::esn(EsnId::OFF),
                ],
            }]),
            Payload::TsI(vec![
                local.into(),
                TrafficSelector::new(v4([10, 1, 1, 7], [10, 1, 1, 9]), 6, Ports::Range(80, 443))
                    .unwrap(),
            ]),
            Payload::TsR(vec![
                remote.into(),
                TrafficSelector::new(AddrRange::ALL_V4, 17, Ports::Opaque).unwrap(),
            ]),
            Payload::Notify(Notify::new(NotifyType::IKEV2_MESSAGE_ID_SYNC_SUPPORTED, &[])),
            Payload::Notify(Notify::new(NotifyType::INITIAL_CONTACT, &[])),
        ],
    );
    let bytes = vector("ike_auth_opened");
    let message = Message::parse(&bytes).unwrap();
    let p = &message.payloads;
    assert_eq!(p.id_i().unwrap().identity(), id_i);
    assert_eq!(p.id_r().unwrap().identity(), id_r);
    // What AUTH covers is the body as it was on the wire (RFC 7296 §2.15): at 32, 18 bytes long.
    assert_eq!(p.id_i().unwrap().body(), bytes[32..50]);
    assert_eq!(p.ts_i().unwrap().len(), 2);
    assert_eq!(p.ts_r().unwrap()[1].to_string(), "0.0.0.0/0[17/OPAQUE]");
    assert_eq!(p.cp().unwrap().kind, CfgType::REQUEST);
    assert_eq!(p.auth().unwrap().method, AuthMethod::SHARED_KEY);
    assert_eq!(p.certs().count(), 1);
    assert!(p.notify(NotifyType::INITIAL_CONTACT).is_some());
    assert_eq!(p.error(), None);
}

#[test]
fn rekeys_carry_spis() {
    same_both_ways(
        "ike_rekey_child_opened",
        header(R, ExchangeType::CREATE_CHILD_SA, true, true, 7),
        &[
            Payload::Notify(Notify::about(NotifyType::REKEY_SA, EspSpi(0xc0ff_ee01), &[])),
            Payload::Sa(vec![Proposal {
                number: 1,
                protocol: ProtocolId::IKE,
                spi: Spi::Ike(IkeSpi(0x0102_0304_0506_0708)),
                transforms: vec![
                    Transform::encr(EncrId::AES_GCM_16, Some(128)),
                    Transform::prf(PrfId::HMAC_SHA2_256),
                    Transform::ke(GroupId::P256),
                ],
            }]),
            Payload::Nonce(&[0x5a; 16]),
        ],
    );
}

#[test]
fn deletes() {
    same_both_ways(
        "ike_delete_opened",
        header(R, ExchangeType::INFORMATIONAL, false, false, 2),
        &[Payload::Delete(Delete::Esp(vec![EspSpi(0xc0ff_ee01), EspSpi(0xc0ff_ee02)]))],
    );
}

#[test]
fn sealed_message_has_its_seams_in_the_right_places() {
    let mut bytes = vector("ike_sealed");
    let message = Message::parse(&bytes).unwrap();
    assert_eq!(message.header, header(R, ExchangeType::INFORMATIONAL, true, false, 3));
    assert!(message.payloads.is_empty());
    let sealed = message.sealed.unwrap();
    assert_eq!((sealed.first, sealed.fragment), (PayloadType::DELETE, None));
    // RFC 5282 §5.1: from the first byte of the header to the last of the SK generic header.
    assert_eq!(sealed.aad(), 0..32);
    assert_eq!(sealed.iv(), 32..40);
    assert_eq!(sealed.body(), 40..65);
    let whole = bytes.clone();
    let parts = sealed.split(&mut bytes).unwrap();
    assert_eq!(parts.aad, &whole[..32]);
    assert_eq!(parts.iv, [0, 1, 2, 3, 4, 5, 6, 7]);
    assert_eq!(parts.body, [[0xee; 9].as_slice(), &[0xdd; 16]].concat());
}

#[test]
fn fragment_has_its_seams_in_the_right_places() {
    let bytes = vector("ike_fragment");
    let sealed = Message::parse(&bytes).unwrap().sealed.unwrap();
    assert_eq!(
        (sealed.first, sealed.fragment),
        (PayloadType::IDI, Some(Fragment { number: 1, total: 3 }))
    );
    // RFC 7383 §2.5.3: the fragment fields are authenticated too.
    assert_eq!((sealed.aad(), sealed.iv(), sealed.body()), (0..36, 36..44, 44..90));
}

#[test]
fn udp_over_both_families() {
    let cases = [("ip_udp4", "10.1.0.2", "10.2.0.3"), ("ip_udp6", "fd00::2", "fd01::3")];
    for (name, src, dst) in cases {
        let bytes = vector(name);
        let (src, dst): (IpAddr, IpAddr) = (src.parse().unwrap(), dst.parse().unwrap());
        let packet = Packet::parse(&bytes).unwrap();
        assert_eq!((packet.src, packet.dst, packet.protocol), (src, dst, 17));
        assert_eq!(packet.l4, L4::Ports { src: 4500, dst: 53 });
        assert_eq!(packet.flow().ports, (4500, 53));
        assert_eq!((packet.total_len, packet.hop_limit), (bytes.len(), 64));
        let segment = &bytes[packet.l4_offset..];
        let udp = Udp::parse(segment).unwrap();
        assert_eq!((udp.src, udp.dst, udp.payload), (4500, 53, b"abc".as_slice()));
        assert!(ip::transport_checksum_ok(src, dst, 17, segment));
        let made =
            ip::udp_packet(SocketAddr::new(src, 4500), SocketAddr::new(dst, 53), b"abc").unwrap();
        assert_eq!(made, bytes, "{name}");
    }
}

#[test]
fn tcp_behind_ipv4_options() {
    let bytes = vector("ip_tcp4_options");
    let packet = Packet::parse(&bytes).unwrap();
    assert_eq!((packet.protocol, packet.l4_offset, packet.traffic_class), (6, 24, 0xb9));
    assert_eq!((ip::dscp(0xb9), ip::Ecn::of(0xb9)), (46, ip::Ecn::Ect1));
    assert_eq!(packet.l4, L4::Ports { src: 1025, dst: 443 });
    let tcp = Tcp::parse(&bytes[24..]).unwrap();
    assert_eq!((tcp.seq, tcp.ack, tcp.flags, tcp.window), (7, 9, Tcp::PSH | Tcp::ACK, 1234));
    assert_eq!((tcp.options, tcp.payload), ([2, 4, 5, 0x78].as_slice(), b"hello".as_slice()));
    assert!(ip::transport_checksum_ok(packet.src, packet.dst, 6, &bytes[24..]));
    let stored = u16::from_be_bytes([bytes[10], bytes[11]]);
    assert_eq!(ip::ipv4_header_checksum(&bytes), Some(stored));
    assert_eq!(ip::checksum(&bytes[..24]), 0);
}

#[test]
fn icmp_has_one_number() {
    let bytes = vector("ip_icmp4");
    let packet = Packet::parse(&bytes).unwrap();
    assert_eq!((packet.protocol, packet.l4), (1, L4::Single(0x0304)));
    assert!(ip::transport_checksum_ok(packet.src, packet.dst, 1, &bytes[packet.l4_offset..]));
    let bytes = vector("ip_icmp6");
    let packet = Packet::parse(&bytes).unwrap();
    assert_eq!((packet.protocol, packet.l4), (58, L4::Single(0x8000)));
    assert!(ip::transport_checksum_ok(packet.src, packet.dst, 58, &bytes[packet.l4_offset..]));
}

#[test]
fn ipv6_extension_headers_are_walked() {
    let bytes = vector("ip_tcp6_extensions");
    let packet = Packet::parse(&bytes).unwrap();
    assert_eq!((packet.protocol, packet.l4_offset, packet.traffic_class), (6, 64, 0x2e));
    assert_eq!(packet.l4, L4::Ports { src: 1, dst: 2 });
    assert_eq!(packet.fragment, IpFragment::Whole);
}

#[test]
fn fragments_of_one_datagram_are_one_flow() {
    for family in ["ip_fragment4", "ip_fragment6"] {
        let (first, later) =
            (vector(&format!("{family}_first")), vector(&format!("{family}_later")));
        let (first, later) = (Packet::parse(&first).unwrap(), Packet::parse(&later).unwrap());
        assert_eq!((first.fragment, later.fragment), (IpFragment::First, IpFragment::Later));
        assert_eq!((first.l4, later.l4), (L4::Ports { src: 9, dst: 10 }, L4::Hidden));
        assert_eq!(first.flow(), later.flow());
        assert_eq!(first.flow().ports, (0, 0));
        assert_eq!(later.protocol, 17);
    }
}

#[test]
fn traffic_class_changes_keep_the_checksum_right() {
    for name in ["ip_udp4", "ip_tcp4_options", "ip_udp6"] {
        let original = vector(name);
        for class in 0..=255 {
            let mut bytes = original.clone();
            ip::set_traffic_class(&mut bytes, class);
            let packet = Packet::parse(&bytes).unwrap();
            assert_eq!(packet.traffic_class, class);
            assert_eq!(packet.dst, Packet::parse(&original).unwrap().dst);
            if packet.is_ipv4() {
                assert_eq!(ip::checksum(&bytes[..packet.l4_offset]), 0, "{name} {class}");
            } else {
                // The flow label is untouched.
                assert_eq!(bytes[1] & 0xf, original[1] & 0xf);
            }
        }
    }
    let mut short = [0x45, 0, 0];
    ip::set_traffic_class(&mut short, 9);
    assert_eq!(short, [0x45, 0, 0]);
}

#[test]
fn address_of_the_other_family_is_no_udp_packet() {
    let v4 = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 1);
    let v6 = SocketAddr::new(std::net::Ipv6Addr::LOCALHOST.into(), 1);
    assert_eq!(ip::udp_packet(v4, v6, b""), None);
    assert_eq!(ip::udp_packet(v4, v4, &vec![0; 65_536]), None);
    assert_eq!(ip::udp_packet(v4, v4, &vec![0; 65_507]).map(|p| p.len()), Some(65_535));
    assert_eq!(ip::udp_packet(v4, v4, &vec![0; 65_508]), None);
}
