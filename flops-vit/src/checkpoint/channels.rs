//! Channels of images: how many a model may have, and values that are given for each.

use serde::Deserialize;

use crate::config::ViTConfig;
use crate::error::CheckpointError;

/// Checks that images fit a model of that configuration: they have three channels, or one as grey.
pub(super) fn check_channels(field: &'static str, config: &ViTConfig) -> Result<(), CheckpointError> {
    match config.in_chans {
        1 | 3 => Ok(()),
        other => Err(CheckpointError::Unsupported {
            field,
            value: other.to_string(),
            supported: "1 (grey) or 3 (red, green, blue)".into(),
        }),
    }
}

/// A value for all channels, or one for each.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged, expecting = "a number is expected, or a list of numbers")]
pub(super) enum PerChannel {
    All(f32),
    Each(Vec<f32>),
}

impl PerChannel {
    /// Returns three values; those of one channel are equal.
    ///
    /// # Errors
    /// [`CheckpointError::Setting`] where a list has another length. A list of equal values is right
    /// for one channel.
    pub fn of(&self, field: &str, channels: usize) -> Result<[f32; 3], CheckpointError> {
        match *self.values() {
            [one] if channels == 1 || matches!(self, Self::All(_)) => Ok([one; 3]),
            [a, b, c] if channels == 3 || (a == b && b == c) => Ok([a, b, c]),
            ref other => Err(CheckpointError::Setting(format!(
                "{field} = {other:?} does not fit in_chans = {channels}; give one value for each channel"
            ))),
        }
    }

    /// The values as they are given.
    pub fn values(&self) -> &[f32] {
        match self {
            Self::All(value) => std::slice::from_ref(value),
            Self::Each(values) => values,
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::backend::Flex;
    use burn::data::dataloader::batcher::Batcher;
    use burn::prelude::*;
    use flops_core::{ForwardModel, Probe};

    use super::super::tests::{HF_CONFIG, config, hf_folder, opened};
    use super::super::{Pretrained, load};
    use crate::data::{DatasetSpec, ImageBatch, ImageBatcher, LoadOptions};
    use crate::model::ViT;
    use crate::normalization::Normalization;

    fn one_channel() -> ViT<Flex> {
        config().with_in_chans(1).init(&Default::default()).unwrap()
    }

    /// The digits are grey, so that a model of three channels whose patch embedding has a third of the
    /// weights for each of them gives the same logits.
    #[test]
    fn models_of_one_channel_classify_digits() {
        let model = one_channel();
        let (dir, _) = hf_folder(&model, &HF_CONFIG.replacen('{', r#"{"num_channels": 1, "#, 1));
        // what MNIST's images are normalised by
        let processor = r#"{"image_mean": [0.1307], "image_std": [0.3081]}"#;
        std::fs::write(dir.path().join("preprocessor_config.json"), processor).unwrap();
        let grey = opened(dir.path()).unwrap();
        assert_eq!(grey.card.config.in_chans, 1);
        assert_eq!(grey.card.normalization, Normalization::grey(0.1307, 0.3081));

        let mut colour = grey.clone();
        colour.card.config.in_chans = 3;
        let third = |weight: Tensor<Flex, 4>| weight.repeat_dim(1, 3).div_scalar(3.0);
        colour.model.patch_embed.weight = colour.model.patch_embed.weight.map(third);
        let digits = DatasetSpec::Digits.load(&LoadOptions::new(8)).unwrap().test;
        let logits = |Pretrained { model, card }: &Pretrained<Flex>| {
            let items = digits.items[..20].to_vec();
            let batch: ImageBatch<Flex> = ImageBatcher::for_card(card).unwrap().batch(items, &Default::default());
            assert_eq!(batch.input.dims(), [20, card.config.in_chans, 8, 8]);
            model.forward(batch.input, &mut Probe::clean())
        };
        let distance: f32 = (logits(&grey) - logits(&colour)).abs().max().into_scalar();
        assert!(distance < 1e-5, "logits differ by {distance}");

        // both forms of saving keep it
        let folder = dir.path().join("saved");
        grey.save_huggingface(&folder).unwrap();
        let again = opened(&folder).unwrap();
        assert_eq!((again.card.normalization, again.card.config), (grey.card.normalization, grey.card.config.clone()));
        let processor = std::fs::read_to_string(folder.join("preprocessor_config.json")).unwrap();
        let processor: serde_json::Value = serde_json::from_str(&processor).unwrap();
        assert_eq!(processor["image_mean"].as_array().unwrap().len(), 1);
        grey.save(&dir.path().join("native.safetensors")).unwrap();
        assert_eq!(load::<Flex>(&dir.path().join("native.safetensors"), &Default::default()).unwrap().card, grey.card);
    }

    /// transformers refuses a list of another length than the channels of the image.
    #[test]
    fn values_for_other_channels_are_refused() {
        let (dir, _) = hf_folder(&one_channel(), HF_CONFIG);
        let with = |channels: usize, processor: &str| {
            let config =
                HF_CONFIG.replace(r#""hidden_size""#, &format!(r#""num_channels": {channels}, "hidden_size""#));
            std::fs::write(dir.path().join("config.json"), config).unwrap();
            std::fs::write(dir.path().join("preprocessor_config.json"), processor).unwrap();
            opened(dir.path()).map(|found| found.card.normalization).map_err(|e| e.to_string())
        };
        assert_eq!(with(1, "{}").unwrap(), Normalization::HALF);
        for equal in [r#"{"image_mean": 0.5}"#, r#"{"image_mean": [0.5, 0.5, 0.5]}"#, r#"{"image_std": [0.5]}"#] {
            assert_eq!(with(1, equal).unwrap(), Normalization::HALF, "{equal}");
        }
        for (channels, processor, expected) in [
            (1, r#"{"image_mean": [0.1, 0.2, 0.3]}"#, "image_mean = [0.1, 0.2, 0.3] does not fit in_chans = 1"),
            (3, r#"{"image_std": [0.5]}"#, "image_std = [0.5] does not fit in_chans = 3"),
            (1, r#"{"image_mean": "grey"}"#, "a number is expected, or a list of numbers"),
            (2, "{}", "num_channels = '2' is not supported; only 1 (grey) or 3 (red, green, blue) is"),
            (4, "{}", "num_channels = '4' is not supported"),
        ] {
            let error = with(channels, processor).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn cards_of_one_channel_have_one_mean() {
        let mut grey = Pretrained { model: one_channel(), card: super::super::tests::card() };
        grey.card.config = config().with_in_chans(1);
        let (dir, path) = super::super::tests::file("model.safetensors", b"");
        let error = grey.save(&path).unwrap_err().to_string();
        assert!(error.contains("expected one value for one channel"), "{error}");
        grey.card.config.in_chans = 5;
        let error = grey.save(&path).unwrap_err().to_string();
        assert!(error.contains("in_chans = 5, expected 1 (grey) or 3"), "{error}");
        drop(dir);
    }
}
