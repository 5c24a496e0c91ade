//! The baseline: the same models trained by backpropagation.

use std::sync::Arc;

use burn::module::{AutodiffModule, Content, ModuleDisplay};
use burn::optim::{GradientsParams, MultiGradientsParams, Optimizer};
use burn::prelude::*;
use burn::tensor::backend::AutodiffBackend;
use burn::train::{InferenceStep, TrainOutput, TrainStep};

use crate::batch::{Batch, Rows};
use crate::estimator::trained_parameters;
use crate::inference::infer_cached;
use crate::lift::Lift;
use crate::model::ForwardModel;
use crate::persist::Persist;
use crate::probe::{PrefixCache, Probe, StepKey};
use crate::train::monitor::Monitor;
use crate::train::output::StepOutput;
use crate::train::prefixes::PrefixCaches;
use crate::train::trainable::{TrainBatch, TrainInput, TrainTarget};

/// Trains a [`ForwardModel`] by backpropagation of its mean loss.
///
/// It is the baseline of forward-only learning: same model, batches and metrics, another gradient. Batches
/// lie on the backend without a graph here, too ([`Lift`](crate::Lift)).
/// From the same seed [dropout](Probe::dropout) draws the same masks as there, where each step is
/// followed by its update. A [batch normalisation](Probe::batch_norm) uses its running statistics.
///
/// A batch in which a loss is not finite, as that of a label that is no class, is not learned from, and the
/// [monitor](Self::monitor) has the error.
///
/// # Panics
/// burn-train's methods return no `Result`. As with [`ForwardLearner`](crate::ForwardLearner), the
/// update or the evaluation panics after a batch whose parts differ in length, unless the
/// [monitor](Self::monitor) has an interrupter.
#[derive(Module, Debug)]
#[module(custom_display)]
pub struct BackpropLearner<B: Backend, M: Module<B>> {
    /// The model.
    pub model: M,
    /// Steps taken, which key the dropout masks.
    steps: Persist<B, u64>,
    #[module(skip)]
    seed: u64,
    #[module(skip)]
    threads: usize,
    #[module(skip)]
    prefixes: PrefixCaches,
    #[module(skip)]
    monitor: Monitor,
}

/// The model alone: no caches.
impl<B: Backend, M: Module<B> + ModuleDisplay> ModuleDisplay for BackpropLearner<B, M> {
    fn custom_content(&self, content: Content) -> Option<Content> {
        content.add("model", &self.model).optional()
    }
}

/// Rows of a forward pass in evaluation, at most.
const ROWS: usize = 32;

impl<B: Backend, M: Module<B>> BackpropLearner<B, M> {
    /// Creates a learner for `model`. Parameters frozen with `no_grad` are not trained.
    #[must_use]
    pub fn new(model: M) -> Self {
        let (prefixes, monitor) = (PrefixCaches::default(), Monitor::default());
        Self { model, steps: Persist::new(0), seed: 0, threads: 1, prefixes, monitor }
    }

    /// A handle on this learner and all its clones: its errors, and what stops it.
    pub fn monitor(&self) -> Monitor {
        self.monitor.clone()
    }

    /// Sets the seed of the [dropout](Probe::dropout) masks (default 0).
    #[must_use]
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Caches the frozen prefixes of training examples, at most `examples` (default 0).
    ///
    /// An example is known by its id and the sizes of its input: use it only for examples without
    /// augmentation, and leave the frozen parameters as they are. Each padding of an example counts.
    #[must_use]
    pub fn with_prefix_cache(mut self, examples: usize) -> Self {
        self.prefixes.training = Arc::new(PrefixCache::new(examples));
        self
    }

    /// Caches the frozen prefixes of evaluated examples, at most `examples` (default 0).
    ///
    /// All of them must come from one data set. Their ids may be equal to ids of training examples.
    #[must_use]
    pub fn with_evaluation_cache(mut self, examples: usize) -> Self {
        self.prefixes.evaluation = Arc::new(PrefixCache::new(examples));
        self
    }

    /// Sets the number of threads that evaluate a batch outside training, at least 1 (default 1).
    ///
    /// The result does not depend on it.
    #[must_use]
    pub fn with_threads(mut self, threads: usize) -> Self {
        self.threads = threads;
        self
    }

    /// Counts a step that has gradients; returns whether it has.
    fn commit(&mut self, lr: f64, has_gradients: bool) -> bool {
        self.monitor.give_up();
        self.monitor.set_lr(lr);
        self.steps.value += u64::from(has_gradients);
        has_gradients
    }
}

impl<B, M> TrainStep for BackpropLearner<B, M>
where
    B: AutodiffBackend,
    M: AutodiffModule<B> + ModuleDisplay + ForwardModel<B> + 'static,
    M::InnerModule: ModuleDisplay + ForwardModel<B::InnerBackend>,
    TrainInput<B, M>: Lift<B, Lifted = M::Input>,
    TrainTarget<B, M>: Lift<B, Lifted = M::Target>,
{
    type Input = TrainBatch<B, M>;
    type Output = StepOutput<B>;

    fn step(&self, batch: Self::Input) -> TrainOutput<Self::Output> {
        let batch = batch.lift::<B>();
        let trained = trained_parameters(&self.model);
        let rows = batch.ids.len();
        // nothing is learned, and the metrics see no loss
        let fail = |error| {
            self.monitor.note(error);
            TrainOutput { grads: GradientsParams::new(), item: StepOutput::failed(rows) }
        };
        if let Err(error) = batch.check() {
            return fail(error);
        }
        let key = StepKey { seed: self.seed, step: self.steps.value, ids: &batch.ids };
        let passes = self.prefixes.passes((&batch, 0..batch.ids.len()), &trained, rows.max(1));
        let (mut outputs, mut stages, mut reached) = (vec![], vec![], 0);
        for job in 0..passes.len() {
            let index = passes.rows(job);
            let mut probe = Probe::trace(trained.clone(), passes.prefix(job), false)
                .with_examples(key.examples(index))
                .with_row_check(index.len(), false);
            outputs.push(self.model.forward(batch.input.rows(index), &mut probe));
            let traced = probe.traced();
            if let Some(fault) = traced.fault {
                return fail(fault);
            }
            stages.push(traced.stages);
            reached = traced.reached.len();
        }
        let output = passes.in_order(outputs);
        let stages = passes.stages(stages);
        self.prefixes.update(&batch, &trained, [(0..batch.ids.len(), &stages)], reached == trained.len());
        let item = StepOutput::clean(&self.model, output, batch.target);
        let gradients = item.losses.clone().mean().backward();
        let losses: Vec<f64> = item.losses.clone().inner().into_data().iter().collect();
        if let Some(error) = self.monitor.see_losses(&batch.ids, &losses, self.steps.value > 0, 0.0) {
            return fail(error);
        }
        TrainOutput::new(self, gradients, item)
    }

    fn optimize<B1: AutodiffBackend, O: Optimizer<Self, B1>>(
        mut self,
        optim: &mut O,
        lr: f64,
        grads: GradientsParams,
    ) -> Self
    where
        Self: AutodiffModule<B1>,
    {
        if self.commit(lr, !grads.is_empty()) { optim.step(lr, self, grads) } else { self }
    }

    fn optimize_multi<B1: AutodiffBackend, O: Optimizer<Self, B1>>(
        mut self,
        optim: &mut O,
        lr: f64,
        grads: MultiGradientsParams,
    ) -> Self
    where
        Self: AutodiffModule<B1>,
    {
        let has_gradients = grads.grads.iter().any(|(grads, _)| !grads.is_empty());
        if self.commit(lr, has_gradients) { optim.step_multi(lr, self, grads) } else { self }
    }
}

impl<B, M> InferenceStep for BackpropLearner<B, M>
where
    B: Backend,
    M: ForwardModel<B> + ModuleDisplay + 'static,
{
    type Input = Batch<M::Input, M::Target>;
    type Output = StepOutput<B>;

    fn step(&self, batch: Self::Input) -> Self::Output {
        let is_sound = batch.check().map_err(|error| self.monitor.note(error)).is_ok();
        // an accumulation that an epoch leaves incomplete has no update that would tell
        self.monitor.give_up();
        if !is_sound {
            return StepOutput::failed(batch.ids.len());
        }
        let output = infer_cached(&self.model, &batch, ROWS, self.threads, &self.prefixes.evaluation);
        StepOutput::clean(&self.model, output, batch.target)
    }
}
