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

/// How far CLOCK_REALTIME, the clock of logs and captures, is ahead of this one.
pub fn realtime_lead() -> Duration {
    // The two readings lie microseconds apart: far below what they are compared for.
    let realtime = clock_gettime(ClockId::CLOCK_REALTIME).map(Duration::from).unwrap_or_default();
    realtime.saturating_sub(now())
}

/// The time of day (UTC) as logs print it: `09:28:25.774`.
pub fn time_of_day(at: Duration) -> String {
    let since = at + realtime_lead();
    let seconds = since.as_secs() % 86_400;
    format!(
        "{:02}:{:02}:{:02}.{:03}",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60,
        since.subsec_millis()
    )
}
