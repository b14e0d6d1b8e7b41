//! The face.
use crate::config::{Config, ConfigError};
use crate::event::{Event, Probe, Transmit};
use crate::status::Status;
use crate::types::{ApplyId, Batch, EndpointId, LinkId, Opaque, Position, SideId, SyncId, Term, Value};
use core::time::Duration;

/// Whether a side message is acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SideKind {
    /// Kept and resent after a reconnect until acknowledged (leases).
    Acked,
    /// Lost with the stream (window tops).
    Unacked,
}

/// Why [`Pair::append`] refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AppendError {
    /// Only an owner that is not handing over writes the log.
    #[error("not the owner of this endpoint, or it is being handed over")]
    NotOwner,
    /// Above [`crate::config::BATCH_MAX`] or [`crate::config::VALUE_MAX`].
    #[error("the record is too large")]
    TooLarge,
}

/// Why [`Pair::switchover`] refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SwitchoverError {
    /// No such endpoint, or the other owns it.
    #[error("not the owner of this endpoint")]
    NotOwner,
    /// There is nobody to hand it to.
    #[error("the other instance is out of contact")]
    NoContact,
    /// The other has not all of our state yet.
    #[error("the other instance is not in sync yet")]
    NotSynced,
    /// The other's uplink is down.
    #[error("the other instance reports a dead uplink")]
    PeerUplink,
    /// One is under way.
    #[error("a switchover is already under way")]
    Busy,
}

/// One instance's half of the pair protocol.
pub struct Pair {
    _config: Config,
}

#[allow(unused_variables, missing_docs)]
impl Pair {
    pub fn new(config: Config, now: Duration, seed: u64, terms: &[Option<Term>]) -> Result<Pair, ConfigError> {
        Ok(Pair { _config: config })
    }
    pub fn handle_stream_up(&mut self, now: Duration, link: LinkId) {}
    pub fn handle_stream_down(&mut self, now: Duration, goodbye: bool) {}
    pub fn handle_frame(&mut self, now: Duration, bytes: &[u8]) {}
    pub fn handle_heartbeat(&mut self, now: Duration, link: LinkId, bytes: &[u8]) {}
    pub fn handle_probe_result(&mut self, now: Duration, link: LinkId, result: Probe) {}
    pub fn handle_turn(&mut self, now: Duration) {}
    pub fn handle_uplink(&mut self, now: Duration, endpoint: EndpointId, up: bool) {}
    pub fn handle_reserved(&mut self, now: Duration, endpoint: EndpointId, up_to: Term) {}
    pub fn append(&mut self, now: Duration, endpoint: EndpointId, batch: Batch) -> Result<Position, AppendError> {
        Err(AppendError::NotOwner)
    }
    pub fn send_side(&mut self, now: Duration, endpoint: EndpointId, kind: SideKind, bytes: Vec<u8>) -> Option<SideId> {
        None
    }
    pub fn confirm_ceilings(&mut self, now: Duration, endpoint: EndpointId, sync: SyncId) {}
    pub fn applied(&mut self, now: Duration, endpoint: EndpointId, id: ApplyId) {}
    pub fn switchover(&mut self, now: Duration, endpoint: EndpointId) -> Result<(), SwitchoverError> {
        Err(SwitchoverError::NotOwner)
    }
    pub fn final_counters(&mut self, now: Duration, endpoint: EndpointId, counters: Opaque) {}
    pub fn goodbye(&mut self, now: Duration) {}
    pub fn poll_transmit(&mut self) -> Option<Transmit> {
        None
    }
    pub fn poll_event(&mut self) -> Option<Event> {
        None
    }
    pub fn poll_timeout(&self) -> Option<Duration> {
        None
    }
    pub fn fence(&self, endpoint: EndpointId) -> Duration {
        Duration::ZERO
    }
    pub fn value(&self, endpoint: EndpointId, key: u64) -> Option<&Value> {
        None
    }
    pub fn status(&self, now: Duration) -> Status {
        unreachable!()
    }
}
