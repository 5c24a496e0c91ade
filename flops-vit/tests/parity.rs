//! Parity with HuggingFace's `ViTForImageClassification`, layer by layer, and with the gradients of
//! PyTorch's autograd.
//!
//! The reference is a random ViT of width 48 with 3 layers, in float32 with eager attention.
//! `fixtures/generate_parity.py` makes its files, in `fixtures/vit`.

use std::path::Path;

use burn::backend::{Autodiff, Flex, NdArray};
use burn::module::AutodiffModule;
use burn::module::{ModuleVisitor, Param};
use burn::prelude::*;
use burn::tensor::backend::AutodiffBackend;
use flops_core::estimator::{Estimate, trained_parameters};
use flops_core::{Allocation, Batch, Estimator, ForwardModel, Probe, QueryBudget, Space};
use flops_vit::ViT;
use flops_vit::checkpoint::{self, Card, Source};
use flops_vit::scope::Scope;
use safetensors::{Dtype, SafeTensors};

const TOLERANCE: f32 = 1e-4;

fn fixture() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/vit"))
}

fn load<B: Backend>(dir: &Path) -> (ViT<B>, Card) {
    let pretrained = checkpoint::open(&Source::Path(dir.into()), &Default::default()).unwrap().pretrained;
    (pretrained.model, pretrained.card)
}

/// Inputs and outputs of the reference.
struct Reference(Vec<u8>);

impl Reference {
    fn read(dir: &Path) -> Self {
        Self(std::fs::read(dir.join("io.safetensors")).unwrap())
    }

    fn floats(&self, name: &str) -> TensorData {
        let file = SafeTensors::deserialize(&self.0).unwrap();
        let tensor = file.tensor(name).unwrap();
        assert_eq!(tensor.dtype(), Dtype::F32);
        let values = tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
        TensorData::new(values.collect(), tensor.shape().to_vec())
    }

    fn labels(&self) -> TensorData {
        let file = SafeTensors::deserialize(&self.0).unwrap();
        let tensor = file.tensor("in.labels").unwrap();
        let values = tensor.data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()));
        TensorData::new(values.collect(), tensor.shape().to_vec())
    }

    fn assert_close<B: Backend, const D: usize>(&self, found: Tensor<B, D>, name: &str) {
        let expected = self.floats(name);
        assert_eq!(found.dims().to_vec(), expected.shape.to_vec(), "shape of {name}");
        assert_near(&found.into_data().to_vec().unwrap(), &expected.to_vec().unwrap(), name);
    }
}

fn assert_near(found: &[f32], expected: &[f32], name: &str) {
    assert_eq!(found.len(), expected.len(), "length of {name}");
    for (i, (a, b)) in found.iter().zip(expected).enumerate() {
        assert!((a - b).abs() <= TOLERANCE, "{name}[{i}]: found {a}, expected {b}");
    }
}

fn assert_forward_matches<B: Backend>() {
    let dir = fixture();
    let device = Default::default();
    let reference = Reference::read(dir);
    let (model, card) = load::<B>(dir);
    assert_eq!(card.config.num_params(), Module::num_params(&model));
    let images = Tensor::<B, 4>::from_data(reference.floats("in.pixel_values"), &device);
    let labels = Tensor::<B, 1, Int>::from_data(reference.labels(), &device);
    let mut probe = Probe::clean();

    let mut x = model.forward_embed(images.clone(), &mut probe);
    reference.assert_close(x.clone(), "out.embeddings");
    for (i, block) in model.blocks.iter().enumerate() {
        x = block.forward(x, &mut probe);
        reference.assert_close(x.clone(), &format!("out.hidden_states.{}", i + 1));
    }
    let features = model.forward_features(images.clone(), &mut probe);
    reference.assert_close(features.clone(), "out.last_hidden_state");
    reference.assert_close(model.forward_head(features, &mut probe), "out.logits");

    // this path computes only the class token in the last block
    let logits = model.forward(images, &mut Probe::clean());
    reference.assert_close(logits.clone(), "out.logits");
    reference.assert_close(model.losses(logits, labels), "out.cross_entropy");
}

#[test]
fn forward_matches_huggingface_on_flex() {
    assert_forward_matches::<Flex>();
}

#[test]
fn forward_matches_huggingface_on_ndarray() {
    assert_forward_matches::<NdArray>();
}

/// Values of the parameters in order, or of their gradients where these are given.
struct Values<'a, B: AutodiffBackend> {
    grads: Option<&'a B::Gradients>,
    path: Vec<String>,
    values: Vec<(String, Vec<f32>)>,
}

impl<B: AutodiffBackend> Values<'_, B> {
    fn of(model: &ViT<B>, grads: Option<&B::Gradients>) -> Vec<(String, Vec<f32>)> {
        let mut visitor = Values { grads, path: Vec::new(), values: Vec::new() };
        model.visit(&mut visitor);
        visitor.values
    }
}

impl<B: AutodiffBackend> ModuleVisitor<B> for Values<'_, B> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        let name = self.path.join(".");
        let data = match self.grads {
            Some(grads) => param.grad(grads).unwrap_or_else(|| panic!("{name} has no gradient")).into_data(),
            None => param.val().into_data(),
        };
        self.values.push((name, data.to_vec().unwrap()));
    }
}

#[test]
fn gradients_match_pytorch() {
    let dir = fixture();
    type AB = Autodiff<Flex>;
    let device = Default::default();
    let reference = Reference::read(dir);
    let (model, _) = load::<AB>(dir);
    let images = Tensor::<AB, 4>::from_data(reference.floats("in.pixel_values"), &device);
    let labels = Tensor::<AB, 1, Int>::from_data(reference.labels(), &device);
    let logits = model.forward(images, &mut Probe::clean());
    let grads = model.losses(logits, labels).mean().backward();

    let expected = reference_gradients::<AB>(dir);
    let (found, expected) = (Values::of(&model, Some(&grads)), Values::of(&expected, None));
    assert_eq!(found.len(), 4 + 3 * 16 + 4);
    for ((name, found), (_, expected)) in found.iter().zip(&expected) {
        assert_near(found, expected, name);
    }
}

/// The reference gradients as a model. Imported under the names of their parameters, they get the
/// layout of ours.
fn reference_gradients<B: Backend>(dir: &Path) -> ViT<B> {
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(dir.join("config.json"), folder.path().join("config.json")).unwrap();
    std::fs::copy(dir.join("grads.safetensors"), folder.path().join("model.safetensors")).unwrap();
    load(folder.path()).0
}

/// Forward-only estimates have PyTorch's gradients as their mean, under an unequal allocation.
///
/// Each case takes `steps` estimates from 16 queries per image on average. It projects them on the
/// reference gradient and divides by the squared norm of that. The mean must be 1 within 4.5
/// standard errors: a false failure has probability 10⁻⁵ per case. A bound on the standard error
/// makes sure that a wrong sign, a missing 1/B or a reweighted objective would show. The bias is
/// O(σ²), with σ = 10⁻².
#[test]
fn estimates_match_pytorch_in_the_mean() {
    let dir = fixture();
    let device = Default::default();
    let reference = Reference::read(dir);
    let labels = Tensor::<Flex, 1, Int>::from_data(reference.labels(), &device);
    let images = Tensor::<Flex, 4>::from_data(reference.floats("in.pixel_values"), &device);
    let n = images.dims()[0];
    let batch = Batch { ids: (0..n as u64).collect(), input: images, target: labels };
    let budget = QueryBudget::new(16, 1).unwrap();
    let skewed: Vec<f64> = (0..n).map(|j| 1.0 + 30.0 * j as f64 / n as f64).collect();
    let allocation = Allocation::project(&skewed, &budget).unwrap();
    assert!(allocation.min() < allocation.max());
    for (scope, space, steps, precision) in [
        (Scope::Head, Space::activation(), 40, 0.1),
        (Scope::ClsTail, Space::activation(), 100, 0.2),
        (Scope::Full, Space::activation(), 40, 0.5),
        (Scope::Head, Space::weights(), 100, 0.3),
    ] {
        let with_graph = load::<Autodiff<Flex>>(dir).0.with_scope(scope).unwrap();
        let trained = trained_parameters(&with_graph);
        let model = with_graph.valid();
        let estimator = Estimator { seed: 4, threads: 2, ..Estimator::new(space) };
        let clean = estimator.clean(&model, &batch, &trained).unwrap();
        let target = reference_gradients::<Flex>(dir);
        let projections: Vec<f64> = (0..steps)
            .map(|step| {
                let estimate = clean.estimate(&allocation, step).unwrap();
                let (mut dot, mut norm) = (0.0, 0.0);
                for (g, t) in gradients(&model, &estimate).iter().zip(&values(&target)) {
                    if let Some(g) = g {
                        dot += g.iter().zip(t).map(|(a, b)| f64::from(a * b)).sum::<f64>();
                        norm += t.iter().map(|t| f64::from(t * t)).sum::<f64>();
                    }
                }
                dot / norm
            })
            .collect();
        let mean = projections.iter().sum::<f64>() / steps as f64;
        let variance = projections.iter().map(|p| (p - mean).powi(2)).sum::<f64>() / (steps - 1) as f64;
        let se = (variance / steps as f64).sqrt();
        println!("{scope} in {space:?}: {mean:.3} ± {se:.3}");
        assert!((mean - 1.0).abs() < 4.5 * se, "{scope} in {space:?}: {mean} ± {se}");
        assert!(se < precision, "{scope} in {space:?}: standard error {se} is too large to tell");
    }
}

/// The estimated gradient of every parameter, in order; `None` for frozen ones.
fn gradients(model: &ViT<Flex>, estimate: &Estimate<Flex>) -> Vec<Option<Vec<f32>>> {
    struct Visit<'a>(&'a Estimate<Flex>, Vec<Option<Vec<f32>>>);
    impl ModuleVisitor<Flex> for Visit<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<Flex, D>>) {
            self.1.push(self.0.gradient(param).map(|g| g.into_data().to_vec().unwrap()));
        }
    }
    let mut visit = Visit(estimate, vec![]);
    model.visit(&mut visit);
    visit.1
}

/// The values of every parameter, in order.
fn values(model: &ViT<Flex>) -> Vec<Vec<f32>> {
    struct Visit(Vec<Vec<f32>>);
    impl ModuleVisitor<Flex> for Visit {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<Flex, D>>) {
            self.0.push(param.val().into_data().to_vec().unwrap());
        }
    }
    let mut visit = Visit(vec![]);
    model.visit(&mut visit);
    visit.0
}
