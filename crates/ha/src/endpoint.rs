//! One endpoint: its state, its role, and what every role shares.
//!
//! ```text
//!                        acquire (ownership)
//!        ┌────────────────────────────────────────────────────────┐
//!        │                                                        ▼
//!    Follower ◄── tail handed over ── Yielding ◄── superseded ── Owner ──┐ heal, resume,
//!   (empty or shadow)                              or healed      │ ▲    │ doubt: a new term
//!        ▲                                                        │ └────┘
//!        └───────────────── granted, goodbye ─────────────────────┘
//! ```
//! Split along the protocol: `owner` is the log and the way into sync, `follower` the shadow,
//! `ownership` who owns, `switchover` the planned way.

use crate::bug::Bug;
use crate::codec::{self, Claim, ClaimRole, Frame};
use crate::config::{ANNOUNCE_MS, Config};
use crate::contact::Contact;
use crate::event::{Event, HookState, Transmit, Warning};
use crate::fence::{Fence, Times, View};
use crate::follower::Follower;
use crate::owner::{Owner, Stage};
use crate::ownership::{HandoverIn, Yielding};
use crate::status::{EndpointStatus, Role as PublicRole};
use crate::store::Store;
use crate::terms::Terms;
use crate::types::{EndpointId, Position, Term};
use core::time::Duration;
use std::collections::{BTreeMap, VecDeque};

/// What leaves, in order.
#[derive(Default)]
pub(crate) struct Out {
    pub(crate) events: VecDeque<Event>,
    pub(crate) transmits: VecDeque<Transmit>,
    /// A heartbeat shall leave at once.
    pub(crate) hurry: bool,
    pub(crate) warnings: Vec<Warning>,
}

impl Out {
    pub(crate) fn frame(&mut self, frame: &Frame) {
        self.transmits.push_back(Transmit::Frame(codec::encode(frame)));
    }

    pub(crate) fn event(&mut self, event: Event) {
        self.events.push_back(event);
    }
}

/// The stream as endpoints see it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Joined {
    /// Grows with every stream over which both said hello; 0 while there is none.
    pub(crate) epoch: u64,
    /// Same config, common release.
    pub(crate) compatible: bool,
}

impl Joined {
    /// The stream on which records may be sent.
    pub(crate) fn usable(self) -> Option<u64> {
        (self.epoch != 0 && self.compatible).then_some(self.epoch)
    }
}

/// What an endpoint may look at and write to during one input.
pub(crate) struct Cx<'a> {
    pub(crate) now: Duration,
    pub(crate) config: &'a Config,
    pub(crate) contact: &'a Contact,
    pub(crate) joined: Joined,
    pub(crate) out: &'a mut Out,
    /// For lineages.
    pub(crate) rng: &'a mut crate::pair::Seed,
    /// Nothing may be acquired: the other claims our index or name, or speaks no format of ours.
    pub(crate) barred: bool,
    /// We said goodbye.
    pub(crate) leaving: bool,
    pub(crate) bug: Bug,
}

pub(crate) enum Role {
    Follower(Follower),
    Owner(Box<Owner>),
    Yielding(Yielding),
}

pub(crate) struct Endpoint {
    pub(crate) id: EndpointId,
    /// As configured, for the log.
    pub(crate) name: String,
    pub(crate) hash: u64,
    pub(crate) home: bool,
    /// Whether the instance that is not its home may own it.
    pub(crate) adopted: bool,
    pub(crate) store: Store,
    pub(crate) terms: Terms,
    pub(crate) fence: Fence,
    pub(crate) role: Role,
    /// Keys changed since the last record that the other acknowledged: the log's tail, compacted.
    pub(crate) dirty: BTreeMap<u64, Position>,
    pub(crate) uplink: bool,
    /// When it came back, if it ever went.
    pub(crate) uplink_since: Option<Duration>,
    /// The highest term offered to us that we refused.
    pub(crate) refused: Term,
    /// The highest term that we took by a grant.
    pub(crate) taken: Term,
    /// The rival (boot, term) above which we have already taken a new term.
    pub(crate) healed: Option<(u64, Term)>,
    /// How many possible usurpers ([`Contact::usurpers`]) our present term is above.
    pub(crate) above_usurpers: u64,
    pub(crate) incoming: Option<HandoverIn>,
    /// Not to be handed back unasked.
    pub(crate) declines: bool,
    /// Not to be handed to us at all.
    pub(crate) drains: bool,
    /// The stream (by its epoch) for whose release the gateway has written the values, and the one
    /// for which it was asked to.
    pub(crate) written: u64,
    pub(crate) asked_to_write: u64,
    pub(crate) uplink_switch_at: Option<Duration>,
    /// When the other last said, while we owned, that its uplink was dead.
    pub(crate) other_uplink_down_at: Option<Duration>,
    /// Source of ids for syncs, applies, snapshots and side messages.
    pub(crate) serial: u64,
    /// Heartbeats sent after this mark carry our present claim.
    pub(crate) claim_mark: u64,
    claimed: Claim,
    told: Duration,
    /// Since when an acquisition waits for a term on disk.
    pub(crate) term_wanted: Option<Duration>,
    announce: Option<(Duration, usize)>,
    hook: Option<(HookState, Term)>,
}

impl Endpoint {
    pub(crate) fn new(id: EndpointId, config: &Config, file: Option<Term>) -> Option<Endpoint> {
        let own = config.endpoints.get(usize::from(id.0))?;
        Some(Endpoint {
            id,
            name: own.name.clone(),
            hash: crate::digest::name_id(&own.name),
            home: own.home_is_me,
            adopted: own.adopted,
            store: Store::default(),
            terms: Terms::new(config.index, file),
            fence: Fence::default(),
            role: Role::Follower(Follower::default()),
            dirty: BTreeMap::new(),
            uplink: true,
            uplink_since: None,
            refused: Term::NONE,
            taken: Term::NONE,
            healed: None,
            above_usurpers: 0,
            incoming: None,
            declines: false,
            drains: false,
            written: 0,
            asked_to_write: 0,
            uplink_switch_at: None,
            other_uplink_down_at: None,
            serial: 0,
            claim_mark: 0,
            claimed: Claim::default(),
            told: Duration::ZERO,
            term_wanted: None,
            announce: None,
            hook: None,
        })
    }

    pub(crate) fn next_serial(&mut self) -> u64 {
        self.serial += 1;
        self.serial
    }

    /// Our line in the next heartbeat.
    pub(crate) fn claim(&self, leaving: bool) -> Claim {
        let (role, synced, offered) = match &self.role {
            _ if leaving => (ClaimRole::Empty, false, Term::NONE),
            Role::Follower(_) if self.store.lineage.0 == 0 => (ClaimRole::Empty, false, Term::NONE),
            Role::Follower(follower) => (ClaimRole::Shadow, follower.synced, Term::NONE),
            Role::Owner(owner) => {
                let offered = owner.offer.as_ref().map_or(Term::NONE, |offer| offer.term);
                (ClaimRole::Owner, matches!(owner.stage, Stage::Synced { .. }), offered)
            }
            Role::Yielding(_) => (ClaimRole::Yielding, false, Term::NONE),
        };
        Claim {
            id: self.hash,
            role,
            term: self.store.term,
            lineage: self.store.lineage,
            synced,
            position: self.store.position,
            digest: self.store.digest(),
            uplink: self.uplink,
            offered,
            refused: self.refused,
            top: self.terms.known(),
            floor: self.terms.top(),
            taken: self.taken,
            declines: (self.declines || self.drains).then_some(true),
            drains: self.drains.then_some(true),
        }
    }

    /// Notices a change of what we claim: it is said at once, and counts as heard only when a
    /// heartbeat sent from now on is echoed.
    pub(crate) fn refresh_claim(&mut self, contact: &Contact, leaving: bool, out: &mut Out) {
        let claim = self.claim(leaving);
        // The position matters only in whether there is anything at all.
        let claim = Claim { digest: 0, position: Position(claim.position.0.min(1)), ..claim };
        let said = Claim { top: claim.top, floor: claim.floor, ..self.claimed.clone() };
        if claim != said {
            self.claim_mark = contact.mark();
            self.claimed = claim;
            out.hurry = true;
        }
    }

    /// Everything that time alone brings about, after the sockets were drained.
    pub(crate) fn turn(&mut self, cx: &mut Cx<'_>) {
        if cx.contact.met || cx.config.lone || cx.now >= cx.contact.sign_at + cx.config.boot_wait {
            self.terms.settle();
        }
        self.reserve(cx);
        self.refresh_synced(cx);
        self.withdraw_turn(cx);
        self.switchover_turn(cx);
        self.ownership_turn(cx);
        self.owner_turn(cx);
        self.fence_turn(cx);
        self.announce_turn(cx);
        if self.hook.is_none() {
            self.notify(HookState::Backup, cx.out);
        }
    }

    pub(crate) fn reserve(&mut self, cx: &mut Cx<'_>) {
        if let Some(up_to) = self.terms.reserve() {
            cx.out.event(Event::Reserve { endpoint: self.id, up_to });
        }
    }

    /// Brings the fence up to date; the workers are told when it moved.
    pub(crate) fn fence_turn(&mut self, cx: &mut Cx<'_>) {
        let Role::Owner(owner) = &self.role else { return };
        if owner.offer.as_ref().is_some_and(|offer| offer.sent) && cx.bug != Bug::FenceOpenInGrant {
            return self.close_fence(cx.out);
        }
        let contact = cx.contact;
        let view = View {
            now: cx.now,
            lone: cx.config.lone,
            heard_at: contact.heard_at(),
            greeted_at: contact.greeted_at(),
            echoed_at: contact.echoed_at(),
            regained_at: contact.regained_at,
            dead: !contact.alive,
            proven_at: contact.proven_at(),
            spoke_at: contact.spoke_at(),
            steady: contact.steady(),
            rejoin_until: if contact.stranger() { contact.rejoin_until } else { Duration::ZERO },
            // Nobody else ever owns what stays at its home.
            other_cannot_take: !self.adopted
                || contact
                    .claim(self.hash)
                    .is_some_and(|claim| !claim.uplink && claim.role != ClaimRole::Owner),
        };
        let times = Times {
            heartbeat: cx.config.heartbeat,
            dead_after: cx.config.dead_after,
            fence_after: cx.config.fence_after,
            alone: cx.config.alone(),
        };
        let times = match cx.bug {
            Bug::AloneTooLong => Times { alone: cx.config.boot_wait * 3, ..times },
            _ => times,
        };
        let valid_until = match cx.bug {
            Bug::FenceByTurnAlone => cx.now + times.fence_after,
            Bug::FenceWithoutListening => {
                let mut forgetful = Fence::default();
                forgetful.turn(view, times)
            }
            _ => self.fence.turn(view, times),
        };
        if valid_until != self.told {
            self.told = valid_until;
            cx.out.event(Event::Fence { endpoint: self.id, valid_until });
        }
    }

    pub(crate) fn close_fence(&mut self, out: &mut Out) {
        self.fence.close();
        if self.told != Duration::ZERO {
            self.told = Duration::ZERO;
            out.event(Event::Fence { endpoint: self.id, valid_until: Duration::ZERO });
        }
    }

    /// Whether the other lives and owns it.
    pub(crate) fn others(&self, contact: &Contact) -> bool {
        let claim = contact.claim(self.hash).filter(|_| contact.alive);
        claim.is_some_and(|claim| claim.role == ClaimRole::Owner)
    }

    /// Whether the other could take it from us at any moment, and would: an operator's wish counts for more than its word
    /// that it will not unasked, unless it drains.
    pub(crate) fn is_welcome(&self, contact: &Contact, asked: bool, bug: Bug) -> bool {
        let Role::Owner(owner) = &self.role else { return false };
        let claim = contact.claim(self.hash).filter(|_| contact.alive);
        owner.offer.is_none()
            && self.adopted
            && matches!(owner.stage, Stage::Synced { .. })
            && claim.is_some_and(|claim| {
                claim.role == ClaimRole::Shadow
                    && claim.synced
                    && claim.uplink
                    && (claim.declines != Some(true) || asked || bug == Bug::DeclinesIgnored)
                    && (claim.drains != Some(true) || bug == Bug::DeclinesIgnored)
            })
    }

    /// Whether flows may be pinned to its tunnels: always where it is adopted; otherwise as long as its home lives,
    /// serves it, has its uplink and is not about to leave.
    pub(crate) fn in_use(&self, contact: &Contact) -> bool {
        if self.adopted {
            return true;
        }
        if matches!(self.role, Role::Owner(_)) {
            return self.uplink && !self.drains;
        }
        let claim = contact.claim(self.hash).filter(|_| contact.alive);
        claim.is_some_and(|claim| {
            claim.role == ClaimRole::Owner && claim.uplink && claim.drains != Some(true)
        })
    }

    pub(crate) fn told(&self) -> Duration {
        self.told
    }

    /// Starts the announcements anew: at an acquisition and after every heal.
    pub(crate) fn announce(&mut self, cx: &mut Cx<'_>) {
        self.announce = Some((cx.now, 0));
        self.announce_turn(cx);
    }

    pub(crate) fn announce_turn(&mut self, cx: &mut Cx<'_>) {
        if !matches!(self.role, Role::Owner(_)) {
            self.announce = None;
        }
        while let Some((start, step)) = self.announce {
            let Some(after) = ANNOUNCE_MS.get(step) else {
                self.announce = None;
                return;
            };
            if cx.now < start + Duration::from_millis(*after) {
                return;
            }
            self.announce = Some((start, step + 1));
            cx.out.event(Event::Announce { endpoint: self.id });
        }
    }

    pub(crate) fn notify(&mut self, state: HookState, out: &mut Out) {
        let term = self.store.term;
        if self.hook != Some((state, term)) {
            self.hook = Some((state, term));
            out.event(Event::Notify { endpoint: self.id, state, term });
        }
    }

    /// The next moment that a turn should not miss.
    pub(crate) fn timeout(&self) -> Option<Duration> {
        let announce = self
            .announce
            .and_then(|(start, step)| Some(start + Duration::from_millis(*ANNOUNCE_MS.get(step)?)));
        let offer = match &self.role {
            Role::Follower(follower) => follower.patience_ends(),
            _ => None,
        };
        [announce, offer].into_iter().flatten().min()
    }

    pub(crate) fn status(&self, contact: &Contact) -> EndpointStatus {
        let (role, acked) = match &self.role {
            Role::Follower(_) if self.store.lineage.0 == 0 => (PublicRole::Empty, Position(0)),
            Role::Follower(follower) => {
                (PublicRole::Shadow { synced: follower.synced }, Position(0))
            }
            Role::Owner(owner) if owner.offer.is_some() => (PublicRole::Offering, owner.acked),
            Role::Owner(owner) => (PublicRole::Owner(owner.stage.mode()), owner.acked),
            Role::Yielding(_) => (PublicRole::Yielding, Position(0)),
        };
        let claim = contact.claim(self.hash).filter(|_| contact.alive);
        EndpointStatus {
            endpoint: self.id,
            role,
            term: self.store.term,
            lineage: self.store.lineage,
            position: self.store.position,
            acked,
            digest: self.store.digest(),
            keys: self.store.len(),
            uplink: self.uplink,
            valid_until: self.told,
            peer_owns: self.others(contact),
            peer_uplink: claim.map(|claim| claim.uplink),
        }
    }
}
