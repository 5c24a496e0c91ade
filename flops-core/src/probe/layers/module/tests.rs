//! Modules at sites, in estimates and in training.

mod recorded;

use std::collections::HashSet;
use std::sync::Arc;

use burn::module::{AutodiffModule, Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::nn::attention::{MhaInput, MultiHeadAttention, MultiHeadAttentionConfig};
use burn::nn::transformer::{TransformerEncoderConfig, TransformerEncoderLayer};
use burn::nn::{
    BatchNorm, BatchNormConfig, Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig, Linear, LinearConfig, Lstm,
    LstmConfig,
};
use burn::optim::AdamConfig;
use burn::prelude::*;
use burn::tensor::DType;
use burn::train::TrainStep;

use crate::allocator::{Allocation, QueryBudget, Uniform};
use crate::batch::Batch;
use crate::error::Error;
use crate::estimator::{Estimate, Estimator, Space, trained_parameters};
use crate::losses::cross_entropy;
use crate::model::ForwardModel;
use crate::noise::{NoiseLaw, Placement, Sampling};
use crate::probe::stages::Prefix;
use crate::probe::{Gradients, Probe, Recorded};
use crate::testing::{AB, B, flat, reseeded, true_gradient, weights};
use crate::train::{BackpropLearner, ForwardConfig, ForwardLearner, TrainBatch, Trainable};

const DIM: usize = 4;
const WORDS: usize = 3;
const EXAMPLES: usize = 4;

/// Words, four of Burn's modules and a layer of this library.
#[derive(Module, Debug)]
struct Text<B: Backend> {
    table: Embedding<B>,
    lstm: Lstm<B>,
    attention: MultiHeadAttention<B>,
    block: TransformerEncoderLayer<B>,
    head: Linear<B>,
}

impl<B: Backend> ForwardModel<B> for Text<B> {
    /// Ids of words, and 1 at each that is no padding.
    type Input = (Tensor<B, 2, Int>, Tensor<B, 2, Int>);
    type Target = Tensor<B, 1, Int>;
    type Output = Tensor<B, 2>;

    fn forward(&self, (ids, real): Self::Input, probe: &mut Probe<B>) -> Tensor<B, 2> {
        let (x, real) = probe.stage((ids, real), |(ids, real), probe| {
            let x = probe.masked(real.clone(), |probe| {
                let x = probe.module(&self.table, ids, Embedding::forward, Embedding::forward);
                site!(probe, &self.lstm, x, |lstm, x| lstm.forward(x, None).0)
            });
            (x, real)
        });
        let padding = real.clone().equal_elem(0);
        let x = probe.stage((x, padding), |(x, padding), probe| {
            let h = probe.masked(real.clone(), |probe| {
                site!(probe, &self.attention, (x.clone(), padding.clone()), |layer, (x, padding)| {
                    layer.forward(MhaInput::self_attn(x).mask_pad(padding)).context
                })
            });
            let x = probe.add(x, h);
            probe.masked(real.clone(), |probe| {
                site!(probe, &self.block, (x, Some(padding)), |block, (x, padding)| block.forward(x, padding, None))
            })
        });
        let weights = real.clone().float() / real.float().sum_dim(1);
        let [x, weights] = probe.align([x, weights.unsqueeze_dim(2)]);
        probe.linear(&self.head, (x * weights).sum_dim(1).squeeze_dim::<2>(1))
    }

    fn losses(&self, logits: Tensor<B, 2>, target: Tensor<B, 1, Int>) -> Tensor<B, 1> {
        cross_entropy(logits, target)
    }

    fn classification(&self, o: &Tensor<B, 2>, t: &Tensor<B, 1, Int>) -> Option<(Tensor<B, 2>, Tensor<B, 1, Int>)> {
        Some((o.clone(), t.clone()))
    }
}

fn text(dropout: f64) -> Text<AB> {
    let device = Default::default();
    let block = TransformerEncoderConfig::new(DIM, 6, 2, 1).with_norm_first(true);
    let text = Text {
        table: EmbeddingConfig::new(6, DIM).init(&device),
        lstm: LstmConfig::new(DIM, DIM, true).init(&device),
        attention: MultiHeadAttentionConfig::new(DIM, 2).with_dropout(0.0).init(&device),
        block: TransformerEncoderLayer::new(&block.with_dropout(dropout), &device),
        head: LinearConfig::new(DIM, 3).init(&device),
    };
    reseeded(text, 5)
}

type TextBatch<B> = Batch<(Tensor<B, 2, Int>, Tensor<B, 2, Int>), Tensor<B, 1, Int>>;

/// Texts of three words, the last of two, and `pads` tokens of padding.
fn batch<B: Backend>(pads: usize) -> TextBatch<B> {
    let (device, tokens) = (Default::default(), WORDS + pads);
    let word = |i: usize| ((i / tokens * 5 + i % tokens * 7) % 6) as i32;
    let real = |i: usize| i32::from(i % tokens < if i / tokens == EXAMPLES - 1 { 2 } else { WORDS });
    let tensor = |f: &dyn Fn(usize) -> i32| {
        Tensor::from_data(TensorData::new((0..EXAMPLES * tokens).map(f).collect(), [EXAMPLES, tokens]), &device)
    };
    Batch {
        ids: vec![7, 8, 9, 2],
        input: (tensor(&word), tensor(&real)),
        target: Tensor::from_ints([0, 1, 2, 1], &device),
    }
}

/// The gradients of all parameters, in the order of the model's fields.
fn vector<M: Module<B>>(model: &M, estimate: &Estimate<B>) -> Vec<f64> {
    struct Visit<'a>(&'a Estimate<B>, Vec<f64>);
    impl ModuleVisitor<B> for Visit<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            let zeros = || param.val().zeros_like();
            self.1.extend(self.0.gradient(param).unwrap_or_else(zeros).into_data().iter::<f64>());
        }
    }
    let mut visit = Visit(estimate, vec![]);
    model.visit(&mut visit);
    visit.1
}

/// Losses, second moments and gradients of an estimate of six queries each.
fn figures<M: ForwardModel<B>>(
    estimator: &Estimator,
    model: &M,
    batch: &Batch<M::Input, M::Target>,
    trained: &Arc<HashSet<ParamId>>,
) -> [Vec<f64>; 3] {
    let clean = estimator.clean(model, batch, trained).unwrap();
    let allocation = Allocation::uniform(batch.ids.len(), &QueryBudget::new(6, 1).unwrap());
    let estimate = clean.estimate(&allocation, 3).unwrap();
    let gradient = vector(model, &estimate);
    [clean.losses.clone(), estimate.second_moments, gradient]
}

/// Distance of two vectors, relative to the second.
fn distance(a: &[f64], b: &[f64]) -> f64 {
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|v| v * v).sum::<f64>().sqrt();
    assert_eq!(a.len(), b.len());
    norm(&mut a.iter().zip(b).map(|(a, b)| a - b)) / norm(&mut b.iter().copied())
}

fn spaces() -> [Space; 3] {
    [Space::activation(), Space::activation().with_placement(Placement::Single).unwrap(), Space::low_rank(1)]
}

/// Two layers of this library, by its methods or as modules.
#[derive(Module, Debug)]
struct Layers<B: Backend> {
    norm: LayerNorm<B>,
    linear: Linear<B>,
    as_modules: bool,
}

impl<B: Backend> ForwardModel<B> for Layers<B> {
    type Input = Tensor<B, 3>;
    type Target = ();
    type Output = Tensor<B, 2>;

    fn forward(&self, x: Tensor<B, 3>, probe: &mut Probe<B>) -> Tensor<B, 2> {
        let h = match self.as_modules {
            true => probe.module(&self.norm, x, LayerNorm::forward, LayerNorm::forward),
            false => probe.layer_norm(&self.norm, x),
        };
        let h = match self.as_modules {
            true => probe.module(&self.linear, h, Linear::forward, Linear::forward),
            false => probe.linear(&self.linear, h),
        };
        h.tanh().sum_dim(1).squeeze_dim(1)
    }

    fn losses(&self, y: Tensor<B, 2>, (): ()) -> Tensor<B, 1> {
        y.powi_scalar(2).sum_dim(1).squeeze_dim(1)
    }
}

/// A layer as a module gives the estimate of the layer's own method, from the same noise.
#[test]
fn a_module_gives_the_estimate_of_the_layer_inside() {
    let device = Default::default();
    let layers = |as_modules| {
        let (norm, linear) = (LayerNormConfig::new(3).init(&device), LinearConfig::new(3, 2).init(&device));
        reseeded(Layers::<AB> { norm, linear, as_modules }, 2)
    };
    let x = Tensor::<B, 1, Int>::arange(0..24, &device).float().sin().reshape([4, 2, 3]);
    let batch = Batch { ids: vec![0, 1, 2, 3], input: x, target: () };
    for placement in [Placement::Joint, Placement::Single] {
        let estimator = Estimator::new(Space::activation().with_placement(placement).unwrap());
        let [by_hand, as_modules] = [false, true].map(|as_modules| {
            let model = layers(as_modules);
            figures(&estimator, &model.valid(), &batch, &trained_parameters(&model))
        });
        assert_eq!(as_modules[0], by_hand[0], "losses");
        assert!(distance(&as_modules[2], &by_hand[2]) < 1e-5, "{as_modules:?}, by hand {by_hand:?}");
    }
}

/// The mean of n = 300 estimates of 64 queries each is autodiff's gradient.
///
/// Every coordinate lies within 5.5 standard errors of it, and the projection on it within 4.5. With
/// five cases of 431 coordinates the false-failure rate is about 10⁻⁴ for fresh seeds, and zero for
/// these. At σ = 10⁻² the smoothing bias is below 10⁻³ of the gradient.
#[test]
fn estimates_are_unbiased() {
    const SAMPLES: u64 = 300;
    let mut with_graph = text(0.0);
    // parameters inside a module may be frozen
    with_graph.attention.query = with_graph.attention.query.no_grad();
    with_graph.block.norm_1 = with_graph.block.norm_1.no_grad();
    let (model, trained) = (with_graph.valid(), trained_parameters(&with_graph));
    let target = true_gradient(&with_graph, batch(1));
    let norm = target.iter().map(|g| g * g).sum::<f64>().sqrt();
    let batch = batch(1);
    for (space, noise, sampling) in [
        (spaces()[0], NoiseLaw::Rademacher, Sampling::OneSided),
        (spaces()[0], NoiseLaw::Gaussian, Sampling::Antithetic),
        (spaces()[1], NoiseLaw::Rademacher, Sampling::Antithetic),
        (spaces()[2], NoiseLaw::Rademacher, Sampling::Antithetic),
    ] {
        let estimator = Estimator { noise, sampling, seed: 11, ..Estimator::new(space) };
        let clean = estimator.clean(&model, &batch, &trained).unwrap();
        assert_eq!(clean.sites().len(), 5);
        let allocation = Allocation::uniform(EXAMPLES, &QueryBudget::new(16, 1).unwrap());
        let samples: Vec<Vec<f64>> = (0..SAMPLES)
            .map(|step| {
                let estimate = clean.estimate(&allocation, step).unwrap();
                assert!(estimate.gradient(&model.attention.query.weight).is_none());
                assert!(estimate.gradient(&model.block.norm_1.gamma).is_none());
                vector(&model, &estimate)
            })
            .collect();
        let n = SAMPLES as f64;
        for (i, g) in target.iter().enumerate() {
            let mean = samples.iter().map(|s| s[i]).sum::<f64>() / n;
            let variance = samples.iter().map(|s| (s[i] - mean).powi(2)).sum::<f64>() / (n - 1.0);
            let error = (variance / n).sqrt();
            assert!((mean - g).abs() < 5.5 * error + 1e-3 * norm, "{space}, {noise}: {mean} ± {error}, autodiff {g}");
        }
        let along: Vec<f64> =
            samples.iter().map(|s| s.iter().zip(&target).map(|(a, b)| a * b / norm).sum::<f64>()).collect();
        let mean = along.iter().sum::<f64>() / n;
        let error = (along.iter().map(|a| (a - mean).powi(2)).sum::<f64>() / (n - 1.0) / n).sqrt();
        assert!((mean - norm).abs() < 4.5 * error + 1e-3 * norm, "{space}, {noise}: {mean} ± {error} of {norm}");
    }
}

/// Threads change no bit, and another process has the same signs: ids of parameters are not in them.
#[test]
fn threads_and_ids_change_no_bit() {
    let with_graph = text(0.0);
    let again = text(0.0);
    assert_ne!(with_graph.head.weight.id, again.head.weight.id);
    for space in spaces() {
        let of = |model: &Text<AB>, threads| {
            let estimator = Estimator { threads, max_rows: 16, ..Estimator::new(space) };
            figures(&estimator, &model.valid(), &batch(1), &trained_parameters(model))
        };
        let one = of(&with_graph, 1);
        assert_eq!(of(&with_graph, 2), one, "{space}");
        assert_eq!(of(&again, 1), one, "{space}");
    }
}

/// Padding changes neither an estimate nor its second moments, where it is masked.
#[test]
fn padding_changes_nothing() {
    let with_graph = text(0.0);
    let (model, trained) = (with_graph.valid(), trained_parameters(&with_graph));
    for space in spaces() {
        let estimator = Estimator { sigma: 0.5, noise: NoiseLaw::Gaussian, ..Estimator::new(space) };
        let [short, long] = [0, 9].map(|pads| figures(&estimator, &model, &batch(pads), &trained));
        for (what, (a, b)) in ["losses", "second moments", "gradient"].iter().zip(long.iter().zip(&short)) {
            let tolerance = if *what == "second moments" { 2e-3 } else { 1e-5 };
            assert!(distance(a, b) < tolerance, "{what} in {space}: {a:?}, without padding {b:?}");
        }
    }
}

fn learner<M: Trainable<AB>>(model: M) -> ForwardLearner<AB, M, Uniform> {
    let config = ForwardConfig::new(QueryBudget::new(16, 2).unwrap()).with_sampling(Sampling::Antithetic).with_seed(3);
    ForwardLearner::new(model, Uniform, config).unwrap()
}

/// 60 steps bring the loss from above 1 to below a half, and the frozen part stays.
#[test]
fn a_learner_trains_modules() {
    let mut model = text(0.0);
    model.attention.query = model.attention.query.no_grad();
    let frozen = |model: &Text<AB>| weights(&model.attention.query.valid());
    let before = frozen(&model);
    let mut learner = learner(model);
    let (mut optimizer, mut losses) = (AdamConfig::new().init(), vec![]);
    for _ in 0..60 {
        let output = TrainStep::step(&learner, batch::<B>(1));
        losses.push(f64::from(output.item.losses.mean().into_scalar()));
        learner = learner.optimize::<AB, _>(&mut optimizer, 0.03, output.grads);
    }
    assert_eq!(learner.monitor().error(), None);
    assert!(losses[0] > 1.0 && losses[59] < 0.5, "{losses:?}");
    assert_eq!(frozen(&learner.model), before);
}

/// The baseline differentiates a module as any layer.
#[test]
fn backpropagation_goes_through_modules() {
    let model = text(0.0);
    let expected = true_gradient(&model, batch(1));
    let mut output = TrainStep::step(&BackpropLearner::new(model.clone()), batch::<B>(1));
    let plain = model.valid();
    struct Take<'a>(&'a mut burn::optim::GradientsParams, Vec<f64>);
    impl ModuleVisitor<B> for Take<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            let gradient = self.0.remove::<B, D>(param.id).expect("a gradient of every parameter");
            self.1.extend(gradient.into_data().iter::<f64>());
        }
    }
    let mut take = Take(&mut output.grads, vec![]);
    plain.visit(&mut take);
    assert!(distance(&take.1, &expected) < 1e-6);
}

/// What the first step of a learner says.
fn error_of_first_step<M: Trainable<AB> + 'static>(model: M, batch: TrainBatch<AB, M>) -> Option<Error> {
    let learner = learner(model);
    let output = TrainStep::step(&learner, batch);
    assert_eq!(output.grads.is_empty(), learner.monitor().error().is_some());
    learner.monitor().error()
}

/// Dropout inside a module is an error that names it, also at a low rate.
#[test]
fn dropout_inside_is_an_error() {
    for rate in [0.5, 0.1, 0.02] {
        let error = error_of_first_step(text(rate), batch(1));
        assert!(
            matches!(&error, Some(Error::ModuleDiffers { path, .. }) if path.starts_with("model.block.")),
            "{error:?}"
        );
        let message = error.unwrap().to_string();
        assert!(message.contains("probe.dropout") && message.contains("set dropout inside it to 0"), "{message}");
    }
    assert_eq!(error_of_first_step(text(0.0), batch(1)), None);
}

/// A batch normalisation as a module, or two functions that are not the same.
#[derive(Module, Debug)]
struct Odd<B: Backend> {
    norm: BatchNorm<B>,
    linear: Linear<B>,
    normalises: bool,
    /// Axes of the input that are no rows.
    flattens: bool,
}

impl<B: Backend> ForwardModel<B> for Odd<B> {
    type Input = Tensor<B, 3>;
    type Target = ();
    type Output = Tensor<B, 2>;

    fn forward(&self, x: Tensor<B, 3>, probe: &mut Probe<B>) -> Tensor<B, 2> {
        if self.flattens {
            let [rows, tokens, d] = x.dims();
            let flat: Tensor<B, 2> = x.reshape([rows * tokens, d]);
            let y = probe.module(&self.linear, flat, Linear::forward, Linear::forward);
            return y.reshape([rows, tokens * d]);
        }
        let y = match self.normalises {
            true => probe.module(&self.norm, x, BatchNorm::forward, BatchNorm::forward),
            false => probe.module(&self.linear, x, Linear::forward, |linear, x| linear.forward(x) * 1.01),
        };
        y.sum_dim(1).squeeze_dim(1)
    }

    fn losses(&self, y: Tensor<B, 2>, (): ()) -> Tensor<B, 1> {
        y.powi_scalar(2).sum_dim(1).squeeze_dim(1)
    }
}

/// The error of a model of one layer, with the running statistics behind it.
fn odd(normalises: bool, flattens: bool) -> (Option<Error>, Vec<f64>) {
    let device = Default::default();
    let mut odd = Odd::<AB> {
        norm: BatchNormConfig::new(2).init(&device),
        linear: LinearConfig::new(2, 2).init(&device),
        normalises,
        flattens,
    };
    match normalises {
        true => odd.linear = odd.linear.no_grad(),
        false => odd.norm = odd.norm.no_grad(),
    }
    let x = Tensor::<B, 1, Int>::arange(0..16, &device).float().sin().reshape([4, 2, 2]);
    let statistics = [odd.norm.running_mean.clone(), odd.norm.running_var.clone()];
    let error = error_of_first_step(odd, Batch { ids: vec![0, 1, 2, 3], input: x, target: () });
    (error, statistics.iter().flat_map(|s| s.value_sync().into_data().iter::<f64>().collect::<Vec<_>>()).collect())
}

/// Statistics of the batch are an error too, and the running ones stay.
#[test]
fn batch_normalisation_inside_is_an_error() {
    let (error, statistics) = odd(true, false);
    assert!(matches!(&error, Some(Error::ModuleDiffers { path, .. }) if path == "model.norm.gamma"), "{error:?}");
    assert!(error.unwrap().to_string().contains("probe.batch_norm"));
    assert_eq!(statistics, [0.0, 0.0, 1.0, 1.0]);
}

#[test]
fn two_functions_that_differ_are_an_error() {
    let (error, _) = odd(false, false);
    let Some(Error::ModuleDiffers { path, difference }) = error else { panic!("{error:?}") };
    assert_eq!(path, "model.linear.weight");
    assert!((difference - 0.01).abs() < 1e-4, "{difference}");
}

/// An input whose first axis is not its rows is an error, as for all tensors that the probe joins.
#[test]
fn an_input_without_rows_is_an_error() {
    let (error, _) = odd(false, true);
    let expected = Error::RowAxis { what: "an argument of probe.module".into(), shape: vec![8, 2], rows: 4 };
    assert_eq!(error, Some(expected));
}
