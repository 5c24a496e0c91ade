//! How well a model classifies: top-1, top-5, and by class. For a look at loaded weights before they are tuned, and after.
//!
//! ```text
//! cargo run --release --example evaluate -- --weights artifacts/vit_cifar/model.safetensors --dataset digits
//! cargo run --release --example evaluate -- --weights path/to/huggingface/folder --dataset folder:path/to/images
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
use flops_examples::artifacts::Artifacts;
use flops_examples::backend::{self, B};
use flops_examples::cli;
use flops_examples::experiment::{Progress, print_table};
use flops_examples::inputs::Inputs;
use flops_examples::plot::{Heat, heat_maps};
use flops_vit::ViT;
use flops_vit::checkpoint::Source;
use flops_vit::data::{DatasetSpec, ImageBatch, ImageBatcher, ImageDataset};
use serde::Serialize;
use serde_json::json;

/// Rows of a pass of one thread, and passes of a batch.
const ROWS: usize = 32;
const BATCH: usize = 8 * ROWS;
/// Classes of which the table is printed, and the confusion drawn; with more, the files hold them.
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
    /// Which images.
    #[arg(long, value_enum, default_value = "test")]
    split: Split,
    /// Use at most this many images, spread evenly over the data set.
    #[arg(long)]
    limit: Option<usize>,
    /// Threads that run the model [default: one per core, at most 8].
    #[arg(long)]
    threads: Option<usize>,
    /// Where the files go.
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

/// What the model is right about in a class.
#[derive(Clone, Debug, Serialize)]
struct Class {
    class: String,
    images: usize,
    top1: Option<f64>,
    top5: Option<f64>,
    /// The class it is most often taken for when it is not recognised.
    mistaken_for: Option<String>,
}

/// For each class of the data, the output of the model that stands for it.
///
/// By name where the model has a class of every name; otherwise by position where both have equally many, and no name is known to both.
fn outputs(model: &[String], data: &[String]) -> Result<(Vec<usize>, Option<String>)> {
    let named: Vec<Option<usize>> = data.iter().map(|name| model.iter().position(|m| m == name)).collect();
    let found: Vec<usize> = named.iter().copied().flatten().collect();
    if found.len() == data.len() {
        return Ok((found, None));
    }
    let unknown: Vec<&str> = data.iter().zip(&named).filter(|n| n.1.is_none()).map(|n| n.0.as_str()).take(5).collect();
    ensure!(
        found.is_empty() && model.len() == data.len(),
        "the model knows {} classes ({}, …) and {} of the data's {} are not among them ({}, …): choose weights with a head for these data, or \
         tune one with vit_cifar",
        model.len(),
        model.iter().take(5).map(String::as_str).collect::<Vec<_>>().join(", "),
        data.len() - found.len(),
        data.len(),
        unknown.join(", ")
    );
    let remark = format!("the model calls its classes {}, … : they are taken in the order of the data's", model[0]);
    Ok(((0..data.len()).collect(), Some(remark)))
}

/// Rank of the right answer for each image, and the class it is taken for, in the order of the loader.
struct Answers {
    /// (label, rank of the right class from 0, class of the data that scores best).
    all: Vec<(usize, usize, usize)>,
    loss: f64,
}

fn answers(
    model: &ViT<B>,
    data: ImageDataset,
    outputs: &[usize],
    batcher: ImageBatcher,
    threads: usize,
    device: &backend::Device,
) -> Result<Answers> {
    let images = data.items.len();
    let loader: EpochLoader<B, _, ImageBatch<B>> =
        EpochLoader::new(std::sync::Arc::new(data), batcher, BATCH, device.clone())?;
    let (mut all, mut loss) = (Vec::with_capacity(images), 0.0);
    let mut progress = Progress::default();
    for batch in loader.iter() {
        let n = batch.ids.len();
        let logits = infer(model, &batch.input, n, ROWS, threads).into_data();
        let classes = logits.shape[1];
        let logits: Vec<f32> = logits.iter::<f32>().collect();
        let labels = batch.target.into_data();
        for (row, label) in logits.chunks_exact(classes).zip(labels.iter::<i64>()) {
            let label = label as usize;
            let scores: Vec<f32> = outputs.iter().map(|&output| row[output]).collect();
            ensure!(
                scores.iter().all(|s| s.is_finite()),
                "the model's output for an image of class {label} is not finite: the weights have diverged"
            );
            let rank =
                scores.iter().enumerate().filter(|&(c, &s)| s > scores[label] || (s == scores[label] && c < label));
            let best = (0..scores.len()).fold(0, |best, c| if scores[c] > scores[best] { c } else { best });
            all.push((label, rank.count(), best));
            let top = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let sum: f64 = scores.iter().map(|s| f64::from(s - top).exp()).sum();
            loss += sum.ln() - f64::from(scores[label] - top);
        }
        progress.at(all.len(), images, || "images".into());
    }
    Ok(Answers { loss: loss / images as f64, all })
}

fn run(args: Args) -> Result<()> {
    ensure!(args.limit != Some(0), "--limit 0: use at least 1 image");
    ensure!(args.threads != Some(0), "--threads 0: use at least 1");
    let started = Instant::now();
    let artifacts = Artifacts::open(&args.artifact_dir)?;
    let device = backend::device()?;
    let (model, card) = args.inputs.model::<B>(&device)?;
    let threads = cli::threads(args.threads);
    let split = args.inputs.images(&args.dataset, &card, threads)?;
    let skipped = split.skipped.len();
    let data = if args.split == Split::Test { split.test } else { split.train }.limited(args.limit);
    let classes = data.classes.clone();
    let (outputs, remark) = outputs(&card.classes, &classes)?;
    remark.iter().for_each(|remark| println!("{remark}"));
    let batcher = ImageBatcher::new(card.config.img_size, card.normalization)?;
    let Answers { all, loss } = answers(&model, data, &outputs, batcher, threads, &device)?;

    let mut confusion = vec![vec![0usize; classes.len()]; classes.len()];
    all.iter().for_each(|&(label, _, best)| confusion[label][best] += 1);
    let share = |top: usize, label: Option<usize>| {
        let ranks: Vec<usize> = all.iter().filter(|a| label.is_none_or(|l| l == a.0)).map(|a| a.1).collect();
        (!ranks.is_empty()).then(|| ranks.iter().filter(|&&rank| rank < top).count() as f64 / ranks.len() as f64)
    };
    let table: Vec<Class> = (0..classes.len())
        .map(|label| {
            let others = (0..classes.len()).filter(|&c| c != label && confusion[label][c] > 0);
            let mistaken = others.max_by_key(|&c| (confusion[label][c], std::cmp::Reverse(c)));
            Class {
                class: classes[label].clone(),
                images: confusion[label].iter().sum(),
                top1: share(1, Some(label)),
                top5: share(5, Some(label)),
                mistaken_for: mistaken.map(|c| classes[c].clone()),
            }
        })
        .collect();

    let percent = |share: Option<f64>| share.map_or("–".into(), |s| format!("{:.1}", 100.0 * s));
    let rows: Vec<Vec<String>> = table
        .iter()
        .take(SHOWN)
        .map(|c| {
            let mistaken = c.mistaken_for.clone().unwrap_or_default();
            vec![c.class.clone(), c.images.to_string(), percent(c.top1), percent(c.top5), mistaken]
        })
        .collect();
    println!("{}", card.description);
    print_table(&["class", "images", "top-1, %", "top-5, %", "most often taken for"], &rows);
    if table.len() > SHOWN {
        println!("  and {} more classes in classes.csv", table.len() - SHOWN);
    }
    let (all_top1, all_top5) = (share(1, None).context("there are no images")?, share(5, None).unwrap_or_default());
    println!("\n{} images, {} classes", all.len(), classes.len());
    println!("  top-1 accuracy   {:>6.2} %", 100.0 * all_top1);
    println!("  top-5 accuracy   {:>6.2} %", 100.0 * all_top5);
    println!("  loss             {loss:>8.4}");

    artifacts.write_csv("classes.csv", &table)?;
    let mut files = "classes.csv";
    if classes.len() <= SHOWN {
        let name = |c: &String| c.chars().take(10).collect::<String>();
        let names: Vec<String> = classes.iter().map(name).collect();
        let cell = |row: &Vec<usize>, n: usize| 100.0 * n as f64 / row.iter().sum::<usize>().max(1) as f64;
        let map = Heat {
            title: String::new(),
            columns: ("taken for".into(), names.clone()),
            rows: ("class".into(), names),
            values: confusion.iter().map(|row| row.iter().map(|&n| cell(row, n)).collect()).collect(),
            decimals: 0,
        };
        let title = "what images are taken for, %";
        artifacts.write("confusion.svg", heat_maps(title, &[map], 1)?.as_bytes())?;
        files = "classes.csv, confusion.svg";
    }
    let summary = json!({
        "weights": args.inputs.weights.as_ref().map(Source::to_string),
        "dataset": args.dataset.to_string(),
        "images": all.len(),
        "skipped_images": skipped,
        "top1": all_top1,
        "top5": all_top5,
        "loss": loss,
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
    fn classes_are_found_by_name_and_else_by_position() {
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
