//! Pretrains `vit_micro_patch4_32` on CIFAR-10 by backpropagation. The shipped checkpoint was made
//! with this program.
//!
//! ```text
//! cargo run --release --example vit_pretrain -- \
//!     --data-dir path/to/cifar-10-batches-bin --epochs 12 --out vit_micro_patch4_32.safetensors
//! ```
// devices are `Copy` on some backends only
#![allow(clippy::clone_on_copy)]

#[macro_use]
extern crate flops_report;

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
use flops_vit::checkpoint::{Card, Pretrained};
use flops_vit::data::{Augment, DatasetSpec, ImageBatch, ImageBatcher, ImageDataset, LoadOptions, Padding};
use flops_vit::{Normalization, Resizing, ViT, ViTConfig};

/// Pretrain a ViT by backpropagation.
#[derive(Parser)]
struct Args {
    /// Folder of CIFAR-10's binary files [default: Burn's data set cache].
    #[arg(long)]
    data_dir: Option<PathBuf>,
    /// Passes over the training set.
    #[arg(long, default_value_t = 12)]
    epochs: usize,
    /// Images of a step.
    #[arg(long, default_value_t = 64)]
    batch_size: usize,
    /// The highest learning rate; it rises linearly over the first twentieth of the steps and falls
    /// as a cosine.
    #[arg(long, default_value_t = 1e-3)]
    lr: f64,
    /// Weight decay.
    #[arg(long, default_value_t = 0.05)]
    weight_decay: f32,
    /// Seed of the initial weights, the order and the augmentation.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Threads that split each batch.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// The checkpoint, written after every epoch.
    #[arg(long, default_value = "vit_micro_patch4_32.safetensors")]
    out: PathBuf,
}

/// Returns the mean gradient over a batch, computed on `threads` threads.
fn gradients(model: &ViT<AB>, batch: &ImageBatch<AB>, threads: usize) -> GradientsParams {
    let n = batch.ids.len();
    let share = n.div_ceil(threads);
    let parts = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..n)
            .step_by(share)
            .map(|start| {
                let index: Vec<usize> = (start..n.min(start + share)).collect();
                let (images, labels) = (batch.input.rows(&index), batch.target.rows(&index));
                // a graph of its own: threads that share leaves would wait for one another forever
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

/// Returns the share of test images that the model classifies correctly.
fn accuracy(model: &ViT<B>, loader: &dyn DataLoader<B, ImageBatch<B>>) -> f64 {
    let (mut correct, mut total) = (0i64, 0usize);
    for batch in loader.iter() {
        let n = batch.ids.len();
        let predicted = model.forward(batch.input, &mut Probe::clean()).argmax(1).reshape([n]);
        correct += predicted.equal(batch.target).int().sum().into_scalar().elem::<i64>();
        total += n;
    }
    correct as f64 / total as f64
}

/// Returns the learning rate of a step, counted from 1: linear warm-up, then a cosine to zero.
fn learning_rate(highest: f64, step: usize, steps: usize) -> f64 {
    let warmup = (steps / 20).max(1);
    if step <= warmup {
        return highest * step as f64 / warmup as f64;
    }
    let done = (step - warmup) as f64 / (steps - warmup).max(1) as f64;
    highest * 0.5 * (1.0 + (std::f64::consts::PI * done).cos())
}

fn train(args: Args) -> Result<()> {
    ensure!(
        args.epochs > 0 && args.batch_size > 0 && args.threads > 0,
        "epochs, batch size and threads must be at least 1"
    );
    let device = backend::device()?;
    let config = ViTConfig::vit_micro_patch4_32();
    let normalization = Normalization::CIFAR10;

    let options = LoadOptions::new(config.img_size).with_data_dir(args.data_dir).with_threads(args.threads);
    let split = DatasetSpec::Cifar10.load(&options)?;
    split.remarks().iter().for_each(|remark| println!("{remark}"));
    let (images, classes) = (split.train.items.len(), split.train.classes.clone());
    let batcher = ImageBatcher::new(config.img_size, normalization)?;
    let test: EpochLoader<B, _, ImageBatch<B>> =
        EpochLoader::new(Arc::new(split.test) as Arc<ImageDataset>, batcher.clone(), 250, device.clone())?;
    let train: EpochLoader<AB, _, ImageBatch<AB>> =
        EpochLoader::new(Arc::new(split.train) as Arc<ImageDataset>, batcher, args.batch_size, device.clone())?
            .shuffled(args.seed)
            .with_augmentation(Augment { flip: true, shift: 4, padding: Padding::Black, seed: args.seed });

    <AB as burn::tensor::backend::Backend>::seed(&device, args.seed);
    let mut model: ViT<AB> = config.init(&device)?;
    println!("{} parameters, {images} images", model.num_params());
    let mut optimizer = AdamWConfig::new().with_weight_decay(args.weight_decay).init();
    let steps = args.epochs * images.div_ceil(args.batch_size);
    let (mut step, start) = (0usize, Instant::now());
    for epoch in 1..=args.epochs {
        for batch in train.iter() {
            step += 1;
            let grads = gradients(&model, &batch, args.threads);
            model = optimizer.step(learning_rate(args.lr, step, steps), model, grads);
            if step.is_multiple_of(50) {
                println!("step {step}/{steps}, {:.0} s", start.elapsed().as_secs_f64());
            }
        }
        let percent = 100.0 * accuracy(&model.valid(), &test);
        println!("epoch {epoch}: test accuracy {percent:.2} %, {:.0} s", start.elapsed().as_secs_f64());
        let description = format!(
            "pretrained by backpropagation on {images} CIFAR-10 records, {epoch} of {} epochs, seed {}: \
             test accuracy {percent:.2} %",
            args.epochs, args.seed,
        );
        let (config, resizing, classes) = (config.clone(), Resizing::default(), classes.clone());
        let card = Card { config, normalization, resizing, classes, description };
        Pretrained { model: model.valid(), card }.save_half(&args.out).context("the checkpoint was not saved")?;
    }
    Ok(())
}

fn main() -> ExitCode {
    cli::run(train)
}
