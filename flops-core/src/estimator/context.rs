//! What the passes of an estimate share.

use std::cell::LazyCell;
use std::collections::HashSet;
use std::sync::Arc;

use burn::module::ParamId;
use burn::prelude::*;

use super::clean_passes::CleanLeaves;
use super::leaf_sum::{LeafSum, SumCodec};
use super::leaves::LeafStages;
use super::rounds::Rounds;
use crate::allocator::Allocation;
use crate::batch::Batch;
use crate::control_variate::{Observation, Prediction};
use crate::error::Error;
use crate::executor::RoundPhase;
use crate::model::ForwardModel;
use crate::noise::NoiseSource;
use crate::parallel::Places;
use crate::parameters::parameters;
use crate::probe::{Gradients, Prefix, StepKey, TracedSite};

/// What the query pass and the update pass of a space need.
pub(super) struct EstimateContext<'a, B: Backend, M: ForwardModel<B>> {
    pub model: &'a M,
    pub batch: &'a Batch<M::Input, M::Target>,
    pub target: &'a M::Target,
    pub trained: &'a Arc<HashSet<ParamId>>,
    pub stages: &'a LeafStages,
    /// Runs the clean pass of a leaf again, where its stages are elsewhere.
    pub leaves: &'a CleanLeaves<'a, B, M>,
    pub rounds: Rounds<'a>,
    /// The rounds of the queries and of the update.
    pub phases: (RoundPhase, RoundPhase),
    /// What keys the dropout masks, the same as in the clean pass.
    pub key: StepKey<'a>,
    pub allocation: &'a Allocation,
    pub noise: NoiseSource,
    pub prediction: Option<&'a Arc<Prediction>>,
    /// The clean losses.
    pub losses: &'a [f64],
    pub max_rows: usize,
    pub on_host: bool,
    pub places: Places,
    /// The sites of the step, in order.
    pub sites: Arc<[TracedSite]>,
}

impl<B: Backend, M: ForwardModel<B>> EstimateContext<'_, B, M> {
    /// Rows of a pass that begins behind the first `stages` stages.
    pub fn rows(&self, stages: usize) -> usize {
        if self.on_host { cached_rows(self.stages.any().width(stages), self.max_rows) } else { self.max_rows }
    }

    /// Rows of a recording pass that begins behind the first `stages` stages.
    ///
    /// A recorded row keeps the inputs of all its sites, where a row of a query keeps those of one layer at
    /// a time. On a device, which waits for launches, a pass has as many rows as take the room of a query
    /// pass, the input and the output of its widest layer, and a sixteenth of `max_rows` at least.
    pub fn recorded_rows(&self, stages: usize) -> usize {
        let widest = self.stages.any().width(stages);
        if self.on_host || widest == 0 {
            return (self.max_rows / 16).min(self.rows(stages) / 8);
        }
        let kept: usize = self.sites.iter().map(|site| site.coordinates).sum();
        let same_room = self.max_rows.saturating_mul(2 * widest) / kept.max(1);
        same_room.clamp(self.max_rows / 16, self.max_rows)
    }

    /// The prefix of the examples of a leaf behind the first `stages` stages.
    ///
    /// # Errors
    /// Where the clean pass of the leaf ran elsewhere, and fails here.
    pub fn prefix(&self, leaf: usize, stages: usize) -> Result<Prefix, Error> {
        if stages == 0 {
            return Ok(Prefix::empty());
        }
        Ok(self.stages.of(leaf, |leaf| self.leaves.stages(leaf))?.prefix(stages))
    }

    /// What the jobs of a round depend on, beside the weights and the settings.
    pub fn round_key(&self) -> Vec<u64> {
        let counts = self.allocation.counts().iter().map(|&count| count as u64);
        let noise = [self.noise.seed, self.noise.step];
        noise.into_iter().chain(self.batch.ids.iter().copied()).chain(counts).collect()
    }

    /// Sends the sums of an update.
    pub fn sum_codec(&self) -> SumCodec<'_, B> {
        let estimated = || {
            let of_model = parameters::<B, M>(self.model).into_iter().filter(|p| self.trained.contains(&p.id));
            let mut seen = HashSet::new();
            of_model.filter(|p| seen.insert(p.id)).map(|p| (p.id, p.shape.iter().product())).collect()
        };
        SumCodec {
            parameters: LazyCell::new(Box::new(estimated)),
            device: self.model.devices().into_iter().next().unwrap_or_default(),
            prediction: self.prediction.map(|prediction| &**prediction),
            examples: self.batch.ids.len(),
            leaves: self.stages.len(),
            sites: self.sites.len(),
        }
    }
}

/// Values of a layer's output that are taken to fit a CPU's cache: 4 MiB in single precision.
const CACHED_VALUES: usize = 1 << 20;

/// Rows that a pass has even where fewer would fill the cache: enough for a matrix product to reach
/// its speed.
const MIN_ROWS: usize = 4;

/// Rows of a pass on a CPU: at most `max_rows`, and no more than leave the outputs of its layers in
/// the cache.
///
/// More rows would cost up to half the speed. `width` is the values of a row in the widest output,
/// 0 where that is not known.
fn cached_rows(width: usize, max_rows: usize) -> usize {
    CACHED_VALUES.checked_div(width).map_or(max_rows, |rows| rows.max(MIN_ROWS).min(max_rows))
}

/// What a space forms from the weights of the queries.
pub(super) struct SpaceGradients<B: Backend> {
    pub gradients: Gradients<B>,
    /// The squared score norm E‖∂_s‖² of each example at each site.
    pub squared_score_norms: Vec<Vec<f64>>,
    /// Rows recorded for it.
    pub recorded: u64,
    /// What the estimates show of the control variate's regression.
    pub observed: Option<Observation>,
}

impl<B: Backend> SpaceGradients<B> {
    /// From the sum over all leaves of a batch of `n` examples.
    pub fn new(n: usize, sum: LeafSum<B>) -> Self {
        let mut squared_score_norms = vec![vec![]; n];
        sum.norms().into_iter().for_each(|(position, norms)| squared_score_norms[position] = norms);
        Self { gradients: sum.gradients, squared_score_norms, recorded: sum.recorded, observed: sum.observed }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A width that is not known limits nothing, and no width asks for more rows than are allowed.
    #[test]
    fn passes_are_no_wider_than_the_cache() {
        let widest = 65 * 512;
        assert_eq!(
            [0, 1, widest, 1 << 19, 1 << 30].map(|width| cached_rows(width, 256)),
            [256, 256, 31, MIN_ROWS, MIN_ROWS]
        );
        assert_eq!([0, 1, widest, 1 << 30].map(|width| cached_rows(width, 2)), [2; 4]);
    }
}
