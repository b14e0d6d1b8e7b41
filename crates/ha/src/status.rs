//! Plain figures for `tandem status` and metrics; nothing here decides anything.

use crate::event::Mode;
use crate::types::{EndpointId, Lineage, LinkId, Position, Term};
use core::time::Duration;

/// What we are for one endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// We hold nothing of it.
    Empty,
    /// We hold state, ready to run.
    Shadow {
        /// Whether the owner says that it is exact.
        synced: bool,
    },
    /// We own it.
    Owner(Mode),
    /// We own it and have offered it to the other.
    Offering,
    /// We lost it after a split and still owe the winner our tail.
    Yielding,
}

/// One endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointStatus {
    /// Which.
    pub endpoint: EndpointId,
    /// Our role.
    pub role: Role,
    /// The term we own it under, or that we follow.
    pub term: Term,
    /// The history our state belongs to.
    pub lineage: Lineage,
    /// Our log position.
    pub position: Position,
    /// Owner: what the shadow has acknowledged.
    pub acked: Position,
    /// The digest of our state.
    pub digest: u64,
    /// Keys held.
    pub keys: usize,
    /// Our uplink works.
    pub uplink: bool,
    /// Until when the fence is open; zero if not at all.
    pub valid_until: Duration,
    /// Whether the other owns it, as last heard.
    pub peer_owns: bool,
    /// Whether the other's uplink works, as last heard.
    pub peer_uplink: Option<bool>,
}

/// One link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkStatus {
    /// Which.
    pub link: LinkId,
    /// Since the last heartbeat heard on it.
    pub heard_ago: Option<Duration>,
    /// Heartbeats accepted.
    pub accepted: u64,
    /// Heartbeats refused by their number.
    pub replayed: u64,
}

/// The whole instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// Heard within `dead_after` and not proven dead.
    pub contact: bool,
    /// The stream is up and both have said hello.
    pub joined: bool,
    /// Replication is possible: same config digest, common release.
    pub compatible: bool,
    /// The release whose formats are in use, as last settled.
    pub release: Option<u32>,
    /// The newest that the other spoke then.
    pub peer_newest: Option<u32>,
    /// What the other called its build; release 1 did not say.
    pub peer_build: Option<String>,
    /// Since the other's newest heartbeat.
    pub heard_ago: Option<Duration>,
    /// Age of our newest heartbeat that the other has echoed.
    pub echo_ago: Option<Duration>,
    /// Smoothed round trip of heartbeats.
    pub rtt: Option<Duration>,
    /// Every link.
    pub links: Vec<LinkStatus>,
    /// Every endpoint.
    pub endpoints: Vec<EndpointStatus>,
    /// Frames and heartbeats dropped as malformed.
    pub malformed: u64,
}
