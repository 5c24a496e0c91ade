//! One forward-only step, on a backend without a graph.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;

use burn::module::ParamId;
use burn::optim::GradientsParams;
use burn::prelude::*;
use rand::SeedableRng;
use rand::rngs::StdRng;
use web_time::Instant;

use super::config::ForwardConfig;
use super::diagnostics::resident_memory;
use super::monitor::Monitor;
use super::output::{StepOutput, StepStats};
use super::pending::Earlier;
use super::prefixes::PrefixCaches;
use super::repeat::loss_noise;
use super::report::{DatumReport, StepReport};
use super::site_checks::SiteChecks;
use super::state::{LearnerState, Pending};
use crate::allocator::{Allocation, AllocationReport, Allocator, DatumFeatures, Embeddings, QueryBudget};
use crate::batch::Batch;
use crate::control_variate::ControlVariate;
use crate::error::Error;
use crate::estimator::{CleanMemory, CleanPass, Codec, CutPasses, Estimate, Normalisation, PassCost, Rounds};
use crate::executor::{Executor, RoundPhase};
use crate::ledger::Phase;
use crate::model::ForwardModel;
use crate::noise::Placement;
use crate::ops;
use crate::probe::TracedSite;
use crate::random::derive_seed;
use crate::variance::VarianceSource;
use crate::wire::{Reader, Writer};

/// Separates the allocator's random numbers from the noise of the same seed.
const ALLOCATE: u64 = u64::from_le_bytes(*b"allocate");
/// Separates the noise of pilots from the noise of the allocated queries.
const PILOT: u64 = u64::from_le_bytes(*b"pilotqry");
/// Separates the noise of further steps before one update from that of the first.
const AGAIN: u64 = u64::from_le_bytes(*b"further.");
/// Steps from one look at the noise of the loss itself to the next.
const REPEAT_EVERY: u64 = 1000;

/// Result of a step: gradients, output for the metrics, and what the update commits.
pub(super) struct StepOutcome<P: Backend> {
    /// Gradient estimate; empty if the step failed.
    pub grads: GradientsParams,
    /// Output for the metrics.
    pub item: StepOutput<P>,
    /// What the step learned.
    pub pending: Pending,
    /// `None` if no clean loss was finite.
    pub report: Option<StepReport>,
}

/// Pilot queries: an estimate of their own, from noise of their own.
struct Pilots<P: Backend> {
    /// Pilots of each example.
    queries: usize,
    estimate: Estimate<P>,
}

/// The estimate of a step, pilots and allocated queries combined.
struct Estimated<P: Backend> {
    estimate: Estimate<P>,
    /// Queries of each example, pilots included.
    allocation: Allocation,
    /// Second moments measured by the allocated queries alone; 0 where none survived.
    ///
    /// Pilots are left out: they decided the allocation and would flatter it.
    measured: Vec<f64>,
}

/// One step, with everything it reads. It changes nothing but the caches.
pub(super) struct ForwardStep<'a, P: Backend, F: ForwardModel<P>> {
    pub config: &'a ForwardConfig,
    pub state: &'a LearnerState,
    pub prefixes: &'a PrefixCaches,
    pub site_checks: &'a SiteChecks,
    pub model: &'a F,
    pub trained: &'a Arc<HashSet<ParamId>>,
    pub batch: &'a Batch<F::Input, F::Target>,
    /// Steps since the last update.
    pub earlier: &'a Earlier,
    pub monitor: &'a Monitor,
    /// Runs the jobs.
    pub executor: &'a dyn Executor,
    pub memory: &'a CleanMemory,
}

impl<'a, P: Backend, F: ForwardModel<P>> ForwardStep<'a, P, F> {
    /// Clean pass, allocation, queries, gradients.
    ///
    /// # Errors
    /// Where settings are unusable, the batch is empty, some clean losses are not finite, or the
    /// model fails.
    pub fn run<G: Allocator<P>>(&self, allocator: &G) -> Result<StepOutcome<P>, Error> {
        let mut clean = self.clean_pass()?;
        let mut outcome = self.outcome(&clean);
        if !self.has_finite_loss(&clean)? {
            return Ok(outcome);
        }
        if !self.model.skips_site_check() {
            self.site_checks.once(self.trained, || self.check_sites(&clean))?;
        }
        let pending = &mut outcome.pending;
        let loss_noise = self.loss_noise(&clean, pending)?;
        let budget = &self.prepare(&mut clean)?;
        let pilots = self.pilots(&clean, pending)?;
        let (allocation, update) = self.allocate(allocator, &clean, budget, pilots.as_ref())?;
        pending.update = Some(Box::new(update));
        let mut estimated = self.estimate(&clean, allocation, budget, pilots, pending)?;
        let report = StepReport { loss_noise, ..self.report(&clean, &estimated, budget)? };
        pending.observed = estimated.estimate.observed.take();
        if !pending.failed {
            outcome.grads = self.gradients(estimated.estimate);
        }
        outcome.item.stats = Some(StepStats::of(&report));
        outcome.report = Some(report);
        Ok(outcome)
    }

    /// The clean pass, from cached prefixes where there are any.
    fn clean_pass(&self) -> Result<CleanPass<'a, P, F>, Error> {
        let &Self { prefixes, model, trained, batch, config, .. } = self;
        let max_rows = config.estimator.clean_rows(model);
        let cut: CutPasses<'a> = Box::new(move |examples| prefixes.passes((batch, examples), trained, max_rows));
        let memory = self.memory.clone();
        let clean =
            config.estimator.clean_from(model, batch, trained, (cut, self.mask_key(), self.rounds(), memory))?;
        prefixes.update(batch, trained, clean.stages.here(), clean.reaches_all());
        Ok(clean)
    }

    /// The rounds of this step.
    fn rounds(&self) -> Rounds<'a> {
        Rounds::new(self.executor, self.state.step, self.earlier.steps)
    }

    /// Whether parameters act through their sites alone, as one worker finds out for all.
    fn check_sites(&self, clean: &CleanPass<'_, P, F>) -> Result<(), Error> {
        let mut run = |_: &[usize], take: &mut (dyn FnMut(usize, Numbers<0>) + Send)| {
            clean.check_sites()?;
            take(0, Numbers([]));
            Ok(())
        };
        self.rounds().gather((RoundPhase::SiteCheck, &self.batch.ids, 1), &mut run, &NumbersCodec).map(drop)
    }

    /// The outcome as it is before any query: a failed step that cost a clean pass.
    fn outcome(&self, clean: &CleanPass<'_, P, F>) -> StepOutcome<P> {
        let ids = &self.batch.ids;
        let classification = self.model.classification(&clean.output, &clean.target);
        let losses: Vec<f32> = clean.losses.iter().map(|&l| l as f32).collect();
        let losses = ops::from_host(losses, [ids.len()], &Default::default());
        let pending = Pending {
            update: None,
            shown: vec![],
            ids: ids.clone(),
            losses: clean.losses.clone(),
            variance_covariate: clean.variance_covariate.clone(),
            second_moments: vec![],
            site_moments: vec![],
            observed: None,
            survived: vec![],
            costs: vec![(Phase::Clean, 0, clean.cost)],
            failed: true,
        };
        let item = StepOutput { losses, classification, stats: None };
        StepOutcome { grads: GradientsParams::new(), item, pending, report: None }
    }

    /// Whether the step can go on: false if no clean loss is finite after an update.
    ///
    /// # Errors
    /// [`Error::NonFiniteData`] if losses are not finite that no step has seen before: the examples
    /// are at fault. [`Error::Diverged`] if they were finite before, or if the others explode. Before
    /// the first update it is always the former.
    fn has_finite_loss(&self, clean: &CleanPass<'_, P, F>) -> Result<bool, Error> {
        let ids = &self.batch.ids;
        let finite = clean.losses.iter().filter(|loss| loss.is_finite()).count();
        let updated = self.state.step > 0;
        if finite == 0 && updated {
            return Ok(false);
        }
        let broken = self.monitor.see_losses(ids, &clean.losses, updated, self.config.estimator.sigma);
        broken.map_or(Ok(true), Err)
    }

    /// The standard deviation of the loss itself: examples evaluated again, without noise.
    ///
    /// It is looked at in every 1,000th step, and the ledger counts its rows.
    fn loss_noise(&self, clean: &CleanPass<'_, P, F>, pending: &mut Pending) -> Result<Option<f64>, Error> {
        if !self.state.step.is_multiple_of(REPEAT_EVERY) || self.earlier.steps > 0 {
            return Ok(None);
        }
        let start = Instant::now();
        let mut run = |_: &[usize], take: &mut (dyn FnMut(usize, Numbers<2>) + Send)| {
            let (noise, rows) = loss_noise(self.model, &self.batch.input, &clean.target, &clean.losses)?;
            take(0, Numbers([noise, rows as f64]));
            Ok(())
        };
        let found = self.rounds().gather((RoundPhase::Repeat, &self.batch.ids, 1), &mut run, &NumbersCodec)?;
        let Some(Numbers([noise, rows])) = found.into_iter().next() else { return Ok(None) };
        let cost = PassCost { rows: rows as u64, elapsed: start.elapsed(), largest: rows as u64 };
        pending.costs.push((Phase::Clean, 0, cost));
        Ok(Some(noise))
    }

    /// The seed of the noise of this step.
    ///
    /// Steps before one update share the step's number, so that each further one has a seed of its
    /// own.
    fn seed(&self) -> u64 {
        let seed = self.config.estimator.seed;
        if self.earlier.steps == 0 { seed } else { derive_seed(&[seed, AGAIN, self.earlier.steps]) }
    }

    /// The key of the dropout masks: the step's number, and for further steps before one update a
    /// key of their own.
    fn mask_key(&self) -> u64 {
        let (step, earlier) = (self.state.step, self.earlier.steps);
        if earlier == 0 { step } else { derive_seed(&[step, AGAIN, earlier]) }
    }

    /// Sets the control variate's prediction and the probabilities of the sites; returns the budget
    /// in queries.
    ///
    /// # Errors
    /// [`Error::NoSignals`] for a biased estimate of a model without error signals, which would learn
    /// nothing.
    fn prepare(&self, clean: &mut CleanPass<'_, P, F>) -> Result<QueryBudget, Error> {
        let ForwardConfig { estimator, budget, .. } = self.config;
        let (model, state) = (self.model, self.state);
        let kind = estimator.space.estimate();
        if let Some(control_variate) = estimator.space.control_variate() {
            let predicts = control_variate == ControlVariate::Prediction;
            let signals = predicts.then(|| model.error_signals(&clean.output, &clean.target)).flatten();
            if predicts && kind.is_biased() && signals.is_none() {
                return Err(Error::NoSignals { estimate: kind.name() });
            }
            let outputs = signals.as_ref().and_then(|_| model.signal_outputs(&clean.output, &clean.target));
            let predicted = state.gradient_predictor.predict(signals, outputs, clean.sites(), kind);
            clean.set_prediction(predicted);
        }
        let (sites, costs) = (clean.sites(), clean.site_costs());
        if kind.is_biased() && estimator.space.placement() == Some(Placement::Single) {
            let probabilities = learning_probabilities(sites);
            clean.set_site_probabilities(probabilities)?;
            return Ok(*budget);
        }
        if estimator.space.placement() == Some(Placement::CostWeighted) && !costs.is_empty() {
            let probabilities = state.sites.probabilities(sites, costs);
            // the budget counts whole passes; a query that starts late costs less than one
            clean.set_site_probabilities(probabilities)?;
            Ok(budget.at_cost(clean.mean_cost()))
        } else {
            clean.set_site_probabilities(state.sites.probabilities(sites, &vec![1.0; costs.len()]))?;
            Ok(*budget)
        }
    }

    /// Pilot queries, where [`VarianceSource::Pilot`] asks for them.
    fn pilots(&self, clean: &CleanPass<'_, P, F>, pending: &mut Pending) -> Result<Option<Pilots<P>>, Error> {
        let VarianceSource::Pilot(queries) = self.config.variance else { return Ok(None) };
        let examples = self.batch.ids.len();
        let allocation = Allocation::uniform(examples, &QueryBudget::new(queries, queries)?);
        let seed = derive_seed(&[self.seed(), PILOT]);
        let phases = (RoundPhase::Pilot, RoundPhase::PilotUpdate);
        let estimate = clean.estimate_in_rounds(seed, &allocation, self.state.step, phases)?;
        pending.costs.push((Phase::Pilot, (examples * queries) as u64, estimate.queries));
        pending.costs.push((Phase::Update, 0, estimate.update));
        Ok(Some(Pilots { queries, estimate }))
    }

    /// Estimates Tr Σ_j and lets the allocator spend what the pilots left.
    fn allocate<G: Allocator<P>>(
        &self,
        allocator: &G,
        clean: &CleanPass<'_, P, F>,
        budget: &QueryBudget,
        pilots: Option<&Pilots<P>>,
    ) -> Result<(Allocation, G::Update), Error> {
        let (state, batch) = (self.state, self.batch);
        let variances = match (pilots, self.config.variance) {
            (Some(pilots), _) => fill_missing(&pilots.estimate.second_moments),
            (None, VarianceSource::Loss) => state.loss_excess.predict(&clean.losses),
            (None, _) => state.variances.predict(&batch.ids, &clean.variance_covariate),
        };
        let matrix = |t: &Tensor<P, 2>| (t.dims()[1], t.to_data().iter::<f32>().collect::<Vec<_>>());
        // what the allocator does not look at stays on the device
        let needs = allocator.needs();
        let embedded = clean.embeddings.as_ref().filter(|_| needs.embeddings).map(matrix);
        let extra = needs.extra.then(|| self.model.allocation_features(&clean.output, &clean.target)).flatten();
        let extra = extra.as_ref().map(matrix);
        let features = DatumFeatures {
            losses: &clean.losses,
            variances: &variances,
            embeddings: as_embeddings(&embedded)?,
            extra: as_embeddings(&extra)?,
        };
        let rest = match pilots {
            Some(pilots) => budget.after_pilots(pilots.queries)?,
            None => *budget,
        };
        let key = [self.seed(), state.step, batch.ids[0], ALLOCATE];
        allocator.allocate(&features, &rest, &mut StdRng::seed_from_u64(derive_seed(&key)))
    }

    /// Evaluates the allocated queries and combines them with the pilots.
    fn estimate(
        &self,
        clean: &CleanPass<'_, P, F>,
        mut allocation: Allocation,
        budget: &QueryBudget,
        pilots: Option<Pilots<P>>,
        pending: &mut Pending,
    ) -> Result<Estimated<P>, Error> {
        let mut estimate = clean.estimate_with_seed(self.seed(), &allocation, self.state.step)?;
        pending.costs.push((Phase::Query, allocation.total() as u64, estimate.queries));
        pending.costs.push((Phase::Update, 0, estimate.update));
        pending.shown = estimate.second_moments.clone();
        let measured = estimate.second_moments.iter().map(|&m| if m.is_finite() { m } else { 0.0 }).collect();
        if let Some(pilots) = pilots {
            let weight = pilots.queries as f64 / budget.queries_per_datum() as f64;
            estimate = pilots.estimate.combine(estimate, weight);
            allocation = allocation.with_more(pilots.queries);
        }
        pending.second_moments = estimate.second_moments.clone();
        pending.site_moments = estimate.site_moments.clone();
        pending.survived = estimate.survived.clone();
        pending.failed = estimate.survived.iter().all(|&n| n == 0);
        Ok(Estimated { estimate, allocation, measured })
    }

    /// The report on an estimate that is not normalised yet.
    fn report(
        &self,
        clean: &CleanPass<'_, P, F>,
        Estimated { estimate, allocation, measured }: &Estimated<P>,
        budget: &QueryBudget,
    ) -> Result<StepReport, Error> {
        let ids = &self.batch.ids;
        let queries = allocation.total() as u64;
        let spent = estimate.variance_objective(measured, allocation);
        let (state, space) = (self.state, self.config.estimator.space);
        let independent = space.is_independent();
        let datum = |j: usize| DatumReport {
            id: ids[j],
            loss: clean.losses[j],
            queries: allocation.counts()[j],
            second_moment: measured[j],
        };
        Ok(StepReport {
            step: self.state.step,
            loss: clean.losses.iter().sum::<f64>() / clean.losses.len() as f64,
            batch_size: ids.len(),
            queries,
            queries_total: self.state.ledger.total().queries + self.earlier.ledger.total().queries + queries,
            dropped: estimate.dropped,
            squared_norm: estimate.squared_norm(),
            variance: if independent { spent / (ids.len() as f64).powi(2) } else { f64::NAN },
            rows: estimate.queries.largest.max(clean.cost.largest),
            memory: resident_memory(),
            sigma: self.config.estimator.sigma,
            changes: estimate.changes,
            loss_noise: None,
            sites: clean.prediction().map_or(vec![], |prediction| state.gradient_predictor.reports(prediction)),
            data: (0..ids.len()).map(datum).collect(),
            allocation: AllocationReport::of(measured, spent, allocation, budget)?,
        })
    }

    /// The gradients for the optimizer, normalised where the configuration says so.
    fn gradients(&self, mut estimate: Estimate<P>) -> GradientsParams {
        if self.config.estimator.space.normalisation() == Normalisation::LossSpread {
            estimate.normalise(self.config.estimator.sigma);
        }
        estimate.into_params(self.model)
    }
}

/// Some numbers that one worker finds for all.
struct Numbers<const N: usize>([f64; N]);

/// Sends them.
struct NumbersCodec;

impl<const N: usize> Codec<Numbers<N>> for NumbersCodec {
    fn write(&self, Numbers(values): &Numbers<N>, writer: &mut Writer) {
        writer.doubles(values);
    }

    fn read(&self, _: Range<usize>, reader: &mut Reader<'_>) -> Option<Numbers<N>> {
        reader.doubles()?.try_into().ok().map(Numbers)
    }

    fn max_bytes(&self, _: Range<usize>) -> usize {
        8 + 8 * N
    }
}

/// Probabilities of the sites ∝ √n, n their shared coordinates: what the prediction does not know of
/// a site falls as its queries over n.
fn learning_probabilities(sites: &[TracedSite]) -> Vec<f64> {
    let roots: Vec<f64> = sites.iter().map(|site| (site.shared_coordinates().max(1) as f64).sqrt()).collect();
    let total: f64 = roots.iter().sum();
    roots.iter().map(|root| root / total).collect()
}

/// A matrix on the host, as (columns, values), in the form that allocators take.
fn as_embeddings(matrix: &Option<(usize, Vec<f32>)>) -> Result<Option<Embeddings<'_>>, Error> {
    matrix.as_ref().map(|(dim, values)| Embeddings::new(values, *dim)).transpose()
}

/// Second moments of pilots, with the mean of the others where no pilot of an example survived.
fn fill_missing(moments: &[f64]) -> Vec<f64> {
    let finite = || moments.iter().filter(|m| m.is_finite());
    let mean = finite().sum::<f64>() / finite().count().max(1) as f64;
    moments.iter().map(|&m| if m.is_finite() { m } else { mean }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_moments_are_the_mean_of_the_others() {
        assert_eq!(fill_missing(&[1.0, f64::NAN, 6.0, 2.0, f64::INFINITY]), [1.0, 3.0, 6.0, 2.0, 3.0]);
        assert_eq!(fill_missing(&[f64::NAN; 2]), [0.0; 2]);
    }
}
