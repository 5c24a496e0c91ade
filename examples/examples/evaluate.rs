//! Measures how well a model classifies: top-1 and top-5 accuracy, in all and by class.
//!
//! Use it on loaded weights before and after they are tuned.
//!
//! ```text
//! cargo run --release --example evaluate -- \
//!     --weights artifacts/vit_cifar/model.safetensors --dataset digits
//! cargo run --release --example evaluate -- \
//!     --weights path/to/huggingface/folder --dataset folder:path/to/images
//! ```
//!
//! The folders of images may be called as the model calls its classes, or by the numbers of its
//! outputs. `--split all` takes all images of a folder that is not split.
//!
//! The artifact folder gets `summary.json`, `classes.csv` and `confusion.svg`.
// devices are `Copy` on some backends only
#![allow(clippy::clone_on_copy)]

#[macro_use]
extern crate flops_report;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use burn::data::dataloader::DataLoader;
use clap::{Parser, ValueEnum};
use flops_core::{EpochLoader, infer};
use flops_examples::backend::{self, B};
use flops_examples::cli::{self, inputs::Inputs};
use flops_examples::experiment::evaluation::{ClassAccuracy, Evaluation, Prediction, draw_confusion};
use flops_examples::experiment::{Progress, print_table};
use flops_examples::run::artifacts::Artifacts;
use flops_vit::ViT;
use flops_vit::checkpoint::{Pretrained, Source};
use flops_vit::data::classes::ClassOutputs;
use flops_vit::data::{DatasetSpec, ImageBatch, ImageBatcher, ImageDataset};
use serde_json::json;

/// Images of one forward pass of a thread.
const ROWS: usize = 32;
/// Images of a batch.
const BATCH: usize = 8 * ROWS;
/// The most classes that are printed and drawn; `classes.csv` holds all of them.
const SHOWN: usize = 20;

/// Measure a model on labelled images.
#[derive(Parser, Debug)]
#[command(name = "evaluate", version)]
struct Args {
    /// cifar10, cifar100, digits (embedded) or folder:PATH (a sub-folder per class).
    #[arg(long, default_value = "cifar10")]
    dataset: DatasetSpec,
    #[command(flatten)]
    inputs: Inputs,
    /// The images to use.
    #[arg(long, value_enum, default_value = "test")]
    split: Split,
    /// The most images; they are spread evenly over the data set.
    #[arg(long)]
    limit: Option<usize>,
    /// Threads that run the model [default: one per core, at most 8].
    #[arg(long)]
    threads: Option<usize>,
    /// Folder of the results.
    #[arg(long, default_value = "artifacts/evaluate")]
    artifact_dir: PathBuf,
}

/// A part of a data set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Split {
    /// The training images.
    Train,
    /// The test images.
    Test,
    /// All images: for a folder that holds nothing but test images.
    All,
}

/// Runs the model on all images.
///
/// # Errors
/// Where an output of the model is not finite.
fn evaluate(
    model: &ViT<B>,
    data: ImageDataset,
    outputs: &[usize],
    batcher: ImageBatcher,
    threads: usize,
    device: &backend::Device,
) -> Result<Evaluation> {
    let images = data.items.len();
    let loader: EpochLoader<B, _, ImageBatch<B>> =
        EpochLoader::new(std::sync::Arc::new(data), batcher, BATCH, device.clone())?;
    let (mut predictions, mut total) = (Vec::with_capacity(images), 0.0);
    let mut progress = Progress::default();
    for batch in loader.iter() {
        let n = batch.ids.len();
        let logits = infer(model, &batch.input, n, ROWS, threads).into_data();
        let classes = logits.shape[1];
        let logits: Vec<f32> = logits.iter::<f32>().collect();
        let labels = batch.target.into_data();
        for (scores, label) in logits.chunks_exact(classes).zip(labels.iter::<i64>()) {
            ensure!(
                scores.iter().all(|s| s.is_finite()),
                "the model's output for an image of class {label} is not finite: the weights have diverged"
            );
            let (prediction, loss) = Prediction::new(scores, label as usize, outputs[label as usize]);
            predictions.push(prediction);
            total += loss;
        }
        progress.at(predictions.len(), images, || "images".into());
    }
    Ok(Evaluation { loss: total / images as f64, predictions })
}

/// Prints the first classes, in the order of the data.
fn print_classes(description: &str, table: &[ClassAccuracy]) {
    let percent = |share: Option<f64>| share.map_or("–".into(), |s| format!("{:.1}", 100.0 * s));
    let row = |c: &ClassAccuracy| {
        let mistaken = c.mistaken_for.clone().unwrap_or_default();
        vec![c.class.clone(), c.images.to_string(), percent(c.top1), percent(c.top5), mistaken]
    };
    let rows: Vec<Vec<String>> = table.iter().take(SHOWN).map(row).collect();
    println!("{description}");
    print_table(&["class", "images", "top-1, %", "top-5, %", "most often taken for"], &rows);
    if table.len() > SHOWN {
        println!("  and {} more classes in classes.csv", table.len() - SHOWN);
    }
}

fn run(args: Args) -> Result<()> {
    ensure!(args.limit != Some(0), "--limit 0: use at least 1 image");
    ensure!(args.threads != Some(0), "--threads 0: use at least 1");
    let started = Instant::now();
    let artifacts = Artifacts::open(&args.artifact_dir)?;
    let device = backend::device()?;
    let Pretrained { model, card } = args.inputs.model::<B>(&device)?;
    let threads = cli::threads(args.threads);
    let split = args.inputs.images(&args.dataset, &card, threads)?;
    let (skipped, left_out) = (split.skipped.len(), split.left_out.len());
    let data = match args.split {
        Split::Train => split.train,
        Split::Test => split.test,
        Split::All => split.whole(),
    };
    let classes = ClassOutputs::find(&card.classes, &data.classes)?;
    classes.remarks.iter().for_each(|remark| println!("{remark}"));
    let batcher = ImageBatcher::for_card(&card)?;

    let evaluation = evaluate(&model, data.limited(args.limit), &classes.outputs, batcher, threads, &device)?;
    let counts = evaluation.counts(classes.outputs.len());
    let table = evaluation.by_class(&classes, &counts);
    print_classes(&card.description, &table);
    let top1 = evaluation.top_k(1, None).context("there are no images")?;
    let top5 = evaluation.top_k(5, None).unwrap_or_default();
    let images = evaluation.predictions.len();
    println!("\n{images} images, {} classes", classes.outputs.len());
    println!("  top-1 accuracy   {:>6.2} %", 100.0 * top1);
    println!("  top-5 accuracy   {:>6.2} %", 100.0 * top5);
    println!("  loss             {:>8.4}", evaluation.loss);

    artifacts.write_csv("classes.csv", &table)?;
    let mut files = "classes.csv";
    if classes.outputs.len() <= SHOWN {
        artifacts.write("confusion.svg", draw_confusion(&classes, &counts)?.as_bytes())?;
        files = "classes.csv, confusion.svg";
    }
    let summary = json!({
        "weights": args.inputs.weights.as_ref().map(Source::to_string),
        "dataset": args.dataset.to_string(),
        "images": images,
        "skipped_images": skipped,
        "left_out_files": left_out,
        "model_classes": classes.names.len(),
        "top1": top1,
        "top5": top5,
        "loss": evaluation.loss,
        "classes": table,
        "seconds": started.elapsed().as_secs_f64(),
        "backend": backend::NAME,
    });
    artifacts.write_json("summary.json", &summary)?;
    println!("\n{} holds {files} and summary.json", artifacts.dir().display());
    Ok(())
}

fn main() -> ExitCode {
    cli::run(run)
}
