//! A network imported from ONNX that sees another camera: it is trained from forward passes alone.
//!
//! ```text
//! cargo run --release --bin imported
//! ```
//!
//! `build/main.rs` has burn-onnx make Rust code of `models/network.onnx`; `src/imported.rs` is what
//! one writes beside it. The network goes on in three ways, with the same number of rows sent through
//! it, where a backward pass counts as two: noise on its weights, noise on the outputs of its layers,
//! and backpropagation.

#[macro_use]
extern crate flops_report;

use std::process::ExitCode;

use anyhow::{Result, ensure};
use burn::module::AutodiffModule;
use clap::Parser;
use flops_core::allocator::{Neyman, Uniform};
use flops_core::parameters::{Parameter, parameters};
use flops_core::{ForwardConfig, NoiseLaw, QueryBudget, Sampling, Space};
use flops_foreign::imported::{Model, Probed};
use flops_foreign::report::{Common, Curve, figure, spread, text, write};
use flops_foreign::train::{AB, MAX_STEPS, Plan, accuracy, backprop, forward_only};
use flops_foreign::{digits, train};
use flops_report::{print_table, program};
use serde_json::{Map, json};

/// A network imported from ONNX, trained from forward passes alone and by backpropagation.
#[derive(Parser, Debug)]
#[command(name = "imported", version)]
struct Args {
    #[command(flatten)]
    common: Common,
    /// Steps of 64 rows and their queries; backpropagation has more steps, from as many rows.
    #[arg(long, default_value_t = 300)]
    steps: usize,
    /// Queries of each row and step: on average with activation noise, of all rows with weight noise.
    #[arg(long, default_value_t = 10)]
    queries: usize,
    /// Adam's learning rate at the start, of all ways.
    #[arg(long, default_value_t = 0.02)]
    lr: f64,
}

impl Args {
    fn check(&self) -> Result<()> {
        ensure!((1..=MAX_STEPS).contains(&self.steps), "--steps {}: use 1 to {MAX_STEPS}", self.steps);
        ensure!(self.lr > 0.0 && self.lr <= 1.0, "--lr {}: use a number above 0 and at most 1", self.lr);
        self.config()?.validate()?;
        Ok(())
    }

    fn config(&self) -> Result<ForwardConfig> {
        Ok(ForwardConfig::new(QueryBudget::new(self.queries, 1)?))
    }

    /// Rows that each way may send through the network.
    fn passes(&self) -> u64 {
        (self.steps * train::BATCH * (self.queries + 1)) as u64
    }

    /// Directions in the weights, both ways each.
    fn weight_noise(&self) -> Result<ForwardConfig> {
        let config = self.config()?.with_space(Space::weights()).with_noise(NoiseLaw::Gaussian);
        Ok(config.with_sampling(Sampling::Antithetic))
    }
}

const WAYS: [&str; 3] = ["weight noise", "activation noise", "backpropagation"];

fn run(args: Args) -> Result<()> {
    args.check()?;
    let threads = args.common.threads()?;
    let artifacts = args.common.artifacts("imported")?;
    let device = Default::default();
    let network = || Model::<AB>::from_embedded(&device);
    let [trained, constant] = [true, false].map(|trained| {
        let found = parameters(&network());
        found.iter().filter(|parameter| parameter.trained == trained).map(Parameter::values).sum::<usize>()
    });
    // burn-onnx makes layers of what it recognises, and constants, which nothing trains, of all other weights
    println!("imported: {trained} values are trained, {constant} are constants of the graph");
    let (train, test) = digits::other_camera(digits::load()?).split();
    let known = accuracy(&network().valid(), &digits::load()?.split().1, threads)?;
    let (mut curves, mut seconds) = (vec![], [(); 3].map(|()| vec![]));
    for seed in 0..args.common.seeds {
        let plan = Plan { lr: args.lr, passes: args.passes(), seed, threads };
        let data = (&train, &test);
        let mut done = |way: usize, looks: Vec<(u64, f64)>, took: f64| {
            let curve = Curve { way: WAYS[way].into(), seed, looks };
            eprintln!("seed {seed}, {}: {:.1} % → {:.1} %, {took:.1} s", WAYS[way], curve.first(), curve.last());
            curves.push(curve);
            seconds[way].push(took);
        };
        let run = forward_only(network(), Uniform, args.weight_noise()?, plan, data)?;
        done(0, run.looks, run.seconds);
        let probed = Probed { network: network() };
        let run = forward_only(probed, Neyman, args.config()?, plan, data)?;
        done(1, run.looks, run.seconds);
        let run = backprop(network(), plan, data)?;
        done(2, run.looks, run.seconds);
    }
    let (mut rows, mut figures) =
        (vec![vec!["as it is".into(), format!("{:.1}", curves[0].first()), "0".into(), String::new()]], Map::new());
    for (way, seconds) in WAYS.into_iter().zip(&seconds) {
        let runs = || curves.iter().filter(|curve| curve.way == way);
        let accuracy: Vec<f64> = runs().map(Curve::last).collect();
        let passes: Vec<f64> = runs().map(|run| run.rows() as f64).collect();
        rows.push(vec![way.to_string(), text(&accuracy), format!("{:.0}", spread(&passes).0), text(seconds)]);
        figures.insert(
            way.into(),
            json!({"test_accuracy": figure(&accuracy), "rows": figure(&passes), "seconds": figure(seconds)}),
        );
    }
    rows.push(vec!["on the camera that it knows".into(), format!("{known:.1}"), String::new(), String::new()]);
    println!(
        "{} rows to train on, {} to test with; mean ± standard deviation of {} seed(s)",
        train.len(),
        test.len(),
        args.common.seeds
    );
    print_table(&["", "test accuracy, %", "rows sent through it", "seconds"], &rows);
    let summary = json!({
        "steps": args.steps, "batch": train::BATCH, "queries": args.queries, "lr": args.lr,
        "values_trained": trained, "values_constant": constant,
        "accuracy_before": curves[0].first(), "accuracy_on_known_data": known, "ways": figures,
    });
    write(&artifacts, "An imported network by another camera", &curves, &summary)?;
    println!("{}: summary.json, accuracy.csv, accuracy.svg", artifacts.display());
    Ok(())
}

fn main() -> ExitCode {
    program::run(run)
}
