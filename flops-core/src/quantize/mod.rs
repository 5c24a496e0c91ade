//! Quantized weights: frozen ones, ones that are trained on their grid, and trained scales.
//!
//! A forward pass is all that training takes here, so weights may be integers. [`quantize_frozen`]
//! turns the frozen matrices of any Burn module into integers with scales, and leaves trained
//! parameters alone. [`QuantizeConfig`] has the other choices: trained weights [on a
//! grid](TrainedWeights::Grid), and [trained scales](TrainedWeights::Scales). All give a [`Quantized`]
//! model, which goes into a [`ForwardLearner`](crate::ForwardLearner), and into checkpoints, like
//! any other. `docs/method.md`, *Quantized weights*, has the mathematics.
//!
//! ```
//! # use burn::{backend::{Autodiff, Flex}, nn, prelude::*};
//! # use flops_core::{ForwardModel, Probe, cross_entropy};
//! # #[derive(Module, Debug)]
//! # struct Net<B: Backend> { body: nn::Linear<B>, head: nn::Linear<B> }
//! # impl<B: Backend> ForwardModel<B> for Net<B> {
//! #     type Input = Tensor<B, 2>; type Target = Tensor<B, 1, Int>; type Output = Tensor<B, 2>;
//! #     fn forward(&self, x: Tensor<B, 2>, probe: &mut Probe<B>) -> Tensor<B, 2> {
//! #         let h = probe.linear(&self.body, x);
//! #         probe.linear(&self.head, h.tanh())
//! #     }
//! #     fn losses(&self, y: Tensor<B, 2>, t: Tensor<B, 1, Int>) -> Tensor<B, 1> {
//! #         cross_entropy(y, t)
//! #     }
//! # }
//! use flops_core::allocator::Neyman;
//! use flops_core::quantize::{WeightScheme, quantize_frozen};
//! use flops_core::{ForwardConfig, ForwardLearner, QueryBudget};
//!
//! type B = Autodiff<Flex>;
//! let device = Default::default();
//! let body = nn::LinearConfig::new(16, 64).init::<B>(&device).no_grad();
//! let net = Net { body, head: nn::LinearConfig::new(64, 3).init(&device) };
//! let quantized = quantize_frozen(net, WeightScheme::Int4)?;
//! assert_eq!(quantized.report().to_string(), "1 parameters quantized; floats: 1 (trained), 2 (no matrix)");
//! let bytes = quantized.weight_bytes();
//! assert!(2 * bytes.held() < bytes.as_floats);
//! let learner = ForwardLearner::new(quantized, Neyman, ForwardConfig::new(QueryBudget::new(20, 1)?))?;
//! # let _ = learner;
//! # Ok::<(), flops_core::Error>(())
//! ```

mod codes;
mod find;
mod quantized;
mod record;
mod report;
mod scheme;
mod weight;

#[cfg(test)]
mod tests;

use burn::module::Module;
use burn::prelude::Backend;
use burn::tensor::quantization::QuantScheme;

pub use quantized::Quantized;
pub use record::{QuantizedItem, QuantizedRecord};
pub use report::{Kept, ParameterReport, QuantizeReport, WeightBytes};
pub use scheme::{QuantizeConfig, Rounding, TrainedWeights, Unpack, WeightScheme};

use crate::error::Error;

/// Quantizes the frozen matrices of a model. Trained parameters stay floats, and stay trained.
///
/// `scheme` is a [`WeightScheme`], or any [`QuantScheme`] of Burn with integers and scales in f32.
/// Integers and scales are those of Burn's own quantizer. [`QuantizeConfig::quantize`] has more choices.
///
/// # Errors
/// As [`QuantizeConfig::quantize`].
pub fn quantize_frozen<B: Backend, M: Module<B>>(
    model: M,
    scheme: impl Into<QuantScheme>,
) -> Result<Quantized<B, M>, Error> {
    QuantizeConfig::new(scheme).quantize(model)
}
