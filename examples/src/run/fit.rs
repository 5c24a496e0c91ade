//! The training loop around a learner: burn-train's, with checkpoints that are safe, a renderer and
//! metrics.

use std::io::IsTerminal;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail, ensure};
use burn::backend::Flex;
use burn::data::dataloader::DataLoader;
use burn::lr_scheduler::LrScheduler;
use burn::lr_scheduler::cosine::{CosineAnnealingLrScheduler, CosineAnnealingLrSchedulerConfig};
use burn::module::{AutodiffModule, Module};
use burn::optim::Optimizer;
use burn::record::{Record, Recorder};
use burn::train::checkpoint::KeepLastNCheckpoints;
use burn::train::logger::InMemoryMetricLogger;
use burn::train::metric::{AccuracyMetric, LossMetric};
use burn::train::{
    ExecutionStrategy, InferenceStep, Interrupter, ItemLazy, Learner, LearningComponentsTypes, SupervisedTraining,
    TrainStep,
};
use flops_core::StepOutput;
use flops_core::train::Advice;
use flops_core::train::Monitor;
use flops_core::train::param_groups::GroupedOptimizer;
use flops_core::train::recorder::AtomicRecorder;
use flops_core::train::{
    CvMetric, DroppedMetric, FloorMetric, MaxQueriesMetric, MinQueriesMetric, QueriesMetric, RelativeVarianceMetric,
};

use super::artifacts::Artifacts;
use super::history::{self, History};
use super::optimizer::{OptimizerKind, adamw, muon};
use super::plan::RunPlan;
use super::renderer::{RunRenderer, SharedHistory};
use crate::backend::{AB, B};

/// A trained learner and the record of its run.
pub struct TrainedRun<M> {
    /// The learner, on the backend without automatic differentiation.
    pub learner: M,
    /// What was measured.
    pub history: History,
    /// Why training stopped before its last epoch, if the user stopped it.
    pub stopped: Option<String>,
    /// What the diagnostics advise.
    pub advice: Vec<Advice>,
}

impl<M> TrainedRun<M> {
    /// Replaces the learner, for instance by its model.
    #[must_use]
    pub fn map<N>(self, map: impl FnOnce(M) -> N) -> TrainedRun<N> {
        let Self { learner, history, stopped, advice } = self;
        TrainedRun { learner: map(learner), history, stopped, advice }
    }
}

/// burn-train's message when its terminal interface is told to stop.
const STOPPED_BY_USER: &str = "Stopping training from user input.";

/// Trains `learner` with a cosine schedule, whether it is forward-only or backpropagates.
///
/// After each epoch a checkpoint and `metrics.csv` are written. The last two checkpoints are kept.
///
/// # Errors
/// Where the learner fails, a loss is not finite, a checkpoint cannot be written, or the one to
/// resume from is of another model.
pub fn fit<L>(
    learner: L,
    train: Arc<dyn DataLoader<AB, L::Input>>,
    test: Arc<dyn DataLoader<B, <L::InnerModule as InferenceStep>::Input>>,
    history: History,
    plan: RunPlan<'_>,
) -> Result<TrainedRun<L::InnerModule>>
where
    L: TrainStep + AutodiffModule<AB> + std::fmt::Display + 'static,
    L::InnerModule: InferenceStep,
    L::Output: ItemLazy<ItemSync = StepOutput<Flex>>,
    <L::InnerModule as InferenceStep>::Output: ItemLazy<ItemSync = StepOutput<Flex>>,
{
    let (decay, beta_2) = (plan.weight_decay, plan.beta_2);
    match plan.optimizer {
        OptimizerKind::AdamW => fit_with(learner, adamw(decay, beta_2), train, test, history, plan),
        OptimizerKind::Muon => fit_with(learner, muon(decay, beta_2), train, test, history, plan),
    }
}

/// [`fit`] with an optimizer.
fn fit_with<L, O>(
    learner: L,
    optimizer: O,
    train: Arc<dyn DataLoader<AB, L::Input>>,
    test: Arc<dyn DataLoader<B, <L::InnerModule as InferenceStep>::Input>>,
    history: History,
    plan: RunPlan<'_>,
) -> Result<TrainedRun<L::InnerModule>>
where
    L: TrainStep + AutodiffModule<AB> + std::fmt::Display + 'static,
    L::InnerModule: InferenceStep,
    L::Output: ItemLazy<ItemSync = StepOutput<Flex>>,
    <L::InnerModule as InferenceStep>::Output: ItemLazy<ItemSync = StepOutput<Flex>>,
    O: Optimizer<L, AB> + 'static,
{
    plan.groups.iter().try_for_each(|group| group.check(&learner))?;
    let optimizer = GroupedOptimizer::new(optimizer, plan.groups.clone());
    let schedule = CosineAnnealingLrSchedulerConfig::new(plan.lr, plan.steps).init();
    let schedule = schedule.map_err(|e| anyhow!("--lr {}: {e}", plan.lr))?;
    if let Some(epoch) = plan.resume {
        check_checkpoint::<L, O>(epoch, &plan)?;
    }

    let recorder = AtomicRecorder::default();
    let barrier = recorder.barrier();
    let mut training = SupervisedTraining::new(plan.artifacts.dir(), barrier.gate(train), test)
        .metrics((LossMetric::<Flex>::new(), AccuracyMetric::<Flex>::new()))
        .num_epochs(plan.last_epoch)
        .with_file_checkpointer(recorder)
        .with_checkpointing_strategy(barrier.track(KeepLastNCheckpoints::new(2)))
        .with_metric_logger(InMemoryMetricLogger::new())
        .with_application_logger(None)
        .with_training_strategy(ExecutionStrategy::single(plan.device.clone()).into());
    let interrupter = training.interrupter();
    if let Some(monitor) = &plan.monitor {
        monitor.stop_with(interrupter.clone());
        training = with_query_metrics(training);
    }
    if let Some(epoch) = plan.resume {
        training = training.checkpoint(epoch);
    }
    let history = SharedHistory::new(history);
    let renderer = RunRenderer::new(history.clone(), &plan, interrupter.clone());
    let result = training.renderer(renderer).launch(Learner::new(learner, optimizer, schedule));
    // closes the terminal interface
    drop(result.renderer);

    let stopped = stop_reason(&interrupter, &plan)?;
    let history = history.lock().clone();
    if history.rows.iter().any(|row| !row.loss.is_finite()) {
        bail!("training diverged: a loss is not finite; lower --lr, or check the images");
    }
    let advice = plan.monitor.as_ref().map_or(vec![], Monitor::advice);
    if !plan.plain && std::io::stdout().is_terminal() {
        // with plain lines it was printed during the run
        advice.iter().for_each(|advice| println!("advice at step {}: {}", advice.step, advice.message));
    }
    Ok(TrainedRun { learner: result.model, history, stopped, advice })
}

/// Adds the metrics of forward-only learning.
fn with_query_metrics<LC>(training: SupervisedTraining<LC>) -> SupervisedTraining<LC>
where
    LC: LearningComponentsTypes,
    <LC::TrainingModel as TrainStep>::Output: ItemLazy<ItemSync = StepOutput<Flex>>,
{
    training
        .metric_train_numeric(QueriesMetric::new())
        .metric_train_numeric(RelativeVarianceMetric::new())
        .metric_train_numeric(FloorMetric::new())
        .metric_train_numeric(CvMetric::new())
        .metric_train_numeric(MinQueriesMetric::new())
        .metric_train_numeric(MaxQueriesMetric::new())
        .metric_train_numeric(DroppedMetric::new())
}

/// Returns why the user stopped training, if so.
///
/// # Errors
/// Where training stopped for another reason. The message says what can be resumed.
fn stop_reason(interrupter: &Interrupter, plan: &RunPlan<'_>) -> Result<Option<String>> {
    let resumable = || match plan.artifacts.checkpoints().first() {
        Some(epoch) => format!("training stopped; epoch {epoch} is kept, and --resume goes on from there"),
        None => "training stopped before the end of its first epoch".to_string(),
    };
    if let Some(error) = plan.monitor.as_ref().and_then(Monitor::error) {
        return Err(error).with_context(resumable);
    }
    match interrupter.get_message().filter(|_| interrupter.should_stop()) {
        Some(reason) if reason != STOPPED_BY_USER => Err(anyhow!(reason)).with_context(resumable),
        reason => Ok(reason),
    }
}

/// Reads the checkpoint once, because burn-train panics where it cannot. [`resumable`] has found
/// its files to be whole.
fn check_checkpoint<L: AutodiffModule<AB>, O: Optimizer<L, AB>>(epoch: usize, plan: &RunPlan<'_>) -> Result<()> {
    fn check<R: Record<AB>>(part: &str, epoch: usize, plan: &RunPlan<'_>) -> Result<()> {
        let path = plan.artifacts.checkpoint(part, epoch);
        let record: Result<R, _> = Recorder::<AB>::load(&AtomicRecorder::default(), path.clone(), &plan.device);
        record.map(drop).with_context(|| {
            let path = path.display();
            format!("the checkpoint {path} is not one of this model; remove it to go on from the one before")
        })
    }
    check::<<L as Module<AB>>::Record>("model", epoch, plan)?;
    check::<O::Record>("optim", epoch, plan)?;
    check::<<CosineAnnealingLrScheduler as LrScheduler>::Record<AB>>("scheduler", epoch, plan)
}

/// Returns the epoch to resume from, and the history up to it.
///
/// It is the last epoch with complete metrics and a complete checkpoint whose checksums are right.
/// A line on standard output tells of each later epoch whose checkpoint is damaged.
///
/// # Errors
/// Where there is none. The message names the damaged files.
pub fn resumable(artifacts: &Artifacts) -> Result<(usize, History)> {
    let none = || {
        format!(
            "there is no finished epoch to resume from in {}; leave --resume out to start anew",
            artifacts.dir().display()
        )
    };
    let checkpoints = artifacts.checkpoints();
    if checkpoints.is_empty() {
        bail!(none());
    }
    let mut history = History::read(&artifacts.path(history::FILE))?;
    let mut damaged = vec![];
    for epoch in checkpoints.into_iter().filter(|&epoch| history.is_complete(epoch)) {
        match artifacts.verify(epoch) {
            Ok(()) => {
                damaged.iter().for_each(|why| println!("warning: {why}; epoch {epoch} is used instead"));
                history.truncate(epoch);
                return Ok((epoch, history));
            }
            Err(why) => damaged.push(why.to_string()),
        }
    }
    ensure!(
        damaged.is_empty(),
        "no checkpoint in {} can be resumed from: {}; leave --resume out to start anew",
        artifacts.dir().display(),
        damaged.join("; ")
    );
    bail!(none())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::history::{Row, Split};
    use super::*;

    /// A folder with the checkpoints of that many epochs, and their metrics.
    fn run(epochs: usize) -> (tempfile::TempDir, Artifacts) {
        let dir = tempfile::tempdir().unwrap();
        let artifacts = Artifacts::open(dir.path()).unwrap();
        fs::create_dir(artifacts.path("checkpoint")).unwrap();
        let mut history = History::default();
        for epoch in 1..=epochs {
            for part in ["model", "optim", "scheduler"] {
                let path = artifacts.checkpoint(part, epoch);
                Recorder::<B>::save_item(&AtomicRecorder::default(), epoch, path).unwrap();
            }
            history.push(Row::new(Split::Test, epoch, 1.0, 0.5));
        }
        history.write(&artifacts).unwrap();
        (dir, artifacts)
    }

    #[test]
    fn a_damaged_checkpoint_is_left_for_the_epoch_before() {
        let (_dir, artifacts) = run(3);
        let from = || resumable(&artifacts).map(|(epoch, history)| (epoch, history.rows.len()));
        assert_eq!(from().unwrap(), (3, 3));
        let flip = |part: &str, epoch: usize| {
            let path = artifacts.checkpoint(part, epoch).with_extension("mpk");
            let mut bytes = fs::read(&path).unwrap();
            bytes[0] ^= 1;
            fs::write(&path, bytes).unwrap();
        };
        // one bit of any part
        flip("scheduler", 3);
        assert_eq!(from().unwrap(), (2, 2));
        flip("optim", 2);
        assert_eq!(from().unwrap(), (1, 1));
        flip("model", 1);
        let error = from().unwrap_err().to_string();
        for file in ["scheduler-3.mpk", "optim-2.mpk", "model-1.mpk"] {
            assert!(error.contains(file), "{error}");
        }
    }

    #[test]
    fn an_epoch_without_metrics_is_not_resumed_from() {
        let (_dir, artifacts) = run(2);
        let mut history = History::read(&artifacts.path(history::FILE)).unwrap();
        history.truncate(1);
        history.write(&artifacts).unwrap();
        assert_eq!(resumable(&artifacts).unwrap().0, 1);
        history.truncate(0);
        history.write(&artifacts).unwrap();
        assert!(resumable(&artifacts).unwrap_err().to_string().contains("no finished epoch"));
    }
}
