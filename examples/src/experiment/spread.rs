//! Mean and standard deviation over seeds.

use serde::Serialize;

/// Mean and standard deviation over seeds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// The mean; NaN without values.
    pub mean: f64,
    /// The sample standard deviation (n − 1); 0 for fewer than two values.
    pub deviation: f64,
}

impl Spread {
    /// Computes the spread of `values`.
    pub fn of(values: &[f64]) -> Self {
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
        Self { mean, deviation: if values.len() < 2 { 0.0 } else { (squares / (n - 1.0)).sqrt() } }
    }

    /// Returns `mean ± deviation` with so many decimals.
    pub fn text(&self, decimals: usize) -> String {
        format!("{:.decimals$} ± {:.decimals$}", self.mean, self.deviation)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spread_is_mean_and_sample_deviation() {
        let s = Spread::of(&[1.0, 2.0, 3.0]);
        assert_eq!((s.mean, s.deviation), (2.0, 1.0));
        assert_eq!(Spread::of(&[4.0]).deviation, 0.0);
        assert_eq!(s.text(1), "2.0 ± 1.0");
    }
}
