//! IKE_AUTH in both roles, with pre-shared keys (RFC 7296 §1.2, §2.15, §2.21.2).
//!
//! ```text
//!  AuthSent: SK {IDi, [N(INITIAL_CONTACT)], IDr, AUTH, SAi2, TSi, TSr} ──► InitAnswered
//!  Established ◄── SK {IDr, AUTH, SAr2, TSi, TSr}                          Established
//!  Established ◄── SK {IDr, AUTH, N(error of the child)}                   Established
//!  gone        ◄── SK {N(AUTHENTICATION_FAILED)}                           Closed
//! ```

use core::net::SocketAddr;

use crypto::{ct_eq, dh::Group, hash::sha256};
use wire::ike::{
    Auth, AuthMethod, ExchangeType, Message, MessageBuilder, Notify, NotifyType, Payload, Payloads,
};

use crate::{
    child::{self, Nonces},
    config::ConnectionConfig,
    error::{Error, Refusal},
    established,
    event::{DeleteReason, Event, Failure, Side, What, some_of},
    keys::{AuthKeys, IkeKeys, Signed},
    nat,
    record::Bytes,
    state::{
        Answered, AuthSent, Closed, Established, Fate, IkeSa, InitAnswered, InitSent, NewChild,
        Outstanding, Phase, Wanted,
    },
    step::{self, Step},
};

/// What IKE_SA_INIT gave the initiator.
pub(crate) struct Agreed {
    pub(crate) keys: IkeKeys,
    pub(crate) auth: AuthKeys,
    pub(crate) group: Group,
    pub(crate) nr: Bytes,
    pub(crate) init_response: Bytes,
}

/// Sends IKE_AUTH.
pub(crate) fn request(
    step: &mut Step<'_, '_>,
    conn: &ConnectionConfig,
    mut sa: IkeSa,
    sent: InitSent,
    agreed: Agreed,
) -> Result<(), Error> {
    let first = sent.wanted.first().and_then(|name| conn.children.iter().find(|c| c.name == *name));
    let child = match first {
        Some(config) => Some(NewChild {
            name: config.name.clone(),
            spi_in: step.new_esp_spi(&[])?,
            nonce: Bytes::from(&[][..]),
            eph: None,
            rekeys: None,
            rival: None,
            rounds: 0,
            local_ts: config.local_ts.clone(),
            remote_ts: config.remote_ts.clone(),
        }),
        None => None,
    };
    let id = conn.local_id.payload();
    let mac = agreed.auth.psk_auth(
        &conn.psk,
        true,
        &Signed { message: &sent.request.bytes, nonce: &agreed.nr, id_body: &id.body() },
    );
    let mut builder = MessageBuilder::sealed(&step::header(&sa, ExchangeType::IKE_AUTH, false, 1));
    builder.push(&Payload::IdI(id));
    // RFC 7296 §2.4; peers.md 7: only when it is true, and nobody else has our
    // identity.
    let alone = !step.of_connection(&conn.name).iter().any(|other| other.established().is_some());
    if sent.fresh && alone && conn.initial_contact {
        builder.push(&Payload::Notify(Notify::new(NotifyType::INITIAL_CONTACT, &[])));
    }
    builder
        .push(&Payload::IdR(conn.remote_id.payload()))
        .push(&Payload::Auth(Auth { method: AuthMethod::SHARED_KEY, data: mac.expose() }));
    if let (Some(config), Some(child)) = (first, &child) {
        child::push_offer(&mut builder, config, child, false);
    }
    // RFC 6311 §6.1; peers.md 3.
    builder.push(&Payload::Notify(Notify::new(NotifyType::IKEV2_MESSAGE_ID_SYNC_SUPPORTED, &[])));
    let bytes = step.seal(true, &agreed.keys, step.term, builder)?;
    step.send(&sa.path, bytes.clone());
    sa.phase = Phase::AuthSent(AuthSent {
        request: Outstanding { id: 1, bytes: bytes.into(), sent_at: step.now(), sent: 1 },
        init_response: agreed.init_response,
        ni: sent.nonce,
        nr: agreed.nr,
        keys: agreed.keys,
        auth: agreed.auth,
        group: agreed.group,
        child,
        wanted: sent.wanted,
        term: Some(step.term),
    });
    step.put(sa);
    Ok(())
}

/// Answers IKE_AUTH.
pub(crate) fn answer(
    step: &mut Step<'_, '_>,
    mut sa: IkeSa,
    state: InitAnswered,
    datagram: &[u8],
    message: &Message<'_>,
    from: SocketAddr,
    to: SocketAddr,
) -> Result<(), Error> {
    let header = message.header;
    if header.exchange != ExchangeType::IKE_AUTH || header.response || header.message_id.0 != 1 {
        return Err(Error::NotExpected);
    }
    let opened = step::open(datagram, message, false, &state.keys)?;
    let born = state.term.unwrap_or(step.term);
    // Authentic with the keys of the exchange: now the addresses count, also
    // of a peer that floats to port 4500 here (peers.md 10).
    sa.path.local = to;
    sa.path.remote = from;
    let hash = Bytes::from(&sha256(&[datagram])[..]);
    let header = header.to_response();

    let mut reply = MessageBuilder::sealed(&header);
    let outcome = match opened.payloads() {
        Ok(payloads) => accept(step, &mut sa, &state, &payloads, &mut reply),
        Err(error) => {
            let refusal = Refusal::from(error);
            Err(refusal)
        }
    };
    match outcome {
        Ok(mut established) => {
            let response = step.seal(false, &state.keys, born, reply)?;
            step.send(&sa.path, response.clone());
            established.answered = Some(Answered { request: hash, response: response.into() });
            established.init_hash = Some(Bytes::from(&sha256(&[&state.request])[..]));
            sa.since = step.now();
            sa.phase = Phase::Established(Box::new(established));
            let conn = step.connection(&sa)?;
            established::supersede_doubtful(step, conn, &sa);
            established::make_room(step, conn, &sa)?;
            established::advance(step, &mut sa)?;
        }
        Err(refusal) => {
            // The peer learns why, also when the answer is lost and it asks
            // again: the refusal stays until the half-open time-out.
            let mut reply = MessageBuilder::sealed(&header);
            reply.push(&Payload::Notify(Notify::new(refusal.kind, &refusal.data)));
            let response = step.seal(false, &state.keys, born, reply)?;
            step.send(&sa.path, response.clone());
            sa.connection = None;
            sa.phase = Phase::Closed(Closed {
                answered: Answered { request: hash, response: response.into() },
                until: sa.since.after(step.limits().half_open_timeout),
                half_open: true,
            });
        }
    }
    step.put(sa);
    Ok(())
}

/// Who the peer is, whether it is, and its first Child SA.
fn accept(
    step: &mut Step<'_, '_>,
    sa: &mut IkeSa,
    state: &InitAnswered,
    payloads: &Payloads<'_>,
    reply: &mut wire::ike::SealedBuilder,
) -> Result<Established, Refusal> {
    let failed = || Refusal::new(NotifyType::AUTHENTICATION_FAILED);
    let id_i = payloads.id_i().ok_or_else(Refusal::syntax)?;
    let (their_id, asked_id) = (id_i.identity(), payloads.id_r().map(|id| id.identity()));
    let peer = sa.path.remote;

    let (here, there) = (sa.path.local.ip(), peer.ip());
    let fits = |c: &&ConnectionConfig| {
        c.local_address == here
            && c.remote_address.matches(there)
            && asked_id.as_ref().is_none_or(|id| *id == c.local_id)
    };
    // The most exact first.
    let fitting = step.registry.with_peer(&their_id).filter(fits);
    let fitting = fitting.min_by_key(|c| c.remote_address.ip().is_none());
    let suite = crate::proposal::IkeSuite {
        aead: state.keys.aead,
        prf: state.keys.prf,
        group: state.group,
    };
    let Some(conn) = fitting else {
        let known = step.registry.candidates(here, there);
        let pairs = known.map(|c| {
            format!("remote_id {} with local_id {} ({})", c.remote_id, c.local_id, c.name)
        });
        let pairs = some_of(pairs, " or ");
        let asked = asked_id.map_or_else(String::new, |id| format!(", asking for IDr {id}"));
        step.event(Event::Failed(Failure {
            connection: None,
            child: None,
            peer,
            what: What::Identity,
            began: Side::Peer,
            sender: Side::Peer,
            sent: format!("IDi {their_id}{asked}"),
            expected: pairs,
        }));
        return Err(failed());
    };
    let fail = |step: &mut Step<'_, '_>, what, sent: String, expected: String| {
        step.event(Event::Failed(Failure {
            connection: Some(conn.name.clone()),
            child: None,
            peer,
            what,
            began: Side::Peer,
            sender: Side::Peer,
            sent,
            expected,
        }));
    };
    // The suite was chosen before the connection was known.
    if !suite.is_in(&conn.ike_proposals) {
        let ours: Vec<String> = conn.ike_proposals.iter().map(ToString::to_string).collect();
        fail(step, What::IkeProposal, format!("{suite}"), ours.join(", "));
        return Err(failed());
    }
    let Some(auth) = payloads.auth() else {
        // RFC 7296 §2.16: no AUTH asks for EAP.
        fail(
            step,
            What::Secret,
            "no AUTH payload (it wants EAP)".to_owned(),
            "a pre-shared key".to_owned(),
        );
        return Err(failed());
    };
    if auth.method != AuthMethod::SHARED_KEY {
        fail(
            step,
            What::Secret,
            format!("authentication method {}", auth.method),
            "a pre-shared key".to_owned(),
        );
        return Err(failed());
    }
    let expected = state.auth.psk_auth(
        &conn.psk,
        true,
        &Signed { message: &state.request, nonce: &state.nr, id_body: &id_i.body() },
    );
    if !ct_eq(expected.expose(), auth.data) {
        fail(
            step,
            What::Secret,
            format!("an AUTH for IDi {their_id} made with another pre-shared key"),
            "the same pre-shared key on both sides".to_owned(),
        );
        return Err(failed());
    }

    sa.connection = Some(conn.name.clone());
    sa.path.encap = nat::keep(conn.encap, sa.path.encap, state.natt);
    let id = conn.local_id.payload();
    let mac = state.auth.psk_auth(
        &conn.psk,
        false,
        &Signed { message: &state.response, nonce: &state.ni, id_body: &id.body() },
    );
    reply
        .push(&Payload::IdR(id))
        .push(&Payload::Auth(Auth { method: AuthMethod::SHARED_KEY, data: mac.expose() }));

    let mut established = establish(step, conn, state.keys.clone(), state.group, state.term);
    established.recv_next = 2;
    established.sync = payloads.notify(NotifyType::IKEV2_MESSAGE_ID_SYNC_SUPPORTED).is_some();
    if payloads.notify(NotifyType::INITIAL_CONTACT).is_some() {
        forget_others(step, conn, sa);
    }
    step.event(Event::Established {
        connection: conn.name.clone(),
        spi: sa.spi,
        peer_spi: sa.peer_spi,
        local: sa.path.local,
        remote: peer,
        suite,
        initiator: false,
    });

    // RFC 7296 §2.21.2: a child that fails does not take the IKE SA with it.
    let nonces = Nonces { ni: &state.ni, nr: &state.nr };
    match child::accept(step, sa, conn, &state.keys, payloads, nonces, None) {
        Ok(made) => {
            child::push_answer(reply, &made);
            let mut child = made.child;
            child.outbound = child::first_use(step, sa, &child.name);
            child::announce(step, sa, conn, &child);
            established.children.push(child);
        }
        Err(refusal) => {
            // INVALID_SYNTAX would take the IKE SA with it.
            let kind = if refusal.fatal { NotifyType::NO_PROPOSAL_CHOSEN } else { refusal.kind };
            reply.push(&Payload::Notify(Notify::new(kind, &refusal.data)));
        }
    }
    if established.sync {
        reply.push(&Payload::Notify(Notify::new(NotifyType::IKEV2_MESSAGE_ID_SYNC_SUPPORTED, &[])));
    }
    Ok(established)
}

/// RFC 7296 §2.4, peers.md 7: INITIAL_CONTACT ends every other IKE SA between
/// the same identities at this endpoint, without a word to the peer.
fn forget_others(step: &mut Step<'_, '_>, conn: &ConnectionConfig, sa: &IkeSa) {
    let same = step.registry.with_peer(&conn.remote_id).filter(|c| c.local_id == conn.local_id);
    let names = same.map(|c| &c.name);
    let old: Vec<(String, wire::id::IkeSpi)> = names
        .flat_map(|name| {
            let others = step.of_connection(name);
            let stale = others.into_iter().filter(|o| o.spi != sa.spi && o.established().is_some());
            stale.map(|o| (name.clone(), o.spi)).collect::<Vec<_>>()
        })
        .collect();
    for (name, spi) in old {
        step.delete(spi);
        step.event(Event::Deleted {
            connection: Some(name),
            spi,
            reason: DeleteReason::InitialContact,
        });
    }
}

/// A fresh established state; message ids are the caller's. `born` is the term in
/// which the keys were made, if that is known and not this one.
pub(crate) fn establish(
    step: &mut Step<'_, '_>,
    conn: &ConnectionConfig,
    keys: IkeKeys,
    group: Group,
    born: Option<u64>,
) -> Established {
    let (rekey_at, expires_at) = child::lifetime(step, &conn.timers, conn.timers.ike_rekey);
    Established {
        keys,
        group,
        send_next: 0,
        request: None,
        recv_next: 0,
        answered: None,
        children: Vec::new(),
        orphans: Vec::new(),
        wanted: Vec::new(),
        rekey_at,
        expires_at,
        heard: step.now(),
        sync: false,
        term: born.unwrap_or(step.term),
        fate: Fate::Live,
        refused_since: None,
        init_hash: None,
        origin: step.now(),
        synced: None,
        synced_m1: 0,
        doubt: false,
    }
}

/// Acts on the response to our IKE_AUTH.
pub(crate) fn finish(
    step: &mut Step<'_, '_>,
    mut sa: IkeSa,
    state: AuthSent,
    datagram: &[u8],
    message: &Message<'_>,
    from: SocketAddr,
    to: SocketAddr,
) -> Result<(), Error> {
    let conn = step.connection(&sa)?;
    let header = message.header;
    if header.exchange != ExchangeType::IKE_AUTH || !header.response || header.message_id.0 != 1 {
        return Err(Error::NotExpected);
    }
    let opened = step::open(datagram, message, true, &state.keys)?;
    let outcome = match opened.payloads() {
        Ok(payloads) => verify(conn, &sa, &state, &payloads).map(|()| payloads),
        Err(error) => Err(Wrong {
            what: What::Protocol,
            sender: Side::Peer,
            sent: format!("an IKE_AUTH response with a {error}"),
            expected: String::new(),
            tell: true,
        }),
    };
    let payloads = match outcome {
        Ok(payloads) => payloads,
        Err(wrong) => {
            if wrong.tell {
                // RFC 7296 §2.21.2: the responder believes the IKE SA is up.
                let mut builder = MessageBuilder::sealed(&step::header(
                    &sa,
                    ExchangeType::INFORMATIONAL,
                    false,
                    2,
                ));
                builder.push(&Payload::Notify(Notify::new(NotifyType::AUTHENTICATION_FAILED, &[])));
                let born = state.term.unwrap_or(step.term);
                let bytes = step.seal(true, &state.keys, born, builder)?;
                step.send(&sa.path, bytes);
            }
            step.event(Event::Failed(Failure {
                connection: Some(conn.name.clone()),
                child: None,
                peer: sa.path.remote,
                what: wrong.what,
                began: Side::Us,
                sender: wrong.sender,
                sent: wrong.sent,
                expected: wrong.expected,
            }));
            step.event(Event::Deleted {
                connection: Some(conn.name.clone()),
                spi: sa.spi,
                reason: DeleteReason::NotEstablished,
            });
            step.delete(sa.spi);
            return Ok(());
        }
    };

    established::follow(step, conn, &mut sa, from, to);
    let mut established = establish(step, conn, state.keys.clone(), state.group, state.term);
    established.send_next = 2;
    established.sync = payloads.notify(NotifyType::IKEV2_MESSAGE_ID_SYNC_SUPPORTED).is_some();
    let now = step.now();
    established.wanted = state
        .wanted
        .iter()
        .filter(|name| state.child.as_ref().is_none_or(|c| c.name != **name))
        .map(|name| Wanted { name: name.clone(), at: now, tries: 0 })
        .collect();
    let suite = established.suite();
    sa.since = now;
    sa.phase = Phase::Established(Box::new(established));
    step.event(Event::Established {
        connection: conn.name.clone(),
        spi: sa.spi,
        peer_spi: sa.peer_spi,
        local: sa.path.local,
        remote: sa.path.remote,
        suite,
        initiator: true,
    });
    if payloads.notify(NotifyType::INITIAL_CONTACT).is_some() {
        forget_others(step, conn, &sa);
    }
    if let Some(new) = state.child {
        let nonces = Nonces { ni: &state.ni, nr: &state.nr };
        child::finish(step, &mut sa, conn, new, &payloads, nonces)?;
    }
    established::supersede_doubtful(step, conn, &sa);
    established::make_room(step, conn, &sa)?;
    established::advance(step, &mut sa)?;
    step.put(sa);
    Ok(())
}

/// Why a response to IKE_AUTH does not authenticate.
struct Wrong {
    what: What,
    sender: Side,
    sent: String,
    expected: String,
    /// The responder is to be told.
    tell: bool,
}

fn verify(
    conn: &ConnectionConfig,
    sa: &IkeSa,
    state: &AuthSent,
    payloads: &Payloads<'_>,
) -> Result<(), Wrong> {
    let (Some(id), Some(auth)) = (payloads.id_r(), payloads.auth()) else {
        let wrong = |what, sent: String, expected: String| Wrong {
            what,
            sender: Side::Us,
            sent,
            expected,
            tell: false,
        };
        return Err(match payloads.error() {
            Some(error) if error.kind == NotifyType::AUTHENTICATION_FAILED => wrong(
                What::Secret,
                format!(
                    "IDi {} asking for IDr {} from {}",
                    conn.local_id,
                    conn.remote_id,
                    sa.path.local.ip()
                ),
                "the identities and the pre-shared key of the peer's configuration \
                 (it only says AUTHENTICATION_FAILED)"
                    .to_owned(),
            ),
            Some(error) => wrong(
                What::Refused,
                "IKE_AUTH".to_owned(),
                format!("the peer only says {}", error.kind),
            ),
            None => Wrong {
                what: What::Protocol,
                sender: Side::Peer,
                sent: "an IKE_AUTH response without IDr or AUTH".to_owned(),
                expected: "both".to_owned(),
                tell: true,
            },
        });
    };
    let identity = id.identity();
    if identity != conn.remote_id {
        return Err(Wrong {
            what: What::Identity,
            sender: Side::Peer,
            sent: format!("IDr {identity}"),
            expected: format!("remote_id {}", conn.remote_id),
            tell: true,
        });
    }
    let expected = state.auth.psk_auth(
        &conn.psk,
        false,
        &Signed { message: &state.init_response, nonce: &state.ni, id_body: &id.body() },
    );
    if auth.method != AuthMethod::SHARED_KEY {
        return Err(Wrong {
            what: What::Secret,
            sender: Side::Peer,
            sent: format!("authentication method {}", auth.method),
            expected: "a pre-shared key".to_owned(),
            tell: true,
        });
    }
    if !ct_eq(expected.expose(), auth.data) {
        return Err(Wrong {
            what: What::Secret,
            sender: Side::Peer,
            sent: format!("an AUTH for IDr {identity} made with another pre-shared key"),
            expected: "the same pre-shared key on both sides".to_owned(),
            tell: true,
        });
    }
    Ok(())
}
