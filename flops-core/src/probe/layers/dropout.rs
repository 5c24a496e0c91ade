//! Dropout with one mask for each example and step.

use burn::nn::Dropout;
use burn::prelude::*;

use crate::error::Error;
use crate::ops;
use crate::probe::Probe;

impl<B: Backend> Probe<B> {
    /// Dropout (Srivastava et al. 2014) with one mask for each example and step.
    ///
    /// In training a value is 0 with probability p, else it is multiplied by 1/(1 − p), as in Burn.
    /// In inference it stays as it is. With p = 0 it always does, and nothing is drawn.
    ///
    /// The mask of an example is a function of (seed, step, id, number of the dropout in the pass).
    /// Clean pass, queries and update pass of a step share it. A query is therefore compared with
    /// the clean loss under the same mask: dropout adds no variance to a step's estimate, which is
    /// that of the loss under the mask. [`BackpropLearner`](crate::BackpropLearner) draws the same
    /// masks from the same seed, where each step is followed by its update.
    ///
    /// Masks are drawn on the host. A prefix cache ends in front of the first dropout.
    ///
    /// # Shapes
    /// - x: `[rows, …]`, or `[1, …]` for what does not depend on the input
    /// - returns: `[rows, …]`
    ///
    /// An input of another number of rows ends the step in [`Error::Length`].
    pub fn dropout<const D: usize>(&mut self, layer: &Dropout, x: Tensor<B, D>) -> Tensor<B, D> {
        let p = layer.prob;
        if p == 0.0 {
            return x;
        }
        let (Some(examples), mut shape) = (&self.examples, x.dims()) else { return x };
        if !(0.0..=1.0).contains(&p) {
            let remedy = "give a probability between 0 and 1".to_string();
            self.fault(Error::Setting { name: "prob of a dropout", value: p, remedy });
            return x;
        }
        let (given, n, len) = (shape[0], examples.ids.len(), shape[1..].iter().product());
        let factors = examples.factors(self.dropouts, p, len);
        self.dropouts += 1;
        let factors = ops::from_host::<B, 2>(factors, [n, len], &x.device());
        let factors = self.repeat(factors, given);
        let rows = factors.dims()[0];
        if given != 1 && given != rows {
            self.fault(Error::Length { name: "rows at a dropout", got: given, expected: n });
            return x;
        }
        shape[0] = rows;
        let dtype = x.dtype();
        let flat: Tensor<B, 2> = x.reshape([given, len]);
        (flat * factors.cast(dtype)).reshape(shape)
    }
}
