//! Initial weights, shared by all layers of the model.

use burn::nn::{Initializer, Linear};
use burn::prelude::*;

/// Initial distribution of weights, class token and positional embedding; biases start at zero.
pub(crate) const INIT: Initializer = Initializer::Normal { mean: 0.0, std: 0.02 };

/// Makes a linear layer with weights N(0, 0.02²) and, where `bias` is set, a bias of zeros.
///
/// The parameters are lazy: they are drawn when they are first used.
///
/// # Shapes
/// - weight: `[d_in, d_out]`, bias: `[d_out]`
pub fn linear<B: Backend>(d_in: usize, d_out: usize, bias: bool, device: &B::Device) -> Linear<B> {
    Linear { weight: INIT.init([d_in, d_out], device), bias: bias.then(|| Initializer::Zeros.init([d_out], device)) }
}
