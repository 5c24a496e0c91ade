//! Resizing of images to a model's input. It belongs to the weights, as the normalisation does.

use crate::long_images;
use image::DynamicImage;
use image::imageops::FilterType;
use serde::{Deserialize, Serialize};

/// The smallest crop: an image is made at most 20 times as large as the model's input.
pub(crate) const MIN_CROP: f32 = 0.05;

/// How an image is resized to a model's input.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Resizing {
    /// Interpolation filter; its support widens where the image shrinks.
    pub filter: Filter,
    /// Whether height and width are resized separately, which changes the proportions.
    ///
    /// Otherwise the shorter side is resized, and the longer one is cropped at both ends.
    pub squash: bool,
    /// Side of the central crop as a fraction of the resized side, in [0.05, 1]: timm's `crop_pct`.
    pub crop: f32,
}

/// An interpolation filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Filter {
    /// The nearest pixel.
    Nearest,
    /// Linear in both directions.
    Bilinear,
    /// The Catmull-Rom cubic.
    Bicubic,
    /// Lanczos with three lobes.
    Lanczos,
}

impl Filter {
    /// PIL's number for the filter, which `transformers` calls `resample`.
    pub(crate) fn to_pil(self) -> u8 {
        match self {
            Self::Nearest => 0,
            Self::Lanczos => 1,
            Self::Bilinear => 2,
            Self::Bicubic => 3,
        }
    }

    /// Returns the filter of PIL's number.
    pub(crate) fn from_pil(number: u8) -> Option<Self> {
        [Self::Nearest, Self::Lanczos, Self::Bilinear, Self::Bicubic].into_iter().find(|f| f.to_pil() == number)
    }
}

impl From<Filter> for FilterType {
    fn from(filter: Filter) -> Self {
        match filter {
            Filter::Nearest => Self::Nearest,
            Filter::Bilinear => Self::Triangle,
            Filter::Bicubic => Self::CatmullRom,
            Filter::Lanczos => Self::Lanczos3,
        }
    }
}

impl Default for Resizing {
    /// Bilinear, the whole central square.
    fn default() -> Self {
        Self { filter: Filter::Bilinear, squash: false, crop: 1.0 }
    }
}

impl Resizing {
    /// Returns whether the crop is in range.
    pub(crate) fn is_valid(&self) -> bool {
        (MIN_CROP..=1.0).contains(&self.crop)
    }

    /// Resizes and crops the image to `side` × `side` pixels.
    pub(crate) fn apply(&self, image: &DynamicImage, side: usize) -> DynamicImage {
        let side = side as u32;
        // the size before the crop, rounded down as in timm
        let outer = ((side as f32 / self.crop.clamp(MIN_CROP, 1.0)) as u32).max(side);
        let whole = match self.squash {
            true => long_images::resize_exact(image, outer, self.filter.into()),
            false => long_images::resize_to_fill(image, outer, self.filter.into()),
        };
        if outer == side { whole } else { whole.crop_imm((outer - side) / 2, (outer - side) / 2, side, side) }
    }
}

#[cfg(test)]
mod tests {
    use image::{Rgb, RgbImage};

    use super::*;

    /// An image of six columns, of which the outer two on each side are white.
    fn wide() -> DynamicImage {
        RgbImage::from_fn(6, 2, |x, _| if (2..4).contains(&x) { Rgb([9; 3]) } else { Rgb([255; 3]) }).into()
    }

    fn reds(resizing: Resizing, side: usize) -> Vec<u8> {
        resizing.apply(&wide(), side).to_rgb8().pixels().map(|p| p[0]).collect()
    }

    #[test]
    fn squash_changes_proportions() {
        let default = Resizing::default();
        assert_eq!(reds(default, 2), [9; 4]);
        let squashed = reds(Resizing { squash: true, ..default }, 2);
        assert!(squashed.iter().all(|&r| r > 100), "the white parts are missing: {squashed:?}");
    }

    #[test]
    fn crop_keeps_the_centre() {
        // resized to 6 × 6, of which the central 2 × 2 are dark
        let nearest = Resizing { filter: Filter::Nearest, squash: true, crop: 1.0 / 3.0 };
        assert_eq!(reds(nearest, 2), [9; 4]);
        assert!(reds(Resizing { crop: 1.0, ..nearest }, 2).contains(&255));
    }

    #[test]
    fn filters_round_trip_through_pil_numbers() {
        for number in 0..4 {
            assert_eq!(Filter::from_pil(number).unwrap().to_pil(), number);
        }
        assert_eq!(Filter::from_pil(7), None);
    }
}
