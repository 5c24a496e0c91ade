//! The report of one forward-only step.

use crate::allocator::AllocationReport;

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
    /// Gain of the allocation over a uniform one, by the variances measured in this step.
    pub allocation: AllocationReport,
    /// One report per example, in the order of the batch.
    pub data: Vec<DatumReport>,
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
