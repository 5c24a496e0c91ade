//! The output of a step as burn-train hands it to the metrics.

use burn::prelude::*;
use burn::train::metric::{AccuracyInput, Adaptor, LossInput};
use burn::train::{ClassificationOutput, ItemLazy};

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

    /// The output of a step that failed on a batch of `rows` examples: every loss is NaN.
    pub(super) fn failed(rows: usize) -> Self {
        let losses = TensorData::new(vec![f32::NAN; rows.max(1)], [rows.max(1)]);
        Self { losses: Tensor::from_data(losses, &Default::default()), classification: None, stats: None }
    }
}

impl<B: Backend> ItemLazy for StepOutput<B> {
    type ItemSync = StepOutput<burn::backend::Flex>;

    fn sync(self) -> Self::ItemSync {
        let device = Default::default();
        StepOutput {
            losses: Tensor::from_data(self.losses.into_data().convert::<f32>(), &device),
            classification: self.classification.map(|(logits, labels)| {
                (
                    Tensor::from_data(logits.into_data().convert::<f32>(), &device),
                    Tensor::from_data(labels.into_data().convert::<i32>(), &device),
                )
            }),
            stats: self.stats,
        }
    }
}

impl<B: Backend> Adaptor<LossInput<B>> for StepOutput<B> {
    fn adapt(&self) -> LossInput<B> {
        LossInput::new(self.losses.clone())
    }
}

impl<B: Backend> Adaptor<AccuracyInput<B>> for StepOutput<B> {
    /// Logits and labels for the accuracy.
    ///
    /// Every row counts as wrong if the step failed or the model does not
    /// [classify](crate::ForwardModel::classification).
    fn adapt(&self) -> AccuracyInput<B> {
        let rows = self.losses.dims()[0];
        let device = self.losses.device();
        let (logits, labels) = self
            .classification
            .clone()
            .unwrap_or_else(|| (Tensor::zeros([rows, 2], &device), Tensor::ones([rows], &device)));
        ClassificationOutput::new(self.losses.clone(), logits, labels).adapt()
    }
}
