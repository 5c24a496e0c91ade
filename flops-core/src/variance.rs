//! Estimates of Tr Σ_j, known before the queries are drawn.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::error::Error;

/// Where the allocator's estimates of Tr Σ_j come from.
///
/// | estimate | queries it costs | knows |
/// |---|---|---|
/// | [`Running`](Self::Running) | none | what data of this loss, and this datum, have shown in earlier steps |
/// | [`Loss`](Self::Loss) | none | the loss |
/// | [`Pilot`](Self::Pilot) | none beyond the budget: they join the estimate with a fixed weight | what this step's own pilots show |
///
/// The default is the one that measurement picked, see `docs/method.md`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VarianceEstimate {
    /// [`VarianceTracker`]: from the queries of earlier steps.
    #[default]
    Running,
    /// Tr Σ_j = ℓ_j²: the clean loss as a proxy.
    Loss,
    /// Pilot queries of the same step, this many for each datum, out of the budget: A₀ must be larger.
    ///
    /// With P pilots, the estimate is ĝ = (P/A₀)·ĝ_pilot + (1 − P/A₀)·ĝ_rest, a weight that is fixed before anything is drawn: ĝ is
    /// unbiased, although the pilots decide the allocation of the rest. A weight that depends on the allocation would bias it.
    Pilot(usize),
}

impl std::fmt::Display for VarianceEstimate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Running => f.write_str("running"),
            Self::Loss => f.write_str("loss"),
            Self::Pilot(queries) => write!(f, "pilot:{queries}"),
        }
    }
}

impl std::str::FromStr for VarianceEstimate {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self, Error> {
        match s {
            "running" => Ok(Self::Running),
            "loss" => Ok(Self::Loss),
            _ => s.strip_prefix("pilot:").and_then(|n| n.parse().ok()).map(Self::Pilot).ok_or_else(|| Error::Unknown {
                what: "estimate of the variance",
                name: s.into(),
                choices: "running, loss, pilot:N (N queries per datum)",
            }),
        }
    }
}

/// Tr Σ_j = ℓ_j², the proxy; losses whose squares overflow are cut.
pub fn loss_proxy(losses: &[f64]) -> Vec<f64> {
    losses.iter().map(|l| (l * l).min(f64::MAX.sqrt())).collect()
}

/// Bins of the pooled curve, equal in log loss from `LOSS_MIN` to `LOSS_MAX`.
const BINS: usize = 48;
const LOSS_MIN: f64 = 1e-6;
const LOSS_MAX: f64 = 1e2;
/// Width of the smoothing kernel, in bins.
const BANDWIDTH: f64 = 0.75;
/// What is left of the curve's weight after one more batch.
const CURVE_DECAY: f64 = 0.98;
/// What is left of a datum's weight when it is seen again, one epoch later.
const DATUM_DECAY: f64 = 0.7;
/// The curve counts as much as this many queries of the datum itself.
const PRIOR_QUERIES: f64 = 40.0;
/// A datum's ratio to the curve is kept below this.
const MAX_RATIO: f64 = 100.0;

/// Predicts Tr Σ_j before datum j's queries are drawn.
///
/// What is observed is m_j, the mean over a datum's queries of ‖ĝ_jq‖². Its expectation is Tr Σ_j + ‖E ĝ_j‖², of which
/// the second term is smaller by about the number of perturbed coordinates; it is not subtracted.
///
/// Two estimates are combined. The *pooled curve* m(ℓ) is what data of loss ℓ have shown lately, whoever they were:
/// it needs no earlier visit, and follows the training. The *datum's own ratio* m_j / m(ℓ_j) is what sets it apart
/// from others of its loss, averaged over its visits with older ones forgotten. The prediction is m(ℓ_j) times that
/// ratio, shrunk towards 1 as if 40 queries had already shown a ratio of 1, since a single query's ‖ĝ‖² scatters
/// by more than 100 %. An unseen datum gets the curve; before any observation every datum gets 1.
///
/// The ratio is remembered, not m_j, so that an estimate from the last epoch stays right when the loss has fallen.
///
/// Memory: 16 bytes per datum seen, about 25 with the map around them; the curve takes 1 kB.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct VarianceTracker {
    curve: Vec<Bin>,
    data: BTreeMap<u64, Datum>,
}

/// A bin of the pooled curve: Σ weight·m and Σ weight, a query of the latest batch weighing 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Bin {
    sum: f64,
    weight: f64,
}

/// A datum's mean ratio to the curve and the number of queries behind it, older ones counting less.
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

    /// The number of data seen.
    pub fn len(&self) -> usize {
        self.data.len()
    }

    /// Whether nothing has been seen.
    pub fn is_empty(&self) -> bool {
        self.data.is_empty()
    }

    /// Estimates of Tr Σ_j, one per datum: finite and not negative.
    pub fn predict(&self, ids: &[u64], losses: &[f64]) -> Vec<f64> {
        ids.iter().zip(losses).map(|(id, &loss)| self.pooled(loss).unwrap_or(1.0) * self.ratio(*id)).collect()
    }

    /// Takes in one step's observations: `m[j]`, the mean of ‖ĝ_jq‖² over the `counts[j]` queries of datum `ids[j]`.
    ///
    /// Entries without queries, or whose loss or `m` is not finite, are passed over.
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

    /// m(ℓ), smoothed over neighbouring bins; none before any observation.
    fn pooled(&self, loss: f64) -> Option<f64> {
        let at = position(loss);
        let (mut sum, mut weight) = (0.0, 0.0);
        for (k, bin) in self.curve.iter().enumerate() {
            let d = (at - k as f64) / BANDWIDTH;
            // The second term carries the curve to where no datum has been; it underflows nowhere.
            let kernel = (-0.5 * d * d).exp() + 1e-4 * (-d.abs()).exp();
            sum += kernel * bin.sum;
            weight += kernel * bin.weight;
        }
        (weight > 0.0).then(|| sum / weight)
    }

    /// The datum's own ratio to the curve, shrunk towards 1.
    fn ratio(&self, id: u64) -> f64 {
        self.data.get(&id).map_or(1.0, |d| {
            let own = d.queries as f64;
            (PRIOR_QUERIES + own * d.ratio as f64) / (PRIOR_QUERIES + own)
        })
    }
}

/// Where a loss lies on the curve, from 0 to `BINS` − 1. NaN lies at 0.
fn position(loss: f64) -> f64 {
    let loss = loss.clamp(LOSS_MIN, LOSS_MAX);
    (loss / LOSS_MIN).ln() / (LOSS_MAX / LOSS_MIN).ln() * (BINS - 1) as f64
}

/// Share of the site probabilities that is equal for all, so that none is forgotten.
const EQUAL_SHARE: f64 = 0.2;
/// What a site's running moment keeps per step.
const SITE_DECAY: f64 = 0.95;

/// Running second moments E_s·G_s of the estimates at each site, and the probabilities p_s ∝ √(E_s·G_s) that follow.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct SiteTracker {
    /// (sum, queries), decayed.
    sites: Vec<(f64, f64)>,
}

impl SiteTracker {
    /// Probabilities of sites whose queries cost `costs`: p_s ∝ √(E_s·G_s/cost_s), mixed with equal ones; equal ones for sites never seen.
    pub fn probabilities(&self, costs: &[f64]) -> Vec<f64> {
        let sites = costs.len();
        let equal = 1.0 / sites.max(1) as f64;
        let known = self.sites.len() == sites && self.sites.iter().all(|s| s.1 > 0.0);
        let roots: Vec<f64> = self.sites.iter().zip(costs).map(|((sum, n), cost)| (sum / (n * cost)).sqrt()).collect();
        let total: f64 = roots.iter().sum();
        if !known || total <= 0.0 || !total.is_finite() {
            return vec![equal; sites];
        }
        roots.iter().map(|r| EQUAL_SHARE * equal + (1.0 - EQUAL_SHARE) * r / total).collect()
    }

    /// The running mean of c²·E_s·E s² at each site, E_s·G_s: the second moment of a query there. NaN where none was seen.
    pub fn moments(&self) -> Vec<f64> {
        self.sites.iter().map(|(sum, queries)| sum / queries).collect()
    }

    /// Takes in what a step saw at each site: the sum of c²·E_s over its queries, and their number.
    pub fn observe(&mut self, moments: &[(f64, u64)]) {
        if moments.is_empty() {
            return;
        }
        if self.sites.len() != moments.len() {
            self.sites = vec![(0.0, 0.0); moments.len()];
        }
        for (kept, &(sum, n)) in self.sites.iter_mut().zip(moments) {
            if sum.is_finite() {
                *kept = (SITE_DECAY * kept.0 + sum, SITE_DECAY * kept.1 + n as f64);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng, rngs::StdRng};

    use super::*;

    #[test]
    fn estimates_have_names() {
        for estimate in [VarianceEstimate::Running, VarianceEstimate::Loss, VarianceEstimate::Pilot(4)] {
            assert_eq!(estimate.to_string().parse::<VarianceEstimate>().unwrap(), estimate);
        }
        assert!("pilot:x".parse::<VarianceEstimate>().unwrap_err().to_string().contains("pilot:N"));
        assert_eq!(loss_proxy(&[3.0, 0.0, -2.0]), [9.0, 0.0, 4.0]);
        assert!(loss_proxy(&[1e300]).iter().all(|v| v.is_finite()));
    }

    #[test]
    fn before_any_observation_all_data_are_alike() {
        assert_eq!(VarianceTracker::new().predict(&[4, 7], &[0.1, 9.0]), [1.0, 1.0]);
        let mut tracker = VarianceTracker::new();
        tracker.observe(&[1, 2, 3], &[1.0, f64::NAN, 1.0], &[f64::INFINITY, 1.0, 1.0], &[5, 5, 0]);
        assert_eq!(tracker.predict(&[1, 2], &[1.0, 1.0]), [1.0, 1.0]);
    }

    #[test]
    fn an_unseen_datum_gets_the_curve() {
        let mut tracker = VarianceTracker::new();
        let losses: Vec<f64> = (0..200).map(|j| 0.01 * 1.05f64.powi(j)).collect();
        let m: Vec<f64> = losses.iter().map(|l| l * l).collect();
        let ids: Vec<u64> = (0..200).collect();
        tracker.observe(&ids, &losses, &m, &[20; 200]);
        for loss in [0.05, 0.3, 2.0, 20.0] {
            let got = tracker.predict(&[999], &[loss])[0];
            // Deterministic; the bins and their smoothing blur m = ℓ² by up to half.
            assert!((got / (loss * loss)).ln().abs() < 0.5, "{loss}: {got}");
        }
        // Far from all data the nearest bins answer, and nothing is ever unusable.
        let odd = tracker.predict(&[999; 5], &[0.0, 1e30, f64::NAN, f64::INFINITY, -1.0]);
        assert!(odd.iter().all(|v| v.is_finite() && *v >= 0.0), "{odd:?}");
        assert!(odd[0] < 1e-3 && odd[1] > 1e3, "{odd:?}");
    }

    #[test]
    fn a_datum_that_differs_from_its_loss_is_found_out() {
        // Two kinds of data of equal loss, Tr Σ = 1 and 9, seen 12 times at 20 queries. m is Tr Σ·χ²₂₀/20, here a sum
        // of 20 uniform variates of mean 1: a fixed seed, deterministic. The true curve is 5.
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
        // Shrunk by 40 of 107 queries: 1 → 2.5 and 9 → 7.5.
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
    fn it_survives_serde() {
        let mut tracker = VarianceTracker::new();
        tracker.observe(&[3, u64::MAX], &[0.2, 0.4], &[1.0, 2.0], &[3, 5]);
        let json = serde_json::to_string(&tracker).unwrap();
        assert_eq!(serde_json::from_str::<VarianceTracker>(&json).unwrap(), tracker);
        assert_eq!(tracker.len(), 2);
    }
}
