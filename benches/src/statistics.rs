//! The middle and the ends of repeated measurements.

/// Returns the median, the smallest and the largest value, or NaN if there are no values.
pub fn spread(values: &[f64]) -> [f64; 3] {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let n = values.len();
    let at = |i: usize| values.get(i).copied().unwrap_or(f64::NAN);
    let middle = if n % 2 == 1 { at(n / 2) } else { 0.5 * (at((n / 2).wrapping_sub(1)) + at(n / 2)) };
    [middle, at(0), at(n.wrapping_sub(1))]
}

/// Returns the median, or NaN if there are no values.
pub fn median(values: &[f64]) -> f64 {
    spread(values)[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spread_is_median_smallest_and_largest() {
        assert_eq!(spread(&[3.0, 1.0, 2.0]), [2.0, 1.0, 3.0]);
        assert_eq!(spread(&[4.0, 1.0, 2.0, 3.0]), [2.5, 1.0, 4.0]);
        assert!(spread(&[]).iter().all(|v| v.is_nan()));
    }
}
