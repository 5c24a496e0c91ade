//! Recommended hyper-parameters, by model and scope.
//!
//! They are for AdamW with a cosine decay of the learning rate to zero, and the estimator's
//! defaults. *Measured* rates were picked from runs of `examples/vit_cifar.rs` on the embedded
//! digits; the README has the figures. The others are guesses from these: more perturbed
//! coordinates, a smaller rate.
//!
//! | model | scope | lr | head's factor | weight decay | σ | queries | measured |
//! |---|---|---|---|---|---|---|---|
//! | `vit_micro_patch4_32` | `head`, `cls_tail` | 5·10⁻³ | 4 | 0.1 | 10⁻² | 20 | yes |
//! | `vit_micro_patch4_32` | `last:1` | 5·10⁻³ | 4 | 0.1 | 10⁻² | 20 | one seed |
//! | `vit_micro_patch4_32` | `lora:R` (R = 4), `bias_norm` | 8·10⁻³ | 4 | 0.1 | 10⁻² | 20 | one seed |
//! | `vit_micro_patch4_32` | `full` | 2·10⁻³ | 4 | 0.1 | 10⁻² | 20 | one seed |
//! | `vit_micro_patch4_32` | `last:K` with K > 1 | 2·10⁻³ | 4 | 0.1 | 10⁻² | 20 | no |
//! | others | as above | lr·min(1, 128/embed_dim) | 4 | 0.1 | 10⁻² | 20 | no |
//!
//! Other widths follow the rule for Adam in the maximal update parametrisation (Yang et al. 2022,
//! arXiv 2203.03466). The learning rate of a hidden layer falls with its width.

use crate::config::ViTConfig;
use crate::scope::Scope;

/// The width at which the learning rates were picked.
const WIDTH: f64 = 128.0;

/// Recommended hyper-parameters for fine-tuning.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct FineTuning {
    /// Initial learning rate of AdamW.
    pub lr: f64,
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
            Scope::Full => (2e-3, true),
            Scope::Last(_) => (2e-3, false),
        };
        Self { lr: lr * (WIDTH / config.embed_dim.max(1) as f64).min(1.0), measured: measured && same }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn learning_rate_falls_with_width() {
        let base = FineTuning::new(&ViTConfig::vit_base_patch16_224(), Scope::ClsTail);
        assert!((base.lr - 5e-3 / 6.0).abs() < 1e-12 && !base.measured);
        assert!(!FineTuning::new(&ViTConfig::vit_micro_patch4_32(), Scope::Last(3)).measured);
    }

    #[test]
    fn default_sigma_is_the_measured_one() {
        assert_eq!(flops_core::Estimator::new(flops_core::Space::activation()).sigma, 1e-2);
    }
}
