//! Macro-F1 on rare classes: trained as it is, against more cross-entropy.
//!
//! ```text
//! cargo run --release --example imbalanced
//! ```
//!
//! Of 1,599 red wines 4 % are poor, 82 % ordinary and 14 % good (Cortez et al. 2009, embedded). A small
//! network is trained on the cross-entropy by backpropagation, until it is good at the ordinary ones. From
//! there it goes on in four ways, with the same passes:
//!
//! - `macro-f1`: the macro-F1 of the training wines, by forward passes. It has no gradient, and it couples
//!   the examples of a batch ([`flops_core::losses::macro_f1`]);
//! - `cross-entropy`: the same loss as before, by backpropagation;
//! - `weighted`: the cross-entropy with a weight of 1/share for each class, by backpropagation;
//! - `start`: not at all.
//!
//! A pass is a wine through the network; a backward pass counts as two. Each seed has a split of its own,
//! 30 % of each class for the test.
// devices are `Copy` on some backends only
#![allow(clippy::clone_on_copy)]

#[macro_use]
extern crate flops_report;

use std::process::ExitCode;

use anyhow::{Result, ensure};
use burn::module::{AutodiffModule, Param};
use burn::optim::AdamConfig;
use burn::prelude::*;
use burn::tensor::activation::relu;
use burn::train::TrainStep;
use clap::Parser;
use flops_core::losses::{BatchTarget, couple_macro_f1, macro_f1};
use flops_core::prelude::*;
use flops_core::random::keyed_rng;
use flops_examples::backend::{self, AB, B, Device};
use flops_examples::cli;
use flops_examples::data::wine::{self, CLASSES, FEATURES, Wine};
use flops_examples::experiment::{ExperimentArgs, Progress, Spread, print_table};
use flops_examples::plot::{Panel, Series, panels};
use rand::seq::SliceRandom;
use serde::Serialize;
use serde_json::{Map, json};

/// Training on rare classes: macro-F1 by forward passes against cross-entropy.
#[derive(Parser, Debug)]
#[command(name = "imbalanced", version)]
struct Args {
    #[command(flatten)]
    experiment: ExperimentArgs,
    /// Epochs of cross-entropy from which all ways start.
    #[arg(long, default_value_t = 30)]
    epochs: usize,
    /// Forward-only steps on all training wines [default: 200, with --full 1,000]; the other ways have as
    /// many passes.
    #[arg(long)]
    steps: Option<usize>,
    /// Queries of each wine and step, on average.
    #[arg(long, default_value_t = 4)]
    queries: usize,
    /// Smoothing scale: the metric has steps.
    #[arg(long, default_value_t = flops_core::losses::STEP_SIGMA)]
    sigma: f64,
    /// Adam's learning rate of macro-F1; that of cross-entropy is 0.003.
    #[arg(long, default_value_t = 3e-3)]
    lr: f64,
}

impl Args {
    fn steps(&self) -> usize {
        self.steps.unwrap_or(if self.experiment.full { 1000 } else { 200 })
    }

    fn config(&self, seed: u64) -> Result<ForwardConfig> {
        let config = ForwardConfig::new(QueryBudget::new(self.queries, 1)?).for_steps().with_sigma(self.sigma);
        let config = config.with_seed(seed).with_threads(self.experiment.threads()?);
        config.validate()?;
        Ok(config)
    }

    fn check(&self) -> Result<()> {
        ensure!(self.epochs > 0, "--epochs 0: use at least 1");
        ensure!(self.steps() > 0, "--steps 0: use at least 1");
        ensure!(self.lr > 0.0 && self.lr <= 1.0, "--lr {}: use a number above 0 and at most 1", self.lr);
        self.config(0).map(|_| ())
    }
}

/// Learning rate of backpropagation.
const LR: f64 = 3e-3;
/// Wines of a batch of backpropagation.
const BATCH: usize = 64;
/// Share of the wines that is for the test.
const TEST_SHARE: f64 = 0.3;
/// Looks at each way of going on.
const LOOKS: usize = 20;

/// A network of two layers, and the loss it is trained on.
#[derive(Module, Debug)]
struct Net<B: Backend> {
    hidden: nn::Linear<B>,
    head: nn::Linear<B>,
    /// Weight of each class in the cross-entropy; a constant.
    weights: Param<Tensor<B, 1>>,
    /// Whether the loss is 1 − macro-F1.
    metric: bool,
}

impl<B: Backend> ForwardModel<B> for Net<B> {
    type Input = Tensor<B, 2>;
    type Target = BatchTarget<B>;
    type Output = Tensor<B, 2>;

    fn forward(&self, x: Tensor<B, 2>, probe: &mut Probe<B>) -> Tensor<B, 2> {
        let x = relu(probe.linear(&self.hidden, x));
        probe.linear(&self.head, x)
    }

    fn losses(&self, logits: Tensor<B, 2>, target: BatchTarget<B>) -> Tensor<B, 1> {
        if self.metric {
            return macro_f1(logits, target);
        }
        let weights = self.weights.val().select(0, target.labels.clone());
        cross_entropy(logits, target.labels) * weights
    }

    fn couple(&self, logits: &Tensor<B, 2>, target: &BatchTarget<B>) -> Option<BatchTarget<B>> {
        self.metric.then(|| couple_macro_f1(logits, target))
    }

    fn classification(
        &self,
        logits: &Tensor<B, 2>,
        target: &BatchTarget<B>,
    ) -> Option<(Tensor<B, 2>, Tensor<B, 1, Int>)> {
        Some((logits.clone(), target.labels.clone()))
    }
}

impl Net<AB> {
    fn new(seed: u64, device: &Device) -> Self {
        <AB as burn::tensor::backend::Backend>::seed(device, seed);
        let linear = |inputs, outputs| nn::LinearConfig::new(inputs, outputs).init(device);
        let weights = Param::from_tensor(Tensor::ones([CLASSES.len()], device)).set_require_grad(false);
        Self { hidden: linear(FEATURES, 32), head: linear(32, CLASSES.len()), weights, metric: false }
    }

    /// The same network with a weight of 1/share for each class, 1 in the mean over the wines.
    fn weighted(mut self, wines: &[Wine], device: &Device) -> Self {
        let weight = |class| {
            let count = wines.iter().filter(|wine| wine.label == class).count();
            wines.len() as f32 / (CLASSES.len() * count.max(1)) as f32
        };
        let weights: Vec<f32> = (0..CLASSES.len()).map(weight).collect();
        self.weights = Param::from_tensor(Tensor::from_floats(&weights[..], device)).set_require_grad(false);
        self
    }
}

fn batch(wines: &[Wine], device: &Device) -> Batch<Tensor<B, 2>, BatchTarget<B>> {
    let x: Vec<f32> = wines.iter().flat_map(|wine| wine.x).collect();
    let labels: Vec<i32> = wines.iter().map(|wine| wine.label as i32).collect();
    Batch {
        ids: wines.iter().map(|wine| wine.id).collect(),
        input: Tensor::from_data(TensorData::new(x, [wines.len(), FEATURES]), device),
        target: BatchTarget::new(Tensor::from_data(TensorData::new(labels, [wines.len()]), device)),
    }
}

/// Macro-F1 and accuracy in percent.
fn scores(net: &Net<AB>, wines: &[Wine], device: &Device) -> [f64; 2] {
    let (net, batch) = (net.valid(), batch(wines, device));
    let logits = net.forward(batch.input, &mut Probe::clean());
    let wrong = zero_one(logits.clone(), batch.target.labels.clone()).mean().into_scalar().elem::<f64>();
    let lost = macro_f1(logits, batch.target).mean().into_scalar().elem::<f64>();
    [lost, wrong].map(|share| 100.0 * (1.0 - share))
}

/// A look at one way: a row of `scores.csv`.
#[derive(Clone, Debug, Serialize)]
struct Look {
    way: &'static str,
    seed: u64,
    passes: u64,
    train_macro_f1: f64,
    test_macro_f1: f64,
    test_accuracy: f64,
}

/// A split, and what is noted on it.
struct Trial<'a> {
    args: &'a Args,
    seed: u64,
    train: Vec<Wine>,
    test: Vec<Wine>,
    device: Device,
    looks: Vec<Look>,
}

impl Trial<'_> {
    fn look(&mut self, way: &'static str, passes: u64, net: &Net<AB>) {
        let [train_macro_f1, _] = scores(net, &self.train, &self.device);
        let [test_macro_f1, test_accuracy] = scores(net, &self.test, &self.device);
        self.looks.push(Look { way, seed: self.seed, passes, train_macro_f1, test_macro_f1, test_accuracy });
    }

    /// Backpropagation until `passes` are spent, on batches from a stream of its own.
    fn backprop(&mut self, way: Option<&'static str>, net: Net<AB>, passes: u64) -> Result<Net<AB>> {
        let mut learner = BackpropLearner::new(net).with_seed(self.seed);
        let mut optimizer = AdamConfig::new().init();
        let (mut spent, mut next, mut epoch) = (0, 0, 0);
        loop {
            let mut wines = self.train.clone();
            wines.shuffle(&mut keyed_rng([self.seed, epoch, u64::from(way.is_some()), 0]));
            epoch += 1;
            for part in wines.chunks(BATCH) {
                let done = spent >= passes;
                // no look just before the last one
                let looks = done || (spent >= next && spent + passes / (2 * LOOKS as u64) < passes);
                if let Some(way) = way.filter(|_| looks) {
                    self.look(way, spent, &learner.model);
                    next += (passes / LOOKS as u64).max(1);
                }
                if done {
                    return Ok(learner.model);
                }
                let output = learner.step(batch(part, &self.device));
                if let Some(error) = learner.monitor().error() {
                    return Err(error.into());
                }
                learner = learner.optimize::<AB, _>(&mut optimizer, LR, output.grads);
                spent += 3 * part.len() as u64;
            }
        }
    }

    /// Forward-only steps on all training wines at once. Returns the passes spent.
    fn forward_only(&mut self, net: Net<AB>) -> Result<u64> {
        let config = self.args.config(self.seed)?;
        let mut learner = ForwardLearner::new(Net { metric: true, ..net }, Neyman, config)?;
        let mut optimizer = AdamConfig::new().init();
        let (steps, mut passes) = (self.args.steps(), 0);
        for step in 0..steps {
            if step.is_multiple_of((steps / LOOKS).max(1)) {
                self.look("macro-f1", passes, &learner.model);
            }
            let estimated = learner.estimate(&batch(&self.train, &self.device))?;
            // falls to nothing, for what is left of the noise
            let lr = self.args.lr * (1.0 - step as f64 / steps as f64);
            learner = learner.update(&mut optimizer, lr, estimated.grads)?;
            passes = learner.state().ledger.total().row_forwards;
        }
        self.look("macro-f1", passes, &learner.model);
        Ok(passes)
    }

    fn run(mut self, progress: &mut Progress, (done, all): (usize, usize)) -> Result<Vec<Look>> {
        let epoch = 3 * self.train.len() as u64;
        let start = self.backprop(None, Net::new(self.seed, &self.device), epoch * self.args.epochs as u64)?;
        self.look("start", 0, &start);
        progress.at(done, all, || format!("seed {}, macro-F1", self.seed));
        let passes = self.forward_only(start.clone())?;
        progress.at(done, all, || format!("seed {}, cross-entropy", self.seed));
        self.backprop(Some("cross-entropy"), start.clone(), passes)?;
        let weighted = start.weighted(&self.train, &self.device);
        self.backprop(Some("weighted"), weighted, passes)?;
        Ok(self.looks)
    }
}

const WAYS: [&str; 4] = ["start", "cross-entropy", "weighted", "macro-f1"];

fn run(args: Args) -> Result<()> {
    args.check()?;
    let (seeds, device, mut progress) = (args.experiment.seeds()?, backend::device()?, Progress::default());
    let artifacts = args.experiment.artifacts("imbalanced")?;
    let wines = wine::load()?;
    let mut looks = vec![];
    for (done, &seed) in seeds.iter().enumerate() {
        let (train, test) = wine::split(wines.clone(), TEST_SHARE, seed);
        let trial = Trial { args: &args, seed, train, test, device: device.clone(), looks: vec![] };
        looks.extend(trial.run(&mut progress, (done, seeds.len()))?);
    }
    let (mut table, mut figures, mut series) = (vec![], Map::new(), vec![]);
    for way in WAYS {
        let of_seed = |seed: u64| looks.iter().filter(move |look| look.way == way && look.seed == seed);
        let last: Vec<&Look> = seeds.iter().filter_map(|&seed| of_seed(seed).next_back()).collect();
        let spread = |value: fn(&Look) -> f64| Spread::of(&last.iter().map(|look| value(look)).collect::<Vec<_>>());
        let (f1, accuracy, train) =
            (spread(|l| l.test_macro_f1), spread(|l| l.test_accuracy), spread(|l| l.train_macro_f1));
        let passes = spread(|l| l.passes as f64);
        table.push(vec![way.into(), f1.text(1), accuracy.text(1), train.text(1), format!("{:.0}", passes.mean)]);
        let by_seed: Vec<f64> = last.iter().map(|look| look.test_macro_f1).collect();
        figures.insert(
            way.into(),
            json!({"test_macro_f1": f1, "test_accuracy": accuracy, "train_macro_f1": train, "passes": passes,
                "test_macro_f1_by_seed": by_seed}),
        );
        let at = |i: usize| {
            let here: Vec<&Look> = seeds.iter().filter_map(|&seed| of_seed(seed).nth(i)).collect();
            let passes = here.iter().map(|look| look.passes as f64).sum::<f64>() / here.len() as f64;
            (passes, Spread::of(&here.iter().map(|look| look.test_macro_f1).collect::<Vec<_>>()).mean)
        };
        let most = seeds.iter().map(|&seed| of_seed(seed).count()).min().unwrap_or(0);
        if most > 1 {
            series.push(Series::new(way, (0..most).map(at)));
        }
    }
    println!("red wines, {} seeds, mean ± standard deviation over them, %", seeds.len());
    print_table(&["", "test macro-F1", "test accuracy", "training macro-F1", "passes"], &table);
    let panel = Panel {
        title: format!("mean of {} seeds", seeds.len()),
        axes: ("passes".into(), "test macro-F1, %".into()),
        log: (false, false),
        series,
    };
    artifacts.write_csv("scores.csv", &looks)?;
    artifacts.write("macro_f1.svg", panels("Red wines: macro-F1 by passes", &[panel])?.as_bytes())?;
    let settings = json!({
        "epochs": args.epochs, "steps": args.steps(), "queries": args.queries, "sigma": args.sigma, "lr": args.lr,
        "ways": figures,
    });
    args.experiment.finish(&artifacts, progress.started(), settings, "macro_f1.svg, scores.csv")
}

fn main() -> ExitCode {
    cli::run(run)
}
