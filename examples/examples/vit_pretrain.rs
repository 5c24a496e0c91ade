//! Pretrains `vit_micro_patch4_32` on CIFAR-10 by backpropagation: how the shipped checkpoint was made.
//!
//! ```text
//! cargo run --release --example vit_pretrain -- --data-dir path/to/cifar-10-batches-bin --epochs 12 --out vit_micro_patch4_32.safetensors
//! ```
// devices are `Copy` on some backends only
#![allow(clippy::clone_on_copy)]

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use burn::data::dataloader::DataLoader;
use burn::module::AutodiffModule;
use burn::optim::{AdamWConfig, GradientsAccumulator, GradientsParams, Optimizer};
use burn::prelude::*;
use clap::Parser;
use flops_core::{EpochLoader, ForwardModel, Probe, Rows};
use flops_examples::backend::{self, AB, B};
use flops_examples::cli;
use flops_vit::checkpoint::{self, Card};
use flops_vit::data::{Augment, DatasetSpec, ImageBatch, ImageBatcher, ImageDataset, LoadOptions, Padding};
use flops_vit::{Normalization, Resizing, ViT, ViTConfig};

/// Pretrain a ViT by backpropagation.
#[derive(Parser)]
struct Args {
    /// Folder with CIFAR-10's binary files; Burn's data set cache if not given.
    #[arg(long)]
    data_dir: Option<PathBuf>,
    /// Passes over the training set.
    #[arg(long, default_value_t = 12)]
    epochs: usize,
    /// Images of a step.
    #[arg(long, default_value_t = 64)]
    batch_size: usize,
    /// Highest learning rate; it rises linearly over the first twentieth of the steps and falls as a cosine.
    #[arg(long, default_value_t = 1e-3)]
    lr: f64,
    /// Weight decay.
    #[arg(long, default_value_t = 0.05)]
    weight_decay: f32,
    /// Seed of initialisation, order and augmentation.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Threads that share a batch.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// The file to write, after every epoch.
    #[arg(long, default_value = "vit_micro_patch4_32.safetensors")]
    out: PathBuf,
}

/// Mean gradient over a batch, shared among `threads`.
fn gradients(model: &ViT<AB>, batch: &ImageBatch<AB>, threads: usize) -> GradientsParams {
    let n = batch.ids.len();
    let share = n.div_ceil(threads);
    let parts = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..n)
            .step_by(share)
            .map(|start| {
                let index: Vec<usize> = (start..n.min(start + share)).collect();
                let (images, labels) = (batch.input.rows(&index), batch.target.rows(&index));
                // a graph of its own: threads that share leaves wait for one another for ever
                let model = model.clone().fork(&model.devices()[0]);
                scope.spawn(move || {
                    let logits = model.forward(images, &mut Probe::clean());
                    let loss = model.losses(logits, labels).sum() / n as f64;
                    GradientsParams::from_grads(loss.backward(), &model)
                })
            })
            .collect();
        workers.into_iter().map(|w| w.join()).collect::<Vec<_>>()
    });
    let mut sum = GradientsAccumulator::new();
    for part in parts {
        match part {
            Ok(grads) => sum.accumulate(model, grads),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
    sum.grads()
}

/// Share of the test images that the model names correctly.
fn accuracy(model: &ViT<B>, loader: &dyn DataLoader<B, ImageBatch<B>>) -> f64 {
    let (mut right, mut all) = (0i64, 0usize);
    for batch in loader.iter() {
        let n = batch.ids.len();
        let named = model.forward(batch.input, &mut Probe::clean()).argmax(1).reshape([n]);
        right += named.equal(batch.target).int().sum().into_scalar().elem::<i64>();
        all += n;
    }
    right as f64 / all as f64
}

fn train(args: Args) -> Result<()> {
    ensure!(
        args.epochs > 0 && args.batch_size > 0 && args.threads > 0,
        "epochs, batch size and threads must be at least 1"
    );
    let device = backend::device()?;
    let config = ViTConfig::vit_micro_patch4_32();
    let options = LoadOptions::new(config.img_size).with_data_dir(args.data_dir).with_threads(args.threads);
    let split = DatasetSpec::Cifar10.load(&options)?;
    for remark in split.remarks() {
        println!("{remark}");
    }
    let classes = split.train.classes.clone();
    let normalization = Normalization::CIFAR10;
    let batcher = ImageBatcher::new(config.img_size, normalization)?;
    let test: EpochLoader<B, _, ImageBatch<B>> =
        EpochLoader::new(Arc::new(split.test) as Arc<ImageDataset>, batcher.clone(), 250, device.clone())?;
    let images = split.train.items.len();
    let train: EpochLoader<AB, _, ImageBatch<AB>> =
        EpochLoader::new(Arc::new(split.train) as Arc<ImageDataset>, batcher, args.batch_size, device.clone())?
            .shuffled(args.seed)
            .with_augmentation(Augment { flip: true, shift: 4, padding: Padding::Black, seed: args.seed });

    <AB as burn::tensor::backend::Backend>::seed(&device, args.seed);
    let mut model: ViT<AB> = config.init(&device)?;
    println!("{} parameters, {images} images", model.num_params());
    let mut optimizer = AdamWConfig::new().with_weight_decay(args.weight_decay).init();
    let steps = args.epochs * images.div_ceil(args.batch_size);
    let warmup = (steps / 20).max(1);
    let (mut step, start) = (0usize, Instant::now());
    for epoch in 1..=args.epochs {
        for batch in train.iter() {
            step += 1;
            let lr = if step <= warmup {
                args.lr * step as f64 / warmup as f64
            } else {
                let done = (step - warmup) as f64 / (steps - warmup).max(1) as f64;
                args.lr * 0.5 * (1.0 + (std::f64::consts::PI * done).cos())
            };
            let grads = gradients(&model, &batch, args.threads);
            model = optimizer.step(lr, model, grads);
            if step.is_multiple_of(50) {
                println!("step {step}/{steps}, {:.0} s", start.elapsed().as_secs_f64());
            }
        }
        let accuracy = accuracy(&model.valid(), &test);
        println!("epoch {epoch}: test accuracy {:.2} %, {:.0} s", 100.0 * accuracy, start.elapsed().as_secs_f64());
        let card = Card {
            config: config.clone(),
            normalization,
            resizing: Resizing::default(),
            classes: classes.clone(),
            description: format!(
                "pretrained by backpropagation on {images} CIFAR-10 records, {epoch} of {} epochs, seed {}: test accuracy {:.2} %",
                args.epochs,
                args.seed,
                100.0 * accuracy
            ),
        };
        checkpoint::save(&model.valid(), &card, &args.out, true).context("the checkpoint was not saved")?;
    }
    Ok(())
}

fn main() -> ExitCode {
    cli::run(train)
}
