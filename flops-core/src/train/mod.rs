//! Training: the learner, its steps and reports, and what connects it with burn-train.
//!
//! [`ForwardLearner`] estimates gradients from forward passes. A loop of your own calls
//! [`estimate`](ForwardLearner::estimate) and [`update`](ForwardLearner::update). With the feature
//! `train`, which is on by default, it goes into burn-train's `Learner` in place of the module. So does
//! `BackpropLearner`, which computes gradients by backpropagation. A [`Monitor`] tells what a run
//! reports, costs and suffers from, also while burn-train owns the learner.
//!
//! No other library code than `burn_train/` in this folder names burn-train.

#[cfg(feature = "train")]
mod burn_train;
mod config;
mod diagnostics;
mod display;
#[cfg(feature = "train")]
pub mod files;
mod graph_roots;
mod learner;
mod loss_history;
pub mod matrix_optimizer;
mod monitor;
mod output;
pub mod param_groups;
mod pending;
mod prefixes;
mod repeat;
mod report;
mod site_checks;
mod state;
mod step;
#[cfg(all(test, feature = "train"))]
mod tests;
mod trainable;
mod workers;

#[cfg(feature = "train")]
pub use burn_train::recorder;
#[cfg(feature = "train")]
pub use burn_train::{
    AlphaMetric, Augmentation, BackpropLearner, ChecksumError, CvMetric, DroppedMetric, EpochLoader, ExplainedMetric,
    FloorMetric, InnerBatcher, LoaderError, MaxQueriesMetric, MinQueriesMetric, NeymanMetric, QueriesMetric,
    RelativeVarianceMetric, StatsInput,
};
pub use config::ForwardConfig;
pub use diagnostics::{Advice, Bounds, Diagnostics, Signature, resident_memory};
pub use learner::{EstimatedStep, ForwardLearner};
pub use monitor::Monitor;
pub use output::{StepOutput, StepStats};
pub use report::{DatumReport, StepReport};
pub use state::LearnerState;
pub use trainable::{TrainBatch, TrainInput, TrainTarget, Trainable};
