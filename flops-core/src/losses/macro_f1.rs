//! Macro-averaged F1 as a loss.
//!
//! For class c let t_c be the examples with this label, p_c those that are predicted so, and h_c both
//! at once. Then F1_c = 2h_c/(t_c + p_c), the harmonic mean of precision and recall. The loss of a
//! batch of B examples is
//!
//! ```text
//! L = 1 − (1/C) Σ_c F1_c = (1/C) Σ_c (t_c + p_c − 2h_c)/(t_c + p_c)
//! ```
//!
//! Each wrong example, of label y and prediction p, adds 1 to the numerators of y and of p. So the
//! parts ℓ_j = (B/C)·(1/(t_y + p_y) + 1/(t_p + p_p)) of the wrong examples, and 0 of the others, have
//! the mean L. A query of example j moves its own prediction alone, which makes L to L′; its loss is
//! ℓ_j + B·(L′ − L).

use burn::prelude::*;
use burn::tensor::DType;

use super::coupled::{BatchTarget, Coupled, one_hot};
use super::nearest_class;

/// The part of each example in 1 − macro-F1 of its batch; the mean over a batch is 1 − macro-F1.
///
/// It goes with [`couple_macro_f1`] as the [coupling](crate::ForwardModel::couple) of the model. Before
/// that, the rows are taken for a batch of their own. A class that no example has and none is predicted
/// to have counts as F1 = 1 (scikit-learn's `zero_division=1`). A label that is no class has the loss NaN.
///
/// **A batch is not the data set.** F1 is no mean over examples, so the mean over batches is not the F1
/// of all: it is too high where rare classes are missing from batches. Take all data as one batch, or
/// batches in which every class has several examples. The loss has steps: see
/// [`STEP_SIGMA`](super::STEP_SIGMA).
///
/// # Shapes
/// - logits: `[rows, classes]`
/// - target: `[rows]`, each label in `0..classes`
/// - returns: `[rows]`
///
/// # Example
/// ```
/// # use burn::{backend::Flex, nn, prelude::*};
/// use flops_core::losses::{BatchTarget, couple_macro_f1, macro_f1};
/// # use flops_core::{ForwardModel, Probe};
/// # #[derive(Module, Debug)]
/// # struct Net<B: Backend> { head: nn::Linear<B> }
/// impl<B: Backend> ForwardModel<B> for Net<B> {
///     type Input = Tensor<B, 2>;
///     type Target = BatchTarget<B>;
///     type Output = Tensor<B, 2>;
///
///     fn forward(&self, x: Tensor<B, 2>, probe: &mut Probe<B>) -> Tensor<B, 2> {
///         probe.linear(&self.head, x)
///     }
///
///     fn losses(&self, logits: Tensor<B, 2>, target: BatchTarget<B>) -> Tensor<B, 1> {
///         macro_f1(logits, target)
///     }
///
///     fn couple(&self, logits: &Tensor<B, 2>, target: &BatchTarget<B>) -> Option<BatchTarget<B>> {
///         Some(couple_macro_f1(logits, target))
///     }
/// }
/// # let device = Default::default();
/// # let labels = Tensor::from_ints([0, 1, 2, 0, 1, 2], &device);
/// # let guesses = Tensor::<Flex, 1, Int>::from_ints([0, 2, 1, 0, 0, 1], &device);
/// # let loss = macro_f1(guesses.one_hot::<2>(3).float(), BatchTarget::new(labels));
/// # assert!((loss.mean().into_scalar() - (1.0 - 4.0 / 15.0)).abs() < 1e-6);
/// ```
pub fn macro_f1<B: Backend>(logits: Tensor<B, 2>, target: BatchTarget<B>) -> Tensor<B, 1> {
    let coupled = target.coupled.unwrap_or_else(|| couple(&logits, &target.labels));
    let [rows, classes] = logits.dims();
    let (_, no_class) = nearest_class(target.labels.clone(), classes);
    let guesses = one_hot(logits.argmax(1).reshape([rows]), classes);
    let before = one_hot(coupled.column(1).int(), classes);
    let change = guesses - before;
    let hits = coupled.statistic(0) + change.clone() * one_hot(target.labels, classes);
    let sizes = coupled.statistic(1) + change;
    (coupled.column(0) + loss(hits, sizes) * coupled.examples as f64).mask_fill(no_class, f32::NAN)
}

/// The target of a batch with these clean logits: what [`macro_f1`] of a query compares them with.
///
/// # Shapes
/// - logits: `[rows, classes]`
pub fn couple_macro_f1<B: Backend>(logits: &Tensor<B, 2>, target: &BatchTarget<B>) -> BatchTarget<B> {
    BatchTarget { coupled: Some(couple(logits, &target.labels)), ..target.clone() }
}

/// Of each row ℓ_j − B·L and its prediction; of the batch h and t + p of every class.
fn couple<B: Backend>(logits: &Tensor<B, 2>, labels: &Tensor<B, 1, Int>) -> Coupled<B> {
    let [rows, classes] = logits.dims();
    let guess = logits.clone().argmax(1).reshape([rows]);
    let (truth, guesses) = (one_hot(labels.clone(), classes), one_hot(guess.clone(), classes));
    let hits = (truth.clone() * guesses.clone()).sum_dim(0);
    let sizes = (truth.clone() + guesses.clone()).sum_dim(0);
    // 1/size of both classes of an example that is wrong; they cancel where label and guess are one
    let shares = (truth - guesses).abs() / sizes.clone().clamp_min(1.0);
    let own = shares.sum_dim(1) * (rows as f64 / classes as f64);
    let base = own - loss(hits.clone(), sizes.clone()).reshape([1, 1]) * rows as f64;
    let guess = guess.float().cast(DType::F32).reshape([rows, 1]);
    let batch = Tensor::cat(vec![hits, sizes], 0);
    Coupled { rows: Tensor::cat(vec![base, guess], 1), batch, examples: rows }
}

/// 1 − macro-F1, from h and t + p of every class.
///
/// # Shapes
/// - hits, sizes: `[rows, classes]`
/// - returns: `[rows]`
fn loss<B: Backend>(hits: Tensor<B, 2>, sizes: Tensor<B, 2>) -> Tensor<B, 1> {
    ((sizes.clone() - hits * 2.0) / sizes.clamp_min(1.0)).mean_dim(1).squeeze_dim(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::B;

    /// 1 − macro-F1 from its definition.
    fn by_hand(labels: &[usize], guesses: &[usize], classes: usize) -> f64 {
        let f1 = |class: usize| {
            let count = |hit: &dyn Fn((&usize, &usize)) -> bool| labels.iter().zip(guesses).filter(|&p| hit(p)).count();
            let hits = count(&|(y, p)| *y == class && *p == class) as f64;
            let (labelled, guessed) = (count(&|(y, _)| *y == class) as f64, count(&|(_, p)| *p == class) as f64);
            if labelled + guessed == 0.0 {
                return 1.0;
            }
            let (precision, recall) = (hits / guessed.max(1.0), hits / labelled.max(1.0));
            if hits == 0.0 { 0.0 } else { 2.0 * precision * recall / (precision + recall) }
        };
        1.0 - (0..classes).map(f1).sum::<f64>() / classes as f64
    }

    fn logits(guesses: &[usize], classes: usize) -> Tensor<B, 2> {
        let ints: Vec<i32> = guesses.iter().map(|&g| g as i32).collect();
        one_hot(Tensor::from_ints(ints.as_slice(), &Default::default()), classes)
    }

    fn target(labels: &[usize]) -> BatchTarget<B> {
        let ints: Vec<i32> = labels.iter().map(|&y| y as i32).collect();
        BatchTarget::new(Tensor::from_ints(ints.as_slice(), &Default::default()))
    }

    fn values(losses: Tensor<B, 1>) -> Vec<f64> {
        losses.into_data().iter::<f64>().collect()
    }

    /// `f1_score([0, 1, 2, 0, 1, 2], [0, 2, 1, 0, 0, 1], average="macro")` of scikit-learn 1.7 is
    /// 0.26666666666666666.
    #[test]
    fn the_mean_is_that_of_scikit_learn() {
        let (labels, guesses) = ([0, 1, 2, 0, 1, 2], [0, 2, 1, 0, 0, 1]);
        let losses = values(macro_f1(logits(&guesses, 3), target(&labels)));
        assert!((losses.iter().sum::<f64>() / 6.0 - (1.0 - 4.0 / 15.0)).abs() < 1e-6, "{losses:?}");
        // right ones have no part; F1 of class 0 has 2 + 3, that of the others 2 + 2 and 2 + 1
        let expected = [0.0, 1.0 / 4.0 + 1.0 / 3.0, 1.0 / 3.0 + 1.0 / 4.0, 0.0, 1.0 / 5.0 + 1.0 / 4.0, 7.0 / 12.0];
        for (got, part) in losses.iter().zip(expected) {
            assert!((got - 2.0 * part).abs() < 1e-5, "{losses:?}");
        }
    }

    /// ℓ_j + B·(L′ − L) for every other prediction of every example, also into and out of a class that
    /// nobody has.
    #[test]
    fn a_query_moves_the_metric_of_the_batch() {
        let (labels, guesses, classes) = ([0, 0, 1, 1, 2, 0, 2], [0, 1, 1, 0, 0, 0, 2], 4);
        let n = labels.len() as f64;
        let coupled = couple_macro_f1(&logits(&guesses, classes), &target(&labels));
        let clean = values(macro_f1(logits(&guesses, classes), coupled.clone()));
        let batch = by_hand(&labels, &guesses, classes);
        assert!((clean.iter().sum::<f64>() / n - batch).abs() < 1e-6);
        for j in 0..labels.len() {
            for guess in 0..classes {
                let mut moved = guesses;
                moved[j] = guess;
                let got = values(macro_f1(logits(&moved, classes), coupled.clone()));
                let expected = clean[j] + n * (by_hand(&labels, &moved, classes) - batch);
                assert!((got[j] - expected).abs() < 1e-5, "example {j} as {guess}: {}, not {expected}", got[j]);
                // to the bit, so that queries that change nothing are seen
                assert!(guess != guesses[j] || got == clean);
            }
        }
    }
}
