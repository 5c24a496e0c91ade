//! The handwritten digits that flops-vit embeds: 1,797 images of 8 × 8 pixels.

use std::io::Read;

use flate2::read::GzDecoder;
use rand::{Rng, RngExt};

/// Side of an image.
pub const SIDE: usize = 8;
/// Pixels of an image.
pub const PIXELS: usize = SIDE * SIDE;
/// Classes.
pub const CLASSES: usize = 10;
/// A pixel full of ink.
const MAX: f32 = 16.0;
/// One image in so many is for testing.
const TEST_EVERY: usize = 5;

const BYTES: &[u8] = include_bytes!("../../../flops-vit/data/digits.csv.gz");

/// An image, its pixels from 0 (no ink) to 1, and what it shows.
#[derive(Clone, Debug, PartialEq)]
pub struct Digit {
    /// Its place in the file.
    pub id: u64,
    /// Rows from the top, each from the left.
    pub pixels: [f32; PIXELS],
    /// 0 to 9.
    pub label: usize,
}

impl Digit {
    /// The pixels as another hand may have written them: turned, slanted, larger or smaller, and moved.
    pub fn changed(&self, rng: &mut impl Rng) -> [f32; PIXELS] {
        let mut within = |limit: f32| rng.random_range(-limit..limit);
        let (turn, slant, move_x, move_y) = (within(0.2), within(0.2), within(0.8), within(0.8));
        let (wide, high) = (1.0 + within(0.15), 1.0 + within(0.1));
        let centre = (SIDE as f32 - 1.0) / 2.0;
        std::array::from_fn(|at| {
            let (x, y) = ((at % SIDE) as f32 - centre - move_x, (at / SIDE) as f32 - centre - move_y);
            let (x, y) = (turn.cos() * x + turn.sin() * y, turn.cos() * y - turn.sin() * x);
            self.ink(centre + wide * (x + slant * y), centre + high * y)
        })
    }

    /// The ink at a place between pixels, by linear interpolation; none outside.
    fn ink(&self, x: f32, y: f32) -> f32 {
        let pixel = |x: f32, y: f32| {
            let inside = |v: f32| (0.0..SIDE as f32).contains(&v);
            if inside(x) && inside(y) { self.pixels[y as usize * SIDE + x as usize] } else { 0.0 }
        };
        let (left, top) = (x.floor(), y.floor());
        let (right, below) = (x - left, y - top);
        let row = |y: f32| pixel(left, y) * (1.0 - right) + pixel(left + 1.0, y) * right;
        row(top) * (1.0 - below) + row(top + 1.0) * below
    }
}

/// The digits to train on, and those to test with: every fifth of the file.
///
/// # Panics
/// Never: a test reads the embedded file.
pub fn load() -> (Vec<Digit>, Vec<Digit>) {
    let mut text = String::new();
    GzDecoder::new(BYTES).read_to_string(&mut text).expect("the embedded digits are whole");
    let digit = |(id, line): (usize, &str)| {
        let values: Vec<f32> = line.split(',').map(|value| value.trim().parse().expect("a number")).collect();
        let (label, ink) = values.split_last().expect("a label");
        let pixels = std::array::from_fn(|at| ink[at] / MAX);
        Digit { id: id as u64, pixels, label: *label as usize }
    };
    let all = text.lines().enumerate().map(digit);
    all.partition(|digit| !(digit.id as usize).is_multiple_of(TEST_EVERY))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ink_is_interpolated_and_ends_at_the_border() {
        let mut pixels = [0.0; PIXELS];
        [pixels[9], pixels[10], pixels[17]] = [1.0, 0.5, 0.25];
        let digit = Digit { id: 0, pixels, label: 0 };
        assert_eq!(digit.ink(1.0, 1.0), 1.0);
        assert_eq!(digit.ink(1.5, 1.0), 0.75);
        assert_eq!(digit.ink(1.0, 1.5), 0.625);
        assert_eq!(digit.ink(-1.5, 1.0), 0.0);
        let full = Digit { pixels: [1.0; PIXELS], ..digit };
        assert_eq!((full.ink(7.5, 3.0), full.ink(7.0, 7.0), full.ink(-0.5, 0.0)), (0.5, 1.0, 0.5));
    }

    /// Changes are small, differ, and keep most of the ink.
    #[test]
    fn changed_digits_resemble_their_originals() {
        let (train, _) = load();
        for (i, digit) in train.iter().take(100).enumerate() {
            let change = |key| digit.changed(&mut flops_core::random::keyed_rng([key, i as u64, 0, 0]));
            assert_ne!(change(0), change(1));
            let ink = |pixels: &[f32; PIXELS]| pixels.iter().sum::<f32>();
            let kept = ink(&change(0)) / ink(&digit.pixels);
            assert!((0.5..1.5).contains(&kept), "{kept} of the ink of {}", digit.id);
        }
    }

    #[test]
    fn digits_are_whole_and_split() {
        let (train, test) = load();
        assert_eq!((train.len(), test.len()), (1437, 360));
        for digits in [&train, &test] {
            for label in 0..CLASSES {
                let share = digits.iter().filter(|digit| digit.label == label).count() as f64 / digits.len() as f64;
                // every fifth of the file does not have all classes alike
                assert!((0.06..0.15).contains(&share), "{share} of {label}");
            }
            let mut pixels = digits.iter().flat_map(|digit| digit.pixels);
            assert!(pixels.all(|ink| (0.0..=1.0).contains(&ink)));
        }
        // sklearn.datasets.load_digits().images[0][0]: 0 0 5 13 9 1 0 0, of 16
        assert_eq!(test[0].pixels[..8], [0., 0., 5., 13., 9., 1., 0., 0.].map(|ink: f32| ink / 16.0));
        assert_eq!(test[0].label, 0);
    }
}
