//! Waiting for a condition with a deadline. Nothing in the lab sleeps and hopes.

use crate::clock;
use crate::error::{Error, Result};
use std::time::Duration;

/// Calls `poll` every `every` until it gives a value; fails after `within` and says `what` did not happen.
/// An error of `poll` ends the wait at once.
pub fn until<T>(
    what: &str,
    within: Duration,
    every: Duration,
    mut poll: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let start = clock::now();
    loop {
        if let Some(value) = poll()? {
            return Ok(value);
        }
        if clock::now() - start > within {
            return Err(Error::Timeout {
                what: what.to_owned(),
                seconds: within.as_secs_f64(),
                hint: String::new(),
            });
        }
        std::thread::sleep(every);
    }
}

/// Like [`until`], but errors of `poll` mean "not yet"; the last one is told if time runs out.
pub fn until_ok<T>(
    what: &str,
    within: Duration,
    every: Duration,
    mut poll: impl FnMut() -> Result<T>,
) -> Result<T> {
    let start = clock::now();
    loop {
        match poll() {
            Ok(value) => return Ok(value),
            Err(error) if clock::now() - start > within => {
                return Err(Error::Timeout {
                    what: what.to_owned(),
                    seconds: within.as_secs_f64(),
                    hint: format!(" ({error})"),
                });
            }
            Err(_) => std::thread::sleep(every),
        }
    }
}

/// Waits until `condition` is true.
pub fn for_true(
    what: &str,
    within: Duration,
    every: Duration,
    mut condition: impl FnMut() -> bool,
) -> Result<()> {
    until(what, within, every, || Ok(condition().then_some(())))
}
