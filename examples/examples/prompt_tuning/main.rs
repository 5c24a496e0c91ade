//! Tunes a prompt of a black box over HTTP, from its scores alone, and compares it with the
//! zero-shot classifier.
//!
//! ```text
//! cargo run --release --example prompt_tuning
//! cargo run --release --example prompt_tuning -- --prompt text
//! cargo run --release --example prompt_tuning -- --endpoint http://127.0.0.1:8080
//! ```
//!
//! Without `--endpoint` it starts a server in another process, and restarts it if it dies. The
//! images are made-up scenes under a domain shift: another camera, which mixes red, green and blue.
//! The classifier knows the classes, but not that camera.
//!
//! Every answer is kept in `answers.journal`. After an interruption, `--resume` takes the same
//! steps again, and asks only what was never answered.
//!
//! The steps are planned when a run starts. A server given by `--endpoint` may charge requests that
//! fail, so that the cap is reached before the last step. Then training stops, and the prompt is
//! evaluated and saved. A higher `--cap` with `--resume` takes the steps that are left.
// devices are `Copy` on some backends only
#![allow(clippy::clone_on_copy)]

#[macro_use]
extern crate flops_report;

mod args;
mod endpoint;
mod report;
mod tuning;

use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use flops_examples::backend::{self, AB, B};
use flops_examples::blackbox::server::serve;
use flops_examples::cli;
use flops_examples::data::shots::shots;
use flops_examples::plot::answers::answers;
use flops_examples::run::artifacts::Artifacts;
use flops_examples::run::history::History;
use flops_multimodal::VisualPrompt;
use flops_multimodal::data::Scenes;

use args::{Args, Prompt};
use endpoint::{Endpoint, connect, set_aside};
use tuning::Run;

/// Settings that do not change the result: a resumed run may have other values.
const FREE_SETTINGS: [&str; 2] = ["concurrency", "cap"];

fn main() -> ExitCode {
    cli::run(|args: Args| match args.serve {
        Some(port) => serve_until_orphaned(&args, port),
        None => run(args),
    })
}

/// Serves until the process that started this one ends, however it ends.
fn serve_until_orphaned(args: &Args, port: u16) -> Result<()> {
    std::thread::spawn(|| {
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        std::process::exit(0);
    });
    serve(&args.classifier, port, args.charge_log.as_deref(), |address| println!("listening on {address}"))
}

fn run(args: Args) -> Result<()> {
    let config = args.validate()?;
    let artifacts = Artifacts::open(&args.artifact_dir)?;
    let plan = args.plan(&artifacts)?;
    let settings = args.settings(&config, &plan)?;
    let device = backend::device()?;
    if args.resume {
        artifacts.check_resumable(&settings, &FREE_SETTINGS)?;
    } else {
        // an endpoint that cannot be used changes nothing in the folder
        args.endpoint.clone().map(|address| connect(&args, address)).transpose()?;
        set_aside(&artifacts)?;
        artifacts.start(&settings)?;
    }
    let started = Instant::now();

    let classes = args.classifier.classes;
    let count = args.shots.saturating_mul(classes.names().len());
    let train = shots(&Scenes::train(1, args.seed), classes, count, args.seed);
    let test = shots(&Scenes::test(1, args.seed), classes, args.test, args.seed);
    let args = Args { test: test.len(), ..args };
    let endpoint = Endpoint::open(&args, &plan, &artifacts, &device)?;
    if plan.cap_before.is_some_and(|before| before != plan.budget.cap) {
        artifacts.write_json("config.json", &settings)?;
        println!("the cap is {} now; the {} steps that were planned stay", plan.budget.cap, plan.steps);
    }

    let history = History::default();
    let mut run = Run { args, config, plan, artifacts, endpoint, train, test, device, history, stopped: None };
    let before = run.evaluate::<VisualPrompt<B>>(None)?;
    let zero_shot = run.push_test(0, &before);
    let (images, tests) = (run.train.len(), run.test.len());
    println!("{images} training images, {tests} test images, zero-shot accuracy {:.1} %", 100.0 * zero_shot);
    <AB as burn::tensor::backend::Backend>::seed(&run.device, run.args.seed);
    let (after, painted) = match run.args.prompt {
        Prompt::Visual => run.tune_visual()?,
        Prompt::Text => run.tune_text()?,
    };
    let tuned = after.as_ref().map(|after| run.push_test(1, after));
    let after = after.as_ref().map(|after| &*after.answers);
    let pictures = painted.map(|painted| answers(&run.test, classes.names(), &before.answers, after, &painted));
    run.report(settings, (zero_shot, tuned), pictures, started)
}
