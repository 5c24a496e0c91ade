//! Small networks from images to logits, for training from scratch.

use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::{Initializer, Linear, PaddingConfig2d};
use burn::prelude::*;
use burn::tensor::activation::relu;
use burn::tensor::module::avg_pool2d;
use flops_core::{ForwardModel, Probe, cross_entropy};
use flops_vit::Sites;

use super::classifier::Classifier;
use super::mlp::{he_linear, he_weights};
use crate::backend::{AB, B, Device};

/// Width of both hidden layers of [`SmallNet::mlp`].
const HIDDEN: usize = 64;
/// Channels of the two convolutions of [`SmallNet::cnn`].
const CHANNELS: [usize; 2] = [16, 32];

/// Convolutions, each with a ReLU and a pooling of 2 × 2, hidden layers with ReLUs, and a
/// classifier. Each layer is a site and a stage.
#[derive(Module, Debug)]
pub struct SmallNet<B: Backend> {
    convolutions: Vec<Conv2d<B>>,
    hidden: Vec<Linear<B>>,
    head: Linear<B>,
}

impl SmallNet<AB> {
    /// Creates two hidden layers with random weights for images of side `img_size`.
    pub fn mlp(img_size: usize, classes: usize, seed: u64, device: &Device) -> Self {
        let layer = |sizes, index| he_linear(sizes, 3 * seed + index, device);
        let hidden = vec![layer([3 * img_size * img_size, HIDDEN], 0), layer([HIDDEN, HIDDEN], 1)];
        Self { convolutions: vec![], hidden, head: layer([HIDDEN, classes], 2) }
    }

    /// Creates two convolutions with random weights for images of side `img_size`, a multiple of 4.
    pub fn cnn(img_size: usize, classes: usize, seed: u64, device: &Device) -> Self {
        let [first, second] = CHANNELS;
        let convolution = |channels, index| he_convolution(channels, 3 * seed + index, device);
        let convolutions = vec![convolution([3, first], 0), convolution([first, second], 1)];
        let features = second * (img_size / 4) * (img_size / 4);
        Self { convolutions, hidden: vec![], head: he_linear([features, classes], 3 * seed + 2, device) }
    }
}

/// Creates a convolution of 3 × 3 that keeps the size, with N(0, 2/fan-in) weights drawn from
/// `seed` and zero biases.
fn he_convolution([inputs, outputs]: [usize; 2], seed: u64, device: &Device) -> Conv2d<AB> {
    let config = Conv2dConfig::new([inputs, outputs], [3, 3]).with_padding(PaddingConfig2d::Same);
    let mut layer = config.with_initializer(Initializer::Zeros).init::<AB>(device);
    layer.weight = he_weights(layer.weight, 9 * inputs, seed);
    layer
}

impl<B: Backend> ForwardModel<B> for SmallNet<B> {
    type Input = Tensor<B, 4>;
    type Target = Tensor<B, 1, Int>;
    type Output = Tensor<B, 2>;

    fn forward(&self, images: Tensor<B, 4>, probe: &mut Probe<B>) -> Tensor<B, 2> {
        let mut x = images;
        for layer in &self.convolutions {
            x = probe.stage(x, |x, probe| {
                let h = relu(probe.conv2d(layer, x));
                avg_pool2d(h, [2, 2], [2, 2], [0, 0], false, false)
            });
        }
        let mut x = probe.stage(x, |x, _| x.flatten::<2>(1, 3));
        for layer in &self.hidden {
            x = probe.stage(x, |x, probe| relu(probe.linear(layer, x)));
        }
        probe.embed(&x);
        probe.linear(&self.head, x)
    }

    fn losses(&self, logits: Tensor<B, 2>, target: Tensor<B, 1, Int>) -> Tensor<B, 1> {
        cross_entropy(logits, target)
    }

    fn classification(
        &self,
        logits: &Tensor<B, 2>,
        target: &Tensor<B, 1, Int>,
    ) -> Option<(Tensor<B, 2>, Tensor<B, 1, Int>)> {
        Some((logits.clone(), target.clone()))
    }
}

impl Classifier for SmallNet<AB> {
    type Plain = SmallNet<B>;

    fn at_sites(self, sites: Sites) -> Option<Self> {
        (sites == Sites::Linear).then_some(self)
    }
}

#[cfg(test)]
mod tests {
    use burn::module::AutodiffModule;

    use super::*;

    #[test]
    fn networks_give_logits_and_depend_on_the_seed() {
        let device = Default::default();
        let images = Tensor::<B, 4>::ones([2, 3, 8, 8], &device);
        let logits = |seed: u64| {
            let mlp = SmallNet::mlp(8, 5, seed, &device).valid().forward(images.clone(), &mut Probe::clean());
            let cnn = SmallNet::cnn(8, 5, seed, &device).valid().forward(images.clone(), &mut Probe::clean());
            assert_eq!((mlp.dims(), cnn.dims()), ([2, 5], [2, 5]));
            [mlp, cnn].map(|logits| logits.into_data().to_vec::<f32>().unwrap())
        };
        assert_eq!(logits(1), logits(1));
        assert!(logits(1).iter().zip(logits(2)).all(|(a, b)| *a != b));
    }

    #[test]
    fn only_a_vit_has_branches() {
        let device = Default::default();
        assert!(SmallNet::mlp(8, 5, 0, &device).at_sites(Sites::Branch).is_none());
        assert!(SmallNet::cnn(8, 5, 0, &device).at_sites(Sites::Linear).is_some());
    }
}
