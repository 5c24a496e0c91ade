//! burn-train's `Learner` around a model of your own: metrics, checkpoints, and resuming.
//!
//! ```text
//! cargo run --release --example learner
//! cargo run --release --example learner -- --epochs 12 --resume 10     goes on after epoch 10, to the same bits
//! cargo run --release --example learner -- --backprop                  the same model by backpropagation
//! ```
//!
//! A small convolutional network learns the embedded digits from random weights. burn-train 0.21 writes
//! the metrics of the first epoch after a checkpoint into the folder of epoch 1.
// devices are `Copy` on some backends only
#![allow(clippy::clone_on_copy)]

#[macro_use]
extern crate flops_report;

use std::fmt::Display;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use burn::backend::Flex;
use burn::data::dataloader::DataLoader;
use burn::module::AutodiffModule;
use burn::optim::AdamWConfig;
use burn::prelude::*;
use burn::tensor::activation::relu;
use burn::train::checkpoint::KeepLastNCheckpoints;
use burn::train::metric::{AccuracyMetric, LossMetric};
use burn::train::{InferenceStep, ItemLazy, Learner, SupervisedTraining, TrainStep};
use clap::Parser;
use flops_core::prelude::*;
use flops_core::train::recorder::AtomicRecorder;
use flops_examples::backend::{AB, B};
use flops_examples::cli;
use flops_vit::Normalization;
use flops_vit::data::{ImageBatch, ImageBatcher, digits};

/// Train a model of your own by burn-train's Learner, with forward passes only.
#[derive(Parser, Debug)]
#[command(name = "learner", version)]
struct Args {
    /// Epochs over the 1,438 training images.
    #[arg(long, default_value_t = 10)]
    epochs: usize,
    /// Go on after the checkpoint of this epoch.
    #[arg(long)]
    resume: Option<usize>,
    /// Train by backpropagation instead.
    #[arg(long)]
    backprop: bool,
    /// Seed of weights, order, noise and allocation.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Folder of checkpoints and metrics.
    #[arg(long, default_value = "artifacts/learner")]
    artifact_dir: PathBuf,
}

#[derive(Module, Debug)]
struct Net<B: Backend> {
    conv: nn::conv::Conv2d<B>,
    hidden: nn::Linear<B>,
    head: nn::Linear<B>,
}

impl<B: Backend> ForwardModel<B> for Net<B> {
    type Input = Tensor<B, 4>;
    type Target = Tensor<B, 1, Int>;
    type Output = Tensor<B, 2>;

    fn forward(&self, x: Tensor<B, 4>, probe: &mut Probe<B>) -> Tensor<B, 2> {
        let x = probe.stage(x, |x, probe| relu(probe.conv2d(&self.conv, x)));
        let x = probe.stage(x, |x, probe| relu(probe.linear(&self.hidden, x.flatten::<2>(1, 3))));
        probe.linear(&self.head, x)
    }

    fn losses(&self, logits: Tensor<B, 2>, labels: Tensor<B, 1, Int>) -> Tensor<B, 1> {
        cross_entropy(logits, labels)
    }

    fn classification(
        &self,
        logits: &Tensor<B, 2>,
        labels: &Tensor<B, 1, Int>,
    ) -> Option<(Tensor<B, 2>, Tensor<B, 1, Int>)> {
        Some((logits.clone(), labels.clone()))
    }
}

type Train = Arc<dyn DataLoader<AB, ImageBatch<B>>>;
type Test = Arc<dyn DataLoader<B, ImageBatch<B>>>;

/// Trains by either learner: they take the same batches, and give the same metrics.
fn fit<L>(learner: L, monitor: &Monitor, args: &Args, train: Train, test: Test) -> Result<L::InnerModule>
where
    L: TrainStep<Input = ImageBatch<B>> + AutodiffModule<AB> + Display + 'static,
    L::InnerModule: InferenceStep<Input = ImageBatch<B>>,
    L::Output: ItemLazy<ItemSync = StepOutput<Flex>>,
    <L::InnerModule as InferenceStep>::Output: ItemLazy<ItemSync = StepOutput<Flex>>,
{
    // the format of Burn's DefaultRecorder, in files that are whole or absent
    let recorder = AtomicRecorder::default();
    let barrier = recorder.barrier();
    let mut training = SupervisedTraining::new(&args.artifact_dir, barrier.gate(train), test)
        .metrics((LossMetric::<Flex>::new(), AccuracyMetric::<Flex>::new()))
        .num_epochs(args.epochs)
        .with_checkpointing_strategy(barrier.track(KeepLastNCheckpoints::new(2)))
        .with_file_checkpointer(recorder)
        .summary();
    if let Some(epoch) = args.resume.filter(|epoch| *epoch > 0) {
        training = training.checkpoint(epoch);
    }
    monitor.stop_with(training.interrupter());
    let optimizer = AdamWConfig::new().init::<AB, L>();
    let result = training.launch(Learner::new(learner, optimizer, 5e-3));
    monitor.error().map_or(Ok(result.model), |error| Err(error.into()))
}

fn run(args: Args) -> Result<()> {
    ensure!(args.epochs > 0, "--epochs 0: use at least 1");
    let start = args.resume.unwrap_or(0);
    ensure!(start < args.epochs, "--resume {start}: use less than the {} epochs of --epochs", args.epochs);
    let checkpoint = args.artifact_dir.join(format!("checkpoint/model-{start}.mpk"));
    ensure!(start == 0 || checkpoint.exists(), "--resume {start}: there is no {}", checkpoint.display());

    let device = flops_examples::backend::device()?;
    let split = digits::load(8)?;
    let batcher = ImageBatcher::new(8, Normalization { mean: [0.5; 3], std: [0.5; 3] })?;
    let train = EpochLoader::new(Arc::new(split.train), InnerBatcher(batcher.clone()), 64, device.clone())?;
    // so that the epochs after a checkpoint have the batches that they would have had
    let train: Train = Arc::new(train.shuffled(args.seed).starting_at_epoch(start as u64));
    let test: Test = Arc::new(EpochLoader::new(Arc::new(split.test), batcher, 128, device.clone())?);

    <AB as burn::tensor::backend::Backend>::seed(&device, args.seed);
    let net = Net {
        conv: nn::conv::Conv2dConfig::new([3, 8], [3, 3]).init::<AB>(&device),
        hidden: nn::LinearConfig::new(8 * 6 * 6, 64).init(&device),
        head: nn::LinearConfig::new(64, 10).init(&device),
    };
    let model = if args.backprop {
        let learner = BackpropLearner::new(net);
        let monitor = learner.monitor();
        fit(learner, &monitor, &args, train, test)?.model
    } else {
        let config = ForwardConfig::new(QueryBudget::new(20, 1)?).with_seed(args.seed).with_threads(2);
        let learner = ForwardLearner::new(net, AnyAllocator::new(AllocatorKind::Neyman, &device)?, config)?;
        let monitor = learner.monitor();
        fit(learner, &monitor, &args, train, test)?.model
    };
    let path = args.artifact_dir.join("model");
    let saved = model.save_file(&path, &AtomicRecorder::default());
    saved.with_context(|| format!("saving {}", path.display()))?;
    println!("{} holds the model, checkpoints and metrics", args.artifact_dir.display());
    Ok(())
}

fn main() -> ExitCode {
    cli::run(run)
}
