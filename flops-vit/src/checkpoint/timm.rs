//! Import of timm's vision transformers.
//!
//! A file of timm's does not hold the sizes of the model: they are read off the shapes. The number
//! of heads shows in no shape. It follows from the model's name where a `config.json` has one,
//! otherwise it is embed_dim/64, which is right for all of timm's published sizes.

use std::collections::BTreeMap;

use burn::prelude::*;
use burn_store::TensorSnapshot;
use serde::Deserialize;

use super::card::Card;
use super::import::{Opened, fill_from};
use super::names::Naming;
use super::pretrained::Pretrained;
use super::table::called;
use super::tensors::{of_values, values};
use crate::config::{Distillation, Pool, ViTConfig};
use crate::error::CheckpointError;
use crate::normalization::Normalization;
use crate::resizing::{Filter, Resizing};

/// `config.json` of a timm model on the hub.
#[derive(Deserialize)]
pub(super) struct TimmConfig {
    architecture: String,
    #[serde(default)]
    global_pool: Option<String>,
    #[serde(default)]
    label_names: Option<Vec<String>>,
    #[serde(default)]
    model_args: BTreeMap<String, serde_json::Value>,
    #[serde(default)]
    pretrained_cfg: PretrainedCfg,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct PretrainedCfg {
    mean: Option<[f32; 3]>,
    std: Option<[f32; 3]>,
    crop_pct: Option<f32>,
    interpolation: Option<String>,
    label_names: Option<Vec<String>>,
}

/// Returns whether the tensors have timm's names.
pub(super) fn is_timm(tensors: &[TensorSnapshot]) -> bool {
    tensors.iter().any(|t| t.full_path() == "patch_embed.proj.weight")
}

/// Number of heads by the second part of a model's name.
fn heads_by_name(architecture: &str) -> Option<usize> {
    let size = architecture.split('_').nth(1)?;
    [("tiny", 3), ("small", 6), ("base", 12), ("large", 16), ("huge", 16)]
        .into_iter()
        .find(|(s, _)| *s == size)
        .map(|s| s.1)
}

/// Infers the sizes of the model from the shapes of its tensors, which have timm's names.
fn sizes(tensors: &[TensorSnapshot], config: Option<&TimmConfig>) -> Result<ViTConfig, CheckpointError> {
    let shapes: BTreeMap<String, Vec<usize>> = tensors.iter().map(|t| (t.full_path(), t.shape.to_vec())).collect();
    let has = |key: &str| shapes.contains_key(key);
    let shape = |key: &str, rank: usize| match shapes.get(key) {
        Some(shape) if shape.len() == rank => Ok(shape.clone()),
        Some(shape) => Err(CheckpointError::Shapes(vec![format!("{key} is {shape:?}, expected {rank} dimensions")])),
        None => Err(CheckpointError::Missing(vec![key.into()])),
    };
    let patch = shape("patch_embed.proj.weight", 4)?;
    let (d, channels, side) = (patch[0], patch[1], patch[2]);
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
    let block = |key: &str| key.strip_prefix("blocks.")?.split('.').next()?.parse::<usize>().ok();
    let depth = shapes.keys().filter_map(|key| block(key)).max().map_or(0, |last| last + 1);
    let hidden = shape("blocks.0.mlp.fc1.weight", 2)?[0];
    let named = config.and_then(|c| c.model_args.get("num_heads")?.as_u64()).map(|heads| heads as usize);
    let heads = named.or_else(|| heads_by_name(&config?.architecture)).unwrap_or(d / 64).max(1);
    let averaged = has("fc_norm.weight") || config.is_some_and(|c| c.global_pool.as_deref() == Some("avg"));
    let classes = shapes.get("head.weight").and_then(|s| s.first().copied());
    Ok(ViTConfig::new()
        .with_img_size(grid * side)
        .with_patch_size(side)
        .with_in_chans(channels)
        .with_embed_dim(d)
        .with_depth(depth)
        .with_num_heads(heads)
        .with_mlp_ratio(hidden as f64 / d.max(1) as f64)
        .with_qkv_bias(has("blocks.0.attn.qkv.bias"))
        .with_num_classes(classes.unwrap_or(1000))
        .with_pool(if averaged { Pool::Avg } else { Pool::Token })
        .with_class_token(class_token)
        .with_distillation(match (dist_token, has("head_dist.weight")) {
            (false, _) => Distillation::None,
            (true, false) => Distillation::Token,
            (true, true) => Distillation::Head,
        }))
}

/// Loads a model from its tensors and, where there is one, its configuration.
pub(super) fn open<B: Backend>(
    mut tensors: Vec<TensorSnapshot>,
    timm: Option<TimmConfig>,
    origin: &str,
    device: &B::Device,
) -> Result<Opened<B>, CheckpointError> {
    let config = sizes(&tensors, timm.as_ref())?;
    config.validate().map_err(|e| CheckpointError::Setting(e.to_string()))?;
    pad_positions(&mut tensors, &config)?;
    let (model, mut notes) = fill_from(&config, tensors, Naming::Timm, device)?;
    let labels = |c: &TimmConfig| c.label_names.clone().or_else(|| c.pretrained_cfg.label_names.clone());
    let classes = timm.as_ref().and_then(labels).filter(|names| names.len() == config.num_classes);
    let classes = classes.unwrap_or_else(|| (0..config.num_classes).map(|i| format!("LABEL_{i}")).collect());
    let given = timm.as_ref().map(|c| &c.pretrained_cfg);
    let normalization = match given.and_then(|c| Some((c.mean?, c.std?))) {
        Some((mean, std)) => Normalization { mean, std },
        None => {
            notes.push("the file does not say what its images were normalised with: mean and std 0.5 are used".into());
            Normalization::HALF
        }
    };
    let description = match &timm {
        Some(c) => format!("imported from timm's {}, {origin}", c.architecture),
        None => format!("imported from timm's weights {origin}"),
    };
    let card = Card { config, normalization, resizing: resizing(given), classes, description };
    Ok(Opened { pretrained: Pretrained { model, card }, notes })
}

/// Puts zeros in front of positions that cover the patches only.
fn pad_positions(tensors: &mut [TensorSnapshot], config: &ViTConfig) -> Result<(), CheckpointError> {
    let (prefix, tokens, d) = (config.num_prefix_tokens(), config.num_tokens(), config.embed_dim);
    for tensor in tensors {
        if tensor.full_path() == "pos_embed" && tensor.shape[1] + prefix == tokens {
            let grid: Vec<f32> = values(tensor)?.to_vec().map_err(|e| CheckpointError::Malformed(format!("{e:?}")))?;
            let all = [vec![0.0; prefix * d], grid].concat();
            *tensor = called(of_values(all, vec![1, tokens, d]), "pos_embed");
        }
    }
    Ok(())
}

/// The resizing of a configuration; bilinear without a crop where it says nothing.
fn resizing(config: Option<&PretrainedCfg>) -> Resizing {
    let filter = match config.and_then(|c| c.interpolation.as_deref()) {
        Some("nearest") => Filter::Nearest,
        Some("bicubic") => Filter::Bicubic,
        Some("lanczos") => Filter::Lanczos,
        _ => Filter::Bilinear,
    };
    let crop = config.and_then(|c| c.crop_pct).filter(|&crop| crop > 0.0 && crop <= 1.0).unwrap_or(1.0);
    Resizing { filter, squash: false, crop }
}
