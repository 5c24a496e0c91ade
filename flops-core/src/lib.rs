//! Training with forward passes only: estimators, query allocators and the burn-train seam.
#![deny(missing_docs)]

pub mod allocator;
pub mod backprop;
pub mod batch;
pub mod budget;
pub mod error;
pub mod estimator;
pub mod learner;
pub mod loader;
pub mod metric;
pub mod noise;
pub mod objective;
pub mod persist;
pub mod probe;
#[cfg(test)]
mod testing;
pub mod variance;

pub use backprop::BackpropLearner;
pub use batch::{Batch, Rows};
pub use budget::{Allocation, QueryBudget};
pub use error::Error;
pub use estimator::{Estimator, Space};
pub use learner::{ForwardConfig, ForwardLearner, Monitor, StepReport};
pub use loader::{EpochLoader, Plain};
pub use metric::StepOutput;
pub use noise::{NoiseLaw, Placement, Sampling};
pub use objective::{ForwardModel, cross_entropy, zero_one};
pub use probe::Probe;
