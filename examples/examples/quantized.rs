//! Training with quantized weights: accuracy, bytes of weights and seconds.
//!
//! ```text
//! cargo run --release --example quantized
//! ```
//!
//! The same scope is trained from the same start with the same queries: in floats, with frozen
//! weights of 8 and of 4 bits, with trained weights on a grid of 4 bits by each way of rounding, and by
//! the scales of the trained weights alone. Backpropagation needs floats for all of these.
// Devices are `Copy` on some backends only.
#![allow(clippy::clone_on_copy)]

#[macro_use]
extern crate flops_report;

use std::fmt;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use burn::module::{Module, ModuleMapper, Param};
use burn::prelude::*;
use clap::{Parser, ValueEnum};
use flops_core::allocator::AllocatorKind;
use flops_core::parameters::trained_values;
use flops_core::quantize::{QuantizeConfig, Quantized, Rounding, TrainedWeights, Unpack, WeightScheme};
use flops_core::{ForwardConfig, NoiseLaw, QueryBudget, Sampling, Space};
use flops_examples::backend::AB;
use flops_examples::cli;
use flops_examples::experiment::{
    Classifier, ExperimentArgs, ImageArgs, Learner, Optim, Progress, Schedule, Spread, Testbed, TestbedArgs, estimate,
    print_table,
};
use flops_examples::plot::{Panel, Series, panels};
use flops_vit::{Scope, ViT};
use serde::Serialize;
use serde_json::{Value, json};

/// Training with quantized weights.
#[derive(Parser, Debug)]
#[command(name = "quantized", version)]
struct Args {
    #[command(flatten)]
    experiment: ExperimentArgs,
    #[command(flatten)]
    images: ImageArgs,
    /// The parameters that are trained.
    #[arg(long, default_value_t = Scope::ClsTail)]
    scope: Scope,
    /// Steps of each run [default: 120, with --full 1,000].
    #[arg(long)]
    steps: Option<usize>,
    /// Images of a step.
    #[arg(long, default_value_t = 32)]
    batch_size: usize,
    /// Queries for each image and step.
    #[arg(long, default_value_t = 10)]
    queries: usize,
    /// Learning rate of AdamW.
    #[arg(long, default_value_t = 5e-3)]
    lr: f64,
    /// Learning rate of AdamW for scales, which begin at 1.
    #[arg(long, default_value_t = 5e-3)]
    scales_lr: f64,
    /// Schemes of frozen weights: int8, int4, int8-tensor, int4-tensor.
    #[arg(long, value_delimiter = ',', default_values_t = [WeightScheme::Int8, WeightScheme::Int4])]
    schemes: Vec<WeightScheme>,
    /// What is compared: float, frozen (by each scheme), grid (by each rounding), scales.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Weights::value_variants().to_vec())]
    methods: Vec<Weights>,
    /// The scheme of all weights where trained ones are quantized too.
    #[arg(long, default_value_t = WeightScheme::Int4)]
    trained_scheme: WeightScheme,
    /// When frozen weights become floats: each-step or each-pass.
    #[arg(long, default_value_t = Unpack::EachStep)]
    unpack: Unpack,
    /// Measurements of the test accuracy in a run.
    #[arg(long, default_value_t = 6)]
    looks: usize,
}

impl Args {
    fn check(&self) -> Result<()> {
        ensure!(self.steps != Some(0), "--steps 0: use at least 1");
        ensure!(self.batch_size > 0, "--batch-size 0: use at least 1 image");
        ensure!((1..=100).contains(&self.looks), "--looks {}: use 1 to 100", self.looks);
        for (name, lr) in [("--lr", self.lr), ("--scales-lr", self.scales_lr)] {
            ensure!(lr > 0.0 && lr <= 1.0, "{name} {lr}: use a number above 0 and at most 1");
        }
        let methods = self.methods();
        methods.iter().enumerate().try_for_each(|(index, method)| {
            let seen = methods[..index].contains(method);
            ensure!(!seen, "{method} would be compared with itself; name it once in --methods and --schemes");
            self.config(*method, 0).map(drop)
        })
    }

    fn steps(&self) -> usize {
        self.steps.unwrap_or(if self.experiment.full { 1000 } else { 120 })
    }

    /// Returns what is compared.
    fn methods(&self) -> Vec<Method> {
        let of = |weights: &Weights| match weights {
            Weights::Float => vec![Method::Float],
            Weights::Frozen => self.schemes.iter().map(|&scheme| Method::Frozen(scheme)).collect(),
            Weights::Grid => Rounding::ALL.map(|rounding| Method::Grid(self.trained_scheme, rounding)).to_vec(),
            Weights::Scales => vec![Method::Scales(self.trained_scheme)],
        };
        self.methods.iter().flat_map(of).collect()
    }

    /// Returns how a method trains. Scales are no layers: noise on the weights reaches them.
    fn config(&self, method: Method, seed: u64) -> Result<ForwardConfig> {
        let config = ForwardConfig::new(QueryBudget::new(self.queries, 1)?).with_seed(seed);
        let config = match method {
            Method::Scales(_) => {
                let weights = config.with_space(Space::weights()).with_sampling(Sampling::Antithetic);
                weights.with_noise(NoiseLaw::Gaussian)
            }
            _ => config,
        };
        config.validate()?;
        Ok(config)
    }
}

/// How weights are held, for `--methods`.
#[derive(ValueEnum, Clone, Copy, PartialEq, Debug)]
enum Weights {
    /// Floats everywhere.
    Float,
    /// Frozen weights quantized.
    Frozen,
    /// Trained weights quantized too, on their grid.
    Grid,
    /// Trained weights quantized too; their scales are trained.
    Scales,
}

/// What is compared.
#[derive(Clone, Copy, PartialEq)]
enum Method {
    /// Floats everywhere.
    Float,
    /// Frozen weights quantized, trained ones floats.
    Frozen(WeightScheme),
    /// Trained weights quantized too; updates are rounded.
    Grid(WeightScheme, Rounding),
    /// Trained weights quantized too; their scales are trained.
    Scales(WeightScheme),
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Float => f.write_str("float"),
            Self::Frozen(scheme) => write!(f, "{scheme} frozen"),
            Self::Grid(scheme, rounding) => write!(f, "{scheme} {rounding}"),
            Self::Scales(scheme) => write!(f, "{scheme} scales"),
        }
    }
}

/// A row of `quantized.csv`: a look at a run.
#[derive(Clone, Serialize)]
struct Row {
    method: String,
    seed: u64,
    step: usize,
    /// Test accuracy in percent.
    accuracy: f64,
    test_loss: f64,
    /// Bytes of the parameters between two steps, with what error feedback keeps.
    bytes: usize,
    /// Bytes of error feedback alone.
    residual_bytes: usize,
    /// Trained values, scales included.
    trained: usize,
    /// Seconds of training so far, without the looks.
    seconds: f64,
}

/// Freezes vectors but those of the head, so that of the network's layers the scales alone are
/// trained.
struct FreezeVectors {
    path: Vec<String>,
}

impl ModuleMapper<AB> for FreezeVectors {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<AB, D>>) -> Param<Tensor<AB, D>> {
        let is_head = self.path.first().is_some_and(|name| name == "head");
        if D == 1 && !is_head { param.set_require_grad(false) } else { param }
    }
}

/// Returns the bytes of the parameters, and those of error feedback.
type Bytes<M> = fn(&M) -> (usize, usize);

/// One run.
struct Setting<'a> {
    args: &'a Args,
    method: Method,
    seed: u64,
}

impl Setting<'_> {
    fn train(&self, testbed: &Testbed) -> Result<Vec<Row>> {
        let model = testbed.model(self.seed);
        let config = match self.method {
            Method::Float => return self.run(testbed, model, |model| (4 * model.num_params(), 0)),
            Method::Frozen(scheme) => QuantizeConfig::new(scheme),
            Method::Grid(scheme, rounding) => {
                let config = QuantizeConfig::new(scheme).with_trained(TrainedWeights::Grid);
                config.with_rounding(rounding).with_seed(self.seed)
            }
            Method::Scales(scheme) => QuantizeConfig::new(scheme).with_trained(TrainedWeights::Scales),
        };
        let model = match self.method {
            Method::Scales(_) => model.map(&mut FreezeVectors { path: vec![] }),
            _ => model,
        };
        let model: Quantized<AB, ViT<AB>> = config.with_unpack(self.args.unpack).quantize(model)?;
        // this network has no kept prefixes, for those need one pass with a graph
        let testbed = Testbed::new(testbed.images.clone(), model.clone(), testbed.threads, false)?;
        self.run(&testbed, model, |model| {
            let bytes = model.weight_bytes();
            (bytes.held(), bytes.residuals)
        })
    }

    fn run<M: Classifier>(&self, testbed: &Testbed<M>, model: M, bytes: Bytes<M>) -> Result<Vec<Row>> {
        let Self { args, method, seed } = *self;
        let (kind, lr) = match method {
            Method::Scales(_) => (AllocatorKind::Uniform, args.scales_lr),
            _ => (AllocatorKind::Neyman, args.lr),
        };
        let mut learner: Learner<_, M> = testbed.learner(model, args.config(method, seed)?, kind)?;
        let (mut optim, mut batches) = (Optim::<M>::adam(), testbed.batches(args.batch_size, seed)?);
        let (steps, mut rows, mut seconds) = (args.steps(), vec![], 0.0);
        for step in 0..steps {
            let start = Instant::now();
            let (grads, _) = estimate(&learner, batches.next().context("there are no images")?)?;
            learner = optim.update(learner, Schedule::Cosine.rate(lr, step, steps), grads);
            seconds += start.elapsed().as_secs_f64();
            if (1..=args.looks).any(|look| (steps * look).div_ceil(args.looks) == step + 1) {
                let (test_loss, accuracy) = testbed.evaluate(&learner.model)?;
                let (bytes, residual_bytes) = bytes(&learner.model);
                let trained = trained_values(&learner.model);
                let (method, step, accuracy) = (method.to_string(), step + 1, 100.0 * accuracy);
                rows.push(Row { method, seed, step, accuracy, test_loss, bytes, residual_bytes, trained, seconds });
            }
        }
        Ok(rows)
    }
}

/// All runs of a method.
struct Runs<'a> {
    method: Method,
    rows: Vec<&'a Row>,
    steps: usize,
}

impl<'a> Runs<'a> {
    fn of(method: Method, table: &'a [Row], steps: usize) -> Self {
        let name = method.to_string();
        Self { method, rows: table.iter().filter(|row| row.method == name).collect(), steps }
    }

    /// Returns a figure over the seeds after a step.
    fn at(&self, step: usize, figure: impl Fn(&Row) -> f64) -> Spread {
        Spread::of(&self.rows.iter().filter(|row| row.step == step).map(|row| figure(row)).collect::<Vec<_>>())
    }

    fn last(&self, figure: impl Fn(&Row) -> f64) -> Spread {
        self.at(self.steps, figure)
    }

    fn series(&self) -> Series {
        let mut steps: Vec<usize> = self.rows.iter().map(|row| row.step).collect();
        steps.sort_unstable();
        steps.dedup();
        let point = |step: usize| {
            let accuracy = self.at(step, |row| row.accuracy);
            (step as f64, accuracy.mean, accuracy.deviation)
        };
        Series { name: self.method.to_string(), points: steps.into_iter().map(point).collect() }
    }

    fn line(&self) -> Vec<String> {
        vec![
            self.method.to_string(),
            self.last(|row| row.accuracy).text(1),
            format!("{:.2}", self.last(|row| row.bytes as f64).mean / 1e6),
            format!("{:.0}", self.last(|row| row.trained as f64).mean),
            self.last(|row| row.seconds).text(1),
        ]
    }

    fn figures(&self) -> Value {
        json!({
            "method": self.method.to_string(),
            "accuracy_percent": self.last(|row| row.accuracy),
            "test_loss": self.last(|row| row.test_loss),
            "bytes": self.last(|row| row.bytes as f64).mean,
            "residual_bytes": self.last(|row| row.residual_bytes as f64).mean,
            "trained": self.last(|row| row.trained as f64).mean,
            "seconds": self.last(|row| row.seconds),
        })
    }
}

fn run(args: Args) -> Result<()> {
    args.check()?;
    let (seeds, methods, steps) = (args.experiment.seeds()?, args.methods(), args.steps());
    let artifacts = args.experiment.artifacts("quantized")?;
    let (images, scope) = (args.images.clone(), args.scope);
    let float = Testbed::open(&TestbedArgs { images, scope }, args.experiment.threads()?)?;
    // every method pays for the frozen layers alike
    let float = Testbed::new(float.images.clone(), float.model(0), float.threads, false)?;
    let (mut progress, mut table) = (Progress::default(), vec![]);
    for (index, &method) in methods.iter().enumerate() {
        for (done, &seed) in seeds.iter().enumerate() {
            progress.at(index * seeds.len() + done, methods.len() * seeds.len(), || format!("{method}, seed {seed}"));
            table.extend(Setting { args: &args, method, seed }.train(&float)?);
        }
    }
    let Args { images, batch_size, queries, .. } = &args;
    let runs: Vec<Runs<'_>> = methods.iter().map(|&method| Runs::of(method, &table, steps)).collect();
    let panel = Panel {
        title: format!("{batch_size} images with {queries} queries a step"),
        axes: ("steps".into(), "test accuracy, %".into()),
        log: (false, false),
        series: runs.iter().map(Runs::series).collect(),
    };
    let title = format!("Quantized weights: {}, scope {scope}", images.dataset);
    artifacts.write("quantized.svg", panels(&title, &[panel])?.as_bytes())?;
    artifacts.write_csv("quantized.csv", &table)?;
    println!(
        "{}, scope {scope}, {steps} steps of {batch_size} images with {queries} queries, {} seeds",
        images.dataset,
        seeds.len()
    );
    let lines: Vec<Vec<String>> = runs.iter().map(Runs::line).collect();
    print_table(&["weights", "test accuracy, %", "weights, MB", "trained values", "seconds"], &lines);
    let figures = json!({
        "dataset": images.dataset.to_string(),
        "scope": scope.to_string(),
        "steps": steps,
        "unpack": args.unpack.name(),
        "methods": runs.iter().map(Runs::figures).collect::<Vec<_>>(),
    });
    args.experiment.finish(&artifacts, progress.started(), figures, "quantized.svg, quantized.csv")
}

fn main() -> ExitCode {
    cli::run(run)
}
