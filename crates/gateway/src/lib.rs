//! The control plane of one Tandem instance, sans-IO: IKE at every endpoint, the pair protocol, and the commands for
//! the shards, composed. It is what the daemon runs and what the simulation runs.
//!
//! # The face, and the drain rule
//! [`Gateway`] never reads a clock, opens a socket, or draws randomness that was not passed in. Times are
//! `CLOCK_BOOTTIME` as [`core::time::Duration`]. Its user
//!
//! 1. feeds everything that has arrived, by the `handle_*` functions;
//! 2. calls [`Gateway::handle_turn`], after every batch of inputs and at the latest at [`Gateway::poll_timeout`];
//! 3. drains [`Gateway::poll_output`] until it is empty, and carries the outputs out **in order**, before the next input.
//!
//! The order of outputs carries meaning: an SA's installation stands before the datagram that makes the peer use it,
//! `Own` before the fence opens, the fence before the announcement. A shard's commands pass one ordered queue.
//!
//! # What never happens here
//! A datagram that depends on a record leaves before the record is committed (`held` keeps it back); a sequence
//! number is used that the shadow does not know to avoid (leases); IKE runs outside the fence.
#![cfg_attr(not(test), deny(clippy::indexing_slicing))]

mod bug;
pub mod config;
mod endpoint;
mod face;
mod formats;
mod held;
mod leases;
mod machine;
mod pair_config;
mod pair_events;
mod parts;
pub mod peer_message;
mod planned;
mod requests;
mod spi;
pub mod status;
mod view;
mod withdraw;

#[cfg(feature = "bugs")]
pub use crate::bug::Bug;
pub use crate::face::{Answer, Moved, Output, Refusal, Request, TunnelUp};
pub use crate::formats::FORMATS;
pub use crate::machine::{Gateway, Start, StartError};
