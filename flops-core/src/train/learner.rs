//! The learner that burn-train drives: a [`TrainStep`] that replaces autodiff.
//!
//! `step` works on the inner (`valid()`) model, on a backend where no graph can exist. `optimize`
//! applies Burn's optimizer and commits what the step learned: λ, running variances, the ledger.

use std::sync::{Arc, Mutex, MutexGuard};

use burn::module::{AutodiffModule, Module, ModuleDisplay};
use burn::optim::{GradientsParams, MultiGradientsParams, Optimizer};
use burn::prelude::*;
use burn::tensor::backend::AutodiffBackend;
use burn::train::{InferenceStep, TrainOutput, TrainStep};

use super::config::ForwardConfig;
use super::diagnostics::Bounds;
use super::monitor::Monitor;
use super::output::StepOutput;

use super::prefixes::PrefixCaches;
use super::state::{LearnerState, Pending};
use super::step::{ForwardStep, StepOutcome};
use crate::allocator::{Allocator, Shown};
use crate::batch::Batch;
use crate::error::Error;
use crate::estimator::trained_parameters;
use crate::inference::infer_cached;
use crate::model::ForwardModel;
use crate::persist::Persist;

/// Trains a [`ForwardModel`] from forward passes alone.
///
/// It goes into burn-train's `Learner` like any model. Parameters that require a gradient are
/// trained; freeze the others with `no_grad`. `B` is an autodiff backend in training, because
/// burn-train asks for one, but no graph is ever recorded on it.
///
/// # Example
/// ```
/// # use burn::{backend::{Autodiff, Flex}, nn, prelude::*};
/// # use flops_core::{ForwardModel, Probe, cross_entropy};
/// # #[derive(Module, Debug)]
/// # struct Model<B: Backend> { fc: nn::Linear<B> }
/// # impl<B: Backend> ForwardModel<B> for Model<B> {
/// #     type Input = Tensor<B, 2>; type Target = Tensor<B, 1, Int>; type Output = Tensor<B, 2>;
/// #     fn forward(&self, x: Tensor<B, 2>, probe: &mut Probe<B>) -> Tensor<B, 2> {
/// #         probe.linear(&self.fc, x)
/// #     }
/// #     fn losses(&self, y: Tensor<B, 2>, t: Tensor<B, 1, Int>) -> Tensor<B, 1> {
/// #         cross_entropy(y, t)
/// #     }
/// # }
/// use burn::optim::AdamConfig;
/// use burn::train::TrainStep;
/// use flops_core::allocator::Neyman;
/// use flops_core::{Batch, ForwardConfig, ForwardLearner, QueryBudget};
///
/// type AB = Autodiff<Flex>;
/// let device = Default::default();
/// let model = Model::<AB> { fc: nn::LinearConfig::new(4, 3).init(&device) };
/// let config = ForwardConfig::new(QueryBudget::new(20, 1)?).with_seed(7);
/// let learner = ForwardLearner::new(model, Neyman, config)?;
///
/// // burn-train does this with every batch, which lies on the backend without a graph
/// let input = Tensor::<Flex, 2>::ones([2, 4], &device);
/// let batch = Batch { ids: vec![0, 1], input, target: Tensor::zeros([2], &device) };
/// let mut optimizer = AdamConfig::new().init();
/// let output = learner.step(batch);
/// let learner = learner.optimize::<AB, _>(&mut optimizer, 1e-3, output.grads);
/// assert_eq!(learner.state().step, 1);
/// # Ok::<(), flops_core::Error>(())
/// ```
#[derive(Module, Debug)]
pub struct ForwardLearner<B: Backend, M: Module<B>, A: Module<B>> {
    /// The model, with parameters θ.
    pub model: M,
    /// The allocator, with parameters λ.
    pub allocator: A,
    state: Persist<B, LearnerState>,
    #[module(skip)]
    config: Arc<ForwardConfig>,
    #[module(skip)]
    monitor: Monitor,
    #[module(skip)]
    pub(super) pending: Arc<Mutex<Vec<Pending>>>,
    #[module(skip)]
    pub(super) prefixes: PrefixCaches,
}

impl<B: Backend, M: Module<B>, A: Module<B>> ForwardLearner<B, M, A> {
    /// Creates a learner for `model`.
    ///
    /// # Errors
    /// See [`ForwardConfig::validate`]. [`Error::SharedNoise`] for weight noise with an allocator
    /// that gives unequal shares: examples share that noise, and would gain nothing.
    pub fn new(model: M, allocator: A, config: ForwardConfig) -> Result<Self, Error>
    where
        A: Allocator<B>,
    {
        config.validate()?;
        if !config.estimator.space.is_independent() && !allocator.is_uniform() {
            return Err(Error::SharedNoise { allocator: allocator.name() });
        }
        // parameters are initialised lazily; without this, each clone would draw its own
        let _ = model.num_params();
        Ok(Self {
            model,
            allocator,
            state: Persist::new(LearnerState::default()),
            prefixes: PrefixCaches::new(config.prefix_cache, config.evaluation_cache),
            monitor: Monitor::new(Bounds { rows: Some(config.estimator.max_rows as u64), memory: config.memory_bound }),
            config: Arc::new(config),
            pending: Arc::default(),
        })
    }

    /// Shares the cached training prefixes of `other`.
    ///
    /// For several runs on the same examples with the same frozen parameters. The cache is valid as
    /// long as the same parameters, by their ids, are trained.
    #[must_use]
    pub fn with_prefixes_of<A2: Module<B>>(mut self, other: &ForwardLearner<B, M, A2>) -> Self {
        self.prefixes.training = other.prefixes.training.clone();
        self
    }

    /// A handle on this learner and all its clones.
    pub fn monitor(&self) -> Monitor {
        self.monitor.clone()
    }

    /// The state that a checkpoint holds beside the parameters.
    pub fn state(&self) -> &LearnerState {
        &self.state.value
    }

    /// The configuration.
    pub fn config(&self) -> &ForwardConfig {
        &self.config
    }

    fn pending(&self) -> MutexGuard<'_, Vec<Pending>> {
        self.pending.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Commits what the steps since the last update learned; returns whether to update the model.
    fn commit(&mut self, lr: f64) -> bool
    where
        A: Allocator<B>,
    {
        let mut pending = std::mem::take(&mut *self.pending());
        pending.sort_by_key(|p| p.first);
        if pending.is_empty() {
            return false;
        }
        let state = &mut self.state.value;
        state.step += 1;
        let mut failed = pending.iter().all(|p| p.failed);
        state.failed_steps = if failed { state.failed_steps + 1 } else { 0 };
        for p in pending {
            for (phase, queries, cost) in p.costs {
                state.ledger.add(phase, queries, cost.rows, cost.elapsed);
            }
            state.variances.observe(&p.ids, &p.variance_covariate, &p.second_moments, &p.survived);
            state.sites.observe(&p.site_moments);
            if let Some(observed) = p.observed {
                state.gradient_predictor.observe(observed);
            }
            match p.update.map(|update| update.downcast::<A::Update>()) {
                Some(Ok(update)) => {
                    self.allocator = self.allocator.clone().apply(*update, &Shown::new(&p.shown));
                }
                Some(Err(_)) => {
                    self.monitor.fail(Error::ForeignUpdate { allocator: self.allocator.name() });
                    failed = true;
                }
                None => {}
            }
        }
        let (steps, sigma) = (state.failed_steps, self.config.estimator.sigma);
        self.monitor.set_ledger(&state.ledger);
        if steps >= self.config.max_failed_steps {
            self.monitor.fail(Error::Diverged { steps, sigma, lr });
        }
        !failed
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
    type Input = Batch<
        <M::InnerModule as ForwardModel<B::InnerBackend>>::Input,
        <M::InnerModule as ForwardModel<B::InnerBackend>>::Target,
    >;
    type Output = StepOutput<B::InnerBackend>;

    fn step(&self, batch: Self::Input) -> TrainOutput<Self::Output> {
        let rows = batch.ids.len();
        // `valid()` leads to the backend without autodiff: no graph can exist from here on
        let (model, allocator) = (self.model.valid(), self.allocator.valid());
        let step = ForwardStep {
            config: &self.config,
            state: &self.state.value,
            prefixes: &self.prefixes,
            model: &model,
            trained: &trained_parameters(&self.model),
            batch: &batch,
        };
        match step.run(&allocator) {
            Ok(StepOutcome { grads, item, pending, report }) => {
                self.pending().push(pending);
                if let Some(report) = report {
                    self.monitor.report(report);
                }
                TrainOutput { grads, item }
            }
            Err(error) => {
                self.monitor.fail(error);
                TrainOutput { grads: GradientsParams::new(), item: StepOutput::failed(rows) }
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
        if self.commit(lr) { optim.step(lr, self, grads) } else { self }
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
        if self.commit(lr) { optim.step_multi(lr, self, grads) } else { self }
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
        let estimator = &self.config.estimator;
        let (rows, cache) = (estimator.clean_rows(&self.model), &self.prefixes.evaluation);
        let output = infer_cached(&self.model, &batch, rows, estimator.threads, cache);
        if let Some(why) = self.model.failure() {
            self.monitor.fail(Error::Model { why });
        }
        StepOutput::clean(&self.model, output, batch.target)
    }
}
