//! What allocation gains where every covariance is known: an MLP on synthetic data.
//!
//! ```text
//! cargo run --release --example variance_synthetic
//! ```
//!
//! θ is trained for a while with equal shares, then held. Tr Σ_j of each datum follows in closed form from its gradient
//! ([`flops_examples::mlp::Known::trace`]). The learned allocators learn on batches with these variances; then each allocator's gradient is estimated many
//! times, and its squared error against the exact gradient is compared with equal shares' at the same budget.
// devices are `Copy` on some backends only
#![allow(clippy::clone_on_copy)]

use std::process::ExitCode;

use anyhow::{Context, Result};
use burn::module::AutodiffModule;
use burn::optim::AdamConfig;
use burn::train::TrainStep;
use clap::Parser;
use flops_core::allocator::{Allocator, AllocatorKind, AnyAllocator, DatumFeatures, Embeddings, proxy};
use flops_core::estimator::trained_parameters;
use flops_core::{Allocation, Estimator, ForwardConfig, ForwardLearner, QueryBudget, Space};
use flops_examples::backend::{self, AB, B, Device};
use flops_examples::experiment::{Common, Progress, Spread, print_table};
use flops_examples::mlp::{Loss, Mlp, known, rows, synthetic};
use flops_examples::plot::{Panel, Series, panels};
use flops_examples::{cli, mlp};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde::Serialize;
use serde_json::{Map, Value, json};

/// Variance of forward-only gradients by allocator, where the covariances are known.
#[derive(Parser, Debug)]
#[command(name = "variance_synthetic", version)]
struct Args {
    #[command(flatten)]
    common: Common,
    /// Data of a batch.
    #[arg(long, default_value_t = 64)]
    batch_size: usize,
    /// Steps in which the allocators learn.
    #[arg(long, default_value_t = 300)]
    steps: usize,
    /// Estimates whose squared error is averaged [default: 300, with --full 3,000].
    #[arg(long)]
    repeats: Option<usize>,
}

const DATA: usize = 512;
const QUERIES: [usize; 6] = [2, 4, 8, 16, 32, 64];
/// The budget that `relative_variance` in `summary.json` is of.
const MAIN: usize = 16;

/// A row of `variance.csv`.
#[derive(Clone, Serialize)]
struct Row {
    seed: u64,
    queries: usize,
    allocator: &'static str,
    /// Measured: mean squared error of the gradient over that of equal shares.
    relative_variance: f64,
    /// Predicted from the known covariances: J over that of equal shares.
    relative_proxy: f64,
    cv: f64,
    ceiling: f64,
}

fn trained(seed: u64, data: &mlp::MlpBatch<B>, device: &Device, args: &Args) -> Result<Mlp<AB>> {
    let config = ForwardConfig::new(QueryBudget::new(8, 1)?).with_seed(seed);
    let allocator = AnyAllocator::new(AllocatorKind::Uniform, device)?;
    let mut learner = ForwardLearner::new(Mlp::new(Loss::CrossEntropy, seed, device), allocator, config)?;
    let mut optimizer = AdamConfig::new().init();
    let mut rng = StdRng::seed_from_u64(seed);
    for _ in 0..400 {
        let batch = rows(data, &pick(args.batch_size, &mut rng));
        let output = TrainStep::step(&learner, batch);
        learner = learner.optimize::<AB, _>(&mut optimizer, 5e-3, output.grads);
    }
    Ok(learner.model)
}

fn pick(n: usize, rng: &mut StdRng) -> Vec<usize> {
    (0..n).map(|_| rng.random_range(0..DATA)).collect()
}

fn run(args: Args) -> Result<()> {
    anyhow::ensure!((1..=DATA).contains(&args.batch_size), "--batch-size {}: use 1 to {DATA}", args.batch_size);
    let (seeds, threads) = (args.common.seeds()?, args.common.threads()?);
    let artifacts = args.common.artifacts("variance_synthetic")?;
    let device = backend::device()?;
    let repeats = args.repeats.unwrap_or(if args.common.full { 3000 } else { 300 });
    anyhow::ensure!(repeats > 0, "--repeats 0: use at least 1");
    let mut table: Vec<Row> = vec![];
    let mut progress = Progress::default();
    let all = seeds.len() * QUERIES.len();
    for &seed in &seeds {
        let data = synthetic(DATA, Loss::CrossEntropy, seed, &device);
        let model = trained(seed, &data, &device, &args)?;
        let facts = known(&model, &data);
        let trained = trained_parameters(&model);
        let plain = model.valid();
        let estimator = Estimator { sigma: 1e-3, seed, threads, ..Estimator::new(Space::Activation) };
        let clean = estimator.clean(&plain, &data, &trained)?;
        let inputs: Vec<f32> = data.input.to_data().iter::<f32>().collect();
        let width = mlp::SIZES[0];
        for queries in QUERIES {
            progress.at(table.len() / AllocatorKind::ALL.len(), all, || format!("seed {seed}, {queries} queries"));
            let budget = QueryBudget::new(queries, 1)?;
            let mut rng = StdRng::seed_from_u64(seed + 1);
            let mut allocators =
                AllocatorKind::ALL.map(|kind| AnyAllocator::<B>::new(kind, &device).map(|a| (kind, a)));
            let test = pick(args.batch_size, &mut rng);
            let mut learning: Vec<Vec<usize>> = (0..args.steps).map(|_| pick(args.batch_size, &mut rng)).collect();
            learning.push(test.clone());
            let mut squared = vec![];
            for slot in &mut allocators {
                let (kind, allocator) = slot.as_mut().map_err(|e| e.clone())?;
                let mut allocation = None;
                let mut rng = StdRng::seed_from_u64(seed + 2);
                let allocate = |allocator: &AnyAllocator<B>, index: &[usize], rng: &mut StdRng| {
                    let losses: Vec<f64> = index.iter().map(|&i| clean.losses[i]).collect();
                    let variances: Vec<f64> = index.iter().map(|&i| facts[i].trace()).collect();
                    let given: Vec<f32> =
                        index.iter().flat_map(|&i| inputs[i * width..(i + 1) * width].to_vec()).collect();
                    let embeddings = Some(Embeddings::new(&given, width)?);
                    let features =
                        DatumFeatures { losses: &losses, variances: &variances, embeddings, ..Default::default() };
                    allocator.allocate(&features, &budget, rng)
                };
                for index in &learning {
                    let (drawn, update) = allocate(allocator, index, &mut rng)?;
                    *allocator = allocator.clone().apply(update);
                    allocation = Some(drawn);
                }
                let allocation = allocation.context("there is a batch")?;
                squared.push((
                    *kind,
                    error(&estimator, &model, &data, &test, &facts, &allocation, repeats)?,
                    allocation,
                ));
            }
            let variances: Vec<f64> = test.iter().map(|&i| facts[i].trace()).collect();
            let equal = squared[0].1;
            let uniform = Allocation::uniform(test.len(), &budget);
            for (kind, error, allocation) in squared {
                let report = flops_core::allocator::AllocationReport::new(&variances, &allocation, &budget)?;
                table.push(Row {
                    seed,
                    queries,
                    allocator: kind.name(),
                    relative_variance: error / equal,
                    relative_proxy: proxy(&variances, &allocation) / proxy(&variances, &uniform),
                    cv: report.cv,
                    ceiling: report.ceiling,
                });
            }
        }
    }
    report(&args, &artifacts, &table, progress)
}

/// The mean over `repeats` of ‖ĝ − g‖² under an allocation, θ and batch held.
fn error(
    estimator: &Estimator,
    model: &Mlp<AB>,
    data: &mlp::MlpBatch<B>,
    index: &[usize],
    facts: &[mlp::Known],
    allocation: &Allocation,
    repeats: usize,
) -> Result<f64> {
    let (trained, plain) = (trained_parameters(model), model.valid());
    let batch = rows(data, index);
    let clean = estimator.clean(&plain, &batch, &trained)?;
    let n = index.len() as f64;
    let mut truth = vec![0.0; facts[0].gradient.len()];
    for &i in index {
        truth.iter_mut().zip(&facts[i].gradient).for_each(|(t, g)| *t += g / n);
    }
    let mut sum = 0.0;
    for step in 0..repeats {
        let estimate = estimator.estimate(&plain, &batch, &trained, &clean, allocation, step as u64)?;
        let mut got: Vec<f64> = vec![];
        for layer in [&plain.hidden, &plain.output] {
            got.extend(estimate.gradient(&layer.weight).context("a gradient")?.into_data().iter::<f64>());
            let bias = layer.bias.as_ref().context("a bias")?;
            got.extend(estimate.gradient(bias).context("a gradient")?.into_data().iter::<f64>());
        }
        sum += got.iter().zip(&truth).map(|(a, b)| (a - b).powi(2)).sum::<f64>();
    }
    Ok(sum / repeats as f64)
}

fn report(
    args: &Args,
    artifacts: &flops_examples::artifacts::Artifacts,
    table: &[Row],
    progress: Progress,
) -> Result<()> {
    let of = |queries: usize, name: &str, value: &dyn Fn(&Row) -> f64| {
        let rows = table.iter().filter(|r| r.queries == queries && r.allocator == name);
        Spread::of(&rows.map(value).collect::<Vec<_>>())
    };
    let names: Vec<&str> = AllocatorKind::ALL.iter().map(|k| k.name()).collect();
    let mut printed = vec![];
    for queries in QUERIES {
        let mut line = vec![queries.to_string()];
        line.extend(names.iter().map(|name| of(queries, name, &|r| r.relative_variance).text(3)));
        line.push(of(queries, "uniform", &|r| r.ceiling).text(3));
        printed.push(line);
    }
    println!("variance of the gradient relative to equal shares, measured, {} seeds", args.common.seeds);
    let mut header = vec!["queries per datum"];
    header.extend(&names);
    header.push("ceiling 1/(1 + CV²)");
    print_table(&header, &printed);

    let mut series: Vec<Series> = names
        .iter()
        .map(|name| Series {
            name: name.to_string(),
            points: QUERIES
                .iter()
                .map(|&q| {
                    let s = of(q, name, &|r| r.relative_variance);
                    (q as f64, s.mean, s.deviation)
                })
                .collect(),
        })
        .collect();
    series.push(Series::new("ceiling", QUERIES.iter().map(|&q| (q as f64, of(q, "uniform", &|r| r.ceiling).mean))));
    let predicted = names
        .iter()
        .map(|name| Series::new(*name, QUERIES.iter().map(|&q| (q as f64, of(q, name, &|r| r.relative_proxy).mean))));
    let axes = ("queries per datum".to_string(), "variance relative to uniform".to_string());
    let panel = |title: &str, series: Vec<Series>| Panel {
        title: title.into(),
        axes: axes.clone(),
        log: (true, false),
        series,
    };
    let picture = panels(
        "Allocation on a problem of known covariances",
        &[
            panel("measured, ± standard deviation over seeds", series),
            panel("J from the known covariances", predicted.collect()),
        ],
    )?;
    artifacts.write("variance.svg", picture.as_bytes())?;
    artifacts.write_csv("variance.csv", table)?;
    let mut relative: Map<String, Value> =
        names.iter().map(|name| (name.to_string(), json!(of(MAIN, name, &|r| r.relative_variance).mean))).collect();
    relative.insert("ceiling".into(), json!(of(MAIN, "uniform", &|r| r.ceiling).mean));
    let figures = json!({
        "relative_variance": relative,
        "queries": MAIN,
        "cv": of(MAIN, "uniform", &|r| r.cv).mean,
        "by_queries": QUERIES.map(|q| json!({
            "queries": q,
            "relative_variance": names.iter().map(|n| (n.to_string(), json!(of(q, n, &|r| r.relative_variance)))).collect::<Map<_, _>>(),
            "ceiling": of(q, "uniform", &|r| r.ceiling),
        })),
        "batch_size": args.batch_size,
    });
    args.common.finish(artifacts, progress.started(), figures, "variance.svg, variance.csv")
}

fn main() -> ExitCode {
    cli::run(run)
}
