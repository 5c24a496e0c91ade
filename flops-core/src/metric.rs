//! What a step reports, and the burn-train metrics that read it.

use std::sync::Arc;

use burn::prelude::*;
use burn::train::metric::state::{FormatOptions, NumericMetricState};
use burn::train::metric::{
    AccuracyInput, Adaptor, LossInput, Metric, MetricAttributes, MetricMetadata, MetricName, Numeric,
    NumericAttributes, NumericEntry, SerializedEntry,
};
use burn::train::{ClassificationOutput, ItemLazy};

use crate::learner::StepReport;

/// What a step hands to the metrics.
pub struct StepOutput<B: Backend> {
    /// Clean loss of each datum, `[batch]`.
    pub losses: Tensor<B, 1>,
    /// Logits `[batch, classes]` and labels `[batch]`, where the model [has them](crate::ForwardModel::classification).
    pub classification: Option<(Tensor<B, 2>, Tensor<B, 1, Int>)>,
    /// Figures of a forward-only step; `None` in validation, in backpropagation, and where a step failed.
    pub stats: Option<StepStats>,
}

/// Figures of a forward-only step, for the metrics.
#[derive(Clone, Copy, Debug)]
pub struct StepStats {
    /// Queries so far.
    pub queries: f64,
    /// Queries dropped in this step for a non-finite loss.
    pub dropped: f64,
    /// Variance of the estimate relative to that of uniform allocation.
    pub relative_variance: f64,
    /// The least relative variance an integer allocation reaches.
    pub neyman: f64,
    /// 1/(1 + CV²).
    pub ceiling: f64,
    /// Coefficient of variation of √(Tr Σ_j).
    pub cv: f64,
    /// Smallest A_j.
    pub min: f64,
    /// Largest A_j.
    pub max: f64,
}

impl StepStats {
    pub(crate) fn of(report: &StepReport) -> Self {
        let a = &report.allocation;
        Self {
            queries: report.queries_total as f64,
            dropped: report.dropped as f64,
            relative_variance: a.relative_variance,
            neyman: a.neyman_relative_variance,
            ceiling: a.ceiling,
            cv: a.cv,
            min: a.min as f64,
            max: a.max as f64,
        }
    }
}

impl<B: Backend> StepOutput<B> {
    /// What a step that failed reports: losses that are not numbers.
    pub(crate) fn failed(rows: usize) -> Self {
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
    /// A model that does not [classify](crate::ForwardModel::classification), or a step that failed, counts as all wrong.
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

/// Input of the metrics of this module.
pub struct StatsInput(pub Option<StepStats>);

impl<B: Backend> Adaptor<StatsInput> for StepOutput<B> {
    fn adapt(&self) -> StatsInput {
        StatsInput(self.stats)
    }
}

macro_rules! step_metric {
    ($(#[$doc:meta])* $name:ident, $title:literal, $precision:literal, $higher:literal, $field:ident, $running:ident) => {
        $(#[$doc])*
        #[derive(Clone)]
        pub struct $name {
            state: NumericMetricState,
            name: MetricName,
        }

        impl $name {
            /// The metric, before any step.
            pub fn new() -> Self {
                Self { state: NumericMetricState::default(), name: Arc::new($title.into()) }
            }
        }

        impl Default for $name {
            fn default() -> Self {
                Self::new()
            }
        }

        impl Metric for $name {
            type Input = StatsInput;

            fn name(&self) -> MetricName {
                self.name.clone()
            }

            fn attributes(&self) -> MetricAttributes {
                NumericAttributes { unit: None, higher_is_better: $higher }.into()
            }

            fn update(&mut self, input: &StatsInput, _: &MetricMetadata) -> SerializedEntry {
                let (value, weight) = match &input.0 {
                    Some(stats) => (stats.$field, 1),
                    None => (0.0, 0),
                };
                self.state.update(value, weight, FormatOptions::new(self.name()).precision($precision))
            }

            fn clear(&mut self) {
                self.state.reset()
            }
        }

        impl Numeric for $name {
            fn value(&self) -> NumericEntry {
                self.state.current_value()
            }

            fn running_value(&self) -> NumericEntry {
                self.state.$running()
            }
        }
    };
}

step_metric!(
    /// Queries spent so far; the value of an epoch is that of its last step.
    QueriesMetric, "Queries", 0, false, queries, current_value
);
step_metric!(
    /// Queries dropped in a step because their loss was not finite.
    DroppedMetric, "Dropped queries", 1, false, dropped, running_value
);
step_metric!(
    /// Variance of the gradient estimate relative to uniform allocation, by the variances measured in the step.
    RelativeVarianceMetric, "Variance vs uniform", 3, false, relative_variance, running_value
);
step_metric!(
    /// The least relative variance that integer allocation reaches.
    NeymanMetric, "Neyman vs uniform", 3, false, neyman, running_value
);
step_metric!(
    /// 1/(1 + CV²), what no allocation gets below.
    CeilingMetric, "Ceiling", 3, false, ceiling, running_value
);
step_metric!(
    /// Coefficient of variation of √(Tr Σ_j).
    CvMetric, "CV", 3, true, cv, running_value
);
step_metric!(
    /// Smallest number of queries of a datum.
    MinQueriesMetric, "Min queries", 1, true, min, running_value
);
step_metric!(
    /// Largest number of queries of a datum.
    MaxQueriesMetric, "Max queries", 1, true, max, running_value
);
