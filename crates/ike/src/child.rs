//! Child SAs: negotiation in IKE_AUTH and CREATE_CHILD_SA, both roles
//! (RFC 7296 §1.3.1, §1.3.3, §2.9, §2.17), and the rules of simultaneous
//! rekeying (§2.8.1, §2.25.1).
//!
//! A Child SA here has two marks. `state`: Live → Doomed (we delete it) →
//! Retired (still receives for 5 s) → gone. `outbound`: 0 while it only
//! receives; of all Child SAs of one name the highest number sends. Whoever
//! asked for a rekeying sends on the new one at once; whoever answered waits
//! for the Delete of the old one, or for the first packet on the new (§2.8).

mod negotiate;

use core::time::Duration;

use crypto::dh::{Ephemeral, Group};
use wire::{
    id::EspSpi,
    ike::{ExchangeType, MessageBuilder, Notify, NotifyType, Payload, Payloads, SealedBuilder},
};

use crate::{
    config::{ChildConfig, ConnectionConfig, Start, Timers},
    error::{Error, Refusal},
    event::{Event, Failure, Selectors, Side, What},
    keys::Key,
    proposal::EspProposal,
    record::{Bytes, Stamp},
    state::{
        Child, ChildRival, ChildState, Eph, Established, Fate, IkeSa, NewChild, Phase, Task, Wanted,
    },
    step::{self, Step},
};
pub(crate) use negotiate::{accept, push_answer, push_ke, push_offer};
use negotiate::{conclude, push_answer_with};

/// How long a deleted Child SA still receives (ha.md).
/// A Child SA whose peer asked for it, beside another that sends, sends after this long at the latest:
/// the peer has had our answer by then, or will ask for it again.
pub(crate) const DEFER: Duration = Duration::from_millis(200);
pub(crate) const LINGER: Duration = Duration::from_secs(5);
/// Key exchange groups tried for one Child SA.
const MAX_ROUNDS: u8 = 3;

/// The nonces of the exchange that makes a Child SA.
#[derive(Clone, Copy)]
pub(crate) struct Nonces<'a> {
    pub(crate) ni: &'a [u8],
    pub(crate) nr: &'a [u8],
}

impl Nonces<'_> {
    /// RFC 7296 §2.8.1: compared octet by octet, a shorter one being lower:
    /// which is how slices compare.
    pub(crate) fn lowest(&self) -> &[u8] {
        self.ni.min(self.nr)
    }
}

/// When to rekey, and when to delete at the latest.
pub(crate) fn lifetime(step: &mut Step<'_, '_>, timers: &Timers, time: Duration) -> (Stamp, Stamp) {
    if time.is_zero() {
        let never = step.now().after(Duration::MAX);
        return (never, never);
    }
    let rekey = step.jittered(time, timers.jitter_percent);
    let over = time.saturating_mul(u32::from(timers.overtime_percent)) / 100;
    (step.now().after(rekey), step.now().after(time.saturating_add(over)))
}

/// Tells the person (and, if asked for, tshark) about a new Child SA.
pub(crate) fn announce(
    step: &mut Step<'_, '_>,
    sa: &IkeSa,
    conn: &ConnectionConfig,
    child: &Child,
) {
    step.log_child_keys(&sa.path, child);
    step.event(Event::ChildUp {
        connection: conn.name.clone(),
        child: child.name.clone(),
        spi_in: child.spi_in,
        spi_out: child.spi_out,
        suite: child.suite(),
        local_ts: child.local_ts.clone(),
        remote_ts: child.remote_ts.clone(),
        rekeyed: child.replaces,
    });
}

/// Asks for a Child SA. `rekeys` names the one it is to replace.
pub(crate) fn request(
    step: &mut Step<'_, '_>,
    sa: &IkeSa,
    conn: &ConnectionConfig,
    name: &str,
    rekeys: Option<EspSpi>,
) -> Result<Option<(Vec<u8>, Task)>, Error> {
    let Some(config) = conn.children.iter().find(|c| c.name == name) else { return Ok(None) };
    let group = config.esp_proposals.first().and_then(|p| p.groups.first()).copied();
    let spi_in = step.new_esp_spi(sa.children())?;
    let nonce = step.nonce().into();
    let eph = group.map(|group| ephemeral(step, group));
    let new = NewChild {
        name: name.to_owned(),
        spi_in,
        nonce,
        eph,
        rekeys,
        rival: None,
        rounds: 0,
        // RFC 7296 §2.9.2: all of our policy, which contains what is in use.
        local_ts: config.local_ts.clone(),
        remote_ts: config.remote_ts.clone(),
    };
    send(step, sa, config, new).map(Some)
}

pub(crate) fn ephemeral(step: &mut Step<'_, '_>, group: Group) -> Eph {
    let key = Ephemeral::generate(group, step.cx.rng);
    Eph { group, secret: Key::new(key.to_secret_bytes()) }
}

fn send(
    step: &mut Step<'_, '_>,
    sa: &IkeSa,
    config: &ChildConfig,
    new: NewChild,
) -> Result<(Vec<u8>, Task), Error> {
    let established = sa.established().ok_or(Error::Internal("child of no IKE SA"))?;
    let id = established.send_next;
    let mut builder =
        MessageBuilder::sealed(&step::header(sa, ExchangeType::CREATE_CHILD_SA, false, id));
    if let Some(old) = new.rekeys {
        // RFC 7296 §1.3.3: the SPI the sender of the notify receives with.
        builder.push(&Payload::Notify(Notify::about(NotifyType::REKEY_SA, old, &[])));
    }
    push_offer(&mut builder, config, &new, true);
    let bytes = step.seal(sa.initiator, &established.keys, established.term, builder)?;
    Ok((bytes, Task::Child(new)))
}

/// Answers CREATE_CHILD_SA for a Child SA, new or rekeyed.
pub(crate) fn answer(
    step: &mut Step<'_, '_>,
    sa: &mut IkeSa,
    conn: &ConnectionConfig,
    payloads: &Payloads<'_>,
    reply: &mut SealedBuilder,
) -> Result<(), Refusal> {
    let established = sa.established().ok_or_else(Refusal::syntax)?;
    // RFC 7296 §2.25.2: while the IKE SA is rekeyed or closed.
    if established.fate != Fate::Live
        || matches!(established.task(), Some(Task::Rekey(_) | Task::DeleteIke))
    {
        return Err(Refusal::temporary());
    }
    let ni = payloads.nonce().ok_or_else(Refusal::syntax)?;
    let mut replaces = None;
    if let Some(notify) = payloads.notify(NotifyType::REKEY_SA) {
        let spi_out = notify.spi.esp().ok_or_else(Refusal::syntax)?;
        let old = established.children.iter().find(|c| c.spi_out == spi_out && !c.is_retired());
        let Some(old) = old else {
            // RFC 7296 §2.25.1, §2.25: with the SPI of the notify.
            reply.push(&Payload::Notify(Notify::about(
                NotifyType::CHILD_SA_NOT_FOUND,
                spi_out,
                &[],
            )));
            return Ok(());
        };
        // RFC 7296 §2.25.1: while we close it.
        if old.state == ChildState::Doomed {
            return Err(Refusal::temporary());
        }
        replaces = Some((old.name.clone(), old.spi_in));
    }
    let nr = step.nonce();
    let nonces = Nonces { ni, nr: &nr };
    let keys = established.keys.clone();
    let only = replaces.as_ref().map(|(name, _)| (name.as_str(), true));
    let made = accept(step, sa, conn, &keys, payloads, nonces, only)?;
    push_answer_with(reply, &made, Some(&nr));

    let mut child = made.child;
    child.replaces = replaces.map(|(_, spi_in)| spi_in);
    if child.replaces.is_none() {
        child.outbound = first_use(step, sa, &child.name);
    }
    announce(step, sa, conn, &child);
    let Phase::Established(established) = &mut sa.phase else { return Err(Refusal::syntax()) };
    // RFC 7296 §2.8.1: note a simultaneous rekeying; the nonces decide when
    // our own response is here.
    if let Some(Task::Child(own)) = established.request.as_mut().map(|r| &mut r.task)
        && own.rekeys.is_some()
        && own.rekeys == child.replaces
    {
        own.rival = Some(ChildRival { spi_in: child.spi_in, nonce: nonces.lowest().into() });
    }
    established.unwant(&child.name);
    established.refused_since = None;
    established.children.push(child);
    Ok(())
}

/// Acts on the response to our request for a Child SA, in IKE_AUTH or
/// CREATE_CHILD_SA. `nonces` are those of the exchange.
pub(crate) fn finish(
    step: &mut Step<'_, '_>,
    sa: &mut IkeSa,
    conn: &ConnectionConfig,
    new: NewChild,
    payloads: &Payloads<'_>,
    nonces: Nonces<'_>,
) -> Result<(), Error> {
    let established = sa.established().ok_or(Error::Internal("child of no IKE SA"))?;
    let keys = established.keys.clone();
    if payloads.sa().is_none() {
        return refused(step, sa, conn, new, payloads);
    }
    let child = match conclude(step, conn, &keys, &new, payloads, nonces) {
        Ok(child) => child,
        Err((what, sent, expected)) => {
            // The peer holds a Child SA that we cannot use.
            step.event(Event::Failed(Failure {
                connection: Some(conn.name.clone()),
                child: Some(new.name.clone()),
                peer: sa.path.remote,
                what,
                began: Side::Us,
                sender: Side::Peer,
                sent,
                expected,
            }));
            let (now, later) = (step.now(), later(step));
            if let Phase::Established(established) = &mut sa.phase {
                established.orphans.push(new.spi_in);
                postpone(established, conn, &new, now, later);
            }
            return Ok(());
        }
    };
    settle(step, sa, conn, &new, child, nonces);
    Ok(())
}

/// Puts a Child SA of ours in place, and decides a simultaneous rekeying
/// (RFC 7296 §2.8.1).
fn settle(
    step: &mut Step<'_, '_>,
    sa: &mut IkeSa,
    conn: &ConnectionConfig,
    new: &NewChild,
    mut child: Child,
    nonces: Nonces<'_>,
) {
    let outbound = step.next_outbound(sa);
    child.replaces = new.rekeys;
    let Phase::Established(established) = &mut sa.phase else { return };
    established.unwant(&new.name);
    established.refused_since = None;
    // The SA with the lowest of the four nonces is closed by whoever asked for
    // it. If that is ours, the peer's must live, or what it was rekeyed to
    // while our response was on its way; else ours survives in any case.
    let others_live = established.children.iter().any(|c| {
        let rival = new.rival.as_ref().is_some_and(|r| r.spi_in == c.spi_in);
        let sends = c.outbound > 0 && Some(c.spi_in) != new.rekeys;
        c.name == new.name && c.state == ChildState::Live && (rival || sends)
    });
    let lowest = new.rival.as_ref().is_some_and(|rival| nonces.lowest() < &rival.nonce[..]);
    if lowest && others_live {
        child.state = ChildState::Doomed;
        announce(step, sa, conn, &child);
        let Phase::Established(established) = &mut sa.phase else { return };
        established.children.push(child);
        return;
    }
    child.outbound = outbound;
    if let Some(old) = new.rekeys.and_then(|spi| established.child_mut(spi)) {
        // RFC 7296 §2.8: who rekeyed deletes the old one.
        if old.state == ChildState::Live {
            old.state = ChildState::Doomed;
        }
    } else {
        child.replaces = None;
    }
    announce(step, sa, conn, &child);
    let Phase::Established(established) = &mut sa.phase else { return };
    established.children.push(child);
}

/// The peer said no to a Child SA.
fn refused(
    step: &mut Step<'_, '_>,
    sa: &mut IkeSa,
    conn: &ConnectionConfig,
    new: NewChild,
    payloads: &Payloads<'_>,
) -> Result<(), Error> {
    let error = payloads.error();
    let kind = error.map_or(NotifyType::INVALID_SYNTAX, |e| e.kind);
    let now = step.now();

    if kind == NotifyType::INVALID_KE_PAYLOAD && new.rounds < MAX_ROUNDS && !new.nonce.is_empty() {
        let config = conn.children.iter().find(|c| c.name == new.name);
        let group = error
            .and_then(|e| <[u8; 2]>::try_from(e.data).ok())
            .and_then(|id| Group::from_transform_id(u16::from_be_bytes(id)))
            .filter(|g| {
                config.is_some_and(|c| c.esp_proposals.iter().any(|p| p.groups.contains(g)))
            })
            .filter(|g| new.eph.as_ref().is_none_or(|e| e.group != *g));
        if let (Some(group), Some(config)) = (group, config) {
            // RFC 7296 §1.3: again with the group the peer wants.
            let nonce = step.nonce().into();
            let eph = Some(ephemeral(step, group));
            let rounds = new.rounds + 1;
            let rekeys = new.rekeys.filter(|spi| {
                sa.established().is_some_and(|e| e.child(*spi).is_some_and(|c| !c.is_retired()))
            });
            if new.rekeys.is_none() || rekeys.is_some() {
                let (bytes, task) =
                    send(step, sa, config, NewChild { nonce, eph, rounds, rekeys, ..new })?;
                crate::established::sent(step, sa, bytes, task);
                return Ok(());
            }
        }
    }
    if kind != NotifyType::TEMPORARY_FAILURE && kind != NotifyType::CHILD_SA_NOT_FOUND {
        let config = conn.children.iter().find(|c| c.name == new.name);
        let proposals = config.map(|c| {
            c.esp_proposals.iter().map(EspProposal::to_string).collect::<Vec<_>>().join(", ")
        });
        let selectors =
            format!("TSi {} === TSr {}", Selectors(&new.local_ts), Selectors(&new.remote_ts));
        let (what, sent) = match kind {
            NotifyType::TS_UNACCEPTABLE => (What::Selectors, selectors),
            NotifyType::NO_PROPOSAL_CHOSEN => {
                (What::EspProposal, format!("esp_proposals {}", proposals.unwrap_or_default()))
            }
            _ => (What::Refused, selectors),
        };
        step.event(Event::Failed(Failure {
            connection: Some(conn.name.clone()),
            child: Some(new.name.clone()),
            peer: sa.path.remote,
            what,
            began: Side::Us,
            sender: Side::Us,
            sent,
            expected: format!("the peer only says {kind}"),
        }));
    }
    let later = later(step);
    let Phase::Established(established) = &mut sa.phase else { return Ok(()) };
    match kind {
        NotifyType::CHILD_SA_NOT_FOUND => {
            // RFC 7296 §2.25: forget ours and make a new one, unless the peer's
            // own rekeying already did (§2.8.1, second sequence).
            if let Some(old) = new.rekeys {
                remove(step, sa, conn, old);
            }
            if let Phase::Established(established) = &mut sa.phase
                && !established.has_live(&new.name)
            {
                want(established, &new.name, now, 0);
            }
        }
        NotifyType::NO_ADDITIONAL_SAS if new.rekeys.is_some() => {
            // RFC 7296 §1.3: the peer cannot rekey; the IKE SA is made anew
            // before the Child SA expires.
            established.rekey_at = established.expires_at;
            postpone(established, conn, &new, now, later);
        }
        _ => {
            if kind == NotifyType::TEMPORARY_FAILURE {
                crate::established::refused(established, now);
            }
            postpone(established, conn, &new, now, later);
        }
    }
    Ok(())
}

/// When a refused rekeying is tried again. RFC 7296 §2.25 forbids at once; drawn,
/// so that two sides that refuse each other do not go on doing so in step.
pub(crate) fn later(step: &mut Step<'_, '_>) -> Stamp {
    let pause = step.jittered(Duration::from_secs(15), 60);
    step.now().after(pause)
}

/// Tries again later.
fn postpone(
    established: &mut Established,
    conn: &ConnectionConfig,
    new: &NewChild,
    now: Stamp,
    later: Stamp,
) {
    if let Some(old) = new.rekeys.and_then(|spi| established.child_mut(spi)) {
        old.rekey_at = later;
        return;
    }
    let start = conn.children.iter().find(|c| c.name == new.name).map(|c| c.start);
    if start == Some(Start::Initiate) && !established.has_live(&new.name) {
        let tries = established.wanted.iter().find(|w| w.name == new.name).map_or(0, |w| w.tries);
        let pause = conn.timers.retry.saturating_mul(1 << tries.min(10)).min(conn.timers.retry_max);
        want(established, &new.name, now.after(pause), tries.saturating_add(1));
    } else {
        established.unwant(&new.name);
    }
}

/// Wishes for a child.
pub(crate) fn want(established: &mut Established, name: &str, at: Stamp, tries: u8) {
    established.unwant(name);
    established.wanted.push(Wanted { name: name.to_owned(), at, tries });
}

/// Takes a Child SA out, because one side deleted it. Its successor sends from
/// now on; with one, it lingers to receive what is on its way (ha.md).
pub(crate) fn remove(
    step: &mut Step<'_, '_>,
    sa: &mut IkeSa,
    conn: &ConnectionConfig,
    spi_in: EspSpi,
) {
    let outbound = step.next_outbound(sa);
    let until = step.now().after(LINGER);
    let Phase::Established(established) = &mut sa.phase else { return };
    let Some(old) = established.child(spi_in) else { return };
    if old.is_retired() {
        return;
    }
    let name = old.name.clone();
    let others = established
        .children
        .iter_mut()
        .filter(|c| c.spi_in != spi_in && c.name == name && c.state == ChildState::Live);
    // The successor is what replaces it, else the youngest.
    let successor = others.max_by_key(|c| (c.replaces == Some(spi_in), c.outbound, c.since));
    let lingers = successor.is_some();
    if let Some(successor) = successor {
        if successor.replaces == Some(spi_in) {
            successor.replaces = None;
        }
        if successor.outbound == 0 {
            successor.outbound = outbound;
        }
    }
    if lingers {
        if let Some(old) = established.child_mut(spi_in) {
            old.state = ChildState::Retired(until);
        }
    } else {
        established.children.retain(|c| c.spi_in != spi_in);
    }
    step.event(Event::ChildDown { connection: conn.name.clone(), child: name, spi_in });
}

/// What makes a Child SA the sender that the peer asked for. RFC 7296 §2.8: the responder may send as
/// soon as its response left, which the peer may not have processed when the first packet arrives. So
/// where another sends already (reauthentication makes before it breaks), it waits: for a packet, for
/// the other's end, or [`DEFER`].
pub(crate) fn first_use(step: &Step<'_, '_>, sa: &IkeSa, name: &str) -> u64 {
    let connection = sa.connection.as_deref().unwrap_or_default();
    let others = step.of_connection(connection).into_iter().flat_map(IkeSa::children);
    let mut all = others.chain(sa.children());
    let sends = |c: &Child| c.name == name && c.state == ChildState::Live && c.outbound > 0;
    if all.any(sends) { 0 } else { step.next_outbound(sa) }
}

/// Those that waited for long enough send.
pub(crate) fn use_deferred(step: &Step<'_, '_>, sa: &mut IkeSa) {
    let (now, outbound) = (step.cx.now, step.next_outbound(sa));
    let Phase::Established(established) = &mut sa.phase else { return };
    let due = |c: &&mut Child| c.is_deferred() && c.since.after(DEFER).is_due(now);
    for child in established.children.iter_mut().filter(due) {
        child.outbound = outbound;
    }
}

/// The first packet came in on a Child SA that only received: the peer is
/// ready (RFC 7296 §2.8).
pub(crate) fn heard(step: &Step<'_, '_>, sa: &mut IkeSa, spi_in: EspSpi) -> bool {
    let outbound = step.next_outbound(sa);
    let Phase::Established(established) = &mut sa.phase else { return false };
    match established.child_mut(spi_in) {
        Some(child) if child.outbound == 0 && child.state == ChildState::Live => {
            child.outbound = outbound;
            true
        }
        _ => false,
    }
}

/// Nonces of the exchange that our request `new` began.
pub(crate) fn own_nonces<'a>(new: &'a Bytes, payloads: &Payloads<'a>) -> Option<Nonces<'a>> {
    Some(Nonces { ni: new, nr: payloads.nonce()? })
}
