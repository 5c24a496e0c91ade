//! Noise on the outputs of the trained layers (likelihood ratio; Peters and Schaal 2008, Jiang et
//! al. 2023).
//!
//! For y = xW + b and z = y + σε, E[ℓ(z)·s(ε)]/σ is the gradient of the smoothed loss with respect
//! to y. So xᵀ(c·s(ε)) estimates the gradient for W, and c·s(ε) that for b. The input x is the
//! clean one. Layers before this one are perturbed too, which moves x by O(σ), and the mean of the
//! estimate by O(σ²).

use burn::prelude::*;

use super::context::{EstimateContext, SpaceGradients};
use super::per_query::{self, Job, JobGradients, Record};
use super::query_weights::WeightedQueries;
use crate::control_variate::{Prediction, ResidualMoments, SiteObservation};
use crate::error::Error;
use crate::model::ForwardModel;
use crate::noise::{Fall, NoiseSource};
use crate::ops;
use crate::probe::{Gradients, Recorded};

/// What the queries of each example showed beside their weights.
pub(super) struct QueryFindings {
    /// What they show beyond the prediction, `[queries, signals]`.
    pub innovations: Vec<Vec<f32>>,
    /// (ℓ_jq − ℓ_j)/σ, with nothing subtracted.
    pub coefficients: Vec<Vec<f64>>,
}

/// Gradients, and the squared score norm of each example at each site.
pub(super) fn gradients<B: Backend, M: ForwardModel<B>>(
    p: &EstimateContext<'_, B, M>,
    weighted: &WeightedQueries,
    shown: &QueryFindings,
) -> Result<SpaceGradients<B>, Error> {
    let (noise, prediction, max_rows) = (&p.noise, p.prediction.map(|p| &**p), p.max_rows);
    let batch = weighted.weights.len();
    let form = |job: &Job<'_>, record: &Record<'_, B>| {
        let Job { positions, rows, weights, .. } = job;
        let sites = record(positions)?;
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
            let (alpha, measures) = prediction.map_or((1.0, false), |p| (p.alpha(index), p.measures_at(index)));
            // a device's noise is taken whatever becomes of it: later sites have what follows
            let by_device = device_makes.then(|| {
                let of_groups = || noise.device_scores(index, &rows.groups, &rows.keys, weights, max_rows, device);
                noise.site_buffer(&mut numbers, of_groups).take(coordinates)
            });
            if measures {
                let residual = by_device.unwrap_or_else(|| on_host.to_outputs(on_host.residual()));
                let (of_site, moments) = compare(site, &residual, job, batch);
                if let Some(seen) = &mut seen {
                    seen.residual = moments;
                }
                if alpha != 0.0 {
                    gradients.merge(of_site.scaled(alpha));
                }
                if let Some(h) = on_host.with_predicted(None) {
                    site.backward(on_host.to_outputs(h), &mut gradients);
                }
            } else {
                // where a device makes the noise nothing is predicted
                let g = match by_device {
                    Some(g) => (alpha != 0.0).then(|| g * alpha),
                    None => on_host.gradient(alpha).map(|g| on_host.to_outputs(g)),
                };
                g.into_iter().for_each(|g| site.backward(g, &mut gradients));
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

    /// α times the residual, plus the prediction, `[examples, width]`; `None` where both are nothing.
    fn gradient(&self, alpha: f64) -> Option<Vec<f32>> {
        let residual = (alpha != 0.0).then(|| {
            let mut residual = self.residual();
            residual.iter_mut().for_each(|v| *v *= alpha as f32);
            residual
        });
        self.with_predicted(residual)
    }

    /// `values` plus the predicted gradients times the weight of their example, `[examples, width]`.
    fn with_predicted(&self, mut values: Option<Vec<f32>>) -> Option<Vec<f32>> {
        let (Some(prediction), layout, width) = (self.prediction, &self.site.layout, self.width()) else {
            return values;
        };
        let positions = &self.job.positions;
        for (i, (&j, &weight)) in positions.iter().zip(&self.job.shares).enumerate() {
            let Some(mut h) = prediction.gradient(self.index, j).filter(|_| weight != 0.0) else { continue };
            h.iter_mut().for_each(|h| *h *= weight as f32);
            let row = &mut values.get_or_insert_with(|| vec![0f32; positions.len() * width])[i * width..][..width];
            if self.shares() {
                row.iter_mut().zip(&h).for_each(|(v, h)| *v += h);
            } else {
                layout.add_shared(&layout.divided(&self.counts(i), h), None, row);
            }
        }
        values
    }

    /// The real tokens of each group, of example i of the job.
    fn counts(&self, i: usize) -> Vec<f32> {
        let (layout, n) = (&self.site.layout, self.job.positions.len());
        let mask = self.site.mask.as_ref().map(|mask| mask.of_rows(n));
        let tokens = mask.as_ref().map_or(0, |mask| mask.len() / n.max(1));
        layout.counts(mask.as_ref().map(|mask| &mask[i * tokens..(i + 1) * tokens]))
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
        for (i, row) in values.chunks_exact_mut(layout.shared().max(1)).enumerate() {
            layout.divide(&self.counts(i), row);
        }
        layout.expand(values, n, device)
    }

    /// Adds the queries of the job to the observation of the site.
    fn observe(&self, shown: &QueryFindings, seen: &mut SiteObservation) {
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
            let (direction, sign) = self.noise.sampling.direction(key.query);
            let Some(Fall { span, .. }) = self.noise.fall(self.index, key.position, direction) else { continue };
            let j = key.position as usize;
            let (of_query, innovations) = (key.query * dim..(key.query + 1) * dim, &shown.innovations[j]);
            // the two rows of an antithetic pair follow one another
            match &mut drawn {
                Some((same, was)) if *same == (j, direction) => {
                    noise.iter_mut().for_each(|e| *e *= *was * sign);
                    *was = sign;
                }
                _ => {
                    self.noise.draw(self.index, key.position, direction, span, &mut noise);
                    noise.iter_mut().for_each(|e| *e *= sign);
                    drawn = Some(((j, direction), sign));
                }
            }
            let shown = (&innovations[of_query], shown.coefficients[j][key.query]);
            prediction.observe_query(self.index, j, (self.shares(), &noise), shown, span.is_some(), seen);
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
