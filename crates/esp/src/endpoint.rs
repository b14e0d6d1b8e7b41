//! One endpoint as a worker sees it: who owns it, and what happens to its
//! packets meanwhile.
//!
//! ```text
//!            Own                    Hold
//!   Idle ──────────► Owner ◄──────────────────► Owner, held
//!    ▲ ▲               │         Release, Own        │
//!    │ └───────────────┤ Disown{steer: false}        │
//!    │                 │                             │
//!    │   Disown        ▼ Disown{steer: true}         │
//!    └────────────  Steering ◄───────────────────────┘
//!                      │  Own
//!                      └───────► Owner
//! ```

use core::time::Duration;

use crypto::aead::IvSequence;
use wire::id::Term;

use crate::batch::Steered;
use crate::queue::Queue;
use crate::reason::Reason;
use crate::sa::Ownership;

/// Obedience to leases.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Obey {
    /// Solo: no ceiling binds.
    No,
    /// From the moment on when all counters are below their ceilings.
    Wanted {
        /// Whether something changed since that was last looked at.
        look: bool,
    },
    /// Ceilings bind.
    Yes,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// Not ours.
    Idle,
    /// Ours a moment ago, now the other instance's; the queue goes there, too.
    Steering,
    /// Ours.
    Owner {
        obey: Obey,
        /// Everything is queued.
        held: bool,
    },
}

/// What to do with a packet of the endpoint.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Admission {
    /// Seal or open it.
    Process(Ownership),
    /// Put it into the queue.
    Queue,
    /// Hand it to the other instance.
    Steer,
    /// Drop it.
    Drop(Reason),
}

/// How a packet got here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Arrival {
    /// Over the pair link.
    pub(crate) steered: Option<Steered>,
    /// Out of the endpoint's own queue.
    pub(crate) released: bool,
}

#[derive(Debug)]
pub(crate) struct Endpoint {
    pub(crate) role: Role,
    /// The last term it was owned in here.
    pub(crate) term: Option<Term>,
    /// The IVs of that term, one sequence for all keys of this worker: an SA that is removed and installed again
    /// within a term, as healing can do, then cannot begin it anew.
    pub(crate) ivs: IvSequence,
    pub(crate) seq_jump: u64,
    pub(crate) direct_until: Duration,
    /// The other instance lives and owns it.
    pub(crate) others: bool,
    /// Until then, packets that were handed over to us are handed back.
    pub(crate) back_until: Duration,
    pub(crate) queue: Queue,
}

impl Endpoint {
    pub(crate) fn new(queue: Queue) -> Self {
        let ivs = IvSequence::new(0);
        Self {
            role: Role::Idle,
            term: None,
            ivs,
            seq_jump: 0,
            direct_until: Duration::ZERO,
            others: false,
            back_until: Duration::ZERO,
            queue,
        }
    }

    /// The ownership, if it is ours, held or not.
    pub(crate) fn ownership(&self) -> Option<Ownership> {
        let Role::Owner { obey, .. } = self.role else { return None };
        Some(Ownership {
            term: self.term?,
            seq_jump: self.seq_jump,
            obey: obey == Obey::Yes,
            leasing: obey != Obey::No,
        })
    }

    #[inline]
    pub(crate) fn admit(&self, now: Duration, arrival: Arrival) -> Admission {
        // Whoever comes while others wait gets in line, so that order is kept.
        let in_line = !arrival.released && !self.queue.is_empty();
        match self.role {
            Role::Owner { held: true, .. } => Admission::Queue,
            Role::Owner { held: false, .. } => {
                // Steered packets are older than what arrives directly: they
                // pass, the others wait for them.
                let direct = arrival.steered.is_none() && !arrival.released;
                if direct && (in_line || now < self.direct_until) {
                    return Admission::Queue;
                }
                match self.ownership() {
                    Some(own) => Admission::Process(own),
                    None => Admission::Drop(Reason::NotOwner),
                }
            }
            // ha.md: steered packets are never steered again. Those that met a switchover under way are handed back,
            // once, and whoever gets them back keeps or drops them.
            Role::Steering
                if arrival
                    .steered
                    .is_some_and(|steered| steered.back || now >= self.back_until) =>
            {
                Admission::Drop(Reason::SteeredTwice)
            }
            Role::Steering if in_line => Admission::Queue,
            Role::Steering => Admission::Steer,
            Role::Idle if !self.others => Admission::Drop(Reason::NotOwner),
            Role::Idle if arrival.steered.is_some() => Admission::Drop(Reason::SteeredTwice),
            Role::Idle => Admission::Steer,
        }
    }

    /// When the queue may be worked off; `None` if it is empty or waits for a
    /// command.
    pub(crate) fn release_at(&self) -> Option<Duration> {
        if self.queue.is_empty() {
            return None;
        }
        match self.role {
            Role::Owner { held: true, .. } => None,
            Role::Owner { held: false, .. } => Some(self.direct_until),
            Role::Steering | Role::Idle => Some(Duration::ZERO),
        }
    }
}
