//! The learner: what a step estimates, and what an update commits.
//!
//! `estimate` works on the inner (`valid()`) model, on a backend where no graph can exist. `update`
//! applies Burn's optimizer and commits what the step learned: λ, running variances, the ledger.

use std::sync::Arc;

use burn::module::{AutodiffModule, Module, ModuleDisplay};
use burn::optim::{GradientsParams, Optimizer};
use burn::prelude::*;
use burn::tensor::backend::AutodiffBackend;

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
use super::trainable::TrainBatch;
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
/// It goes into burn-train's `Learner` like any model. In a loop of your own, [`estimate`](Self::estimate)
/// and [`update`](Self::update) are a step; they return errors, and need no burn-train. Parameters that
/// require a gradient are trained; freeze the others with `no_grad`. `B` is an autodiff backend in
/// training, because Burn's optimizers ask for one, but no graph is ever recorded on it. A module at a
/// site has one of its own on the inner backend ([`Probe::module`](crate::Probe::module)).
///
/// Clones share the [`Monitor`], cached prefixes and the check of sites, and nothing else: the clones
/// of a sweep train side by side, each with its own steps. [`apart`](Self::apart) gives a clone its
/// own of these. An update commits the steps of its own learner, or of the one that this was cloned
/// from. Several steps may come before an update (gradient accumulation); each has noise of its own.
/// burn-train's multi-device strategy is [refused](Error::MultiDevice): an
/// [executor](Self::with_executor) shares the jobs of a step instead.
///
/// A record holds all that a step depends on, so a run that resumes from it keeps its bits on the same
/// backend. A record in half precision (Burn's `CompactRecorder`) rounds the parameters: the run goes
/// on, but with other bits, and saving warns through `log`.
///
/// # Panics
/// burn-train's methods return no `Result`. Without an interrupter ([`Monitor::stop_with`]) these
/// panic with an error that [never passes](Error::may_pass):
///
/// - `TrainStep::optimize`, where a step had such an error, for example for a layer that is not
///   called through the probe; [`check`](Self::check) returns that error before training;
/// - `InferenceStep::step`, where no update has told it, or the parts of a batch differ in length.
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
/// use flops_core::allocator::Neyman;
/// use flops_core::{Batch, ForwardConfig, ForwardLearner, QueryBudget};
///
/// type AB = Autodiff<Flex>;
/// let device = Default::default();
/// let model = Model::<AB> { fc: nn::LinearConfig::new(4, 3).init(&device) };
/// let config = ForwardConfig::new(QueryBudget::new(20, 1)?).with_seed(7);
/// let learner = ForwardLearner::new(model, Neyman, config)?;
///
/// // a step of a plain loop; batches lie on the backend without a graph
/// let input = Tensor::<Flex, 2>::ones([2, 4], &device);
/// let batch = Batch { ids: vec![0, 1], input, target: Tensor::zeros([2], &device) };
/// let mut optimizer = AdamConfig::new().init();
/// let step = learner.estimate(&batch)?;
/// let learner = learner.update(&mut optimizer, 1e-3, step.grads)?;
/// assert_eq!(learner.state().step, 1);
/// # Ok::<(), flops_core::Error>(())
/// ```
#[derive(Module, Debug)]
#[module(custom_display)]
pub struct ForwardLearner<B: Backend, M: Module<B>, A: Module<B>> {
    /// The model, with parameters θ.
    pub model: M,
    /// The allocator, with parameters λ.
    pub allocator: A,
    state: Persist<B, LearnerState>,
    #[module(skip)]
    config: Arc<ForwardConfig>,
    #[module(skip)]
    pub(super) monitor: Monitor,
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
    ///
    /// # Errors
    /// The first of those that [`update`](Self::update) has. The monitor has recorded all of them.
    pub(super) fn commit(&mut self, lr: f64, has_gradients: bool) -> Result<bool, Error>
    where
        A: Allocator<B>,
    {
        free_graph_roots(self.state.value.step);
        let taken = usable_rate(lr).and_then(|()| self.pending.take());
        let pending = taken.inspect_err(|error| self.monitor.record(error))?;
        let state = &mut self.state.value;
        if pending.is_empty() {
            state.step += u64::from(has_gradients);
            return Ok(has_gradients);
        }
        state.step += 1;
        let failed = pending.iter().all(|p| p.failed);
        state.failed_steps = if failed { state.failed_steps + 1 } else { 0 };
        let mut observed = None::<Observation>;
        let mut errors = vec![];
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
                Some(Err(_)) => errors.push(Error::ForeignUpdate { allocator: self.allocator.name() }),
                None => {}
            }
        }
        observed.into_iter().for_each(|all| state.gradient_predictor.observe(all));
        let (steps, sigma) = (state.failed_steps, self.config.estimator.sigma);
        self.monitor.set_ledger(state.ledger.clone());
        self.monitor.set_lr(lr);
        if steps >= self.config.max_failed_steps {
            let evidence = format!("no finite loss in {steps} steps in a row");
            errors.push(Error::Diverged { evidence, sigma, lr });
        }
        errors.iter().for_each(|error| self.monitor.record(error));
        errors.into_iter().next().map_or(Ok(!failed), Err)
    }
}

/// Refuses a learning rate that would spoil the parameters.
fn usable_rate(lr: f64) -> Result<(), Error> {
    if lr.is_finite() && lr >= 0.0 {
        return Ok(());
    }
    Err(Error::Setting { name: "lr", value: lr, remedy: "use a finite learning rate, 0 or above".into() })
}

/// The estimate of a step, before its update.
#[non_exhaustive]
pub struct EstimatedStep<P: Backend> {
    /// The gradients by parameter; empty if no loss was finite, and the model stays as it is.
    pub grads: GradientsParams,
    /// Losses and figures.
    pub output: StepOutput<P>,
}

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
    pub fn check(&self, batch: &TrainBatch<B, M>) -> Result<(), Error> {
        let apart = Monitor::default();
        self.run(batch, &self.pending.earlier(), (&apart, &Threads)).map(drop)
    }

    /// Estimates the gradients of a batch, on the backend without a graph.
    ///
    /// What the step learned waits for the next [`update`](Self::update). Several steps may come before
    /// it: add up their gradients.
    ///
    /// # Errors
    /// Where settings are unusable, the batch is empty or its parts differ in length, some losses are
    /// not finite, or the model fails. After an error that [may pass](Error::may_pass) training can go
    /// on with another batch.
    pub fn estimate(&self, batch: &TrainBatch<B, M>) -> Result<EstimatedStep<B::InnerBackend>, Error>
    where
        M: ModuleDisplay,
        A: Allocator<B>,
    {
        let mut earlier = self.pending.earlier();
        let met = self.workers.meet(self.state.value.step, &self.config, self.allocator.name(), self);
        let run = |()| self.run(batch, &earlier, (&self.monitor, self.workers.executor()));
        let outcome = met.and_then(run).inspect_err(|error| {
            self.pending.push(None);
            self.monitor.record(error);
        })?;
        let StepOutcome { grads, item, pending, report } = outcome;
        earlier.add(&pending);
        self.pending.push(Some(pending));
        earlier.ledger.merge(&self.state.value.ledger);
        self.monitor.set_ledger(earlier.ledger);
        if let Some(report) = report {
            self.monitor.report(report);
        }
        Ok(EstimatedStep { grads, output: item })
    }

    /// Updates the model by the gradients, and commits what the steps since the last update learned.
    ///
    /// `lr` is the learning rate, finite and at least 0.
    ///
    /// # Errors
    /// - [`Error::Setting`] for any other learning rate, which would spoil the parameters;
    /// - [`Error::Diverged`] where too many steps in a row had no finite loss
    ///   ([`max_failed_steps`](ForwardConfig::max_failed_steps));
    /// - [`Error::ForeignUpdate`] where the allocator cannot take an update that it made itself;
    /// - [`Error::MultiDevice`] where clones of this learner have stepped, and not itself.
    pub fn update<O>(mut self, optimizer: &mut O, lr: f64, grads: GradientsParams) -> Result<Self, Error>
    where
        A: Allocator<B>,
        Self: AutodiffModule<B>,
        O: Optimizer<Self, B>,
    {
        let updates = self.commit(lr, !grads.is_empty())?;
        Ok(if updates { optimizer.step(lr, self, grads) } else { self })
    }

    /// One step, after those `earlier` ones that wait for the same update.
    fn run(
        &self,
        batch: &TrainBatch<B, M>,
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

impl<B: Backend, M: ForwardModel<B>, A: Module<B>> ForwardLearner<B, M, A> {
    /// Evaluates a batch by an unperturbed pass, from cached prefixes where there are any.
    ///
    /// # Errors
    /// Where the batch is empty or its parts differ in length, or the model fails.
    pub fn evaluate(&self, batch: Batch<M::Input, M::Target>) -> Result<StepOutput<B>, Error> {
        let run = || {
            batch.check()?;
            let estimator = &self.config.estimator;
            let (rows, cache) = (estimator.clean_rows(&self.model), &self.prefixes.evaluation);
            let output = infer_cached(&self.model, &batch, rows, estimator.threads, cache);
            match self.model.failure() {
                Some(why) => Err(Error::Model { why }),
                None => Ok(output),
            }
        };
        let output = run().inspect_err(|error| self.monitor.record(error))?;
        Ok(StepOutput::clean(&self.model, output, batch.target))
    }
}
