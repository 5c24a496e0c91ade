//! Noise laws × losses: where the estimator of a datum is far from Gaussian, and what the allocator then does.
//!
//! ```text
//! cargo run --release --example noise_robustness
//! ```
//!
//! For each law and each loss (smooth, non-smooth, heavy-tailed) a small network is trained with the Gaussian allocator, by its own queries, and with equal
//! shares. Reported: the excess kurtosis of one datum's estimate along a random direction (0 for a Gaussian), from a single query and
//! from the mean of 20; the variance that the allocation leaves, relative to uniform's, beside the ceiling by the same step's second moments (which scatter, and make it
//! optimistic); and the final loss of both.
// devices are `Copy` on some backends only
#![allow(clippy::clone_on_copy)]

use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use burn::module::AutodiffModule;
use burn::optim::AdamConfig;
use burn::train::TrainStep;
use clap::Parser;
use flops_core::allocator::{AllocatorKind, AnyAllocator};
use flops_core::estimator::trained_parameters;
use flops_core::{Allocation, Estimator, ForwardConfig, ForwardLearner, NoiseLaw, Placement, QueryBudget, Space};
use flops_examples::backend::{self, AB, B, Device};
use flops_examples::cli;
use flops_examples::experiment::{Common, Progress, Spread, print_table};
use flops_examples::mlp::{Loss, Mlp, MlpBatch, rows, synthetic};
use flops_examples::plot::{Heat, heat_maps};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde::Serialize;
use serde_json::json;

/// Noise laws × losses: the Gaussian assumption and what allocation gains without it.
#[derive(Parser, Debug)]
#[command(name = "noise_robustness", version)]
struct Args {
    #[command(flatten)]
    common: Common,
    /// Queries per datum.
    #[arg(long, default_value_t = 20)]
    queries: usize,
    /// Training steps [default: 300, with --full 2,000].
    #[arg(long)]
    steps: Option<usize>,
    /// Estimates behind each kurtosis [default: 400, with --full 4,000].
    #[arg(long)]
    samples: Option<usize>,
}

const DATA: usize = 512;
const BATCH: usize = 64;
/// Data whose kurtosis is averaged.
const LOOKED_AT: usize = 6;

/// A row of `robustness.csv`.
#[derive(Clone, Serialize)]
struct Row {
    seed: u64,
    noise: NoiseLaw,
    loss: &'static str,
    sigma: f64,
    /// Excess kurtosis of a single query's estimate, and of the mean of the budget's queries.
    kurtosis_one: f64,
    kurtosis_mean: f64,
    /// Of the Gaussian allocator, over the second half of the steps.
    relative_variance: f64,
    ceiling: f64,
    final_loss: f64,
    final_loss_uniform: f64,
}

/// A step function needs noise that crosses its steps.
fn sigma(loss: Loss) -> f64 {
    if loss == Loss::ZeroOne { 0.5 } else { 1e-2 }
}

struct Outcome {
    model: Mlp<AB>,
    loss: f64,
    relative: f64,
    ceiling: f64,
}

/// What a run is about.
#[derive(Clone, Copy)]
struct Setting<'a> {
    args: &'a Args,
    data: &'a MlpBatch<B>,
    loss: Loss,
    noise: NoiseLaw,
    seed: u64,
    steps: usize,
    samples: usize,
    threads: usize,
    device: &'a Device,
}

fn train(setting: Setting<'_>, kind: AllocatorKind) -> Result<Outcome> {
    let Setting { args, data, loss, noise, seed, steps, threads, device, .. } = setting;
    let config = ForwardConfig::new(QueryBudget::new(args.queries, 1)?)
        .with_noise(noise)
        .with_sigma(sigma(loss))
        .with_seed(seed)
        .with_threads(threads);
    let allocator = AnyAllocator::new(kind, device)?;
    let mut learner = ForwardLearner::new(Mlp::new(loss, seed, device), allocator, config)?;
    let mut optimizer = AdamConfig::new().init();
    let mut rng = StdRng::seed_from_u64(seed);
    let (mut relative, mut ceiling, mut losses) = (vec![], vec![], vec![]);
    for step in 0..steps {
        let index: Vec<usize> = (0..BATCH).map(|_| rng.random_range(0..DATA)).collect();
        let output = TrainStep::step(&learner, rows(data, &index));
        if let Some(error) = learner.monitor().error() {
            return Err(error.into());
        }
        let report = learner.monitor().take_reports().pop().context("the losses are not finite")?;
        if step >= steps / 2 {
            relative.push(report.allocation.relative_variance);
            ceiling.push(report.allocation.ceiling);
        }
        if step >= steps - steps.div_ceil(10) {
            // the median: the mean of a heavy-tailed loss is that of its largest
            let mut batch: Vec<f64> = report.data.iter().map(|d| d.loss).collect();
            batch.sort_by(f64::total_cmp);
            losses.push(if loss == Loss::HeavyTailed { batch[batch.len() / 2] } else { report.loss });
        }
        learner = learner.optimize::<AB, _>(&mut optimizer, 5e-3, output.grads);
    }
    let mean = |v: &[f64]| Spread::of(v).mean;
    Ok(Outcome { loss: mean(&losses), relative: mean(&relative), ceiling: mean(&ceiling), model: learner.model })
}

/// Excess kurtosis of the estimates of single data along a random direction, averaged over data.
fn kurtosis(setting: Setting<'_>, model: &Mlp<AB>) -> Result<[f64; 2]> {
    let Setting { args, data, loss, noise, seed, samples, .. } = setting;
    let (trained, plain) = (trained_parameters(model), model.valid());
    // on both layers at once: with one of them, half of the queries would say nothing of this one
    let placement = Placement::Joint;
    let estimator = Estimator { noise, placement, sigma: sigma(loss), seed, ..Estimator::new(Space::Activation) };
    let mut sums = [0.0; 2];
    let mut counted = [0.0; 2];
    for (which, queries) in [1, args.queries].into_iter().enumerate() {
        for j in 0..LOOKED_AT {
            let batch = rows(data, &[j * DATA / LOOKED_AT]);
            let clean = estimator.clean(&plain, &batch, &trained)?;
            let allocation = Allocation::uniform(1, &QueryBudget::new(queries, 1)?);
            let mut values = vec![];
            for step in 0..samples {
                let e = estimator.estimate(&plain, &batch, &trained, &clean, &allocation, step as u64)?;
                let gradient = e.gradient(&plain.output.weight).context("a gradient")?;
                let mut rng = StdRng::seed_from_u64(seed + j as u64);
                values.push(gradient.into_data().iter::<f64>().map(|g| g * (rng.random::<f64>() - 0.5)).sum::<f64>());
            }
            let n = values.len() as f64;
            let centre = values.iter().sum::<f64>() / n;
            let moment = |p: i32| values.iter().map(|v| (v - centre).powi(p)).sum::<f64>() / n;
            let variance = moment(2);
            if variance > 0.0 {
                sums[which] += moment(4) / variance.powi(2) - 3.0;
                counted[which] += 1.0;
            }
        }
    }
    Ok([0, 1].map(|i| sums[i] / counted[i]))
}

fn run(args: Args) -> Result<()> {
    let steps = args.steps.unwrap_or(if args.common.full { 2000 } else { 300 });
    let samples = args.samples.unwrap_or(if args.common.full { 4000 } else { 400 });
    ensure!(steps > 0 && samples > 1, "--steps {steps}, --samples {samples}: use at least 1 step and 2 samples");
    QueryBudget::new(args.queries, 1)?;
    let seeds = args.common.seeds()?;
    let threads = args.common.threads()?;
    let artifacts = args.common.artifacts("noise_robustness")?;
    let device = backend::device()?;
    let mut progress = Progress::default();
    let all = seeds.len() * NoiseLaw::ALL.len() * Loss::ALL.len();
    let mut table = vec![];
    for &seed in &seeds {
        for loss in Loss::ALL {
            let data = synthetic(DATA, loss, seed, &device);
            for noise in NoiseLaw::ALL {
                progress.at(table.len(), all, || format!("seed {seed}, {noise} noise, {} loss", loss.name()));
                let setting =
                    Setting { args: &args, data: &data, loss, noise, seed, steps, samples, threads, device: &device };
                let gaussian = train(setting, AllocatorKind::Gaussian)?;
                let uniform = train(setting, AllocatorKind::Uniform)?;
                let [kurtosis_one, kurtosis_mean] = kurtosis(setting, &gaussian.model)?;
                table.push(Row {
                    seed,
                    noise,
                    loss: loss.name(),
                    sigma: sigma(loss),
                    kurtosis_one,
                    kurtosis_mean,
                    relative_variance: gaussian.relative,
                    ceiling: gaussian.ceiling,
                    final_loss: gaussian.loss,
                    final_loss_uniform: uniform.loss,
                });
            }
        }
    }
    let spread = |loss: Loss, noise: NoiseLaw, of: &dyn Fn(&Row) -> f64| {
        let mine = table.iter().filter(|r| r.loss == loss.name() && r.noise == noise).map(of);
        Spread::of(&mine.filter(|v| v.is_finite()).collect::<Vec<_>>())
    };
    let mut printed = vec![];
    for loss in Loss::ALL {
        for noise in NoiseLaw::ALL {
            let s = |of: &dyn Fn(&Row) -> f64, decimals| spread(loss, noise, of).text(decimals);
            printed.push(vec![
                loss.name().to_string(),
                noise.to_string(),
                s(&|r| r.kurtosis_one, 1),
                s(&|r| r.kurtosis_mean, 2),
                s(&|r| r.relative_variance, 3),
                s(&|r| r.ceiling, 3),
                s(&|r| r.final_loss, 3),
                s(&|r| r.final_loss_uniform, 3),
            ]);
        }
    }
    println!(
        "{} queries per datum, {steps} steps, {} seeds; kurtosis is excess over a Gaussian's",
        args.queries,
        seeds.len()
    );
    let many = format!("kurtosis, mean of {}", args.queries);
    print_table(
        &[
            "loss",
            "noise",
            "kurtosis, 1 query",
            &many,
            "variance over uniform's",
            "ceiling, in hindsight",
            "final loss",
            "final loss, uniform",
        ],
        &printed,
    );
    let heat = |title: &str, of: &dyn Fn(&Row) -> f64, decimals: usize| Heat {
        title: title.into(),
        columns: ("noise".into(), NoiseLaw::ALL.iter().map(|n| n.to_string()).collect()),
        rows: ("loss".into(), Loss::ALL.iter().map(|l| l.name().to_string()).collect()),
        values: Loss::ALL.map(|loss| NoiseLaw::ALL.map(|noise| spread(loss, noise, of).mean).to_vec()).to_vec(),
        decimals,
    };
    let kurtoses = heat_maps(
        "Excess kurtosis of one datum's estimate",
        &[heat("of one query", &|r| r.kurtosis_one, 1), heat("of the mean of the budget", &|r| r.kurtosis_mean, 2)],
        2,
    )?;
    let variances = heat_maps(
        "Variance over uniform's, Gaussian allocator",
        &[heat("reached", &|r| r.relative_variance, 2), heat("ceiling, in hindsight", &|r| r.ceiling, 2)],
        2,
    )?;
    artifacts.write("kurtosis.svg", kurtoses.as_bytes())?;
    artifacts.write("variance.svg", variances.as_bytes())?;
    artifacts.write_csv("robustness.csv", &table)?;
    let cells: Vec<_> = Loss::ALL
        .iter()
        .flat_map(|&loss| NoiseLaw::ALL.map(|noise| (loss, noise)))
        .map(|(loss, noise)| {
            json!({
                "loss": loss.name(), "noise": noise, "sigma": sigma(loss),
                "kurtosis_one": spread(loss, noise, &|r| r.kurtosis_one),
                "kurtosis_mean": spread(loss, noise, &|r| r.kurtosis_mean),
                "relative_variance": spread(loss, noise, &|r| r.relative_variance),
                "ceiling": spread(loss, noise, &|r| r.ceiling),
                "final_loss": spread(loss, noise, &|r| r.final_loss),
                "final_loss_uniform": spread(loss, noise, &|r| r.final_loss_uniform),
            })
        })
        .collect();
    let figures = json!({"queries": args.queries, "steps": steps, "samples": samples, "cells": cells});
    args.common.finish(&artifacts, progress.started(), figures, "kurtosis.svg, variance.svg, robustness.csv")
}

fn main() -> ExitCode {
    cli::run(run)
}
