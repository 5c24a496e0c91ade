//! What a learner carries from step to step.

use std::any::Any;

use serde::{Deserialize, Serialize};

use crate::control_variate::{GradientPredictor, Observation};
use crate::estimator::PassCost;
use crate::ledger::{Ledger, Phase};
use crate::site_tracker::{SiteMoment, SiteTracker};
use crate::variance::{LossExcess, VarianceTracker};

/// State of a learner that a checkpoint holds beside the parameters of model and allocator.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[non_exhaustive]
pub struct LearnerState {
    /// Steps taken.
    pub step: u64,
    /// Queries, row-forwards and seconds so far.
    pub ledger: Ledger,
    /// Running estimates of the variances; empty unless the source is
    /// [`Running`](crate::VarianceSource::Running).
    pub variances: VarianceTracker,
    /// The least losses of the latest steps, for [`VarianceSource::Loss`](crate::VarianceSource::Loss).
    pub loss_excess: LossExcess,
    /// Running second moments of the sites.
    pub sites: SiteTracker,
    /// Weights that predict gradients, gains and α.
    pub gradient_predictor: GradientPredictor,
    /// Steps in a row without a finite loss.
    pub failed_steps: usize,
}

/// What one step learned, kept until the optimizer's update commits it.
///
/// A step sees the learner by reference and cannot change it. Several workers leave one each.
#[derive(Debug, Default)]
pub(super) struct Pending {
    /// The allocator's [`Update`](crate::allocator::Allocator::Update); `None` if nothing was
    /// allocated.
    pub update: Option<Box<dyn Any + Send>>,
    /// Second moments that the allocated queries measured, without pilots; NaN where none survived.
    pub shown: Vec<f64>,
    /// Ids of the batch.
    pub ids: Vec<u64>,
    /// Clean losses.
    pub losses: Vec<f64>,
    /// Key of each example in the variance tracker.
    pub variance_covariate: Vec<f64>,
    /// Second moment of each example; empty if nothing was estimated.
    pub second_moments: Vec<f64>,
    /// Second moments of the queries on each site.
    pub site_moments: Vec<SiteMoment>,
    /// What the queries show of the prediction.
    pub observed: Option<Observation>,
    /// Queries of each example with a finite loss.
    pub survived: Vec<usize>,
    /// Phase, queries and cost of each pass.
    pub costs: Vec<(Phase, u64, PassCost)>,
    /// Whether no loss was finite.
    pub failed: bool,
}
