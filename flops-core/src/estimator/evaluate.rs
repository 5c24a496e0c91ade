//! From a clean pass and an allocation to a gradient estimate.

use burn::prelude::*;
use web_time::Instant;

use super::activation::QueryFindings;
use super::clean::CleanPass;
use super::context::{EstimateContext, SpaceGradients};
use super::estimate::{Estimate, PassCost};
use super::leaves::LeafStages;
use super::per_query::Answers;
use super::query_weights::{LossChanges, loss_spread};
use super::space::Space;
use super::weight_noise::WeightNoise;
use super::{activation, low_rank, per_query, weights};
use crate::allocator::Allocation;
use crate::error::Error;
use crate::executor::RoundPhase;
use crate::model::ForwardModel;
use crate::noise::{NoiseSource, Placement, makes_noise};
use crate::ops;
use crate::random::derive_seed;
use crate::site_tracker::SiteMoment;

impl<B: Backend, M: ForwardModel<B>> CleanPass<'_, B, M> {
    /// The gradient of the mean loss of the batch, estimated from `allocation`'s queries.
    ///
    /// `step` keys the noise; dropout masks stay those of the clean pass. For a law that [has a
    /// score](crate::NoiseLaw::has_score) the estimate is unbiased for the gradient of the loss
    /// smoothed by the law. The other laws are exact for quadratic losses, with a bias of O(σ²)
    /// otherwise. Both hold for every allocation that was fixed before this call. In the activation
    /// space every law has a further bias of O(σ²), because gradients use the clean inputs.
    ///
    /// Weight noise is shared by the examples of a pass: unequal allocations gain nothing there.
    ///
    /// # Errors
    /// - [`Error::Length`]: the allocation is for another batch.
    /// - [`Error::RowCount`]: the model returns another number of rows or losses than it was given.
    /// - [`Error::GradientShape`]: a layer gives a gradient of another shape than its parameter.
    /// - [`Error::NothingTrained`]: no parameter is trained.
    /// - [`Error::NotSites`]: a trained parameter is not called through the probe (activation and
    ///   low-rank space).
    /// - [`Error::SitesVary`]: a query, or the update, calls other layers than the clean pass.
    /// - [`Error::Model`]: the model cannot answer.
    pub fn estimate(&self, allocation: &Allocation, step: u64) -> Result<Estimate<B>, Error> {
        self.estimate_with_seed(self.estimator.seed, allocation, step)
    }

    /// [`estimate`](Self::estimate) with the noise of another seed.
    pub(crate) fn estimate_with_seed(
        &self,
        seed: u64,
        allocation: &Allocation,
        step: u64,
    ) -> Result<Estimate<B>, Error> {
        self.estimate_in_rounds(seed, allocation, step, (RoundPhase::Query, RoundPhase::Update))
    }

    /// [`estimate_with_seed`](Self::estimate_with_seed) in rounds of these phases.
    pub(crate) fn estimate_in_rounds(
        &self,
        seed: u64,
        allocation: &Allocation,
        step: u64,
        phases: (RoundPhase, RoundPhase),
    ) -> Result<Estimate<B>, Error> {
        let n = self.batch.ids.len();
        if self.losses.len() != n {
            return Err(Error::Length { name: "clean losses", got: self.losses.len(), expected: n });
        }
        if allocation.counts().len() != n {
            return Err(Error::Length { name: "allocation", got: allocation.counts().len(), expected: n });
        }
        let estimated = self.reachable()?;
        let nowhere = LeafStages::nowhere(n, self.estimator.leaves);
        let noise = self.noise(seed, step);
        // a device that makes noise waits for launches, as one in a test does
        let on_host = !noise.on_device && self.model.devices().first().is_some_and(ops::is_host::<B>);
        let context = EstimateContext {
            model: self.model,
            batch: self.batch,
            target: &self.target,
            trained: &estimated,
            stages: if estimated.is_subset(&self.reached) { &self.stages } else { &nowhere },
            leaves: &self.leaves,
            rounds: self.rounds,
            phases,
            sites: self.sites.as_slice().into(),
            key: self.key(),
            allocation,
            noise,
            prediction: self.prediction.as_ref(),
            losses: &self.losses,
            max_rows: self.estimator.max_rows,
            on_host,
            places: self.leaves.places(),
        };
        let weight_noise = match self.estimator.space {
            Space::Weights { subspace, .. } => {
                let settings = (self.estimator, subspace);
                WeightNoise::of(self.model, &estimated, settings, step, context.noise.on_device)
            }
            Space::Activation { .. } | Space::LowRank { .. } => WeightNoise::default(),
        };
        self.estimate_in(&context, &weight_noise)
    }

    /// Law, scale, sampling and seed of the noise of a step.
    fn noise(&self, seed: u64, step: u64) -> NoiseSource {
        let estimator = self.estimator;
        NoiseSource {
            law: estimator.noise,
            sampling: estimator.sampling,
            sigma: estimator.sigma,
            // steps of other batches, as of a run that went on otherwise, have noise of their own
            seed: derive_seed(&[seed, self.batch.ids.first().copied().unwrap_or(0)]),
            step,
            sites: estimator.is_single_site().then(|| self.place_probabilities().into()),
            spans: self.prediction.as_ref().map(|prediction| prediction.spans()).unwrap_or_default().into(),
            spread: estimator.space.placement() == Some(Placement::CostWeighted),
            shared: estimator.space.estimate().is_biased(),
            on_device: self.model.devices().first().is_some_and(makes_noise::<B>),
        }
    }

    /// The query pass, the weights of the queries, and the update pass.
    fn estimate_in(
        &self,
        context: &EstimateContext<'_, B, M>,
        weight_noise: &WeightNoise<B>,
    ) -> Result<Estimate<B>, Error> {
        let estimator = self.estimator;
        let start = Instant::now();
        let Answers { mut losses, explained, innovations, rows: largest } = match estimator.space {
            Space::Activation { .. } => per_query::losses(context, None)?,
            Space::LowRank { rank, .. } => per_query::losses(context, Some(rank))?,
            Space::Weights { .. } => {
                let (losses, rows) = weights::losses(context, weight_noise)?;
                Answers { losses, explained: vec![], innovations: vec![], rows }
            }
        };
        let rows = losses.iter().map(|l| l.len() as u64).sum();
        let queries = PassCost { rows, elapsed: start.elapsed(), largest: largest as u64 };
        let changes = LossChanges::of(&losses, &self.losses);
        let coefficient = |(losses, clean): (&Vec<f64>, &f64)| -> Vec<f64> {
            losses.iter().map(|l| (l - clean) / estimator.sigma).collect()
        };
        let coefficients = losses.iter().zip(&self.losses).map(coefficient).collect();
        let shown = QueryFindings { innovations, coefficients };
        for (losses, explained) in losses.iter_mut().zip(&explained) {
            losses.iter_mut().zip(explained).for_each(|(loss, explained)| *loss -= explained);
        }
        let weighted = estimator.query_weights(&losses, &self.losses);
        let start = Instant::now();
        let formed = match estimator.space {
            Space::Activation { .. } => activation::gradients(context, &weighted, &shown)?,
            Space::LowRank { rank, .. } => low_rank::gradients(context, &weighted, rank)?,
            Space::Weights { .. } => weights::gradients(context, weight_noise, &weighted.weights)?,
        };
        let SpaceGradients { mut gradients, squared_score_norms, recorded, observed } = formed;
        let accum_dtype = ops::accum_dtype::<B>();
        self.exact.iter().for_each(|(id, g)| gradients.add_flat(*id, g.clone().cast(accum_dtype)));
        gradients.check(self.model)?;
        let (second_moments, of_sites) = estimator.second_moments(&context.noise, &weighted, &squared_score_norms);
        let site_moments =
            self.sites.iter().zip(of_sites).map(|(site, sums)| SiteMoment::new(site.key, sums)).collect();
        Ok(Estimate {
            gradients,
            second_moments,
            site_moments,
            observed,
            survived: weighted.survived,
            dropped: weighted.dropped,
            changes,
            mixed: None,
            loss_spread: loss_spread(&losses, &self.losses),
            queries,
            update: PassCost { rows: recorded, elapsed: start.elapsed(), largest: 0 },
        })
    }
}
