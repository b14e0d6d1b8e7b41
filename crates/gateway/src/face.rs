//! What goes into a [`Gateway`](crate::Gateway) from an operator, and what comes out of it.

use core::fmt;
use core::net::SocketAddr;
use core::time::Duration;

use wire::id::{EndpointId, Term};

use crate::status::{FlowStatus, Status, TunnelState};

/// Something for the runtime to do, in this order. The runtime does it before its next input.
pub enum Output {
    /// Send an IKE message from the endpoint's address. The runtime puts four zero bytes before it on port 4500
    /// (RFC 3948 §2.2), and compares the endpoint's fence right before the system call.
    Ike {
        /// By whose socket.
        endpoint: EndpointId,
        /// Our address and port.
        from: SocketAddr,
        /// The peer's.
        to: SocketAddr,
        /// The message, without the non-ESP marker; a single 0xFF is a NAT keepalive (RFC 3948 §2.3).
        bytes: Vec<u8>,
    },
    /// An IKE message for the instance that owns the endpoint, over the pair link.
    SteerIke {
        /// Which endpoint it came to.
        endpoint: EndpointId,
        /// The peer.
        from: SocketAddr,
        /// Our address and port.
        to: SocketAddr,
        /// The message.
        bytes: Vec<u8>,
    },
    /// For the pair link.
    Pair(ha::Transmit),
    /// For every worker's shard, by its ordered queue.
    Shard(esp::Command),
    /// Store the fence word that workers, the IKE sockets and ARP compare. Zero: closed.
    Fence {
        /// Which endpoint.
        endpoint: EndpointId,
        /// Nothing leaves at or after this time.
        valid_until: Duration,
    },
    /// The endpoint's addresses must be, or must not be, on the TUN.
    Addresses {
        /// Which endpoint.
        endpoint: EndpointId,
        /// Whether they should be there.
        present: bool,
    },
    /// Announce the endpoint's addresses now.
    Announce {
        /// Which endpoint.
        endpoint: EndpointId,
    },
    /// Make the reservation durable, then call [`Gateway::handle_reserved`](crate::Gateway::handle_reserved).
    Reserve {
        /// Which endpoint.
        endpoint: EndpointId,
        /// Highest term that may be used afterwards.
        up_to: Term,
    },
    /// Run the notify hook.
    Notify {
        /// Which endpoint.
        endpoint: EndpointId,
        /// `MASTER`, `BACKUP` or `FAULT`.
        state: &'static str,
        /// The term owned or followed.
        term: Term,
    },
    /// A line of a key log that an operator asked for.
    KeyLog(ike::KeyLogLine),
    /// The answer to a request.
    Answer {
        /// As given with the request.
        ticket: u64,
        /// The answer.
        answer: Answer,
    },
}

impl fmt::Debug for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ike { endpoint, to, bytes, .. } => {
                write!(f, "Ike({endpoint} to {to}, {} B)", bytes.len())
            }
            Self::SteerIke { endpoint, bytes, .. } => {
                write!(f, "SteerIke({endpoint}, {} B)", bytes.len())
            }
            Self::Pair(transmit) => transmit.fmt(f),
            Self::Shard(command) => command.fmt(f),
            Self::Fence { endpoint, valid_until } => {
                write!(f, "Fence({endpoint}, {valid_until:?})")
            }
            Self::Addresses { endpoint, present } => write!(f, "Addresses({endpoint}, {present})"),
            Self::Announce { endpoint } => write!(f, "Announce({endpoint})"),
            Self::Reserve { endpoint, up_to } => write!(f, "Reserve({endpoint}, {up_to})"),
            Self::Notify { endpoint, state, term } => {
                write!(f, "Notify({endpoint}, {state}, {term})")
            }
            Self::KeyLog(_) => f.write_str("KeyLog(…)"),
            Self::Answer { ticket, .. } => write!(f, "Answer({ticket})"),
        }
    }
}

/// What an operator asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// Everything there is to know.
    Status,
    /// The same without the tunnels, which may be many: they are only counted.
    Summary,
    /// Give endpoints to the other instance: one by name, or all that this instance owns.
    Failover {
        /// Name of one endpoint.
        endpoint: Option<String>,
    },
    /// Give all endpoints to the other instance, and take none back unasked.
    Drain,
    /// Take endpoints back.
    Undrain,
    /// The flows that the shards know of.
    Flows,
    /// Bring a connection up.
    Up {
        /// Its name.
        connection: String,
    },
    /// Take a connection down.
    Down {
        /// Its name.
        connection: String,
        /// What keeps its traffic from leaving in clear is to go as well, so no other tunnel may need it.
        purge: bool,
    },
    /// Replace a connection's keys.
    Rekey {
        /// Its name.
        connection: String,
        /// The IKE SA.
        ike: bool,
        /// The Child SAs.
        children: bool,
    },
}

/// What the operator gets.
#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    /// To [`Request::Status`] and [`Request::Summary`].
    Status(Box<Status>),
    /// To [`Request::Failover`]: every move is complete.
    Moved(Vec<Moved>),
    /// To [`Request::Drain`]: nothing is served here any more.
    Drained {
        /// Every move is complete.
        moved: Vec<Moved>,
        /// Endpoints that cannot move: their tunnels have ended.
        withdrawn: Vec<String>,
    },
    /// To [`Request::Undrain`].
    Undrained,
    /// To [`Request::Flows`].
    Flows(Vec<FlowStatus>),
    /// To [`Request::Up`]: how far each tunnel is.
    Up(Vec<TunnelUp>),
    /// To [`Request::Down`].
    Down {
        /// IKE SAs that are being closed.
        closed: u32,
    },
    /// To [`Request::Rekey`]: what is being replaced.
    Rekey {
        /// IKE SAs.
        ike: u32,
        /// Child SAs.
        children: u32,
    },
    /// Not done.
    Refused {
        /// Whose doing.
        why: Refusal,
        /// One sentence.
        text: String,
        /// What to do about it.
        hint: Option<&'static str>,
    },
}

/// A tunnel that was asked up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TunnelUp {
    /// Name of its connection.
    pub connection: String,
    /// Name of its endpoint.
    pub endpoint: String,
    /// How far it is.
    pub state: TunnelState,
}

/// An endpoint that was handed over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Moved {
    /// Its name.
    pub endpoint: String,
    /// Its new term.
    pub term: Term,
    /// From the request to the new owner's word.
    pub took: Duration,
}

/// Why a request was not carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// No endpoint or connection of that name.
    UnknownName,
    /// The other instance owns what would have to change.
    NotOwner,
    /// The other instance cannot take over now.
    NotReady,
    /// It was tried, and somebody said no or nothing.
    Failed,
}
