//! The running regression that predicts gradients.

use std::sync::Arc;

use burn::prelude::*;
use serde::{Deserialize, Serialize};

use super::observation::{Observation, SiteObservation};
use super::prediction::{Prediction, SitePrediction};
use crate::linalg::{cholesky, solve};
use crate::probe::{SiteKey, TracedSite};

/// Weight of a step in the regression, for a window of 50 steps.
const RATE: f64 = 0.02;
/// Ridge of the regression, in units of the signals' mean variance.
const RIDGE: f64 = 0.1;
/// Factor per step on the sums behind the gain, for a window of 20 steps.
const GAIN_DECAY: f64 = 0.95;
/// Largest number of signals that gradients are predicted from.
const MAX_SIGNALS: usize = 128;
/// Widths that are kept of a site, those observed last.
const WIDTHS: usize = 8;

/// The running regression that predicts gradients, part of the learner's checkpoint.
///
/// Regressions are kept by site and width. A step that does not have a site leaves its regression
/// as it was. Of a site whose width changes, as with texts of several lengths, the last 8 widths
/// are kept. If the number of signals changes, all starts anew.
///
/// The covariance of the signals is the mean over all steps, and the cross moments of a site are
/// the mean over the steps that had it. The signals shrink with the loss, so the two may differ in
/// scale. The covariance is therefore scaled to the mean square of the signals of the site's own
/// steps. For a site that every step has, that factor is 1.
///
/// Memory: 4 bytes for each pair of a signal and a perturbed coordinate of a row, for each width.
/// That is 46 kB for the class token's path through the last block, the final norm and the head of
/// a ViT. Its width is 128 here, with 10 classes.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct GradientPredictor {
    /// The number of signals.
    dim: usize,
    /// Mean of r rᵀ over the window, `[signals, signals]`.
    covariance: Vec<f64>,
    /// Mean of ‖r‖² over the window.
    squares: f64,
    /// Observations so far.
    steps: u64,
    /// Sorted by key and width.
    sites: Vec<SiteRegression>,
}

/// The running regression of one site and width.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct SiteRegression {
    key: SiteKey,
    /// Mean of r ĝᵀ over the window of this site, `[signals, coordinates]`.
    ///
    /// Clones share it, for burn-train clones the learner in every step.
    #[serde(with = "shared")]
    cross: Arc<Vec<f32>>,
    /// Mean of ‖r‖² over the same window.
    squares: f64,
    /// Σ hᵀĝ over the window of the gain.
    along: f64,
    /// Σ ‖h‖² over the window of the gain.
    squared: f64,
    /// The last observation that had it.
    last: u64,
}

/// A shared vector in a record: its values.
mod shared {
    use std::sync::Arc;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub fn serialize<S: Serializer>(values: &Arc<Vec<f32>>, serializer: S) -> Result<S::Ok, S::Error> {
        values.as_slice().serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Arc<Vec<f32>>, D::Error> {
        Vec::deserialize(deserializer).map(Arc::new)
    }
}

impl GradientPredictor {
    /// Predicts the gradients of a batch from its signals, at the sites of its step.
    ///
    /// [`CleanPass::sites`](crate::estimator::CleanPass::sites) gives the sites. One that was not
    /// observed at its present width has no prediction. Returns `None` if there are no signals,
    /// more than 128, or any that is not finite.
    ///
    /// # Shapes
    /// - signals: `[batch, signals]`
    pub fn predict<B: Backend>(&self, signals: Tensor<B, 2>, sites: &[TracedSite]) -> Option<Prediction> {
        let [_, dim] = signals.dims();
        let signals: Vec<f64> = signals.into_data().iter::<f64>().collect();
        if !(1..=MAX_SIGNALS).contains(&dim) || signals.iter().any(|r| !r.is_finite()) {
            return None;
        }
        let trace: f64 = self.covariance.iter().step_by(self.dim + 1).sum();
        let mean = trace / dim as f64;
        if dim != self.dim || mean <= f64::MIN_POSITIVE {
            return Some(Prediction::new(signals, dim, sites, |_| None));
        }
        let coefficients = self.coefficients(&signals, mean);
        let predict = |site: &TracedSite| {
            let kept = self.sites.get(self.find(site.key, dim * site.coordinates).ok()?)?;
            kept.predict(&coefficients, dim, self.squares)
        };
        Some(Prediction::new(signals, dim, sites, predict))
    }

    /// (C/c̄ + ridge)⁻¹ r/c̄ of each example.
    ///
    /// The signals' mean variance c̄ falls with the loss, by many orders of magnitude.
    fn coefficients(&self, signals: &[f64], mean: f64) -> Vec<f64> {
        let mut factor: Vec<f64> = self.covariance.iter().map(|c| c / mean).collect();
        factor.iter_mut().step_by(self.dim + 1).for_each(|c| *c += RIDGE);
        cholesky(&mut factor, self.dim, 0.1 * RIDGE);
        let mut coefficients: Vec<f64> = signals.iter().map(|r| r / mean).collect();
        coefficients.chunks_exact_mut(self.dim).for_each(|row| solve(&factor, row));
        coefficients
    }

    /// Where the regression of a site with this many cross moments lies, or belongs.
    fn find(&self, key: SiteKey, moments: usize) -> Result<usize, usize> {
        self.sites.binary_search_by_key(&(key, moments), |site| (site.key, site.cross.len()))
    }

    /// Adds the observation of a step. One that is not finite is skipped.
    pub fn observe(&mut self, seen: Observation) {
        if seen.examples == 0.0 || !seen.is_finite() {
            return;
        }
        if self.dim != seen.dim {
            *self = Self { dim: seen.dim, covariance: vec![0.0; seen.dim * seen.dim], ..Self::default() };
        }
        self.steps += 1;
        let share = RATE / seen.examples;
        self.covariance.iter_mut().zip(&seen.covariance).for_each(|(c, s)| *c = (1.0 - RATE) * *c + share * s);
        self.squares = (1.0 - RATE) * self.squares + share * seen.squares;
        for site in seen.sites.iter().filter(|site| site.examples > 0.0) {
            let at = self.entry(site.key, site.cross.len());
            self.sites[at].observe(site, self.steps);
        }
    }

    /// Where the regression of a site lies. A new one replaces the site's oldest of too many.
    fn entry(&mut self, key: SiteKey, moments: usize) -> usize {
        let at = match self.find(key, moments) {
            Ok(at) => return at,
            Err(at) => at,
        };
        self.sites.insert(at, SiteRegression::new(key, moments, self.steps));
        let others = self.sites.iter().enumerate().filter(|(i, site)| *i != at && site.key == key);
        let (count, oldest) = (others.clone().count(), others.min_by_key(|(_, site)| site.last));
        match oldest.map(|(oldest, _)| oldest) {
            Some(oldest) if count >= WIDTHS => {
                self.sites.remove(oldest);
                at - usize::from(oldest < at)
            }
            _ => at,
        }
    }
}

impl SiteRegression {
    fn new(key: SiteKey, moments: usize, last: u64) -> Self {
        Self { key, cross: Arc::new(vec![0.0; moments]), squares: 0.0, along: 0.0, squared: 0.0, last }
    }

    /// The gradients that the coefficients of a batch predict; `squares` is the mean ‖r‖² of all
    /// steps.
    fn predict(&self, coefficients: &[f64], dim: usize, squares: f64) -> Option<SitePrediction> {
        if self.squares <= f64::MIN_POSITIVE {
            return None;
        }
        let (len, scale) = ((self.cross.len() / dim).max(1), squares / self.squares);
        let gain = if self.squared > 0.0 { (self.along / self.squared).clamp(0.0, 1.0) } else { 0.0 };
        let mut gradients = vec![0f32; coefficients.len() / dim * len];
        for (h, a) in gradients.chunks_exact_mut(len).zip(coefficients.chunks_exact(dim)) {
            for (cross, a) in self.cross.chunks_exact(len).zip(a) {
                let a = (scale * a) as f32;
                h.iter_mut().zip(cross).for_each(|(h, c)| *h += a * c);
            }
        }
        gradients.iter().all(|h| h.is_finite()).then_some(SitePrediction { gain, gradients })
    }

    fn observe(&mut self, seen: &SiteObservation, step: u64) {
        let share = RATE / seen.examples;
        self.squares = (1.0 - RATE) * self.squares + share * seen.squares;
        let (keep, share) = ((1.0 - RATE) as f32, share as f32);
        Arc::make_mut(&mut self.cross).iter_mut().zip(&seen.cross).for_each(|(c, s)| *c = keep * *c + share * s);
        self.along = GAIN_DECAY * self.along + seen.along;
        self.squared = GAIN_DECAY * self.squared + seen.squared;
        self.last = step;
    }
}

#[cfg(test)]
impl GradientPredictor {
    /// Of each site and width: its coordinates, and whether every step has had it.
    pub(crate) fn kept(&self) -> Vec<(SiteKey, usize, bool)> {
        self.sites.iter().map(|s| (s.key, s.cross.len() / self.dim, s.squares == self.squares)).collect()
    }
}
