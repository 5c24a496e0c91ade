//! Configuration of CLIP's towers.

use burn::prelude::*;

use super::layers::{Activation, check_eps, check_sizes};
use crate::error::MultimodalError;

/// Configuration of an image tower; the defaults are those of OpenAI's ViT-B/32.
#[derive(Config, Debug, PartialEq)]
pub struct VisionConfig {
    /// Height and width of the input, in pixels; a multiple of `patch_size`.
    #[config(default = 224)]
    pub img_size: usize,
    /// Height and width of a patch, in pixels.
    #[config(default = 32)]
    pub patch_size: usize,
    /// Input channels.
    #[config(default = 3)]
    pub in_chans: usize,
    /// Width; a multiple of `num_heads`.
    #[config(default = 768)]
    pub embed_dim: usize,
    /// Number of layers.
    #[config(default = 12)]
    pub depth: usize,
    /// Attention heads of a layer.
    #[config(default = 12)]
    pub num_heads: usize,
    /// Hidden width of a layer's MLP.
    #[config(default = 3072)]
    pub mlp_dim: usize,
    /// ε of the layer normalisations.
    #[config(default = 1e-5)]
    pub layer_norm_eps: f64,
    /// Activation function of the MLPs.
    #[config(default = "Activation::QuickGelu")]
    pub activation: Activation,
}

/// Configuration of a text tower; the defaults are those of OpenAI's ViT-B/32.
#[derive(Config, Debug, PartialEq)]
pub struct TextConfig {
    /// Number of tokens in the vocabulary.
    #[config(default = 49408)]
    pub vocab_size: usize,
    /// Number of positions: the longest text, in tokens.
    #[config(default = 77)]
    pub context_length: usize,
    /// Width; a multiple of `num_heads`.
    #[config(default = 512)]
    pub embed_dim: usize,
    /// Number of layers.
    #[config(default = 12)]
    pub depth: usize,
    /// Attention heads of a layer.
    #[config(default = 8)]
    pub num_heads: usize,
    /// Hidden width of a layer's MLP.
    #[config(default = 2048)]
    pub mlp_dim: usize,
    /// ε of the layer normalisations.
    #[config(default = 1e-5)]
    pub layer_norm_eps: f64,
    /// Activation function of the MLPs.
    #[config(default = "Activation::QuickGelu")]
    pub activation: Activation,
    /// The token at the end of a text, whose hidden state represents it; 2 means the token with the
    /// largest id.
    #[config(default = 49407)]
    pub eos_token_id: usize,
}

/// Configuration of a [`Clip`](super::Clip); `ClipConfig::new(VisionConfig::new(),
/// TextConfig::new())` is OpenAI's ViT-B/32.
#[derive(Config, Debug, PartialEq)]
pub struct ClipConfig {
    /// The image tower.
    pub vision: VisionConfig,
    /// The text tower.
    pub text: TextConfig,
    /// Width of the embedding space that both towers share.
    #[config(default = 512)]
    pub projection_dim: usize,
}

impl ClipConfig {
    /// Checks that the sizes are valid, and both ε.
    ///
    /// # Errors
    /// [`MultimodalError::Config`], which names the size at fault, or [`MultimodalError::Setting`].
    pub fn validate(&self) -> Result<(), MultimodalError> {
        let (vision, text) = (&self.vision, &self.text);
        let sizes = [
            ("img_size", vision.img_size),
            ("patch_size", vision.patch_size),
            ("in_chans", vision.in_chans),
            ("embed_dim", vision.embed_dim),
            ("depth", vision.depth),
            ("mlp_dim", vision.mlp_dim),
            ("projection_dim", self.projection_dim),
        ];
        check_sizes(&sizes, vision.embed_dim, vision.num_heads)?;
        if !vision.img_size.is_multiple_of(vision.patch_size) {
            let remedy = "use a multiple of patch_size";
            return Err(MultimodalError::Config { field: "img_size", value: vision.img_size, remedy });
        }
        let sizes = [
            ("vocab_size", text.vocab_size),
            ("context_length", text.context_length),
            ("embed_dim", text.embed_dim),
            ("depth", text.depth),
            ("mlp_dim", text.mlp_dim),
        ];
        check_sizes(&sizes, text.embed_dim, text.num_heads)?;
        check_eps(vision.layer_norm_eps)?;
        check_eps(text.layer_norm_eps)
    }
}
