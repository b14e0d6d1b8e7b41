//! Percentiles.

/// The nearest-rank percentile: the smallest value that at least `percent` % of the values do not exceed.
/// 0 for no values.
pub fn nearest_rank(values: &[f64], percent: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (percent / 100.0 * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.max(1) - 1).copied().unwrap_or(0.0)
}

/// The largest value, 0 for none.
pub fn maximum(values: &[f64]) -> f64 {
    values.iter().copied().fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_rank_by_its_definition() {
        let values = [15.0, 20.0, 35.0, 40.0, 50.0];
        for (percent, wanted) in
            [(5.0, 15.0), (30.0, 20.0), (40.0, 20.0), (50.0, 35.0), (100.0, 50.0)]
        {
            assert_eq!(nearest_rank(&values, percent), wanted);
        }
        assert_eq!(nearest_rank(&[], 50.0), 0.0);
        let fifty: Vec<f64> = (1..=50).map(f64::from).collect();
        assert_eq!((nearest_rank(&fifty, 50.0), nearest_rank(&fifty, 99.0)), (25.0, 50.0));
    }
}
