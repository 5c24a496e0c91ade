//! The failures that are recognised, and the advice on them.

use serde::{Deserialize, Serialize};

use crate::names::named_enum;

/// A common failure of forward-only training.
///
/// | signature | what is seen | what it means |
/// |---|---|---|
/// | [`HighVariance`](Self::HighVariance) | the estimate is nearly all noise, though every example has enough queries | a poor allocation, or too many perturbed coordinates |
/// | [`OscillatingLoss`](Self::OscillatingLoss) | the loss goes up and down by more than its scatter from batch to batch | too large a step, of the model or of the allocator |
/// | [`SlowConvergence`](Self::SlowConvergence) | the allocation is near its optimum, and the loss stands still | the allocation does not limit training |
/// | [`OverBound`](Self::OverBound) | more rows in a pass, or more memory, than allowed | an allocation or a model beyond its bounds |
/// | [`UnmovedLoss`](Self::UnmovedLoss) | nine of ten queries leave the loss as it was, or move it by rounding alone | a step-shaped loss, too small a σ, or a loss with a large constant in it |
/// | [`NoisyLoss`](Self::NoisyLoss) | the same examples with the same parameters give another loss | a model or a service with random numbers of its own |
/// | [`ExplodingLoss`](Self::ExplodingLoss) | the loss has risen by orders of magnitude | training has diverged |
/// | [`SingleExamples`](Self::SingleExamples) | batches of one example | allocation has nothing to divide |
///
/// The first three are decided every 50 steps, over a window of 200. Of these, a high variance and
/// slow convergence are not reported where the loss itself is at fault. The others are looked at in
/// every step. None of them changes what is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Signature {
    /// The variance of the estimate is high despite enough queries.
    HighVariance,
    /// The training loss oscillates.
    OscillatingLoss,
    /// Convergence is slow although the allocation is near its optimum.
    SlowConvergence,
    /// The rows of a pass or the memory exceed their bound.
    OverBound,
    /// Queries do not move the loss.
    UnmovedLoss,
    /// The loss itself is noisy.
    NoisyLoss,
    /// The loss has risen by orders of magnitude.
    ExplodingLoss,
    /// Every batch holds one example.
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
