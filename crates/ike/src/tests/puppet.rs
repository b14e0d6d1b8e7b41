//! A peer that holds the right keys and says wrong things: what comes out of
//! decryption is not trusted either (security.md 1, 2, 4, 6).

use crypto::{
    aead::{AeadAlg, AeadKey},
    dh::{Ephemeral, Group},
    prf::PrfAlg,
};
use rand_chacha::rand_core::RngCore;
use wire::{
    id::MessageId,
    ike::{
        Auth, AuthMethod, Delete, ExchangeType, GroupId, Header, KeyExchange, Message,
        MessageBuilder, Notify, NotifyType, Payload, PayloadType, Payloads, Proposal, Spi,
    },
};

use super::*;
use crate::keys::{AuthKeys, Exchange, IkeKeys, Signed, Skeyseed};

/// Plays side A by hand towards a real side B.
struct Puppet {
    spi: IkeSpi,
    peer: IkeSpi,
    keys: IkeKeys,
    auth: AuthKeys,
    request: Vec<u8>,
    nr: Vec<u8>,
    iv: u64,
}

fn header(spi: IkeSpi, peer: IkeSpi, exchange: ExchangeType, id: u32) -> Header {
    Header {
        initiator_spi: spi,
        responder_spi: peer,
        exchange,
        from_initiator: true,
        response: false,
        message_id: MessageId(id),
    }
}

/// Hands B a datagram and gives its answer.
fn say(w: &mut World, bytes: &[u8]) -> Option<Vec<u8>> {
    let at = |n: usize| SocketAddr::new(ip(n), 500);
    w.with_side(B, |ike, cx| ike.handle_datagram(cx, at(A), at(B), bytes));
    let answer = w.wire.pop_front().map(|f| f.packet.bytes);
    assert!(w.wire.is_empty(), "more than one answer");
    answer
}

/// Digests of nobody's addresses: a NAT on both sides.
fn claim_nat(b: &mut MessageBuilder) {
    for kind in [NotifyType::NAT_DETECTION_SOURCE_IP, NotifyType::NAT_DETECTION_DESTINATION_IP] {
        b.push(&Payload::Notify(Notify::new(kind, &[0; 20])));
    }
}

fn ike_offer() -> Vec<Proposal> {
    proposal::ike_payload(
        &proposal::parse_ike(&["aes256gcm16-prfsha384-x25519"]).unwrap(),
        Spi::None,
    )
}

fn esp_offer() -> Payload<'static> {
    let ours = proposal::parse_esp(&["aes256gcm16"]).unwrap();
    Payload::Sa(proposal::esp_payload(&ours, EspSpi(0x7777), false))
}

impl Puppet {
    /// IKE_SA_INIT done.
    fn new(w: &mut World) -> Self {
        Self::with_spi(w, IkeSpi(0xaaaa))
    }

    fn with_spi(w: &mut World, spi: IkeSpi) -> Self {
        let mut r = rng(4711);
        let eph = Ephemeral::generate(Group::X25519, &mut r);
        let mut b = MessageBuilder::clear(&header(spi, IkeSpi(0), ExchangeType::IKE_SA_INIT, 0));
        let public = eph.public();
        b.push(&Payload::Sa(ike_offer()))
            .push(&Payload::Ke(KeyExchange { group: GroupId::X25519, data: &public }))
            .push(&Payload::Nonce(&[7; 32]));
        claim_nat(&mut b);
        let request = b.finish().unwrap();
        let answer = say(w, &request).expect("an answer to IKE_SA_INIT");
        let message = Message::parse(&answer).unwrap();
        let nr = message.payloads.nonce().unwrap().to_vec();
        let peer = message.header.responder_spi;
        let shared = eph.agree(message.payloads.ke().unwrap().data).unwrap();
        let x = Exchange { ni: &[7; 32], nr: &nr, spi_i: spi, spi_r: peer };
        let (keys, auth) = Skeyseed::initial(PrfAlg::HmacSha384, &x, &shared)
            .expand(PrfAlg::HmacSha384, AeadAlg::Aes256Gcm16, &x)
            .unwrap();
        Self { spi, peer, keys, auth, request, nr, iv: 0 }
    }

    /// Seals anything at all as the inside of a message.
    fn seal_raw(&mut self, exchange: ExchangeType, id: u32, first: u8, inside: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let len = 28 + 4 + 8 + inside.len() + 1 + 16;
        bytes.extend(self.spi.to_bytes());
        bytes.extend(self.peer.to_bytes());
        bytes.extend([46, 0x20, exchange.0, 0x08]);
        bytes.extend(id.to_be_bytes());
        bytes.extend((len as u32).to_be_bytes());
        bytes.extend([first, 0]);
        bytes.extend(((len - 28) as u16).to_be_bytes());
        let aad = bytes.clone();
        self.iv += 1;
        let iv = self.iv.to_be_bytes();
        bytes.extend(iv);
        let mut text = inside.to_vec();
        text.push(0);
        let key = AeadKey::new(self.keys.aead, self.keys.sk_ei.expose()).unwrap();
        let tag = key.seal_in_place(iv, &aad, &mut text).unwrap();
        bytes.extend(text);
        bytes.extend(tag);
        bytes
    }

    fn seal(&mut self, exchange: ExchangeType, id: u32, payloads: &[Payload<'_>]) -> Vec<u8> {
        let mut b = MessageBuilder::sealed(&header(self.spi, self.peer, exchange, id));
        for p in payloads {
            b.push(p);
        }
        self.iv += 1;
        let key = AeadKey::new(self.keys.aead, self.keys.sk_ei.expose()).unwrap();
        let seal = |iv, aad: &[u8], text: &mut [u8]| key.seal_in_place(iv, aad, text);
        b.finish().unwrap().seal(self.iv.to_be_bytes(), seal).unwrap()
    }

    /// What an answer says, by payload type and notify type.
    fn read(&self, answer: &[u8]) -> (Vec<PayloadType>, Vec<NotifyType>) {
        let message = Message::parse(answer).unwrap();
        let sealed = message.sealed.unwrap();
        let mut copy = answer.to_vec();
        let parts = sealed.split(&mut copy).unwrap();
        let key = AeadKey::new(self.keys.aead, self.keys.sk_er.expose()).unwrap();
        let text = key.open_in_place(parts.iv, parts.aad, parts.body).unwrap();
        let payloads: Payloads<'_> = sealed.parse_opened(text).unwrap();
        let kinds = payloads.iter().map(Payload::kind).collect();
        (kinds, payloads.notifies().map(|n| n.kind).collect())
    }

    /// A correct AUTH.
    fn mac(&self) -> Vec<u8> {
        let id: Identity = "gw0.example".parse().unwrap();
        let body = id.payload().body();
        let signed = Signed { message: &self.request, nonce: &self.nr, id_body: &body };
        let psk = Secret::from_slice(b"the secret of both");
        self.auth.psk_auth(&psk, true, &signed).expose().to_vec()
    }

    /// Authenticates properly.
    fn authenticate(&mut self) -> Vec<u8> {
        let mac = self.mac();
        let id: Identity = "gw0.example".parse().unwrap();
        let auth = Payload::Auth(Auth { method: AuthMethod::SHARED_KEY, data: &mac });
        let (tsi, tsr) = (Payload::TsI(ts("10.1.0.0/24")), Payload::TsR(ts("10.2.0.0/24")));
        let all = [Payload::IdI(id.payload()), auth, esp_offer(), tsi, tsr];
        self.seal(ExchangeType::IKE_AUTH, 1, &all)
    }

    fn establish(&mut self, w: &mut World) {
        let bytes = self.authenticate();
        let answer = say(w, &bytes).unwrap();
        let (kinds, errors) = self.read(&answer);
        assert!(errors.is_empty() && kinds.contains(&PayloadType::SA), "{kinds:?} {errors:?}");
    }
}

fn established(w: &World) -> bool {
    w.sides[B].ike.status(w.now).ike_sas.iter().any(|s| s.state == "established")
}

// Each mandatory payload of IKE_AUTH missing, doubled, or wrong.
// security.md, statement 4.
#[test]
fn wrong_ike_auth_requests_establish_nothing() {
    let id: Identity = "gw0.example".parse().unwrap();
    let other: Identity = "gw9.example".parse().unwrap();
    let (tsi, tsr) = (Payload::TsI(ts("10.1.0.0/24")), Payload::TsR(ts("10.2.0.0/24")));
    let idi = Payload::IdI(id.payload());
    let failed = NotifyType::AUTHENTICATION_FAILED;
    let syntax = NotifyType::INVALID_SYNTAX;
    for case in 0..9 {
        let mut w = World::new();
        let mut p = Puppet::new(&mut w);
        let mac = p.mac();
        let zero = [0; 48];
        let auth = Payload::Auth(Auth { method: AuthMethod::SHARED_KEY, data: &mac });
        let (payloads, why) = match case {
            0 => (vec![auth.clone(), esp_offer()], syntax), // no IDi
            1 => (vec![idi.clone(), esp_offer(), tsi.clone(), tsr.clone()], failed), // no AUTH
            2 => (vec![idi.clone(), idi.clone(), auth.clone()], syntax), // IDi twice
            3 => (vec![idi.clone(), auth.clone(), auth.clone()], syntax), // AUTH twice
            4 => (vec![Payload::IdI(other.payload()), auth.clone()], failed),
            5 => {
                let short =
                    Payload::Auth(Auth { method: AuthMethod::SHARED_KEY, data: &mac[..47] });
                (vec![idi.clone(), short], failed)
            }
            6 => {
                let zero = Payload::Auth(Auth { method: AuthMethod::SHARED_KEY, data: &zero });
                (vec![idi.clone(), zero], failed)
            }
            7 => {
                // RFC 7619: null authentication is not on offer.
                let null = Payload::Auth(Auth { method: AuthMethod::NULL, data: &mac });
                (vec![idi.clone(), null], failed)
            }
            _ => {
                let rsa = Payload::Auth(Auth { method: AuthMethod::RSA, data: &mac });
                (vec![idi.clone(), rsa], failed)
            }
        };
        let bytes = p.seal(ExchangeType::IKE_AUTH, 1, &payloads);
        let answer = say(&mut w, &bytes).expect("an answer");
        let (kinds, errors) = p.read(&answer);
        assert_eq!((kinds.len(), errors.as_slice()), (1, &[why][..]), "case {case}");
        assert!(!established(&w) && w.sides[B].plane.sas.is_empty(), "case {case}");
        // And no second try in the same half-open SA.
        let good = p.mac();
        let auth = Payload::Auth(Auth { method: AuthMethod::SHARED_KEY, data: &good });
        let bytes = p.seal(ExchangeType::IKE_AUTH, 1, &[idi.clone(), auth]);
        assert!(say(&mut w, &bytes).is_none() && !established(&w), "case {case}");
        w.run(Duration::from_secs(31));
        assert!(w.snapshot(B).is_empty());
    }
}

// RFC 7296 §2.21.2: authentication succeeds without a (whole) child offer.
#[test]
fn a_childless_ike_auth_has_its_error() {
    let mut w = World::new();
    let mut p = Puppet::new(&mut w);
    let mac = p.mac();
    let id: Identity = "gw0.example".parse().unwrap();
    let auth = Payload::Auth(Auth { method: AuthMethod::SHARED_KEY, data: &mac });
    let bytes = p.seal(ExchangeType::IKE_AUTH, 1, &[Payload::IdI(id.payload()), auth]);
    let answer = say(&mut w, &bytes).unwrap();
    let (kinds, errors) = p.read(&answer);
    assert!(kinds.contains(&PayloadType::AUTH));
    assert_eq!(errors, [NotifyType::NO_PROPOSAL_CHOSEN]);
    assert!(established(&w));
    assert!(w.sides[B].plane.sas.is_empty());
}

// security.md, statement 4: other exchanges, before authentication, with the right keys.
#[test]
fn exchanges_before_authentication_are_not_answered() {
    let mut w = World::new();
    let mut p = Puppet::new(&mut w);
    let before = w.snapshot(B);
    for exchange in [
        ExchangeType::CREATE_CHILD_SA,
        ExchangeType::INFORMATIONAL,
        ExchangeType::IKE_INTERMEDIATE,
        ExchangeType(200),
    ] {
        for id in [0, 1, 2] {
            let bytes = p.seal(exchange, id, &[Payload::Delete(Delete::Ike)]);
            assert!(say(&mut w, &bytes).is_none());
        }
    }
    for id in [0, 2, 3, u32::MAX] {
        let bytes = p.seal(ExchangeType::IKE_AUTH, id, &[]);
        assert!(say(&mut w, &bytes).is_none());
    }
    assert_eq!(w.snapshot(B), before);
    p.establish(&mut w);
    assert!(established(&w));
}

// What is out of scope is passed over politely: CP, certificate requests, vendor
// ids, unknown notifies and payloads without critical bit.
#[test]
fn what_we_do_not_know_is_passed_over() {
    let mut w = World::new();
    let mut p = Puppet::new(&mut w);
    let mac = p.mac();
    let id: Identity = "gw0.example".parse().unwrap();
    let all = [
        Payload::VendorId(b"somebody"),
        Payload::IdI(id.payload()),
        Payload::Notify(Notify::new(NotifyType::MOBIKE_SUPPORTED, &[])),
        Payload::Notify(Notify::new(NotifyType(40_000), b"private")),
        Payload::Cp(wire::ike::Configuration {
            kind: wire::ike::CfgType::REQUEST,
            attributes: Vec::new(),
        }),
        Payload::CertReq(wire::ike::Certificate {
            encoding: wire::ike::CertEncoding::X509_SIGNATURE,
            data: &[1; 20],
        }),
        Payload::Unknown { kind: PayloadType(200), body: b"?" },
        Payload::Auth(Auth { method: AuthMethod::SHARED_KEY, data: &mac }),
        esp_offer(),
        Payload::TsI(ts("10.1.0.0/24")),
        Payload::TsR(ts("10.2.0.0/24")),
    ];
    let bytes = p.seal(ExchangeType::IKE_AUTH, 1, &all);
    let answer = say(&mut w, &bytes).unwrap();
    assert!(p.read(&answer).1.is_empty());
    assert!(established(&w) && w.sides[B].plane.sas.len() == 1);
}

// RFC 7296 §2.5: an unknown critical payload rejects the message, not the SA.
// security.md, statement 5.
#[test]
fn a_critical_unknown_payload_is_named() {
    let mut w = World::new();
    let mut p = Puppet::new(&mut w);
    p.establish(&mut w);
    let bytes = p.seal_raw(ExchangeType::INFORMATIONAL, 2, 200, &[0, 0x80, 0, 4]);
    let answer = say(&mut w, &bytes).unwrap();
    assert_eq!(p.read(&answer).1, [NotifyType::UNSUPPORTED_CRITICAL_PAYLOAD]);
    assert!(established(&w));
    // The window moved on.
    let bytes = p.seal(ExchangeType::INFORMATIONAL, 3, &[]);
    assert!(p.read(&say(&mut w, &bytes).unwrap()).0.is_empty());
}

// RFC 7296 §2.21.3: a malformed request ends the IKE SA on both sides; its
// answer is repeated for a while.
#[test]
fn a_malformed_request_is_fatal_and_says_so() {
    for inside in [&[0, 0, 0, 3][..], &[0, 0, 0, 200], &[41, 0, 0, 8, 0, 0, 0, 0]] {
        let mut w = World::new();
        let mut p = Puppet::new(&mut w);
        p.establish(&mut w);
        let bytes = p.seal_raw(ExchangeType::INFORMATIONAL, 2, 41, inside);
        let answer = say(&mut w, &bytes).unwrap();
        assert_eq!(p.read(&answer).1, [NotifyType::INVALID_SYNTAX]);
        assert!(!established(&w) && w.sides[B].plane.sas.is_empty());
        assert_eq!(say(&mut w, &bytes), Some(answer));
        w.run(Duration::from_secs(16));
        assert!(w.snapshot(B).is_empty());
    }
}

// security.md 6: public values that are wrong, in both exchanges that have them.
#[test]
fn bad_public_values_are_refused() {
    let off_curve = [&[4; 32][..], &[5; 32]].concat();
    let bad: [(Group, Vec<u8>); 8] = [
        (Group::X25519, vec![0; 32]),
        (Group::X25519, [vec![1], vec![0; 31]].concat()),
        (Group::X25519, vec![9; 31]),
        (Group::X25519, vec![9; 33]),
        (Group::X25519, Vec::new()),
        (Group::P256, vec![0; 64]),
        (Group::P256, off_curve),
        (Group::P384, vec![255; 96]),
    ];
    let tune = |_: usize, c: &mut EndpointConfig| {
        let c = &mut c.connections[0];
        c.ike_proposals =
            proposal::parse_ike(&["aes256gcm16-prfsha384-x25519-ecp256-ecp384"]).unwrap();
        c.children[0].esp_proposals =
            proposal::parse_esp(&["aes256gcm16-x25519-ecp256-ecp384", "aes256gcm16"]).unwrap();
    };
    for (group, value) in &bad {
        let id = GroupId(group.transform_id());
        let mut w = World::tuned(tune);
        let ours = proposal::parse_ike(&["aes256gcm16-prfsha384-x25519-ecp256-ecp384"]).unwrap();
        let first = header(IkeSpi(5), IkeSpi(0), ExchangeType::IKE_SA_INIT, 0);
        let mut b = MessageBuilder::clear(&first);
        b.push(&Payload::Sa(proposal::ike_payload(&ours, Spi::None)))
            .push(&Payload::Ke(KeyExchange { group: id, data: value }))
            .push(&Payload::Nonce(&[7; 32]));
        claim_nat(&mut b);
        assert!(say(&mut w, &b.finish().unwrap()).is_none());
        assert!(w.snapshot(B).is_empty());
        assert_eq!(w.sides[B].ike.counters().bad_crypto, 1);

        let mut p = Puppet::new(&mut w);
        p.establish(&mut w);
        let esp = proposal::parse_esp(&["aes256gcm16-x25519-ecp256-ecp384"]).unwrap();
        let sas = w.sides[B].plane.sas.len();
        let bytes = p.seal(
            ExchangeType::CREATE_CHILD_SA,
            2,
            &[
                Payload::Sa(proposal::esp_payload(&esp, EspSpi(0x8888), true)),
                Payload::Nonce(&[8; 32]),
                Payload::Ke(KeyExchange { group: id, data: value }),
                Payload::TsI(ts("10.1.0.0/24")),
                Payload::TsR(ts("10.2.0.0/24")),
            ],
        );
        let answer = say(&mut w, &bytes).unwrap();
        assert_eq!(p.read(&answer).1, [NotifyType::NO_PROPOSAL_CHOSEN]);
        assert_eq!(w.sides[B].plane.sas.len(), sas);
        assert!(established(&w), "the exchange fails, not the IKE SA");
    }
}

// Rekeying and deleting what does not exist; deleting what is not ours.
// security.md, statement 5.
#[test]
fn requests_about_unknown_sas() {
    let mut w = World::new();
    let mut p = Puppet::new(&mut w);
    p.establish(&mut w);
    let rekey = Notify::about(NotifyType::REKEY_SA, EspSpi(0xdead), &[]);
    let bytes = p.seal(
        ExchangeType::CREATE_CHILD_SA,
        2,
        &[
            Payload::Notify(rekey),
            esp_offer(),
            Payload::Nonce(&[8; 32]),
            Payload::TsI(ts("10.1.0.0/24")),
            Payload::TsR(ts("10.2.0.0/24")),
        ],
    );
    let answer = say(&mut w, &bytes).unwrap();
    assert_eq!(p.read(&answer).1, [NotifyType::CHILD_SA_NOT_FOUND]);
    for delete in [
        Delete::Esp(vec![EspSpi(0xdead)]),
        Delete::Esp(Vec::new()),
        Delete::Ah(vec![EspSpi(0x7777)]),
        // Our own inbound SPI, not the peer's.
        Delete::Esp(w.sides[B].plane.sas.keys().copied().collect()),
    ] {
        let id = 3 + w.sent.iter().filter(|(_, t)| t.bytes[18] == 37).count() as u32;
        let bytes = p.seal(ExchangeType::INFORMATIONAL, id, &[Payload::Delete(delete)]);
        let answer = say(&mut w, &bytes).unwrap();
        assert!(p.read(&answer).0.is_empty());
    }
    assert!(established(&w) && w.sides[B].plane.sas.len() == 1);
}

// Thousands of damaged insides, rightly sealed: every one is answered or ends
// the IKE SA in order; nothing panics, spins, or leaks an SPI.
#[test]
fn damaged_insides() {
    let mut dice = rng(99);
    let mut closed = 0;
    for seed in 0..300u64 {
        let mut w = World::new();
        let mut p = Puppet::new(&mut w);
        p.establish(&mut w);
        let mut id = 2;
        while id < 22 {
            let mut b =
                MessageBuilder::clear(&header(p.spi, p.peer, ExchangeType::CREATE_CHILD_SA, id));
            let esp = proposal::parse_esp(&["aes256gcm16-x25519"]).unwrap();
            let eph = Ephemeral::generate(Group::X25519, &mut dice);
            b.push(&Payload::Sa(proposal::esp_payload(&esp, EspSpi(0x9000 + id), true)))
                .push(&Payload::Nonce(&[9; 32]))
                .push(&Payload::Ke(KeyExchange { group: GroupId::X25519, data: &eph.public() }))
                .push(&Payload::TsI(ts("10.1.0.0/24")))
                .push(&Payload::TsR(ts("10.2.0.0/24")))
                .push(&Payload::Delete(Delete::Esp(vec![EspSpi(0x7777)])));
            let mut inside = b.finish().unwrap().split_off(28);
            for _ in 0..=dice.next_u32() % 4 {
                let at = dice.next_u32() as usize % inside.len();
                inside[at] = dice.next_u32() as u8;
            }
            inside.truncate(inside.len() - dice.next_u32() as usize % 3);
            let exchange = [ExchangeType::CREATE_CHILD_SA, ExchangeType::INFORMATIONAL]
                [dice.next_u32() as usize % 2];
            let bytes = p.seal_raw(exchange, id, 33, &inside);
            let answer = say(&mut w, &bytes);
            assert!(answer.is_some(), "seed {seed}: a request without answer");
            id += 1;
            if !established(&w) {
                closed += 1;
                break;
            }
        }
        w.run(Duration::from_secs(400));
        assert!(w.snapshot(B).is_empty(), "the puppet is silent, so nothing may remain");
        assert!(w.sides[B].spis.taken.is_empty());
    }
    assert!(closed > 50, "{closed}");
}

// security.md, "Under attack": before the cookie no reply is longer than its
// request, so the very shortest requests get none.
#[test]
fn a_tiny_first_message_is_not_amplified() {
    let mut w = World::tuned(|_, c| c.limits.cookie_total = 0);
    for nonce in [16, 64] {
        let mut b =
            MessageBuilder::clear(&header(IkeSpi(5), IkeSpi(0), ExchangeType::IKE_SA_INIT, 0));
        let empty = Proposal {
            number: 1,
            protocol: wire::ike::ProtocolId::IKE,
            spi: Spi::None,
            transforms: Vec::new(),
        };
        b.push(&Payload::Sa(vec![empty]))
            .push(&Payload::Ke(KeyExchange { group: GroupId::X25519, data: &[] }))
            .push(&Payload::Nonce(&vec![7; nonce]));
        let request = b.finish().unwrap();
        let answer = say(&mut w, &request);
        assert!(answer.as_ref().is_none_or(|a| a.len() <= request.len()));
        assert_eq!(answer.is_some(), nonce == 64);
    }
}

/// Plays side B by hand towards a real side A that initiates.
struct Responder {
    spi: IkeSpi,
    peer: IkeSpi,
    keys: IkeKeys,
    auth: AuthKeys,
    init: Vec<u8>,
    ni: Vec<u8>,
    iv: u64,
}

impl Responder {
    /// A has sent IKE_SA_INIT; answers it and gives A's IKE_AUTH back.
    fn new(w: &mut World) -> Self {
        let request = w.take(B).packet.bytes;
        let message = Message::parse(&request).unwrap();
        let mut r = rng(4712);
        let eph = Ephemeral::generate(Group::X25519, &mut r);
        let spi = IkeSpi(0xbbbb);
        let head = Header { responder_spi: spi, ..message.header.to_response() };
        let suite = proposal::IkeSuite {
            aead: AeadAlg::Aes256Gcm16,
            prf: PrfAlg::HmacSha384,
            group: Group::X25519,
        };
        let public = eph.public();
        let mut b = MessageBuilder::clear(&head);
        b.push(&Payload::Sa(proposal::ike_answer(1, suite, Spi::None)))
            .push(&Payload::Ke(KeyExchange { group: GroupId::X25519, data: &public }))
            .push(&Payload::Nonce(&[6; 32]));
        claim_nat(&mut b);
        let init = b.finish().unwrap();
        let ni = message.payloads.nonce().unwrap().to_vec();
        let peer = message.header.initiator_spi;
        let shared = eph.agree(message.payloads.ke().unwrap().data).unwrap();
        let x = Exchange { ni: &ni, nr: &[6; 32], spi_i: peer, spi_r: spi };
        let (keys, auth) =
            Skeyseed::initial(suite.prf, &x, &shared).expand(suite.prf, suite.aead, &x).unwrap();
        let this = Self { spi, peer, keys, auth, init, ni, iv: 0 };
        this.say(w, &this.init);
        w.take(B);
        this
    }

    fn say(&self, w: &mut World, bytes: &[u8]) {
        let at = |n: usize| SocketAddr::new(ip(n), 500);
        w.with_side(A, |ike, cx| ike.handle_datagram(cx, at(B), at(A), bytes));
    }

    /// Answers IKE_AUTH with these payloads after IDr and a correct AUTH.
    fn finish(&mut self, w: &mut World, more: &[Payload<'_>]) {
        let id: Identity = "gw1.example".parse().unwrap();
        let body = id.payload().body();
        let signed = Signed { message: &self.init, nonce: &self.ni, id_body: &body };
        let psk = Secret::from_slice(b"the secret of both");
        let mac = self.auth.psk_auth(&psk, false, &signed);
        let head = Header {
            initiator_spi: self.peer,
            responder_spi: self.spi,
            exchange: ExchangeType::IKE_AUTH,
            from_initiator: false,
            response: true,
            message_id: MessageId(1),
        };
        let mut b = MessageBuilder::sealed(&head);
        b.push(&Payload::IdR(id.payload()))
            .push(&Payload::Auth(Auth { method: AuthMethod::SHARED_KEY, data: mac.expose() }));
        for p in more {
            b.push(p);
        }
        self.iv += 1;
        let key = AeadKey::new(self.keys.aead, self.keys.sk_er.expose()).unwrap();
        let seal = |iv, aad: &[u8], text: &mut [u8]| key.seal_in_place(iv, aad, text);
        let bytes = b.finish().unwrap().seal(self.iv.to_be_bytes(), seal).unwrap();
        self.say(w, &bytes);
    }
}

// RFC 7296 §2.9, §2.7: an answer that is no subset of the offer makes no Child
// SA; the IKE SA stays, and the peer is told to delete its half.
// security.md, statement 14.
#[test]
fn answers_that_were_not_offered() {
    let answer = |text: &str| {
        let suite = text.parse::<proposal::EspProposal>().unwrap();
        let suite =
            proposal::EspSuite { aead: suite.aeads[0], group: suite.groups.first().copied() };
        Payload::Sa(proposal::esp_answer(1, suite, EspSpi(0x7777)))
    };
    let (i, r) = (|t: &str| Payload::TsI(ts(t)), |t: &str| Payload::TsR(ts(t)));
    let good = answer("aes256gcm16");
    for (case, payloads, fits) in [
        ("all right", vec![good.clone(), i("10.1.0.0/24"), r("10.2.0.0/24")], true),
        ("narrower", vec![good.clone(), i("10.1.0.9/32"), r("10.2.0.0/25")], true),
        ("wider here", vec![good.clone(), i("10.0.0.0/8"), r("10.2.0.0/24")], false),
        ("wider there", vec![good.clone(), i("10.1.0.0/24"), r("0.0.0.0/0")], false),
        ("elsewhere", vec![good.clone(), i("10.1.0.0/24"), r("10.9.0.0/24")], false),
        ("no selectors", vec![good.clone(), i("10.1.0.0/24")], false),
        (
            "other cipher",
            vec![answer("chacha20poly1305"), i("10.1.0.0/24"), r("10.2.0.0/24")],
            false,
        ),
        ("a group", vec![answer("aes256gcm16-ecp256"), i("10.1.0.0/24"), r("10.2.0.0/24")], true),
    ] {
        let mut w = World::new();
        w.initiate(A);
        let mut p = Responder::new(&mut w);
        p.finish(&mut w, &payloads);
        let status = w.sides[A].ike.status(w.now);
        assert_eq!(status.ike_sas[0].state, "established", "{case}");
        assert_eq!(w.sides[A].plane.sas.len(), usize::from(fits), "{case}");
        // The Delete for the half that the peer holds.
        assert_eq!(w.wire.len(), usize::from(!fits), "{case}");
    }
}

// RFC 6311 §5.1: a synchronisation whose M1 is not above the last one's does
// nothing, even if it is another message.
#[test]
fn a_second_sync_with_the_same_ids_is_dropped() {
    let mut w = World::new();
    let mut p = Puppet::new(&mut w);
    let mac = p.mac();
    let id: Identity = "gw0.example".parse().unwrap();
    let supported = Notify::new(NotifyType::IKEV2_MESSAGE_ID_SYNC_SUPPORTED, &[]);
    let bytes = p.seal(
        ExchangeType::IKE_AUTH,
        1,
        &[
            Payload::IdI(id.payload()),
            Payload::Auth(Auth { method: AuthMethod::SHARED_KEY, data: &mac }),
            Payload::Notify(supported),
        ],
    );
    say(&mut w, &bytes).unwrap();
    let sync = |p: &mut Puppet, nonce: u8, m1: u8| {
        let data = [[nonce; 4], [0, 0, 1, m1], [0; 4]].concat();
        let notify = Notify::new(NotifyType::IKEV2_MESSAGE_ID_SYNC, &data);
        p.seal(ExchangeType::INFORMATIONAL, 0, &[Payload::Notify(notify)])
    };
    let first = sync(&mut p, 1, 2);
    let answer = say(&mut w, &first).expect("agreed");
    let before = w.snapshot(B);
    let second = sync(&mut p, 2, 2);
    assert!(say(&mut w, &second).is_none());
    let lower = sync(&mut p, 3, 1);
    assert!(say(&mut w, &lower).is_none());
    assert_eq!(say(&mut w, &first), Some(answer), "a repetition gets the same bytes");
    assert_eq!(w.snapshot(B), before);
}

// security.md, statement 11: a peer that comes anew again and again, without INITIAL_CONTACT, at limit - 1, limit and
// limit + 1. The IKE SA that was silent longest makes room, and its Child SA with it.
#[test]
fn established_ike_sas_of_a_connection_are_bounded() {
    let limit = 3;
    let mut w = World::tuned(|_, c| c.limits.ike_per_connection = limit);
    let mut spis = Vec::new();
    for n in 1..=limit + 2 {
        // Reauthentication must not wait for a cookie.
        w.run(Duration::from_secs(1));
        let mut p = Puppet::with_spi(&mut w, IkeSpi(0xaaa0 + n as u64));
        if n > limit {
            let bytes = p.authenticate();
            w.with_side(B, |ike, cx| {
                ike.handle_datagram(
                    cx,
                    SocketAddr::new(ip(A), 500),
                    SocketAddr::new(ip(B), 500),
                    &bytes,
                );
            });
            // The answer, and one Delete for the IKE SA that went.
            let left: Vec<ExchangeType> = w
                .wire
                .drain(..)
                .map(|f| Message::parse(&f.packet.bytes).unwrap().header.exchange)
                .collect();
            assert_eq!(left.len(), 2);
            assert!(left.contains(&ExchangeType::INFORMATIONAL), "{left:?}");
        } else {
            p.establish(&mut w);
        }
        spis.push(p.peer);
        let status = w.sides[B].ike.status(w.now);
        let here: BTreeSet<IkeSpi> = status.ike_sas.iter().map(|s| s.spi).collect();
        let newest = spis.iter().rev().take(limit).copied().collect();
        assert_eq!(here, newest, "after {n}");
        assert_eq!(w.sides[B].plane.sas.len(), n.min(limit), "after {n}");
    }
    let crowded =
        |e: &&Event| matches!(e, Event::Deleted { reason: crate::DeleteReason::Crowded, .. });
    assert_eq!(w.sides[B].events.iter().filter(crowded).count(), 2);
}

// security.md, statement 11: Child SAs of one IKE SA at limit - 1, limit and limit + 1.
#[test]
fn child_sas_of_an_ike_sa_are_bounded() {
    let mut w = World::tuned(|_, c| c.limits.children_per_ike = 3);
    let mut p = Puppet::new(&mut w);
    p.establish(&mut w);
    let group = Ephemeral::generate(Group::X25519, &mut rng(5)).public();
    for n in 2..=5_u32 {
        let ours = proposal::parse_esp(&["aes256gcm16-x25519"]).unwrap();
        let offer = Payload::Sa(proposal::esp_payload(&ours, EspSpi(0x7777 + n), true));
        let ke = Payload::Ke(KeyExchange { group: GroupId::X25519, data: &group });
        let (tsi, tsr) = (Payload::TsI(ts("10.1.0.0/24")), Payload::TsR(ts("10.2.0.0/24")));
        let all = [offer, Payload::Nonce(&[9; 32]), ke, tsi, tsr];
        let bytes = p.seal(ExchangeType::CREATE_CHILD_SA, n, &all);
        let answer = say(&mut w, &bytes).unwrap();
        let (kinds, errors) = p.read(&answer);
        if n <= 3 {
            assert!(errors.is_empty() && kinds.contains(&PayloadType::SA), "{n}: {errors:?}");
        } else {
            assert_eq!(errors, [NotifyType::NO_ADDITIONAL_SAS], "{n}");
        }
        assert_eq!(w.sides[B].plane.sas.len(), n.min(3) as usize);
        assert!(established(&w));
    }
}
