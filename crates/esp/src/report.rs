//! What a shard tells the control thread.

use core::net::{IpAddr, SocketAddr};
use core::time::Duration;

use wire::id::{ConnectionId, EndpointId, EspSpi, Term};

use crate::command::Counters;
use crate::reason::Stats;

/// Window tops that moved, as many as fit one report. No allocation: they are
/// made while packets flow.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Tops {
    tops: [(EspSpi, u32); Self::MAX],
    len: usize,
}

impl Tops {
    /// Most entries of one report.
    pub const MAX: usize = 32;

    pub(crate) const fn new() -> Self {
        Self { tops: [(EspSpi(0), 0); Self::MAX], len: 0 }
    }

    /// `false` if it is full.
    pub(crate) fn push(&mut self, spi_in: EspSpi, top: u32) -> bool {
        match self.tops.get_mut(self.len) {
            Some(entry) => {
                *entry = (spi_in, top);
                self.len += 1;
                true
            }
            None => false,
        }
    }

    /// Inbound SPIs with the highest number each has seen.
    #[must_use]
    pub fn as_slice(&self) -> &[(EspSpi, u32)] {
        self.tops.get(..self.len).unwrap_or_default()
    }
}

impl core::fmt::Debug for Tops {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_list().entries(self.as_slice()).finish()
    }
}

/// Why an SA should be replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expiry {
    /// Sequence numbers near their end: 2^29 are left, or fewer.
    Sequence,
    /// Its keys have lived through 2^14 terms.
    Terms,
}

/// What one SA has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SaStats {
    /// The SA.
    pub spi_in: EspSpi,
    /// The peer's SPI.
    pub spi_out: EspSpi,
    /// Its connection.
    pub connection: ConnectionId,
    /// Its endpoint.
    pub endpoint: EndpointId,
    /// Whether it seals.
    pub outbound: bool,
    /// Packets sealed here.
    pub packets_out: u64,
    /// Inner bytes sealed here.
    pub bytes_out: u64,
    /// Packets opened here.
    pub packets_in: u64,
    /// Inner bytes opened here.
    pub bytes_in: u64,
    /// When the last packet was opened here.
    pub last_in: Option<Duration>,
    /// When the last packet was sealed here.
    pub last_out: Option<Duration>,
    /// Next outbound sequence number.
    pub next_seq: u64,
    /// Ceiling of its lease.
    pub ceiling: u64,
    /// Highest inbound sequence number.
    pub top: u32,
}

/// The answer to [`Command::Query`](crate::Command::Query).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// That of the query.
    pub token: u64,
    /// The shard's counters.
    pub stats: Stats,
    /// Every SA of the shard.
    pub sas: Vec<SaStats>,
}

/// A flow that sent something lately, and where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flow {
    /// Source of the inner packets.
    pub src: IpAddr,
    /// Destination.
    pub dst: IpAddr,
    /// IP protocol.
    pub protocol: u8,
    /// Source and destination port, where the protocol has them.
    pub ports: Option<(u16, u16)>,
    /// The endpoint of its tunnel.
    pub endpoint: EndpointId,
    /// The SA that it leaves by, or that its owner lets it leave by.
    pub spi_in: EspSpi,
    /// Since its last packet here.
    pub idle: Duration,
}

/// Something the control thread should know. Reports about one SA or policy
/// coalesce until they are polled.
#[allow(
    clippy::large_enum_variant,
    reason = "boxing the tops would allocate every few milliseconds while packets flow"
)]
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Report {
    /// Half the lease is used up, or all; a higher ceiling is wanted
    /// ([`ceiling_for`](crate::ceiling_for)). Repeated while nothing comes:
    /// every 50 ms under traffic, every second when leases are not obeyed.
    LeaseLow {
        /// The SA.
        spi_in: EspSpi,
        /// Next outbound sequence number.
        next_seq: u64,
        /// Ceiling it has.
        ceiling: u64,
        /// Recent packets per second.
        rate_per_s: u64,
    },
    /// All counters of the endpoint are below their ceilings, and from this
    /// moment on they stay there.
    Obeying {
        /// The endpoint.
        endpoint: EndpointId,
        /// How many commands the shard had obeyed by then.
        at: u64,
    },
    /// Window tops that moved since the last such report, while there is a shadow
    /// ([`Command::ObeyLeases`](crate::Command::ObeyLeases)).
    Windows(Tops),
    /// Answer to `Hold`: nothing is sealed or opened any more, and these are
    /// the final counters.
    Held {
        /// The endpoint.
        endpoint: EndpointId,
        /// Its term.
        term: Term,
        /// All its SAs.
        counters: Vec<Counters>,
        /// How many commands the shard had obeyed by then.
        at: u64,
    },
    /// Answer to `Disown`, with the same counters.
    Disowned {
        /// The endpoint.
        endpoint: EndpointId,
        /// The last term it was owned in here, if it ever was.
        term: Option<Term>,
        /// All its SAs.
        counters: Vec<Counters>,
        /// How many commands the shard had obeyed by then.
        at: u64,
    },
    /// The SA should be rekeyed soon. Once per SA and reason.
    Expiring {
        /// The SA.
        spi_in: EspSpi,
        /// Its connection.
        connection: ConnectionId,
        /// Why.
        why: Expiry,
    },
    /// A packet met a policy without an SA. At most once a second per policy.
    NoSa {
        /// The endpoint of the policy.
        endpoint: EndpointId,
        /// The connection of the policy.
        connection: ConnectionId,
        /// The child of the policy.
        child: u16,
    },
    /// The newest authentic packet of the SA came from another address than we
    /// send to (RFC 7296 §2.23). Repeated while it is so, at most once a
    /// second.
    PeerMoved {
        /// The SA.
        spi_in: EspSpi,
        /// Its connection.
        connection: ConnectionId,
        /// Where the packet came from.
        from: SocketAddr,
    },
    /// Answer to `Query`.
    Snapshot(Box<Snapshot>),
    /// Answer to `Flows`.
    Flows {
        /// From the command.
        token: u64,
        /// What is in the cache.
        flows: Vec<Flow>,
    },
}
