//! A network that burn-onnx made of `models/network.onnx`, and what one writes to train it.

// `Model`, with its weights: normalisation of the pixels, two linear layers, a ReLU between them
include!(concat!(env!("OUT_DIR"), "/network.rs"));

use burn::tensor::activation::relu;
use flops_core::{ForwardModel, Probe, cross_entropy};

impl<B: Backend> Model<B> {
    /// Mean and scale of the pixels, which nothing trains: burn-onnx calls them by numbers.
    pub fn constants(&self) -> [Tensor<B, 1>; 2] {
        [self.constant1.val(), self.constant2.val()]
    }
}

// ---- weight noise: the generated code as it is ---------------------------------------------------

impl<B: Backend> ForwardModel<B> for Model<B> {
    type Input = Tensor<B, 2>;
    type Target = Tensor<B, 1, Int>;
    type Output = Tensor<B, 2>;

    fn forward(&self, pixels: Tensor<B, 2>, _: &mut Probe<B>) -> Tensor<B, 2> {
        self.forward(pixels)
    }

    fn losses(&self, logits: Tensor<B, 2>, labels: Tensor<B, 1, Int>) -> Tensor<B, 1> {
        cross_entropy(logits, labels)
    }
}

// ---- activation noise: the same fields, the layers through the probe -----------------------------

/// The imported network with a forward pass that calls its layers through the probe.
#[derive(Module, Debug)]
pub struct Probed<B: Backend> {
    /// The network.
    pub network: Model<B>,
}

impl<B: Backend> ForwardModel<B> for Probed<B> {
    type Input = Tensor<B, 2>;
    type Target = Tensor<B, 1, Int>;
    type Output = Tensor<B, 2>;

    fn forward(&self, pixels: Tensor<B, 2>, probe: &mut Probe<B>) -> Tensor<B, 2> {
        let Model { linear1, linear2, .. } = &self.network;
        let [mean, scale] = self.network.constants();
        let normalised = (pixels - mean.unsqueeze()) / scale.unsqueeze();
        let hidden = relu(probe.linear(linear1, normalised));
        probe.linear(linear2, hidden)
    }

    fn losses(&self, logits: Tensor<B, 2>, labels: Tensor<B, 1, Int>) -> Tensor<B, 1> {
        cross_entropy(logits, labels)
    }

    fn classification(
        &self,
        logits: &Tensor<B, 2>,
        labels: &Tensor<B, 1, Int>,
    ) -> Option<(Tensor<B, 2>, Tensor<B, 1, Int>)> {
        Some((logits.clone(), labels.clone()))
    }
}
