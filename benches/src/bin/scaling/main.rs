//! Measures what several workers gain over one process, and models what many more would.
//!
//! ```text
//! cargo run --release -p flops-benches --bin scaling -- --artifact-dir DIR
//! cargo run --release -p flops-benches --bin scaling --features nats,mpi -- --workers 1,2,4
//! ```
//!
//! Workers are processes of this program, of one thread each. They take steps of
//! `vit_micro_patch4_32` with a hub, over a NATS server that this program starts, or as ranks that
//! `mpirun` starts. Before and after each measurement a single process of one thread takes as many
//! steps: the speed-up is the mean of its two times over theirs. On a machine that does other work
//! times mislead: see the seconds of a processor beside them, and `--beside`. Processes that are
//! not measured wait and take no time. Figures are medians over `--rounds`; their spread is the
//! smallest and the largest. All workers must have the weights of the single process, bit for bit.
//!
//! The model takes seconds of rows, noise and updates from the single process, and what a hub, a
//! server and MPI do from exchanges between processes here. The larger steps and the network are
//! assumed: see `cases.rs`, `--gigabits` and `--hop`.

#[macro_use]
extern crate flops_report;

mod args;
mod cases;
mod group;
mod measure;
mod model;
mod probes;
mod profile;
mod report;
mod task;
mod worker;

use std::process::ExitCode;

use anyhow::{Context, Result};
use flops_benches::{Folder, TASK};
use flops_core::NoiseLaw;
use flops_distributed::SumMode;
use flops_report::Progress;

use args::Args;
use cases::Machine;
use group::{Group, Server};
use model::Link;
use report::{Links, Report};
use task::{Engine, Steps};

/// That of the examples, so that workers are measured as they run there.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The steps of all scopes and spaces.
fn steps(args: &Args) -> Vec<Steps> {
    let of = |scope: &flops_vit::Scope, noise| Steps {
        scope: scope.to_string(),
        noise,
        batch: args.batch,
        queries: args.queries,
        leaves: args.leaves,
        kept: args.kept,
    };
    args.noise.iter().flat_map(|&noise| args.scopes.iter().map(move |scope| of(scope, noise))).collect()
}

/// Measures what connects workers.
fn links(engines: &[Engine], steps: &Steps, server: &str) -> Result<Links> {
    let mut links = Links::default();
    for engine in engines {
        match engine {
            Engine::Hub => links.hub = Some(probes::hub().context("the hub")?),
            #[cfg(feature = "nats")]
            Engine::Nats => links.nats = Some(probes::nats(server).context("the NATS server")?),
            Engine::Mpi => {
                let small = Steps { batch: 2, queries: 2, ..steps.clone() };
                links.mpi = Some(Group::start(&small, Engine::Mpi, 2, SumMode::Auto, server)?.link()?);
            }
            _ => {}
        }
    }
    Ok(links)
}

fn run(args: Args) -> Result<()> {
    args.check()?;
    let folder = Folder::open(&args.artifact_dir)?;
    let (engines, steps) = (args.engines(), steps(&args));
    let server = if engines.contains(&Engine::Nats) { Some(Server::start()?) } else { None };
    let address = server.as_ref().map_or("", |server| &server.address);
    println!(
        "vit_micro_patch4_32, {}, workers of one thread, {} images, {} queries each, {} leaves, medians of {}",
        flops_backend::NAME,
        args.batch,
        args.queries,
        args.leaves,
        args.rounds
    );
    let machine = Machine { gaussian: probes::noise(NoiseLaw::Gaussian, args.rounds) };
    let links = links(&engines, &steps[0], address)?;
    let (mut progress, mut figures, mut measured) = (Progress::default(), vec![], vec![]);
    for steps in &steps {
        let found = measure::measure(&args, steps, (&engines, address), &mut progress)?;
        report::print_figures(&found);
        measured.push(cases::measured(&found[0], &machine, cases::answer(&found)));
        figures.extend(found);
    }
    let log = links.nats.or(links.hub).map(|log| (log.bandwidth, (log.entry, log.serve())));
    let mpi = links.mpi.map(|mpi| (Link::Mpi, cases::network(&args, mpi, Default::default())));
    let log = log.map(|(bandwidth, log)| (Link::Log, cases::network(&args, (0.0, bandwidth), log)));
    let networks: Vec<_> = mpi.into_iter().chain(log).collect();
    let modelled = cases::modelled(&measured, &cases::larger(&measured, &machine), &networks);
    let report = Report { figures, machine, links, networks, modelled };
    report.print();
    report.write(&folder)
}

fn main() -> ExitCode {
    if let Ok(task) = std::env::var(TASK) {
        let done = serde_json::from_str(&task).map_err(Into::into).and_then(|task| worker::work(&task));
        // the program that started this worker is told why
        return if done.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    flops_report::program::run(run)
}
