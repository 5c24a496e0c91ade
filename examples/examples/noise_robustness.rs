//! Noise laws × losses: where the estimate of an example is far from Gaussian, and what the
//! allocator then does.
//!
//! ```text
//! cargo run --release --example noise_robustness
//! ```
//!
//! For each law and each loss (smooth, non-smooth, heavy-tailed) a small network is trained twice:
//! with the Neyman allocator, and with uniform allocation. Each uses its own queries. Reported
//! are:
//!
//! - the excess kurtosis of one example's estimate along a random direction (0 for a Gaussian),
//!   from a single query and from the mean of 20;
//! - the variance that the allocation leaves, relative to uniform's, beside its floor. The floor is
//!   computed from the second moments of the same step. These scatter, so the floor is too low;
//! - the final loss of both.
// Devices are `Copy` on some backends only.
#![allow(clippy::clone_on_copy)]

#[macro_use]
extern crate flops_report;

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
use flops_examples::experiment::mlp::{Loss, Mlp, MlpBatch, rows, synthetic};
use flops_examples::experiment::{ExperimentArgs, Progress, Spread, print_table};
use flops_examples::plot::{Heat, heat_maps};
use flops_examples::run::artifacts::Artifacts;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde::Serialize;
use serde_json::{Value, json};

/// Noise laws × losses: the Gaussian assumption, and what allocation gains without it.
#[derive(Parser, Debug)]
#[command(name = "noise_robustness", version)]
struct Args {
    #[command(flatten)]
    experiment: ExperimentArgs,
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

impl Args {
    fn steps(&self) -> usize {
        self.steps.unwrap_or(if self.experiment.full { 2000 } else { 300 })
    }

    fn samples(&self) -> usize {
        self.samples.unwrap_or(if self.experiment.full { 4000 } else { 400 })
    }
}

/// Examples in the data set.
const EXAMPLES: usize = 512;
const BATCH: usize = 64;
/// Examples whose kurtosis is averaged.
const LOOKED_AT: usize = 6;

/// A row of `robustness.csv`.
#[derive(Clone, Serialize)]
struct Row {
    seed: u64,
    noise: NoiseLaw,
    loss: &'static str,
    sigma: f64,
    /// Excess kurtosis of a single query's estimate.
    kurtosis_one: f64,
    /// Excess kurtosis of the mean of the budget's queries.
    kurtosis_mean: f64,
    /// Of the Neyman allocator, over the second half of the steps.
    relative_variance: f64,
    floor: f64,
    final_loss: f64,
    final_loss_uniform: f64,
}

/// Returns σ. A step function needs noise that crosses its steps.
fn sigma(loss: Loss) -> f64 {
    if loss == Loss::ZeroOne { 0.5 } else { 1e-2 }
}

/// The settings of a training run.
#[derive(Clone, Copy)]
struct Setting<'a> {
    args: &'a Args,
    data: &'a MlpBatch<B>,
    loss: Loss,
    noise: NoiseLaw,
    seed: u64,
    threads: usize,
    device: &'a Device,
}

/// A trained network and the figures of its run.
struct Outcome {
    model: Mlp<AB>,
    loss: f64,
    relative_variance: f64,
    floor: f64,
}

impl Setting<'_> {
    fn train(&self, kind: AllocatorKind) -> Result<Outcome> {
        let Self { args, data, loss, noise, seed, threads, device } = *self;
        let config = ForwardConfig::new(QueryBudget::new(args.queries, 1)?)
            .with_noise(noise)
            .with_sigma(sigma(loss))
            .with_seed(seed)
            .with_threads(threads);
        let allocator = AnyAllocator::new(kind, device)?;
        let mut learner = ForwardLearner::new(Mlp::new(loss, seed, device), allocator, config)?;
        let mut optimizer = AdamConfig::new().init();
        let mut rng = StdRng::seed_from_u64(seed);
        let (mut relative, mut floor, mut losses) = (vec![], vec![], vec![]);
        let steps = args.steps();
        for step in 0..steps {
            let index: Vec<usize> = (0..BATCH).map(|_| rng.random_range(0..EXAMPLES)).collect();
            let output = TrainStep::step(&learner, rows(data, &index));
            if let Some(error) = learner.monitor().error() {
                return Err(error.into());
            }
            let report = learner.monitor().take_reports().pop().context("the losses are not finite")?;
            if step >= steps / 2 {
                relative.push(report.allocation.relative_variance);
                floor.push(report.allocation.floor);
            }
            if step >= steps - steps.div_ceil(10) {
                // The largest values dominate the mean of a heavy-tailed loss, so its median is
                // used.
                let mut batch: Vec<f64> = report.data.iter().map(|d| d.loss).collect();
                batch.sort_by(f64::total_cmp);
                losses.push(if loss == Loss::HeavyTailed { batch[batch.len() / 2] } else { report.loss });
            }
            learner = learner.optimize::<AB, _>(&mut optimizer, 5e-3, output.grads);
        }
        let mean = |v: &[f64]| Spread::of(v).mean;
        let model = learner.model;
        Ok(Outcome { model, loss: mean(&losses), relative_variance: mean(&relative), floor: mean(&floor) })
    }

    /// Returns the excess kurtosis of an example's estimate along a random direction, the mean over
    /// a few examples: from a single query, and from the mean of the budget's queries.
    fn kurtosis(&self, model: &Mlp<AB>) -> Result<[f64; 2]> {
        let mut kurtoses = [f64::NAN; 2];
        for (kurtosis, queries) in kurtoses.iter_mut().zip([1, self.args.queries]) {
            let (mut sum, mut count) = (0.0, 0.0);
            for j in 0..LOOKED_AT {
                let values = self.projections(model, j, queries)?;
                if let Some(found) = excess_kurtosis(&values) {
                    sum += found;
                    count += 1.0;
                }
            }
            *kurtosis = sum / count;
        }
        Ok(kurtoses)
    }

    /// Returns estimates of the gradient of one example, projected on a random direction.
    fn projections(&self, model: &Mlp<AB>, j: usize, queries: usize) -> Result<Vec<f64>> {
        let Self { args, data, loss, noise, seed, .. } = *self;
        let (trained, plain) = (trained_parameters(model), model.valid());
        // Noise falls on both layers at once. With one layer per query, half of the queries would
        // tell nothing about the output layer.
        let space = Space::activation().with_placement(Placement::Joint)?;
        let estimator = Estimator { noise, sigma: sigma(loss), seed, ..Estimator::new(space) };
        let batch = rows(data, &[j * EXAMPLES / LOOKED_AT]);
        let clean = estimator.clean(&plain, &batch, &trained)?;
        let allocation = Allocation::uniform(1, &QueryBudget::new(queries, 1)?);
        let mut values = vec![];
        for step in 0..args.samples() {
            let estimate = clean.estimate(&allocation, step as u64)?;
            let gradient = estimate.gradient(&plain.output.weight).context("a gradient")?;
            let mut rng = StdRng::seed_from_u64(seed + j as u64);
            values.push(gradient.into_data().iter::<f64>().map(|g| g * (rng.random::<f64>() - 0.5)).sum());
        }
        Ok(values)
    }

    fn measure(&self) -> Result<Row> {
        let neyman = self.train(AllocatorKind::Neyman)?;
        let uniform = self.train(AllocatorKind::Uniform)?;
        let [kurtosis_one, kurtosis_mean] = self.kurtosis(&neyman.model)?;
        Ok(Row {
            seed: self.seed,
            noise: self.noise,
            loss: self.loss.name(),
            sigma: sigma(self.loss),
            kurtosis_one,
            kurtosis_mean,
            relative_variance: neyman.relative_variance,
            floor: neyman.floor,
            final_loss: neyman.loss,
            final_loss_uniform: uniform.loss,
        })
    }
}

/// Returns the excess kurtosis, or nothing if all values are equal.
fn excess_kurtosis(values: &[f64]) -> Option<f64> {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let moment = |p: i32| values.iter().map(|v| (v - mean).powi(p)).sum::<f64>() / n;
    let variance = moment(2);
    (variance > 0.0).then(|| moment(4) / variance.powi(2) - 3.0)
}

/// The rows of all seeds, losses and laws.
struct Table(Vec<Row>);

impl Table {
    fn spread(&self, loss: Loss, noise: NoiseLaw, value: fn(&Row) -> f64) -> Spread {
        let mine = self.0.iter().filter(|r| r.loss == loss.name() && r.noise == noise).map(value);
        Spread::of(&mine.filter(|v| v.is_finite()).collect::<Vec<_>>())
    }

    /// Returns one value for each loss and law, in the order of the tables.
    fn cells<T>(&self, cell: impl Fn(Loss, NoiseLaw) -> T) -> Vec<T> {
        Loss::ALL.iter().flat_map(|&loss| NoiseLaw::ALL.map(|noise| cell(loss, noise))).collect()
    }

    fn print(&self, queries: usize) {
        let rows = self.cells(|loss, noise| {
            let text = |value: fn(&Row) -> f64, decimals: usize| self.spread(loss, noise, value).text(decimals);
            vec![
                loss.name().to_string(),
                noise.to_string(),
                text(|r| r.kurtosis_one, 1),
                text(|r| r.kurtosis_mean, 2),
                text(|r| r.relative_variance, 3),
                text(|r| r.floor, 3),
                text(|r| r.final_loss, 3),
                text(|r| r.final_loss_uniform, 3),
            ]
        });
        let header = [
            "loss",
            "noise",
            "kurtosis, 1 query",
            &format!("kurtosis, mean of {queries}"),
            "variance over uniform's",
            "floor, in hindsight",
            "final loss",
            "final loss, uniform",
        ];
        print_table(&header, &rows);
    }

    fn draw(&self, artifacts: &Artifacts) -> Result<()> {
        let heat = |title: &str, value: fn(&Row) -> f64, decimals: usize| Heat {
            title: title.into(),
            columns: ("noise".into(), NoiseLaw::ALL.iter().map(|n| n.to_string()).collect()),
            rows: ("loss".into(), Loss::ALL.iter().map(|l| l.name().to_string()).collect()),
            values: Loss::ALL
                .map(|loss| NoiseLaw::ALL.map(|noise| self.spread(loss, noise, value).mean).to_vec())
                .to_vec(),
            decimals,
        };
        let kurtoses =
            [heat("of one query", |r| r.kurtosis_one, 1), heat("of the mean of the budget", |r| r.kurtosis_mean, 2)];
        let kurtoses = heat_maps("Excess kurtosis of one datum's estimate", &kurtoses, 2)?;
        let variances = [heat("reached", |r| r.relative_variance, 2), heat("floor, in hindsight", |r| r.floor, 2)];
        let variances = heat_maps("Variance over uniform's, Neyman allocator", &variances, 2)?;
        artifacts.write("kurtosis.svg", kurtoses.as_bytes())?;
        artifacts.write("variance.svg", variances.as_bytes())
    }

    fn figures(&self) -> Vec<Value> {
        self.cells(|loss, noise| {
            json!({
                "loss": loss.name(), "noise": noise, "sigma": sigma(loss),
                "kurtosis_one": self.spread(loss, noise, |r| r.kurtosis_one),
                "kurtosis_mean": self.spread(loss, noise, |r| r.kurtosis_mean),
                "relative_variance": self.spread(loss, noise, |r| r.relative_variance),
                "floor": self.spread(loss, noise, |r| r.floor),
                "final_loss": self.spread(loss, noise, |r| r.final_loss),
                "final_loss_uniform": self.spread(loss, noise, |r| r.final_loss_uniform),
            })
        })
    }
}

fn run(args: Args) -> Result<()> {
    let (steps, samples) = (args.steps(), args.samples());
    ensure!(steps > 0 && samples > 1, "--steps {steps}, --samples {samples}: use at least 1 step and 2 samples");
    QueryBudget::new(args.queries, 1)?;
    let (seeds, threads) = (args.experiment.seeds()?, args.experiment.threads()?);
    let artifacts = args.experiment.artifacts("noise_robustness")?;
    let device = backend::device()?;
    let mut progress = Progress::default();
    let all = seeds.len() * NoiseLaw::ALL.len() * Loss::ALL.len();
    let mut table = Table(vec![]);
    for &seed in &seeds {
        for loss in Loss::ALL {
            let data = synthetic(EXAMPLES, loss, seed, &device);
            for noise in NoiseLaw::ALL {
                progress.at(table.0.len(), all, || format!("seed {seed}, {noise} noise, {} loss", loss.name()));
                let setting = Setting { args: &args, data: &data, loss, noise, seed, threads, device: &device };
                table.0.push(setting.measure()?);
            }
        }
    }
    println!(
        "{} queries per datum, {steps} steps, {} seeds; kurtosis is excess over a Gaussian's",
        args.queries,
        seeds.len()
    );
    table.print(args.queries);
    table.draw(&artifacts)?;
    artifacts.write_csv("robustness.csv", &table.0)?;
    let figures = json!({"queries": args.queries, "steps": steps, "samples": samples, "cells": table.figures()});
    args.experiment.finish(&artifacts, progress.started(), figures, "kurtosis.svg, variance.svg, robustness.csv")
}

fn main() -> ExitCode {
    cli::run(run)
}
