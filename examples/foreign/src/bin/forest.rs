//! A forest of scikit-learn that sees another camera: an adapter in front of it is trained.
//!
//! ```text
//! cargo run --release --bin forest
//! ```
//!
//! The forest knows 8 × 8 digits, and is right about 92.5 % of those it was not trained on. On the
//! same digits from another camera it is right about 41.7 %. A linear layer in front of it learns to
//! undo the change, from labelled images of the new camera and the forest's answers. No gradient
//! exists: trees are constant between their thresholds.

#[macro_use]
extern crate flops_report;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Result, bail, ensure};
use burn::module::AutodiffModule;
use clap::{Parser, ValueEnum};
use flops_core::allocator::Neyman;
use flops_core::{ForwardConfig, QueryBudget};
use flops_foreign::adapter::Adapter;
use flops_foreign::classifier::Classifier;
use flops_foreign::report::{Common, Curve, figure, save, spread, text, write};
use flops_foreign::table::Table;
use flops_foreign::train::{AB, MAX_STEPS, Plan, accuracy, forward_only};
use flops_foreign::{digits, train};
use flops_report::{print_table, program};
use serde_json::json;

/// What the forest tells of a row.
#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum Feedback {
    /// The probability of each class.
    Probabilities,
    /// Its answer alone, right or wrong.
    Answers,
}

/// An adapter in front of a forest of scikit-learn, trained from the forest's answers alone.
#[derive(Parser, Debug)]
#[command(name = "forest", version)]
struct Args {
    #[command(flatten)]
    common: Common,
    /// An ONNX classifier of your own, for rows of numbers [default: the embedded forest].
    #[arg(long)]
    model: Option<PathBuf>,
    /// Rows as the classifier sees them now: CSV without a header. At the end of each is its class, the
    /// column of its probability, from 0. Every fifth row is for testing [default: the embedded digits,
    /// by another camera].
    #[arg(long)]
    data: Option<PathBuf>,
    /// What is learned from.
    #[arg(long, value_enum, default_value = "probabilities")]
    feedback: Feedback,
    /// Steps of 64 rows.
    #[arg(long, default_value_t = 300)]
    steps: usize,
    /// Queries of each row and step, on average.
    #[arg(long, default_value_t = 3)]
    queries: usize,
    /// Smoothing scale, in standard deviations of a feature.
    #[arg(long, default_value_t = 0.5)]
    sigma: f64,
    /// Adam's learning rate at the start.
    #[arg(long, default_value_t = 0.01)]
    lr: f64,
}

impl Args {
    fn config(&self) -> Result<ForwardConfig> {
        let config = ForwardConfig::new(QueryBudget::new(self.queries, 1)?).for_steps().with_sigma(self.sigma);
        config.validate()?;
        ensure!((1..=MAX_STEPS).contains(&self.steps), "--steps {}: use 1 to {MAX_STEPS}", self.steps);
        ensure!(self.lr > 0.0 && self.lr <= 1.0, "--lr {}: use a number above 0 and at most 1", self.lr);
        Ok(config)
    }

    fn classifier(&self) -> Result<Classifier> {
        self.model.as_deref().map_or_else(Classifier::embedded, Classifier::read)
    }
}

/// Whether rows and classifier belong together.
fn check(table: &Table, classifier: &Classifier) -> Result<()> {
    let (features, classes) = (classifier.features, classifier.classes);
    ensure!(
        table.features == features,
        "the rows have {} features, and the model takes {features}; use the data it was made for (--data)",
        table.features
    );
    let label = table.labels.iter().max().copied().unwrap_or_default();
    ensure!(label < classes, "the rows have the label {label}, and the model has the classes 0 to {}", classes - 1);
    let (train, test) = table.split();
    if let Some(label) = test.labels.iter().find(|label| !train.labels.contains(label)) {
        bail!("no row to train on has the label {label}; shuffle the rows, of which every fifth is for testing");
    }
    Ok(())
}

fn run(args: Args) -> Result<()> {
    let (config, threads) = (args.config()?, args.common.threads()?);
    let (device, classifier) = (Default::default(), Arc::new(args.classifier()?));
    let (now, known) = match &args.data {
        Some(file) => (Table::read(file)?, None),
        None => (digits::other_camera(digits::load()?), Some(digits::load()?)),
    };
    check(&now, &classifier)?;
    let artifacts = args.common.artifacts("forest")?;
    let (train, test) = now.split();
    let answers_only = args.feedback == Feedback::Answers;
    let adapter = || Adapter::<AB>::new(classifier.clone(), &train, answers_only, &device);
    let known = known.map(|known| accuracy(&adapter().valid(), &known.split().1, threads)).transpose()?;
    let (mut curves, mut start, mut end, mut asked, mut seconds) = (vec![], vec![], vec![], vec![], vec![]);
    for seed in 0..args.common.seeds {
        let passes = (args.steps * train::BATCH * (args.queries + 1)) as u64;
        let plan = Plan { lr: args.lr, passes, seed, threads };
        let run = forward_only(adapter(), Neyman, config.clone(), plan, (&train, &test))?;
        // the rows that it was asked about are paid for: what they taught is kept at once
        let file = artifacts.join(format!("adapter-{seed}.csv"));
        save(&file, &run.model.csv())?;
        let curve = Curve { way: "adapter".into(), seed, looks: run.looks };
        eprintln!("seed {seed}: {:.1} % → {:.1} %, {:.1} s", curve.first(), curve.last(), run.seconds);
        start.push(curve.first());
        end.push(curve.last());
        asked.push(curve.rows() as f64);
        seconds.push(run.seconds);
        curves.push(curve);
    }
    println!(
        "{} rows to train on, {} to test with; mean ± standard deviation of {} seed(s)",
        train.len(),
        test.len(),
        end.len()
    );
    let mut rows = vec![
        vec!["as it is".to_string(), text(&start), "0".into(), String::new()],
        vec!["with the trained adapter".into(), text(&end), format!("{:.0}", spread(&asked).0), text(&seconds)],
    ];
    if let Some(known) = known {
        rows.push(vec!["on the camera that it knows".into(), format!("{known:.1}"), String::new(), String::new()]);
    }
    print_table(&["", "test accuracy, %", "rows asked in training", "seconds"], &rows);
    let summary = json!({
        "steps": args.steps, "batch": train::BATCH, "queries": args.queries, "sigma": args.sigma, "lr": args.lr,
        "feedback": format!("{:?}", args.feedback).to_lowercase(),
        "accuracy_before": figure(&start), "accuracy_after": figure(&end), "accuracy_on_known_data": known,
        "rows_asked": figure(&asked), "seconds": figure(&seconds),
    });
    write(&artifacts, "An adapter in front of a forest", &curves, &summary)?;
    println!("{}: summary.json, accuracy.csv, accuracy.svg, adapter-SEED.csv", artifacts.display());
    Ok(())
}

fn main() -> ExitCode {
    program::run(run)
}
