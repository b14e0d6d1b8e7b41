//! Deliberate mistakes in how flows are pinned, which the simulation must catch. Without the feature `bugs` none of them
//! can be switched on.

/// One deliberate mistake: each breaks invariant 6.
#[cfg_attr(
    not(feature = "bugs"),
    allow(dead_code, unreachable_pub, reason = "nobody can switch one on in a build that ships")
)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Bug {
    /// Correct behaviour.
    #[default]
    None,
    /// The flow's hash, modulo how many SAs there are, picks one.
    PinModulo,
    /// SAs draw the lots, not tunnels.
    PinBySa,
    /// Tunnels that are not up win flows, too.
    PinToTheDead,
}

#[cfg(feature = "bugs")]
impl crate::Shard {
    /// Switches a deliberate mistake on, for the simulation that must catch it.
    pub fn set_bug(&mut self, bug: Bug) {
        self.policies.bug = bug;
    }
}
