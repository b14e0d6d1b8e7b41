//! CLOCK_BOOTTIME: the one clock that every process of the lab shares, whatever its namespace.

use nix::time::{ClockId, clock_gettime};
use std::time::Duration;

/// Time since boot. All times in the lab are on this clock.
pub fn now() -> Duration {
    // The kernel never refuses this clock; a zero would be noticed by every measurement at once.
    clock_gettime(ClockId::CLOCK_BOOTTIME).map(Duration::from).unwrap_or_default()
}

/// Sleeps until `at`; returns at once if that is past.
pub fn sleep_until(at: Duration) {
    let now = now();
    if at > now {
        std::thread::sleep(at - now);
    }
}

/// Nanoseconds, for compact records: 2^63 ns are 292 years.
pub fn nanos(at: Duration) -> u64 {
    u64::try_from(at.as_nanos()).unwrap_or(u64::MAX)
}

/// Milliseconds as a fraction, for people.
pub fn millis(span: Duration) -> f64 {
    span.as_secs_f64() * 1e3
}
