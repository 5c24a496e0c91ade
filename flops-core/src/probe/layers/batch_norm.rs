//! Batch normalisation by running statistics.

use burn::module::ParamId;
use burn::nn::BatchNorm;
use burn::prelude::*;

use crate::ops;
use crate::probe::gradients::Gradients;
use crate::probe::layer::{Site, SquaredScoreNorm, WeightNoise};
use crate::probe::rows::QueryRows;
use crate::probe::{Probe, trained_id};

impl<B: Backend> Probe<B> {
    /// A batch normalisation as a site: noise on its output reaches its scale γ and its shift β.
    ///
    /// It normalises by its running statistics, always: y = γ·(x − mean)/√(variance + ε) + β. Rows
    /// then do not influence one another. On an autodiff backend Burn's own layer takes the
    /// statistics of the batch instead, and updates the running ones. Here nothing does: they stay
    /// as the weights were loaded. A model trained from scratch is better off with a layer norm.
    ///
    /// Its second axis is channels, so no [token mask](Self::masked) applies.
    ///
    /// # Shapes
    /// - x: `[rows, channels, …]`
    /// - returns: `[rows, channels, …]`
    pub fn batch_norm<const D: usize>(&mut self, layer: &BatchNorm<B>, x: Tensor<B, D>) -> Tensor<B, D> {
        let (shape, device) = (x.dims(), x.device());
        let mut by_channel = [1; D];
        by_channel[1] = shape[1];
        let of_channels = |value: Tensor<B, 1>| value.to_device(&device).reshape(by_channel);
        let (mean, variance) = (of_channels(layer.running_mean.value()), of_channels(layer.running_var.value()));
        let normalised = (x - mean) / variance.add_scalar(layer.epsilon).sqrt();
        let y = normalised.clone() * of_channels(layer.gamma.val()) + of_channels(layer.beta.val());
        let (gamma, beta) = (layer.gamma.id, layer.beta.id);
        self.unmasked(|probe| {
            probe.site(&[gamma, beta], y, |trained| BatchNormSite {
                normalised: normalised
                    .reshape([shape[0], shape[1], shape[2..].iter().product()])
                    .cast(ops::accum_dtype::<B>()),
                gamma: trained_id(trained, gamma),
                beta: trained_id(trained, beta),
            })
        })
    }
}

struct BatchNormSite<B: Backend> {
    /// `[rows, channels, values]`
    normalised: Tensor<B, 3>,
    gamma: Option<ParamId>,
    beta: Option<ParamId>,
}

impl<B: Backend> Site<B> for BatchNormSite<B> {
    fn backward(&self, g: Tensor<B, 2>, gradients: &mut Gradients<B>) {
        let channels = self.normalised.dims()[1];
        let g = g.reshape(self.normalised.dims());
        let by_channel = |x: Tensor<B, 3>| x.sum_dim(2).sum_dim(0).reshape([channels]);
        if let Some(id) = self.gamma {
            gradients.add(id, by_channel(self.normalised.clone() * g.clone()));
        }
        if let Some(id) = self.beta {
            gradients.add(id, by_channel(g));
        }
    }

    /// ‖x̂_j‖² + C·V, x̂ the normalised input, the C·V coordinates of C channels for the shift.
    fn squared_score_norm(&self) -> SquaredScoreNorm<B> {
        let norm = match self.gamma {
            Some(_) => SquaredScoreNorm::of_inputs(self.normalised.clone(), 1.0),
            None => SquaredScoreNorm::constant(0.0),
        };
        let [_, channels, values] = self.normalised.dims();
        norm.plus(if self.beta.is_some() { (channels * values) as f64 } else { 0.0 })
    }

    fn weight_noise(&self) -> Option<&dyn WeightNoise<B>> {
        Some(self)
    }
}

/// Scale and shift get vectors of noise; there is no matrix.
impl<B: Backend> WeightNoise<B> for BatchNormSite<B> {
    fn matrix_shape(&self) -> Option<[usize; 2]> {
        None
    }

    fn vector_elements(&self) -> usize {
        let channels = self.normalised.dims()[1];
        [self.gamma, self.beta].into_iter().flatten().count() * channels
    }

    fn perturb(
        &self,
        y: Tensor<B, 2>,
        _: Option<(Tensor<B, 3>, Tensor<B, 3>)>,
        vectors: Option<Tensor<B, 2>>,
        rows: &QueryRows,
    ) -> Tensor<B, 2> {
        let Some(vectors) = vectors else { return y };
        let ([n, coordinates], [_, channels, values]) = (y.dims(), self.normalised.dims());
        let part = |at: usize| vectors.clone().narrow(1, at, channels).reshape([n, channels, 1]);
        let mut y: Tensor<B, 3> = y.reshape([n, channels, values]);
        if self.gamma.is_some() {
            y = y + rows.repeat(self.normalised.clone()) * part(0);
        }
        if self.beta.is_some() {
            y = y + part(if self.gamma.is_some() { channels } else { 0 });
        }
        y.reshape([n, coordinates])
    }

    fn add_gradients(&self, _: Option<Tensor<B, 2>>, vectors: Option<Tensor<B, 1>>, gradients: &mut Gradients<B>) {
        let (Some(vectors), channels) = (vectors, self.normalised.dims()[1]) else { return };
        for (i, id) in [self.gamma, self.beta].into_iter().flatten().enumerate() {
            gradients.add(id, vectors.clone().narrow(0, i * channels, channels));
        }
    }
}
