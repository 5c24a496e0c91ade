//! Low-rank adapters (LoRA; Hu et al. 2021, arXiv 2106.09685).
//!
//! y = Wx + b + B(Ax), with A from `embed_dim` to the rank and B back. W and b stay frozen; A and B are trained. The adapters sit on the
//! query and value projections of every block, the paper's choice. The paper's factor α/r is 1 here: α is the rank.
//!
//! A is drawn from N(0, 1/embed_dim), B is zero, so a model with new adapters is the model it was. As long as B is zero, A has no
//! effect on the loss: its gradient is zero, in backpropagation as in the mean of forward-only estimates, and noise that falls on A's
//! output alone leaves the loss as it is, up to rounding. So the first step moves B and the head; A follows from the second step on.
//! Queries that the first step spends on A tell nothing.

use burn::module::Param;
use burn::nn::Linear;
use burn::prelude::*;
use burn::tensor::Distribution;
use flops_core::Probe;
use rand::SeedableRng;
use rand::rngs::StdRng;

use crate::block::Attention;
use crate::error::VitError;
use crate::model::{ViT, linear};

/// An adapter: two linear layers without biases, the outputs of both perturbed in a query.
#[derive(Module, Debug)]
pub struct Lora<B: Backend> {
    /// A, `[embed_dim, rank]`.
    pub down: Linear<B>,
    /// B, `[rank, embed_dim]`; zero at the start.
    pub up: Linear<B>,
}

impl<B: Backend> Lora<B> {
    fn new(d: usize, rank: usize, rng: &mut StdRng, device: &B::Device) -> Self {
        let law = Distribution::Normal(0.0, (d as f64).sqrt().recip());
        let down = Tensor::from_data(TensorData::random::<f32, _, _>([d, rank], law, rng), device);
        let layer = |weight| Linear { weight: Param::from_tensor(weight), bias: None };
        Self { down: layer(down), up: layer(Tensor::zeros([rank, d], device)) }
    }

    /// Parameters that are made when they are looked at, to be filled from a file.
    fn lazy(d: usize, rank: usize, device: &B::Device) -> Self {
        Self { down: linear(d, rank, false, device), up: linear(rank, d, false, device) }
    }

    /// The number of columns between its two layers.
    pub fn rank(&self) -> usize {
        // known before the parameter is made
        self.down.weight.lazy_shape()[1]
    }

    /// B(Ax).
    fn forward(&self, x: Tensor<B, 3>, probe: &mut Probe<B>) -> Tensor<B, 3> {
        let x = probe.linear(&self.down, x);
        probe.linear(&self.up, x)
    }

    /// The layer that does the same as `layer` and the adapter.
    fn merged_into(self, mut layer: Linear<B>) -> Linear<B> {
        let change = self.down.weight.val().matmul(self.up.weight.val()).detach();
        layer.weight = layer.weight.map(|weight| {
            let trained = weight.is_require_grad();
            (weight.detach() + change).set_require_grad(trained)
        });
        layer
    }
}

/// `layer` and its adapter, where it has one.
///
/// # Shapes
/// - x: `[rows, tokens, embed_dim]`, and so the result
pub(crate) fn adapted<B: Backend>(
    layer: &Linear<B>,
    lora: &Option<Lora<B>>,
    x: Tensor<B, 3>,
    probe: &mut Probe<B>,
) -> Tensor<B, 3> {
    let Some(lora) = lora else { return probe.linear(layer, x) };
    let y = probe.linear(layer, x.clone());
    let change = lora.forward(x, probe);
    probe.add(y, change)
}

impl<B: Backend> Attention<B> {
    fn with_lora(mut self, mut lora: impl FnMut() -> Lora<B>) -> Self {
        self.query_lora = Some(lora());
        self.value_lora = Some(lora());
        self
    }

    fn merged(mut self) -> Self {
        if let Some(lora) = self.query_lora.take() {
            self.query = lora.merged_into(self.query);
        }
        if let Some(lora) = self.value_lora.take() {
            self.value = lora.merged_into(self.value);
        }
        self
    }
}

impl<B: Backend> ViT<B> {
    /// Puts new [adapters](Lora) of `rank` on the query and value projections of every block; the model's logits stay what they were.
    ///
    /// What is random comes from `seed` alone. Adapters that are there already are replaced, and what they learned is lost: where it
    /// should stay, [`merged`](Self::merged) comes first. [`Scope::Lora`](crate::Scope::Lora) of the same rank trains the adapters.
    ///
    /// # Errors
    /// [`VitError::LoraRank`] where `rank` is 0 or more than `embed_dim`.
    ///
    /// # Example
    /// ```
    /// use burn::backend::Flex;
    /// use flops_vit::{Scope, ViTConfig};
    ///
    /// let model = ViTConfig::vit_micro_patch4_32().with_depth(2).init::<Flex>(&Default::default())?;
    /// let model = model.with_lora(4, 0)?.with_scope(Scope::Lora(4))?;
    /// assert_eq!(model.lora_rank(), Some(4));
    /// assert_eq!(model.merged().lora_rank(), None);
    /// # Ok::<(), flops_vit::VitError>(())
    /// ```
    pub fn with_lora(self, rank: usize, seed: u64) -> Result<Self, VitError> {
        let (d, device) = (self.check_rank(rank)?, self.head.weight.device());
        // a stream of its own: the same seed draws other numbers for a new head
        let mut key = [0; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        key[8..12].copy_from_slice(b"lora");
        let mut rng = StdRng::from_seed(key);
        Ok(self.with_adapters(|| Lora::new(d, rank, &mut rng, &device)))
    }

    /// The same with adapters that are made when they are looked at.
    pub(crate) fn with_lazy_lora(self, rank: usize) -> Result<Self, VitError> {
        let (d, device) = (self.check_rank(rank)?, self.head.weight.device());
        Ok(self.with_adapters(|| Lora::lazy(d, rank, &device)))
    }

    fn with_adapters(mut self, mut lora: impl FnMut() -> Lora<B>) -> Self {
        for block in std::mem::take(&mut self.blocks) {
            let attn = block.attn.with_lora(&mut lora);
            self.blocks.push(crate::model::Block { attn, ..block });
        }
        self
    }

    /// `embed_dim`, where adapters of that rank fit it.
    fn check_rank(&self, rank: usize) -> Result<usize, VitError> {
        let [embed_dim, _] = self.head.weight.dims();
        if (1..=embed_dim).contains(&rank) { Ok(embed_dim) } else { Err(VitError::LoraRank { rank, embed_dim }) }
    }

    /// The rank of the adapters; `None` where a projection that should have one has none, or where ranks differ.
    pub fn lora_rank(&self) -> Option<usize> {
        let mut ranks = self.adapters().map(|lora| lora.map(Lora::rank));
        let first = ranks.next()??;
        ranks.all(|rank| rank == Some(first)).then_some(first)
    }

    /// Whether there is any adapter.
    pub(crate) fn has_adapters(&self) -> bool {
        self.adapters().any(|lora| lora.is_some())
    }

    fn adapters(&self) -> impl Iterator<Item = Option<&Lora<B>>> {
        self.blocks.iter().flat_map(|block| [block.attn.query_lora.as_ref(), block.attn.value_lora.as_ref()])
    }

    /// The model with B·A added to the query and value weights and without adapters: the same logits, up to rounding, at the cost of
    /// the model without adapters. What was trainable stays so. A model without adapters stays as it is.
    pub fn merged(mut self) -> Self {
        for block in std::mem::take(&mut self.blocks) {
            self.blocks.push(crate::model::Block { attn: block.attn.merged(), ..block });
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::config::ViTConfig;
    use crate::scope::Scope;
    use burn::backend::{Autodiff, Flex};
    use burn::module::{AutodiffModule, ModuleMapper, ModuleVisitor};
    use burn::optim::AdamConfig;
    use burn::record::{BinBytesRecorder, FullPrecisionSettings, Recorder};
    use burn::train::{InferenceStep, TrainStep};
    use flops_core::allocator::{AllocatorKind, AnyAllocator};
    use flops_core::estimator::trained_parameters;
    use flops_core::{Allocation, Batch, Estimator, ForwardConfig, ForwardLearner, ForwardModel, QueryBudget, Space};

    type AB = Autodiff<Flex>;
    type Images<B> = Batch<Tensor<B, 4>, Tensor<B, 1, Int>>;

    const RANK: usize = 2;

    /// Two blocks of width 8, far enough from zero for attention to matter.
    fn model<B: Backend>() -> ViT<B> {
        let config =
            ViTConfig::new().with_img_size(8).with_patch_size(4).with_embed_dim(8).with_depth(2).with_num_heads(2);
        let model = config.with_num_classes(3).init(&Default::default()).unwrap();
        redrawn(model, "", 0.3)
    }

    /// The same model with what a run of training would make of its adapters.
    fn tuned<B: Backend>() -> ViT<B> {
        redrawn(model().with_lora(RANK, 7).unwrap(), "up.weight", 0.5)
    }

    /// The model with the weights whose path ends so drawn from N(0, std²), always the same.
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
                // linear weights are all that is asked for
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
    fn new_adapters_change_nothing_and_trained_ones_do() {
        let plain = model::<Flex>();
        let fresh = plain.clone().with_lora(RANK, 7).unwrap();
        assert_eq!(logits(&plain).into_data(), logits(&fresh).into_data());
        let tuned = tuned::<Flex>();
        assert!(distance(logits(&plain), logits(&tuned)) > 0.05);
        // the path of the class token alone has the same adapters as the block for all tokens
        let mut probe = Probe::clean();
        let all = tuned.forward_head(tuned.forward_features(images(4).input, &mut probe), &mut probe);
        let short = distance(all, logits(&tuned));
        assert!(short < 1e-5, "logits differ by {short}");
    }

    #[test]
    fn merged_adapters_give_the_same_logits() {
        let tuned = tuned::<AB>().with_scope(Scope::Lora(RANK)).unwrap();
        let merged = tuned.clone().merged();
        assert_eq!(merged.lora_rank(), None);
        assert_eq!(Module::num_params(&merged), Module::num_params(&model::<Flex>()));
        let apart = distance(logits(&tuned), logits(&merged));
        assert!(apart < 1e-5, "logits differ by {apart}");
        // queries and values took everything up, and stay frozen
        let (before, after) = (weights(&model::<AB>(), ""), weights(&merged, ""));
        for ((name, before), (_, after)) in before.iter().zip(&after) {
            let changed = name.ends_with("query.weight") || name.ends_with("value.weight");
            assert_eq!(before != after, changed, "{name}");
        }
        each(&merged, |name, param| assert_eq!(param.is_require_grad(), name == "head.weight", "{name}"));
        assert_eq!(logits(&merged).into_data(), logits(&merged.clone().merged()).into_data());
    }

    #[test]
    fn adapters_depend_on_their_seed_alone() {
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
        // the head of the same seed comes from another stream, up to the factor 0.02·√8
        let head = weights(&model::<Flex>().with_new_head(RANK, 7), "head").remove(0).1;
        assert!((head[0] / first[0].1[0] - 0.02 * 8f32.sqrt()).abs() > 1e-3);
    }

    #[test]
    fn ranks_that_do_not_fit_are_errors() {
        for rank in [0, 9, usize::MAX] {
            let error = model::<Flex>().with_lora(rank, 0).unwrap_err();
            assert!(matches!(error, VitError::LoraRank { embed_dim: 8, .. }));
            assert!(error.to_string().contains(&rank.to_string()) && error.to_string().contains("1 to 8"), "{error}");
        }
        assert_eq!(model::<Flex>().with_lora(8, 0).unwrap().lora_rank(), Some(8));
        assert_eq!(model::<Flex>().with_lora(2, 0).unwrap().with_lora(3, 0).unwrap().lora_rank(), Some(3));
    }

    #[test]
    fn a_record_comes_back() {
        let recorder = BinBytesRecorder::<FullPrecisionSettings>::default();
        let tuned = tuned::<Flex>();
        let bytes = Recorder::<Flex>::record(&recorder, tuned.clone().into_record(), ()).unwrap();
        let record = Recorder::<Flex>::load(&recorder, bytes, &Default::default()).unwrap();
        let loaded = model::<Flex>().with_lora(RANK, 8).unwrap().load_record(record);
        assert_eq!(weights(&tuned, ""), weights(&loaded, ""));
    }

    /// The estimated gradients of all linear weights by name, `None` for frozen ones; step after step.
    fn estimates(model: &ViT<AB>, space: Space, steps: u64, mut take: impl FnMut(&str, Option<Vec<f32>>)) {
        let (batch, trained) = (images(4), trained_parameters(model));
        let model = model.valid();
        let estimator = Estimator { seed: 4, threads: 2, ..Estimator::new(space) };
        let clean = estimator.clean(&model, &batch, &trained).unwrap();
        let skewed = Allocation::project(&[1.0, 2.0, 3.0, 4.0], &QueryBudget::new(16, 1).unwrap()).unwrap();
        for step in 0..steps {
            let estimate = estimator.estimate(&model, &batch, &trained, &clean, &skewed, step).unwrap();
            each(&model, |name, param| take(name, estimate.gradient(param).map(floats)));
        }
    }

    /// Forward-only estimates of the gradients of adapters against autodiff, for each weight on its own.
    ///
    /// n steps of 16 queries per datum, unequal ones; the projection of their estimates on the gradient, per unit of its squared
    /// norm, has mean 1 within 4.5 standard errors (false-failure rate 7·10⁻⁶ a case, 2·10⁻⁴ in all 27), and the standard error is small
    /// enough for a wrong sign, factor or weight to show. The bias of σ = 10⁻² is O(σ²).
    #[test]
    fn estimates_agree_with_autodiff() {
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
        for (space, steps) in [(Space::Activation, 400), (Space::LowRank(1), 400), (Space::Weights, 400)] {
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
    fn the_gradient_of_a_is_zero_while_b_is() {
        let model = model::<AB>().with_lora(RANK, 7).unwrap().with_scope(Scope::Lora(RANK)).unwrap();
        let (mut down, mut up) = (0f32, 0f32);
        estimates(&model, Space::Activation, 5, |name, estimated| {
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
}
