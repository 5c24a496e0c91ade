//! Batch normalisation by running statistics.

use burn::nn::BatchNorm;
use burn::prelude::*;

use super::affine::AffineSite;
use crate::ops;
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
            probe.site(&[gamma, beta], y, |trained| AffineSite {
                normalised: normalised
                    .reshape([shape[0], shape[1], shape[2..].iter().product()])
                    .cast(ops::accum_dtype::<B>()),
                axis: 1,
                gamma: trained_id(trained, gamma),
                beta: trained_id(trained, beta),
            })
        })
    }
}
