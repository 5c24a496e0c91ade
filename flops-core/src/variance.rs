//! Estimates of Tr Σ_j before the queries are drawn.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::error::Error;

/// The source of the allocator's estimates of Tr Σ_j.
///
/// | source | queries | what the estimates rest on |
/// |---|---|---|
/// | [`Running`](Self::Running) | none | earlier queries of examples with this loss, and of this example |
/// | [`Loss`](Self::Loss) | none | the clean loss |
/// | [`Pilot`](Self::Pilot) | part of the budget | pilot queries of this step |
///
/// The default did best in experiments, see `docs/method.md`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum VarianceSource {
    /// The queries of earlier steps, by a [`VarianceTracker`].
    #[default]
    Running,
    /// The clean loss: Tr Σ_j is taken to be ℓ_j².
    Loss,
    /// Pilot queries of the same step, this many for each example, at least 1 and fewer than A₀.
    ///
    /// With P pilots the gradient estimate is ĝ = (P/A₀)·ĝ_pilot + (1 − P/A₀)·ĝ_rest. The weight
    /// P/A₀ is fixed before anything is drawn, so ĝ is unbiased, although the pilots decide the
    /// allocation of the rest. A weight that depended on the allocation would bias it.
    Pilot(usize),
}

impl std::fmt::Display for VarianceSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Running => f.write_str("running"),
            Self::Loss => f.write_str("loss"),
            Self::Pilot(queries) => write!(f, "pilot:{queries}"),
        }
    }
}

impl std::str::FromStr for VarianceSource {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self, Error> {
        match s {
            "running" => Ok(Self::Running),
            "loss" => Ok(Self::Loss),
            _ => s.strip_prefix("pilot:").and_then(|n| n.parse().ok()).map(Self::Pilot).ok_or_else(|| Error::Unknown {
                what: "variance source",
                name: s.into(),
                choices: "running, loss, pilot:N (N queries per example)",
            }),
        }
    }
}

/// ℓ_j², the estimate of Tr Σ_j by [`VarianceSource::Loss`].
///
/// Squares are cut at the square root of the largest `f64`, so that sums of them stay finite.
pub fn squared_losses(losses: &[f64]) -> Vec<f64> {
    losses.iter().map(|l| (l * l).min(f64::MAX.sqrt())).collect()
}

/// Number of bins of the pooled curve, of equal width in log loss from `LOSS_MIN` to `LOSS_MAX`.
const BINS: usize = 48;
const LOSS_MIN: f64 = 1e-6;
const LOSS_MAX: f64 = 1e2;
/// Width of the smoothing kernel, in bins.
const BANDWIDTH: f64 = 0.75;
/// Factor on the curve's weight per batch.
const CURVE_DECAY: f64 = 0.98;
/// Factor on an example's weight when it is seen again, usually one epoch later.
const DATUM_DECAY: f64 = 0.7;
/// The curve counts as much as this many queries of the example itself.
const PRIOR_QUERIES: f64 = 40.0;
/// Upper bound of an example's ratio to the curve.
const MAX_RATIO: f64 = 100.0;

/// Predicts Tr Σ_j before the queries of example j are drawn.
///
/// It observes m_j, an estimate of E‖ĝ_jq‖² = Tr Σ_j + ‖E ĝ_j‖² from the queries of an example. The
/// second term is not subtracted: it is smaller by a factor of about the number of perturbed
/// coordinates.
///
/// Two estimates are combined.
///
/// - The *pooled curve* m(ℓ) is the recent mean of m over all examples with loss ℓ. It needs no
///   earlier visit of the example, and it follows the training.
/// - The example's *own ratio* m_j / m(ℓ_j) sets it apart from others with its loss. It is averaged
///   over the visits, and older visits count less.
///
/// The prediction is m(ℓ_j) times the ratio. The standard deviation of a single query's ‖ĝ‖² is
/// above its mean. The ratio is therefore shrunk towards 1, as if 40 queries had already shown a
/// ratio of 1. An unseen example gets the curve. Before any observation every example gets 1.
///
/// The tracker remembers the ratio instead of m_j, so that an estimate from the last epoch stays
/// right when the loss has fallen. The loss may be replaced by another variance covariate, if the
/// model has one.
///
/// Memory: 16 bytes per example seen, or about 25 with the map around them. The curve takes 1 kB.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct VarianceTracker {
    curve: Vec<Bin>,
    data: BTreeMap<u64, Datum>,
}

/// A bin of the pooled curve: Σ weight·m and Σ weight. A query of the latest batch has weight 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Bin {
    sum: f64,
    weight: f64,
}

/// An example's mean ratio to the curve, and its number of queries, where older ones count less.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
struct Datum {
    ratio: f32,
    queries: f32,
}

impl VarianceTracker {
    /// A tracker that has seen nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// The number of examples seen.
    pub fn len(&self) -> usize {
        self.data.len()
    }

    /// Whether nothing has been seen.
    pub fn is_empty(&self) -> bool {
        self.data.is_empty()
    }

    /// Estimates of Tr Σ_j, one per example, finite and not negative.
    pub fn predict(&self, ids: &[u64], losses: &[f64]) -> Vec<f64> {
        ids.iter().zip(losses).map(|(id, &loss)| self.pooled(loss).unwrap_or(1.0) * self.ratio(*id)).collect()
    }

    /// Adds the observations of one step.
    ///
    /// `m[j]` estimates E‖ĝ_jq‖² from the `counts[j]` queries of example `ids[j]`. Entries without
    /// queries are skipped, and so are those whose loss or `m` is not finite.
    pub fn observe(&mut self, ids: &[u64], losses: &[f64], m: &[f64], counts: &[usize]) {
        self.curve.resize(BINS, Bin::default());
        for bin in &mut self.curve {
            bin.sum *= CURVE_DECAY;
            bin.weight *= CURVE_DECAY;
        }
        let entries = || {
            let zipped = ids.iter().zip(losses).zip(m).zip(counts);
            zipped
                .map(|(((&id, &loss), &m), &n)| (id, loss, m, n as f64))
                .filter(|&(_, loss, m, n)| loss.is_finite() && m.is_finite() && m >= 0.0 && n > 0.0)
        };
        for (_, loss, m, n) in entries() {
            let bin = &mut self.curve[position(loss).round() as usize];
            bin.sum += n * m;
            bin.weight += n;
        }
        for (id, loss, m, n) in entries() {
            let Some(expected) = self.pooled(loss).filter(|e| *e > 0.0) else { continue };
            let ratio = (m / expected).min(MAX_RATIO);
            let seen = self.data.entry(id).or_insert(Datum { ratio: 1.0, queries: 0.0 });
            let queries = DATUM_DECAY * seen.queries as f64 + n;
            let old = seen.ratio as f64;
            *seen = Datum { ratio: (old + n / queries * (ratio - old)) as f32, queries: queries as f32 };
        }
    }

    /// m(ℓ), smoothed over neighbouring bins, or none before any observation.
    fn pooled(&self, loss: f64) -> Option<f64> {
        let at = position(loss);
        let (mut sum, mut weight) = (0.0, 0.0);
        for (k, bin) in self.curve.iter().enumerate() {
            let d = (at - k as f64) / BANDWIDTH;
            // the second term extends the curve to losses that no example has had; it never
            // underflows
            let kernel = (-0.5 * d * d).exp() + 1e-4 * (-d.abs()).exp();
            sum += kernel * bin.sum;
            weight += kernel * bin.weight;
        }
        (weight > 0.0).then(|| sum / weight)
    }

    /// The example's own ratio to the curve, shrunk towards 1.
    fn ratio(&self, id: u64) -> f64 {
        self.data.get(&id).map_or(1.0, |d| {
            let own = d.queries as f64;
            (PRIOR_QUERIES + own * d.ratio as f64) / (PRIOR_QUERIES + own)
        })
    }
}

/// The position of a loss on the curve, from 0 to `BINS` − 1, or NaN for NaN.
fn position(loss: f64) -> f64 {
    let loss = loss.clamp(LOSS_MIN, LOSS_MAX);
    (loss / LOSS_MIN).ln() / (LOSS_MAX / LOSS_MIN).ln() * (BINS - 1) as f64
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng, rngs::StdRng};

    use super::*;

    #[test]
    fn sources_have_names() {
        for source in [VarianceSource::Running, VarianceSource::Loss, VarianceSource::Pilot(4)] {
            assert_eq!(source.to_string().parse::<VarianceSource>().unwrap(), source);
        }
        assert!("pilot:x".parse::<VarianceSource>().unwrap_err().to_string().contains("pilot:N"));
        assert_eq!(squared_losses(&[3.0, 0.0, -2.0]), [9.0, 0.0, 4.0]);
        assert!(squared_losses(&[1e300]).iter().all(|v| v.is_finite()));
    }

    #[test]
    fn before_any_observation_all_examples_are_alike() {
        assert_eq!(VarianceTracker::new().predict(&[4, 7], &[0.1, 9.0]), [1.0, 1.0]);
        let mut tracker = VarianceTracker::new();
        tracker.observe(&[1, 2, 3], &[1.0, f64::NAN, 1.0], &[f64::INFINITY, 1.0, 1.0], &[5, 5, 0]);
        assert_eq!(tracker.predict(&[1, 2], &[1.0, 1.0]), [1.0, 1.0]);
    }

    #[test]
    fn an_unseen_example_gets_the_curve() {
        let mut tracker = VarianceTracker::new();
        let losses: Vec<f64> = (0..200).map(|j| 0.01 * 1.05f64.powi(j)).collect();
        let m: Vec<f64> = losses.iter().map(|l| l * l).collect();
        let ids: Vec<u64> = (0..200).collect();
        tracker.observe(&ids, &losses, &m, &[20; 200]);
        for loss in [0.05, 0.3, 2.0, 20.0] {
            let got = tracker.predict(&[999], &[loss])[0];
            // deterministic: the bins and their smoothing blur m = ℓ² by less than a factor of
            // e^0.5
            assert!((got / (loss * loss)).ln().abs() < 0.5, "{loss}: {got}");
        }
        // far from all examples the nearest bins decide, and every prediction is usable
        let odd = tracker.predict(&[999; 5], &[0.0, 1e30, f64::NAN, f64::INFINITY, -1.0]);
        assert!(odd.iter().all(|v| v.is_finite() && *v >= 0.0), "{odd:?}");
        assert!(odd[0] < 1e-3 && odd[1] > 1e3, "{odd:?}");
    }

    #[test]
    fn an_example_that_differs_from_others_of_its_loss_is_recognised() {
        // Two kinds of examples with equal loss and Tr Σ = 1 and 9 are seen 12 times with 20
        // queries. m is Tr Σ times the mean of 20 uniform variates of mean 1. The seed is fixed.
        // The true curve is 5.
        let mut rng = StdRng::seed_from_u64(1);
        let (ids, losses): (Vec<u64>, Vec<f64>) = ((0..64).collect(), vec![1.0; 64]);
        let mut tracker = VarianceTracker::new();
        for _ in 0..12 {
            let m: Vec<f64> = ids
                .iter()
                .map(|id| {
                    let mean = (0..20).map(|_| 2.0 * rng.next_u64() as f64 / u64::MAX as f64).sum::<f64>() / 20.0;
                    if id % 2 == 0 { mean } else { 9.0 * mean }
                })
                .collect();
            tracker.observe(&ids, &losses, &m, &[20; 64]);
        }
        let v = tracker.predict(&ids, &losses);
        // the ratio is shrunk by 40 of 106 queries: 1 becomes 2.5, and 9 becomes 7.5
        assert!(v.chunks(2).all(|p| p[0] > 1.5 && p[0] < 3.5 && p[1] > 6.0 && p[1] < 9.0), "{v:?}");
    }

    #[test]
    fn zeros_stay_zero_and_the_curve_forgets() {
        let mut tracker = VarianceTracker::new();
        tracker.observe(&[0, 1], &[0.0, 1.0], &[0.0, 0.0], &[4, 4]);
        assert_eq!(tracker.predict(&[0, 1, 2], &[0.0, 1.0, 5.0]), [0.0; 3]);
        for _ in 0..400 {
            tracker.observe(&[2], &[1.0], &[3.0], &[4]);
        }
        let v = tracker.predict(&[9], &[1.0])[0];
        assert!((v - 3.0).abs() < 0.01, "{v}");
    }

    #[test]
    fn a_tracker_survives_serde() {
        let mut tracker = VarianceTracker::new();
        tracker.observe(&[3, u64::MAX], &[0.2, 0.4], &[1.0, 2.0], &[3, 5]);
        let json = serde_json::to_string(&tracker).unwrap();
        assert_eq!(serde_json::from_str::<VarianceTracker>(&json).unwrap(), tracker);
        assert_eq!(tracker.len(), 2);
    }
}
