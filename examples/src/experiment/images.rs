//! The images of an experiment, and batches of them.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Result, ensure};
use burn::data::dataloader::DataLoader;
use burn::data::dataloader::batcher::Batcher;
use flops_core::EpochLoader;
use flops_vit::Normalization;
use flops_vit::checkpoint::{self, Pretrained};
use flops_vit::data::{DatasetSpec, ImageBatch, ImageBatcher, ImageDataset, ImageItem, LoadOptions};

use crate::backend::{AB, B, Device};

/// Images of a batch when the test images are evaluated.
const TEST_BATCH: usize = 64;

/// The data of an experiment, and the weights that it starts from.
#[derive(clap::Args, Clone, Debug)]
pub struct ImageArgs {
    /// cifar10, cifar100, digits (embedded) or folder:PATH.
    #[arg(long, default_value = "digits")]
    pub dataset: DatasetSpec,
    /// Folder of CIFAR's binary files.
    #[arg(long)]
    pub data_dir: Option<PathBuf>,
    /// Checkpoint to start from [default: the one shipped with flops-vit].
    #[arg(long)]
    pub weights: Option<PathBuf>,
    /// Use at most this many training and this many test images.
    #[arg(long)]
    pub limit: Option<usize>,
}

impl ImageArgs {
    /// Reads the model that the experiment starts from.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn pretrained(&self, device: &Device) -> Result<Pretrained<AB>> {
        let found = match &self.weights {
            Some(path) => checkpoint::load::<AB>(path, device)?,
            None => checkpoint::pretrained(device)?,
        };
        let channels = found.card.config.in_chans;
        ensure!(channels == 3, "the weights take images of {channels} channel: the experiments need those of 3");
        Ok(found)
    }
}

/// Training and test images in memory; clones share them.
#[derive(Clone)]
pub struct Images {
    /// The training images.
    pub train: Arc<ImageDataset>,
    /// The test images.
    pub test: Arc<ImageDataset>,
    /// Where batches are made.
    pub device: Device,
    batcher: ImageBatcher,
}

impl Images {
    /// Loads the images at a size, in pixels. What is missing or was skipped is printed.
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn load(
        args: &ImageArgs,
        img_size: usize,
        normalization: Normalization,
        threads: usize,
        device: &Device,
    ) -> Result<Self> {
        ensure!(args.limit != Some(0), "--limit 0: use at least 1 image");
        let options = LoadOptions::new(img_size).with_data_dir(args.data_dir.clone()).with_threads(threads);
        let split = args.dataset.load(&options)?;
        for remark in split.remarks() {
            println!("{remark}");
        }
        let limited = |data: ImageDataset| Arc::new(data.limited(args.limit));
        let batcher = ImageBatcher::new(img_size, normalization)?;
        Ok(Self { train: limited(split.train), test: limited(split.test), device: device.clone(), batcher })
    }

    /// Returns batches of the training images without end, each epoch shuffled by `seed`.
    ///
    /// # Errors
    /// If there are no images or `batch_size` is 0.
    pub fn batches(&self, batch_size: usize, seed: u64) -> Result<Batches> {
        let loader = EpochLoader::new(self.train.clone(), self.batcher.clone(), batch_size, self.device.clone())?;
        Ok(Batches { loader: loader.shuffled(seed), waiting: VecDeque::new() })
    }

    /// Returns at most `limit` training images, evenly spread, as one batch.
    pub fn fixed_batch(&self, limit: usize) -> ImageBatch<B> {
        let images = ImageDataset::clone(&self.train).limited(Some(limit));
        self.batcher.batch(images.items, &self.device)
    }

    /// Returns the test images in their order.
    ///
    /// # Errors
    /// If there are none.
    pub fn test_batches(&self) -> Result<impl DataLoader<B, ImageBatch<B>> + use<>> {
        let loader: EpochLoader<B, ImageItem, ImageBatch<B>> =
            EpochLoader::new(self.test.clone(), self.batcher.clone(), TEST_BATCH, self.device.clone())?;
        Ok(loader)
    }
}

/// Batches of training images without end.
pub struct Batches {
    loader: EpochLoader<B, ImageItem, ImageBatch<B>>,
    waiting: VecDeque<ImageBatch<B>>,
}

impl Iterator for Batches {
    type Item = ImageBatch<B>;

    fn next(&mut self) -> Option<ImageBatch<B>> {
        if self.waiting.is_empty() {
            self.waiting.extend(self.loader.iter());
        }
        self.waiting.pop_front()
    }
}
