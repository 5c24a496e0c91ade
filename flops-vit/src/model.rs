//! The vision transformer (Dosovitskiy et al. 2021, arXiv 2010.11929), every layer called through the probe.

use burn::module::Param;
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::{Initializer, LayerNorm, LayerNormConfig, Linear};
use burn::prelude::*;
use flops_core::{ForwardModel, Probe, cross_entropy};

pub use crate::block::{Attention, Block};
use crate::config::ViTConfig;
use crate::error::VitError;

/// Initial law of weights, class token and positional embedding; biases start at zero.
const INIT: Initializer = Initializer::Normal { mean: 0.0, std: 0.02 };

/// A linear layer with weights N(0, 0.02²) and, where it has one, a bias of zeros.
pub(crate) fn linear<B: Backend>(d_in: usize, d_out: usize, bias: bool, device: &B::Device) -> Linear<B> {
    Linear { weight: INIT.init([d_in, d_out], device), bias: bias.then(|| Initializer::Zeros.init([d_out], device)) }
}

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
    /// A model with random weights: N(0, 0.02²), biases zero, as in timm.
    ///
    /// # Errors
    /// Where the sizes do not fit together, see [`validate`](Self::validate).
    pub fn init<B: Backend>(&self, device: &B::Device) -> Result<ViT<B>, VitError> {
        self.validate()?;
        let model = self.init_lazy(device);
        // parameters are made on first use; made now, so that clones are the same model
        let _ = Module::num_params(&model);
        Ok(model)
    }

    /// The same without making the parameters: nothing is drawn or allocated until they are looked at.
    pub(crate) fn init_lazy<B: Backend>(&self, device: &B::Device) -> ViT<B> {
        let d = self.embed_dim;
        let patch = [self.patch_size; 2];
        let mut patch_embed =
            Conv2dConfig::new([self.in_chans, d], patch).with_stride(patch).with_initializer(INIT).init(device);
        patch_embed.bias = Some(Initializer::Zeros.init([d], device));
        ViT {
            patch_embed,
            cls_token: INIT.init([1, 1, d], device),
            pos_embed: INIT.init([1, self.num_tokens(), d], device),
            blocks: (0..self.depth).map(|_| Block::new(self, device)).collect(),
            norm: LayerNormConfig::new(d).with_epsilon(self.layer_norm_eps).init(device),
            head: linear(d, self.num_classes, true, device),
        }
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
    /// Weights are N(0, 0.02²) and biases zero, from `seed` alone; both are trainable. A [`Card`](crate::checkpoint::Card) that
    /// goes with the model needs the new `num_classes` and `classes`.
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
        let x = last.class_token(state, probe);
        let features = probe.stage(x, |x, probe| probe.layer_norm(&self.norm, x));
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

#[cfg(test)]
mod tests {
    use super::*;
    use burn::backend::Flex;

    fn model() -> ViT<Flex> {
        let config =
            ViTConfig::new().with_img_size(8).with_patch_size(4).with_embed_dim(8).with_depth(2).with_num_heads(2);
        config.with_num_classes(3).init(&Default::default()).unwrap()
    }

    #[test]
    fn biases_start_at_zero_and_weights_do_not() {
        let model = model();
        let block = &model.blocks[1];
        let linear = [&block.attn.query, &block.attn.key, &block.attn.value, &block.attn.proj, &block.fc1, &block.fc2];
        for layer in linear.into_iter().chain([&model.head]) {
            assert_eq!(layer.bias.as_ref().unwrap().val().abs().max().into_scalar(), 0.0);
            let largest = layer.weight.val().abs().max().into_scalar();
            assert!(0.0 < largest && largest < 0.2, "largest weight {largest}");
        }
        assert_eq!(model.patch_embed.bias.as_ref().unwrap().val().abs().max().into_scalar(), 0.0);
        assert_eq!(block.fc1.weight.dims(), [8, 32]);
    }

    #[test]
    fn a_new_head_depends_on_its_seed_alone() {
        let head = |model: ViT<Flex>, seed| model.with_new_head(5, seed).head;
        let (a, b, other) = (head(model(), 7), head(model(), 7), head(model(), 8));
        assert_eq!(a.weight.dims(), [8, 5]);
        assert_eq!(a.weight.to_data(), b.weight.to_data());
        assert_ne!(a.weight.to_data(), other.weight.to_data());
        assert_eq!(a.bias.unwrap().to_data(), TensorData::from([0.0f32; 5]));
    }

    #[test]
    fn the_class_token_path_gives_the_same_logits() {
        let images = Tensor::from_data(
            TensorData::new((0..384).map(|i| (i as f32).sin()).collect(), [2, 3, 8, 8]),
            &Default::default(),
        );
        let (model, mut probe) = (model(), Probe::clean());
        let all = model.forward_head(model.forward_features(images.clone(), &mut probe), &mut probe);
        let short = model.forward(images, &mut Probe::clean());
        let distance: f32 = (all - short).abs().max().into_scalar();
        assert!(distance < 1e-6, "logits differ by {distance}");
    }
}
