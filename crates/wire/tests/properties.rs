//! Round trips: what is written reads back as the same value; and range arithmetic against brute force.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

use proptest::collection::vec;
use proptest::prelude::*;
use wire::id::{EspSpi, IkeSpi, MessageId};
use wire::ike::*;
use wire::ts::{self, AddrRange, Cidr, Ports, TrafficSelector};

/// Payload contents that own their bytes; [`borrow`] makes the payload.
#[derive(Clone, Debug)]
enum Owned {
    Sa(Vec<Proposal>),
    Ke(u16, Vec<u8>),
    Id(bool, Identity, [u8; 3]),
    Cert(bool, u8, Vec<u8>),
    Auth(u8, Vec<u8>),
    Nonce(Vec<u8>),
    Notify(u8, Spi, u16, Vec<u8>),
    Delete(Delete),
    Vendor(Vec<u8>),
    Ts(bool, Vec<TrafficSelector>),
    Cp(u8, Vec<(u16, Vec<u8>)>),
    Eap(Vec<u8>),
    Unknown(u8, Vec<u8>),
}

fn borrow(owned: &Owned) -> Payload<'_> {
    match owned {
        Owned::Sa(proposals) => Payload::Sa(proposals.clone()),
        Owned::Ke(group, data) => Payload::Ke(KeyExchange { group: GroupId(*group), data }),
        Owned::Id(initiator, id, reserved) => {
            let payload = IdPayload { reserved: *reserved, ..id.payload() };
            if *initiator { Payload::IdI(payload) } else { Payload::IdR(payload) }
        }
        Owned::Cert(request, encoding, data) => {
            let cert = Certificate { encoding: CertEncoding(*encoding), data };
            if *request { Payload::CertReq(cert) } else { Payload::Cert(cert) }
        }
        Owned::Auth(method, data) => Payload::Auth(Auth { method: AuthMethod(*method), data }),
        Owned::Nonce(nonce) => Payload::Nonce(nonce),
        Owned::Notify(protocol, spi, kind, data) => Payload::Notify(Notify {
            protocol: ProtocolId(*protocol),
            spi: *spi,
            kind: NotifyType(*kind),
            data,
        }),
        Owned::Delete(delete) => Payload::Delete(delete.clone()),
        Owned::Vendor(id) => Payload::VendorId(id),
        Owned::Ts(initiator, list) if *initiator => Payload::TsI(list.clone()),
        Owned::Ts(_, list) => Payload::TsR(list.clone()),
        Owned::Cp(kind, attributes) => Payload::Cp(Configuration {
            kind: CfgType(*kind),
            attributes: attributes
                .iter()
                .map(|(kind, value)| CfgAttribute { kind: CfgAttributeType(*kind), value })
                .collect(),
        }),
        Owned::Eap(message) => Payload::Eap(message),
        Owned::Unknown(kind, body) => Payload::Unknown { kind: PayloadType(*kind), body },
    }
}

fn spi() -> impl Strategy<Value = Spi> {
    prop_oneof![
        Just(Spi::None),
        any::<u32>().prop_map(|v| Spi::Esp(EspSpi(v))),
        any::<u64>().prop_map(|v| Spi::Ike(IkeSpi(v))),
    ]
}

fn proposal() -> impl Strategy<Value = Proposal> {
    let transform =
        (any::<u8>(), any::<u16>(), any::<Option<u16>>()).prop_map(|(kind, id, key_bits)| {
            Transform { kind: TransformType(kind), id, key_bits, foreign: false }
        });
    (any::<u8>(), any::<u8>(), spi(), vec(transform, 0..6)).prop_map(
        |(number, protocol, spi, transforms)| Proposal {
            number,
            protocol: ProtocolId(protocol),
            spi,
            transforms,
        },
    )
}

fn ports() -> impl Strategy<Value = Ports> {
    prop_oneof![
        Just(Ports::Any),
        Just(Ports::Opaque),
        (any::<u16>(), any::<u16>())
            .prop_map(|(a, b)| Ports::from_wire(a.min(b), a.max(b)).unwrap()),
    ]
}

fn range() -> impl Strategy<Value = AddrRange> {
    prop_oneof![
        (any::<[u8; 4]>(), any::<[u8; 4]>()).prop_map(|(a, b)| AddrRange::new(
            a.min(b).into(),
            a.max(b).into()
        )
        .unwrap()),
        (any::<[u8; 16]>(), any::<[u8; 16]>()).prop_map(|(a, b)| AddrRange::new(
            a.min(b).into(),
            a.max(b).into()
        )
        .unwrap()),
    ]
}

fn selector() -> impl Strategy<Value = TrafficSelector> {
    (range(), 0..20u8, ports()).prop_map(|(range, protocol, ports)| {
        TrafficSelector::new(range, protocol, ports).unwrap_or(TrafficSelector::all(range))
    })
}

fn identity() -> impl Strategy<Value = Identity> {
    prop_oneof![
        any::<std::net::IpAddr>().prop_map(Identity::address),
        (
            prop_oneof![Just(2u8), Just(3), Just(9), Just(10), Just(11), Just(77)],
            vec(any::<u8>(), 1..40)
        )
            .prop_map(|(kind, data)| Identity::new(IdType(kind), data).unwrap()),
    ]
}

fn payload() -> impl Strategy<Value = Owned> {
    let bytes = || vec(any::<u8>(), 0..60);
    prop_oneof![
        vec(proposal(), 1..5).prop_map(Owned::Sa),
        (any::<u16>(), bytes()).prop_map(|(g, b)| Owned::Ke(g, b)),
        (any::<bool>(), identity(), any::<[u8; 3]>()).prop_map(|(i, id, r)| Owned::Id(i, id, r)),
        (any::<bool>(), any::<u8>(), bytes()).prop_map(|(r, e, b)| Owned::Cert(r, e, b)),
        (any::<u8>(), bytes()).prop_map(|(m, b)| Owned::Auth(m, b)),
        vec(any::<u8>(), 16..=256).prop_map(Owned::Nonce),
        (any::<u8>(), spi(), any::<u16>(), bytes())
            .prop_map(|(p, s, k, b)| Owned::Notify(p, s, k, b)),
        vec(any::<u32>(), 0..9)
            .prop_map(|v| Owned::Delete(Delete::Esp(v.into_iter().map(EspSpi).collect()))),
        vec(any::<u32>(), 0..9)
            .prop_map(|v| Owned::Delete(Delete::Ah(v.into_iter().map(EspSpi).collect()))),
        Just(Owned::Delete(Delete::Ike)),
        bytes().prop_map(Owned::Vendor),
        (any::<bool>(), vec(selector(), 1..6)).prop_map(|(i, l)| Owned::Ts(i, l)),
        (any::<u8>(), vec((0..0x8000u16, vec(any::<u8>(), 0..9)), 0..6))
            .prop_map(|(k, a)| Owned::Cp(k, a)),
        bytes().prop_map(Owned::Eap),
        (54..=255u8, bytes()).prop_map(|(k, b)| Owned::Unknown(k, b)),
    ]
}

fn header() -> impl Strategy<Value = Header> {
    (1..=u64::MAX, any::<u64>(), any::<u8>(), any::<bool>(), any::<bool>(), any::<u32>()).prop_map(
        |(i, r, exchange, from_initiator, response, id)| Header {
            initiator_spi: IkeSpi(i),
            responder_spi: IkeSpi(r),
            exchange: ExchangeType(exchange),
            from_initiator,
            response,
            message_id: MessageId(id),
        },
    )
}

proptest! {
    #[test]
    fn clear_messages_read_back(header in header(), contents in vec(payload(), 0..8)) {
        let payloads: Vec<_> = contents.iter().map(borrow).collect();
        let mut builder = MessageBuilder::clear(&header);
        payloads.iter().for_each(|p| { builder.push(p); });
        let bytes = builder.finish().unwrap();
        let message = Message::parse(&bytes).unwrap();
        prop_assert_eq!(message.header, header);
        prop_assert_eq!(message.payloads.iter().cloned().collect::<Vec<_>>(), payloads);
        prop_assert!(message.sealed.is_none());
    }

    /// With a cipher that flips every bit and an ICV over what it was given, everything comes back, and
    /// both sides see the same additional data.
    #[test]
    fn sealed_messages_read_back(header in header(), contents in vec(payload(), 0..8), iv in any::<[u8; 8]>()) {
        let payloads: Vec<_> = contents.iter().map(borrow).collect();
        let mut builder = MessageBuilder::sealed(&header);
        payloads.iter().for_each(|p| { builder.push(p); });
        let unsealed = builder.finish().unwrap();
        let mut sent_aad = Vec::new();
        let datagram = unsealed.seal(iv, |given_iv, aad, plaintext| {
            assert_eq!(given_iv, iv);
            sent_aad = aad.to_vec();
            plaintext.iter_mut().for_each(|b| *b = !*b);
            Ok::<_, ()>([0x77; 16])
        }).unwrap();

        let mut copy = datagram.clone();
        let message = Message::parse(&datagram).unwrap();
        prop_assert_eq!(message.header, header);
        let sealed = message.sealed.unwrap();
        let parts = sealed.split(&mut copy).unwrap();
        prop_assert_eq!(parts.aad, &sent_aad[..]);
        prop_assert_eq!(parts.iv, iv);
        let (ciphertext, icv) = parts.body.split_last_chunk_mut::<16>().unwrap();
        prop_assert_eq!(*icv, [0x77; 16]);
        ciphertext.iter_mut().for_each(|b| *b = !*b);
        let inner = sealed.parse_opened(ciphertext).unwrap();
        prop_assert_eq!(inner.iter().cloned().collect::<Vec<_>>(), payloads);
    }

    #[test]
    fn selectors_read_back(list in vec(selector(), 1..=255)) {
        let mut out = Vec::new();
        ts::emit_payload(&list, &mut out).unwrap();
        prop_assert_eq!(ts::parse_payload(&out), Ok(list));
    }

    #[test]
    fn identities_of_printable_names_read_back(name in "[a-zA-Z0-9@:=./ -]{1,30}", kind in prop_oneof![Just(2u8), Just(3)]) {
        let id = Identity::new(IdType(kind), name).unwrap();
        prop_assert_eq!(id.to_string().parse::<Identity>(), Ok(id));
    }

    /// The networks of a range are in order, touch each other and end where it ends.
    #[test]
    fn cidrs_tile_the_range(range in range()) {
        let mut expected = Some(range.first());
        let mut last = None;
        for cidr in range.cidrs() {
            prop_assert_eq!(Some(cidr.addr()), expected);
            prop_assert_eq!(cidr.to_string().parse::<Cidr>(), Ok(cidr));
            let end = AddrRange::from(cidr).last();
            expected = successor(end);
            last = Some(end);
        }
        prop_assert_eq!(last, Some(range.last()));
    }

    /// Intersection is what both match, containment is intersection with oneself left over.
    #[test]
    fn intersection_is_what_both_match(
        a in small_selector(), b in small_selector(), addr in 0..8u8, protocol in 1..4u8, port in proptest::option::of(0..6u16)
    ) {
        let addr = [10, 0, 0, addr].into();
        let both = a.matches(addr, protocol, port) && b.matches(addr, protocol, port);
        let meet = a.intersect(&b);
        prop_assert_eq!(meet.is_some_and(|m| m.matches(addr, protocol, port)), both);
        prop_assert_eq!(meet, b.intersect(&a));
        prop_assert_eq!(a.contains(&b), meet == Some(b));
        if a.contains(&b) && b.matches(addr, protocol, port) {
            prop_assert!(a.matches(addr, protocol, port));
        }
        let narrowed = ts::narrow(&[a, b], &[b]);
        prop_assert_eq!(narrowed.iter().any(|t| t.matches(addr, protocol, port)), b.matches(addr, protocol, port));
    }
}

/// Selectors over a universe so small that random packets hit.
fn small_selector() -> impl Strategy<Value = TrafficSelector> {
    let ports = prop_oneof![
        Just(Ports::Any),
        Just(Ports::Opaque),
        (0..6u16, 0..6u16).prop_map(|(a, b)| Ports::Range(a.min(b), a.max(b))),
    ];
    (0..8u8, 0..8u8, 0..4u8, ports).prop_map(|(a, b, protocol, ports)| {
        let range =
            AddrRange::new([10, 0, 0, a.min(b)].into(), [10, 0, 0, a.max(b)].into()).unwrap();
        TrafficSelector::new(range, protocol, ports).unwrap_or(TrafficSelector::all(range))
    })
}

fn successor(addr: std::net::IpAddr) -> Option<std::net::IpAddr> {
    match addr {
        std::net::IpAddr::V4(a) => {
            a.to_bits().checked_add(1).map(|b| std::net::Ipv4Addr::from_bits(b).into())
        }
        std::net::IpAddr::V6(a) => {
            a.to_bits().checked_add(1).map(|b| std::net::Ipv6Addr::from_bits(b).into())
        }
    }
}
