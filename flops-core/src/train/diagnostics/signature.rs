//! The failures that are recognised, and the advice on them.

use serde::{Deserialize, Serialize};

use crate::names::named_enum;

/// A common failure of forward-only training.
///
/// The first three are decided every 50 steps, over a window of 200. Of these, a high variance and
/// slow convergence are not reported where the loss itself is at fault. The others are looked at in
/// every step, but for a noisy loss (the first step and every 1,000th) and an exploding one (every 5
/// steps). None of them changes what is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Signature {
    /// The estimate is nearly all noise, though every example has enough queries.
    ///
    /// A poor allocation, or too many perturbed coordinates.
    HighVariance,
    /// The loss goes up and down by more than its scatter from batch to batch.
    ///
    /// Too large a step, of the model or of the allocator.
    OscillatingLoss,
    /// The allocation is near its optimum, and the loss stands still.
    ///
    /// The allocation does not limit training.
    SlowConvergence,
    /// More rows in a pass, or more memory, than allowed.
    OverBound,
    /// Nine of ten queries leave the loss as it was, or move it by rounding alone.
    ///
    /// A step-shaped loss, too small a σ, or a loss with a large constant in it.
    UnmovedLoss,
    /// The same examples with the same parameters give another loss.
    ///
    /// A model or a service with random numbers of its own.
    NoisyLoss,
    /// The loss has risen by orders of magnitude: training has diverged.
    ExplodingLoss,
    /// Every batch holds one example, so allocation has nothing to divide.
    SingleExamples,
}

named_enum! {
    Signature: "failure signature" {
        HighVariance => "high-variance",
        OscillatingLoss => "oscillating-loss",
        SlowConvergence => "slow-convergence",
        OverBound => "over-bound",
        UnmovedLoss => "unmoved-loss",
        NoisyLoss => "noisy-loss",
        ExplodingLoss => "exploding-loss",
        SingleExamples => "single-examples",
    }
}

/// One line that says what is wrong and what to do about it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Advice {
    /// The failure recognised.
    pub signature: Signature,
    /// Number of the step, from 0.
    pub step: u64,
    /// The figures and a remedy.
    pub message: String,
}

/// Bounds that [`Signature::OverBound`] checks; `None` for no bound.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bounds {
    /// Rows of a forward pass; a learner sets the estimator's `max_rows`.
    pub rows: Option<u64>,
    /// Resident memory of the process in bytes.
    pub memory: Option<u64>,
}
