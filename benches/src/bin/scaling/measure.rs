//! Steps on several workers, in turn with the same steps on one process.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use flops_benches::spread;
use flops_distributed::SumMode;
use flops_report::Progress;
use serde::Serialize;

use crate::args::Args;
use crate::group::Group;
use crate::profile::{Phases, Seconds};
use crate::task::{Engine, Steps};
use crate::worker::Reply;

/// Steps that are not measured: what is made on first use, and a prediction that learns.
const FIRST: usize = 4;

/// Workers that are measured.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Setup {
    engine: Engine,
    workers: usize,
    sums: SumMode,
    leaves: usize,
}

/// What was measured of some workers. All but the times of whole steps is a mean over the steps and
/// the workers.
#[derive(Clone, Debug, Serialize)]
pub struct Figures {
    /// The steps.
    pub steps: Steps,
    /// What connects the workers.
    pub engine: Engine,
    /// Their number.
    pub workers: usize,
    /// How they come by sums.
    pub sums: SumMode,
    /// Values that are trained.
    pub trained: usize,
    /// Milliseconds of a step on the slowest worker: median, least, most.
    pub milliseconds: [f64; 3],
    /// How many times as fast as the single process with as many leaves, measured before and after:
    /// median, least, most.
    pub speedup: [f64; 3],
    /// Milliseconds of a processor that the busiest worker needs for a step, without MPI's waiting;
    /// other work of the machine changes them less than times. Nothing where the system does not
    /// tell.
    pub busy: Option<f64>,
    /// Bytes that a worker sends and receives in a step.
    pub bytes: (f64, f64),
    /// Milliseconds of a step that a worker spends in exchanges, and not in its jobs.
    pub waited: f64,
    /// Milliseconds of a step in what every worker does for itself: allocation, report, optimizer.
    pub rest: f64,
    /// Milliseconds of each phase of a step.
    pub phases: Phases,
    /// Whether the weights were those of the single process, bit for bit, on all workers and each
    /// time they were compared; nothing where the leaves differ.
    pub same_bits: Option<bool>,
}

/// What several runs of some workers gave.
#[derive(Default)]
struct Runs {
    milliseconds: Vec<f64>,
    busy: Vec<f64>,
    speedup: Vec<f64>,
    replies: Vec<Reply>,
    same: Option<bool>,
}

impl Runs {
    /// Adds what workers said of some steps.
    fn add(&mut self, replies: Vec<Reply>, steps: usize) {
        let each = 1e3 / steps as f64;
        self.milliseconds.push(each * slowest(&replies));
        let busy: Option<Vec<f64>> = replies.iter().map(|reply| reply.busy).collect();
        self.busy.extend(busy.map(|busy| each * busy.into_iter().fold(0.0, f64::max)));
        self.replies.extend(replies);
    }
}

/// The single process, and the weights that it had after each number of steps.
struct Reference {
    group: Group,
    /// Others that take the same steps beside it.
    beside: Vec<Group>,
    weights: BTreeMap<u64, u64>,
    runs: Runs,
}

impl Reference {
    /// Takes steps; returns the seconds of one.
    fn run(&mut self, steps: usize) -> Result<f64> {
        self.beside.iter_mut().try_for_each(|group| group.begin(steps))?;
        let replies = self.group.run(steps)?;
        self.beside.iter_mut().try_for_each(|group| group.replies().map(drop))?;
        self.weights.extend(replies.iter().map(|reply| (reply.taken, reply.hash)));
        let seconds = slowest(&replies) / steps as f64;
        self.runs.speedup.push(1.0);
        self.runs.add(replies, steps);
        Ok(seconds)
    }

    /// Whether workers have the weights that this process had after as many steps.
    fn agrees(&self, replies: &[Reply]) -> bool {
        replies.iter().all(|reply| self.weights.get(&reply.taken) == Some(&reply.hash))
    }
}

fn slowest(replies: &[Reply]) -> f64 {
    replies.iter().map(|reply| reply.seconds).fold(0.0, f64::max)
}

/// The workers to measure beside the single process.
fn setups(args: &Args, engines: &[Engine]) -> Vec<Setup> {
    let single = Setup { engine: Engine::Single, workers: 1, sums: SumMode::Auto, leaves: 1 };
    let mut all = if args.leaves > 1 { vec![single] } else { vec![] };
    for &engine in engines {
        for &workers in &args.workers {
            // one worker exchanges no sums
            let sums = if workers == 1 { &args.sums[..1] } else { &args.sums[..] };
            all.extend(sums.iter().map(|&sums| Setup { engine, workers, sums, leaves: args.leaves }));
        }
    }
    all
}

/// Measures steps with all engines; the single process comes first.
///
/// # Errors
/// If workers cannot be started, or fail.
pub fn measure(
    args: &Args,
    steps: &Steps,
    (engines, server): (&[Engine], &str),
    progress: &mut Progress,
) -> Result<Vec<Figures>> {
    let start = |setup: &Setup| {
        let steps = Steps { leaves: setup.leaves, ..steps.clone() };
        Group::start(&steps, setup.engine, setup.workers, setup.sums, server)
    };
    let single = Setup { engine: Engine::Single, workers: 1, sums: SumMode::Auto, leaves: args.leaves };
    let beside = (0..args.beside).map(|_| start(&single)).collect::<Result<_>>()?;
    let mut reference = Reference { group: start(&single)?, beside, weights: BTreeMap::new(), runs: Runs::default() };
    let what = format!("{} {}", steps.scope, steps.noise);
    let first = reference.run(FIRST)?;
    let setups = setups(args, engines);
    let mut groups = setups.iter().map(start).collect::<Result<Vec<_>>>()?;
    let mut all: Vec<Runs> = setups.iter().map(|_| Runs::default()).collect();
    for (setup, (group, runs)) in setups.iter().zip(groups.iter_mut().zip(&mut all)) {
        progress.at(0, args.rounds, || format!("{what}, first steps over {}", setup.engine));
        let replies = group.run(FIRST)?;
        runs.same = (setup.leaves == args.leaves).then(|| reference.agrees(&replies));
    }
    // the last of the first steps is like the later ones
    let each = ((args.seconds / first).ceil() as usize).clamp(1, 1000);
    reference.runs = Runs::default();
    let mut before = reference.run(each)?;
    for round in 0..args.rounds {
        for (setup, (group, runs)) in setups.iter().zip(groups.iter_mut().zip(&mut all)) {
            progress.at(round, args.rounds, || format!("{what}, {} workers over {}", setup.workers, setup.engine));
            let replies = group.run(each)?;
            let after = reference.run(each)?;
            let seconds = slowest(&replies) / each as f64;
            // the machine's other work changes: the reference is the mean of before and after
            runs.speedup.push(0.5 * (before + after) / seconds);
            before = after;
            runs.same = runs.same.map(|same| same && reference.agrees(&replies));
            runs.add(replies, each);
        }
    }
    let mut found = vec![figures(steps, &single, &reference.runs, (each, reference.group.trained))];
    for (setup, (group, runs)) in setups.iter().zip(groups.iter().zip(&all)) {
        let steps = Steps { leaves: setup.leaves, ..steps.clone() };
        found.push(figures(&steps, setup, runs, (each, group.trained)));
    }
    ensure!(found.iter().all(|figures| figures.same_bits != Some(false)), "workers had other weights: {found:#?}");
    Ok(found)
}

fn figures(steps: &Steps, setup: &Setup, runs: &Runs, (each, trained): (usize, usize)) -> Figures {
    let count = (runs.replies.len() * each) as f64;
    let mut phases = Phases::new();
    for (name, seconds) in runs.replies.iter().flat_map(|reply| &reply.phases) {
        phases.entry(name.clone()).or_default().add(seconds, 1e3 / count);
    }
    let mean = |value: &dyn Fn(&Reply) -> f64| runs.replies.iter().map(value).sum::<f64>() / count;
    Figures {
        steps: steps.clone(),
        engine: setup.engine,
        workers: setup.workers,
        sums: setup.sums,
        trained,
        milliseconds: spread(&runs.milliseconds),
        speedup: spread(&runs.speedup),
        busy: (!runs.busy.is_empty()).then(|| spread(&runs.busy)[0]),
        bytes: (mean(&|reply| reply.bytes.0 as f64), mean(&|reply| reply.bytes.1 as f64)),
        waited: phases.values().map(Seconds::waited).sum(),
        rest: 1e3 * mean(&|reply| reply.seconds) - phases.values().map(|phase| phase.all).sum::<f64>(),
        phases,
        same_bits: runs.same,
    }
}
