//! One endpoint as this instance sees it: its IKE machine, what waits for commitment, its leases, its part.
//!
//! ```text
//!            Own                       Hold                 StandDown(Granted)
//!   Shadow ───────► Owner ────────────────────► Holding ───────────────────────► Steering ──5 s quiet──► Shadow
//!     ▲               ▲                            │
//!     │               └────────── Resume ──────────┘
//!     └───────────────────── StandDown ─────────────
//! ```

use std::collections::VecDeque;
use std::time::Duration;

use core::net::SocketAddr;
use wire::id::{EndpointId, IkeSpi, Term};

use crate::held::Held;
use crate::leases::Leases;
use crate::parts::Applying;
use crate::withdraw::Closing;

/// IKE datagrams that wait out a switchover; more are dropped (peers retransmit).
pub(crate) const INBOX: usize = 256;
/// A steering instance gives the addresses up after this much quiet (ha.md, switchover).
pub(crate) const STEER_QUIET: Duration = Duration::from_secs(5);

/// A received IKE message.
#[derive(Debug)]
pub(crate) struct Datagram {
    pub(crate) from: SocketAddr,
    pub(crate) to: SocketAddr,
    pub(crate) bytes: Vec<u8>,
}

/// What this instance is for an endpoint.
#[derive(Debug)]
pub(crate) enum Part {
    /// Holds state ready to run, or nothing yet.
    Shadow,
    /// Serves it.
    Owner {
        /// The sync attempt whose ceilings the shadow does not all hold yet.
        sync: Option<Sync>,
    },
    /// Offered it: nothing is sealed, opened or answered; IKE messages wait.
    Holding {
        inbox: VecDeque<Datagram>,
        /// The workers' final counters, once they have stopped.
        counters: Option<Vec<esp::Counters>>,
        /// They were handed to `ha`.
        granted: bool,
    },
    /// Granted it: hands on what still arrives.
    Steering {
        /// When something last arrived.
        last: Duration,
    },
}

/// Progress of one attempt to come to depend on the shadow.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sync {
    pub(crate) id: ha::SyncId,
    /// The shard keeps every counter below its ceiling.
    pub(crate) obeying: bool,
}

/// One endpoint.
#[derive(Debug)]
pub(crate) struct Endpoint {
    pub(crate) id: EndpointId,
    pub(crate) name: String,
    pub(crate) ike: ike::Endpoint,
    pub(crate) part: Part,
    pub(crate) term: Term,
    pub(crate) held: Held,
    pub(crate) leases: Leases,
    /// Newest record that we appended, or applied as shadow.
    pub(crate) position: u64,
    /// Newest record that is committed.
    pub(crate) committed: u64,
    pub(crate) mode: ha::Mode,
    /// Until when the fence is open.
    pub(crate) valid_until: Duration,
    /// Counters that a winner after a split still waits for.
    pub(crate) owes_counters: bool,
    /// Since when the other instance could take it, and should.
    pub(crate) welcome_since: Option<Duration>,
    /// When it was last offered by our own plan.
    pub(crate) offered_at: Option<Duration>,
    /// What the shards were last told of who else owns it.
    pub(crate) others: bool,
    /// Whether the shards may pin flows to its tunnels, as they were last told.
    pub(crate) in_use: bool,
    /// How far it is closed, where its addresses stay.
    pub(crate) closing: Option<Closing>,
    /// What the owner said and is not applied in full.
    pub(crate) applying: VecDeque<Applying>,
    /// Records that are to be written anew, while that is under way.
    pub(crate) rewriting: Option<VecDeque<IkeSpi>>,
}

impl Endpoint {
    pub(crate) fn new(id: EndpointId, name: String, ike: ike::Endpoint) -> Self {
        Self {
            id,
            name,
            ike,
            part: Part::Shadow,
            term: Term(0),
            held: Held::default(),
            leases: Leases::default(),
            position: 0,
            committed: 0,
            mode: ha::Mode::Solo,
            valid_until: Duration::ZERO,
            owes_counters: false,
            welcome_since: None,
            offered_at: None,
            others: false,
            in_use: true,
            closing: None,
            applying: VecDeque::new(),
            rewriting: None,
        }
    }

    /// Whether IKE runs here and now: owner, inside the fence (ha.md, "The fence").
    pub(crate) fn serves(&self, now: Duration) -> bool {
        matches!(self.part, Part::Owner { .. }) && now < self.valid_until
    }

    pub(crate) fn owns(&self) -> bool {
        matches!(self.part, Part::Owner { .. } | Part::Holding { .. })
    }

    pub(crate) fn ha_id(&self) -> ha::EndpointId {
        ha::EndpointId(self.id.0)
    }
}
