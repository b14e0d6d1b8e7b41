//! Deliberate mistakes, one or more for each invariant, which the simulation must catch. Without
//! the feature `bugs` (and outside this crate's own tests) none of them can be switched on.

/// One deliberate mistake.
#[cfg_attr(
    not(any(test, feature = "bugs")),
    allow(dead_code, unreachable_pub, reason = "nobody can switch one on in a build that ships")
)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Bug {
    /// Correct behaviour.
    #[default]
    None,
    /// Invariant 1: a new term is not above those that a restart may have used.
    TermReuse,
    /// Invariant 1: a term of the other's parity is taken.
    TermParity,
    /// Invariant 2: a lease counts as acknowledged when it is sent.
    LeaseBeforeAck,
    /// Invariant 2: who was stopped goes on with its old numbers, although the other may have owned before it died.
    UsurperForgotten,
    /// Invariant 3: the owner's fence ignores echoes.
    FenceByTurnAlone,
    /// Invariant 3: after a late turn the fence opens without listening.
    FenceWithoutListening,
    /// Invariant 3: a lone survivor relies on that beyond `boot_wait`, and knows nobody afterwards.
    AloneTooLong,
    /// Invariant 3: the fence stays open while a grant is under way.
    FenceOpenInGrant,
    /// Invariant 3: a late grant is accepted although it was refused.
    GrantAfterRefusal,
    /// Invariant 3: a higher term of one's own lineage does not end ownership.
    IgnoreHigherTerm,
    /// Invariants 4 and 5: a record counts as committed when it is sent.
    CommitBeforeAck,
    /// Invariants 4 and 5: the shadow acknowledges what its workers have not installed.
    AckBeforeApply,
    /// Invariant 4: the owner goes solo without the shadow knowing that it is out of sync.
    SoloBeforeEcho,
    /// Invariant 4: a new owner goes on acknowledging the old log.
    OldLogAcked,
    /// Invariant 5: an empty instance that boots takes a living one's endpoint.
    EmptyBeatsLiving,
    /// Invariant 5: the winner after a split takes no new term.
    HealInOldTerm,
    /// Invariant 5: a snapshot leaves with values in the format they were put in, whatever is settled.
    SnapshotAsItWas,
    /// Invariants 1, 2, 4, 5, 7: an endpoint can be handed to, and is taken by, a shadow that is not in sync.
    SwitchoverInexact,
    /// Planned work: an endpoint goes home although that declines it.
    DeclinesIgnored,
    /// Invariant 7: a put is lost at the shadow.
    PutLost,
    /// Invariant 7: a difference of digests is ignored (together with [`Bug::PutLost`]).
    DigestIgnored,
}
