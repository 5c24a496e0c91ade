//! A control variate for activation noise, learned from the queries of training.
//!
//! # What it does
//! g_j is the gradient of example j with respect to a site's output. A query of example j with
//! noise ε measures c_jq ≈ g_jᵀε. Given a prediction h_j of g_j, only the rest has to be measured:
//!
//! ĝ_j = h_j + (1/A_j) Σ_q (c_jq − h_jᵀε_jq)·s(ε_jq).
//!
//! The mean is unchanged, since E[(h_jᵀε)·s(ε)] = h_j for every law of unit variance. The variance
//! is that of a gradient g_j − h_j.
//!
//! # How gradients are predicted
//! The prediction is linear in the error signals r_j of the model's output: h_j = γ·r_jᵀW. For a
//! classifier r_j = softmax(logits_j) − onehot(label_j). W is learned, as the ridge regression of
//! the estimated gradients on the signals of recent steps. Backpropagation computes such feedback
//! exactly, and direct feedback alignment (Nøkland 2016, arXiv 1609.01596) draws it at random.
//!
//! The gain γ ∈ [0, 1] of a site is the regression coefficient of the gradients on earlier
//! predictions. A prediction that explains nothing is therefore not used.
//!
//! # What it is kept under
//! W and γ belong to a site and a width: the key of the layer, and its perturbed coordinates. A
//! step predicts where it meets both again. Elsewhere there is no prediction in this step, and only
//! that site starts anew. Other widths of a site are kept for when they come back.
//!
//! # Why it does not bias
//! W, γ and r_j are fixed before the noise of a step is drawn. The estimate is therefore as
//! unbiased with the control variate as without it, and no derivative of the model or the loss is
//! taken.
//!
//! FLOPS (arXiv 2410.05966) has no control variate but the clean loss; this is an addition.

mod observation;
mod prediction;
mod predictor;
#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

use crate::names::named_enum;
pub use observation::Observation;
pub use prediction::Prediction;
pub use predictor::GradientPredictor;

/// The control variate that is subtracted from the queries' losses, besides the clean loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum ControlVariate {
    /// The clean loss alone.
    None,
    /// The [learned prediction](self) of the gradients.
    ///
    /// It needs the activation space. Sites with more than 4,096 perturbed coordinates per row go
    /// without.
    Prediction,
}

named_enum! { ControlVariate: "control variate" { None => "none", Prediction => "prediction" } }
