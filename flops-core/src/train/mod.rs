//! Training with burn-train: learners, metrics, data loading and values in checkpoints.
//!
//! [`ForwardLearner`] estimates gradients from forward passes, [`BackpropLearner`] computes them by
//! backpropagation. Both go into burn-train's `Learner`, in place of the module. A [`Monitor`]
//! tells what a run reports, costs and suffers from while burn-train owns the learner.
//!
//! No other library code names burn-train, so a change of its API stays in here.

mod backprop;
mod checksum;
mod config;
mod diagnostics;
pub mod files;
mod graph_roots;
mod learner;
mod loader;
mod loss_history;
pub mod matrix_optimizer;
mod metric;
mod monitor;
mod output;
pub mod param_groups;
mod pending;
mod prefixes;
pub mod recorder;
mod repeat;
mod report;
mod site_checks;
mod state;
mod step;
#[cfg(test)]
mod tests;
mod workers;

pub use backprop::BackpropLearner;
pub use checksum::ChecksumError;
pub use config::ForwardConfig;
pub use diagnostics::{Advice, Bounds, Diagnostics, Signature, resident_memory};
pub use learner::ForwardLearner;
pub use loader::{Augmentation, EpochLoader, InnerBatcher, LoaderError};
pub use metric::{
    AlphaMetric, CvMetric, DroppedMetric, ExplainedMetric, FloorMetric, MaxQueriesMetric, MinQueriesMetric,
    NeymanMetric, QueriesMetric, RelativeVarianceMetric, StatsInput,
};
pub use monitor::Monitor;
pub use output::{StepOutput, StepStats};
pub use report::{DatumReport, StepReport};
pub use state::LearnerState;
