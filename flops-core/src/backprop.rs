//! The baseline: the same models trained by backpropagation.

use burn::module::{AutodiffModule, ModuleDisplay};
use burn::prelude::*;
use burn::tensor::backend::AutodiffBackend;
use burn::train::{InferenceStep, TrainOutput, TrainStep};

use crate::batch::Batch;
use crate::metric::StepOutput;
use crate::objective::ForwardModel;
use crate::probe::Probe;

/// Trains a [`ForwardModel`] by backpropagation of its mean loss: same model, same batches, same metrics, the other gradient.
///
/// It is what forward-only learning is measured against, and how the shipped checkpoints were pretrained.
#[derive(Module, Debug)]
pub struct BackpropLearner<B: Backend, M: Module<B>> {
    /// The model.
    pub model: M,
    #[module(skip)]
    backend: std::marker::PhantomData<B>,
}

impl<B: Backend, M: Module<B>> BackpropLearner<B, M> {
    /// A learner for `model`; parameters frozen with `no_grad` stay as they are.
    pub fn new(model: M) -> Self {
        Self { model, backend: std::marker::PhantomData }
    }
}

/// Losses and output of a plain forward pass.
pub(crate) fn evaluate<B: Backend, M: ForwardModel<B>>(model: &M, batch: Batch<M::Input, M::Target>) -> StepOutput<B> {
    let output = model.forward(batch.input, &mut Probe::clean());
    let classification = model.classification(&output, &batch.target);
    StepOutput { losses: model.losses(output, batch.target), classification, stats: None }
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
        let item = evaluate(&self.model, batch);
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
        evaluate(&self.model, batch)
    }
}
