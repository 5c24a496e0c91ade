//! What allocation gains when every covariance is known: an MLP on synthetic data.
//!
//! ```text
//! cargo run --release --example variance_synthetic
//! ```
//!
//! 1. *Train.* θ is trained with uniform allocation, then held.
//! 2. *Variances.* Tr Σ_j of each example follows in closed form from its gradient
//!    ([`flops_examples::experiment::mlp::ExactDatum::trace`]).
//! 3. *Learn.* The learned allocators learn on batches whose queries show these variances.
//! 4. *Measure.* Each allocator's gradient is estimated many times. Its squared error against the
//!    exact gradient is compared with that of uniform allocation at the same budget.
//! 5. *Leave out.* The Gaussian allocator learns without one parameter or another; J is compared.
//! 6. *Sample data instead.* As many queries fall on examples drawn by importance, with weights 1/p.
//!    Its variance has a closed form, as Neyman's has.
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
use flops_core::allocator::{
    AllocationReport, Allocator, AllocatorKind, AnyAllocator, DatumFeatures, Embeddings, GaussianAllocatorConfig,
    MeanModel, Shown, variance_objective,
};
use flops_core::estimator::trained_parameters;
use flops_core::{Allocation, Estimator, ForwardConfig, ForwardLearner, QueryBudget, Space};
use flops_examples::backend::{self, AB, B, Device};
use flops_examples::cli;
use flops_examples::experiment::mlp::{self, ExactDatum, Loss, Mlp, MlpBatch, exact_data, rows, synthetic};
use flops_examples::experiment::{ExperimentArgs, Progress, Spread, print_table};
use flops_examples::plot::{Panel, Series, panels};
use flops_examples::run::artifacts::Artifacts;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde::Serialize;
use serde_json::{Map, Value, json};

/// Variance of forward-only gradients by allocator when the covariances are known.
#[derive(Parser, Debug)]
#[command(name = "variance_synthetic", version)]
struct Args {
    #[command(flatten)]
    experiment: ExperimentArgs,
    /// Examples in a batch.
    #[arg(long, default_value_t = 64)]
    batch_size: usize,
    /// Steps in which the allocators learn.
    #[arg(long, default_value_t = 300)]
    steps: usize,
    /// Estimates whose squared error is averaged [default: 300, with --full 3,000].
    #[arg(long)]
    repeats: Option<usize>,
}

impl Args {
    fn repeats(&self) -> usize {
        self.repeats.unwrap_or(if self.experiment.full { 3000 } else { 300 })
    }
}

/// Examples in the data set.
const EXAMPLES: usize = 512;
/// Queries per datum that are compared.
const QUERIES: [usize; 6] = [2, 4, 8, 16, 32, 64];
/// Queries per datum of the figures at the top of `summary.json`.
const MAIN: usize = 16;

/// A row of `variance.csv`.
#[derive(Clone, Serialize)]
struct Row {
    seed: u64,
    queries: usize,
    allocator: &'static str,
    /// Measured: the mean squared error of the gradient over that of uniform allocation.
    relative_variance: f64,
    /// Predicted from the known covariances: J over that of uniform allocation.
    relative_objective: f64,
    /// The coefficient of variation of √(Tr Σ_j) over the batch.
    cv: f64,
    /// 1/(1 + CV²): no allocation gets below it.
    floor: f64,
}

/// A row of `parameters.csv`: the Gaussian allocator with some of its parameters.
#[derive(Clone, Serialize)]
struct Variant {
    seed: u64,
    parameters: &'static str,
    /// J from the known covariances over that of uniform allocation, at [`MAIN`] queries.
    relative_objective: f64,
}

/// A row of `sampling.csv`: variances over uniform allocation's, in closed form for real numbers of
/// queries.
#[derive(Clone, Serialize)]
struct Sampling {
    seed: u64,
    /// (mean √S)² / mean S, with S_j = Tr Σ_j.
    neyman: f64,
    /// ((mean √m)² − ‖g‖²) / mean S, with m_j = S_j + ‖g_j‖² and g the mean of the gradients g_j.
    importance: f64,
}

/// Draws the indices of a batch.
fn draw_batch(n: usize, rng: &mut StdRng) -> Vec<usize> {
    (0..n).map(|_| rng.random_range(0..EXAMPLES)).collect()
}

/// Trains the network for 400 steps with uniform allocation.
fn train(seed: u64, data: &MlpBatch<B>, device: &Device, batch_size: usize) -> Result<Mlp<AB>> {
    let config = ForwardConfig::new(QueryBudget::new(8, 1)?).with_seed(seed);
    let allocator = AnyAllocator::new(AllocatorKind::Uniform, device)?;
    let mut learner = ForwardLearner::new(Mlp::new(Loss::CrossEntropy, seed, device), allocator, config)?;
    let mut optimizer = AdamConfig::new().init();
    let mut rng = StdRng::seed_from_u64(seed);
    for _ in 0..400 {
        let batch = rows(data, &draw_batch(batch_size, &mut rng));
        let output = TrainStep::step(&learner, batch);
        learner = learner.optimize::<AB, _>(&mut optimizer, 5e-3, output.grads);
    }
    Ok(learner.model)
}

/// A trained network, its data, and the exact quantities of every example.
struct Problem {
    seed: u64,
    data: MlpBatch<B>,
    model: Mlp<AB>,
    exact: Vec<ExactDatum>,
    losses: Vec<f64>,
    /// The inputs, one row of [`mlp::SIZES`]`[0]` values per example.
    inputs: Vec<f32>,
    estimator: Estimator,
}

impl Problem {
    fn new(seed: u64, threads: usize, batch_size: usize, device: &Device) -> Result<Self> {
        let data = synthetic(EXAMPLES, Loss::CrossEntropy, seed, device);
        let model = train(seed, &data, device, batch_size)?;
        let exact = exact_data(&model, &data);
        let estimator = Estimator { sigma: 1e-3, seed, threads, ..Estimator::new(Space::activation()) };
        let losses = estimator.clean(&model.valid(), &data, &trained_parameters(&model))?.losses;
        let inputs = data.input.to_data().iter::<f32>().collect();
        Ok(Self { seed, data, model, exact, losses, inputs, estimator })
    }

    fn variances(&self, index: &[usize]) -> Vec<f64> {
        index.iter().map(|&i| self.exact[i].trace()).collect()
    }

    /// Lets an allocator learn on `batches`, with the inputs as embeddings if it is to have any.
    /// Returns its allocation for the last one.
    fn learn(
        &self,
        mut allocator: AnyAllocator<B>,
        batches: &[Vec<usize>],
        budget: &QueryBudget,
        embedded: bool,
    ) -> Result<Allocation> {
        let width = mlp::SIZES[0];
        let mut rng = StdRng::seed_from_u64(self.seed + 2);
        let mut last = None;
        for index in batches {
            let losses: Vec<f64> = index.iter().map(|&i| self.losses[i]).collect();
            let variances = self.variances(index);
            let inputs: Vec<f32> =
                index.iter().flat_map(|&i| &self.inputs[i * width..(i + 1) * width]).copied().collect();
            let embeddings = if embedded { Some(Embeddings::new(&inputs, width)?) } else { None };
            let features = DatumFeatures { losses: &losses, variances: &variances, embeddings, ..Default::default() };
            let (allocation, update) = allocator.allocate(&features, budget, &mut rng)?;
            allocator = allocator.apply(update, &Shown::new(&variances));
            last = Some(allocation);
        }
        last.context("there is a batch")
    }

    /// Returns the mean of ‖ĝ − g‖² over `repeats` estimates under an allocation; θ and batch are
    /// held.
    fn error(&self, index: &[usize], allocation: &Allocation, repeats: usize) -> Result<f64> {
        let (trained, plain) = (trained_parameters(&self.model), self.model.valid());
        let batch = rows(&self.data, index);
        let clean = self.estimator.clean(&plain, &batch, &trained)?;
        let truth = self.exact_gradient(index);
        let mut sum = 0.0;
        for step in 0..repeats {
            let estimate = clean.estimate(allocation, step as u64)?;
            let mut found: Vec<f64> = vec![];
            for layer in [&plain.hidden, &plain.output] {
                found.extend(estimate.gradient(&layer.weight).context("a gradient")?.into_data().iter::<f64>());
                let bias = layer.bias.as_ref().context("a bias")?;
                found.extend(estimate.gradient(bias).context("a gradient")?.into_data().iter::<f64>());
            }
            sum += found.iter().zip(&truth).map(|(a, b)| (a - b).powi(2)).sum::<f64>();
        }
        Ok(sum / repeats as f64)
    }

    /// Returns the exact gradient of the mean loss of a batch.
    fn exact_gradient(&self, index: &[usize]) -> Vec<f64> {
        let n = index.len() as f64;
        let mut sum = vec![0.0; self.exact[0].gradient.len()];
        for &i in index {
            sum.iter_mut().zip(&self.exact[i].gradient).for_each(|(t, g)| *t += g / n);
        }
        sum
    }

    /// Returns the batch that is measured.
    fn test_batch(&self, args: &Args) -> Vec<usize> {
        draw_batch(args.batch_size, &mut StdRng::seed_from_u64(self.seed + 1))
    }

    /// Returns the batches that allocators learn on, and last the one that is measured.
    fn batches(&self, args: &Args) -> Vec<Vec<usize>> {
        let mut rng = StdRng::seed_from_u64(self.seed + 1);
        let test = draw_batch(args.batch_size, &mut rng);
        (0..args.steps).map(|_| draw_batch(args.batch_size, &mut rng)).chain([test]).collect()
    }

    /// Leaves parameters of the Gaussian allocator out.
    fn variants(&self, args: &Args, device: &Device) -> Result<Vec<Variant>> {
        let (budget, batches, test) = (QueryBudget::new(MAIN, 1)?, self.batches(args), self.test_batch(args));
        let (variances, full) = (self.variances(&test), GaussianAllocatorConfig::new());
        let uniform = variance_objective(&variances, &Allocation::uniform(test.len(), &budget));
        // Without embeddings all distances are 1: the covariance then adds common noise, which the
        // projection undoes, and γ has nothing to shape. A floor above σ's bound pins it at 0.5.
        let variants = [
            ("β₁, ψ, σ, γ", full.clone(), true),
            ("without γ", full.clone(), false),
            ("without learning σ", full.clone().with_sigma_floor(1e3), true),
            ("without γ and learning σ", full.clone().with_sigma_floor(1e3), false),
            ("without ψ", full.clone().with_mean(MeanModel::Loss), true),
            ("without learning", full.clone().with_updates_per_step(0), true),
            ("β₁, σ, γ, and a draw: the paper", GaussianAllocatorConfig::paper(), true),
        ];
        let row = |(parameters, config, embedded): (&'static str, GaussianAllocatorConfig, bool)| {
            let allocator = AnyAllocator::Gaussian(config.init(device)?);
            let allocation = self.learn(allocator, &batches, &budget, embedded)?;
            let relative_objective = variance_objective(&variances, &allocation) / uniform;
            Ok(Variant { seed: self.seed, parameters, relative_objective })
        };
        variants.into_iter().map(row).collect()
    }

    /// Compares Neyman allocation with importance sampling of the examples of a batch.
    fn sampling(&self, index: &[usize]) -> Sampling {
        let n = index.len() as f64;
        let squared = |g: &[f64]| g.iter().map(|v| v * v).sum::<f64>();
        let mean = |value: &dyn Fn(&ExactDatum) -> f64| index.iter().map(|&i| value(&self.exact[i])).sum::<f64>() / n;
        let uniform = mean(&|d| d.trace());
        let roots = mean(&|d| (d.trace() + squared(&d.gradient)).sqrt());
        let importance = (roots.powi(2) - squared(&self.exact_gradient(index))) / uniform;
        Sampling { seed: self.seed, neyman: mean(&|d| d.trace().sqrt()).powi(2) / uniform, importance }
    }

    /// Compares the allocators at one budget.
    fn compare(&self, queries: usize, args: &Args, device: &Device) -> Result<Vec<Row>> {
        let budget = QueryBudget::new(queries, 1)?;
        let batches = self.batches(args);
        let test = self.test_batch(args);
        let mut found = vec![];
        for kind in AllocatorKind::ALL {
            let allocation = self.learn(AnyAllocator::new(kind, device)?, &batches, &budget, true)?;
            found.push((kind, self.error(&test, &allocation, args.repeats())?, allocation));
        }
        let variances = self.variances(&test);
        let uniform = Allocation::uniform(test.len(), &budget);
        let uniform_error = found[0].1;
        let row = |(kind, error, allocation): (AllocatorKind, f64, Allocation)| -> Result<Row> {
            let report = AllocationReport::new(&variances, &allocation, &budget)?;
            Ok(Row {
                seed: self.seed,
                queries,
                allocator: kind.name(),
                relative_variance: error / uniform_error,
                relative_objective: variance_objective(&variances, &allocation)
                    / variance_objective(&variances, &uniform),
                cv: report.cv,
                floor: report.floor,
            })
        };
        found.into_iter().map(row).collect()
    }
}

/// The rows of all seeds, budgets and allocators.
struct Table(Vec<Row>);

impl Table {
    fn spread(&self, queries: usize, allocator: &str, value: impl Fn(&Row) -> f64) -> Spread {
        let rows = self.0.iter().filter(|r| r.queries == queries && r.allocator == allocator);
        Spread::of(&rows.map(value).collect::<Vec<_>>())
    }

    fn print(&self, names: &[&str]) {
        let line = |queries: usize| -> Vec<String> {
            let variances = names.iter().map(|name| self.spread(queries, name, |r| r.relative_variance).text(3));
            let floor = self.spread(queries, "uniform", |r| r.floor).text(3);
            std::iter::once(queries.to_string()).chain(variances).chain([floor]).collect()
        };
        let header = [&["queries per datum"][..], names, &["floor 1/(1 + CV²)"][..]].concat();
        print_table(&header, &QUERIES.map(line));
    }

    fn draw(&self, names: &[&str]) -> Result<String> {
        let measured = names.iter().map(|name| {
            let point = |q: usize| {
                let s = self.spread(q, name, |r| r.relative_variance);
                (q as f64, s.mean, s.deviation)
            };
            Series { name: name.to_string(), points: QUERIES.map(point).to_vec() }
        });
        let means = |name: &str, allocator: &str, value: fn(&Row) -> f64| {
            Series::new(name, QUERIES.map(|q| (q as f64, self.spread(q, allocator, value).mean)))
        };
        let floor = means("floor", "uniform", |r| r.floor);
        let predicted = names.iter().map(|name| means(name, name, |r| r.relative_objective)).collect();
        let panel = |title: &str, series: Vec<Series>| Panel {
            title: title.into(),
            axes: ("queries per datum".into(), "variance relative to uniform".into()),
            log: (true, false),
            series,
        };
        panels(
            "Allocation on a problem of known covariances",
            &[
                panel("measured, ± standard deviation over seeds", measured.chain([floor]).collect()),
                panel("J from the known covariances", predicted),
            ],
        )
    }

    fn figures(&self, names: &[&str], batch_size: usize) -> Value {
        let of_all = |queries: usize, value: &dyn Fn(Spread) -> Value| -> Map<String, Value> {
            let figure = |name: &&str| (name.to_string(), value(self.spread(queries, name, |r| r.relative_variance)));
            names.iter().map(figure).collect()
        };
        let mut relative = of_all(MAIN, &|s| json!(s.mean));
        relative.insert("floor".into(), json!(self.spread(MAIN, "uniform", |r| r.floor).mean));
        json!({
            "relative_variance": relative,
            "queries": MAIN,
            "cv": self.spread(MAIN, "uniform", |r| r.cv).mean,
            "by_queries": QUERIES.map(|q| json!({
                "queries": q,
                "relative_variance": of_all(q, &|s| json!(s)),
                "floor": self.spread(q, "uniform", |r| r.floor),
            })),
            "batch_size": batch_size,
        })
    }

    fn write(&self, artifacts: &Artifacts, names: &[&str]) -> Result<()> {
        artifacts.write("variance.svg", self.draw(names)?.as_bytes())?;
        artifacts.write_csv("variance.csv", &self.0)
    }
}

/// Prints what each parameter of the Gaussian allocator is worth, and returns it.
fn print_variants(variants: &[Variant]) -> Value {
    let mut names: Vec<&str> = vec![];
    for variant in variants {
        if !names.contains(&variant.parameters) {
            names.push(variant.parameters);
        }
    }
    let spread = |name: &str| {
        let mine = variants.iter().filter(|v| v.parameters == name).map(|v| v.relative_objective);
        Spread::of(&mine.collect::<Vec<_>>())
    };
    println!("\nJ of the Gaussian allocator over uniform's, by its parameters, {MAIN} queries per datum");
    let rows: Vec<_> = names.iter().map(|name| vec![name.to_string(), spread(name).text(3)]).collect();
    print_table(&["parameters", "J over uniform's"], &rows);
    names.iter().map(|name| (name.to_string(), json!(spread(name)))).collect::<Map<_, _>>().into()
}

/// Prints how Neyman allocation compares with importance sampling of the data, and returns it.
fn print_sampling(sampling: &[Sampling]) -> Value {
    let spread = |value: fn(&Sampling) -> f64| Spread::of(&sampling.iter().map(value).collect::<Vec<_>>());
    let (neyman, importance) = (spread(|s| s.neyman), spread(|s| s.importance));
    println!("\nvariance over uniform allocation's, in closed form, any number of queries");
    let rows = [("Neyman allocation", neyman.text(3)), ("importance sampling of the examples", importance.text(3))];
    print_table(&["method", "variance"], &rows.map(|(name, text)| vec![name.to_string(), text]));
    json!({ "neyman": neyman, "importance": importance })
}

fn run(args: Args) -> Result<()> {
    ensure!((1..=EXAMPLES).contains(&args.batch_size), "--batch-size {}: use 1 to {EXAMPLES}", args.batch_size);
    let (seeds, threads) = (args.experiment.seeds()?, args.experiment.threads()?);
    let artifacts = args.experiment.artifacts("variance_synthetic")?;
    let device = backend::device()?;
    ensure!(args.repeats() > 0, "--repeats 0: use at least 1");
    let mut table = Table(vec![]);
    let (mut variants, mut sampling) = (vec![], vec![]);
    let mut progress = Progress::default();
    let all = seeds.len() * QUERIES.len();
    for &seed in &seeds {
        let problem = Problem::new(seed, threads, args.batch_size, &device)?;
        variants.extend(problem.variants(&args, &device)?);
        sampling.push(problem.sampling(&problem.test_batch(&args)));
        for queries in QUERIES {
            let done = table.0.len() / AllocatorKind::ALL.len();
            progress.at(done, all, || format!("seed {seed}, {queries} queries"));
            table.0.extend(problem.compare(queries, &args, &device)?);
        }
    }
    println!("variance of the gradient relative to uniform allocation, measured, {} seeds", args.experiment.seeds);
    let names = AllocatorKind::ALL.map(|kind| kind.name());
    table.print(&names);
    table.write(&artifacts, &names)?;
    let mut figures = table.figures(&names, args.batch_size);
    figures["parameters"] = print_variants(&variants);
    figures["sampling"] = print_sampling(&sampling);
    artifacts.write_csv("parameters.csv", &variants)?;
    artifacts.write_csv("sampling.csv", &sampling)?;
    args.experiment.finish(
        &artifacts,
        progress.started(),
        figures,
        "variance.svg, variance.csv, parameters.csv, sampling.csv",
    )
}

fn main() -> ExitCode {
    cli::run(run)
}
