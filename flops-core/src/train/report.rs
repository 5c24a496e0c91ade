//! The report of one forward-only step.

use crate::allocator::AllocationReport;
use crate::control_variate::SiteReport;
use crate::estimator::LossChanges;

/// Report of one forward-only step.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct StepReport {
    /// Number of the step, from 0.
    pub step: u64,
    /// Mean clean loss of the batch.
    pub loss: f64,
    /// Examples in the batch, B.
    pub batch_size: usize,
    /// Queries of this step, pilots included.
    pub queries: u64,
    /// Queries so far, those of this step included.
    ///
    /// Steps that wait for an update count. Workers that run at the same time do not know of each
    /// other.
    pub queries_total: u64,
    /// Queries of this step dropped for a non-finite loss.
    pub dropped: u64,
    /// ‖ĝ‖², the squared norm of the gradient estimate, before any normalisation.
    pub squared_norm: f64,
    /// Estimated variance E‖ĝ − E ĝ‖² = (1/B²) Σ_j m_j / A_j.
    ///
    /// The m_j are the second moments measured in this step. NaN in the weight space, where
    /// examples share their noise and the formula does not hold.
    pub variance: f64,
    /// Rows of the largest forward pass.
    pub rows: u64,
    /// Resident memory of the process in bytes; `None` where the system does not tell.
    pub memory: Option<u64>,
    /// Smoothing scale σ.
    pub sigma: f64,
    /// How much the queries changed the loss.
    pub changes: LossChanges,
    /// Standard deviation of the loss itself, with the same example and the same parameters.
    ///
    /// It is measured in the first step and in every 1,000th; `None` in the others.
    pub loss_noise: Option<f64>,
    /// Gain of the allocation over a uniform one, by the variances measured in this step.
    pub allocation: AllocationReport,
    /// What the prediction knows of the sites of this step, before it: explained share, γ, span and α.
    ///
    /// Empty without a prediction, and in older reports, where the monitor holds too many of them.
    pub sites: Vec<SiteReport>,
    /// One report per example, in the order of the batch.
    ///
    /// Empty in older reports, where the monitor holds too many of them.
    pub data: Vec<DatumReport>,
}

impl StepReport {
    /// The mean of a figure over the sites; `empty` where there is none.
    pub(super) fn mean_over_sites(&self, empty: f64, of: impl Fn(&SiteReport) -> f64) -> f64 {
        if self.sites.is_empty() {
            return empty;
        }
        self.sites.iter().map(of).sum::<f64>() / self.sites.len() as f64
    }
}

/// What a [`StepReport`] says about one example.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct DatumReport {
    /// Id of the example.
    pub id: u64,
    /// Clean loss.
    pub loss: f64,
    /// Queries it was given, pilots included.
    pub queries: usize,
    /// Estimate of E‖ĝ_jq‖² from the queries allocated to it, which stands in for Tr Σ_j; 0 where
    /// none survived.
    pub second_moment: f64,
}
