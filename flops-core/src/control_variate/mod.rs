//! Predicted gradients, learned from the queries of training.
//!
//! # What is predicted
//! g_j is the gradient of example j with respect to a site's output. Let o be the outputs of the
//! model, and r_j = ∂ℓ/∂o its *error signals*, known before any query. For a classifier r_j =
//! softmax(logits_j) − onehot(label_j). Then g_j = r_jᵀJ_j, with J_j the derivative of the outputs
//! at the site. The prediction has one matrix W of a site in place of all J_j:
//!
//! h_j = γ·r_jᵀW.
//!
//! Backpropagation computes such feedback exactly. Direct feedback alignment (Nøkland 2016, arXiv
//! 1609.01596) draws it at random. Weight mirrors (Akrout et al. 2019, arXiv 1904.05391) and node
//! perturbation (Lansdell, Prakash and Kording, ICLR 2020, arXiv 1906.00889) learn it, as here.
//! PseuZO (NeurIPS 2025) is the prediction without its residual.
//!
//! # How it is learned
//! A query with noise ε moves the outputs by Δo ≈ σJ_jε: one equation for each output. What W does
//! not explain of it, the *innovation* Δo/σ − Wε, corrects W:
//!
//! W ← W + Σ_q (Δo_q/σ − Wε_q)ε_qᵀ / (Q + n)
//!
//! with Q queries in the step and n shared coordinates, those of all sites where a query perturbs
//! all: a normalised least-mean-squares step. Its noise falls as W becomes right. Where outputs are
//! not visible, the innovation is the smallest vector that explains Δℓ/σ − r_jᵀWε. Of more than 32
//! signals the principal directions are taken, by a running sketch.
//!
//! Tokens that are [alike](crate::Probe::alike) share their part of W: few unknowns are learned
//! soon. W then stands for the sum over such tokens, and each token has an equal part of h_j.
//!
//! # What it is used for
//! As a *control variate* it leaves the mean of an estimate, and lowers its variance to that of a
//! gradient g_j − h_j:
//!
//! ĝ_j = h_j + (1/A_j) Σ_q (c_jq − h_jᵀε_jq)·s(ε_jq).
//!
//! The mean is unchanged, since E[(h_jᵀε)·s(ε)] = h_j for every law of unit variance.
//!
//! In a [shrunk](GradientEstimate::Shrunk) estimate the second term is measured in the span of W,
//! or has a weight α of its site. It is biased, see there.
//!
//! The gain γ ∈ [0, 1] of a site is the regression coefficient of the queries' coefficients on those
//! predicted. A prediction that explains nothing is therefore not used.
//!
//! # What it is kept under
//! W, γ and α belong to a site and a width: the key of the layer, and its shared coordinates. A
//! step predicts where it meets both again. Elsewhere there is no prediction in this step, and only
//! that site starts anew. Other widths of a site are kept for when they come back.
//!
//! W, γ, α and r_j are fixed before the noise of a step is drawn.
//!
//! FLOPS (arXiv 2410.05966) has no control variate but the clean loss; this is an addition.

mod observation;
mod prediction;
mod predictor;
mod signals;
#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

use crate::names::named_enum;
pub use observation::Observation;
pub(crate) use observation::{ResidualMoments, SiteObservation};
pub(crate) use prediction::PredictedRows;
pub use prediction::Prediction;
pub use predictor::{GradientPredictor, SiteReport};

/// The control variate that is subtracted from the queries' losses, besides the clean loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum ControlVariate {
    /// The clean loss alone.
    None,
    /// The [learned prediction](self) of the gradients.
    ///
    /// It needs the activation space, and a model with [error
    /// signals](crate::ForwardModel::error_signals). A site that would need more than 4 million
    /// weights goes without. So does one of more than 4,096 coordinates whose noise a GPU makes,
    /// unless its tokens share it.
    Prediction,
}

named_enum! { ControlVariate: "control variate" { None => "none", Prediction => "prediction" } }

/// What the queries are used for beside the prediction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum GradientEstimate {
    /// h + residual: the prediction is a control variate, and the estimate is unbiased.
    #[default]
    Unbiased,
    /// h + the part of the residual that can be measured with little noise: less error, and a
    /// **bias**.
    ///
    /// Once the prediction explains 0.1 of a site's gradient, three quarters of the queries have
    /// noise in the *span* of W's rows alone: one coordinate for each signal, and not one for each
    /// value of the output (guided evolution strategies, Maheswaranathan et al. 2019, arXiv
    /// 1806.10230). The residual in the span counts in full. What lies outside is left out: that is
    /// the bias. The other queries have noise on all coordinates, and W learns from them. This needs
    /// a placement on single sites.
    ///
    /// Where there is no span, the residual has a weight α ∈ [0, 1]. The mean squared error at a
    /// site is α²V + (1 − α)²R. V is the variance of the residual's estimate, R the squared norm of
    /// its mean. It is least at α = R/(R + V) (James and Stein 1961). Both are measured in every 8th
    /// step: estimates a and b of the residual's parameter gradient, from two halves of some
    /// examples, have E⟨a, b⟩ = R, and their difference shows V. So R is that of the mean over the
    /// data, and V holds the spread of the examples too. An α below 0.1 counts as 0. With many
    /// queries or few coordinates α goes to 1, and the bias vanishes.
    ///
    /// A prediction is used once it explains 0.3 of a site's gradient, until it explains less than
    /// 0.2. Where it is not used and α is 0, the site is not updated in that step.
    ///
    /// Tokens that are [alike](crate::Probe::alike) share their noise. The residual then follows
    /// the sum of their gradients, and what differs between them is left out: a second bias.
    /// [`StepReport::sites`](crate::train::StepReport::sites) has α, γ and the explained share of
    /// each site.
    Shrunk,
    /// h alone: what [`Shrunk`](Self::Shrunk) is without any residual, with a **bias** that does not
    /// vanish.
    ///
    /// All queries serve to learn W. PseuZO (NeurIPS 2025) trains by such an estimate.
    Predicted,
}

named_enum! {
    GradientEstimate: "gradient estimate" {
        Unbiased => "unbiased",
        Shrunk => "shrunk",
        Predicted => "predicted",
    }
}

impl GradientEstimate {
    /// Whether its mean differs from the gradient.
    #[must_use]
    pub fn is_biased(self) -> bool {
        self != Self::Unbiased
    }
}

/// A shared vector in a record: its values.
mod shared {
    use std::sync::Arc;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub fn serialize<S: Serializer>(values: &Arc<Vec<f32>>, serializer: S) -> Result<S::Ok, S::Error> {
        values.as_slice().serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Arc<Vec<f32>>, D::Error> {
        Vec::deserialize(deserializer).map(Arc::new)
    }
}
