//! The area under the ROC curve as a loss.
//!
//! With P positive examples of scores s_i and N negative ones of scores s_k, the area is the share of
//! pairs in the right order (Mann and Whitney 1947). The loss of a batch of B examples is the rest,
//!
//! ```text
//! L = (1/PN) Σ_i Σ_k [s_k > s_i] + ½[s_k = s_i]
//! ```
//!
//! Let e_j be the terms that example j has a part in. Each pair has two members, so the parts ℓ_j =
//! (B/2)·e_j/PN have the mean L. A query of example j moves its own score alone, which makes e_j to e′_j;
//! its loss is ℓ_j + B·(e′_j − e_j)/PN.

use burn::prelude::*;
use burn::tensor::DType;

use super::coupled::{BatchTarget, Coupled};
use super::nearest_class;

/// The part of each example in 1 − AUC of its batch; the mean over a batch is 1 − AUC.
///
/// It goes with [`couple_roc_auc`] as the [coupling](crate::ForwardModel::couple) of the model. Before
/// that, the rows are taken for a batch of their own. The area is 1 where all labels are the same. The
/// mean over batches is a mean over the pairs within batches: unlike that of
/// [`macro_f1`](super::macro_f1) it is unbiased, if every batch has both labels. The loss has steps: see
/// [`STEP_SIGMA`](super::STEP_SIGMA).
///
/// # Shapes
/// - scores: `[rows]`, higher for positive; of two logits, their difference
/// - target: `[rows]`, labels 1 for positive and 0 for negative; any other one has the loss NaN
/// - returns: `[rows]`
///
/// # Example
/// ```
/// use burn::{backend::Flex, prelude::*};
/// use flops_core::losses::{BatchTarget, roc_auc};
///
/// let device = Default::default();
/// let target = BatchTarget::new(Tensor::<Flex, 1, Int>::from_ints([0, 0, 1, 1], &device));
/// let losses = roc_auc(Tensor::from_floats([0.1, 0.4, 0.35, 0.8], &device), target);
/// assert_eq!(losses.mean().into_scalar(), 1.0 - 0.75);
/// ```
pub fn roc_auc<B: Backend>(scores: Tensor<B, 1>, target: BatchTarget<B>) -> Tensor<B, 1> {
    let coupled = target.coupled.unwrap_or_else(|| couple(&scores, &target.labels));
    let (_, no_class) = nearest_class(target.labels.clone(), 2);
    let of_pairs = wrong_pairs(scores, target.labels, &coupled);
    (coupled.column(0) + of_pairs * coupled.examples as f64).mask_fill(no_class, f32::NAN)
}

/// The target of a batch with these clean scores: what [`roc_auc`] of a query compares them with.
///
/// # Shapes
/// - scores: `[rows]`
pub fn couple_roc_auc<B: Backend>(scores: &Tensor<B, 1>, target: &BatchTarget<B>) -> BatchTarget<B> {
    BatchTarget { coupled: Some(couple(scores, &target.labels)), ..target.clone() }
}

/// Of each row −(B/2)·e_j/PN; of the batch its scores and labels.
fn couple<B: Backend>(scores: &Tensor<B, 1>, labels: &Tensor<B, 1, Int>) -> Coupled<B> {
    let [rows] = scores.dims();
    let as_row = |values: Tensor<B, 1>| values.cast(DType::F32).reshape([1, rows]);
    let batch = Tensor::cat(vec![as_row(scores.clone()), as_row(labels.clone().float())], 0);
    let mut coupled = Coupled { rows: Tensor::zeros([rows, 1], &scores.device()), batch, examples: rows };
    let of_pairs = wrong_pairs(scores.clone(), labels.clone(), &coupled).reshape([rows, 1]);
    coupled.rows = of_pairs * (-0.5 * rows as f64);
    coupled
}

/// e/PN of rows with these scores, against a batch.
///
/// # Shapes
/// - scores, labels: `[rows]`
/// - returns: `[rows]`
fn wrong_pairs<B: Backend>(scores: Tensor<B, 1>, labels: Tensor<B, 1, Int>, batch: &Coupled<B>) -> Tensor<B, 1> {
    let [rows] = scores.dims();
    let column = |values: Tensor<B, 1>| values.cast(DType::F32).reshape([rows, 1]);
    let sign = column(labels.float()) * 2.0 - 1.0;
    let signs = batch.statistic(1) * 2.0 - 1.0;
    let positive = (signs.clone() + 1.0).sum_dim(1) * 0.5;
    let pairs = (positive.clone() * (positive.neg() + batch.examples as f64)).clamp_min(1.0);
    // above 0 where the other is on the wrong side; of examples of one label nothing is asked
    let ahead = (batch.statistic(0) - column(scores)) * sign.clone();
    let wrong = ahead.clone().greater_elem(0.0).float() + ahead.equal_elem(0.0).float() * 0.5;
    let apart = (sign * signs).lower_elem(0.0).float();
    ((wrong * apart).cast(DType::F32).sum_dim(1) / pairs).squeeze_dim(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::B;

    /// 1 − AUC, pair by pair.
    fn by_hand(labels: &[usize], scores: &[f32]) -> f64 {
        let of = |label: usize| labels.iter().zip(scores).filter(move |(y, _)| **y == label).map(|(_, &s)| s);
        let pairs: Vec<f64> = of(1)
            .flat_map(|p| {
                of(0).map(move |n| {
                    if n > p {
                        1.0
                    } else if n == p {
                        0.5
                    } else {
                        0.0
                    }
                })
            })
            .collect();
        pairs.iter().sum::<f64>() / pairs.len().max(1) as f64
    }

    fn target(labels: &[usize]) -> BatchTarget<B> {
        let ints: Vec<i32> = labels.iter().map(|&y| y as i32).collect();
        BatchTarget::new(Tensor::from_ints(ints.as_slice(), &Default::default()))
    }

    fn scores(scores: &[f32]) -> Tensor<B, 1> {
        Tensor::from_floats(scores, &Default::default())
    }

    fn values(losses: Tensor<B, 1>) -> Vec<f64> {
        losses.into_data().iter::<f64>().collect()
    }

    /// ℓ_j + B·(L′ − L), at, above and below every score of the batch.
    #[test]
    fn a_query_moves_the_metric_of_the_batch() {
        let (labels, clean) = ([1, 0, 1, 0, 0, 1, 0], [0.2, 0.5, 0.5, -1.0, 0.7, 1.5, 0.1]);
        let (n, batch) = (labels.len() as f64, by_hand(&labels, &clean));
        let coupled = couple_roc_auc(&scores(&clean), &target(&labels));
        let losses = values(roc_auc(scores(&clean), coupled.clone()));
        assert!((losses.iter().sum::<f64>() / n - batch).abs() < 1e-6, "{losses:?}");
        for j in 0..labels.len() {
            for score in [-2.0, -1.0, 0.0, 0.1, 0.2, 0.3, 0.5, 0.6, 0.7, 1.0, 1.5, 2.0] {
                let mut moved = clean;
                moved[j] = score;
                let got = values(roc_auc(scores(&moved), coupled.clone()))[j];
                let expected = losses[j] + n * (by_hand(&labels, &moved) - batch);
                assert!((got - expected).abs() < 1e-5, "example {j} at {score}: {got}, not {expected}");
            }
        }
    }

    #[test]
    fn one_label_alone_is_in_order() {
        assert_eq!(values(roc_auc(scores(&[0.3, 0.1]), target(&[1, 1]))), [0.0; 2]);
    }
}
