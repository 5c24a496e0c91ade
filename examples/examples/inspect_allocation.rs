//! A picture of an allocation: the images of a batch with the queries of each, most queries first.
//!
//! ```text
//! cargo run --release --example inspect_allocation
//! cargo run --release --example inspect_allocation -- --allocator gaussian --steps 600
//! ```
//!
//! The model is trained for a while, so that its losses are uneven. Then one step's allocation is
//! shown as a contact sheet, beside what the queries measured.
// Devices are `Copy` on some backends only.
#![allow(clippy::clone_on_copy)]

#[macro_use]
extern crate flops_report;

use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use flops_core::allocator::AllocatorKind;
use flops_core::{ForwardConfig, QueryBudget, StepReport, VarianceSource};
use flops_examples::cli;
use flops_examples::experiment::{
    ExperimentArgs, Optim, Progress, Run, Spread, Testbed, TestbedArgs, estimate, print_table,
};
use flops_examples::plot::contact_sheet::{Picture, contact_sheet};
use flops_examples::run::artifacts::Artifacts;
use serde::Serialize;
use serde_json::json;

/// Show which images of a batch get how many queries.
#[derive(Parser, Debug)]
#[command(name = "inspect_allocation", version)]
struct Args {
    #[command(flatten)]
    experiment: ExperimentArgs,
    #[command(flatten)]
    testbed: TestbedArgs,
    /// The allocator: uniform, neyman, gaussian, bernoulli or gaussian-paper.
    #[arg(long, default_value = "neyman")]
    allocator: String,
    /// The source of its variance estimates: running, loss or pilot:N.
    #[arg(long, default_value = "running")]
    variance: VarianceSource,
    /// Queries per datum.
    #[arg(long, default_value_t = 20)]
    queries: usize,
    /// Images in the batch.
    #[arg(long, default_value_t = 64)]
    batch_size: usize,
    /// Images in the picture: those with most and those with fewest queries [default: all of the batch].
    #[arg(long)]
    shown: Option<usize>,
    /// Training steps before the allocation is shown [default: 300, with --full 1,500].
    #[arg(long)]
    steps: Option<usize>,
}

impl Args {
    fn steps(&self) -> usize {
        self.steps.unwrap_or(if self.experiment.full { 1500 } else { 300 })
    }
}

/// A row of `allocation.csv`; the image with most queries comes first.
#[derive(Clone, Serialize)]
struct Row {
    seed: u64,
    id: u64,
    label: String,
    loss: f64,
    queries: usize,
    /// Measured in this same step.
    second_moment: f64,
}

/// Trains for a while, then returns the report of one further step.
fn report_after_training(args: &Args, testbed: &Testbed, kind: AllocatorKind, seed: u64) -> Result<StepReport> {
    let config = ForwardConfig::new(QueryBudget::new(args.queries, 1)?).with_seed(seed).with_variance(args.variance);
    let learner = testbed.learner(testbed.model(seed), config, kind)?;
    let mut batches = testbed.batches(args.batch_size, seed)?;
    let learner = match args.steps() {
        0 => learner,
        steps => Run::new(learner, Optim::adam(), 5e-3, steps).finish(&mut batches, |_, _| {})?.0.learner,
    };
    Ok(estimate(&learner, batches.next().context("there are no images")?)?.1)
}

/// Returns the rows of a report, most queries first.
fn rows(testbed: &Testbed, report: &StepReport, seed: u64) -> Result<Vec<Row>> {
    let mut data = report.data.clone();
    data.sort_by(|a, b| b.queries.cmp(&a.queries).then(a.id.cmp(&b.id)));
    let item = |id: u64| testbed.images.train.items.iter().find(|item| item.id == id).context("an image of the batch");
    let rows = data.iter().map(|datum| -> Result<Row> {
        Ok(Row {
            seed,
            id: datum.id,
            label: testbed.images.train.classes.get(item(datum.id)?.label).cloned().unwrap_or_default(),
            loss: datum.loss,
            queries: datum.queries,
            second_moment: datum.second_moment,
        })
    });
    rows.collect()
}

/// Writes the contact sheet, and prints the images with most and with fewest queries.
fn show(args: &Args, testbed: &Testbed, rows: &[Row], artifacts: &Artifacts) -> Result<()> {
    let picture = |row: &Row| -> Result<Picture> {
        let items = &testbed.images.train.items;
        let item = items.iter().find(|item| item.id == row.id).context("an image of the batch")?;
        Ok(Picture {
            pixels: item.pixels.clone(),
            height: item.height,
            width: item.width,
            lines: [format!("{} queries", row.queries), format!("{}, loss {:.2}", row.label, row.loss)],
            share: row.queries as f64 / rows[0].queries as f64,
        })
    };
    let shown = args.shown.unwrap_or(rows.len()).min(rows.len());
    let ends = rows[..shown.div_ceil(2)].iter().chain(&rows[rows.len() - shown / 2..]);
    let pictures: Vec<Picture> = ends.map(picture).collect::<Result<_>>()?;
    let part = if shown < rows.len() { format!(", {shown} of {} images", rows.len()) } else { String::new() };
    let title = format!(
        "{}, {} allocator, mean of {} queries per image, after {} steps{part}",
        args.testbed.images.dataset,
        args.allocator,
        args.queries,
        args.steps()
    );
    artifacts.write("allocation.svg", contact_sheet(&title, &pictures)?.as_bytes())?;
    println!("{title}");
    let ends = rows.iter().take(5).chain(rows.iter().skip(5.max(rows.len().saturating_sub(5))));
    let ends = ends.map(|row| vec![row.id.to_string(), format!("{:.4}", row.loss), row.queries.to_string()]);
    print_table(&["id, most and fewest queries", "loss", "queries"], &ends.collect::<Vec<_>>());
    Ok(())
}

fn run(args: Args) -> Result<()> {
    let kind: AllocatorKind = args.allocator.parse()?;
    let seeds = args.experiment.seeds()?;
    ensure!(args.batch_size > 0, "--batch-size 0: use at least 1 image");
    ensure!(args.shown != Some(0), "--shown 0: use at least 1 image");
    let artifacts = args.experiment.artifacts("inspect_allocation")?;
    let testbed = Testbed::open(&args.testbed, args.experiment.threads()?)?;
    let mut progress = Progress::default();
    let (mut table, mut relative, mut floor, mut correlations) = (vec![], vec![], vec![], vec![]);
    for (i, &seed) in seeds.iter().enumerate() {
        progress.at(i, seeds.len(), || format!("seed {seed}"));
        let report = report_after_training(&args, &testbed, kind, seed)?;
        relative.push(report.allocation.relative_variance);
        floor.push(report.allocation.floor);
        let rows = rows(&testbed, &report, seed)?;
        correlations.push(rank_correlation(&rows.iter().map(|r| (r.queries as f64, r.loss)).collect::<Vec<_>>()));
        if i == 0 {
            show(&args, &testbed, &rows, &artifacts)?;
        }
        table.extend(rows);
    }
    let [relative, floor, correlation] = [&relative, &floor, &correlations].map(|v| Spread::of(v));
    println!("\nvariance relative to uniform {}, floor {}", relative.text(3), floor.text(3));
    println!("rank correlation of queries with losses {}, {} seeds", correlation.text(2), seeds.len());
    artifacts.write_csv("allocation.csv", &table)?;
    let figures = json!({
        "dataset": args.testbed.images.dataset.to_string(),
        "scope": args.testbed.scope.to_string(),
        "allocator": args.allocator,
        "variance": args.variance.to_string(),
        "queries": args.queries,
        "steps": args.steps(),
        "relative_variance": relative,
        "floor": floor,
        "rank_correlation_of_queries_and_losses": correlation,
    });
    args.experiment.finish(&artifacts, progress.started(), figures, "allocation.svg, allocation.csv")
}

/// Returns Spearman's rank correlation, or 0 if one side is constant. Equal values share their mean
/// rank.
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
