//! The models that are measured, their images, and plain inference.

use burn::prelude::*;
use burn::tensor::Distribution;
use flops_backend::{AB, B};
use flops_core::{Batch, ForwardModel, Rows, infer};
use flops_vit::data::ImageBatch;
use flops_vit::{Scope, ViT, ViTConfig};
use rand::SeedableRng;
use rand::rngs::StdRng;

use crate::THREADS;

/// Returns `vit_micro_patch4_32` with `depth` blocks.
pub fn micro(depth: usize) -> ViTConfig {
    ViTConfig::vit_micro_patch4_32().with_depth(depth)
}

/// Returns a model with random weights that trains `scope`, with adapters if the scope trains them.
///
/// # Panics
/// If the configuration or the scope is invalid.
pub fn model(config: &ViTConfig, scope: Scope) -> ViT<AB> {
    let model = config.init::<AB>(&Default::default()).and_then(|model| match scope {
        Scope::Lora(rank) => model.with_lora(rank, 0)?.with_scope(scope),
        _ => model.with_scope(scope),
    });
    model.expect("the preset and its scopes are valid")
}

/// Returns `rows` random images of `side` × `side` pixels, of ten classes.
pub fn images(rows: usize, side: usize) -> ImageBatch<B> {
    let device = Default::default();
    let mut rng = StdRng::seed_from_u64(0);
    let pixels = TensorData::random::<f32, _, _>([rows, 3, side, side], Distribution::Normal(0.0, 1.0), &mut rng);
    let labels: Vec<i32> = (0..rows as i32).map(|i| i % 10).collect();
    Batch {
        ids: (0..rows as u64).collect(),
        input: Tensor::from_data(pixels, &device),
        target: Tensor::from_data(TensorData::new(labels, [rows]), &device),
    }
}

/// Computes the losses of `rows` rows by plain inference, `max_rows` in a pass, on [`THREADS`]
/// threads. Returns their sum, which is read from the device once.
pub fn inference(model: &ViT<B>, batch: &ImageBatch<B>, rows: usize, max_rows: usize) -> f32 {
    let n = batch.ids.len().max(1);
    let sums = (0..rows).step_by(n).map(|start| {
        let index: Vec<usize> = (0..n.min(rows - start)).collect();
        let logits = infer(model, &batch.input.rows(&index), index.len(), max_rows, THREADS);
        model.losses(logits, batch.target.rows(&index)).sum()
    });
    sums.reduce(|a, b| a + b).map_or(0.0, |sum| sum.into_scalar().elem())
}

/// Returns the multiply-adds of a plain forward pass of one image.
pub fn multiply_adds(config: &ViTConfig) -> f64 {
    let (d, hidden, tokens) = (config.embed_dim, config.mlp_dim(), config.num_tokens());
    let patches = tokens * config.in_chans * config.patch_size * config.patch_size * d;
    let block = tokens * (4 * d * d + 2 * d * hidden) + 2 * tokens * tokens * d;
    // The last block computes keys and values of all tokens, the rest for the class token alone.
    let last = 2 * tokens * d * d + 2 * d * d + 2 * d * hidden + 2 * tokens * d;
    (patches + (config.depth - 1) * block + last + d * config.num_classes) as f64
}
