//! Accuracy against queries: this library's estimator and the peers' recipes at equal budgets.
//!
//! ```text
//! cargo run --release --example query_efficiency
//! cargo run --release --example query_efficiency -- --dataset cifar10 --data-dir path/to/cifar-10-batches-bin --limit 2000
//! ```
//!
//! Every method starts from the same pretrained ViT with a new head and trains the same scope on the same batches. Each budget gets the same number of
//! queries in all: with fewer queries per datum it takes more steps. AdamW drives every method; MeZO and FZOO, whose papers use SGD, run with SGD too, and
//! each method's learning rate is the best of a small grid on the first seed, on training loss.
// devices are `Copy` on some backends only
#![allow(clippy::clone_on_copy)]

use std::process::ExitCode;

use anyhow::{Result, ensure};
use clap::Parser;
use flops_core::{QueryBudget, Recipe};
use flops_examples::cli;
use flops_examples::experiment::{Common, Progress, Spread, print_table};
use flops_examples::lab::{Lab, LabArgs, Learner, Optim, Run};
use flops_examples::plot::{Panel, Series, panels};
use flops_examples::renderer::thousands;
use serde::Serialize;
use serde_json::{Map, Value, json};

/// Accuracy against total queries, by method.
#[derive(Parser, Debug)]
#[command(name = "query_efficiency", version)]
struct Args {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    lab: LabArgs,
    /// Queries per datum and step; several make a comparison.
    #[arg(long, value_delimiter = ',', default_values_t = [2, 20, 100])]
    queries: Vec<usize>,
    /// Queries of each run in all [default: 150,000, with --full 3,000,000].
    #[arg(long)]
    total: Option<u64>,
    /// Test accuracy whose price is asked for.
    #[arg(long, default_value_t = 0.85)]
    target: f64,
    /// Times that the test accuracy is looked at in a run.
    #[arg(long, default_value_t = 8)]
    looks: usize,
    /// Data of a batch.
    #[arg(long, default_value_t = 64)]
    batch_size: usize,
}

/// A method: a recipe and an optimizer, with the learning rates it may choose from.
#[derive(Clone, Copy)]
struct Method {
    name: &'static str,
    recipe: Recipe,
    sgd: bool,
    rates: [f64; 3],
}

const ADAM: [f64; 3] = [1e-3, 5e-3, 2e-2];
const SGD: [f64; 3] = [1e-2, 1e-1, 1.0];
const METHODS: [Method; 8] = [
    Method { name: "default", recipe: Recipe::Default, sgd: false, rates: ADAM },
    Method { name: "flops", recipe: Recipe::Flops, sgd: false, rates: ADAM },
    Method { name: "eggroll", recipe: Recipe::Eggroll, sgd: false, rates: ADAM },
    Method { name: "es", recipe: Recipe::Es, sgd: false, rates: ADAM },
    Method { name: "mezo", recipe: Recipe::Mezo, sgd: false, rates: ADAM },
    Method { name: "mezo-sgd", recipe: Recipe::Mezo, sgd: true, rates: SGD },
    Method { name: "fzoo", recipe: Recipe::Fzoo, sgd: false, rates: ADAM },
    Method { name: "fzoo-sgd", recipe: Recipe::Fzoo, sgd: true, rates: SGD },
];

/// A row of `efficiency.csv`.
#[derive(Clone, Serialize)]
struct Row {
    method: &'static str,
    queries_per_datum: usize,
    seed: u64,
    lr: f64,
    queries: u64,
    /// Rows sent through the scope, clean and recorded ones included.
    row_forwards: u64,
    test_loss: f64,
    test_accuracy: f64,
}

struct Ran {
    rows: Vec<Row>,
    train_loss: f64,
}

/// A run of a method.
#[derive(Clone, Copy)]
struct Setting {
    method: Method,
    /// Per datum.
    queries: usize,
    seed: u64,
    lr: f64,
    /// Queries in all.
    total: u64,
    looks: usize,
}

fn train(args: &Args, lab: &Lab, setting: Setting) -> Result<Ran> {
    let Setting { method, queries, seed, lr, total, looks } = setting;
    let config = method.recipe.config(QueryBudget::new(queries, 1)?).with_seed(seed);
    let learner = lab.learner(lab.model(seed), config, method.recipe.allocator())?;
    let optim = if method.sgd { Optim::sgd() } else { Optim::adam() };
    let steps = (total / (queries * args.batch_size) as u64).max(1) as usize;
    let mut run = Run::new(learner, optim, lr, steps);
    let mut batches = lab.batches(args.batch_size, seed)?;
    let (mut rows, mut losses) = (vec![], vec![]);
    let row = |queries_done, learner: &Learner| -> Result<Row> {
        let (test_loss, test_accuracy) = lab.evaluate(&learner.model)?;
        Ok(Row {
            method: method.name,
            queries_per_datum: queries,
            seed,
            lr,
            queries: queries_done,
            row_forwards: learner.state().ledger.total().row_forwards,
            test_loss,
            test_accuracy,
        })
    };
    for step in 0..steps {
        let Some(batch) = batches.next() else { break };
        let report;
        (run, report) = run.step(batch)?;
        if step >= steps - steps.div_ceil(10) {
            losses.push(report.loss);
        }
        // looks stand closer together where accuracy rises
        let due = (1..=looks).any(|k| {
            let at = (steps as f64 * (k as f64 / looks as f64).powf(1.5)).ceil() as usize;
            at.clamp(1, steps) == step + 1
        });
        if due {
            rows.push(row(report.queries_total, &run.learner)?);
        }
    }
    Ok(Ran { rows, train_loss: Spread::of(&losses).mean })
}

fn run(args: Args) -> Result<()> {
    ensure!((0.0..=1.0).contains(&args.target), "--target {}: use a share from 0 to 1", args.target);
    ensure!(args.looks > 0, "--looks 0: use at least 1");
    ensure!(args.batch_size > 0, "--batch-size 0: use at least 1 image");
    ensure!(!args.queries.is_empty(), "--queries: give at least one number");
    for &queries in &args.queries {
        ensure!(queries >= 2, "--queries {queries}: use at least 2, an antithetic pair");
        QueryBudget::new(queries, 1)?;
    }
    let total = args.total.unwrap_or(if args.common.full { 3_000_000 } else { 150_000 });
    let seeds = args.common.seeds()?;
    let artifacts = args.common.artifacts("query_efficiency")?;
    let lab = Lab::open(&args.lab, args.common.threads()?)?;
    let mut progress = Progress::default();
    let all = METHODS.len() * args.queries.len() * (seeds.len() + 3);
    let (mut table, mut chosen, mut diverged, mut done) = (vec![], vec![], vec![], 0);
    for method in METHODS {
        for &queries in &args.queries {
            // the rate, on the first seed and a third of the budget, by training loss
            let mut best = (f64::INFINITY, method.rates[0]);
            for lr in method.rates {
                progress.at(done, all, || format!("{}, {queries} queries per datum, lr {lr}", method.name));
                // a rate at which training diverges is not the best
                if let Ok(ran) =
                    train(&args, &lab, Setting { method, queries, seed: seeds[0], lr, total: total / 3, looks: 1 })
                    && ran.train_loss < best.0
                {
                    best = (ran.train_loss, lr);
                }
                done += 1;
            }
            chosen.push(json!({"method": method.name, "queries_per_datum": queries, "lr": best.1}));
            for &seed in &seeds {
                progress.at(done, all, || format!("{}, {queries} queries per datum, seed {seed}", method.name));
                let setting = Setting { method, queries, seed, lr: best.1, total, looks: args.looks };
                match train(&args, &lab, setting) {
                    Ok(ran) => table.extend(ran.rows),
                    Err(error) => diverged.push(format!("{}, {queries} queries, seed {seed}: {error}", method.name)),
                }
                done += 1;
            }
        }
    }

    let at_end = |method: &str, queries: usize| {
        let last = seeds.iter().filter_map(|&seed| {
            let mine =
                table.iter().filter(|r: &&Row| r.method == method && r.queries_per_datum == queries && r.seed == seed);
            mine.max_by_key(|r| r.queries).map(|r| 100.0 * r.test_accuracy)
        });
        Spread::of(&last.collect::<Vec<_>>())
    };
    // the first look at which the mean over seeds is there, of all budgets per datum the cheapest
    let curve = |method: &str, queries: usize| {
        let mut points: Vec<(u64, Vec<f64>)> = vec![];
        for r in table.iter().filter(|r| r.method == method && r.queries_per_datum == queries) {
            match points.iter_mut().find(|p| p.0 == r.queries) {
                Some(point) => point.1.push(r.test_accuracy),
                None => points.push((r.queries, vec![r.test_accuracy])),
            }
        }
        points.sort_by_key(|p| p.0);
        points.into_iter().map(|(q, a)| (q, Spread::of(&a))).collect::<Vec<_>>()
    };
    let price = |method: &str| -> Option<u64> {
        let prices = args.queries.iter().filter_map(|&queries| {
            curve(method, queries).into_iter().find(|(_, a)| a.mean >= args.target).map(|(q, _)| q)
        });
        prices.min()
    };
    // clean and recorded rows come on top of the queries
    let passes_of = |method: &str| {
        let mine = || table.iter().filter(|r: &&Row| r.method == method);
        mine().map(|r| r.row_forwards).sum::<u64>() as f64 / mine().map(|r| r.queries).sum::<u64>() as f64
    };
    let passes: Map<String, Value> = METHODS.iter().map(|m| (m.name.to_string(), json!(passes_of(m.name)))).collect();
    println!(
        "{}, scope {}, test accuracy in % after {} queries, {} seeds",
        args.lab.dataset,
        args.lab.scope,
        thousands(total),
        seeds.len()
    );
    let mut header: Vec<String> = vec!["method".into()];
    header.extend(args.queries.iter().map(|q| format!("{q} per datum")));
    header.push("passes per query".into());
    header.push(format!("queries to {:.0} %", 100.0 * args.target));
    let printed: Vec<Vec<String>> = METHODS
        .iter()
        .map(|m| {
            let mut line = vec![m.name.to_string()];
            line.extend(args.queries.iter().map(|&q| at_end(m.name, q).text(1)));
            line.push(format!("{:.2}", passes_of(m.name)));
            line.push(price(m.name).map_or("–".into(), thousands));
            line
        })
        .collect();
    print_table(&header.iter().map(String::as_str).collect::<Vec<_>>(), &printed);
    diverged.iter().for_each(|what| println!("  diverged: {what}"));
    let pictures: Vec<Panel> = args
        .queries
        .iter()
        .map(|&queries| Panel {
            title: format!("{queries} queries per datum and step"),
            axes: ("queries in all".into(), "test accuracy, %".into()),
            log: (true, false),
            series: METHODS
                .iter()
                .map(|m| Series {
                    name: m.name.into(),
                    points: curve(m.name, queries)
                        .iter()
                        .map(|(q, a)| (*q as f64, 100.0 * a.mean, 100.0 * a.deviation))
                        .collect(),
                })
                .collect(),
        })
        .collect();
    let title = format!("Accuracy against queries: {}, scope {}", args.lab.dataset, args.lab.scope);
    artifacts.write("efficiency.svg", panels(&title, &pictures)?.as_bytes())?;
    artifacts.write_csv("efficiency.csv", &table)?;
    let prices: Map<String, Value> = METHODS.iter().map(|m| (m.name.to_string(), json!(price(m.name)))).collect();
    let ends: Vec<Value> = METHODS
        .iter()
        .flat_map(|m| {
            args.queries
                .iter()
                .map(|&q| json!({"method": m.name, "queries_per_datum": q, "accuracy_percent": at_end(m.name, q)}))
        })
        .collect();
    let figures = json!({
        "dataset": args.lab.dataset.to_string(),
        "scope": args.lab.scope.to_string(),
        "total": total,
        "queries_per_datum": args.queries,
        "target": args.target,
        "queries_to_target": prices,
        "final": ends,
        "learning_rates": chosen,
        "diverged": diverged,
        "passes_per_query": passes,
    });
    args.common.finish(&artifacts, progress.started(), figures, "efficiency.svg, efficiency.csv")
}

fn main() -> ExitCode {
    cli::run(run)
}
