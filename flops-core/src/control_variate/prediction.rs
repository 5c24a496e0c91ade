//! The gradients that a step predicts, and what they take from losses and add to estimates.

use super::observation::{Observation, SiteObservation};
use crate::ops;
use crate::probe::{SiteKey, TracedSite};

/// Largest number of perturbed coordinates of a row at a site with predictions. It bounds their
/// memory.
const MAX_COORDINATES: usize = 4096;

/// The signals of a batch, and the gradients that they predict at each site.
#[derive(Clone, Debug)]
pub struct Prediction {
    /// r_j, `[batch, signals]`.
    signals: Vec<f64>,
    /// The number of signals.
    dim: usize,
    /// The sites of the step, in order.
    sites: Vec<PredictedSite>,
}

/// A site of the step, with the gradients predicted there, if any.
#[derive(Clone, Debug)]
struct PredictedSite {
    key: SiteKey,
    /// Values of a row.
    coordinates: usize,
    predicted: Option<SitePrediction>,
    /// Which tokens are real, `[batch, tokens]`; `None` for all.
    mask: Option<Vec<bool>>,
}

/// The predicted gradients at one site.
#[derive(Clone, Debug)]
pub(super) struct SitePrediction {
    /// γ.
    pub gain: f64,
    /// r_jᵀW, `[batch, coordinates]`.
    pub gradients: Vec<f32>,
}

impl Prediction {
    /// The prediction of a batch with these signals, at the sites of its step.
    ///
    /// # Shapes
    /// - signals: `[batch, dim]`
    pub(super) fn new(
        signals: Vec<f64>,
        dim: usize,
        sites: &[TracedSite],
        predict: impl Fn(&TracedSite) -> Option<SitePrediction>,
    ) -> Self {
        let site = |site: &TracedSite| PredictedSite {
            key: site.key,
            coordinates: site.coordinates,
            predicted: takes_part(site.coordinates).then(|| predict(site)).flatten(),
            mask: None,
        };
        Self { signals, dim, sites: sites.iter().map(site).collect() }
    }

    /// What is predicted at a site whose rows have `len` coordinates.
    fn at(&self, site: usize, len: usize) -> Option<&SitePrediction> {
        self.sites.get(site).filter(|site| site.coordinates == len)?.predicted.as_ref()
    }

    /// The part of a row's loss to subtract: the predicted effect of its perturbation σε.
    ///
    /// `position` is the row's place in the batch. The row has `len` coordinates, and
    /// `perturbation` holds σε of those from `start` on. The result is their part of h_jᵀ(σε).
    pub(crate) fn subtract(&self, site: usize, position: usize, len: usize, start: usize, perturbation: &[f32]) -> f64 {
        let Some(predicted) = self.at(site, len) else { return 0.0 };
        let start = position * len + start;
        predicted.gain * ops::dot(perturbation, &predicted.gradients[start..start + perturbation.len()])
    }

    /// Keeps predictions and observations at a site off masked tokens.
    ///
    /// # Shapes
    /// - mask: `[batch, tokens]`, true at a real token
    pub(crate) fn mask(&mut self, site: usize, mask: Vec<bool>) {
        let Some(site) = self.sites.get_mut(site) else { return };
        if let Some(predicted) = &mut site.predicted {
            zero_masked(&mut predicted.gradients, &mask);
        }
        site.mask = Some(mask);
    }

    /// Whether a site with `len` coordinates per row takes part.
    ///
    /// If so, the host must see its noise and its gradients.
    pub(crate) fn looks_at(&self, len: usize) -> bool {
        takes_part(len)
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
        let &PredictedSite { key, ref mask, .. } = self.sites.get(site).filter(|_| takes_part(len))?;
        let predicted = self.at(site, len);
        let mut seen = SiteObservation {
            key,
            examples: 0.0,
            squares: 0.0,
            cross: vec![0.0; self.dim * len],
            along: 0.0,
            squared: 0.0,
        };
        for ((&j, &weight), gradient) in positions.iter().zip(weights).zip(gradients.chunks_exact_mut(len)) {
            if weight == 0.0 {
                continue;
            }
            if let Some(mask) = mask {
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
            let signals = self.signals_of(j);
            seen.examples += 1.0;
            seen.squares += squared_norm(signals);
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
        let (mut examples, mut squares) = (0.0, 0.0);
        for (&j, _) in positions.iter().zip(weights).filter(|(_, w)| **w != 0.0) {
            let r = self.signals_of(j);
            examples += 1.0;
            squares += squared_norm(r);
            for (row, a) in covariance.chunks_exact_mut(self.dim).zip(r) {
                row.iter_mut().zip(r).for_each(|(c, b)| *c += a * b);
            }
        }
        Observation { dim: self.dim, examples, covariance, squares, sites: vec![] }
    }

    /// r_j.
    fn signals_of(&self, j: usize) -> &[f64] {
        &self.signals[j * self.dim..(j + 1) * self.dim]
    }
}

/// Sets the values of masked tokens to 0; `mask` has an entry for each token of `values`.
fn zero_masked(values: &mut [f32], mask: &[bool]) {
    let width = values.len() / mask.len().max(1);
    values.chunks_exact_mut(width.max(1)).zip(mask).filter(|(_, real)| !**real).for_each(|(token, _)| token.fill(0.0));
}

fn takes_part(coordinates: usize) -> bool {
    (1..=MAX_COORDINATES).contains(&coordinates)
}

fn squared_norm(r: &[f64]) -> f64 {
    r.iter().map(|r| r * r).sum()
}

#[cfg(test)]
impl Prediction {
    /// A prediction with given gain and gradients, `[batch, coordinates]`, at each site.
    pub(crate) fn fixed(signals: Vec<f64>, dim: usize, sites: Vec<(f64, Vec<f32>)>) -> Self {
        let batch = signals.len() / dim;
        let site = |(i, (gain, gradients)): (usize, (f64, Vec<f32>))| {
            let TracedSite { key, coordinates, .. } = TracedSite::fake(i as u64, gradients.len() / batch);
            PredictedSite { key, coordinates, predicted: Some(SitePrediction { gain, gradients }), mask: None }
        };
        Self { signals, dim, sites: sites.into_iter().enumerate().map(site).collect() }
    }

    /// The gradients predicted at a site before their gain, if any.
    pub(crate) fn gradients(&self, site: usize) -> Option<&[f32]> {
        self.sites[site].predicted.as_ref().map(|p| &p.gradients[..])
    }

    /// γ of a site with a prediction.
    pub(super) fn gain(&self, site: usize) -> f64 {
        self.sites[site].predicted.as_ref().map_or(0.0, |p| p.gain)
    }
}
