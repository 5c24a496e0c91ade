//! Channel means and standard deviations. They belong to the weights: a model sees images as it saw them in pretraining.

use serde::{Deserialize, Serialize};

/// What takes a pixel in [0, 1] to a model's input: (pixel − mean) / std, per channel (R, G, B).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Normalization {
    /// Mean of each channel.
    pub mean: [f32; 3],
    /// Standard deviation of each channel.
    pub std: [f32; 3],
}

impl Normalization {
    /// CIFAR-10's training set.
    pub const CIFAR10: Self = Self { mean: [0.4914, 0.4822, 0.4465], std: [0.2470, 0.2435, 0.2616] };
    /// ImageNet's training set, as timm's `IMAGENET_DEFAULT_MEAN` and `_STD`.
    pub const IMAGENET: Self = Self { mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225] };
    /// To [−1, 1], as timm's `IMAGENET_INCEPTION_MEAN` and `_STD`: the augmented-regularised ViTs use it.
    pub const HALF: Self = Self { mean: [0.5; 3], std: [0.5; 3] };
    /// The images CLIP was trained on, as open_clip's `OPENAI_DATASET_MEAN` and `_STD`.
    pub const CLIP: Self =
        Self { mean: [0.481_454_66, 0.457_827_5, 0.408_210_73], std: [0.268_629_54, 0.261_302_6, 0.275_777_1] };
    /// The training part of the embedded digits at 32×32, for a model trained on them from scratch.
    pub const DIGITS: Self = Self { mean: [0.4036; 3], std: [0.1623; 3] };

    /// The normalised value of an 8-bit pixel of `channel` (0, 1, 2 for R, G, B).
    pub fn apply(&self, pixel: u8, channel: usize) -> f32 {
        (f32::from(pixel) / 255.0 - self.mean[channel]) / self.std[channel]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_as_torchvision() {
        // torchvision.transforms.Normalize((0.5,)*3, (0.5,)*3)(ToTensor()(...)): 0 -> -1, 255 -> 1
        assert_eq!(Normalization::HALF.apply(0, 0), -1.0);
        assert_eq!(Normalization::HALF.apply(255, 2), 1.0);
        // (128/255 - 0.406) / 0.225 = 0.42649
        assert!((Normalization::IMAGENET.apply(128, 2) - 0.426_49).abs() < 1e-4);
    }
}
