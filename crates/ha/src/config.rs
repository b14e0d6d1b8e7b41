//! What an instance is told about the pair, and the limits that nobody configures.

use core::time::Duration;

/// The largest encoded frame on the stream, in bytes. `tandem::link` refuses more.
pub const FRAME_MAX: usize = 1 << 20;
/// The largest encoded heartbeat, in bytes.
pub const HEARTBEAT_MAX: usize = 8 << 10;
/// The largest value of one key, in bytes.
pub const VALUE_MAX: usize = 512 << 10;
/// The largest record: the sum of its values and 16 bytes per key.
pub const BATCH_MAX: usize = 768 << 10;
/// The largest side message, in bytes.
pub const SIDE_MAX: usize = 64 << 10;
/// The largest opaque payload of a grant or of a handover after a split, in bytes.
pub const COUNTERS_MAX: usize = 64 << 20;
/// Most endpoints of one pair (each has an entry in every heartbeat).
pub const ENDPOINTS_MAX: usize = 64;
/// Most links of one pair.
pub const LINKS_MAX: usize = 8;
/// Bytes of values per snapshot chunk.
pub(crate) const CHUNK: usize = 64 << 10;
/// Snapshot chunks in flight, so that a side message or a heartbeat's stream check never queues
/// behind more than this many.
pub(crate) const CHUNK_WINDOW: u64 = 8;
/// Terms reserved on disk ahead of use (ha.md: blocks of 16), counted in terms of our own parity.
pub(crate) const TERM_BLOCK: u64 = 16;
/// A term is on disk within milliseconds of being asked for, and at a first start it is wanted before
/// that: only a longer wait is worth a warning.
pub const TERM_PATIENCE: Duration = Duration::from_secs(1);
/// How far above the highest heard term an instance without a term file starts.
pub(crate) const TERM_FILE_LOST: u64 = 1024;
/// Added to every sequence ceiling on a takeover by silence.
pub const JUMP_SILENCE: u64 = 1 << 24;
/// Added to every last known ceiling on an acquisition without exact state, by the acquirer's
/// index. The two differ because neither need know of the other's: an instance may acquire in
/// doubt, send and die, and then the other, which saw nothing of that, from the same ceiling. With
/// one jump for both it would send the very same numbers again.
pub const JUMP_UNSYNCED: [u64; 2] = [1 << 28, (1 << 28) + (1 << 27)];
/// How long whoever was away so long that the other may have started anew and acquired meanwhile
/// (`boot_wait`) listens before it sends: a new process is heard only over a new stream, so this is
/// the old stream's end (`dead_after`), a reconnect (every 200 ms) and a handshake, with reserve.
pub const REJOIN: Duration = Duration::from_secs(1);
/// After a split or what may be one, nobody starts IKE exchanges for this long.
pub const QUIET: Duration = Duration::from_secs(10);
/// Acknowledgements may lag this long while contact lasts.
pub const LAG: Duration = Duration::from_millis(500);
/// A record behind a snapshot that still makes progress may wait this long.
pub const SYNC_HOLD: Duration = Duration::from_secs(2);
/// A shadow refuses an offer whose grant has not come this long after it first heard of it.
pub const OFFER_PATIENCE: Duration = Duration::from_millis(50);
/// At most one switchover for the uplink's sake in this long.
pub const UPLINK_HOLDOFF: Duration = Duration::from_secs(10);
/// A loser's gateway has this long to report its final counters before the tail goes without.
pub const YIELD_PATIENCE: Duration = Duration::from_millis(500);
/// Warnings of one kind are reported at most once in this long.
pub const WARN_EVERY: Duration = Duration::from_secs(60);
/// When the addresses are announced, counted from the acquisition or the heal, in ms.
pub const ANNOUNCE_MS: [u64; 7] = [0, 20, 100, 300, 1_100, 2_000, 5_000];

/// One endpoint as both instances know it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointConfig {
    /// Its name; heartbeats name endpoints by a hash of it, so that instances whose configs differ
    /// still agree on who owns what.
    pub name: String,
    /// Whether this instance is its home.
    pub home_is_me: bool,
    /// Whether the other instance may own it as well. If not, its addresses cannot move: when its home dies, the
    /// other's state of it is removed ([`crate::Pair::in_use`]).
    pub adopted: bool,
}

/// The formats this build speaks. A build speaks its own and the previous one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Releases {
    /// The newest, this build's own.
    pub own: u32,
    /// The oldest.
    pub oldest: u32,
}

impl Default for Releases {
    fn default() -> Self {
        Releases { own: crate::codec::RELEASE, oldest: crate::codec::RELEASE }
    }
}

/// One instance's view of its pair.
#[derive(Clone, Debug)]
pub struct Config {
    /// This instance's name.
    pub name: String,
    /// This instance's index, 0 or 1: the parity of its terms.
    pub index: u8,
    /// The other instance's name.
    pub peer_name: String,
    /// How many pair links are configured (1 to [`LINKS_MAX`]; 0 only with `lone`).
    pub links: u8,
    /// No pair is configured: own every endpoint at once and stay solo.
    pub lone: bool,
    /// Heartbeat interval (20 ms).
    pub heartbeat: Duration,
    /// Silence that means death (100 ms).
    pub dead_after: Duration,
    /// How long an echo, or a turn out of contact, keeps the fence open (80 ms; longer where the other
    /// is known to be dead).
    pub fence_after: Duration,
    /// How long an instance without in-sync state waits for contact after its start (10 s).
    pub boot_wait: Duration,
    /// Formats spoken.
    pub releases: Releases,
    /// A digest over what must be equal on both sides. Different digests: contact and ownership
    /// go on, replication does not.
    pub config_digest: u64,
    /// The endpoints, in config order.
    pub endpoints: Vec<EndpointConfig>,
}

impl Config {
    /// The defaults of ha.md, with no endpoint.
    #[must_use]
    pub fn new(name: &str, index: u8, peer_name: &str) -> Config {
        Config {
            name: name.into(),
            index,
            peer_name: peer_name.into(),
            links: 1,
            lone: false,
            heartbeat: Duration::from_millis(20),
            dead_after: Duration::from_millis(100),
            fence_after: Duration::from_millis(80),
            boot_wait: Duration::from_secs(10),
            releases: Releases::default(),
            config_digest: 0,
            endpoints: Vec::new(),
        }
    }

    /// How long an instance that knows every process of the other to be dead may rely on that: a
    /// new one, some [`REJOIN`] old without being known, owns nothing before `boot_wait`, by a
    /// clock that may be faster. Half of that, to be far from the edge, and a second at most: the
    /// two may have been given different times. (With a witness this must not be used.)
    pub(crate) fn alone(&self) -> Duration {
        ((self.boot_wait * 4 / 5).saturating_sub(REJOIN) / 2).min(Duration::from_secs(1))
    }

    /// Checks what [`crate::Pair::new`] relies on; `tandem check` calls it too.
    ///
    /// # Errors
    /// The first rule broken.
    pub fn check(&self) -> Result<(), ConfigError> {
        if self.index > 1 {
            return Err(ConfigError::Index(self.index));
        }
        if !self.lone && self.name == self.peer_name {
            return Err(ConfigError::EqualNames);
        }
        if self.endpoints.len() > ENDPOINTS_MAX {
            return Err(ConfigError::Endpoints(self.endpoints.len()));
        }
        for (n, endpoint) in self.endpoints.iter().enumerate() {
            let id = crate::digest::name_id(&endpoint.name);
            let earlier = self.endpoints.iter().take(n);
            if earlier.into_iter().any(|other| crate::digest::name_id(&other.name) == id) {
                return Err(ConfigError::EqualEndpoints(endpoint.name.clone()));
            }
        }
        if usize::from(self.links) > LINKS_MAX || (self.links == 0 && !self.lone) {
            return Err(ConfigError::Links(self.links));
        }
        if self.heartbeat.is_zero() {
            return Err(ConfigError::Heartbeat);
        }
        if self.fence_after + self.heartbeat > self.dead_after {
            return Err(ConfigError::Fence);
        }
        if self.fence_after < self.heartbeat * 2 {
            return Err(ConfigError::FenceShort);
        }
        Ok(())
    }
}

/// Why a [`Config`] cannot be used. All of them are the operator's to mend.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The index decides the parity of terms.
    #[error("instance index is {0}, expected 0 or 1")]
    Index(u8),
    /// Both instances bear the same name.
    #[error("both instances have the same name")]
    EqualNames,
    /// Heartbeats carry one entry for each endpoint.
    #[error("{0} endpoints, at most {ENDPOINTS_MAX}")]
    Endpoints(usize),
    /// Two endpoints have names that hash alike.
    #[error("endpoint {0:?} has the same name, or the same hash of it, as another")]
    EqualEndpoints(String),
    /// There must be at least one link.
    #[error("{0} pair links, expected 1 to {LINKS_MAX}")]
    Links(u8),
    /// A heartbeat interval of zero.
    #[error("the heartbeat interval is zero")]
    Heartbeat,
    /// ha.md: refused, for the fence must close before the other may judge us dead.
    #[error("fence_after + one heartbeat interval is longer than dead_after")]
    Fence,
    /// The fence could not stay open between two heartbeats.
    #[error("fence_after is shorter than two heartbeat intervals")]
    FenceShort,
}
