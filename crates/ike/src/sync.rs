//! Message id synchronisation (RFC 6311) after a takeover in doubt, and our
//! answer when the peer is a cluster itself.
//!
//! ```text
//!  HDR(id 0), SK {N(IKEV2_MESSAGE_ID_SYNC: nonce, M1, P1)} ──►
//!  ◄── HDR(id 0), SK {N(IKEV2_MESSAGE_ID_SYNC: nonce, P2, M2)}
//! ```
//! strongSwan 5.9.8 announces this only as the original initiator, and then, with
//! an AEAD, once it has sent requests and responses both, cannot encrypt its
//! answer with message id 0 (its IVs are message ids that must grow) and destroys
//! the IKE SA: seen in the lab. So a peer that initiated gets a new IKE SA
//! instead, make-before-break, unless a NAT keeps us from calling it.
//!
//! M1 is the id of our next request: the last one committed plus 256 (ha.md),
//! so it lies above all that the old owner may have used. The request is
//! committed before it is sent and never sent again by a later owner.
//!
//! The doubt is part of the record, so a later owner inherits it:
//!
//! ```text
//!   takeover in doubt ──► waits ──► quiet time over ──┬─► synchronises ──agreed──► exact
//!     or of what is in doubt                          │         │ no answer
//!                                                     └─────────┴──► Doubtful ──► replaced
//! ```
//! Until it is exact it repeats committed answers and says nothing else but its
//! synchronisation (or the answer to the peer's, which agrees just as well):
//! whatever the old owner said after our last record, no message id gets a second
//! content. Its Child SAs go on.

use core::net::SocketAddr;

use crypto::hash::sha256;
use wire::ike::{ExchangeType, Message, MessageBuilder, Notify, NotifyType, Payload, Payloads};

use crate::{
    child,
    error::Error,
    established, init,
    record::Bytes,
    state::{Answered, ChildState, Fate, IkeSa, Outstanding, Phase, Request, Task},
    step::{self, Step},
};

/// How far above the last committed id we continue.
const JUMP: u32 = 256;

struct Ids {
    nonce: u32,
    send: u32,
    recv: u32,
}

impl Ids {
    /// RFC 6311 §5.1: one notify and nothing else.
    fn parse(payloads: &Payloads<'_>) -> Option<Self> {
        let notify = payloads.notify(NotifyType::IKEV2_MESSAGE_ID_SYNC)?;
        let (nonce, rest) = notify.data.split_first_chunk::<4>()?;
        let (send, rest) = rest.split_first_chunk::<4>()?;
        let (recv, rest) = rest.split_first_chunk::<4>()?;
        (rest.is_empty() && payloads.len() == 1).then_some(Self {
            nonce: u32::from_be_bytes(*nonce),
            send: u32::from_be_bytes(*send),
            recv: u32::from_be_bytes(*recv),
        })
    }

    fn bytes(&self) -> [u8; 12] {
        let mut out = [0; 12];
        let words = [self.nonce, self.send, self.recv].map(u32::to_be_bytes);
        for (to, from) in out.iter_mut().zip(words.iter().flatten()) {
            *to = *from;
        }
        out
    }
}

/// Asks the peer to agree on message ids. What the old owner had outstanding is
/// forgotten; a Child SA it may have made is deleted at the peer afterwards.
pub(crate) fn request(step: &mut Step<'_, '_>, mut sa: IkeSa) -> Result<(), Error> {
    let nonce = step.cx.rng.next_u32();
    let (path, now) = (sa.path, step.now());
    let header = step::header(&sa, ExchangeType::INFORMATIONAL, false, 0);
    let initiator = sa.initiator;
    let Phase::Established(established) = &mut sa.phase else {
        return Err(Error::Internal("sync of no IKE SA"));
    };
    // RFC 6311 §5.1: M1 above that of a sync that another owner sent.
    established.set_in_doubt();
    if let Some(Task::Child(new)) = established.request.take().map(|r| r.task) {
        established.orphans.push(new.spi_in);
    }
    let m1 = established.send_next.saturating_add(JUMP);
    let ids = Ids { nonce, send: m1, recv: established.recv_next };
    let (keys, born) = (established.keys.clone(), established.term);
    let mut builder = MessageBuilder::sealed(&header);
    builder.push(&Payload::Notify(Notify::new(NotifyType::IKEV2_MESSAGE_ID_SYNC, &ids.bytes())));
    let bytes = step.seal(initiator, &keys, born, builder)?;
    established.request = Some(Request {
        out: Outstanding { id: 0, bytes: bytes.as_slice().into(), sent_at: now, sent: 1 },
        task: Task::Sync(nonce, m1),
    });
    step.send(&path, bytes);
    step.put(sa);
    Ok(())
}

/// Whether to agree on message ids rather than to establish a new IKE SA.
pub(crate) fn is_preferred(sa: &IkeSa) -> bool {
    sa.established().is_some_and(|e| e.sync && e.fate != Fate::Doubtful)
        && (sa.initiator || sa.path.nat_there)
}

/// The other way out of doubt: a new IKE SA, without INITIAL_CONTACT, while the
/// Child SAs of this one go on until that one is up.
pub(crate) fn reestablish(step: &mut Step<'_, '_>, mut sa: IkeSa) -> Result<(), Error> {
    let conn = step.connection(&sa)?;
    // Whether somebody else carries the connection: the peer called meanwhile.
    let carried = step.of_connection(&conn.name).iter().any(|other| {
        other.established().is_some_and(|e| !e.doubt && e.fate == Fate::Live && e.carries())
    });
    let until = step.now().after(child::LINGER);
    let Phase::Established(established) = &mut sa.phase else {
        return Err(Error::Internal("doubt about no IKE SA"));
    };
    established.doubt = true;
    established.request = None;
    if let Fate::Deleting(reason) = established.fate {
        // It was on its way out, and its Delete can no longer be said.
        return established::drop_sa(step, &sa, reason);
    }
    established.fate = Fate::Doubtful;
    if carried {
        established.expires_at = established.expires_at.min(until);
    }
    let mut names: Vec<String> = established
        .children
        .iter()
        .filter(|c| !c.is_retired())
        .map(|c| c.name.clone())
        .chain(established.wanted.iter().map(|w| w.name.clone()))
        .collect();
    names.sort();
    names.dedup();
    let remote = sa.path.remote.ip();
    let trying = step.of_connection(&conn.name).iter().any(|other| other.is_initiating());
    step.put(sa);
    if trying || carried {
        return Ok(());
    }
    init::start(step, conn, remote, names, false).map(|_| ())
}

/// The peer agreed.
pub(crate) fn finish(
    step: &mut Step<'_, '_>,
    mut sa: IkeSa,
    payloads: &Payloads<'_>,
    nonce: u32,
    m1: u32,
) -> Result<(), Error> {
    // RFC 6311 §5.1: dropped if the nonce differs.
    let ids = Ids::parse(payloads).filter(|ids| ids.nonce == nonce).ok_or(Error::NotExpected)?;
    let now = step.now();
    let Phase::Established(established) = &mut sa.phase else { return Err(Error::NotExpected) };
    established.request = None;
    established.send_next = m1.max(ids.recv);
    established.recv_next = established.recv_next.max(ids.send);
    established.answered = None;
    established.heard = now;
    established.doubt = false;
    if established.fate == Fate::Doubtful {
        established.fate = Fate::Live;
    }
    // ha.md: Child SAs first. Their counters jumped, and their windows may be old.
    for child in established.children.iter_mut().filter(|c| c.state == ChildState::Live) {
        child.rekey_at = child.rekey_at.min(now);
    }
    established::advance(step, &mut sa)?;
    step.put(sa);
    Ok(())
}

/// The peer is the cluster: agree, and forget what was outstanding.
pub(crate) fn answer(
    step: &mut Step<'_, '_>,
    mut sa: IkeSa,
    datagram: &[u8],
    message: &Message<'_>,
    from: SocketAddr,
    to: SocketAddr,
) -> Result<(), Error> {
    if message.header.exchange != ExchangeType::INFORMATIONAL {
        return Err(Error::NotExpected);
    }
    let established = sa.established().ok_or(Error::NotExpected)?;
    let hash = sha256(&[datagram]);
    if let Some(synced) = established.synced.as_ref().filter(|s| s.request[..] == hash) {
        let bytes = synced.response.to_vec();
        step.transmit(to, from, bytes);
        return Ok(());
    }
    let (keys, born) = (established.keys.clone(), established.term);
    let opened = step::open(datagram, message, sa.initiator, &keys)?;
    let payloads = opened.payloads()?;
    let ids = Ids::parse(&payloads).ok_or(Error::NotExpected)?;
    let now = step.now();
    let initiator = sa.initiator;
    let Phase::Established(established) = &mut sa.phase else { return Err(Error::NotExpected) };
    // RFC 6311 §5.1: dropped in silence unless M1 is above all we have seen, so
    // that a replay does nothing.
    let replayed = established.synced.is_some() && ids.send <= established.synced_m1;
    if ids.send < established.recv_next || replayed || established.fate == Fate::Doubtful {
        return Err(Error::NotExpected);
    }
    established.recv_next = ids.send;
    if core::mem::take(&mut established.doubt) {
        // Both ends are clusters: P2 is above what our old owner may have used.
        established.send_next = match established.task() {
            Some(Task::Sync(_, m1)) => *m1,
            _ => established.send_next.saturating_add(JUMP),
        };
    }
    established.send_next = established.send_next.max(ids.recv);
    established.answered = None;
    established.heard = now;
    // RFC 6311 §9: do not wait for pending responses. What was asked for is
    // asked for again when it is due.
    if let Some(Task::Child(new)) = established.request.take().map(|r| r.task) {
        established.orphans.push(new.spi_in);
    }
    let agreed = Ids { nonce: ids.nonce, send: established.send_next, recv: established.recv_next };
    let mut builder = MessageBuilder::sealed(&message.header.to_response());
    builder.push(&Payload::Notify(Notify::new(NotifyType::IKEV2_MESSAGE_ID_SYNC, &agreed.bytes())));
    let bytes = step.seal(initiator, &keys, born, builder)?;
    established.synced_m1 = ids.send;
    established.synced =
        Some(Answered { request: Bytes::from(&hash[..]), response: bytes.as_slice().into() });
    step.transmit(to, from, bytes);
    established::advance(step, &mut sa)?;
    step.put(sa);
    Ok(())
}
