//! The testbed of the experiments: images, and a network trained on them by any recipe.
//!
//! burn-train's loop reports epochs. The experiments have a loop of their own: they look at every
//! step, and their runs share the frozen prefixes of the images.

use anyhow::{Context, Result};
use burn::data::dataloader::DataLoader;
use burn::module::AutodiffModule;
use burn::optim::GradientsParams;
use burn::prelude::*;
use burn::train::{InferenceStep, TrainStep};
use flops_core::allocator::{Allocator, AllocatorKind, AnyAllocator};
use flops_core::{BackpropLearner, Batch, ForwardConfig, ForwardLearner, QueryBudget, Rows};
use flops_vit::checkpoint::Pretrained;
use flops_vit::data::ImageBatch;
use flops_vit::{Scope, Sites, ViT};

use super::classifier::Classifier;
use super::images::{Batches, ImageArgs, Images};
use super::oracle::OracleAllocator;
use crate::backend::{self, AB, B};
use crate::run::prefixes::prefixes_fit;

/// A forward-only learner, of the ViT unless another network is named.
pub type Learner<A = AnyAllocator<AB>, M = ViT<AB>> = ForwardLearner<AB, M, A>;

/// The data of an experiment, and the part of the ViT that it trains.
#[derive(clap::Args, Clone, Debug)]
pub struct TestbedArgs {
    /// The images and the weights.
    #[command(flatten)]
    pub images: ImageArgs,
    /// The parameters that are trained.
    #[arg(long, default_value = "head")]
    pub scope: Scope,
}

/// Data and a network to train on them, the same for all runs of an experiment.
pub struct Testbed<M: Classifier = ViT<AB>> {
    /// The images.
    pub images: Images,
    /// Threads of every run.
    pub threads: usize,
    model: M,
    /// Whether frozen prefixes of the images are kept.
    keeps_prefixes: bool,
    /// Keeps the frozen prefixes that the learners share.
    prefix_owner: Learner<AnyAllocator<AB>, M>,
    backprop: BackpropLearner<AB, M>,
    evaluator: BackpropLearner<AB, M>,
}

impl Testbed {
    /// Loads the data, and a ViT with a new head that trains the scope of `args`.
    ///
    /// # Errors
    /// If data or weights cannot be read, or the device does not compute.
    pub fn open(args: &TestbedArgs, threads: usize) -> Result<Self> {
        let device = backend::device()?;
        let pretrained = args.images.pretrained(&device)?;
        let card = &pretrained.card;
        let images = Images::load(&args.images, card.config.img_size, card.normalization, threads, &device)?;
        Self::pretrained(images, &pretrained, args.scope, threads)
    }

    /// Creates a testbed for a pretrained ViT with a new head that trains `scope`.
    ///
    /// # Errors
    /// If the model does not have the scope, or there are no test images.
    pub fn pretrained(images: Images, pretrained: &Pretrained<AB>, scope: Scope, threads: usize) -> Result<Self> {
        let mut model = pretrained.model.clone().with_new_head(images.train.classes.len(), 0);
        if let Scope::Lora(rank) = scope {
            model = model.with_lora(rank, 0)?;
        }
        let model = model.with_scope(scope)?;
        let fits = prefixes_fit(&pretrained.card.config, images.train.items.len() + images.test.items.len());
        Self::new(images, model, threads, fits && scope != Scope::Full)
    }

    /// Returns the model with a head drawn from `seed`. Its parameters keep their ids, so that kept
    /// prefixes stay valid.
    pub fn model(&self, seed: u64) -> ViT<AB> {
        let mut model = self.model.clone();
        let fresh = model.clone().with_new_head(self.images.train.classes.len(), seed).head.weight.val();
        model.head.weight = model.head.weight.map(|old| fresh.set_require_grad(old.is_require_grad()));
        model
    }
}

impl<M: Classifier> Testbed<M> {
    /// Creates a testbed for `model`, whose trained parameters are those of every run.
    ///
    /// With `keeps_prefixes` the outputs of its frozen layers are kept. All runs then start from
    /// models that have the same parameters, by their ids, and the same frozen values.
    ///
    /// # Errors
    /// If nothing is trained, or there are no test images.
    pub fn new(images: Images, model: M, threads: usize, keeps_prefixes: bool) -> Result<Self> {
        let kept = |items: usize| if keeps_prefixes { items } else { 0 };
        let (train, test) = (kept(images.train.items.len()), kept(images.test.items.len()));
        let config = ForwardConfig::new(QueryBudget::new(1, 1)?).with_prefix_cache(train);
        let uniform = AnyAllocator::new(AllocatorKind::Uniform, &images.device)?;
        let prefix_owner = ForwardLearner::new(model.clone(), uniform, config)?;
        let backprop = BackpropLearner::new(model.clone()).with_prefix_cache(train).with_threads(threads);
        let evaluator = BackpropLearner::new(model.clone()).with_evaluation_cache(test).with_threads(threads);
        if keeps_prefixes {
            // a step tells the cache which parameters are trained; its gradient is ignored
            let batch = images.test_batches()?.iter().next().context("there are no test images")?;
            let one = Batch { ids: vec![batch.ids[0]], input: batch.input.rows(&[0]), target: batch.target.rows(&[0]) };
            TrainStep::step(&evaluator, one);
        }
        Ok(Self { images, threads, model, keeps_prefixes, prefix_owner, backprop, evaluator })
    }

    /// Returns the same testbed with noise at other sites, and nothing kept yet; `None` if the
    /// network has no such sites.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn at_sites(&self, sites: Sites) -> Result<Option<Self>> {
        let model = self.model.clone().at_sites(sites);
        model.map(|model| Self::new(self.images.clone(), model, self.threads, self.keeps_prefixes)).transpose()
    }

    /// Creates a learner for `model` with a new allocator.
    ///
    /// # Errors
    /// If the configuration is invalid.
    pub fn learner(
        &self,
        model: M,
        config: ForwardConfig,
        allocator: AllocatorKind,
    ) -> Result<Learner<AnyAllocator<AB>, M>> {
        let allocator = AnyAllocator::new(allocator, &self.images.device)?;
        let learner = ForwardLearner::new(model, allocator, config.with_threads(self.threads))?;
        Ok(learner.with_prefixes_of(&self.prefix_owner))
    }

    /// Creates a learner whose allocator is told the variances.
    ///
    /// # Errors
    /// If the configuration is invalid.
    pub fn oracle_learner(&self, model: M, config: ForwardConfig) -> Result<Learner<OracleAllocator, M>> {
        let learner = ForwardLearner::new(model, OracleAllocator::default(), config.with_threads(self.threads))?;
        Ok(learner.with_prefixes_of(&self.prefix_owner))
    }

    /// Creates a learner for `model` by backpropagation.
    pub fn backprop_learner(&self, model: M) -> BackpropLearner<AB, M> {
        let mut learner = self.backprop.clone();
        learner.model = model;
        learner
    }

    /// Returns a copy of `learner` to look at: what it does changes nothing of `learner`, nor what
    /// its monitor knows.
    pub fn copy<A>(&self, learner: &Learner<A, M>) -> Learner<A, M>
    where
        A: AutodiffModule<AB> + Allocator<AB>,
    {
        learner.clone().apart().with_prefixes_of(&self.prefix_owner)
    }

    /// Returns batches of the training images without end, each epoch shuffled by `seed`.
    ///
    /// # Errors
    /// If there are no images or `batch_size` is 0.
    pub fn batches(&self, batch_size: usize, seed: u64) -> Result<Batches> {
        self.images.batches(batch_size, seed)
    }

    /// Returns the mean loss and the accuracy on the test images. Frozen prefixes are computed
    /// once.
    ///
    /// # Errors
    /// If there are no test images.
    pub fn evaluate(&self, model: &M) -> Result<(f64, f64)> {
        let mut evaluator = self.evaluator.clone();
        evaluator.model = model.clone();
        let evaluator = evaluator.valid();
        let (mut loss, mut right, mut all) = (0.0, 0i64, 0usize);
        for batch in self.images.test_batches()?.iter() {
            let n = batch.ids.len();
            let output = InferenceStep::step(&evaluator, batch);
            let (logits, labels) = output.classification.context("the network classifies")?;
            right += logits.argmax(1).reshape([n]).equal(labels).int().sum().into_scalar().elem::<i64>();
            loss += output.losses.sum().into_scalar().elem::<f64>();
            all += n;
        }
        Ok((loss / all as f64, right as f64 / all as f64))
    }

    /// Returns the gradient of the mean loss of a batch by autodiff.
    pub fn true_gradient(&self, model: &M, batch: &ImageBatch<B>) -> GradientsParams {
        TrainStep::step(&self.backprop_learner(model.clone()), batch.clone()).grads
    }
}
