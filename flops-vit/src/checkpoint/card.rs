//! The description that a checkpoint carries in its metadata.

use burn::prelude::*;
use serde::{Deserialize, Deserializer, Serialize};

use crate::config::ViTConfig;
use crate::error::CheckpointError;
use crate::model::ViT;
use crate::normalization::Normalization;
use crate::resizing::{MIN_CROP, Resizing};

/// Key of the [`Card`] in the metadata of a model's file.
pub(super) const CARD_KEY: &str = "flops";
/// Key of the card in the metadata of a file of adapters.
pub(super) const ADAPTER_KEY: &str = "flops-lora";

/// All that is needed to use a checkpoint's weights, stored as JSON in the file's metadata.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Card {
    /// Sizes of the model.
    #[serde(deserialize_with = "with_defaults")]
    pub config: ViTConfig,
    /// Normalisation of the inputs, in pretraining and in use.
    pub normalization: Normalization,
    /// Resizing of images to the model's input.
    #[serde(default)]
    pub resizing: Resizing,
    /// Names of the head's classes in order, `config.num_classes` of them.
    pub classes: Vec<String>,
    /// How the model was trained, and how good it is; free text.
    pub description: String,
}

/// Reads a configuration; a field that an older version did not write has its default.
fn with_defaults<'de, D: Deserializer<'de>>(deserializer: D) -> Result<ViTConfig, D::Error> {
    use serde::de::Error;
    let given = serde_json::Map::deserialize(deserializer)?;
    let mut all = serde_json::to_value(ViTConfig::new()).map_err(D::Error::custom)?;
    if let Some(all) = all.as_object_mut() {
        all.extend(given);
    }
    serde_json::from_value(all).map_err(D::Error::custom)
}

impl Card {
    /// Checks that the card describes `model`; the error says what differs.
    pub(super) fn fits<B: Backend>(&self, model: &ViT<B>) -> Result<(), String> {
        self.check().map_err(|why| format!("the card does not fit the model: {why}"))?;
        let compare = |what: &str, says: usize, has: usize| match says == has {
            true => Ok(()),
            false => Err(format!("the card says {says} {what}, the model's has {has}")),
        };
        compare("classes", self.config.num_classes, model.head.weight.dims()[1])?;
        compare("tokens", self.config.num_tokens(), model.pos_embed.dims()[1])
    }

    /// Checks that the parts of the card fit together; the error says what is wrong.
    pub(super) fn check(&self) -> Result<(), String> {
        self.config.validate().map_err(|e| e.to_string())?;
        if self.classes.len() != self.config.num_classes {
            return Err(format!("it names {} classes, num_classes = {}", self.classes.len(), self.config.num_classes));
        }
        if !matches!(self.config.in_chans, 1 | 3) {
            return Err(format!("in_chans = {}, expected 1 (grey) or 3 (red, green, blue)", self.config.in_chans));
        }
        let Normalization { mean, std } = self.normalization;
        if self.config.in_chans == 1 && !self.normalization.is_grey() {
            return Err(format!(
                "its normalization has mean {mean:?} and std {std:?}, expected one value for one channel"
            ));
        }
        if mean.iter().chain(&std).any(|x| !x.is_finite()) || std.iter().any(|&x| x <= 0.0) {
            return Err(format!(
                "its normalization has mean {mean:?} and std {std:?}, expected finite numbers and std > 0"
            ));
        }
        if !self.resizing.is_valid() {
            return Err(format!(
                "its resizing keeps a part of {}, expected one from {MIN_CROP} to 1",
                self.resizing.crop
            ));
        }
        Ok(())
    }
}

/// Checks that `depth` is possible: each block of a model has tensors of its own.
///
/// Otherwise a damaged configuration could make a model of 10¹² blocks.
pub(super) fn check_depth(config: &ViTConfig, tensors: usize) -> Result<(), CheckpointError> {
    match config.depth > tensors {
        true => {
            let why = format!("depth = {}, but the file holds {tensors} tensors", config.depth);
            Err(CheckpointError::Card(why))
        }
        false => Ok(()),
    }
}
