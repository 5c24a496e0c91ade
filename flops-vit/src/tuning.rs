//! Settings to start from, by model and scope.
//!
//! For AdamW under a learning rate that falls to zero as a cosine, with the estimator's defaults. *Measured* means that it was picked from runs of
//! `examples/vit_cifar.rs` on the embedded digits; the README has the figures. The others are a guess from these: more perturbed coordinates, a smaller rate.
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
//! The rule for other widths is that of Adam in the maximal update parametrisation (Yang et al. 2022, arXiv 2203.03466), where the learning rate of
//! a hidden layer falls with its width.

use crate::config::ViTConfig;
use crate::scope::Scope;

/// The width that the learning rates were picked at.
const WIDTH: f64 = 128.0;

/// Settings to start from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FineTuning {
    /// Learning rate of AdamW at the start, per step.
    pub lr: f64,
    /// Whether it comes from a measurement; if not, it is a guess from one.
    pub measured: bool,
}

impl FineTuning {
    /// The head's learning rate as a multiple of it.
    pub const HEAD_LR_FACTOR: f64 = 4.0;
    /// Decoupled weight decay, in units of the learning rate.
    pub const WEIGHT_DECAY: f64 = 0.1;
    /// Queries of a datum and step, on average.
    pub const QUERIES: usize = 20;

    /// The settings for a model of that configuration.
    ///
    /// # Example
    /// ```
    /// use flops_vit::{FineTuning, Scope, ViTConfig};
    ///
    /// let tuning = FineTuning::new(&ViTConfig::vit_micro_patch4_32(), Scope::ClsTail);
    /// assert_eq!((tuning.lr, tuning.measured), (5e-3, true));
    /// ```
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
    fn the_learning_rate_falls_with_the_width() {
        let base = FineTuning::new(&ViTConfig::vit_base_patch16_224(), Scope::ClsTail);
        assert!((base.lr - 5e-3 / 6.0).abs() < 1e-12 && !base.measured);
        assert!(!FineTuning::new(&ViTConfig::vit_micro_patch4_32(), Scope::Last(3)).measured);
    }

    /// The estimator's default is the one that was measured.
    #[test]
    fn the_smoothing_scale_is_the_estimator_s() {
        assert_eq!(flops_core::Estimator::new(flops_core::Space::Activation).sigma, 1e-2);
    }
}
