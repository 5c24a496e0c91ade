//! The baseline: the same models trained by backpropagation.

use std::sync::Arc;

use burn::module::{AutodiffModule, ModuleDisplay};
use burn::prelude::*;
use burn::tensor::backend::AutodiffBackend;
use burn::train::{InferenceStep, TrainOutput, TrainStep};

use crate::batch::Batch;
use crate::estimator::trained_parameters;
use crate::metric::StepOutput;
use crate::objective::{ForwardModel, infer_again};
use crate::probe::{PrefixCache, Probe};

/// Trains a [`ForwardModel`] by backpropagation of its mean loss: same model, same batches, same metrics, the other gradient.
///
/// It is what forward-only learning is measured against.
#[derive(Module, Debug)]
pub struct BackpropLearner<B: Backend, M: Module<B>> {
    /// The model.
    pub model: M,
    #[module(skip)]
    threads: usize,
    #[module(skip)]
    prefixes: Arc<PrefixCache>,
    #[module(skip)]
    evaluated: Arc<PrefixCache>,
    #[module(skip)]
    backend: std::marker::PhantomData<B>,
}

/// Rows of a pass of the evaluation.
const ROWS: usize = 32;

impl<B: Backend, M: Module<B>> BackpropLearner<B, M> {
    /// A learner for `model`; parameters frozen with `no_grad` stay as they are.
    pub fn new(model: M) -> Self {
        let (prefixes, evaluated) = Default::default();
        Self { model, threads: 1, prefixes, evaluated, backend: std::marker::PhantomData }
    }

    /// Keeps the frozen prefix of this many data from epoch to epoch. Only for data that are not augmented, since a datum is
    /// known by its id alone, and for frozen parameters that nobody changes.
    pub fn with_prefix_cache(mut self, data: usize) -> Self {
        self.prefixes = Arc::new(PrefixCache::new(data));
        self
    }

    /// The same for data that are evaluated between epochs, all of one data set: their ids may be those of training data.
    pub fn with_evaluation_cache(mut self, data: usize) -> Self {
        self.evaluated = Arc::new(PrefixCache::new(data));
        self
    }

    /// Sets the threads, at least 1, that evaluate a batch outside training; the result does not depend on it.
    pub fn with_threads(mut self, threads: usize) -> Self {
        self.threads = threads;
        self
    }
}

/// What a plain pass with this output reports.
pub(crate) fn report<B: Backend, M: ForwardModel<B>>(model: &M, output: M::Output, target: M::Target) -> StepOutput<B> {
    let classification = model.classification(&output, &target);
    StepOutput { losses: model.losses(output, target), classification, stats: None }
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
        let mut probe = Probe::survey(trained.clone(), self.prefixes.get(&batch.ids, &trained), false);
        let output = self.model.forward(batch.input, &mut probe);
        let surveyed = probe.surveyed();
        // a trained parameter that is not called through the probe may act in any stage
        let reaches_all = surveyed.reached.len() == trained.len();
        if reaches_all {
            self.prefixes.keep(&batch.ids, &trained, &surveyed.stages.frozen());
        }
        self.evaluated.turn_to(if reaches_all { trained } else { Arc::default() });
        let item = report(&self.model, output, batch.target);
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
        let output = infer_again(&self.model, &batch, ROWS, self.threads, &self.evaluated);
        report(&self.model, output, batch.target)
    }
}
