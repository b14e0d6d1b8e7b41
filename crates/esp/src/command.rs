//! What the control thread tells a shard. Commands are applied in order and
//! never dropped (architecture.md, "Control and workers").

use core::net::SocketAddr;
use core::time::Duration;

use crypto::Secret;
use crypto::aead::AeadAlg;
use wire::id::{ConnectionId, EndpointId, EspSpi, Term};
use wire::ts::TrafficSelector;

use crate::pin::Pin;
use crate::replay::Window;

/// Least size of a lease of sequence numbers (ha.md, "ESP counters").
pub const LEASE_MIN: u64 = 1 << 20;

/// The ceiling that both instances give a fresh SA without asking: its record
/// is committed before its first use, and stands for this first lease.
pub const INITIAL_CEILING: u64 = 1 + LEASE_MIN;

/// The ceiling to ask for, when an SA stands at `next_seq` and sends
/// `rate_per_s` packets a second: max(2^20, 2 s of traffic) numbers more.
#[must_use]
pub const fn ceiling_for(next_seq: u64, rate_per_s: u64) -> u64 {
    let two_seconds = rate_per_s.saturating_mul(2);
    let lease = if two_seconds > LEASE_MIN { two_seconds } else { LEASE_MIN };
    let ceiling = next_seq.saturating_add(lease);
    if ceiling > crate::sa::SEQ_END { crate::sa::SEQ_END } else { ceiling }
}

/// A pair of ESP SAs, one each way, as IKE negotiated them.
#[derive(Debug)]
pub struct Sa {
    /// Where it was negotiated.
    pub endpoint: EndpointId,
    /// Which connection it belongs to.
    pub connection: ConnectionId,
    /// Our SPI, by the layout of [`wire::id::SpiLayout`]. Names the pair in
    /// all commands and reports.
    pub spi_in: EspSpi,
    /// The peer's SPI.
    pub spi_out: EspSpi,
    /// Algorithm of both directions.
    pub alg: AeadAlg,
    /// Key ‖ salt for what we receive.
    pub keymat_in: Secret,
    /// Key ‖ salt for what we send.
    pub keymat_out: Secret,
    /// What our side's addresses, protocols and ports may be.
    pub local_ts: Vec<TrafficSelector>,
    /// What the peer's side's may be.
    pub remote_ts: Vec<TrafficSelector>,
    /// Our outer address and UDP port.
    pub local: SocketAddr,
    /// The peer's outer address and UDP port.
    pub remote: SocketAddr,
    /// In UDP (RFC 3948), or else as IP protocol 50.
    pub udp_encap: bool,
    /// First outbound sequence number if this instance owns the endpoint when
    /// it installs the SA: 1 for a fresh one. A later owner starts at the
    /// ceiling instead.
    pub next_seq: u64,
    /// All outbound numbers below this one may have been used by whoever
    /// owned the endpoint. [`INITIAL_CEILING`] for a fresh one.
    pub ceiling: u64,
    /// Term in which the keys were made. 2^14 terms later they are reported
    /// for replacement, long before IVs could repeat.
    pub born: Term,
}

impl Sa {
    /// The same without its keys, for a worker that does not seal or open with it.
    #[must_use]
    pub fn without_keys(&self) -> Self {
        Self {
            keymat_in: Secret::new(Vec::new()),
            keymat_out: Secret::new(Vec::new()),
            local_ts: self.local_ts.clone(),
            remote_ts: self.remote_ts.clone(),
            ..*self
        }
    }
}

/// What the operator configured to be protected, whether an SA is up or not.
#[derive(Debug, Clone)]
pub struct Policy {
    /// The endpoint whose SA would carry it.
    pub endpoint: EndpointId,
    /// The connection that would carry it.
    pub connection: ConnectionId,
    /// Flows are pinned to one of the tunnels of all connections with the same
    /// group.
    pub group: ConnectionId,
    /// The child within the connection, in the caller's numbering.
    pub child: u16,
    /// Our side.
    pub local_ts: Vec<TrafficSelector>,
    /// The peer's side.
    pub remote_ts: Vec<TrafficSelector>,
    /// What decides which flows the tunnel of `connection` at `endpoint` gets.
    pub pin: Pin,
}

/// Exact counters of one SA at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counters {
    /// The SA.
    pub spi_in: EspSpi,
    /// The first outbound sequence number not used yet; 2^32 when all are.
    pub next_seq: u64,
    /// The ceiling that the owner holds acknowledged.
    pub ceiling: u64,
    /// The inbound window.
    pub window: Window,
}

/// An order to the shard.
#[derive(Debug)]
pub enum Command {
    /// Replaces all configured policies.
    Policies(Vec<Policy>),
    /// Installs an SA; it opens at once and seals after
    /// [`Command::UseOutbound`]. If an SA with the same SPIs and keys is there
    /// already, only its addresses and selectors change: counters go on.
    Install(Box<Sa>),
    /// Seals with this SA from now on, wherever it and others match alike.
    UseOutbound {
        /// The SA.
        spi_in: EspSpi,
    },
    /// The outer addresses of an SA changed; everything else stays.
    Move {
        /// The SA.
        spi_in: EspSpi,
        /// Our outer address and UDP port.
        local: SocketAddr,
        /// The peer's outer address and UDP port.
        remote: SocketAddr,
        /// In UDP (RFC 3948), or else as IP protocol 50.
        udp_encap: bool,
    },
    /// Forgets an SA.
    Remove {
        /// The SA.
        spi_in: EspSpi,
    },
    /// This instance owns the endpoint. In a new term every SA goes on at its
    /// ceiling + `seq_jump`, or at the counters of a [`Command::Resume`] for
    /// this term; in the term it had, exactly where it stopped. Ends a hold.
    Own {
        /// The endpoint.
        endpoint: EndpointId,
        /// The term; never lower than one seen before.
        term: Term,
        /// Distance from the ceiling, for takeovers in doubt (ha.md: 2^24
        /// after silence without a witness, 2^28 when unsynced).
        seq_jump: u64,
        /// Obey leases from the first packet on.
        obey_leases: bool,
    },
    /// Switches obedience to leases. Switching on takes effect when all
    /// counters are below their ceilings, which
    /// [`Report::Obeying`](crate::Report::Obeying) tells; until then, every SA
    /// that is not reports [`Report::LeaseLow`](crate::Report::LeaseLow). All
    /// window tops are reported anew.
    ObeyLeases {
        /// The endpoint.
        endpoint: EndpointId,
        /// On or off.
        on: bool,
    },
    /// Stops sealing and opening for the endpoint and queues its packets;
    /// answered by [`Report::Held`](crate::Report::Held).
    Hold {
        /// The endpoint.
        endpoint: EndpointId,
    },
    /// Ends a hold in the same term: the queue is worked off in order.
    Release {
        /// The endpoint.
        endpoint: EndpointId,
    },
    /// The endpoint is not ours (any more); answered by
    /// [`Report::Disowned`](crate::Report::Disowned).
    Disown {
        /// The endpoint.
        endpoint: EndpointId,
        /// Steer its packets to the other instance, the queued ones first;
        /// otherwise drop them.
        steer: bool,
    },
    /// Whether the other instance lives and owns the endpoint: while it is not
    /// owned here, its packets are handed over.
    Steer {
        /// The endpoint.
        endpoint: EndpointId,
        /// On or off.
        on: bool,
    },
    /// Whether new packets may be pinned to the endpoint's tunnels (they may at
    /// first). What the other instance has pinned there is sent all the same.
    Pin {
        /// The endpoint.
        endpoint: EndpointId,
        /// On or off.
        on: bool,
    },
    /// Hands packets that the other instance handed over back to it until
    /// then, once, if the endpoint is not owned here any more: they left when
    /// it was.
    HandBack {
        /// The endpoint.
        endpoint: EndpointId,
        /// End, on the clock of `now`.
        until: Duration,
    },
    /// Queues what arrives directly for the endpoint until then, while steered
    /// packets pass, so that order within a flow is kept after a switchover.
    HoldDirect {
        /// The endpoint.
        endpoint: EndpointId,
        /// End of the hold, on the clock of `now`.
        until: Duration,
    },
    /// The other instance knows that numbers below `ceiling` may be in use.
    /// Ceilings never go down.
    Lease {
        /// The SA.
        spi_in: EspSpi,
        /// The new ceiling: the first number that may not be used.
        ceiling: u64,
    },
    /// Exact counters from a grant. Good for that term alone, so that those of
    /// a switchover that came to nothing are never used later.
    Resume {
        /// The term that the grant is for.
        term: Term,
        /// The counters.
        counters: Box<Counters>,
    },
    /// The owner's streamed window top: this instance will refuse everything
    /// at or below it.
    Window {
        /// The SA.
        spi_in: EspSpi,
        /// The top.
        top: u32,
    },
    /// Asks for a [`Report::Snapshot`](crate::Report::Snapshot).
    Query {
        /// Given back in the answer.
        token: u64,
    },
    /// Asks for [`Report::Flows`](crate::Report::Flows).
    Flows {
        /// Given back in the answer.
        token: u64,
        /// On the clock of the packets.
        now: Duration,
    },
}

impl Command {
    /// The SA that it is about, if it is about one.
    #[must_use]
    pub fn spi_in(&self) -> Option<EspSpi> {
        match self {
            Self::Install(sa) => Some(sa.spi_in),
            Self::UseOutbound { spi_in }
            | Self::Move { spi_in, .. }
            | Self::Remove { spi_in }
            | Self::Lease { spi_in, .. }
            | Self::Window { spi_in, .. } => Some(*spi_in),
            Self::Resume { counters, .. } => Some(counters.spi_in),
            _ => None,
        }
    }

    /// The same for another worker than the SA's, which needs no keys. Every worker is told every command, in one
    /// order: each decides where a packet belongs.
    #[must_use]
    pub fn without_keys(&self) -> Self {
        match self {
            Self::Policies(policies) => Self::Policies(policies.clone()),
            Self::Install(sa) => Self::Install(Box::new(sa.without_keys())),
            Self::Resume { term, counters } => {
                Self::Resume { term: *term, counters: counters.clone() }
            }
            Self::UseOutbound { spi_in } => Self::UseOutbound { spi_in: *spi_in },
            Self::Move { spi_in, local, remote, udp_encap } => Self::Move {
                spi_in: *spi_in,
                local: *local,
                remote: *remote,
                udp_encap: *udp_encap,
            },
            Self::Remove { spi_in } => Self::Remove { spi_in: *spi_in },
            Self::Own { endpoint, term, seq_jump, obey_leases } => Self::Own {
                endpoint: *endpoint,
                term: *term,
                seq_jump: *seq_jump,
                obey_leases: *obey_leases,
            },
            Self::ObeyLeases { endpoint, on } => Self::ObeyLeases { endpoint: *endpoint, on: *on },
            Self::Hold { endpoint } => Self::Hold { endpoint: *endpoint },
            Self::Release { endpoint } => Self::Release { endpoint: *endpoint },
            Self::Disown { endpoint, steer } => Self::Disown { endpoint: *endpoint, steer: *steer },
            Self::Steer { endpoint, on } => Self::Steer { endpoint: *endpoint, on: *on },
            Self::Pin { endpoint, on } => Self::Pin { endpoint: *endpoint, on: *on },
            Self::HandBack { endpoint, until } => {
                Self::HandBack { endpoint: *endpoint, until: *until }
            }
            Self::HoldDirect { endpoint, until } => {
                Self::HoldDirect { endpoint: *endpoint, until: *until }
            }
            Self::Lease { spi_in, ceiling } => Self::Lease { spi_in: *spi_in, ceiling: *ceiling },
            Self::Window { spi_in, top } => Self::Window { spi_in: *spi_in, top: *top },
            Self::Query { token } => Self::Query { token: *token },
            Self::Flows { token, now } => Self::Flows { token: *token, now: *now },
        }
    }
}

/// Why a command changed nothing. All but [`CommandError::UnknownSa`], which
/// can be a race between removal and a lease, are bugs of the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    /// No SA has this SPI.
    #[error("no SA with inbound SPI {0}")]
    UnknownSa(EspSpi),
    /// The SPI is not one of ours, or beyond the shard's table.
    #[error("inbound SPI {0} is outside the layout")]
    BadSpi(EspSpi),
    /// Another SA still sits in this SPI's slot.
    #[error("the slot of inbound SPI {0} is taken by {1}")]
    SlotTaken(EspSpi, EspSpi),
    /// The key material does not fit the algorithm.
    #[error("key material of {0}: {1}")]
    Key(EspSpi, crypto::Error),
    /// More endpoints than the shard was made for.
    #[error("endpoint {0} does not exist")]
    UnknownEndpoint(EndpointId),
    /// A term below one that the endpoint already had.
    #[error("term {got} for endpoint {endpoint} after term {had}")]
    StaleTerm {
        /// The endpoint.
        endpoint: EndpointId,
        /// Its term so far.
        had: Term,
        /// The one in the command.
        got: Term,
    },
    /// The endpoint is not owned, so it cannot be held.
    #[error("endpoint {0} is not owned")]
    NotOwner(EndpointId),
}
