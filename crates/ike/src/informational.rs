//! INFORMATIONAL requests of the peer (RFC 7296 §1.4, §2.21, §2.25).

use wire::{
    id::EspSpi,
    ike::{Delete, NotifyType, Payload, Payloads, SealedBuilder},
};

use crate::{
    child,
    config::ConnectionConfig,
    error::Refusal,
    established::{self, After},
    event::{DeleteReason, Event, Failure, Side, What},
    rekey,
    state::{ChildState, Fate, IkeSa, Phase, Task},
    step::Step,
};

/// Answers deletes and errors; everything else, an empty request above all,
/// with an empty response.
pub(crate) fn answer(
    step: &mut Step<'_, '_>,
    sa: &mut IkeSa,
    conn: &ConnectionConfig,
    payloads: &Payloads<'_>,
    reply: &mut SealedBuilder,
) -> Result<After, Refusal> {
    // RFC 7296 §2.21.2: the initiator could not authenticate us; no Delete
    // follows.
    if payloads.notify(NotifyType::AUTHENTICATION_FAILED).is_some() {
        step.event(Event::Failed(Failure {
            connection: Some(conn.name.clone()),
            child: None,
            peer: sa.path.remote,
            what: What::Secret,
            began: Side::Peer,
            sender: Side::Us,
            sent: format!("IDr {} and AUTH", conn.local_id),
            expected: "what the peer's configuration names (it only says AUTHENTICATION_FAILED)"
                .to_owned(),
        }));
        return Ok(After::Close(DeleteReason::Error));
    }
    if payloads.deletes().any(|d| *d == Delete::Ike) {
        return Ok(After::Close(ike_deleted(step, sa)));
    }
    let mut ours = Vec::new();
    for delete in payloads.deletes() {
        if let Delete::Esp(spis) = delete {
            for spi_out in spis {
                ours.extend(child_deleted(step, sa, conn, *spi_out));
            }
        }
    }
    if !ours.is_empty() {
        // RFC 7296 §1.4.1: the other half of each pair.
        reply.push(&Payload::Delete(Delete::Esp(ours)));
    }
    Ok(After::Keep)
}

/// RFC 7296 §2.8.2: a peer that deletes an IKE SA which both rekey has finished
/// its own rekeying; ours is forgotten and the children go with the peer's.
fn ike_deleted(step: &mut Step<'_, '_>, sa: &mut IkeSa) -> DeleteReason {
    let Some(established) = sa.established() else { return DeleteReason::Peer };
    if matches!(established.fate, Fate::Replaced(_)) {
        return DeleteReason::Rekeyed;
    }
    if matches!(established.fate, Fate::Rival(..) | Fate::Deleting(DeleteReason::Redundant)) {
        return DeleteReason::Redundant;
    }
    let rival = match established.task() {
        Some(Task::Rekey(new)) => new.rival.as_ref().map(|r| r.spi),
        _ => None,
    };
    match rival {
        Some(rival) if rekey::inherit(step, sa, rival) => DeleteReason::Rekeyed,
        _ => match established_fate(sa) {
            Fate::Deleting(reason) => reason,
            _ => DeleteReason::Peer,
        },
    }
}

fn established_fate(sa: &IkeSa) -> Fate {
    sa.established().map_or(Fate::Live, |e| e.fate)
}

/// Takes out a Child SA that the peer deletes; gives our SPI for the answer.
fn child_deleted(
    step: &mut Step<'_, '_>,
    sa: &mut IkeSa,
    conn: &ConnectionConfig,
    spi_out: EspSpi,
) -> Option<EspSpi> {
    let now = step.now();
    let established = sa.established()?;
    let child = established.children.iter().find(|c| c.spi_out == spi_out && !c.is_retired())?;
    let (spi_in, name, state) = (child.spi_in, child.name.clone(), child.state);
    let asked =
        matches!(established.task(), Some(Task::DeleteChildren(spis)) if spis.contains(&spi_in));
    let had_successor = established.has_live(&name)
        && established
            .children
            .iter()
            .any(|c| c.name == name && c.spi_in != spi_in && c.state == ChildState::Live);
    child::remove(step, sa, conn, spi_in);
    if let Phase::Established(established) = &mut sa.phase
        && state == ChildState::Live
        && !had_successor
    {
        established::want_again(established, conn, &name, now);
    }
    // RFC 7296 §1.4.1, §2.25.1: both delete it at once: no Delete in the answer.
    (!asked).then_some(spi_in)
}
