//! The pair protocol of Tandem, sans-IO (types first; bodies being written).
#![cfg_attr(not(test), deny(clippy::indexing_slicing))]

pub mod codec;
pub mod config;
mod digest;
mod event;
mod pair;
mod status;
mod types;

pub use config::{Config, ConfigError, EndpointConfig, Releases};
pub use event::{Event, HookState, How, Mode, Own, Probe, TailItem, Transmit, Warning, Why};
pub use pair::{AppendError, Pair, SideKind, SwitchoverError};
pub use status::{EndpointStatus, LinkStatus, Role, Status};
pub use types::{ApplyId, Batch, EndpointId, Lineage, LinkId, Opaque, Position, SideId, SyncId, Term, Value};
