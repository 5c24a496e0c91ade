//! A control variate for activation noise, learned from the queries of training.
//!
//! # What it does
//! g_j is the gradient of example j with respect to a site's output. A query of example j with
//! noise ε measures c_jq ≈ g_jᵀε. Given a prediction h_j of g_j, only the rest has to be measured:
//!
//! ĝ_j = h_j + (1/A_j) Σ_q (c_jq − h_jᵀε_jq)·s(ε_jq).
//!
//! The mean is unchanged, since E[(h_jᵀε)·s(ε)] = h_j for every law of unit variance. The variance
//! is that of a gradient g_j − h_j.
//!
//! # How gradients are predicted
//! The prediction is linear in the error signals r_j of the model's output: h_j = γ·r_jᵀW. For a
//! classifier r_j = softmax(logits_j) − onehot(label_j). W is learned, as the ridge regression of
//! the estimated gradients on the signals of recent steps. Backpropagation computes such feedback
//! exactly, and direct feedback alignment (Nøkland 2016, arXiv 1609.01596) draws it at random.
//!
//! The gain γ ∈ [0, 1] of a site is the regression coefficient of the gradients on earlier
//! predictions. A prediction that explains nothing is therefore not used.
//!
//! W, γ and r_j are fixed before the noise of a step is drawn. The estimate is therefore as
//! unbiased with the control variate as without it, and no derivative of the model or the loss is
//! taken.
//!
//! FLOPS (arXiv 2410.05966) has no control variate but the clean loss; this is an addition.

use burn::prelude::*;
use serde::{Deserialize, Serialize};

use crate::linalg::{cholesky, solve};
use crate::names::named_enum;
use crate::ops;

/// Weight of a step in the regression, for a window of 50 steps.
const RATE: f64 = 0.02;
/// Ridge of the regression, in units of the signals' mean variance.
const RIDGE: f64 = 0.1;
/// Factor per step on the sums behind the gain, for a window of 20 steps.
const GAIN_DECAY: f64 = 0.95;
/// Largest number of perturbed coordinates of a row at a site with predictions. It bounds their
/// memory.
const MAX_COORDINATES: usize = 4096;
/// Largest number of signals that gradients are predicted from.
const MAX_SIGNALS: usize = 128;

/// The control variate that is subtracted from the queries' losses, besides the clean loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum ControlVariate {
    /// The clean loss alone.
    None,
    /// The [learned prediction](self) of the gradients.
    ///
    /// It needs the activation space. Sites with more than 4,096 perturbed coordinates per row go
    /// without.
    Prediction,
}

named_enum! { ControlVariate: "control variate" { None => "none", Prediction => "prediction" } }

/// The signals of a batch, and the gradients that they predict at each site.
#[derive(Clone, Debug)]
pub struct Prediction {
    /// r_j, `[batch, signals]`.
    signals: Vec<f64>,
    /// The number of signals.
    dim: usize,
    sites: Vec<Option<SitePrediction>>,
    /// By site, which tokens are real, `[batch, tokens]`; all where there is no entry.
    masks: Vec<(usize, Vec<bool>)>,
}

/// The predicted gradients at one site.
#[derive(Clone, Debug)]
struct SitePrediction {
    /// γ.
    gain: f64,
    /// r_jᵀW, `[batch, coordinates]`.
    gradients: Vec<f32>,
}

impl Prediction {
    /// The part of a row's loss to subtract: the predicted effect of its perturbation σε.
    ///
    /// `position` is the row's place in the batch. The row has `len` coordinates, and
    /// `perturbation` holds σε of those from `start` on. The result is their part of h_jᵀ(σε).
    pub(crate) fn subtract(&self, site: usize, position: usize, len: usize, start: usize, perturbation: &[f32]) -> f64 {
        let Some(Some(predicted)) = self.sites.get(site) else { return 0.0 };
        let start = position * len + start;
        predicted.gain * ops::dot(perturbation, &predicted.gradients[start..start + perturbation.len()])
    }

    /// Keeps predictions and observations at a site off masked tokens.
    ///
    /// # Shapes
    /// - mask: `[batch, tokens]`, true at a real token
    pub(crate) fn mask(&mut self, site: usize, mask: Vec<bool>) {
        if let Some(Some(predicted)) = self.sites.get_mut(site) {
            zero_masked(&mut predicted.gradients, &mask);
        }
        self.masks.push((site, mask));
    }

    /// Whether a site with `len` coordinates per row takes part.
    ///
    /// If so, the host must see its noise and its gradients.
    pub(crate) fn looks_at(&self, len: usize) -> bool {
        (1..=MAX_COORDINATES).contains(&len)
    }

    /// Adds the prediction h_j, times the weight of example j, to what the queries measured of its
    /// gradient.
    ///
    /// Returns what the sums show of the regression, or none if the site does not take part.
    ///
    /// # Shapes
    /// - positions: `[examples]`, their places in the batch
    /// - weights: `[examples]`, 1/B, or 0 if none of the example's queries survived
    /// - gradients: `[examples, coordinates]`
    pub(crate) fn add_back(
        &self,
        site: usize,
        positions: &[usize],
        weights: &[f64],
        gradients: &mut [f32],
    ) -> Option<SiteObservation> {
        let len = gradients.len() / positions.len().max(1);
        if !self.looks_at(len) {
            return None;
        }
        let predicted = self.sites.get(site).and_then(Option::as_ref);
        let mask = self.masks.iter().find(|(of, _)| *of == site);
        let mut seen = SiteObservation { cross: vec![0.0; self.dim * len], along: 0.0, squared: 0.0 };
        for ((&j, &weight), gradient) in positions.iter().zip(weights).zip(gradients.chunks_exact_mut(len)) {
            if weight == 0.0 {
                continue;
            }
            if let Some((_, mask)) = mask {
                let tokens = mask.len() / (self.signals.len() / self.dim.max(1)).max(1);
                zero_masked(gradient, &mask[j * tokens..(j + 1) * tokens]);
            }
            if let Some(predicted) = predicted {
                let h = &predicted.gradients[j * len..(j + 1) * len];
                let scale = (weight * predicted.gain) as f32;
                gradient.iter_mut().zip(h).for_each(|(g, h)| *g += scale * h);
                seen.along += ops::dot(gradient, h) / weight;
                seen.squared += ops::dot(h, h);
            }
            let signals = &self.signals[j * self.dim..(j + 1) * self.dim];
            for (row, &r) in seen.cross.chunks_exact_mut(len).zip(signals) {
                let r = (r / weight) as f32;
                row.iter_mut().zip(&*gradient).for_each(|(c, g)| *c += r * g);
            }
        }
        Some(seen)
    }

    /// The observation of a step, with the signals of these examples and no site yet.
    pub(crate) fn observe(&self, positions: &[usize], weights: &[f64]) -> Observation {
        let mut covariance = vec![0.0; self.dim * self.dim];
        for (&j, _) in positions.iter().zip(weights).filter(|(_, w)| **w != 0.0) {
            let r = &self.signals[j * self.dim..(j + 1) * self.dim];
            for (row, a) in covariance.chunks_exact_mut(self.dim).zip(r) {
                row.iter_mut().zip(r).for_each(|(c, b)| *c += a * b);
            }
        }
        let examples = weights.iter().filter(|w| **w != 0.0).count() as f64;
        Observation { dim: self.dim, examples, covariance, sites: vec![] }
    }
}

/// Sets the values of masked tokens to 0; `mask` has an entry for each token of `values`.
fn zero_masked(values: &mut [f32], mask: &[bool]) {
    let width = values.len() / mask.len().max(1);
    values.chunks_exact_mut(width.max(1)).zip(mask).filter(|(_, real)| !**real).for_each(|(token, _)| token.fill(0.0));
}

/// What a step adds to the regression: sums over the examples whose queries survived.
#[derive(Clone, Debug)]
pub struct Observation {
    dim: usize,
    /// The number of examples.
    examples: f64,
    /// Σ r_j r_jᵀ, `[signals, signals]`.
    covariance: Vec<f64>,
    pub(crate) sites: Vec<Option<SiteObservation>>,
}

/// What a step adds to the regression of one site.
#[derive(Clone, Debug)]
pub(crate) struct SiteObservation {
    /// Σ r_j ĝ_jᵀ, `[signals, coordinates]`.
    cross: Vec<f32>,
    /// Σ h_jᵀĝ_j, with h_j before its gain.
    along: f64,
    /// Σ ‖h_j‖², with h_j before its gain.
    squared: f64,
}

impl Observation {
    /// Adds the observation of other examples.
    pub(crate) fn merge(&mut self, other: Self) {
        self.examples += other.examples;
        self.covariance.iter_mut().zip(other.covariance).for_each(|(a, b)| *a += b);
        for (mine, theirs) in self.sites.iter_mut().zip(other.sites) {
            if let (Some(mine), Some(theirs)) = (mine, theirs) {
                mine.cross.iter_mut().zip(theirs.cross).for_each(|(a, b)| *a += b);
                mine.along += theirs.along;
                mine.squared += theirs.squared;
            }
        }
    }

    fn is_finite(&self) -> bool {
        self.covariance.iter().all(|c| c.is_finite())
            && self.sites.iter().flatten().all(|s| s.along.is_finite() && s.cross.iter().all(|c| c.is_finite()))
    }
}

/// The running regression that predicts gradients, part of the learner's checkpoint.
///
/// Memory: 4 bytes for each pair of a signal and a perturbed coordinate of a row. That is 46 kB for
/// the class token's path through the last block, the final norm and the head of a ViT. Its width
/// is 128 here, with 10 classes.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct GradientPredictor {
    /// The number of signals.
    dim: usize,
    /// Mean of r rᵀ over the window, `[signals, signals]`.
    covariance: Vec<f64>,
    sites: Vec<Option<SiteRegression>>,
}

/// The running regression of one site.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct SiteRegression {
    /// Mean of r ĝᵀ over the window, `[signals, coordinates]`.
    cross: Vec<f32>,
    /// Σ hᵀĝ over the window of the gain.
    along: f64,
    /// Σ ‖h‖² over the window of the gain.
    squared: f64,
}

impl GradientPredictor {
    /// Predicts the gradients of a batch from its signals.
    ///
    /// Returns `None` if there are no signals, more than 128, or any that is not finite.
    ///
    /// # Shapes
    /// - signals: `[batch, signals]`
    pub fn predict<B: Backend>(&self, signals: Tensor<B, 2>) -> Option<Prediction> {
        let [_, dim] = signals.dims();
        let signals: Vec<f64> = signals.into_data().iter::<f64>().collect();
        if !(1..=MAX_SIGNALS).contains(&dim) || signals.iter().any(|r| !r.is_finite()) {
            return None;
        }
        let trace: f64 = self.covariance.iter().step_by(self.dim + 1).sum();
        let mean = trace / dim as f64;
        if dim != self.dim || mean <= f64::MIN_POSITIVE {
            return Some(Prediction { signals, dim, sites: vec![], masks: vec![] });
        }
        // (C/c̄ + ridge)⁻¹ r/c̄: the signals' mean variance c̄ falls with the loss, by many orders
        // of magnitude
        let mut factor: Vec<f64> = self.covariance.iter().map(|c| c / mean).collect();
        factor.iter_mut().step_by(dim + 1).for_each(|c| *c += RIDGE);
        cholesky(&mut factor, dim, 0.1 * RIDGE);
        let mut coefficients: Vec<f64> = signals.iter().map(|r| r / mean).collect();
        coefficients.chunks_exact_mut(dim).for_each(|row| solve(&factor, row));
        let site = |site: &SiteRegression| {
            let gain = if site.squared > 0.0 { (site.along / site.squared).clamp(0.0, 1.0) } else { 0.0 };
            let len = site.cross.len() / dim;
            let mut gradients = vec![0f32; coefficients.len() / dim * len];
            for (h, a) in gradients.chunks_exact_mut(len.max(1)).zip(coefficients.chunks_exact(dim)) {
                for (cross, &a) in site.cross.chunks_exact(len.max(1)).zip(a) {
                    h.iter_mut().zip(cross).for_each(|(h, c)| *h += a as f32 * c);
                }
            }
            gradients.iter().all(|h| h.is_finite()).then_some(SitePrediction { gain, gradients })
        };
        let sites = self.sites.iter().map(|s| s.as_ref().and_then(site)).collect();
        Some(Prediction { signals, dim, sites, masks: vec![] })
    }

    /// Adds the observation of a step. One that is not finite is skipped.
    pub fn observe(&mut self, seen: Observation) {
        if seen.examples == 0.0 || !seen.is_finite() {
            return;
        }
        let old: Vec<_> = self.sites.iter().map(|s| s.as_ref().map(|s| s.cross.len())).collect();
        let new: Vec<_> = seen.sites.iter().map(|s| s.as_ref().map(|s| s.cross.len())).collect();
        if self.dim != seen.dim || old != new {
            let sites =
                new.iter().map(|len| len.map(|len| SiteRegression { cross: vec![0.0; len], along: 0.0, squared: 0.0 }));
            *self = Self { dim: seen.dim, covariance: vec![0.0; seen.dim * seen.dim], sites: sites.collect() };
        }
        let share = RATE / seen.examples;
        self.covariance.iter_mut().zip(&seen.covariance).for_each(|(c, s)| *c = (1.0 - RATE) * *c + share * s);
        for (kept, seen) in self.sites.iter_mut().zip(seen.sites) {
            if let (Some(kept), Some(seen)) = (kept, seen) {
                let (keep, share) = ((1.0 - RATE) as f32, share as f32);
                kept.cross.iter_mut().zip(&seen.cross).for_each(|(c, s)| *c = keep * *c + share * s);
                kept.along = GAIN_DECAY * kept.along + seen.along;
                kept.squared = GAIN_DECAY * kept.squared + seen.squared;
            }
        }
    }
}

#[cfg(test)]
impl Prediction {
    /// A prediction with given gain and gradients, `[batch, coordinates]`, at each site.
    pub(crate) fn fixed(signals: Vec<f64>, dim: usize, sites: Vec<(f64, Vec<f32>)>) -> Self {
        let sites = sites.into_iter().map(|(gain, gradients)| Some(SitePrediction { gain, gradients })).collect();
        Self { signals, dim, sites, masks: vec![] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::backend::Flex;
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    const EXAMPLES: usize = 40;
    const DIM: usize = 3;
    const LEN: usize = 5;

    fn uniform(n: usize, rng: &mut StdRng) -> Vec<f64> {
        (0..n).map(|_| rng.random_range(-1.0..1.0)).collect()
    }

    /// One site has gradients g = Wᵀr, another unrelated ones. Both are measured with noise of five
    /// times their size.
    ///
    /// From step 250 on, with 40 examples a step, less than a tenth of ‖g‖² is left at the first
    /// site. The gain of the second stays below 0.5. The seed is fixed.
    #[test]
    fn related_gradients_are_predicted_and_unrelated_ones_are_not() {
        let mut rng = StdRng::seed_from_u64(1);
        let truth = uniform(DIM * LEN, &mut rng);
        let (mut predictor, mut left, mut total, mut gain) = (GradientPredictor::default(), 0.0, 0.0, 1.0);
        for step in 0..300 {
            let signals = uniform(EXAMPLES * DIM, &mut rng);
            let tensor =
                Tensor::<Flex, 2>::from_data(TensorData::new(signals.clone(), [EXAMPLES, DIM]), &Default::default());
            let prediction = predictor.predict(tensor).unwrap();
            let positions: Vec<usize> = (0..EXAMPLES).collect();
            let shares = vec![1.0 / EXAMPLES as f64; EXAMPLES];
            let mut seen = prediction.observe(&positions, &shares);
            let exact = |j: usize, k: usize| (0..DIM).map(|f| signals[j * DIM + f] * truth[f * LEN + k]).sum::<f64>();
            let zeros = vec![0f32; EXAMPLES * LEN];
            let mut predicted = zeros.clone();
            prediction.add_back(0, &positions, &shares, &mut predicted);
            for site in 0..2 {
                // the queries measure the truth less the prediction, with noise
                let mut known = zeros.clone();
                prediction.add_back(site, &positions, &shares, &mut known);
                let mut measured: Vec<f32> = (0..EXAMPLES * LEN)
                    .map(|i| {
                        let truth = if site == 0 { exact(i / LEN, i % LEN) } else { rng.random_range(-1.0..1.0) };
                        (truth / EXAMPLES as f64) as f32 - known[i] + rng.random_range(-5.0..5.0f32) / EXAMPLES as f32
                    })
                    .collect();
                seen.sites.push(prediction.add_back(site, &positions, &shares, &mut measured));
            }
            if step >= 250 {
                for (i, h) in predicted.iter().enumerate() {
                    let g = exact(i / LEN, i % LEN);
                    left += (g - f64::from(h * EXAMPLES as f32)).powi(2);
                    total += g * g;
                }
                gain = prediction.sites[1].as_ref().unwrap().gain;
            }
            predictor.observe(seen);
        }
        assert!(left < 0.1 * total, "{left} of {total}");
        assert!(gain < 0.5, "unrelated gradients are predicted with gain {gain}");
    }

    #[test]
    fn values_that_are_not_finite_and_wide_outputs_are_skipped() {
        let device = Default::default();
        let mut predictor = GradientPredictor::default();
        let signals = Tensor::<Flex, 2>::from_data([[1.0f32, -1.0]], &device);
        let prediction = predictor.predict(signals.clone()).unwrap();
        for value in [f32::NAN, 1.0] {
            let mut seen = prediction.observe(&[0], &[1.0]);
            seen.sites.push(prediction.add_back(0, &[0], &[1.0], &mut [value; 4]));
            predictor.observe(seen);
            assert_eq!(predictor.sites.is_empty(), value.is_nan());
        }
        let nothing = prediction.observe(&[0], &[0.0]);
        predictor.observe(nothing);
        assert!(predictor.predict(signals.mul_scalar(f32::NAN)).is_none());
        assert!(predictor.predict(Tensor::<Flex, 2>::zeros([1, MAX_SIGNALS + 1], &device)).is_none());
        assert!(prediction.add_back(0, &[0], &[1.0], &mut [0.0; MAX_COORDINATES + 1]).is_none());
    }
}
