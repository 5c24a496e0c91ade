//! Scopes, padding, and estimates against autodiff.

use burn::backend::{Autodiff, Flex};
use burn::module::{AutodiffModule, ModuleVisitor};
use flops_core::estimator::{Estimate, trained_parameters};
use flops_core::{Allocation, Estimator, QueryBudget, Space};

use super::*;
use crate::checkpoint::bert;
use crate::towers::BertConfig;

type AB = Autodiff<Flex>;

fn model(seed: u64) -> TextClassifier<AB> {
    let device = Default::default();
    <AB as Backend>::seed(&device, seed);
    let config = BertConfig::new().with_vocab_size(12).with_context_length(6).with_embed_dim(8);
    let encoder = config.with_depth(2).with_num_heads(2).with_mlp_dim(12).init(&device).unwrap();
    TextClassifier::new(encoder, 3, seed).unwrap()
}

/// Weights large enough for attention and adapters to matter.
fn grown(model: TextClassifier<AB>) -> TextClassifier<AB> {
    struct Grow(u32);
    impl ModuleMapper<AB> for Grow {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<AB, D>>) -> Param<Tensor<AB, D>> {
            self.0 += 1;
            let phase = f64::from(self.0);
            param.map(|value| {
                let (shape, trained) = (value.dims(), value.is_require_grad());
                let waves = Tensor::<AB, 1, Int>::arange(0..shape.iter().product::<usize>() as i64, &value.device());
                let waves = (waves.float() * 1.7 + phase).sin().reshape(shape) * 0.3;
                (value.detach() + waves.detach()).detach().set_require_grad(trained)
            })
        }
    }
    model.map(&mut Grow(0))
}

/// Four texts of 2 to 5 tokens.
fn batch<B: Backend>() -> TextBatch<B> {
    let device = Default::default();
    let ids = [[1, 5, 2, 0, 0], [1, 7, 3, 9, 2], [1, 2, 0, 0, 0], [1, 4, 4, 2, 0]];
    let mask = [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]];
    Batch {
        ids: (0..4).collect(),
        input: (Tensor::from_ints(ids, &device), Tensor::from_ints(mask, &device)),
        target: Tensor::from_ints([0, 1, 2, 1], &device),
    }
}

#[derive(Default)]
struct Trained {
    path: Vec<String>,
    names: Vec<String>,
}

impl ModuleVisitor<AB> for Trained {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.into());
    }
    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<AB, D>>) {
        if param.is_require_grad() {
            self.names.push(self.path.join("."));
        }
    }
}

fn trained(model: &TextClassifier<AB>) -> Vec<String> {
    let mut seen = Trained::default();
    model.visit(&mut seen);
    seen.names
}

#[test]
fn scopes_train_what_they_say() {
    let of = |scope: &str| trained(&model(1).with_lora(2, 1).unwrap().with_scope(scope.parse().unwrap()).unwrap());
    assert_eq!(of("head"), ["head.weight", "head.bias"]);
    let lora = of("lora:2");
    assert_eq!(lora.len(), 2 * 2 * 2 + 2);
    assert!(lora.iter().all(|name| name.contains("_lora.") || name.starts_with("head.")), "{lora:?}");
    let last = of("last:1");
    assert_eq!(last.len(), 16 + 2);
    assert!(last.iter().all(|name| name.starts_with("encoder.layers.1.") || name.starts_with("head.")), "{last:?}");
    assert_eq!(of("bias_norm").len(), 2 * 10 + 2 + 2);
    // embeddings and their norm, two layers with two adapters each, the head
    assert_eq!(of("full").len(), 5 + 2 * (16 + 4) + 2);
}

#[test]
fn what_does_not_fit_is_named() {
    let error = |scope: &str| model(1).with_scope(scope.parse().unwrap()).unwrap_err().to_string();
    assert!(error("lora:4").contains("scope = lora:4") && error("lora:4").contains("with_lora"));
    assert!(error("last:3").contains("fewer layers"));
    assert!(error("cls_tail").contains("for texts use head"));
    let one = TextClassifier::new(model(1).encoder, 1, 0).unwrap_err().to_string();
    assert!(one.contains("classes = 1"), "{one}");
    let opened = bert::shipped::<AB>(&Default::default()).unwrap();
    let tokenizer = opened.tokenizer.unwrap();
    let item = |text: &str| TextItem { id: 0, text: text.into(), label: 0 };
    // a tokenizer with more words than the encoder
    let foreign = model(1).batch::<Flex>(&tokenizer, &[item("a large dotted star")], &Default::default());
    assert!(foreign.unwrap_err().to_string().contains("vocabulary of 12"));
    assert!(model(1).batch::<Flex>(&tokenizer, &[], &Default::default()).is_err());
    let fourth = TextItem { label: 3, ..item("a star") };
    let outside = model(1).batch::<Flex>(&tokenizer, &[fourth], &Default::default()).unwrap_err().to_string();
    assert!(outside.contains("label = 3"), "{outside}");
}

/// As the docs say: a record is loaded into a model with the same adapters.
#[test]
fn records_with_adapters_round_trip() {
    let tuned = grown(model(1).with_lora(2, 1).unwrap());
    let logits = |model: &TextClassifier<AB>| model.forward(batch::<AB>().input, &mut Probe::clean()).into_data();
    let record = || tuned.clone().into_record();
    assert_eq!(logits(&model(5).with_lora(2, 9).unwrap().load_record(record())), logits(&tuned));
    let without = model(5).load_record(record());
    assert!(without.encoder.lora_rank().is_none());
    assert_eq!(model(5).with_lora(2, 9).unwrap().load_record(without.into_record()).encoder.lora_rank(), None);
}

/// A text has the same logits alone and beside a longer one, and a limit truncates it.
#[test]
fn padding_changes_nothing_and_long_texts_are_truncated() {
    let device = Default::default();
    let opened = bert::shipped::<Flex>(&device).unwrap();
    let tokenizer = opened.tokenizer.unwrap();
    let model = TextClassifier::new(opened.model, 2, 0).unwrap();
    let items = ["a star", "a picture of a small dotted yellow disc at the top left"];
    let items: Vec<TextItem> =
        items.into_iter().zip(0..).map(|(text, id)| TextItem { id, text: text.into(), label: id as usize }).collect();
    let logits = |model: &TextClassifier<Flex>, items: &[TextItem]| {
        let batch = model.batch::<Flex>(&tokenizer, items, &device).unwrap();
        model.forward(batch.input, &mut Probe::clean())
    };
    let both = logits(&model, &items);
    for (row, item) in items.iter().enumerate() {
        let alone = logits(&model, std::slice::from_ref(item));
        let apart: f32 = (both.clone().narrow(0, row, 1) - alone).abs().max().into_scalar();
        assert!(apart < 1e-5, "row {row}: {apart}");
    }
    let short = model.with_max_tokens(5);
    assert_eq!(short.batch::<Flex>(&tokenizer, &items, &device).unwrap().input.0.dims(), [2, 5]);
    assert_eq!(short.with_max_tokens(1000).max_tokens, 24);
}

/// Estimates on texts of different lengths, projected on autodiff's gradient of each parameter.
///
/// Each of the steps allocates 12 queries per text on average, unequally. A projection divided by
/// the squared norm has mean 1, within 4.5 standard errors (false-failure rate 7·10⁻⁶ for each of the
/// 10 + 39 parameters). Gradients below a hundredth of the largest are left out: their projections
/// have no scale of their own. Some means must be known to a quarter, or the test would say nothing: 4
/// with adapters, 5 in full. The bias of σ = 10⁻² is O(σ²).
#[test]
fn estimates_match_autodiff() {
    for (scope, sites, steps, least) in [("lora:2", Sites::Linear, 900, 4), ("full", Sites::Branch, 400, 5)] {
        let scope: Scope = scope.parse().unwrap();
        let tuned = match scope {
            Scope::Lora(rank) => model(2).with_lora(rank, 3).unwrap(),
            _ => model(2),
        };
        let model = grown(tuned).with_sites(sites).with_scope(scope).unwrap();
        let Batch { input, target, .. } = batch::<AB>();
        let exact = model.losses(model.forward(input, &mut Probe::clean()), target).mean().backward();
        let truth = gradients(&model, &Exact(&exact));
        let largest = truth.iter().map(|(_, g)| norm(g)).fold(0.0, f64::max);
        let (inner, known) = (model.valid(), trained_parameters(&model));
        let estimator = Estimator { seed: 4, threads: 2, ..Estimator::new(Space::activation()) };
        let texts = batch();
        let clean = estimator.clean(&inner, &texts, &known).unwrap();
        let skewed = Allocation::project(&[1.0, 2.0, 3.0, 2.0], &QueryBudget::new(12, 1).unwrap()).unwrap();
        let mut projections = vec![vec![]; truth.len()];
        for step in 0..steps {
            let estimate = clean.estimate(&skewed, step).unwrap();
            let found = gradients(&model, &estimate);
            for (((_, found), (_, truth)), projections) in found.iter().zip(&truth).zip(&mut projections) {
                let dot = |a: &[f32]| a.iter().zip(truth).map(|(a, b)| f64::from(a * b)).sum::<f64>();
                projections.push(dot(found) / dot(truth));
            }
        }
        let mut telling = 0;
        for ((name, truth), projections) in truth.iter().zip(&projections) {
            if norm(truth) < 0.01 * largest {
                continue;
            }
            let n = projections.len() as f64;
            let mean = projections.iter().sum::<f64>() / n;
            let se = (projections.iter().map(|p| (p - mean).powi(2)).sum::<f64>() / (n - 1.0) / n).sqrt();
            assert!((mean - 1.0).abs() < 4.5 * se, "{name} in {scope}: {mean} ± {se}");
            telling += usize::from(se < 0.25);
        }
        assert!(telling >= least, "{scope}: {telling} of {} parameters have a mean that says something", truth.len());
    }
}

fn floats<const D: usize>(tensor: Tensor<Flex, D>) -> Vec<f32> {
    tensor.into_data().to_vec().unwrap()
}

fn norm(values: &[f32]) -> f64 {
    values.iter().map(|v| f64::from(v * v)).sum::<f64>().sqrt()
}

/// Where gradients of parameters of any rank are looked up; 0 where there is none.
trait OfAnyRank {
    fn gradient<const D: usize>(&self, param: &Param<Tensor<AB, D>>) -> Vec<f32>;
}

/// Autodiff's.
struct Exact<'a>(&'a <AB as burn::tensor::backend::AutodiffBackend>::Gradients);

impl OfAnyRank for Exact<'_> {
    fn gradient<const D: usize>(&self, param: &Param<Tensor<AB, D>>) -> Vec<f32> {
        param.grad(self.0).map_or_else(|| vec![0.0; param.shape().num_elements()], floats)
    }
}

impl OfAnyRank for Estimate<Flex> {
    fn gradient<const D: usize>(&self, param: &Param<Tensor<AB, D>>) -> Vec<f32> {
        let inner = Param::initialized(param.id, param.val().inner());
        Estimate::<Flex>::gradient(self, &inner).map(floats).expect("every trained parameter has an estimate")
    }
}

/// A gradient of each trained parameter, whatever its rank, in the order of the model.
fn gradients(model: &TextClassifier<AB>, of: &impl OfAnyRank) -> Vec<(String, Vec<f32>)> {
    struct Visit<'a, F>(Vec<String>, &'a F, Vec<(String, Vec<f32>)>);
    impl<F: OfAnyRank> ModuleVisitor<AB> for Visit<'_, F> {
        fn enter_module(&mut self, name: &str, _: &str) {
            self.0.push(name.into());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.0.pop();
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<AB, D>>) {
            if param.is_require_grad() {
                self.2.push((self.0.join("."), self.1.gradient(param)));
            }
        }
    }
    let mut visit = Visit(vec![], of, vec![]);
    model.visit(&mut visit);
    visit.2
}
