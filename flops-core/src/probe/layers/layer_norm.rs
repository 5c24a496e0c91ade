//! Layer normalisation.

use burn::module::ParamId;
use burn::nn::LayerNorm;
use burn::prelude::*;

use crate::ops;
use crate::probe::gradients::Gradients;
use crate::probe::layer::{Site, SquaredScoreNorm, WeightNoise};
use crate::probe::rows::QueryRows;
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
        let y = layer.forward(x.clone());
        self.site(&parameters, y, |trained| LayerNormSite {
            normalised: normalised(layer, x).cast(ops::accum_dtype::<B>()),
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

struct LayerNormSite<B: Backend> {
    /// `[rows, tokens, d]`
    normalised: Tensor<B, 3>,
    gamma: Option<ParamId>,
    beta: Option<ParamId>,
}

impl<B: Backend> Site<B> for LayerNormSite<B> {
    fn backward(&self, g: Tensor<B, 2>, gradients: &mut Gradients<B>) {
        let [rows, tokens, d] = self.normalised.dims();
        let g = g.reshape([rows * tokens, d]);
        if let Some(id) = self.gamma {
            let normalised = self.normalised.clone().reshape([rows * tokens, d]);
            gradients.add(id, (normalised * g.clone()).sum_dim(0).reshape([d]));
        }
        if let Some(id) = self.beta {
            gradients.add(id, g.sum_dim(0).reshape([d]));
        }
    }

    /// ‖x̂_j‖² + T·d, x̂ the normalised input, the T·d coordinates for the shift.
    fn squared_score_norm(&self) -> SquaredScoreNorm<B> {
        let norm = match self.gamma {
            Some(_) => SquaredScoreNorm::of_inputs(self.normalised.clone(), 1.0),
            None => SquaredScoreNorm::constant(0.0),
        };
        let [_, tokens, d] = self.normalised.dims();
        norm.plus(if self.beta.is_some() { (tokens * d) as f64 } else { 0.0 })
    }

    fn weight_noise(&self) -> Option<&dyn WeightNoise<B>> {
        Some(self)
    }
}

impl<B: Backend> WeightNoise<B> for LayerNormSite<B> {
    fn matrix_shape(&self) -> Option<[usize; 2]> {
        None
    }

    fn vector_elements(&self) -> usize {
        let d = self.normalised.dims()[2];
        [self.gamma, self.beta].into_iter().flatten().count() * d
    }

    fn perturb(
        &self,
        y: Tensor<B, 2>,
        _: Option<(Tensor<B, 3>, Tensor<B, 3>)>,
        vectors: Option<Tensor<B, 2>>,
        rows: &QueryRows,
    ) -> Tensor<B, 2> {
        let Some(vectors) = vectors else { return y };
        let ([n, coordinates], d) = (y.dims(), self.normalised.dims()[2]);
        let part = |at: usize| vectors.clone().narrow(1, at, d).reshape([n, 1, d]);
        let mut y: Tensor<B, 3> = y.reshape([n, coordinates / d.max(1), d]);
        if self.gamma.is_some() {
            y = y + rows.repeat(self.normalised.clone()) * part(0);
        }
        if self.beta.is_some() {
            y = y + part(if self.gamma.is_some() { d } else { 0 });
        }
        y.reshape([n, coordinates])
    }

    fn add_gradients(&self, _: Option<Tensor<B, 2>>, vectors: Option<Tensor<B, 1>>, gradients: &mut Gradients<B>) {
        let (Some(vectors), d) = (vectors, self.normalised.dims()[2]) else { return };
        for (i, id) in [self.gamma, self.beta].into_iter().flatten().enumerate() {
            gradients.add(id, vectors.clone().narrow(0, i * d, d));
        }
    }
}
