//! IKEv2 (RFC 7296) as a sans-IO state machine: IKE SAs and Child SAs of one
//! endpoint, ready to be carried on by another instance at any point.
//!
//! It never reads a clock, draws randomness, or opens a socket: time,
//! randomness and datagrams are arguments ([`Context`]).
//!
//! **One step, one record.** Every handled input yields at most one
//! [`Transition`] (a few inputs, such as a command for a connection, yield one
//! per IKE SA): the new serialised values of the IKE SAs it touched, what the
//! data plane must hold afterwards, and the datagrams that may leave once the
//! record is committed. [`ChildOp`]s are the difference between old and new
//! values, so the owner and a shadow that applies the same bytes derive the
//! same ([`Endpoint::apply`]). A message that is malformed, not authentic or
//! out of order changes nothing: steps work on copies (`state`).
//!
//! **Drain rule.** After any call on [`Endpoint`], call
//! [`Endpoint::poll_transition`], [`Endpoint::poll_keepalive`] and
//! [`Endpoint::poll_event`] until each gives `None`, then
//! [`Endpoint::poll_timeout`] for the time of the next
//! [`Endpoint::handle_timeout`]. Transitions are ordered; their transmits leave
//! in that order.
//!
//! | file | what |
//! | --- | --- |
//! | `endpoint` | demultiplexing, commands, timers, the replication face |
//! | `step` | one atomic step: what it may read and what it collects |
//! | `state`, `note`, `record` | the replicated values and their codec |
//! | `init`, `cookie`, `auth` | IKE_SA_INIT and IKE_AUTH, both roles |
//! | `child`, `rekey`, `informational` | exchanges of an established IKE SA |
//! | `table` | all IKE SAs with their indexes; the difference of two states for the workers |
//! | `established` | window, answers, which task comes next |
//! | `retransmit` | repetition, giving up, every other timer of an IKE SA |
//! | `sync` | message id synchronisation after a takeover in doubt (RFC 6311) |
//! | `keys`, `proposal`, `nat` | key schedule, algorithms, NAT detection |

#![cfg_attr(not(test), deny(clippy::indexing_slicing))]

mod auth;
mod child;
pub mod config;
mod cookie;
mod endpoint;
mod error;
mod established;
mod event;
mod informational;
mod init;
mod keys;
mod nat;
mod note;
pub mod proposal;
mod record;
mod rekey;
mod retransmit;
mod state;
mod step;
mod sync;
mod table;
#[cfg(test)]
mod tests;

use core::{net::SocketAddr, time::Duration};

use crypto::{Rng, Secret, aead::AeadAlg};
use wire::{
    id::{ConnectionId, EspSpi, IkeSpi, Term},
    ts::TrafficSelector,
};
use zeroize::Zeroizing;

pub use config::{
    ChildConfig, ConnectionConfig, Encap, EndpointConfig, Limits, RemoteAddress, Retransmit, Start,
    Timers,
};
pub use endpoint::{Application, Applied, Counters, Endpoint};
pub use event::{
    ChildName, ChildStatus, DeleteReason, Event, Failure, IkeStatus, KeyLogLine, KeyLogTable,
    Progress, Side, Status, What,
};
pub use record::{NEWEST_FORMAT, OLDEST_FORMAT, RecordError};
pub use wire::ike::Identity;

/// What a step may use of the world.
pub struct Context<'a> {
    /// Time since the zero of CLOCK_BOOTTIME. Never goes back.
    pub now: Duration,
    /// Keys, nonces, SPIs, jitter.
    pub rng: &'a mut dyn Rng,
    /// Inbound ESP SPIs.
    pub spis: &'a mut dyn SpiAllocator,
}

/// Hands out inbound ESP SPIs, which carry the index of worker and slot
/// (`wire::id::SpiLayout`).
pub trait SpiAllocator {
    /// A free SPI, reserved until it is released; of the same worker as `like`, so that the SAs of a tunnel stay
    /// together, also through a rekey. `None` when all are taken.
    fn allocate(&mut self, like: Option<EspSpi>) -> Option<EspSpi>;
    /// The SPI is free again. Called also for SPIs that another instance
    /// allocated: those are to be ignored.
    fn release(&mut self, spi: EspSpi);
}

/// One atomic step, which is one replication record.
#[derive(Default)]
pub struct Transition {
    /// The whole serialised state of IKE SAs with their Child SAs, by our SPI, and notes about connections.
    pub puts: Vec<(IkeSpi, Zeroizing<Vec<u8>>)>,
    /// IKE SAs and notes that are gone.
    pub deletes: Vec<IkeSpi>,
    /// What the workers must hold after this step, in order.
    pub children: Vec<ChildOp>,
    /// Datagrams that leave only when this record and all before it are
    /// committed.
    pub transmits: Vec<Transmit>,
}

impl Transition {
    /// Whether there is anything to replicate. Repeated datagrams and answers
    /// without state come in transitions that are no record.
    #[must_use]
    pub fn is_record(&self) -> bool {
        !self.puts.is_empty() || !self.deletes.is_empty()
    }
}

impl core::fmt::Debug for Transition {
    /// Records hold keys, so only their lengths show.
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let puts: Vec<_> = self.puts.iter().map(|(spi, bytes)| (spi, bytes.len())).collect();
        f.debug_struct("Transition")
            .field("puts", &puts)
            .field("deletes", &self.deletes)
            .field("children", &self.children)
            .field("transmits", &self.transmits)
            .finish()
    }
}

/// A change of what the workers hold.
#[derive(Debug)]
pub enum ChildOp {
    /// Receive on it at once; do not send yet.
    Install(Box<ChildSa>),
    /// Send on it, once the record is committed, in place of any other Child
    /// SA of the same connection and child.
    UseOutbound {
        /// Which.
        spi_in: EspSpi,
    },
    /// The peer's (or our) outer addresses changed; keys and counters stay.
    Move {
        /// Which.
        spi_in: EspSpi,
        /// Our outer address and, in UDP, port.
        local: SocketAddr,
        /// The peer's.
        remote: SocketAddr,
        /// ESP in UDP.
        udp_encap: bool,
    },
    /// Forget it.
    Remove {
        /// Which.
        spi_in: EspSpi,
    },
}

/// All the data plane needs of one Child SA.
#[derive(Debug)]
pub struct ChildSa {
    /// The connection it belongs to.
    pub connection: ConnectionId,
    /// Its name in the configuration.
    pub child: String,
    /// The SPI the peer sends to us with.
    pub spi_in: EspSpi,
    /// The SPI we send with.
    pub spi_out: EspSpi,
    /// Cipher of both directions.
    pub aead: AeadAlg,
    /// Key ‖ salt of what we receive.
    pub keymat_in: Secret,
    /// Key ‖ salt of what we send.
    pub keymat_out: Secret,
    /// Inner addresses on our side.
    pub local_ts: Vec<TrafficSelector>,
    /// Inner addresses on the peer's side.
    pub remote_ts: Vec<TrafficSelector>,
    /// Our outer address; the port counts only in UDP.
    pub local: SocketAddr,
    /// The peer's outer address; the port counts only in UDP.
    pub remote: SocketAddr,
    /// ESP in UDP (RFC 3948).
    pub udp_encap: bool,
    /// The term in which its keys were made: IVs carry terms, so its age in terms is bounded (ha.md).
    pub born: Term,
}

/// One IKE datagram, without the non-ESP marker: the caller adds it when
/// `from.port()` is 4500.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transmit {
    /// Our address and port.
    pub from: SocketAddr,
    /// The peer's address and port.
    pub to: SocketAddr,
    /// The IKE message.
    pub bytes: Vec<u8>,
}

/// A NAT keepalive (RFC 3948 §2.3) to be sent: one byte 0xFF, no marker,
/// waiting for no record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keepalive {
    /// Our address and port.
    pub from: SocketAddr,
    /// The peer's address and port.
    pub to: SocketAddr,
}

/// What a command is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// Every IKE SA of a connection.
    Connection(ConnectionId),
    /// Every Child SA of a connection, not the IKE SAs.
    Children(ConnectionId),
    /// One IKE SA, by our SPI.
    Ike(IkeSpi),
    /// One Child SA, by our inbound SPI.
    Child(EspSpi),
}

/// How sure a new owner is of the state it takes over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Doubt {
    /// It was synced: message ids are exact.
    None,
    /// It was not: RFC 6311 where negotiated, else re-establish.
    InDoubt,
}

/// Why [`Endpoint::activate`] refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ActivateError {
    /// The term is not above the last one: IVs would repeat.
    #[error("term is not newer than the last one")]
    OldTerm,
}
