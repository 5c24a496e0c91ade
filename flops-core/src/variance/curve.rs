//! The pooled curve: the recent mean of m over examples of like covariates.

use serde::{Deserialize, Serialize};

/// Observations that the curve rests on, the latest ones.
const WINDOW: usize = 4096;
/// Factor on the weight of what was observed, per batch.
const DECAY: f64 = 0.98;
/// Knots of the curve, equally spaced in the log odds of the rank from −`REACH` to `REACH`.
const KNOTS: usize = 81;
const REACH: f64 = 8.0;
const STEP: f64 = 2.0 * REACH / (KNOTS - 1) as f64;
/// Standard deviation of the smoothing kernel, in log odds.
const BANDWIDTH: f64 = 0.25;
/// Upper bound of m, so that weighted sums of it stay finite.
const MAX_MOMENT: f64 = 1e150;

/// What one example's queries showed.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(from = "(f64, f64, f32, u16)", into = "(f64, f64, f32, u16)")]
struct Observation {
    covariate: f64,
    moment: f64,
    /// Number of queries, decayed.
    weight: f32,
    /// Number of observations since, below `WINDOW`.
    age: u16,
}

impl From<(f64, f64, f32, u16)> for Observation {
    fn from((covariate, moment, weight, age): (f64, f64, f32, u16)) -> Self {
        Self { covariate, moment, weight, age }
    }
}

impl From<Observation> for (f64, f64, f32, u16) {
    fn from(o: Observation) -> Self {
        (o.covariate, o.moment, o.weight, o.age)
    }
}

/// The latest observations, from which the curve is fitted whenever it is read.
///
/// A covariate enters through its order among them alone. The curve is therefore the same, up to
/// rounding, under every increasing map of the covariate, and mirrored under a decreasing one.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct Curve {
    /// In the order of the covariates.
    recent: Vec<Observation>,
}

impl Curve {
    /// Adds one batch of (covariate, m, number of queries), all finite.
    ///
    /// Of a batch larger than the window, evenly spaced entries are kept.
    pub fn observe(&mut self, batch: &[(f64, f64, f64)]) {
        let added = batch.len().min(WINDOW);
        if added == 0 {
            return;
        }
        self.recent.retain_mut(|o| {
            o.weight *= DECAY as f32;
            let age = o.age as usize + added;
            o.age = age.min(WINDOW) as u16;
            age < WINDOW
        });
        let newest = (0..added).map(|i| {
            let (covariate, moment, queries) = batch[i * batch.len() / added];
            // the sum turns −0 into 0: they are one covariate
            let covariate = covariate + 0.0;
            let (moment, age) = (moment.min(MAX_MOMENT), (added - 1 - i) as u16);
            Observation { covariate, moment, weight: queries as f32, age }
        });
        let mut newest: Vec<Observation> = newest.collect();
        newest.sort_by(|a, b| a.covariate.total_cmp(&b.covariate));
        // two sorted runs, which a stable sort merges in linear time
        self.recent.extend(newest);
        self.recent.sort_by(|a, b| a.covariate.total_cmp(&b.covariate));
    }

    /// The curve as it is now; `None` before any observation.
    pub fn fit(&self) -> Option<FittedCurve> {
        let total: f64 = self.recent.iter().map(|o| o.weight as f64).sum();
        if total <= 0.0 {
            return None;
        }
        let knots = knot_ranks();
        let mut bins = [(0.0, 0.0); KNOTS];
        let (mut covariates, mut ranks) = (Vec::with_capacity(WINDOW), Vec::with_capacity(WINDOW));
        let (mut below, mut knot) = (0.0, 0);
        for tied in self.recent.chunk_by(|a, b| a.covariate == b.covariate) {
            let weight: f64 = tied.iter().map(|o| o.weight as f64).sum();
            let sum: f64 = tied.iter().map(|o| o.weight as f64 * o.moment).sum();
            let rank = ((below + 0.5 * weight) / total).min(1.0);
            while knot + 2 < KNOTS && knots[knot + 1] <= rank {
                knot += 1;
            }
            let part = between(&knots, knot, rank);
            for (bin, share) in [(knot, 1.0 - part), (knot + 1, part)] {
                bins[bin].0 += share * sum;
                bins[bin].1 += share * weight;
            }
            covariates.push(tied[0].covariate);
            ranks.push((below / total, rank));
            below += weight;
        }
        Some(FittedCurve { covariates, ranks, knots, moments: smooth(&bins) })
    }
}

/// m over the rank of the covariate, linear between knots.
pub(super) struct FittedCurve {
    /// Those observed, in order, without ties.
    covariates: Vec<f64>,
    /// The share of the weight below each covariate, and that with half of the weight equal to it.
    ranks: Vec<(f64, f64)>,
    /// Ranks of the knots.
    knots: [f64; KNOTS],
    /// m at the knots.
    moments: [f64; KNOTS],
}

impl FittedCurve {
    /// m at the rank that `covariate` has among those observed: the share of the weight below it
    /// and half of that equal to it.
    pub fn at(&self, covariate: f64) -> f64 {
        let index = self.covariates.partition_point(|c| *c < covariate);
        let rank = match self.ranks.get(index) {
            // what has no order is put in the middle
            _ if covariate.is_nan() => 0.5,
            Some((_, equal)) if self.covariates[index] == covariate => *equal,
            Some((below, _)) => below.min(1.0),
            None => 1.0,
        };
        let knot = self.knots.partition_point(|k| *k <= rank).saturating_sub(1).min(KNOTS - 2);
        let part = between(&self.knots, knot, rank);
        (1.0 - part) * self.moments[knot] + part * self.moments[knot + 1]
    }
}

/// The ranks of the knots: 1/(1 + e^−z) at equally spaced log odds z.
fn knot_ranks() -> [f64; KNOTS] {
    std::array::from_fn(|k| 1.0 / (1.0 + (REACH - STEP * k as f64).exp()))
}

/// The part of the way from a knot to the next one at which `rank` lies, from 0 to 1.
fn between(knots: &[f64; KNOTS], knot: usize, rank: f64) -> f64 {
    ((rank - knots[knot]) / (knots[knot + 1] - knots[knot])).clamp(0.0, 1.0)
}

/// Means Σ k·sum / Σ k·weight of (sum, weight) over neighbouring knots, with a kernel k.
fn smooth(bins: &[(f64, f64); KNOTS]) -> [f64; KNOTS] {
    let kernel: [f64; KNOTS] = std::array::from_fn(|distance| {
        let d = STEP * distance as f64 / BANDWIDTH;
        // the second term extends the curve to ranks that no example has had; it never underflows
        (-0.5 * d * d).exp() + 1e-4 * (-d).exp()
    });
    std::array::from_fn(|at| {
        let (mut sum, mut weight) = (0.0, 0.0);
        for (k, bin) in bins.iter().enumerate() {
            sum += kernel[at.abs_diff(k)] * bin.0;
            weight += kernel[at.abs_diff(k)] * bin.1;
        }
        sum / weight
    })
}
