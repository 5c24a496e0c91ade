//! Noise of low rank on the weights, a draw of its own for every query (EGGROLL, Sarkar et al.
//! 2025, arXiv 2511.16652).
//!
//! A query sees W + σ·A·B/√r instead of W, with A `[d_in, r]` and B `[r, d_out]` of independent
//! unit entries. The output of the layer gains the side term σ(xA)B/√r, which costs r·(d_in +
//! d_out) products per token; the perturbed weight is never formed. For E = AB/√r and every law of
//! independent entries of unit variance, E[⟨G, E⟩ E] = G. So c·E estimates the gradient for W, up
//! to O(σ²), and needs no clean input. The update of all queries is one product, [A₁ … A_N]·[c₁B₁;
//! …; c_N B_N].
//!
//! The squared norm of E is d_in·d_out for signs. For Gaussian entries c² and ‖E‖² go together. The
//! second moments that allocators see are then short by the same factor (1 + 2/d_in)(1 + 2/d_out)
//! for all examples at rank 1.
//!
//! A layer that is called again in a pass is one site: all of its calls see the same E.
//!
//! Vectors (biases, the scale and shift of a normalisation) get full noise of their own, the same
//! for all tokens of a row. Looked-up rows of an embedding and bare parameters are perturbed as in
//! the activation space. The weight of a convolution is a matrix from patches to channels.

use burn::prelude::*;

use super::context::{EstimateContext, SpaceGradients};
use super::per_query::{self, Job, JobGradients, Record};
use super::query_weights::WeightedQueries;
use crate::error::Error;
use crate::model::ForwardModel;
use crate::noise::NoiseSource;
use crate::ops;
use crate::probe::low_rank::Layout;
use crate::probe::{Gradients, Recorded, SquaredScoreNorm};

/// Gradients, and for each example at each site E‖E‖², or the squared score norm where noise falls
/// on the output.
pub(super) fn gradients<B: Backend, M: ForwardModel<B>>(
    p: &EstimateContext<'_, B, M>,
    weighted: &WeightedQueries,
    rank: usize,
) -> Result<SpaceGradients<B>, Error> {
    let noise = &p.noise;
    let form = |job: &Job<'_>, record: &Record<'_, B>| {
        // the shapes of the sites, which one example tells, are enough where no gradient depends on
        // rows
        let (mut sites, mut recorded) = (record(&job.positions[..1])?, 1);
        let is_constant = |site: &Recorded<B>| site.site.is_constant() && site.mask.is_none();
        let needs_all = |site: &Recorded<B>| site.site.weight_noise().is_none() && !is_constant(site);
        if job.positions.len() > 1 && sites.iter().any(needs_all) {
            sites = record(job.positions)?;
            recorded += job.positions.len();
        }
        let mut gradients = Gradients::default();
        let norms = sites.iter().enumerate().map(|(index, site)| {
            let layout = Layout::new(&*site.site, site.coordinates, rank);
            let sums = Sums::of(&layout, (index, noise), job);
            sums.add_to(&layout, site, job, &mut gradients);
            match site.site.weight_noise() {
                Some(_) => Ok(SquaredScoreNorm::constant(layout.squared_norm())),
                None => site.squared_score_norm(job.positions.len()),
            }
        });
        let norms = norms.collect::<Result<_, Error>>()?;
        Ok(JobGradients { gradients, squared_score_norms: norms, observed: None, recorded })
    };
    per_query::gradients(p, weighted, form)
}

/// What the directions of a job add up to at a site.
struct Sums {
    /// A of each direction, one after the other.
    lefts: Vec<f32>,
    /// weight·B/√r of each direction.
    rights: Vec<f32>,
    /// Σ weight·ε of the vectors.
    vectors: Vec<f64>,
    /// Σ weight·ε of the output, for each example.
    outputs: Vec<f32>,
}

impl Sums {
    fn of(layout: &Layout, (index, noise): (usize, &NoiseSource), job: &Job<'_>) -> Self {
        let (left, right) = (layout.left(), layout.right());
        let mut sums = Self {
            lefts: vec![],
            rights: vec![],
            vectors: vec![0f64; layout.vectors],
            outputs: vec![0f32; job.positions.len() * layout.output],
        };
        let mut row = vec![0f32; layout.len()];
        for (j, group) in job.rows.groups.iter().enumerate() {
            for (position, direction, weight) in noise.directions(index, group.clone(), &job.rows.keys, &job.weights) {
                noise.draw(index, position, direction, None, &mut row);
                let (a, rest) = row.split_at(left);
                let (b, rest) = rest.split_at(right);
                let (vectors, output) = rest.split_at(layout.vectors);
                sums.lefts.extend_from_slice(a);
                let factor = (weight / (layout.rank as f64).sqrt()) as f32;
                sums.rights.extend(b.iter().map(|b| factor * b));
                sums.vectors.iter_mut().zip(vectors).for_each(|(v, &e)| *v += weight * f64::from(e));
                let here = &mut sums.outputs[j * layout.output..(j + 1) * layout.output];
                here.iter_mut().zip(output).for_each(|(o, e)| *o += weight as f32 * e);
            }
        }
        sums
    }

    fn add_to<B: Backend>(self, layout: &Layout, site: &Recorded<B>, job: &Job<'_>, gradients: &mut Gradients<B>) {
        let (rank, device) = (layout.rank, &site.device);
        if let Some(noise) = site.site.weight_noise() {
            let matrix = layout.matrix().map(|[inputs, outputs]| {
                let n = self.lefts.len() / layout.left().max(1);
                if n == 0 {
                    return ops::from_host::<B, 2>(vec![0.0; inputs * outputs], [inputs, outputs], device);
                }
                let a = ops::from_host::<B, 3>(self.lefts, [n, inputs, rank], device);
                let b = ops::from_host(self.rights, [n * rank, outputs], device);
                a.swap_dims(0, 1).reshape([inputs, n * rank]).matmul(b)
            });
            let vectors = (layout.vectors > 0).then(|| {
                let values: Vec<f32> = self.vectors.iter().map(|&v| v as f32).collect();
                ops::from_host::<B, 1>(values, [layout.vectors], device)
            });
            noise.add_gradients(matrix, vectors, gradients);
        }
        if layout.output > 0 {
            let g = ops::from_host(self.outputs, [job.positions.len(), layout.output], device);
            site.backward(g, gradients);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::allocator::Allocation;
    use crate::estimator::{Estimator, Space};
    use crate::noise::{NoiseLaw, Placement, Sampling};
    use crate::random::derive_seed;
    use crate::testing::pair::{case, pair};

    /// One query's gradients are its coefficient times A·B/√r and the noise of the bias, also where
    /// that noise is no sign. The coefficient is the same for both, and so it drops out.
    #[test]
    fn gradients_are_proportional_to_the_noise_of_their_query() {
        let case = case(&pair(1, true), &[4]);
        let space = Space::low_rank(1).with_placement(Placement::Joint).unwrap();
        for law in [NoiseLaw::Gaussian, NoiseLaw::Uniform] {
            let estimator = Estimator { noise: law, sigma: 0.5, seed: 7, ..Estimator::new(space) };
            let clean = estimator.clean(&case.model, &case.batch, &case.trained).unwrap();
            let estimate = clean.estimate(&Allocation::of(&[1]), 3).unwrap();
            let noise = NoiseSource {
                law,
                sampling: Sampling::OneSided,
                sigma: 0.5,
                seed: derive_seed(&[7, 4]),
                step: 3,
                sites: None,
                spans: Default::default(),
                spread: false,
                shared: false,
                on_device: false,
            };
            for (index, (layer, outputs)) in [(&case.model.first, 2), (&case.model.second, 1)].into_iter().enumerate() {
                // A, then B, then the noise of the bias
                let mut row = vec![0f32; 1 + 2 * outputs];
                noise.draw(index, 0, 0, None, &mut row);
                let values = |gradient: Tensor<_, 1>| gradient.into_data().to_vec::<f32>().unwrap();
                let of_weight = values(estimate.gradient(&layer.weight).unwrap().reshape([outputs]));
                let of_bias = values(estimate.gradient(layer.bias.as_ref().unwrap()).unwrap());
                for k in 0..outputs {
                    let (product, bias) = (row[0] * row[1 + k], row[1 + outputs + k]);
                    let (a, b) = (of_weight[k] * bias, of_bias[k] * product);
                    assert!((a - b).abs() < 1e-5 * a.abs().max(b.abs()) && a != 0.0, "{law}, site {index}: {a}, {b}");
                }
            }
        }
    }
}
