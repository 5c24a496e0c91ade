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
//! The artifact folder gets `summary.json`, `classes.csv` and `confusion.svg`.
// devices are `Copy` on some backends only
#![allow(clippy::clone_on_copy)]

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use burn::data::dataloader::DataLoader;
use clap::{Parser, ValueEnum};
use flops_core::{EpochLoader, infer};
use flops_examples::backend::{self, B};
use flops_examples::cli::{self, inputs::Inputs};
use flops_examples::experiment::{Progress, print_table};
use flops_examples::plot::{Heat, heat_maps};
use flops_examples::run::artifacts::Artifacts;
use flops_vit::ViT;
use flops_vit::checkpoint::{Pretrained, Source};
use flops_vit::data::{DatasetSpec, ImageBatch, ImageBatcher, ImageDataset};
use serde::Serialize;
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
}

/// The accuracy on the images of a class; none where there are no images.
#[derive(Clone, Debug, Serialize)]
struct ClassAccuracy {
    class: String,
    images: usize,
    top1: Option<f64>,
    top5: Option<f64>,
    /// The class that is predicted most often when the prediction is wrong.
    mistaken_for: Option<String>,
}

/// Returns the model's output for each class of the data, and a remark if they were not matched by
/// name.
///
/// Classes are matched by name if the model has them all. If it has none of them but equally many,
/// they are matched by position.
///
/// # Errors
/// Where neither holds.
fn outputs(model: &[String], data: &[String]) -> Result<(Vec<usize>, Option<String>)> {
    let named: Vec<Option<usize>> = data.iter().map(|name| model.iter().position(|m| m == name)).collect();
    let found: Vec<usize> = named.iter().copied().flatten().collect();
    if found.len() == data.len() {
        return Ok((found, None));
    }
    let unknown: Vec<&str> = data.iter().zip(&named).filter(|n| n.1.is_none()).map(|n| n.0.as_str()).take(5).collect();
    ensure!(
        found.is_empty() && model.len() == data.len(),
        "the model knows {} classes ({}, …) and {} of the data's {} are not among them ({}, …): choose \
         weights with a head for this data set, or tune one with vit_cifar",
        model.len(),
        model.iter().take(5).map(String::as_str).collect::<Vec<_>>().join(", "),
        data.len() - found.len(),
        data.len(),
        unknown.join(", ")
    );
    let remark = format!("the model calls its classes {}, … : they are taken in the order of the data's", model[0]);
    Ok(((0..data.len()).collect(), Some(remark)))
}

/// What the model predicts for one image.
struct Prediction {
    label: usize,
    /// The rank of the label among the classes by score, from 0.
    rank: usize,
    /// The class with the best score.
    best: usize,
}

/// The predictions for all images, and their mean loss.
struct Evaluation {
    predictions: Vec<Prediction>,
    loss: f64,
}

impl Prediction {
    /// Returns the prediction from the scores of the data's classes, and its cross-entropy.
    fn new(scores: &[f32], label: usize) -> (Self, f64) {
        let better =
            scores.iter().enumerate().filter(|&(c, &s)| s > scores[label] || (s == scores[label] && c < label));
        let best = (0..scores.len()).fold(0, |best, c| if scores[c] > scores[best] { c } else { best });
        let top = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = scores.iter().map(|s| f64::from(s - top).exp()).sum();
        let loss = sum.ln() - f64::from(scores[label] - top);
        (Self { label, rank: better.count(), best }, loss)
    }
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
        for (row, label) in logits.chunks_exact(classes).zip(labels.iter::<i64>()) {
            let scores: Vec<f32> = outputs.iter().map(|&output| row[output]).collect();
            ensure!(
                scores.iter().all(|s| s.is_finite()),
                "the model's output for an image of class {label} is not finite: the weights have diverged"
            );
            let (prediction, loss) = Prediction::new(&scores, label as usize);
            predictions.push(prediction);
            total += loss;
        }
        progress.at(predictions.len(), images, || "images".into());
    }
    Ok(Evaluation { loss: total / images as f64, predictions })
}

impl Evaluation {
    /// Returns the share of images whose label is among the `k` best classes, of one class or of
    /// all.
    fn top_k(&self, k: usize, class: Option<usize>) -> Option<f64> {
        let of_class = self.predictions.iter().filter(|p| class.is_none_or(|class| class == p.label));
        let ranks: Vec<usize> = of_class.map(|p| p.rank).collect();
        (!ranks.is_empty()).then(|| ranks.iter().filter(|&&rank| rank < k).count() as f64 / ranks.len() as f64)
    }

    /// Returns how many images of each class (row) are predicted as each class (column).
    fn confusion(&self, classes: usize) -> Vec<Vec<usize>> {
        let mut confusion = vec![vec![0; classes]; classes];
        self.predictions.iter().for_each(|p| confusion[p.label][p.best] += 1);
        confusion
    }

    /// Returns the accuracy of each class.
    fn by_class(&self, classes: &[String], confusion: &[Vec<usize>]) -> Vec<ClassAccuracy> {
        let accuracy = |label: usize| {
            let others = (0..classes.len()).filter(|&c| c != label && confusion[label][c] > 0);
            let mistaken = others.max_by_key(|&c| (confusion[label][c], std::cmp::Reverse(c)));
            ClassAccuracy {
                class: classes[label].clone(),
                images: confusion[label].iter().sum(),
                top1: self.top_k(1, Some(label)),
                top5: self.top_k(5, Some(label)),
                mistaken_for: mistaken.map(|c| classes[c].clone()),
            }
        };
        (0..classes.len()).map(accuracy).collect()
    }
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

/// Draws the confusion matrix, each row in percent of its images.
fn draw_confusion(classes: &[String], confusion: &[Vec<usize>]) -> Result<String> {
    let name = |c: &String| c.chars().take(10).collect::<String>();
    let names: Vec<String> = classes.iter().map(name).collect();
    let percent = |row: &[usize], n: usize| 100.0 * n as f64 / row.iter().sum::<usize>().max(1) as f64;
    let map = Heat {
        title: String::new(),
        columns: ("taken for".into(), names.clone()),
        rows: ("class".into(), names),
        values: confusion.iter().map(|row| row.iter().map(|&n| percent(row, n)).collect()).collect(),
        decimals: 0,
    };
    heat_maps("what images are taken for, %", &[map], 1)
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
    let skipped = split.skipped.len();
    let data = if args.split == Split::Test { split.test } else { split.train }.limited(args.limit);
    let classes = data.classes.clone();
    let (outputs, remark) = outputs(&card.classes, &classes)?;
    remark.iter().for_each(|remark| println!("{remark}"));
    let batcher = ImageBatcher::new(card.config.img_size, card.normalization)?;

    let evaluation = evaluate(&model, data, &outputs, batcher, threads, &device)?;
    let confusion = evaluation.confusion(classes.len());
    let table = evaluation.by_class(&classes, &confusion);
    print_classes(&card.description, &table);
    let top1 = evaluation.top_k(1, None).context("there are no images")?;
    let top5 = evaluation.top_k(5, None).unwrap_or_default();
    let images = evaluation.predictions.len();
    println!("\n{images} images, {} classes", classes.len());
    println!("  top-1 accuracy   {:>6.2} %", 100.0 * top1);
    println!("  top-5 accuracy   {:>6.2} %", 100.0 * top5);
    println!("  loss             {:>8.4}", evaluation.loss);

    artifacts.write_csv("classes.csv", &table)?;
    let mut files = "classes.csv";
    if classes.len() <= SHOWN {
        artifacts.write("confusion.svg", draw_confusion(&classes, &confusion)?.as_bytes())?;
        files = "classes.csv, confusion.svg";
    }
    let summary = json!({
        "weights": args.inputs.weights.as_ref().map(Source::to_string),
        "dataset": args.dataset.to_string(),
        "images": images,
        "skipped_images": skipped,
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

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|n| n.to_string()).collect()
    }

    #[test]
    fn classes_are_matched_by_name_else_by_position() {
        let (found, remark) = outputs(&names(&["dog", "cow", "cat"]), &names(&["cat", "dog"])).unwrap();
        assert_eq!((found, remark), (vec![2, 0], None));
        let (found, remark) = outputs(&names(&["LABEL_0", "LABEL_1"]), &names(&["cat", "dog"])).unwrap();
        assert_eq!(found, [0, 1]);
        assert!(remark.unwrap().contains("LABEL_0"));
        for model in [&["LABEL_0", "LABEL_1", "LABEL_2"][..], &["cat", "cow"]] {
            let error = outputs(&names(model), &names(&["cat", "dog"])).unwrap_err().to_string();
            assert!(error.contains("dog"), "{error}");
        }
    }
}
