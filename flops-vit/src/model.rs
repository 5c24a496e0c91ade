//! The vision transformer (Dosovitskiy et al. 2021, arXiv 2010.11929), every layer called through the probe.

use burn::module::Param;
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::{Initializer, LayerNorm, LayerNormConfig, Linear, LinearConfig};
use burn::prelude::*;
use flops_core::{ForwardModel, Probe, cross_entropy};

pub use crate::block::{Attention, Block};
use crate::config::ViTConfig;
use crate::error::VitError;

/// timm's initialisation of weights; biases follow the same law, at a size that does not matter.
pub(crate) const INIT: Initializer = Initializer::Normal { mean: 0.0, std: 0.02 };

/// A vision transformer that classifies by its class token.
///
/// # Example
/// ```
/// use burn::backend::Flex;
/// use burn::prelude::*;
/// use flops_core::{ForwardModel, Probe};
/// use flops_vit::ViTConfig;
///
/// let device = Default::default();
/// let model = ViTConfig::vit_micro_patch4_32().init::<Flex>(&device).unwrap();
/// let images = Tensor::zeros([2, 3, 32, 32], &device);
/// let logits = model.forward(images, &mut Probe::clean());
/// assert_eq!(logits.dims(), [2, 10]);
/// ```
#[derive(Module, Debug)]
pub struct ViT<B: Backend> {
    /// Patches to tokens: a convolution whose stride is its kernel.
    pub patch_embed: Conv2d<B>,
    /// Class token, `[1, 1, embed_dim]`.
    pub cls_token: Param<Tensor<B, 3>>,
    /// Positional embedding, `[1, tokens, embed_dim]`.
    pub pos_embed: Param<Tensor<B, 3>>,
    /// The blocks, first to last.
    pub blocks: Vec<Block<B>>,
    /// Final normalisation.
    pub norm: LayerNorm<B>,
    /// Classifier.
    pub head: Linear<B>,
}

impl ViTConfig {
    /// A model with timm's random initialisation.
    ///
    /// # Errors
    /// Where the sizes do not fit together, see [`validate`](Self::validate).
    pub fn init<B: Backend>(&self, device: &B::Device) -> Result<ViT<B>, VitError> {
        self.validate()?;
        let d = self.embed_dim;
        let patch = [self.patch_size; 2];
        let model = ViT {
            patch_embed: Conv2dConfig::new([self.in_chans, d], patch)
                .with_stride(patch)
                .with_initializer(INIT)
                .init(device),
            cls_token: INIT.init([1, 1, d], device),
            pos_embed: INIT.init([1, self.num_tokens(), d], device),
            blocks: (0..self.depth).map(|_| Block::new(self, device)).collect(),
            norm: LayerNormConfig::new(d).with_epsilon(self.layer_norm_eps).init(device),
            head: LinearConfig::new(d, self.num_classes).with_initializer(INIT).init(device),
        };
        // parameters are made on first use; made now, so that clones are the same model
        let _ = model.num_params();
        Ok(model)
    }
}

impl<B: Backend> ViT<B> {
    /// Patches, class token and positions.
    ///
    /// # Shapes
    /// - images: `[rows, in_chans, img_size, img_size]`
    /// - returns: `[rows, tokens, embed_dim]`
    pub fn forward_embed(&self, images: Tensor<B, 4>, probe: &mut Probe<B>) -> Tensor<B, 3> {
        let patches = probe.conv2d(&self.patch_embed, images).flatten::<3>(2, 3).swap_dims(1, 2);
        let cls = probe.param(&self.cls_token);
        let pos = probe.param(&self.pos_embed);
        let x = probe.cat(vec![cls, patches], 1);
        probe.add(x, pos)
    }

    /// All tokens behind the final normalisation, `[rows, tokens, embed_dim]`.
    ///
    /// Classification needs the class token alone: [`forward`](ForwardModel::forward) does not compute the other tokens of the
    /// last block, and gives the same logits.
    pub fn forward_features(&self, images: Tensor<B, 4>, probe: &mut Probe<B>) -> Tensor<B, 3> {
        let mut x = self.forward_embed(images, probe);
        for block in &self.blocks {
            x = block.forward(x, probe);
        }
        probe.layer_norm(&self.norm, x)
    }

    /// Logits from [`forward_features`](Self::forward_features), `[rows, num_classes]`.
    pub fn forward_head(&self, features: Tensor<B, 3>, probe: &mut Probe<B>) -> Tensor<B, 2> {
        let cls = features.narrow(1, 0, 1).squeeze_dim::<2>(1);
        probe.embed(&cls);
        probe.linear(&self.head, cls)
    }

    /// Puts a freshly initialised head of `num_classes` classes in place of this one.
    ///
    /// Weights are N(0, 0.02²) and biases zero, from `seed` alone.
    pub fn with_new_head(mut self, num_classes: usize, seed: u64) -> Self {
        use rand::SeedableRng;
        let [d, _] = self.head.weight.dims();
        let device = self.head.weight.device();
        let mut rng = rand::rngs::StdRng::seed_from_u64(seed);
        let weight =
            TensorData::random::<f32, _, _>([d, num_classes], burn::tensor::Distribution::Normal(0.0, 0.02), &mut rng);
        self.head = Linear {
            weight: Param::from_tensor(Tensor::from_data(weight, &device)),
            bias: Some(Param::from_tensor(Tensor::zeros([num_classes], &device))),
        };
        self
    }
}

impl<B: Backend> ForwardModel<B> for ViT<B> {
    type Input = Tensor<B, 4>;
    type Target = Tensor<B, 1, Int>;
    type Output = Tensor<B, 2>;

    fn forward(&self, images: Tensor<B, 4>, probe: &mut Probe<B>) -> Tensor<B, 2> {
        let mut x = probe.stage(images, |images, probe| self.forward_embed(images, probe));
        let (last, before) = match self.blocks.split_last() {
            Some(split) => split,
            None => return self.forward_head(x, probe),
        };
        for block in before {
            x = probe.stage(x, |x, probe| block.forward(x, probe));
        }
        // nothing but the class token reaches the loss: of the other tokens the last block needs keys and values
        let state = probe.stage(x, |x, probe| last.keys_values(x, probe));
        let features = probe.stage(state, |state, probe| {
            let x = last.class_token(state, probe);
            probe.layer_norm(&self.norm, x)
        });
        self.forward_head(features, probe)
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
