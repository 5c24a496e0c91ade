//! burn-train metrics of queries, variance and allocation.

use std::sync::Arc;

use burn::prelude::Backend;
use burn::train::metric::state::{FormatOptions, NumericMetricState};
use burn::train::metric::{
    Adaptor, Metric, MetricAttributes, MetricMetadata, MetricName, Numeric, NumericAttributes, NumericEntry,
    SerializedEntry,
};

use crate::train::output::{StepOutput, StepStats};

/// Input of the metrics of forward-only training.
pub struct StatsInput(pub Option<StepStats>);

impl<B: Backend> Adaptor<StatsInput> for StepOutput<B> {
    fn adapt(&self) -> StatsInput {
        StatsInput(self.stats)
    }
}

macro_rules! step_metric {
    ($(#[$doc:meta])* $name:ident, $title:literal, $precision:literal, $higher:literal, $field:ident, $is_count:literal) => {
        $(#[$doc])*
        #[derive(Clone)]
        pub struct $name {
            state: NumericMetricState,
            name: MetricName,
        }

        impl $name {
            /// Creates the metric of a run that has not begun.
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
                // the running mean of a count is no count: an epoch has the value of its last step
                if $is_count && weight > 0 {
                    self.state.reset();
                }
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
                self.state.running_value()
            }
        }
    };
}

step_metric!(
    /// Queries so far; the value of an epoch is the one of its last step. burn-train's summary at the
    /// end of training is a mean over the entries of every metric, of this one too.
    QueriesMetric, "Queries", 0, false, queries, true
);
step_metric!(
    /// Queries of a step dropped for a non-finite loss.
    DroppedMetric, "Dropped queries", 1, false, dropped, false
);
step_metric!(
    /// Variance of the estimate relative to uniform allocation, by the variances measured in the
    /// step.
    RelativeVarianceMetric, "Variance vs uniform", 3, false, relative_variance, false
);
step_metric!(
    /// Least variance of any integer allocation, relative to uniform allocation.
    NeymanMetric, "Neyman vs uniform", 3, false, neyman, false
);
step_metric!(
    /// 1/(1 + CV²), the floor: no allocation gets a relative variance below it.
    FloorMetric, "Floor", 3, false, floor, false
);
step_metric!(
    /// CV, the coefficient of variation of √(Tr Σ_j) over the batch.
    CvMetric, "CV", 3, true, cv, false
);
step_metric!(
    /// Smallest number of queries of an example in the batch.
    MinQueriesMetric, "Min queries", 1, true, min, false
);
step_metric!(
    /// Largest number of queries of an example in the batch.
    MaxQueriesMetric, "Max queries", 1, true, max, false
);
step_metric!(
    /// Mean over the sites of the part of the residual that the estimate has, [α]: 1 for an unbiased
    /// estimate, less for a [shrunk](crate::GradientEstimate::Shrunk) one.
    ///
    /// [α]: crate::control_variate::SiteReport::alpha
    AlphaMetric, "Alpha", 3, true, alpha, false
);
step_metric!(
    /// Mean over the sites of the share of the gradient that the prediction explains.
    ExplainedMetric, "Explained share", 3, true, explained, false
);

#[cfg(test)]
mod tests {
    use burn::data::dataloader::Progress;

    use super::*;

    /// The first two steps of a run have 100 and 300 queries, the next thing that is seen is a test batch.
    #[test]
    fn queries_are_counted_and_other_figures_are_means() {
        let stats = |queries: f64, floor: f64| StepStats {
            queries,
            floor,
            dropped: 0.0,
            relative_variance: 1.0,
            neyman: 1.0,
            cv: 0.0,
            min: 1.0,
            max: 1.0,
            alpha: 1.0,
            explained: 0.0,
        };
        let progress = Progress::new(1, 2);
        let metadata = MetricMetadata { global_progress: progress.clone(), progress, iteration: Some(1), lr: None };
        let (mut queries, mut floor) = (QueriesMetric::new(), FloorMetric::new());
        for input in [Some(stats(100.0, 0.5)), Some(stats(400.0, 1.0)), None].map(StatsInput) {
            let [count, mean] = [queries.update(&input, &metadata), floor.update(&input, &metadata)];
            if input.0.is_some_and(|stats| stats.queries == 400.0) {
                assert_eq!(
                    (&*count.formatted, &*mean.formatted),
                    ("epoch 400 - batch 400", "epoch 0.750 - batch 1.000")
                );
            }
        }
        assert_eq!((queries.running_value().current(), floor.running_value().current()), (400.0, 0.75));
    }
}
