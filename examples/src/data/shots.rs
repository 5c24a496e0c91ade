//! Few-shot images of made-up scenes, under a domain shift.

use burn::data::dataloader::batcher::Batcher;
use burn::prelude::*;
use flops_core::Batch;
use flops_core::random::keyed_rng;
use flops_multimodal::data::scenes::SIDE;
use flops_multimodal::data::{Scene, Scenes, Shift};
use rand::seq::SliceRandom;

use crate::blackbox::classes::Classes;

/// The camera of the task: it mixes red, green and blue, and adds an offset.
pub const CAMERA: Shift =
    Shift { mix: [[0.56, 0.20, 0.14], [0.10, 0.60, 0.18], [0.17, 0.13, 0.58]], offset: [0.07, 0.03, 0.0] };

/// The image of a scene, and its class.
#[derive(Clone, Debug)]
pub struct Shot {
    /// Position of the scene in its data set.
    pub id: u64,
    /// Values in [0, 1], `[3, SIDE, SIDE]` flattened.
    pub pixels: Vec<f32>,
    /// Position of its class in [`Classes::names`].
    pub label: usize,
}

/// Draws `count` scenes, as evenly over the classes as possible, and renders them under the
/// [`CAMERA`].
pub fn shots(scenes: &Scenes, classes: Classes, count: usize, seed: u64) -> Vec<Shot> {
    let names = classes.names().len();
    let mut order: Vec<usize> = (0..scenes.len()).collect();
    order.shuffle(&mut keyed_rng([seed, 1, 0, 0]));
    let mut of_class: Vec<Vec<usize>> = vec![vec![]; names];
    order.into_iter().for_each(|i| of_class[classes.of(&scenes.scenes[i])].push(i));
    let mut chosen = vec![];
    for round in 0..scenes.len() {
        chosen.extend(of_class.iter().filter_map(|of| of.get(round)));
    }
    let shot = |&i: &usize| {
        let scene: &Scene = &scenes.scenes[i];
        Shot { id: i as u64, pixels: scene.render(scenes.seeds[i], &CAMERA), label: classes.of(scene) }
    };
    chosen.iter().take(count).map(shot).collect()
}

/// Collects shots into batches.
#[derive(Clone)]
pub struct ShotBatcher;

/// A batch of shots.
pub type ShotBatch<B> = Batch<Tensor<B, 4>, Tensor<B, 1, Int>>;

impl<B: Backend> Batcher<B, Shot, ShotBatch<B>> for ShotBatcher {
    fn batch(&self, shots: Vec<Shot>, device: &B::Device) -> ShotBatch<B> {
        let n = shots.len();
        let pixels: Vec<f32> = shots.iter().flat_map(|shot| shot.pixels.iter().copied()).collect();
        let labels: Vec<i32> = shots.iter().map(|shot| shot.label as i32).collect();
        Batch {
            ids: shots.iter().map(|shot| shot.id).collect(),
            input: Tensor::from_data(TensorData::new(pixels, [n, 3, SIDE, SIDE]), device),
            target: Tensor::from_data(TensorData::new(labels, [n]), device),
        }
    }
}
