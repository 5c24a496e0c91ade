//! The clean pass of a step.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;

use burn::module::ParamId;
use burn::prelude::*;
use web_time::Instant;

use super::clean_leaf::{CleanMemory, LeafMasks, LeafTrace};
use super::clean_passes::{CleanLeaves, CutPasses};
use super::estimate::PassCost;
use super::leaves::LeafStages;
use super::rounds::Rounds;
use super::rows::{self, check_len, check_repeats, check_sites};
use super::settings::Estimator;
use super::space::Space;
use crate::batch::{Batch, Rows};
use crate::control_variate::Prediction;
use crate::error::Error;
use crate::model::ForwardModel;
use crate::noise::makes_noise;
use crate::ops::to_host;
use crate::parameters::paths;
use crate::probe::{Passes, StepKey, TracedSite};

/// What the clean pass leaves, and the context in which its queries are evaluated.
///
/// [`estimate`](Self::estimate) turns it into a gradient.
pub struct CleanPass<'a, B: Backend, M: ForwardModel<B>> {
    pub(super) estimator: &'a Estimator,
    pub(super) model: &'a M,
    pub(super) batch: &'a Batch<M::Input, M::Target>,
    pub(super) trained: &'a Arc<HashSet<ParamId>>,
    /// The step, which keys the dropout masks.
    step: u64,
    /// Loss ℓ_j of each example.
    pub losses: Vec<f64>,
    /// Key by which the variance tracker groups examples: the loss, unless
    /// [overridden](ForwardModel::variance_covariate).
    pub variance_covariate: Vec<f64>,
    /// The output of the model.
    pub output: M::Output,
    /// What the losses of the queries compare their outputs with.
    ///
    /// These are the batch's targets, [coupled](ForwardModel::couple) where the loss couples
    /// examples.
    pub target: M::Target,
    /// What the model [offered](crate::Probe::embed) as embeddings, `[batch, dim]`.
    pub embeddings: Option<Tensor<B, 2>>,
    /// Rows that went through the model, and the time they took.
    pub cost: PassCost,
    /// Who runs the jobs of the queries and of the update.
    pub(super) rounds: Rounds<'a>,
    pub(crate) stages: LeafStages,
    /// The sites, in order.
    pub(crate) sites: Vec<TracedSite>,
    /// The token masks of the sites of each leaf.
    masks: Vec<LeafMasks<B>>,
    /// Runs the clean pass of a leaf again, where its stages are elsewhere.
    pub(super) leaves: CleanLeaves<'a, B, M>,
    pub(super) site_probabilities: Vec<f64>,
    site_costs: Vec<f64>,
    pub(super) prediction: Option<Arc<Prediction>>,
    /// Trained parameters that were called through the probe.
    pub(super) reached: HashSet<ParamId>,
    /// Gradients of the mean loss that the model knows in closed form, of trained parameters that
    /// are never perturbed.
    pub(super) exact: Vec<(ParamId, Tensor<B, 1>)>,
}

impl<B: Backend, M: ForwardModel<B>> CleanPass<'_, B, M> {
    /// The trained parameters whose gradient is estimated.
    pub(super) fn estimated(&self) -> Arc<HashSet<ParamId>> {
        if self.exact.is_empty() {
            return self.trained.clone();
        }
        let is_exact = |id: &ParamId| self.exact.iter().any(|(exact, _)| exact == id);
        Arc::new(self.trained.iter().filter(|id| !is_exact(id)).copied().collect())
    }

    /// [`estimated`](Self::estimated), where all can be.
    ///
    /// # Errors
    /// [`Error::NothingTrained`] or [`Error::NotSites`].
    pub(super) fn reachable(&self) -> Result<Arc<HashSet<ParamId>>, Error> {
        let estimated = self.estimated();
        if estimated.is_empty() {
            return Err(Error::NothingTrained);
        }
        let missed = estimated.difference(&self.reached).count();
        if self.estimator.space.is_independent() && missed > 0 {
            let is_missed = |id| estimated.contains(&id) && !self.reached.contains(&id);
            let paths = paths::<B, M>(self.model, is_missed);
            return Err(Error::NotSites { paths, missed, trained: estimated.len() });
        }
        Ok(estimated)
    }

    /// Whether every parameter whose gradient is estimated was called through the probe.
    ///
    /// One that was not may act in any stage: none can be skipped.
    pub(crate) fn reaches_all(&self) -> bool {
        self.estimated().is_subset(&self.reached)
    }

    /// The sites of the step, in order. What is learned about a site is kept under its key.
    pub fn sites(&self) -> &[TracedSite] {
        &self.sites
    }

    /// Probability of each site where a direction falls on one; they sum to one. Equal, unless set.
    pub fn site_probabilities(&self) -> &[f64] {
        &self.site_probabilities
    }

    /// The part of a pass that a query on each site takes, in (0, 1], by the multiply-adds of the
    /// layers.
    pub fn site_costs(&self) -> &[f64] {
        &self.site_costs
    }

    /// Sets the probability of each site; [`SiteTracker`](crate::site_tracker::SiteTracker) has
    /// good ones.
    ///
    /// # Errors
    /// [`Error::Length`] or [`Error::Value`], unless there is one positive number for each site.
    pub fn set_site_probabilities(&mut self, probabilities: Vec<f64>) -> Result<(), Error> {
        let (got, expected) = (probabilities.len(), self.site_costs.len());
        if got != expected {
            return Err(Error::Length { name: "site probabilities", got, expected });
        }
        if let Some(index) = probabilities.iter().position(|p| !(*p > 0.0 && *p < 1.0 + 1e-9)) {
            let remedy = "give every site a probability above 0; they sum to 1";
            return Err(Error::Value { name: "site probabilities", index, value: probabilities[index], remedy });
        }
        self.site_probabilities = probabilities;
        Ok(())
    }

    /// Sets what the control variate predicts (activation space); nothing, unless set.
    ///
    /// [`GradientPredictor`](crate::control_variate::GradientPredictor) makes predictions. They
    /// must be made before the noise of the step is drawn.
    ///
    /// They are set to 0 at masked tokens.
    pub fn set_prediction(&mut self, prediction: Option<Prediction>) {
        let shares = self.estimator.space.estimate().is_biased();
        let on_device = self.model.devices().first().is_some_and(makes_noise::<B>);
        let single = self.estimator.is_single_site();
        self.prediction = prediction.map(|mut prediction| {
            if !single {
                prediction.leave_spans();
            }
            if on_device {
                prediction.read_no_device(shares);
            }
            for (index, site) in self.sites.iter().enumerate() {
                let of_leaf = |(leaf, masks): (usize, &LeafMasks<B>)| match self.stages.range(leaf).len() {
                    0 => Some(vec![]),
                    _ => masks.of_site(index),
                };
                if prediction.looks_at(index, site.coordinates)
                    && let Some(masks) = self.masks.iter().enumerate().map(of_leaf).collect::<Option<Vec<_>>>()
                {
                    prediction.mask(index, masks.concat());
                }
            }
            Arc::new(prediction)
        });
    }

    /// What is predicted.
    pub(crate) fn prediction(&self) -> Option<&Prediction> {
        self.prediction.as_deref()
    }

    /// The mean cost of a query, as a part of a pass, where each falls on one site.
    pub(crate) fn mean_cost(&self) -> f64 {
        let costs = self.site_costs.iter().cycle();
        self.place_probabilities().iter().zip(costs).map(|(p, cost)| p * cost).sum()
    }

    /// The probability of each place that a direction falls on: the sites, and then, where any site
    /// has a span, the sites again with noise in it.
    pub(super) fn place_probabilities(&self) -> Vec<f64> {
        let sites = &self.site_probabilities;
        self.prediction.as_ref().map_or_else(|| sites.clone(), |prediction| prediction.places(sites))
    }

    /// What keys the dropout masks of clean pass, queries and update.
    pub(super) fn key(&self) -> StepKey<'_> {
        StepKey { seed: self.estimator.seed, step: self.step, ids: &self.batch.ids }
    }
}

impl Estimator {
    /// The clean pass: losses, output, embeddings, and the state in front of the first trained
    /// stage.
    ///
    /// Dropout masks are those of step 0; [`clean_at`](Self::clean_at) takes another.
    ///
    /// # Errors
    /// Where settings are unusable, the batch is empty or its parts differ in length, the model
    /// cannot answer, or it breaks the [row contract](crate::Probe#rows). [`Error::RepeatedCalls`], where
    /// activation noise falls on all calls of a layer at once.
    pub fn clean<'a, B: Backend, M: ForwardModel<B>>(
        &'a self,
        model: &'a M,
        batch: &'a Batch<M::Input, M::Target>,
        trained: &'a Arc<HashSet<ParamId>>,
    ) -> Result<CleanPass<'a, B, M>, Error> {
        self.clean_at(model, batch, trained, 0)
    }

    /// [`clean`](Self::clean) with the [dropout](crate::Probe::dropout) masks of a step.
    ///
    /// # Errors
    /// As [`clean`](Self::clean).
    pub fn clean_at<'a, B: Backend, M: ForwardModel<B>>(
        &'a self,
        model: &'a M,
        batch: &'a Batch<M::Input, M::Target>,
        trained: &'a Arc<HashSet<ParamId>>,
        step: u64,
    ) -> Result<CleanPass<'a, B, M>, Error> {
        let max_rows = self.clean_rows(model);
        let cut = Box::new(move |examples: Range<usize>| Passes::new(examples.len(), None, max_rows));
        self.clean_from(model, batch, trained, (cut, step, Rounds::local(), CleanMemory::default()))
    }

    /// [`clean_at`](Self::clean_at) a step, by passes that may begin behind prefixes that an earlier
    /// epoch kept.
    pub(crate) fn clean_from<'a, B: Backend, M: ForwardModel<B>>(
        &'a self,
        model: &'a M,
        batch: &'a Batch<M::Input, M::Target>,
        trained: &'a Arc<HashSet<ParamId>>,
        (cut, step, rounds, memory): (CutPasses<'a>, u64, Rounds<'a>, CleanMemory),
    ) -> Result<CleanPass<'a, B, M>, Error> {
        self.validate()?;
        batch.check()?;
        let n = batch.ids.len();
        let start = Instant::now();
        let late = self.is_single_site();
        let devices = rounds.devices();
        let leaves = CleanLeaves { estimator: self, model, batch, trained, step, cut, devices, memory };
        let (found, earlier) = leaves.all(rounds)?;
        let (earlier, mut structure) = match earlier {
            Some(LeafTrace { stages, reached, sites }) => (Some(stages), Some((reached, sites, 0))),
            None => (None, None),
        };
        let stages = LeafStages::new(n, self.leaves).with_earlier(earlier);
        let (mut losses, mut outputs, mut embeddings, mut masks, mut largest) = (vec![], vec![], vec![], vec![], 0);
        for (leaf, found) in found.into_iter().enumerate() {
            losses.extend(found.losses);
            outputs.extend(found.output);
            embeddings.extend(found.embeddings);
            masks.push(found.masks);
            largest = largest.max(found.largest);
            let Some(trace) = found.here else { continue };
            stages.set(leaf, trace.stages);
            match &structure {
                Some((_, sites, rows)) if self.space.is_independent() => {
                    check_sites(model, (sites, *rows), (&trace.sites, found.largest))?;
                }
                Some(_) => {}
                None => structure = Some((trace.reached, trace.sites, found.largest)),
            }
        }
        let (reached, sites, _) = structure.unwrap_or_default();
        if matches!(self.space, Space::Activation { .. }) && !late {
            check_repeats(model, &sites)?;
        }
        let output = M::Output::cat(outputs);
        let (losses, target) = match model.couple(&output, &batch.target) {
            Some(target) => {
                let count = |got| Error::RowCount { what: "the coupled target", got, rows: n };
                target.check_rows(n).map_err(count)?;
                let losses = rows::losses(model, output.clone(), target.clone(), n)?;
                (to_host(vec![losses]), target)
            }
            None => (losses, batch.target.clone()),
        };
        let variance_covariate = match model.variance_covariate(&output, &target) {
            Some(covariate) => to_host(vec![check_len("the variance covariate", covariate, n)?]),
            None => losses.clone(),
        };
        let mut exact = model.exact_gradients(&output, &target);
        exact.retain(|(id, _)| trained.contains(id));
        let count = exact.iter().filter(|(id, _)| reached.contains(id)).count();
        if count > 0 {
            let is_exact = |id| exact.iter().any(|(exact, _)| *exact == id) && reached.contains(&id);
            return Err(Error::ExactSites { paths: paths::<B, M>(model, is_exact), count });
        }
        let got = embeddings.iter().map(|e: &Tensor<B, 2>| e.dims()[0]).sum();
        if got != n && !embeddings.is_empty() {
            return Err(Error::RowCount { what: "the embeddings", got, rows: n });
        }
        let embeddings = (!embeddings.is_empty()).then(|| Rows::cat(embeddings));
        let cost = PassCost { rows: n as u64, elapsed: start.elapsed(), largest: largest as u64 };
        let of_sites = |site| if late { stages.any().cost(site) } else { 1.0 };
        Ok(CleanPass {
            estimator: self,
            model,
            batch,
            trained,
            rounds,
            step,
            site_costs: (0..sites.len()).map(of_sites).collect(),
            losses,
            variance_covariate,
            output,
            target,
            embeddings,
            cost,
            stages,
            site_probabilities: vec![1.0 / sites.len().max(1) as f64; sites.len()],
            sites,
            masks,
            leaves,
            prediction: None,
            reached,
            exact,
        })
    }
}
