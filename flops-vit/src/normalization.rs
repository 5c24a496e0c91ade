//! Channel means and standard deviations.
//!
//! They belong to the weights: a model must see images as it saw them in pretraining.

use serde::{Deserialize, Serialize};

/// Normalisation of a pixel in [0, 1]: (pixel − mean) / std, per channel (R, G, B).
///
/// That of a model of one channel has one mean and one std, three times each.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Normalization {
    /// Mean of each channel.
    pub mean: [f32; 3],
    /// Standard deviation of each channel.
    pub std: [f32; 3],
}

impl Normalization {
    /// Statistics of CIFAR-10's training images.
    pub const CIFAR10: Self = Self { mean: [0.4914, 0.4822, 0.4465], std: [0.2470, 0.2435, 0.2616] };
    /// Statistics of ImageNet's training images, timm's `IMAGENET_DEFAULT_MEAN` and `_STD`.
    pub const IMAGENET: Self = Self { mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225] };
    /// Maps to [−1, 1]: timm's `IMAGENET_INCEPTION_MEAN` and `_STD`, used by the AugReg ViTs.
    pub const HALF: Self = Self { mean: [0.5; 3], std: [0.5; 3] };
    /// Statistics of CLIP's training images: open_clip's `OPENAI_DATASET_MEAN` and `_STD`.
    pub const CLIP: Self =
        Self { mean: [0.481_454_66, 0.457_827_5, 0.408_210_73], std: [0.268_629_54, 0.261_302_6, 0.275_777_1] };
    /// Statistics of the embedded digits' training images at 32×32, for training from scratch.
    pub const DIGITS: Self = Self { mean: [0.4036; 3], std: [0.1623; 3] };

    /// Normalises an 8-bit pixel of `channel` (0, 1, 2 for R, G, B).
    pub fn apply(&self, pixel: u8, channel: usize) -> f32 {
        (f32::from(pixel) / 255.0 - self.mean[channel]) / self.std[channel]
    }

    /// The normalisation of grey images.
    pub fn grey(mean: f32, std: f32) -> Self {
        Self { mean: [mean; 3], std: [std; 3] }
    }

    /// Whether all channels are normalised alike, as in a model of one channel.
    pub(crate) fn is_grey(&self) -> bool {
        let alike = |values: [f32; 3]| values.iter().all(|value| *value == values[0]);
        alike(self.mean) && alike(self.std)
    }
}

/// The grey of a pixel: the luma of ITU-R 601-2, rounded as by PIL's `convert("L")`.
pub(crate) fn luma(red: u8, green: u8, blue: u8) -> u8 {
    let [red, green, blue] = [red, green, blue].map(u32::from);
    ((red * 19_595 + green * 38_470 + blue * 7_471 + 0x8000) >> 16) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normalization_matches_torchvision() {
        // torchvision.transforms.Normalize((0.5,)*3, (0.5,)*3)(ToTensor()(...)): 0 -> -1, 255 -> 1
        assert_eq!(Normalization::HALF.apply(0, 0), -1.0);
        assert_eq!(Normalization::HALF.apply(255, 2), 1.0);
        // (128/255 - 0.406) / 0.225 = 0.42649
        assert!((Normalization::IMAGENET.apply(128, 2) - 0.426_49).abs() < 1e-4);
    }

    /// Image.new("RGB", (1, 1), rgb).convert("L").getpixel((0, 0))
    #[test]
    fn luma_matches_pil() {
        for (rgb, expected) in [
            ([255, 0, 0], 76),
            ([0, 255, 0], 150),
            ([0, 0, 255], 29),
            ([10, 20, 30], 18),
            ([200, 100, 50], 124),
            ([1, 0, 1], 0),
        ] {
            assert_eq!(luma(rgb[0], rgb[1], rgb[2]), expected, "{rgb:?}");
        }
        assert!((0..=255).all(|grey| luma(grey, grey, grey) == grey));
    }
}
