//! The images of a run.

use std::sync::Arc;

use anyhow::{Result, ensure};
use burn::data::dataloader::DataLoader;
use flops_core::{EpochLoader, ForwardConfig, InnerBatcher};
use flops_examples::backend::{AB, B, Device};
use flops_examples::run::prefixes::prefixes_fit;
use flops_vit::checkpoint::Card;
use flops_vit::data::{Augment, ImageBatch, ImageBatcher, ImageDataset, ImageItem, Padding};

use crate::args::Args;

/// Images of a batch when the test set is evaluated.
const TEST_BATCH: usize = 250;
/// The most bytes of training images.
const IMAGE_BYTES: usize = 8 << 30;

/// The images of a run.
pub struct Data {
    pub train: Arc<ImageDataset>,
    pub test: Arc<dyn DataLoader<B, ImageBatch<B>>>,
    pub batcher: ImageBatcher,
    pub skipped: usize,
}

impl Data {
    /// Loads the images at the size that the model takes.
    pub fn load(args: &Args, card: &Card, threads: usize, device: &Device) -> Result<Self> {
        let split = args.inputs.images(&args.dataset, card, threads)?;
        let skipped = split.skipped.len();
        let train = match args.shots {
            Some(shots) => split.train.shots(shots, args.seed)?,
            None => split.train.limited(args.limit),
        };
        let test = split.test.limited(args.limit);
        let pixels = train.items.first().map_or(0, |item| item.pixels.len());
        ensure!(
            train.items.len().saturating_mul((args.copies() + 1) * pixels) <= IMAGE_BYTES,
            "--copies {}: the images would take more than {} GiB; use fewer",
            args.copies(),
            IMAGE_BYTES >> 30
        );
        let shifts = Augment { flip: false, shift: args.shift, padding: Padding::Edge, seed: args.seed };
        let train = Arc::new(train.with_copies(args.copies(), &shifts));

        let batcher = ImageBatcher::for_card(card)?;
        let test: EpochLoader<B, ImageItem, ImageBatch<B>> =
            EpochLoader::new(Arc::new(test), batcher.clone(), TEST_BATCH, device.clone())?;
        Ok(Self { train, test: Arc::new(test), batcher, skipped })
    }

    /// Returns the training images in batches without a graph, shuffled and augmented anew in each
    /// epoch.
    pub fn train_loader(
        &self,
        args: &Args,
        first_epoch: usize,
        device: &Device,
    ) -> Result<Arc<dyn DataLoader<AB, ImageBatch<B>>>> {
        let batcher = InnerBatcher(self.batcher.clone());
        let loader = EpochLoader::new(self.train.clone(), batcher, args.batch_size, device.clone())?
            .shuffled(args.seed)
            .starting_at_epoch(first_epoch as u64);
        Ok(match args.augmentation() {
            Some(augment) => Arc::new(loader.with_augmentation(augment)),
            None => Arc::new(loader),
        })
    }
}

/// Lets the learner keep the prefixes of all training images, and of all test images.
///
/// Training prefixes are not kept where they take too much memory, or where the images change from
/// epoch to epoch. Test prefixes are not kept where the two sets take too much memory.
pub fn with_prefix_caches(config: ForwardConfig, args: &Args, data: &Data, card: &Card) -> ForwardConfig {
    let (train, test) = (data.train.items.len(), data.test.num_items());
    let fits = |images: usize| prefixes_fit(&card.config, images);
    let train = if args.no_prefix_cache || args.augmentation().is_some() || !fits(train) { 0 } else { train };
    let test = if args.no_prefix_cache || !fits(train + test) { 0 } else { test };
    config.with_prefix_cache(train).with_evaluation_cache(test)
}
