//! The settings of a training loop.

use flops_core::train::Monitor;
use flops_core::train::param_groups::ParamGroup;

use super::artifacts::Artifacts;
use super::optimizer::OptimizerKind;
use crate::backend::Device;

/// The settings of the training loop.
pub struct RunPlan<'a> {
    /// Where checkpoints and `metrics.csv` go.
    pub artifacts: &'a Artifacts,
    /// The device to train on.
    pub device: Device,
    /// How parameters are updated.
    pub optimizer: OptimizerKind,
    /// The learning rate, above 0 and at most 1; it falls to zero as a cosine.
    pub lr: f64,
    /// Parameters with a multiple of this rate.
    pub groups: Vec<ParamGroup>,
    /// AdamW's β₂.
    pub beta_2: f32,
    /// Decoupled weight decay, in units of the learning rate.
    pub weight_decay: f32,
    /// Steps of the whole schedule.
    pub steps: usize,
    /// The last epoch of this run.
    pub last_epoch: usize,
    /// The epoch whose checkpoint training starts from.
    pub resume: Option<usize>,
    /// The monitor of a forward-only learner.
    pub monitor: Option<Monitor>,
    /// Whether to print plain lines on a terminal too.
    pub plain: bool,
}
