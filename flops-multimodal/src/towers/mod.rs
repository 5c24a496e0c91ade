//! Encoders of texts and images, every layer called through the [`Probe`](flops_core::Probe).
//!
//! - [`Clip`]: two towers with one embedding space (Radford et al. 2021, arXiv 2103.00020).
//! - [`Bert`]: a sentence encoder such as all-MiniLM-L6-v2 (Devlin et al. 2019, arXiv 1810.04805; Reimers & Gurevych 2019, arXiv 1908.10084).
//!
//! With [`Probe::clean`](flops_core::Probe::clean) a tower is plain inference, on an autodiff backend the forward pass of backpropagation, and in a
//! query of forward-only learning its trained layers are perturbed. A tower makes no [stages](flops_core::Probe::stage): stages follow one
//! another, two towers of a model run side by side. A model that trains a part of a tower makes the stages of the tower's parts
//! (`embed_text`, `layers`, `project_text`); one that trains nothing in it calls it in one.
//!
//! Texts may also come as token embeddings ([`Bert::forward_embedded`], [`TextTower::forward_embedded`]): learned prompts go in there.

mod bert;
mod clip;
mod clip_config;
mod layers;

pub use bert::{Bert, BertConfig};
pub use clip::{Clip, TextTower, VisionTower};
pub use clip_config::{ClipConfig, TextConfig, VisionConfig};
pub use layers::{Activation, EncoderLayer, NormOrder, attention_bias};

use burn::prelude::*;

use crate::error::MultimodalError;

/// Rows divided by their Euclidean length, x / max(‖x‖, 10⁻¹²).
///
/// # Shapes
/// - x: `[rows, dim]`, and so the result
pub fn normalise<B: Backend>(x: Tensor<B, 2>) -> Tensor<B, 2> {
    let length = x.clone().powi_scalar(2).sum_dim(1).clamp_min(1e-24).sqrt();
    x / length
}

/// Sizes of a transformer that must be positive, and heads that must fit.
pub(crate) fn check_sizes(sizes: &[(&'static str, usize)], dim: usize, heads: usize) -> Result<(), MultimodalError> {
    let fail = |field, value, remedy| Err(MultimodalError::Config { field, value, remedy });
    if let Some((field, value)) = sizes.iter().find(|(_, value)| *value == 0) {
        return fail(field, *value, "it must be at least 1");
    }
    if heads == 0 || !dim.is_multiple_of(heads) {
        return fail("num_heads", heads, "use a divisor of embed_dim");
    }
    Ok(())
}

#[cfg(test)]
mod tests;
