//! The command line.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use flops_core::allocator::AllocatorKind;
use flops_core::{ForwardConfig, Recipe};
use flops_examples::backend;
use flops_examples::cli::forward_args::ForwardArgs;
use flops_examples::cli::inputs::Inputs;
use flops_examples::cli::method::Method;
use flops_examples::cli::worker_args::WorkerArgs;
use flops_examples::run::artifacts::{Settings, merge};
use flops_examples::run::optimizer::OptimizerKind;
use flops_examples::run::workers::starter;
use flops_vit::checkpoint::Source;
use flops_vit::data::{Augment, DatasetSpec, Padding};
use flops_vit::{FineTuning, Noise, Scope, Sites};
use serde_json::json;

/// Settings that do not change the result: a resumed run may have other values.
pub const FREE_SETTINGS: [&str; 4] = ["data_dir", "threads", "prefix_cache", "memory_bound"];

/// Fine-tune a vision transformer with forward passes only.
#[derive(Parser, Debug)]
#[command(name = "vit_cifar", version)]
pub struct Args {
    /// How gradients are obtained: forward (this library's defaults), backprop, or the settings of
    /// another method: flops (the paper), mezo, fzoo, es (evolution strategies), eggroll, lozo,
    /// zo-muon, pseuzo.
    #[arg(long, default_value = "forward")]
    pub method: Method,
    /// cifar10, cifar100, digits (embedded) or folder:PATH (a sub-folder per class).
    #[arg(long, default_value = "digits")]
    pub dataset: DatasetSpec,
    #[command(flatten)]
    pub inputs: Inputs,
    /// The most training images, and the most test images; they are spread evenly over the data
    /// set.
    #[arg(long)]
    pub limit: Option<usize>,
    /// Train on this many images per class, drawn by the seed; --limit then applies to the test
    /// images only.
    #[arg(long)]
    pub shots: Option<usize>,
    /// Flip training images horizontally with probability 1/2, drawn anew in each epoch. Prefixes
    /// are then not kept, which takes time.
    #[arg(long)]
    pub flip: bool,
    /// Pad training images with this many black pixels on each side and crop them at random, anew
    /// in each epoch. Prefixes are then not kept, as with --flip.
    #[arg(long, default_value_t = 0)]
    pub crop: usize,
    /// Start from a new head even if the checkpoint has the same classes.
    #[arg(long)]
    pub reset_head: bool,
    /// The trained parameters: head, cls_tail, bias_norm, last:K, lora:R (adapters of rank R) or
    /// full.
    #[arg(long, default_value = "cls_tail")]
    pub scope: Scope,
    /// Where activation noise falls: linear (on the output of every layer) or branch (on what each
    /// residual branch adds) [default: linear; branch for last:K and full].
    #[arg(long)]
    pub sites: Option<Sites>,
    #[command(flatten)]
    pub forward: ForwardArgs,
    /// Copies of each training image, shifted at random [default: 4 for digits, which are few,
    /// otherwise none].
    #[arg(long)]
    pub copies: Option<usize>,
    /// The most pixels by which a copy is shifted, in each direction.
    #[arg(long, default_value_t = 1)]
    pub shift: usize,
    /// Passes over the training images and their copies.
    #[arg(long, default_value_t = 24)]
    pub epochs: usize,
    /// Images of a step.
    #[arg(long, default_value_t = 64)]
    pub batch_size: usize,
    /// Optimizer: adamw, or muon (Muon on matrices, AdamW on vectors) [default: the method's, muon
    /// for zo-muon, otherwise adamw].
    #[arg(long, value_enum)]
    pub optimizer: Option<OptimizerKind>,
    /// The learning rate; it falls to zero as a cosine over all epochs [default: from
    /// flops_vit::FineTuning, by model and scope; 0.005 for the shipped model and cls_tail].
    #[arg(long, allow_negative_numbers = true)]
    pub lr: Option<f64>,
    /// The learning rate of the head, as a multiple of --lr.
    #[arg(long, default_value_t = FineTuning::HEAD_LR_FACTOR, allow_negative_numbers = true)]
    pub head_lr_factor: f64,
    /// The learning rate of the embeddings of patches, classes and positions, as a multiple of --lr.
    #[arg(long, default_value_t = FineTuning::EMBED_LR_FACTOR, allow_negative_numbers = true)]
    pub embed_lr_factor: f64,
    /// Decay of the squared gradients that AdamW divides by, at least 0 and below 1.
    #[arg(long, default_value_t = FineTuning::BETA_2, allow_negative_numbers = true)]
    pub beta_2: f32,
    /// Decoupled weight decay, in units of the learning rate.
    #[arg(long, default_value_t = FineTuning::WEIGHT_DECAY, allow_negative_numbers = true)]
    pub weight_decay: f64,
    /// Seed of the order, the noise, the allocation, the head and the adapters.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Recompute the frozen layers before the scope in each epoch, instead of keeping their
    /// outputs.
    #[arg(long)]
    pub no_prefix_cache: bool,
    /// Continue the run in the artifact folder after its last finished epoch.
    #[arg(long)]
    pub resume: bool,
    /// Print what the run would take, measured on two steps that are discarded, and stop.
    #[arg(long)]
    pub dry_run: bool,
    /// Stop after this epoch; --resume continues.
    #[arg(long)]
    pub stop_after: Option<usize>,
    /// Folder of the run's files.
    #[arg(long, default_value = "artifacts/vit_cifar")]
    pub artifact_dir: PathBuf,
    /// Draw the test figures of the run in this folder into curves.svg, such as one by --method backprop.
    #[arg(long)]
    pub beside: Option<PathBuf>,
    /// Print plain lines instead of the terminal interface.
    #[arg(long)]
    pub plain: bool,
    #[command(flatten)]
    pub workers: WorkerArgs,
}

impl Args {
    /// Fills in the noise that [`flops_vit::Noise`] recommends for the scope, where no flag says
    /// otherwise.
    ///
    /// The settings of another method, or of another space, stay as they are.
    pub fn with_recommended_noise(mut self) -> Self {
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
    pub fn validate(&self) -> Result<ForwardConfig> {
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
        self.workers.validate()?;
        if self.workers.is_shared() {
            let alone = "leave --workers and --executor out";
            ensure!(self.method.is_forward(), "--method backprop has no jobs that workers could share; {alone}");
            ensure!(!self.dry_run, "--dry-run is of one process; {alone}");
        }
        // those on this machine share its cores
        let threads = self.forward.threads.or(self.workers.workers.map(starter::threads));
        let forward = ForwardArgs { threads, ..self.forward.clone() };
        let config = forward.config(self.method.recipe(), self.seed)?.with_leaves(self.workers.leaves());
        config.validate()?;
        Ok(config)
    }

    /// Returns the number of copies of each training image.
    pub fn copies(&self) -> usize {
        self.copies.unwrap_or(if self.dataset == DatasetSpec::Digits { 4 } else { 0 })
    }

    /// Returns how training images are changed in each epoch, if they are.
    pub fn augmentation(&self) -> Option<Augment> {
        let augment = Augment { flip: self.flip, shift: self.crop, padding: Padding::Black, seed: self.seed };
        (self.flip || self.crop > 0).then_some(augment)
    }

    /// Returns every setting of the run, by the name of its flag.
    pub fn settings(&self, config: &ForwardConfig, lr: f64) -> Result<Settings> {
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
            let leaves = config.estimator.leaves;
            if leaves > 1 {
                merge(&mut settings, json!({ "leaves": leaves }));
            }
        }
        settings.as_object().cloned().context("settings are an object")
    }

    /// Returns the allocator that was given, otherwise the method's.
    pub fn allocator(&self) -> Result<AllocatorKind> {
        self.forward.allocator(self.method.recipe())
    }

    /// Returns the optimizer that was given, otherwise the method's.
    pub fn optimizer(&self) -> OptimizerKind {
        self.optimizer.unwrap_or(OptimizerKind::of(self.method.recipe()))
    }

    /// Returns the method in a few words.
    pub fn description(&self) -> String {
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
