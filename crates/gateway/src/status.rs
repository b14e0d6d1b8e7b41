//! What `tandem status --json` prints: the stable, documented shape of an instance's state.
//!
//! These are plain values. The gateway core fills them from ike, ha and the shards' reports; the
//! control socket carries them; the command line draws a table from them or prints them as they are.
//! Fields are only ever added (a reader ignores what it does not know); none is renamed or removed
//! within a major release. Units stand last in a name. A number that is not known is `null`, never 0.
//! Nothing here is secret: no key, no nonce, no pre-shared key ever enters these types.
//! A whole document is compared, field by field, in crates/tandem/tests/json_shapes.rs.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The whole answer of `tandem status`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Name of the instance that answers.
    pub instance: String,
    /// Its index: 0 (even terms) or 1 (odd terms).
    pub index: u8,
    /// Release of its `tandemd`.
    pub release: String,
    /// Seconds since the daemon started.
    pub uptime_s: u64,
    /// Threads that carry packets.
    #[serde(default)]
    pub workers: u8,
    /// Its endpoints leave, and do not come back before `tandem undrain`.
    #[serde(default)]
    pub draining: bool,
    /// First 16 hexadecimal digits of the configuration's digest: equal on both hosts.
    pub config_digest: String,
    /// The other instance, or `null` for a lone gateway.
    pub pair: Option<PairStatus>,
    /// Sorted by name.
    pub endpoints: Vec<EndpointStatus>,
    /// Sorted by connection, then endpoint; none in a summary.
    pub tunnels: Vec<TunnelStatus>,
    /// How many there are, also in a summary.
    #[serde(default)]
    pub tunnel_counts: TunnelCounts,
    /// Totals since the daemon started.
    pub counters: Counters,
}

/// Whether the two instances hear each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Contact {
    /// Heartbeats pass both ways.
    TwoWay,
    /// We hear the other instance, it does not hear us.
    OneWay,
    /// Nothing is heard.
    #[default]
    None,
    /// The handshake was refused: see `refused`.
    Refused,
}

/// The other instance, as seen from here.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PairStatus {
    /// Name of the other instance, from the configuration.
    pub peer: String,
    /// Release of its daemon, once heard; one that speaks format 1 does not say.
    pub peer_release: Option<String>,
    /// The format in use between the two: the lower of the two newest, as last settled.
    #[serde(default)]
    pub format: Option<u32>,
    /// The newest format that this instance speaks; see `tandemd --hold-format`.
    #[serde(default)]
    pub newest_format: Option<u32>,
    /// The newest that the other one spoke at the last handshake.
    #[serde(default)]
    pub peer_newest_format: Option<u32>,
    /// State of contact.
    pub contact: Contact,
    /// Why the other instance was refused (wrong secret, equal indices, differing configuration …).
    pub refused: Option<String>,
    /// One row per configured link, in the configuration's order.
    pub links: Vec<LinkStatus>,
}

/// One heartbeat path.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LinkStatus {
    /// Our address and port on this link.
    pub local: String,
    /// The other instance's address and port on this link.
    pub remote: String,
    /// A heartbeat was heard within `dead_after_ms`.
    pub up: bool,
    /// The state stream (TCP) runs over this link.
    pub stream: bool,
    /// Round trip of the newest echoed heartbeat, microseconds.
    pub rtt_us: Option<u64>,
    /// Milliseconds since the newest heartbeat.
    pub last_heard_ms: Option<u64>,
}

/// What this instance is for an endpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Serves it.
    Owner,
    /// Holds state that is ready to run.
    Shadow,
    /// Just gave it away and hands on what still arrives.
    Steering,
    /// Holds nothing of it (starting, or refused by the other instance).
    #[default]
    None,
}

/// How the owner's state stands with the shadow's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// No shadow: a second failure loses the tunnels.
    #[default]
    Solo,
    /// A snapshot is on its way.
    Syncing,
    /// The shadow can carry on at any moment.
    Synced,
}

/// One endpoint.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct EndpointStatus {
    /// Name from the configuration.
    pub name: String,
    /// Its virtual WAN address.
    pub address: String,
    /// Instance that serves it when both are well.
    pub home: String,
    /// Instance that serves it now, as far as this one knows.
    pub owner: Option<String>,
    /// What this instance is for it.
    pub role: Role,
    /// Highest term seen; grows at every change of owner.
    pub term: u64,
    /// Owner's replication state.
    pub mode: Mode,
    /// Position in the record log: the owner's newest, or the shadow's newest installed.
    pub position: u64,
    /// Newest position the other instance has acknowledged (owner only).
    pub acked_position: Option<u64>,
    /// Milliseconds for which this instance may still send without another sign of life; owner only.
    pub fence_ms_left: Option<u64>,
    /// The WAN interface of this instance is up and its gateway answers; `null` when not watched.
    pub uplink: Option<bool>,
    /// Flows are pinned to its tunnels: `false` only where `on_failure` is `withdraw` and its home is gone, drains, or has
    /// lost its uplink.
    #[serde(default = "pinned")]
    pub pinned: bool,
    /// Seconds until this instance hands it to its home, if nothing changes; owner only.
    #[serde(default)]
    pub home_in_s: Option<u64>,
}

/// What instances without the field do.
fn pinned() -> bool {
    true
}

/// A flow that sent something through this instance within the last minute, as `tandem flows` lists
/// it. The list comes from a cache: of many flows some may be missing.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct FlowStatus {
    /// Source address of the inner packets.
    pub source: String,
    /// Destination address.
    pub destination: String,
    /// IP protocol number.
    pub protocol: u8,
    /// Source port, where the protocol has one.
    pub source_port: Option<u16>,
    /// Destination port.
    pub destination_port: Option<u16>,
    /// Name of its connection.
    pub connection: Option<String>,
    /// Name of the child.
    pub child: Option<String>,
    /// Name of the endpoint whose tunnel it is pinned to.
    pub endpoint: String,
    /// The other instance owns that endpoint: its packets cross the pair link.
    pub steered: bool,
    /// SPI of the SA it leaves by, 8 hexadecimal digits.
    pub spi_out: Option<String>,
    /// Milliseconds since its last packet here.
    pub idle_ms: u64,
}

/// How far a tunnel is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TunnelState {
    /// Nothing negotiated; waiting for the peer, for traffic or for `tandem up`.
    #[default]
    Down,
    /// IKE_SA_INIT or IKE_AUTH under way.
    Connecting,
    /// The IKE SA stands (children have a state of their own).
    Established,
    /// A delete is under way.
    Closing,
}

/// How many tunnels there are, by how far they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunnelCounts {
    /// See [`TunnelState::Down`].
    pub down: u64,
    /// See [`TunnelState::Connecting`].
    pub connecting: u64,
    /// See [`TunnelState::Established`].
    pub established: u64,
    /// See [`TunnelState::Closing`].
    pub closing: u64,
    /// Child SAs that carry traffic both ways.
    pub children: u64,
}

/// One connection at one endpoint.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TunnelStatus {
    /// Name of the connection.
    pub connection: String,
    /// Name of the endpoint.
    pub endpoint: String,
    /// How far it is.
    pub state: TunnelState,
    /// The IKE SA, once there is one.
    pub ike: Option<IkeStatus>,
    /// Child SAs, by name, then age.
    pub children: Vec<ChildStatus>,
    /// The last thing that went wrong, in one line, and how many seconds ago.
    pub last_error: Option<LastError>,
    /// An operator took it down: it stays down until `tandem up`, or until the peer brings it up.
    #[serde(default)]
    pub taken_down: bool,
}

/// The newest failure of a tunnel.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LastError {
    /// One line: which side sent what, and what would have matched.
    pub text: String,
    /// Seconds since.
    pub age_s: u64,
}

/// One IKE SA.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct IkeStatus {
    /// Initiator's SPI, 16 hexadecimal digits.
    pub spi_i: String,
    /// Responder's SPI, 16 hexadecimal digits.
    pub spi_r: String,
    /// `initiator` or `responder`: our part in the exchange that created this SA.
    pub role: String,
    /// Seconds since it was established.
    pub age_s: u64,
    /// Seconds until we rekey it.
    pub rekey_in_s: Option<u64>,
    /// Negotiated algorithms, spelled as a proposal string: `aes256gcm16-prfsha384-x25519`.
    pub algs: String,
    /// Our address and port.
    pub local: String,
    /// Our identity.
    pub local_id: String,
    /// The peer's address and port.
    pub remote: String,
    /// The peer's identity.
    pub remote_id: String,
    /// Who is behind a NAT (as far as NAT detection says).
    pub nat: Nat,
}

/// Outcome of NAT detection (RFC 7296 §2.23).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Nat {
    /// No NAT seen and none claimed.
    #[default]
    None,
    /// We are, or claim to be, behind one.
    Local,
    /// The peer is, or claims to be.
    Remote,
    /// Both.
    Both,
}

/// How far a Child SA is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ChildState {
    /// Inbound usable, outbound not yet (the shadow has not acknowledged, or the peer has not).
    #[default]
    Installing,
    /// Carries traffic both ways.
    Installed,
    /// A successor is being negotiated.
    Rekeying,
    /// Replaced: only late inbound packets pass.
    Rekeyed,
    /// A delete is under way.
    Closing,
}

/// One Child SA: a pair of ESP SAs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ChildStatus {
    /// Name of the child in the configuration.
    pub name: String,
    /// SPI of what we receive, 8 hexadecimal digits.
    pub spi_in: String,
    /// SPI of what we send, 8 hexadecimal digits.
    pub spi_out: String,
    /// How far it is.
    pub state: ChildState,
    /// ESP travels in UDP (RFC 3948).
    pub udp_encap: bool,
    /// Negotiated algorithms, spelled as a proposal string.
    pub algs: String,
    /// Seconds since it was installed.
    pub age_s: u64,
    /// Seconds until we rekey it.
    pub rekey_in_s: Option<u64>,
    /// Bytes of inner packets received.
    pub bytes_in: u64,
    /// Bytes of inner packets sent.
    pub bytes_out: u64,
    /// Inner packets received.
    pub packets_in: u64,
    /// Inner packets sent.
    pub packets_out: u64,
    /// Next outbound sequence number.
    pub seq_out: Option<u64>,
    /// Outbound numbers below this one are acknowledged by the shadow (the lease).
    pub seq_ceiling: Option<u64>,
    /// Highest inbound sequence number.
    pub seq_in: Option<u64>,
    /// Negotiated selectors of our side: `10.1.0.0/24`.
    pub local_ts: Vec<String>,
    /// Negotiated selectors of the peer's side.
    pub remote_ts: Vec<String>,
}

/// Totals since the daemon started.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Counters {
    /// Inner packets received through tunnels.
    pub packets_in: u64,
    /// Inner packets sent through tunnels.
    pub packets_out: u64,
    /// Their bytes.
    pub bytes_in: u64,
    /// Their bytes.
    pub bytes_out: u64,
    /// Packets handed to the other instance.
    pub steered_out: u64,
    /// Packets that the other instance handed to us.
    pub steered_in: u64,
    /// Packets that came to one worker and were handed to another.
    #[serde(default)]
    pub handed: u64,
    /// Takeovers and switchovers since the start, by kind.
    pub changes: BTreeMap<String, u64>,
    /// Dropped ESP and inner packets, by reason.
    pub drops: BTreeMap<String, u64>,
    /// Dropped IKE datagrams, by reason.
    pub ike_drops: BTreeMap<String, u64>,
    /// Dropped or refused frames on the pair link, by reason.
    pub pair_drops: BTreeMap<String, u64>,
}
