//! Nothing trained is lost, values are what dequantization says, checkpoints, and training on grids.

use burn::module::{AutodiffModule, Module, Quantizer};
use burn::nn::{Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig, Linear, LinearConfig};
use burn::optim::{AdamConfig, Optimizer, SgdConfig};
use burn::prelude::*;
use burn::record::{BinBytesRecorder, DefaultRecorder, FullPrecisionSettings, HalfPrecisionSettings, Recorder};
use burn::tensor::DType;
use burn::tensor::quantization::{Calibration, QuantLevel, QuantScheme, QuantStore, QuantValue};
use burn::train::TrainStep;

use super::codes::{Codes, RoundKey};
use super::*;
use crate::allocator::{QueryBudget, Uniform};
use crate::batch::Batch;
use crate::estimator::{Space, trained_parameters};
use crate::losses::cross_entropy;
use crate::model::ForwardModel;
use crate::parameters::parameters;
use crate::probe::Probe;
use crate::testing::{AB, B, reseeded, weights, zoo, zoo_batch};
use crate::train::param_groups::{GroupedOptimizer, ParamGroup};
use crate::train::{BackpropLearner, ForwardConfig, ForwardLearner};

/// An embedding that a later layer shares, and linear layers; the last one's width is 3.
#[derive(Module, Debug)]
struct Net<B: Backend> {
    table: Embedding<B>,
    norm: LayerNorm<B>,
    body: Linear<B>,
    head: Linear<B>,
    out: Linear<B>,
}

impl<B: Backend> ForwardModel<B> for Net<B> {
    type Input = Tensor<B, 2, Int>;
    type Target = Tensor<B, 1, Int>;
    type Output = Tensor<B, 2>;

    fn forward(&self, words: Self::Input, probe: &mut Probe<B>) -> Tensor<B, 2> {
        let x = probe.stage(words, |words, probe| probe.embedding(&self.table, words));
        let x = probe.stage(x, |x, probe| {
            let h = probe.layer_norm(&self.norm, x);
            probe.linear(&self.body, h).tanh()
        });
        let x = x.mean_dim(1).squeeze_dim::<2>(1);
        let x = probe.linear(&self.head, x);
        let x = probe.tied_linear(&self.table.weight, x);
        probe.linear(&self.out, x)
    }

    fn losses(&self, logits: Tensor<B, 2>, target: Tensor<B, 1, Int>) -> Tensor<B, 1> {
        cross_entropy(logits, target)
    }

    fn classification(&self, o: &Tensor<B, 2>, t: &Tensor<B, 1, Int>) -> Option<(Tensor<B, 2>, Tensor<B, 1, Int>)> {
        Some((o.clone(), t.clone()))
    }
}

/// Table, norm and body are frozen; head and out are trained: 4 of 9 parameters.
fn net(seed: u64) -> Net<AB> {
    let device = Default::default();
    let net = Net {
        table: EmbeddingConfig::new(8, 32).init(&device),
        norm: LayerNormConfig::new(32).init(&device),
        body: LinearConfig::new(32, 64).init(&device),
        head: LinearConfig::new(64, 32).init(&device),
        out: LinearConfig::new(8, 3).init(&device),
    };
    let net = reseeded(net, seed);
    Net { table: net.table.no_grad(), norm: net.norm.no_grad(), body: net.body.no_grad(), ..net }
}

fn batch(n: usize) -> Batch<Tensor<B, 2, Int>, Tensor<B, 1, Int>> {
    let words: Vec<i32> = (0..3 * n).map(|i| (i * i % 7) as i32).collect();
    let labels: Vec<i32> = (0..n).map(|i| (i * 5 % 3) as i32).collect();
    let device = Default::default();
    Batch {
        ids: (0..n as u64).collect(),
        input: Tensor::from_data(TensorData::new(words, [n, 3]), &device),
        target: Tensor::from_data(TensorData::new(labels, [n]), &device),
    }
}

fn config(trained: TrainedWeights) -> QuantizeConfig {
    QuantizeConfig::new(WeightScheme::Int4).with_trained(trained).with_seed(5)
}

type Learner = ForwardLearner<AB, Quantized<AB, Net<AB>>, Uniform>;

fn learner(model: Quantized<AB, Net<AB>>, space: Space) -> Learner {
    let config = ForwardConfig::new(QueryBudget::new(16, 16).unwrap()).with_space(space).with_seed(2);
    ForwardLearner::new(model, Uniform, config).unwrap()
}

fn train(mut learner: Learner, optimizer: &mut impl Optimizer<Learner, AB>, lr: f64, steps: usize) -> Learner {
    let monitor = learner.monitor();
    for _ in 0..steps {
        let output = TrainStep::step(&learner, batch(12));
        assert_eq!(monitor.error(), None);
        learner = learner.optimize::<AB, _>(optimizer, lr, output.grads);
    }
    learner
}

fn logits(model: &impl ForwardModel<B, Input = Tensor<B, 2, Int>, Output = Tensor<B, 2>>) -> Vec<f32> {
    model.forward(batch(12).input, &mut Probe::clean()).into_data().to_vec().unwrap()
}

fn loss(
    model: &impl ForwardModel<B, Input = Tensor<B, 2, Int>, Target = Tensor<B, 1, Int>, Output = Tensor<B, 2>>,
) -> f32 {
    let Batch { input, target, .. } = batch(12);
    model.losses(model.forward(input, &mut Probe::clean()), target).mean().into_scalar()
}

fn close(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5 * (1.0 + a.abs()))
}

fn names(model: &impl Module<AB>) -> Vec<String> {
    parameters(model).into_iter().filter(|p| p.trained).map(|p| p.name()).collect()
}

fn bytes<S: burn::record::PrecisionSettings>(model: Quantized<AB, Net<AB>>) -> Vec<u8> {
    Recorder::<AB>::record(&BinBytesRecorder::<S>::default(), model.into_record(), ()).unwrap()
}

/// Values and their kin of every scheme.
fn schemes() -> Vec<QuantScheme> {
    let of = |value, level| QuantScheme::default().with_value(value).with_level(level);
    let all = [QuantValue::Q8F, QuantValue::Q8S, QuantValue::Q4F, QuantValue::Q4S, QuantValue::Q2F, QuantValue::Q2S];
    all.into_iter().flat_map(|value| [of(value, QuantLevel::Tensor), of(value, QuantLevel::block([4]))]).collect()
}

fn samples(n: usize) -> Vec<f32> {
    (0..n).map(|i| (1.7 * i as f32).sin() * (1.0 + i as f32 / n as f32)).collect()
}

/// Integers, scales and values are those of Burn's quantizer, and its backends read the packed words.
#[test]
fn codes_are_those_of_burn() {
    for scheme in schemes() {
        // 20 values leave the last word of 4-bit integers half empty
        let values = samples(20);
        let codes = Codes::quantize(&values, &[5, 4], (scheme, DType::F32)).unwrap();
        let device = Default::default();
        let ours: Tensor<B, 2> = Tensor::from_data(TensorData::new(values, [5, 4]), &device);
        let theirs = ours.quantize_dynamic(&scheme.with_store(QuantStore::Native)).dequantize().into_data();
        assert_eq!(codes.float::<B, 2>(&device).into_data(), theirs, "{scheme:?}");
        assert_eq!(codes.quantized::<B, 2>(&device).dequantize().into_data(), theirs, "{scheme:?}");
        assert_eq!(Codes::from_data(&codes.to_data(), DType::F32), Ok(codes));
    }
}

fn grid(len: usize) -> Codes {
    // a scale of 1: the largest value is 7
    let values: Vec<f32> = (0..len).map(|i| if i == 0 { 7.0 } else { 2.0 }).collect();
    Codes::quantize(&values, &[1, len], (WeightScheme::Int4Tensor.scheme(), DType::F32)).unwrap()
}

fn key(rounding: Rounding, update: u64) -> RoundKey {
    RoundKey { rounding, seed: 3, update, position: 1 }
}

/// Among 40,000 draws the share that rounds up has a standard deviation of at most 0.0025: five of them
/// are missed once in 1.7 million runs.
#[test]
fn stochastic_rounding_is_unbiased() {
    const N: usize = 40_000;
    for share in [0.1, 0.5, 0.83] {
        for value in [2.0 + share, -3.0 + share] {
            let mut codes = grid(N);
            codes.round(&vec![value; N], &mut None, key(Rounding::Stochastic, 0));
            let mean = codes.values().iter().sum::<f32>() / N as f32;
            let bound = 5.0 * (share * (1.0 - share) / N as f32).sqrt();
            assert!((mean - value).abs() < bound, "{value}: {mean}");
            let low = value.floor() as i8;
            assert!(codes.codes().iter().all(|&code| code == low || code == low + 1));
        }
    }
}

/// A hundred updates of a twentieth of a step are five steps; the nearest value loses all of them.
#[test]
fn error_feedback_keeps_what_nearest_loses() {
    let after = |rounding| {
        let (mut codes, mut residual) = (grid(64), None);
        for update in 0..100 {
            let values: Vec<f32> = codes.values().iter().map(|v| v - 0.05).collect();
            codes.round(&values, &mut residual, key(rounding, update));
        }
        (codes.values(), residual)
    };
    assert_eq!(after(Rounding::Nearest), (grid(64).values(), None));
    let (values, residual) = after(Rounding::ErrorFeedback);
    for (index, (value, kept)) in values.iter().zip(residual.unwrap()).enumerate() {
        let exact = if index == 0 { 7.0 } else { 2.0 } - 5.0;
        assert!((value + kept - exact).abs() < 1e-4, "{value} and {kept} are not {exact}");
        assert!(kept.abs() <= 0.5);
    }
    // the mean of 63 such walks has a standard deviation below 100·½/√(100·63) = 0.28
    let (values, _) = after(Rounding::Stochastic);
    let mean = values[1..].iter().sum::<f32>() / 63.0;
    assert!((mean + 3.0).abs() < 1.4, "{mean}");
}

#[test]
fn rounding_changes_what_an_update_changed_alone() {
    let fresh = grid(64);
    for rounding in Rounding::ALL {
        let (mut codes, mut residual) = (fresh.clone(), Some(vec![0.4; 64]));
        codes.round(&fresh.values(), &mut residual, key(rounding, 0));
        assert_eq!((&codes, residual), (&fresh, Some(vec![0.4; 64])), "{rounding}");
    }
    // one value moves, and the others stay where they are
    let mut values = fresh.values();
    values[9] = -1.5;
    let rounded = |update| {
        let mut codes = fresh.clone();
        codes.round(&values, &mut None, key(Rounding::Stochastic, update));
        codes.codes()
    };
    assert!((0..20).all(|update| rounded(update).iter().enumerate().all(|(i, &c)| i == 9 || c == fresh.codes()[i])));
    assert_eq!(rounded(4), rounded(4));
    assert!((0..20).any(|update| rounded(update) != rounded(0)), "another update draws anew");
    // beyond the grid, and no number at all
    let mut codes = fresh.clone();
    let mut values = fresh.values();
    (values[1], values[2]) = (9.3, -100.0);
    codes.round(&values, &mut None, key(Rounding::Stochastic, 0));
    assert_eq!(codes.values()[1..3], [7.0, -7.0]);
    values[3] = f32::INFINITY;
    codes.round(&values, &mut None, key(Rounding::Nearest, 0));
    assert!(codes.values().iter().all(|value| value.is_nan()), "a loss must show it");
}

/// Why this module exists: a quantized tensor of Burn requires no gradient, so that a mapper over all
/// parameters freezes every trained matrix without a word.
#[test]
fn burn_s_quantizer_loses_trained_matrices() {
    let zoo = zoo(1);
    let before = trained_parameters(&zoo).len();
    let scheme = WeightScheme::Int8Tensor.scheme().with_store(QuantStore::Native);
    let mut quantizer = Quantizer { calibration: Calibration::MinMax, scheme };
    let quantized = crate::testing::Zoo::<AB>::from_inner(zoo.valid().quantize_weights(&mut quantizer));
    assert!(trained_parameters(&quantized).len() < before);
    let ours = quantize_frozen(Frozen(zoo).all_but_the_head(), scheme).unwrap();
    assert_eq!(names(&ours), ["model.head.weight", "model.head.bias"]);
}

struct Frozen(crate::testing::Zoo<AB>);

impl Frozen {
    fn all_but_the_head(self) -> crate::testing::Zoo<AB> {
        let head = self.0.head.clone();
        crate::testing::Zoo { head, ..self.0.no_grad() }
    }
}

#[test]
fn nothing_trained_is_lost_and_every_float_has_a_reason() {
    let before = names(&net(1));
    assert_eq!(before.len(), 4);
    let model = quantize_frozen(net(1), WeightScheme::Int4).unwrap();
    let report = model.report().clone();
    let quantized: Vec<&str> = report.quantized().map(|p| p.path.as_str()).collect();
    assert_eq!(quantized, ["table.weight", "body.weight"]);
    assert_eq!(report.to_string(), "2 parameters quantized; floats: 2 (trained), 5 (no matrix)");
    let on_grid = config(TrainedWeights::Grid).quantize(net(1)).unwrap();
    let indivisible: Vec<_> = on_grid.report().kept(Kept::Indivisible).collect();
    assert!(indivisible.len() == 1 && indivisible[0].path == "out.weight" && indivisible[0].trained);
    let scaled = config(TrainedWeights::Scales).quantize(net(1)).unwrap();
    let of_scales =
        ["model.head.bias", "model.out.weight", "model.out.bias", "model.head.weight.scales"].map(String::from);
    assert_eq!(names(&scaled), of_scales);
    // through every way that burn-train takes a model
    for model in [model, on_grid] {
        let device = Default::default();
        let forked = model.clone().fork(&device);
        let back = Quantized::<AB, Net<AB>>::from_inner(model.valid());
        let loaded = model.clone().load_record(model.clone().into_record());
        let mapped = model.clone().map(&mut Nothing);
        for (what, model) in
            [("", &model), ("forked", &forked), ("back", &back), ("loaded", &loaded), ("mapped", &mapped)]
        {
            assert_eq!(names(model), before, "{what}");
            assert_eq!(logits(&model.valid()), logits(&loaded.valid()), "{what}");
        }
        assert_eq!(names(&model.dequantized()), before);
        assert_eq!(names(&model.clone().no_grad()), Vec::<String>::new());
    }
    assert_eq!(names(&scaled.dequantized()), before);
    let table = Embedding { weight: net(1).table.weight.map(|w| w * f32::NAN) };
    let broken = quantize_frozen(Net { table, ..net(1) }, WeightScheme::Int8).unwrap();
    assert_eq!(broken.report().kept(Kept::NotFinite).count(), 1);
    // a trained block of zeros would never leave zero; a frozen one is what it is
    let without_first_row = |weight: Tensor<AB, 2>| {
        let weight = weight.inner();
        let zeros = weight.clone().slice([0..1, 0..32]).zeros_like();
        Tensor::from_inner(weight.slice_assign([0..1, 0..32], zeros)).require_grad()
    };
    let zeros = || {
        let with = |linear: Linear<AB>| Linear { weight: linear.weight.map(without_first_row), ..linear };
        let head = with(net(1).head);
        assert!(head.weight.is_require_grad());
        Net { head, ..net(1) }
    };
    for trained in [TrainedWeights::Grid, TrainedWeights::Scales] {
        let model = config(trained).quantize(zeros()).unwrap();
        let kept: Vec<_> = model.report().kept(Kept::Zeros).map(|p| p.path.as_str()).collect();
        assert_eq!((kept, names(&model)), (vec!["head.weight"], before.clone()), "{trained}");
    }
    assert_eq!(quantize_frozen(zeros().no_grad(), WeightScheme::Int4).unwrap().report().kept(Kept::Zeros).count(), 0);
    let error = quantize_frozen(net(1).out.no_grad(), WeightScheme::Int8).unwrap_err().to_string();
    assert!(error.contains("1 (last axis not divisible by the block)") && error.contains("int8-tensor"), "{error}");
}

struct Nothing;

impl<B: Backend> burn::module::ModuleMapper<B> for Nothing {}

/// Floats once a step, Burn's quantized tensors in every pass, and a model of the same floats.
#[test]
fn passes_have_the_dequantized_values() {
    for scheme in WeightScheme::ALL {
        for trained in TrainedWeights::ALL {
            let config = QuantizeConfig::new(scheme).with_trained(trained);
            let once = config.quantize(net(1)).unwrap();
            let each = config.clone().with_unpack(Unpack::EachPass).quantize(net(1)).unwrap();
            let expected = logits(&once.dequantized().valid());
            assert!(close(&logits(&once.valid()), &expected), "{scheme}, {trained}");
            assert!(close(&logits(&each.valid()), &expected), "{scheme}, {trained}, each pass");
            assert_ne!(logits(&net(1).valid()), expected);
        }
    }
    // a convolution, a class token, and a model on a backend without autodiff
    let float = zoo(1).valid();
    let batch = zoo_batch::<B>(5, 1);
    let of = |unpack| {
        let config = QuantizeConfig::new(WeightScheme::Int8Tensor).with_unpack(unpack);
        let model = config.quantize(float.clone()).unwrap();
        assert_eq!(model.report().quantized().count(), 4);
        model.forward(batch.input.clone(), &mut Probe::clean()).into_data().to_vec::<f32>().unwrap()
    };
    assert!(close(&of(Unpack::EachStep), &of(Unpack::EachPass)));
}

#[test]
fn frozen_weights_stay_and_the_loss_falls_in_every_space() {
    for (space, unpack, lr) in [
        (Space::activation(), Unpack::EachStep, 0.02),
        (Space::activation(), Unpack::EachPass, 0.02),
        (Space::weights(), Unpack::EachPass, 0.02),
    ] {
        let model = QuantizeConfig::new(WeightScheme::Int8).with_unpack(unpack).quantize(net(1)).unwrap();
        let before = (loss(&model.valid()), weights(&model.dequantized().valid()));
        // burn-train does this first
        let learner = learner(model, space).fork(&Default::default());
        let learner = train(learner, &mut AdamConfig::new().init(), lr, 60);
        let model = &learner.model;
        assert!(loss(&model.valid()) < 0.8 * before.0, "{space:?}: {} after {}", loss(&model.valid()), before.0);
        // table, norm and body come first
        let (frozen, after) = (8 * 32 + 64 + 32 * 64 + 64, weights(&model.dequantized().valid()));
        assert_eq!(after[..frozen], before.1[..frozen]);
        assert_ne!(after[frozen..], before.1[frozen..]);
    }
}

#[test]
fn trained_weights_stay_on_their_grid() {
    let head = |model: &Quantized<AB, Net<AB>>| {
        let data = model.dequantized().valid().head.weight.val().into_data();
        data.to_vec::<f32>().unwrap()
    };
    let trained = |rounding, lr| {
        let model = config(TrainedWeights::Grid).with_rounding(rounding).quantize(net(1)).unwrap();
        let before = (loss(&model.valid()), head(&model));
        // the groups make several maps of an update
        let groups = [ParamGroup::new("model.out", 1.0)];
        let mut optimizer = GroupedOptimizer::new(AdamConfig::new().init(), groups);
        let learner = train(learner(model, Space::activation()), &mut optimizer, lr, 60);
        (before, learner.model)
    };
    for rounding in Rounding::ALL {
        let ((before, weight), model) = trained(rounding, 0.02);
        assert!(loss(&model.valid()) < 0.8 * before, "{rounding}: {} after {before}", loss(&model.valid()));
        let moved = head(&model).iter().zip(&weight).filter(|(a, b)| a != b).count();
        // Adam's first updates are 0.02, and half a step of this grid is above 0.05
        assert_eq!(moved == 0, rounding == Rounding::Nearest, "{rounding}: {moved}");
        let bytes = model.weight_bytes();
        assert_eq!(bytes.residuals, if rounding == Rounding::ErrorFeedback { 4 * 64 * 32 } else { 0 });
        assert!(bytes.quantized < (8 * 32 + 32 * 64 + 64 * 32) * 5 / 8 + 1, "{bytes:?}");
        // integers of four bits times the scales of before
        let steps: Vec<f32> = head(&model)
            .chunks(32)
            .zip(weight.chunks(32))
            .flat_map(|(after, before)| {
                let scale = before.iter().fold(0f32, |max, v| max.max(v.abs())) / 7.0;
                after.iter().map(move |v| v / scale).collect::<Vec<_>>()
            })
            .collect();
        assert!(steps.iter().all(|x| (x - x.round()).abs() < 1e-4 && x.abs() < 7.001));
    }
    let [a, b] = [1, 2].map(|_| head(&trained(Rounding::Stochastic, 0.02).1));
    assert_eq!(a, b, "the same seed gives the same bits");
}

#[test]
fn scales_alone_are_trained() {
    let model = config(TrainedWeights::Scales).quantize(net(1)).unwrap();
    let error = {
        let learner = learner(model.clone(), Space::activation());
        learner.check(&batch(12)).unwrap_err().to_string()
    };
    assert!(error.contains("model.head.weight.scales") && error.contains("weight space"), "{error}");
    // the rest of what is trained is frozen here
    let frozen = Net { head: Linear { bias: None, ..net(1).head }, out: net(1).out.no_grad(), ..net(1) };
    let model = config(TrainedWeights::Scales).quantize(frozen).unwrap();
    assert_eq!(names(&model), ["model.head.weight.scales"]);
    let before =
        (loss(&model.valid()), model.dequantized().valid().head.weight.val().into_data().to_vec::<f32>().unwrap());
    let learner = train(learner(model, Space::weights()), &mut AdamConfig::new().init(), 0.05, 60);
    let model = learner.model;
    assert!(loss(&model.valid()) < 0.8 * before.0, "{} after {}", loss(&model.valid()), before.0);
    let after = model.dequantized().valid().head.weight.val().into_data().to_vec::<f32>().unwrap();
    // one factor for each block
    for (after, before) in after.chunks(32).zip(before.1.chunks(32)) {
        let factors: Vec<f32> = after.iter().zip(before).filter(|(_, b)| **b != 0.0).map(|(a, b)| a / b).collect();
        assert!(factors.iter().all(|f| (f - factors[0]).abs() < 1e-4 * factors[0].abs()), "{factors:?}");
    }
    assert_ne!(after, before.1);
    let fixed = model.clone().with_fixed_scales();
    assert!(names(&fixed).is_empty() && close(&logits(&fixed.valid()), &logits(&model.valid())));
}

/// Steps, optimizer, integers, what error feedback keeps and the draws of rounding go on as they were.
#[test]
fn a_resumed_run_ends_on_the_same_bits() {
    for (trained, rounding) in [
        (TrainedWeights::Float, Rounding::Nearest),
        (TrainedWeights::Grid, Rounding::Stochastic),
        (TrainedWeights::Grid, Rounding::ErrorFeedback),
        (TrainedWeights::Scales, Rounding::Nearest),
    ] {
        let fresh = |seed| {
            let model = config(trained).with_rounding(rounding).quantize(net(seed)).unwrap();
            learner(model, if trained == TrainedWeights::Scales { Space::weights() } else { Space::activation() })
        };
        let mut optimizer = AdamConfig::new().init();
        let half = train(fresh(1), &mut optimizer, 0.05, 4);
        let recorder = BinBytesRecorder::<FullPrecisionSettings>::default();
        let saved = Recorder::<AB>::record(&recorder, half.clone().into_record(), ()).unwrap();
        let saved_optimizer = Recorder::<AB>::record(&recorder, optimizer.to_record(), ()).unwrap();
        let whole = train(half, &mut optimizer, 0.05, 4).model.valid();

        let device = Default::default();
        let learner = fresh(9).load_record(Recorder::<AB>::load(&recorder, saved.clone(), &device).unwrap());
        let mut optimizer = AdamConfig::new().init();
        optimizer = optimizer.load_record(Recorder::<AB>::load(&recorder, saved_optimizer, &device).unwrap());
        let resumed = train(learner, &mut optimizer, 0.05, 4).model.valid();
        assert_eq!(logits(&resumed), logits(&whole), "{trained}, {rounding}");

        // a checkpoint of training, loaded where nothing is trained
        let plain = fresh(9).valid();
        let plain = plain.load_record(Recorder::<B>::load(&recorder, saved.clone(), &device).unwrap());
        let again = fresh(1).load_record(Recorder::<AB>::load(&recorder, saved, &device).unwrap());
        assert_eq!(logits(&plain.model), logits(&again.valid().model), "{trained}, {rounding}");
    }
}

#[test]
fn records_hold_the_bits_at_any_precision_and_others_are_refused() {
    let device = Default::default();
    let model = config(TrainedWeights::Grid).quantize(net(1)).unwrap();
    let float = |model: Net<AB>| {
        Recorder::<AB>::record(&BinBytesRecorder::<FullPrecisionSettings>::default(), model.into_record(), ()).unwrap()
    };
    let full = bytes::<FullPrecisionSettings>(model.clone());
    assert!(2 * full.len() < float(net(1)).len(), "{} bytes", full.len());
    let half = bytes::<HalfPrecisionSettings>(model.clone());
    let recorder = BinBytesRecorder::<HalfPrecisionSettings>::default();
    let loaded = config(TrainedWeights::Grid).quantize(net(7)).unwrap();
    let loaded = loaded.load_record(Recorder::<AB>::load(&recorder, half, &device).unwrap());
    let [a, b] = [&loaded, &model].map(|m| m.dequantized().valid());
    for (a, b) in [(&a.table.weight, &b.table.weight), (&a.head.weight, &b.head.weight)] {
        assert_eq!(a.val().into_data(), b.val().into_data());
    }

    let recorder = BinBytesRecorder::<FullPrecisionSettings>::default();
    let record = || Recorder::<AB>::load::<QuantizedRecord<_>>(&recorder, full.clone(), &device).unwrap();
    let refused =
        |config: QuantizeConfig| config.quantize(net(1)).unwrap().try_load_record(record()).unwrap_err().to_string();
    let frozen = refused(config(TrainedWeights::Float));
    assert!(frozen.contains("has 3 quantized weights where the model has 2"), "{frozen}");
    let int8 = refused(QuantizeConfig::new(WeightScheme::Int8).with_trained(TrainedWeights::Grid));
    assert!(int8.contains("table.weight is [8, 32] in Q4S") && int8.contains("the model has [8, 32] in Q8S"), "{int8}");
    let scales = refused(config(TrainedWeights::Scales));
    assert!(scales.contains("the scales of head.weight are fixed"), "{scales}");
    // a record of floats is none of a quantized model, nor the other way round
    let folder = tempfile::tempdir().unwrap();
    let [floats, integers] = ["floats", "integers"].map(|name| folder.path().join(name));
    let recorder = DefaultRecorder::new();
    net(1).save_file(&floats, &recorder).unwrap();
    model.clone().save_file(&integers, &recorder).unwrap();
    assert!(model.clone().load_file(&floats, &recorder, &device).is_err());
    assert!(net(1).load_file(&integers, &recorder, &device).is_err());
    let loaded = config(TrainedWeights::Grid).quantize(net(7)).unwrap();
    let loaded = loaded.load_file(&integers, &recorder, &device).unwrap();
    assert_eq!(logits(&loaded.valid()), logits(&model.valid()));
}

/// What compares the parameters of workers sees other integers.
#[test]
fn placeholders_tell_weights_apart() {
    let placeholder = |seed| {
        let model = quantize_frozen(net(seed), WeightScheme::Int4).unwrap();
        let table = model.clone().map(&mut Nothing).inner().body.weight.val();
        assert_eq!(table.dims(), [32, 64]);
        table.into_data().as_bytes().to_vec()
    };
    assert_eq!(placeholder(1), placeholder(1));
    assert_ne!(placeholder(1), placeholder(2));
}

#[test]
#[should_panic(expected = "quantized weights have no backward pass")]
fn backpropagation_is_refused() {
    let model = quantize_frozen(net(1), WeightScheme::Int4).unwrap();
    TrainStep::step(&BackpropLearner::new(model), batch(4));
}

/// An update that is not finite shows in the loss.
#[test]
fn a_broken_update_is_not_hidden() {
    let model = config(TrainedWeights::Grid).quantize(net(1)).unwrap();
    let mut learner = learner(model, Space::activation());
    let output = TrainStep::step(&learner, batch(12));
    learner = learner.optimize::<AB, _>(&mut SgdConfig::new().init(), f64::MAX, output.grads);
    assert!(loss(&learner.model.valid()).is_nan());
}
