//! Import of HuggingFace's `ViTForImageClassification`.
//!
//! The folder holds what a model's page on the hub does: `config.json`, `model.safetensors` and, where there is one,
//! `preprocessor_config.json` for the normalisation.

use std::collections::BTreeMap;
use std::path::Path;

use burn::prelude::*;
use burn_store::{PyTorchToBurnAdapter, TensorSnapshot};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::hf_keys::{from_hf, to_hf};
use super::{Card, fill, read, tensors};
use crate::config::ViTConfig;
use crate::error::{CheckpointError, VitError};
use crate::model::ViT;
use crate::normalization::Normalization;

/// `config.json`; a key that is absent has HuggingFace's default.
#[derive(Deserialize)]
#[serde(default)]
struct HfConfig {
    model_type: String,
    hidden_act: String,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    layer_norm_eps: f64,
    image_size: usize,
    patch_size: usize,
    num_channels: usize,
    qkv_bias: bool,
    id2label: BTreeMap<usize, String>,
}

impl Default for HfConfig {
    fn default() -> Self {
        Self {
            model_type: "vit".into(),
            hidden_act: "gelu".into(),
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            layer_norm_eps: 1e-12,
            image_size: 224,
            patch_size: 16,
            num_channels: 3,
            qkv_bias: true,
            id2label: BTreeMap::from([(0, "LABEL_0".into()), (1, "LABEL_1".into())]),
        }
    }
}

/// `preprocessor_config.json`.
#[derive(Deserialize)]
struct HfPreprocessor {
    image_mean: [f32; 3],
    image_std: [f32; 3],
}

impl HfConfig {
    /// The same in our words, and the names of the classes.
    fn convert(self) -> Result<(ViTConfig, Vec<String>), CheckpointError> {
        let only = |field, value: &str, supported| {
            let value = value.to_string();
            if value == supported { Ok(()) } else { Err(CheckpointError::Unsupported { field, value, supported }) }
        };
        only("model_type", &self.model_type, "vit")?;
        only("hidden_act", &self.hidden_act, "gelu")?;
        if self.id2label.keys().enumerate().any(|(i, &id)| i != id) {
            return Err(CheckpointError::Json("the ids of id2label are not 0, 1, 2 and so on".into()));
        }
        let config = ViTConfig::new()
            .with_img_size(self.image_size)
            .with_patch_size(self.patch_size)
            .with_in_chans(self.num_channels)
            .with_embed_dim(self.hidden_size)
            .with_depth(self.num_hidden_layers)
            .with_num_heads(self.num_attention_heads)
            .with_mlp_ratio(self.intermediate_size as f64 / self.hidden_size as f64)
            .with_qkv_bias(self.qkv_bias)
            .with_layer_norm_eps(self.layer_norm_eps)
            .with_num_classes(self.id2label.len());
        Ok((config, self.id2label.into_values().collect()))
    }
}

/// Loads a HuggingFace folder: the model, and a card to [`save`](super::save) it with.
///
/// Without a `preprocessor_config.json` inputs are normalised with [`Normalization::HALF`], as HuggingFace does.
///
/// # Errors
/// [`VitError::Checkpoint`] where a file is missing or damaged, lacks parameters (listed), has some that the configuration does
/// not explain, or is another model than a ViT with GELU.
pub fn load<B: Backend>(dir: &Path, device: &B::Device) -> Result<(ViT<B>, Card), VitError> {
    let file = |name: &str| dir.join(name);
    let in_file = |name: &str, why| VitError::Checkpoint { path: dir.join(name).display().to_string(), why };

    let (config, classes) = json::<HfConfig>(&file("config.json"))
        .and_then(HfConfig::convert)
        .map_err(|why| in_file("config.json", why))?;
    config.validate()?;
    let normalization = match json::<HfPreprocessor>(&file("preprocessor_config.json")) {
        Ok(found) => Normalization { mean: found.image_mean, std: found.image_std },
        Err(CheckpointError::Read(e)) if e.kind() == std::io::ErrorKind::NotFound => Normalization::HALF,
        Err(why) => return Err(in_file("preprocessor_config.json", why)),
    };
    let model =
        weights(&config, &file("model.safetensors"), device).map_err(|why| in_file("model.safetensors", why))?;
    let description = format!("imported from the HuggingFace folder {}", dir.display());
    Ok((model, Card { config, normalization, classes, description }))
}

fn json<T: DeserializeOwned>(path: &Path) -> Result<T, CheckpointError> {
    serde_json::from_slice(&read(path)?).map_err(|e| CheckpointError::Json(e.to_string()))
}

fn weights<B: Backend>(config: &ViTConfig, path: &Path, device: &B::Device) -> Result<ViT<B>, CheckpointError> {
    // what classification does not use
    let ignored = |key: &str| key.starts_with("vit.pooler.") || key.ends_with(".position_ids");
    let found = tensors(read(path)?)?.into_iter().filter(|t| !ignored(&t.full_path()));
    let named: Vec<TensorSnapshot> = found.map(renamed).collect();
    let theirs = |names: Vec<String>| names.into_iter().map(|name| to_hf(&name).unwrap_or(name)).collect();
    fill(config, named, PyTorchToBurnAdapter, device).map_err(|why| match why {
        CheckpointError::Missing(names) => CheckpointError::Missing(theirs(names)),
        CheckpointError::Unexpected(names) => CheckpointError::Unexpected(theirs(names)),
        CheckpointError::NonFinite { name } => CheckpointError::NonFinite { name: to_hf(&name).unwrap_or(name) },
        other => other,
    })
}

/// The tensor under our name; under its own where it has none.
fn renamed(mut tensor: TensorSnapshot) -> TensorSnapshot {
    if let Some(name) = from_hf(&tensor.full_path()) {
        tensor.path_stack = Some(name.split('.').map(String::from).collect());
    }
    tensor
}
