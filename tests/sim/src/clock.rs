//! Time: the simulation's own, and each host's CLOCK_BOOTTIME, which starts anywhere and runs up to 10 % fast or slow.

use std::time::Duration;

/// The simulation's time in nanoseconds since its start.
pub type Nanos = u64;

/// A microsecond.
pub const US: Nanos = 1_000;
/// A millisecond.
pub const MS: Nanos = 1_000_000;
/// A second.
pub const S: Nanos = 1_000_000_000;

const MILLION: u64 = 1_000_000;

/// One host's clock.
#[derive(Debug, Clone)]
pub struct Clock {
    /// What it showed at `origin`.
    base: Nanos,
    origin: Nanos,
    /// Its nanoseconds in a million of ours.
    rate: u64,
    /// Since when it stands still (a hypervisor's pause).
    frozen: Option<Nanos>,
}

impl Clock {
    /// A clock that shows `base` at `origin` and runs at `rate` millionths of true speed.
    #[must_use]
    pub fn new(origin: Nanos, base: Nanos, rate: u64) -> Self {
        Self { base, origin, rate, frozen: None }
    }

    /// What it shows.
    #[must_use]
    pub fn local(&self, at: Nanos) -> Duration {
        let at = self.frozen.unwrap_or(at);
        let run = u128::from(at.saturating_sub(self.origin)) * u128::from(self.rate)
            / u128::from(MILLION);
        Duration::from_nanos(self.base + run as u64)
    }

    /// The first moment at which it shows at least this, if it does not stop.
    #[must_use]
    pub fn when(&self, local: Duration) -> Nanos {
        let Ok(local) = u64::try_from(local.as_nanos()) else { return Nanos::MAX };
        let run = u128::from(local.saturating_sub(self.base)) * u128::from(MILLION);
        let run = u64::try_from(run.div_ceil(u128::from(self.rate))).unwrap_or(Nanos::MAX);
        self.origin.saturating_add(run)
    }

    /// It stops.
    pub fn freeze(&mut self, at: Nanos) {
        if self.frozen.is_none() {
            self.frozen = Some(at);
        }
    }

    /// It goes on from where it stopped.
    pub fn thaw(&mut self, at: Nanos) {
        if self.frozen.is_some() {
            let shown = self.local(at);
            self.base = shown.as_nanos() as u64;
            self.origin = at;
            self.frozen = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn when_is_the_first_moment_of_local() {
        for rate in [900_000, 1_000_000, 1_100_000, 1_033_333] {
            let clock = Clock::new(5 * S, 1_000 * S + 7, rate);
            for local in [0, 999 * S, 1_000 * S + 8, 1_001 * S + 12_345, 1_060 * S] {
                let local = Duration::from_nanos(local);
                let at = clock.when(local);
                assert!(clock.local(at) >= local);
                assert!(at == 5 * S || clock.local(at - 1) < local);
            }
        }
    }

    #[test]
    fn a_frozen_clock_goes_on_where_it_stood() {
        let mut clock = Clock::new(0, 0, 1_000_000);
        clock.freeze(S);
        assert_eq!(clock.local(9 * S), Duration::from_secs(1));
        clock.thaw(10 * S);
        assert_eq!(clock.local(11 * S), Duration::from_secs(2));
        assert_eq!(clock.when(Duration::from_secs(3)), 12 * S);
    }
}
