//! Time in one IKE SA: repetition of requests (RFC 7296 §2.1, §2.4), giving up,
//! and when anything else is due.

use core::time::Duration;

use crate::{
    child,
    config::{ConnectionConfig, Limits, Retransmit},
    error::Error,
    established,
    event::{DeleteReason, Event, Failure, Side, What},
    record::Stamp,
    rekey,
    state::{ChildState, Established, Fate, IkeSa, Outstanding, Phase, Task},
    step::Step,
    sync,
};

/// See [`tries`]: 26 s with the default times.
const SHORT_TRIES: u8 = 5;

/// When an outstanding request is to be repeated or given up.
pub(crate) fn again_at(out: &Outstanding, backoff: &Retransmit) -> Stamp {
    out.sent_at.after(backoff.wait(out.sent))
}

/// How often a request may be repeated. What is half-open at the peer is gone
/// there after some 30 s, so IKE_SA_INIT and IKE_AUTH are better begun anew; and
/// for the Delete of an IKE SA nobody needs to wait long.
pub(crate) fn tries(sa: &IkeSa, backoff: &Retransmit) -> u8 {
    match (&sa.phase, sa.established().and_then(Established::task)) {
        (Phase::InitSent(_) | Phase::AuthSent(_), _) | (_, Some(Task::DeleteIke)) => {
            backoff.tries.min(SHORT_TRIES)
        }
        _ => backoff.tries,
    }
}

/// When an SA next wants [`tick`].
pub(crate) fn deadline(
    sa: &IkeSa,
    conn: Option<&ConnectionConfig>,
    limits: &Limits,
) -> Option<Duration> {
    let backoff = conn.map(|c| c.timers.retransmit).unwrap_or_default();
    let repeat = sa.outstanding().map(|out| again_at(out, &backoff));
    let other = match &sa.phase {
        Phase::InitSent(_) | Phase::AuthSent(_) => None,
        Phase::InitAnswered(_) => Some(sa.since.after(limits.half_open_timeout)),
        Phase::Closed(closed) => Some(closed.until),
        Phase::Established(e) => earliest(e, conn, repeat.is_some()),
    };
    repeat.into_iter().chain(other).min().map(Stamp::deadline)
}

fn earliest(e: &Established, conn: Option<&ConnectionConfig>, busy: bool) -> Option<Stamp> {
    let retired = e.children.iter().filter_map(|c| match c.state {
        ChildState::Retired(until) => Some(until),
        _ => None,
    });
    let deferred = e.children.iter().filter(|c| c.is_deferred());
    let retired = retired.chain(deferred.map(|c| c.since.after(child::DEFER))).min();
    if busy || e.waits() {
        // The next task waits for the response, or for the end of a doubt.
        return retired;
    }
    let fate = match e.fate {
        Fate::Replaced(at) | Fate::Rival(at, _) => return retired.into_iter().chain([at]).min(),
        Fate::Doubtful => return retired.into_iter().chain([e.expires_at]).min(),
        Fate::Deleting(_) => return Some(e.heard),
        Fate::Live => e.expires_at.min(e.rekey_at),
    };
    let children = e.children.iter().map(|c| match c.state {
        ChildState::Live if c.is_deferred() => c.since.after(child::DEFER),
        ChildState::Live
            if c.outbound == 0 || e.children.iter().any(|o| o.replaces == Some(c.spi_in)) =>
        {
            c.expires_at
        }
        ChildState::Live => c.rekey_at.min(c.expires_at),
        ChildState::Doomed => e.heard,
        ChildState::Retired(until) => until,
    });
    let dpd = conn.map(|c| c.timers.dpd).filter(|dpd| !dpd.is_zero());
    let wanted = e.wanted.iter().map(|w| w.at);
    children.chain([fate]).chain(dpd.map(|dpd| e.heard.after(dpd))).chain(wanted).min()
}

/// Does what is due, other than repetition.
pub(crate) fn tick(step: &mut Step<'_, '_>, mut sa: IkeSa) -> Result<(), Error> {
    let now = step.cx.now;
    match &mut sa.phase {
        // Only their requests have deadlines, and those are not handled here.
        Phase::InitSent(_) | Phase::AuthSent(_) => return Ok(()),
        Phase::InitAnswered(_) | Phase::Closed(_) => {
            step.delete(sa.spi);
            return Ok(());
        }
        Phase::Established(e) if e.fate == Fate::Doubtful && e.expires_at.is_due(now) => {
            return established::drop_sa(step, &sa, DeleteReason::InDoubt);
        }
        Phase::Established(e) => {
            e.children.retain(|c| match c.state {
                ChildState::Retired(until) => !until.is_due(now),
                _ => true,
            });
        }
    }
    child::use_deferred(step, &mut sa);
    established::advance(step, &mut sa)?;
    step.put(sa);
    Ok(())
}

/// The peer did not answer any of the repetitions.
pub(crate) fn give_up(step: &mut Step<'_, '_>, mut sa: IkeSa) -> Result<(), Error> {
    let connection = sa.connection.clone();
    let sent = match &sa.phase {
        // That was told when it came.
        Phase::InitSent(_) if sa.is_refused() => {
            return established::drop_sa(step, &sa, DeleteReason::NotEstablished);
        }
        Phase::InitSent(_) => "IKE_SA_INIT",
        Phase::AuthSent(_) => "IKE_AUTH",
        _ => {
            let (task, fate) = match sa.established() {
                Some(e) => (e.task().cloned(), e.fate),
                None => return Ok(()),
            };
            match (task, fate) {
                (Some(Task::DeleteIke), Fate::Deleting(reason)) => {
                    return established::drop_sa(step, &sa, reason);
                }
                // RFC 6311 failed: the peer may still be there.
                (Some(Task::Sync(..)), _) => return sync::reestablish(step, sa),
                (Some(Task::Rekey(new)), _) => {
                    // The peer's own new IKE SA may live (RFC 7296 §2.8.2).
                    if let Some(rival) = new.rival
                        && rekey::inherit(step, &mut sa, rival.spi)
                    {
                        return established::drop_sa(step, &sa, DeleteReason::Rekeyed);
                    }
                }
                _ => {}
            }
            return established::drop_sa(step, &sa, DeleteReason::PeerDead);
        }
    };
    step.event(Event::Failed(Failure {
        connection: connection.clone(),
        child: None,
        peer: sa.path.remote,
        what: What::Silence,
        began: Side::Us,
        sender: Side::Us,
        sent: sent.to_owned(),
        expected: format!(
            "any response to {}; is the peer up, and do ports 500 and 4500 reach it?",
            sa.path.local
        ),
    }));
    established::drop_sa(step, &sa, DeleteReason::NotEstablished)
}

/// The first packet on a Child SA that only received.
pub(crate) fn first_packet(
    step: &mut Step<'_, '_>,
    mut sa: IkeSa,
    spi_in: wire::id::EspSpi,
) -> Result<(), Error> {
    if child::heard(step, &mut sa, spi_in) {
        step.put(sa);
    }
    Ok(())
}
