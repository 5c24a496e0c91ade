//! The only seam with burn-train: a [`TrainStep`] that replaces autodiff.
//!
//! `step` walks: clean pass → variances predicted → λ updated and queries allocated → queries → gradients. It works on the inner
//! (`valid()`) model and on its plain backend, where a graph cannot exist. `optimize` applies Burn's optimizer and puts in what the
//! step learned: λ, running variances, the ledger.

mod config;
mod monitor;

use std::any::Any;
use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard};

use burn::module::{AutodiffModule, Module, ModuleDisplay, ParamId};
use burn::optim::{GradientsParams, MultiGradientsParams, Optimizer};
use burn::prelude::*;
use burn::tensor::backend::AutodiffBackend;
use burn::train::{InferenceStep, TrainOutput, TrainStep};
use rand::SeedableRng;
use rand::rngs::StdRng;
use serde::{Deserialize, Serialize};

use crate::allocator::{AllocationReport, Allocator, DatumFeatures, Embeddings};
use crate::backprop::report;
use crate::batch::Batch;
use crate::budget::{Allocation, Ledger, Phase, QueryBudget};
use crate::diagnostics::resident_memory;
use crate::error::Error;
use crate::estimator::{CleanPass, Estimate, Estimator, Space, trained_parameters};
use crate::feedback::{ControlVariate, FeedbackTracker, Observation};
use crate::metric::{StepOutput, StepStats};
use crate::noise::{Placement, derive};
use crate::objective::{ForwardModel, infer_again};
use crate::ops;
use crate::persist::Persist;
use crate::probe::PrefixCache;
use crate::variance::{SiteTracker, VarianceEstimate, VarianceTracker, loss_proxy};

pub use config::{ForwardConfig, Normalisation};
pub use monitor::{DatumReport, Monitor, StepReport};

/// Separates the allocator's random numbers from the noise of the same seed.
const ALLOCATE: u64 = u64::from_le_bytes(*b"allocate");
/// Separates the noise of pilots from that of the allocated queries.
const PILOT: u64 = u64::from_le_bytes(*b"pilotqry");

/// State that a checkpoint carries beside θ and λ.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct LearnerState {
    /// Steps taken.
    pub step: u64,
    /// Queries, row-forwards and seconds so far.
    pub ledger: Ledger,
    /// Running variances.
    pub variances: VarianceTracker,
    /// Running second moments of the sites.
    pub sites: SiteTracker,
    /// The control variate's regression.
    pub feedback: FeedbackTracker,
    /// Steps in a row without a finite loss.
    pub failed_steps: usize,
}

/// What a step leaves for `optimize`, in the order of its first datum's id.
#[derive(Debug)]
struct Pending {
    first: u64,
    /// The allocator's update; its type is the allocator's, which a module and its `valid()` share.
    update: Option<Box<dyn Any + Send>>,
    ids: Vec<u64>,
    difficulty: Vec<f64>,
    second_moments: Vec<f64>,
    site_moments: Vec<(f64, u64)>,
    observed: Option<Observation>,
    survived: Vec<usize>,
    ledger: Vec<(Phase, u64, u64, std::time::Duration)>,
    failed: bool,
}

/// Trains a [`ForwardModel`] from forward passes alone; goes into burn-train's `Learner` like any model.
///
/// `B` is an autodiff backend in training, because burn-train asks for one; no graph is ever recorded on it. Trained are the
/// parameters that require a gradient: freeze the others with `no_grad`.
///
/// # Example
/// ```
/// # use burn::{backend::{Autodiff, Flex}, nn, prelude::*};
/// # use flops_core::{ForwardModel, Probe, cross_entropy};
/// # #[derive(Module, Debug)]
/// # struct Model<B: Backend> { fc: nn::Linear<B> }
/// # impl<B: Backend> ForwardModel<B> for Model<B> {
/// #     type Input = Tensor<B, 2>; type Target = Tensor<B, 1, Int>; type Output = Tensor<B, 2>;
/// #     fn forward(&self, x: Tensor<B, 2>, probe: &mut Probe<B>) -> Tensor<B, 2> { probe.linear(&self.fc, x) }
/// #     fn losses(&self, y: Tensor<B, 2>, t: Tensor<B, 1, Int>) -> Tensor<B, 1> { cross_entropy(y, t) }
/// # }
/// use burn::optim::AdamConfig;
/// use burn::train::TrainStep;
/// use flops_core::allocator::GaussianAllocatorConfig;
/// use flops_core::{Batch, ForwardConfig, ForwardLearner, QueryBudget};
///
/// type AB = Autodiff<Flex>;
/// let device = Default::default();
/// let model = Model::<AB> { fc: nn::LinearConfig::new(4, 3).init(&device) };
/// let config = ForwardConfig::new(QueryBudget::new(20, 1)?).with_seed(7);
/// let learner = ForwardLearner::new(model, GaussianAllocatorConfig::new().init(&device)?, config)?;
///
/// // what burn-train does with it, once per batch (on the backend without a graph)
/// let batch = Batch { ids: vec![0, 1], input: Tensor::<Flex, 2>::ones([2, 4], &device), target: Tensor::zeros([2], &device) };
/// let mut optimizer = AdamConfig::new().init();
/// let output = learner.step(batch);
/// let learner = learner.optimize::<AB, _>(&mut optimizer, 1e-3, output.grads);
/// assert_eq!(learner.state().step, 1);
/// # Ok::<(), flops_core::Error>(())
/// ```
#[derive(Module, Debug)]
pub struct ForwardLearner<B: Backend, M: Module<B>, A: Module<B>> {
    /// The model, θ.
    pub model: M,
    /// The allocator, λ.
    pub allocator: A,
    state: Persist<B, LearnerState>,
    #[module(skip)]
    config: Arc<ForwardConfig>,
    #[module(skip)]
    monitor: Monitor,
    #[module(skip)]
    pending: Arc<Mutex<Vec<Pending>>>,
    #[module(skip)]
    prefixes: Arc<PrefixCache>,
    #[module(skip)]
    evaluated: Arc<PrefixCache>,
}

impl<B: Backend, M: Module<B>, A: Module<B>> ForwardLearner<B, M, A> {
    /// A learner for `model`.
    ///
    /// # Errors
    /// Where a setting is out of its range.
    pub fn new(model: M, allocator: A, config: ForwardConfig) -> Result<Self, Error> {
        config.validate()?;
        // lazily made parameters would differ between clones
        let _ = model.num_params();
        Ok(Self {
            model,
            allocator,
            state: Persist::new(LearnerState::default()),
            prefixes: Arc::new(PrefixCache::new(config.prefix_cache)),
            evaluated: Arc::new(PrefixCache::new(config.evaluation_cache)),
            monitor: Monitor::of(&config),
            config: Arc::new(config),
            pending: Arc::default(),
        })
    }

    /// Shares the frozen prefixes that `other` keeps: for several runs on the same data, from the same frozen parameters.
    ///
    /// They are used as long as the same parameters are trained, by their ids.
    pub fn with_prefixes_of<A2: Module<B>>(mut self, other: &ForwardLearner<B, M, A2>) -> Self {
        self.prefixes = other.prefixes.clone();
        self
    }

    /// The handle on this learner and all its clones.
    pub fn monitor(&self) -> Monitor {
        self.monitor.clone()
    }

    /// What is saved beside θ and λ.
    pub fn state(&self) -> &LearnerState {
        &self.state.value
    }

    /// How it spends its queries.
    pub fn config(&self) -> &ForwardConfig {
        &self.config
    }

    fn pending(&self) -> MutexGuard<'_, Vec<Pending>> {
        self.pending.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// A matrix on the host as allocators take it.
fn view(given: &Option<(usize, Vec<f32>)>) -> Result<Option<Embeddings<'_>>, Error> {
    given.as_ref().map(|(dim, values)| Embeddings::new(values, *dim)).transpose()
}

/// Second moments of pilots; those of data without any surviving pilot are the mean of the others'.
fn known(moments: &[f64]) -> Vec<f64> {
    let finite = || moments.iter().filter(|m| m.is_finite());
    let mean = finite().sum::<f64>() / finite().count().max(1) as f64;
    moments.iter().map(|&m| if m.is_finite() { m } else { mean }).collect()
}

/// What a forward-only step gives: gradients, report, and what `optimize` is to take in.
struct Stepped<B: Backend> {
    grads: GradientsParams,
    item: StepOutput<B>,
    pending: Pending,
    report: Option<StepReport>,
}

impl<B: Backend, M, A> ForwardLearner<B, M, A>
where
    M: Module<B>,
    A: Module<B>,
{
    /// One step on the plain backend `P`, with the model and the allocator as they are there.
    fn forward_step<P: Backend, F: ForwardModel<P>, G: Allocator<P>>(
        &self,
        model: &F,
        allocator: &G,
        trained: &Arc<HashSet<ParamId>>,
        batch: Batch<F::Input, F::Target>,
    ) -> Result<Stepped<P>, Error> {
        let estimator = &self.config.estimator;
        let state = &self.state.value;
        let mut clean = estimator.clean_from(model, &batch, trained, self.prefixes.get(&batch.ids, trained))?;
        let reaches_all = clean.reaches_all(trained);
        if reaches_all {
            self.prefixes.keep(&batch.ids, trained, &clean.stages.frozen());
        }
        // an evaluation does not know what is trained: where it must not keep anything, nothing is
        self.evaluated.turn_to(if reaches_all { trained.clone() } else { Arc::default() });
        let classification = model.classification(&clean.output, &clean.target);
        let device = Default::default();
        let losses = clean.losses.iter().map(|&l| l as f32).collect::<Vec<_>>();
        let mut item =
            StepOutput { losses: ops::from_host(losses, [batch.ids.len()], &device), classification, stats: None };
        let mut pending = Pending {
            first: batch.ids[0],
            update: None,
            ids: batch.ids.clone(),
            difficulty: clean.difficulty.clone(),
            second_moments: vec![],
            site_moments: vec![],
            observed: None,
            survived: vec![],
            ledger: vec![(Phase::Clean, 0, clean.cost.rows, clean.cost.elapsed)],
            failed: true,
        };

        let broken: Vec<u64> =
            batch.ids.iter().zip(&clean.losses).filter(|(_, l)| !l.is_finite()).map(|(&id, _)| id).collect();
        if broken.len() == batch.ids.len() {
            // the model, not a datum, is at fault
            return Ok(Stepped { grads: GradientsParams::new(), item, pending, report: None });
        }
        if !broken.is_empty() {
            let mut ids = broken.iter().take(5).map(u64::to_string).collect::<Vec<_>>().join(", ");
            if broken.len() > 5 {
                ids += ", …";
            }
            return Err(Error::NonFiniteData { count: broken.len(), ids });
        }

        let budget = &self.prepare(model, &mut clean);
        let pilots = self.pilots(model, &batch, trained, &clean)?;
        if let Some((queries, pilots)) = &pilots {
            let spent = (batch.ids.len() * queries) as u64;
            pending.ledger.push((Phase::Pilot, spent, pilots.queries.rows, pilots.queries.elapsed));
            pending.ledger.push((Phase::Update, 0, pilots.update.rows, pilots.update.elapsed));
        }
        let (allocation, update) = self.allocate(model, allocator, &batch, &clean, budget, pilots.as_ref())?;
        pending.update = Some(Box::new(update));

        let mut estimate = estimator.estimate(model, &batch, trained, &clean, &allocation, state.step)?;
        pending.ledger.push((Phase::Query, allocation.total() as u64, estimate.queries.rows, estimate.queries.elapsed));
        pending.ledger.push((Phase::Update, 0, estimate.update.rows, estimate.update.elapsed));
        // of the allocated queries alone: pilots decided the allocation, and would flatter it
        let measured: Vec<f64> = estimate.second_moments.iter().map(|&m| if m.is_finite() { m } else { 0.0 }).collect();
        let allocation = match pilots {
            Some((queries, pilots)) => {
                estimate = pilots.mix(estimate, queries as f64 / budget.queries_per_datum() as f64);
                allocation.with_more(queries)
            }
            None => allocation,
        };
        let queries = allocation.total() as u64;
        pending.second_moments = estimate.second_moments.clone();
        pending.site_moments = estimate.site_moments.clone();
        pending.observed = estimate.observed.take();
        pending.survived = estimate.survived.clone();
        pending.failed = estimate.survived.iter().all(|&n| n == 0);
        let spent = estimate.proxy(&measured, &allocation);
        // of the estimate itself, before anything is done for the optimizer
        let squared_norm = estimate.squared_norm();
        if self.config.normalisation == Normalisation::LossSpread {
            estimate.normalise(estimator.sigma);
        }
        let independent = estimator.space.is_independent();
        let report = StepReport {
            step: state.step,
            loss: clean.losses.iter().sum::<f64>() / clean.losses.len() as f64,
            batch_size: batch.ids.len(),
            queries,
            queries_total: state.ledger.total().queries + queries,
            dropped: estimate.dropped,
            squared_norm,
            variance: if independent { spent / (batch.ids.len() as f64).powi(2) } else { f64::NAN },
            rows: estimate.queries.largest.max(clean.cost.largest),
            memory: resident_memory(),
            data: (0..batch.ids.len())
                .map(|j| DatumReport {
                    id: batch.ids[j],
                    loss: clean.losses[j],
                    queries: allocation.counts()[j],
                    second_moment: measured[j],
                })
                .collect(),
            allocation: AllocationReport::of(&measured, spent, &allocation, budget)?,
        };
        item.stats = Some(StepStats::of(&report));
        let grads = if pending.failed { GradientsParams::new() } else { estimate.into_params(model) };
        Ok(Stepped { grads, item, pending, report: Some(report) })
    }

    /// What is known before any query: the control variate's prediction, the probabilities of the sites, and the budget in queries.
    fn prepare<P: Backend, F: ForwardModel<P>>(
        &self,
        model: &F,
        clean: &mut CleanPass<P, F::Output, F::Target>,
    ) -> QueryBudget {
        let ForwardConfig { estimator, budget, control_variate, .. } = &*self.config;
        let state = &self.state.value;
        if *control_variate == ControlVariate::Feedback && estimator.space == Space::Activation {
            let signals = model.error_signals(&clean.output, &clean.target);
            clean.prediction = signals.and_then(|s| state.feedback.predict(s)).map(Arc::new);
        }
        if estimator.placement == Placement::Staged && !clean.site_costs.is_empty() {
            clean.site_probabilities = state.sites.probabilities(&clean.site_costs);
            // passes instead of queries: as many of these as A₀ full ones are worth
            let cost = clean.site_probabilities.iter().zip(&clean.site_costs).map(|(p, cost)| p * cost).sum();
            budget.at_cost(cost)
        } else {
            clean.site_probabilities = state.sites.probabilities(&vec![1.0; clean.site_costs.len()]);
            *budget
        }
    }

    /// Pilots, where variances are estimated from some: their number per datum and an estimate of its own, of noise of its own.
    fn pilots<P: Backend, F: ForwardModel<P>>(
        &self,
        model: &F,
        batch: &Batch<F::Input, F::Target>,
        trained: &Arc<HashSet<ParamId>>,
        clean: &CleanPass<P, F::Output, F::Target>,
    ) -> Result<Option<(usize, Estimate<P>)>, Error> {
        let VarianceEstimate::Pilot(queries) = self.config.variance else { return Ok(None) };
        let shares = Allocation::uniform(batch.ids.len(), &QueryBudget::new(queries, queries)?);
        let estimator = &self.config.estimator;
        let estimator = Estimator { seed: derive(&[estimator.seed, PILOT]), ..estimator.clone() };
        let estimate = estimator.estimate(model, batch, trained, clean, &shares, self.state.value.step)?;
        Ok(Some((queries, estimate)))
    }

    /// Estimates Tr Σ_j, updates λ, and draws the allocation of what the pilots left.
    fn allocate<P: Backend, F: ForwardModel<P>, G: Allocator<P>>(
        &self,
        model: &F,
        allocator: &G,
        batch: &Batch<F::Input, F::Target>,
        clean: &CleanPass<P, F::Output, F::Target>,
        budget: &QueryBudget,
        pilots: Option<&(usize, Estimate<P>)>,
    ) -> Result<(Allocation, G::Update), Error> {
        let state = &self.state.value;
        let variances = match (pilots, self.config.variance) {
            (Some((_, estimate)), _) => known(&estimate.second_moments),
            (None, VarianceEstimate::Loss) => loss_proxy(&clean.losses),
            (None, _) => state.variances.predict(&batch.ids, &clean.difficulty),
        };
        let matrix = |t: &Tensor<P, 2>| (t.dims()[1], t.to_data().iter::<f32>().collect::<Vec<_>>());
        let embedded = clean.embeddings.as_ref().map(matrix);
        let extra = model.allocation_features(&clean.output, &clean.target).as_ref().map(matrix);
        let features = DatumFeatures {
            losses: &clean.losses,
            variances: &variances,
            embeddings: view(&embedded)?,
            extra: view(&extra)?,
        };
        let rest = match pilots {
            Some((queries, _)) => budget.after_pilots(*queries)?,
            None => *budget,
        };
        let key = [self.config.estimator.seed, state.step, batch.ids[0], ALLOCATE];
        allocator.allocate(&features, &rest, &mut StdRng::seed_from_u64(derive(&key)))
    }

    /// Takes in what the steps since the last update left.
    fn advance(&mut self, lr: f64) -> bool
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
        let failed = pending.iter().all(|p| p.failed);
        state.failed_steps = if failed { state.failed_steps + 1 } else { 0 };
        for p in pending {
            for (phase, queries, rows, elapsed) in p.ledger {
                state.ledger.add(phase, queries, rows, elapsed);
            }
            state.variances.observe(&p.ids, &p.difficulty, &p.second_moments, &p.survived);
            state.sites.observe(&p.site_moments);
            if let Some(observed) = p.observed {
                state.feedback.observe(observed);
            }
            if let Some(update) = p.update.and_then(|u| u.downcast::<A::Update>().ok()) {
                self.allocator = self.allocator.clone().apply(*update);
            }
        }
        let (steps, sigma) = (state.failed_steps, self.config.estimator.sigma);
        self.monitor.spent(&state.ledger);
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
        // from here on the backend is a plain one: no graph can exist
        let (model, allocator) = (self.model.valid(), self.allocator.valid());
        match self.forward_step(&model, &allocator, &trained_parameters(&self.model), batch) {
            Ok(stepped) => {
                self.pending().push(stepped.pending);
                if let Some(report) = stepped.report {
                    self.monitor.report(report);
                }
                TrainOutput { grads: stepped.grads, item: stepped.item }
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
        if self.advance(lr) { optim.step(lr, self, grads) } else { self }
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
        if self.advance(lr) { optim.step_multi(lr, self, grads) } else { self }
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
        let output =
            infer_again(&self.model, &batch, estimator.clean_rows(&self.model), estimator.threads, &self.evaluated);
        if let Some(why) = self.model.failure() {
            self.monitor.fail(Error::Model { why });
        }
        report(&self.model, output, batch.target)
    }
}

#[cfg(test)]
mod half;
#[cfg(test)]
mod tests;
