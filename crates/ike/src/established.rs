//! An established IKE SA: the window of one message each way (RFC 7296 §2.1 to
//! §2.3), answers, and which task of ours comes next.
//!
//! ```text
//!  request, id = next expected ──► decrypt ──► answer, remember both
//!  request, id = the one before, same bytes ──► the same answer again
//!  response, id = our outstanding request ──► decrypt ──► what its task says
//!  anything else ──► dropped in silence
//!            after each: if no request is outstanding, the next task begins
//! ```
//! While a takeover leaves the ids in doubt (`sync`), only the second line holds,
//! and no task begins.

use core::{net::SocketAddr, time::Duration};

use crypto::hash::sha256;
use wire::{
    id::EspSpi,
    ike::{Delete, ExchangeType, Message, MessageBuilder, Notify, NotifyType, Payload, Payloads},
};

use crate::{
    child,
    config::{ConnectionConfig, Start},
    error::{Error, Refusal},
    event::{DeleteReason, Event},
    informational,
    record::{Bytes, Stamp},
    rekey,
    state::{
        Answered, ChildState, Closed, Established, Fate, IkeSa, Outstanding, Phase, Request, Task,
    },
    step::{self, Step},
    sync,
};

/// How long a closed IKE SA repeats its last answer.
const CLOSED_FOR: Duration = Duration::from_secs(15);
/// TEMPORARY_FAILURE for so long closes the IKE SA (RFC 7296 §2.25).
const REFUSED_FOR: Duration = Duration::from_secs(180);
/// Terms after which a key is replaced (ha.md: 2^14).
const TERMS_PER_KEY: u64 = 1 << 14;

/// What a request leaves of its IKE SA.
pub(crate) enum After {
    Keep,
    Close(DeleteReason),
}

/// Answers a request of the peer's.
pub(crate) fn on_request(
    step: &mut Step<'_, '_>,
    sa: IkeSa,
    datagram: &[u8],
    message: &Message<'_>,
    from: SocketAddr,
    to: SocketAddr,
) -> Result<(), Error> {
    let established = sa.established().ok_or(Error::NotExpected)?;
    let header = message.header;
    let id = header.message_id.0;
    let hash = sha256(&[datagram]);
    if let Some(answered) = &established.answered {
        // RFC 7296 §2.1: the same request gets the same answer, to where it
        // came from.
        if id.checked_add(1) == Some(established.recv_next) && answered.request[..] == hash {
            let bytes = answered.response.to_vec();
            step.transmit(to, from, bytes);
            return Ok(());
        }
    }
    // Message id 0 is also that of the first request of an original responder:
    // the content tells (RFC 6311 §5.1).
    if id == 0 && established.sync && header.exchange == ExchangeType::INFORMATIONAL {
        let known = established.synced.as_ref().is_some_and(|s| s.request[..] == hash);
        let opened = step::open(datagram, message, sa.initiator, &established.keys)?;
        let wanted = |p: &Payloads<'_>| p.notify(NotifyType::IKEV2_MESSAGE_ID_SYNC).is_some();
        if known || opened.payloads().is_ok_and(|p| wanted(&p)) {
            return sync::answer(step, sa, datagram, message, from, to);
        }
    }
    // RFC 7296 §2.3: outside the window, in silence. In doubt nobody knows where
    // the window is: the old owner may have given this id another answer (RFC 6311
    // §8.1 leaves it to us to reject all that comes before ids are agreed upon).
    //
    // That goes for a Delete, too, although it is authentic and no replay could undo
    // anything with it: it may be the end of a rekeying of which we do not know the
    // beginning. Obeying would take down the half that we hold, while at the peer the
    // children live on: with an IKE SA all of them, and healing from a split would
    // take them for ended. Waiting costs little. Once ids are agreed, the children are
    // rekeyed, and a peer that deleted one says so (CHILD_SA_NOT_FOUND), or deletes it
    // again; a peer that deleted the IKE SA does not answer, and a new one is made.
    if id != established.recv_next || established.doubt {
        return Err(Error::NotExpected);
    }
    if !matches!(header.exchange, ExchangeType::CREATE_CHILD_SA | ExchangeType::INFORMATIONAL) {
        return Err(Error::NotExpected);
    }
    let opened = step::open(datagram, message, sa.initiator, &established.keys)?;
    let (keys, born) = (established.keys.clone(), established.term);
    let conn = step.connection(&sa)?;
    let reply_header = header.to_response();

    let mut work = sa.clone();
    alive(step, conn, &mut work, from, to);
    let before = work.clone();
    let mut reply = MessageBuilder::sealed(&reply_header);
    let outcome = opened.payloads().map_err(Refusal::from).and_then(|payloads| {
        match (header.exchange, payloads.sa()) {
            (ExchangeType::CREATE_CHILD_SA, Some(proposals)) if rekey::is_for_ike(proposals) => {
                rekey::answer(step, &mut work, conn, &payloads, &mut reply).map(|()| After::Keep)
            }
            (ExchangeType::CREATE_CHILD_SA, _) => {
                child::answer(step, &mut work, conn, &payloads, &mut reply).map(|()| After::Keep)
            }
            _ => informational::answer(step, &mut work, conn, &payloads, &mut reply),
        }
    });
    let after = match outcome {
        Ok(after) => after,
        Err(refusal) => {
            work = before;
            reply = MessageBuilder::sealed(&reply_header);
            reply.push(&Payload::Notify(Notify::new(refusal.kind, &refusal.data)));
            if refusal.fatal { After::Close(DeleteReason::Error) } else { After::Keep }
        }
    };
    let response = step.seal(work.initiator, &keys, born, reply)?;
    let path = work.path;
    step.send(&path, response.clone());
    let answered = Answered { request: Bytes::from(&hash[..]), response: response.into() };
    match after {
        After::Keep => {
            if let Phase::Established(established) = &mut work.phase {
                established.recv_next = established.recv_next.saturating_add(1);
                established.answered = Some(answered);
            }
            advance(step, &mut work)?;
        }
        After::Close(reason) => close(step, &mut work, answered, reason),
    }
    step.put(work);
    Ok(())
}

/// The IKE SA ends with the answer just given.
fn close(step: &mut Step<'_, '_>, sa: &mut IkeSa, answered: Answered, reason: DeleteReason) {
    step.event(Event::Deleted { connection: sa.connection.clone(), spi: sa.spi, reason });
    sa.phase =
        Phase::Closed(Closed { answered, until: step.now().after(CLOSED_FOR), half_open: false });
}

/// Something authentic and new came: the peer lives, perhaps elsewhere.
pub(crate) fn alive(
    step: &mut Step<'_, '_>,
    conn: &ConnectionConfig,
    sa: &mut IkeSa,
    from: SocketAddr,
    to: SocketAddr,
) {
    follow(step, conn, sa, from, to);
    let now = step.now();
    if let Phase::Established(established) = &mut sa.phase {
        established.heard = now;
    }
}

/// RFC 7296 §2.23: follow a peer behind a NAT whose mapping changed, unless we
/// are behind one ourselves.
pub(crate) fn follow(
    step: &mut Step<'_, '_>,
    conn: &ConnectionConfig,
    sa: &mut IkeSa,
    from: SocketAddr,
    to: SocketAddr,
) {
    // A peer that is configured at one address has its translator there: only the port can change.
    let known = conn.remote_address.matches(from.ip());
    let same = (sa.path.remote, sa.path.local) == (from, to);
    if same || !known || sa.path.nat_here || !sa.path.nat_there {
        return;
    }
    if sa.path.remote != from {
        step.event(Event::Moved {
            connection: conn.name.clone(),
            spi: sa.spi,
            from: sa.path.remote,
            to: from,
        });
    }
    sa.path.remote = from;
    sa.path.local = to;
}

/// The newest ESP packet of a Child SA was authentic and came from elsewhere. IKE and ESP share one mapping of the NAT,
/// so all of the IKE SA moves.
pub(crate) fn esp_from(
    step: &mut Step<'_, '_>,
    mut sa: IkeSa,
    from: SocketAddr,
) -> Result<(), Error> {
    let conn = step.connection(&sa)?;
    let (before, to) = (sa.path.remote, sa.path.local);
    // Also in doubt: a path needs no message id, and what is to end the doubt must reach the peer.
    follow(step, conn, &mut sa, from, to);
    if sa.path.remote != before {
        step.put(sa);
    }
    Ok(())
}

/// Acts on the response to our outstanding request.
pub(crate) fn on_response(
    step: &mut Step<'_, '_>,
    mut sa: IkeSa,
    datagram: &[u8],
    message: &Message<'_>,
    from: SocketAddr,
    to: SocketAddr,
) -> Result<(), Error> {
    let established = sa.established().ok_or(Error::NotExpected)?;
    let request = established.request.as_ref().ok_or(Error::NotExpected)?;
    let header = message.header;
    if header.message_id.0 != request.out.id || header.exchange != request.task.exchange() {
        return Err(Error::NotExpected);
    }
    // The old owner may have acted on it, and gone on from there.
    if established.waits() {
        return Err(Error::NotExpected);
    }
    let opened = step::open(datagram, message, sa.initiator, &established.keys)?;
    // A response that is authentic and malformed cannot be acted upon; the
    // request is repeated and, in the end, given up.
    let payloads = opened.payloads()?;
    let task = request.task.clone();
    if let Task::Sync(nonce, m1) = task {
        return sync::finish(step, sa, &payloads, nonce, m1);
    }
    let conn = step.connection(&sa)?;
    alive(step, conn, &mut sa, from, to);
    if let Phase::Established(established) = &mut sa.phase {
        established.request = None;
    }
    // RFC 7296 §2.21.3: INVALID_SYNTAX ends the IKE SA on both sides.
    if payloads.notify(NotifyType::INVALID_SYNTAX).is_some() {
        return drop_sa(step, &sa, DeleteReason::Error);
    }
    match task {
        Task::Liveness | Task::Sync(..) => {}
        Task::Child(new) => {
            let nonce = new.nonce.clone();
            // A refusal has no nonce.
            let nonces = child::own_nonces(&nonce, &payloads)
                .unwrap_or(child::Nonces { ni: &nonce, nr: &[] });
            if payloads.sa().is_some() && payloads.nonce().is_none() {
                return Err(Error::NotExpected);
            }
            child::finish(step, &mut sa, conn, new, &payloads, nonces)?;
        }
        Task::Rekey(new) => rekey::finish(step, &mut sa, conn, new, &payloads)?,
        Task::DeleteChildren(spis) => {
            for spi in &spis {
                child::remove(step, &mut sa, conn, *spi);
            }
            if let Phase::Established(established) = &mut sa.phase {
                established.orphans.retain(|orphan| !spis.contains(orphan));
            }
        }
        Task::DeleteIke => {
            let reason = match sa.established().map(|e| e.fate) {
                Some(Fate::Deleting(reason)) => reason,
                _ => DeleteReason::Command,
            };
            return drop_sa(step, &sa, reason);
        }
    }
    advance(step, &mut sa)?;
    step.put(sa);
    Ok(())
}

/// Forgets an IKE SA at once.
pub(crate) fn drop_sa(
    step: &mut Step<'_, '_>,
    sa: &IkeSa,
    reason: DeleteReason,
) -> Result<(), Error> {
    step.event(Event::Deleted { connection: sa.connection.clone(), spi: sa.spi, reason });
    step.delete(sa.spi);
    Ok(())
}

impl Task {
    /// The exchange its request belongs to.
    pub(crate) fn exchange(&self) -> ExchangeType {
        match self {
            Self::Child(_) | Self::Rekey(_) => ExchangeType::CREATE_CHILD_SA,
            _ => ExchangeType::INFORMATIONAL,
        }
    }
}

/// Notes a request that is on its way.
pub(crate) fn sent(step: &mut Step<'_, '_>, sa: &mut IkeSa, bytes: Vec<u8>, task: Task) {
    let (path, now) = (sa.path, step.now());
    let Phase::Established(established) = &mut sa.phase else { return };
    let id = established.send_next;
    established.send_next = id.saturating_add(1);
    let out = Outstanding { id, bytes: bytes.as_slice().into(), sent_at: now, sent: 1 };
    established.request = Some(Request { out, task });
    step.send(&path, bytes);
}

/// Sends an INFORMATIONAL request.
fn inform(
    step: &mut Step<'_, '_>,
    sa: &mut IkeSa,
    payload: Option<Payload<'_>>,
    task: Task,
) -> Result<(), Error> {
    let established = sa.established().ok_or(Error::Internal("request in no IKE SA"))?;
    let header = step::header(sa, ExchangeType::INFORMATIONAL, false, established.send_next);
    let mut builder = MessageBuilder::sealed(&header);
    if let Some(payload) = payload {
        builder.push(&payload);
    }
    let bytes = step.seal(sa.initiator, &established.keys, established.term, builder)?;
    sent(step, sa, bytes, task);
    Ok(())
}

/// What is to be done next, if nothing is outstanding.
enum Next {
    Nothing,
    DeleteIke(DeleteReason),
    DeleteChildren(Vec<EspSpi>),
    Child(String, Option<EspSpi>),
    Rekey,
    Liveness,
}

/// Begins the next task that is due, if no request is outstanding.
pub(crate) fn advance(step: &mut Step<'_, '_>, sa: &mut IkeSa) -> Result<(), Error> {
    let conn = step.connection(sa)?;
    let now = step.cx.now;
    let (term, quiet) = (step.term, step.quiet);
    let Phase::Established(established) = &mut sa.phase else { return Ok(()) };
    if established.request.is_some() || established.doubt || quiet {
        return Ok(());
    }
    match next(established, conn, now, term) {
        Next::Nothing => Ok(()),
        Next::DeleteIke(reason) => {
            established.fate = Fate::Deleting(reason);
            inform(step, sa, Some(Payload::Delete(Delete::Ike)), Task::DeleteIke)
        }
        Next::DeleteChildren(spis) => {
            let payload = Payload::Delete(Delete::Esp(spis.clone()));
            inform(step, sa, Some(payload), Task::DeleteChildren(spis))
        }
        Next::Child(name, rekeys) => match child::request(step, sa, conn, &name, rekeys)? {
            Some((bytes, task)) => {
                sent(step, sa, bytes, task);
                Ok(())
            }
            None => {
                // The child is no longer configured.
                if let Phase::Established(established) = &mut sa.phase {
                    established.unwant(&name);
                    if let Some(old) = rekeys.and_then(|spi| established.child_mut(spi)) {
                        old.rekey_at = old.expires_at;
                    }
                }
                Ok(())
            }
        },
        Next::Rekey => {
            let (bytes, task) = rekey::request(step, sa, conn)?;
            sent(step, sa, bytes, task);
            Ok(())
        }
        Next::Liveness => inform(step, sa, None, Task::Liveness),
    }
}

fn next(established: &mut Established, conn: &ConnectionConfig, now: Duration, term: u64) -> Next {
    match established.fate {
        Fate::Live => {}
        Fate::Deleting(reason) => return Next::DeleteIke(reason),
        Fate::Replaced(at) if at.is_due(now) => return Next::DeleteIke(DeleteReason::Rekeyed),
        Fate::Rival(at, _) if at.is_due(now) => return Next::DeleteIke(DeleteReason::Redundant),
        Fate::Replaced(_) | Fate::Rival(..) | Fate::Doubtful => return Next::Nothing,
    }
    if established.expires_at.is_due(now) {
        return Next::DeleteIke(DeleteReason::Expired);
    }
    let mut lost = Vec::new();
    for n in 0..established.children.len() {
        let (useless, expired) = match established.children.get(n) {
            Some(c) if c.state == ChildState::Live => (
                // The redundant half of a simultaneous rekeying that nobody
                // deleted: never used, while another sends.
                c.rekey_at.is_due(now)
                    && c.outbound == 0
                    && established.children.iter().any(|o| {
                        o.name == c.name
                            && o.state == ChildState::Live
                            && o.outbound > 0
                            && c.replaces != Some(o.spi_in)
                    }),
                c.expires_at.is_due(now),
            ),
            _ => continue,
        };
        if (useless || expired)
            && let Some(child) = established.children.get_mut(n)
        {
            child.state = ChildState::Doomed;
            lost.push(child.name.clone());
        }
    }
    for name in lost {
        want_again(established, conn, &name, Stamp::at(now));
    }
    let doomed = established.children.iter().filter(|c| c.state == ChildState::Doomed);
    let spis: Vec<EspSpi> =
        doomed.map(|c| c.spi_in).chain(established.orphans.iter().copied()).collect();
    if !spis.is_empty() {
        return Next::DeleteChildren(spis);
    }
    let due = established.children.iter().find(|c| {
        c.state == ChildState::Live
            && (c.rekey_at.is_due(now) || term.saturating_sub(c.term) >= TERMS_PER_KEY)
            // The peer may not have our answer yet, so it may not know it.
            && c.outbound > 0
            // The peer rekeyed it and will delete it.
            && !established.children.iter().any(|o| o.replaces == Some(c.spi_in))
    });
    if let Some(child) = due {
        return Next::Child(child.name.clone(), Some(child.spi_in));
    }
    if established.rekey_at.is_due(now) || term.saturating_sub(established.term) >= TERMS_PER_KEY {
        return Next::Rekey;
    }
    if let Some(wanted) = established.wanted.iter().find(|w| w.at.is_due(now)) {
        return Next::Child(wanted.name.clone(), None);
    }
    if !conn.timers.dpd.is_zero() && established.heard.after(conn.timers.dpd).is_due(now) {
        return Next::Liveness;
    }
    Next::Nothing
}

/// The peer answered TEMPORARY_FAILURE. RFC 7296 §2.25: after several minutes of
/// nothing else the two states have parted, and the IKE SA is closed.
pub(crate) fn refused(established: &mut Established, now: Stamp) {
    match established.refused_since {
        None => established.refused_since = Some(now),
        Some(since) if since.after(REFUSED_FOR) <= now => {
            established.fate = Fate::Deleting(DeleteReason::Error);
        }
        Some(_) => {}
    }
}

/// A child went away: if it is ours to bring up and nothing replaces it, we
/// want it back.
pub(crate) fn want_again(
    established: &mut Established,
    conn: &ConnectionConfig,
    name: &str,
    now: Stamp,
) {
    let ours = conn.children.iter().any(|c| c.name == name && c.start == Start::Initiate);
    if ours && !established.has_live(name) && !established.wanted.iter().any(|w| w.name == name) {
        child::want(established, name, now.after(conn.timers.retry), 0);
    }
}

/// A new IKE SA is up: those in doubt of the same connection go, without a
/// Delete. Its message id may be one that the old owner used for something else,
/// and no peer may see two requests with one id (ha.md, invariant 4); the peer
/// finds out by its own means. What is on its way is still received.
pub(crate) fn supersede_doubtful(step: &mut Step<'_, '_>, conn: &ConnectionConfig, sa: &IkeSa) {
    let until = step.now().after(child::LINGER);
    let doubtful: Vec<IkeSa> = step
        .of_connection(&conn.name)
        .into_iter()
        .filter(|o| o.spi != sa.spi)
        .filter(|o| o.established().is_some_and(|e| e.fate == Fate::Doubtful))
        .cloned()
        .collect();
    for mut old in doubtful {
        if let Phase::Established(established) = &mut old.phase {
            established.expires_at = established.expires_at.min(until);
        }
        step.put(old);
    }
}

/// A new IKE SA is up, and the peer has proven who it is: those of its connection beyond the limit go, silent longest
/// first, so that a peer that restarts often without INITIAL_CONTACT fills no memory (security.md, statement 11). They
/// are forgotten at once, since a peer that no longer knows them answers no Delete; it is sent once, for a peer that does.
pub(crate) fn make_room(
    step: &mut Step<'_, '_>,
    conn: &ConnectionConfig,
    sa: &IkeSa,
) -> Result<(), Error> {
    let mut others: Vec<IkeSa> = step
        .of_connection(&conn.name)
        .into_iter()
        .filter(|o| o.spi != sa.spi && o.established().is_some())
        .cloned()
        .collect();
    // The new one counts, too.
    let surplus = (others.len() + 1).saturating_sub(step.limits().ike_per_connection);
    others.sort_by_key(|o| (o.established().map(|e| e.heard), o.since, o.spi));
    for old in others.iter().take(surplus.min(others.len())) {
        if let Some(e) = old.established()
            && e.request.is_none()
            && !e.doubt
            && e.fate != Fate::Doubtful
            && !step.quiet
        {
            let header = step::header(old, ExchangeType::INFORMATIONAL, false, e.send_next);
            let mut builder = MessageBuilder::sealed(&header);
            builder.push(&Payload::Delete(Delete::Ike));
            // One that can say nothing more goes all the same.
            if let Ok(bytes) = step.seal(old.initiator, &e.keys, e.term, builder) {
                step.send(&old.path, bytes);
            }
        }
        drop_sa(step, old, DeleteReason::Crowded)?;
    }
    Ok(())
}
