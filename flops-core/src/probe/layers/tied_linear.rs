//! Output layers that share their weight with an embedding.

use burn::module::Param;
use burn::prelude::*;

use super::linear::LinearSite;
use crate::ops;
use crate::probe::{Probe, trained_id};

impl<B: Backend> Probe<B> {
    /// y = xWᵀ as a site, with W the table of an embedding (weight tying; Press and Wolf 2017, arXiv
    /// 1608.05859).
    ///
    /// The gradient of a query is (c·s(ε))ᵀx for W, with the clean x. It is added to the gradient of
    /// W's other use in [`embedding`](Self::embedding). A bias is a bare parameter `[1, …, entries]`
    /// behind it, by [`param`](Self::param) and [`add`](Self::add).
    ///
    /// # Shapes
    /// - weight: `[entries, d]`
    /// - x: `[rows, …, d]`
    /// - returns: `[rows, …, entries]`
    ///
    /// # Example
    /// ```
    /// use burn::nn::{Embedding, EmbeddingConfig};
    /// use burn::prelude::*;
    /// use flops_core::Probe;
    ///
    /// fn logits<B: Backend>(table: &Embedding<B>, ids: Tensor<B, 2, Int>, probe: &mut Probe<B>) -> Tensor<B, 3> {
    ///     let x = probe.embedding(table, ids);
    ///     probe.tied_linear(&table.weight, x.tanh())
    /// }
    ///
    /// type B = burn::backend::Flex;
    /// let device = Default::default();
    /// let table: Embedding<B> = EmbeddingConfig::new(5, 3).init(&device);
    /// let ids = Tensor::zeros([2, 4], &device);
    /// assert_eq!(logits(&table, ids, &mut Probe::clean()).dims(), [2, 4, 5]);
    /// ```
    pub fn tied_linear<const D: usize>(&mut self, weight: &Param<Tensor<B, 2>>, x: Tensor<B, D>) -> Tensor<B, D> {
        let [d_out, d_in] = weight.dims();
        let mut shape = x.dims();
        shape[D - 1] = d_out;
        let all_tokens: usize = shape[..D - 1].iter().product();
        let tokens = all_tokens / shape[0].max(1);
        self.record_cost(tokens * d_in * d_out, tokens * d_out);
        let flat: Tensor<B, 2> = x.reshape([all_tokens, d_in]);
        let y = flat.clone().matmul(ops::unpacked(weight.val()).transpose()).reshape(shape);
        self.site(&[weight.id], y, |trained| LinearSite {
            x: flat.reshape([shape[0], tokens, d_in]).cast(ops::accum_dtype::<B>()),
            d_out,
            transposed: true,
            weight: trained_id(trained, weight.id),
            bias: None,
        })
    }
}
