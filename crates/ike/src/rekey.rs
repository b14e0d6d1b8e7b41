//! Rekeying an IKE SA (RFC 7296 §1.3.2, §2.18), and both sides doing it at once
//! (§2.8.2, §2.25.2).
//!
//! ```text
//!  we ask                                    the peer asks
//!  SA(SPI), Ni, KEi ──►                      ──► SA(SPI), Ni, KEi
//!  ◄── SA(SPI), Nr, KEr                      ◄── SA(SPI), Nr, KEr
//!  new one: Live, takes the children         new one: Live, takes the children
//!  old one: Deleting(Rekeyed), D ──►         old one: Replaced, waits for ──► D
//!
//!  both ask: the peer's new one is a Rival without children until our response
//!  is here. The exchange with the lowest nonce loses:
//!    ours lost:    ours: Deleting(Redundant); rival: Live, takes the children;
//!                  old: Replaced (the peer deletes it)
//!    theirs lost:  ours: Live, takes the children; old: Deleting(Rekeyed);
//!                  rival: waits for the peer's D
//!    the peer deletes the old one first, or answers with an error:
//!                  rival: Live, takes the children
//! ```
//! Children move in the same step that decides, so one record holds both ends.

use core::time::Duration;

use crypto::dh::{Ephemeral, Group};
use wire::{
    id::IkeSpi,
    ike::{
        ExchangeType, GroupId, KeyExchange, MessageBuilder, NotifyType, Payload, Payloads,
        Proposal, ProtocolId, SealedBuilder, Spi,
    },
};

use crate::{
    auth,
    child::{self, Nonces},
    config::ConnectionConfig,
    error::{Error, Refusal},
    established,
    event::{DeleteReason, Event, Failure, Side, What},
    keys::{Exchange, Skeyseed},
    proposal::{self, IkeProposal, IkeSuite, choose_ike, offers},
    state::{Eph, Fate, IkeRival, IkeSa, NewIke, Phase, Task},
    step::{self, Step},
};

/// How long the side that has to delete an IKE SA may take before we do.
const DELETE_WITHIN: Duration = Duration::from_secs(30);
/// Key exchange groups tried for one rekeying.
const MAX_ROUNDS: u8 = 3;

/// Whether CREATE_CHILD_SA is about the IKE SA.
pub(crate) fn is_for_ike(proposals: &[Proposal]) -> bool {
    proposals.first().is_some_and(|p| p.protocol == ProtocolId::IKE)
}

/// Asks for a new IKE SA.
pub(crate) fn request(
    step: &mut Step<'_, '_>,
    sa: &IkeSa,
    conn: &ConnectionConfig,
) -> Result<(Vec<u8>, Task), Error> {
    let group = conn
        .ike_proposals
        .first()
        .and_then(|p| p.groups.first())
        .ok_or(Error::Internal("connection without proposals"))?;
    let spi = step.new_ike_spi();
    let nonce = step.nonce().into();
    let eph = child::ephemeral(step, *group);
    send(step, sa, conn, NewIke { spi, nonce, eph, rival: None, rounds: 0 })
}

fn send(
    step: &mut Step<'_, '_>,
    sa: &IkeSa,
    conn: &ConnectionConfig,
    new: NewIke,
) -> Result<(Vec<u8>, Task), Error> {
    let established = sa.established().ok_or(Error::Internal("rekeying of no IKE SA"))?;
    let header = step::header(sa, ExchangeType::CREATE_CHILD_SA, false, established.send_next);
    let mut builder = MessageBuilder::sealed(&header);
    let mut ours = proposal::with_prf(&conn.ike_proposals, established.keys.prf);
    if ours.is_empty() {
        // It was negotiated under another configuration.
        ours.clone_from(&conn.ike_proposals);
    }
    builder
        .push(&Payload::Sa(proposal::ike_payload(&ours, Spi::Ike(new.spi))))
        .push(&Payload::Nonce(&new.nonce));
    child::push_ke(&mut builder, Some(&new.eph));
    let bytes = step.seal(sa.initiator, &established.keys, established.term, builder)?;
    Ok((bytes, Task::Rekey(new)))
}

/// Answers the peer's wish for a new IKE SA.
pub(crate) fn answer(
    step: &mut Step<'_, '_>,
    sa: &mut IkeSa,
    conn: &ConnectionConfig,
    payloads: &Payloads<'_>,
    reply: &mut SealedBuilder,
) -> Result<(), Refusal> {
    let established = sa.established().ok_or_else(Refusal::syntax)?;
    // RFC 7296 §2.25.1, §2.25.2: not while a Child SA is created, rekeyed or
    // closed, nor while the IKE SA is.
    let busy = matches!(
        established.task(),
        Some(Task::Child(_) | Task::DeleteChildren(_) | Task::DeleteIke | Task::Sync(..))
    );
    // security.md 11: each rekeying leaves an old IKE SA until the peer deletes it, or time does.
    let left = |other: &&IkeSa| {
        other.established().is_some_and(|e| matches!(e.fate, Fate::Replaced(_) | Fate::Rival(..)))
    };
    let full = step.of_connection(&conn.name).iter().filter(|other| left(other)).count()
        >= step.limits().ike_per_connection;
    if busy || full || established.fate != Fate::Live {
        return Err(Refusal::temporary());
    }
    let (Some(proposals), Some(ni), Some(ke)) = (payloads.sa(), payloads.nonce(), payloads.ke())
    else {
        return Err(Refusal::syntax());
    };
    let theirs = offers(proposals, ProtocolId::IKE);
    let sent = Group::from_transform_id(ke.group.0);
    let same_prf = proposal::with_prf(&conn.ike_proposals, established.keys.prf);
    let chosen = choose_ike(&same_prf, &theirs, sent)
        .or_else(|| choose_ike(&conn.ike_proposals, &theirs, sent))
        .and_then(|(offer, suite)| Some((offer, suite, offer.spi.ike()?)));
    let Some((offer, suite, peer_spi)) = chosen else {
        let ours: Vec<String> = conn.ike_proposals.iter().map(IkeProposal::to_string).collect();
        step.event(Event::Failed(Failure {
            connection: Some(conn.name.clone()),
            child: None,
            peer: sa.path.remote,
            what: What::IkeProposal,
            began: Side::Peer,
            sender: Side::Peer,
            sent: format!("ike_proposals {}", proposal::describe(proposals)),
            expected: ours.join(", "),
        }));
        return Err(Refusal::new(NotifyType::NO_PROPOSAL_CHOSEN));
    };
    if sent != Some(suite.group) {
        let mut refusal = Refusal::new(NotifyType::INVALID_KE_PAYLOAD);
        refusal.data = suite.group.transform_id().to_be_bytes().to_vec();
        return Err(refusal);
    }
    let eph = Ephemeral::generate(suite.group, step.cx.rng);
    let shared = eph.agree(ke.data).map_err(|_| Refusal::new(NotifyType::NO_PROPOSAL_CHOSEN))?;
    let spi = step.new_ike_spi();
    let nr = step.nonce();
    let x = Exchange { ni, nr: &nr, spi_i: peer_spi, spi_r: spi };
    let mut new =
        successor(step, sa, conn, Ends { spi, peer_spi, initiator: false }, suite, &x, &shared)
            .map_err(|_| Refusal::temporary())?;
    reply
        .push(&Payload::Sa(proposal::ike_answer(offer.number, suite, Spi::Ike(spi))))
        .push(&Payload::Nonce(&nr))
        .push(&Payload::Ke(KeyExchange {
            group: GroupId(suite.group.transform_id()),
            data: &eph.public(),
        }));

    let deadline = step.now().after(DELETE_WITHIN);
    let old_spi = sa.spi;
    let Phase::Established(established) = &mut sa.phase else { return Err(Refusal::syntax()) };
    if let Some(Task::Rekey(own)) = established.request.as_mut().map(|r| &mut r.task) {
        // Both at once: the nonces decide when our own response is here.
        let nonces = Nonces { ni, nr: &nr };
        own.rival = Some(IkeRival { spi, nonce: nonces.lowest().into() });
        if let Phase::Established(e) = &mut new.phase {
            e.fate = Fate::Rival(deadline, old_spi);
        }
    } else {
        established.fate = Fate::Replaced(deadline);
        move_children(sa, &mut new);
        step.event(Event::Rekeyed {
            connection: conn.name.clone(),
            old: old_spi,
            new: spi,
            suite,
            by_us: false,
        });
    }
    step.put(new);
    Ok(())
}

/// SPIs and role in the new IKE SA.
struct Ends {
    spi: IkeSpi,
    peer_spi: IkeSpi,
    initiator: bool,
}

/// The IKE SA that replaces `sa`, without children yet.
fn successor(
    step: &mut Step<'_, '_>,
    sa: &IkeSa,
    conn: &ConnectionConfig,
    ends: Ends,
    suite: IkeSuite,
    x: &Exchange<'_>,
    shared: &crypto::Secret,
) -> Result<IkeSa, Error> {
    let old = sa.established().ok_or(Error::Internal("rekeying of no IKE SA"))?;
    // RFC 7296 §2.18: SKEYSEED by the old PRF, the rest by the new one.
    let (keys, _) = Skeyseed::rekeyed(&old.keys, x, shared).expand(suite.prf, suite.aead, x)?;
    let mut established = auth::establish(step, conn, keys.clone(), suite.group, None);
    established.sync = old.sync;
    established.origin = old.origin;
    let new = IkeSa {
        spi: ends.spi,
        peer_spi: ends.peer_spi,
        initiator: ends.initiator,
        connection: sa.connection.clone(),
        path: sa.path,
        since: step.now(),
        phase: Phase::Established(Box::new(established)),
    };
    step.log_ike_keys(&new, &keys);
    Ok(new)
}

/// RFC 7296 §2.8: the new IKE SA inherits all Child SAs.
fn move_children(old: &mut IkeSa, new: &mut IkeSa) {
    let (Phase::Established(old), Phase::Established(new)) = (&mut old.phase, &mut new.phase)
    else {
        return;
    };
    new.children.append(&mut old.children);
    new.orphans.append(&mut old.orphans);
    new.wanted.append(&mut old.wanted);
}

/// The rival takes over from `sa`. False if it no longer exists.
pub(crate) fn inherit(step: &mut Step<'_, '_>, sa: &mut IkeSa, rival: IkeSpi) -> bool {
    let Some(mut new) = step.get(rival).cloned() else { return false };
    let deadline = step.now().after(DELETE_WITHIN);
    let Phase::Established(established) = &mut new.phase else { return false };
    if !matches!(established.fate, Fate::Rival(_, of) if of == sa.spi) {
        return false;
    }
    established.fate = Fate::Live;
    let suite = established.suite();
    move_children(sa, &mut new);
    if let Phase::Established(old) = &mut sa.phase {
        old.fate = Fate::Replaced(deadline);
    }
    step.event(Event::Rekeyed {
        connection: sa.connection.clone().unwrap_or_default(),
        old: sa.spi,
        new: rival,
        suite,
        by_us: false,
    });
    step.put(new);
    true
}

/// Acts on the response to our wish for a new IKE SA.
pub(crate) fn finish(
    step: &mut Step<'_, '_>,
    sa: &mut IkeSa,
    conn: &ConnectionConfig,
    new: NewIke,
    payloads: &Payloads<'_>,
) -> Result<(), Error> {
    let (Some(proposals), Some(nr), Some(ke)) = (payloads.sa(), payloads.nonce(), payloads.ke())
    else {
        return refused(step, sa, conn, new, payloads);
    };
    let theirs = offers(proposals, ProtocolId::IKE);
    let chosen = match (proposals.as_slice(), theirs.as_slice()) {
        ([_], [offer]) if offer.is_single() => {
            choose_ike(&conn.ike_proposals, &theirs, Some(new.eph.group))
                .filter(|(_, suite)| suite.group == new.eph.group)
                .filter(|(_, suite)| ke.group.0 == suite.group.transform_id())
                .and_then(|(_, suite)| Some((suite, offer.spi.ike()?)))
        }
        _ => None,
    };
    let key = Ephemeral::from_secret_bytes(new.eph.group, new.eph.secret.expose())?;
    let agreed = chosen.zip(key.agree(ke.data).ok());
    let Some(((suite, peer_spi), shared)) = agreed else {
        // The peer holds an IKE SA that we cannot compute: give up the whole.
        fail(step, sa, conn, Side::Peer, proposal::describe(proposals), "our proposal".to_owned());
        if let Phase::Established(established) = &mut sa.phase {
            established.fate = Fate::Deleting(DeleteReason::Error);
        }
        return Ok(());
    };
    let x = Exchange { ni: &new.nonce, nr, spi_i: new.spi, spi_r: peer_spi };
    let ends = Ends { spi: new.spi, peer_spi, initiator: true };
    let mut own = successor(step, sa, conn, ends, suite, &x, &shared)?;

    let nonces = Nonces { ni: &new.nonce, nr };
    let lost = new.rival.as_ref().is_some_and(|rival| nonces.lowest() < &rival.nonce[..]);
    let inherited = lost && new.rival.is_some_and(|rival| inherit(step, sa, rival.spi));
    if inherited {
        if let Phase::Established(e) = &mut own.phase {
            e.fate = Fate::Deleting(DeleteReason::Redundant);
        }
    } else {
        move_children(sa, &mut own);
        if let Phase::Established(old) = &mut sa.phase {
            old.fate = Fate::Deleting(DeleteReason::Rekeyed);
        }
        step.event(Event::Rekeyed {
            connection: conn.name.clone(),
            old: sa.spi,
            new: own.spi,
            suite,
            by_us: true,
        });
    }
    established::advance(step, &mut own)?;
    step.put(own);
    Ok(())
}

/// The peer said no to a new IKE SA.
fn refused(
    step: &mut Step<'_, '_>,
    sa: &mut IkeSa,
    conn: &ConnectionConfig,
    new: NewIke,
    payloads: &Payloads<'_>,
) -> Result<(), Error> {
    let error = payloads.error();
    let kind = error.map_or(NotifyType::INVALID_SYNTAX, |e| e.kind);
    if kind == NotifyType::INVALID_KE_PAYLOAD && new.rounds < MAX_ROUNDS && new.rival.is_none() {
        let group = error
            .and_then(|e| <[u8; 2]>::try_from(e.data).ok())
            .and_then(|id| Group::from_transform_id(u16::from_be_bytes(id)))
            .filter(|g| *g != new.eph.group)
            .filter(|g| conn.ike_proposals.iter().any(|p| p.groups.contains(g)));
        if let Some(group) = group {
            let nonce = step.nonce().into();
            let eph: Eph = child::ephemeral(step, group);
            let again = NewIke { nonce, eph, rounds: new.rounds + 1, ..new };
            let (bytes, task) = send(step, sa, conn, again)?;
            established::sent(step, sa, bytes, task);
            return Ok(());
        }
    }
    // RFC 7296 §2.8.2: the peer finished its own rekeying before it saw ours.
    if let Some(rival) = new.rival
        && inherit(step, sa, rival.spi)
    {
        return Ok(());
    }
    if kind != NotifyType::TEMPORARY_FAILURE {
        let ours: Vec<String> = conn.ike_proposals.iter().map(IkeProposal::to_string).collect();
        let sent = format!("a rekeying with ike_proposals {}", ours.join(", "));
        fail(step, sa, conn, Side::Us, sent, format!("the peer only says {kind}"));
    }
    let (now, again) = (step.now(), child::later(step));
    if let Phase::Established(established) = &mut sa.phase {
        established.rekey_at = again;
        if kind == NotifyType::TEMPORARY_FAILURE {
            established::refused(established, now);
        }
    }
    Ok(())
}

fn fail(
    step: &mut Step<'_, '_>,
    sa: &IkeSa,
    conn: &ConnectionConfig,
    sender: Side,
    sent: String,
    expected: String,
) {
    step.event(Event::Failed(Failure {
        connection: Some(conn.name.clone()),
        child: None,
        peer: sa.path.remote,
        what: What::IkeProposal,
        began: Side::Us,
        sender,
        sent,
        expected,
    }));
}
