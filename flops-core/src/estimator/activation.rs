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
use crate::error::Error;
use crate::model::ForwardModel;
use crate::ops;
use crate::probe::{Gradients, Recorded};

/// Gradients, and the squared score norm of each example at each site.
pub(super) fn gradients<B: Backend, M: ForwardModel<B>>(
    p: &EstimateContext<'_, B, M>,
    weighted: &WeightedQueries,
) -> Result<SpaceGradients<B>, Error> {
    let (noise, prediction, max_rows) = (&p.noise, p.prediction, p.max_rows);
    let form = |job: &Job<'_>, record: &dyn Fn(&[usize]) -> Vec<Recorded<B>>| {
        let Job { positions, rows, weights, shares } = job;
        let sites = record(positions);
        let (mut gradients, mut norms) = (Gradients::default(), Vec::with_capacity(sites.len()));
        let mut observed = prediction.map(|p| p.observe(positions, shares));
        let mut numbers = None;
        for (index, site) in sites.iter().enumerate() {
            let (coordinates, device) = (site.coordinates, &site.device);
            let seen_on_host = prediction.is_some_and(|p| p.looks_at(coordinates));
            let g = if noise.on_device && !seen_on_host {
                let of_groups = || noise.device_scores(index, &rows.groups, &rows.keys, weights, max_rows, device);
                noise.site_buffer(&mut numbers, of_groups).take(coordinates)
            } else {
                let mut g = noise.weighted_scores(index, &rows.groups, &rows.keys, weights, coordinates);
                if let (Some(prediction), Some(observed)) = (prediction, &mut observed) {
                    observed.sites.extend(prediction.add_back(index, positions, shares, &mut g));
                }
                ops::from_host(g, [positions.len(), coordinates], device)
            };
            norms.push(site.squared_score_norm(positions.len())?);
            site.backward(g, &mut gradients);
        }
        Ok(JobGradients { gradients, squared_score_norms: norms, observed, recorded: positions.len() })
    };
    per_query::gradients(p, weighted, form)
}
