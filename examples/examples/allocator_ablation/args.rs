//! The command line, and the contenders that it names.

use anyhow::{Result, ensure};
use clap::Parser;
use flops_core::allocator::AllocatorKind;
use flops_core::{ControlVariate, ForwardConfig, QueryBudget, Space, VarianceSource};
use flops_examples::experiment::{ExperimentArgs, Schedule, TestbedArgs};

/// Compare allocators and variance estimates at equal budget.
#[derive(Parser, Debug)]
#[command(name = "allocator_ablation", version)]
pub struct Args {
    #[command(flatten)]
    pub experiment: ExperimentArgs,
    #[command(flatten)]
    pub testbed: TestbedArgs,
    /// Queries per datum.
    #[arg(long, default_value_t = 20)]
    pub queries: usize,
    /// Images in a batch.
    #[arg(long, default_value_t = 64)]
    pub batch_size: usize,
    /// Steps of each run [default: 300, with --full 1,500].
    #[arg(long)]
    steps: Option<usize>,
    /// Steps from one measurement of the gradient's error to the next.
    #[arg(long, default_value_t = 5)]
    pub every: usize,
    /// Learning rate of AdamW.
    #[arg(long, default_value_t = 5e-3)]
    pub lr: f64,
    /// Allocators to compare with uniform, each with every variance estimate.
    #[arg(long, value_delimiter = ',', default_values_t = ["neyman", "gaussian", "bernoulli"].map(String::from))]
    contenders: Vec<String>,
    /// Variance estimates to compare: running, loss, pilot:N [default: all, with a quarter of the
    /// queries as pilots].
    #[arg(long, value_delimiter = ',')]
    estimates: Vec<VarianceSource>,
    /// The learning rate's schedule. A falling rate hides the gradient's variance in the final
    /// loss.
    #[arg(long, value_enum, default_value = "constant")]
    pub schedule: Schedule,
    /// The control variate besides the clean loss: none or prediction [default: the library's].
    #[arg(long)]
    control_variate: Option<ControlVariate>,
    /// Leave the training runs out.
    #[arg(long)]
    pub trajectory_only: bool,
    /// Leave the trajectory out.
    #[arg(long)]
    pub training_only: bool,
}

impl Args {
    /// Checks the flags, those of every contender included.
    pub fn check(&self) -> Result<()> {
        ensure!(self.every > 0, "--every 0: use at least 1");
        ensure!(self.lr > 0.0 && self.lr <= 1.0, "--lr {}: use a number above 0 and at most 1", self.lr);
        ensure!(self.steps() > 0, "--steps 0: use at least 1");
        self.experiment.seeds()?;
        contenders(self)?.iter().try_for_each(|c| Ok(self.config(0, c.estimate)?.validate()?))
    }

    /// Returns the steps of each run.
    pub fn steps(&self) -> usize {
        self.steps.unwrap_or(if self.experiment.full { 1500 } else { 300 })
    }

    /// Returns the configuration of a learner.
    pub fn config(&self, seed: u64, estimate: VarianceSource) -> Result<ForwardConfig> {
        let config = ForwardConfig::new(QueryBudget::new(self.queries, 1)?).with_seed(seed).with_variance(estimate);
        Ok(match self.control_variate {
            Some(control_variate) => config.with_space(Space::activation().with_control_variate(control_variate)?),
            None => config,
        })
    }
}

/// An allocator with its variance estimate.
pub struct Contender {
    pub name: String,
    pub kind: AllocatorKind,
    pub estimate: VarianceSource,
}

/// Returns the contenders, uniform first.
pub fn contenders(args: &Args) -> Result<Vec<Contender>> {
    let mut estimates = args.estimates.clone();
    if estimates.is_empty() {
        estimates = vec![VarianceSource::Running, VarianceSource::Loss];
        if args.queries > 3 {
            estimates.push(VarianceSource::Pilot(args.queries / 4));
        }
    }
    let uniform = AllocatorKind::Uniform;
    let mut list = vec![Contender { name: "uniform".into(), kind: uniform, estimate: VarianceSource::Running }];
    for estimate in estimates {
        for name in &args.contenders {
            let kind: AllocatorKind = name.parse()?;
            if kind != uniform {
                list.push(Contender { name: format!("{name}, {estimate}"), kind, estimate });
            }
        }
    }
    Ok(list)
}
