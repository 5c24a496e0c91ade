//! Recommended hyper-parameters, by model and scope.
//!
//! They are for AdamW with a cosine decay of the learning rate to zero, and the estimator's
//! defaults. *Measured* rates were picked from runs of `examples/vit_cifar` on the embedded
//! digits; `docs/results.md` has the figures. The others are guesses from these: more perturbed
//! coordinates, a smaller rate.
//!
//! | model | scope | lr | noise on | estimate | σ | measured |
//! |---|---|---|---|---|---|---|
//! | `vit_micro_patch4_32` | `head`, `cls_tail` | 5·10⁻³ | layers | unbiased | 10⁻² | yes |
//! | `vit_micro_patch4_32` | `last:1` | 5·10⁻³ | branches | unbiased | 10⁻² | yes |
//! | `vit_micro_patch4_32` | `last:K` with K > 1 | 10⁻³ | branches | shrunk | 2·10⁻² | K = 3, one seed |
//! | `vit_micro_patch4_32` | `full` | 10⁻³ | branches | shrunk | 2·10⁻² | yes |
//! | `vit_micro_patch4_32` | `lora:R` (R = 4), `bias_norm` | 8·10⁻³ | layers | unbiased | 10⁻² | one seed |
//! | others | as above | lr·min(1, 128/embed_dim) | as above | as above | as above | no |
//!
//! Everywhere the head's factor is 4, that of the embeddings 0.1, weight decay 0.1 and β₂ 0.95, at
//! 20 queries an example. A shrunk estimate is biased
//! ([`GradientEstimate::Shrunk`]).
//!
//! Other widths follow the rule for Adam in the maximal update parametrisation (Yang et al. 2022,
//! arXiv 2203.03466). The learning rate of a hidden layer falls with its width.

use flops_core::GradientEstimate;

use crate::config::ViTConfig;
use crate::scope::Scope;
use crate::sites::Sites;

/// The width at which the learning rates were picked.
const WIDTH: f64 = 128.0;

/// Recommended activation noise for fine-tuning.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Noise {
    /// What it falls on.
    pub sites: Sites,
    /// What the queries are used for.
    pub estimate: GradientEstimate,
    /// Smoothing scale σ.
    pub sigma: f64,
}

impl Noise {
    /// Returns the noise for a scope.
    ///
    /// Where many coordinates are perturbed, queries alone carry little: the estimate is shrunk
    /// towards the prediction there, which is biased.
    #[must_use]
    pub fn new(scope: Scope) -> Self {
        let (sites, estimate, sigma) = match scope {
            Scope::Head | Scope::ClsTail | Scope::Lora(_) | Scope::BiasNorm => {
                (Sites::Linear, GradientEstimate::Unbiased, 1e-2)
            }
            Scope::Last(1) => (Sites::Branch, GradientEstimate::Unbiased, 1e-2),
            Scope::Last(_) | Scope::Full => (Sites::Branch, GradientEstimate::Shrunk, 2e-2),
        };
        Self { sites, estimate, sigma }
    }
}

/// Recommended hyper-parameters for fine-tuning.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct FineTuning {
    /// Initial learning rate of AdamW.
    pub lr: f64,
    /// The noise of the queries.
    pub noise: Noise,
    /// Whether the rate was measured; if not, it is a guess from measured ones.
    pub measured: bool,
}

impl FineTuning {
    /// The head's learning rate as a multiple of [`lr`](Self::lr).
    pub const HEAD_LR_FACTOR: f64 = 4.0;
    /// The embeddings' learning rate as a multiple of [`lr`](Self::lr), where they are trained.
    ///
    /// Their values are small, about 0.02 at the start, and Adam's steps are as long for them as
    /// for all others. Fine-tuning with rates that fall towards the input is customary (BEiT, Bao et al.
    /// 2022, arXiv 2106.08254).
    pub const EMBED_LR_FACTOR: f64 = 0.1;
    /// Adam's β₂. Burn's default, 0.999, remembers the noisy estimates of the first steps for longer
    /// than a short run lasts.
    pub const BETA_2: f32 = 0.95;
    /// Decoupled weight decay, as a multiple of the learning rate.
    pub const WEIGHT_DECAY: f64 = 0.1;
    /// Average queries per example and step.
    pub const QUERIES: usize = 20;

    /// Returns the settings for a model of that configuration.
    ///
    /// # Example
    /// ```
    /// use flops_vit::{FineTuning, Scope, ViTConfig};
    ///
    /// let tuning = FineTuning::new(&ViTConfig::vit_micro_patch4_32(), Scope::ClsTail);
    /// assert_eq!((tuning.lr, tuning.measured), (5e-3, true));
    /// ```
    #[must_use]
    pub fn new(config: &ViTConfig, scope: Scope) -> Self {
        let micro = ViTConfig::vit_micro_patch4_32();
        let same = config.embed_dim == micro.embed_dim && config.depth == micro.depth;
        let (lr, measured) = match scope {
            Scope::Head | Scope::ClsTail => (5e-3, true),
            Scope::Lora(_) | Scope::BiasNorm => (8e-3, true),
            Scope::Last(1) => (5e-3, true),
            Scope::Full | Scope::Last(3) => (1e-3, true),
            Scope::Last(_) => (1e-3, false),
        };
        let lr = lr * (WIDTH / config.embed_dim.max(1) as f64).min(1.0);
        Self { lr, noise: Noise::new(scope), measured: measured && same }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn learning_rate_falls_with_width() {
        let base = FineTuning::new(&ViTConfig::vit_base_patch16_224(), Scope::ClsTail);
        assert!((base.lr - 5e-3 / 6.0).abs() < 1e-12 && !base.measured);
        assert!(!FineTuning::new(&ViTConfig::vit_micro_patch4_32(), Scope::Last(2)).measured);
    }

    #[test]
    fn the_default_noise_of_the_estimator_is_that_of_small_scopes() {
        let (estimator, noise) =
            (flops_core::Estimator::new(flops_core::Space::activation()), Noise::new(Scope::ClsTail));
        assert_eq!((estimator.sigma, estimator.space.estimate()), (noise.sigma, noise.estimate));
        assert_eq!(Sites::default(), noise.sites);
    }

    #[test]
    fn deep_scopes_are_shrunk_towards_the_prediction() {
        for (scope, estimate) in [
            (Scope::Full, GradientEstimate::Shrunk),
            (Scope::Last(2), GradientEstimate::Shrunk),
            (Scope::Last(1), GradientEstimate::Unbiased),
        ] {
            assert_eq!((Noise::new(scope).sites, Noise::new(scope).estimate), (Sites::Branch, estimate), "{scope}");
        }
    }
}
