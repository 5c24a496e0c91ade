//! Rates of a few cases, measured in turn with plain inference and with PyTorch.

use anyhow::Result;
use flops_benches::{Case, THREADS};
use flops_core::{ControlVariate, GradientEstimate, NoiseLaw, Placement, Sampling, Space};
use flops_report::Progress;
use flops_vit::{Scope, Sites, ViTConfig};

use crate::args::Args;
use crate::measure::{InferenceRun, first_uses, timed};
use crate::peer::Peer;
use crate::report::{Row, Table};

/// Returns the cases whose rates are compared, with their names.
///
/// In full scope these are antithetic normal noise on all weights, signs on all activations, and
/// signs on one activation. The last of these is measured without a prediction as well, at
/// linear sites and at branches, and shrunk at branches. Smaller scopes and backpropagation follow.
pub fn cases(args: &Args) -> Vec<(&'static str, Case)> {
    let of = |scope, space| Case {
        batch: args.batch,
        queries: args.queries,
        max_rows: args.max_rows,
        ..Case::new(scope, space)
    };
    let full = of(Scope::Full, Space::activation());
    let branch = Case { sites: Sites::Branch, ..full };
    let weights = of(Scope::Full, Space::weights());
    let (unbiased, none) = (GradientEstimate::Unbiased, ControlVariate::None);
    vec![
        ("weights", Case { law: NoiseLaw::Gaussian, sampling: Sampling::Antithetic, ..weights }),
        ("activation", full),
        ("single", full.with_placement(Placement::Single)),
        ("single_unpredicted", full.with_estimate(unbiased, none)),
        ("branch_unpredicted", branch.with_estimate(unbiased, none)),
        ("branch_shrunk", branch.with_estimate(GradientEstimate::Shrunk, ControlVariate::Prediction)),
        ("last3", of(Scope::Last(3), Space::activation())),
        ("cls_tail", of(Scope::ClsTail, Space::activation())),
        ("cls_tail_kept", Case { kept: true, ..of(Scope::ClsTail, Space::activation()) }),
        ("backprop", Case::backprop(Scope::Full, args.batch)),
    ]
    .into_iter()
    .filter(|(name, _)| args.only.is_empty() || args.only.iter().any(|only| only == name))
    .collect()
}

/// A case that is measured, with what was found: its seconds, and those of plain inference.
struct Measured {
    name: &'static str,
    case: Case,
    step: Box<dyn FnMut()>,
    found: Vec<(f64, f64)>,
}

/// A task of PyTorch, with the seconds that it took.
struct TorchTask {
    name: &'static str,
    task: String,
    rows: usize,
    seconds: Vec<f64>,
}

/// PyTorch's process and its tasks.
struct Torch {
    peer: Peer,
    tasks: Vec<TorchTask>,
}

impl Torch {
    /// Starts PyTorch with the tasks that `cases` are compared with. Without PyTorch, prints why it
    /// is left out.
    fn start(args: &Args, cases: &[Measured]) -> Option<Self> {
        let rows = args.batch * args.queries;
        // PyTorch's weight noise comes in pairs.
        let paired = args.queries.next_multiple_of(2);
        let tasks = [
            ("inference", format!("inference {rows}"), rows),
            ("weights", format!("weights {paired}"), args.batch * paired),
            ("activation", format!("activation {}", args.queries), rows),
            ("backprop", "backprop".into(), args.batch),
        ]
        .into_iter()
        .filter(|(name, ..)| *name == "inference" || cases.iter().any(|case| case.name == *name))
        .map(|(name, task, rows)| TorchTask { name, task, rows, seconds: vec![] })
        .collect();
        let peer = Peer::start(&args.python, &peer_arguments(args));
        peer.map(|peer| Self { peer, tasks }).map_err(|why| println!("without PyTorch: {why:#}")).ok()
    }

    /// Does every task once without measuring it. If one fails, prints why PyTorch is left out.
    fn warm_up(mut self) -> Option<Self> {
        let done = self.tasks.iter().try_for_each(|task| self.peer.seconds(&task.task).map(drop));
        done.map(|()| self).map_err(|why| println!("without PyTorch: {why:#}")).ok()
    }

    fn measure(&mut self) -> Result<()> {
        for task in &mut self.tasks {
            task.seconds.push(self.peer.seconds(&task.task)?);
        }
        Ok(())
    }
}

/// Returns the arguments of PyTorch's process.
fn peer_arguments(args: &Args) -> Vec<String> {
    let (batch, rows, threads) = (args.batch.to_string(), args.torch_rows().to_string(), THREADS.to_string());
    let device = args.torch_device.as_deref().unwrap_or("cpu");
    let words = ["--model", &args.model, "--dtype", &args.torch_dtype, "--device", device];
    let numbers = ["--batch", &batch, "--max-rows", &rows, "--threads", &threads];
    words.iter().chain(&numbers).map(|word| word.to_string()).collect()
}

/// Prints how far the rates have come. Round 0 is the first use of everything.
fn tell(progress: &mut Progress, names: &[&str], rounds: usize, round: usize, task: usize) {
    let what = || format!("rates, {}{}", if round == 0 { "first use of " } else { "" }, names[task]);
    progress.at(round * names.len() + task, (rounds + 1) * names.len(), what);
}

/// Measures the rates of the cases and adds them to the table.
///
/// # Errors
/// If PyTorch's process fails after its first use.
pub fn measure(args: &Args, config: &ViTConfig, table: &mut Table, progress: &mut Progress) -> Result<()> {
    let rows = args.batch * args.queries;
    let wide = args.inference_rows();
    let plain = InferenceRun::new(config, args.batch.max(THREADS * wide), wide);
    let measured = |(name, case): (_, Case)| Measured { name, case, step: case.stepper(config), found: vec![] };
    let mut measured: Vec<Measured> = cases(args).into_iter().map(measured).collect();
    let torch = Torch::start(args, &measured);
    let names: Vec<&str> = std::iter::once("inference").chain(measured.iter().map(|m| m.name)).collect();
    let mut tell = |round, task| tell(progress, &names, args.rounds, round, task);

    // What is made on first use is not measured.
    tell(0, 0);
    plain.run(rows);
    for (i, measured) in measured.iter_mut().enumerate() {
        tell(0, i + 1);
        (0..first_uses(&measured.case)).for_each(|_| (measured.step)());
    }
    let mut torch = torch.and_then(Torch::warm_up);
    table.torch = torch.as_ref().map(|torch| torch.peer.version.clone());

    let mut references = vec![];
    for round in 1..=args.rounds {
        tell(round, 0);
        let mut reference = timed(|| plain.run(rows));
        references.push(reference);
        for (i, Measured { case, step, found, .. }) in measured.iter_mut().enumerate() {
            tell(round, i + 1);
            let before = reference;
            let took = timed(step);
            // The reference is the mean of inference before and after, because the machine's other
            // work changes.
            reference = timed(|| plain.run(rows));
            references.push(reference);
            found.push((took, 0.5 * (before + reference) * case.rows() as f64 / rows as f64));
        }
        if let Some(torch) = &mut torch {
            torch.measure()?;
        }
    }
    table.rows.push(Row::plain("rates", "inference", rows, &references));
    for Measured { name, case, found, .. } in &measured {
        table.rows.push(Row::step("rates", name, case, config.depth, found));
    }
    for TorchTask { name, rows, seconds, .. } in torch.iter().flat_map(|torch| &torch.tasks) {
        table.rows.push(Row::plain("rates", &format!("torch {name}"), *rows, seconds));
    }
    Ok(())
}
