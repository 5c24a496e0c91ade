//! Losses of classifiers, one value per example; metrics of a whole batch as losses.

mod coupled;
mod macro_f1;
mod roc_auc;

use burn::prelude::*;
use burn::tensor::DType;
use burn::tensor::activation::log_softmax;

pub use coupled::BatchTarget;
pub use macro_f1::{couple_macro_f1, macro_f1};
pub use roc_auc::{couple_roc_auc, roc_auc};

/// Smoothing scale to begin with where the loss has steps: 0.3, of the useful 0.1 to 0.5.
///
/// A loss that counts (errors, ranks, steps of an episode) is flat almost everywhere. Noise that does
/// not reach over a step measures nothing, so σ has to be of the size of what it moves: activations
/// and weights are of the order of 1. [`ForwardConfig::for_steps`](crate::ForwardConfig::for_steps)
/// sets it.
pub const STEP_SIGMA: f64 = 0.3;

/// Cross-entropy of each example, −ln softmax(logits)\[target\].
///
/// It is computed in f32, whatever the precision of the logits.
///
/// # Shapes
/// - logits: `[rows, classes]`
/// - target: `[rows]`, each in `0..classes`
/// - returns: `[rows]`
pub fn cross_entropy<B: Backend>(logits: Tensor<B, 2>, target: Tensor<B, 1, Int>) -> Tensor<B, 1> {
    let rows = logits.dims()[0];
    let logits = logits.cast(DType::F32);
    log_softmax(logits, 1).gather(1, target.reshape([rows, 1])).neg().reshape([rows])
}

/// 0-1 loss of each example: 1 where the largest logit is not the label's, else 0.
///
/// It has no useful gradient; training from forward passes does not need one, but a σ that reaches
/// over its steps ([`STEP_SIGMA`]).
///
/// # Shapes
/// - logits: `[rows, classes]`
/// - target: `[rows]`
/// - returns: `[rows]`
pub fn zero_one<B: Backend>(logits: Tensor<B, 2>, target: Tensor<B, 1, Int>) -> Tensor<B, 1> {
    let rows = logits.dims()[0];
    logits.argmax(1).reshape([rows]).not_equal(target).float().cast(DType::F32)
}
