//! What an endpoint tells a person: changes, failures, keys for tshark.
//!
//! Events carry no secrets (but [`KeyLogLine`], which exists only when asked
//! for) and nothing that a machine must act upon: that is in
//! [`crate::Transition`]. Text from a peer is escaped where it is made.

use core::{fmt, net::SocketAddr, time::Duration};

use wire::{
    id::{EspSpi, IkeSpi},
    ts::TrafficSelector,
};
use zeroize::Zeroizing;

use crate::proposal::{EspSuite, IkeSuite};

/// One thing that happened. `Display` gives one log line without the time.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// An IKE SA is up, both sides authenticated.
    Established {
        /// Its connection.
        connection: String,
        /// Our SPI.
        spi: IkeSpi,
        /// The peer's SPI.
        peer_spi: IkeSpi,
        /// Our address.
        local: SocketAddr,
        /// The peer's address.
        remote: SocketAddr,
        /// What was negotiated.
        suite: IkeSuite,
        /// Whether we initiated.
        initiator: bool,
    },
    /// An IKE SA replaced another.
    Rekeyed {
        /// Its connection.
        connection: String,
        /// Our SPI of the old one.
        old: IkeSpi,
        /// Our SPI of the new one.
        new: IkeSpi,
        /// What was negotiated.
        suite: IkeSuite,
        /// Whether we asked for it.
        by_us: bool,
    },
    /// An IKE SA is gone.
    Deleted {
        /// Its connection, if it got that far.
        connection: Option<String>,
        /// Our SPI.
        spi: IkeSpi,
        /// Why.
        reason: DeleteReason,
    },
    /// A Child SA is up.
    ChildUp {
        /// Its connection.
        connection: String,
        /// Its name in the configuration.
        child: String,
        /// Our inbound SPI.
        spi_in: EspSpi,
        /// Our outbound SPI.
        spi_out: EspSpi,
        /// What was negotiated.
        suite: EspSuite,
        /// What it carries on our side.
        local_ts: Vec<TrafficSelector>,
        /// What it carries on the peer's side.
        remote_ts: Vec<TrafficSelector>,
        /// The inbound SPI of the Child SA it replaces.
        rekeyed: Option<EspSpi>,
    },
    /// A Child SA is gone (it may still receive for a few seconds).
    ChildDown {
        /// Its connection.
        connection: String,
        /// Its name.
        child: String,
        /// Our inbound SPI.
        spi_in: EspSpi,
    },
    /// A peer's address or port changed.
    Moved {
        /// Its connection.
        connection: String,
        /// Our SPI.
        spi: IkeSpi,
        /// Where it was.
        from: SocketAddr,
        /// Where it is.
        to: SocketAddr,
    },
    /// A request of ours is being repeated.
    Retransmitting {
        /// Its connection, if known.
        connection: Option<String>,
        /// Our SPI.
        spi: IkeSpi,
        /// How often it was sent.
        sent: u8,
    },
    /// Something did not come about; the line says which side sent what and
    /// what would have matched.
    Failed(Failure),
    /// A line for a tshark table. Only with `keylog`.
    KeyLog(KeyLogLine),
}

/// Why an IKE SA ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeleteReason {
    /// The peer deleted it.
    Peer,
    /// An operator's command.
    Command,
    /// The peer did not answer.
    PeerDead,
    /// The peer announced INITIAL_CONTACT on another IKE SA.
    InitialContact,
    /// It was rekeyed.
    Rekeyed,
    /// It lost against a simultaneous rekeying.
    Redundant,
    /// Its lifetime ended before it could be rekeyed.
    Expired,
    /// One side found the other's message fatally wrong.
    Error,
    /// Its establishment failed or timed out.
    NotEstablished,
    /// A takeover left its message ids in doubt; it is re-established.
    InDoubt,
    /// Too many others of its connection were established after it.
    Crowded,
}

impl fmt::Display for DeleteReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Peer => "the peer deleted it",
            Self::Command => "by command",
            Self::PeerDead => "the peer did not answer",
            Self::InitialContact => "the peer started afresh (INITIAL_CONTACT)",
            Self::Rekeyed => "it was rekeyed",
            Self::Redundant => "both sides rekeyed at once and it was the redundant one",
            Self::Expired => "its lifetime ended",
            Self::Error => "one side refused a message for good",
            Self::NotEstablished => "it did not come about",
            Self::InDoubt => "a takeover left it in doubt",
            Self::Crowded => "its connection has newer ones, and no room for more",
        })
    }
}

/// Which of the two sides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// This endpoint.
    Us,
    /// The remote gateway.
    Peer,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Us => "we",
            Self::Peer => "the peer",
        })
    }
}

/// What did not fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// No connection for that address.
    Address,
    /// IDi or IDr.
    Identity,
    /// The AUTH payload: the pre-shared keys differ.
    Secret,
    /// The proposal for the IKE SA.
    IkeProposal,
    /// The proposal for a Child SA.
    EspProposal,
    /// The traffic selectors of a Child SA.
    Selectors,
    /// The key exchange group.
    Group,
    /// Something else the peer refused.
    Refused,
    /// No answer.
    Silence,
    /// A message that breaks the protocol.
    Protocol,
}

/// Why something did not come about, in the words of both sides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// The connection, if known.
    pub connection: Option<String>,
    /// The child, if it is about one.
    pub child: Option<String>,
    /// The peer's address.
    pub peer: SocketAddr,
    /// What did not fit.
    pub what: What,
    /// Who began the exchange. What a peer began may come from anybody who can send us a datagram.
    pub began: Side,
    /// Who sent what did not fit.
    pub sender: Side,
    /// What was sent.
    pub sent: String,
    /// What would have matched.
    pub expected: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.what {
            What::Address => "no connection for the peer's address",
            What::Identity => "identity mismatch",
            What::Secret => "authentication failed",
            What::IkeProposal => "no common IKE proposal",
            What::EspProposal => "no common ESP proposal",
            What::Selectors => "traffic selectors do not match",
            What::Group => "no common key exchange group",
            What::Refused => "refused",
            What::Silence => "no answer",
            What::Protocol => "protocol error",
        };
        match (&self.connection, &self.child) {
            (Some(connection), Some(child)) => write!(f, "{connection}/{child}: ")?,
            (Some(connection), None) => write!(f, "{connection}: ")?,
            _ => {}
        }
        let peer = self.peer.ip();
        match self.sender {
            Side::Us => write!(f, "{what}: we sent {} to {peer}", self.sent)?,
            Side::Peer => write!(f, "{what}: the peer ({peer}) sent {}", self.sent)?,
        }
        if !self.expected.is_empty() {
            write!(f, "; would have matched: {}", self.expected)?;
        }
        Ok(())
    }
}

/// A line for one of tshark's tables.
#[derive(Clone, PartialEq)]
pub struct KeyLogLine {
    /// Which table.
    pub table: KeyLogTable,
    /// The line, with the keys in it.
    pub line: Zeroizing<String>,
}

impl fmt::Debug for KeyLogLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyLogLine({:?}, …)", self.table)
    }
}

/// tshark's tables (files in its profile folder).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyLogTable {
    /// `ikev2_decryption_table`
    Ike,
    /// `esp_sa`
    Esp,
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Established { connection, spi, peer_spi, local, remote, suite, initiator } => {
                let role = if *initiator { "initiator" } else { "responder" };
                write!(
                    f,
                    "{connection}: IKE SA {spi} established with {remote} (peer's {peer_spi}, \
                     from {local}, {role}, {suite})"
                )
            }
            Self::Rekeyed { connection, old, new, suite, by_us } => {
                let side = if *by_us { Side::Us } else { Side::Peer };
                write!(f, "{connection}: IKE SA {old} rekeyed to {new} ({side} asked, {suite})")
            }
            Self::Deleted { connection, spi, reason } => {
                if let Some(connection) = connection {
                    write!(f, "{connection}: ")?;
                }
                write!(f, "IKE SA {spi} deleted: {reason}")
            }
            Self::ChildUp {
                connection,
                child,
                spi_in,
                spi_out,
                suite,
                local_ts,
                remote_ts,
                rekeyed,
            } => {
                write!(f, "{connection}/{child}: Child SA {spi_in} in, {spi_out} out, {suite}, ")?;
                write!(f, "{} === {}", Selectors(local_ts), Selectors(remote_ts))?;
                match rekeyed {
                    Some(old) => write!(f, ", replaces {old}"),
                    None => Ok(()),
                }
            }
            Self::ChildDown { connection, child, spi_in } => {
                write!(f, "{connection}/{child}: Child SA {spi_in} closed")
            }
            Self::Moved { connection, spi, from, to } => {
                write!(f, "{connection}: peer of IKE SA {spi} moved from {from} to {to}")
            }
            Self::Retransmitting { connection, spi, sent } => {
                if let Some(connection) = connection {
                    write!(f, "{connection}: ")?;
                }
                write!(f, "IKE SA {spi}: no answer, request sent {sent} times")
            }
            Self::Failed(failure) => failure.fmt(f),
            Self::KeyLog(line) => write!(f, "key log line for {:?}", line.table),
        }
    }
}

/// Selectors as a person writes them: separated by spaces.
pub(crate) struct Selectors<'a>(pub(crate) &'a [TrafficSelector]);

impl fmt::Display for Selectors<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("nothing");
        }
        for (n, ts) in self.0.iter().enumerate() {
            if n > 0 {
                f.write_str(" ")?;
            }
            write!(f, "{ts}")?;
        }
        Ok(())
    }
}

/// Most of a kind that a message names.
const NAMED: usize = 8;

/// The first few different ones, for a message: a stranger's mistake must not cost a line as long as the configuration.
pub(crate) fn some_of(all: impl Iterator<Item = String>, between: &str) -> String {
    let mut named: Vec<String> = Vec::new();
    for one in all {
        if named.len() == NAMED {
            named.push("…".to_owned());
            break;
        }
        if !named.contains(&one) {
            named.push(one);
        }
    }
    named.join(between)
}

/// All IKE SAs of an endpoint, for `tandem status`.
#[derive(Debug, Clone, Default)]
pub struct Status {
    /// By connection, then age.
    pub ike_sas: Vec<IkeStatus>,
    /// Half-open SAs that peers began.
    pub half_open: usize,
}

/// Whose a Child SA is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChildName<'a> {
    /// Its connection, once known.
    pub connection: Option<&'a str>,
    /// Its name in the configuration.
    pub child: &'a str,
    /// Our outbound SPI.
    pub spi_out: EspSpi,
}

/// How far one connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// As [`IkeStatus::state`]; none without an IKE SA.
    pub state: Option<&'static str>,
    /// Child SAs that send and receive.
    pub children: usize,
}

/// One IKE SA.
#[derive(Debug, Clone)]
pub struct IkeStatus {
    /// Its connection, once known.
    pub connection: Option<String>,
    /// Our SPI.
    pub spi: IkeSpi,
    /// The peer's SPI.
    pub peer_spi: IkeSpi,
    /// `connecting`, `established`, `rekeying`, `deleting`, `replaced` (the
    /// peer is to delete it), `synchronising`, `in doubt`.
    pub state: &'static str,
    /// Whether we initiated it.
    pub initiator: bool,
    /// Our address and port.
    pub local: SocketAddr,
    /// The peer's address and port.
    pub remote: SocketAddr,
    /// Our identity.
    pub local_id: Option<String>,
    /// The peer's identity.
    pub remote_id: Option<String>,
    /// What protects it, once negotiated.
    pub suite: Option<String>,
    /// Time since it was established or begun.
    pub age: Duration,
    /// Time until we rekey it.
    pub rekey_in: Option<Duration>,
    /// Time since anything authentic came from the peer.
    pub heard: Option<Duration>,
    /// NAT before us, NAT before the peer (or claimed by it).
    pub nat: (bool, bool),
    /// Its Child SAs, those that only still receive included.
    pub children: Vec<ChildStatus>,
}

/// One Child SA.
#[derive(Debug, Clone)]
pub struct ChildStatus {
    /// Its name in the configuration.
    pub name: String,
    /// Our inbound SPI.
    pub spi_in: EspSpi,
    /// Our outbound SPI.
    pub spi_out: EspSpi,
    /// `installed` (sends and receives), `receiving` (inbound only), `rekeying`,
    /// `deleting`, `retired` (deleted, still receiving for a few seconds).
    pub state: &'static str,
    /// What protects it.
    pub suite: String,
    /// UDP encapsulation.
    pub udp_encap: bool,
    /// Selectors on our side.
    pub local_ts: Vec<TrafficSelector>,
    /// Selectors on the peer's side.
    pub remote_ts: Vec<TrafficSelector>,
    /// Time since it was made.
    pub age: Duration,
    /// Time until we rekey it.
    pub rekey_in: Option<Duration>,
}
