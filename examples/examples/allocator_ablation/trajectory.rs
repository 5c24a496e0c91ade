//! The errors of all contenders along uniform's trajectory.

use anyhow::{Context, Result};
use burn::optim::GradientsParams;
use flops_core::allocator::AllocatorKind;
use flops_core::{ForwardConfig, QueryBudget, StepReport, VarianceSource};
use flops_examples::backend::B;
use flops_examples::experiment::{
    Learner, Optim, OracleAllocator, Progress, Run, Testbed, estimate, observe, squared_distance,
};
use flops_vit::data::ImageBatch;
use serde::Serialize;

use crate::args::{Args, Contender, contenders};

/// The name of the contender that is told the variances.
pub const ORACLE: &str = "neyman, variances known";
/// Queries per datum that show the variances.
const ASSAY: usize = 96;
/// Keeps the seeds of the contenders apart.
const SALT: u64 = 1 << 32;

/// A row of `trajectory.csv`.
#[derive(Clone, Serialize)]
pub struct Look {
    pub seed: u64,
    pub step: usize,
    pub contender: String,
    /// ‖ĝ − g‖², with g by autodiff.
    pub squared_error: f64,
    /// Its expectation Σ_j v_j/A_j/B² by the assay's variances. Empty for pilots, whose expectation
    /// is another.
    pub expected: Option<f64>,
    /// ‖g‖².
    pub squared_norm: f64,
}

/// The exact gradient on a batch, and the variances that the assay shows.
struct Truth {
    gradient: GradientsParams,
    variances: Vec<f64>,
    squared_batch_size: f64,
}

impl Truth {
    /// Returns the variance of a step's estimate by the assay's variances.
    fn expected_error(&self, report: &StepReport) -> f64 {
        let sum: f64 = self.variances.iter().zip(&report.data).map(|(v, datum)| v / datum.queries as f64).sum();
        sum / self.squared_batch_size
    }
}

/// The learners of one seed. All hold the parameters of the leader.
struct Contest {
    seed: u64,
    /// The run that moves θ.
    leader: Run,
    contenders: Vec<(Contender, Learner)>,
    oracle: Learner<OracleAllocator>,
    /// Shows the variances. Its control variate learns only when it is asked.
    assay: Learner,
}

impl Contest {
    fn new(args: &Args, testbed: &Testbed, seed: u64) -> Result<Self> {
        let running = VarianceSource::Running;
        let config = |estimate, salt: u64| args.config(seed + salt * SALT, estimate);
        let learner = |kind, config: ForwardConfig| testbed.learner(testbed.model(seed), config, kind);
        let leader = learner(AllocatorKind::Uniform, config(running, 0)?)?;
        let leader = Run::new(leader, Optim::adam(), args.lr, args.steps()).with_schedule(args.schedule);
        let mut list = vec![];
        for (i, contender) in contenders(args)?.into_iter().enumerate() {
            let learner = learner(contender.kind, config(contender.estimate, 1 + i as u64)?)?;
            list.push((contender, learner));
        }
        let oracle = testbed.oracle_learner(testbed.model(seed), config(running, 100)?)?;
        let budget = QueryBudget::new(ASSAY, 1)?;
        let assay = learner(AllocatorKind::Uniform, ForwardConfig { budget, ..config(running, 101)? })?;
        Ok(Self { seed, leader, contenders: list, oracle, assay })
    }

    /// Computes the exact gradient, and measures the variances.
    fn look(mut self, testbed: &Testbed, batch: &ImageBatch<B>) -> Result<(Self, Truth)> {
        let model = self.leader.learner.model.clone();
        let gradient = testbed.true_gradient(&model, batch);
        self.assay.model = model;
        let (grads, report) = estimate(&self.assay, batch.clone())?;
        self.assay = observe(self.assay, grads);
        let variances = report.data.iter().map(|d| d.second_moment).collect();
        Ok((self, Truth { gradient, variances, squared_batch_size: (batch.ids.len() as f64).powi(2) }))
    }

    /// Lets every contender estimate the gradient, records its error if the truth is known, and
    /// moves θ.
    fn step(mut self, step: usize, batch: ImageBatch<B>, truth: Option<&Truth>, looks: &mut Vec<Look>) -> Result<Self> {
        let (seed, model) = (self.seed, self.leader.learner.model.clone());
        let mut record = |name: &str, grads: &GradientsParams, report: &StepReport, pilots: bool| {
            let Some(truth) = truth else { return };
            let (squared_error, squared_norm) = squared_distance(&model, grads, &truth.gradient);
            let expected = (!pilots).then(|| truth.expected_error(report));
            looks.push(Look { seed, step, contender: name.into(), squared_error, expected, squared_norm });
        };
        let mut observed = vec![];
        for (contender, mut learner) in self.contenders {
            learner.model = model.clone();
            let (grads, report) = estimate(&learner, batch.clone())?;
            record(&contender.name, &grads, &report, matches!(contender.estimate, VarianceSource::Pilot(_)));
            observed.push((contender, observe(learner, grads)));
        }
        self.contenders = observed;
        self.oracle.model = model.clone();
        if let Some(truth) = truth {
            self.oracle.allocator.tell(truth.variances.clone());
        }
        let (grads, report) = estimate(&self.oracle, batch.clone())?;
        record(ORACLE, &grads, &report, false);
        self.oracle = observe(self.oracle, grads);
        (self.leader, _) = self.leader.step(batch)?;
        Ok(self)
    }
}

/// Follows uniform's trajectory and records the errors of all contenders at every `--every` steps.
pub fn follow(args: &Args, testbed: &Testbed, seed: u64, looks: &mut Vec<Look>, progress: &mut Progress) -> Result<()> {
    let mut contest = Contest::new(args, testbed, seed)?;
    let mut batches = testbed.batches(args.batch_size, seed)?;
    for step in 0..args.steps() {
        progress.at(step, args.steps(), || format!("seed {seed}, along uniform's trajectory"));
        let batch = batches.next().context("there are no images")?;
        let mut truth = None;
        if step % args.every == 0 {
            let looked;
            (contest, looked) = contest.look(testbed, &batch)?;
            truth = Some(looked);
        }
        contest = contest.step(step, batch, truth.as_ref(), looks)?;
    }
    Ok(())
}
