//! The seam to burn-train, with the feature `train`: the one folder that names it.
//!
//! A change of its API stays in here. Learner, step, reports and monitor, in the folder above, run
//! without it.

mod backprop;
mod checksum;
mod forward;
mod loader;
mod metric;
mod output;
pub mod recorder;
mod stopping;

pub use backprop::BackpropLearner;
pub use checksum::ChecksumError;
pub use loader::{Augmentation, EpochLoader, InnerBatcher, LoaderError};
pub use metric::{
    AlphaMetric, CvMetric, DroppedMetric, ExplainedMetric, FloorMetric, MaxQueriesMetric, MinQueriesMetric,
    NeymanMetric, QueriesMetric, RelativeVarianceMetric, StatsInput,
};
