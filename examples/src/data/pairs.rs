//! Image-text pairs as the outputs of frozen encoders, computed once.

use anyhow::Result;
use burn::data::dataloader::batcher::Batcher;
use burn::data::dataset::Dataset;
use burn::prelude::*;
use flops_core::Batch;
use flops_multimodal::alignment::Scaling;
use flops_multimodal::data::{Scenes, Shift, scenes};
use flops_multimodal::{ImageEncoder, Pairs, TextEncoder};

use crate::backend::{B, Device};

/// Images of one encoder call.
const BATCH: usize = 64;

/// Features of image-text pairs, one row per pair.
#[derive(Clone, Debug)]
pub struct PairFeatures {
    /// Image features, `[pairs, image_dim]` flattened.
    pub images: Vec<f32>,
    /// Text features, `[pairs, text_dim]` flattened.
    pub texts: Vec<f32>,
    /// `[image_dim, text_dim]`.
    pub dims: [usize; 2],
}

/// One pair and its position.
#[derive(Clone, Debug)]
pub struct PairItem {
    id: u64,
    image: Vec<f32>,
    text: Vec<f32>,
}

/// Encodes images on `threads` threads; returns `[images, image_dim]` flattened, and `image_dim`.
///
/// `pixels` are `[images, 3, side, side]` flattened, with values in [0, 1].
pub fn encode_images(
    encoder: &ImageEncoder<B>,
    pixels: &[f32],
    side: usize,
    threads: usize,
    device: &Device,
) -> (Vec<f32>, usize) {
    let batches: Vec<&[f32]> = pixels.chunks(BATCH * 3 * side * side).collect();
    let encode = |batch: &&[f32]| {
        let rows = batch.len() / (3 * side * side);
        let images = Tensor::<B, 4>::from_data(TensorData::new(batch.to_vec(), [rows, 3, side, side]), device);
        encoder.encode(images).into_data().iter::<f32>().collect::<Vec<f32>>()
    };
    let encoded: Vec<Vec<f32>> = std::thread::scope(|scope| {
        let share = batches.len().div_ceil(threads.max(1)).max(1);
        let workers: Vec<_> = batches
            .chunks(share)
            .map(|batches| scope.spawn(move || batches.iter().map(encode).collect::<Vec<_>>()))
            .collect();
        workers.into_iter().flat_map(|worker| worker.join().unwrap_or_else(|e| std::panic::resume_unwind(e))).collect()
    });
    let images = pixels.len() / (3 * side * side);
    let all = encoded.concat();
    let features = all.len() / images.max(1);
    (all, features)
}

impl PairFeatures {
    /// Encodes scenes and their captions.
    ///
    /// # Errors
    /// Where a caption cannot be encoded.
    pub fn of_scenes(
        scenes: &Scenes,
        captions: &[String],
        encoders: (&ImageEncoder<B>, &TextEncoder<B>),
        threads: usize,
        device: &Device,
    ) -> Result<Self> {
        let pixels = scenes.render(&Shift::NONE);
        let (images, image_dim) = encode_images(encoders.0, &pixels, scenes::SIDE, threads, device);
        let texts = encoders.1.encode(captions)?;
        let text_dim = texts.dims()[1];
        Ok(Self { images, texts: texts.into_data().iter::<f32>().collect(), dims: [image_dim, text_dim] })
    }

    /// Returns the mean and spread of the image and the text features.
    pub fn scaling(&self) -> [Scaling; 2] {
        [Scaling::fit(&self.images, self.dims[0]), Scaling::fit(&self.texts, self.dims[1])]
    }

    /// Standardises the features.
    pub fn scaled(mut self, scaling: &[Scaling; 2]) -> Self {
        scaling[0].apply(&mut self.images);
        scaling[1].apply(&mut self.texts);
        self
    }

    /// Returns all image and all text features as tensors.
    pub fn tensors(&self, device: &Device) -> (Tensor<B, 2>, Tensor<B, 2>) {
        let of = |rows: &[f32], dim: usize| {
            Tensor::from_data(TensorData::new(rows.to_vec(), [rows.len() / dim, dim]), device)
        };
        (of(&self.images, self.dims[0]), of(&self.texts, self.dims[1]))
    }
}

impl Dataset<PairItem> for PairFeatures {
    fn get(&self, index: usize) -> Option<PairItem> {
        let row = |rows: &[f32], dim: usize| rows.get(index * dim..(index + 1) * dim).map(<[f32]>::to_vec);
        let (image, text) = (row(&self.images, self.dims[0])?, row(&self.texts, self.dims[1])?);
        Some(PairItem { id: index as u64, image, text })
    }

    fn len(&self) -> usize {
        self.images.len() / self.dims[0].max(1)
    }
}

/// Collects pairs into batches.
#[derive(Clone, Debug)]
pub struct PairBatcher;

/// A batch of pairs.
pub type PairBatch<B> = Batch<(Tensor<B, 2>, Tensor<B, 2>), Pairs<B>>;

impl<B: Backend> Batcher<B, PairItem, PairBatch<B>> for PairBatcher {
    fn batch(&self, items: Vec<PairItem>, device: &B::Device) -> PairBatch<B> {
        let n = items.len();
        let of = |row: &dyn Fn(&PairItem) -> &Vec<f32>| {
            let dim = items.first().map_or(0, |item| row(item).len());
            let all: Vec<f32> = items.iter().flat_map(|item| row(item).iter().copied()).collect();
            Tensor::from_data(TensorData::new(all, [n, dim]), device)
        };
        let input = (of(&|item| &item.image), of(&|item| &item.text));
        Batch { ids: items.iter().map(|item| item.id).collect(), input, target: Pairs::new(n) }
    }
}
