//! HuggingFace's and timm's names of the parameters.

use burn_store::TensorSnapshot;

use super::table::{Table, called, to_ours, to_theirs};
use super::tensors::split_rows;
use crate::config::{Distillation, Pool, ViTConfig};
use crate::error::CheckpointError;

/// Names of `transformers`, without the prefix of the backbone.
#[rustfmt::skip]
const HF: Table = &[
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.distillation_token", "dist_token"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.patch_embeddings.projection.weight", "patch_embed.weight"),
    ("embeddings.patch_embeddings.projection.bias", "patch_embed.bias"),
    ("encoder.layer.N.layernorm_before.weight", "blocks.N.norm1.gamma"),
    ("encoder.layer.N.layernorm_before.bias", "blocks.N.norm1.beta"),
    ("encoder.layer.N.attention.attention.query.weight", "blocks.N.attn.query.weight"),
    ("encoder.layer.N.attention.attention.query.bias", "blocks.N.attn.query.bias"),
    ("encoder.layer.N.attention.attention.key.weight", "blocks.N.attn.key.weight"),
    ("encoder.layer.N.attention.attention.key.bias", "blocks.N.attn.key.bias"),
    ("encoder.layer.N.attention.attention.value.weight", "blocks.N.attn.value.weight"),
    ("encoder.layer.N.attention.attention.value.bias", "blocks.N.attn.value.bias"),
    ("encoder.layer.N.attention.output.dense.weight", "blocks.N.attn.proj.weight"),
    ("encoder.layer.N.attention.output.dense.bias", "blocks.N.attn.proj.bias"),
    ("encoder.layer.N.layernorm_after.weight", "blocks.N.norm2.gamma"),
    ("encoder.layer.N.layernorm_after.bias", "blocks.N.norm2.beta"),
    ("encoder.layer.N.intermediate.dense.weight", "blocks.N.fc1.weight"),
    ("encoder.layer.N.intermediate.dense.bias", "blocks.N.fc1.bias"),
    ("encoder.layer.N.output.dense.weight", "blocks.N.fc2.weight"),
    ("encoder.layer.N.output.dense.bias", "blocks.N.fc2.bias"),
    ("layernorm.weight", "norm.gamma"),
    ("layernorm.bias", "norm.beta"),
];

/// Heads of `ForImageClassification`, and of DeiT's `ForImageClassificationWithTeacher`.
#[rustfmt::skip]
const HF_HEADS: Table = &[
    ("classifier.weight", "head.weight"),
    ("classifier.bias", "head.bias"),
    ("cls_classifier.weight", "head.weight"),
    ("cls_classifier.bias", "head.bias"),
    ("distillation_classifier.weight", "head_dist.weight"),
    ("distillation_classifier.bias", "head_dist.bias"),
];

/// Names of timm, after `qkv` has been split.
#[rustfmt::skip]
const TIMM: Table = &[
    ("cls_token", "cls_token"),
    ("dist_token", "dist_token"),
    ("pos_embed", "pos_embed"),
    ("patch_embed.proj.weight", "patch_embed.weight"),
    ("patch_embed.proj.bias", "patch_embed.bias"),
    ("blocks.N.norm1.weight", "blocks.N.norm1.gamma"),
    ("blocks.N.norm1.bias", "blocks.N.norm1.beta"),
    ("blocks.N.attn.query.weight", "blocks.N.attn.query.weight"),
    ("blocks.N.attn.query.bias", "blocks.N.attn.query.bias"),
    ("blocks.N.attn.key.weight", "blocks.N.attn.key.weight"),
    ("blocks.N.attn.key.bias", "blocks.N.attn.key.bias"),
    ("blocks.N.attn.value.weight", "blocks.N.attn.value.weight"),
    ("blocks.N.attn.value.bias", "blocks.N.attn.value.bias"),
    ("blocks.N.attn.proj.weight", "blocks.N.attn.proj.weight"),
    ("blocks.N.attn.proj.bias", "blocks.N.attn.proj.bias"),
    ("blocks.N.norm2.weight", "blocks.N.norm2.gamma"),
    ("blocks.N.norm2.bias", "blocks.N.norm2.beta"),
    ("blocks.N.mlp.fc1.weight", "blocks.N.fc1.weight"),
    ("blocks.N.mlp.fc1.bias", "blocks.N.fc1.bias"),
    ("blocks.N.mlp.fc2.weight", "blocks.N.fc2.weight"),
    ("blocks.N.mlp.fc2.bias", "blocks.N.fc2.bias"),
    ("norm.weight", "norm.gamma"),
    ("norm.bias", "norm.beta"),
    ("fc_norm.weight", "norm.gamma"),
    ("fc_norm.bias", "norm.beta"),
    ("head.weight", "head.weight"),
    ("head.bias", "head.bias"),
    ("head_dist.weight", "head_dist.weight"),
    ("head_dist.bias", "head_dist.bias"),
];

/// The library whose names a file has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Naming {
    /// HuggingFace's: the backbone is called `vit` or `deit`, and has no name when saved alone.
    Hf,
    /// timm's.
    Timm,
}

impl Naming {
    /// Returns our name of the parameter that the library calls `key`.
    pub fn ours(self, key: &str) -> Option<String> {
        match self {
            Self::Hf => {
                let backbone = ["vit.", "deit."].into_iter().find_map(|p| key.strip_prefix(p)).unwrap_or(key);
                to_ours(HF, backbone).or_else(|| to_ours(HF_HEADS, key))
            }
            Self::Timm => to_ours(TIMM, key),
        }
    }

    /// Returns the library's name of our parameter `key` in a model of that configuration.
    pub fn theirs(self, key: &str, config: &ViTConfig) -> Option<String> {
        let find = |table: Table| to_theirs(table, key);
        match self {
            Self::Hf if key.starts_with("head") => {
                let both = config.distillation == Distillation::Head;
                find(if both { &HF_HEADS[2..] } else { &HF_HEADS[..2] })
            }
            Self::Hf => find(HF).map(|name| format!("{}.{name}", hf_model_type(config))),
            Self::Timm => find(TIMM).map(|name| match config.pool {
                Pool::Avg | Pool::Max | Pool::AvgMax if config.fc_norm && name.starts_with("norm.") => {
                    format!("fc_{name}")
                }
                _ => name,
            }),
        }
    }

    /// Returns whether classification does not use the tensor.
    fn ignores(self, key: &str) -> bool {
        self == Self::Hf && (key.contains("pooler.dense.") || key.ends_with("position_ids"))
    }

    /// Splits fused projections and gives tensors our names; a tensor that we do not know keeps its
    /// own.
    pub fn renamed(self, tensors: Vec<TensorSnapshot>) -> Result<Vec<TensorSnapshot>, CheckpointError> {
        let mut named = vec![];
        for tensor in tensors {
            let key = tensor.full_path();
            if self.ignores(&key) {
                continue;
            }
            match key.split_once(".attn.qkv.") {
                Some((block, kind)) if self == Self::Timm => {
                    let parts = split_rows(&tensor, 3)?.into_iter().zip(["query", "key", "value"]);
                    named.extend(parts.map(|(part, name)| (format!("{block}.attn.{name}.{kind}"), part)));
                }
                _ => named.push((key, tensor)),
            }
        }
        let ours = |key: String| self.ours(&key).unwrap_or(key);
        Ok(named.into_iter().map(|(key, tensor)| called(tensor, &ours(key))).collect())
    }
}

/// Returns the `model_type` of that configuration in `transformers`.
pub(super) fn hf_model_type(config: &ViTConfig) -> &'static str {
    if config.distillation == Distillation::None { "vit" } else { "deit" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        let hf = |key: &str| Naming::Hf.ours(key);
        for key in ["vit.encoder.layer.11.output.dense.bias", "deit.encoder.layer.11.output.dense.bias"] {
            assert_eq!(hf(key).unwrap(), "blocks.11.fc2.bias");
        }
        assert_eq!(hf("encoder.layer.0.output.dense.bias").unwrap(), "blocks.0.fc2.bias");
        assert_eq!(hf("vit.encoder.layer.x.output.dense.bias"), None);
        assert_eq!(hf("vit.pooler.dense.bias"), None);
        let plain = ViTConfig::vit_micro_patch4_32();
        let distilled = plain.clone().with_distillation(Distillation::Head);
        for (config, backbone) in [(&plain, "vit"), (&distilled, "deit")] {
            for (theirs, ours) in HF {
                let (theirs, ours) = (format!("{backbone}.{}", theirs.replace('N', "7")), ours.replace('N', "7"));
                assert_eq!(hf(&theirs).unwrap(), ours);
                assert_eq!(Naming::Hf.theirs(&ours, config).unwrap(), theirs);
            }
        }
        assert_eq!(Naming::Hf.theirs("head.bias", &plain).unwrap(), "classifier.bias");
        assert_eq!(Naming::Hf.theirs("head.bias", &distilled).unwrap(), "cls_classifier.bias");
        assert_eq!(Naming::Hf.theirs("head_dist.bias", &distilled).unwrap(), "distillation_classifier.bias");
        assert_eq!(Naming::Timm.ours("fc_norm.weight").unwrap(), "norm.gamma");
        let pooled = plain.clone().with_pool(Pool::Avg);
        assert_eq!(Naming::Timm.theirs("norm.gamma", &pooled).unwrap(), "fc_norm.weight");
        assert_eq!(Naming::Timm.theirs("norm.gamma", &plain).unwrap(), "norm.weight");
        let before = pooled.with_fc_norm(false);
        assert_eq!(Naming::Timm.theirs("norm.gamma", &before).unwrap(), "norm.weight");
    }
}
