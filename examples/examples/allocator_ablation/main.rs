//! Allocators and variance estimates compared on a small ViT: the error of the gradient along one
//! trajectory, and training runs.
//!
//! ```text
//! # head, 5 seeds, minutes
//! cargo run --release --example allocator_ablation
//! # another scope and budget
//! cargo run --release --example allocator_ablation -- --scope cls_tail --queries 4
//! # 1,500 steps of everything
//! cargo run --release --example allocator_ablation -- --full
//! ```
//!
//! 1. *Along uniform's trajectory.* A run with uniform allocation moves θ. On the same batches
//!    every contender allocates queries with a state of its own and estimates the gradient. The
//!    estimate is compared with autodiff's gradient. The last contender is told the variances that
//!    96 further queries per image show, and uses integer Neyman allocation. Expected errors use
//!    these same variances, which flatters that contender a little.
//! 2. *On its own.* Each contender trains from the same start, at the same budget.
//! 3. *By depth.* The second moment of a query on each layer of the whole model, by depth.
// Devices are `Copy` on some backends only.
#![allow(clippy::clone_on_copy)]

#[macro_use]
extern crate flops_report;

mod args;
mod depth;
mod report;
mod training;
mod trajectory;

use std::process::ExitCode;

use anyhow::Result;
use flops_examples::cli;
use flops_examples::experiment::{Progress, Testbed};

use args::{Args, contenders};
use report::Results;

fn run(args: Args) -> Result<()> {
    args.check()?;
    let (seeds, list) = (args.experiment.seeds()?, contenders(&args)?);
    let artifacts = args.experiment.artifacts("allocator_ablation")?;
    let testbed = Testbed::open(&args.testbed, args.experiment.threads()?)?;
    let mut progress = Progress::default();
    let (mut looks, mut trained, mut points) = (vec![], vec![], vec![]);
    for &seed in &seeds {
        if !args.training_only {
            trajectory::follow(&args, &testbed, seed, &mut looks, &mut progress)?;
        }
        if !args.trajectory_only {
            for contender in &list {
                let what = || format!("seed {seed}, training with {}", contender.name);
                progress.at(trained.len(), seeds.len() * list.len(), what);
                trained.push(training::train(&args, &testbed, seed, contender, &mut points)?);
            }
        }
    }
    let by_depth =
        if args.training_only || args.trajectory_only { vec![] } else { depth::second_moments(&args, seeds[0])? };
    let results = Results::new(&args, seeds, looks, trained, points, by_depth)?;
    results.print();
    results.write(&artifacts)?;
    let files = "ablation.svg, trajectory.csv, training.csv, curves.csv";
    args.experiment.finish(&artifacts, progress.started(), results.figures()?, files)
}

fn main() -> ExitCode {
    cli::run(run)
}
