//! Padding changes neither the estimate nor its variance, where it is masked.

use std::sync::Arc;

use burn::module::{AutodiffModule, Module};
use burn::nn::{Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig, Linear, LinearConfig};
use burn::prelude::*;

use super::tests::figures_of;
use super::*;
use crate::allocator::{Allocation, QueryBudget};
use crate::batch::Batch;
use crate::control_variate::Prediction;
use crate::error::Error;
use crate::losses::cross_entropy;
use crate::model::ForwardModel;
use crate::noise::{NoiseLaw, Placement, Sampling, forced};
use crate::probe::Probe;
use crate::testing::{AB, B, flat, reseeded};

const WORDS: usize = 4;
const DIM: usize = 3;
const EXAMPLES: usize = 3;

/// Words, a residual layer on each of them, and their mean.
#[derive(Module, Debug)]
struct Text<B: Backend> {
    table: Embedding<B>,
    norm: LayerNorm<B>,
    mix: Linear<B>,
    head: Linear<B>,
    /// Whether the probe is told of the padding.
    masked: bool,
}

impl<B: Backend> Text<B> {
    fn scope<T>(&self, mask: Tensor<B, 2, Int>, probe: &mut Probe<B>, run: impl FnOnce(&mut Probe<B>) -> T) -> T {
        if self.masked { probe.masked(mask, run) } else { run(probe) }
    }
}

impl<B: Backend> ForwardModel<B> for Text<B> {
    type Input = (Tensor<B, 2, Int>, Tensor<B, 2, Int>);
    type Target = Tensor<B, 1, Int>;
    type Output = Tensor<B, 2>;

    fn forward(&self, (ids, mask): Self::Input, probe: &mut Probe<B>) -> Tensor<B, 2> {
        // one mask in a stage, the other around one
        let x = probe.stage((ids, mask.clone()), |(ids, mask), probe| {
            self.scope(mask, probe, |probe| probe.embedding(&self.table, ids))
        });
        let x = self.scope(mask.clone(), probe, |probe| {
            probe.stage(x, |x, probe| {
                let h = probe.layer_norm(&self.norm, x.clone());
                let h = probe.linear(&self.mix, h).tanh();
                probe.add(x, h)
            })
        });
        let weights = mask.clone().float() / mask.float().sum_dim(1);
        let [x, weights] = probe.align([x, weights.unsqueeze_dim(2)]);
        probe.linear(&self.head, (x * weights).sum_dim(1).squeeze_dim::<2>(1))
    }

    fn losses(&self, logits: Tensor<B, 2>, target: Tensor<B, 1, Int>) -> Tensor<B, 1> {
        cross_entropy(logits, target)
    }
}

fn text(masked: bool) -> Text<AB> {
    let device = Default::default();
    let text = Text {
        table: EmbeddingConfig::new(6, DIM).init(&device),
        norm: LayerNormConfig::new(DIM).init(&device),
        mix: LinearConfig::new(DIM, DIM).init(&device),
        head: LinearConfig::new(DIM, DIM).init(&device),
        masked,
    };
    reseeded(text, 5)
}

type TextBatch = Batch<(Tensor<B, 2, Int>, Tensor<B, 2, Int>), Tensor<B, 1, Int>>;

/// Three texts, the last of two words, and `pads` tokens of padding behind four.
fn batch(pads: usize) -> TextBatch {
    let (device, tokens) = (Default::default(), WORDS + pads);
    let word = |i: usize| ((i / tokens * 5 + i % tokens * 7) % 6) as i32;
    let real = |i: usize| i32::from(i % tokens < if i / tokens == 2 { 2 } else { WORDS });
    let tensor = |f: &dyn Fn(usize) -> i32| {
        Tensor::from_data(TensorData::new((0..EXAMPLES * tokens).map(f).collect(), [EXAMPLES, tokens]), &device)
    };
    Batch { ids: vec![7, 8, 9], input: (tensor(&word), tensor(&real)), target: Tensor::from_ints([0, 1, 2], &device) }
}

/// Losses, second moments and gradients of an estimate.
fn figures(estimator: &Estimator, masked: bool, pads: usize, prediction: Option<Prediction>) -> [Vec<f64>; 3] {
    let with_graph = text(masked);
    let (model, trained, batch) = (with_graph.valid(), trained_parameters(&with_graph), batch(pads));
    let mut clean = estimator.clean(&model, &batch, &trained).unwrap();
    clean.set_prediction(prediction.map(|prediction| prediction.with_layouts(clean.sites())));
    let allocation = Allocation::uniform(EXAMPLES, &QueryBudget::new(6, 1).unwrap());
    figures_of(&clean, &allocation, 3)
}

/// Relative distance of two vectors.
fn distance(a: &[f64], b: &[f64]) -> f64 {
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|v| v * v).sum::<f64>().sqrt();
    norm(&mut a.iter().zip(b).map(|(a, b)| a - b)) / norm(&mut a.iter().copied())
}

/// σ = 0.5, so that rounding is not divided by a small number.
fn estimator(space: Space) -> Estimator {
    Estimator { sigma: 0.5, noise: NoiseLaw::Gaussian, ..Estimator::new(space) }
}

#[test]
fn a_padded_batch_keeps_the_estimate_and_its_variance() {
    for space in [
        Space::activation(),
        Space::activation().with_placement(Placement::Single).unwrap(),
        Space::low_rank(2),
        Space::low_rank(1).with_placement(Placement::Single).unwrap(),
        Space::weights(),
    ] {
        for sampling in [Sampling::OneSided, Sampling::Antithetic] {
            let estimator = Estimator { sampling, ..estimator(space) };
            let (short, long) = (figures(&estimator, true, 0, None), figures(&estimator, true, 16, None));
            for (what, (a, b)) in ["losses", "second moments", "gradient"].iter().zip(short.iter().zip(&long)) {
                assert!(distance(a, b) < 1e-5, "{what} in {space}: {a:?}, padded {b:?}");
            }
        }
    }
}

/// What the mask is for: without it, a few words of twenty tokens pay for the noise on the others.
///
/// Second moments are means over 400 steps of 6 queries per text.
#[test]
fn padding_that_is_not_masked_raises_the_variance() {
    let [masked, unmasked] = [true, false].map(|masked| {
        let with_graph = text(masked);
        let (model, trained, batch) = (with_graph.valid(), trained_parameters(&with_graph), batch(16));
        let estimator = estimator(Space::activation());
        let clean = estimator.clean(&model, &batch, &trained).unwrap();
        let allocation = Allocation::uniform(EXAMPLES, &QueryBudget::new(6, 1).unwrap());
        let mut means = vec![0.0; EXAMPLES];
        for step in 0..400 {
            let [_, squares, _] = figures_of(&clean, &allocation, step);
            means.iter_mut().zip(squares).for_each(|(mean, square)| *mean += square / 400.0);
        }
        means
    });
    assert!(unmasked.iter().zip(&masked).all(|(u, m)| u > m), "{unmasked:?}, masked {masked:?}");
    assert!(unmasked.iter().sum::<f64>() > 2.0 * masked.iter().sum::<f64>(), "{unmasked:?}, masked {masked:?}");
}

/// A prediction at masked tokens is neither subtracted from losses nor added to gradients.
#[test]
fn the_control_variate_does_not_look_at_padding() {
    let predicted = |pads: usize, at_pads: f32| {
        let tokens = WORDS + pads;
        let width = |tokens: usize| {
            (0..EXAMPLES * tokens * DIM).map(move |i| {
                let (row, token, k) = (i / (tokens * DIM), i / DIM % tokens, i % DIM);
                let real = token < if row == 2 { 2 } else { WORDS };
                if real { ((row * 31 + token * 7 + k) as f32).sin() } else { at_pads }
            })
        };
        let sites = vec![(0.5, width(tokens).collect()); 3];
        let head = (0..EXAMPLES * DIM).map(|i| (i as f32).cos()).collect();
        Prediction::fixed(EXAMPLES, [sites, vec![(1.0, head)]].concat())
    };
    for placement in [Placement::Joint, Placement::Single] {
        let estimator = estimator(Space::activation().with_placement(placement).unwrap());
        let short = figures(&estimator, true, 0, Some(predicted(0, 9.0)));
        let long = figures(&estimator, true, 16, Some(predicted(16, -5.0)));
        short.iter().zip(&long).for_each(|(a, b)| assert!(distance(a, b) < 1e-5, "{a:?}, padded {b:?}"));
        let without = figures(&estimator, true, 0, None);
        assert!(distance(&short[2], &without[2]) > 0.05, "the prediction changes the estimate");
        // noise of a device that the host looks at, because of the prediction
        let device = forced::on(|| figures(&estimator, true, 16, Some(predicted(16, -5.0))));
        device.iter().zip(&long).for_each(|(a, b)| assert!(distance(a, b) < 1e-5, "{a:?}, on a device {b:?}"));
    }
}

/// On a device the noise of later sites depends on the widths of earlier ones, so estimates agree
/// in law alone.
///
/// Over 400 estimates of 6 queries each the means differ by a vector of squared length (Tr Σ + Tr
/// Σ')/400 in the mean; 8 times that has a probability below 10⁻⁴ (Chernoff, Σ of rank one being
/// the worst case). The variances agree within 30 %: their standard error is below 6 %. Unmasked,
/// the variance doubles.
#[test]
fn device_noise_stays_off_padding() {
    let with_graph = text(true);
    let (model, trained) = (with_graph.valid(), trained_parameters(&with_graph));
    let estimator = Estimator { sigma: 0.01, ..estimator(Space::activation()) };
    let estimates = |pads: usize| -> (Vec<Vec<f64>>, Vec<f64>) {
        let batch = batch(pads);
        let clean = estimator.clean(&model, &batch, &trained).unwrap();
        let allocation = Allocation::uniform(EXAMPLES, &QueryBudget::new(6, 1).unwrap());
        let mut moments = vec![0.0; EXAMPLES];
        let samples = (0..400).map(|step| {
            let estimate = clean.estimate(&allocation, step).unwrap();
            moments.iter_mut().zip(&estimate.second_moments).for_each(|(m, e)| *m += e / 400.0);
            let of = |id| estimate.gradients.get(id).map(|g| g.to_data().iter::<f64>().collect());
            flat(&model, &mut |id, _| of(id))
        });
        (samples.collect(), moments)
    };
    let ((short, of_short), (long, of_long)) = forced::on(|| (estimates(0), estimates(16)));
    let mean = |x: &[Vec<f64>]| -> Vec<f64> {
        (0..x[0].len()).map(|i| x.iter().map(|s| s[i]).sum::<f64>() / x.len() as f64).collect()
    };
    let (a, b) = (mean(&short), mean(&long));
    let squared = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| (x - y).powi(2)).sum::<f64>();
    let spread = short.iter().map(|s| squared(s, &a)).sum::<f64>() / 400.0;
    let spread_of_long = long.iter().map(|s| squared(s, &b)).sum::<f64>() / 400.0;
    assert!(squared(&a, &b) < 8.0 * (spread + spread_of_long) / 400.0);
    assert!((spread_of_long / spread - 1.0).abs() < 0.3, "{spread}, padded {spread_of_long}");
    assert!(distance(&of_short, &of_long) < 0.3, "{of_short:?}, padded {of_long:?}");
}

/// A mask of another number of rows than the batch is an error that says so.
#[test]
fn a_mask_of_other_rows_is_an_error() {
    let with_graph = text(true);
    let (model, trained, batch) = (with_graph.valid(), trained_parameters(&with_graph), batch(0));
    let forward = |model: &Text<B>, mask: Tensor<B, 2, Int>| {
        let key = crate::probe::StepKey { seed: 0, step: 0, ids: &batch.ids };
        let mut probe = Probe::trace(Arc::clone(&trained), None, false).with_examples(key.examples(&[0, 1, 2]));
        probe.masked(mask, |probe| probe.embedding(&model.table, batch.input.0.clone()));
        probe.traced().fault
    };
    let of = |rows: usize| Tensor::ones([rows, WORDS], &Default::default());
    assert_eq!(forward(&model, of(2)), Some(Error::Length { name: "token mask", got: 2, expected: 3 }));
    assert_eq!((forward(&model, of(3)), forward(&model, of(1))), (None, None));
}
