//! Linear layers.

use burn::module::ParamId;
use burn::nn::Linear;
use burn::prelude::*;

use crate::ops;
use crate::probe::gradients::Gradients;
use crate::probe::layer::{Site, SquaredScoreNorm, WeightNoise};
use crate::probe::rows::QueryRows;
use crate::probe::{Probe, trained_id};

impl<B: Backend> Probe<B> {
    /// A linear layer as a site.
    ///
    /// The gradient of a query is xᵀ(c·s(ε)) for the weight and Σ c·s(ε) over the tokens for the
    /// bias, with the clean x.
    ///
    /// # Shapes
    /// - x: `[rows, …, d_in]`
    /// - returns: `[rows, …, d_out]`
    pub fn linear<const D: usize>(&mut self, layer: &Linear<B>, x: Tensor<B, D>) -> Tensor<B, D> {
        let [d_in, d_out] = layer.weight.dims();
        let mut shape = x.dims();
        shape[D - 1] = d_out;
        let all_tokens: usize = shape[..D - 1].iter().product();
        let tokens = all_tokens / shape[0].max(1);
        self.record_cost(tokens * d_in * d_out, tokens * d_out);
        // one matrix product: some backends are three times slower on more than two axes
        let flat: Tensor<B, 2> = x.reshape([all_tokens, d_in]);
        let y = layer.forward(flat.clone()).reshape(shape);
        let (weight, bias) = (layer.weight.id, layer.bias.as_ref().map(|b| b.id));
        self.site(&[Some(weight), bias].into_iter().flatten().collect::<Vec<_>>(), y, |trained| LinearSite {
            x: flat.reshape([shape[0], tokens, d_in]).cast(ops::accum_dtype::<B>()),
            d_out,
            transposed: false,
            weight: trained_id(trained, weight),
            bias: bias.and_then(|id| trained_id(trained, id)),
        })
    }
}

/// y = xW + b, with W stored as `[d_in, d_out]`, or transposed.
pub(super) struct LinearSite<B: Backend> {
    /// `[rows, tokens, d_in]`
    pub x: Tensor<B, 3>,
    pub d_out: usize,
    /// Whether the parameter is Wᵀ, `[d_out, d_in]`.
    pub transposed: bool,
    pub weight: Option<ParamId>,
    pub bias: Option<ParamId>,
}

impl<B: Backend> Site<B> for LinearSite<B> {
    fn backward(&self, g: Tensor<B, 2>, gradients: &mut Gradients<B>) {
        let [rows, tokens, d_in] = self.x.dims();
        let g = g.reshape([rows * tokens, self.d_out]);
        if let Some(id) = self.weight {
            let x = self.x.clone().reshape([rows * tokens, d_in]);
            let (left, right) = if self.transposed { (g.clone(), x) } else { (x, g.clone()) };
            gradients.add(id, left.transpose().matmul(right));
        }
        if let Some(id) = self.bias {
            gradients.add(id, g.sum_dim(0).reshape([self.d_out]));
        }
    }

    /// d_out·(‖x_j‖² + T), the T tokens for the bias.
    fn squared_score_norm(&self) -> SquaredScoreNorm<B> {
        let norm = match self.weight {
            Some(_) => SquaredScoreNorm::of_inputs(self.x.clone(), self.d_out as f64),
            None => SquaredScoreNorm::constant(0.0),
        };
        norm.plus(if self.bias.is_some() { (self.x.dims()[1] * self.d_out) as f64 } else { 0.0 })
    }

    fn weight_noise(&self) -> Option<&dyn WeightNoise<B>> {
        Some(self)
    }
}

impl<B: Backend> WeightNoise<B> for LinearSite<B> {
    fn matrix_shape(&self) -> Option<[usize; 2]> {
        self.weight.map(|_| [self.x.dims()[2], self.d_out])
    }

    fn vector_elements(&self) -> usize {
        self.bias.map_or(0, |_| self.d_out)
    }

    fn perturb(
        &self,
        y: Tensor<B, 2>,
        factors: Option<(Tensor<B, 3>, Tensor<B, 3>)>,
        vectors: Option<Tensor<B, 2>>,
        rows: &QueryRows,
    ) -> Tensor<B, 2> {
        let [n, coordinates] = y.dims();
        let mut y = y;
        if let Some((a, b)) = factors {
            y = y + rows.repeat(self.x.clone()).matmul(a).matmul(b).reshape([n, coordinates]);
        }
        if let Some(bias) = vectors {
            let tokens = coordinates / self.d_out.max(1);
            let y3: Tensor<B, 3> = y.reshape([n, tokens, self.d_out]);
            y = (y3 + bias.reshape([n, 1, self.d_out])).reshape([n, coordinates]);
        }
        y
    }

    fn add_gradients(&self, matrix: Option<Tensor<B, 2>>, vectors: Option<Tensor<B, 1>>, gradients: &mut Gradients<B>) {
        if let (Some(id), Some(matrix)) = (self.weight, matrix) {
            gradients.add(id, if self.transposed { matrix.transpose() } else { matrix });
        }
        if let (Some(id), Some(bias)) = (self.bias, vectors) {
            gradients.add(id, bias);
        }
    }
}
