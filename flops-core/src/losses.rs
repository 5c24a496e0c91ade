//! Losses of classifiers, one value per example.

use burn::prelude::*;
use burn::tensor::DType;
use burn::tensor::activation::log_softmax;

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
/// It has no useful gradient; training from forward passes does not need one.
///
/// # Shapes
/// - logits: `[rows, classes]`
/// - target: `[rows]`
/// - returns: `[rows]`
pub fn zero_one<B: Backend>(logits: Tensor<B, 2>, target: Tensor<B, 1, Int>) -> Tensor<B, 1> {
    let rows = logits.dims()[0];
    logits.argmax(1).reshape([rows]).not_equal(target).float().cast(DType::F32)
}
