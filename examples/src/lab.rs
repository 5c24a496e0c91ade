//! The laboratory of the experiments: a ViT on digits or CIFAR-10, trained by any recipe in a loop of its own.
//!
//! burn-train's loop reports epochs; experiments look at every step, and share the frozen prefix of the data among their runs.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use burn::data::dataloader::DataLoader;
use burn::module::{AutodiffModule, Module, ModuleVisitor, Param};
use burn::optim::adaptor::OptimizerAdaptor;
use burn::optim::{AdamW, AdamWConfig, GradientsParams, Sgd, SgdConfig};
use burn::prelude::*;
use burn::train::TrainStep;
use flops_core::allocator::{Allocator, AllocatorKind, AnyAllocator, DatumFeatures, Neyman};
use flops_core::{
    Allocation, BackpropLearner, Batch, EpochLoader, Error, ForwardConfig, ForwardLearner, QueryBudget, StepReport,
};
use flops_vit::checkpoint;
use flops_vit::data::{DatasetSpec, ImageBatch, ImageBatcher, ImageDataset, ImageItem, LoadOptions};
use flops_vit::{Scope, ViT};
use rand::rngs::StdRng;

use crate::backend::{self, AB, B, Device};
use crate::groups::{Grouped, LrGroup};

/// A forward-only learner of the ViT.
pub type Learner<A = AnyAllocator<AB>> = ForwardLearner<AB, ViT<AB>, A>;

/// Which data and which part of the model an experiment is about.
#[derive(clap::Args, Clone, Debug)]
pub struct LabArgs {
    /// cifar10, cifar100, digits (embedded) or folder:PATH.
    #[arg(long, default_value = "digits")]
    pub dataset: DatasetSpec,
    /// Folder of CIFAR's binary files.
    #[arg(long)]
    pub data_dir: Option<PathBuf>,
    /// Checkpoint to start from; the one shipped with flops-vit if not given.
    #[arg(long)]
    pub weights: Option<PathBuf>,
    /// Use at most this many training and this many test images.
    #[arg(long)]
    pub limit: Option<usize>,
    /// What is trained.
    #[arg(long, default_value = "head")]
    pub scope: Scope,
}

/// Data and a model to train on them, the same for all runs of an experiment.
pub struct Lab {
    /// The training images.
    pub train: Arc<ImageDataset>,
    test: Arc<ImageDataset>,
    batcher: ImageBatcher,
    device: Device,
    model: ViT<AB>,
    /// Threads of every run.
    pub threads: usize,
    /// Keeps the frozen prefixes.
    keeper: Learner,
    graph: BackpropLearner<AB, ViT<AB>>,
    judge: BackpropLearner<AB, ViT<AB>>,
}

impl Lab {
    /// A ViT with a new head, of which the scope is trained.
    ///
    /// # Errors
    /// Where data or weights cannot be read, or the device does not compute.
    pub fn open(args: &LabArgs, threads: usize) -> Result<Self> {
        ensure!(args.limit != Some(0), "--limit 0: use at least 1 image");
        let device = backend::device()?;
        let (model, card) = match &args.weights {
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
        let keeper = ForwardLearner::new(model.clone(), AnyAllocator::new(AllocatorKind::Uniform, &device)?, config)?;
        let graph = BackpropLearner::new(model.clone()).with_prefix_cache(train.items.len()).with_threads(threads);
        let judge = BackpropLearner::new(model.clone()).with_prefix_cache(test.items.len());
        Ok(Self { train, test, batcher, device, model, threads, keeper, graph, judge })
    }

    /// The model with a head drawn from `seed`; its parameters keep their names, so that prefixes stay valid.
    pub fn model(&self, seed: u64) -> ViT<AB> {
        let mut model = self.model.clone();
        let fresh = model.clone().with_new_head(self.train.classes.len(), seed).head.weight.val();
        model.head.weight = model.head.weight.map(|old| fresh.set_require_grad(old.is_require_grad()));
        model
    }

    /// A learner for `model` with an allocator of its own.
    pub fn learner(&self, model: ViT<AB>, config: ForwardConfig, allocator: AllocatorKind) -> Result<Learner> {
        let allocator = AnyAllocator::new(allocator, &self.device)?;
        Ok(ForwardLearner::new(model, allocator, config.with_threads(self.threads))?.with_prefixes_of(&self.keeper))
    }

    /// A learner whose allocator is told the variances.
    pub fn informed(&self, model: ViT<AB>, config: ForwardConfig) -> Result<Learner<Informed>> {
        let learner = ForwardLearner::new(model, Informed::default(), config.with_threads(self.threads))?;
        Ok(learner.with_prefixes_of(&self.keeper))
    }

    /// Batches of the training images, epoch after epoch, in an order of the seed.
    ///
    /// # Errors
    /// Where there are no images or `batch_size` is 0.
    pub fn batches(&self, batch_size: usize, seed: u64) -> Result<Batches> {
        let loader = EpochLoader::new(self.train.clone(), self.batcher.clone(), batch_size, self.device.clone())?;
        Ok(Batches { loader: loader.shuffled(seed), waiting: VecDeque::new() })
    }

    /// Mean loss and accuracy on the test images, from their frozen prefixes where these were computed before.
    ///
    /// # Errors
    /// Where there are none.
    pub fn evaluate(&self, model: &ViT<AB>) -> Result<(f64, f64)> {
        let loader = EpochLoader::<B, ImageItem, ImageBatch<B>>::new(
            self.test.clone(),
            self.batcher.clone(),
            64,
            self.device.clone(),
        )?;
        // a step of backpropagation whose gradient nobody asks for: it alone knows of prefixes
        let mut judge = self.judge.clone();
        judge.model = model.clone();
        let (mut loss, mut right, mut all) = (0.0, 0i64, 0usize);
        for batch in loader.iter() {
            let n = batch.ids.len();
            let item = TrainStep::step(&judge, with_graph(&batch)).item;
            let (logits, labels) = item.classification.context("a ViT classifies")?;
            right += logits.argmax(1).reshape([n]).equal(labels).int().sum().into_scalar().elem::<i64>();
            loss += item.losses.sum().into_scalar().elem::<f64>();
            all += n;
        }
        Ok((loss / all as f64, right as f64 / all as f64))
    }

    /// The gradient of the mean loss of a batch by autodiff.
    pub fn true_gradient(&mut self, model: &ViT<AB>, batch: &ImageBatch<B>) -> GradientsParams {
        self.graph.model = model.clone();
        TrainStep::step(&self.graph, with_graph(batch)).grads
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

/// ‖a − b‖² and ‖b‖² over the trained parameters of `model`; a missing gradient is zero.
pub fn squared_distance(model: &ViT<AB>, a: &GradientsParams, b: &GradientsParams) -> (f64, f64) {
    struct Distance<'a>(&'a GradientsParams, &'a GradientsParams, f64, f64);
    impl ModuleVisitor<AB> for Distance<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<AB, D>>) {
            let values = |g: &GradientsParams| g.get::<B, D>(param.id).map(|g| g.into_data().iter::<f64>().collect());
            let (a, b): (Option<Vec<f64>>, Option<Vec<f64>>) = (values(self.0), values(self.1));
            let n = a.as_ref().or(b.as_ref()).map_or(0, Vec::len);
            let (a, b) = (a.unwrap_or_else(|| vec![0.0; n]), b.unwrap_or_else(|| vec![0.0; n]));
            self.2 += a.iter().zip(&b).map(|(a, b)| (a - b).powi(2)).sum::<f64>();
            self.3 += b.iter().map(|b| b * b).sum::<f64>();
        }
    }
    let mut distance = Distance(a, b, 0.0, 0.0);
    model.visit(&mut distance);
    (distance.2, distance.3)
}

/// Integer Neyman allocation by the variances of the batch, where it was told them; by the learner's own estimates otherwise.
///
/// It is also an example of an allocator of one's own.
#[derive(Module, Clone, Debug, Default)]
pub struct Informed {
    #[module(skip)]
    known: Known,
}

type Known = Arc<std::sync::Mutex<Option<Vec<f64>>>>;

impl Informed {
    /// Tells it Tr Σ_j of the next batch.
    pub fn tell(&self, variances: Vec<f64>) {
        *self.known.lock().unwrap_or_else(|e| e.into_inner()) = Some(variances);
    }
}

impl<P: Backend> Allocator<P> for Informed {
    type Update = ();

    fn allocate(
        &self,
        features: &DatumFeatures<'_>,
        budget: &QueryBudget,
        rng: &mut StdRng,
    ) -> Result<(Allocation, ()), Error> {
        let told = self.known.lock().unwrap_or_else(|e| e.into_inner()).take();
        let variances = told.as_deref().unwrap_or(features.variances);
        Allocator::<P>::allocate(&Neyman, &DatumFeatures { variances, ..*features }, budget, rng)
    }

    fn apply(self, (): ()) -> Self {
        self
    }

    fn name(&self) -> &'static str {
        "informed"
    }
}

/// AdamW as `vit_cifar` has it, or plain SGD.
pub enum Optim {
    /// AdamW, weight decay 0.1, the head at four times the learning rate.
    Adam(Grouped<OptimizerAdaptor<AdamW, Learner, AB>>),
    /// SGD without momentum.
    Sgd(OptimizerAdaptor<Sgd<B>, Learner, AB>),
}

impl Optim {
    /// AdamW.
    pub fn adam() -> Self {
        let group = LrGroup { path: vec!["model", "head"], factor: 4.0 };
        Self::Adam(Grouped { inner: AdamWConfig::new().with_weight_decay(0.1).init(), group })
    }

    /// SGD.
    pub fn sgd() -> Self {
        Self::Sgd(SgdConfig::new().init())
    }
}

/// How the learning rate changes over a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Schedule {
    /// It falls to zero as a cosine, and with it the effect of the gradient's variance on the final loss.
    #[default]
    Cosine,
    /// It stays: the final loss shows the variance.
    Constant,
}

impl Schedule {
    /// The rate at `step`.
    pub fn rate(self, lr: f64, step: usize, steps: usize) -> f64 {
        match self {
            Self::Cosine => 0.5 * lr * (1.0 + (std::f64::consts::PI * step as f64 / steps.max(1) as f64).cos()),
            Self::Constant => lr,
        }
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cosine => "cosine",
            Self::Constant => "constant",
        }
    }
}

/// One step, without the update of θ.
///
/// # Errors
/// Where the step failed.
pub fn estimate<A>(learner: &Learner<A>, batch: ImageBatch<B>) -> Result<(GradientsParams, StepReport)>
where
    A: AutodiffModule<AB> + Allocator<AB>,
    A::InnerModule: Allocator<B, Update = A::Update>,
{
    let output = TrainStep::step(learner, batch);
    let monitor = learner.monitor();
    if let Some(error) = monitor.error() {
        return Err(error.into());
    }
    let report = monitor.take_reports().pop().context("no loss of the batch is finite; lower the learning rate")?;
    Ok((output.grads, report))
}

/// The update that follows an estimate: θ at `lr`, and what the learner learned of its own.
pub fn update(learner: Learner, optim: &mut Optim, lr: f64, grads: GradientsParams) -> Learner {
    match optim {
        Optim::Adam(optim) => learner.optimize::<AB, _>(optim, lr, grads),
        Optim::Sgd(optim) => learner.optimize::<AB, _>(optim, lr, grads),
    }
}

/// What the learner learned of its own, θ held where it is.
pub fn observe<A>(learner: Learner<A>, grads: GradientsParams) -> Learner<A>
where
    A: AutodiffModule<AB> + Allocator<AB>,
    A::InnerModule: Allocator<B, Update = A::Update>,
{
    learner.optimize::<AB, _>(&mut SgdConfig::new().init(), 0.0, grads)
}

/// A training run by one recipe: its learner, optimizer and schedule.
pub struct Run {
    /// The learner.
    pub learner: Learner,
    optim: Optim,
    lr: f64,
    steps: usize,
    done: usize,
    schedule: Schedule,
}

impl Run {
    /// The same run under another schedule.
    pub fn with_schedule(mut self, schedule: Schedule) -> Self {
        self.schedule = schedule;
        self
    }

    /// A run of `steps` steps whose rate falls from `lr` to zero.
    pub fn new(learner: Learner, optim: Optim, lr: f64, steps: usize) -> Self {
        Self { learner, optim, lr, steps, done: 0, schedule: Schedule::default() }
    }

    /// One step.
    ///
    /// # Errors
    /// Where it failed.
    pub fn step(mut self, batch: ImageBatch<B>) -> Result<(Self, StepReport)> {
        let (grads, report) = estimate(&self.learner, batch)?;
        let lr = self.schedule.rate(self.lr, self.done, self.steps);
        self.learner = update(self.learner, &mut self.optim, lr, grads);
        self.done += 1;
        Ok((self, report))
    }

    /// All steps that are left; the mean loss of the last tenth of them.
    ///
    /// # Errors
    /// Where one failed.
    pub fn finish(mut self, batches: &mut Batches, mut look: impl FnMut(usize, &StepReport)) -> Result<(Self, f64)> {
        let tail = (self.steps / 10).max(1);
        let mut last = VecDeque::new();
        while self.done < self.steps {
            let batch = batches.next().context("there are no images")?;
            let report;
            (self, report) = self.step(batch)?;
            look(self.done, &report);
            if last.len() == tail {
                last.pop_front();
            }
            last.push_back(report.loss);
        }
        let loss = last.iter().sum::<f64>() / last.len() as f64;
        Ok((self, loss))
    }
}
