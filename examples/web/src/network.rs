//! The network: two linear layers with a ReLU between them.

use burn::module::Param;
use burn::nn::{Initializer, Linear, LinearConfig};
use burn::prelude::*;
use burn::tensor::Distribution;
use burn::tensor::activation::relu;
use flops_core::random::keyed_rng;
use flops_core::{ForwardModel, Probe, cross_entropy};

use crate::digits::{CLASSES, PIXELS};

/// Width of the hidden layer.
pub const HIDDEN: usize = 64;

/// From pixels to logits. Both layers are sites.
#[derive(Module, Debug)]
pub struct Network<B: Backend> {
    hidden: Linear<B>,
    head: Linear<B>,
}

impl<B: Backend> Network<B> {
    /// Creates a network with N(0, 2/fan-in) weights drawn from `seed`, and zero biases.
    pub fn new(seed: u64, device: &B::Device) -> Self {
        let layer = |key, inputs, outputs| {
            let mut layer: Linear<B> =
                LinearConfig::new(inputs, outputs).with_initializer(Initializer::Zeros).init(device);
            let law = Distribution::Normal(0.0, (2.0 / inputs as f64).sqrt());
            let weights = TensorData::random::<f32, _, _>([inputs, outputs], law, &mut keyed_rng([seed, key, 0, 0]));
            layer.weight = Param::from_tensor(Tensor::from_data(weights, device));
            layer
        };
        Self { hidden: layer(0, PIXELS, HIDDEN), head: layer(1, HIDDEN, CLASSES) }
    }
}

impl<B: Backend> ForwardModel<B> for Network<B> {
    /// Pixels `[rows, 64]`.
    type Input = Tensor<B, 2>;
    /// Labels `[rows]`.
    type Target = Tensor<B, 1, Int>;
    /// Logits `[rows, 10]`.
    type Output = Tensor<B, 2>;

    fn forward(&self, pixels: Tensor<B, 2>, probe: &mut Probe<B>) -> Tensor<B, 2> {
        let x = relu(probe.linear(&self.hidden, pixels));
        probe.linear(&self.head, x)
    }

    fn losses(&self, logits: Tensor<B, 2>, labels: Tensor<B, 1, Int>) -> Tensor<B, 1> {
        cross_entropy(logits, labels)
    }
}
