//! What a [`crate::Pair`] asks of its gateway: datagrams, frames, and things to do in order.

use crate::config::TERM_PATIENCE;
use crate::types::{
    ApplyId, Batch, EndpointId, LinkId, Opaque, Position, SideId, SyncId, Term, Value,
};
use core::fmt;
use core::time::Duration;

/// What leaves towards the other instance. `tandem::link` authenticates and sends it.
#[derive(PartialEq, Eq)]
pub enum Transmit {
    /// A datagram for one link, at most [`crate::config::HEARTBEAT_MAX`] bytes.
    Heartbeat {
        /// The link to send it on.
        link: LinkId,
        /// The encoded heartbeat.
        bytes: Vec<u8>,
    },
    /// A frame for the stream, at most [`crate::config::FRAME_MAX`] bytes. In order; may hold keys.
    Frame(Value),
    /// Try a TCP connection to the other's pair port over this link and report how it went with
    /// [`crate::Pair::handle_probe_result`]; close it at once if it was accepted.
    Probe {
        /// The link whose addresses to use.
        link: LinkId,
    },
    /// Close the stream; with `goodbye`, tell the other that it is on purpose.
    CloseStream {
        /// We are leaving and own nothing any more.
        goodbye: bool,
    },
}

impl fmt::Debug for Transmit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Transmit::Heartbeat { link, bytes } => {
                write!(f, "Heartbeat({link:?}, {} B)", bytes.len())
            }
            Transmit::Frame(bytes) => write!(f, "Frame({} B)", bytes.len()),
            Transmit::Probe { link } => write!(f, "Probe({link:?})"),
            Transmit::CloseStream { goodbye } => write!(f, "CloseStream(goodbye: {goodbye})"),
        }
    }
}

/// How a [`Transmit::Probe`] ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probe {
    /// The other's kernel refused: nobody listens on the pair port.
    Refused,
    /// Somebody listens.
    Accepted,
    /// No answer, no route, or a local error: proves nothing.
    Unknown,
}

/// How an endpoint came to be owned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum How {
    /// It started empty: a new lineage, no SA of old.
    Boot,
    /// The other's process is proven dead (or said goodbye, or came back as a new process).
    ProvenDeath,
    /// The other was silent on every link; it may live beyond a cut.
    Silence,
    /// A switchover: the other's exact counters and windows, as its gateway gave them to
    /// [`crate::Pair::final_counters`].
    Grant(Opaque),
    /// We owned it already, met a rival after a split and won. [`Event::Handover`] follows when
    /// the loser has reported.
    Heal,
    /// We owned it already and had offered it; contact was lost before an answer came. The other
    /// may have used numbers up to the ceilings in the grant, so start above these.
    Resume,
    /// We owned it already, and were stopped for so long that the other may have taken over; it died
    /// before it could say so.
    Doubt,
    /// We follow nobody, the other lives and owns nothing, and our claim is the better one.
    Free,
}

/// An acquisition, in the words of ha.md's "Takeover, in order".
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Own {
    /// Which endpoint.
    pub endpoint: EndpointId,
    /// The new term: tell the workers before anything is sent.
    pub term: Term,
    /// How it came about.
    pub how: How,
    /// Whether our state is exact. If not: IKE is in doubt and Child SAs are rekeyed first.
    pub synced: bool,
    /// Add this to every sequence ceiling (0, [`crate::config::JUMP_SILENCE`] or one of
    /// [`crate::config::JUMP_UNSYNCED`]; where that would wrap, the SA is not used).
    pub seq_jump: u64,
    /// Whether the workers obey leases from the start (a switchover: the other holds our
    /// ceilings). If not, [`Event::Mode`] with [`Mode::Solo`] or [`Mode::Syncing`] follows.
    pub obey_leases: bool,
    /// Start no IKE exchange before this time (the other may live beyond a cut).
    pub quiet_until: Option<Duration>,
}

/// How far the owner depends on its shadow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Alone: every record is acknowledged as soon as it is appended; leases are not obeyed.
    Solo,
    /// Records wait for the shadow; leases are not obeyed yet. On entering: send a lease for every
    /// SA by [`crate::Pair::send_side`]; when all are acknowledged, make the workers obey them, and
    /// when they confirm, call [`crate::Pair::confirm_ceilings`] with this id.
    Syncing(SyncId),
    /// Records wait for the shadow and leases are obeyed. The shadow knows that its state is exact.
    /// Said again when a new stream follows one that broke: unacknowledged side messages of that
    /// one may be lost.
    Synced,
}

/// Why ownership ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// A switchover that we offered: steer queues and stragglers until 5 s of quiet.
    Granted,
    /// The other took a higher term of our lineage (we were silent, or hung).
    Superseded,
    /// A rival of another lineage had the better claim after a split.
    Healed,
    /// We said goodbye.
    Goodbye,
}

/// The state reported to the notify hook (keepalived's words).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HookState {
    /// `MASTER`: we own it.
    Master,
    /// `BACKUP`: the other owns it, or nobody yet.
    Backup,
    /// `FAULT`: we may not own anything (equal indices or names, unknown releases).
    Fault,
}

/// One key of a loser's log tail.
#[derive(Clone, PartialEq, Eq)]
pub struct TailItem {
    /// The key.
    pub key: u64,
    /// What it was when the loser stood down; none if it removed it.
    pub value: Option<Value>,
    /// Whether the winner changed or made this key itself since the split. If not, ha.md wants the
    /// IKE SA taken from the loser.
    pub touched: bool,
}

impl fmt::Debug for TailItem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = if self.value.is_some() { "put" } else { "delete" };
        write!(f, "TailItem({:x} {what}, touched: {})", self.key, self.touched)
    }
}

/// What is wrong with the link or the other's config; the gateway logs one line for each, which is
/// at most one a minute for each kind.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Warning {
    /// Both instances claim the same index.
    #[error("both instances have index {0}: give them 0 and 1; nothing new is owned")]
    EqualIndex(u8),
    /// Both instances claim the same name.
    #[error(
        "both instances are named {0:?}: start each with its own --instance; nothing new is owned"
    )]
    EqualName(String),
    /// The other is not the instance that our config names.
    #[error("the other instance is named {heard:?}, our config expects {expected:?}")]
    OtherName {
        /// What it said.
        heard: String,
        /// What the config says.
        expected: String,
    },
    /// The config files differ; tunnels are not replicated until they agree.
    #[error(
        "config digests differ (ours {ours:016x}, theirs {theirs:016x}): nothing is replicated until both hosts have the same file"
    )]
    WrongDigest {
        /// Ours.
        ours: u64,
        /// Theirs.
        theirs: u64,
    },
    /// No common format.
    #[error(
        "no common release: we speak {}..={}, the other {}..={}; upgrade {}",
        ours.0,
        ours.1,
        theirs.0,
        theirs.1,
        if ours.1 < theirs.0 { "this instance" } else { "the other instance" }
    )]
    OldRelease {
        /// Our oldest and newest.
        ours: (u32, u32),
        /// Theirs.
        theirs: (u32, u32),
    },
    /// An authenticated frame or heartbeat that we cannot read, or that breaks the protocol.
    #[error("the pair link carried something we cannot use: {0}")]
    Malformed(&'static str),
    /// Equal positions, different digests: ERROR; a snapshot was forced.
    #[error("digests differ at position {}; a snapshot was forced", position.0)]
    DigestMismatch {
        /// Which.
        endpoint: EndpointId,
        /// Where.
        position: Position,
    },
    /// A takeover has waited long for the disk to hold the next block of terms.
    #[error("a term is needed that is not on disk yet, since {} s or more", TERM_PATIENCE.as_secs())]
    TermNotReserved(EndpointId),
}

impl Warning {
    /// The endpoint that it is about, if it is about one: the texts do not name it.
    #[must_use]
    pub fn endpoint(&self) -> Option<EndpointId> {
        match self {
            Warning::DigestMismatch { endpoint, .. } | Warning::TermNotReserved(endpoint) => {
                Some(*endpoint)
            }
            _ => None,
        }
    }
}

/// Things for the gateway to do, in this order.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// We own an endpoint under a new term.
    Own(Own),
    /// Switchover, step 1: stop sealing, opening and IKE; queue all three, bounded; then give the
    /// exact counters to [`crate::Pair::final_counters`].
    Hold {
        /// Which endpoint.
        endpoint: EndpointId,
    },
    /// The switchover was refused: go on under the old term at the exact counters.
    Resume {
        /// Which endpoint.
        endpoint: EndpointId,
    },
    /// We no longer own an endpoint. Its state stays, as a shadow's.
    StandDown {
        /// Which endpoint.
        endpoint: EndpointId,
        /// Why.
        why: Why,
        /// The winner waits for our final counters: disown, then call
        /// [`crate::Pair::final_counters`].
        counters_wanted: bool,
    },
    /// Shadow: install this state (also in the workers, which must have confirmed), then call
    /// [`crate::Pair::applied`]. Either one record, or the whole difference that a snapshot makes.
    Apply {
        /// Which endpoint.
        endpoint: EndpointId,
        /// To be given back.
        id: ApplyId,
        /// The log position that this reaches.
        position: Position,
        /// What changes.
        batch: Batch,
    },
    /// Owner: everything up to here is committed; datagrams that wait for it may leave.
    Acked {
        /// Which endpoint.
        endpoint: EndpointId,
        /// Inclusive.
        position: Position,
    },
    /// A side message from the owner. An acknowledged one is acknowledged when this event is
    /// polled, so take it to heart (a lease: keep its ceiling) before anything else. It may name
    /// an SA whose record is still on its way: keep it.
    Side {
        /// Which endpoint.
        endpoint: EndpointId,
        /// As sent.
        bytes: Opaque,
    },
    /// Owner: the shadow holds this side message.
    SideAcked {
        /// Which endpoint.
        endpoint: EndpointId,
        /// Which message.
        id: SideId,
    },
    /// Owner: how far we depend on the shadow from now on.
    Mode {
        /// Which endpoint.
        endpoint: EndpointId,
        /// The new mode.
        mode: Mode,
    },
    /// Owner without contact: the other may live beyond a cut, so start no IKE exchange before
    /// this time.
    Quiet {
        /// Which endpoint.
        endpoint: EndpointId,
        /// When the period ends.
        until: Duration,
    },
    /// The word that workers compare: send nothing at or after this time. Zero: not at all.
    Fence {
        /// Which endpoint.
        endpoint: EndpointId,
        /// On the clock of `now`.
        valid_until: Duration,
    },
    /// Write the number to the endpoint's term file, sync it, then call
    /// [`crate::Pair::handle_reserved`].
    Reserve {
        /// Which endpoint.
        endpoint: EndpointId,
        /// The highest term that may be used once this is on disk.
        up_to: Term,
    },
    /// Announce the endpoint's addresses now (gratuitous ARP, unsolicited NA).
    Announce {
        /// Which endpoint.
        endpoint: EndpointId,
    },
    /// Run the notify hook: `INSTANCE endpoint STATE term`.
    Notify {
        /// Which endpoint.
        endpoint: EndpointId,
        /// The state's name.
        state: HookState,
        /// The term owned or followed.
        term: Term,
    },
    /// Winner after a split: what the loser did meanwhile. Continue every SA above the larger of
    /// its counters and ours; take over keys that are not `touched`, by ordinary records.
    Handover {
        /// Which endpoint.
        endpoint: EndpointId,
        /// What the loser changed since the last record that we acknowledged.
        tail: Vec<TailItem>,
        /// Its final counters, as given to [`crate::Pair::final_counters`]; empty if they did not
        /// come in time.
        counters: Opaque,
    },
    /// A stream is joined, and this release's formats are settled for it: values put from now on
    /// are in the format of this release, and so is everything that the stream will carry.
    Settled {
        /// The lower of the two newest.
        release: u32,
    },
    /// Owner: the values held may be in another format than the one settled, or have grown old. Put
    /// them all anew by [`crate::Pair::rewrite`], then call [`crate::Pair::rewritten`]; no snapshot
    /// leaves before that.
    Rewrite {
        /// Which endpoint.
        endpoint: EndpointId,
        /// The other holds all of it already, in this format, but for what changed since the stream
        /// before broke: there is nothing to rewrite.
        exact: bool,
    },
    /// Contact with the other instance began (true) or ended.
    Contact(bool),
    /// Something for the operator's log.
    Warning(Warning),
}
