//! The highest rate that is carried. Pure: the caller probes.

use crate::error::Result;

/// Where a search looks.
#[derive(Clone, Copy, Debug)]
pub struct Range {
    /// First rate to try.
    pub start: f64,
    /// Nothing below is looked for.
    pub lowest: f64,
    /// Nothing above is looked for.
    pub highest: f64,
    /// The search ends when the lowest refused rate is at most this multiple of the highest carried one.
    pub precision: f64,
}

/// What became of a rate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Outcome {
    /// It was sent and arrived.
    Carried,
    /// Too much of it was lost.
    Lost,
    /// What was sent arrived, but the sender managed only this rate.
    Slower(f64),
}

/// Doubles (or halves) from the start until one rate was carried and a higher one was not, then halves the distance by
/// ratio. A rate is refused only when it failed twice: a machine that stood still for a moment proves nothing. What a
/// slow sender managed was carried, and what it was asked for was not. 0 if nothing is carried.
pub fn highest(range: Range, mut probe: impl FnMut(f64) -> Result<Outcome>) -> Result<f64> {
    let (mut good, mut bad) = (0.0_f64, f64::INFINITY);
    let mut rate = range.start;
    loop {
        let mut held = false;
        for _ in 0..2 {
            match probe(rate)? {
                Outcome::Carried => held = true,
                Outcome::Slower(managed) => good = good.max(managed.min(rate)),
                Outcome::Lost => {}
            }
            if held {
                break;
            }
        }
        if held {
            good = good.max(rate);
        } else {
            bad = bad.min(rate);
        }
        if good >= range.highest || good * range.precision >= bad {
            return Ok(good);
        }
        rate = match (good > 0.0, bad.is_finite()) {
            (true, true) => (good * bad).sqrt(),
            (true, false) => (good * 2.0).min(range.highest),
            (false, _) if rate <= range.lowest => return Ok(0.0),
            (false, _) => (rate / 2.0).max(range.lowest),
        };
    }
}

/// The first of `rate`, a little less, less again, … that is carried, with what `probe` found there.
pub fn confirm<T>(
    rate: f64,
    step: f64,
    tries: u32,
    mut probe: impl FnMut(f64) -> Result<(bool, T)>,
) -> Result<Option<(f64, T)>> {
    let mut rate = rate;
    for _ in 0..tries {
        let (held, found) = probe(rate)?;
        if held {
            return Ok(Some((rate, found)));
        }
        rate *= step;
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    const RANGE: Range = Range { start: 8e3, lowest: 100.0, highest: 4e6, precision: 1.03 };

    fn found(limit: f64) -> f64 {
        highest(RANGE, |rate| Ok(if rate <= limit { Outcome::Carried } else { Outcome::Lost }))
            .unwrap()
    }

    #[test]
    fn the_highest_carried_rate_is_found_within_the_precision_from_either_side() {
        for limit in [150.0, 7_999.0, 8_000.0, 8_001.0, 123_456.0, 1_900_000.0] {
            let rate = found(limit);
            assert!(rate <= limit && rate * RANGE.precision >= limit, "{limit}: {rate}");
        }
        assert_eq!(found(50.0), 0.0);
        assert_eq!(found(1e9), RANGE.highest);
    }

    #[test]
    fn one_failure_is_forgiven_and_two_are_not() {
        let mut failed = false;
        let rate = highest(RANGE, |rate| {
            let hiccup = !failed && rate > 30e3;
            failed |= hiccup;
            Ok(if !hiccup && rate <= 50e3 { Outcome::Carried } else { Outcome::Lost })
        });
        assert!(rate.unwrap() > 48e3);
    }

    #[test]
    fn what_a_slow_sender_managed_was_carried() {
        let slow = |limit: f64| {
            highest(RANGE, |rate| {
                Ok(if rate > limit { Outcome::Slower(limit) } else { Outcome::Carried })
            })
        };
        for limit in [300.0, 15e3, 117e3] {
            let rate = slow(limit).unwrap();
            assert!(rate <= limit && rate * RANGE.precision >= limit, "{limit}: {rate}");
        }
        // One that never manages what it is asked for: the best it ever managed, at the first rate.
        assert_eq!(highest(RANGE, |rate| Ok(Outcome::Slower(0.7 * rate))).unwrap(), 5.6e3);
    }

    #[test]
    fn confirming_steps_down_to_what_holds_and_gives_up() {
        let at = |limit: f64| confirm(100.0, 0.9, 5, |rate| Ok((rate <= limit, rate))).unwrap();
        assert_eq!(at(100.0), Some((100.0, 100.0)));
        let (rate, probed) = at(85.0).unwrap();
        assert!((rate - 81.0).abs() < 1e-9 && rate == probed);
        assert_eq!(at(50.0), None);
    }
}
