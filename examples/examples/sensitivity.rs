//! Learning rate × σ × batch size × queries: accuracy, and the error of the gradient, as heat maps.
//!
//! ```text
//! cargo run --release --example sensitivity
//! ```
//!
//! The paper gives one setting of each and no guide to others. Here every combination trains the same scope from the same start, at the same number of queries in
//! all; the error of the gradient is that of the untrained model, against autodiff.
// devices are `Copy` on some backends only
#![allow(clippy::clone_on_copy)]

use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use flops_core::allocator::AllocatorKind;
use flops_core::{ForwardConfig, QueryBudget};
use flops_examples::cli;
use flops_examples::experiment::{Common, Progress, Spread, print_table};
use flops_examples::lab::{Lab, LabArgs, Optim, Run, estimate, observe, squared_distance};
use flops_examples::plot::{Heat, heat_maps};
use serde::Serialize;
use serde_json::{Value, json};

/// Sensitivity to learning rate, σ, batch size and queries.
#[derive(Parser, Debug)]
#[command(name = "sensitivity", version)]
struct Args {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    lab: LabArgs,
    /// Queries of each run in all [default: 40,000, with --full 1,000,000].
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

/// A row of `sensitivity.csv`.
#[derive(Clone, Serialize)]
struct Row {
    seed: u64,
    lr: f64,
    sigma: f64,
    batch_size: usize,
    queries: usize,
    /// Test accuracy in percent; empty where training diverged.
    accuracy: Option<f64>,
    /// ‖ĝ − g‖²/‖g‖² at the start, mean over a few batches.
    relative_error: f64,
}

/// Batches behind each error.
const LOOKS: usize = 4;

fn config(sigma: f64, queries: usize, seed: u64) -> Result<ForwardConfig> {
    let config = ForwardConfig::new(QueryBudget::new(queries, 1)?).with_sigma(sigma).with_seed(seed);
    config.validate()?;
    Ok(config)
}

fn run(args: Args) -> Result<()> {
    for (name, empty) in [
        ("--lr", args.lr.is_empty()),
        ("--sigma", args.sigma.is_empty()),
        ("--batch-size", args.batch_size.is_empty()),
        ("--queries", args.queries.is_empty()),
    ] {
        ensure!(!empty, "{name}: give at least one number");
    }
    for &lr in &args.lr {
        ensure!(lr > 0.0 && lr <= 1.0, "--lr {lr}: use numbers above 0 and at most 1");
    }
    for &size in &args.batch_size {
        ensure!(size > 0, "--batch-size 0: use at least 1 image");
    }
    for &sigma in &args.sigma {
        for &queries in &args.queries {
            config(sigma, queries, 0)?;
        }
    }
    let total = args.total.unwrap_or(if args.common.full { 1_000_000 } else { 40_000 });
    let seeds = args.common.seeds()?;
    let artifacts = args.common.artifacts("sensitivity")?;
    let mut lab = Lab::open(&args.lab, args.common.threads()?)?;
    let mut progress = Progress::default();
    let all = seeds.len() * args.lr.len() * args.sigma.len() * args.batch_size.len() * args.queries.len();
    let mut table = vec![];
    for &seed in &seeds {
        for &batch_size in &args.batch_size {
            for &queries in &args.queries {
                for &sigma in &args.sigma {
                    let mut learner =
                        lab.learner(lab.model(seed), config(sigma, queries, seed)?, AllocatorKind::Gaussian)?;
                    let mut batches = lab.batches(batch_size, seed)?;
                    let mut errors = vec![];
                    for _ in 0..LOOKS {
                        let batch = batches.next().context("there are no images")?;
                        let truth = lab.true_gradient(&learner.model.clone(), &batch);
                        let (grads, _) = estimate(&learner, batch)?;
                        let (error, norm) = squared_distance(&learner.model, &grads, &truth);
                        errors.push(error / norm);
                        learner = observe(learner, grads);
                    }
                    let relative_error = Spread::of(&errors).mean;
                    for &lr in &args.lr {
                        progress.at(table.len(), all, || {
                            format!("seed {seed}, batch {batch_size}, {queries} queries, σ {sigma}, lr {lr}")
                        });
                        let learner =
                            lab.learner(lab.model(seed), config(sigma, queries, seed)?, AllocatorKind::Gaussian)?;
                        let steps = (total / (queries * batch_size) as u64).max(1) as usize;
                        let ran = Run::new(learner, Optim::adam(), lr, steps)
                            .finish(&mut lab.batches(batch_size, seed)?, |_, _| {});
                        // a setting at which training diverges has no accuracy
                        let accuracy = match ran {
                            Ok((run, _)) => Some(100.0 * lab.evaluate(&run.learner.model)?.1),
                            Err(_) => None,
                        };
                        table.push(Row { seed, lr, sigma, batch_size, queries, accuracy, relative_error });
                    }
                }
            }
        }
    }
    let cell = |lr: f64, sigma: f64, batch_size: usize, queries: usize, of: &dyn Fn(&Row) -> Option<f64>| {
        let mine = table
            .iter()
            .filter(|r| r.lr == lr && r.sigma == sigma && r.batch_size == batch_size && r.queries == queries);
        Spread::of(&mine.filter_map(of).collect::<Vec<_>>())
    };
    let panels = |of: &dyn Fn(f64, f64, usize, usize) -> f64, decimals: usize| -> Vec<Heat> {
        let mut maps = vec![];
        for &batch_size in &args.batch_size {
            for &queries in &args.queries {
                maps.push(Heat {
                    title: format!("batch {batch_size}, {queries} queries per datum"),
                    columns: ("σ".into(), args.sigma.iter().map(f64::to_string).collect()),
                    rows: ("lr".into(), args.lr.iter().map(f64::to_string).collect()),
                    values: args
                        .lr
                        .iter()
                        .map(|&lr| args.sigma.iter().map(|&sigma| of(lr, sigma, batch_size, queries)).collect())
                        .collect(),
                    decimals,
                });
            }
        }
        maps
    };
    let accuracy = panels(&|lr, sigma, b, q| cell(lr, sigma, b, q, &|r| r.accuracy).mean, 1);
    let error = panels(&|lr, sigma, b, q| cell(lr, sigma, b, q, &|r| Some(r.relative_error.log10())).mean, 2);
    let wide = args.queries.len();
    let title = format!("{}, scope {}: test accuracy in % after {total} queries", args.lab.dataset, args.lab.scope);
    artifacts.write("accuracy.svg", heat_maps(&title, &accuracy, wide)?.as_bytes())?;
    // the error does not depend on the learning rate: one row of it
    let error: Vec<Heat> = error
        .into_iter()
        .map(|map| Heat { rows: ("".into(), vec!["any lr".into()]), values: vec![map.values[0].clone()], ..map })
        .collect();
    let title = "log₁₀ of the squared error of the gradient over its squared norm, untrained";
    artifacts.write("error.svg", heat_maps(title, &error, wide)?.as_bytes())?;
    artifacts.write_csv("sensitivity.csv", &table)?;

    let mut cells: Vec<(Value, f64, Vec<String>)> = vec![];
    for &batch_size in &args.batch_size {
        for &queries in &args.queries {
            for &lr in &args.lr {
                for &sigma in &args.sigma {
                    let got = cell(lr, sigma, batch_size, queries, &|r| r.accuracy);
                    let error = cell(lr, sigma, batch_size, queries, &|r| Some(r.relative_error));
                    cells.push((
                        json!({
                            "lr": lr, "sigma": sigma, "batch_size": batch_size, "queries": queries,
                            "accuracy_percent": got, "relative_error": error,
                            "diverged": table.iter().filter(|r| {
                                (r.lr, r.sigma, r.batch_size, r.queries) == (lr, sigma, batch_size, queries) && r.accuracy.is_none()
                            }).count(),
                        }),
                        got.mean,
                        vec![
                            lr.to_string(),
                            sigma.to_string(),
                            batch_size.to_string(),
                            queries.to_string(),
                            got.text(1),
                            format!("{:.2e}", error.mean),
                        ],
                    ));
                }
            }
        }
    }
    // a setting at which every seed diverged is the worst
    let rank = |accuracy: f64| if accuracy.is_nan() { f64::NEG_INFINITY } else { accuracy };
    cells.sort_by(|a, b| rank(b.1).total_cmp(&rank(a.1)));
    println!(
        "{}, scope {}, {total} queries in all, {} seeds; the best first",
        args.lab.dataset,
        args.lab.scope,
        seeds.len()
    );
    let printed: Vec<Vec<String>> = cells.iter().map(|c| c.2.clone()).collect();
    print_table(&["lr", "σ", "batch", "queries", "test accuracy, %", "error of the gradient"], &printed);
    let figures = json!({
        "dataset": args.lab.dataset.to_string(),
        "scope": args.lab.scope.to_string(),
        "total": total,
        "cells": cells.into_iter().map(|c| c.0).collect::<Vec<_>>(),
    });
    args.common.finish(&artifacts, progress.started(), figures, "accuracy.svg, error.svg, sensitivity.csv")
}

fn main() -> ExitCode {
    cli::run(run)
}
