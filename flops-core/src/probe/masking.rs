//! Parts of a forward pass in which padding is masked.

use burn::prelude::*;

use super::mask::TokenMask;
use super::{Mode, Probe};
use crate::error::Error;

impl<B: Backend> Probe<B> {
    /// Runs a part of the forward pass in which padding is masked.
    ///
    /// Sites in it whose output is `[rows, tokens, …]`, three or more axes with as many tokens,
    /// follow the mask. No noise falls on masked tokens, and they add nothing to gradients, to
    /// squared score norms and to the control variate. Estimate and variance are then those of the
    /// batch without padding. Noise of low rank on weights has no need of it: it falls on weights,
    /// not on tokens. Other outputs, such as a pooled `[rows, d]`, are left alone.
    ///
    /// The loss must not depend on masked tokens, as with an attention bias and a masked mean.
    /// Otherwise that part of the gradient is lost.
    ///
    /// It may surround stages or lie in one. A mask that is needed in several stages is set in
    /// each, or around them all. Inside another mask it replaces that one.
    ///
    /// # Shapes
    /// - mask: `[rows, tokens]`, 1 at a token and 0 at padding; a single row is for all rows
    ///
    /// A mask with another number of rows ends the step in [`Error::Length`].
    ///
    /// # Example
    /// ```
    /// use burn::{nn, prelude::*};
    /// use flops_core::Probe;
    ///
    /// /// Word vectors, without noise on padding; x: `[rows, tokens, d]`.
    /// fn words<B: Backend>(
    ///     layer: &nn::Linear<B>,
    ///     x: Tensor<B, 3>,
    ///     mask: Tensor<B, 2, Int>,
    ///     probe: &mut Probe<B>,
    /// ) -> Tensor<B, 3> {
    ///     probe.masked(mask, |probe| probe.linear(layer, x).tanh())
    /// }
    /// ```
    pub fn masked<T>(&mut self, mask: Tensor<B, 2, Int>, run: impl FnOnce(&mut Self) -> T) -> T {
        let rows = mask.dims()[0];
        let mask = match &self.mode {
            Mode::Inference => None,
            Mode::Query(query) => Some(TokenMask::new(mask).repeat(&query.rows)),
            _ => Some(TokenMask::new(mask)),
        };
        if let (Mode::Trace { .. }, Some(examples)) = (&self.mode, &self.examples)
            && rows != 1
            && rows != examples.ids.len()
        {
            let expected = examples.ids.len();
            self.fault(Error::Length { name: "token mask", got: rows, expected });
        }
        self.within(mask, run)
    }

    /// Runs a part of the forward pass without the mask around it.
    ///
    /// For layers whose second axis is not the tokens, such as the channels of an image.
    pub fn unmasked<T>(&mut self, run: impl FnOnce(&mut Self) -> T) -> T {
        self.within(None, run)
    }

    /// Runs a part of the forward pass in which the tokens from `apart` on are declared alike.
    ///
    /// What a query does to one of them, it does to the others about as well, as with the patches of
    /// an image behind its class token. The [learned prediction](crate::control_variate) then has
    /// one set of weights for all of them, instead of one for each. The first `apart` tokens have
    /// their own. [`GradientEstimate::Shrunk`](crate::GradientEstimate::Shrunk) also gives them the
    /// same noise.
    ///
    /// Tokens are the second of three axes, `[rows, tokens, d]`, or the last two of four, `[rows,
    /// channels, height, width]`. Inside a [mask](Self::masked) they are always the second. Other
    /// outputs are left alone. It may surround stages or lie in one.
    ///
    /// # Example
    /// ```
    /// use burn::{nn, prelude::*};
    /// use flops_core::Probe;
    ///
    /// /// A class token and patches, `[rows, 1 + patches, d]`.
    /// fn mix<B: Backend>(layer: &nn::Linear<B>, x: Tensor<B, 3>, probe: &mut Probe<B>) -> Tensor<B, 3> {
    ///     probe.alike(1, |probe| probe.linear(layer, x))
    /// }
    /// ```
    pub fn alike<T>(&mut self, apart: usize, run: impl FnOnce(&mut Self) -> T) -> T {
        let outer = self.alike.replace(apart);
        let output = run(self);
        self.alike = outer;
        output
    }

    fn within<T>(&mut self, mask: Option<TokenMask<B>>, run: impl FnOnce(&mut Self) -> T) -> T {
        let outer = std::mem::replace(&mut self.mask, mask);
        let output = run(self);
        self.mask = outer;
        output
    }
}
