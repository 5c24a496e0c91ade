//! Bare parameters: class tokens, positions, prompts.

use burn::module::{Param, ParamId};
use burn::prelude::*;

use crate::probe::Probe;
use crate::probe::gradients::Gradients;
use crate::probe::layer::{Site, SquaredScoreNorm};

impl<B: Backend> Probe<B> {
    /// A bare parameter (class token, positional embedding, prompt) as a site.
    ///
    /// Clean, it has the one row it is stored with; perturbed, one row per query. Join it to other
    /// tensors by [`add`](Self::add) or [`cat`](Self::cat). Noise of low rank is of full rank here.
    ///
    /// A trained parameter whose first axis is not 1, such as `[tokens, d]`, ends the step in
    /// [`Error::BareParameter`](crate::Error::BareParameter).
    ///
    /// # Shapes
    /// - param: `[1, …]`
    /// - returns: `[1 or rows, …]`
    pub fn param<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) -> Tensor<B, D> {
        let value = param.val();
        let shape = value.dims();
        self.check_param(param.id, &shape);
        self.site(&[param.id], value, |_| ParamSite { id: param.id, shape })
    }
}

/// A parameter that is its own output.
struct ParamSite<const D: usize> {
    id: ParamId,
    /// `[1, …]`
    shape: [usize; D],
}

impl<B: Backend, const D: usize> Site<B> for ParamSite<D> {
    fn backward(&self, g: Tensor<B, 2>, gradients: &mut Gradients<B>) {
        gradients.add(self.id, g.sum_dim(0).reshape(self.shape));
    }

    fn squared_score_norm(&self) -> SquaredScoreNorm<B> {
        SquaredScoreNorm::constant(self.shape[1..].iter().product::<usize>() as f64)
    }

    fn is_constant(&self) -> bool {
        true
    }
}
