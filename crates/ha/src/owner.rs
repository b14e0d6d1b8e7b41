//! The owner's side of the log: append, commit, and the way from solo into sync and back.
//!
//! ```text
//!            stream joined, contact two-way, the other follows
//!   Solo ───────────────────────────────────────────────► Syncing ── snapshot cut, chunks, tail
//!    ▲ ▲ ▲                                                 │   │
//!    │ │ └── stream lost, or no progress for 500 ms ───────┘   │ snapshot acknowledged, and the
//!    │ │                                                       │ gateway confirmed that counters are
//!    │ │                                                       ▼ below acknowledged ceilings
//!    │ └── the other is dead ───────────────────────────── Synced ◄┐ stream lost and back:
//!    │                                                        │  └─┘ a snapshot, still in sync
//!    └── `unsynced` echoed (or the other is dead) ── Leaving ◄┘ acknowledgements lag 500 ms,
//!                                                               or the digests differ
//! ```
//! Before a snapshot is cut for a stream, the gateway writes all values anew, in the format of the
//! release that is settled for it and with ages as of then (`Rewrite`). So whatever a stream
//! carries is in its format, and the same bytes make the digests of both. That is a record like any
//! other, which steps the position; but it is no change that a winner would have to know of after a
//! split, so the tail of the log (`dirty`) does not have it.
//!
//! In Solo every record is committed as it is appended. In the other three it is committed when
//! acknowledged, which at the shadow means installed. From the cut of the snapshot on, records
//! queue behind its last chunk; side messages go ahead of what remains of it. In Leaving the owner
//! has said `unsynced` but still obeys, until a heartbeat echoes that: so a shadow that believes
//! itself in sync is.

use crate::bug::Bug;
use crate::codec::{self, Chunk, ClaimRole, Frame, Put, Record};
use crate::config::{CHUNK, CHUNK_WINDOW, LAG, SIDE_MAX, SYNC_HOLD};
use crate::endpoint::{Cx, Endpoint, Role};
use crate::event::{Event, Mode, Transmit, Warning};
use crate::ownership::class;
use crate::pair::{AppendError, SideKind};
use crate::types::{Batch, Position, SideId, SyncId, Term, Value};
use core::time::Duration;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

/// First pause before another attempt after the shadow was too slow; doubles up to the last.
const BACKOFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// Positions whose digest is remembered for comparison with the shadow's.
const HISTORY: usize = 1024;

pub(crate) enum Stage {
    Solo,
    Syncing {
        id: SyncId,
        /// The snapshot is acknowledged.
        snapped: bool,
        /// Counters are below acknowledged ceilings.
        confirmed: bool,
    },
    Synced {
        since: Duration,
    },
    Leaving {
        /// What was sent after this mark says `unsynced`.
        mark: u64,
        /// The digests differ: no pause before the next attempt.
        at_once: bool,
    },
}

impl Stage {
    pub(crate) fn mode(&self) -> Mode {
        match self {
            Stage::Solo => Mode::Solo,
            Stage::Syncing { id, .. } => Mode::Syncing(*id),
            Stage::Synced { .. } | Stage::Leaving { .. } => Mode::Synced,
        }
    }
}

struct Snapshot {
    snap: u64,
    position: Position,
    digest: u64,
    rest: VecDeque<(u64, Arc<Value>)>,
    next_part: u64,
    acked_parts: u64,
    /// The last chunk has left.
    sent: bool,
}

/// A switchover under way.
pub(crate) struct Offer {
    pub(crate) term: Term,
    /// The grant has left, so the other may own at any moment.
    pub(crate) sent: bool,
    /// The process that it was meant for has ended: nobody can answer.
    pub(crate) orphaned: bool,
}

pub(crate) struct Owner {
    pub(crate) stage: Stage,
    /// What the shadow has acknowledged.
    pub(crate) acked: Position,
    pub(crate) offer: Option<Offer>,
    /// Appended and not acknowledged, with the time.
    pending: VecDeque<(Position, Duration)>,
    /// Records behind the snapshot.
    held: VecDeque<Value>,
    snapshot: Option<Snapshot>,
    sides: BTreeMap<u64, (Duration, Value)>,
    history: VecDeque<(Position, u64)>,
    /// The stream that carries our records; another one wants a snapshot first.
    stream: u64,
    progress_at: Duration,
    resync_at: Duration,
    backoff: Duration,
}

impl Owner {
    pub(crate) fn new(now: Duration, position: Position, digest: u64) -> Owner {
        Owner {
            stage: Stage::Solo,
            acked: Position(0),
            offer: None,
            pending: VecDeque::new(),
            held: VecDeque::new(),
            snapshot: None,
            sides: BTreeMap::new(),
            history: [(position, digest)].into(),
            stream: 0,
            progress_at: now,
            resync_at: now,
            backoff: BACKOFF.0,
        }
    }

    /// After a grant the old owner is our shadow, exact to the last record.
    pub(crate) fn granted(mut self, now: Duration, position: Position, stream: u64) -> Owner {
        self.stage = Stage::Synced { since: now };
        self.acked = position;
        self.stream = stream;
        self
    }

    fn slower(&mut self) -> Duration {
        let pause = self.backoff;
        self.backoff = (pause * 2).min(BACKOFF.1);
        pause
    }
}

impl Endpoint {
    pub(crate) fn append(
        &mut self,
        cx: &mut Cx<'_>,
        batch: Batch,
    ) -> Result<Position, AppendError> {
        let changed: Vec<u64> =
            batch.puts.iter().map(|(key, _)| key).chain(&batch.deletes).copied().collect();
        let position = self.log(cx, batch)?;
        self.dirty.extend(changed.into_iter().map(|key| (key, position)));
        Ok(position)
    }

    /// The gateway says what it holds once more. A loser that owes its tail says it in the format
    /// that the winner reads.
    pub(crate) fn rewrite(
        &mut self,
        cx: &mut Cx<'_>,
        batch: Batch,
    ) -> Result<Option<Position>, AppendError> {
        if matches!(self.role, Role::Yielding(_)) {
            self.store.reword(batch);
            return Ok(None);
        }
        self.log(cx, batch).map(Some)
    }

    /// The gateway has said all.
    pub(crate) fn rewritten(&mut self, cx: &mut Cx<'_>) {
        self.written = self.asked_to_write;
        self.owner_turn(cx);
    }

    fn log(&mut self, cx: &mut Cx<'_>, batch: Batch) -> Result<Position, AppendError> {
        let Role::Owner(owner) = &mut self.role else { return Err(AppendError::NotOwner) };
        if owner.offer.is_some() {
            return Err(AppendError::NotOwner);
        }
        if !codec::fits(&batch) {
            return Err(AppendError::TooLarge);
        }
        let position = Position(self.store.position.0.saturating_add(1));
        let alone = matches!(owner.stage, Stage::Solo);
        let live = !alone && cx.joined.usable() == Some(owner.stream);
        let batch = if live {
            let puts = batch.puts.into_iter().map(|(key, value)| Put { key, value }).collect();
            let record = Frame::Record(Record {
                id: self.hash,
                term: self.store.term,
                position,
                puts,
                deletes: batch.deletes,
            });
            let bytes = codec::encode(&record);
            if owner.snapshot.as_ref().is_some_and(|snapshot| !snapshot.sent) {
                owner.held.push_back(bytes);
            } else {
                cx.out.transmits.push_back(Transmit::Frame(bytes));
            }
            let Frame::Record(record) = record else { return Err(AppendError::NotOwner) };
            let puts = record.puts.into_iter().map(|put| (put.key, put.value)).collect();
            Batch { puts, deletes: record.deletes }
        } else {
            batch
        };
        self.store.apply(batch);
        if owner.history.len() == HISTORY {
            owner.history.pop_front();
        }
        owner.history.push_back((position, self.store.digest()));
        if alone || cx.bug == Bug::CommitBeforeAck {
            cx.out.event(Event::Acked { endpoint: self.id, position });
        }
        if !alone {
            if owner.pending.is_empty() && owner.snapshot.is_none() {
                owner.progress_at = cx.now;
            }
            owner.pending.push_back((position, cx.now));
        }
        Ok(position)
    }

    pub(crate) fn send_side(
        &mut self,
        cx: &mut Cx<'_>,
        kind: SideKind,
        bytes: Vec<u8>,
    ) -> Option<SideId> {
        let serial = self.next_serial();
        let term = self.store.term;
        let Role::Owner(owner) = &mut self.role else { return None };
        if matches!(owner.stage, Stage::Solo) || bytes.len() > SIDE_MAX {
            return None;
        }
        let live = cx.joined.usable() == Some(owner.stream);
        let acked = kind == SideKind::Acked;
        if !live && !acked {
            return None;
        }
        let side = if acked { serial } else { 0 };
        let bytes = Value::new(bytes);
        if live {
            cx.out.frame(&Frame::Side { id: self.hash, term, side, bytes: bytes.clone() });
        }
        if acked {
            owner.sides.insert(serial, (cx.now, bytes));
        }
        if acked && cx.bug == Bug::LeaseBeforeAck {
            cx.out.event(Event::SideAcked { endpoint: self.id, id: SideId(serial) });
        }
        Some(SideId(serial))
    }

    pub(crate) fn confirm_ceilings(&mut self, cx: &mut Cx<'_>, sync: SyncId) {
        let Role::Owner(owner) = &mut self.role else { return };
        if let Stage::Syncing { id, confirmed, .. } = &mut owner.stage
            && *id == sync
        {
            *confirmed = true;
            self.try_synced(cx);
        }
    }

    fn try_synced(&mut self, cx: &mut Cx<'_>) {
        let Role::Owner(owner) = &mut self.role else { return };
        if matches!(owner.stage, Stage::Syncing { snapped: true, confirmed: true, .. }) {
            owner.stage = Stage::Synced { since: cx.now };
            cx.out.event(Event::Mode { endpoint: self.id, mode: Mode::Synced });
        }
    }

    /// Nobody to wait for: everything appended is committed, nothing is obeyed.
    pub(crate) fn go_solo(&mut self, cx: &mut Cx<'_>, pause: Duration) {
        let Role::Owner(owner) = &mut self.role else { return };
        owner.resync_at = cx.now + pause;
        owner.pending.clear();
        owner.held.clear();
        owner.snapshot = None;
        owner.sides.clear();
        owner.stream = 0;
        if !matches!(owner.stage, Stage::Solo) {
            owner.stage = Stage::Solo;
            cx.out.event(Event::Mode { endpoint: self.id, mode: Mode::Solo });
            cx.out.event(Event::Acked { endpoint: self.id, position: self.store.position });
        }
    }

    /// The other came back as a new process: it holds nothing of what the old one acknowledged.
    pub(crate) fn peer_restarted(&mut self, cx: &mut Cx<'_>) {
        self.go_solo(cx, Duration::ZERO);
        if let Role::Owner(owner) = &mut self.role
            && let Some(offer) = &mut owner.offer
        {
            offer.orphaned = true;
        }
        self.switchover_turn(cx);
    }

    /// Whether the other is ready to follow us.
    fn can_sync(&self, cx: &Cx<'_>) -> bool {
        let Some(claim) = cx.contact.claim(self.hash) else { return false };
        let follows = matches!(claim.role, ClaimRole::Empty | ClaimRole::Shadow);
        // A better claim than ours is about to be made good.
        let outranked =
            claim.lineage != self.store.lineage && class(claim) > class(&self.claim(false));
        // A term above its own comes first.
        let above = claim.term <= self.store.term || cx.bug == Bug::HealInOldTerm;
        follows && above && !outranked && cx.contact.echoed_lately(cx.now, cx.config.dead_after)
    }

    /// What the log does in a turn.
    pub(crate) fn owner_turn(&mut self, cx: &mut Cx<'_>) {
        let can_sync = self.can_sync(cx);
        let position = self.store.position;
        let Role::Owner(owner) = &mut self.role else { return };
        let dead = !cx.contact.alive;
        if owner.offer.is_some() {
            if dead {
                self.go_solo(cx, Duration::ZERO);
            }
            return;
        }
        let now = cx.now;
        let usable = cx.joined.usable();
        if let Some(epoch) = usable
            && epoch != self.written
            && epoch != self.asked_to_write
        {
            self.asked_to_write = epoch;
            let exact = matches!(owner.stage, Stage::Synced { .. } | Stage::Leaving { .. });
            cx.out.event(Event::Rewrite { endpoint: self.id, exact });
        }
        let written = usable == Some(self.written) || cx.bug == Bug::SnapshotAsItWas;
        let oldest = owner.pending.front().map(|(_, at)| *at);
        let oldest_side = owner.sides.values().next().map(|(at, _)| *at);
        match owner.stage {
            Stage::Solo => {
                if usable.is_some() && written && can_sync && now >= owner.resync_at {
                    let id = SyncId(self.next_serial());
                    if let Role::Owner(owner) = &mut self.role {
                        owner.stage = Stage::Syncing { id, snapped: false, confirmed: false };
                    }
                    cx.out.event(Event::Mode { endpoint: self.id, mode: Mode::Syncing(id) });
                    self.cut(cx);
                }
            }
            _ if dead => self.go_solo(cx, Duration::ZERO),
            Stage::Syncing { .. } => {
                let waiting = owner.snapshot.is_some() || oldest.is_some() || oldest_side.is_some();
                let stuck = waiting && now >= owner.progress_at + LAG;
                if usable != Some(owner.stream) {
                    self.go_solo(cx, Duration::ZERO);
                } else if stuck || oldest.is_some_and(|at| now >= at + SYNC_HOLD) {
                    let pause = owner.slower();
                    tracing::warn!(endpoint = self.name, "the shadow is too slow to follow: solo");
                    self.go_solo(cx, pause);
                }
            }
            Stage::Synced { since } => {
                if now >= since + BACKOFF.1 * 2 {
                    owner.backoff = BACKOFF.0;
                }
                if usable.is_some() && written && usable != Some(owner.stream) && can_sync {
                    self.cut(cx);
                    cx.out.event(Event::Mode { endpoint: self.id, mode: Mode::Synced });
                } else if [oldest, oldest_side].into_iter().flatten().any(|at| now >= at + LAG) {
                    tracing::warn!(
                        endpoint = self.name,
                        ?position,
                        "acknowledgements lag: unsynced"
                    );
                    self.leave_sync(cx, false);
                }
            }
            Stage::Leaving { mark, at_once } => {
                if cx.contact.echoed_since(mark) {
                    let pause = if at_once { Duration::ZERO } else { owner.slower() };
                    self.go_solo(cx, pause);
                }
            }
        }
    }

    fn leave_sync(&mut self, cx: &mut Cx<'_>, at_once: bool) {
        let Role::Owner(owner) = &mut self.role else { return };
        owner.stage = Stage::Leaving { mark: cx.contact.mark(), at_once };
        if cx.bug == Bug::SoloBeforeEcho {
            self.go_solo(cx, Duration::ZERO);
        }
    }

    /// Cuts a snapshot for a stream that has none: pending side messages first, then its chunks.
    fn cut(&mut self, cx: &mut Cx<'_>) {
        let snap = self.next_serial();
        let (id, term) = (self.hash, self.store.term);
        let Role::Owner(owner) = &mut self.role else { return };
        owner.stream = cx.joined.epoch;
        owner.held.clear();
        owner.progress_at = cx.now;
        for (side, (_, bytes)) in &owner.sides {
            cx.out.frame(&Frame::Side { id, term, side: *side, bytes: bytes.clone() });
        }
        owner.snapshot = Some(Snapshot {
            snap,
            position: self.store.position,
            digest: self.store.digest(),
            rest: self.store.iter().map(|(key, value)| (key, Arc::clone(value))).collect(),
            next_part: 0,
            acked_parts: 0,
            sent: false,
        });
        self.pump(cx);
    }

    /// Sends what the window allows.
    fn pump(&mut self, cx: &mut Cx<'_>) {
        let (id, term, lineage) = (self.hash, self.store.term, self.store.lineage);
        let Role::Owner(owner) = &mut self.role else { return };
        let Some(snapshot) = &mut owner.snapshot else { return };
        while !snapshot.sent && snapshot.next_part < snapshot.acked_parts + CHUNK_WINDOW {
            let mut puts = Vec::new();
            let mut size = 0;
            while let Some((key, value)) = snapshot.rest.pop_front() {
                size += value.len() + 20;
                puts.push(Put { key, value: Value::clone(&value) });
                if size >= CHUNK {
                    break;
                }
            }
            snapshot.sent = snapshot.rest.is_empty();
            cx.out.frame(&Frame::Chunk(Chunk {
                id,
                term,
                lineage,
                snap: snapshot.snap,
                part: snapshot.next_part,
                position: snapshot.position,
                digest: snapshot.digest,
                last: snapshot.sent,
                puts,
            }));
            snapshot.next_part += 1;
        }
        if snapshot.sent {
            cx.out.transmits.extend(owner.held.drain(..).map(Transmit::Frame));
        }
    }

    pub(crate) fn handle_chunk_ack(&mut self, cx: &mut Cx<'_>, term: Term, snap: u64, part: u64) {
        if term != self.store.term {
            return;
        }
        let Role::Owner(owner) = &mut self.role else { return };
        let Some(snapshot) = &mut owner.snapshot else { return };
        if snap == snapshot.snap && part < snapshot.next_part {
            snapshot.acked_parts = snapshot.acked_parts.max(part + 1);
            owner.progress_at = cx.now;
            self.pump(cx);
        }
    }

    /// The shadow has installed everything up to `position`, and the snapshot `snap`.
    pub(crate) fn handle_ack(
        &mut self,
        cx: &mut Cx<'_>,
        term: Term,
        position: Position,
        snap: u64,
    ) {
        if term != self.store.term || position > self.store.position {
            return;
        }
        let Role::Owner(owner) = &mut self.role else { return };
        if matches!(owner.stage, Stage::Solo) {
            return;
        }
        owner.progress_at = cx.now;
        owner.acked = owner.acked.max(position);
        self.dirty.retain(|_, changed| *changed > position);
        let mut fresh = false;
        while owner.pending.front().is_some_and(|(at, _)| *at <= position) {
            owner.pending.pop_front();
            fresh = true;
        }
        if fresh {
            cx.out.event(Event::Acked { endpoint: self.id, position });
        }
        if owner.snapshot.as_ref().is_some_and(|snapshot| snapshot.sent && snapshot.snap == snap) {
            owner.snapshot = None;
            if let Stage::Syncing { snapped, .. } = &mut owner.stage {
                *snapped = true;
            }
            self.try_synced(cx);
        }
    }

    pub(crate) fn handle_side_ack(&mut self, cx: &mut Cx<'_>, term: Term, side: u64) {
        if term != self.store.term {
            return;
        }
        let Role::Owner(owner) = &mut self.role else { return };
        if owner.sides.remove(&side).is_some() {
            owner.progress_at = cx.now;
            if cx.bug != Bug::LeaseBeforeAck {
                cx.out.event(Event::SideAcked { endpoint: self.id, id: SideId(side) });
            }
        }
    }

    /// The shadow cannot go on from what it holds.
    pub(crate) fn handle_resync(&mut self, cx: &mut Cx<'_>, term: Term) {
        if term == self.store.term {
            self.repair(cx);
        }
    }

    /// Compares the shadow's digest with ours at its position.
    pub(crate) fn compare(&mut self, cx: &mut Cx<'_>) {
        let Some(claim) = cx.contact.claim(self.hash) else { return };
        let Role::Owner(owner) = &self.role else { return };
        if claim.role != ClaimRole::Shadow
            || claim.term != self.store.term
            || claim.lineage != self.store.lineage
            || cx.bug == Bug::DigestIgnored
        {
            return;
        }
        let settled =
            matches!(owner.stage, Stage::Synced { .. } | Stage::Syncing { snapped: true, .. });
        let ours = owner.history.iter().rev().find(|(position, _)| *position == claim.position);
        if let Some((position, digest)) = ours
            && *digest != claim.digest
            && settled
        {
            let (endpoint, position) = (self.id, *position);
            cx.out.warnings.push(Warning::DigestMismatch { endpoint, position });
            self.repair(cx);
        }
    }

    fn repair(&mut self, cx: &mut Cx<'_>) {
        let Role::Owner(owner) = &mut self.role else { return };
        if owner.offer.is_some() {
            return;
        }
        match &mut owner.stage {
            Stage::Synced { .. } => self.leave_sync(cx, true),
            Stage::Syncing { snapped, .. } => {
                *snapped = false;
                self.cut(cx);
            }
            Stage::Solo | Stage::Leaving { .. } => {}
        }
    }
}
