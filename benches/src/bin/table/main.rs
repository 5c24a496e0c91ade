//! What a forward-only step costs: against plain inference, backpropagation and PyTorch, in time and in memory.
//!
//! ```text
//! cargo run --release -p flops-benches --bin table -- --artifact-dir DIR
//! ```
//!
//! Everything is measured in turn with what it is compared with, in one process (PyTorch in one beside it), `--rounds` times; figures are
//! medians, their spread the least and the largest. A step is charged whole: clean pass, allocation, noise, queries, recorded rows, gradients and
//! optimizer; inference the rows of the queries alone. Peak memory is that of a process of its own for each.

mod peer;
mod report;

use std::hint::black_box;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, bail, ensure};
use burn::module::AutodiffModule;
use burn::prelude::*;
use burn::tensor::Distribution;
use clap::Parser;
use flops_benches::{
    B, BACKEND, Case, INFERENCE_ROWS, ON_HOST, TASK, THREADS, images_of, in_a_process, inference, micro, model_of,
    multiply_adds, peak_memory,
};
use flops_core::{NoiseLaw, Placement, Sampling, Space};
use flops_examples::artifacts::Artifacts;
use flops_examples::experiment::Progress;
use flops_vit::data::ImageBatch;
use flops_vit::{Scope, ViT, ViTConfig};
use peer::Peer;
use report::{Row, Table};

const SCOPES: [Scope; 7] =
    [Scope::Head, Scope::ClsTail, Scope::Last(1), Scope::Last(3), Scope::BiasNorm, Scope::Lora(4), Scope::Full];

/// What a forward-only step costs.
#[derive(Clone, Debug, Parser)]
struct Args {
    /// Folder for table.csv, summary.json and cost.svg
    #[arg(long, default_value = "artifacts/table")]
    artifact_dir: PathBuf,
    /// The model: vit_micro_patch4_32, vit_base_patch16_224, …
    #[arg(long, default_value = "vit_micro_patch4_32")]
    model: String,
    /// Data of a step where rates are measured
    #[arg(long, default_value_t = 64)]
    batch: usize,
    /// Queries of a datum there
    #[arg(long, default_value_t = 20)]
    queries: usize,
    /// Rows of a pass at most
    #[arg(long, default_value_t = 256)]
    max_rows: usize,
    /// Rows of a pass of plain inference; on a device that is not the host as many as of a query pass unless given
    #[arg(long)]
    inference_rows: Option<usize>,
    /// How often each is measured
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Measure the rates alone: no scopes, no laws, no dependence on batch, queries and depth, no memory
    #[arg(long)]
    rates_only: bool,
    /// The rates to measure, of weights, activation, single, last3, cls_tail, cls_tail_kept and backprop; all of them unless given
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// The Python that has PyTorch; without one its figures are left out
    #[arg(long, default_value = "python3")]
    python: String,
    /// PyTorch's device, as cuda; the CPU unless given
    #[arg(long)]
    torch_device: Option<String>,
    /// PyTorch's numbers: float32 or bfloat16
    #[arg(long, default_value = "float32")]
    torch_dtype: String,
    /// Rows of a pass of PyTorch's inference and queries; 64, or where ours run on a device as many as of our query pass, unless given
    #[arg(long)]
    torch_rows: Option<usize>,
}

impl Args {
    fn inference_rows(&self) -> usize {
        self.inference_rows.unwrap_or(if ON_HOST { INFERENCE_ROWS } else { self.max_rows })
    }

    fn torch_rows(&self) -> usize {
        self.torch_rows.unwrap_or(if ON_HOST { 64 } else { self.max_rows })
    }
}

/// The model's configuration by its name.
fn config_of(name: &str) -> Result<ViTConfig> {
    Ok(match name {
        "vit_micro_patch4_32" => micro(6),
        "vit_tiny_patch16_224" => ViTConfig::vit_tiny_patch16_224().with_num_classes(10),
        "vit_small_patch16_224" => ViTConfig::vit_small_patch16_224().with_num_classes(10),
        "vit_base_patch16_224" => ViTConfig::vit_base_patch16_224().with_num_classes(10),
        _ => bail!(
            "--model {name}: use vit_micro_patch4_32, vit_tiny_patch16_224, vit_small_patch16_224 or vit_base_patch16_224"
        ),
    })
}

fn timed(mut run: impl FnMut()) -> f64 {
    let start = Instant::now();
    run();
    start.elapsed().as_secs_f64()
}

/// Plain inference with a model and images of its own.
struct Plain {
    model: ViT<B>,
    batch: ImageBatch<B>,
    rows: usize,
}

impl Plain {
    fn new(config: &ViTConfig, batch: usize, rows: usize) -> Self {
        let model = model_of(config, Scope::Full).valid();
        Self { model, batch: images_of::<B>(batch, config.img_size), rows }
    }

    fn run(&self, rows: usize) {
        black_box(inference(&self.model, &self.batch, rows, self.rows));
    }
}

/// Steps that are not measured; a device compiles for allocations too, of which a first step has one like no other.
const FIRST_USES: usize = if ON_HOST { 1 } else { 4 };

/// Seconds of a case and of as many rows of plain inference, in turn.
fn paired(case: &Case, config: &ViTConfig, rounds: usize, inference_rows: usize) -> Vec<(f64, f64)> {
    // passes of inference are full, for every caller, however small the step's batch is
    let plain = Plain::new(config, case.batch.max(THREADS * inference_rows), inference_rows);
    let mut step = case.stepper(config);
    (0..FIRST_USES).for_each(|_| step());
    if !ON_HOST {
        plain.run(case.rows());
    }
    (0..rounds)
        .map(|_| {
            let reference = timed(|| plain.run(case.rows()));
            (timed(&mut step), reference)
        })
        .collect()
}

/// The cases whose rates are compared: antithetic normal noise on all weights, signs on all activations, and the default; full scope and less of it.
fn rated(args: &Args) -> Vec<(&'static str, Case)> {
    let of = |scope, space| Case {
        batch: args.batch,
        queries: args.queries,
        max_rows: args.max_rows,
        ..Case::new(scope, space)
    };
    let full = of(Scope::Full, Space::Activation);
    vec![
        (
            "weights",
            Case { law: NoiseLaw::Gaussian, sampling: Sampling::Antithetic, ..of(Scope::Full, Space::Weights) },
        ),
        ("activation", full),
        ("single", Case { placement: Placement::Single, ..full }),
        ("last3", of(Scope::Last(3), Space::Activation)),
        ("cls_tail", of(Scope::ClsTail, Space::Activation)),
        ("cls_tail_kept", Case { kept: true, ..of(Scope::ClsTail, Space::Activation) }),
        ("backprop", Case::backprop(Scope::Full, args.batch)),
    ]
    .into_iter()
    .filter(|(name, _)| args.only.is_empty() || args.only.iter().any(|only| only == name))
    .collect()
}

/// What PyTorch's process is told.
fn peer_arguments(args: &Args) -> Vec<String> {
    let (batch, rows, threads) = (args.batch.to_string(), args.torch_rows().to_string(), THREADS.to_string());
    let device = args.torch_device.as_deref().unwrap_or("cpu");
    let words = ["--model", &args.model, "--dtype", &args.torch_dtype, "--device", device];
    let numbers = ["--batch", &batch, "--max-rows", &rows, "--threads", &threads];
    words.iter().chain(&numbers).map(|word| word.to_string()).collect()
}

/// Rates of the cases above, in turn with plain inference and with PyTorch.
fn rates(args: &Args, config: &ViTConfig, table: &mut Table, progress: &mut Progress) -> Result<()> {
    let cases = rated(args);
    let wide = args.inference_rows();
    let plain = Plain::new(config, args.batch.max(THREADS * wide), wide);
    let mut steps: Vec<_> = cases.iter().map(|(_, case)| case.stepper(config)).collect();
    let mut peer = Peer::start(&args.python, &peer_arguments(args));
    match &peer {
        Ok(peer) => table.torch = Some(peer.version.clone()),
        Err(why) => println!("without PyTorch: {why:#}"),
    }
    let rows = args.batch * args.queries;
    // PyTorch's weight noise comes in pairs
    let pairs = args.queries.next_multiple_of(2);
    let asked: Vec<_> = [
        ("inference", format!("inference {rows}"), rows),
        ("weights", format!("weights {}", pairs), args.batch * pairs),
        ("activation", format!("activation {}", args.queries), rows),
        ("backprop", "backprop".into(), args.batch),
    ]
    .into_iter()
    .filter(|(name, ..)| *name == "inference" || cases.iter().any(|(case, _)| case == name))
    .collect();
    // what is made on first use is not measured
    let (of_all, each) = (args.rounds + 1, cases.len() + 1);
    let mut say = |round: usize, task: usize| {
        let name = if task == 0 { "inference" } else { cases[task - 1].0 };
        let what = || format!("rates, {}{name}", if round == 0 { "first use of " } else { "" });
        progress.at(round * each + task, of_all * each, what);
    };
    say(0, 0);
    plain.run(rows);
    for (i, step) in steps.iter_mut().enumerate() {
        say(0, i + 1);
        (0..FIRST_USES).for_each(|_| step());
    }
    if let Ok(running) = &mut peer
        && let Err(why) = asked.iter().try_for_each(|(_, task, _)| running.seconds(task).map(drop))
    {
        println!("without PyTorch: {why:#}");
        (peer, table.torch) = (Err(why), None);
    }
    let mut ours = vec![vec![]; cases.len()];
    let mut theirs = vec![vec![]; asked.len()];
    let mut references = vec![];
    for round in 0..args.rounds {
        say(round + 1, 0);
        let mut reference = timed(|| plain.run(rows));
        references.push(reference);
        for (i, ((step, (_, case)), found)) in steps.iter_mut().zip(&cases).zip(&mut ours).enumerate() {
            say(round + 1, i + 1);
            let before = reference;
            let took = timed(step);
            // between two runs of inference, for what else the machine does changes
            reference = timed(|| plain.run(rows));
            references.push(reference);
            found.push((took, 0.5 * (before + reference) * case.rows() as f64 / rows as f64));
        }
        if let Ok(peer) = &mut peer {
            for ((_, task, _), found) in asked.iter().zip(&mut theirs) {
                found.push(peer.seconds(task)?);
            }
        }
    }
    table.rows.push(Row::plain("rates", "inference", rows, &references));
    for ((name, case), found) in cases.iter().zip(&ours) {
        table.rows.push(Row::of("rates", name, case, config.depth, found));
    }
    if peer.is_ok() {
        for ((name, _, rows), found) in asked.iter().zip(&theirs) {
            table.rows.push(Row::plain("rates", &format!("torch {name}"), *rows, found));
        }
    }
    Ok(())
}

/// Numbers a second of each law, and multiply-adds a second of a matrix product that fills the device.
fn parts(rounds: usize, table: &mut Table) {
    let mut numbers = vec![0f32; 1 << 20];
    for law in NoiseLaw::ALL {
        let found: Vec<f64> =
            (0..rounds as u64).map(|seed| timed(|| law.sample(seed, black_box(&mut numbers)))).collect();
        table.rows.push(Row::plain("noise", law.name(), numbers.len(), &found));
    }
    let device = Default::default();
    if !ON_HOST {
        let n = 1 << 24;
        for law in NoiseLaw::ALL {
            let draw = |seed| {
                black_box(law.sample_on::<B>(seed, n, &device));
                B::sync(&device).expect("the device answers");
            };
            draw(0);
            let found: Vec<f64> = (0..rounds as u64).map(|seed| timed(|| draw(seed))).collect();
            table.rows.push(Row::plain("noise", &format!("{law}, made by the device"), n, &found));
        }
    }
    let n = if ON_HOST { 2048 } else { 4096 };
    let a = Tensor::<B, 2>::random([n, n], Distribution::Normal(0.0, 1.0), &device);
    let product = || {
        black_box(a.clone().matmul(a.clone()));
        B::sync(&device).expect("the device answers");
    };
    product();
    let found: Vec<f64> = (0..rounds).map(|_| timed(product)).collect();
    table.rows.push(Row::plain("matmul", "multiply-adds", n * n * n, &found));
}

/// Peak memory of a process that does a case, or plain inference, in MiB.
fn memory(task: &str, returning: bool) -> f64 {
    in_a_process(task, returning).trim().parse().unwrap_or_else(|_| {
        eprintln!("the memory of '{task}' could not be measured");
        f64::NAN
    })
}

/// Rows of a pass at most where memory is measured, the estimator's default; on a CPU the passes of the model are [`INFERENCE_ROWS`] wide.
const MEMORY_ROWS: usize = 256;

/// The case whose memory is compared with inference's.
fn remembered(scope: Scope, space: Option<Space>) -> Case {
    let case = space.map_or(Case::backprop(scope, 64), |space| Case::new(scope, space));
    let queries = if space.is_some() { 10 } else { 1 };
    Case { max_rows: MEMORY_ROWS, queries, ..case }
}

/// Does what a measured process is there for, and prints its peak memory in MiB.
fn measured(task: &str) -> Result<()> {
    let Some((depth, case)) = task.split_once(' ') else { bail!("'{task}' is no task") };
    let config = micro(depth.parse()?);
    if let Some(rows) = case.strip_prefix("inference ") {
        let rows = rows.parse::<usize>()?;
        let plain = Plain::new(&config, rows * THREADS, rows);
        plain.run(2 * rows * THREADS);
    } else {
        let mut step = case.parse::<Case>().map_err(anyhow::Error::msg)?.stepper(&config);
        step();
        step();
    }
    println!("{}", peak_memory());
    Ok(())
}

/// Peak memory of every scope and space, and of the budgets of a full one.
fn memories(table: &mut Table, progress: &mut Progress) {
    for returning in [true, false] {
        let section = if returning { "memory" } else { "memory with free blocks" };
        for rows in [MEMORY_ROWS, INFERENCE_ROWS] {
            let name = format!("inference, {rows} rows in a pass");
            let peak = memory(&format!("6 inference {rows}"), returning);
            table.rows.push(Row::memory(section, &name, None, 6, peak));
        }
        for (i, scope) in SCOPES.into_iter().enumerate() {
            progress.at(i, SCOPES.len(), || section.into());
            let [joint, weights, low_rank] = Space::ALL.map(|space| remembered(scope, Some(space)));
            let single = Case { placement: Placement::Single, ..joint };
            for case in [joint, single, weights, low_rank, remembered(scope, None)] {
                table.rows.push(Row::memory(section, "step", Some(&case), 6, memory(&format!("6 {case}"), returning)));
            }
        }
    }
}

/// Time and memory against queries, batch and depth.
fn dependence(args: &Args, table: &mut Table, progress: &mut Progress) {
    for space in [Space::Activation, Space::Weights] {
        let base = Case { batch: 16, queries: 10, ..Case::new(Scope::Full, space) };
        let queries = [5, 10, 20, 40].map(|queries| (Case { queries, ..base }, 6, "queries"));
        let batches = [8, 16, 32, 64].map(|batch| (Case { batch, ..base }, 6, "batch"));
        let depths = [2, 4, 6, 8].map(|depth| (base, depth, "depth"));
        for (i, (case, depth, of)) in queries.into_iter().chain(batches).chain(depths).enumerate() {
            progress.at(i, 12, || format!("cost against {of}"));
            let mut row =
                Row::of(of, "step", &case, depth, &paired(&case, &micro(depth), args.rounds.min(3), INFERENCE_ROWS));
            row.peak_mib = memory(&format!("{depth} {case}"), true);
            table.rows.push(row);
        }
    }
}

/// Every scope in every space and by backpropagation; every law in the full scope.
fn scopes(args: &Args, config: &ViTConfig, table: &mut Table, progress: &mut Progress) {
    let small = |case: Case| Case { batch: 16, max_rows: args.max_rows, ..case };
    for (i, scope) in SCOPES.into_iter().enumerate() {
        progress.at(i, SCOPES.len(), || format!("scope {scope}"));
        for space in Space::ALL {
            let case = small(Case::new(scope, space));
            let found = paired(&case, config, args.rounds, args.inference_rows());
            table.rows.push(Row::of("scopes", "step", &case, config.depth, &found));
        }
        let single = Case { placement: Placement::Single, ..small(Case::new(scope, Space::Activation)) };
        let found = paired(&single, config, args.rounds, args.inference_rows());
        table.rows.push(Row::of("scopes", "step", &single, config.depth, &found));
        let case = Case::backprop(scope, 64);
        let found = paired(&case, config, args.rounds, args.inference_rows());
        table.rows.push(Row::of("scopes", "backprop", &case, config.depth, &found));
    }
    for (i, law) in NoiseLaw::ALL.into_iter().enumerate() {
        progress.at(i, NoiseLaw::ALL.len(), || format!("law {law}"));
        for space in [Space::Activation, Space::Weights] {
            for sampling in [Sampling::OneSided, Sampling::Antithetic] {
                let case = Case { law, sampling, ..small(Case::new(Scope::Full, space)) };
                let found = paired(&case, config, args.rounds, args.inference_rows());
                table.rows.push(Row::of("laws", "step", &case, config.depth, &found));
            }
        }
    }
}

fn run(args: &Args) -> Result<()> {
    ensure!(args.rounds > 0, "--rounds 0: use at least 1");
    ensure!(args.batch > 0 && args.queries > 0, "--batch and --queries must be at least 1");
    let narrow = args.inference_rows() == 0 || args.torch_rows() == 0;
    ensure!(
        !narrow && args.max_rows > 1,
        "--inference-rows and --torch-rows must be at least 1, --max-rows at least 2"
    );
    let names: Vec<&str> = rated(&Args { only: vec![], ..args.clone() }).iter().map(|(name, _)| *name).collect();
    if let Some(unknown) = args.only.iter().find(|only| !names.contains(&only.as_str())) {
        bail!("--only {unknown}: use some of {}", names.join(", "));
    }
    let config = config_of(&args.model)?;
    ensure!(
        args.rates_only || args.model == "vit_micro_patch4_32",
        "--model {}: what a step costs by scope, budget and memory is measured on vit_micro_patch4_32; add --rates-only",
        args.model
    );
    let artifacts = Artifacts::open(&args.artifact_dir)?;
    let mut table = Table::new(&args.model, multiply_adds(&config));
    let mut progress = Progress::default();
    println!(
        "{}, {BACKEND}, {THREADS} threads, {} data, {} queries each, medians of {}",
        args.model, args.batch, args.queries, args.rounds
    );
    parts(args.rounds, &mut table);
    rates(args, &config, &mut table, &mut progress)?;
    if !args.rates_only {
        scopes(args, &config, &mut table, &mut progress);
        dependence(args, &mut table, &mut progress);
        memories(&mut table, &mut progress);
    }
    table.print();
    artifacts.write_csv("table.csv", &table.rows)?;
    if !args.rates_only {
        artifacts.write("cost.svg", table.picture()?.as_bytes())?;
    }
    artifacts.write_json("summary.json", &table.summary())?;
    let picture = if args.rates_only { "" } else { ", cost.svg" };
    println!("\n{} holds summary.json, table.csv{picture}", artifacts.dir().display());
    Ok(())
}

fn main() -> ExitCode {
    if let Ok(task) = std::env::var(TASK) {
        return match measured(&task) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        };
    }
    flops_examples::cli::run(|args: Args| run(&args))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_case_is_read_back_from_its_text() {
        for (_, case) in rated(&Args::parse_from(["table"])) {
            assert_eq!(case.to_string().parse(), Ok(case));
        }
        let case = remembered(Scope::Lora(4), Some(Space::LowRank(2)));
        assert_eq!(case.to_string().parse(), Ok(case));
        assert!("full weights".parse::<Case>().is_err());
        assert!("full weights cauchy one-sided joint 1 1 2 false".parse::<Case>().is_err());
    }

    #[test]
    fn a_peer_that_is_not_there_is_left_out() {
        let missing = Peer::start("no-such-python", &[]);
        assert!(missing.err().is_some_and(|e| e.to_string().contains("no-such-python")));
    }

    #[test]
    fn a_small_run_writes_every_figure() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_str().unwrap();
        let words =
            ["table", "--rates-only", "--batch", "2", "--queries", "2", "--rounds", "1", "--python", "no-such-python"];
        run(&Args::parse_from(words.into_iter().chain(["--artifact-dir", path]))).unwrap();
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
