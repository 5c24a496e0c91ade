//! CLIP: an image tower and a text tower whose embeddings are compared by cosine similarity.

use burn::module::Param;
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::{Embedding, Initializer, LayerNorm, Linear};
use burn::prelude::*;
use flops_core::Probe;
use flops_vit::Sites;
use flops_vit::model::linear;

use super::clip_config::{ClipConfig, TextConfig, VisionConfig};
use super::layers::{
    EncoderLayer, LayerSizes, NormOrder, attention_bias, norm, normalise, positions, set_sites, table,
};
use crate::error::MultimodalError;
use crate::tokenizer::Tokens;

/// The `eos_token_id` of HuggingFace's first CLIP configurations. It means that a text ends at the
/// token with the largest id.
const LEGACY_EOS: usize = 2;

impl ClipConfig {
    /// A model with random weights: N(0, 0.02²), biases zero, temperature 0.07.
    ///
    /// # Errors
    /// If a size is invalid, see [`validate`](Self::validate).
    pub fn init<B: Backend>(&self, device: &B::Device) -> Result<Clip<B>, MultimodalError> {
        self.validate()?;
        let model = self.init_lazy(device);
        // Burn initialises parameters on first use; do it now, so that clones have the same values
        let _ = Module::num_params(&model);
        Ok(model)
    }

    /// A model whose parameters are initialised on first use, for loading weights into it.
    pub(crate) fn init_lazy<B: Backend>(&self, device: &B::Device) -> Clip<B> {
        Clip {
            vision: self.vision.init_lazy(self.projection_dim, device),
            text: self.text.init_lazy(self.projection_dim, device),
            logit_scale: Initializer::Constant { value: (1.0f64 / 0.07).ln() }.init([1], device),
        }
    }
}

impl VisionConfig {
    fn init_lazy<B: Backend>(&self, projection_dim: usize, device: &B::Device) -> VisionTower<B> {
        let (d, eps) = (self.embed_dim, self.layer_norm_eps);
        let patch = [self.patch_size; 2];
        let init = Initializer::Normal { mean: 0.0, std: 0.02 };
        let patches = Conv2dConfig::new([self.in_chans, d], patch).with_stride(patch).with_bias(false);
        let sizes = LayerSizes {
            embed_dim: d,
            num_heads: self.num_heads,
            mlp_dim: self.mlp_dim,
            layer_norm_eps: eps,
            activation: self.activation,
            order: NormOrder::Pre,
        };
        VisionTower {
            patch_embed: patches.with_initializer(init.clone()).init(device),
            cls_token: init.init([1, 1, d], device),
            pos_embed: table((self.img_size / self.patch_size.max(1)).pow(2) + 1, d, device),
            norm_pre: norm(d, eps, device),
            layers: (0..self.depth).map(|_| EncoderLayer::new(&sizes, device)).collect(),
            norm: norm(d, eps, device),
            proj: linear(d, projection_dim, false, device),
        }
    }
}

impl TextConfig {
    fn init_lazy<B: Backend>(&self, projection_dim: usize, device: &B::Device) -> TextTower<B> {
        let (d, eps) = (self.embed_dim, self.layer_norm_eps);
        let sizes = LayerSizes {
            embed_dim: d,
            num_heads: self.num_heads,
            mlp_dim: self.mlp_dim,
            layer_norm_eps: eps,
            activation: self.activation,
            order: NormOrder::Pre,
        };
        TextTower {
            token_embed: table(self.vocab_size, d, device),
            pos_embed: table(self.context_length, d, device),
            layers: (0..self.depth).map(|_| EncoderLayer::new(&sizes, device)).collect(),
            norm: norm(d, eps, device),
            proj: linear(d, projection_dim, false, device),
            eos_token_id: self.eos_token_id,
        }
    }
}

/// The image tower of CLIP: a vision transformer with a layer normalisation in front of its layers.
#[derive(Module, Debug)]
pub struct VisionTower<B: Backend> {
    /// Patches to tokens: a convolution whose stride is its kernel size, without bias.
    pub patch_embed: Conv2d<B>,
    /// Class token, `[1, 1, embed_dim]`.
    pub cls_token: Param<Tensor<B, 3>>,
    /// Position embeddings, `[tokens, embed_dim]`.
    pub pos_embed: Embedding<B>,
    /// Normalisation in front of the layers.
    pub norm_pre: LayerNorm<B>,
    /// The layers, first to last.
    pub layers: Vec<EncoderLayer<B>>,
    /// Normalisation of the class token after the layers.
    pub norm: LayerNorm<B>,
    /// Projection into the shared space, `[embed_dim, projection_dim]`, without bias.
    pub proj: Linear<B>,
}

impl<B: Backend> VisionTower<B> {
    /// Chooses the sites of the layers; parameters and outputs stay the same.
    ///
    /// [`Sites::Branch`] puts noise on what each residual branch adds to the stream. The
    /// embeddings, the norms around the layers and the projection keep sites of their own.
    #[must_use]
    pub fn with_sites(mut self, sites: Sites) -> Self {
        set_sites(&mut self.layers, sites);
        self
    }

    /// Class token and patches, with position embeddings.
    ///
    /// # Shapes
    /// - images: `[rows, in_chans, img_size, img_size]`
    /// - returns: `[rows, tokens, embed_dim]`
    pub fn embed_image(&self, images: Tensor<B, 4>, probe: &mut Probe<B>) -> Tensor<B, 3> {
        // no class token is among the patches yet: all of them are alike
        let patches =
            probe.alike(0, |probe| probe.conv2d(&self.patch_embed, images)).flatten::<3>(2, 3).swap_dims(1, 2);
        let class = probe.param(&self.cls_token);
        let x = probe.cat(vec![class, patches], 1);
        let [rows, tokens, _] = x.dims();
        let places = positions(&self.pos_embed, [rows, tokens], probe);
        probe.add(x, places)
    }

    /// The hidden states after the last layer.
    ///
    /// # Shapes
    /// - images: `[rows, in_chans, img_size, img_size]`
    /// - returns: `[rows, tokens, embed_dim]`
    pub fn forward(&self, images: Tensor<B, 4>, probe: &mut Probe<B>) -> Tensor<B, 3> {
        // the patches are alike, the class token is not
        probe.alike(1, |probe| {
            let x = self.embed_image(images, probe);
            let mut x = probe.layer_norm(&self.norm_pre, x);
            for layer in &self.layers {
                x = layer.forward(x, None, probe);
            }
            x
        })
    }

    /// The class token, projected into the shared space, not normalised.
    ///
    /// # Shapes
    /// - hidden: `[rows, tokens, embed_dim]`
    /// - returns: `[rows, projection_dim]`
    pub fn project_image(&self, hidden: Tensor<B, 3>, probe: &mut Probe<B>) -> Tensor<B, 2> {
        let class = probe.layer_norm(&self.norm, hidden.narrow(1, 0, 1).squeeze_dim::<2>(1));
        probe.linear(&self.proj, class)
    }
}

/// The text tower of CLIP: a causal transformer, whose hidden state at the end of the text is the
/// embedding.
#[derive(Module, Debug)]
pub struct TextTower<B: Backend> {
    /// Token embeddings, `[vocab_size, embed_dim]`.
    pub token_embed: Embedding<B>,
    /// Position embeddings, `[context_length, embed_dim]`.
    pub pos_embed: Embedding<B>,
    /// The layers, first to last.
    pub layers: Vec<EncoderLayer<B>>,
    /// Normalisation after the layers.
    pub norm: LayerNorm<B>,
    /// Projection into the shared space, `[embed_dim, projection_dim]`, without bias.
    pub proj: Linear<B>,
    /// The token at the end of a text; 2 means the token with the largest id.
    pub eos_token_id: usize,
}

impl<B: Backend> TextTower<B> {
    /// Chooses the sites of the layers; parameters and outputs stay the same.
    ///
    /// [`Sites::Branch`] puts noise on what each residual branch adds to the stream. The
    /// embeddings, the norms around the layers and the projection keep sites of their own.
    #[must_use]
    pub fn with_sites(mut self, sites: Sites) -> Self {
        set_sites(&mut self.layers, sites);
        self
    }

    /// The embedding of each token, before positions are added.
    ///
    /// # Shapes
    /// - ids: `[rows, tokens]`
    /// - returns: `[rows, tokens, embed_dim]`
    pub fn token_embeddings(&self, ids: Tensor<B, 2, Int>, probe: &mut Probe<B>) -> Tensor<B, 3> {
        probe.embedding(&self.token_embed, ids)
    }

    /// Adds positions to token embeddings: the input of the first layer.
    ///
    /// # Shapes
    /// - embeddings: `[rows, tokens, embed_dim]`; the result has the same shape
    pub fn embed_text(&self, embeddings: Tensor<B, 3>, probe: &mut Probe<B>) -> Tensor<B, 3> {
        let [rows, tokens, _] = embeddings.dims();
        let places = positions(&self.pos_embed, [rows, tokens], probe);
        probe.add(embeddings, places)
    }

    /// The normalised last hidden states of texts given as token embeddings, which may include
    /// learned prompts.
    ///
    /// Noise stays off padding ([`Probe::masked`]): no loss may depend on its hidden states.
    ///
    /// # Shapes
    /// - embeddings: `[rows, tokens, embed_dim]`, at most `context_length` tokens
    /// - mask: `[rows, tokens]`, 1 at a token and 0 at padding
    /// - returns: `[rows, tokens, embed_dim]`
    pub fn forward_embedded(
        &self,
        embeddings: Tensor<B, 3>,
        mask: Tensor<B, 2, Int>,
        probe: &mut Probe<B>,
    ) -> Tensor<B, 3> {
        probe.masked(mask.clone(), |probe| self.hidden_states(embeddings, mask, probe))
    }

    fn hidden_states(&self, embeddings: Tensor<B, 3>, mask: Tensor<B, 2, Int>, probe: &mut Probe<B>) -> Tensor<B, 3> {
        let bias = attention_bias(mask, true);
        // no place is apart: the end, which is read off, is elsewhere in each text
        probe.alike(0, |probe| {
            let mut x = self.embed_text(embeddings, probe);
            for layer in &self.layers {
                x = layer.forward(x, Some(&bias), probe);
            }
            probe.layer_norm(&self.norm, x)
        })
    }

    /// The normalised last hidden states of texts given as token ids.
    ///
    /// Noise stays off padding, but for the [end](Self::text_end) of a text, which is read off.
    ///
    /// # Shapes
    /// - ids and mask: `[rows, tokens]`, at most `context_length` tokens
    /// - returns: `[rows, tokens, embed_dim]`
    pub fn forward(&self, ids: Tensor<B, 2, Int>, mask: Tensor<B, 2, Int>, probe: &mut Probe<B>) -> Tensor<B, 3> {
        let end: Tensor<B, 2> = self.text_end(ids.clone()).squeeze_dim(2);
        probe.masked(mask.clone().max_pair(end.int()), |probe| {
            let embeddings = probe.alike(0, |probe| self.token_embeddings(ids, probe));
            self.hidden_states(embeddings, mask, probe)
        })
    }

    /// A mask with 1 at the end of each text and 0 elsewhere.
    ///
    /// The end is the first `eos_token_id`, or the first token if there is none. If `eos_token_id`
    /// is 2, the end is the first token with the largest id.
    ///
    /// # Shapes
    /// - ids: `[rows, tokens]`
    /// - returns: `[rows, tokens, 1]`
    pub fn text_end(&self, ids: Tensor<B, 2, Int>) -> Tensor<B, 3> {
        let [rows, tokens] = ids.dims();
        let end = match self.eos_token_id {
            LEGACY_EOS => ids.clone().equal(ids.max_dim(1).expand([rows, tokens])),
            id => ids.equal_elem(id as i64),
        };
        let place = Tensor::<B, 1, Int>::arange(0..tokens as i64, &end.device()).reshape([1, tokens]);
        let first = place.clone().equal_elem(0).int();
        // earlier ends score higher than later ones, any end higher than the first token; no two
        // such scores are equal
        let score = end.int() * (place.neg() + tokens as i64) * 2 + first;
        let best = score.clone().max_dim(1).expand([rows, tokens]);
        score.equal(best).float().unsqueeze_dim(2)
    }

    /// The hidden state at the end of each text, projected into the shared space, not normalised.
    ///
    /// # Shapes
    /// - hidden: `[rows, tokens, embed_dim]`
    /// - end: `[rows, tokens, 1]`, from [`text_end`](Self::text_end)
    /// - returns: `[rows, projection_dim]`
    pub fn project_text(&self, hidden: Tensor<B, 3>, end: Tensor<B, 3>, probe: &mut Probe<B>) -> Tensor<B, 2> {
        let [hidden, end] = probe.align([hidden, end]);
        probe.linear(&self.proj, (hidden * end).sum_dim(1).squeeze_dim::<2>(1))
    }
}

/// CLIP (Radford et al. 2021, arXiv 2103.00020).
///
/// # Example
/// ```
/// use burn::backend::Flex;
/// use burn::prelude::*;
/// use flops_core::Probe;
/// use flops_multimodal::tokenizer::Tokens;
/// use flops_multimodal::towers::{ClipConfig, TextConfig, VisionConfig};
///
/// let device = Default::default();
/// let vision = VisionConfig::new().with_img_size(8).with_patch_size(4).with_embed_dim(8);
/// let vision = vision.with_depth(1).with_num_heads(2).with_mlp_dim(16);
/// let text = TextConfig::new().with_vocab_size(50).with_eos_token_id(49).with_embed_dim(8);
/// let text = text.with_depth(1).with_mlp_dim(16);
/// let model = ClipConfig::new(vision, text).with_projection_dim(4).init::<Flex>(&device)?;
/// let (ids, mask) = (vec![vec![48, 7, 49], vec![48, 49, 49]], vec![vec![1, 1, 1], vec![1, 1, 0]]);
/// let tokens = Tokens::new(ids, mask)?;
/// let mut probe = Probe::clean();
/// let images = model.encode_image(Tensor::zeros([1, 3, 8, 8], &device), &mut probe);
/// let texts = model.encode_text(&tokens, &mut probe)?;
/// assert_eq!(model.logits_per_image(images, texts).dims(), [1, 2]);
/// # Ok::<(), flops_multimodal::MultimodalError>(())
/// ```
#[derive(Module, Debug)]
pub struct Clip<B: Backend> {
    /// The image tower.
    pub vision: VisionTower<B>,
    /// The text tower.
    pub text: TextTower<B>,
    /// τ, `[1]`: the cosines are multiplied by e^τ.
    pub logit_scale: Param<Tensor<B, 1>>,
}

impl<B: Backend> Clip<B> {
    /// Chooses the sites of the layers of both towers; parameters and outputs stay the same.
    ///
    /// See [`VisionTower::with_sites`] and [`TextTower::with_sites`].
    #[must_use]
    pub fn with_sites(self, sites: Sites) -> Self {
        Self { vision: self.vision.with_sites(sites), text: self.text.with_sites(sites), ..self }
    }

    /// Features of images in the shared space, not [normalised](normalise).
    ///
    /// # Shapes
    /// - images: `[rows, in_chans, img_size, img_size]`
    /// - returns: `[rows, projection_dim]`
    pub fn encode_image(&self, images: Tensor<B, 4>, probe: &mut Probe<B>) -> Tensor<B, 2> {
        let hidden = self.vision.forward(images, probe);
        self.vision.project_image(hidden, probe)
    }

    /// Features of texts in the shared space, not [normalised](normalise).
    ///
    /// # Shapes
    /// - returns: `[rows, projection_dim]`
    ///
    /// # Errors
    /// If a text is longer than `context_length`, or a token is not in the vocabulary.
    pub fn encode_text(&self, tokens: &Tokens, probe: &mut Probe<B>) -> Result<Tensor<B, 2>, MultimodalError> {
        let [context_length, _] = self.text.pos_embed.weight.dims();
        let [vocab_size, _] = self.text.token_embed.weight.dims();
        tokens.check(context_length, vocab_size)?;
        let device = self.text.pos_embed.weight.device();
        let ids = tokens.ids_tensor(&device);
        let hidden = self.text.forward(ids.clone(), tokens.mask_tensor(&device), probe);
        Ok(self.text.project_text(hidden, self.text.text_end(ids), probe))
    }

    /// The cosine of each image with each text, times exp(`logit_scale`).
    ///
    /// # Shapes
    /// - images: `[images, projection_dim]`, texts: `[texts, projection_dim]`
    /// - returns: `[images, texts]`
    pub fn logits_per_image(&self, images: Tensor<B, 2>, texts: Tensor<B, 2>) -> Tensor<B, 2> {
        let cosines = normalise(images).matmul(normalise(texts).transpose());
        cosines * self.logit_scale.val().exp().unsqueeze()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::backend::Flex;

    fn config(eos: usize) -> ClipConfig {
        let vision = VisionConfig::new().with_img_size(8).with_patch_size(4).with_embed_dim(8).with_depth(1);
        let text = TextConfig::new().with_vocab_size(20).with_context_length(6).with_eos_token_id(eos);
        let text = text.with_embed_dim(8).with_depth(2).with_num_heads(2).with_mlp_dim(16);
        ClipConfig::new(vision.with_num_heads(2).with_mlp_dim(16), text).with_projection_dim(4)
    }

    fn model(eos: usize) -> Clip<Flex> {
        config(eos).init(&Default::default()).unwrap()
    }

    fn ids(rows: Vec<Vec<i64>>) -> Tensor<Flex, 2, Int> {
        Tokens::new(rows.clone(), rows.iter().map(|r| vec![1; r.len()]).collect())
            .unwrap()
            .ids_tensor(&Default::default())
    }

    #[test]
    fn text_end_matches_huggingface() {
        let end = |eos, row: [i64; 5]| -> Vec<f32> {
            model(eos).text.text_end(ids(vec![row.to_vec()])).into_data().to_vec().unwrap()
        };
        // the first of several ends, a later token with a larger id, no end, an end in front
        assert_eq!(end(9, [1, 5, 9, 9, 9]), [0., 0., 1., 0., 0.]);
        assert_eq!(end(9, [1, 5, 9, 12, 0]), [0., 0., 1., 0., 0.]);
        assert_eq!(end(9, [1, 5, 3, 2, 4]), [1., 0., 0., 0., 0.]);
        assert_eq!(end(9, [9, 5, 3, 9, 4]), [1., 0., 0., 0., 0.]);
        // the first token with the largest id, wherever 2 is
        assert_eq!(end(2, [1, 2, 9, 12, 12]), [0., 0., 0., 1., 0.]);
        assert_eq!(end(2, [0, 0, 0, 0, 0]), [1., 0., 0., 0., 0.]);
    }

    #[test]
    fn text_attention_is_causal() {
        let text = model(9).text;
        let mask = || Tensor::ones([1, 5], &Default::default());
        let hidden = |last| text.forward(ids(vec![vec![1, 5, 3, 4, last]]), mask(), &mut Probe::clean());
        let change = (hidden(6) - hidden(7)).abs();
        let before: f32 = change.clone().narrow(1, 0, 4).max().into_scalar();
        let at: f32 = change.narrow(1, 4, 1).max().into_scalar();
        assert!(before < 1e-7 && at > 1e-4, "{before} before the changed token, {at} at it");
    }

    #[test]
    fn errors_name_the_size() {
        let error = |config: ClipConfig| config.init::<Flex>(&Default::default()).unwrap_err().to_string();
        let mut odd = config(9);
        odd.vision.img_size = 10;
        assert!(error(odd).contains("img_size = 10"));
        let mut none = config(9);
        none.text.depth = 0;
        assert!(error(none).contains("depth = 0"));
    }
}
