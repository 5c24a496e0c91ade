//! A picture of an allocation: the images of a batch with the queries each was given, most first.
//!
//! ```text
//! cargo run --release --example inspect_allocation
//! cargo run --release --example inspect_allocation -- --allocator neyman --steps 600
//! ```
//!
//! The model is trained for a while, so that its losses are uneven; then one step's allocation is shown as a contact sheet, beside what the queries measured.
// devices are `Copy` on some backends only
#![allow(clippy::clone_on_copy)]

use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use flops_core::allocator::AllocatorKind;
use flops_core::{ForwardConfig, QueryBudget, VarianceEstimate};
use flops_examples::cli;
use flops_examples::experiment::{Common, Progress, Spread, print_table};
use flops_examples::lab::{Lab, LabArgs, Optim, Run, estimate};
use flops_examples::sheet::{Picture, contact_sheet};
use serde::Serialize;
use serde_json::json;

/// Show which images of a batch get how many queries.
#[derive(Parser, Debug)]
#[command(name = "inspect_allocation", version)]
struct Args {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    lab: LabArgs,
    /// How queries are dealt out: uniform, neyman, gaussian, bernoulli or gaussian-paper.
    #[arg(long, default_value = "gaussian")]
    allocator: String,
    /// Where its estimates of the variances come from: running, loss or pilot:N.
    #[arg(long, default_value = "running")]
    variance: VarianceEstimate,
    /// Queries per datum.
    #[arg(long, default_value_t = 20)]
    queries: usize,
    /// Images of the batch.
    #[arg(long, default_value_t = 64)]
    batch_size: usize,
    /// Steps before the look [default: 300, with --full 1,500].
    #[arg(long)]
    steps: Option<usize>,
}

/// A row of `allocation.csv`, the image with most queries first.
#[derive(Clone, Serialize)]
struct Row {
    seed: u64,
    id: u64,
    label: String,
    loss: f64,
    queries: usize,
    /// Measured in this very step.
    second_moment: f64,
}

fn run(args: Args) -> Result<()> {
    let steps = args.steps.unwrap_or(if args.common.full { 1500 } else { 300 });
    let kind: AllocatorKind = args.allocator.parse()?;
    let seeds = args.common.seeds()?;
    ensure!(args.batch_size > 0, "--batch-size 0: use at least 1 image");
    let artifacts = args.common.artifacts("inspect_allocation")?;
    let lab = Lab::open(&args.lab, args.common.threads()?)?;
    let mut progress = Progress::default();
    let (mut table, mut relative, mut ceiling, mut follows) = (vec![], vec![], vec![], vec![]);
    for (i, &seed) in seeds.iter().enumerate() {
        progress.at(i, seeds.len(), || format!("seed {seed}"));
        let config =
            ForwardConfig::new(QueryBudget::new(args.queries, 1)?).with_seed(seed).with_variance(args.variance);
        let learner = lab.learner(lab.model(seed), config, kind)?;
        let mut batches = lab.batches(args.batch_size, seed)?;
        let learner = match steps {
            0 => learner,
            _ => Run::new(learner, Optim::adam(), 5e-3, steps).finish(&mut batches, |_, _| {})?.0.learner,
        };
        let (_, report) = estimate(&learner, batches.next().context("there are no images")?)?;
        relative.push(report.allocation.relative_variance);
        ceiling.push(report.allocation.ceiling);
        let mut data = report.data.clone();
        data.sort_by(|a, b| b.queries.cmp(&a.queries).then(a.id.cmp(&b.id)));
        follows.push(rank_correlation(&data.iter().map(|d| (d.queries as f64, d.loss)).collect::<Vec<_>>()));
        let mut pictures = vec![];
        for datum in &data {
            let item = lab.train.items.iter().find(|item| item.id == datum.id).context("an image of the batch")?;
            let label = lab.train.classes.get(item.label).cloned().unwrap_or_default();
            table.push(Row {
                seed,
                id: datum.id,
                label: label.clone(),
                loss: datum.loss,
                queries: datum.queries,
                second_moment: datum.second_moment,
            });
            pictures.push(Picture {
                pixels: item.pixels.clone(),
                height: item.height,
                width: item.width,
                lines: [format!("{} queries", datum.queries), format!("{label}, loss {:.2}", datum.loss)],
                share: datum.queries as f64 / data[0].queries as f64,
            });
        }
        if i == 0 {
            let title = format!(
                "{}, {} allocator, {} queries per image in the mean, after {steps} steps",
                args.lab.dataset, args.allocator, args.queries
            );
            artifacts.write("allocation.svg", contact_sheet(&title, &pictures)?.as_bytes())?;
            println!("{title}");
            let ends: Vec<Vec<String>> = data
                .iter()
                .take(5)
                .chain(data.iter().skip(5.max(data.len().saturating_sub(5))))
                .map(|d| vec![d.id.to_string(), format!("{:.4}", d.loss), d.queries.to_string()])
                .collect();
            print_table(&["id, most and fewest queries", "loss", "queries"], &ends);
        }
    }
    let [relative, ceiling, follows] = [&relative, &ceiling, &follows].map(|v| Spread::of(v));
    println!("\nvariance relative to uniform {}, ceiling {}", relative.text(3), ceiling.text(3));
    println!("rank correlation of queries with losses {}, {} seeds", follows.text(2), seeds.len());
    artifacts.write_csv("allocation.csv", &table)?;
    let figures = json!({
        "dataset": args.lab.dataset.to_string(),
        "scope": args.lab.scope.to_string(),
        "allocator": args.allocator,
        "variance": args.variance.to_string(),
        "queries": args.queries,
        "steps": steps,
        "relative_variance": relative,
        "ceiling": ceiling,
        "rank_correlation_of_queries_and_losses": follows,
    });
    args.common.finish(&artifacts, progress.started(), figures, "allocation.svg, allocation.csv")
}

/// Spearman's rank correlation, equal values sharing their mean rank; 0 where one side is constant.
fn rank_correlation(pairs: &[(f64, f64)]) -> f64 {
    let ranks = |values: Vec<f64>| -> Vec<f64> {
        let below = |v: f64| values.iter().filter(|&&w| w < v).count() as f64;
        let equal = |v: f64| values.iter().filter(|&&w| w == v).count() as f64;
        values.iter().map(|&v| below(v) + 0.5 * (equal(v) - 1.0)).collect()
    };
    let (a, b) = (ranks(pairs.iter().map(|p| p.0).collect()), ranks(pairs.iter().map(|p| p.1).collect()));
    let centre = (pairs.len() as f64 - 1.0) / 2.0;
    let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| (x - centre) * (y - centre)).sum::<f64>();
    let norm = (dot(&a, &a) * dot(&b, &b)).sqrt();
    if norm > 0.0 { dot(&a, &b) / norm } else { 0.0 }
}

fn main() -> ExitCode {
    cli::run(run)
}
