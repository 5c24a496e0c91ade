//! `pretrained_cfg` of timm: how images are resized and normalised, and the names of the classes.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::super::channels::PerChannel;
use super::settings::compare_sizes;
use super::shapes::Shapes;
use crate::error::CheckpointError;
use crate::normalization::Normalization;
use crate::resizing::{Filter, MIN_CROP, Resizing};

/// timm's default of `crop_pct`.
const CROP_PCT: f64 = 0.875;

/// What a configuration says of the inputs; an absent key has timm's default.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct PretrainedCfg {
    input_size: Option<[usize; 3]>,
    fixed_input_size: Option<bool>,
    mean: Option<PerChannel>,
    std: Option<PerChannel>,
    crop_pct: Option<f64>,
    crop_mode: Option<String>,
    interpolation: Option<String>,
    pub num_classes: Option<i64>,
    pub label_names: Option<Labels>,
    label_offset: Option<i64>,
}

/// Names of classes: a list, or by id.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged, expecting = "label_names is a list of names, or a map from ids to names")]
pub(super) enum Labels {
    List(Vec<String>),
    ById(BTreeMap<String, String>),
}

impl Labels {
    /// Returns the names of the classes 0, 1 and so on, up to the first id that is left out.
    pub fn names(self) -> Vec<String> {
        match self {
            Self::List(names) => names,
            Self::ById(mut names) => (0..).map_while(|id: usize| names.remove(&id.to_string())).collect(),
        }
    }
}

fn unsupported(field: &'static str, value: impl ToString, supported: &str) -> CheckpointError {
    CheckpointError::Unsupported { field, value: value.to_string(), supported: supported.into() }
}

impl PretrainedCfg {
    /// Compares the input size with the weights. `img_size` and `in_chans` of `model_args` come
    /// before it, where they are given.
    pub fn compare(&self, shapes: &Shapes, img_size: bool, in_chans: bool) -> Result<(), CheckpointError> {
        let Some([channels, height, width]) = self.input_size else { return Ok(()) };
        if channels != shapes.in_chans && !in_chans {
            return Err(CheckpointError::Setting(format!(
                "input_size = [{channels}, {height}, {width}], and the weights have in_chans = {}; take both from the \
                 same model",
                shapes.in_chans
            )));
        }
        match img_size && self.fixed_input_size == Some(true) {
            true => Ok(()),
            false => compare_sizes("input_size", [height, width], shapes),
        }
    }

    /// Returns the resizing.
    pub fn resizing(&self) -> Result<Resizing, CheckpointError> {
        if self.label_offset.is_some_and(|offset| offset != 0) {
            return Err(unsupported("label_offset", self.label_offset.unwrap_or_default(), "0"));
        }
        let filter = match self.interpolation.as_deref() {
            None | Some("" | "bicubic") => Filter::Bicubic,
            Some("nearest") => Filter::Nearest,
            Some("bilinear") => Filter::Bilinear,
            Some("lanczos") => Filter::Lanczos,
            Some(other) => return Err(unsupported("interpolation", other, "nearest, bilinear, bicubic or lanczos")),
        };
        let squash = match self.crop_mode.as_deref() {
            None | Some("" | "center") => false,
            Some("squash") => true,
            Some(other) => return Err(unsupported("crop_mode", other, "center or squash")),
        };
        // 0 means the default, as in timm
        let crop = self.crop_pct.filter(|&crop| crop != 0.0).unwrap_or(CROP_PCT);
        let crop = crop as f32;
        if !(MIN_CROP..=1.0).contains(&crop) {
            return Err(unsupported("crop_pct", crop, "a number from 0.05 to 1"));
        }
        Ok(Resizing { filter, squash, crop })
    }

    /// Returns the normalisation of a model of so many channels, and a note where values were
    /// averaged.
    pub fn normalization(&self, channels: usize) -> Result<(Normalization, Option<String>), CheckpointError> {
        let default = Normalization::IMAGENET;
        let (mean, mean_averaged) = values("mean", &self.mean, default.mean, channels)?;
        let (std, std_averaged) = values("std", &self.std, default.std, channels)?;
        if !std.iter().all(|std| std.is_finite() && *std > 0.0) || !mean.iter().all(|mean| mean.is_finite()) {
            let why = format!("mean = {mean:?}, std = {std:?}; positive deviations are expected");
            return Err(CheckpointError::Setting(why));
        }
        let note = "mean and std have three values for a model of one channel: their averages are used, as in timm";
        let averaged = mean_averaged || std_averaged;
        Ok((Normalization { mean, std }, averaged.then(|| note.into())))
    }
}

/// Returns a value for each channel, and whether values were averaged. As in timm, one value is that
/// of all channels, and a model of one channel takes the average of three.
fn values(
    field: &str,
    given: &Option<PerChannel>,
    default: [f32; 3],
    channels: usize,
) -> Result<([f32; 3], bool), CheckpointError> {
    let given = given.as_ref().map_or(default.as_slice(), PerChannel::values);
    match *given {
        [one] => Ok(([one; 3], false)),
        [a, b, c] if channels == 1 => Ok(([(a + b + c) / 3.0; 3], a != b || b != c)),
        [a, b, c] => Ok(([a, b, c], false)),
        ref other => Err(CheckpointError::Setting(format!(
            "{field} = {other:?} does not fit in_chans = {channels}; give one value for each channel"
        ))),
    }
}
