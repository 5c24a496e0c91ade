//! Strokes on the page as an image like those of the data set.
//!
//! The authors of the data set scaled each digit to a bitmap of 32 × 32, and counted the ink in
//! blocks of 4 × 4. The same is done here.

use crate::digits::{PIXELS, SIDE};

/// Side of the bitmap.
const BITMAP: usize = 32;
/// Side of a block, which becomes a pixel.
const BLOCK: usize = BITMAP / SIDE;
/// Width of a line on the bitmap.
const WIDTH: f32 = 4.5;

/// A point of a stroke, in any unit, down and to the right.
pub type Point = [f32; 2];

/// Returns the image of some strokes, its pixels from 0 to 1; `None` without a point.
///
/// Where and how large they are drawn does not matter: they are scaled to fill the image, and centred.
pub fn image(strokes: &[Vec<Point>]) -> Option<[f32; PIXELS]> {
    let points = || strokes.iter().flatten();
    points().next()?;
    let limits = [0, 1].map(|axis| {
        let values = || points().map(move |point| point[axis]);
        (values().fold(f32::INFINITY, f32::min), values().fold(f32::NEG_INFINITY, f32::max))
    });
    let extent = limits.iter().map(|(low, high)| high - low).fold(0.0, f32::max);
    // a lone dot stays one
    let scale = if extent > 0.0 { (BITMAP as f32 - WIDTH) / extent } else { 1.0 };
    let place = |point: &Point| -> Point {
        [0, 1].map(|axis| {
            let (low, high) = limits[axis];
            BITMAP as f32 / 2.0 + scale * (point[axis] - (low + high) / 2.0)
        })
    };
    let mut pixels = [0.0; PIXELS];
    let placed: Vec<Vec<Point>> = strokes.iter().map(|stroke| stroke.iter().map(place).collect()).collect();
    for (x, y) in (0..BITMAP * BITMAP).map(|at| (at % BITMAP, at / BITMAP)) {
        let centre = [x as f32 + 0.5, y as f32 + 0.5];
        if placed.iter().any(|stroke| is_inked(stroke, centre)) {
            pixels[y / BLOCK * SIDE + x / BLOCK] += 1.0 / (BLOCK * BLOCK) as f32;
        }
    }
    Some(pixels)
}

/// Whether a point of the bitmap lies on a stroke.
fn is_inked(stroke: &[Point], at: Point) -> bool {
    let near = |from: &Point, to: &Point| squared_distance(at, *from, *to) <= (WIDTH / 2.0).powi(2);
    stroke.first().is_some_and(|first| near(first, first)) || stroke.windows(2).any(|line| near(&line[0], &line[1]))
}

/// The squared distance of `at` to the line between two points.
fn squared_distance(at: Point, from: Point, to: Point) -> f32 {
    let [along, off] = [[to[0] - from[0], to[1] - from[1]], [at[0] - from[0], at[1] - from[1]]];
    let length = along[0].powi(2) + along[1].powi(2);
    let share = if length > 0.0 { ((off[0] * along[0] + off[1] * along[1]) / length).clamp(0.0, 1.0) } else { 0.0 };
    (off[0] - share * along[0]).powi(2) + (off[1] - share * along[1]).powi(2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn place_and_size_of_a_drawing_do_not_matter() {
        let seven = |scale: f32, shift: f32| {
            vec![[[0., 0.], [10., 0.], [4., 16.]].map(|point: Point| point.map(|v| shift + scale * v)).to_vec()]
        };
        let image = |scale, shift| super::image(&seven(scale, shift)).unwrap();
        assert_eq!(image(1.0, 0.0), image(16.0, 64.0));
        let row = |at: usize| image(1.0, 0.0)[8 * at..][..8].iter().sum::<f32>();
        // a bar above, a line below
        assert!(row(0) > 2.0 * row(6), "{} and {}", row(0), row(6));
    }

    #[test]
    fn a_line_is_as_wide_as_it_should_be() {
        let upright = image(&[vec![[5., 0.], [5., 100.]]]).unwrap();
        for row in upright.chunks(8).skip(1).take(6) {
            // of 32 columns
            assert!((row.iter().sum::<f32>() * 4.0 - WIDTH).abs() <= 0.5, "{row:?}");
        }
    }

    #[test]
    fn nothing_is_no_image_and_a_dot_is_one() {
        assert_eq!(image(&[]), None);
        assert_eq!(image(&[vec![]]), None);
        let dot = image(&[vec![[3., 3.]]]).unwrap();
        assert!(dot[3 * 8 + 3] > 0.0 && dot[0] == 0.0);
    }
}
