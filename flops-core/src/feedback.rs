//! A control variate for activation noise, learned from the queries that training makes anyway.
//!
//! A query of datum j with noise ε measures g_jᵀε, g_j being the gradient with respect to a site's output. Where a prediction h_j of g_j
//! is known before the noise is drawn, measuring the rest is enough:
//!
//! ĝ_j = h_j + (1/A_j) Σ_q (c_jq − h_jᵀε_jq)·s(ε_jq),
//!
//! whose mean is the same, since E[(h_jᵀε)·s(ε)] = h_j for every law of unit variance, and whose variance is that of a gradient
//! g_j − h_j. The prediction is linear in the error of the model's output, h_j = γ·r_jᵀW with r_j = softmax(logits_j) − onehot(label_j)
//! for a classifier: the feedback that backpropagation computes exactly and that direct feedback alignment (Nøkland 2016, arXiv
//! 1609.01596) draws at random is learned here, as the ridge regression of the estimated gradients on the errors of the latest
//! steps. The gain γ ∈ [0, 1] of a site is the regression coefficient of the gradients on the predictions made for them, so a
//! prediction that explains nothing is not used. W, γ and r_j are fixed before the noise of a step is drawn: the estimate stays
//! unbiased whatever they are, and no derivative of the model or the loss is ever taken.
//!
//! The paper has no control variate but the clean loss; this is an addition to it.

use burn::prelude::*;
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::linalg::{cholesky, solve};
use crate::noise::RowKey;
use crate::ops;

/// Weight of a step in the regression: a window of 50 steps.
const RATE: f64 = 0.02;
/// Ridge of the regression, in units of the mean variance of a signal.
const RIDGE: f64 = 0.1;
/// What the sums behind the gain keep per step: a window of 20 steps.
const GAIN_DECAY: f64 = 0.95;
/// Perturbed coordinates of a row beyond which a site goes without: it bounds the memory of predictions.
const MAX_COORDINATES: usize = 4096;
/// Signals beyond which nothing is predicted.
const MAX_SIGNALS: usize = 128;

/// What is subtracted from the coefficients of queries, besides the clean loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ControlVariate {
    /// Nothing.
    None,
    /// What the [learned feedback](self) of the output's error predicts; activation space, sites of at most 4,096 coordinates.
    Feedback,
}

impl std::str::FromStr for ControlVariate {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self, Error> {
        match s {
            "none" => Ok(Self::None),
            "feedback" => Ok(Self::Feedback),
            _ => Err(Error::Unknown { what: "control variate", name: s.into(), choices: "none, feedback" }),
        }
    }
}

/// Signals of a batch and the gradients they predict at each site.
#[derive(Clone, Debug)]
pub struct Prediction {
    /// `[batch, signals]`
    signals: Vec<f64>,
    dim: usize,
    sites: Vec<Option<SitePrediction>>,
}

#[derive(Clone, Debug)]
struct SitePrediction {
    /// γ.
    gain: f64,
    /// r_jᵀW, `[batch, coordinates]`.
    gradients: Vec<f32>,
}

impl Prediction {
    /// Of a row's loss what is explained by some of the `len` numbers of its perturbation σε, those from `start` on: their part of γ·h_jᵀ(σε).
    pub(crate) fn explain(&self, site: usize, row: RowKey, len: usize, start: usize, perturbation: &[f32]) -> f64 {
        let Some(Some(predicted)) = self.sites.get(site) else { return 0.0 };
        let start = row.position as usize * len + start;
        predicted.gain * ops::dot(perturbation, &predicted.gradients[start..start + perturbation.len()])
    }

    /// Whether a site of so many coordinates a row takes part: its noise and its gradients must be seen on the host.
    pub(crate) fn looks_at(&self, len: usize) -> bool {
        (1..=MAX_COORDINATES).contains(&len)
    }

    /// Adds γ·h_j, times the weight of datum j, to what the queries measured of it, and looks at the sum.
    ///
    /// # Shapes
    /// - positions, weights: `[data]`, where the data lie in the batch and 1/B, or 0 where none of its queries survived
    /// - gradients: `[data, coordinates]`
    pub(crate) fn complete(
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
        let mut seen = SiteObservation { cross: vec![0.0; self.dim * len], along: 0.0, squared: 0.0 };
        for ((&j, &weight), gradient) in positions.iter().zip(weights).zip(gradients.chunks_exact_mut(len)) {
            if weight == 0.0 {
                continue;
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

    /// An observation of nothing yet, of the signals of these data.
    pub(crate) fn observe(&self, positions: &[usize], weights: &[f64]) -> Observation {
        let mut covariance = vec![0.0; self.dim * self.dim];
        for (&j, _) in positions.iter().zip(weights).filter(|(_, w)| **w != 0.0) {
            let r = &self.signals[j * self.dim..(j + 1) * self.dim];
            for (row, a) in covariance.chunks_exact_mut(self.dim).zip(r) {
                row.iter_mut().zip(r).for_each(|(c, b)| *c += a * b);
            }
        }
        let data = weights.iter().filter(|w| **w != 0.0).count() as f64;
        Observation { dim: self.dim, data, covariance, sites: vec![] }
    }
}

/// What the queries of a step have shown of the regression: Σ_j over the data whose queries survived.
#[derive(Clone, Debug)]
pub struct Observation {
    dim: usize,
    data: f64,
    /// Σ r_j r_jᵀ
    covariance: Vec<f64>,
    pub(crate) sites: Vec<Option<SiteObservation>>,
}

#[derive(Clone, Debug)]
pub(crate) struct SiteObservation {
    /// Σ r_j ĝ_jᵀ, `[signals, coordinates]`
    cross: Vec<f32>,
    /// Σ h_jᵀĝ_j and Σ ‖h_j‖², h_j without its gain
    along: f64,
    squared: f64,
}

impl Observation {
    /// Adds what other data have shown.
    pub(crate) fn merge(&mut self, other: Self) {
        self.data += other.data;
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

/// The running regression; part of the learner's checkpoint.
///
/// Memory: 4 bytes for each signal and perturbed coordinate of a row, 46 kB for the class token's tail of a ViT of width 128.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct FeedbackTracker {
    dim: usize,
    /// Mean of r rᵀ over the window.
    covariance: Vec<f64>,
    sites: Vec<Option<SiteFeedback>>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct SiteFeedback {
    /// Mean of r ĝᵀ over the window.
    cross: Vec<f32>,
    along: f64,
    squared: f64,
}

impl FeedbackTracker {
    /// What `signals` of a batch, `[batch, signals]`, say of its gradients; `None` where there are too many of them, or none.
    pub fn predict<B: Backend>(&self, signals: Tensor<B, 2>) -> Option<Prediction> {
        let [_, dim] = signals.dims();
        let signals: Vec<f64> = signals.into_data().iter::<f64>().collect();
        if !(1..=MAX_SIGNALS).contains(&dim) || signals.iter().any(|r| !r.is_finite()) {
            return None;
        }
        let trace: f64 = self.covariance.iter().step_by(self.dim + 1).sum();
        let mean = trace / dim as f64;
        if dim != self.dim || mean <= f64::MIN_POSITIVE {
            return Some(Prediction { signals, dim, sites: vec![] });
        }
        // (C/c̄ + ridge)⁻¹ r/c̄: the mean variance c̄ of the signals falls with the loss, by many orders
        let mut factor: Vec<f64> = self.covariance.iter().map(|c| c / mean).collect();
        factor.iter_mut().step_by(dim + 1).for_each(|c| *c += RIDGE);
        cholesky(&mut factor, dim, 0.1 * RIDGE);
        let mut coefficients: Vec<f64> = signals.iter().map(|r| r / mean).collect();
        coefficients.chunks_exact_mut(dim).for_each(|row| solve(&factor, row));
        let site = |site: &SiteFeedback| {
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
        Some(Prediction { signals, dim, sites })
    }

    /// Takes in what a step has shown; what is not finite is left out.
    pub fn observe(&mut self, seen: Observation) {
        if seen.data == 0.0 || !seen.is_finite() {
            return;
        }
        let old: Vec<_> = self.sites.iter().map(|s| s.as_ref().map(|s| s.cross.len())).collect();
        let new: Vec<_> = seen.sites.iter().map(|s| s.as_ref().map(|s| s.cross.len())).collect();
        if self.dim != seen.dim || old != new {
            let sites =
                new.iter().map(|len| len.map(|len| SiteFeedback { cross: vec![0.0; len], along: 0.0, squared: 0.0 }));
            *self = Self { dim: seen.dim, covariance: vec![0.0; seen.dim * seen.dim], sites: sites.collect() };
        }
        let share = RATE / seen.data;
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
    /// A prediction from nowhere: gain and gradients `[batch, coordinates]` of each site.
    pub(crate) fn fixed(signals: Vec<f64>, dim: usize, sites: Vec<(f64, Vec<f32>)>) -> Self {
        let sites = sites.into_iter().map(|(gain, gradients)| Some(SitePrediction { gain, gradients })).collect();
        Self { signals, dim, sites }
    }
}

#[cfg(test)]
impl Observation {
    /// Coordinates of each site.
    pub(crate) fn widths(&self) -> Vec<usize> {
        self.sites.iter().map(|s| s.as_ref().map_or(0, |s| s.cross.len() / self.dim)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::backend::Flex;
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    const DATA: usize = 40;
    const DIM: usize = 3;
    const LEN: usize = 5;

    fn uniform(n: usize, rng: &mut StdRng) -> Vec<f64> {
        (0..n).map(|_| rng.random_range(-1.0..1.0)).collect()
    }

    /// Gradients g = Wᵀr at one site and unrelated ones at another, both seen through noise of five times their size: after 300
    /// steps of 40 data the first is predicted to a tenth of its energy or better, and the second is left alone. A fixed seed.
    #[test]
    fn what_can_be_predicted_is_and_nothing_else() {
        let mut rng = StdRng::seed_from_u64(1);
        let truth = uniform(DIM * LEN, &mut rng);
        let (mut tracker, mut left, mut energy, mut gain) = (FeedbackTracker::default(), 0.0, 0.0, 1.0);
        for step in 0..300 {
            let signals = uniform(DATA * DIM, &mut rng);
            let tensor =
                Tensor::<Flex, 2>::from_data(TensorData::new(signals.clone(), [DATA, DIM]), &Default::default());
            let prediction = tracker.predict(tensor).unwrap();
            let positions: Vec<usize> = (0..DATA).collect();
            let shares = vec![1.0 / DATA as f64; DATA];
            let mut seen = prediction.observe(&positions, &shares);
            let exact = |j: usize, k: usize| (0..DIM).map(|f| signals[j * DIM + f] * truth[f * LEN + k]).sum::<f64>();
            let zeros = vec![0f32; DATA * LEN];
            let mut predicted = zeros.clone();
            prediction.complete(0, &positions, &shares, &mut predicted);
            for site in 0..2 {
                // what the queries leave: the truth less the prediction, and noise
                let mut known = zeros.clone();
                prediction.complete(site, &positions, &shares, &mut known);
                let mut measured: Vec<f32> = (0..DATA * LEN)
                    .map(|i| {
                        let truth = if site == 0 { exact(i / LEN, i % LEN) } else { rng.random_range(-1.0..1.0) };
                        (truth / DATA as f64) as f32 - known[i] + rng.random_range(-5.0..5.0f32) / DATA as f32
                    })
                    .collect();
                seen.sites.push(prediction.complete(site, &positions, &shares, &mut measured));
            }
            if step >= 250 {
                for (i, h) in predicted.iter().enumerate() {
                    let g = exact(i / LEN, i % LEN);
                    left += (g - f64::from(h * DATA as f32)).powi(2);
                    energy += g * g;
                }
                gain = prediction.sites[1].as_ref().unwrap().gain;
            }
            tracker.observe(seen);
        }
        assert!(left < 0.1 * energy, "{left} of {energy}");
        assert!(gain < 0.5, "unrelated gradients are predicted with gain {gain}");
    }

    #[test]
    fn broken_numbers_and_wide_outputs_are_left_out() {
        let device = Default::default();
        let mut tracker = FeedbackTracker::default();
        let signals = Tensor::<Flex, 2>::from_data([[1.0f32, -1.0]], &device);
        let prediction = tracker.predict(signals.clone()).unwrap();
        for value in [f32::NAN, 1.0] {
            let mut seen = prediction.observe(&[0], &[1.0]);
            seen.sites.push(prediction.complete(0, &[0], &[1.0], &mut [value; 4]));
            tracker.observe(seen);
            assert_eq!(tracker.sites.is_empty(), value.is_nan());
        }
        let nothing = prediction.observe(&[0], &[0.0]);
        tracker.observe(nothing);
        assert!(tracker.predict(signals.mul_scalar(f32::NAN)).is_none());
        assert!(tracker.predict(Tensor::<Flex, 2>::zeros([1, MAX_SIGNALS + 1], &device)).is_none());
        assert!(prediction.complete(0, &[0], &[1.0], &mut [0.0; MAX_COORDINATES + 1]).is_none());
    }
}
