//! The weights that predict gradients, learned from the answers of queries.

use std::sync::Arc;

use burn::prelude::*;
use serde::{Deserialize, Serialize};

use super::observation::{CoefficientSums, Observation, SiteObservation};
use super::prediction::{PredictedSite, Prediction};
use super::signals::{Basis, MAX_SIGNALS};
use super::{GradientEstimate, shared};
use crate::noise::Span;
use crate::ops;
use crate::probe::{SiteKey, TracedSite};

/// Queries per coordinate that the weights remember, about.
///
/// Fewer follow a model that moves faster, and average less over what differs between examples.
const MEMORY: f64 = 1.0;
/// Factor per step on the sums behind the gain, for a window of 20 steps.
const GAIN_DECAY: f64 = 0.95;
/// Largest gain.
const MAX_GAIN: f64 = 1.0;
/// Explained share from which a site's prediction is used in a shrunk estimate.
const USED_FROM: f64 = 0.3;
/// Explained share below which it is not used any more.
const USED_UNTIL: f64 = 0.2;
/// Explained share from which the residual is measured in the span of the weights.
const SPAN_FROM: f64 = 0.1;
/// Steps from one comparison of halves to the next.
const MEASURE_EVERY: u64 = 8;
/// Factor per comparison on the sums behind α, for a window of 10 comparisons.
const RESIDUAL_DECAY: f64 = 0.9;
/// α below which the residual is left out: it would add more noise to an optimizer that divides by
/// the size of the gradient than it adds direction.
const LEAST_ALPHA: f64 = 0.1;
/// Comparisons before there is an α: a single one is mostly noise.
const LEAST_PAIRS: f64 = 2.5;
/// Widths that are kept of a site, those observed last.
const WIDTHS: usize = 8;

/// The weights W of every site, part of the learner's checkpoint.
///
/// They are kept by site and by the number of its shared coordinates. A step that does not have a
/// site leaves its weights as they were. Of a site whose width changes, as with texts of several
/// lengths, the last 8 widths are kept. If the number of signals changes, all starts anew.
///
/// Memory: 4 bytes for each pair of a signal, 32 at most, and a shared coordinate of a row, for each
/// width. A site of a ViT of width 128 with 10 classes has 10 kB, where its patches are
/// [alike](crate::Probe::alike).
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct GradientPredictor {
    /// The number of signals.
    dim: usize,
    /// The principal directions of the signals, where the model has more than 32.
    basis: Option<Basis>,
    /// Observations so far.
    steps: u64,
    /// Sorted by key and width.
    sites: Vec<SiteWeights>,
}

/// What is known of one site and width.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct SiteWeights {
    key: SiteKey,
    shared: usize,
    /// W, `[signals, shared]`; clones share it, for burn-train clones the learner in every step.
    #[serde(with = "shared")]
    weights: Arc<Vec<f32>>,
    /// Of queries with noise on all coordinates, over the window of the gain.
    free: CoefficientSums,
    /// Of queries with noise in the span, over the same window.
    spanned: CoefficientSums,
    /// Whether a shrunk estimate uses the prediction.
    used: bool,
    /// Running sum of products of the residual's estimates by halves, and of what they show of V.
    product: f64,
    variance: f64,
    /// Comparisons in these sums.
    pairs: f64,
    /// Whether halves were ever to be compared.
    tried: bool,
    /// The last observation that had it.
    last: u64,
}

/// What the predictor knows of a site, for reports.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct SiteReport {
    /// Which site it is.
    pub key: SiteKey,
    /// Coordinates of a row that have weights of their own.
    pub shared_coordinates: usize,
    /// The share of the gradient's energy that the prediction explains, in [0, 1].
    pub explained: f64,
    /// γ of this step; 0 where the prediction is not used.
    pub gain: f64,
    /// The part of the residual that the estimate has, in [0, 1]: 1 in an unbiased one.
    ///
    /// It is α, or the share of the residual's energy that lies in the span.
    pub alpha: f64,
    /// Dimension of the span that the residual is measured in; `None` for all coordinates.
    pub span: Option<usize>,
}

impl GradientPredictor {
    /// Predicts the gradients of a batch from its signals, at the sites of its step.
    ///
    /// [`CleanPass::sites`](crate::estimator::CleanPass::sites) gives the sites. Without signals, or
    /// with any that is not finite, nothing is predicted; a shrunk estimate then has its α all the
    /// same. `None` where there is nothing to do at all.
    ///
    /// # Shapes
    /// - signals: `[batch, signals]`, ∂ℓ/∂o of each example
    /// - outputs: `[batch, signals]`, the o, where they are visible
    pub fn predict<B: Backend>(
        &self,
        signals: Option<Tensor<B, 2>>,
        outputs: Option<Tensor<B, 2>>,
        sites: &[TracedSite],
        estimate: GradientEstimate,
    ) -> Option<Prediction> {
        let shape = signals.as_ref().map(|signals| signals.dims());
        let outputs = outputs.filter(|outputs| Some(outputs.dims()) == shape);
        // an output of −∞, as of a masked class, has no change: losses tell instead
        let [signals, outputs] =
            ops::all_to_host([signals, outputs]).map(|read| read.filter(|values| values.iter().all(|v| v.is_finite())));
        let full = signals.as_ref().and(shape).map_or(0, |[_, full]| full);
        let many = full > MAX_SIGNALS;
        let basis = self.basis.clone().filter(|basis| many && basis.full == full);
        let next = match &signals {
            Some(signals) if many => Some(Basis::updated(basis.as_ref(), signals, full)),
            _ => None,
        };
        let dim = match &basis {
            Some(basis) => basis.len(),
            None if many => 0,
            None => full,
        };
        let along = |values: Vec<f64>| -> Vec<f32> {
            let values: Vec<f32> = values.into_iter().map(|v| v as f32).collect();
            match &basis {
                Some(basis) => values.chunks_exact(full).flat_map(|row| basis.along(row)).collect(),
                None => values,
            }
        };
        if estimate == GradientEstimate::Unbiased && full == 0 {
            return None;
        }
        let r = if dim > 0 { signals.map(along).unwrap_or_default() } else { vec![] };
        let outputs = if dim > 0 { outputs.map(along) } else { None };
        let sites = sites.iter().map(|site| self.predict_site(site, dim, estimate));
        let mut prediction = Prediction::new(r, outputs, dim, sites.collect());
        (prediction.basis, prediction.next) = (basis, next);
        Some(prediction)
    }

    /// What is known of a site at its width, by as many signals.
    fn get(&self, site: &TracedSite, dim: usize) -> Option<&SiteWeights> {
        let at = self.find(site.key, site.layout.shared()).ok()?;
        // without signals there is no prediction, but still an α
        self.sites.get(at).filter(|_| self.dim == dim || dim == 0)
    }

    fn find(&self, key: SiteKey, shared: usize) -> Result<usize, usize> {
        self.sites.binary_search_by_key(&(key, shared), |site| (site.key, site.shared))
    }

    /// What is known of the sites of a step, by its prediction.
    pub(crate) fn reports(&self, prediction: &Prediction) -> Vec<SiteReport> {
        let report = |(index, site): (usize, &PredictedSite)| {
            let (key, shared_coordinates) = (site.key, site.layout.shared());
            let at = self.find(key, shared_coordinates).ok();
            let known = at.map(|at| &self.sites[at]).filter(|_| self.dim == prediction.dim());
            let explained = known.map_or(0.0, |known| known.free.explained());
            let alpha = match (known, &site.span) {
                (Some(known), Some(_)) => known.share_in_span(site.gain),
                _ => prediction.alpha(index),
            };
            let span = site.span.as_ref().map(Span::dim);
            SiteReport { key, shared_coordinates, explained, gain: site.gain, alpha, span }
        };
        prediction.sites().iter().enumerate().map(report).collect()
    }

    fn predict_site(&self, site: &TracedSite, dim: usize, estimate: GradientEstimate) -> PredictedSite {
        let new = PredictedSite::new(site, dim);
        match (self.get(site, dim), estimate) {
            (Some(known), GradientEstimate::Unbiased) => known.predict(new, dim),
            (Some(known), GradientEstimate::Shrunk) => {
                let is_due = self.steps.is_multiple_of(MEASURE_EVERY);
                known.predict_shrunk(known.predict(new, dim), is_due)
            }
            (Some(known), GradientEstimate::Predicted) => known.predict_alone(known.predict(new, dim)),
            (None, GradientEstimate::Unbiased) => new,
            (None, GradientEstimate::Shrunk) => PredictedSite { alpha: 0.0, measures: true, ..new },
            (None, GradientEstimate::Predicted) => PredictedSite { alpha: 0.0, ..new },
        }
    }

    /// Adds the observation of a step. What is not finite is skipped.
    pub fn observe(&mut self, seen: Observation) {
        // steps that wait for the same update may have seen older directions
        let turned = match (&self.basis, &seen.basis) {
            (Some(known), Some(basis)) if known != basis && known.full == basis.full => Some(known.rotation(basis)),
            _ => None,
        };
        let dim = if turned.is_some() || seen.dim == 0 { self.dim } else { seen.dim };
        if self.dim != dim {
            *self = Self { dim, ..Self::default() };
        }
        self.steps += 1;
        for mut site in seen.sites.into_iter().filter(SiteObservation::is_finite) {
            if let Some(turned) = &turned {
                site.innovation = rotate(turned, seen.dim, &site.innovation, site.shared);
            }
            let at = self.entry(site.key, site.shared);
            self.sites[at].observe(&site, dim, self.steps);
        }
        if let Some(next) = seen.next {
            let old = self.basis.take().or(seen.basis).filter(|old| old.full == next.full);
            let rotation = old.map(|old| (next.rotation(&old), old.len()));
            for site in &mut self.sites {
                let turned = rotation.as_ref().map(|(r, old)| rotate(r, *old, &site.weights, site.shared));
                site.weights = Arc::new(turned.unwrap_or_default());
            }
            self.dim = next.len();
            self.basis = Some(next);
        }
    }

    /// Where a site lies. A new one replaces the site's oldest of too many widths.
    fn entry(&mut self, key: SiteKey, shared: usize) -> usize {
        let at = match self.find(key, shared) {
            Ok(at) => return at,
            Err(at) => at,
        };
        self.sites.insert(at, SiteWeights::new(key, shared, self.steps));
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

/// Weights along other directions: `rotation` `[new, old]` times `[old, shared]`.
fn rotate(rotation: &[f32], old: usize, weights: &[f32], shared: usize) -> Vec<f32> {
    if weights.is_empty() || old == 0 {
        return vec![];
    }
    let mut out = vec![0f32; rotation.len() / old * shared];
    for (out, row) in out.chunks_exact_mut(shared).zip(rotation.chunks_exact(old)) {
        for (weights, r) in weights.chunks_exact(shared).zip(row) {
            out.iter_mut().zip(weights).for_each(|(o, w)| *o += r * w);
        }
    }
    out
}

impl SiteWeights {
    fn new(key: SiteKey, shared: usize, last: u64) -> Self {
        let (weights, free, spanned, product, variance, pairs) = Default::default();
        Self { key, shared, weights, free, spanned, used: false, product, variance, pairs, tried: false, last }
    }

    /// R/(R + V), 0 below its least or after too few comparisons; 1 where halves could not be
    /// compared.
    fn alpha(&self) -> f64 {
        if self.pairs == 0.0 {
            return if self.tried { 1.0 } else { 0.0 };
        }
        let residual = self.product.max(0.0);
        let alpha = residual / (residual + self.variance.max(0.0)).max(f64::MIN_POSITIVE);
        if alpha < LEAST_ALPHA || self.pairs < LEAST_PAIRS { 0.0 } else { alpha }
    }

    /// The share of the residual's energy that lies in the span.
    fn share_in_span(&self, gain: f64) -> f64 {
        let all = self.free.residual(gain);
        if all > 0.0 { (self.spanned.residual(gain) / all).min(1.0) } else { 1.0 }
    }

    /// The site with the weights and the gain of an unbiased estimate.
    fn predict(&self, new: PredictedSite, dim: usize) -> PredictedSite {
        let known = new.learns && !self.weights.is_empty() && self.weights.len() == dim * self.shared;
        let CoefficientSums { along, squared, .. } = self.free.and(1.0, self.spanned);
        let gain = if known && squared > 0.0 { (along / squared).clamp(0.0, MAX_GAIN) } else { 0.0 };
        PredictedSite { weights: known.then(|| self.weights.clone()), gain, ..new }
    }

    /// The same, of a shrunk estimate. `is_due`: halves are compared in this step.
    fn predict_shrunk(&self, site: PredictedSite, is_due: bool) -> PredictedSite {
        let confined = self.free.explained() >= SPAN_FROM;
        let weights = site.weights.as_ref().filter(|_| confined);
        let span = weights.and_then(|weights| Span::of(weights, self.shared));
        let span = span.filter(|span| span.dim() < self.shared);
        let settled = self.tried && (self.pairs == 0.0 || self.pairs >= LEAST_PAIRS);
        PredictedSite { alpha: self.alpha(), span, measures: is_due || !settled, ..self.predict_alone(site) }
    }

    /// The same, without a residual; nothing where the prediction explains too little.
    fn predict_alone(&self, site: PredictedSite) -> PredictedSite {
        let gain = if self.used { site.gain } else { 0.0 };
        PredictedSite { gain, alpha: 0.0, ..site }
    }

    /// W += Σ (answer − Wε)εᵀ/(queries + n/μ), a normalised least-mean-squares step.
    fn observe(&mut self, seen: &SiteObservation, dim: usize, step: u64) {
        self.last = step;
        let queries = seen.free.queries + seen.spanned.queries;
        if queries > 0.0 {
            let weights = Arc::make_mut(&mut self.weights);
            weights.resize(dim * self.shared, 0.0);
            let rate = (1.0 / (queries + MEMORY * seen.together.max(self.shared) as f64)) as f32;
            weights.iter_mut().zip(&seen.innovation).for_each(|(w, i)| *w += rate * i);
            if !weights.iter().all(|w| w.is_finite()) {
                *self = Self::new(self.key, self.shared, step);
                return;
            }
            self.free = self.free.and(GAIN_DECAY, seen.free);
            self.spanned = self.spanned.and(GAIN_DECAY, seen.spanned);
            self.used = self.free.explained() >= if self.used { USED_UNTIL } else { USED_FROM };
        }
        self.tried |= seen.residual.tried;
        if seen.residual.pairs > 0.0 {
            let (keep, pairs) = (RESIDUAL_DECAY, seen.residual.pairs);
            self.product = keep * self.product + seen.residual.product / pairs;
            self.variance = keep * self.variance + seen.residual.variance / pairs;
            self.pairs = keep * self.pairs + 1.0;
        }
    }
}

#[cfg(test)]
impl GradientPredictor {
    /// Of each site and width: its key and its shared coordinates.
    pub(crate) fn kept(&self) -> Vec<(SiteKey, usize)> {
        self.sites.iter().map(|s| (s.key, s.shared)).collect()
    }
}
