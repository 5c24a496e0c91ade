//! Training deep scopes with forward passes only: all methods at equal cost, and backpropagation.
//!
//! ```text
//! cargo run --release --example deep_scopes -- --seeds 3
//! cargo run --release --example deep_scopes -- --seeds 3 --dataset cifar10 --limit 2000 \
//!     --data-dir path/to/cifar-10-batches-bin --artifact-dir artifacts/deep_cifar10
//! cargo run --release --example deep_scopes -- --seeds 3 --from-scratch \
//!     --artifact-dir artifacts/deep_scratch
//! ```
//!
//! **What is trained.** Scopes of the pretrained ViT with a new head, on images without augmented
//! copies. With `--from-scratch`: an MLP and a small CNN on digits, the ViT on other data.
//!
//! **Methods.** `unbiased` is the library's default: activation noise, an unbiased estimate.
//! `shrunk-linear` is shrunk towards the prediction. Both have a form with noise at residual
//! branches: `unbiased-branch`, `shrunk-branch`. The published recipes of
//! [`Recipe`](flops_core::Recipe) follow, then `backprop`. Muon drives ZO-Muon, and AdamW all
//! others, with a cosine schedule over the run.
//!
//! **Equal cost.** Every run goes on until its row-forwards are spent. The ledger counts a row for
//! each clean pass, each query and each recorded pass of the update. A query that starts late is a
//! whole row. The backward pass of a row counts as two more (`--backward`). Backpropagation has one
//! in every step. So has the update at branches, where each branch is differentiated by itself.
//!
//! **Learning rates.** Each method, for each number of queries, takes the best of three rates
//! (`--lrs`). The best has the lowest training loss at the end of a whole run on the first seed.
//! Test images do not choose. The table marks a rate at the edge of its grid with `*`. All seeds
//! then train at the chosen rate.
//!
//! **Measurements.** Each run is measured `--looks` times: test accuracy, training loss,
//! row-forwards, seconds of training, and the cosine of the estimate to the exact gradient on a
//! fixed batch. They cost no row-forwards. At the end α and the explained share of each site are
//! recorded.
//!
//! **Resuming.** The grid takes many hours. A finished run is a file in the folder `runs`, and is
//! not repeated. Processes with other `--methods`, `--scopes`, `--queries` or seeds may share a
//! folder; give `--row-forwards` if `--queries` differ. `--report-only` sums up what is there.
// Devices are `Copy` on some backends only.
#![allow(clippy::clone_on_copy)]

#[macro_use]
extern crate flops_report;

mod args;
mod grid;
mod method;
mod pictures;
mod record;
mod report;
mod subject;
mod trainee;
mod training;

use std::process::ExitCode;

use anyhow::Result;
use burn::prelude::*;
use flops_examples::backend::{self, AB, Device};
use flops_examples::cli;
use flops_examples::experiment::nets::SmallNet;
use flops_examples::experiment::{Images, Testbed};
use flops_vit::ViT;
use flops_vit::checkpoint::Pretrained;
use flops_vit::data::DatasetSpec;
use serde_json::json;

use crate::args::Args;
use crate::grid::Grid;
use crate::record::Records;
use crate::report::Final;
use crate::subject::{Network, Subject};

/// Side of the digits for networks from scratch: that of the originals.
const DIGITS_SIZE: usize = 8;

fn main() -> ExitCode {
    cli::run(run)
}

fn run(args: Args) -> Result<()> {
    args.check()?;
    let artifacts = args.experiment.shared_artifacts("deep_scopes")?;
    let device = backend::device()?;
    let pretrained = args.images.pretrained(&device)?;
    let images = load(&args, &pretrained, pretrained.card.config.img_size, &device)?;
    let budget = args.budget(images.train.items.len());
    let records = Records::open(&artifacts, &args.settings(budget)?)?;

    let mut grid = Grid::new(&args, budget, &records)?;
    let mut rows = vec![];
    for subject in args.subjects() {
        match subject {
            Subject::Pretrained(scope) => {
                let testbed = Testbed::pretrained(images.clone(), &pretrained, scope, args.experiment.threads()?)?;
                grid.measure(subject, &testbed, |seed| Ok(testbed.model(seed)))?;
            }
            Subject::Scratch(network) => measure_from_scratch(&args, &mut grid, network, &pretrained, &images)?,
        }
        // what is known so far is kept, should the program be stopped
        rows = grid.cells.iter().map(|cell| Final::of(cell, args.target)).collect();
        rows.sort_by_key(|row: &Final| (position(&args, row), row.queries));
        report::write(&grid.cells, &rows, &artifacts)?;
        pictures::draw(&args.images.dataset.to_string(), subject, &args.queries, &grid.cells, &artifacts)?;
    }

    println!("{}, {budget} row-forwards a run, {} seeds\n", args.images.dataset, args.experiment.seeds);
    print!("{}", report::table(&rows, args.target));
    grid.left_out.iter().for_each(|line| println!("\nleft out: {line}"));
    let figures = json!({
        "dataset": args.images.dataset.to_string(),
        "from_scratch": args.from_scratch,
        "row_forwards": budget,
        "backward": args.backward,
        "target": args.target,
        "final": rows,
        "left_out": grid.left_out,
    });
    args.experiment.finish(&artifacts, grid.started(), figures, "final.csv, curves.csv, sites.csv, pictures")
}

/// Returns the place of a row's subject in the order of the command line.
fn position(args: &Args, row: &Final) -> Option<usize> {
    args.subjects().iter().position(|subject| subject.to_string() == row.subject)
}

fn load(args: &Args, pretrained: &Pretrained<AB>, img_size: usize, device: &Device) -> Result<Images> {
    Images::load(&args.images, img_size, pretrained.card.normalization, args.experiment.threads()?, device)
}

/// Measures all methods on a network with random weights, all of which are trained.
fn measure_from_scratch(
    args: &Args,
    grid: &mut Grid<'_>,
    network: Network,
    pretrained: &Pretrained<AB>,
    images: &Images,
) -> Result<()> {
    let (device, threads, subject) = (&images.device, args.experiment.threads()?, Subject::Scratch(network));
    let (classes, full_size) = (images.train.classes.len(), pretrained.card.config.img_size);
    let size = if args.images.dataset == DatasetSpec::Digits { DIGITS_SIZE } else { full_size };
    let mut small = |new: fn(usize, usize, u64, &Device) -> SmallNet<AB>| {
        let images = load(args, pretrained, size, device)?;
        let start = |seed| new(size, classes, seed, device);
        let testbed = Testbed::new(images, start(0), threads, false)?;
        grid.measure(subject, &testbed, |seed| Ok(start(seed)))
    };
    match network {
        Network::Mlp => small(SmallNet::mlp),
        Network::Cnn => small(SmallNet::cnn),
        Network::Vit => {
            let config = pretrained.card.config.clone().with_num_classes(classes);
            let start = |seed| -> Result<ViT<AB>> {
                AB::seed(device, seed);
                Ok(config.init(device)?)
            };
            let testbed = Testbed::new(images.clone(), start(0)?, threads, false)?;
            grid.measure(subject, &testbed, start)
        }
    }
}
