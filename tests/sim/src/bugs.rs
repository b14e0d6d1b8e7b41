//! The deliberate mistakes, by name, with the invariant of ha.md that each breaks. `--bugs` proves that every one is
//! caught; a simulation that cannot find them would find nothing.
//!
//! Those of the pair protocol live in `ha`, those of its composition in `gateway`, both as test-only switches. Those
//! of the runtime, which the simulation plays itself, live here.

use esp::Command;
use wire::id::Term;

/// A mistake of the runtime around a gateway, or of what reaches its shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Runtime {
    /// Workers and the IKE sockets do not compare the fence before they send.
    IgnoreFence,
    /// The shard is never told a new term: IV counters restart under the old one.
    TermNotInIv,
    /// A packet without an SA leaves as it is.
    SendInClear,
    /// One fence word for all endpoints.
    OneFenceForAll,
    /// Packets from the other instance look as if they came from the LAN or the WAN.
    SteeredUnmarked,
    /// The shard is not told that the other instance owns an endpoint.
    SteerMissing,
    /// A new owner does not hold what arrives directly.
    HoldDirectMissing,
    /// A former owner does not hand back what it was handed too late.
    HandBackMissing,
    /// Pins depend on the instance.
    PinsDiffer,
}

impl Runtime {
    /// What the mistake makes of a command to an instance's shard; `false` if it does not get there.
    #[must_use]
    pub fn spoil(self, host: usize, command: &mut Command) -> bool {
        match (self, command) {
            (Self::TermNotInIv, Command::Own { term, .. }) => *term = Term(2),
            // Keys know their first term, and none gives an IV in a term before that.
            (Self::TermNotInIv, Command::Install(sa)) => sa.born = Term(2),
            (Self::PinsDiffer, Command::Policies(policies)) => {
                for policy in policies {
                    policy.pin.id ^= host as u64;
                }
            }
            (Self::SteerMissing, Command::Steer { .. })
            | (Self::HoldDirectMissing, Command::HoldDirect { .. })
            | (Self::HandBackMissing, Command::HandBack { .. }) => return false,
            _ => {}
        }
        true
    }
}

/// One deliberate mistake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// In the pair protocol.
    Pair(ha::Bug),
    /// In the composition.
    Gateway(gateway::Bug),
    /// In the shards.
    Shard(esp::Bug),
    /// In the runtime.
    Runtime(Runtime),
}

/// Every mistake: its name, the invariant that it breaks (with others by which it may show first, and why), and what it
/// is. It counts as caught only when one of these is what was violated.
///
/// Four of `ha`'s are left to its own tests: `SnapshotAsItWas` (the gateway has nearly always answered before the
/// other is ready for a snapshot), and three because a whole gateway leaves no way to them: `AckBeforeApply` (the
/// gateway applies a record before it handles anything else), `OldLogAcked` (a takeover closes the stream, so no
/// record of the old term arrives) and `HealInOldTerm` (a loser stands down at the hello, before the winner hears its
/// heartbeats; where both go on from one history, the winner's term is above both anyway).
///
/// What ha.md promises of planned work, and its rules about steering, have no number: 5 where packets are lost or turned
/// around though nothing went wrong, else 0.
pub const ALL: &[(&str, &[u8], Bug)] = &[
    ("term-reuse", &[1], Bug::Pair(ha::Bug::TermReuse)),
    // 0: a shadow takes nothing of a term of its own parity, so before two instances can ever use one term with the
    // same keys, the pair is seen never to settle.
    ("term-parity", &[1, 0], Bug::Pair(ha::Bug::TermParity)),
    ("term-not-in-iv", &[1], Bug::Runtime(Runtime::TermNotInIv)),
    ("lease-before-ack", &[2], Bug::Pair(ha::Bug::LeaseBeforeAck)),
    ("leases-ignored", &[2], Bug::Gateway(gateway::Bug::LeasesIgnored)),
    ("ceilings-forgotten", &[2], Bug::Gateway(gateway::Bug::CeilingsForgotten)),
    ("ignore-fence", &[3], Bug::Runtime(Runtime::IgnoreFence)),
    ("fence-never-lowered", &[3], Bug::Gateway(gateway::Bug::FenceNeverLowered)),
    ("fence-by-turn-alone", &[3], Bug::Pair(ha::Bug::FenceByTurnAlone)),
    ("fence-without-listening", &[3], Bug::Pair(ha::Bug::FenceWithoutListening)),
    ("fence-open-in-grant", &[3], Bug::Pair(ha::Bug::FenceOpenInGrant)),
    ("grant-after-refusal", &[3], Bug::Pair(ha::Bug::GrantAfterRefusal)),
    ("ignore-higher-term", &[3], Bug::Pair(ha::Bug::IgnoreHigherTerm)),
    // 2: the outbound half of a Child SA waits for the same commitment as the datagrams, so its packets overtake the
    // record, and the lease in it, before a takeover shows the same of a message id. For both of these.
    ("send-before-commit", &[4, 2], Bug::Gateway(gateway::Bug::SendBeforeCommit)),
    ("commit-before-ack", &[4, 2], Bug::Pair(ha::Bug::CommitBeforeAck)),
    ("doubt-ignored", &[4], Bug::Gateway(gateway::Bug::DoubtIgnored)),
    ("solo-before-echo", &[4], Bug::Pair(ha::Bug::SoloBeforeEcho)),
    // 3: the empty one takes what a living one owns, so before an SA is lost both are inside their fences, until the
    // living one hears of it.
    ("empty-beats-living", &[5, 3], Bug::Pair(ha::Bug::EmptyBeatsLiving)),
    // 5: what is missing is an IKE SA, which a takeover loses, or the record of a state in it.
    ("bad-record-acked", &[7, 5], Bug::Gateway(gateway::Bug::BadRecordAcked)),
    // 0: a build that is held back refuses every record, so the pair is never seen to settle.
    ("format-ignored", &[5, 0], Bug::Gateway(gateway::Bug::FormatIgnored)),
    ("put-lost", &[7], Bug::Pair(ha::Bug::PutLost)),
    ("digest-ignored", &[7], Bug::Pair(ha::Bug::DigestIgnored)),
    ("send-in-clear", &[8], Bug::Runtime(Runtime::SendInClear)),
    ("one-fence-for-all", &[3], Bug::Runtime(Runtime::OneFenceForAll)),
    ("pins-differ", &[6], Bug::Runtime(Runtime::PinsDiffer)),
    ("pin-modulo", &[6], Bug::Shard(esp::Bug::PinModulo)),
    ("pin-by-sa", &[6], Bug::Shard(esp::Bug::PinBySa)),
    ("pin-to-the-dead", &[6], Bug::Shard(esp::Bug::PinToTheDead)),
    ("shadow-never-uses", &[6], Bug::Gateway(gateway::Bug::ShadowNeverUses)),
    ("shadow-uses-at-once", &[6, 5], Bug::Gateway(gateway::Bug::ShadowUsesAtOnce)),
    ("steered-unmarked", &[0], Bug::Runtime(Runtime::SteeredUnmarked)),
    ("steer-missing", &[5], Bug::Runtime(Runtime::SteerMissing)),
    ("hand-back-missing", &[5], Bug::Runtime(Runtime::HandBackMissing)),
    ("hold-direct-missing", &[5], Bug::Runtime(Runtime::HoldDirectMissing)),
    ("hold-down-ignored", &[0], Bug::Gateway(gateway::Bug::HoldDownIgnored)),
    ("failover-not-kept", &[0], Bug::Gateway(gateway::Bug::FailoverNotKept)),
    ("decline-kept", &[0], Bug::Gateway(gateway::Bug::DeclineKept)),
    ("declines-ignored", &[0], Bug::Pair(ha::Bug::DeclinesIgnored)),
    ("drain-unready", &[1, 2, 4, 5, 7], Bug::Gateway(gateway::Bug::DrainUnready)),
];

/// The mistake of a name.
#[must_use]
pub fn named(name: &str) -> Option<Bug> {
    ALL.iter().find(|(known, _, _)| *known == name).map(|(_, _, bug)| *bug)
}
