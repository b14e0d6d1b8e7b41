//! The one clock of the product, and timers on it.
//!
//! All times in Tandem are a `Duration` since the zero of CLOCK_BOOTTIME: it never steps, is the
//! same in every thread and, unlike CLOCK_MONOTONIC, goes on during suspend, so a fence that was
//! armed before a suspend is over after it (ha.md, "The fence").
//!
//! For asynchronous code prefer [`Timer`] to tokio's sleep where milliseconds matter: tokio's
//! wheel rounds up to whole milliseconds and runs on CLOCK_MONOTONIC.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use tokio::io::unix::AsyncFd;

use crate::sys::{check, is_transient};

/// Now, since CLOCK_BOOTTIME's zero.
#[must_use]
pub fn boottime() -> Duration {
    let mut spec = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `spec` is a valid timespec that the kernel fills. The call cannot fail for a clock
    // that every kernel since 2.6.39 has; were it to, the zero above stays, which fences us.
    unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut spec) };
    Duration::new(spec.tv_sec.unsigned_abs(), spec.tv_nsec.unsigned_abs() as u32)
}

/// Now in nanoseconds, the form of the fence words that workers compare with.
#[must_use]
pub fn boottime_ns() -> u64 {
    let now = boottime();
    now.as_secs().saturating_mul(1_000_000_000).saturating_add(u64::from(now.subsec_nanos()))
}

/// A one-shot timer on CLOCK_BOOTTIME (timerfd) for the control loop.
#[derive(Debug)]
pub struct Timer {
    fd: AsyncFd<OwnedFd>,
    deadline: Option<Duration>,
}

impl Timer {
    /// An unarmed timer; must be made inside a tokio runtime.
    pub fn new() -> io::Result<Self> {
        let flags = libc::TFD_NONBLOCK | libc::TFD_CLOEXEC;
        // SAFETY: takes no pointer.
        let raw = check(unsafe { libc::timerfd_create(libc::CLOCK_BOOTTIME, flags) })?;
        // SAFETY: `raw` was just returned by the kernel and has no other owner.
        let fd = unsafe { OwnedFd::from_raw_fd(raw) };
        // SAFETY: the OwnedFd stays open and its number the same for as long as it is registered.
        let fd = unsafe { AsyncFd::register(fd) }?;
        Ok(Self { fd, deadline: None })
    }

    /// Arms the timer for an absolute time, or disarms it. Cheap when nothing changes.
    pub fn set(&mut self, deadline: Option<Duration>) -> io::Result<()> {
        if self.deadline == deadline {
            return Ok(());
        }
        let at = match deadline {
            None => Duration::ZERO,
            // Zero would disarm: the earliest deadline is one nanosecond.
            Some(at) => at.max(Duration::from_nanos(1)),
        };
        let zero = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        let value = libc::timespec {
            tv_sec: libc::time_t::try_from(at.as_secs()).unwrap_or(libc::time_t::MAX),
            tv_nsec: libc::c_long::from(at.subsec_nanos()),
        };
        let spec = libc::itimerspec { it_interval: zero, it_value: value };
        let raw = self.fd.get_ref().as_raw_fd();
        // SAFETY: `spec` lives through the call; a null old value is allowed.
        check(unsafe {
            libc::timerfd_settime(
                raw,
                libc::TFD_TIMER_ABSTIME,
                &raw const spec,
                std::ptr::null_mut(),
            )
        })?;
        self.deadline = deadline;
        Ok(())
    }

    /// Waits until the armed deadline has come; for ever when unarmed. Cancel-safe.
    pub async fn expired(&mut self) -> io::Result<()> {
        loop {
            let mut guard = self.fd.readable().await?;
            let mut count = 0_u64;
            let raw = guard.get_inner().as_raw_fd();
            // SAFETY: the buffer is the 8 bytes that a timerfd writes.
            let read = unsafe { libc::read(raw, (&raw mut count).cast(), size_of::<u64>()) };
            if read == size_of::<u64>() as isize {
                self.deadline = None;
                return Ok(());
            }
            let error = io::Error::last_os_error();
            guard.clear_ready();
            if !is_transient(&error) {
                return Err(error);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boottime_moves_forward_with_the_kernels_uptime() {
        let uptime = std::fs::read_to_string("/proc/uptime").unwrap();
        let uptime: f64 = uptime.split(' ').next().unwrap().parse().unwrap();
        let first = boottime();
        assert!((first.as_secs_f64() - uptime).abs() < 0.5, "{first:?} against {uptime}");
        assert!(boottime() > first);
        assert!(Duration::from_nanos(boottime_ns()) >= first);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn timer_expires_on_time_and_can_be_moved_and_disarmed() {
        let mut timer = Timer::new().unwrap();
        let start = boottime();
        timer.set(Some(start + Duration::from_secs(60))).unwrap();
        timer.set(Some(start + Duration::from_millis(5))).unwrap();
        timer.expired().await.unwrap();
        let late = boottime() - start;
        assert!(late >= Duration::from_millis(5) && late < Duration::from_millis(500), "{late:?}");
        // A deadline in the past fires at once.
        timer.set(Some(Duration::ZERO)).unwrap();
        timer.expired().await.unwrap();
        timer.set(Some(boottime() + Duration::from_millis(5))).unwrap();
        timer.set(None).unwrap();
        assert!(tokio::time::timeout(Duration::from_millis(30), timer.expired()).await.is_err());
    }
}
