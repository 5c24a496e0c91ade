//! How an image of any size becomes a model's input. It belongs to the weights, as the normalisation does.

use image::DynamicImage;
use image::imageops::FilterType;
use serde::{Deserialize, Serialize};

/// How an image is brought to the size of a model's input.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Resizing {
    /// The kernel; it widens where the image shrinks.
    pub filter: Filter,
    /// Whether height and width are brought to size each by itself, which changes the proportions; otherwise the shorter side is, and what the
    /// longer has more is cut off on both ends.
    pub squash: bool,
    /// The side of the input as a part of the side the image is brought to, in (0, 1]: what is outside is cut off on all sides. timm's `crop_pct`.
    pub crop: f32,
}

/// A kernel of resizing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Filter {
    /// The nearest pixel.
    Nearest,
    /// Linear in both directions.
    Bilinear,
    /// The cubic of Catmull and Rom.
    Bicubic,
    /// Lanczos' with three lobes.
    Lanczos,
}

impl Filter {
    /// PIL's number for it, which `transformers` calls `resample`.
    pub(crate) fn to_pil(self) -> u8 {
        match self {
            Self::Nearest => 0,
            Self::Lanczos => 1,
            Self::Bilinear => 2,
            Self::Bicubic => 3,
        }
    }

    /// The filter of PIL's number.
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
    /// Bilinear, the whole of the central square.
    fn default() -> Self {
        Self { filter: Filter::Bilinear, squash: false, crop: 1.0 }
    }
}

impl Resizing {
    /// Whether the part that is kept is one.
    pub(crate) fn is_valid(&self) -> bool {
        self.crop > 0.0 && self.crop <= 1.0
    }

    /// The image at `side` × `side` pixels.
    pub(crate) fn apply(&self, image: &DynamicImage, side: usize) -> DynamicImage {
        let side = side as u32;
        // as timm: the size before the cut, rounded down
        let outer = ((side as f32 / self.crop.clamp(0.05, 1.0)) as u32).max(side);
        let whole = match self.squash {
            true => image.resize_exact(outer, outer, self.filter.into()),
            false => image.resize_to_fill(outer, outer, self.filter.into()),
        };
        if outer == side { whole } else { whole.crop_imm((outer - side) / 2, (outer - side) / 2, side, side) }
    }
}

#[cfg(test)]
mod tests {
    use image::{Rgb, RgbImage};

    use super::*;

    /// Six columns, the outer two of each side white.
    fn wide() -> DynamicImage {
        RgbImage::from_fn(6, 2, |x, _| if (2..4).contains(&x) { Rgb([9; 3]) } else { Rgb([255; 3]) }).into()
    }

    fn reds(resizing: Resizing, side: usize) -> Vec<u8> {
        resizing.apply(&wide(), side).to_rgb8().pixels().map(|p| p[0]).collect()
    }

    #[test]
    fn proportions_are_kept_or_not() {
        let default = Resizing::default();
        assert_eq!(reds(default, 2), [9; 4]);
        let squashed = reds(Resizing { squash: true, ..default }, 2);
        assert!(squashed.iter().all(|&r| r > 100), "the white parts are there: {squashed:?}");
    }

    #[test]
    fn the_edge_is_cut_off() {
        // brought to 6 × 6 first, of which the central 2 × 2 are kept: dark
        let nearest = Resizing { filter: Filter::Nearest, squash: true, crop: 1.0 / 3.0 };
        assert_eq!(reds(nearest, 2), [9; 4]);
        assert!(reds(Resizing { crop: 1.0, ..nearest }, 2).contains(&255));
    }

    #[test]
    fn pil_s_numbers() {
        for number in 0..4 {
            assert_eq!(Filter::from_pil(number).unwrap().to_pil(), number);
        }
        assert_eq!(Filter::from_pil(7), None);
    }
}
