//! A page that trains a network in its visitor's browser, from forward passes alone.
//!
//! This is what JavaScript calls; the rest of the crate knows nothing of a page.

pub mod digits;
pub mod drawing;
pub mod network;
pub mod trainer;

use wasm_bindgen::prelude::*;

/// A network in training, for JavaScript.
#[wasm_bindgen]
pub struct Training(trainer::Trainer);

#[wasm_bindgen]
impl Training {
    /// Creates a network with random weights; everything follows from `seed`.
    #[wasm_bindgen(constructor)]
    pub fn new(seed: u32) -> Result<Self, JsError> {
        Ok(Self(trainer::Trainer::new(seed.into())?))
    }

    /// Trains on a batch; returns its mean loss before that.
    pub fn step(&mut self) -> Result<f64, JsError> {
        Ok(self.0.step()?)
    }

    /// Steps so far.
    #[wasm_bindgen(getter)]
    pub fn steps(&self) -> f64 {
        self.0.steps() as f64
    }

    /// Steps of a training.
    #[wasm_bindgen(getter, js_name = stepsInAll)]
    pub fn steps_in_all(&self) -> f64 {
        self.0.steps_in_all() as f64
    }

    /// Queries so far.
    #[wasm_bindgen(getter)]
    pub fn queries(&self) -> f64 {
        self.0.queries() as f64
    }

    /// Parameters of the network.
    #[wasm_bindgen(getter)]
    pub fn parameters(&self) -> usize {
        self.0.parameters()
    }

    /// The number of test digits.
    #[wasm_bindgen(getter, js_name = testDigits)]
    pub fn test_digits(&self) -> usize {
        self.0.test().len()
    }

    /// The share of test digits that are classified correctly.
    pub fn accuracy(&self) -> f64 {
        self.0.accuracy()
    }

    /// The pixels of a test digit.
    #[wasm_bindgen(js_name = testPixels)]
    pub fn test_pixels(&self, at: usize) -> Vec<f32> {
        self.0.test()[at % self.0.test().len()].pixels.to_vec()
    }

    /// What a test digit shows.
    #[wasm_bindgen(js_name = testLabel)]
    pub fn test_label(&self, at: usize) -> usize {
        self.0.test()[at % self.0.test().len()].label
    }

    /// The probability of each class for an image of 64 pixels; empty for another number of them.
    pub fn probabilities(&self, pixels: &[f32]) -> Vec<f32> {
        match pixels.try_into() {
            Ok(image) => self.0.probabilities(&[image]).concat(),
            Err(_) => vec![],
        }
    }
}

/// The image of some strokes, 64 pixels; empty without a point.
///
/// `points` are x and y in turn, of all strokes; `lengths` are the points of each.
#[wasm_bindgen]
pub fn image(points: &[f32], lengths: &[u32]) -> Vec<f32> {
    let mut points = points.chunks_exact(2).map(|point| [point[0], point[1]]);
    let strokes: Vec<Vec<_>> = lengths.iter().map(|&length| points.by_ref().take(length as usize).collect()).collect();
    drawing::image(&strokes).map_or(vec![], |pixels| pixels.to_vec())
}
