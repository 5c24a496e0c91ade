//! Fine-tunes a pretrained ViT with forward passes only, and says what it cost.
//!
//! ```text
//! cargo run --release --example vit_cifar
//! cargo run --release --example vit_cifar -- --dataset cifar10 --data-dir path/to/cifar-10-batches-bin --reset-head
//! cargo run --release --example vit_cifar -- --method backprop
//! ```
//!
//! The artifact folder is described in [`flops_examples::artifacts`].
// devices are `Copy` on some backends only
#![allow(clippy::clone_on_copy)]

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
use flops_core::{BackpropLearner, EpochLoader, ForwardConfig, ForwardLearner, ForwardModel, Plain, Recipe, infer};
use flops_examples::artifacts::{Artifacts, Settings, merge};
use flops_examples::backend::{self, AB, B, Device};
use flops_examples::dry_run::{Planned, forecast, measure, parameters};
use flops_examples::fit::{self, Plan, fit};
use flops_examples::groups::LrGroup;
use flops_examples::history::{History, Row, Split};
use flops_examples::inputs::Inputs;
use flops_examples::method::{Method, Spending};
use flops_examples::renderer::thousands;
use flops_examples::{BURN_VERSION, cli, curves};
use flops_vit::checkpoint::{self, Card, Source, hf};
use flops_vit::data::{Augment, DatasetSpec, ImageBatch, ImageBatcher, ImageDataset, ImageItem, Padding};
use flops_vit::{FineTuning, Pool, Scope, ViT};
use serde_json::{Value, json};

/// Images of a batch when the test set is evaluated, and of each pass over a part of it.
const TEST_BATCH: usize = 250;
const TEST_ROWS: usize = 32;
/// Memory that kept prefixes of frozen blocks may take.
const PREFIX_CACHE_BYTES: usize = 1 << 30;
/// Memory that the training images may take.
const IMAGE_BYTES: usize = 8 << 30;
/// The model as a folder that `transformers` loads.
const FOLDER: &str = "huggingface";
/// The file of what `lora:R` trained, without the model.
const ADAPTERS: &str = "adapters.safetensors";
/// Settings that do not change what is computed: a resumed run may have others.
const FREE_SETTINGS: [&str; 4] = ["data_dir", "threads", "prefix_cache", "memory_bound"];

/// Fine-tune a vision transformer with forward passes only.
#[derive(Parser, Debug)]
#[command(name = "vit_cifar", version)]
struct Args {
    /// How gradients are obtained: forward (this library's way), backprop, or by the settings of another method: flops (the paper),
    /// mezo, fzoo, es (evolution strategies), eggroll.
    #[arg(long, default_value = "forward")]
    method: Method,
    /// cifar10, cifar100, digits (embedded) or folder:PATH (a sub-folder per class).
    #[arg(long, default_value = "digits")]
    dataset: DatasetSpec,
    #[command(flatten)]
    inputs: Inputs,
    /// Use at most this many training and this many test images, spread evenly over the data set.
    #[arg(long)]
    limit: Option<usize>,
    /// Train on this many images of every class, drawn by the seed; --limit then holds for the test images alone.
    #[arg(long)]
    shots: Option<usize>,
    /// Mirror every second training image, drawn anew in each epoch; prefixes of frozen blocks are then not kept, which takes time.
    #[arg(long)]
    flip: bool,
    /// Crop each training image to its size after padding it with this many black pixels on each side, at a place drawn anew in each
    /// epoch; prefixes are then not kept, as with --flip.
    #[arg(long, default_value_t = 0)]
    crop: usize,
    /// Start from a new head even where the checkpoint has the same classes.
    #[arg(long)]
    reset_head: bool,
    /// What is trained: head, cls_tail, bias_norm, last:K, lora:R (adapters of rank R) or full.
    #[arg(long, default_value = "cls_tail")]
    scope: Scope,
    #[command(flatten)]
    spending: Spending,
    /// Copies of each training image beside it, moved at random [default: 4 for digits, which are few, otherwise none].
    #[arg(long)]
    copies: Option<usize>,
    /// The most pixels a copy is moved by, in each direction.
    #[arg(long, default_value_t = 1)]
    shift: usize,
    /// Passes over the training images and their copies.
    #[arg(long, default_value_t = 24)]
    epochs: usize,
    /// Images of a step.
    #[arg(long, default_value_t = 64)]
    batch_size: usize,
    /// AdamW's learning rate; it falls to zero as a cosine over all epochs [default: flops_vit::FineTuning's for model and scope, 0.005 for
    /// the shipped one and cls_tail].
    #[arg(long, allow_negative_numbers = true)]
    lr: Option<f64>,
    /// The head learns at this multiple of the learning rate.
    #[arg(long, default_value_t = FineTuning::HEAD_LR_FACTOR, allow_negative_numbers = true)]
    head_lr_factor: f64,
    /// Decoupled weight decay, in units of the learning rate.
    #[arg(long, default_value_t = FineTuning::WEIGHT_DECAY, allow_negative_numbers = true)]
    weight_decay: f64,
    /// Seed of order, noise, allocation, head and adapters.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Compute what lies before the scope anew in each epoch.
    #[arg(long)]
    no_prefix_cache: bool,
    /// Go on with the run in the artifact folder after its last finished epoch.
    #[arg(long)]
    resume: bool,
    /// Say what the run would take, from two steps whose results are thrown away, and stop.
    #[arg(long)]
    dry_run: bool,
    /// Stop after this epoch, to go on with --resume another time.
    #[arg(long)]
    stop_after: Option<usize>,
    /// Where the run's files go.
    #[arg(long, default_value = "artifacts/vit_cifar")]
    artifact_dir: PathBuf,
    /// Plain lines instead of the terminal interface.
    #[arg(long)]
    plain: bool,
}

impl Args {
    /// What can be said before anything is loaded.
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
        let factor = self.head_lr_factor;
        ensure!(factor.is_finite() && factor > 0.0, "--head-lr-factor {factor}: use a number above 0");
        let decay = self.weight_decay;
        ensure!((0.0..=1.0).contains(&decay), "--weight-decay {decay}: use a number from 0 to 1");
        if let Some(epoch) = self.stop_after {
            ensure!((1..=self.epochs).contains(&epoch), "--stop-after {epoch}: use 1 to {}, the epochs", self.epochs);
        }
        self.spending.config(self.method.recipe(), self.seed)
    }

    /// Copies of each training image.
    fn copies(&self) -> usize {
        self.copies.unwrap_or(if self.dataset == DatasetSpec::Digits { 4 } else { 0 })
    }

    /// What each epoch changes of the training images, if anything.
    fn augmentation(&self) -> Option<Augment> {
        let augment = Augment { flip: self.flip, shift: self.crop, padding: Padding::Black, seed: self.seed };
        (self.flip || self.crop > 0).then_some(augment)
    }

    /// Every setting of the run, by its flag's name.
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
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "lr": lr,
            "head_lr_factor": self.head_lr_factor,
            "weight_decay": self.weight_decay,
            "seed": self.seed,
        });
        if self.method.is_forward() {
            let forward = self.spending.settings(self.method.recipe(), config)?;
            merge(&mut settings, forward);
        }
        settings.as_object().cloned().context("settings are an object")
    }
}

/// What the kept prefix of an image takes at most: keys, values and hidden state of every token.
fn prefix_bytes(card: &Card) -> usize {
    3 * card.config.num_tokens() * card.config.embed_dim * size_of::<f32>()
}

/// The training and the test images whose prefix in front of the scope may be kept: all, or none where they would take too much memory or
/// change from epoch to epoch.
fn prefix_caches(args: &Args, (train, test): (usize, usize), card: &Card) -> (usize, usize) {
    let fits = |images: usize| images.saturating_mul(prefix_bytes(card)) <= PREFIX_CACHE_BYTES;
    let train = if args.no_prefix_cache || args.augmentation().is_some() || !fits(train) { 0 } else { train };
    (train, if args.no_prefix_cache || !fits(train + test) { 0 } else { test })
}

/// Mean loss and accuracy on the test images.
fn evaluate(model: &ViT<B>, loader: &dyn DataLoader<B, ImageBatch<B>>, threads: usize) -> (f64, f64) {
    let (mut loss, mut right, mut all) = (0.0, 0i64, 0usize);
    for batch in loader.iter() {
        let n = batch.ids.len();
        let logits = infer(model, &batch.input, n, TEST_ROWS, threads);
        let named = logits.clone().argmax(1).reshape([n]);
        right += named.equal(batch.target.clone()).int().sum().into_scalar().elem::<i64>();
        loss += model.losses(logits, batch.target).sum().into_scalar().elem::<f64>();
        all += n;
    }
    (loss / all as f64, right as f64 / all as f64)
}

fn train(args: Args) -> Result<()> {
    let mut config = args.validate()?;
    let artifacts = Artifacts::open(&args.artifact_dir)?;
    let device = backend::device()?;

    let (model, mut card): (ViT<AB>, Card) = args.inputs.model(&device)?;
    let split = args.inputs.images(&args.dataset, &card, config.estimator.threads)?;
    let skipped = split.skipped.len();
    let train_data = match args.shots {
        Some(shots) => split.train.shots(shots, args.seed)?,
        None => split.train.limited(args.limit),
    };
    let test_data = split.test.limited(args.limit);
    let pixels = train_data.items.first().map_or(0, |item| item.pixels.len());
    ensure!(
        train_data.items.len().saturating_mul((args.copies() + 1) * pixels) <= IMAGE_BYTES,
        "--copies {}: the images would take more than {} GiB; use fewer",
        args.copies(),
        IMAGE_BYTES >> 30
    );
    let moves = Augment { flip: false, shift: args.shift, padding: Padding::Edge, seed: args.seed };
    let train_data = train_data.with_copies(args.copies(), &moves);
    let images = train_data.items.len();
    let (kept, evaluated) = prefix_caches(&args, (images, test_data.items.len()), &card);
    config = config.with_prefix_cache(kept).with_evaluation_cache(evaluated);
    let lr = args.lr.unwrap_or(FineTuning::new(&card.config, args.scope).lr);
    let settings = args.settings(&config, lr)?;
    if args.resume {
        artifacts.check_resumable(&settings, &FREE_SETTINGS)?;
    }

    let new_head = args.reset_head || card.classes != train_data.classes;
    if new_head && card.classes.len() != train_data.classes.len() {
        let (theirs, ours) = (card.classes.len(), train_data.classes.len());
        println!("the head of {theirs} classes does not fit data of {ours}: a new one is used");
    }
    let model = if new_head { model.with_new_head(train_data.classes.len(), args.seed) } else { model };
    card.config.num_classes = train_data.classes.len();
    card.classes = train_data.classes.clone();
    let model = match args.scope {
        Scope::Lora(rank) => model.with_lora(rank, args.seed)?,
        _ => model,
    };
    let model = model.with_scope(args.scope)?;

    let batcher = ImageBatcher::new(card.config.img_size, card.normalization)?;
    let test: EpochLoader<B, ImageItem, ImageBatch<B>> =
        EpochLoader::new(Arc::new(test_data), batcher.clone(), TEST_BATCH, device.clone())?;
    let test: Arc<dyn DataLoader<B, ImageBatch<B>>> = Arc::new(test);

    if args.dry_run {
        return dry_run(&args, &config, model, Arc::new(train_data), batcher, &card, &device);
    }
    let (resume, history) = if args.resume {
        let (epoch, history) = fit::resumable(&artifacts)?;
        (Some(epoch), history)
    } else {
        let (loss, accuracy) = evaluate(&model.valid(), &*test, config.estimator.threads);
        let mut history = History::default();
        history.push(Row::new(Split::Test, 0, loss, accuracy));
        artifacts.start(&settings)?;
        (None, history)
    };
    let before =
        history.of(Split::Test).next().cloned().context("metrics.csv has no row of epoch 0; start a new run")?;
    println!(
        "{} on {}: {images} training images, scope {}, {}, test accuracy before {:.2} %",
        args.method.name(),
        args.dataset,
        args.scope,
        if new_head { "new head" } else { "the checkpoint's head" },
        100.0 * before.accuracy,
    );
    if let Some(epoch) = resume {
        println!("going on after epoch {epoch} of {}", args.epochs);
    }

    let steps_per_epoch = images.div_ceil(args.batch_size);
    let loader = Training {
        data: Arc::new(train_data),
        batcher,
        args: &args,
        epoch: resume.unwrap_or(0),
        device: device.clone(),
    };
    let group = LrGroup { path: vec!["model", "head"], factor: args.head_lr_factor };
    let plan = |monitor| Plan {
        artifacts: &artifacts,
        device: device.clone(),
        lr,
        group: group.clone(),
        weight_decay: args.weight_decay as f32,
        steps: args.epochs * steps_per_epoch,
        last_epoch: args.stop_after.unwrap_or(args.epochs),
        resume,
        monitor,
        plain: args.plain,
    };
    let (model, history, stopped, advice) = match args.method {
        method if method.is_forward() => {
            let allocator = AnyAllocator::<AB>::new(args.spending.allocator(args.method.recipe())?, &device)?;
            let learner = ForwardLearner::new(model, allocator, config.clone())?;
            let plan = plan(Some(learner.monitor()));
            let fitted = fit(learner, loader.plain()?, test.clone(), history, plan)?;
            (fitted.learner.model, fitted.history, fitted.stopped, fitted.advice)
        }
        _ => {
            let learner = BackpropLearner::new(model)
                .with_prefix_cache(config.prefix_cache)
                .with_evaluation_cache(config.evaluation_cache)
                .with_threads(config.estimator.threads);
            let fitted = fit(learner, loader.differentiable()?, test.clone(), history, plan(None))?;
            (fitted.learner.model, fitted.history, fitted.stopped, vec![])
        }
    };

    let (loss, accuracy) = evaluate(&model, &*test, config.estimator.threads);
    let epochs = history.of(Split::Test).next_back().map_or(0, |row| row.epoch);
    let budget = if args.method.is_forward() { budget(&history, images, &args) } else { 0 };
    let independent = args.method.is_forward() && config.estimator.space.is_independent();
    let mut summary = Value::Object(settings.clone());
    merge(
        &mut summary,
        json!({
            "allocator": settings.get("allocator"),
            "variance": settings.get("variance"),
            "advice": advice,
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
            "query_budget": budget,
            "queries_used": history.queries(),
            "queries_dropped": history.of(Split::Train).filter_map(|row| row.dropped).sum::<u64>(),
            "steps": history.steps(),
            "epochs_done": epochs,
            "seconds": history.seconds(),
            // what equal shares would give is known for noise that is independent between the images only
            "variance_vs_uniform": history.mean(|row| row.variance_vs_uniform).filter(|_| independent),
            "ceiling": history.mean(|row| row.ceiling).filter(|_| independent),
            "train_images": images,
            "skipped_images": skipped,
            "stopped": stopped,
            "config": settings,
            "versions": {"flops": env!("CARGO_PKG_VERSION"), "burn": BURN_VERSION},
        }),
    );
    card.description = format!(
        "{}; fine-tuned on {} ({}, scope {}, {epochs} epochs, seed {}): test accuracy {:.2} %",
        card.description,
        args.dataset,
        args.method.name(),
        args.scope,
        args.seed,
        100.0 * accuracy
    );
    checkpoint::save(&model, &card, &artifacts.path("model.safetensors"), false)?;
    let folder = card.config.pool == Pool::Token;
    if folder {
        hf::save(&model, &card, &artifacts.path(FOLDER))?;
    }
    if model.lora_rank().is_some() {
        checkpoint::save_adapters(&model, &card, &artifacts.path(ADAPTERS))?;
    }
    history.write(&artifacts)?;
    let title = format!("{}, scope {}, {}", args.dataset, args.scope, description(&args));
    artifacts.write("curves.svg", curves::draw(&history, &title)?.as_bytes())?;
    artifacts.write_json("summary.json", &summary)?;
    print_table(&args, &summary);
    let adapters = if model.lora_rank().is_some() { format!(", {ADAPTERS}") } else { String::new() };
    let folder = if folder { format!(", the folder {FOLDER} for transformers") } else { String::new() };
    println!(
        "\n{} holds summary.json, metrics.csv, curves.svg{adapters}{folder} and model.safetensors",
        artifacts.dir().display()
    );
    Ok(())
}

/// Prints what the run would take.
fn dry_run(
    args: &Args,
    config: &ForwardConfig,
    model: ViT<AB>,
    data: Arc<ImageDataset>,
    batcher: ImageBatcher,
    card: &Card,
    device: &Device,
) -> Result<()> {
    let planned = Planned {
        images: data.items.len(),
        batch_size: args.batch_size,
        epochs: args.epochs,
        queries: if args.method.is_forward() { args.spending.queries } else { 0 },
        prefix_bytes: if config.prefix_cache > 0 { prefix_bytes(card) } else { 0 },
        evaluation_bytes: config.evaluation_cache * prefix_bytes(card),
    };
    let parameters = parameters(&model);
    let loader = Training { data, batcher, args, epoch: 0, device: device.clone() };
    let empty = "there are no training images";
    let measured = if args.method.is_forward() {
        let allocator = AnyAllocator::<AB>::new(args.spending.allocator(args.method.recipe())?, device)?;
        let learner = ForwardLearner::new(model, allocator, config.clone())?;
        let monitor = learner.monitor();
        let batch = loader.plain()?.iter().next().context(empty)?;
        let measured = measure(learner, batch, || Some(monitor.ledger()));
        if let Some(error) = monitor.error() {
            return Err(error.into());
        }
        measured
    } else {
        let learner =
            BackpropLearner::new(model).with_prefix_cache(config.prefix_cache).with_threads(config.estimator.threads);
        measure(learner, loader.differentiable()?.iter().next().context(empty)?, || None)
    };
    println!("\n{}, scope {}, {}: nothing is trained", args.dataset, args.scope, description(args));
    for (name, value) in forecast(&planned, &measured, parameters) {
        println!("  {name:<28}{value:>16}");
    }
    Ok(())
}

/// What the steps taken were to spend: A₀ queries for each image they saw.
fn budget(history: &History, images: usize, args: &Args) -> u64 {
    let mut seen = 0;
    let steps_per_epoch = images.div_ceil(args.batch_size) as u64;
    for step in 0..history.steps() {
        let start = (step % steps_per_epoch) as usize * args.batch_size;
        seen += args.batch_size.min(images - start);
    }
    (seen * args.spending.queries) as u64
}

/// The method in a few words.
fn description(args: &Args) -> String {
    match args.method {
        Method::Backprop => "backpropagation".to_string(),
        method => {
            let allocator = args.spending.allocator(args.method.recipe()).map_or("", AllocatorKind::name);
            let name = if method.recipe() == Recipe::Default { "forward-only" } else { method.name() };
            format!("{name}, {allocator} allocator, {} queries per image", args.spending.queries)
        }
    }
}

/// The training images, to be loaded for either method.
struct Training<'a> {
    data: Arc<ImageDataset>,
    batcher: ImageBatcher,
    args: &'a Args,
    epoch: usize,
    device: Device,
}

impl Training<'_> {
    /// Batches without a graph.
    fn plain(&self) -> Result<Arc<dyn DataLoader<AB, ImageBatch<B>>>> {
        self.load(Plain(self.batcher.clone()))
    }

    /// Batches for backpropagation, in the same order.
    fn differentiable(&self) -> Result<Arc<dyn DataLoader<AB, ImageBatch<AB>>>> {
        self.load(self.batcher.clone())
    }

    /// Shuffled and, where that is asked for, changed in every epoch.
    fn load<O: Send + 'static>(
        &self,
        batcher: impl Batcher<AB, ImageItem, O> + 'static,
    ) -> Result<Arc<dyn DataLoader<AB, O>>> {
        let loader = EpochLoader::new(self.data.clone(), batcher, self.args.batch_size, self.device.clone())?
            .shuffled(self.args.seed)
            .starting_at_epoch(self.epoch as u64);
        Ok(match self.args.augmentation() {
            Some(augment) => Arc::new(loader.with_augmentation(augment)),
            None => Arc::new(loader),
        })
    }
}

fn print_table(args: &Args, summary: &Value) {
    let number = |key: &str| summary[key].as_f64();
    let count = |key: &str| summary[key].as_u64().map_or("–".into(), thousands);
    let percent = |key: &str| number(key).map_or("–".into(), |v| format!("{:.2} %", 100.0 * v));
    let decimal = |key: &str, digits: usize| number(key).map_or("–".into(), |v| format!("{v:.digits$}"));
    println!("\n{}, scope {}, {}", args.dataset, args.scope, description(args));
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
        rows.push(("ceiling 1/(1 + CV²)", decimal("ceiling", 3)));
    }
    for (name, value) in rows {
        println!("  {name:<30}{value:>12}");
    }
}

fn main() -> ExitCode {
    cli::run(train)
}
