//! Fine-tunes a pretrained ViT with forward passes only, and reports what it cost.
//!
//! ```text
//! cargo run --release --example vit_cifar
//! cargo run --release --example vit_cifar -- \
//!     --dataset cifar10 --data-dir path/to/cifar-10-batches-bin --reset-head
//! cargo run --release --example vit_cifar -- --method backprop
//! cargo run --release --example vit_cifar -- --workers 4
//! ```
//!
//! A run reads from here in its order: `args`, `data`, `model`, `training`, `report`. The artifact
//! folder is described in [`flops_examples::run::artifacts`].
// devices are `Copy` on some backends only
#![allow(clippy::clone_on_copy)]

#[macro_use]
extern crate flops_report;

mod args;
mod data;
mod model;
mod report;
mod training;

use std::process::ExitCode;

use anyhow::Result;
use flops_core::ForwardConfig;
use flops_examples::backend::AB;
use flops_examples::run::artifacts::Artifacts;
use flops_examples::run::curves::Beside;
use flops_examples::run::workers::starter;
use flops_examples::run::workers::worker::Worker;
use flops_examples::{backend, cli};
use flops_vit::FineTuning;
use flops_vit::checkpoint::Pretrained;

use crate::args::{Args, FREE_SETTINGS};
use crate::data::{Data, with_prefix_caches};
use crate::model::prepare;
use crate::training::Run;

fn main() -> ExitCode {
    cli::run(run)
}

fn run(args: Args) -> Result<()> {
    let args = args.with_recommended_noise();
    let config = args.validate()?;
    let beside = args.beside.as_deref().map(Beside::read).transpose()?;
    if args.workers.workers.is_some() && starter::place()?.is_none() {
        return starter::run(&args.workers, &args.artifact_dir, config.estimator.threads, args.plain);
    }
    match Worker::join(&args.workers, &args.artifact_dir)? {
        Some(worker) => {
            let outcome = train(args, config, beside, Some(&worker));
            worker.end(outcome)
        }
        None => train(args, config, beside, None),
    }
}

fn train(mut args: Args, config: ForwardConfig, beside: Option<Beside>, worker: Option<&Worker>) -> Result<()> {
    // a dry run leaves the folder to a run that uses it
    let dir = worker.map_or(args.artifact_dir.clone(), |worker| worker.folder(&args.artifact_dir));
    let artifacts = if args.dry_run { Artifacts::read_only(&dir) } else { Artifacts::open(&dir)? };
    let device = backend::device()?;

    let pretrained = args.inputs.model::<AB>(&device)?;
    let data = Data::load(&args, &pretrained.card, config.estimator.threads, &device)?;
    let config = with_prefix_caches(config, &args, &data, &pretrained.card);
    let lr = args.lr.unwrap_or(FineTuning::new(&pretrained.card.config, args.scope).lr);
    let settings = args.settings(&config, lr)?;
    if let Some(worker) = worker {
        args.resume = worker.catch_up(&artifacts, args.resume, &settings, &FREE_SETTINGS)?;
        args.plain |= worker.is_plain();
    }
    if args.resume {
        artifacts.check_resumable(&settings, &FREE_SETTINGS)?;
    }

    let new_head = args.reset_head || pretrained.card.classes != data.train.classes;
    let Pretrained { model, card } = prepare(pretrained, new_head, &args, &data.train.classes)?;
    let run = Run { args, config, lr, settings, artifacts, device, data, worker, beside };
    if run.args.dry_run {
        return run.dry_run(model, &card);
    }

    let start = run.start(&model, new_head)?;
    let trained = run.fit(model, &start, &card)?;
    if worker.is_some_and(|worker| !worker.is_first()) {
        // the model is that of the first
        return Ok(());
    }
    run.report(trained, &start.before, card)
}
