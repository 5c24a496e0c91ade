//! A small network, trained in front of a black box, that repaints the images.

use burn::nn::Initializer;
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::prelude::*;
use burn::tensor::activation::{relu, sigmoid};
use flops_core::{ForwardModel, Probe, cross_entropy};

use crate::blackbox::BlackBoxClient;
use crate::error::MultimodalError;

/// A small network that repaints images before the black box sees them.
///
/// An image x becomes x′ = sigmoid(logit(x) + g(2x − 1)). The trained g is two 1×1 convolutions
/// with ReLU between them (after BlackVIP, Oh et al. 2023, arXiv 2303.14773). x′ is an image for
/// every g, and unless the sigmoid saturates, a change of g changes it. g starts at zero, so x′
/// starts at x, with pixels clamped to [0.01, 0.99].
///
/// The network has few weights, so weight noise suits it best: [low
/// rank](flops_core::Space::LowRank), drawn for every query of every image, or
/// [shared](flops_core::Space::Weights) by a pass.
#[derive(Module, Debug)]
pub struct VisualPrompt<B: Backend> {
    /// From the image's channels to the hidden ones.
    pub conv1: Conv2d<B>,
    /// From the hidden channels back to the image's; zero at the start.
    pub conv2: Conv2d<B>,
    #[module(skip)]
    client: BlackBoxClient,
}

impl<B: Backend> VisualPrompt<B> {
    /// A network with `hidden` channels, at least 1, between its convolutions.
    ///
    /// # Errors
    /// [`MultimodalError::Config`] if `hidden` is 0.
    pub fn new(client: BlackBoxClient, hidden: usize, device: &B::Device) -> Result<Self, MultimodalError> {
        if hidden == 0 {
            return Err(MultimodalError::Config { field: "hidden", value: hidden, remedy: "use at least 1 channel" });
        }
        let channels = client.info().image[0];
        let conv1 = Conv2dConfig::new([channels, hidden], [1, 1]).init(device);
        let zero = Initializer::Zeros;
        let mut conv2 = Conv2dConfig::new([hidden, channels], [1, 1]).with_initializer(zero.clone()).init(device);
        conv2.bias = Some(zero.init([channels], device));
        let prompt = Self { conv1, conv2, client };
        // Burn initialises parameters on first use; do it now, so that clones have the same values
        let _ = prompt.num_params();
        Ok(prompt)
    }

    /// The images that the black box sees, in [0, 1].
    ///
    /// # Shapes
    /// - images: `[rows, channels, height, width]`, in [0, 1]; the result has the same shape
    pub fn repaint(&self, images: Tensor<B, 4>, probe: &mut Probe<B>) -> Tensor<B, 4> {
        let hidden = relu(probe.conv2d(&self.conv1, images.clone().mul_scalar(2.0).sub_scalar(1.0)));
        let change = probe.conv2d(&self.conv2, hidden);
        let x = images.clamp(0.01, 0.99);
        let logit = x.clone().log() - x.neg().add_scalar(1.0).log();
        sigmoid(probe.add(logit, change))
    }
}

impl<B: Backend> ForwardModel<B> for VisualPrompt<B> {
    /// Images in [0, 1], `[rows, channels, height, width]`.
    type Input = Tensor<B, 4>;
    type Target = Tensor<B, 1, Int>;
    type Output = Tensor<B, 2>;

    fn forward(&self, images: Tensor<B, 4>, probe: &mut Probe<B>) -> Tensor<B, 2> {
        let images = self.repaint(images, probe);
        self.client.scores(images, None)
    }

    fn losses(&self, scores: Tensor<B, 2>, labels: Tensor<B, 1, Int>) -> Tensor<B, 1> {
        cross_entropy(scores, labels)
    }

    fn classification(
        &self,
        scores: &Tensor<B, 2>,
        labels: &Tensor<B, 1, Int>,
    ) -> Option<(Tensor<B, 2>, Tensor<B, 1, Int>)> {
        Some((scores.clone(), labels.clone()))
    }

    fn failure(&self) -> Option<String> {
        self.client.failure().map(|e| e.to_string())
    }

    /// A black box may charge for every query.
    fn skips_site_check(&self) -> bool {
        true
    }
}
