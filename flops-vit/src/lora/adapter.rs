//! One adapter, and a linear layer with it.

use burn::module::Param;
use burn::nn::Linear;
use burn::prelude::*;
use burn::tensor::Distribution;
use flops_core::Probe;
use rand::rngs::StdRng;

use crate::layers::linear;

/// An adapter: two linear layers without biases, each a site of its own.
#[derive(Module, Debug)]
pub struct Lora<B: Backend> {
    /// A, `[embed_dim, rank]`.
    pub down: Linear<B>,
    /// B, `[rank, embed_dim]`; zero at the start.
    pub up: Linear<B>,
}

impl<B: Backend> Lora<B> {
    /// Draws A from N(0, 1/d); B is zero.
    pub(crate) fn new(d: usize, rank: usize, rng: &mut StdRng, device: &B::Device) -> Self {
        let law = Distribution::Normal(0.0, (d as f64).sqrt().recip());
        let down = Tensor::from_data(TensorData::random::<f32, _, _>([d, rank], law, rng), device);
        let layer = |weight| Linear { weight: Param::from_tensor(weight), bias: None };
        Self { down: layer(down), up: layer(Tensor::zeros([rank, d], device)) }
    }

    /// Makes lazy parameters, to be filled from a file.
    pub(crate) fn lazy(d: usize, rank: usize, device: &B::Device) -> Self {
        Self { down: linear(d, rank, false, device), up: linear(rank, d, false, device) }
    }

    /// The rank: the width between the two layers.
    pub fn rank(&self) -> usize {
        // the shape is known before a lazy parameter is made
        self.down.weight.lazy_shape()[1]
    }

    /// B(Ax).
    fn forward(&self, x: Tensor<B, 3>, probe: &mut Probe<B>) -> Tensor<B, 3> {
        let x = probe.linear(&self.down, x);
        probe.linear(&self.up, x)
    }

    /// Adds B·A to the weight of `layer`.
    pub(crate) fn merged_into(self, mut layer: Linear<B>) -> Linear<B> {
        let change = self.down.weight.val().matmul(self.up.weight.val()).detach();
        layer.weight = layer.weight.map(|weight| {
            let trained = weight.is_require_grad();
            (weight.detach() + change).set_require_grad(trained)
        });
        layer
    }
}

/// The output of `layer`, plus that of its adapter where it has one.
///
/// # Shapes
/// - x: `[rows, tokens, embed_dim]`, and so the result
pub(crate) fn adapted<B: Backend>(
    layer: &Linear<B>,
    lora: &Option<Lora<B>>,
    x: Tensor<B, 3>,
    probe: &mut Probe<B>,
) -> Tensor<B, 3> {
    let Some(lora) = lora else { return probe.linear(layer, x) };
    let y = probe.linear(layer, x.clone());
    let change = lora.forward(x, probe);
    probe.add(y, change)
}
