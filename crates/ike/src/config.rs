//! What the operator wants, already validated: connections, their children,
//! and the limits and timers of one endpoint.
//!
//! Plain data without behaviour. The gateway builds these values from the
//! config file; nothing here is ever changed by a packet.

use core::{fmt, time::Duration};
use std::net::IpAddr;

use crypto::Secret;
use wire::{
    id::{ConnectionId, EndpointId},
    ike::Identity,
    ts::TrafficSelector,
};

use crate::proposal::{EspProposal, IkeProposal};

/// One endpoint: the virtual WAN address and the connections served there.
#[derive(Debug)]
pub struct EndpointConfig {
    /// Dense index, the same on both hosts.
    pub id: EndpointId,
    /// Our addresses at this endpoint. Datagrams to others are dropped.
    pub addresses: Vec<IpAddr>,
    /// The connections, in any order. Names and ids must be unique.
    pub connections: Vec<ConnectionConfig>,
    /// Bounds under attack.
    pub limits: Limits,
    /// Emit [`crate::Event::KeyLog`] with lines for tshark. Off by default;
    /// whoever turns it on gives every key away.
    pub keylog: bool,
}

/// What the operator configures towards one remote gateway.
#[derive(Debug)]
pub struct ConnectionConfig {
    /// The name in the config file, shown in logs and kept in records.
    pub name: String,
    /// Dense index, the same on both hosts.
    pub id: ConnectionId,
    /// Which of the endpoint's addresses we speak from.
    pub local_address: IpAddr,
    /// Where the remote gateway is.
    pub remote_address: RemoteAddress,
    /// Our identity (IDi when we initiate).
    pub local_id: Identity,
    /// The only identity we accept from the peer, compared exactly.
    pub remote_id: Identity,
    /// The pre-shared key: the bytes as they are in the file, undecoded.
    pub psk: Secret,
    /// Proposals for the IKE SA, most preferred first. Never empty
    /// ([`crate::proposal::default_ike`]).
    pub ike_proposals: Vec<IkeProposal>,
    /// The Child SAs. Names are unique within the connection.
    pub children: Vec<ChildConfig>,
    /// UDP encapsulation of ESP.
    pub encap: Encap,
    /// Rekey, liveness and retransmission times.
    pub timers: Timers,
    /// Whether INITIAL_CONTACT may be sent at all. Must be false where another
    /// endpoint has the same pair of identities (peers.md, 7).
    pub initial_contact: bool,
}

impl ConnectionConfig {
    /// Whether we bring it up, unasked.
    #[must_use]
    pub fn is_begun_by_us(&self) -> bool {
        self.children.iter().any(|c| c.start == Start::Initiate)
            && self.remote_address != RemoteAddress::Any
    }
}

/// One Child SA of a connection.
#[derive(Debug, Clone)]
pub struct ChildConfig {
    /// The name in the config file.
    pub name: String,
    /// What lies behind us.
    pub local_ts: Vec<TrafficSelector>,
    /// What lies behind the peer.
    pub remote_ts: Vec<TrafficSelector>,
    /// Proposals for ESP, most preferred first. Never empty
    /// ([`crate::proposal::default_esp`]).
    pub esp_proposals: Vec<EspProposal>,
    /// What brings it up.
    pub start: Start,
}

/// Where the remote gateway is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RemoteAddress {
    /// At this address.
    Ip(IpAddr),
    /// Anywhere: we only respond.
    Any,
}

impl RemoteAddress {
    /// The address, if it is one.
    #[must_use]
    pub fn ip(&self) -> Option<IpAddr> {
        match self {
            Self::Ip(ip) => Some(*ip),
            Self::Any => None,
        }
    }

    /// Whether a peer at `ip` may be this one.
    #[must_use]
    pub fn matches(&self, ip: IpAddr) -> bool {
        match self {
            Self::Ip(own) => *own == ip,
            Self::Any => true,
        }
    }
}

impl fmt::Display for RemoteAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(ip) => write!(f, "{ip}"),
            Self::Any => f.write_str("any"),
        }
    }
}

/// What brings a Child SA up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// We do, at once, and again whenever it is lost.
    Initiate,
    /// We do, when the first packet asks for it ([`crate::Endpoint::acquire`]).
    Trap,
    /// Only the peer does.
    Respond,
}

/// UDP encapsulation of ESP (RFC 3948).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encap {
    /// Claim a NAT in NAT_DETECTION_SOURCE_IP, so that any peer encapsulates
    /// (dataplane.md prefers UDP to protocol 50); protocol 50 with one that
    /// knows nothing of NATs.
    Auto,
    /// As `Auto`, and encapsulate even if the peer knows nothing of NATs.
    Always,
    /// Be honest: protocol 50, unless there is a NAT.
    Never,
}

/// Times of one connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timers {
    /// Age at which we rekey an IKE SA.
    pub ike_rekey: Duration,
    /// Age at which we rekey a Child SA.
    pub child_rekey: Duration,
    /// Rekeying starts up to this share (in percent) of the time earlier,
    /// drawn per SA, so that both ends seldom collide (RFC 7296 §2.8.1).
    pub jitter_percent: u8,
    /// How long after its planned rekeying an SA may still be used, as a share
    /// of the rekey time in percent. Then it is deleted (RFC 7296 §2.8).
    pub overtime_percent: u8,
    /// Liveness check after this time without anything authentic from the
    /// peer; zero turns it off.
    pub dpd: Duration,
    /// NAT keepalive interval (RFC 3948 §4); zero turns it off.
    pub keepalive: Duration,
    /// How requests are repeated.
    pub retransmit: Retransmit,
    /// First pause before a failed initiation is tried again; it doubles up to
    /// `retry_max`.
    pub retry: Duration,
    /// Longest pause between initiations.
    pub retry_max: Duration,
}

impl Default for Timers {
    fn default() -> Self {
        Self {
            // peers.md 13: what peers use.
            ike_rekey: Duration::from_secs(4 * 3600),
            child_rekey: Duration::from_secs(3600),
            jitter_percent: 10,
            overtime_percent: 10,
            dpd: Duration::from_secs(30),
            keepalive: Duration::from_secs(20),
            retransmit: Retransmit::default(),
            retry: Duration::from_secs(1),
            retry_max: Duration::from_secs(60),
        }
    }
}

/// Exponential backoff of one request (RFC 7296 §2.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retransmit {
    /// Wait before the first repetition.
    pub initial: Duration,
    /// Each wait is this many percent of the one before; above 100.
    pub factor_percent: u16,
    /// No wait is longer.
    pub max: Duration,
    /// Repetitions before the peer counts as dead.
    pub tries: u8,
}

impl Default for Retransmit {
    fn default() -> Self {
        // 1, 1.6, 2.6, 4.1, 6.6, 10.5, 16.8, 26.8, 30 s: dead after 100 s.
        Self {
            initial: Duration::from_secs(1),
            factor_percent: 160,
            max: Duration::from_secs(30),
            tries: 8,
        }
    }
}

impl Retransmit {
    /// The wait that follows the sending number `sent` (1 is the first).
    #[must_use]
    pub fn wait(&self, sent: u8) -> Duration {
        let mut wait = self.initial;
        for _ in 1..sent {
            wait = wait.saturating_mul(u32::from(self.factor_percent)) / 100;
            if wait >= self.max {
                return self.max;
            }
        }
        wait
    }
}

/// Bounds under attack (security.md, "Under attack"), all in one place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Half-open SAs in all from which cookies are demanded.
    pub cookie_total: usize,
    /// Half-open SAs of one source address from which cookies are demanded.
    pub cookie_per_source: usize,
    /// Half-open SAs of one source address; more are refused.
    pub half_open_per_source: usize,
    /// Half-open SAs in all; more are refused, cookie or not.
    pub half_open_total: usize,
    /// Age at which a half-open SA is dropped.
    pub half_open_timeout: Duration,
    /// Age at which the cookie secret is replaced.
    pub cookie_rotation: Duration,
    /// Age up to which a cookie is good.
    pub cookie_lifetime: Duration,
    /// Longest IKE datagram.
    pub message_len: usize,
    /// Child SAs of one IKE SA.
    pub children_per_ike: usize,
    /// Established IKE SAs of one connection: when one more comes up, the one that was silent longest ends.
    pub ike_per_connection: usize,
    /// Our own unfinished initiations to one address (peers.md, 12).
    pub initiations_per_peer: usize,
    /// Our own unfinished initiations in all.
    pub initiations_total: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            cookie_total: 30,
            cookie_per_source: 3,
            half_open_per_source: 5,
            half_open_total: 1000,
            half_open_timeout: Duration::from_secs(30),
            cookie_rotation: Duration::from_secs(120),
            cookie_lifetime: Duration::from_secs(10),
            message_len: 65_535,
            children_per_ike: 64,
            // Reauthentication that makes before it breaks needs two (peers.md 8), a rekeying one more.
            ike_per_connection: 8,
            initiations_per_peer: 2,
            initiations_total: 64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backoff_grows_to_its_maximum() {
        let backoff = Retransmit::default();
        let waits: Vec<u128> = (1..=9).map(|n| backoff.wait(n).as_millis()).collect();
        assert_eq!(waits, [1000, 1600, 2560, 4096, 6553, 10485, 16777, 26843, 30000]);
    }
}
