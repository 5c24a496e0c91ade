//! Names for what code needs that is generic over models.

use burn::module::{AutodiffModule, ModuleDisplay};
use burn::tensor::backend::AutodiffBackend;

use crate::batch::Batch;
use crate::model::ForwardModel;

/// A model that a [`ForwardLearner`](crate::ForwardLearner) can train: the bounds of a loop of
/// [`estimate`](crate::ForwardLearner::estimate) and [`update`](crate::ForwardLearner::update) that is generic
/// over models.
///
/// Every module on an autodiff backend is one, if it is a [`ForwardModel`] on the backend without a graph.
/// burn-train's `Learner` asks for `'static` besides, and `BackpropLearner` for [`Lift`](crate::Lift).
///
/// # Example
/// ```
/// use burn::optim::AdamConfig;
/// use burn::tensor::backend::AutodiffBackend;
/// use flops_core::prelude::*;
///
/// fn fit<B: AutodiffBackend, M: Trainable<B>>(
///     model: M,
///     batches: &[TrainBatch<B, M>],
/// ) -> Result<M, flops_core::Error> {
///     let config = ForwardConfig::new(QueryBudget::new(20, 1)?);
///     let mut learner = ForwardLearner::new(model, Neyman, config)?;
///     let mut optimizer = AdamConfig::new().init();
///     for batch in batches {
///         let step = learner.estimate(batch)?;
///         learner = learner.update(&mut optimizer, 1e-3, step.grads)?;
///     }
///     Ok(learner.model)
/// }
/// ```
pub trait Trainable<B: AutodiffBackend>:
    AutodiffModule<B, InnerModule: ForwardModel<B::InnerBackend> + ModuleDisplay> + ModuleDisplay
{
}

impl<B, M> Trainable<B> for M
where
    B: AutodiffBackend,
    M: AutodiffModule<B> + ModuleDisplay,
    M::InnerModule: ForwardModel<B::InnerBackend> + ModuleDisplay,
{
}

/// What `M` takes on the backend without a graph.
pub type TrainInput<B, M> =
    <<M as AutodiffModule<B>>::InnerModule as ForwardModel<<B as AutodiffBackend>::InnerBackend>>::Input;

/// What `M` compares its outputs with on the backend without a graph.
pub type TrainTarget<B, M> =
    <<M as AutodiffModule<B>>::InnerModule as ForwardModel<<B as AutodiffBackend>::InnerBackend>>::Target;

/// A batch that a learner of `M` takes.
pub type TrainBatch<B, M> = Batch<TrainInput<B, M>, TrainTarget<B, M>>;
