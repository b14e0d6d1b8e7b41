//! Who owns an endpoint: boot, takeover, healing, and the end of ownership.
//!
//! ```text
//!   who follows and may own asks, each turn:
//!   other dead (Proven) ───────────────► own
//!   other dead (Silence) ── uplink up ──► own, jump 2²⁴, no initiating for 10 s
//!   other never met ────── boot_wait ───► own (empty: a new lineage)
//!   stopped for so long that another process may own ── boot_wait again ──► own, in doubt
//!   other alive, not owning ────────────► the better claim owns, once the other has echoed it
//!   other alive, owning ────────────────► follow; one that is emptier stands down for us first
//!   addresses cannot move, not its home ► never; its home dead or empty: what we hold is removed
//!
//!   an owner that hears
//!   a higher term of its lineage ───────► stands down at once, owes its tail
//!   a rival with the better claim ──────► the same
//!   empty: a shadow with state of its own ► stands down, and that owns when it has heard of it
//!   a rival with the worse claim, or what
//!   stood down from a higher term ──────► takes a term above both, announces again
//!   nothing more of who may have owned
//!   while we were stopped ──────────────► takes a new term, in doubt
//! ```
//! Claims are compared by class (owning or synced 2, unsynced 1, empty 0), then by term; equal
//! empty ones by home, unless the home's uplink is dead. Both sides compare the same two claims,
//! for each acts only when the other has echoed its present one: so just one of them acts.
//! Empty means that the lineage has no record yet: an instance that booted alone and owns nothing
//! worth keeping is no better than one that does not own.

use crate::bug::Bug;
use crate::codec::{Claim, ClaimRole, Frame, Handover, TailPut};
use crate::config::{
    CHUNK, COUNTERS_MAX, JUMP_SILENCE, JUMP_UNSYNCED, QUIET, TERM_PATIENCE, YIELD_PATIENCE,
};
use crate::contact::Death;
use crate::endpoint::{Cx, Endpoint, Role};
use crate::event::{Event, HookState, How, Mode, Own, TailItem, Warning, Why};
use crate::follower::Follower;
use crate::owner::Owner;
use crate::types::{ApplyId, Lineage, Opaque, Position, Term, Value};
use core::time::Duration;
use std::collections::BTreeMap;

/// Most keys and bytes of a loser's tail that a winner takes in.
const TAIL_KEYS_MAX: usize = 1 << 20;

/// A loser that owes the winner its tail.
pub(crate) struct Yielding {
    since: Duration,
    /// The winner's process.
    to: u64,
    /// The winner's history is not ours: it knows nothing of what we hold.
    foreign: bool,
    counters: Option<Opaque>,
}

/// A tail on its way in.
pub(crate) struct HandoverIn {
    term: Term,
    next_part: u64,
    bytes: usize,
    tail: Vec<TailPut>,
    counters: Vec<u8>,
}

/// How much a claim is worth before terms are compared.
pub(crate) fn class(claim: &Claim) -> u8 {
    match claim.role {
        _ if claim.position.0 == 0 || claim.lineage == Lineage::NONE => 0,
        ClaimRole::Empty => 0,
        ClaimRole::Owner => 2,
        ClaimRole::Shadow if claim.synced => 2,
        ClaimRole::Shadow | ClaimRole::Yielding => 1,
    }
}

/// Whether `one` has more of another history.
fn fuller(one: &Claim, other: &Claim) -> bool {
    one.lineage != other.lineage && class(one) > class(other)
}

/// Whether `mine` beats `theirs`; the same question asked by the other gives the opposite answer.
fn beats(mine: &Claim, theirs: &Claim, home: bool) -> bool {
    let owners = mine.role == ClaimRole::Owner && theirs.role == ClaimRole::Owner;
    if owners && mine.lineage == theirs.lineage {
        return mine.term > theirs.term;
    }
    let (ours, other) = (class(mine), class(theirs));
    if ours != other {
        return ours > other;
    }
    if (ours > 0 || owners) && mine.term != theirs.term {
        return mine.term > theirs.term;
    }
    let (home_claim, away_claim) = if home { (mine, theirs) } else { (theirs, mine) };
    let home_wins = home_claim.uplink || !away_claim.uplink;
    home_wins == home
}

impl Endpoint {
    /// The newest claims of the other were heard.
    pub(crate) fn handle_claims(&mut self, cx: &mut Cx<'_>) {
        let Some(claim) = cx.contact.claim(self.hash).cloned() else { return };
        // While it offers a term to us, its own floor stands at that term, which is ours to take.
        let floor = if claim.offered == Term::NONE { claim.floor } else { Term::NONE };
        self.terms.heard(claim.term.max(floor));
        self.terms.heard_top(claim.top.max(claim.term));
        self.refresh_synced(cx);
        self.notice_offer(cx);
        self.handle_owned(cx, claim.taken);
        self.handle_refused(cx, claim.refused);
        let Role::Owner(_) = &self.role else { return };
        if claim.lineage == self.store.lineage && claim.term > self.store.term {
            if cx.bug != Bug::IgnoreHigherTerm {
                self.stand_down(cx, Why::Superseded);
            }
        } else if claim.role == ClaimRole::Owner
            && !beats(&self.claim(false), &claim, self.home)
            && cx.bug != Bug::IgnoreHigherTerm
        {
            self.stand_down(cx, Why::Healed);
        } else if self.adopted
            && claim.role != ClaimRole::Owner
            && fuller(&claim, &self.claim(false))
            && cx.bug != Bug::EmptyBeatsLiving
        {
            // It was away for so long that we began anew. It owns when it has heard that we do not.
            self.stand_down(cx, Why::Healed);
        } else {
            self.compare(cx);
        }
    }

    pub(crate) fn ownership_turn(&mut self, cx: &mut Cx<'_>) {
        match &self.role {
            Role::Owner(_) => {
                self.heal(cx);
                self.doubt(cx);
            }
            Role::Yielding(_) => self.yield_turn(cx),
            Role::Follower(_) => {
                if let Some((how, synced)) = self.claimable(cx) {
                    let empty = self.store.lineage == Lineage::NONE;
                    let how = if empty { How::Boot } else { how };
                    match self.next_term(cx.bug) {
                        Some(term) => self.acquire(cx, term, how, synced || empty),
                        None => self.wait_for_term(cx),
                    }
                }
            }
        }
    }

    /// Where addresses cannot move, only the home owns.
    pub(crate) fn may_own(&self) -> bool {
        self.home || self.adopted
    }

    /// What cannot be taken over is of no use once its home is gone, and in the way of a home that starts anew: we are
    /// empty then, and so claim nothing against it.
    pub(crate) fn withdraw_turn(&mut self, cx: &mut Cx<'_>) {
        let Role::Follower(_) = &self.role else { return };
        let claim = cx.contact.claim(self.hash).filter(|_| cx.contact.alive);
        let mine = self.claim(false);
        let home_has_it =
            claim.is_some_and(|claim| claim.role != ClaimRole::Empty && !fuller(&mine, claim));
        if self.may_own() || home_has_it || self.store.lineage == Lineage::NONE {
            return;
        }
        tracing::warn!(endpoint = self.name, "its home is gone: its tunnels are down here");
        let (batch, _) = self.store.replace(BTreeMap::new());
        (self.store.lineage, self.store.position) = (Lineage::NONE, Position(0));
        self.role = Role::Follower(Follower::default());
        let (id, position) = (ApplyId(self.next_serial()), self.store.position);
        cx.out.event(Event::Apply { endpoint: self.id, id, position, batch });
    }

    /// Our uplink works, and the other had the time to hear so. An owner that hears us but is not
    /// echoed goes on for as long as we report a dead uplink (fence, rule 4): it must have closed
    /// before a living uplink lets us take over by silence.
    pub(crate) fn uplink_lately(&self, cx: &Cx<'_>) -> bool {
        self.uplink && self.uplink_since.is_none_or(|since| cx.now >= since + cx.config.dead_after)
    }

    fn next_term(&self, bug: Bug) -> Option<Term> {
        match bug {
            Bug::TermParity => Some(Term(self.terms.top().0 + 1)),
            Bug::TermReuse => Some(Term(self.store.term.0).next_of(self.terms.index())),
            _ => self.terms.next(),
        }
    }

    /// Whether we may own now, how, and whether our state is exact.
    fn claimable(&self, cx: &Cx<'_>) -> Option<(How, bool)> {
        let Role::Follower(follower) = &self.role else { return None };
        let contact = cx.contact;
        if cx.leaving || cx.barred || !self.may_own() {
            return None;
        }
        if cx.config.lone {
            return Some((How::Boot, true));
        }
        let theirs = contact.claim(self.hash);
        let owned = theirs.is_some_and(|claim| claim.role == ClaimRole::Owner);
        if contact.alive {
            // In contact: only a claim that the other has heard counts, lest both act at once.
            let mine = self.claim(false);
            let won = match theirs {
                None => true,
                Some(_) if cx.bug == Bug::EmptyBeatsLiving && mine.role == ClaimRole::Empty => {
                    self.home
                }
                Some(_) if owned => false,
                Some(_) if !self.adopted => true,
                Some(theirs) => beats(&mine, theirs, self.home),
            };
            let heard = contact.echoed_since(self.claim_mark)
                && contact.echoed_lately(cx.now, cx.config.dead_after);
            let fresh = follower.synced && !owned;
            return (won && heard).then_some((How::Free, fresh));
        }
        // A shadow that could not take over at once no longer knows what a solo owner did since.
        // A proven death has been reckoned with when it was found.
        let belief = cx.config.dead_after * 3;
        let synced = follower.synced
            && (contact.proven_at().is_some()
                || contact.heard_at().is_some_and(|heard| cx.now < heard + belief)
                || cx.bug == Bug::SoloBeforeEcho);
        let uplink = self.uplink_lately(cx) || !self.adopted;
        // The new process behind a hello may own already; and one that we have yet to hear of may,
        // if we were away for long: then we know no more than one that boots.
        let known = contact.met && !contact.stranger() && !(contact.heard_at().is_none() && owned);
        match contact.death {
            Some(Death::Proven) if known => Some((How::ProvenDeath, synced)),
            Some(Death::Silence) if known => uplink.then_some((How::Silence, synced)),
            _ => {
                let waited = cx.now >= contact.sign_at + cx.config.boot_wait
                    && cx.now >= contact.listen_until.max(contact.rejoin_until);
                (waited && uplink).then_some((How::Silence, synced))
            }
        }
    }

    /// Takes the endpoint under a new term (ha.md, "Takeover, in order").
    pub(crate) fn acquire(&mut self, cx: &mut Cx<'_>, term: Term, how: How, synced: bool) {
        let kept = matches!(self.role, Role::Owner(_));
        let synced = synced && !(kept && self.usurped(cx));
        if self.store.lineage == Lineage::NONE {
            self.store.lineage = Lineage(cx.rng.draw());
        }
        self.store.term = term;
        self.terms.heard(term);
        self.term_wanted = None;
        self.above_usurpers = cx.contact.usurpers;
        if !kept {
            self.dirty.clear();
        }
        let granted = matches!(how, How::Grant(_));
        // What came over the stream is in its format. What a shadow holds besides may be of an older one.
        if granted {
            self.written = cx.joined.usable().unwrap_or_default();
        } else if !kept {
            (self.written, self.asked_to_write) = (0, 0);
        }
        let silence = how == How::Silence;
        let [first, second] = JUMP_UNSYNCED;
        let seq_jump = match (synced, silence) {
            (false, _) => {
                if cx.config.index == 0 {
                    first
                } else {
                    second
                }
            }
            (true, true) => JUMP_SILENCE,
            (true, false) => 0,
        };
        let owner = Owner::new(cx.now, self.store.position, self.store.digest());
        self.role = Role::Owner(Box::new(if granted {
            owner.granted(cx.now, self.store.position, cx.joined.usable().unwrap_or_default())
        } else {
            owner
        }));
        self.incoming = None;
        tracing::debug!(endpoint = self.name, term = term.0, how = how.name(), synced, "owner");
        let endpoint = self.id;
        cx.out.event(Event::Own(Own {
            endpoint,
            term,
            how,
            synced,
            seq_jump,
            obey_leases: granted,
            quiet_until: silence.then_some(cx.now + QUIET),
        }));
        let mode = if granted { Mode::Synced } else { Mode::Solo };
        cx.out.event(Event::Mode { endpoint, mode });
        if kept {
            // What waited for the shadow waits no more.
            cx.out.event(Event::Acked { endpoint, position: self.store.position });
        }
        self.fence_turn(cx);
        self.announce(cx);
        self.notify(HookState::Master, cx.out);
        self.reserve(cx);
    }

    /// No term is on disk. Worth a warning when that lasts.
    fn wait_for_term(&mut self, cx: &mut Cx<'_>) {
        let since = *self.term_wanted.get_or_insert(cx.now);
        if cx.now >= since + TERM_PATIENCE {
            cx.out.warnings.push(Warning::TermNotReserved(self.id));
        }
    }

    /// A rival whose claim is worse: the winner takes a new term above both, once for each rival.
    fn heal(&mut self, cx: &mut Cx<'_>) {
        let Some(claim) = cx.contact.claim(self.hash) else { return };
        let Some(boot) = cx.contact.peer.as_ref().map(|peer| peer.boot) else { return };
        // A rival of another lineage may have heard our claim, and stood down, before we heard it
        // as an owner: its term shows it.
        let mine = self.claim(false);
        let worse = match claim.role {
            ClaimRole::Owner => beats(&mine, claim, self.home),
            _ => claim.term > mine.term && class(claim) <= class(&mine),
        };
        let rival = cx.contact.alive && worse && self.healed != Some((boot, claim.term));
        // Our offer taken: handled where claims are heard.
        if !rival || matches!(&self.role, Role::Owner(owner) if owner.offer.is_some()) {
            return;
        }
        if cx.bug == Bug::HealInOldTerm {
            self.healed = Some((boot, claim.term));
            return;
        }
        match self.terms.next() {
            Some(term) => {
                self.healed = Some((boot, claim.term));
                self.acquire(cx, term, How::Heal, true);
            }
            None => self.wait_for_term(cx),
        }
    }

    fn usurped(&self, cx: &Cx<'_>) -> bool {
        self.adopted
            && self.above_usurpers != cx.contact.usurpers
            && cx.bug != Bug::UsurperForgotten
    }

    /// We were stopped, and the other died before we heard from it again: it may have owned meanwhile, and used numbers
    /// that we know nothing of.
    fn doubt(&mut self, cx: &mut Cx<'_>) {
        if !self.usurped(cx) {
            return;
        }
        match self.terms.next() {
            Some(term) => self.acquire(cx, term, How::Doubt, false),
            None => self.wait_for_term(cx),
        }
    }

    /// The other took what we offered: it is exact to the last record, and so are we.
    pub(crate) fn granted(&mut self, cx: &mut Cx<'_>, term: Term) {
        self.close_fence(cx.out);
        self.store.term = term;
        self.terms.heard(term);
        self.dirty.clear();
        self.role = Role::Follower(Follower::exact());
        tracing::debug!(endpoint = self.name, term = term.0, "switchover: handed over");
        let endpoint = self.id;
        cx.out.event(Event::StandDown { endpoint, why: Why::Granted, counters_wanted: false });
        self.notify(HookState::Backup, cx.out);
    }

    /// Ownership ends. The state stays as an unsynced shadow's until the winner's snapshot
    /// replaces it.
    pub(crate) fn stand_down(&mut self, cx: &mut Cx<'_>, why: Why) {
        if !matches!(self.role, Role::Owner(_)) {
            return;
        }
        self.close_fence(cx.out);
        let claim = cx.contact.claim(self.hash);
        let to = cx.contact.peer.as_ref().map_or(0, |peer| peer.boot);
        let counters_wanted =
            why != Why::Goodbye && claim.is_some_and(|claim| claim.role == ClaimRole::Owner);
        self.role = if counters_wanted {
            let foreign = claim.is_none_or(|claim| claim.lineage != self.store.lineage);
            Role::Yielding(Yielding { since: cx.now, to, foreign, counters: None })
        } else {
            Role::Follower(Follower::default())
        };
        self.incoming = None;
        tracing::debug!(endpoint = self.name, term = self.store.term.0, ?why, "no longer owner");
        cx.out.event(Event::StandDown { endpoint: self.id, why, counters_wanted });
        self.notify(HookState::Backup, cx.out);
    }

    /// The gateway reports final counters: for the grant, or for the winner after a split.
    pub(crate) fn final_counters(&mut self, cx: &mut Cx<'_>, counters: Opaque) {
        match &mut self.role {
            Role::Owner(_) => self.grant(cx, &counters),
            Role::Yielding(yielding) if counters.0.len() <= COUNTERS_MAX => {
                yielding.counters = Some(counters);
                self.yield_turn(cx);
            }
            _ => {}
        }
    }

    fn yield_turn(&mut self, cx: &mut Cx<'_>) {
        let Role::Yielding(yielding) = &self.role else { return };
        let gone = cx.contact.death.is_some()
            || cx.contact.peer.as_ref().is_none_or(|peer| peer.boot != yielding.to);
        let ready = yielding.counters.is_some() || cx.now >= yielding.since + YIELD_PATIENCE;
        if !gone && ready && cx.joined.epoch != 0 && cx.joined.compatible {
            self.hand_over(cx);
        } else if gone || (ready && cx.joined.epoch != 0) {
            self.role = Role::Follower(Follower::default());
        }
    }

    /// Sends the tail and the final counters; from then on we follow.
    fn hand_over(&mut self, cx: &mut Cx<'_>) {
        let Role::Yielding(yielding) = &mut self.role else { return };
        let counters = yielding.counters.take().unwrap_or_default();
        let keys: Vec<u64> = if yielding.foreign {
            self.store.iter().map(|(key, _)| key).collect()
        } else {
            self.dirty.keys().copied().collect()
        };
        let (id, term) = (self.hash, self.store.term);
        let mut keys = keys.into_iter();
        let mut pieces = counters.0.chunks(CHUNK);
        let mut part = 0;
        loop {
            let mut tail = Vec::new();
            let mut size = 0;
            while size < CHUNK
                && let Some(key) = keys.next()
            {
                let value = self.store.get(key).map(|value| Value::clone(value));
                size += 20 + value.as_ref().map_or(0, |value| value.len());
                tail.push(TailPut {
                    key,
                    removed: value.is_none(),
                    value: value.unwrap_or_default(),
                });
            }
            let counters = pieces.next().unwrap_or_default();
            let last = keys.len() == 0 && pieces.len() == 0;
            let counters = Value::new(counters.to_vec());
            cx.out.frame(&Frame::Handover(Handover { id, term, part, last, tail, counters }));
            if last {
                break;
            }
            part += 1;
        }
        self.dirty.clear();
        self.role = Role::Follower(Follower::default());
    }

    /// A loser's tail comes in.
    pub(crate) fn handle_handover(&mut self, cx: &mut Cx<'_>, piece: Handover) {
        if !matches!(self.role, Role::Owner(_)) {
            return;
        }
        if piece.part == 0 {
            let (tail, counters) = (Vec::new(), Vec::new());
            self.incoming =
                Some(HandoverIn { term: piece.term, next_part: 0, bytes: 0, tail, counters });
        }
        let Some(incoming) = &mut self.incoming else { return };
        incoming.bytes += piece.tail.iter().map(|item| item.value.len()).sum::<usize>();
        let fits = incoming.term == piece.term
            && incoming.next_part == piece.part
            && incoming.tail.len() + piece.tail.len() <= TAIL_KEYS_MAX
            && incoming.bytes <= 1 << 30
            && incoming.counters.len() + piece.counters.len() <= COUNTERS_MAX;
        if !fits {
            self.incoming = None;
            return;
        }
        incoming.next_part += 1;
        incoming.tail.extend(piece.tail);
        incoming.counters.extend_from_slice(&piece.counters);
        if !piece.last {
            return;
        }
        let Some(incoming) = self.incoming.take() else { return };
        let dirty: &BTreeMap<u64, _> = &self.dirty;
        let tail = incoming
            .tail
            .into_iter()
            .map(|item| TailItem {
                key: item.key,
                value: (!item.removed).then_some(item.value),
                touched: dirty.contains_key(&item.key),
            })
            .collect();
        let counters = Opaque(incoming.counters);
        cx.out.event(Event::Handover { endpoint: self.id, tail, counters });
    }
}

impl How {
    fn name(&self) -> &'static str {
        match self {
            How::Boot => "boot",
            How::ProvenDeath => "proven death",
            How::Silence => "silence",
            How::Grant(_) => "switchover",
            How::Heal => "heal",
            How::Resume => "resume",
            How::Doubt => "doubt",
            How::Free => "free",
        }
    }
}
