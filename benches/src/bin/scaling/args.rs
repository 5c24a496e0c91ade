//! The command line.

use std::path::PathBuf;

use anyhow::{Result, bail, ensure};
use clap::Parser;
use flops_distributed::SumMode;
use flops_vit::Scope;

use crate::task::{Engine, Noise};

/// Measures what several workers gain over one process, and models what more of them would.
#[derive(Clone, Debug, Parser)]
pub struct Args {
    /// Folder for scaling.csv, model.csv, summary.json and scaling.svg
    #[arg(long, default_value = "artifacts/scaling")]
    pub artifact_dir: PathBuf,
    /// Numbers of workers, of one thread each
    #[arg(long, value_delimiter = ',', default_values_t = [1, 2])]
    pub workers: Vec<usize>,
    /// What connects the workers: hub, nats, mpi [default: all that this program was built with]
    #[arg(long, value_delimiter = ',')]
    pub engines: Vec<Engine>,
    /// Scopes: cls_tail, full, …
    #[arg(long, value_delimiter = ',', default_value = "cls_tail,full")]
    pub scopes: Vec<Scope>,
    /// What the noise falls on: weights, activations
    #[arg(long, value_delimiter = ',', default_value = "weights,activations")]
    pub noise: Vec<Noise>,
    /// How workers come by sums: scalars, gradients, auto
    #[arg(long, value_delimiter = ',', default_value = "scalars,gradients")]
    pub sums: Vec<SumMode>,
    /// Images in a step
    #[arg(long, default_value_t = 64)]
    pub batch: usize,
    /// Queries per image
    #[arg(long, default_value_t = 20)]
    pub queries: usize,
    /// Leaves that a batch is cut into, a power of two
    #[arg(long, default_value_t = 8)]
    pub leaves: usize,
    /// Keep the frozen prefixes of the images from step to step
    #[arg(long)]
    pub kept: bool,
    /// How often each is measured
    #[arg(long, default_value_t = 7)]
    pub rounds: usize,
    /// Seconds that one measurement of the single process takes at least
    #[arg(long, default_value_t = 1.0)]
    pub seconds: f64,
    /// Processes that take the same steps beside the single one, each for itself: 1 for a machine
    /// of two cores that does other work, which would slow a process on one core alone otherwise
    #[arg(long, default_value_t = 0)]
    pub beside: usize,
    /// Bandwidth of the modelled network in Gb/s, where the measured one is not less
    #[arg(long, default_value_t = 10.0)]
    pub gigabits: f64,
    /// Latency of a hop of the modelled network in µs, added to what was measured
    #[arg(long, default_value_t = 50.0)]
    pub hop: f64,
}

impl Args {
    /// Checks the flags.
    ///
    /// # Errors
    /// If a value cannot be used; the text names it.
    pub fn check(&self) -> Result<()> {
        ensure!(self.rounds > 0, "--rounds 0: use at least 1");
        ensure!(self.batch > 0 && self.queries > 0, "--batch and --queries must be at least 1");
        let leaves = self.leaves;
        ensure!(leaves.is_power_of_two() && leaves <= 1024, "--leaves {leaves}: use a power of two up to 1024");
        if let Some(workers) = self.workers.iter().find(|workers| **workers == 0 || **workers > leaves) {
            bail!("--workers {workers}: use 1 to {leaves}, the leaves");
        }
        let lists = [self.workers.len(), self.scopes.len(), self.noise.len(), self.sums.len()];
        ensure!(!lists.contains(&0), "--workers, --scopes, --noise and --sums must name at least one");
        for (flag, value) in [("seconds", self.seconds), ("gigabits", self.gigabits)] {
            ensure!(value.is_finite() && value > 0.0, "--{flag} {value}: use a number above 0");
        }
        ensure!(self.hop.is_finite() && self.hop >= 0.0, "--hop {}: use 0 or more", self.hop);
        self.engines.iter().try_for_each(|engine| engine.check())
    }

    /// The engines that are measured.
    pub fn engines(&self) -> Vec<Engine> {
        match self.engines.is_empty() {
            true => Engine::ALL.into_iter().filter(|engine| engine.check().is_ok()).collect(),
            false => self.engines.clone(),
        }
    }
}
