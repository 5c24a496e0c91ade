//! Fine-tunes a pretrained ViT with forward passes only, and reports what it cost.
//!
//! ```text
//! cargo run --release --example vit_cifar
//! cargo run --release --example vit_cifar -- \
//!     --dataset cifar10 --data-dir path/to/cifar-10-batches-bin --reset-head
//! cargo run --release --example vit_cifar -- --method backprop
//! ```
//!
//! The file reads in the order of a run: settings, data, model, learner, fit, report. The artifact
//! folder is described in [`flops_examples::run::artifacts`].
// devices are `Copy` on some backends only
#![allow(clippy::clone_on_copy)]

#[macro_use]
extern crate flops_report;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use burn::data::dataloader::DataLoader;
use burn::data::dataloader::batcher::Batcher;
use burn::module::AutodiffModule;
use burn::prelude::*;
use clap::Parser;
use flops_core::allocator::{AllocatorKind, AnyAllocator};
use flops_core::{
    BackpropLearner, EpochLoader, ForwardConfig, ForwardLearner, ForwardModel, InnerBatcher, Recipe, infer,
};
use flops_examples::backend::{self, AB, B, Device};
use flops_examples::cli::forward_args::ForwardArgs;
use flops_examples::cli::inputs::Inputs;
use flops_examples::cli::method::Method;
use flops_examples::run::artifacts::{Artifacts, Settings, merge};
use flops_examples::run::curves;
use flops_examples::run::dry_run::{RunSize, forecast, measure, parameters};
use flops_examples::run::fit::{TrainedRun, fit, resumable};
use flops_examples::run::format::thousands;
use flops_examples::run::history::{History, Row, Split};
use flops_examples::run::optimizer::{OptimizerKind, groups};
use flops_examples::run::plan::RunPlan;
use flops_examples::run::prefixes::{prefix_bytes, prefixes_fit};
use flops_examples::{BURN_VERSION, cli};
use flops_vit::checkpoint::{Card, Pretrained, Source};
use flops_vit::data::{Augment, DatasetSpec, ImageBatch, ImageBatcher, ImageDataset, ImageItem, Padding};
use flops_vit::{FineTuning, Noise, Pool, Scope, Sites, ViT};
use serde_json::{Value, json};

/// Images of a batch when the test set is evaluated.
const TEST_BATCH: usize = 250;
/// Images of one forward pass of a thread when the test set is evaluated.
const TEST_ROWS: usize = 32;
/// The most bytes of training images.
const IMAGE_BYTES: usize = 8 << 30;
/// The folder of the model for `transformers`.
const FOLDER: &str = "huggingface";
/// The file of the adapters and the head that `lora:R` trained.
const ADAPTERS: &str = "adapters.safetensors";
/// Settings that do not change the result: a resumed run may have other values.
const FREE_SETTINGS: [&str; 4] = ["data_dir", "threads", "prefix_cache", "memory_bound"];

// ---- the run ------------------------------------------------------------------------------------

fn main() -> ExitCode {
    cli::run(run)
}

fn run(args: Args) -> Result<()> {
    let args = args.with_recommended_noise();
    let config = args.validate()?;
    // a dry run leaves the folder to a run that uses it
    let dir = &args.artifact_dir;
    let artifacts = if args.dry_run { Artifacts::read_only(dir) } else { Artifacts::open(dir)? };
    let device = backend::device()?;

    let pretrained = args.inputs.model::<AB>(&device)?;
    let data = Data::load(&args, &pretrained.card, config.estimator.threads, &device)?;
    let config = with_prefix_caches(config, &args, &data, &pretrained.card);
    let lr = args.lr.unwrap_or(FineTuning::new(&pretrained.card.config, args.scope).lr);
    let settings = args.settings(&config, lr)?;
    if args.resume {
        artifacts.check_resumable(&settings, &FREE_SETTINGS)?;
    }

    let new_head = args.reset_head || pretrained.card.classes != data.train.classes;
    let Pretrained { model, card } = prepare(pretrained, new_head, &args, &data.train.classes)?;
    let run = Run { args, config, lr, settings, artifacts, device, data };
    if run.args.dry_run {
        return run.dry_run(model, &card);
    }

    let start = run.start(&model, new_head)?;
    let trained = run.fit(model, &start)?;
    run.report(trained, &start.before, card)
}

// ---- settings -----------------------------------------------------------------------------------

/// Fine-tune a vision transformer with forward passes only.
#[derive(Parser, Debug)]
#[command(name = "vit_cifar", version)]
struct Args {
    /// How gradients are obtained: forward (this library's defaults), backprop, or the settings of
    /// another method: flops (the paper), mezo, fzoo, es (evolution strategies), eggroll, lozo,
    /// zo-muon, pseuzo.
    #[arg(long, default_value = "forward")]
    method: Method,
    /// cifar10, cifar100, digits (embedded) or folder:PATH (a sub-folder per class).
    #[arg(long, default_value = "digits")]
    dataset: DatasetSpec,
    #[command(flatten)]
    inputs: Inputs,
    /// The most training images, and the most test images; they are spread evenly over the data
    /// set.
    #[arg(long)]
    limit: Option<usize>,
    /// Train on this many images per class, drawn by the seed; --limit then applies to the test
    /// images only.
    #[arg(long)]
    shots: Option<usize>,
    /// Flip training images horizontally with probability 1/2, drawn anew in each epoch. Prefixes
    /// are then not kept, which takes time.
    #[arg(long)]
    flip: bool,
    /// Pad training images with this many black pixels on each side and crop them at random, anew
    /// in each epoch. Prefixes are then not kept, as with --flip.
    #[arg(long, default_value_t = 0)]
    crop: usize,
    /// Start from a new head even if the checkpoint has the same classes.
    #[arg(long)]
    reset_head: bool,
    /// The trained parameters: head, cls_tail, bias_norm, last:K, lora:R (adapters of rank R) or
    /// full.
    #[arg(long, default_value = "cls_tail")]
    scope: Scope,
    /// Where activation noise falls: linear (on the output of every layer) or branch (on what each
    /// residual branch adds) [default: linear; branch for last:K and full].
    #[arg(long)]
    sites: Option<Sites>,
    #[command(flatten)]
    forward: ForwardArgs,
    /// Copies of each training image, shifted at random [default: 4 for digits, which are few,
    /// otherwise none].
    #[arg(long)]
    copies: Option<usize>,
    /// The most pixels by which a copy is shifted, in each direction.
    #[arg(long, default_value_t = 1)]
    shift: usize,
    /// Passes over the training images and their copies.
    #[arg(long, default_value_t = 24)]
    epochs: usize,
    /// Images of a step.
    #[arg(long, default_value_t = 64)]
    batch_size: usize,
    /// Optimizer: adamw, or muon (Muon on matrices, AdamW on vectors) [default: the method's, muon
    /// for zo-muon, otherwise adamw].
    #[arg(long, value_enum)]
    optimizer: Option<OptimizerKind>,
    /// The learning rate; it falls to zero as a cosine over all epochs [default: from
    /// flops_vit::FineTuning, by model and scope; 0.005 for the shipped model and cls_tail].
    #[arg(long, allow_negative_numbers = true)]
    lr: Option<f64>,
    /// The learning rate of the head, as a multiple of --lr.
    #[arg(long, default_value_t = FineTuning::HEAD_LR_FACTOR, allow_negative_numbers = true)]
    head_lr_factor: f64,
    /// The learning rate of the embeddings of patches, classes and positions, as a multiple of --lr.
    #[arg(long, default_value_t = FineTuning::EMBED_LR_FACTOR, allow_negative_numbers = true)]
    embed_lr_factor: f64,
    /// Decay of the squared gradients that AdamW divides by, at least 0 and below 1.
    #[arg(long, default_value_t = FineTuning::BETA_2, allow_negative_numbers = true)]
    beta_2: f32,
    /// Decoupled weight decay, in units of the learning rate.
    #[arg(long, default_value_t = FineTuning::WEIGHT_DECAY, allow_negative_numbers = true)]
    weight_decay: f64,
    /// Seed of the order, the noise, the allocation, the head and the adapters.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Recompute the frozen layers before the scope in each epoch, instead of keeping their
    /// outputs.
    #[arg(long)]
    no_prefix_cache: bool,
    /// Continue the run in the artifact folder after its last finished epoch.
    #[arg(long)]
    resume: bool,
    /// Print what the run would take, measured on two steps that are discarded, and stop.
    #[arg(long)]
    dry_run: bool,
    /// Stop after this epoch; --resume continues.
    #[arg(long)]
    stop_after: Option<usize>,
    /// Folder of the run's files.
    #[arg(long, default_value = "artifacts/vit_cifar")]
    artifact_dir: PathBuf,
    /// Print plain lines instead of the terminal interface.
    #[arg(long)]
    plain: bool,
}

impl Args {
    /// Fills in the noise that [`flops_vit::Noise`] recommends for the scope, where no flag says
    /// otherwise.
    ///
    /// The settings of another method, or of another space, stay as they are.
    fn with_recommended_noise(mut self) -> Self {
        let (noise, forward) = (Noise::new(self.scope), &mut self.forward);
        let other = [forward.space.is_some(), forward.control_variate.is_some()].contains(&true);
        if self.method == Method::Forward(Recipe::Default) && !other {
            self.sites.get_or_insert(noise.sites);
            if *forward.estimate.get_or_insert(noise.estimate) == noise.estimate {
                forward.sigma.get_or_insert(noise.sigma);
            }
        }
        self.sites.get_or_insert_default();
        self
    }

    /// Checks the flags before anything is loaded, and returns the settings of the learner.
    fn validate(&self) -> Result<ForwardConfig> {
        ensure!(self.epochs > 0, "--epochs 0: train for at least 1 epoch");
        ensure!(self.batch_size > 0, "--batch-size 0: use at least 1 image");
        ensure!(self.limit != Some(0), "--limit 0: use at least 1 image");
        ensure!(self.shots != Some(0), "--shots 0: use at least 1 image of every class");
        ensure!(self.crop <= 1000, "--crop {}: use at most 1000 pixels", self.crop);
        ensure!(self.copies() <= 1000, "--copies {}: use at most 1000", self.copies());
        ensure!(self.shift <= 1000, "--shift {}: use at most 1000 pixels", self.shift);
        if let Some(lr) = self.lr {
            ensure!(lr > 0.0 && lr <= 1.0, "--lr {lr}: use a number above 0 and at most 1");
        }
        for (flag, factor) in [("head", self.head_lr_factor), ("embed", self.embed_lr_factor)] {
            ensure!(factor.is_finite() && factor > 0.0, "--{flag}-lr-factor {factor}: use a number above 0");
        }
        let beta = self.beta_2;
        ensure!((0.0..1.0).contains(&beta), "--beta-2 {beta}: use a number from 0 to below 1");
        let decay = self.weight_decay;
        ensure!((0.0..=1.0).contains(&decay), "--weight-decay {decay}: use a number from 0 to 1");
        if let Some(epoch) = self.stop_after {
            ensure!((1..=self.epochs).contains(&epoch), "--stop-after {epoch}: use 1 to {}, the epochs", self.epochs);
        }
        self.forward.config(self.method.recipe(), self.seed)
    }

    /// Returns the number of copies of each training image.
    fn copies(&self) -> usize {
        self.copies.unwrap_or(if self.dataset == DatasetSpec::Digits { 4 } else { 0 })
    }

    /// Returns how training images are changed in each epoch, if they are.
    fn augmentation(&self) -> Option<Augment> {
        let augment = Augment { flip: self.flip, shift: self.crop, padding: Padding::Black, seed: self.seed };
        (self.flip || self.crop > 0).then_some(augment)
    }

    /// Returns every setting of the run, by the name of its flag.
    fn settings(&self, config: &ForwardConfig, lr: f64) -> Result<Settings> {
        let mut settings = json!({
            "method": self.method.name(),
            "backend": backend::NAME,
            "dataset": self.dataset.to_string(),
            "data_dir": self.inputs.data_dir.as_ref().map(|p| p.display().to_string()),
            "limit": self.limit,
            "shots": self.shots,
            "flip": self.flip,
            "crop": self.crop,
            "weights": self.inputs.weights.as_ref().map(Source::to_string),
            "img_size": self.inputs.img_size,
            "reset_head": self.reset_head,
            "copies": self.copies(),
            "shift": self.shift,
            "scope": self.scope.to_string(),
            "sites": self.sites.map(|sites| sites.to_string()),
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "optimizer": self.optimizer().name(),
            "lr": lr,
            "head_lr_factor": self.head_lr_factor,
            "embed_lr_factor": self.embed_lr_factor,
            "beta_2": self.beta_2,
            "weight_decay": self.weight_decay,
            "seed": self.seed,
        });
        if self.method.is_forward() {
            let forward = self.forward.settings(self.method.recipe(), config)?;
            merge(&mut settings, forward);
        }
        settings.as_object().cloned().context("settings are an object")
    }

    /// Returns the allocator that was given, otherwise the method's.
    fn allocator(&self) -> Result<AllocatorKind> {
        self.forward.allocator(self.method.recipe())
    }

    /// Returns the optimizer that was given, otherwise the method's.
    fn optimizer(&self) -> OptimizerKind {
        self.optimizer.unwrap_or(OptimizerKind::of(self.method.recipe()))
    }

    /// Returns the method in a few words.
    fn description(&self) -> String {
        match self.method {
            Method::Backprop => "backpropagation".to_string(),
            method => {
                let allocator = self.allocator().map_or("", AllocatorKind::name);
                let name = if method.recipe() == Recipe::Default { "forward-only" } else { method.name() };
                format!("{name}, {allocator} allocator, {} queries per image", self.forward.queries)
            }
        }
    }
}

// ---- data ---------------------------------------------------------------------------------------

/// The images of a run.
struct Data {
    train: Arc<ImageDataset>,
    test: Arc<dyn DataLoader<B, ImageBatch<B>>>,
    batcher: ImageBatcher,
    skipped: usize,
}

impl Data {
    /// Loads the images at the size that the model takes.
    fn load(args: &Args, card: &Card, threads: usize, device: &Device) -> Result<Self> {
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

    /// Returns the training images as batches of `batcher`, shuffled and augmented anew in each
    /// epoch.
    fn train_loader<O: Send + 'static>(
        &self,
        batcher: impl Batcher<AB, ImageItem, O> + 'static,
        args: &Args,
        first_epoch: usize,
        device: &Device,
    ) -> Result<Arc<dyn DataLoader<AB, O>>> {
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
fn with_prefix_caches(config: ForwardConfig, args: &Args, data: &Data, card: &Card) -> ForwardConfig {
    let (train, test) = (data.train.items.len(), data.test.num_items());
    let fits = |images: usize| prefixes_fit(&card.config, images);
    let train = if args.no_prefix_cache || args.augmentation().is_some() || !fits(train) { 0 } else { train };
    let test = if args.no_prefix_cache || !fits(train + test) { 0 } else { test };
    config.with_prefix_cache(train).with_evaluation_cache(test)
}

// ---- model --------------------------------------------------------------------------------------

/// Gives the model a head for `classes` and adapters where they are needed, and freezes what is not
/// trained.
fn prepare(pretrained: Pretrained<AB>, new_head: bool, args: &Args, classes: &[String]) -> Result<Pretrained<AB>> {
    let (theirs, ours) = (pretrained.card.classes.len(), classes.len());
    if new_head && theirs != ours {
        println!("the head of {theirs} classes does not fit data of {ours}: a new one is used");
    } else if let Some((theirs, ours)) = pretrained.card.classes.iter().zip(classes).find(|(a, b)| a != b) {
        println!("the head has the class {theirs} where the data has {ours}: a new one is used");
    }
    let pretrained = if new_head { pretrained.with_new_head(classes.to_vec(), args.seed) } else { pretrained };
    let pretrained = match args.scope {
        Scope::Lora(rank) => pretrained.with_lora(rank, args.seed)?,
        _ => pretrained,
    };
    let Pretrained { model, card } = pretrained.with_scope(args.scope)?;
    Ok(Pretrained { model: model.with_sites(args.sites.unwrap_or_default()), card })
}

/// Returns the mean loss and the accuracy on the test images.
fn evaluate(model: &ViT<B>, loader: &dyn DataLoader<B, ImageBatch<B>>, threads: usize) -> (f64, f64) {
    let (mut loss, mut correct, mut total) = (0.0, 0i64, 0usize);
    for batch in loader.iter() {
        let n = batch.ids.len();
        let logits = infer(model, &batch.input, n, TEST_ROWS, threads);
        let predicted = logits.clone().argmax(1).reshape([n]);
        correct += predicted.equal(batch.target.clone()).int().sum().into_scalar().elem::<i64>();
        loss += model.losses(logits, batch.target).sum().into_scalar().elem::<f64>();
        total += n;
    }
    (loss / total as f64, correct as f64 / total as f64)
}

// ---- learner and fit ----------------------------------------------------------------------------

/// A run whose settings and data are known.
struct Run {
    args: Args,
    config: ForwardConfig,
    lr: f64,
    settings: Settings,
    artifacts: Artifacts,
    device: Device,
    data: Data,
}

/// Where training starts.
struct Start {
    /// The epoch that training goes on after.
    resume: Option<usize>,
    history: History,
    /// The evaluation of the model before training.
    before: Row,
}

impl Run {
    fn forward_learner(&self, model: ViT<AB>) -> Result<ForwardLearner<AB, ViT<AB>, AnyAllocator<AB>>> {
        let allocator = AnyAllocator::<AB>::new(self.args.allocator()?, &self.device)?;
        Ok(ForwardLearner::new(model, allocator, self.config.clone())?)
    }

    fn backprop_learner(&self, model: ViT<AB>) -> BackpropLearner<AB, ViT<AB>> {
        BackpropLearner::new(model)
            .with_prefix_cache(self.config.prefix_cache)
            .with_evaluation_cache(self.config.evaluation_cache)
            .with_threads(self.config.estimator.threads)
    }

    /// Returns the batches of a forward-only learner, without a graph.
    fn forward_loader(&self, first_epoch: usize) -> Result<Arc<dyn DataLoader<AB, ImageBatch<B>>>> {
        self.data.train_loader(InnerBatcher(self.data.batcher.clone()), &self.args, first_epoch, &self.device)
    }

    /// Returns the same batches for backpropagation.
    fn backprop_loader(&self, first_epoch: usize) -> Result<Arc<dyn DataLoader<AB, ImageBatch<AB>>>> {
        self.data.train_loader(self.data.batcher.clone(), &self.args, first_epoch, &self.device)
    }

    /// Starts a new run with an evaluation of the untrained model, or finds the epoch to resume
    /// from.
    fn start(&self, model: &ViT<AB>, new_head: bool) -> Result<Start> {
        let (resume, history) = if self.args.resume {
            let (epoch, history) = resumable(&self.artifacts)?;
            (Some(epoch), history)
        } else {
            let (loss, accuracy) = evaluate(&model.valid(), &*self.data.test, self.config.estimator.threads);
            let mut history = History::default();
            history.push(Row::new(Split::Test, 0, loss, accuracy));
            self.artifacts.start(&self.settings)?;
            (None, history)
        };
        let before = history.of(Split::Test).next().cloned();
        let before = before.context("metrics.csv has no row of epoch 0; start a new run")?;
        println!(
            "{} on {}: {} training images, scope {}, {}, test accuracy before {:.2} %",
            self.args.method.name(),
            self.args.dataset,
            self.data.train.items.len(),
            self.args.scope,
            if new_head { "new head" } else { "the checkpoint's head" },
            100.0 * before.accuracy,
        );
        if let Some(epoch) = resume {
            println!("going on after epoch {epoch} of {}", self.args.epochs);
        }
        Ok(Start { resume, history, before })
    }

    /// Trains the model with burn-train.
    fn fit(&self, model: ViT<AB>, start: &Start) -> Result<TrainedRun<ViT<B>>> {
        let args = &self.args;
        let plan = |monitor| RunPlan {
            artifacts: &self.artifacts,
            device: self.device.clone(),
            lr: self.lr,
            optimizer: args.optimizer(),
            groups: groups(args.head_lr_factor, args.embed_lr_factor),
            beta_2: args.beta_2,
            weight_decay: args.weight_decay as f32,
            steps: args.epochs * self.data.train.items.len().div_ceil(args.batch_size),
            last_epoch: args.stop_after.unwrap_or(args.epochs),
            resume: start.resume,
            monitor,
            plain: args.plain,
        };
        let (test, history, first_epoch) = (self.data.test.clone(), start.history.clone(), start.resume.unwrap_or(0));
        if args.method.is_forward() {
            let learner = self.forward_learner(model)?;
            let plan = plan(Some(learner.monitor()));
            let trained = fit(learner, self.forward_loader(first_epoch)?, test, history, plan)?;
            Ok(trained.map(|learner| learner.model))
        } else {
            let learner = self.backprop_learner(model);
            let trained = fit(learner, self.backprop_loader(first_epoch)?, test, history, plan(None))?;
            Ok(trained.map(|learner| learner.model))
        }
    }

    /// Prints what the run would take.
    fn dry_run(&self, model: ViT<AB>, card: &Card) -> Result<()> {
        let (args, config) = (&self.args, &self.config);
        let size = RunSize {
            images: self.data.train.items.len(),
            batch_size: args.batch_size,
            epochs: args.epochs,
            queries: if args.method.is_forward() { args.forward.queries } else { 0 },
            prefix_bytes: if config.prefix_cache > 0 { prefix_bytes(&card.config) } else { 0 },
            evaluation_bytes: config.evaluation_cache * prefix_bytes(&card.config),
        };
        let parameters = parameters(&model);
        let empty = "there are no training images";
        let measured = if args.method.is_forward() {
            let learner = self.forward_learner(model)?;
            let monitor = learner.monitor();
            let batch = self.forward_loader(0)?.iter().next().context(empty)?;
            let measured = measure(learner, batch, || Some(monitor.ledger()));
            if let Some(error) = monitor.error() {
                return Err(error.into());
            }
            measured
        } else {
            let batch = self.backprop_loader(0)?.iter().next().context(empty)?;
            measure(self.backprop_learner(model), batch, || None)
        };
        println!("\n{}, scope {}, {}: nothing is trained", args.dataset, args.scope, args.description());
        for (name, value) in forecast(&size, &measured, parameters) {
            println!("  {name:<28}{value:>16}");
        }
        Ok(())
    }
}

// ---- report -------------------------------------------------------------------------------------

impl Run {
    /// Evaluates the trained model, writes the files of the run and prints its table.
    fn report(&self, trained: TrainedRun<ViT<B>>, before: &Row, mut card: Card) -> Result<()> {
        let (loss, accuracy) = evaluate(&trained.learner, &*self.data.test, self.config.estimator.threads);
        let summary = self.summary(&trained, before, (loss, accuracy));
        let args = &self.args;
        card.description = format!(
            "{}; fine-tuned on {} ({}, scope {}, {} epochs, seed {}): test accuracy {:.2} %",
            card.description,
            args.dataset,
            args.method.name(),
            args.scope,
            epochs_done(&trained.history),
            args.seed,
            100.0 * accuracy
        );
        let more = self.save_model(&Pretrained { model: trained.learner, card })?;
        trained.history.write(&self.artifacts)?;
        let title = format!("{}, scope {}, {}", args.dataset, args.scope, args.description());
        self.artifacts.write("curves.svg", curves::draw(&trained.history, &title)?.as_bytes())?;
        self.artifacts.write_json("summary.json", &summary)?;
        print_table(args, &summary);
        println!(
            "\n{} holds summary.json, metrics.csv, curves.svg{more} and model.safetensors",
            self.artifacts.dir().display()
        );
        Ok(())
    }

    /// Saves the model, and returns the names of the other forms that were saved.
    fn save_model(&self, tuned: &Pretrained<B>) -> Result<String> {
        let mut more = String::new();
        tuned.save(&self.artifacts.path("model.safetensors"))?;
        let folder = tuned.card.config.pool == Pool::Token;
        if folder {
            tuned.save_huggingface(&self.artifacts.path(FOLDER))?;
        }
        if tuned.model.lora_rank().is_some() {
            tuned.save_adapters(&self.artifacts.path(ADAPTERS))?;
            more += &format!(", {ADAPTERS}");
        }
        if folder {
            more += &format!(", the folder {FOLDER} for transformers");
        }
        Ok(more)
    }

    /// Returns what `summary.json` holds.
    fn summary(&self, trained: &TrainedRun<ViT<B>>, before: &Row, (loss, accuracy): (f64, f64)) -> Value {
        let (history, settings) = (&trained.history, &self.settings);
        let forward = self.args.method.is_forward();
        // what uniform allocation would give is known only for noise that is independent between
        // the images
        let independent = forward && self.config.estimator.space.is_independent();
        let mut summary = Value::Object(settings.clone());
        let more = json!({
            "allocator": settings.get("allocator"),
            "variance": settings.get("variance"),
            "advice": trained.advice,
            "space": settings.get("space"),
            "noise": settings.get("noise"),
            "sampling": settings.get("sampling"),
            "placement": settings.get("placement"),
            "control_variate": settings.get("control_variate"),
            "sigma": settings.get("sigma"),
            "accuracy_before": before.accuracy,
            "accuracy_after": accuracy,
            "loss_before": before.loss,
            "loss_after": loss,
            "query_budget": if forward { self.query_budget(history) } else { 0 },
            "queries_used": history.queries(),
            "queries_dropped": history.of(Split::Train).filter_map(|row| row.dropped).sum::<u64>(),
            "steps": history.steps(),
            "epochs_done": epochs_done(history),
            "seconds": history.seconds(),
            "variance_vs_uniform": history.mean(|row| row.variance_vs_uniform).filter(|_| independent),
            "floor": history.mean(|row| row.floor).filter(|_| independent),
            "train_images": self.data.train.items.len(),
            "skipped_images": self.data.skipped,
            "site_reports": history.sites(),
            "stopped": trained.stopped,
            "config": settings,
            "versions": {"flops": env!("CARGO_PKG_VERSION"), "burn": BURN_VERSION},
        });
        merge(&mut summary, more);
        summary
    }

    /// Returns the budget of the steps so far: A₀ queries for each of their images.
    fn query_budget(&self, history: &History) -> u64 {
        let (images, batch_size) = (self.data.train.items.len(), self.args.batch_size);
        let steps_per_epoch = images.div_ceil(batch_size) as u64;
        let seen: usize = (0..history.steps())
            .map(|step| (step % steps_per_epoch) as usize * batch_size)
            .map(|start| batch_size.min(images - start))
            .sum();
        (seen * self.args.forward.queries) as u64
    }
}

fn epochs_done(history: &History) -> usize {
    history.of(Split::Test).next_back().map_or(0, |row| row.epoch)
}

fn print_table(args: &Args, summary: &Value) {
    let number = |key: &str| summary[key].as_f64();
    let count = |key: &str| summary[key].as_u64().map_or("–".into(), thousands);
    let percent = |key: &str| number(key).map_or("–".into(), |v| format!("{:.2} %", 100.0 * v));
    let decimal = |key: &str, digits: usize| number(key).map_or("–".into(), |v| format!("{v:.digits$}"));
    println!("\n{}, scope {}, {}", args.dataset, args.scope, args.description());
    let mut rows = vec![
        ("test accuracy before", percent("accuracy_before")),
        ("test accuracy after", percent("accuracy_after")),
        ("test loss before", decimal("loss_before", 4)),
        ("test loss after", decimal("loss_after", 4)),
        ("steps", count("steps")),
        ("seconds", decimal("seconds", 1)),
    ];
    if args.method.is_forward() {
        rows.push(("query budget", count("query_budget")));
        rows.push(("queries used", count("queries_used")));
        rows.push(("variance relative to uniform", decimal("variance_vs_uniform", 3)));
        rows.push(("floor 1/(1 + CV²)", decimal("floor", 3)));
    }
    for (name, value) in rows {
        println!("  {name:<30}{value:>12}");
    }
}
