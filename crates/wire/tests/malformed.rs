//! Messages that are wrong in one way each: the error names that way, because the answer depends on it
//! (security.md, statements 1 to 3 and 12).

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

mod common;

use common::vector;
use wire::id::{EspSpi, IkeSpi, MessageId};
use wire::ike::*;

const HEADER: Header = Header {
    initiator_spi: IkeSpi(1),
    responder_spi: IkeSpi(2),
    exchange: ExchangeType::INFORMATIONAL,
    from_initiator: true,
    response: false,
    message_id: MessageId(5),
};

/// A message with this chain, whatever it is.
fn message(first: PayloadType, chain: &[u8]) -> Vec<u8> {
    let mut bytes = MessageBuilder::clear(&HEADER).finish().unwrap();
    bytes[16] = first.0;
    bytes.extend(chain);
    let len = bytes.len() as u32;
    bytes[24..28].copy_from_slice(&len.to_be_bytes());
    bytes
}

/// One payload with its generic header.
fn payload(next: PayloadType, critical: bool, body: &[u8]) -> Vec<u8> {
    let len = (body.len() + 4) as u16;
    [&[next.0, if critical { 0x80 } else { 0 }], len.to_be_bytes().as_slice(), body].concat()
}

fn error(bytes: &[u8]) -> ParseError {
    Message::parse(bytes).expect_err("should be refused")
}

fn fault_in(kind: PayloadType, body: &[u8]) -> Fault {
    match error(&message(kind, &payload(PayloadType::NONE, false, body))) {
        ParseError::Malformed { payload, fault } if payload == kind => fault,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_is_no_ike_message_is_not_answered() {
    let good = message(PayloadType::NONE, &[]);
    assert!(Message::parse(&good).unwrap().payloads.is_empty());
    let refused = |bytes: &[u8], fault| {
        let error = error(bytes);
        assert_eq!(error, ParseError::Header(fault));
        assert_eq!(error.notify_type(), None);
        assert_eq!(Header::parse(bytes), Err(error));
    };
    for len in 0..HEADER_LEN {
        refused(&good[..len], HeaderFault::Short);
    }
    refused(&[good.as_slice(), &[0]].concat(), HeaderFault::Length);
    let mut long = good.clone();
    long[27] += 1;
    refused(&long, HeaderFault::Length);
    let mut huge = good.clone();
    huge[24] = 0xff;
    refused(&huge, HeaderFault::Length);
    let mut no_spi = good.clone();
    no_spi[7] = 0;
    refused(&no_spi, HeaderFault::ZeroSpi);
    let mut v1 = good.clone();
    v1[17] = 0x10;
    refused(&v1, HeaderFault::OldVersion);
}

/// RFC 7296 §2.5: a higher major version is answered, a higher minor version and odd flags are ignored.
#[test]
fn versions() {
    let mut v3 = message(PayloadType::NONE, &[]);
    v3[17] = 0x30;
    assert_eq!(error(&v3), ParseError::MajorVersion(3));
    assert_eq!(error(&v3).notify_type(), Some(NotifyType::INVALID_MAJOR_VERSION));
    assert_eq!(Header::peek(&v3), Some(HEADER));
    let mut v2_7 = message(PayloadType::NONE, &[]);
    v2_7[17] = 0x27;
    v2_7[19] |= 0x10 | 0xc7;
    assert_eq!(Message::parse(&v2_7).unwrap().header, HEADER);
}

/// RFC 7296 §2.5: unknown and critical is refused and named; unknown is skipped; critical on a known type
/// means nothing.
#[test]
fn the_critical_bit() {
    let unknown = PayloadType(99);
    let nonce = payload(PayloadType::NONE, true, &[1; 16]);
    let chain = |critical| [payload(PayloadType::NONCE, critical, b"?"), nonce.clone()].concat();
    let refused = error(&message(unknown, &chain(true)));
    assert_eq!(refused, ParseError::UnsupportedCritical(unknown));
    assert_eq!(refused.notify_type(), Some(NotifyType::UNSUPPORTED_CRITICAL_PAYLOAD));
    assert_eq!(refused.notify_data(), [99]);
    let bytes = message(unknown, &chain(false));
    let skipped = Message::parse(&bytes).unwrap();
    assert_eq!(
        skipped.payloads.iter().next(),
        Some(&Payload::Unknown { kind: unknown, body: b"?" })
    );
    assert_eq!(skipped.payloads.nonce(), Some([1; 16].as_slice()));
}

// security.md, statement 12.
#[test]
fn chains_that_do_not_fit_the_message() {
    let fault = |first, chain: &[u8]| match error(&message(first, chain)) {
        ParseError::Malformed { payload, fault } => (payload, fault),
        other => panic!("{other:?}"),
    };
    let v = PayloadType::VENDOR_ID;
    assert_eq!(fault(v, &[]), (v, Fault::Truncated));
    assert_eq!(fault(v, &[0, 0, 0]), (v, Fault::Truncated));
    // Lengths of 0 to 3 cannot loop.
    for len in 0..4 {
        assert_eq!(fault(v, &[v.0, 0, 0, len, 0, 0, 0, 0]), (v, Fault::Length));
    }
    assert_eq!(fault(v, &[0, 0, 0, 6, 1]), (v, Fault::Length));
    assert_eq!(fault(v, &[0, 0, 0, 5, 1, 2]), (PayloadType::NONE, Fault::Trailing));
    assert_eq!(fault(PayloadType::NONE, &[0]), (PayloadType::NONE, Fault::Trailing));
    // A chain that says "one more" at the end.
    assert_eq!(fault(v, &payload(v, false, b"x")), (v, Fault::Truncated));
}

#[test]
fn payload_count_at_the_limit() {
    let v = PayloadType::VENDOR_ID;
    let chain = |count: usize| -> Vec<u8> {
        (1..=count)
            .flat_map(|i| payload(if i == count { PayloadType::NONE } else { v }, false, b""))
            .collect()
    };
    for count in [MAX_PAYLOADS - 1, MAX_PAYLOADS] {
        assert_eq!(Message::parse(&message(v, &chain(count))).unwrap().payloads.len(), count);
    }
    let over = error(&message(v, &chain(MAX_PAYLOADS + 1)));
    assert_eq!(over, ParseError::Malformed { payload: v, fault: Fault::TooMany });
    assert_eq!(over.notify_type(), Some(NotifyType::INVALID_SYNTAX));
}

#[test]
fn nonces_have_16_to_256_bytes() {
    let kind = PayloadType::NONCE;
    for len in [0, 15, 257] {
        assert_eq!(fault_in(kind, &vec![1; len]), Fault::Value);
        assert_eq!(build(&[Payload::Nonce(&vec![1; len])]), Err(BuildError::Value(kind)));
    }
    for len in [16, 256] {
        assert!(
            Message::parse(&message(kind, &payload(PayloadType::NONE, false, &vec![1; len])))
                .is_ok()
        );
    }
}

fn build(payloads: &[Payload<'_>]) -> Result<Vec<u8>, BuildError> {
    let mut builder = MessageBuilder::clear(&HEADER);
    payloads.iter().for_each(|p| {
        builder.push(p);
    });
    builder.finish()
}

/// The body of an SA payload with these proposals; each is (last/more byte, number of transforms, transforms).
fn sa(proposals: &[(u8, u8, &[u8])]) -> Vec<u8> {
    proposals
        .iter()
        .flat_map(|(more, count, transforms)| {
            let len = (8 + transforms.len()) as u16;
            [&[*more, 0], len.to_be_bytes().as_slice(), &[1, 1, 0, *count], transforms].concat()
        })
        .collect()
}

// security.md, statement 12.
#[test]
fn malformed_proposals() {
    let (last, more): (&[u8], &[u8]) = (&[0, 0, 0, 8, 4, 0, 0, 31], &[3, 0, 0, 8, 4, 0, 0, 31]);
    let two = [more, last].concat();
    let kind = PayloadType::SA;
    assert!(
        Message::parse(&message(kind, &payload(PayloadType::NONE, false, &sa(&[(0, 2, &two)]))))
            .is_ok()
    );
    let cases: &[(Vec<u8>, Fault)] = &[
        (vec![], Fault::Truncated),
        (sa(&[(0, 1, &two)]), Fault::Count),
        (sa(&[(0, 3, &two)]), Fault::Count),
        (sa(&[(0, 2, &[last, last].concat())]), Fault::Count),
        (sa(&[(0, 1, more)]), Fault::Count),
        (sa(&[(0, 0, last)]), Fault::Trailing),
        (sa(&[(0, 1, last), (0, 1, last)]), Fault::Trailing),
        (sa(&[(2, 1, last)]), Fault::Truncated),
        (sa(&[(1, 1, last)]), Fault::Value),
        (sa(&[(0, 1, &[5, 0, 0, 8, 4, 0, 0, 31])]), Fault::Value),
        (sa(&[(0, 1, &[0, 0, 0, 3, 4, 0, 0, 31])]), Fault::Length),
        (sa(&[(0, 1, &[0, 0, 0, 0, 4, 0, 0, 31])]), Fault::Length),
        (sa(&[(0, 1, &[0, 0, 0, 9, 4, 0, 0, 31])]), Fault::Length),
        (sa(&[(0, 1, &[0, 0, 0, 7, 4, 0, 0])]), Fault::Truncated),
        // An attribute of three bytes; a variable one longer than the transform.
        (sa(&[(0, 1, &[0, 0, 0, 11, 1, 0, 0, 20, 0x80, 14, 1])]), Fault::Truncated),
        (sa(&[(0, 1, &[0, 0, 0, 12, 1, 0, 0, 20, 0, 14, 0, 1])]), Fault::Truncated),
        // An SPI size beyond the proposal; proposal lengths of 0 and beyond the payload.
        (vec![0, 0, 0, 8, 1, 3, 4, 0], Fault::Truncated),
        (vec![0, 0, 0, 0, 1, 3, 0, 0], Fault::Length),
        (vec![0, 0, 0, 9, 1, 3, 0, 0], Fault::Length),
    ];
    for (body, fault) in cases {
        assert_eq!(fault_in(kind, body), *fault, "{body:02x?}");
    }
}

#[test]
fn proposal_count_at_the_limit() {
    let body = |count: usize| {
        let last: &[u8] = &[0, 0, 0, 8, 4, 0, 0, 31];
        let list: Vec<_> = (1..=count).map(|i| (if i == count { 0 } else { 2 }, 1, last)).collect();
        sa(&list)
    };
    let kind = PayloadType::SA;
    let bytes = message(kind, &payload(PayloadType::NONE, false, &body(MAX_PROPOSALS)));
    assert_eq!(Message::parse(&bytes).unwrap().payloads.sa().unwrap().len(), MAX_PROPOSALS);
    assert_eq!(fault_in(kind, &body(MAX_PROPOSALS + 1)), Fault::TooMany);
}

/// RFC 7296 §3.3.6: a transform with an attribute we do not know is not acceptable; its neighbours are.
#[test]
fn foreign_attributes_taint_their_transform_only() {
    let transforms: &[u8] = &[
        3, 0, 0, 14, 1, 0, 0, 20, 0, 99, 0, 2, 1, 2, // variable-length attribute 99
        3, 0, 0, 12, 1, 0, 0, 20, 0x80, 99, 1, 0, // fixed-length attribute 99
        3, 0, 0, 16, 1, 0, 0, 20, 0x80, 14, 1, 0, 0x80, 14, 0, 128, // two key lengths
        0, 0, 0, 12, 1, 0, 0, 20, 0x80, 14, 1, 0, // 256 bits
    ];
    let bytes =
        message(PayloadType::SA, &payload(PayloadType::NONE, false, &sa(&[(0, 4, transforms)])));
    let parsed = Message::parse(&bytes).unwrap();
    let transforms = &parsed.payloads.sa().unwrap()[0].transforms;
    assert_eq!(transforms.iter().map(|t| t.foreign).collect::<Vec<_>>(), [true, true, true, false]);
    assert_eq!(transforms[3], Transform::encr(EncrId::AES_GCM_16, Some(256)));
    assert_eq!(
        build(&[Payload::Sa(parsed.payloads.sa().unwrap().clone())]),
        Err(BuildError::Value(PayloadType::SA))
    );
}

#[test]
fn spis_of_unknown_length() {
    let odd: &[u8] = &[0, 0, 0, 10, 1, 9, 2, 0, 0xaa, 0xbb];
    let bytes = message(PayloadType::SA, &payload(PayloadType::NONE, false, odd));
    let parsed = Message::parse(&bytes).unwrap();
    assert_eq!(parsed.payloads.sa().unwrap()[0].spi, Spi::Other(2));
    // RFC 7296 §3.10.1: unknown status is ignored, so its SPI must not make the message malformed.
    let notify = payload(PayloadType::NONE, false, &[9, 2, 0xff, 0xff, 0xaa, 0xbb, 1]);
    let bytes = message(PayloadType::NOTIFY, &notify);
    let parsed = Message::parse(&bytes).unwrap();
    let notify = parsed.payloads.notify(NotifyType(0xffff)).unwrap();
    assert_eq!((notify.spi, notify.data), (Spi::Other(2), [1].as_slice()));
    assert_eq!(build(&[Payload::Notify(*notify)]), Err(BuildError::Value(PayloadType::NOTIFY)));
    // An SPI of zero names no SA.
    assert_eq!(Spi::Esp(EspSpi(0)).esp(), None);
    assert_eq!(Spi::Ike(IkeSpi(0)).ike(), None);
    assert_eq!(Spi::Esp(EspSpi(256)).esp(), Some(EspSpi(256)));
}

#[test]
fn malformed_notifies_deletes_and_others() {
    assert_eq!(fault_in(PayloadType::NOTIFY, &[0, 0, 1]), Fault::Truncated);
    assert_eq!(fault_in(PayloadType::NOTIFY, &[3, 4, 0x40, 9, 1, 2, 3]), Fault::Truncated);
    let d = PayloadType::DELETE;
    assert_eq!(fault_in(d, &[1, 0, 0]), Fault::Truncated);
    assert_eq!(fault_in(d, &[1, 0, 0, 1]), Fault::Count);
    assert_eq!(fault_in(d, &[1, 0, 0, 0, 9]), Fault::Count);
    assert_eq!(fault_in(d, &[1, 8, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8]), Fault::Value);
    assert_eq!(fault_in(d, &[3, 4, 0, 2, 1, 2, 3, 4]), Fault::Count);
    assert_eq!(fault_in(d, &[3, 4, 0, 1, 1, 2, 3, 4, 5]), Fault::Count);
    assert_eq!(fault_in(d, &[3, 0, 0, 9]), Fault::Value);
    assert_eq!(fault_in(d, &[3, 4, 0xff, 0xff]), Fault::TooMany);
    assert_eq!(fault_in(d, &[4, 4, 0, 0]), Fault::Value);
    assert_eq!(fault_in(PayloadType::KE, &[0, 31, 0]), Fault::Truncated);
    assert_eq!(fault_in(PayloadType::AUTH, &[2, 0, 0]), Fault::Truncated);
    assert_eq!(fault_in(PayloadType::CERT, &[]), Fault::Truncated);
    assert_eq!(fault_in(PayloadType::CP, &[1, 0, 0]), Fault::Truncated);
    assert_eq!(fault_in(PayloadType::CP, &[1, 0, 0, 0, 0, 1, 0, 1]), Fault::Truncated);
    let attributes = |count: usize| [vec![1, 0, 0, 0], [0, 1, 0, 0].repeat(count)].concat();
    assert_eq!(fault_in(PayloadType::CP, &attributes(MAX_CFG_ATTRIBUTES + 1)), Fault::TooMany);
    let full = message(
        PayloadType::CP,
        &payload(PayloadType::NONE, false, &attributes(MAX_CFG_ATTRIBUTES)),
    );
    assert!(Message::parse(&full).is_ok());
    assert!(matches!(fault_in(PayloadType::TSI, &[0, 0, 0, 0]), Fault::TrafficSelector(_)));
}

#[test]
fn delete_count_at_the_limit() {
    let full = Payload::Delete(Delete::Esp(vec![EspSpi(7); MAX_DELETE_SPIS]));
    let bytes = build(std::slice::from_ref(&full)).unwrap();
    assert_eq!(Message::parse(&bytes).unwrap().payloads.iter().next(), Some(&full));
    let count = MAX_DELETE_SPIS as u16 + 1;
    let body = [&[3, 4], count.to_be_bytes().as_slice(), &vec![7; usize::from(count) * 4]].concat();
    assert_eq!(fault_in(PayloadType::DELETE, &body), Fault::TooMany);
    let over = Payload::Delete(Delete::Esp(vec![EspSpi(7); MAX_DELETE_SPIS + 1]));
    assert_eq!(build(&[over]), Err(BuildError::Count(PayloadType::DELETE)));
}

/// security.md, statement 2: payloads that may come once are found when they come twice.
#[test]
fn doubled_payloads_are_found() {
    let nonce = Payload::Nonce(&[1; 16]);
    let ke = Payload::Ke(KeyExchange { group: GroupId::X25519, data: &[1; 32] });
    let notify = Payload::Notify(Notify::new(NotifyType::COOKIE, &[1]));
    let unknown = Payload::Unknown { kind: PayloadType(200), body: &[] };
    let doubled = |list: &[&Payload<'_>]| {
        let list: Vec<_> = list.iter().map(|p| (*p).clone()).collect();
        Message::parse(&build(&list).unwrap()).unwrap().payloads.doubled()
    };
    assert_eq!(doubled(&[&nonce, &ke, &notify, &notify, &unknown, &unknown]), None);
    assert_eq!(doubled(&[&ke, &nonce, &notify, &nonce]), Some(PayloadType::NONCE));
    assert_eq!(doubled(&[&ke, &nonce, &nonce, &ke]), Some(PayloadType::KE));
    assert_eq!(doubled(&[&ke, &nonce, &nonce]), Some(PayloadType::NONCE));
}

#[test]
fn encrypted_payloads_out_of_place() {
    let content = [0u8; 25];
    let sk = payload(PayloadType::NONE, false, &content);
    let malformed = |payload, fault| ParseError::Malformed { payload, fault };
    let (kind, nonce) = (PayloadType::SK, payload(PayloadType::SK, false, &[1; 16]));
    assert!(Message::parse(&message(kind, &sk)).unwrap().sealed.is_some());
    // At the end of others it is legal, not before them.
    let bytes = message(PayloadType::NONCE, &[nonce.clone(), sk.clone()].concat());
    let both = Message::parse(&bytes).unwrap();
    assert!(both.sealed.is_some() && both.payloads.nonce().is_some());
    assert_eq!(
        error(&message(kind, &[sk.clone(), nonce].concat())),
        malformed(kind, Fault::Encrypted)
    );
    // Too short for IV, pad length and ICV.
    let short = payload(PayloadType::NONE, false, &content[..24]);
    assert_eq!(error(&message(kind, &short)), malformed(kind, Fault::Truncated));

    // Fragments: RFC 7383 §2.5; security.md, statement 3.
    let kind = PayloadType::SKF;
    let fragment = |number: u16, total: u16| {
        payload(
            PayloadType::NONE,
            false,
            &[&number.to_be_bytes(), total.to_be_bytes().as_slice(), &content].concat(),
        )
    };
    assert!(Message::parse(&message(kind, &fragment(2, 2))).is_ok());
    for (number, total) in [(0, 0), (0, 1), (2, 1)] {
        assert_eq!(error(&message(kind, &fragment(number, total))), malformed(kind, Fault::Value));
    }
    assert_eq!(error(&message(kind, &sk)), malformed(kind, Fault::Value));
    let company = [payload(kind, false, &[1; 16]), fragment(1, 1)].concat();
    assert_eq!(error(&message(PayloadType::NONCE, &company)), malformed(kind, Fault::Encrypted));
}

#[test]
fn opened_content_is_checked_like_the_rest() {
    let message = Message::parse(&vector("ike_sealed")).unwrap().sealed.unwrap();
    assert_eq!(message.first, PayloadType::DELETE);
    let delete = payload(PayloadType::NONE, false, &[1, 0, 0, 0]);
    let padded = |pad: &[u8]| [delete.as_slice(), pad, &[pad.len() as u8]].concat();
    // RFC 7296 §3.14: any padding.
    for pad in [vec![], vec![9], vec![0xff; 255]] {
        let plaintext = padded(&pad);
        let inner = message.parse_opened(&plaintext).unwrap();
        assert_eq!(inner.deletes().collect::<Vec<_>>(), [&Delete::Ike]);
    }
    let refused = |plaintext: &[u8]| match message.parse_opened(plaintext) {
        Err(ParseError::Malformed { payload, fault }) => (payload, fault),
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(&[]), (PayloadType::SK, Fault::Truncated));
    assert_eq!(refused(&[1]), (PayloadType::SK, Fault::Truncated));
    assert_eq!(refused(&[0]), (PayloadType::DELETE, Fault::Truncated));
    // RFC 7296 §3.1: an Encrypted payload MUST NOT contain another.
    let nested = [
        payload(PayloadType::SK, false, &[1, 0, 0, 0]),
        payload(PayloadType::NONE, false, &[0; 25]),
    ]
    .concat();
    assert_eq!(refused(&[nested, vec![0]].concat()), (PayloadType::SK, Fault::Encrypted));
}

#[test]
fn messages_that_do_not_fit_are_not_written() {
    let body = vec![0; 65_532];
    let kind = PayloadType::VENDOR_ID;
    assert_eq!(build(&[Payload::VendorId(&body)]), Err(BuildError::TooLong(kind)));
    assert_eq!(build(&[Payload::VendorId(&body[..65_475])]).map(|b| b.len()), Ok(MAX_MESSAGE_LEN));
    assert_eq!(build(&[Payload::VendorId(&body[..65_476])]), Err(BuildError::TooLong(kind)));
    assert_eq!(
        build(&[Payload::VendorId(&body[..40_000]), Payload::VendorId(&body[..40_000])]),
        Err(BuildError::TooLong(kind))
    );
    assert_eq!(build(&[Payload::Sa(vec![])]), Err(BuildError::Count(PayloadType::SA)));
    assert_eq!(build(&[Payload::TsR(vec![])]), Err(BuildError::Count(PayloadType::TSR)));
    let sealed = |len: usize| {
        let mut builder = MessageBuilder::sealed(&HEADER);
        builder.push(&Payload::VendorId(&body[..len]));
        builder.finish().map(|_| ())
    };
    // 28 header + 4 + 8 IV + 4 + body + 1 + 16.
    assert_eq!(sealed(MAX_MESSAGE_LEN - 61), Ok(()));
    assert!(matches!(sealed(MAX_MESSAGE_LEN - 60), Err(BuildError::TooLong(_))));
}
