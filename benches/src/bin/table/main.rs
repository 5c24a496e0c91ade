//! Measures what a forward-only step costs, in time and in memory, against plain inference,
//! backpropagation and PyTorch.
//!
//! ```text
//! cargo run --release -p flops-benches --bin table -- --artifact-dir DIR
//! ```
//!
//! Everything is measured `--rounds` times, in turn with what it is compared with, in one process.
//! PyTorch runs in a process beside it. Figures are medians; their spread is the smallest and the
//! largest. The time of a step is that of the whole step: clean pass, allocation, noise, queries,
//! recorded rows, gradients and optimizer. Inference runs only the rows of the queries. Peak memory
//! is measured in a process of its own for each case.

#[macro_use]
extern crate flops_report;

mod args;
mod measure;
mod memory;
mod parts;
mod peer;
mod rates;
mod report;
mod sections;

use std::process::ExitCode;

use anyhow::{Result, bail, ensure};
use flops_benches::{Folder, TASK, THREADS, micro, multiply_adds};
use flops_report::Progress;
use flops_vit::ViTConfig;

use args::Args;
use report::Table;

/// Returns the configuration of a model by its name.
fn config_of(name: &str) -> Result<ViTConfig> {
    Ok(match name {
        "vit_micro_patch4_32" => micro(6),
        "vit_tiny_patch16_224" => ViTConfig::vit_tiny_patch16_224().with_num_classes(10),
        "vit_small_patch16_224" => ViTConfig::vit_small_patch16_224().with_num_classes(10),
        "vit_base_patch16_224" => ViTConfig::vit_base_patch16_224().with_num_classes(10),
        _ => bail!(
            "--model {name}: use vit_micro_patch4_32, vit_tiny_patch16_224, vit_small_patch16_224 or \
             vit_base_patch16_224"
        ),
    })
}

/// Checks the flags.
fn check(args: &Args) -> Result<()> {
    ensure!(args.rounds > 0, "--rounds 0: use at least 1");
    ensure!(args.batch > 0 && args.queries > 0, "--batch and --queries must be at least 1");
    let narrow = args.inference_rows() == 0 || args.torch_rows() == 0;
    ensure!(
        !narrow && args.max_rows > 1,
        "--inference-rows and --torch-rows must be at least 1, --max-rows at least 2"
    );
    let mut all = args.clone();
    all.only.clear();
    let names: Vec<&str> = rates::cases(&all).into_iter().map(|(name, _)| name).collect();
    if let Some(unknown) = args.only.iter().find(|only| !names.contains(&only.as_str())) {
        bail!("--only {unknown}: use some of {}", names.join(", "));
    }
    Ok(())
}

fn run(args: Args) -> Result<()> {
    let args = &args;
    check(args)?;
    let config = config_of(&args.model)?;
    ensure!(
        args.rates_only || args.model == "vit_micro_patch4_32",
        "--model {}: the cost by scope, budget and memory is measured on vit_micro_patch4_32; add --rates-only",
        args.model
    );
    let folder = Folder::open(&args.artifact_dir)?;
    let mut table = Table::new(&args.model, multiply_adds(&config));
    let mut progress = Progress::default();
    println!(
        "{}, {}, {THREADS} threads, {} images, {} queries each, medians of {}",
        args.model,
        flops_backend::NAME,
        args.batch,
        args.queries,
        args.rounds
    );
    parts::measure(args.rounds, &mut table);
    rates::measure(args, &config, &mut table, &mut progress)?;
    if !args.rates_only {
        sections::scopes_and_laws(args, &config, &mut table, &mut progress);
        sections::dependence(args, &mut table, &mut progress);
        memory::measure(&mut table, &mut progress);
    }
    table.print();
    table.write(&folder, !args.rates_only)
}

fn main() -> ExitCode {
    if let Ok(task) = std::env::var(TASK) {
        return match memory::run_task(&task) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        };
    }
    flops_report::program::run(run)
}

#[cfg(test)]
mod tests {
    use super::peer::Peer;
    use super::*;
    use clap::Parser;
    use flops_benches::Case;
    use flops_core::Space;
    use flops_vit::Scope;

    #[test]
    fn case_text_round_trips() {
        for (_, case) in rates::cases(&Args::parse_from(["table"])) {
            assert_eq!(case.to_string().parse(), Ok(case));
        }
        let case = memory::case(Scope::Lora(4), Some(Space::low_rank(2)));
        assert_eq!(case.to_string().parse(), Ok(case));
        assert!("full weights".parse::<Case>().is_err());
        assert!("full linear weights cauchy one-sided - - - 1 1 2 false".parse::<Case>().is_err());
    }

    #[test]
    fn a_missing_python_is_named_in_the_error() {
        let missing = Peer::start("no-such-python", &[]);
        assert!(missing.err().is_some_and(|e| e.to_string().contains("no-such-python")));
    }

    #[test]
    fn a_small_run_writes_every_figure() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_str().unwrap();
        let words =
            ["table", "--rates-only", "--batch", "2", "--queries", "2", "--rounds", "1", "--python", "no-such-python"];
        run(Args::parse_from(words.into_iter().chain(["--artifact-dir", path]))).unwrap();
        let summary: serde_json::Value =
            serde_json::from_slice(&std::fs::read(dir.path().join("summary.json")).unwrap()).unwrap();
        for key in ["step_over_inference_full", "row_queries_per_second_full", "inference_rows_per_second"] {
            assert!(summary[key].as_f64().is_some_and(|v| v > 0.0), "{key}: {}", summary[key]);
        }
        assert!(summary["torch"].is_null());
        let table = std::fs::read_to_string(dir.path().join("table.csv")).unwrap();
        assert!(table.lines().count() > 10, "{table}");
    }
}
