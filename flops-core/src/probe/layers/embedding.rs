//! Embedding tables.

use burn::module::ParamId;
use burn::nn::Embedding;
use burn::prelude::*;
use burn::tensor::TensorPrimitive;

use crate::ops;
use crate::probe::Probe;
use crate::probe::gradients::Gradients;
use crate::probe::layer::{Site, SquaredScoreNorm};

impl<B: Backend> Probe<B> {
    /// An embedding table as a site: the gradient of a looked-up row goes to that row of the table.
    ///
    /// Noise of low rank falls on the looked-up rows, as in the activation space.
    ///
    /// # Shapes
    /// - ids: `[rows, tokens]`
    /// - returns: `[rows, tokens, d]`
    pub fn embedding(&mut self, layer: &Embedding<B>, ids: Tensor<B, 2, Int>) -> Tensor<B, 3> {
        let y = layer.forward(ids.clone());
        self.site(&[layer.weight.id], y, |_| EmbeddingSite {
            ids,
            table: layer.weight.val().cast(ops::accum_dtype::<B>()),
            weight: layer.weight.id,
        })
    }
}

struct EmbeddingSite<B: Backend> {
    /// `[rows, tokens]`
    ids: Tensor<B, 2, Int>,
    /// `[entries, d]`
    table: Tensor<B, 2>,
    weight: ParamId,
}

impl<B: Backend> Site<B> for EmbeddingSite<B> {
    fn backward(&self, g: Tensor<B, 2>, gradients: &mut Gradients<B>) {
        let ([rows, tokens], [_, d]) = (self.ids.dims(), self.table.dims());
        let table = B::embedding_backward(
            self.table.clone().into_primitive().tensor(),
            g.reshape([rows, tokens, d]).into_primitive().tensor(),
            self.ids.clone().into_primitive(),
        );
        gradients.add(self.weight, Tensor::<B, 2>::from_primitive(TensorPrimitive::Float(table)));
    }

    /// The looked-up coordinates of a row.
    fn squared_score_norm(&self) -> SquaredScoreNorm<B> {
        SquaredScoreNorm::constant((self.ids.dims()[1] * self.table.dims()[1]) as f64)
    }
}
