//! What the shapes of timm's tensors say of the model.

use std::collections::BTreeMap;

use burn_store::TensorSnapshot;

use super::layer_scale;
use crate::config::{Distillation, ViTConfig};
use crate::error::CheckpointError;

/// The sizes of a model, read off its tensors.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Shapes {
    pub img_size: usize,
    pub patch_size: usize,
    pub in_chans: usize,
    pub embed_dim: usize,
    pub depth: usize,
    pub mlp_dim: usize,
    pub qkv_bias: bool,
    /// The classes of the head, where there is one.
    pub num_classes: Option<usize>,
    pub class_token: bool,
    pub distillation: Distillation,
    /// Whether the final norm is that of pooled tokens.
    pub fc_norm: bool,
    /// Whether the blocks have LayerScale.
    pub layer_scale: bool,
}

impl Shapes {
    /// Reads the sizes off the tensors, which have timm's names.
    pub fn read(tensors: &[TensorSnapshot]) -> Result<Self, CheckpointError> {
        let shapes: BTreeMap<String, Vec<usize>> = tensors.iter().map(|t| (t.full_path(), t.shape.to_vec())).collect();
        let has = |key: &str| shapes.contains_key(key);
        let shape = |key: &str, rank: usize| match shapes.get(key) {
            Some(shape) if shape.len() == rank => Ok(shape.clone()),
            Some(shape) => {
                Err(CheckpointError::Shapes(vec![format!("{key} is {shape:?}, expected {rank} dimensions")]))
            }
            None => Err(CheckpointError::Missing(vec![key.into()])),
        };
        let patch = shape("patch_embed.proj.weight", 4)?;
        let tokens = shape("pos_embed", 3)?[1];
        let (class_token, dist_token) = (has("cls_token"), has("dist_token"));
        let prefix = usize::from(class_token) + usize::from(dist_token);
        let square = |n: usize| Some(n.isqrt()).filter(|root| root * root == n);
        // some models have positions for the patches alone
        let grid = tokens.checked_sub(prefix).and_then(square).or_else(|| square(tokens));
        let grid = grid.ok_or_else(|| {
            CheckpointError::Shapes(vec![format!(
                "pos_embed has {tokens} tokens, of which {prefix} are no patches; expected a square beside them"
            )])
        })?;
        if has("norm.weight") && has("fc_norm.weight") {
            return Err(CheckpointError::Unexpected(vec!["fc_norm.weight".into()]));
        }
        let block = |key: &str| key.strip_prefix("blocks.")?.split('.').next()?.parse::<usize>().ok();
        let depth = shapes.keys().filter_map(|key| block(key)).max().map_or(0, |last| last.saturating_add(1));
        Ok(Self {
            img_size: grid.saturating_mul(patch[2]),
            patch_size: patch[2],
            in_chans: patch[1],
            embed_dim: patch[0],
            depth,
            mlp_dim: shape("blocks.0.mlp.fc1.weight", 2)?[0],
            qkv_bias: has("blocks.0.attn.qkv.bias"),
            num_classes: shapes.get("head.weight").and_then(|s| s.first().copied()),
            class_token,
            distillation: match (dist_token, has("head_dist.weight")) {
                (false, _) => Distillation::None,
                (true, false) => Distillation::Token,
                (true, true) => Distillation::Head,
            },
            fc_norm: has("fc_norm.weight"),
            layer_scale: layer_scale::is_there(tensors),
        })
    }

    /// The configuration with those sizes; what shows in no shape has its default.
    pub fn config(&self, num_classes: usize) -> ViTConfig {
        ViTConfig::new()
            .with_img_size(self.img_size)
            .with_patch_size(self.patch_size)
            .with_in_chans(self.in_chans)
            .with_embed_dim(self.embed_dim)
            .with_depth(self.depth)
            .with_mlp_ratio(self.mlp_dim as f64 / self.embed_dim.max(1) as f64)
            .with_qkv_bias(self.qkv_bias)
            .with_num_classes(num_classes)
            .with_class_token(self.class_token)
            .with_distillation(self.distillation)
    }
}
