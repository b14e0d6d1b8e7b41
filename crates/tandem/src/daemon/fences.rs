//! The only shared words between the control loop and the workers: until when each endpoint may send.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use wire::id::EndpointId;

/// One word an endpoint, in nanoseconds of CLOCK_BOOTTIME. Zero: closed. Clones share the words.
#[derive(Debug, Clone)]
pub(super) struct Fences(Arc<[AtomicU64]>);

impl Fences {
    /// All closed.
    pub(super) fn new(endpoints: usize) -> Self {
        Self((0..endpoints).map(|_| AtomicU64::new(0)).collect())
    }

    /// Moves one; an endpoint that does not exist stays closed.
    pub(super) fn set(&self, endpoint: EndpointId, valid_until: Duration) {
        if let Some(word) = self.0.get(usize::from(endpoint.0)) {
            word.store(
                u64::try_from(valid_until.as_nanos()).unwrap_or(u64::MAX),
                Ordering::Release,
            );
        }
    }

    /// Whether something may leave at this time.
    pub(super) fn is_open(&self, endpoint: EndpointId, now: Duration) -> bool {
        let word = self.0.get(usize::from(endpoint.0));
        word.is_some_and(|word| now < Duration::from_nanos(word.load(Ordering::Acquire)))
    }

    /// The words, for a worker.
    pub(super) fn words(&self) -> Arc<[AtomicU64]> {
        Arc::clone(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn open_until_and_not_at_the_time() {
        let fences = Fences::new(2);
        let at = Duration::from_millis(5);
        assert!(!fences.is_open(EndpointId(1), Duration::ZERO));
        fences.clone().set(EndpointId(1), at);
        assert!(fences.is_open(EndpointId(1), at - Duration::from_nanos(1)));
        assert!(!fences.is_open(EndpointId(1), at));
        assert!(!fences.is_open(EndpointId(0), Duration::ZERO));
        fences.set(EndpointId(7), at);
        assert!(!fences.is_open(EndpointId(7), Duration::ZERO));
    }
}
