//! Learning rate × σ × batch size × queries: accuracy, and the error of the gradient, as heat maps.
//!
//! ```text
//! cargo run --release --example sensitivity
//! ```
//!
//! The paper gives one value of each and no guide to others. Here every combination trains the same
//! scope from the same start, with the same total number of queries. The error of the gradient is
//! that of the untrained model, against autodiff.
// Devices are `Copy` on some backends only.
#![allow(clippy::clone_on_copy)]

#[macro_use]
extern crate flops_report;

use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use flops_core::allocator::AllocatorKind;
use flops_core::{ForwardConfig, QueryBudget};
use flops_examples::cli;
use flops_examples::experiment::{
    ExperimentArgs, Optim, Progress, Run, Spread, Testbed, TestbedArgs, estimate, observe, print_table,
    squared_distance,
};
use flops_examples::plot::{Heat, heat_maps};
use flops_examples::run::artifacts::Artifacts;
use serde::Serialize;
use serde_json::{Value, json};

/// Sensitivity to learning rate, σ, batch size and queries.
#[derive(Parser, Debug)]
#[command(name = "sensitivity", version)]
struct Args {
    #[command(flatten)]
    experiment: ExperimentArgs,
    #[command(flatten)]
    testbed: TestbedArgs,
    /// Total queries of each run [default: 40,000, with --full 1,000,000].
    #[arg(long)]
    total: Option<u64>,
    /// Learning rates of AdamW.
    #[arg(long, value_delimiter = ',', default_values_t = [1e-3, 5e-3, 2e-2])]
    lr: Vec<f64>,
    /// Smoothing scales.
    #[arg(long, value_delimiter = ',', default_values_t = [1e-4, 1e-2, 1.0])]
    sigma: Vec<f64>,
    /// Batch sizes.
    #[arg(long, value_delimiter = ',', default_values_t = [16, 64])]
    batch_size: Vec<usize>,
    /// Queries per datum.
    #[arg(long, value_delimiter = ',', default_values_t = [4, 20])]
    queries: Vec<usize>,
}

impl Args {
    fn check(&self) -> Result<()> {
        for (name, empty) in [
            ("--lr", self.lr.is_empty()),
            ("--sigma", self.sigma.is_empty()),
            ("--batch-size", self.batch_size.is_empty()),
            ("--queries", self.queries.is_empty()),
        ] {
            ensure!(!empty, "{name}: give at least one number");
        }
        for &lr in &self.lr {
            ensure!(lr > 0.0 && lr <= 1.0, "--lr {lr}: use numbers above 0 and at most 1");
        }
        for &size in &self.batch_size {
            ensure!(size > 0, "--batch-size 0: use at least 1 image");
        }
        for &sigma in &self.sigma {
            for &queries in &self.queries {
                config(sigma, queries, 0)?;
            }
        }
        Ok(())
    }

    fn total(&self) -> u64 {
        self.total.unwrap_or(if self.experiment.full { 1_000_000 } else { 40_000 })
    }

    /// Returns the pairs of batch size and queries per datum; each has a heat map.
    fn budgets(&self) -> impl Iterator<Item = (usize, usize)> {
        self.batch_size.iter().flat_map(move |&size| self.queries.iter().map(move |&queries| (size, queries)))
    }
}

/// A row of `sensitivity.csv`.
#[derive(Clone, Serialize)]
struct Row {
    seed: u64,
    lr: f64,
    sigma: f64,
    batch_size: usize,
    queries: usize,
    /// Test accuracy in percent; empty if training diverged.
    accuracy: Option<f64>,
    /// ‖ĝ − g‖²/‖g‖² at the start, the mean over a few batches.
    relative_error: f64,
}

/// Batches behind each error.
const LOOKS: usize = 4;

fn config(sigma: f64, queries: usize, seed: u64) -> Result<ForwardConfig> {
    let config = ForwardConfig::new(QueryBudget::new(queries, 1)?).with_sigma(sigma).with_seed(seed);
    config.validate()?;
    Ok(config)
}

/// A combination of settings, apart from the learning rate.
#[derive(Clone, Copy)]
struct Setting {
    seed: u64,
    batch_size: usize,
    queries: usize,
    sigma: f64,
}

impl Setting {
    /// Measures ‖ĝ − g‖²/‖g‖² of the untrained model.
    fn relative_error(self, testbed: &Testbed) -> Result<f64> {
        let config = config(self.sigma, self.queries, self.seed)?;
        let mut learner = testbed.learner(testbed.model(self.seed), config, AllocatorKind::Neyman)?;
        let mut batches = testbed.batches(self.batch_size, self.seed)?;
        let mut errors = vec![];
        for _ in 0..LOOKS {
            let batch = batches.next().context("there are no images")?;
            let truth = testbed.true_gradient(&learner.model.clone(), &batch);
            let (grads, _) = estimate(&learner, batch)?;
            let (error, norm) = squared_distance(&learner.model, &grads, &truth);
            errors.push(error / norm);
            learner = observe(learner, grads);
        }
        Ok(Spread::of(&errors).mean)
    }

    /// Trains, and returns the test accuracy in percent, or nothing if training diverged.
    fn accuracy(self, testbed: &Testbed, lr: f64, total: u64) -> Result<Option<f64>> {
        let config = config(self.sigma, self.queries, self.seed)?;
        let learner = testbed.learner(testbed.model(self.seed), config, AllocatorKind::Neyman)?;
        let steps = (total / (self.queries * self.batch_size) as u64).max(1) as usize;
        let run = Run::new(learner, Optim::adam(), lr, steps);
        match run.finish(&mut testbed.batches(self.batch_size, self.seed)?, |_, _| {}) {
            Ok((run, _)) => Ok(Some(100.0 * testbed.evaluate(&run.learner.model)?.1)),
            Err(_) => Ok(None),
        }
    }
}

/// Measures every combination on every seed.
fn measure(args: &Args, seeds: &[u64], testbed: &Testbed, progress: &mut Progress) -> Result<Vec<Row>> {
    let all = seeds.len() * args.budgets().count() * args.sigma.len() * args.lr.len();
    let mut rows = vec![];
    for &seed in seeds {
        for (batch_size, queries) in args.budgets() {
            for &sigma in &args.sigma {
                let setting = Setting { seed, batch_size, queries, sigma };
                let relative_error = setting.relative_error(testbed)?;
                for &lr in &args.lr {
                    progress.at(rows.len(), all, || {
                        format!("seed {seed}, batch {batch_size}, {queries} queries, σ {sigma}, lr {lr}")
                    });
                    let accuracy = setting.accuracy(testbed, lr, args.total())?;
                    rows.push(Row { seed, lr, sigma, batch_size, queries, accuracy, relative_error });
                }
            }
        }
    }
    Ok(rows)
}

/// The rows of one combination, over seeds.
struct Cell<'a> {
    lr: f64,
    sigma: f64,
    batch_size: usize,
    queries: usize,
    rows: Vec<&'a Row>,
}

impl<'a> Cell<'a> {
    fn new(table: &'a [Row], lr: f64, sigma: f64, (batch_size, queries): (usize, usize)) -> Self {
        let key = (lr, sigma, batch_size, queries);
        let rows = table.iter().filter(|r| (r.lr, r.sigma, r.batch_size, r.queries) == key).collect();
        Self { lr, sigma, batch_size, queries, rows }
    }

    fn accuracy(&self) -> Spread {
        Spread::of(&self.rows.iter().filter_map(|r| r.accuracy).collect::<Vec<_>>())
    }

    fn error(&self) -> Spread {
        Spread::of(&self.rows.iter().map(|r| r.relative_error).collect::<Vec<_>>())
    }

    fn log_error(&self) -> f64 {
        Spread::of(&self.rows.iter().map(|r| r.relative_error.log10()).collect::<Vec<_>>()).mean
    }

    /// Returns the order of the cells: the mean accuracy. A cell whose runs all diverged is the
    /// worst.
    fn rank(&self) -> f64 {
        let mean = self.accuracy().mean;
        if mean.is_nan() { f64::NEG_INFINITY } else { mean }
    }

    fn line(&self) -> Vec<String> {
        vec![
            self.lr.to_string(),
            self.sigma.to_string(),
            self.batch_size.to_string(),
            self.queries.to_string(),
            self.accuracy().text(1),
            format!("{:.2e}", self.error().mean),
        ]
    }

    fn figures(&self) -> Value {
        json!({
            "lr": self.lr, "sigma": self.sigma, "batch_size": self.batch_size, "queries": self.queries,
            "accuracy_percent": self.accuracy(), "relative_error": self.error(),
            "diverged": self.rows.iter().filter(|r| r.accuracy.is_none()).count(),
        })
    }
}

/// Draws a heat map for each budget: accuracy by learning rate and σ, and the error of the gradient
/// by σ.
fn draw(args: &Args, table: &[Row], artifacts: &Artifacts) -> Result<()> {
    let maps = |lrs: &[f64], value: fn(&Cell<'_>) -> f64, decimals: usize| -> Vec<Heat> {
        let row = |lr: f64, budget| -> Vec<f64> {
            args.sigma.iter().map(|&s| value(&Cell::new(table, lr, s, budget))).collect()
        };
        let map = |(batch_size, queries)| Heat {
            title: format!("batch {batch_size}, {queries} queries per datum"),
            columns: ("σ".into(), args.sigma.iter().map(f64::to_string).collect()),
            rows: ("lr".into(), lrs.iter().map(f64::to_string).collect()),
            values: lrs.iter().map(|&lr| row(lr, (batch_size, queries))).collect(),
            decimals,
        };
        args.budgets().map(map).collect()
    };
    let (testbed, total, wide) = (&args.testbed, args.total(), args.queries.len());
    let title =
        format!("{}, scope {}: test accuracy in % after {total} queries", testbed.images.dataset, testbed.scope);
    let accuracy = maps(&args.lr, |cell| cell.accuracy().mean, 1);
    artifacts.write("accuracy.svg", heat_maps(&title, &accuracy, wide)?.as_bytes())?;
    // The error does not depend on the learning rate, so one row shows it.
    let error = maps(&args.lr[..1], |cell| cell.log_error(), 2).into_iter();
    let error: Vec<Heat> = error.map(|map| Heat { rows: ("".into(), vec!["any lr".into()]), ..map }).collect();
    let title = "log₁₀ of the squared error of the gradient over its squared norm, untrained";
    artifacts.write("error.svg", heat_maps(title, &error, wide)?.as_bytes())
}

fn run(args: Args) -> Result<()> {
    args.check()?;
    let seeds = args.experiment.seeds()?;
    let artifacts = args.experiment.artifacts("sensitivity")?;
    let testbed = Testbed::open(&args.testbed, args.experiment.threads()?)?;
    let mut progress = Progress::default();
    let table = measure(&args, &seeds, &testbed, &mut progress)?;
    draw(&args, &table, &artifacts)?;
    artifacts.write_csv("sensitivity.csv", &table)?;

    let args = &args;
    let of_budget = |budget| args.lr.iter().flat_map(move |&lr| args.sigma.iter().map(move |&s| (lr, s, budget)));
    let cells = args.budgets().flat_map(of_budget).map(|(lr, sigma, budget)| Cell::new(&table, lr, sigma, budget));
    let mut cells: Vec<Cell<'_>> = cells.collect();
    cells.sort_by(|a, b| b.rank().total_cmp(&a.rank()));
    println!(
        "{}, scope {}, {} queries in total, {} seeds; the best first",
        args.testbed.images.dataset,
        args.testbed.scope,
        args.total(),
        seeds.len()
    );
    let lines: Vec<Vec<String>> = cells.iter().map(Cell::line).collect();
    print_table(&["lr", "σ", "batch", "queries", "test accuracy, %", "error of the gradient"], &lines);
    let figures = json!({
        "dataset": args.testbed.images.dataset.to_string(),
        "scope": args.testbed.scope.to_string(),
        "total": args.total(),
        "cells": cells.iter().map(Cell::figures).collect::<Vec<_>>(),
    });
    args.experiment.finish(&artifacts, progress.started(), figures, "accuracy.svg, error.svg, sensitivity.csv")
}

fn main() -> ExitCode {
    cli::run(run)
}
