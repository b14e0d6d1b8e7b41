//! The pair protocol of Tandem, sans-IO: two instances that share every tunnel's state, so that
//! either can carry on the other's. It decides who owns an endpoint, under which term, until when
//! the owner may send, and carries opaque records in authenticated frames.
//!
//! [`Pair`] is the whole face: `handle_*(now, …)`, then drain [`Pair::poll_event`],
//! [`Pair::poll_transmit`] and [`Pair::poll_timeout`]. It reads no clock, draws no randomness,
//! opens no socket. Authentication and sockets belong to `tandem::link`.
//!
//! ```text
//!                 ┌────────────────────────── Pair ──────────────────────────┐
//!   heartbeats ──►│ contact: echo, numbers, death  ──►  ownership, switchover│──► Own, StandDown
//!   probes     ──►│                                └──► fence                │──► Fence
//!   frames     ──►│ follower: snapshot, log  ◄── terms                       │──► Apply
//!   append     ──►│ owner: log, sync                                         │──► Acked, Mode
//!                 └──────────────────────────────────────────────────────────┘
//! ```
//! Each module draws its own part. What ha.md leaves open is decided where it arises; the larger
//! choices: claims are compared by the same rule on both sides and acted upon only once echoed
//! (`ownership`); after a switchover the old owner is an exact shadow at once, without a snapshot
//! (`switchover`); a loser keeps its state, as an unsynced shadow's, until the winner's snapshot
//! replaces it (`follower`); the tail handed over is compacted to the keys it changed (`owner`).
//!
//! There is no witness yet (a later issue).
#![cfg_attr(not(test), deny(clippy::indexing_slicing))]

mod bug;
pub mod codec;
pub mod config;
mod contact;
mod digest;
mod endpoint;
mod event;
mod fence;
mod follower;
mod owner;
mod ownership;
mod pair;
mod status;
mod store;
mod switchover;
mod terms;
mod types;

#[cfg(any(test, feature = "bugs"))]
pub use bug::Bug;
pub use config::{Config, ConfigError, EndpointConfig, Releases};
pub use event::{Event, HookState, How, Mode, Own, Probe, TailItem, Transmit, Warning, Why};
pub use pair::{AppendError, Pair, SideKind, SwitchoverError};
pub use status::{EndpointStatus, LinkStatus, Role, Status};
pub use types::{
    ApplyId, Batch, EndpointId, Lineage, LinkId, Opaque, Position, SideId, SyncId, Term, Value,
};

#[cfg(test)]
mod sim;
