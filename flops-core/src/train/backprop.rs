//! The baseline: the same models trained by backpropagation.

use std::sync::Arc;

use burn::module::{AutodiffModule, ModuleDisplay};
use burn::prelude::*;
use burn::tensor::backend::AutodiffBackend;
use burn::train::{InferenceStep, TrainOutput, TrainStep};

use super::output::StepOutput;
use super::prefixes::PrefixCaches;
use crate::batch::{Batch, Rows};
use crate::estimator::trained_parameters;
use crate::inference::infer_cached;
use crate::model::ForwardModel;
use crate::probe::{PrefixCache, Probe};

/// Trains a [`ForwardModel`] by backpropagation of its mean loss.
///
/// It is the baseline of forward-only learning: same model, batches and metrics, another gradient.
#[derive(Module, Debug)]
pub struct BackpropLearner<B: Backend, M: Module<B>> {
    /// The model.
    pub model: M,
    #[module(skip)]
    threads: usize,
    #[module(skip)]
    prefixes: PrefixCaches,
    #[module(skip)]
    backend: std::marker::PhantomData<B>,
}

/// Rows of a forward pass in evaluation, at most.
const ROWS: usize = 32;

impl<B: Backend, M: Module<B>> BackpropLearner<B, M> {
    /// Creates a learner for `model`. Parameters frozen with `no_grad` are not trained.
    #[must_use]
    pub fn new(model: M) -> Self {
        Self { model, threads: 1, prefixes: PrefixCaches::default(), backend: std::marker::PhantomData }
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
}

impl<B, M> TrainStep for BackpropLearner<B, M>
where
    B: AutodiffBackend,
    M: AutodiffModule<B> + ModuleDisplay + ForwardModel<B> + 'static,
    M::InnerModule: ModuleDisplay,
{
    type Input = Batch<M::Input, M::Target>;
    type Output = StepOutput<B>;

    fn step(&self, batch: Self::Input) -> TrainOutput<Self::Output> {
        let trained = trained_parameters(&self.model);
        let passes = self.prefixes.passes(&batch, &trained, batch.ids.len().max(1));
        let (mut outputs, mut stages, mut reached) = (vec![], vec![], 0);
        for job in 0..passes.len() {
            let mut probe = Probe::trace(trained.clone(), passes.prefix(job), false);
            outputs.push(self.model.forward(batch.input.rows(passes.rows(job)), &mut probe));
            let traced = probe.traced();
            stages.push(traced.stages);
            reached = traced.reached.len();
        }
        let output = passes.in_order(outputs);
        self.prefixes.update(&batch, &trained, &passes.stages(stages), reached == trained.len());
        let item = StepOutput::clean(&self.model, output, batch.target);
        TrainOutput::new(self, item.losses.clone().mean().backward(), item)
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
        let output = infer_cached(&self.model, &batch, ROWS, self.threads, &self.prefixes.evaluation);
        StepOutput::clean(&self.model, output, batch.target)
    }
}
