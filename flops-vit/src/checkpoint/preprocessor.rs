//! `preprocessor_config.json` of HuggingFace: how images are resized and normalised.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::json;

use super::card::Card;
use super::channels::PerChannel;
use crate::error::CheckpointError;
use crate::normalization::Normalization;
use crate::resizing::{Filter, MIN_CROP, Resizing};

/// `preprocessor_config.json`; an absent key has the default of HuggingFace's `ViTImageProcessor`.
#[derive(Deserialize)]
#[serde(default)]
pub(super) struct HfPreprocessor {
    do_resize: bool,
    do_normalize: bool,
    do_rescale: bool,
    do_center_crop: bool,
    rescale_factor: f32,
    resample: u8,
    image_mean: Option<PerChannel>,
    image_std: Option<PerChannel>,
    size: Option<HfSize>,
    crop_size: Option<HfSize>,
    /// The class that reads the file.
    #[serde(alias = "feature_extractor_type")]
    image_processor_type: Option<String>,
    /// All other keys.
    #[serde(flatten)]
    other: BTreeMap<String, serde_json::Value>,
}

/// Image processors that do what the keys above say, and nothing else: their names without the endings
/// `ImageProcessor`, `ImageProcessorFast` and `FeatureExtractor`.
const PROCESSORS: [&str; 5] = ["ViT", "DeiT", "CLIP", "Siglip", "Beit"];

/// Keys that change no pixel.
const WITHOUT_EFFECT: [&str; 12] = [
    "_valid_processor_keys",
    "auto_map",
    "data_format",
    "default_to_square",
    "device",
    "disable_grouping",
    "do_convert_rgb",
    "do_reduce_labels",
    "input_data_format",
    "processor_class",
    "reduce_labels",
    "return_tensors",
];

/// The images that a model takes: squares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModelImages {
    /// Channels, 1 or 3.
    pub channels: usize,
    /// Pixels of a side.
    pub side: usize,
}

/// A size, in any of the forms that versions of `transformers` have written.
#[derive(Clone, Copy, Deserialize)]
#[serde(untagged)]
enum HfSize {
    Side(f32),
    Pair([f32; 2]),
    Shortest { shortest_edge: f32 },
    Both { height: f32, width: f32 },
}

impl HfSize {
    /// Returns the side of a square.
    fn side(self) -> Result<f32, CheckpointError> {
        match self {
            Self::Side(side) | Self::Shortest { shortest_edge: side } if side >= 1.0 => Ok(side),
            Self::Both { height, width } | Self::Pair([height, width]) if height == width && height >= 1.0 => {
                Ok(height)
            }
            Self::Side(side) | Self::Shortest { shortest_edge: side } => {
                Err(CheckpointError::Setting(format!("a size of {side} is below one pixel")))
            }
            Self::Both { height, width } | Self::Pair([height, width]) => {
                let why = format!("the size {height} × {width} is not a square of at least one pixel");
                Err(CheckpointError::Setting(format!("{why}; only squares are supported")))
            }
        }
    }
}

impl Default for HfPreprocessor {
    fn default() -> Self {
        Self {
            do_resize: true,
            do_normalize: true,
            do_rescale: true,
            do_center_crop: false,
            rescale_factor: 1.0 / 255.0,
            resample: 2,
            image_mean: None,
            image_std: None,
            size: None,
            crop_size: None,
            image_processor_type: None,
            other: BTreeMap::new(),
        }
    }
}

impl HfPreprocessor {
    /// Returns both for the images of a model.
    pub fn both(&self, images: ModelImages) -> Result<(Normalization, Resizing), CheckpointError> {
        self.check_keys()?;
        let both = (self.normalization(images.channels)?, self.resizing()?);
        let (name, last) = if self.do_center_crop && self.crop_size.is_some() {
            ("crop_size", self.crop_size)
        } else {
            ("size", self.size)
        };
        match last.map(HfSize::side).transpose()? {
            Some(found) if found != images.side as f32 => Err(CheckpointError::Setting(format!(
                "{name} = {found}, and image_size of the model is {}; the images would not fit the model: \
                 correct one of them",
                images.side
            ))),
            _ => Ok(both),
        }
    }

    /// Whether all that the file says is known here.
    fn check_keys(&self) -> Result<(), CheckpointError> {
        if let Some(name) = &self.image_processor_type {
            let kind = ["ImageProcessorFast", "ImageProcessor", "FeatureExtractor"];
            let kind = kind.iter().find_map(|ending| name.strip_suffix(ending)).unwrap_or(name);
            if !PROCESSORS.contains(&kind) {
                let supported = "those of ViT, DeiT, BEiT, CLIP and SigLIP".into();
                let value = name.clone();
                return Err(CheckpointError::Unsupported { field: "image_processor_type", value, supported });
            }
        }
        for (key, value) in &self.other {
            let is_off = value.is_null() || value == &serde_json::Value::Bool(false);
            if !is_off && !WITHOUT_EFFECT.contains(&key.as_str()) {
                let why = format!("{key} = {value} is not known, and may change the images");
                return Err(CheckpointError::Setting(format!("{why}; remove the key if it does not")));
            }
        }
        Ok(())
    }

    /// Proportions are kept only where the size is that of the shortest edge.
    fn resizing(&self) -> Result<Resizing, CheckpointError> {
        let unsupported = |field, value: String, supported: &str| {
            Err(CheckpointError::Unsupported { field, value, supported: supported.into() })
        };
        if !self.do_resize {
            return unsupported("do_resize", "false".into(), "true");
        }
        let Some(filter) = Filter::from_pil(self.resample) else {
            return unsupported(
                "resample",
                self.resample.to_string(),
                "0 (nearest), 1 (Lanczos), 2 (bilinear) or 3 (bicubic)",
            );
        };
        let size = self.size.map(HfSize::side).transpose()?;
        let crop = match (self.do_center_crop, size, self.crop_size) {
            (true, Some(size), Some(crop)) => crop.side()? / size,
            _ => 1.0,
        };
        if !(MIN_CROP..=1.0).contains(&crop) {
            return unsupported(
                "crop_size",
                format!("{crop} × size"),
                "a crop between a 20th of the size and the size",
            );
        }
        Ok(Resizing { filter, squash: !matches!(self.size, Some(HfSize::Shortest { .. })), crop })
    }

    /// The normalisation of pixels in [0, 1]: the rescale factor is folded in.
    fn normalization(&self, channels: usize) -> Result<Normalization, CheckpointError> {
        let wrong = |setting: String| Err(CheckpointError::Setting(setting));
        if self.do_rescale && !(self.rescale_factor.is_finite() && self.rescale_factor > 0.0) {
            return wrong(format!("rescale_factor = {}; a positive number is expected", self.rescale_factor));
        }
        let scale = 255.0 * if self.do_rescale { self.rescale_factor } else { 1.0 };
        let half = Normalization::HALF;
        let values = |field, given: &Option<PerChannel>, default| match given {
            Some(given) if self.do_normalize => given.of(field, channels),
            _ => Ok(default),
        };
        let (mean, std) = if self.do_normalize { (half.mean, half.std) } else { ([0.0; 3], [1.0; 3]) };
        let mean = values("image_mean", &self.image_mean, mean)?;
        let std = values("image_std", &self.image_std, std)?;
        if !std.iter().all(|std| std.is_finite() && *std > 0.0) || !mean.iter().all(|mean| mean.is_finite()) {
            return wrong(format!("image_mean = {mean:?}, image_std = {std:?}; positive deviations are expected"));
        }
        Ok(Normalization { mean: mean.map(|m| m / scale), std: std.map(|s| s / scale) })
    }
}

/// Returns the file's content for the model of a card.
pub(super) fn of_card(card: &Card) -> serde_json::Value {
    let (side, resizing) = (card.config.img_size, card.resizing);
    // one value for a model of one channel
    let channels = |values: &[f32; 3]| values[..card.config.in_chans.min(3)].to_vec();
    let outer = ((side as f32 / resizing.crop) as usize).max(side);
    // ViTImageProcessor cannot crop
    let (kind, size) = match (resizing.squash, resizing.crop < 1.0) {
        (true, false) => ("ViTImageProcessor", json!({"height": side, "width": side})),
        (true, true) => ("DeiTImageProcessor", json!({"height": outer, "width": outer})),
        (false, _) => ("CLIPImageProcessor", json!({"shortest_edge": outer})),
    };
    json!({
        "image_processor_type": kind,
        "do_resize": true,
        "size": size,
        "do_center_crop": kind != "ViTImageProcessor",
        "crop_size": {"height": side, "width": side},
        "resample": resizing.filter.to_pil(),
        "do_rescale": true,
        "rescale_factor": 1.0 / 255.0,
        "do_normalize": true,
        "image_mean": channels(&card.normalization.mean),
        "image_std": channels(&card.normalization.std),
    })
}
