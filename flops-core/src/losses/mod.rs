//! Losses of classifiers, one value per example; metrics of a whole batch as losses.

mod coupled;
mod macro_f1;
mod roc_auc;

use burn::prelude::*;
use burn::tensor::activation::log_softmax;
use burn::tensor::{DType, FloatDType};

pub use coupled::BatchTarget;
pub(crate) use coupled::one_hot;
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
/// It is computed in f32, whatever the precision of the logits. A label that is no class has the loss
/// NaN, so that a step [names the example](crate::Error::NonFiniteData).
///
/// # Shapes
/// - logits: `[rows, classes]`
/// - target: `[rows]`, each in `0..classes`
/// - returns: `[rows]`
pub fn cross_entropy<B: Backend>(logits: Tensor<B, 2>, target: Tensor<B, 1, Int>) -> Tensor<B, 1> {
    let [rows, classes] = logits.dims();
    let logits = logits.cast(DType::F32);
    let (class, no_class) = nearest_class(target, classes);
    let class = class.reshape([rows, 1]);
    log_softmax(logits, 1).gather(1, class).neg().reshape([rows]).mask_fill(no_class, f32::NAN)
}

/// 0-1 loss of each example: 1 where the largest logit is not the label's, else 0.
///
/// It has no useful gradient; training from forward passes does not need one, but a σ that reaches
/// over its steps ([`STEP_SIGMA`]). A label that is no class has the loss NaN.
///
/// # Shapes
/// - logits: `[rows, classes]`
/// - target: `[rows]`, each in `0..classes`
/// - returns: `[rows]`
pub fn zero_one<B: Backend>(logits: Tensor<B, 2>, target: Tensor<B, 1, Int>) -> Tensor<B, 1> {
    let [rows, classes] = logits.dims();
    let (class, no_class) = nearest_class(target, classes);
    let wrong = logits.argmax(1).reshape([rows]).not_equal(class);
    wrong.float().cast(DType::F32).mask_fill(no_class, f32::NAN)
}

/// The class nearest to each label, and which labels are no class.
///
/// Floats are compared, whose operations a device fuses; they tell up to 2²⁴ classes apart. A label above
/// that loses digits, and is no class before and after.
fn nearest_class<B: Backend>(target: Tensor<B, 1, Int>, classes: usize) -> (Tensor<B, 1, Int>, Tensor<B, 1, Bool>) {
    let label = target.cast(FloatDType::F32);
    let class = label.clone().clamp(0.0, classes as f32 - 1.0);
    (class.clone().int(), class.not_equal(label))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::B;

    #[test]
    fn a_label_that_is_no_class_has_no_loss() {
        let logits = Tensor::<B, 2>::from_data([[1f32, 2.0, 4.0]; 5], &Default::default());
        let target = Tensor::<B, 1, Int>::from_data([1i64, 3, -1, 2, 1000], &Default::default());
        let values = |losses: Tensor<B, 1>| losses.into_data().iter::<f32>().collect::<Vec<_>>();
        // ln(e + e² + e⁴) = 4.16984602
        let entropy = values(cross_entropy(logits.clone(), Tensor::clone(&target)));
        let errors = values(zero_one(logits.clone(), target.clone()));
        let batch = BatchTarget::new(target);
        // one label of class 1, one of class 2, and all are taken for 2: 5/3·(1/1 + 1/6)
        let f1 = values(macro_f1(logits.clone(), batch.clone()));
        let f1_coupled = values(macro_f1(logits.clone(), couple_macro_f1(&logits, &batch)));
        assert!(f1.iter().zip(&f1_coupled).all(|(a, b)| a.to_bits() == b.to_bits()), "{f1:?}, {f1_coupled:?}");
        for (got, expected) in [(entropy, [2.169_846, 0.169_846]), (errors, [1.0, 0.0]), (f1, [35.0 / 18.0, 0.0])] {
            assert!((got[0] - expected[0]).abs() < 1e-5 && (got[3] - expected[1]).abs() < 1e-5, "{got:?}");
            assert!([1, 2, 4].iter().all(|&row| got[row].is_nan()), "{got:?}");
        }
        let scores = Tensor::<B, 1>::from_data([0.1f32, 0.4, 0.35, 0.8], &Default::default());
        let labels = Tensor::from_data([0i64, 2, -1, 1], &Default::default());
        let auc = values(roc_auc(scores, BatchTarget::new(labels)));
        assert_eq!(auc.iter().map(|loss| loss.is_nan()).collect::<Vec<_>>(), [false, true, true, false]);
    }
}
