//! The vision transformer (Dosovitskiy et al. 2021, arXiv 2010.11929).

use burn::module::Param;
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::{Initializer, LayerNorm, LayerNormConfig, Linear};
use burn::prelude::*;
use burn::tensor::Distribution;
use flops_core::{ForwardModel, Probe, cross_entropy};
use rand::SeedableRng;
use rand::rngs::StdRng;

pub use crate::block::{Attention, Block};
use crate::config::{Distillation, Pool, ViTConfig};
use crate::error::VitError;
use crate::layers::INIT;
pub use crate::layers::linear;
use crate::positions;
use crate::sites::Sites;

/// A vision transformer that classifies by its class token, or by its pooled patch tokens.
///
/// Every layer is called through the [`Probe`].
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
    /// Maps patches to tokens: a convolution whose stride equals its kernel.
    pub patch_embed: Conv2d<B>,
    /// Class token, `[1, 1, embed_dim]`.
    pub cls_token: Option<Param<Tensor<B, 3>>>,
    /// DeiT's distillation token, `[1, 1, embed_dim]`, after the class token.
    pub dist_token: Option<Param<Tensor<B, 3>>>,
    /// Positional embedding, `[1, tokens, embed_dim]`.
    pub pos_embed: Param<Tensor<B, 3>>,
    /// The blocks, first to last.
    pub blocks: Vec<Block<B>>,
    /// Final normalisation: of the tokens, or of what they are pooled to.
    pub norm: LayerNorm<B>,
    /// Classifier.
    pub head: Linear<B>,
    /// Classifier of the distillation token; the logits are the mean of both.
    pub head_dist: Option<Linear<B>>,
    /// Which features the head classifies.
    #[module(skip)]
    pub pool: Pool,
    /// Whether pooled patch tokens are normalised after pooling, not before.
    #[module(skip)]
    pub fc_norm: bool,
    /// What its sites are.
    #[module(skip)]
    pub sites: Sites,
}

impl ViTConfig {
    /// Makes a model with random weights: N(0, 0.02²), biases zero, as in timm.
    ///
    /// # Errors
    /// [`VitError::Config`] where the sizes do not fit together, see [`validate`](Self::validate).
    pub fn init<B: Backend>(&self, device: &B::Device) -> Result<ViT<B>, VitError> {
        self.validate()?;
        let model = self.init_lazy(device);
        // lazy parameters would be drawn anew in every clone
        let _ = Module::num_params(&model);
        Ok(model)
    }

    /// Makes a model with lazy parameters: nothing is drawn or allocated before first use.
    pub(crate) fn init_lazy<B: Backend>(&self, device: &B::Device) -> ViT<B> {
        let d = self.embed_dim;
        let patch = [self.patch_size; 2];
        let mut patch_embed =
            Conv2dConfig::new([self.in_chans, d], patch).with_stride(patch).with_initializer(INIT).init(device);
        patch_embed.bias = Some(Initializer::Zeros.init([d], device));
        ViT {
            patch_embed,
            cls_token: self.class_token.then(|| INIT.init([1, 1, d], device)),
            dist_token: (self.distillation != Distillation::None).then(|| INIT.init([1, 1, d], device)),
            pos_embed: INIT.init([1, self.num_tokens(), d], device),
            blocks: (0..self.depth).map(|_| Block::new(self, device)).collect(),
            norm: LayerNormConfig::new(d).with_epsilon(self.layer_norm_eps).init(device),
            head: linear(d, self.num_classes, true, device),
            head_dist: (self.distillation == Distillation::Head).then(|| linear(d, self.num_classes, true, device)),
            pool: self.pool,
            fc_norm: self.fc_norm,
            sites: Sites::Linear,
        }
    }
}

impl<B: Backend> ViT<B> {
    /// Embeds images as class token, distillation token and patches, with positions.
    ///
    /// # Shapes
    /// - images: `[rows, in_chans, img_size, img_size]`
    /// - returns: `[rows, tokens, embed_dim]`
    pub fn forward_embed(&self, images: Tensor<B, 4>, probe: &mut Probe<B>) -> Tensor<B, 3> {
        let patches = probe.alike(0, |probe| probe.conv2d(&self.patch_embed, images));
        let patches = patches.flatten::<3>(2, 3).swap_dims(1, 2);
        let mut tokens: Vec<_> =
            [&self.cls_token, &self.dist_token].into_iter().flatten().map(|t| probe.param(t)).collect();
        tokens.push(patches);
        // positions are what sets tokens apart
        let pos = probe.alike(usize::MAX, |probe| probe.param(&self.pos_embed));
        let x = probe.cat(tokens, 1);
        probe.add(x, pos)
    }

    /// Number of class and distillation tokens.
    pub fn num_prefix_tokens(&self) -> usize {
        usize::from(self.cls_token.is_some()) + usize::from(self.dist_token.is_some())
    }

    /// All tokens after the final normalisation, or after the last block where pooled tokens are
    /// normalised.
    ///
    /// [`forward`](ForwardModel::forward) gives the same logits, but under [`Pool::Token`] it does
    /// not compute the other tokens of the last block.
    ///
    /// # Shapes
    /// - images: `[rows, in_chans, img_size, img_size]`
    /// - returns: `[rows, tokens, embed_dim]`
    pub fn forward_features(&self, images: Tensor<B, 4>, probe: &mut Probe<B>) -> Tensor<B, 3> {
        let mut x = self.forward_embed(images, probe);
        for block in &self.blocks {
            x = block.forward(x, probe);
        }
        if self.norm_is_last() { x } else { probe.layer_norm(&self.norm, x) }
    }

    /// Whether the final normalisation is that of pooled tokens.
    fn norm_is_last(&self) -> bool {
        self.pool != Pool::Token && self.fc_norm
    }

    /// Logits from the output of [`forward_features`](Self::forward_features).
    ///
    /// # Shapes
    /// - features: `[rows, tokens, embed_dim]`
    /// - returns: `[rows, num_classes]`
    pub fn forward_head(&self, features: Tensor<B, 3>, probe: &mut Probe<B>) -> Tensor<B, 2> {
        let prefix = self.num_prefix_tokens();
        let features = match self.pool {
            Pool::Token => features,
            pool if self.fc_norm => probe.layer_norm(&self.norm, pool.apply(features, prefix)),
            pool => pool.apply(features, prefix),
        };
        self.classify(features, probe)
    }

    /// The patch tokens after the last block, pooled and normalised, `[rows, 1, embed_dim]`.
    fn pooled(&self, x: Tensor<B, 3>, probe: &mut Probe<B>) -> Tensor<B, 3> {
        let prefix = self.num_prefix_tokens();
        match self.norm_is_last() {
            true => probe.layer_norm(&self.norm, self.pool.apply(x, prefix)),
            false => self.pool.apply(probe.layer_norm(&self.norm, x), prefix),
        }
    }

    /// Logits from the tokens that have a head.
    fn classify(&self, features: Tensor<B, 3>, probe: &mut Probe<B>) -> Tensor<B, 2> {
        let token = |at: usize| features.clone().narrow(1, at, 1).squeeze_dim::<2>(1);
        let seen = token(0);
        probe.embed(&seen);
        let logits = probe.linear(&self.head, seen);
        match &self.head_dist {
            Some(head) => {
                let other = probe.linear(head, token(1));
                probe.add(logits.mul_scalar(0.5), other.mul_scalar(0.5))
            }
            None => logits,
        }
    }

    /// Replaces the head by a new one of `num_classes` classes, drawn from `seed` alone.
    ///
    /// Weights are N(0, 0.02²) and biases zero; all are trainable. The head of a distillation token
    /// is replaced too. [`Pretrained::with_new_head`](crate::checkpoint::Pretrained::with_new_head)
    /// changes the card too.
    #[must_use]
    pub fn with_new_head(mut self, num_classes: usize, seed: u64) -> Self {
        let [d, _] = self.head.weight.dims();
        let device = self.head.weight.device();
        let mut rng = StdRng::seed_from_u64(seed);
        let mut new = || {
            let law = Distribution::Normal(0.0, 0.02);
            let weight = TensorData::random::<f32, _, _>([d, num_classes], law, &mut rng);
            Linear {
                weight: Param::from_tensor(Tensor::from_data(weight, &device)),
                bias: Some(Param::from_tensor(Tensor::zeros([num_classes], &device))),
            }
        };
        self.head = new();
        self.head_dist = self.head_dist.map(|_| new());
        self
    }

    /// Adapts the model to images of `img_size` × `img_size` pixels.
    ///
    /// The positional embedding is interpolated as in timm, by an antialiased bicubic. The present
    /// size changes nothing.
    /// [`Pretrained::with_img_size`](crate::checkpoint::Pretrained::with_img_size) changes the card
    /// too.
    ///
    /// # Errors
    /// [`VitError::Config`] where `img_size` is not a positive multiple of the patch size, or the
    /// model's grid of patches is not a square.
    pub fn with_img_size(mut self, img_size: usize) -> Result<Self, VitError> {
        let patch = self.patch_embed.kernel_size[0];
        if img_size == 0 || !img_size.is_multiple_of(patch) {
            let remedy = "use a positive multiple of the model's patch_size";
            return Err(VitError::Config { field: "img_size", value: img_size, remedy });
        }
        let prefix = self.num_prefix_tokens();
        let [_, tokens, d] = self.pos_embed.dims();
        let (from, to) = ((tokens - prefix).isqrt(), img_size / patch);
        if from * from != tokens - prefix {
            let remedy = "only square grids of patches can be resized";
            return Err(VitError::Config { field: "patches", value: tokens - prefix, remedy });
        }
        if from != to {
            let device = self.pos_embed.device();
            self.pos_embed = self.pos_embed.map(|pos| {
                let trained = pos.is_require_grad();
                let values: Vec<f32> = pos.into_data().iter::<f32>().collect();
                let values = positions::resampled(&values, prefix, d, from, to);
                let pos = Tensor::from_data(TensorData::new(values, [1, prefix + to * to, d]), &device);
                pos.set_require_grad(trained)
            });
        }
        Ok(self)
    }
}

impl<B: Backend> ForwardModel<B> for ViT<B> {
    type Input = Tensor<B, 4>;
    type Target = Tensor<B, 1, Int>;
    type Output = Tensor<B, 2>;

    fn forward(&self, images: Tensor<B, 4>, probe: &mut Probe<B>) -> Tensor<B, 2> {
        // the patches are alike, class and distillation token are not
        probe.alike(self.num_prefix_tokens(), |probe| match self.sites {
            Sites::Linear => self.forward_layers(images, probe),
            Sites::Branch => self.forward_branches(images, probe),
        })
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

impl<B: Backend> ViT<B> {
    /// Tokens that have a head; `None` where pooled patches are classified.
    pub(crate) fn heads(&self) -> Option<usize> {
        (self.pool == Pool::Token).then_some(if self.head_dist.is_some() { 2 } else { 1 })
    }

    /// The logits, with a site for every layer.
    fn forward_layers(&self, images: Tensor<B, 4>, probe: &mut Probe<B>) -> Tensor<B, 2> {
        let mut x = probe.stage(images, |images, probe| self.forward_embed(images, probe));
        let (last, before) = match (self.blocks.split_last(), self.pool) {
            (Some(split), Pool::Token) => split,
            _ => {
                for block in &self.blocks {
                    x = probe.stage(x, |x, probe| block.forward(x, probe));
                }
                if self.pool != Pool::Token {
                    x = probe.stage(x, |x, probe| self.pooled(x, probe));
                }
                return self.classify(x, probe);
            }
        };
        for block in before {
            x = probe.stage(x, |x, probe| block.forward(x, probe));
        }
        // only tokens with a head reach the loss; of the others the last block needs keys and
        // values
        let seen = self.heads().unwrap_or(1);
        let state = probe.stage(x, |x, probe| last.keys_values(x, seen, probe));
        let x = last.class_token(state, probe);
        let features = probe.stage(x, |x, probe| probe.layer_norm(&self.norm, x));
        self.classify(features, probe)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Activation;
    use burn::backend::Flex;

    fn config() -> ViTConfig {
        let config = ViTConfig::new().with_img_size(8).with_patch_size(4).with_embed_dim(8).with_depth(2);
        config.with_num_heads(2).with_num_classes(3)
    }

    fn averaged() -> ViTConfig {
        config().with_pool(Pool::Avg).with_class_token(false)
    }

    fn of(config: ViTConfig) -> ViT<Flex> {
        config.init(&Default::default()).unwrap()
    }

    fn model() -> ViT<Flex> {
        of(config())
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
    fn new_head_is_a_function_of_the_seed() {
        let head = |model: ViT<Flex>, seed| model.with_new_head(5, seed).head;
        let (a, b, other) = (head(model(), 7), head(model(), 7), head(model(), 8));
        assert_eq!(a.weight.dims(), [8, 5]);
        assert_eq!(a.weight.to_data(), b.weight.to_data());
        assert_ne!(a.weight.to_data(), other.weight.to_data());
        assert_eq!(a.bias.unwrap().to_data(), TensorData::from([0.0f32; 5]));
    }

    #[test]
    fn class_token_path_preserves_logits() {
        let images = Tensor::from_data(
            TensorData::new((0..384).map(|i| (i as f32).sin()).collect(), [2, 3, 8, 8]),
            &Default::default(),
        );
        for distillation in [Distillation::None, Distillation::Token, Distillation::Head] {
            let (model, mut probe) = (of(config().with_distillation(distillation)), Probe::clean());
            let all = model.forward_head(model.forward_features(images.clone(), &mut probe), &mut probe);
            let short = model.forward(images.clone(), &mut Probe::clean());
            let distance: f32 = (all - short).abs().max().into_scalar();
            assert!(distance < 1e-6, "{distillation:?}: logits differ by {distance}");
        }
        for config in [averaged(), averaged().with_fc_norm(false), averaged().with_pool(Pool::AvgMax)] {
            let (model, mut probe) = (of(config), Probe::clean());
            let all = model.forward_head(model.forward_features(images.clone(), &mut probe), &mut probe);
            assert_eq!(all.into_data(), model.forward(images.clone(), &mut Probe::clean()).into_data());
        }
    }

    /// timm normalises the pooled tokens with `fc_norm`, and all tokens before pooling without it.
    #[test]
    fn fc_norm_is_the_place_of_the_norm() {
        let images = Tensor::from_data(
            TensorData::new((0..384).map(|i| (i as f32).sin()).collect(), [2, 3, 8, 8]),
            &Default::default(),
        );
        let model = of(config().with_pool(Pool::Avg));
        let probe = &mut Probe::clean();
        let mut x = model.forward_embed(images.clone(), probe);
        for block in &model.blocks {
            x = block.forward(x, probe);
        }
        let patches = x.narrow(1, 1, 4);
        let after = model.norm.forward(patches.clone().mean_dim(1)).squeeze_dim::<2>(1);
        let before = model.norm.forward(patches).mean_dim(1).squeeze_dim::<2>(1);
        for (fc_norm, features) in [(true, after), (false, before)] {
            let model = ViT { fc_norm, ..model.clone() };
            let logits = model.forward(images.clone(), &mut Probe::clean());
            let distance: f32 = (model.head.forward(features) - logits).abs().max().into_scalar();
            assert!(distance < 1e-6, "fc_norm = {fc_norm}: logits differ by {distance}");
        }
    }

    /// Branches and layers compute the same logits.
    #[test]
    fn sites_do_not_change_the_logits() {
        let images = Tensor::from_data(
            TensorData::new((0..384).map(|i| (i as f32).sin()).collect(), [2, 3, 8, 8]),
            &Default::default(),
        );
        let distilled = config().with_distillation(Distillation::Head);
        let pooled = config().with_pool(Pool::Max).with_activation(Activation::GeluTanh);
        let normed = averaged().with_fc_norm(false).with_activation(Activation::QuickGelu);
        for config in [config(), distilled, averaged(), config().with_pool(Pool::Avg), pooled, normed] {
            let model = of(config);
            let layers = model.forward(images.clone(), &mut Probe::clean());
            let branches = model.with_sites(Sites::Branch).forward(images.clone(), &mut Probe::clean());
            let distance: f32 = (layers - branches).abs().max().into_scalar();
            assert!(distance < 1e-6, "logits differ by {distance}");
        }
    }

    #[test]
    fn with_img_size_changes_only_positions() {
        for config in [config(), config().with_distillation(Distillation::Head), averaged()] {
            let model = of(config.clone());
            let same = model.clone().with_img_size(8).unwrap();
            assert_eq!(same.pos_embed.to_data(), model.pos_embed.to_data());
            let larger = model.clone().with_img_size(16).unwrap();
            assert_eq!(larger.pos_embed.dims(), [1, config.num_prefix_tokens() + 16, 8]);
            let images = Tensor::ones([2, 3, 16, 16], &Default::default());
            assert_eq!(larger.forward(images, &mut Probe::clean()).dims(), [2, 3]);
            for size in [0, 10] {
                let error = model.clone().with_img_size(size).unwrap_err().to_string();
                assert!(error.contains(&format!("img_size = {size}")), "{error}");
            }
        }
    }
}
