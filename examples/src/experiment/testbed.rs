//! The testbed of the experiments: a ViT on digits or CIFAR, trained by any recipe.
//!
//! burn-train's loop reports epochs. The experiments have a loop of their own: they look at every
//! step, and their runs share the frozen prefixes of the images.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use burn::data::dataloader::DataLoader;
use burn::optim::GradientsParams;
use burn::prelude::*;
use burn::train::TrainStep;
use flops_core::allocator::{AllocatorKind, AnyAllocator};
use flops_core::{BackpropLearner, Batch, EpochLoader, ForwardConfig, ForwardLearner, QueryBudget};
use flops_vit::checkpoint::{self, Pretrained};
use flops_vit::data::{DatasetSpec, ImageBatch, ImageBatcher, ImageDataset, ImageItem, LoadOptions};
use flops_vit::{Scope, ViT};

use super::oracle::OracleAllocator;
use crate::backend::{self, AB, B, Device};

/// A forward-only learner of the ViT.
pub type Learner<A = AnyAllocator<AB>> = ForwardLearner<AB, ViT<AB>, A>;

/// The data of an experiment, and the part of the model that it trains.
#[derive(clap::Args, Clone, Debug)]
pub struct TestbedArgs {
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
    /// The parameters that are trained.
    #[arg(long, default_value = "head")]
    pub scope: Scope,
}

/// Data and a model to train on them, the same for all runs of an experiment.
pub struct Testbed {
    /// The training images.
    pub train: Arc<ImageDataset>,
    test: Arc<ImageDataset>,
    batcher: ImageBatcher,
    device: Device,
    model: ViT<AB>,
    /// Threads of every run.
    pub threads: usize,
    /// Keeps the frozen prefixes that the learners share.
    prefix_owner: Learner,
    backprop: BackpropLearner<AB, ViT<AB>>,
    evaluator: BackpropLearner<AB, ViT<AB>>,
}

impl Testbed {
    /// Loads the data, and a ViT with a new head that trains the scope of `args`.
    ///
    /// # Errors
    /// If data or weights cannot be read, or the device does not compute.
    pub fn open(args: &TestbedArgs, threads: usize) -> Result<Self> {
        ensure!(args.limit != Some(0), "--limit 0: use at least 1 image");
        let device = backend::device()?;
        let Pretrained { model, card } = match &args.weights {
            Some(path) => checkpoint::load::<AB>(path, &device)?,
            None => checkpoint::pretrained(&device)?,
        };
        let options = LoadOptions::new(card.config.img_size).with_data_dir(args.data_dir.clone()).with_threads(threads);
        let split = args.dataset.load(&options)?;
        for remark in split.remarks() {
            println!("{remark}");
        }
        let limited = |data: ImageDataset| Arc::new(data.limited(args.limit));
        let (train, test) = (limited(split.train), limited(split.test));
        let mut model = model.with_new_head(train.classes.len(), 0);
        if let Scope::Lora(rank) = args.scope {
            model = model.with_lora(rank, 0)?;
        }
        let model = model.with_scope(args.scope)?;
        let batcher = ImageBatcher::new(card.config.img_size, card.normalization)?;
        let config = ForwardConfig::new(QueryBudget::new(1, 1)?).with_prefix_cache(train.items.len());
        let uniform = AnyAllocator::new(AllocatorKind::Uniform, &device)?;
        let prefix_owner = ForwardLearner::new(model.clone(), uniform, config)?;
        let backprop = BackpropLearner::new(model.clone()).with_prefix_cache(train.items.len()).with_threads(threads);
        let evaluator = BackpropLearner::new(model.clone()).with_prefix_cache(test.items.len());
        Ok(Self { train, test, batcher, device, model, threads, prefix_owner, backprop, evaluator })
    }

    /// Returns the model with a head drawn from `seed`. Its parameters keep their ids, so that kept
    /// prefixes stay valid.
    pub fn model(&self, seed: u64) -> ViT<AB> {
        let mut model = self.model.clone();
        let fresh = model.clone().with_new_head(self.train.classes.len(), seed).head.weight.val();
        model.head.weight = model.head.weight.map(|old| fresh.set_require_grad(old.is_require_grad()));
        model
    }

    /// Creates a learner for `model` with a new allocator.
    ///
    /// # Errors
    /// If the configuration is invalid.
    pub fn learner(&self, model: ViT<AB>, config: ForwardConfig, allocator: AllocatorKind) -> Result<Learner> {
        let allocator = AnyAllocator::new(allocator, &self.device)?;
        let learner = ForwardLearner::new(model, allocator, config.with_threads(self.threads))?;
        Ok(learner.with_prefixes_of(&self.prefix_owner))
    }

    /// Creates a learner whose allocator is told the variances.
    ///
    /// # Errors
    /// If the configuration is invalid.
    pub fn oracle_learner(&self, model: ViT<AB>, config: ForwardConfig) -> Result<Learner<OracleAllocator>> {
        let learner = ForwardLearner::new(model, OracleAllocator::default(), config.with_threads(self.threads))?;
        Ok(learner.with_prefixes_of(&self.prefix_owner))
    }

    /// Returns batches of the training images without end, each epoch shuffled by `seed`.
    ///
    /// # Errors
    /// If there are no images or `batch_size` is 0.
    pub fn batches(&self, batch_size: usize, seed: u64) -> Result<Batches> {
        let loader = EpochLoader::new(self.train.clone(), self.batcher.clone(), batch_size, self.device.clone())?;
        Ok(Batches { loader: loader.shuffled(seed), waiting: VecDeque::new() })
    }

    /// Returns the mean loss and the accuracy on the test images. Frozen prefixes are computed
    /// once.
    ///
    /// # Errors
    /// If there are no test images.
    pub fn evaluate(&self, model: &ViT<AB>) -> Result<(f64, f64)> {
        let loader = EpochLoader::<B, ImageItem, ImageBatch<B>>::new(
            self.test.clone(),
            self.batcher.clone(),
            64,
            self.device.clone(),
        )?;
        // A step of backpropagation reuses kept prefixes. Its gradient is ignored.
        let mut evaluator = self.evaluator.clone();
        evaluator.model = model.clone();
        let (mut loss, mut right, mut all) = (0.0, 0i64, 0usize);
        for batch in loader.iter() {
            let n = batch.ids.len();
            let item = TrainStep::step(&evaluator, with_graph(&batch)).item;
            let (logits, labels) = item.classification.context("a ViT classifies")?;
            right += logits.argmax(1).reshape([n]).equal(labels).int().sum().into_scalar().elem::<i64>();
            loss += item.losses.sum().into_scalar().elem::<f64>();
            all += n;
        }
        Ok((loss / all as f64, right as f64 / all as f64))
    }

    /// Returns the gradient of the mean loss of a batch by autodiff.
    pub fn true_gradient(&mut self, model: &ViT<AB>, batch: &ImageBatch<B>) -> GradientsParams {
        self.backprop.model = model.clone();
        TrainStep::step(&self.backprop, with_graph(batch)).grads
    }
}

fn with_graph(batch: &ImageBatch<B>) -> ImageBatch<AB> {
    Batch {
        ids: batch.ids.clone(),
        input: Tensor::from_inner(batch.input.clone()),
        target: Tensor::from_inner(batch.target.clone()),
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
