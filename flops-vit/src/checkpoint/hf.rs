//! HuggingFace's folders of `ViTForImageClassification` and DeiT's classifiers, read and written.
//!
//! As on the hub, a folder holds `config.json`, the weights (`model.safetensors` or
//! `pytorch_model.bin`, whole or in shards with an index) and optionally
//! `preprocessor_config.json`. [`open`](super::open) reads it.

use std::collections::BTreeMap;
use std::path::Path;

use burn::prelude::*;
use flops_core::train::files::write_atomic;
use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::json;

use super::card::Card;
use super::channels::check_channels;
use super::file::json;
use super::import::{Opened, fill_from};
use super::names::{Naming, hf_model_type};
pub use super::preprocessor::ModelImages;
use super::preprocessor::{self, HfPreprocessor};
use super::pretrained::Pretrained;
use super::tensors::{TensorSnapshot, to_pytorch};
use crate::config::{Activation, Distillation, Pool, ViTConfig};
use crate::error::{CheckpointError, VitError};
use crate::normalization::Normalization;
use crate::resizing::Resizing;

/// Reads a side, as a number or as a pair of equal ones; for `deserialize_with`.
///
/// # Errors
/// Where it is neither, or the pair is not square.
pub fn side<'de, D: Deserializer<'de>>(deserializer: D) -> Result<usize, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Side {
        One(usize),
        Both([usize; 2]),
    }
    match Side::deserialize(deserializer)
        .map_err(|_| D::Error::custom("a size is a whole number, or a pair of them"))?
    {
        Side::One(side) => Ok(side),
        Side::Both([height, width]) if height == width => Ok(height),
        Side::Both(both) => {
            Err(D::Error::custom(format!("the size {both:?} is not square; only squares are supported")))
        }
    }
}

/// Reads a value for which `null` means the default; for `deserialize_with`.
///
/// # Errors
/// Where it is neither `null` nor such a value.
pub fn or_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(deserializer: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// Activations by their names in `transformers`; `gelu_new` and others are refused.
const ACTIVATIONS: [(&str, Activation); 3] =
    [("gelu", Activation::Gelu), ("gelu_pytorch_tanh", Activation::GeluTanh), ("quick_gelu", Activation::QuickGelu)];

/// The most classes without names.
const MOST_CLASSES: usize = 1 << 20;

/// `config.json`; an absent key has HuggingFace's default.
#[derive(Deserialize, Serialize)]
#[serde(default)]
pub(super) struct HfConfig {
    model_type: String,
    hidden_act: String,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    layer_norm_eps: f64,
    #[serde(deserialize_with = "side")]
    image_size: usize,
    #[serde(deserialize_with = "side")]
    patch_size: usize,
    num_channels: usize,
    qkv_bias: bool,
    #[serde(deserialize_with = "or_default")]
    id2label: BTreeMap<usize, String>,
    /// The number of classes where they have no names.
    #[serde(skip_serializing)]
    num_labels: Option<usize>,
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
            id2label: BTreeMap::new(),
            num_labels: None,
        }
    }
}

impl HfConfig {
    /// Converts to a [`ViTConfig`] and the names of the classes; `has` tells which tensors exist.
    fn convert(self, has: impl Fn(&str) -> bool) -> Result<(ViTConfig, Vec<String>), CheckpointError> {
        let only = |field, value: &str, supported: &[&str]| match supported.contains(&value) {
            true => Ok(()),
            false => {
                Err(CheckpointError::Unsupported { field, value: value.into(), supported: supported.join(" or ") })
            }
        };
        only("model_type", &self.model_type, &["vit", "deit"])?;
        let names = &ACTIVATIONS.map(|(name, _)| name);
        only("hidden_act", &self.hidden_act, names)?;
        let activation = ACTIVATIONS.into_iter().find(|(name, _)| *name == self.hidden_act);
        // as in transformers: names by default, of two classes where nothing says how many
        let classes: Vec<String> = match (self.id2label.is_empty(), self.num_labels.unwrap_or(2)) {
            (true, count @ 0..=MOST_CLASSES) => (0..count).map(|i| format!("LABEL_{i}")).collect(),
            (true, count) => return Err(CheckpointError::Setting(format!("num_labels = {count} is too large"))),
            (false, _) => self.id2label.values().cloned().collect(),
        };
        if self.id2label.keys().enumerate().any(|(i, &id)| i != id) {
            return Err(CheckpointError::Setting("the ids of id2label are not 0, 1, 2 and so on".into()));
        }
        let distillation = match (self.model_type.as_str(), has("distillation_classifier.weight")) {
            ("deit", true) => Distillation::Head,
            ("deit", false) => Distillation::Token,
            _ => Distillation::None,
        };
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
            .with_activation(activation.map_or(Activation::Gelu, |(_, activation)| activation))
            .with_num_classes(classes.len())
            .with_distillation(distillation);
        Ok((config, classes))
    }
}

/// Reads normalisation and resizing from a folder's `preprocessor_config.json`, if there is one.
///
/// What it makes must be `images`, those of the model.
///
/// # Errors
/// [`VitError::Checkpoint`] where the file cannot be read or parsed, has means for another number of
/// channels, makes images of another size, or has a key that is not known and may change them.
pub fn preprocessing(dir: &Path, images: ModelImages) -> Result<Option<(Normalization, Resizing)>, VitError> {
    preprocessing_with(dir, images, |_| ())
}

/// Like [`preprocessing`], where `change` turns the settings of another image processor into those
/// of `ViTImageProcessor`. None of them is null.
///
/// # Errors
/// Those of [`preprocessing`].
pub fn preprocessing_with(
    dir: &Path,
    images: ModelImages,
    change: impl FnOnce(&mut serde_json::Map<String, serde_json::Value>),
) -> Result<Option<(Normalization, Resizing)>, VitError> {
    let path = dir.join("preprocessor_config.json");
    let read = |mut settings: serde_json::Map<_, serde_json::Value>| {
        // null stands for the processor's own default, as if the key were absent
        settings.retain(|_, value| !value.is_null());
        change(&mut settings);
        let settings = serde_json::from_value::<HfPreprocessor>(settings.into());
        let settings = settings.map_err(|e| CheckpointError::Setting(format!("a setting is not understood: {e}")))?;
        settings.both(images)
    };
    match json(&path).and_then(read) {
        Ok(both) => Ok(Some(both)),
        Err(CheckpointError::Read(e)) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(why) => Err(VitError::Checkpoint { path: path.display().to_string(), why }),
    }
}

/// Loads the model of a folder from its configuration and its tensors, read from the file
/// `weights`.
///
/// Without a `preprocessor_config.json` inputs are resized and normalised by the defaults of
/// HuggingFace's `ViTImageProcessor`.
pub(super) fn open<B: Backend>(
    dir: &Path,
    config: HfConfig,
    (weights, tensors): (&str, Vec<TensorSnapshot>),
    device: &B::Device,
) -> Result<Opened<B>, VitError> {
    let in_file = |name: &str, why| VitError::Checkpoint { path: dir.join(name).display().to_string(), why };
    let has = |key: &str| tensors.iter().any(|t| t.full_path() == key);
    let (config, classes) = config.convert(has).map_err(|why| in_file("config.json", why))?;
    config.validate()?;
    check_channels("num_channels", &config).map_err(|why| in_file("config.json", why))?;
    let mut said = vec![];
    let images = ModelImages { channels: config.in_chans, side: config.img_size };
    let preprocessing = match preprocessing(dir, images)? {
        Some(found) => found,
        None => {
            said.push(
                "there is no preprocessor_config.json: images are prepared by the defaults of ViTImageProcessor".into(),
            );
            HfPreprocessor::default().both(images).map_err(|why| in_file("preprocessor_config.json", why))?
        }
    };
    let (normalization, resizing) = preprocessing;
    let (model, notes) = fill_from(&config, tensors, Naming::Hf, device).map_err(|why| in_file(weights, why))?;
    let description = format!("imported from the HuggingFace folder {}", dir.display());
    let card = Card { config, normalization, resizing, classes, description };
    said.extend(notes);
    Ok(Opened { pretrained: Pretrained { model, card }, notes: said })
}

impl<B: Backend> Pretrained<B> {
    /// Writes the folder that `transformers` loads with
    /// `AutoModelForImageClassification.from_pretrained`.
    ///
    /// It holds `config.json`, `preprocessor_config.json` and `model.safetensors` in f32. Adapters
    /// are [merged](crate::ViT::merged) first. Each file is written beside its place and renamed.
    ///
    /// # Errors
    /// [`VitError::Save`] where the card does not fit the model, a weight is not finite, or the
    /// folder cannot be created. Also where the head classifies pooled patch tokens:
    /// transformers has no such model. [`VitError::Write`] where a file cannot be written.
    pub fn save_huggingface(&self, dir: &Path) -> Result<(), VitError> {
        let failed = |why| VitError::Save { path: dir.to_path_buf(), why };
        let files = to_files(self).map_err(failed)?;
        std::fs::create_dir_all(dir).map_err(|e| failed(format!("{e}; choose another folder")))?;
        files.iter().try_for_each(|(name, bytes)| write_atomic(&dir.join(name), bytes).map_err(VitError::Write))
    }
}

/// Returns the files of the folder, by name.
fn to_files<B: Backend>(pretrained: &Pretrained<B>) -> Result<[(&'static str, Vec<u8>); 3], String> {
    let Pretrained { model, card } = pretrained;
    card.fits(model)?;
    let config = &card.config;
    if config.pool != Pool::Token {
        return Err("transformers has no ViT that classifies by the mean of its patch tokens, or their maximum; use \
             Pretrained::save"
            .into());
    }
    let merged = model.has_adapters().then(|| model.clone().merged());
    let model = merged.as_ref().unwrap_or(model);
    let weights = to_pytorch(model, false, |name| Naming::Hf.theirs(name, config))?;

    let pretty = |value: &serde_json::Value| serde_json::to_vec_pretty(value).map_err(|e| e.to_string());
    Ok([
        ("config.json", pretty(&hf_config(card))?),
        ("preprocessor_config.json", pretty(&preprocessor::of_card(card))?),
        ("model.safetensors", weights),
    ])
}

fn hf_config(card: &Card) -> serde_json::Value {
    let config = &card.config;
    let label2id: BTreeMap<&String, usize> = card.classes.iter().enumerate().map(|(i, name)| (name, i)).collect();
    let architecture = match config.distillation {
        Distillation::None => "ViTForImageClassification",
        Distillation::Token => "DeiTForImageClassification",
        Distillation::Head => "DeiTForImageClassificationWithTeacher",
    };
    let mut all = json!({
        "architectures": [architecture],
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "torch_dtype": "float32",
        "label2id": label2id,
    });
    let activation = ACTIVATIONS.into_iter().find(|(_, activation)| *activation == config.activation);
    let sizes = json!(HfConfig {
        model_type: hf_model_type(config).into(),
        hidden_act: activation.map_or("gelu", |(name, _)| name).into(),
        hidden_size: config.embed_dim,
        intermediate_size: config.mlp_dim(),
        num_hidden_layers: config.depth,
        num_attention_heads: config.num_heads,
        layer_norm_eps: config.layer_norm_eps,
        image_size: config.img_size,
        patch_size: config.patch_size,
        num_channels: config.in_chans,
        qkv_bias: config.qkv_bias,
        id2label: card.classes.iter().cloned().enumerate().collect(),
        num_labels: None,
    });
    if let (Some(all), serde_json::Value::Object(sizes)) = (all.as_object_mut(), sizes) {
        all.extend(sizes);
    }
    all
}
