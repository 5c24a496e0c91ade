//! The learner that burn-train drives: a [`TrainStep`] that replaces autodiff.
//!
//! `step` works on the inner (`valid()`) model, on a backend where no graph can exist. `optimize`
//! applies Burn's optimizer and commits what the step learned: λ, running variances, the ledger.

use std::sync::Arc;

use burn::module::{AutodiffModule, Module, ModuleDisplay};
use burn::optim::{GradientsParams, MultiGradientsParams, Optimizer};
use burn::prelude::*;
use burn::tensor::backend::AutodiffBackend;
use burn::train::{InferenceStep, TrainOutput, TrainStep};

use super::config::ForwardConfig;
use super::diagnostics::{Bounds, Diagnostics};
use super::graph_roots::free_graph_roots;
use super::monitor::Monitor;
use super::output::StepOutput;
use super::pending::{Earlier, PendingSteps};
use super::prefixes::PrefixCaches;
use super::site_checks::SiteChecks;
use super::state::LearnerState;
use super::step::{ForwardStep, StepOutcome};
use super::workers::Workers;
use crate::allocator::{Allocator, Shown};
use crate::batch::Batch;
use crate::control_variate::Observation;
use crate::error::Error;
use crate::estimator::trained_parameters;
use crate::executor::{Executor, Threads};
use crate::inference::infer_cached;
use crate::model::ForwardModel;
use crate::persist::Persist;
use crate::variance::VarianceSource;

/// Trains a [`ForwardModel`] from forward passes alone.
///
/// It goes into burn-train's `Learner` like any model. Parameters that require a gradient are
/// trained; freeze the others with `no_grad`. `B` is an autodiff backend in training, because
/// burn-train asks for one, but no graph is ever recorded on it. A module at a site has one of its own
/// on the inner backend ([`Probe::module`](crate::Probe::module)).
///
/// Clones share the [`Monitor`], cached prefixes and the check of sites, and nothing else: the clones
/// of a sweep train side by side, each with its own steps. [`apart`](Self::apart) gives a clone its
/// own of these. An update commits the steps of its own learner, or of the one that this was cloned
/// from. Several steps may come before an update (gradient accumulation); each has noise of its own.
/// burn-train's multi-device strategy is [refused](Error::MultiDevice): an
/// [executor](Self::with_executor) shares the jobs of a step instead.
///
/// # Panics
/// burn-train's methods return no `Result`. Without an interrupter ([`Monitor::stop_with`]) these
/// panic with an error that [never passes](Error::may_pass):
///
/// - [`TrainStep::optimize`], where a step had such an error, for example for a layer that is not
///   called through the probe; [`check`](Self::check) returns that error before training;
/// - [`InferenceStep::step`], where no update has told it, or the parts of a batch differ in length.
///
/// With an interrupter training stops in an orderly way, and [`Monitor::error`] has the error.
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
    pub(super) pending: PendingSteps,
    #[module(skip)]
    pub(super) prefixes: PrefixCaches,
    #[module(skip)]
    site_checks: SiteChecks,
    #[module(skip)]
    workers: Workers,
}

impl<B: Backend, M: Module<B>, A: Module<B>> ForwardLearner<B, M, A> {
    /// Creates a learner for `model`.
    ///
    /// # Errors
    /// See [`ForwardConfig::validate`]. [`Error::SharedNoise`] for weight noise with an allocator
    /// that gives unequal shares: examples share that noise, and would gain nothing.
    /// [`Error::NothingTrained`] for a model on an autodiff backend whose parameters are all frozen.
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
        // on other backends, as of a module that is only evaluated, no parameter asks for a gradient
        let can_train = model.devices().iter().any(B::ad_enabled);
        if can_train && trained_parameters(&model).is_empty() {
            return Err(Error::NothingTrained);
        }
        let bounds = Bounds { rows: Some(config.estimator.max_rows as u64), memory: config.memory_bound };
        Ok(Self {
            model,
            state: Persist::new(LearnerState::default()),
            prefixes: PrefixCaches::new(config.prefix_cache, config.evaluation_cache),
            monitor: Monitor::new(Diagnostics::new(bounds).with_allocation(!allocator.is_uniform())),
            allocator,
            config: Arc::new(config),
            pending: PendingSteps::default(),
            site_checks: SiteChecks::default(),
            workers: Workers::default(),
        })
    }

    /// Lets `executor` run the jobs of every step, on this worker and on others.
    ///
    /// Every worker has a learner of its own with the same settings, weights and batches, and ends a step
    /// with the same weights. Set the [leaves](crate::Estimator::leaves) to at least the number of workers.
    ///
    /// ```
    /// # use std::sync::Arc;
    /// # use burn::{backend::{Autodiff, Flex}, module::Module};
    /// # use flops_core::{ForwardLearner, executor::Threads};
    /// # fn run<M: Module<Autodiff<Flex>>, A: Module<Autodiff<Flex>>>(
    /// #     learner: ForwardLearner<Autodiff<Flex>, M, A>,
    /// # ) {
    /// // the default: all jobs in this process
    /// let learner = learner.with_executor(Arc::new(Threads));
    /// # }
    /// ```
    #[must_use]
    pub fn with_executor(mut self, executor: Arc<dyn Executor>) -> Self {
        self.workers = Workers::new(executor);
        self
    }

    /// Shares the cached training prefixes of `other`.
    ///
    /// For several runs on the same examples with the same frozen parameters. The cache is valid as
    /// long as the same parameters, by their ids, are trained, and the others keep their values.
    #[must_use]
    pub fn with_prefixes_of<A2: Module<B>>(mut self, other: &ForwardLearner<B, M, A2>) -> Self {
        self.prefixes.training = other.prefixes.training.clone();
        self
    }

    /// Gives a clone its own monitor, its own check of sites and its own empty prefix caches.
    ///
    /// For clones that train apart, as in a sweep. Clones that share a cache must have the same
    /// frozen parameters, with the same values. Two that trained all layers, and then freeze all but
    /// the head, have not.
    #[must_use]
    pub fn apart(mut self) -> Self {
        self.monitor = self.monitor.renewed();
        self.prefixes = PrefixCaches::new(self.config.prefix_cache, self.config.evaluation_cache);
        self.site_checks = SiteChecks::default();
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

    /// Commits what the steps since the last update learned; returns whether to update the model.
    ///
    /// `has_gradients` tells whether there is anything to update it with. Gradients of a step that
    /// another clone has committed are applied all the same.
    fn commit(&mut self, lr: f64, has_gradients: bool) -> bool
    where
        A: Allocator<B>,
    {
        self.monitor.give_up();
        free_graph_roots(self.state.value.step);
        let pending = match self.pending.take() {
            Ok(pending) => pending,
            Err(error) => {
                self.monitor.note(error);
                self.monitor.give_up();
                return false;
            }
        };
        let state = &mut self.state.value;
        if pending.is_empty() {
            state.step += u64::from(has_gradients);
            return has_gradients;
        }
        state.step += 1;
        let mut failed = pending.iter().all(|p| p.failed);
        state.failed_steps = if failed { state.failed_steps + 1 } else { 0 };
        let mut observed = None::<Observation>;
        for p in pending {
            for (phase, queries, cost) in p.costs {
                state.ledger.add(phase, queries, cost.rows, cost.elapsed);
            }
            state.loss_excess.observe(&p.losses);
            if self.config.variance == VarianceSource::Running {
                state.variances.observe(&p.ids, &p.variance_covariate, &p.second_moments, &p.survived);
            }
            state.sites.observe(&p.site_moments);
            // innovations by the same weights are one correction of them, not one after another
            match (&mut observed, p.observed) {
                (Some(all), Some(seen)) if all.fits(&seen) => all.merge(seen),
                (_, Some(seen)) => {
                    observed.replace(seen).into_iter().for_each(|all| state.gradient_predictor.observe(all));
                }
                (_, None) => {}
            }
            match p.update.map(|update| update.downcast::<A::Update>()) {
                Some(Ok(update)) => {
                    self.allocator = self.allocator.clone().apply(*update, &Shown::new(&p.shown));
                }
                Some(Err(_)) => {
                    self.monitor.note(Error::ForeignUpdate { allocator: self.allocator.name() });
                    failed = true;
                }
                None => {}
            }
        }
        observed.into_iter().for_each(|all| state.gradient_predictor.observe(all));
        let (steps, sigma) = (state.failed_steps, self.config.estimator.sigma);
        self.monitor.set_ledger(state.ledger.clone());
        self.monitor.set_lr(lr);
        if steps >= self.config.max_failed_steps {
            let evidence = format!("no finite loss in {steps} steps in a row");
            self.monitor.note(Error::Diverged { evidence, sigma, lr });
        }
        self.monitor.give_up();
        !failed
    }
}

/// A batch of what `M` takes on the backend without a graph.
type InnerBatch<B, M> = Batch<
    <<M as AutodiffModule<B>>::InnerModule as ForwardModel<<B as AutodiffBackend>::InnerBackend>>::Input,
    <<M as AutodiffModule<B>>::InnerModule as ForwardModel<<B as AutodiffBackend>::InnerBackend>>::Target,
>;

impl<B, M, A> ForwardLearner<B, M, A>
where
    B: AutodiffBackend,
    M: AutodiffModule<B>,
    M::InnerModule: ForwardModel<B::InnerBackend>,
    A: AutodiffModule<B>,
    A::InnerModule: Allocator<B::InnerBackend>,
{
    /// Whether a step on `batch` works: what never can is found before training.
    ///
    /// It runs a whole step, which costs what a step costs, and keeps nothing of it but cached
    /// prefixes.
    ///
    /// # Errors
    /// Where the step would fail.
    pub fn check(&self, batch: &InnerBatch<B, M>) -> Result<(), Error> {
        let apart = Monitor::default();
        self.run(batch, &self.pending.earlier(), (&apart, &Threads)).map(drop)
    }

    /// One step, after those `earlier` ones that wait for the same update.
    fn run(
        &self,
        batch: &InnerBatch<B, M>,
        earlier: &Earlier,
        (monitor, executor): (&Monitor, &dyn Executor),
    ) -> Result<StepOutcome<B::InnerBackend>, Error> {
        // `valid()` leads to the backend without autodiff: no graph can exist from here on
        let (model, allocator) = (self.model.valid(), self.allocator.valid());
        let step = ForwardStep {
            config: &self.config,
            state: &self.state.value,
            prefixes: &self.prefixes,
            site_checks: &self.site_checks,
            model: &model,
            trained: &trained_parameters(&self.model),
            batch,
            earlier,
            monitor,
            executor,
            memory: &self.workers.memory,
        };
        step.run(&allocator)
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
        let mut earlier = self.pending.earlier();
        let met = self.workers.meet(self.state.value.step, &self.config, self.allocator.name(), self);
        let run = |()| self.run(&batch, &earlier, (&self.monitor, self.workers.executor()));
        match met.and_then(run) {
            Ok(StepOutcome { grads, item, pending, report }) => {
                earlier.add(&pending);
                self.pending.push(Some(pending));
                earlier.ledger.merge(&self.state.value.ledger);
                self.monitor.set_ledger(earlier.ledger);
                if let Some(report) = report {
                    self.monitor.report(report);
                }
                TrainOutput { grads, item }
            }
            Err(error) => {
                self.pending.push(None);
                self.monitor.note(error);
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

impl<B, M, A> InferenceStep for ForwardLearner<B, M, A>
where
    B: Backend,
    M: ForwardModel<B> + ModuleDisplay + 'static,
    A: Module<B> + ModuleDisplay + 'static,
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
        let estimator = &self.config.estimator;
        let (rows, cache) = (estimator.clean_rows(&self.model), &self.prefixes.evaluation);
        let output = infer_cached(&self.model, &batch, rows, estimator.threads, cache);
        if let Some(why) = self.model.failure() {
            self.monitor.note(Error::Model { why });
        }
        StepOutput::clean(&self.model, output, batch.target)
    }
}
