//! Noise on the outputs of the trained layers (likelihood ratio; Peters and Schaal 2008, Jiang et
//! al. 2023).
//!
//! For y = xW + b and z = y + σε, E[ℓ(z)·s(ε)]/σ is the gradient of the smoothed loss with respect
//! to y. So xᵀ(c·s(ε)) estimates the gradient for W, and c·s(ε) that for b. The input x is the
//! clean one. Layers before this one are perturbed too, which moves x by O(σ), and the mean of the
//! estimate by O(σ²).

use burn::prelude::*;

use super::context::{EstimateContext, SpaceGradients};
use super::per_query::{self, Job, JobGradients};
use super::query_weights::WeightedQueries;
use crate::control_variate::{Prediction, ResidualMoments, SiteObservation};
use crate::error::Error;
use crate::model::ForwardModel;
use crate::noise::NoiseSource;
use crate::ops;
use crate::probe::{Gradients, Recorded};

/// What the queries of each example showed beside their weights.
pub(super) struct Shown {
    /// What they show beyond the prediction, `[queries, signals]`.
    pub innovations: Vec<Vec<f32>>,
    /// (ℓ_jq − ℓ_j)/σ, with nothing subtracted.
    pub coefficients: Vec<Vec<f64>>,
}

/// Gradients, and the squared score norm of each example at each site.
pub(super) fn gradients<B: Backend, M: ForwardModel<B>>(
    p: &EstimateContext<'_, B, M>,
    weighted: &WeightedQueries,
    shown: &Shown,
) -> Result<SpaceGradients<B>, Error> {
    let (noise, prediction, max_rows) = (&p.noise, p.prediction.map(|p| &**p), p.max_rows);
    let batch = weighted.weights.len();
    let form = |job: &Job<'_>, record: &dyn Fn(&[usize]) -> Vec<Recorded<B>>| {
        let Job { positions, rows, weights, .. } = job;
        let sites = record(positions);
        let (mut gradients, mut norms) = (Gradients::default(), Vec::with_capacity(sites.len()));
        let mut observed = prediction.map(Prediction::observe);
        let mut numbers = None;
        for (index, site) in sites.iter().enumerate() {
            norms.push(site.squared_score_norm(positions.len())?);
            let (coordinates, device) = (site.coordinates, &site.device);
            let on_host = SiteJob { noise, index, site, job, prediction };
            let seen_on_host = prediction.is_some_and(|p| p.looks_at(index, coordinates));
            let device_makes = noise.on_device && !seen_on_host && !noise.shares(&site.layout);
            let mut seen = prediction.and_then(|p| p.observe_site(index));
            if let Some(seen) = seen.as_mut().filter(|_| !device_makes) {
                on_host.observe(shown, seen);
            }
            let (alpha, measures) = prediction.map_or((1.0, false), |p| (p.alpha(index), p.measures()));
            let residual = (alpha != 0.0 || measures || device_makes).then(|| {
                if device_makes {
                    let of_groups = || noise.device_scores(index, &rows.groups, &rows.keys, weights, max_rows, device);
                    return noise.site_buffer(&mut numbers, of_groups).take(coordinates);
                }
                on_host.to_outputs(on_host.residual())
            });
            let predicted = on_host.predicted().map(|h| on_host.to_outputs(h));
            let mut add = |g: Tensor<B, 2>| site.backward(g, &mut gradients);
            match (measures, residual) {
                (true, Some(residual)) => {
                    let (of_site, moments) = compare(site, &residual, job, batch);
                    if let Some(seen) = &mut seen {
                        seen.residual = moments;
                    }
                    predicted.into_iter().for_each(add);
                    if alpha != 0.0 {
                        gradients.merge(of_site.scaled(alpha));
                    }
                }
                (_, residual) => {
                    let residual = residual.filter(|_| alpha != 0.0);
                    let residual = residual.map(|g| if alpha == 1.0 { g } else { g * alpha });
                    // the host's values are summed before they are copied, in the same order
                    match (residual, predicted) {
                        (Some(residual), Some(predicted)) => add(residual + predicted),
                        (one, other) => one.or(other).into_iter().for_each(add),
                    }
                }
            }
            if let (Some(observed), Some(seen)) = (&mut observed, seen) {
                observed.sites.push(seen);
            }
        }
        Ok(JobGradients { gradients, squared_score_norms: norms, observed, recorded: positions.len() })
    };
    per_query::gradients(p, weighted, form)
}

/// A site in a job of the update pass, whose noise the host draws.
struct SiteJob<'a, B: Backend> {
    noise: &'a NoiseSource,
    index: usize,
    site: &'a Recorded<B>,
    job: &'a Job<'a>,
    prediction: Option<&'a Prediction>,
}

impl<B: Backend> SiteJob<'_, B> {
    /// Whether tokens that are alike share their noise.
    fn shares(&self) -> bool {
        self.noise.shares(&self.site.layout)
    }

    /// Values of a row of noise.
    fn width(&self) -> usize {
        if self.shares() { self.site.layout.shared() } else { self.site.layout.len() }
    }

    /// Σ_q c_jq s(ε_jq)/(B·A_j) of each example, `[examples, width]`.
    fn residual(&self) -> Vec<f32> {
        let rows = &self.job.rows;
        self.noise.weighted_scores(self.index, &rows.groups, &rows.keys, &self.job.weights, self.width())
    }

    /// The predicted gradients times the weight of their example, `[examples, width]`; `None` where
    /// nothing is predicted.
    fn predicted(&self) -> Option<Vec<f32>> {
        let (prediction, layout) = (self.prediction?, &self.site.layout);
        let mut out = vec![0f32; self.job.positions.len() * self.width()];
        let mut any = false;
        let counts = self.counts();
        for (i, (&j, &weight)) in self.job.positions.iter().zip(&self.job.shares).enumerate() {
            let Some(mut h) = prediction.gradient(self.index, j).filter(|_| weight != 0.0) else { continue };
            any = true;
            h.iter_mut().for_each(|h| *h *= weight as f32);
            let row = &mut out[i * self.width()..(i + 1) * self.width()];
            if self.shares() {
                row.copy_from_slice(&h);
            } else {
                layout.divide(&counts[i], &mut h);
                layout.add_shared(&h, None, row);
            }
        }
        any.then_some(out)
    }

    /// The real tokens of each group, of each example.
    fn counts(&self) -> Vec<Vec<f32>> {
        let (layout, n) = (&self.site.layout, self.job.positions.len());
        match self.site.mask.as_ref().map(|mask| mask.of_rows(n)) {
            Some(mask) => mask.chunks_exact((mask.len() / n.max(1)).max(1)).map(|m| layout.counts(Some(m))).collect(),
            None => vec![layout.counts(None); n],
        }
    }

    /// Gradients at the output; tokens that are alike have equal parts of what they share.
    ///
    /// # Shapes
    /// - values: `[examples, width]`
    /// - returns: `[examples, coordinates]`
    fn to_outputs(&self, mut values: Vec<f32>) -> Tensor<B, 2> {
        let (layout, n, device) = (&self.site.layout, self.job.positions.len(), &self.site.device);
        if !self.shares() {
            return ops::from_host(values, [n, layout.len()], device);
        }
        for (row, counts) in values.chunks_exact_mut(layout.shared().max(1)).zip(self.counts()) {
            layout.divide(&counts, row);
        }
        layout.expand(values, n, device)
    }

    /// Adds the queries of the job to the observation of the site.
    fn observe(&self, shown: &Shown, seen: &mut SiteObservation) {
        let (Some(prediction), rows) = (self.prediction, &self.job.rows) else { return };
        let (dim, mut noise) = (prediction.dim(), vec![0f32; self.width()]);
        if dim == 0 {
            return;
        }
        if self.noise.sites.is_none() {
            seen.together = prediction.learned_coordinates();
        }
        let mut drawn = None;
        for key in &rows.keys {
            let Some((direction, sign)) = self.noise.signed(self.index, key) else { continue };
            let j = key.position as usize;
            let (of_query, innovations) = (key.query * dim..(key.query + 1) * dim, &shown.innovations[j]);
            // the two rows of an antithetic pair follow one another
            match &mut drawn {
                Some((same, was)) if *same == (j, direction) => {
                    noise.iter_mut().for_each(|e| *e *= *was * sign);
                    *was = sign;
                }
                _ => {
                    self.noise.draw(self.index, key.position, direction, &mut noise);
                    noise.iter_mut().for_each(|e| *e *= sign);
                    drawn = Some(((j, direction), sign));
                }
            }
            let shown = (&innovations[of_query], shown.coefficients[j][key.query]);
            prediction.observe_query(self.index, j, (self.shares(), &noise), shown, seen);
        }
    }
}

/// The parameters' gradients of the residual, and what its halves show of their mean and variance.
///
/// The halves are every other example of the job. With a and b the means over n and m examples, of
/// a batch of B, ⟨a, b⟩ estimates the squared norm of the mean, and ‖a − b‖²/(1/n + 1/m)/B the
/// variance of the mean of the batch.
fn compare<B: Backend>(
    site: &Recorded<B>,
    residual: &Tensor<B, 2>,
    job: &Job<'_>,
    batch: usize,
) -> (Gradients<B>, ResidualMoments) {
    let examples = job.positions.len();
    let half = |parity: usize| {
        let chosen: Vec<f32> = (0..examples).map(|i| f32::from(u8::from(i % 2 == parity))).collect();
        let mut gradients = Gradients::default();
        site.backward(residual.clone() * ops::from_host(chosen, [examples, 1], &site.device), &mut gradients);
        gradients
    };
    let (even, odd) = (half(0), half(1));
    let (n, m) = (examples.div_ceil(2) as f64, (examples / 2) as f64);
    let mut moments = ResidualMoments { tried: true, ..Default::default() };
    if m > 0.0 {
        // weights hold 1/B
        let (a, b) = (batch as f64 / n, batch as f64 / m);
        let product = even.dot(&odd);
        let difference = a * a * even.dot(&even) - 2.0 * a * b * product + b * b * odd.dot(&odd);
        moments.product = a * b * product;
        moments.variance = difference / (1.0 / n + 1.0 / m) / batch as f64;
        moments.pairs = 1.0;
    }
    let mut both = even;
    both.merge(odd);
    (both, moments)
}
