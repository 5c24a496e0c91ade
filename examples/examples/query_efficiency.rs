//! Accuracy against queries: this library's estimator and the peers' recipes at equal budgets.
//!
//! ```text
//! cargo run --release --example query_efficiency
//! cargo run --release --example query_efficiency -- \
//!     --dataset cifar10 --data-dir path/to/cifar-10-batches-bin --limit 2000
//! ```
//!
//! Every method starts from the same pretrained ViT with a new head, and trains the same scope on
//! the same batches. Each run gets the same total number of queries: with fewer queries per datum
//! it takes more steps. AdamW drives every method but ZO-Muon, whose matrices Muon updates. MeZO,
//! FZOO and LOZO, whose papers use SGD, run with SGD too. Each method's learning rate is the best of
//! a small grid by training loss, on the first seed.
// Devices are `Copy` on some backends only.
#![allow(clippy::clone_on_copy)]

#[macro_use]
extern crate flops_report;

use std::process::ExitCode;

use anyhow::{Result, ensure};
use clap::Parser;
use flops_core::{QueryBudget, Recipe};
use flops_examples::cli;
use flops_examples::experiment::{
    ExperimentArgs, Learner, Optim, Progress, Run, Spread, Testbed, TestbedArgs, print_table,
};
use flops_examples::plot::{Panel, Series, panels};
use flops_examples::run::format::thousands;
use serde::Serialize;
use serde_json::{Map, Value, json};

/// Accuracy against total queries, by method.
#[derive(Parser, Debug)]
#[command(name = "query_efficiency", version)]
struct Args {
    #[command(flatten)]
    experiment: ExperimentArgs,
    #[command(flatten)]
    testbed: TestbedArgs,
    /// Queries per datum and step; several are compared.
    #[arg(long, value_delimiter = ',', default_values_t = [2, 20, 100])]
    queries: Vec<usize>,
    /// Total queries of each run [default: 150,000, with --full 3,000,000].
    #[arg(long)]
    total: Option<u64>,
    /// Test accuracy, from 0 to 1, whose price in queries is reported.
    #[arg(long, default_value_t = 0.85)]
    target: f64,
    /// How often the test accuracy is measured in a run.
    #[arg(long, default_value_t = 8)]
    looks: usize,
    /// Images in a batch.
    #[arg(long, default_value_t = 64)]
    batch_size: usize,
}

impl Args {
    fn check(&self) -> Result<()> {
        ensure!((0.0..=1.0).contains(&self.target), "--target {}: use a share from 0 to 1", self.target);
        ensure!(self.looks > 0, "--looks 0: use at least 1");
        ensure!(self.batch_size > 0, "--batch-size 0: use at least 1 image");
        ensure!(!self.queries.is_empty(), "--queries: give at least one number");
        for &queries in &self.queries {
            ensure!(queries >= 2, "--queries {queries}: use at least 2, an antithetic pair");
            QueryBudget::new(queries, 1)?;
        }
        Ok(())
    }

    fn total(&self) -> u64 {
        self.total.unwrap_or(if self.experiment.full { 3_000_000 } else { 150_000 })
    }
}

/// A method: a recipe and an optimizer, with the learning rates it may choose from.
#[derive(Clone, Copy)]
struct Method {
    name: &'static str,
    recipe: Recipe,
    optim: fn() -> Optim,
    rates: [f64; 3],
}

const ADAM: [f64; 3] = [1e-3, 5e-3, 2e-2];
const SGD: [f64; 3] = [1e-2, 1e-1, 1.0];
const METHODS: [Method; 11] = [
    Method { name: "default", recipe: Recipe::Default, optim: Optim::adam, rates: ADAM },
    Method { name: "flops", recipe: Recipe::Flops, optim: Optim::adam, rates: ADAM },
    Method { name: "eggroll", recipe: Recipe::Eggroll, optim: Optim::adam, rates: ADAM },
    Method { name: "es", recipe: Recipe::Es, optim: Optim::adam, rates: ADAM },
    Method { name: "mezo", recipe: Recipe::Mezo, optim: Optim::adam, rates: ADAM },
    Method { name: "mezo-sgd", recipe: Recipe::Mezo, optim: Optim::sgd, rates: SGD },
    Method { name: "fzoo", recipe: Recipe::Fzoo, optim: Optim::adam, rates: ADAM },
    Method { name: "fzoo-sgd", recipe: Recipe::Fzoo, optim: Optim::sgd, rates: SGD },
    Method { name: "lozo", recipe: Recipe::Lozo, optim: Optim::adam, rates: ADAM },
    Method { name: "lozo-sgd", recipe: Recipe::Lozo, optim: Optim::sgd, rates: SGD },
    Method { name: "zo-muon", recipe: Recipe::ZoMuon, optim: Optim::muon, rates: ADAM },
];

/// A row of `efficiency.csv`.
#[derive(Clone, Serialize)]
struct Row {
    method: &'static str,
    queries_per_datum: usize,
    seed: u64,
    lr: f64,
    queries: u64,
    /// Rows that pass through the scope, clean and recorded rows included.
    row_forwards: u64,
    test_loss: f64,
    test_accuracy: f64,
}

/// A trained run: its measurements, and the mean training loss of the last tenth of its steps.
struct TrainedRun {
    rows: Vec<Row>,
    train_loss: f64,
}

/// The settings of a run.
#[derive(Clone, Copy)]
struct Setting {
    method: Method,
    /// Queries per datum.
    queries: usize,
    seed: u64,
    lr: f64,
    /// Total queries.
    total: u64,
    looks: usize,
}

impl Setting {
    fn train(self, args: &Args, testbed: &Testbed) -> Result<TrainedRun> {
        let Self { method, queries, seed, lr, total, .. } = self;
        let config = method.recipe.config(QueryBudget::new(queries, 1)?).with_seed(seed);
        let learner = testbed.learner(testbed.model(seed), config, method.recipe.allocator())?;
        let steps = (total / (queries * args.batch_size) as u64).max(1) as usize;
        let mut run = Run::new(learner, (method.optim)(), lr, steps);
        let mut batches = testbed.batches(args.batch_size, seed)?;
        let (mut rows, mut losses) = (vec![], vec![]);
        for step in 0..steps {
            let Some(batch) = batches.next() else { break };
            let report;
            (run, report) = run.step(batch)?;
            if step >= steps - steps.div_ceil(10) {
                losses.push(report.loss);
            }
            if self.looks_after(step, steps) {
                rows.push(self.look(testbed, report.queries_total, &run.learner)?);
            }
        }
        Ok(TrainedRun { rows, train_loss: Spread::of(&losses).mean })
    }

    /// Returns whether the accuracy is measured after `step`. Looks are closer together at the
    /// start, where the accuracy rises.
    fn looks_after(self, step: usize, steps: usize) -> bool {
        (1..=self.looks).any(|k| {
            let at = (steps as f64 * (k as f64 / self.looks as f64).powf(1.5)).ceil() as usize;
            at.clamp(1, steps) == step + 1
        })
    }

    fn look(self, testbed: &Testbed, queries: u64, learner: &Learner) -> Result<Row> {
        let (test_loss, test_accuracy) = testbed.evaluate(&learner.model)?;
        Ok(Row {
            method: self.method.name,
            queries_per_datum: self.queries,
            seed: self.seed,
            lr: self.lr,
            queries,
            row_forwards: learner.state().ledger.total().row_forwards,
            test_loss,
            test_accuracy,
        })
    }
}

/// Everything that was measured.
struct Results<'a> {
    args: &'a Args,
    seeds: Vec<u64>,
    table: Vec<Row>,
    /// The learning rate of each method and budget per datum.
    chosen: Vec<Value>,
    /// Runs that diverged, one line for each.
    diverged: Vec<String>,
}

impl Results<'_> {
    /// Chooses the learning rate, then trains on every seed, for each method and budget per datum.
    fn measure(&mut self, testbed: &Testbed, progress: &mut Progress) {
        let all = METHODS.len() * self.args.queries.len() * (self.seeds.len() + 3);
        let mut done = 0;
        for method in METHODS {
            for &queries in &self.args.queries {
                let mut tell = |what: String| {
                    progress.at(done, all, || format!("{}, {queries} queries per datum, {what}", method.name));
                    done += 1;
                };
                let lr = self.choose_rate(testbed, method, queries, &mut tell);
                self.chosen.push(json!({"method": method.name, "queries_per_datum": queries, "lr": lr}));
                for &seed in &self.seeds {
                    tell(format!("seed {seed}"));
                    let (total, looks) = (self.args.total(), self.args.looks);
                    match (Setting { method, queries, seed, lr, total, looks }).train(self.args, testbed) {
                        Ok(run) => self.table.extend(run.rows),
                        Err(error) => {
                            self.diverged.push(format!("{}, {queries} queries, seed {seed}: {error}", method.name));
                        }
                    }
                }
            }
        }
    }

    /// Returns the rate of the lowest training loss, on the first seed and a third of the budget.
    fn choose_rate(&self, testbed: &Testbed, method: Method, queries: usize, tell: &mut impl FnMut(String)) -> f64 {
        let mut best = (f64::INFINITY, method.rates[0]);
        for lr in method.rates {
            tell(format!("lr {lr}"));
            let setting = Setting { method, queries, seed: self.seeds[0], lr, total: self.args.total() / 3, looks: 1 };
            // A rate at which training diverges is never the best.
            if let Ok(run) = setting.train(self.args, testbed)
                && run.train_loss < best.0
            {
                best = (run.train_loss, lr);
            }
        }
        best.1
    }

    fn rows(&self, method: &str) -> impl Iterator<Item = &Row> {
        self.table.iter().filter(move |r| r.method == method)
    }

    /// Returns the test accuracy in percent at the end of the runs.
    fn final_accuracy(&self, method: &str, queries: usize) -> Spread {
        let last = self.seeds.iter().filter_map(|&seed| {
            let mine = self.rows(method).filter(|r| r.queries_per_datum == queries && r.seed == seed);
            mine.max_by_key(|r| r.queries).map(|r| 100.0 * r.test_accuracy)
        });
        Spread::of(&last.collect::<Vec<_>>())
    }

    /// Returns the test accuracy over seeds against the queries spent.
    fn curve(&self, method: &str, queries: usize) -> Vec<(u64, Spread)> {
        let mut points: Vec<(u64, Vec<f64>)> = vec![];
        for r in self.rows(method).filter(|r| r.queries_per_datum == queries) {
            match points.iter_mut().find(|p| p.0 == r.queries) {
                Some(point) => point.1.push(r.test_accuracy),
                None => points.push((r.queries, vec![r.test_accuracy])),
            }
        }
        points.sort_by_key(|p| p.0);
        points.into_iter().map(|(q, a)| (q, Spread::of(&a))).collect()
    }

    /// Returns the queries after which the mean accuracy over seeds reaches the target, for the
    /// cheapest budget per datum.
    fn price(&self, method: &str) -> Option<u64> {
        let reached = |queries: &usize| {
            self.curve(method, *queries).into_iter().find(|(_, a)| a.mean >= self.args.target).map(|(q, _)| q)
        };
        self.args.queries.iter().filter_map(reached).min()
    }

    /// Returns the forward passes per query. Clean and recorded rows come on top of the queries.
    fn passes_per_query(&self, method: &str) -> f64 {
        let passes: u64 = self.rows(method).map(|r| r.row_forwards).sum();
        passes as f64 / self.rows(method).map(|r| r.queries).sum::<u64>() as f64
    }

    fn print(&self) {
        let Args { testbed, queries, target, .. } = self.args;
        println!(
            "{}, scope {}, test accuracy in % after {} queries, {} seeds",
            testbed.images.dataset,
            testbed.scope,
            thousands(self.args.total()),
            self.seeds.len()
        );
        let mut header: Vec<String> = vec!["method".into()];
        header.extend(queries.iter().map(|q| format!("{q} per datum")));
        header.push("passes per query".into());
        header.push(format!("queries to {:.0} %", 100.0 * target));
        let line = |m: &Method| {
            let mut line = vec![m.name.to_string()];
            line.extend(queries.iter().map(|&q| self.final_accuracy(m.name, q).text(1)));
            line.push(format!("{:.2}", self.passes_per_query(m.name)));
            line.push(self.price(m.name).map_or("–".into(), thousands));
            line
        };
        let header: Vec<&str> = header.iter().map(String::as_str).collect();
        print_table(&header, &METHODS.each_ref().map(line));
        self.diverged.iter().for_each(|what| println!("  diverged: {what}"));
    }

    fn draw(&self) -> Result<String> {
        let Args { testbed, queries, .. } = self.args;
        let line = |m: &Method, queries: usize| {
            let percent = |(q, a): (u64, Spread)| (q as f64, 100.0 * a.mean, 100.0 * a.deviation);
            Series { name: m.name.into(), points: self.curve(m.name, queries).into_iter().map(percent).collect() }
        };
        let panel = |&queries: &usize| Panel {
            title: format!("{queries} queries per datum and step"),
            axes: ("total queries".into(), "test accuracy, %".into()),
            log: (true, false),
            series: METHODS.iter().map(|m| line(m, queries)).collect(),
        };
        let title = format!("Accuracy against queries: {}, scope {}", testbed.images.dataset, testbed.scope);
        panels(&title, &queries.iter().map(panel).collect::<Vec<_>>())
    }

    fn figures(&self) -> Value {
        let Args { testbed, queries, target, .. } = self.args;
        let by_method = |figure: &dyn Fn(&str) -> Value| -> Map<String, Value> {
            METHODS.iter().map(|m| (m.name.to_string(), figure(m.name))).collect()
        };
        let pairs = METHODS.iter().flat_map(|m| queries.iter().map(|&q| (m.name, q)));
        let finals = pairs.map(|(name, q)| {
            json!({"method": name, "queries_per_datum": q, "accuracy_percent": self.final_accuracy(name, q)})
        });
        json!({
            "dataset": testbed.images.dataset.to_string(),
            "scope": testbed.scope.to_string(),
            "total": self.args.total(),
            "queries_per_datum": queries,
            "target": target,
            "queries_to_target": by_method(&|name| json!(self.price(name))),
            "final": finals.collect::<Vec<_>>(),
            "learning_rates": self.chosen,
            "diverged": self.diverged,
            "passes_per_query": by_method(&|name| json!(self.passes_per_query(name))),
        })
    }
}

fn run(args: Args) -> Result<()> {
    args.check()?;
    let seeds = args.experiment.seeds()?;
    let artifacts = args.experiment.artifacts("query_efficiency")?;
    let testbed = Testbed::open(&args.testbed, args.experiment.threads()?)?;
    let mut progress = Progress::default();
    let mut results = Results { args: &args, seeds, table: vec![], chosen: vec![], diverged: vec![] };
    results.measure(&testbed, &mut progress);
    results.print();
    artifacts.write("efficiency.svg", results.draw()?.as_bytes())?;
    artifacts.write_csv("efficiency.csv", &results.table)?;
    args.experiment.finish(&artifacts, progress.started(), results.figures(), "efficiency.svg, efficiency.csv")
}

fn main() -> ExitCode {
    cli::run(run)
}
