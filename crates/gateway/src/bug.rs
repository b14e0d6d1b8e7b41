//! Deliberate mistakes in the composition, which the simulation must catch. Without the feature `bugs` none of them
//! can be switched on. Those of the pair protocol itself are `ha::Bug`.

/// One deliberate mistake.
#[cfg_attr(
    not(feature = "bugs"),
    allow(dead_code, unreachable_pub, reason = "nobody can switch one on in a build that ships")
)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Bug {
    /// Correct behaviour.
    #[default]
    None,
    /// Invariants 4 and 5: datagrams leave before their record is committed.
    SendBeforeCommit,
    /// Invariant 4: an owner in doubt goes on as if its state were exact.
    DoubtIgnored,
    /// Invariant 5: records are written in this build's own format, whatever is settled.
    FormatIgnored,
    /// Invariants 5 and 7: a shadow acknowledges what it could not decode.
    BadRecordAcked,
    /// Invariant 2: `synced` is said although the shards do not obey their leases.
    LeasesIgnored,
    /// Invariant 2: a shadow forgets the ceilings that it is told.
    CeilingsForgotten,
    /// Invariant 3: the fence word is only ever raised.
    FenceNeverLowered,
    /// Invariant 6: a shadow's shards use no SA before the endpoint is theirs, so the instances pin flows apart.
    ShadowNeverUses,
    /// Planned work costs nothing: a shadow's shards use an SA before its owner's do.
    ShadowUsesAtOnce,
    /// Planned work: endpoints go home as soon as home is ready.
    HoldDownIgnored,
    /// Planned work: an endpoint that an operator moved away goes home.
    FailoverNotKept,
    /// Invariants 1, 2, 4, 5, 7: a drain does not ask whether the other instance is in sync, and neither does that
    /// (`ha::Bug::SwitchoverInexact`).
    DrainUnready,
    /// Planned work: an instance that was given an endpoint back, or took it back, declines it for ever.
    DeclineKept,
}

#[cfg(feature = "bugs")]
impl crate::Gateway {
    /// Switches a deliberate mistake on, for the simulation that must catch it.
    pub fn set_bug(&mut self, bug: Bug) {
        self.bug = bug;
        if bug == Bug::DrainUnready {
            self.pair.set_bug(ha::Bug::SwitchoverInexact);
        }
    }

    /// The same for the pair protocol.
    pub fn set_pair_bug(&mut self, bug: ha::Bug) {
        self.pair.set_bug(bug);
    }

    /// The next so many records that come from the other instance arrive damaged: as if its release wrote what this one
    /// cannot read. A fault of the simulation, not a mistake.
    pub fn spoil_records(&mut self, number: u32) {
        self.spoil = number;
    }

    /// What IKE holds for an endpoint, by the keys of the records, in their order.
    #[must_use]
    pub fn held_records(
        &self,
        now: std::time::Duration,
        endpoint: wire::id::EndpointId,
    ) -> Vec<u64> {
        let endpoint = self.endpoints.get(usize::from(endpoint.0));
        let records = endpoint.into_iter().flat_map(|e| e.ike.snapshot(now));
        let mut keys: Vec<u64> = records.map(|(key, _)| key.0).collect();
        keys.sort_unstable();
        keys
    }

    /// The pair protocol's state, for the simulation's checks.
    #[must_use]
    pub fn pair(&self) -> &ha::Pair {
        &self.pair
    }
}
