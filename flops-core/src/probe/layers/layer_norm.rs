//! Layer normalisation.

use burn::module::ParamId;
use burn::nn::LayerNorm;
use burn::prelude::*;

use super::affine::AffineSite;
use crate::ops;
use crate::probe::{Probe, trained_id};

impl<B: Backend> Probe<B> {
    /// A layer normalisation as a site: noise on its output reaches its scale γ and its shift β.
    ///
    /// # Shapes
    /// - x: `[rows, …, d]`
    /// - returns: `[rows, …, d]`
    pub fn layer_norm<const D: usize>(&mut self, layer: &LayerNorm<B>, x: Tensor<B, D>) -> Tensor<B, D> {
        let (gamma, beta) = (layer.gamma.id, layer.beta.as_ref().map(|b| b.id));
        let parameters: Vec<ParamId> = [Some(gamma), beta].into_iter().flatten().collect();
        if !self.is_site(&parameters) {
            return layer.forward(x);
        }
        // on a device the site and the output share the normalised input, where both are asked for
        let shared = (self.makes_sites() && !ops::is_host::<B>(&x.device())).then(|| normalised(layer, x.clone()));
        let y = match &shared {
            Some(unit) => scaled(layer, unit.clone()).reshape(x.dims()),
            None => layer.forward(x.clone()),
        };
        self.site(&parameters, y, |trained| AffineSite {
            normalised: shared.unwrap_or_else(|| normalised(layer, x)).cast(ops::accum_dtype::<B>()),
            axis: 2,
            gamma: trained_id(trained, gamma),
            beta: beta.and_then(|id| trained_id(trained, id)),
        })
    }
}

/// (x − mean)/√(variance + ε), `[rows, tokens, d]`.
fn normalised<B: Backend, const D: usize>(layer: &LayerNorm<B>, x: Tensor<B, D>) -> Tensor<B, 3> {
    let shape = x.dims();
    let (rows, d) = (shape[0], shape[D - 1]);
    let tokens: usize = shape[1..D - 1].iter().product();
    let mut unit = layer.clone();
    unit.gamma = unit.gamma.map(|g| g.ones_like());
    unit.beta = None;
    let flat: Tensor<B, 2> = x.reshape([rows * tokens, d]);
    unit.forward(flat).reshape([rows, tokens, d])
}

/// γ·x̂ + β, in the order in which Burn computes it.
///
/// # Shapes
/// - unit: `[rows, tokens, d]`
fn scaled<B: Backend>(layer: &LayerNorm<B>, unit: Tensor<B, 3>) -> Tensor<B, 3> {
    let y = unit * layer.gamma.val().unsqueeze();
    match &layer.beta {
        Some(beta) => y + beta.val().unsqueeze(),
        None => y,
    }
}
