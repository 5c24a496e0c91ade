//! The handwritten digits that flops-vit embeds, and another camera that they are seen by.

use std::io::Read;

use anyhow::{Context, Result};
use flate2::read::GzDecoder;

use crate::table::Table;

/// Side of an image.
const SIDE: usize = 8;
/// Pixels of an image.
pub const PIXELS: usize = SIDE * SIDE;
/// Classes.
pub const CLASSES: usize = 10;
/// A pixel full of ink.
const MAX: f32 = 16.0;

const BYTES: &[u8] = include_bytes!("../../../flops-vit/data/digits.csv.gz");

/// Returns all 1,797 images, their pixels from 0 (no ink) to 1, rows from the top.
pub fn load() -> Result<Table> {
    let mut text = String::new();
    GzDecoder::new(BYTES).read_to_string(&mut text).context("the embedded digits are broken")?;
    let mut table = Table::parse(&text, "the embedded digits")?;
    table.values.iter_mut().for_each(|ink| *ink /= MAX);
    Ok(table)
}

/// Returns the images as the other camera has them: slanted, blurred, with less contrast on a grey
/// ground, and brighter to the right.
pub fn other_camera(mut table: Table) -> Table {
    for image in table.values.chunks_exact_mut(PIXELS) {
        let sharp = image.to_vec();
        let ink = |x: isize, y: isize| {
            let inside = (0..SIDE as isize).contains(&x) && (0..SIDE as isize).contains(&y);
            if inside { sharp[y as usize * SIDE + x as usize] } else { 0.0 }
        };
        // upper rows go to the right, lower rows to the left, by up to 1.4 pixels
        let slanted = |x: isize, y: isize| {
            let from = x as f32 - 0.4 * (3.5 - y as f32);
            let (left, share) = (from.floor() as isize, from - from.floor());
            ink(left, y) * (1.0 - share) + ink(left + 1, y) * share
        };
        for (at, pixel) in image.iter_mut().enumerate() {
            let (x, y) = ((at % SIDE) as isize, (at / SIDE) as isize);
            let around = [(-1, 0), (1, 0), (0, -1), (0, 1)].map(|(dx, dy)| slanted(x + dx, y + dy));
            let blurred = 0.6 * slanted(x, y) + 0.1 * around.iter().sum::<f32>();
            let gain = 0.7 + 0.6 * x as f32 / (SIDE - 1) as f32;
            *pixel = gain * (0.15 + 0.6 * blurred);
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_are_whole() {
        let table = load().unwrap();
        assert_eq!((table.len(), table.features), (1797, PIXELS));
        assert!(table.values.iter().all(|ink| (0.0..=1.0).contains(ink)));
        assert!(table.labels.iter().all(|&label| label < CLASSES));
        // sklearn.datasets.load_digits().images[0][0]: 0 0 5 13 9 1 0 0, of 16
        assert_eq!(table.values[..8], [0., 0., 5., 13., 9., 1., 0., 0.].map(|ink: f32| ink / 16.0));
        assert_eq!(table.labels[0], 0);
    }

    /// An image without ink is the ground alone: grey, 0.7 times as bright on the left as in the
    /// middle, 1.3 times on the right.
    #[test]
    fn the_other_camera_has_a_grey_ground() {
        let blank = Table { features: PIXELS, values: vec![0.0; PIXELS], ..load().unwrap() };
        let seen = other_camera(blank).values;
        for row in seen.chunks(SIDE) {
            assert!((row[0] - 0.105).abs() < 1e-6 && (row[7] - 0.195).abs() < 1e-6, "{row:?}");
        }
    }
}
