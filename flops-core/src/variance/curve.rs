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

#[cfg(test)]
mod tests {
    use super::*;

    /// The window holds the latest observations: all of the last batch, and the last of the one
    /// before.
    #[test]
    fn the_curve_rests_on_the_latest_observations() {
        let mut curve = Curve::default();
        let batch = |moment: f64| (0..3000).map(|i| (f64::from(i), moment, 1.0)).collect::<Vec<_>>();
        curve.observe(&batch(1.0));
        curve.observe(&batch(9.0));
        let of = |moment: f64| curve.recent.iter().filter(move |o| o.moment == moment).map(|o| o.covariate as usize);
        assert_eq!(of(9.0).collect::<Vec<_>>(), (0..3000).collect::<Vec<_>>());
        assert_eq!(of(1.0).collect::<Vec<_>>(), (6000 - WINDOW..3000).collect::<Vec<_>>());
        assert!(curve.recent.iter().all(|o| o.weight == if o.moment == 9.0 { 1.0 } else { DECAY as f32 }));
    }

    /// Half of the weight has a covariate of 0 with m = 1, the other half 1 with m = 9: ranks of
    /// 1/4 and 3/4, and log odds of ∓ln 3.
    #[test]
    fn the_curve_is_linear_between_its_knots() {
        let mut curve = Curve::default();
        curve.observe(&[(0.0, 1.0, 5.0), (1.0, 9.0, 5.0)]);
        let fitted = curve.fit().unwrap();
        assert_eq!(fitted.ranks, [(0.0, 0.25), (0.5, 0.75)]);
        for (covariate, rank) in [(0.0, 0.25), (0.5, 0.5), (1.0, 0.75)] {
            let above = fitted.knots.iter().position(|k| *k > rank).unwrap();
            let (a, b) = (fitted.knots[above - 1], fitted.knots[above]);
            let part = (rank - a) / (b - a);
            let expected = fitted.moments[above - 1] + part * (fitted.moments[above] - fitted.moments[above - 1]);
            assert!((fitted.at(covariate) - expected).abs() < 1e-12, "{covariate}");
        }
        // the kernel gives each half its own m, up to what the wide part of it brings from the other
        assert!((fitted.at(0.0) - 1.0).abs() < 0.1 && (fitted.at(1.0) - 9.0).abs() < 0.1);
        assert!((fitted.at(0.5) - 5.0).abs() < 1e-9, "halfway by symmetry");
    }

    /// Two knots side by side have been seen: each other one has their mean, weighted by a Gaussian of
    /// the distance in log odds, and far away by an exponential.
    #[test]
    fn knots_are_smoothed_over_their_neighbours() {
        let mut bins = [(0.0, 0.0); KNOTS];
        (bins[40], bins[41]) = ((6.0, 2.0), (20.0, 4.0));
        let kernel = |k: usize, at: usize| {
            let d = 0.2 * k.abs_diff(at) as f64 / 0.25;
            (-0.5 * d * d).exp() + 1e-4 * (-d).exp()
        };
        for (at, got) in smooth(&bins).into_iter().enumerate() {
            let (a, b) = (kernel(40, at), kernel(41, at));
            let expected = (6.0 * a + 20.0 * b) / (2.0 * a + 4.0 * b);
            assert!((got / expected - 1.0).abs() < 1e-12, "knot {at}: {got}, not {expected}");
        }
    }

    #[test]
    fn a_rank_lies_between_two_knots() {
        let knots = knot_ranks();
        assert_eq!(knots[KNOTS / 2], 0.5);
        assert!(knots.iter().zip(knots.iter().rev()).all(|(a, b)| (a + b - 1.0).abs() < 1e-12));
        let odds = |k: usize| (knots[k] / (1.0 - knots[k])).ln();
        assert!((odds(0) + REACH).abs() < 1e-9 && (odds(KNOTS - 1) - REACH).abs() < 1e-9);
        let (a, b) = (knots[50], knots[51]);
        let parts = [a - 0.01, a, 0.75 * a + 0.25 * b, b, b + 0.01].map(|rank| between(&knots, 50, rank));
        assert!(parts.iter().zip([0.0, 0.0, 0.25, 1.0, 1.0]).all(|(a, b)| (a - b).abs() < 1e-12), "{parts:?}");
    }
}
