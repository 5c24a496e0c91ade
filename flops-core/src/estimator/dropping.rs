//! Dropout: estimates are those of the loss under one mask for each example and step.

use std::sync::Arc;

use burn::module::{AutodiffModule, Module};
use burn::nn::{Dropout, DropoutConfig, Linear, LinearConfig};
use burn::prelude::*;

use super::tests::figures_of;
use super::*;
use crate::allocator::{Allocation, QueryBudget};
use crate::batch::Batch;
use crate::error::Error;
use crate::losses::cross_entropy;
use crate::model::ForwardModel;
use crate::noise::Placement;
use crate::probe::{Probe, StepKey};
use crate::testing::{AB, B, reseeded};

const EXAMPLES: usize = 5;
const DIM: usize = 6;
const SEED: u64 = 11;

/// Two layers, with dropout behind each: by the probe, or by factors that come with the input.
#[derive(Module, Debug)]
struct Dropped<B: Backend> {
    first: Linear<B>,
    second: Linear<B>,
    head: Linear<B>,
    dropout: Dropout,
    /// Whether the factors of the input are used instead of the dropout.
    multiplied_in: bool,
}

impl<B: Backend> Dropped<B> {
    fn drop(&self, x: Tensor<B, 2>, factors: Tensor<B, 2>, probe: &mut Probe<B>) -> Tensor<B, 2> {
        if self.multiplied_in {
            let [x, factors] = probe.align([x, factors]);
            return x * factors;
        }
        probe.dropout(&self.dropout, x)
    }
}

impl<B: Backend> ForwardModel<B> for Dropped<B> {
    /// Rows, and the factors of the two dropouts.
    type Input = (Tensor<B, 2>, Tensor<B, 2>, Tensor<B, 2>);
    type Target = Tensor<B, 1, Int>;
    type Output = Tensor<B, 2>;

    fn forward(&self, (x, first, second): Self::Input, probe: &mut Probe<B>) -> Tensor<B, 2> {
        let x = probe.stage((x, first), |(x, first), probe| {
            let h = probe.linear(&self.first, x).tanh();
            self.drop(h, first, probe)
        });
        let x = probe.stage((x, second), |(x, second), probe| {
            let h = probe.linear(&self.second, x.clone()).tanh();
            let h = probe.add(x, h);
            self.drop(h, second, probe)
        });
        probe.linear(&self.head, x)
    }

    fn losses(&self, logits: Tensor<B, 2>, target: Tensor<B, 1, Int>) -> Tensor<B, 1> {
        cross_entropy(logits, target)
    }
}

fn model(prob: f64, multiplied_in: bool) -> Dropped<AB> {
    let device = Default::default();
    let square = || LinearConfig::new(DIM, DIM).init(&device);
    let head = LinearConfig::new(DIM, 3).init(&device);
    let dropout = DropoutConfig::new(prob).init();
    reseeded(Dropped { first: square(), second: square(), head, dropout, multiplied_in }, 3)
}

type Rows = Batch<(Tensor<B, 2>, Tensor<B, 2>, Tensor<B, 2>), Tensor<B, 1, Int>>;

/// A batch of these ids, with the factors of a step.
fn batch(ids: &[u64], (seed, step): (u64, u64), prob: f64) -> Rows {
    let (device, n) = (Default::default(), ids.len());
    let positions: Vec<usize> = (0..n).collect();
    let examples = StepKey { seed, step, ids }.examples(&positions);
    let factors = |call| Tensor::from_data(TensorData::new(examples.factors(call, prob, DIM), [n, DIM]), &device);
    let x = ids.iter().flat_map(|&id| (0..DIM).map(move |k| ((id * 17 + k as u64 * 5) as f32).sin())).collect();
    let labels: Vec<i32> = ids.iter().map(|id| (id % 3) as i32).collect();
    Batch {
        ids: ids.to_vec(),
        input: (Tensor::from_data(TensorData::new(x, [n, DIM]), &device), factors(0), factors(1)),
        target: Tensor::from_data(TensorData::new(labels, [n]), &device),
    }
}

const IDS: [u64; EXAMPLES] = [4, 19, 7, 100, 3];

/// Losses, second moments and gradients at a step.
fn figures(estimator: &Estimator, model: &Dropped<AB>, batch: &Rows, step: u64) -> [Vec<f64>; 3] {
    let (plain, trained) = (model.valid(), trained_parameters(model));
    let clean = estimator.clean_at(&plain, batch, &trained, step).unwrap();
    let weights = [1.0, 2.0, 1.0, 3.0, 1.0];
    let allocation = match estimator.space {
        Space::Weights { .. } => Allocation::uniform(EXAMPLES, &QueryBudget::new(4, 1).unwrap()),
        _ => Allocation::project(&weights, &QueryBudget::new(4, 1).unwrap()).unwrap(),
    };
    figures_of(&clean, &allocation, step + 50)
}

/// The estimate is bit for bit that of the same model with the factors multiplied in: what every
/// estimate says of a loss without dropout holds for the loss under the mask.
#[test]
fn dropout_is_a_mask_that_a_step_shares() {
    let single = |space: Space| space.with_placement(Placement::Single).unwrap();
    for space in [
        Space::activation(),
        single(Space::activation()),
        Space::low_rank(2),
        single(Space::low_rank(1)),
        Space::weights(),
    ] {
        for (max_rows, threads) in [(256, 1), (4, 3)] {
            let estimator = Estimator { seed: SEED, max_rows, threads, sigma: 0.1, ..Estimator::new(space) };
            for step in [0, 8] {
                let batch = batch(&IDS, (SEED, step), 0.4);
                let dropped = figures(&estimator, &model(0.4, false), &batch, step);
                let multiplied = figures(&estimator, &model(0.4, true), &batch, step);
                assert_eq!(dropped, multiplied, "{space}, at most {max_rows} rows");
                let other = figures(&estimator, &model(0.4, false), &batch, step + 1);
                assert_ne!(dropped[0], other[0], "another step has another mask");
            }
        }
    }
}

/// Frozen layers in front: their stage with dropout runs once a step, under the mask of the step.
#[test]
fn dropout_in_front_of_the_trained_layers_is_that_of_the_step() {
    let freeze = |mut model: Dropped<AB>| {
        model.first = model.first.no_grad();
        model.second = model.second.no_grad();
        model
    };
    let estimator = Estimator { seed: SEED, ..Estimator::new(Space::activation()) };
    for step in [0, 8] {
        let batch = batch(&IDS, (SEED, step), 0.4);
        let dropped = figures(&estimator, &freeze(model(0.4, false)), &batch, step);
        assert_eq!(dropped, figures(&estimator, &freeze(model(0.4, true)), &batch, step));
    }
}

#[test]
fn a_mask_belongs_to_an_example_wherever_it_is() {
    let estimator = Estimator { seed: SEED, ..Estimator::new(Space::activation()) };
    let with_graph = model(0.4, false);
    let (plain, trained) = (with_graph.valid(), trained_parameters(&with_graph));
    let losses = |ids: &[u64]| {
        let batch = batch(ids, (0, 0), 0.4);
        estimator.clean_at(&plain, &batch, &trained, 2).unwrap().losses
    };
    let mut reversed = IDS;
    reversed.reverse();
    let mut found = losses(&reversed);
    found.reverse();
    // to rounding: products of matrices of other shapes
    losses(&IDS).iter().zip(&found).for_each(|(a, b)| assert!((a - b).abs() < 1e-6, "{a}, reversed {b}"));
    assert!((losses(&IDS[1..2])[0] - found[1]).abs() < 1e-6);
}

/// A key changes the mask in each of its parts.
///
/// Of 200,000 values the dropped part lies within 5 standard errors of p. The false-failure rate is
/// 10⁻⁶, and zero for this seed. The others are 1/(1 − p).
#[test]
fn factors_are_functions_of_their_key() {
    let of = |seed, step, id, call, p, len| StepKey { seed, step, ids: &[id] }.examples(&[0]).factors(call, p, len);
    let one = of(1, 2, 3, 4, 0.3, 64);
    assert_eq!(one, of(1, 2, 3, 4, 0.3, 64));
    assert_eq!(one[..7], of(1, 2, 3, 4, 0.3, 7), "padding behind does not change a row");
    for other in [of(9, 2, 3, 4, 0.3, 64), of(1, 9, 3, 4, 0.3, 64), of(1, 2, 9, 4, 0.3, 64), of(1, 2, 3, 9, 0.3, 64)] {
        assert_ne!(one, other);
    }
    for p in [0.1, 0.3, 0.5, 0.9] {
        let values = of(1, 2, 3, 4, p, 200_000);
        let kept = (1.0 / (1.0 - p)) as f32;
        assert!(values.iter().all(|v| *v == 0.0 || *v == kept));
        let dropped = values.iter().filter(|v| **v == 0.0).count() as f64 / 200_000.0;
        assert!((dropped - p).abs() < 5.0 * (p * (1.0 - p) / 200_000.0).sqrt(), "{dropped} of {p}");
    }
    assert!(of(1, 2, 3, 4, 1.0, 8).iter().all(|v| *v == 0.0));
}

#[test]
fn dropout_is_the_identity_in_inference_and_at_zero() {
    let estimator = Estimator { seed: SEED, ..Estimator::new(Space::activation()) };
    let batch = batch(&IDS, (SEED, 0), 0.4);
    let (dropping, none) = (model(0.4, false), model(0.0, false));
    let logits = |model: &Dropped<AB>| model.valid().forward(batch.input.clone(), &mut Probe::clean()).into_data();
    assert_eq!(logits(&dropping), logits(&none));
    assert_eq!(figures(&estimator, &none, &batch, 0), figures(&estimator, &none, &batch, 0));
    let (plain, trained) = (none.valid(), trained_parameters(&none));
    let clean = estimator.clean(&plain, &batch, &trained).unwrap();
    let inferred = plain.losses(plain.forward(batch.input.clone(), &mut Probe::clean()), batch.target.clone());
    let inferred: Vec<f64> = inferred.into_data().iter::<f64>().collect();
    clean.losses.iter().zip(&inferred).for_each(|(a, b)| assert!((a - b).abs() < 1e-6));
}

#[test]
fn a_probability_that_is_none_is_an_error() {
    let estimator = Estimator::new(Space::activation());
    let batch = batch(&IDS, (SEED, 0), 0.4);
    for prob in [-0.1, 1.5, f64::NAN] {
        let mut with_graph = model(0.4, false);
        with_graph.dropout.prob = prob;
        let (plain, trained) = (with_graph.valid(), trained_parameters(&with_graph));
        let error = estimator.clean(&plain, &batch, &trained).map(|_| ()).unwrap_err();
        assert!(matches!(error, Error::Setting { name: "prob of a dropout", .. }), "{error}");
    }
}

/// What does not depend on the input gets a mask for each example, too.
#[test]
fn a_single_row_for_all_is_dropped_for_each_example() {
    let key = StepKey { seed: 1, step: 2, ids: &IDS };
    let mut probe = Probe::<B>::trace(Arc::default(), None, false).with_examples(key.examples(&[0, 1, 2, 3, 4]));
    let dropout = DropoutConfig::new(0.5).init();
    let y = probe.dropout(&dropout, Tensor::<B, 3>::ones([1, 4, 5], &Default::default()));
    assert_eq!(y.dims(), [EXAMPLES, 4, 5]);
    let expected = key.examples(&[0, 1, 2, 3, 4]).factors(0, 0.5, 20);
    assert_eq!(y.into_data().iter::<f32>().collect::<Vec<_>>(), expected);
    let x = Tensor::<B, 2>::ones([3, 5], &Default::default());
    assert_eq!(probe.dropout(&dropout, x).dims(), [3, 5]);
    let expected = Error::Length { name: "rows at a dropout", got: 3, expected: EXAMPLES };
    assert_eq!(probe.traced().fault, Some(expected));
}
