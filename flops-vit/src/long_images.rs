//! Images that are many times longer than wide, resized within bounded memory.

use image::DynamicImage;
use image::imageops::FilterType;
use image::metadata::Orientation;

/// Above this ratio of its sides an image is long.
const LONG: u32 = 16;

/// Resizes the shorter side to `side` and crops the longer one to it, at both ends alike.
///
/// Of a long image the ends are cut off first: their pixels do not reach the crop, and a row of
/// 20,000 pixels would become 224 rows of 4,480,000. Other images are resized whole, then cropped.
pub(crate) fn resize_to_fill(image: &DynamicImage, side: u32, filter: FilterType) -> DynamicImage {
    match middle(image) {
        Some(middle) => middle.resize_to_fill(side, side, filter),
        None => image.resize_to_fill(side, side, filter),
    }
}

/// Resizes both sides to `side`.
///
/// The filter goes down the columns first, and keeps `side` rows of the old width. A long row is
/// therefore stood upright.
pub(crate) fn resize_exact(image: &DynamicImage, side: u32, filter: FilterType) -> DynamicImage {
    if image.width() <= image.height().saturating_mul(LONG) {
        return image.resize_exact(side, side, filter);
    }
    let transposed = |mut image: DynamicImage| {
        image.apply_orientation(Orientation::Rotate90FlipH);
        image
    };
    transposed(transposed(image.clone()).resize_exact(side, side, filter))
}

/// Returns the middle of a long image, [`LONG`] times as long as wide.
///
/// As many pixels are cut off at either end, so that the centre stays where it is.
fn middle(image: &DynamicImage) -> Option<DynamicImage> {
    let (width, height) = (image.width(), image.height());
    let (long, kept) = (width.max(height), width.min(height).saturating_mul(LONG));
    let kept = kept + long.checked_sub(kept).filter(|&cut| cut > 0)? % 2;
    let start = (long - kept) / 2;
    Some(if width > height { image.crop_imm(start, 0, kept, height) } else { image.crop_imm(0, start, width, kept) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::{Rgb, RgbImage};

    /// A smooth picture: colours change along the row, and less down the columns.
    fn smooth(width: u32, height: u32) -> DynamicImage {
        let wave = |x: u32, period: f32| (120.0 + 100.0 * (x as f32 / period).sin()) as u8;
        RgbImage::from_fn(width, height, |x, y| Rgb([wave(x, 40.0), wave(x, 23.0), wave(y, 30.0)])).into()
    }

    fn largest_difference(a: &DynamicImage, b: &DynamicImage) -> u8 {
        let (a, b) = (a.to_rgb8(), b.to_rgb8());
        assert_eq!(a.dimensions(), b.dimensions());
        a.as_raw().iter().zip(b.as_raw()).map(|(a, b)| a.abs_diff(*b)).max().unwrap()
    }

    const FILTERS: [FilterType; 3] = [FilterType::Triangle, FilterType::CatmullRom, FilterType::Lanczos3];

    #[test]
    fn cutting_first_changes_nothing_within_rounding() {
        // the two ways may differ by half a pixel of the result: where the resized length is odd
        for (width, height) in [(400, 4), (401, 4), (700, 7), (901, 11), (4, 400), (7, 913)] {
            for filter in FILTERS {
                let image = smooth(width, height);
                assert!(middle(&image).is_some());
                let whole = image.resize_to_fill(8, 8, filter);
                let off = largest_difference(&resize_to_fill(&image, 8, filter), &whole);
                assert!(off <= 4, "{width} × {height}, {filter:?}: {off} levels");
            }
        }
    }

    #[test]
    fn other_images_are_resized_whole() {
        for (width, height) in [(64, 4), (4, 64), (5, 5), (1, 1), (1, 16)] {
            let image = smooth(width, height);
            assert!(middle(&image).is_none());
            assert_eq!(
                resize_to_fill(&image, 8, FilterType::Triangle),
                image.resize_to_fill(8, 8, FilterType::Triangle)
            );
            assert_eq!(resize_exact(&image, 8, FilterType::Triangle), image.resize_exact(8, 8, FilterType::Triangle));
        }
    }

    #[test]
    fn long_rows_are_squashed_as_others_are() {
        for (width, height) in [(400, 4), (401, 3), (90, 1)] {
            for filter in FILTERS {
                let image = smooth(width, height);
                let off = largest_difference(&resize_exact(&image, 8, filter), &image.resize_exact(8, 8, filter));
                assert!(off <= 1, "{width} × {height}, {filter:?}: {off} levels");
            }
        }
    }

    #[test]
    fn the_middle_of_a_long_image_is_kept() {
        for (width, height, kept) in [(20_000, 1, 16), (20_001, 1, 17), (1_000, 10, 160), (17, 1, 17)] {
            let row = RgbImage::from_fn(width, height, |x, _| Rgb([if 2 * x + 1 < width { 0 } else { 255 }; 3]));
            let middle = middle(&row.into()).unwrap().to_rgb8();
            assert_eq!(middle.dimensions(), (kept, height));
            let dark = middle.pixels().filter(|pixel| pixel[0] == 0).count() as u32;
            assert_eq!(dark, kept / 2 * height, "{width} × {height}");
        }
    }
}
