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

/// Doubles (or halves) from the start until one rate was carried and a higher one was not, then halves the distance by
/// ratio. A rate is refused only when it failed twice: a machine that stood still for a moment proves nothing.
/// 0 if nothing is carried.
pub fn highest(range: Range, mut carried: impl FnMut(f64) -> Result<bool>) -> Result<f64> {
    let mut holds = |rate: f64| -> Result<bool> { Ok(carried(rate)? || carried(rate)?) };
    let (mut good, mut bad) = (0.0, f64::INFINITY);
    let mut rate = range.start;
    while good == 0.0 || bad.is_infinite() {
        if holds(rate)? {
            good = rate;
            if rate >= range.highest {
                return Ok(good);
            }
            rate = (rate * 2.0).min(range.highest);
        } else {
            bad = rate;
            if good > 0.0 {
                break;
            }
            if rate <= range.lowest {
                return Ok(0.0);
            }
            rate = (rate / 2.0).max(range.lowest);
        }
        if good > 0.0 && rate >= bad {
            break;
        }
    }
    while bad / good > range.precision {
        let middle = (good * bad).sqrt();
        if holds(middle)? {
            good = middle;
        } else {
            bad = middle;
        }
    }
    Ok(good)
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
        highest(RANGE, |rate| Ok(rate <= limit)).unwrap()
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
            Ok(!hiccup && rate <= 50e3)
        });
        assert!(rate.unwrap() > 48e3);
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
