//! The learner as burn-train drives it: a [`TrainStep`] that replaces autodiff.

use burn::module::{AutodiffModule, Module, ModuleDisplay};
use burn::optim::{GradientsParams, MultiGradientsParams, Optimizer};
use burn::prelude::*;
use burn::tensor::backend::AutodiffBackend;
use burn::train::{InferenceStep, TrainOutput, TrainStep};

use crate::allocator::Allocator;
use crate::batch::Batch;
use crate::model::ForwardModel;
use crate::train::learner::{EstimatedStep, ForwardLearner};
use crate::train::output::StepOutput;
use crate::train::trainable::TrainBatch;

impl<B: Backend, M: Module<B>, A: Allocator<B>> ForwardLearner<B, M, A> {
    /// Commits what the steps since the last update learned; returns whether to update the model.
    ///
    /// # Panics
    /// Without an interrupter, for an error that never passes.
    fn commit_or_stop(&mut self, lr: f64, has_gradients: bool) -> bool {
        self.monitor.give_up();
        let committed = self.commit(lr, has_gradients).map_err(|error| self.monitor.end(error));
        self.monitor.give_up();
        committed.unwrap_or(false)
    }
}

impl<B, M, A> TrainStep for ForwardLearner<B, M, A>
where
    B: AutodiffBackend,
    M: AutodiffModule<B> + ModuleDisplay + 'static,
    M::InnerModule: ForwardModel<B::InnerBackend>,
    A: AutodiffModule<B> + Allocator<B>,
    A::InnerModule: Allocator<B::InnerBackend, Update = A::Update>,
{
    type Input = TrainBatch<B, M>;
    type Output = StepOutput<B::InnerBackend>;

    fn step(&self, batch: Self::Input) -> TrainOutput<Self::Output> {
        match self.estimate(&batch) {
            Ok(EstimatedStep { grads, output }) => TrainOutput { grads, item: output },
            Err(error) => {
                self.monitor.end(error);
                TrainOutput { grads: GradientsParams::new(), item: StepOutput::failed(batch.ids.len()) }
            }
        }
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
        if self.commit_or_stop(lr, !grads.is_empty()) { optim.step(lr, self, grads) } else { self }
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
        if self.commit_or_stop(lr, has_gradients) { optim.step_multi(lr, self, grads) } else { self }
    }
}

impl<B, M, A> InferenceStep for ForwardLearner<B, M, A>
where
    B: Backend,
    M: ForwardModel<B> + ModuleDisplay + 'static,
    A: Module<B> + ModuleDisplay + 'static,
{
    type Input = Batch<M::Input, M::Target>;
    type Output = StepOutput<B>;

    fn step(&self, batch: Self::Input) -> Self::Output {
        let rows = batch.ids.len();
        let evaluated = self.evaluate(batch).map_err(|error| self.monitor.end(error));
        // an accumulation that an epoch leaves incomplete has no update that would tell
        self.monitor.give_up();
        evaluated.unwrap_or_else(|()| StepOutput::failed(rows))
    }
}
