//! What a program that trains a model needs, in one `use`.
//!
//! ```
//! use flops_core::prelude::*;
//! ```

pub use crate::allocator::{
    Allocation, Allocator, AllocatorKind, AnyAllocator, GaussianAllocatorConfig, Neyman, QueryBudget, Uniform,
};
pub use crate::batch::Batch;
pub use crate::control_variate::{ControlVariate, GradientEstimate};
pub use crate::estimator::{Normalisation, Space, Subspace};
pub use crate::losses::{cross_entropy, zero_one};
pub use crate::model::ForwardModel;
pub use crate::noise::{NoiseLaw, Placement, Sampling};
pub use crate::probe::Probe;
pub use crate::recipe::Recipe;
pub use crate::site;
#[cfg(feature = "train")]
pub use crate::train::{BackpropLearner, EpochLoader, InnerBatcher};
pub use crate::train::{ForwardConfig, ForwardLearner, Monitor, StepOutput, StepReport, TrainBatch, Trainable};
pub use crate::variance::VarianceSource;
// the traits and their derives
pub use crate::{Lift, Rows};
