//! What an experiment can train: any network from images to logits.

use burn::module::{AutodiffModule, ModuleDisplay};
use burn::prelude::*;
use flops_core::ForwardModel;
use flops_core::quantize::Quantized;
use flops_vit::{Sites, ViT};

use crate::backend::{AB, B};

/// A network from images to logits, with and without automatic differentiation. Its classifier is
/// the field `head`.
pub trait Classifier:
    AutodiffModule<AB, InnerModule = <Self as Classifier>::Plain>
    + ForwardModel<AB, Input = Tensor<AB, 4>, Target = Tensor<AB, 1, Int>, Output = Tensor<AB, 2>>
    + ModuleDisplay
    + 'static
{
    /// The same network without automatic differentiation.
    type Plain: ForwardModel<B, Input = Tensor<B, 4>, Target = Tensor<B, 1, Int>, Output = Tensor<B, 2>>
        + ModuleDisplay
        + 'static;

    /// Returns the same network with its noise at `sites`; `None` if it has no such sites.
    fn at_sites(self, sites: Sites) -> Option<Self>;
}

impl Classifier for ViT<AB> {
    type Plain = ViT<B>;

    fn at_sites(self, sites: Sites) -> Option<Self> {
        Some(self.with_sites(sites))
    }
}

/// Quantized weights have no backward pass: such a model is trained from forward passes alone.
impl Classifier for Quantized<AB, ViT<AB>> {
    type Plain = Quantized<B, ViT<B>>;

    fn at_sites(self, _: Sites) -> Option<Self> {
        None
    }
}
