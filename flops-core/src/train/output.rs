//! The output of a step, which metrics look at.

use burn::prelude::*;

use super::report::StepReport;
use crate::model::ForwardModel;

/// Output of a training or validation step, for the metrics.
#[non_exhaustive]
pub struct StepOutput<B: Backend> {
    /// Clean loss of each example, `[batch]`.
    pub losses: Tensor<B, 1>,
    /// Logits `[batch, classes]` and labels `[batch]`, of a model that [has
    /// them](crate::ForwardModel::classification).
    pub classification: Option<(Tensor<B, 2>, Tensor<B, 1, Int>)>,
    /// Figures of a forward-only step.
    ///
    /// `None` in validation, in backpropagation, and after a failed step.
    pub stats: Option<StepStats>,
}

/// Figures of a forward-only step, for the metrics.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct StepStats {
    /// Queries so far.
    pub queries: f64,
    /// Queries of this step dropped for a non-finite loss.
    pub dropped: f64,
    /// Variance of the estimate relative to uniform allocation.
    pub relative_variance: f64,
    /// Least relative variance of any integer allocation.
    pub neyman: f64,
    /// 1/(1 + CV²), the floor: no allocation gets a relative variance below it.
    pub floor: f64,
    /// CV, the coefficient of variation of √(Tr Σ_j) over the batch.
    pub cv: f64,
    /// Smallest A_j.
    pub min: f64,
    /// Largest A_j.
    pub max: f64,
    /// Mean α over the sites: 1 for an unbiased estimate.
    pub alpha: f64,
    /// Mean over the sites of the share of the gradient that the prediction explains.
    pub explained: f64,
}

impl StepStats {
    /// The figures of `report` that have a metric.
    pub(super) fn of(report: &StepReport) -> Self {
        let a = &report.allocation;
        Self {
            queries: report.queries_total as f64,
            dropped: report.dropped as f64,
            relative_variance: a.relative_variance,
            neyman: a.neyman_relative_variance,
            floor: a.floor,
            cv: a.cv,
            min: a.min as f64,
            max: a.max as f64,
            alpha: report.mean_over_sites(1.0, |site| site.alpha),
            explained: report.mean_over_sites(0.0, |site| site.explained),
        }
    }
}

impl<B: Backend> StepOutput<B> {
    /// The output of an unperturbed pass.
    pub(super) fn clean<M: ForwardModel<B>>(model: &M, output: M::Output, target: M::Target) -> Self {
        let classification = model.classification(&output, &target);
        Self { losses: model.losses(output, target), classification, stats: None }
    }
}
