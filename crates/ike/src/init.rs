//! IKE_SA_INIT in both roles (RFC 7296 §1.2, §2.6, §2.7, §2.21.1).
//!
//! ```text
//!  initiator                                 responder
//!  InitSent: HDR(A,0), SAi1, KEi, Ni  ──►    cookie check, limits
//!            ◄── HDR(A,0), N(COOKIE)         (no state)
//!            ◄── HDR(A,0), N(INVALID_KE…)    (no state)
//!            ◄── HDR(A,B), SAr1, KEr, Nr     InitAnswered
//!  AuthSent (see auth.rs)
//! ```
//!
//! Nothing here is authentic: a response that does not lead on is ignored, and
//! the request goes on being repeated until it is given up (§2.21.1).

use core::net::{IpAddr, SocketAddr};

use crypto::{
    dh::{Ephemeral, Group},
    hash::sha256,
};
use wire::{
    id::{IkeSpi, MessageId},
    ike::{
        ExchangeType, GroupId, Header, KeyExchange, Message, MessageBuilder, Notify, NotifyType,
        Payload, Payloads, ProtocolId, Spi,
    },
};

use crate::{
    auth,
    config::ConnectionConfig,
    cookie::{Claim, Cookies},
    error::Error,
    event::{Event, Failure, Side, What, some_of},
    keys::{Exchange, Key, Skeyseed},
    nat,
    proposal::{self, IkeProposal, choose_ike, offers},
    record::Bytes,
    state::{Eph, IkeSa, InitAnswered, InitSent, Outstanding, Path, Phase},
    step::Step,
};

/// Requests changed by COOKIE or INVALID_KE_PAYLOAD before we stop obeying.
const MAX_ROUNDS: u8 = 6;

/// Answers an IKE_SA_INIT request that is not a repetition.
pub(crate) fn answer(
    step: &mut Step<'_, '_>,
    cookies: &mut Cookies,
    datagram: &[u8],
    message: &Message<'_>,
    from: SocketAddr,
    to: SocketAddr,
) -> Result<(), Error> {
    let header = message.header;
    let payloads = &message.payloads;
    if message.sealed.is_some() || payloads.doubled().is_some() {
        return Err(Error::NotExpected);
    }
    // security.md 2: a missing mandatory payload. There is no key to answer
    // INVALID_SYNTAX with (RFC 7296 §3.10.1), so silence.
    let (Some(proposals), Some(ke), Some(ni)) = (payloads.sa(), payloads.ke(), payloads.nonce())
    else {
        return Err(Error::NotExpected);
    };

    let limits = *step.limits();
    let (of_source, in_all) = step.table.half_open(from.ip());
    let claim = Claim { nonce: ni, from, spi: header.initiator_spi };
    if of_source >= limits.cookie_per_source || in_all >= limits.cookie_total {
        let returned = payloads.notify(NotifyType::COOKIE);
        if !returned.is_some_and(|n| cookies.check(n.data, &claim, step.cx.now, &limits)) {
            let cookie = cookies.make(&claim, step.cx.now, &limits, step.cx.rng);
            return refuse(step, datagram, &header, from, to, NotifyType::COOKIE, &cookie);
        }
    }
    if of_source >= limits.half_open_per_source || in_all >= limits.half_open_total {
        return Err(Error::Limit);
    }

    let candidates = step.registry.candidates(to.ip(), from.ip());
    let first = candidates.clone().next();
    if first.is_none() {
        let all = step.registry.config.connections.iter();
        let known = some_of(all.map(|c| c.remote_address.to_string()), " or ");
        let sent = format!("IKE_SA_INIT to {} from {}", to.ip(), from.ip());
        let expected = format!("remote_address {known}");
        step.event(unfit(first, from, What::Address, sent, expected));
        return refuse(step, datagram, &header, from, to, NotifyType::NO_PROPOSAL_CHOSEN, &[]);
    }
    let theirs = offers(proposals, ProtocolId::IKE);
    let sent = Group::from_transform_id(ke.group.0);
    let choice = candidates.clone().find_map(|c| choose_ike(&c.ike_proposals, &theirs, sent));
    let Some((offer, suite)) = choice else {
        let ours = candidates.flat_map(|c| &c.ike_proposals).map(IkeProposal::to_string);
        let sent = format!("ike_proposals {}", proposal::describe(proposals));
        let expected = format!("any of {}", some_of(ours, ", "));
        step.event(unfit(first, from, What::IkeProposal, sent, expected));
        return refuse(step, datagram, &header, from, to, NotifyType::NO_PROPOSAL_CHOSEN, &[]);
    };
    if sent != Some(suite.group) {
        // RFC 7296 §1.2: name the group we want; nothing is kept.
        let want = suite.group.transform_id().to_be_bytes();
        return refuse(step, datagram, &header, from, to, NotifyType::INVALID_KE_PAYLOAD, &want);
    }

    // Until IKE_AUTH names the connection, the best candidate decides.
    let encap = first.map_or(crate::Encap::Auto, |c| c.encap);
    let detected = nat::detect(payloads, header.initiator_spi, header.responder_spi, from, to);

    let eph = Ephemeral::generate(suite.group, step.cx.rng);
    let shared = eph.agree(ke.data)?;
    let spi = step.new_ike_spi();
    let nr = step.nonce();
    let x = Exchange { ni, nr: &nr, spi_i: header.initiator_spi, spi_r: spi };
    let (keys, auth) =
        Skeyseed::initial(suite.prf, &x, &shared).expand(suite.prf, suite.aead, &x)?;

    let source = nat::source_digest(encap, header.initiator_spi, spi, to);
    let destination = nat::digest(header.initiator_spi, spi, from);
    let response_header = Header { responder_spi: spi, ..header.to_response() };
    let mut builder = MessageBuilder::clear(&response_header);
    let public = eph.public();
    builder
        .push(&Payload::Sa(proposal::ike_answer(offer.number, suite, Spi::None)))
        .push(&Payload::Ke(KeyExchange { group: ke.group, data: &public }))
        .push(&Payload::Nonce(&nr))
        .push(&Payload::Notify(Notify::new(NotifyType::NAT_DETECTION_SOURCE_IP, &source)))
        .push(&Payload::Notify(Notify::new(
            NotifyType::NAT_DETECTION_DESTINATION_IP,
            &destination,
        )));
    let response = builder.finish()?;

    let path = Path {
        local: to,
        remote: from,
        nat_here: detected.here,
        nat_there: detected.there,
        encap: nat::encapsulate(encap, detected),
    };
    let sa = IkeSa {
        spi,
        peer_spi: header.initiator_spi,
        initiator: false,
        connection: None,
        path,
        since: step.now(),
        phase: Phase::InitAnswered(InitAnswered {
            request: datagram.into(),
            response: response.as_slice().into(),
            ni: ni.into(),
            nr: nr.into(),
            keys: keys.clone(),
            auth,
            group: suite.group,
            natt: detected.supported,
            term: Some(step.term),
        }),
    };
    step.log_ike_keys(&sa, &keys);
    step.put(sa);
    step.transmit(to, from, response);
    Ok(())
}

/// A peer's IKE_SA_INIT fits none of the connections that it may mean.
fn unfit(
    first: Option<&ConnectionConfig>,
    peer: SocketAddr,
    what: What,
    sent: String,
    expected: String,
) -> Event {
    let connection = first.map(|c| c.name.clone());
    let (began, sender) = (Side::Peer, Side::Peer);
    Event::Failed(Failure { connection, child: None, peer, what, began, sender, sent, expected })
}

/// An answer in clear that keeps no state and is never longer than the request
/// (security.md, "Under attack").
fn refuse(
    step: &mut Step<'_, '_>,
    datagram: &[u8],
    header: &Header,
    from: SocketAddr,
    to: SocketAddr,
    kind: NotifyType,
    data: &[u8],
) -> Result<(), Error> {
    let mut builder = MessageBuilder::clear(&header.to_response());
    builder.push(&Payload::Notify(Notify::new(kind, data)));
    let bytes = builder.finish()?;
    if bytes.len() > datagram.len() {
        return Err(Error::Limit);
    }
    step.transmit(to, from, bytes);
    Ok(())
}

/// Begins an IKE SA. `wanted` names the children; the first goes into IKE_AUTH.
pub(crate) fn start(
    step: &mut Step<'_, '_>,
    conn: &ConnectionConfig,
    remote: IpAddr,
    wanted: Vec<String>,
    fresh: bool,
) -> Result<IkeSpi, Error> {
    let group = conn
        .ike_proposals
        .first()
        .and_then(|p| p.groups.first())
        .ok_or(Error::Internal("connection without proposals"))?;
    let spi = step.new_ike_spi();
    let path = Path {
        local: SocketAddr::new(conn.local_address, 500),
        remote: SocketAddr::new(remote, 500),
        nat_here: false,
        nat_there: false,
        encap: false,
    };
    let nonce = step.nonce();
    let sa = IkeSa {
        spi,
        peer_spi: IkeSpi::ZERO,
        initiator: true,
        connection: Some(conn.name.clone()),
        path,
        since: step.now(),
        phase: request(
            step,
            conn,
            spi,
            &path,
            Asked {
                group: *group,
                nonce: nonce.into(),
                cookie: None,
                rounds: 0,
                eph: None,
                fresh,
                complained: false,
                wanted,
            },
        )?,
    };
    step.put(sa);
    Ok(spi)
}

/// What one IKE_SA_INIT request is made from.
struct Asked {
    group: Group,
    nonce: Bytes,
    cookie: Option<Bytes>,
    rounds: u8,
    eph: Option<Eph>,
    fresh: bool,
    complained: bool,
    wanted: Vec<String>,
}

fn request(
    step: &mut Step<'_, '_>,
    conn: &ConnectionConfig,
    spi: IkeSpi,
    path: &Path,
    asked: Asked,
) -> Result<Phase, Error> {
    let key = match &asked.eph {
        Some(eph) => Ephemeral::from_secret_bytes(eph.group, eph.secret.expose())?,
        None => Ephemeral::generate(asked.group, step.cx.rng),
    };
    let header = Header {
        initiator_spi: spi,
        responder_spi: IkeSpi::ZERO,
        exchange: ExchangeType::IKE_SA_INIT,
        from_initiator: true,
        response: false,
        message_id: MessageId(0),
    };
    let source = nat::source_digest(conn.encap, spi, IkeSpi::ZERO, path.local);
    let destination = nat::digest(spi, IkeSpi::ZERO, path.remote);
    let public = key.public();
    let mut builder = MessageBuilder::clear(&header);
    if let Some(cookie) = &asked.cookie {
        // RFC 7296 §2.6: the cookie is the first payload.
        builder.push(&Payload::Notify(Notify::new(NotifyType::COOKIE, cookie)));
    }
    builder
        .push(&Payload::Sa(proposal::ike_payload(&conn.ike_proposals, Spi::None)))
        .push(&Payload::Ke(KeyExchange {
            group: GroupId(key.group().transform_id()),
            data: &public,
        }))
        .push(&Payload::Nonce(&asked.nonce))
        .push(&Payload::Notify(Notify::new(NotifyType::NAT_DETECTION_SOURCE_IP, &source)))
        .push(&Payload::Notify(Notify::new(
            NotifyType::NAT_DETECTION_DESTINATION_IP,
            &destination,
        )));
    let bytes = builder.finish()?;
    step.send(path, bytes.clone());
    Ok(Phase::InitSent(InitSent {
        request: Outstanding { id: 0, bytes: bytes.into(), sent_at: step.now(), sent: 1 },
        eph: Eph { group: key.group(), secret: Key::new(key.to_secret_bytes()) },
        nonce: asked.nonce,
        cookie: asked.cookie,
        rounds: asked.rounds,
        fresh: asked.fresh,
        complained: asked.complained,
        wanted: asked.wanted,
    }))
}

/// Acts on a response to our IKE_SA_INIT request.
pub(crate) fn finish(
    step: &mut Step<'_, '_>,
    mut sa: IkeSa,
    sent: InitSent,
    datagram: &[u8],
    message: &Message<'_>,
    from: SocketAddr,
    to: SocketAddr,
) -> Result<(), Error> {
    let conn = step.connection(&sa)?;
    let header = message.header;
    let payloads = &message.payloads;
    let expected = header.exchange == ExchangeType::IKE_SA_INIT
        && header.response
        && header.message_id == MessageId(0)
        && from.ip() == sa.path.remote.ip()
        && message.sealed.is_none()
        && payloads.doubled().is_none();
    if !expected {
        return Err(Error::NotExpected);
    }
    if payloads.sa().is_none() {
        return refused(step, conn, sa, sent, payloads);
    }
    let (Some(proposals), Some(ke), Some(nr)) = (payloads.sa(), payloads.ke(), payloads.nonce())
    else {
        return Err(Error::NotExpected);
    };
    // RFC 7296 §2.7: one proposal, one transform of each type, out of ours.
    let theirs = offers(proposals, ProtocolId::IKE);
    let suite = match (proposals.as_slice(), theirs.as_slice()) {
        ([_], [offer]) if offer.is_single() => {
            choose_ike(&conn.ike_proposals, &theirs, Some(sent.eph.group)).map(|(_, suite)| suite)
        }
        _ => None,
    };
    let suite = suite
        .filter(|s| s.group == sent.eph.group && ke.group.0 == s.group.transform_id())
        .ok_or(Error::NotExpected)?;
    if header.responder_spi.is_zero() {
        return Err(Error::NotExpected);
    }
    let detected = nat::detect(payloads, sa.spi, header.responder_spi, from, to);
    let eph = Ephemeral::from_secret_bytes(sent.eph.group, sent.eph.secret.expose())?;
    let shared = eph.agree(ke.data)?;
    let x = Exchange { ni: &sent.nonce, nr, spi_i: sa.spi, spi_r: header.responder_spi };
    let (keys, auth) =
        Skeyseed::initial(suite.prf, &x, &shared).expand(suite.prf, suite.aead, &x)?;

    sa.peer_spi = header.responder_spi;
    sa.path.nat_here = detected.here;
    sa.path.nat_there = detected.there;
    sa.path.encap = nat::encapsulate(conn.encap, detected);
    // RFC 7296 §2.23: with a NAT (or the claim of one) everything else goes
    // over port 4500.
    if detected.supported && (sa.path.encap || detected.here || detected.there) {
        sa.path.local.set_port(nat::NATT_PORT);
        sa.path.remote.set_port(nat::NATT_PORT);
    }
    step.log_ike_keys(&sa, &keys);
    auth::request(
        step,
        conn,
        sa,
        sent,
        auth::Agreed {
            keys,
            auth,
            group: suite.group,
            nr: nr.into(),
            init_response: datagram.into(),
        },
    )
}

/// A response without SA payload: a cookie, another group, or an error.
fn refused(
    step: &mut Step<'_, '_>,
    conn: &ConnectionConfig,
    mut sa: IkeSa,
    sent: InitSent,
    payloads: &Payloads<'_>,
) -> Result<(), Error> {
    let again = |sent: InitSent| Asked {
        group: sent.eph.group,
        nonce: sent.nonce,
        cookie: sent.cookie,
        rounds: sent.rounds + 1,
        eph: Some(sent.eph),
        fresh: sent.fresh,
        complained: sent.complained,
        wanted: sent.wanted,
    };
    let path = sa.path;
    if let Some(cookie) = payloads.notify(NotifyType::COOKIE) {
        // RFC 7296 §2.6: 1 to 64 bytes; repeat the request with it, all else
        // unchanged.
        let fits = (1..=64).contains(&cookie.data.len());
        let known = sent.cookie.as_deref() == Some(cookie.data);
        if !fits || known || sent.rounds >= MAX_ROUNDS {
            return Err(Error::NotExpected);
        }
        let asked = Asked { cookie: Some(cookie.data.into()), ..again(sent) };
        sa.phase = request(step, conn, sa.spi, &path, asked)?;
        step.put(sa);
        return Ok(());
    }
    if let Some(invalid) = payloads.notify(NotifyType::INVALID_KE_PAYLOAD) {
        let group = <[u8; 2]>::try_from(invalid.data)
            .ok()
            .and_then(|id| Group::from_transform_id(u16::from_be_bytes(id)))
            .filter(|g| *g != sent.eph.group)
            // RFC 7296 §2.7: only a group we offered.
            .filter(|g| conn.ike_proposals.iter().any(|p| p.groups.contains(g)));
        return match group {
            Some(group) if sent.rounds < MAX_ROUNDS => {
                let asked = Asked { group, eph: None, ..again(sent) };
                sa.phase = request(step, conn, sa.spi, &path, asked)?;
                step.put(sa);
                Ok(())
            }
            _ => Err(Error::NotExpected),
        };
    }
    let error = payloads.error().ok_or(Error::NotExpected)?;
    let ours: Vec<String> = conn.ike_proposals.iter().map(IkeProposal::to_string).collect();
    let what = match error.kind {
        NotifyType::NO_PROPOSAL_CHOSEN => What::IkeProposal,
        _ => What::Refused,
    };
    let sent_by_us = (what, Side::Us, format!("ike_proposals {}", ours.join(", ")));
    complain(step, conn, sa, sent, sent_by_us, format!("the peer only says {}", error.kind))
}

/// A response that ends our attempt, if it is the peer's. It is not authentic (RFC 7296 §2.21.1), so it is only reported,
/// once, and we keep trying.
fn complain(
    step: &mut Step<'_, '_>,
    conn: &ConnectionConfig,
    mut sa: IkeSa,
    asked: InitSent,
    (what, sender, sent): (What, Side, String),
    expected: String,
) -> Result<(), Error> {
    if asked.complained {
        return Err(Error::NotExpected);
    }
    step.event(Event::Failed(Failure {
        connection: Some(conn.name.clone()),
        child: None,
        peer: sa.path.remote,
        what,
        began: Side::Us,
        sender,
        sent,
        expected,
    }));
    sa.phase = Phase::InitSent(InitSent { complained: true, ..asked });
    step.put(sa);
    Ok(())
}

/// Repeats the answer to a repeated request, or says it was not one.
pub(crate) fn repeated(
    step: &mut Step<'_, '_>,
    datagram: &[u8],
    from: SocketAddr,
    to: SocketAddr,
) -> bool {
    let Some(sa) = step.table.of_init(&sha256(&[datagram])) else { return false };
    if let Phase::InitAnswered(answered) = &sa.phase {
        // Only to where the first answer went: the request could be a copy.
        if sa.path.remote == from {
            let bytes = answered.response.to_vec();
            step.transmit(to, from, bytes);
        }
    }
    true
}
