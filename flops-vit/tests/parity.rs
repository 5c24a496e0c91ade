//! Agreement with HuggingFace's `ViTForImageClassification`, layer by layer, and with the gradients of PyTorch's autograd.
//!
//! The reference values (a random ViT of width 48 with 3 layers, float32, eager attention) are looked for in the folder
//! `fixtures/vit` of `FLOPS_SHARED`, by default `shared` beside the workspace; without them the tests print "skipped".

use std::path::{Path, PathBuf};

use burn::backend::{Autodiff, Flex, NdArray};
use burn::module::{ModuleVisitor, Param};
use burn::prelude::*;
use burn::tensor::backend::AutodiffBackend;
use flops_core::{ForwardModel, Probe};
use flops_vit::ViT;
use flops_vit::checkpoint::hf;
use safetensors::{Dtype, SafeTensors};

const TOLERANCE: f32 = 1e-4;

fn fixture() -> Option<PathBuf> {
    let shared = std::env::var("FLOPS_SHARED").unwrap_or(concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared").into());
    let dir = Path::new(&shared).join("fixtures/vit");
    if !dir.join("model.safetensors").exists() {
        println!("skipped: no reference values in {}", dir.display());
        return None;
    }
    Some(dir)
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

fn forward_agrees<B: Backend>() {
    let Some(dir) = fixture() else { return };
    let device = Default::default();
    let reference = Reference::read(&dir);
    let (model, card) = hf::load::<B>(&dir, &device).unwrap();
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

    // the path that computes the class token alone in the last block
    let logits = model.forward(images, &mut Probe::clean());
    reference.assert_close(logits.clone(), "out.logits");
    reference.assert_close(model.losses(logits, labels), "out.cross_entropy");
}

#[test]
fn forward_agrees_on_flex() {
    forward_agrees::<Flex>();
}

#[test]
fn forward_agrees_on_ndarray() {
    forward_agrees::<NdArray>();
}

/// Values of the parameters, or of their gradients where there are some, in order.
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
fn gradients_agree() {
    let Some(dir) = fixture() else { return };
    type AB = Autodiff<Flex>;
    let device = Default::default();
    let reference = Reference::read(&dir);
    let (model, _) = hf::load::<AB>(&dir, &device).unwrap();
    let images = Tensor::<AB, 4>::from_data(reference.floats("in.pixel_values"), &device);
    let labels = Tensor::<AB, 1, Int>::from_data(reference.labels(), &device);
    let logits = model.forward(images, &mut Probe::clean());
    let grads = model.losses(logits, labels).mean().backward();

    // the reference gradients bear the names of their parameters: imported, they are laid out as ours
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(dir.join("config.json"), folder.path().join("config.json")).unwrap();
    std::fs::copy(dir.join("grads.safetensors"), folder.path().join("model.safetensors")).unwrap();
    let (expected, _) = hf::load::<AB>(folder.path(), &device).unwrap();

    let (found, expected) = (Values::of(&model, Some(&grads)), Values::of(&expected, None));
    assert_eq!(found.len(), 4 + 3 * 16 + 4);
    for ((name, found), (_, expected)) in found.iter().zip(&expected) {
        assert_near(found, expected, name);
    }
}
