//! Counts what a training step asks a device for: kernels, submissions, values read back, waits.
//!
//! ```text
//! cargo run --release -p flops-benches --features wgpu --bin launches
//! ```
//!
//! The counts stand beside those of plain inference of the same passes. They need no GPU: Mesa's
//! software driver is asked for the same as one. A step is taken until two in a row are alike, for the
//! first ones choose kernels and learn what is predicted. `kernels.csv` names the kernels of the last
//! step, in order.

#[macro_use]
extern crate flops_report;

mod counter;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use burn::module::AutodiffModule;
use burn::prelude::*;
use burn::tensor::Transaction;
use clap::Parser;
use flops_backend::B;
use flops_benches::{Case, Folder, images, micro, model};
use flops_core::{ControlVariate, ForwardModel, GradientEstimate, NoiseLaw, Placement, Probe, Sampling, Space};
use flops_report::{Progress, print_table};
use flops_vit::{Scope, Sites, ViTConfig};
use serde::{Deserialize, Serialize};

use counter::{Counts, counted, install, take_kernels};

/// Count what a training step asks a device for.
#[derive(Parser, Debug)]
#[command(name = "launches", version)]
struct Args {
    /// Folder for launches.csv, kernels.csv and summary.json
    #[arg(long, default_value = "artifacts/launches")]
    artifact_dir: PathBuf,
    /// Models: tiny (one block, 8 px), micro (vit_micro_patch4_32), base (two blocks of vit_base_patch16_224)
    #[arg(long, value_delimiter = ',', default_value = "micro,base")]
    models: Vec<String>,
    /// Images in a step
    #[arg(long, default_value_t = 8)]
    batch: usize,
    /// Queries per image
    #[arg(long, default_value_t = 8)]
    queries: usize,
    /// The most rows in a pass
    #[arg(long, default_value_t = 32)]
    max_rows: usize,
    /// A summary.json of another run: fail where a count is more than 5 % above it, or 15 % where steps differ
    #[arg(long)]
    against: Option<PathBuf>,
}

/// The counts of a step.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Row {
    model: String,
    step: String,
    /// Passes: the clean one and those of the queries.
    passes: u64,
    launches: u64,
    /// Launches of plain inference of as many passes.
    inference: u64,
    over_inference: f64,
    submits: u64,
    reads: u64,
    bytes_read: u64,
    /// Reads, and waits for all that was submitted, without the one that ends the measurement. What is read
    /// together counts each.
    waits: u64,
    /// Whether two steps in a row had these counts. Queries that draw their sites make each step another.
    settled: bool,
}

/// A kernel that runs in a step.
#[derive(Serialize)]
struct KernelRow {
    model: String,
    step: String,
    kernel: String,
}

impl Row {
    fn name(&self) -> String {
        format!("{}, {}", self.model, self.step)
    }
}

/// Steps that are taken at most until two are alike.
const MOST: usize = 12;

fn config_of(name: &str) -> Result<ViTConfig> {
    Ok(match name {
        "tiny" => {
            let config = ViTConfig::new().with_img_size(8).with_patch_size(4).with_embed_dim(8).with_depth(1);
            config.with_num_heads(2).with_mlp_ratio(2.0).with_num_classes(10)
        }
        "micro" => micro(6),
        "base" => ViTConfig::vit_base_patch16_224().with_depth(2).with_num_classes(10),
        _ => bail!("--models {name}: use tiny, micro or base"),
    })
}

/// The steps that are counted, by name.
fn cases(args: &Args) -> Vec<(&'static str, Case)> {
    let sized = |case: Case| Case { batch: args.batch, queries: args.queries, max_rows: args.max_rows, ..case };
    let full = |space: Space| Case::new(Scope::Full, space);
    let (gaussian, antithetic) = (NoiseLaw::Gaussian, Sampling::Antithetic);
    let shrunk = Case { sites: Sites::Branch, ..full(Space::activation()) };
    let all = [
        ("weights", Case { law: gaussian, sampling: antithetic, ..full(Space::weights()) }),
        ("activations, all sites", full(Space::activation())),
        ("activations, one site", full(Space::activation()).with_placement(Placement::Single)),
        ("low rank", full(Space::low_rank(1))),
        ("predicted, branches", shrunk.with_estimate(GradientEstimate::Shrunk, ControlVariate::Prediction)),
        ("cls_tail, one site", Case::new(Scope::ClsTail, Space::activation()).with_placement(Placement::Single)),
    ];
    all.map(|(name, case)| (name, sized(case))).into()
}

/// Passes of a step: the clean one, and those of the queries. Images share the noise of a pass on weights.
fn passes(case: &Case) -> usize {
    let of = |rows: usize| rows.div_ceil(case.max_rows);
    let queries = match case.space {
        Some(space) if !space.is_independent() => case.queries * of(case.batch),
        _ => of(case.rows()),
    };
    of(case.batch) + queries
}

/// Steps that choose kernels, and learn what is predicted.
const FIRST: usize = 3;

/// The counts of `work` once two in a row are alike, and whether they were. Where they never are, or sites
/// are `drawn` for its queries, they are those of the median step.
fn settled(drawn: bool, mut work: impl FnMut()) -> (Counts, bool) {
    let mut all: Vec<Counts> = vec![];
    while all.len() < MOST {
        let counts = counted(&mut work);
        if all.last() == Some(&counts) && !drawn {
            return (counts, true);
        }
        all.push(counts);
    }
    let later = &mut all[FIRST..];
    later.sort_by_key(|counts| counts.launches);
    (later[later.len() / 2], false)
}

/// Launches of one pass of plain inference and its losses.
fn inference(config: &ViTConfig, case: &Case) -> u64 {
    let (model, device) = (model(config, Scope::Full).valid(), Default::default());
    let batch = images(case.batch.min(case.max_rows), config.img_size);
    let pass = || {
        let logits = model.forward(batch.input.clone(), &mut Probe::clean());
        // registered, so that nothing of it is left out
        let losses = model.losses(logits, batch.target.clone());
        let _: Vec<TensorData> = Transaction::default().register(losses).execute();
        B::sync(&device).expect("the device answers");
    };
    settled(false, pass).0.launches
}

fn count(args: &Args) -> Result<(Vec<Row>, Vec<KernelRow>)> {
    let configs = args.models.iter().map(|name| Ok((name, config_of(name)?)));
    let configs = configs.collect::<Result<Vec<_>>>()?;
    let (steps, mut rows, mut kernels, mut progress) = (cases(args), vec![], vec![], Progress::default());
    for (model, config) in &configs {
        let of_a_pass = inference(config, &steps[0].1);
        kernels.extend(of_step(model, "inference"));
        for (name, case) in &steps {
            progress.at(rows.len(), configs.len() * steps.len(), || format!("steps, {model}, {name}"));
            let drawn = case.space.and_then(Space::placement) == Some(Placement::Single);
            let (counts, settled) = settled(drawn, case.stepper(config));
            kernels.extend(of_step(model, name));
            let passes = passes(case) as u64;
            rows.push(Row {
                model: model.to_string(),
                step: name.to_string(),
                passes,
                launches: counts.launches,
                inference: passes * of_a_pass,
                over_inference: counts.launches as f64 / (passes * of_a_pass).max(1) as f64,
                submits: counts.submits,
                reads: counts.reads,
                bytes_read: counts.bytes,
                waits: (counts.reads + counts.syncs).saturating_sub(1),
                settled,
            });
        }
    }
    Ok((rows, kernels))
}

/// The kernels of the last step, in order.
fn of_step(model: &str, step: &str) -> Vec<KernelRow> {
    let row = |kernel| KernelRow { model: model.into(), step: step.into(), kernel };
    take_kernels().into_iter().map(row).collect()
}

/// Compares counts with those of another run, which must have the same steps of the same models.
fn compare(rows: &[Row], before: &[Row]) -> Result<()> {
    let names = |rows: &[Row]| rows.iter().map(Row::name).collect::<Vec<_>>().join("; ");
    ensure!(names(rows) == names(before), "--against has the steps {}, not {}", names(before), names(rows));
    for (row, old) in rows.iter().zip(before) {
        // steps that differ have other kernels from run to run
        let most = if row.settled || old.settled { 1.05 } else { 1.15 };
        ensure!(old.passes == row.passes, "{}: {} passes, and {} before", row.name(), row.passes, old.passes);
        for (what, now, then) in
            [("launches", row.launches, old.launches), ("reads", row.reads, old.reads), ("waits", row.waits, old.waits)]
        {
            ensure!(now as f64 <= most * then as f64, "{}: {now} {what}, and {then} before", row.name());
        }
    }
    Ok(())
}

fn table(rows: &[impl Serialize]) -> Result<Vec<u8>> {
    let mut csv = csv::Writer::from_writer(vec![]);
    rows.iter().try_for_each(|row| csv.serialize(row))?;
    Ok(csv.into_inner()?)
}

fn run(args: Args) -> Result<()> {
    ensure!(
        args.batch > 0 && args.queries > 0 && args.queries.is_multiple_of(2) && args.max_rows > 1,
        "--batch {} --queries {} --max-rows {}: use at least 1, an even number and at least 2",
        args.batch,
        args.queries,
        args.max_rows
    );
    ensure!(!cfg!(feature = "cuda"), "the feature cuda chooses another device; build with wgpu alone");
    let before: Option<Vec<Row>> = match &args.against {
        Some(path) => {
            let text = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
            Some(serde_json::from_slice(&text).with_context(|| format!("{} has no counts", path.display()))?)
        }
        None => None,
    };
    let folder = Folder::open(&args.artifact_dir)?;
    install()?;
    let (rows, kernels) = count(&args)?;
    let cells = rows.iter().map(|row| {
        let over = format!("{:.2} ×", row.over_inference);
        let launches = if row.settled { row.launches.to_string() } else { format!("{} (varies)", row.launches) };
        let counts = [row.passes, row.inference, row.submits, row.reads, row.bytes_read, row.waits];
        let [passes, inference, submits, reads, bytes, waits] = counts.map(|count| count.to_string());
        vec![row.name(), passes, launches, inference, over, submits, reads, bytes, waits]
    });
    let header = ["step", "passes", "launches", "inference", "over it", "submissions", "reads", "bytes read", "waits"];
    print_table(&header, &cells.collect::<Vec<_>>());
    folder.write("launches.csv", &table(&rows)?)?;
    folder.write("kernels.csv", &table(&kernels)?)?;
    folder.write("summary.json", &serde_json::to_vec_pretty(&rows)?)?;
    println!("\n{folder} holds launches.csv, kernels.csv and summary.json");
    before.map_or(Ok(()), |before| compare(&rows, &before))
}

fn main() -> ExitCode {
    flops_report::program::run(run)
}
