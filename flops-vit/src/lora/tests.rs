//! Adapters: what they change, how they are trained, and what merging gives.

use std::collections::HashMap;

use burn::backend::{Autodiff, Flex};
use burn::module::{AutodiffModule, ModuleMapper, ModuleVisitor, Param};
use burn::optim::AdamConfig;
use burn::prelude::*;
use burn::record::{BinBytesRecorder, FullPrecisionSettings, Recorder};
use burn::tensor::Distribution;
use burn::train::{InferenceStep, TrainStep};
use flops_core::allocator::{AllocatorKind, AnyAllocator};
use flops_core::estimator::trained_parameters;
use flops_core::{
    Allocation, Batch, Estimator, ForwardConfig, ForwardLearner, ForwardModel, Probe, QueryBudget, Space,
};
use rand::SeedableRng;
use rand::rngs::StdRng;

use crate::config::ViTConfig;
use crate::error::VitError;
use crate::model::ViT;
use crate::scope::Scope;

type AB = Autodiff<Flex>;
type Images<B> = Batch<Tensor<B, 4>, Tensor<B, 1, Int>>;

const RANK: usize = 2;

/// Two blocks of width 8, with weights large enough for attention to matter.
fn model<B: Backend>() -> ViT<B> {
    let config = ViTConfig::new().with_img_size(8).with_patch_size(4).with_embed_dim(8).with_depth(2).with_num_heads(2);
    let model = config.with_num_classes(3).init(&Default::default()).unwrap();
    redrawn(model, "", 0.3)
}

/// The same model with adapters as after training: B is not zero.
fn tuned<B: Backend>() -> ViT<B> {
    redrawn(model().with_lora(RANK, 7).unwrap(), "up.weight", 0.5)
}

/// Redraws the weights whose path ends in `path` from N(0, std²), with a fixed seed.
fn redrawn<B: Backend>(model: ViT<B>, path: &str, std: f64) -> ViT<B> {
    struct Redraw<'a>(&'a str, Vec<String>, Distribution, StdRng);
    impl<B: Backend> ModuleMapper<B> for Redraw<'_> {
        fn enter_module(&mut self, name: &str, _: &str) {
            self.1.push(name.into());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.1.pop();
        }
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
            let name = self.1.join(".");
            if !name.ends_with(self.0) || name.ends_with("gamma") {
                return param;
            }
            let data = TensorData::random::<f32, _, _>(param.dims(), self.2, &mut self.3);
            param.map(|t| Tensor::from_data(data, &t.device()).set_require_grad(t.is_require_grad()))
        }
    }
    model.map(&mut Redraw(path, vec![], Distribution::Normal(0.0, std), StdRng::seed_from_u64(5)))
}

fn images<B: Backend>(n: usize) -> Images<B> {
    let device = Default::default();
    let pixels = (0..n * 192).map(|i| (i as f32 * 0.7).sin()).collect();
    let labels: Vec<i32> = (0..n as i32).map(|i| i % 3).collect();
    Batch {
        ids: (0..n as u64).collect(),
        input: Tensor::from_data(TensorData::new(pixels, [n, 3, 8, 8]), &device),
        target: Tensor::from_ints(labels.as_slice(), &device),
    }
}

fn logits<B: Backend>(model: &ViT<B>) -> Tensor<B, 2> {
    model.forward(images(4).input, &mut Probe::clean())
}

fn distance<B: Backend>(a: Tensor<B, 2>, b: Tensor<B, 2>) -> f32 {
    (a - b).abs().max().into_scalar().elem()
}

/// Calls `of` with the name of every linear weight.
fn each<B: Backend>(model: &ViT<B>, of: impl FnMut(&str, ParamRef<'_, B>)) {
    struct Visit<F>(Vec<String>, F);
    impl<B: Backend, F: FnMut(&str, ParamRef<'_, B>)> ModuleVisitor<B> for Visit<F> {
        fn enter_module(&mut self, name: &str, _: &str) {
            self.0.push(name.into());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.0.pop();
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            // only linear weights are visited
            let any: &dyn std::any::Any = param;
            if let Some(param) = any.downcast_ref::<Param<Tensor<B, 2>>>() {
                (self.1)(&self.0.join("."), param);
            }
        }
    }
    model.visit(&mut Visit(vec![], of));
}

type ParamRef<'a, B> = &'a Param<Tensor<B, 2>>;

fn floats<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> Vec<f32> {
    tensor.into_data().to_vec().unwrap()
}

fn weights<B: Backend>(model: &ViT<B>, part: &str) -> Vec<(String, Vec<f32>)> {
    let mut found = vec![];
    each(model, |name, param| {
        if name.contains(part) {
            found.push((name.to_string(), floats(param.val())));
        }
    });
    found
}

#[test]
fn new_adapters_leave_logits_unchanged() {
    let plain = model::<Flex>();
    let fresh = plain.clone().with_lora(RANK, 7).unwrap();
    assert_eq!(logits(&plain).into_data(), logits(&fresh).into_data());
    let tuned = tuned::<Flex>();
    assert!(distance(logits(&plain), logits(&tuned)) > 0.05);
    // the class-token path has the same adapters as the path of all tokens
    let mut probe = Probe::clean();
    let all = tuned.forward_head(tuned.forward_features(images(4).input, &mut probe), &mut probe);
    let short = distance(all, logits(&tuned));
    assert!(short < 1e-5, "logits differ by {short}");
}

#[test]
fn merging_preserves_logits() {
    let tuned = tuned::<AB>().with_scope(Scope::Lora(RANK)).unwrap();
    let merged = tuned.clone().merged();
    assert_eq!(merged.lora_rank(), None);
    assert_eq!(Module::num_params(&merged), Module::num_params(&model::<Flex>()));
    let apart = distance(logits(&tuned), logits(&merged));
    assert!(apart < 1e-5, "logits differ by {apart}");
    // only query and value weights changed, and they stay frozen
    let (before, after) = (weights(&model::<AB>(), ""), weights(&merged, ""));
    for ((name, before), (_, after)) in before.iter().zip(&after) {
        let changed = name.ends_with("query.weight") || name.ends_with("value.weight");
        assert_eq!(before != after, changed, "{name}");
    }
    each(&merged, |name, param| assert_eq!(param.is_require_grad(), name == "head.weight", "{name}"));
    assert_eq!(logits(&merged).into_data(), logits(&merged.clone().merged()).into_data());
}

#[test]
fn adapters_are_a_function_of_the_seed() {
    let down = |seed| weights(&model::<Flex>().with_lora(RANK, seed).unwrap(), "down");
    let first = down(7);
    assert_eq!(first.len(), 4);
    assert_eq!(first, down(7));
    for (a, b) in first.iter().zip(&down(8)) {
        assert_ne!(a.1, b.1, "{}", a.0);
    }
    for (i, a) in first.iter().enumerate() {
        assert!(first[..i].iter().all(|b| a.1 != b.1), "{} is another adapter's", a.0);
    }
    // a head of the same seed comes from another stream; the stds differ by the factor 0.02·√8
    let head = weights(&model::<Flex>().with_new_head(RANK, 7), "head").remove(0).1;
    assert!((head[0] / first[0].1[0] - 0.02 * 8f32.sqrt()).abs() > 1e-3);
}

#[test]
fn errors_name_the_rank() {
    for rank in [0, 9, usize::MAX] {
        let error = model::<Flex>().with_lora(rank, 0).unwrap_err();
        assert!(matches!(error, VitError::LoraRank { embed_dim: 8, .. }));
        assert!(error.to_string().contains(&rank.to_string()) && error.to_string().contains("1 to 8"), "{error}");
    }
    assert_eq!(model::<Flex>().with_lora(8, 0).unwrap().lora_rank(), Some(8));
    assert_eq!(model::<Flex>().with_lora(2, 0).unwrap().with_lora(3, 0).unwrap().lora_rank(), Some(3));
}

#[test]
fn records_round_trip() {
    let recorder = BinBytesRecorder::<FullPrecisionSettings>::default();
    let tuned = tuned::<Flex>();
    let bytes = Recorder::<Flex>::record(&recorder, tuned.clone().into_record(), ()).unwrap();
    let record = Recorder::<Flex>::load(&recorder, bytes, &Default::default()).unwrap();
    let loaded = model::<Flex>().with_lora(RANK, 8).unwrap().load_record(record);
    assert_eq!(weights(&tuned, ""), weights(&loaded, ""));
}

/// Calls `take` at every step with the name and the estimated gradient of each linear weight.
///
/// The gradient of a frozen weight is `None`.
fn estimates(model: &ViT<AB>, space: Space, steps: u64, mut take: impl FnMut(&str, Option<Vec<f32>>)) {
    let (batch, trained) = (images(4), trained_parameters(model));
    let model = model.valid();
    let estimator = Estimator { seed: 4, threads: 2, ..Estimator::new(space) };
    let clean = estimator.clean(&model, &batch, &trained).unwrap();
    let skewed = Allocation::project(&[1.0, 2.0, 3.0, 4.0], &QueryBudget::new(16, 1).unwrap()).unwrap();
    for step in 0..steps {
        let estimate = clean.estimate(&skewed, step).unwrap();
        each(&model, |name, param| take(name, estimate.gradient(param).map(floats)));
    }
}

/// Compares forward-only estimates of each adapter's gradient with autodiff.
///
/// Each of the 400 steps allocates 16 queries per example on average, unequally. Estimates are
/// projected on the gradient and divided by its squared norm, so their mean must be 1. It is within
/// 4.5 standard errors (false-failure rate 7·10⁻⁶ per case, 2·10⁻⁴ over all 27 cases). The standard
/// error is small enough to show a wrong sign, factor or weight. The bias of σ = 10⁻² is O(σ²).
#[test]
fn estimates_match_autodiff() {
    let model = tuned::<AB>().with_scope(Scope::Lora(RANK)).unwrap();
    let batch = images::<AB>(4);
    let losses = model.losses(model.forward(batch.input, &mut Probe::clean()), batch.target);
    let grads = losses.mean().backward();
    let mut truth = HashMap::new();
    each(&model, |name, param| {
        if param.is_require_grad() {
            truth.insert(name.to_string(), floats(param.grad(&grads).unwrap()));
        }
    });
    assert_eq!(truth.len(), 2 * 4 + 1);
    for (space, steps) in [(Space::activation(), 400), (Space::low_rank(1), 400), (Space::weights(), 400)] {
        let mut projections = HashMap::<String, Vec<f64>>::new();
        estimates(&model, space, steps, |name, estimated| {
            let Some(truth) = truth.get(name) else { return assert!(estimated.is_none(), "{name}") };
            let dot = |a: &[f32]| a.iter().zip(truth).map(|(a, b)| f64::from(a * b)).sum::<f64>();
            let projection = dot(&estimated.unwrap()) / dot(truth);
            projections.entry(name.to_string()).or_default().push(projection);
        });
        assert_eq!(projections.len(), truth.len());
        for (name, projections) in &projections {
            let n = projections.len() as f64;
            let mean = projections.iter().sum::<f64>() / n;
            let variance = projections.iter().map(|p| (p - mean).powi(2)).sum::<f64>() / (n - 1.0);
            let se = (variance / n).sqrt();
            println!("{name} in {space:?}: {mean:.3} ± {se:.3}");
            assert!((mean - 1.0).abs() < 4.5 * se, "{name} in {space:?}: {mean} ± {se}");
            assert!(se < 0.2, "{name} in {space:?}: standard error {se} says nothing");
        }
    }
}

#[test]
fn gradient_of_a_is_zero_while_b_is_zero() {
    let model = model::<AB>().with_lora(RANK, 7).unwrap().with_scope(Scope::Lora(RANK)).unwrap();
    let (mut down, mut up) = (0f32, 0f32);
    estimates(&model, Space::activation(), 5, |name, estimated| {
        let largest = estimated.into_iter().flatten().fold(0f32, |a, b| a.max(b.abs()));
        let part = if name.contains("down") { &mut down } else { &mut up };
        *part = part.max(largest);
    });
    println!("largest estimates: A {down}, others {up}");
    assert!(down < 1e-3 * up, "A has {down}, others {up}");
}

#[test]
fn forward_only_training_lowers_the_loss() {
    let start = model::<AB>().with_lora(RANK, 7).unwrap().with_scope(Scope::Lora(RANK)).unwrap();
    let allocator = AnyAllocator::new(AllocatorKind::Uniform, &Default::default()).unwrap();
    let config = ForwardConfig::new(QueryBudget::new(8, 1).unwrap()).with_seed(3);
    let mut learner = ForwardLearner::new(start.clone(), allocator, config).unwrap();
    let loss = |learner: &ForwardLearner<AB, ViT<AB>, AnyAllocator<AB>>| -> f32 {
        InferenceStep::step(&learner.valid(), images(12)).losses.mean().into_scalar()
    };
    let before = loss(&learner);
    let mut optimizer = AdamConfig::new().init();
    for _ in 0..60 {
        let output = TrainStep::step(&learner, images::<Flex>(12));
        learner = learner.optimize::<AB, _>(&mut optimizer, 0.02, output.grads);
    }
    let after = loss(&learner);
    assert!(after < 0.8 * before, "{after} after {before}");
    for ((name, before), (_, after)) in weights(&start, "").iter().zip(&weights(&learner.model, "")) {
        assert_eq!(before != after, name.contains("lora") || name == "head.weight", "{name}");
    }
}
