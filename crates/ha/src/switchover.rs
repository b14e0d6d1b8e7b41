//! The planned way: the owner hands an endpoint to a shadow that is in sync.
//!
//! ```text
//!   owner (term T)                                   shadow
//!     │ Hold: workers stop and queue; IKE stops        │
//!     ├─ heartbeat: offered T+1 ──────────────────────►│ first heard: 50 ms of patience
//!     │ final_counters(): fence closed                 │
//!     ├─ Grant{T+1, counters, windows} ───────────────►│ in time, exact, not refused before
//!     │                                                │ Own{Grant}: announces
//!     │◄──────────────── Owned frame, and heartbeats ──┤
//!     │ StandDown{Granted}: steer queues and stragglers│
//!
//!     │◄─── refused T+1 (patience over, or not exact) ─┤ never accepts T+1 later
//!     │ Resume: term T, exact counters                 │
//!
//!     ╳ contact lost before any answer                 │ may own T+1 up to the granted ceilings
//!     │ Own{Resume}: a term above T+1, at the ceilings │
//! ```
//! Offer and answer ride in every heartbeat, so neither hangs on the stream alone. If the grant
//! never left, nobody can own by it: the owner resumes in its old term.

use crate::bug::Bug;
use crate::codec::{ClaimRole, Frame, Grant};
use crate::config::{COUNTERS_MAX, OFFER_PATIENCE, UPLINK_HOLDOFF};
use crate::contact::Death;
use crate::endpoint::{Cx, Endpoint, Role};
use crate::event::{Event, How};
use crate::follower::GrantIn;
use crate::owner::{Offer, Stage};
use crate::pair::SwitchoverError;
use crate::types::{Opaque, Term, Value};

/// Bytes of counters per frame.
const PART: usize = 256 << 10;

impl Endpoint {
    pub(crate) fn switchover(&mut self, cx: &mut Cx<'_>) -> Result<(), SwitchoverError> {
        let Role::Owner(owner) = &self.role else { return Err(SwitchoverError::NotOwner) };
        if owner.offer.is_some() {
            return Err(SwitchoverError::Busy);
        }
        if !self.adopted {
            return Err(SwitchoverError::Stays);
        }
        if !cx.contact.echoed_lately(cx.now, cx.config.dead_after) || cx.joined.usable().is_none() {
            return Err(SwitchoverError::NoContact);
        }
        if !matches!(owner.stage, Stage::Synced { .. }) {
            return Err(SwitchoverError::NotSynced);
        }
        match cx.contact.claim(self.hash) {
            Some(claim) if claim.role == ClaimRole::Shadow && claim.synced => {
                if !claim.uplink && self.uplink {
                    return Err(SwitchoverError::PeerUplink);
                }
            }
            _ => return Err(SwitchoverError::NotSynced),
        }
        self.offer(cx);
        Ok(())
    }

    fn offer(&mut self, cx: &mut Cx<'_>) {
        let refused = cx.contact.claim(self.hash).map_or(Term::NONE, |claim| claim.refused);
        let term = self.terms.top().max(self.store.term).max(refused).next_of(1 - cx.config.index);
        let Role::Owner(owner) = &mut self.role else { return };
        tracing::info!(endpoint = self.name, term = term.0, "switchover: offering");
        owner.offer = Some(Offer { term, sent: false, orphaned: false });
        // Whatever comes of it, no later term of ours may fall below it.
        self.terms.heard(term);
        cx.out.event(Event::Hold { endpoint: self.id });
    }

    /// The owner's gateway has exact counters: the grant leaves.
    pub(crate) fn grant(&mut self, cx: &mut Cx<'_>, counters: &Opaque) {
        let (id, from, position) = (self.hash, self.store.term, self.store.position);
        let Role::Owner(owner) = &mut self.role else { return };
        let Some(offer) = &mut owner.offer else { return };
        if offer.sent || cx.joined.usable().is_none() || counters.0.len() > COUNTERS_MAX {
            return;
        }
        offer.sent = true;
        let term = offer.term;
        if cx.bug != Bug::FenceOpenInGrant {
            self.close_fence(cx.out);
        }
        let parts = counters.0.len().div_ceil(PART).max(1);
        let mut pieces = counters.0.chunks(PART);
        for part in 0..parts {
            let piece = pieces.next().unwrap_or_default().to_vec();
            cx.out.frame(&Frame::Grant(Grant {
                id,
                from,
                term,
                position,
                part: part as u64,
                last: part + 1 == parts,
                counters: Value::new(piece),
            }));
        }
    }

    /// The other answered an offer, by frame or by heartbeat.
    pub(crate) fn handle_owned(&mut self, cx: &mut Cx<'_>, term: Term) {
        let Role::Owner(owner) = &self.role else { return };
        if owner.offer.as_ref().is_some_and(|offer| offer.sent && offer.term == term) {
            self.granted(cx, term);
        }
    }

    pub(crate) fn handle_refused(&mut self, cx: &mut Cx<'_>, term: Term) {
        let Role::Owner(owner) = &mut self.role else { return };
        if owner.offer.as_ref().is_some_and(|offer| offer.term <= term && !offer.orphaned) {
            tracing::info!(endpoint = self.name, "switchover: refused, resuming");
            owner.offer = None;
            cx.out.event(Event::Resume { endpoint: self.id });
            self.fence_turn(cx);
        }
    }

    /// The shadow notices an offer in a heartbeat: patience starts.
    pub(crate) fn notice_offer(&mut self, cx: &Cx<'_>) {
        let offered = cx
            .contact
            .claim(self.hash)
            .filter(|claim| claim.role == ClaimRole::Owner)
            .map_or(Term::NONE, |claim| claim.offered);
        let refused = self.refused;
        let Role::Follower(follower) = &mut self.role else { return };
        if offered == Term::NONE {
            follower.offer = None;
        } else if offered > refused && follower.offer.is_none_or(|(term, _)| term != offered) {
            follower.offer = Some((offered, cx.now));
        }
    }

    fn refuse(&mut self, cx: &mut Cx<'_>, term: Term) {
        if let Role::Follower(follower) = &mut self.role {
            follower.offer = None;
            follower.grant = None;
        }
        self.refused = self.refused.max(term);
        // Our next own term must not be one that means "offer taken".
        self.terms.heard(term);
        cx.out.frame(&Frame::Refused { id: self.hash, term });
    }

    pub(crate) fn handle_grant(&mut self, cx: &mut Cx<'_>, piece: Grant) {
        let may_own = self.may_own();
        let late = piece.term <= self.refused && cx.bug != Bug::GrantAfterRefusal;
        let Role::Follower(follower) = &mut self.role else { return };
        if late {
            return self.refuse(cx, piece.term);
        }
        if piece.part == 0 {
            let (term, counters) = (piece.term, Value::default());
            follower.grant = Some(GrantIn { term, next_part: 0, counters });
        }
        let Some(grant) = &mut follower.grant else { return };
        let size = grant.counters.len() + piece.counters.len();
        if grant.term != piece.term || grant.next_part != piece.part || size > COUNTERS_MAX {
            return self.refuse(cx, piece.term);
        }
        grant.next_part += 1;
        grant.counters.extend_from_slice(&piece.counters);
        if !piece.last {
            return;
        }
        let patient = follower.offer.is_none_or(|(term, heard)| {
            term != piece.term
                || cx.now < heard + OFFER_PATIENCE
                || cx.bug == Bug::GrantAfterRefusal
        });
        let exact = follower.synced
            && piece.from == self.store.term
            && piece.position == self.store.position;
        let free = cx.bug == Bug::GrantAfterRefusal || self.terms.may_take(piece.term);
        let contact = cx.contact.alive && !cx.barred && !cx.leaving && may_own;
        let counters =
            follower.grant.take().map(|grant| grant.counters.to_vec()).unwrap_or_default();
        if !(patient && exact && free && contact) {
            tracing::info!(endpoint = self.name, patient, exact, free, contact, "grant refused");
            return self.refuse(cx, piece.term);
        }
        self.taken = piece.term;
        // What the old owner said before it learns of this is no rival's claim.
        self.healed = cx.contact.peer.as_ref().map(|peer| (peer.boot, piece.from));
        cx.out.frame(&Frame::Owned { id: self.hash, term: piece.term });
        self.acquire(cx, piece.term, How::Grant(Opaque(counters)), true);
    }

    pub(crate) fn switchover_turn(&mut self, cx: &mut Cx<'_>) {
        match &mut self.role {
            Role::Follower(follower) => {
                if let Some((term, heard)) = follower.offer
                    && cx.now >= heard + OFFER_PATIENCE
                {
                    self.refuse(cx, term);
                }
            }
            Role::Owner(owner) => {
                let Some(offer) = &owner.offer else {
                    return self.uplink_turn(cx);
                };
                if cx.contact.alive && !offer.orphaned {
                    return;
                }
                if !offer.sent {
                    owner.offer = None;
                    cx.out.event(Event::Resume { endpoint: self.id });
                } else if (offer.orphaned
                    || self.uplink_lately(cx)
                    || cx.contact.death == Some(Death::Proven))
                    && let Some(term) = self.terms.next()
                {
                    self.acquire(cx, term, How::Resume, true);
                }
            }
            Role::Yielding(_) => {}
        }
    }

    /// Hands over by itself, only to a strictly better uplink, at most once in 10 s: counted here for the one that
    /// hands over, and for the one that was handed the endpoint by the other's uplink, which has failed too lately.
    fn uplink_turn(&mut self, cx: &mut Cx<'_>) {
        let Some(other_up) = cx.contact.claim(self.hash).map(|claim| claim.uplink) else { return };
        if !other_up {
            self.other_uplink_down_at = Some(cx.now);
        }
        let better = !self.uplink && other_up;
        let rested = [self.uplink_switch_at, self.other_uplink_down_at]
            .into_iter()
            .flatten()
            .all(|at| cx.now >= at + UPLINK_HOLDOFF);
        if better && rested && self.switchover(cx).is_ok() {
            self.uplink_switch_at = Some(cx.now);
        }
    }
}
