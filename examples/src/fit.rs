//! The training loop around a learner: burn-train's, with this folder's checkpoints, renderer and metrics.

use std::io::IsTerminal;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use burn::backend::Flex;
use burn::data::dataloader::DataLoader;
use burn::lr_scheduler::LrScheduler;
use burn::lr_scheduler::cosine::{CosineAnnealingLrScheduler, CosineAnnealingLrSchedulerConfig};
use burn::module::{AutodiffModule, Module};
use burn::optim::adaptor::OptimizerAdaptor;
use burn::optim::{AdamW, AdamWConfig, Optimizer};
use burn::record::Recorder;
use burn::train::checkpoint::KeepLastNCheckpoints;
use burn::train::logger::InMemoryMetricLogger;
use burn::train::metric::{AccuracyMetric, LossMetric};
use burn::train::{ExecutionStrategy, InferenceStep, ItemLazy, Learner, SupervisedTraining, TrainStep};
use flops_core::StepOutput;
use flops_core::diagnostics::Advice;
use flops_core::learner::Monitor;
use flops_core::metric::{
    CeilingMetric, CvMetric, DroppedMetric, MaxQueriesMetric, MinQueriesMetric, QueriesMetric, RelativeVarianceMetric,
};

use crate::artifacts::Artifacts;
use crate::backend::{AB, B, Device};
use crate::groups::{Grouped, LrGroup};
use crate::history::{self, History};
use crate::recorder::AtomicRecorder;
use crate::renderer::{RunRenderer, SharedHistory};

/// What the loop is to do.
pub struct Plan<'a> {
    /// Where checkpoints and `metrics.csv` go.
    pub artifacts: &'a Artifacts,
    /// Where to train.
    pub device: Device,
    /// AdamW's learning rate; it falls to zero as a cosine.
    pub lr: f64,
    /// Parameters with a multiple of it.
    pub group: LrGroup,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// Steps of the whole schedule.
    pub steps: usize,
    /// The last epoch of this run.
    pub last_epoch: usize,
    /// The epoch whose checkpoint training goes on from.
    pub resume: Option<usize>,
    /// The monitor of a forward-only learner.
    pub monitor: Option<Monitor>,
    /// Whether to show plain lines on a terminal too.
    pub plain: bool,
}

/// A trained model and how it came to be.
pub struct Fitted<M> {
    /// The learner, on the plain backend.
    pub learner: M,
    /// What was measured.
    pub history: History,
    /// Why training stopped before its last epoch, if the user stopped it.
    pub stopped: Option<String>,
    /// What the diagnostics had to say.
    pub advice: Vec<Advice>,
}

/// What burn-train says when its terminal interface is told to stop.
const STOPPED_BY_USER: &str = "Stopping training from user input.";

/// Trains `learner` with AdamW and a cosine schedule, forward-only and backpropagation alike.
///
/// After each epoch a checkpoint and `metrics.csv` are written; the last two checkpoints are kept.
///
/// # Errors
/// Where the learner gives up, a checkpoint cannot be written, or the one to resume from is damaged.
pub fn fit<L>(
    learner: L,
    train: Arc<dyn DataLoader<AB, L::Input>>,
    test: Arc<dyn DataLoader<B, <L::InnerModule as InferenceStep>::Input>>,
    history: History,
    plan: Plan<'_>,
) -> Result<Fitted<L::InnerModule>>
where
    L: TrainStep + AutodiffModule<AB> + std::fmt::Display + 'static,
    L::InnerModule: InferenceStep,
    L::Output: ItemLazy<ItemSync = StepOutput<Flex>>,
    <L::InnerModule as InferenceStep>::Output: ItemLazy<ItemSync = StepOutput<Flex>>,
{
    let optimizer = Grouped {
        inner: AdamWConfig::new().with_weight_decay(plan.weight_decay).init::<AB, L>(),
        group: plan.group.clone(),
    };
    let schedule: CosineAnnealingLrScheduler = CosineAnnealingLrSchedulerConfig::new(plan.lr, plan.steps)
        .init()
        .map_err(|e| anyhow!("--lr {}: {e}", plan.lr))?;
    if let Some(epoch) = plan.resume {
        check_checkpoint::<L>(&optimizer, epoch, &plan)?;
    }

    let recorder = AtomicRecorder::default();
    let unread = recorder.unread();
    let mut training = SupervisedTraining::new(plan.artifacts.dir(), unread.before_epochs(train), test)
        .metrics((LossMetric::<Flex>::new(), AccuracyMetric::<Flex>::new()))
        .num_epochs(plan.last_epoch)
        .with_file_checkpointer(recorder)
        .with_checkpointing_strategy(unread.noted(KeepLastNCheckpoints::new(2)))
        .with_metric_logger(InMemoryMetricLogger::new())
        .with_application_logger(None)
        .with_training_strategy(ExecutionStrategy::single(plan.device.clone()).into());
    let interrupter = training.interrupter();
    if let Some(monitor) = &plan.monitor {
        monitor.stop_with(interrupter.clone());
        training = training
            .metric_train_numeric(QueriesMetric::new())
            .metric_train_numeric(RelativeVarianceMetric::new())
            .metric_train_numeric(CeilingMetric::new())
            .metric_train_numeric(CvMetric::new())
            .metric_train_numeric(MinQueriesMetric::new())
            .metric_train_numeric(MaxQueriesMetric::new())
            .metric_train_numeric(DroppedMetric::new());
    }
    if let Some(epoch) = plan.resume {
        training = training.checkpoint(epoch);
    }
    let history = SharedHistory::new(history);
    let training = training.renderer(RunRenderer::new(
        history.clone(),
        plan.artifacts.clone(),
        plan.monitor.clone(),
        interrupter.clone(),
        plan.resume,
        plan.plain,
    ));

    let result = training.launch(Learner::new(learner, optimizer, schedule));
    // the terminal is ours again
    drop(result.renderer);
    let resumable = || match plan.artifacts.checkpoints().first() {
        Some(epoch) => format!("training stopped; epoch {epoch} is kept, and --resume goes on from there"),
        None => "training stopped before the end of its first epoch".to_string(),
    };
    if let Some(error) = plan.monitor.as_ref().and_then(Monitor::error) {
        return Err(error).with_context(resumable);
    }
    let reason = interrupter.get_message().filter(|_| interrupter.should_stop());
    if let Some(reason) = reason.as_ref().filter(|reason| *reason != STOPPED_BY_USER) {
        return Err(anyhow!(reason.clone())).with_context(resumable);
    }
    let history = history.lock().clone();
    if history.rows.iter().any(|row| !row.loss.is_finite()) {
        bail!("training diverged: a loss is not finite; lower --lr, or check the images");
    }
    let advice = plan.monitor.as_ref().map_or(vec![], Monitor::advice);
    if !plan.plain && std::io::stdout().is_terminal() {
        // plain lines had it as it came
        advice.iter().for_each(|advice| println!("advice at step {}: {}", advice.step, advice.message));
    }
    Ok(Fitted { learner: result.model, history, stopped: reason, advice })
}

/// Reads the checkpoint once, since burn-train panics where it cannot.
fn check_checkpoint<L: AutodiffModule<AB>>(
    optimizer: &Grouped<OptimizerAdaptor<AdamW, L, AB>>,
    epoch: usize,
    plan: &Plan<'_>,
) -> Result<()> {
    fn read<R: burn::record::Record<AB>>(part: &str, epoch: usize, plan: &Plan<'_>) -> Result<()> {
        let path = plan.artifacts.checkpoint(part, epoch);
        let record: Result<R, _> = Recorder::<AB>::load(&AtomicRecorder::default(), path.clone(), &plan.device);
        record.map(drop).with_context(|| {
            format!("the checkpoint {} is damaged; remove it to go on from the one before", path.display())
        })
    }
    fn read_optimizer<L: AutodiffModule<AB>, O: Optimizer<L, AB>>(_: &O, epoch: usize, plan: &Plan<'_>) -> Result<()> {
        read::<O::Record>("optim", epoch, plan)
    }
    read::<<L as Module<AB>>::Record>("model", epoch, plan)?;
    read_optimizer::<L, _>(optimizer, epoch, plan)?;
    read::<<CosineAnnealingLrScheduler as LrScheduler>::Record<AB>>("scheduler", epoch, plan)
}

/// The epoch to resume from: the last one with a complete checkpoint and complete metrics, and the history up to it.
///
/// # Errors
/// Where there is none.
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
    let epoch = checkpoints.into_iter().find(|&epoch| history.is_complete(epoch)).with_context(none)?;
    history.truncate(epoch);
    Ok((epoch, history))
}
