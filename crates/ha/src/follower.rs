//! The shadow's side: receive a snapshot, follow the log, acknowledge what is installed.
//!
//! ```text
//!   chunk 0 … last ──► staging ──► whole and its digest right ──► swap in, Apply the difference
//!                         │                                          │
//!                         └ stream lost, gap: dropped, the old       ▼
//!                           state stays                       records, each the next position:
//!                                                             Apply ──► applied() ──► Ack
//!                                                               └► unusable(): taken back, never
//!                                                                  acknowledged, and nothing more
//!                                                                  until a whole snapshot is installed
//! ```
//! What the gateway cannot use leaves the state before it, unsynced: good enough to take over in
//! doubt, as any shadow that fell behind. A snapshot is asked for at most once in
//! [`UNUSABLE_PAUSE`]; one that is unusable too is not asked for again, so the owner's own pauses
//! (`owner`: 1 s, doubling up to 30 s) bound how often it tries.
//!
//! A snapshot is staged and swapped in whole, so the state is at every moment some legal prefix
//! of the log, and an owner that dies in mid-snapshot leaves at least the older state. Nothing is
//! taken from a term other than the one followed, and nothing at all once we own.

use crate::bug::Bug;
use crate::codec::{Chunk, ClaimRole, Frame, Record};
use crate::config::OFFER_PATIENCE;
use crate::digest::entry_hash;
use crate::endpoint::{Cx, Endpoint, Role};
use crate::event::Event;
use crate::ownership::class;
use crate::store::Undo;
use crate::types::{ApplyId, Batch, Lineage, Opaque, Position, Term, Value};
use core::time::Duration;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

/// Most keys, and most bytes of values, of one endpoint's snapshot.
const KEYS_MAX: usize = 1 << 20;
const STATE_MAX: usize = 1 << 30;
/// A snapshot in place of an unusable record is asked for at most once in this long.
pub(crate) const UNUSABLE_PAUSE: Duration = Duration::from_secs(1);

pub(crate) struct Staging {
    snap: u64,
    term: Term,
    lineage: Lineage,
    next_part: u64,
    bytes: usize,
    digest: u64,
    map: BTreeMap<u64, Arc<Value>>,
}

/// Pieces of a grant.
pub(crate) struct GrantIn {
    pub(crate) term: Term,
    pub(crate) next_part: u64,
    pub(crate) counters: Value,
}

struct Installing {
    id: ApplyId,
    term: Term,
    position: Position,
    snap: u64,
    /// It is a whole snapshot.
    whole: bool,
    undo: Undo,
}

#[derive(Default)]
pub(crate) struct Follower {
    /// The owner says that our state is exact.
    pub(crate) synced: bool,
    /// The offer we heard of, and when first.
    pub(crate) offer: Option<(Term, Duration)>,
    pub(crate) grant: Option<GrantIn>,
    staging: Option<Staging>,
    installing: VecDeque<Installing>,
    snap: u64,
    asked: bool,
    /// A record could not be used: what follows it is worth nothing without a snapshot.
    hole: bool,
    /// No snapshot is asked for on account of that before.
    ask_again: Duration,
}

impl Follower {
    /// The old owner after a switchover: exact to the last record.
    pub(crate) fn exact() -> Follower {
        Follower { synced: true, ..Follower::default() }
    }

    pub(crate) fn patience_ends(&self) -> Option<Duration> {
        self.offer.map(|(_, heard)| heard + OFFER_PATIENCE)
    }

    /// The stream is gone: what was on its way will not come.
    pub(crate) fn stream_down(&mut self) {
        self.staging = None;
        self.grant = None;
        self.asked = false;
    }
}

impl Endpoint {
    /// Takes the owner's word for how exact our state is.
    pub(crate) fn refresh_synced(&mut self, cx: &Cx<'_>) {
        let Role::Follower(follower) = &mut self.role else { return };
        follower.synced &= cx.contact.in_step() && !follower.hole;
        let Some(claim) = cx.contact.claim(self.hash) else { return };
        if claim.role != ClaimRole::Owner {
            return;
        }
        let same = claim.term == self.store.term && claim.lineage == self.store.lineage;
        let damaged = same
            && claim.position == self.store.position
            && claim.digest != self.store.digest()
            && cx.bug != Bug::DigestIgnored;
        if same && damaged && follower.synced {
            tracing::error!(endpoint = self.name, "digests differ: our state is not exact");
        }
        let exact = !damaged && !follower.hole;
        follower.synced = same && claim.synced && exact && cx.contact.in_step();
    }

    pub(crate) fn handle_chunk(&mut self, cx: &mut Cx<'_>, chunk: Chunk) {
        let ours = self.claim(false);
        let Role::Follower(follower) = &mut self.role else { return };
        // A claim of ours that is better than the sender's is about to be made good, and an older
        // owner of our own lineage has been superseded.
        let outranked = chunk.lineage != self.store.lineage
            && cx.contact.claim(self.hash).is_some_and(|claim| class(claim) < class(&ours));
        let old = chunk.lineage == self.store.lineage && chunk.term < self.store.term;
        if outranked
            || old
            || chunk.lineage == Lineage::NONE
            || chunk.term.index() == cx.config.index
        {
            return;
        }
        if chunk.part == 0 {
            follower.asked = false;
            follower.staging = Some(Staging {
                snap: chunk.snap,
                term: chunk.term,
                lineage: chunk.lineage,
                next_part: 0,
                bytes: 0,
                digest: 0,
                map: BTreeMap::new(),
            });
        }
        let Some(staging) = &mut follower.staging else { return };
        let fits = staging.snap == chunk.snap
            && staging.term == chunk.term
            && staging.lineage == chunk.lineage
            && staging.next_part == chunk.part;
        if !fits {
            return self.ask_resync(cx);
        }
        staging.next_part += 1;
        for put in chunk.puts {
            staging.bytes = staging.bytes.saturating_add(put.value.len());
            staging.digest = staging.digest.wrapping_add(entry_hash(put.key, &put.value));
            staging.map.insert(put.key, Arc::new(put.value));
        }
        if staging.map.len() > KEYS_MAX || staging.bytes > STATE_MAX {
            return self.ask_resync(cx);
        }
        let (id, term, snap) = (self.hash, chunk.term, chunk.snap);
        cx.out.frame(&Frame::ChunkAck { id, term, snap, part: chunk.part });
        if !chunk.last {
            return;
        }
        let Some(staging) = follower.staging.take() else { return };
        if staging.digest != chunk.digest {
            tracing::error!(
                endpoint = self.name,
                "a snapshot's digest differs: asking for another"
            );
            return self.ask_resync(cx);
        }
        follower.snap = chunk.snap;
        let (batch, undo) = self.store.replace(staging.map);
        self.store.term = chunk.term;
        self.store.lineage = chunk.lineage;
        self.store.position = chunk.position;
        self.terms.heard(chunk.term);
        self.dirty.clear();
        self.install(cx, batch, undo, true);
        self.refresh_synced(cx);
        self.notify(crate::event::HookState::Backup, cx.out);
    }

    pub(crate) fn handle_record(&mut self, cx: &mut Cx<'_>, record: Record) {
        if cx.bug == Bug::OldLogAcked && !matches!(self.role, Role::Follower(_)) {
            let (id, term, position) = (self.hash, record.term, record.position);
            cx.out.frame(&Frame::Ack { id, term, position, snap: 0 });
        }
        let Role::Follower(follower) = &mut self.role else { return };
        if record.term != self.store.term || record.term.index() == cx.config.index {
            return;
        }
        if record.position <= self.store.position || follower.hole {
            return;
        }
        if follower.staging.is_some() || record.position.0 != self.store.position.0 + 1 {
            return self.ask_resync(cx);
        }
        let mut batch = Batch {
            puts: record.puts.into_iter().map(|put| (put.key, put.value)).collect(),
            deletes: record.deletes,
        };
        if matches!(cx.bug, Bug::PutLost | Bug::DigestIgnored) && record.position.0 % 7 == 3 {
            batch.puts.pop();
        }
        let undo = self.store.apply(batch.clone());
        self.install(cx, batch, undo, false);
    }

    /// Gives the gateway something to install.
    fn install(&mut self, cx: &mut Cx<'_>, batch: Batch, undo: Undo, whole: bool) {
        let id = ApplyId(self.next_serial());
        let (term, position) = (self.store.term, self.store.position);
        let Role::Follower(follower) = &mut self.role else { return };
        let snap = follower.snap;
        follower.installing.push_back(Installing { id, term, position, snap, whole, undo });
        cx.out.event(Event::Apply { endpoint: self.id, id, position, batch });
        if cx.bug == Bug::AckBeforeApply {
            cx.out.frame(&Frame::Ack { id: self.hash, term, position, snap });
        }
    }

    /// The gateway has installed everything up to and including `id`.
    pub(crate) fn applied(&mut self, cx: &mut Cx<'_>, id: ApplyId) {
        let Role::Follower(follower) = &mut self.role else { return };
        let mut reached = None;
        while follower.installing.front().is_some_and(|front| front.id <= id) {
            reached = follower.installing.pop_front();
            follower.hole &= !reached.as_ref().is_some_and(|reached| reached.whole);
        }
        if let Some(Installing { term, position, snap, .. }) = reached
            && term == self.store.term
            && cx.joined.usable().is_some()
        {
            cx.out.frame(&Frame::Ack { id: self.hash, term, position, snap });
        }
    }

    /// The gateway cannot use `id`: it and all after it are taken back. False if there was nothing of it.
    pub(crate) fn unusable(&mut self, cx: &mut Cx<'_>, id: ApplyId) -> bool {
        let Role::Follower(follower) = &mut self.role else { return false };
        let mut first = None;
        while follower.installing.back().is_some_and(|back| back.id >= id)
            && let Some(Installing { whole, undo, .. }) = follower.installing.pop_back()
        {
            self.store.revert(undo);
            first = Some(whole);
        }
        let Some(whole) = first else { return false };
        follower.hole = true;
        follower.synced = false;
        follower.grant = None;
        let term = cx.contact.claim(self.hash).map_or(self.store.term, |claim| claim.term);
        tracing::error!(
            endpoint = self.name,
            what = if whole { "snapshot" } else { "record" },
            "unusable, and not acknowledged: this instance is not in sync"
        );
        if !whole && cx.now >= follower.ask_again {
            follower.ask_again = cx.now + UNUSABLE_PAUSE;
            cx.out.frame(&Frame::Resync { id: self.hash, term });
        }
        true
    }

    fn ask_resync(&mut self, cx: &mut Cx<'_>) {
        let Role::Follower(follower) = &mut self.role else { return };
        follower.staging = None;
        if !follower.asked {
            follower.asked = true;
            cx.out.frame(&Frame::Resync { id: self.hash, term: self.store.term });
        }
    }

    pub(crate) fn handle_side(&mut self, cx: &mut Cx<'_>, term: Term, side: u64, bytes: &[u8]) {
        // A side message may run ahead of the snapshot that brings its term.
        let owner = cx
            .contact
            .claim(self.hash)
            .is_some_and(|claim| claim.role == ClaimRole::Owner && claim.term == term);
        if !matches!(self.role, Role::Follower(_)) || !(owner || term == self.store.term) {
            return;
        }
        cx.out.event(Event::Side { endpoint: self.id, bytes: Opaque(bytes.to_vec()) });
        if side != 0 {
            cx.out.frame(&Frame::SideAck { id: self.hash, term, side });
        }
    }
}
