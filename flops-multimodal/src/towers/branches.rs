//! The residual branches of an encoder layer as modules, each one site.
//!
//! They share the parameters of the layer: parameters are reference-counted, nothing is copied.

use burn::nn::{LayerNorm, Linear};
use burn::prelude::*;
use flops_core::{Probe, site};

use super::layers::{Activation, EncoderLayer, attend};

/// What attention adds to the stream.
#[derive(Module, Debug)]
pub(crate) struct AttentionBranch<B: Backend> {
    /// The norm in front; `None` where the layer normalises afterwards.
    norm: Option<LayerNorm<B>>,
    query: Linear<B>,
    key: Linear<B>,
    value: Linear<B>,
    proj: Linear<B>,
    num_heads: usize,
}

impl<B: Backend> AttentionBranch<B> {
    pub fn new(layer: &EncoderLayer<B>, norm: Option<LayerNorm<B>>) -> Self {
        Self {
            norm,
            query: layer.query.clone(),
            key: layer.key.clone(),
            value: layer.value.clone(),
            proj: layer.proj.clone(),
            num_heads: layer.num_heads,
        }
    }

    /// The branch as a site. Its input holds `bias`, so a query repeats the rows of both alike.
    pub fn site(&self, x: Tensor<B, 3>, bias: Option<&Tensor<B, 4>>, probe: &mut Probe<B>) -> Tensor<B, 3> {
        site!(probe, self, (x, bias.cloned()), |branch, (x, bias)| branch.forward(x, bias))
    }

    fn forward(&self, x: Tensor<B, 3>, bias: Option<Tensor<B, 4>>) -> Tensor<B, 3> {
        let probe = &mut Probe::clean();
        let x = match &self.norm {
            Some(norm) => probe.layer_norm(norm, x),
            None => x,
        };
        attend([&self.query, &self.key, &self.value, &self.proj], self.num_heads, x, bias.as_ref(), probe)
    }
}

/// What the MLP adds to the stream.
#[derive(Module, Debug)]
pub(crate) struct MlpBranch<B: Backend> {
    /// The norm in front; `None` where the layer normalises afterwards.
    norm: Option<LayerNorm<B>>,
    fc1: Linear<B>,
    fc2: Linear<B>,
    #[module(skip)]
    activation: Activation,
}

impl<B: Backend> MlpBranch<B> {
    pub fn new(layer: &EncoderLayer<B>, norm: Option<LayerNorm<B>>) -> Self {
        Self { norm, fc1: layer.fc1.clone(), fc2: layer.fc2.clone(), activation: layer.activation }
    }

    /// The branch as a site.
    pub fn site(&self, x: Tensor<B, 3>, probe: &mut Probe<B>) -> Tensor<B, 3> {
        site!(probe, self, x, |branch, x| branch.forward(x))
    }

    fn forward(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        let probe = &mut Probe::clean();
        let x = match &self.norm {
            Some(norm) => probe.layer_norm(norm, x),
            None => x,
        };
        let h = self.activation.forward(probe.linear(&self.fc1, x));
        probe.linear(&self.fc2, h)
    }
}
