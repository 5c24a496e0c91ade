//! BERT as a sentence encoder: its last hidden states, and what a [`SentenceHead`] makes of them.

use burn::nn::{Embedding, LayerNorm};
use burn::prelude::*;
use flops_core::Probe;
use flops_vit::Sites;

use super::layers::{
    Activation, EncoderLayer, LayerSizes, NormOrder, attention_bias, check_eps, check_sizes, norm, positions,
    set_sites, table,
};
use super::sentence::{Pooling, SentenceHead};
use crate::error::MultimodalError;
use crate::tokenizer::Tokens;

/// Configuration of a [`Bert`]; the defaults are all-MiniLM-L6-v2's.
#[derive(Config, Debug, PartialEq)]
pub struct BertConfig {
    /// Number of tokens in the vocabulary.
    #[config(default = 30522)]
    pub vocab_size: usize,
    /// Number of positions: the longest text, in tokens.
    #[config(default = 512)]
    pub context_length: usize,
    /// Number of token types. Only the first is used.
    #[config(default = 2)]
    pub type_vocab_size: usize,
    /// Width; a multiple of `num_heads`.
    #[config(default = 384)]
    pub embed_dim: usize,
    /// Number of layers.
    #[config(default = 6)]
    pub depth: usize,
    /// Attention heads of a layer.
    #[config(default = 12)]
    pub num_heads: usize,
    /// Hidden width of a layer's MLP.
    #[config(default = 1536)]
    pub mlp_dim: usize,
    /// ε of the layer normalisations.
    #[config(default = 1e-12)]
    pub layer_norm_eps: f64,
    /// Activation function of the MLPs.
    #[config(default = "Activation::Gelu")]
    pub activation: Activation,
    /// The token that texts are padded with.
    #[config(default = 0)]
    pub pad_token_id: usize,
}

impl BertConfig {
    /// Checks that the sizes are valid, and the ε.
    ///
    /// # Errors
    /// [`MultimodalError::Config`], which names the size at fault, or [`MultimodalError::Setting`].
    pub fn validate(&self) -> Result<(), MultimodalError> {
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("context_length", self.context_length),
            ("type_vocab_size", self.type_vocab_size),
            ("embed_dim", self.embed_dim),
            ("depth", self.depth),
            ("mlp_dim", self.mlp_dim),
        ];
        check_sizes(&sizes, self.embed_dim, self.num_heads)?;
        check_eps(self.layer_norm_eps)
    }

    /// A model with random weights: N(0, 0.02²), biases zero.
    ///
    /// # Errors
    /// If a size is invalid, see [`validate`](Self::validate).
    pub fn init<B: Backend>(&self, device: &B::Device) -> Result<Bert<B>, MultimodalError> {
        self.validate()?;
        let model = self.init_lazy(device);
        // Burn initialises parameters on first use; do it now, so that clones have the same values
        let _ = Module::num_params(&model);
        Ok(model)
    }

    /// A model whose parameters are initialised on first use, for loading weights into it.
    pub(crate) fn init_lazy<B: Backend>(&self, device: &B::Device) -> Bert<B> {
        let d = self.embed_dim;
        let sizes = LayerSizes {
            embed_dim: d,
            num_heads: self.num_heads,
            mlp_dim: self.mlp_dim,
            layer_norm_eps: self.layer_norm_eps,
            activation: self.activation,
            order: NormOrder::Post,
        };
        Bert {
            token_embed: table(self.vocab_size, d, device),
            pos_embed: table(self.context_length, d, device),
            type_embed: table(self.type_vocab_size, d, device),
            norm: norm(d, self.layer_norm_eps, device),
            layers: (0..self.depth).map(|_| EncoderLayer::new(&sizes, device)).collect(),
        }
    }
}

/// A BERT encoder without its pooler.
///
/// # Example
/// ```
/// use burn::backend::Flex;
/// use flops_core::Probe;
/// use flops_multimodal::tokenizer::Tokens;
/// use flops_multimodal::towers::BertConfig;
///
/// let config = BertConfig::new().with_vocab_size(50).with_embed_dim(8).with_depth(1);
/// let config = config.with_num_heads(2).with_mlp_dim(16);
/// let model = config.init::<Flex>(&Default::default())?;
/// let (ids, mask) = (vec![vec![1, 7, 2], vec![1, 2, 0]], vec![vec![1, 1, 1], vec![1, 1, 0]]);
/// let tokens = Tokens::new(ids, mask)?;
/// assert_eq!(model.encode(&tokens, &mut Probe::clean())?.dims(), [2, 8]);
/// # Ok::<(), flops_multimodal::MultimodalError>(())
/// ```
#[derive(Module, Debug)]
pub struct Bert<B: Backend> {
    /// Token embeddings, `[vocab_size, embed_dim]`.
    pub token_embed: Embedding<B>,
    /// Position embeddings, `[context_length, embed_dim]`.
    pub pos_embed: Embedding<B>,
    /// Token type embeddings, `[type_vocab_size, embed_dim]`; every token has the first type.
    pub type_embed: Embedding<B>,
    /// Normalisation of the embeddings.
    pub norm: LayerNorm<B>,
    /// The layers, first to last.
    pub layers: Vec<EncoderLayer<B>>,
}

impl<B: Backend> Bert<B> {
    /// Chooses the sites of the layers; parameters and outputs stay the same.
    ///
    /// [`Sites::Branch`] puts noise on what each residual branch adds to the stream. The
    /// embeddings and the norms behind the branches keep sites of their own.
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

    /// Adds position and type to token embeddings, and normalises: the input of the first layer.
    ///
    /// # Shapes
    /// - embeddings: `[rows, tokens, embed_dim]`; the result has the same shape
    pub fn embed_text(&self, embeddings: Tensor<B, 3>, probe: &mut Probe<B>) -> Tensor<B, 3> {
        let [rows, tokens, _] = embeddings.dims();
        let first = Tensor::zeros([rows, tokens], &embeddings.device());
        let types = probe.embedding(&self.type_embed, first);
        let places = positions(&self.pos_embed, [rows, tokens], probe);
        let x = probe.add(embeddings, types);
        let x = probe.add(x, places);
        probe.layer_norm(&self.norm, x)
    }

    /// The last hidden states of texts given as token embeddings, which may include learned
    /// prompts.
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
        let bias = attention_bias(mask.clone(), false);
        Self::over_tokens(&mask, probe, |probe| {
            let mut x = self.embed_text(embeddings, probe);
            for layer in &self.layers {
                x = layer.forward(x, Some(&bias), probe);
            }
            x
        })
    }

    /// Runs a part of the encoder. Noise stays off padding. The words are alike, the `[CLS]` token is
    /// not.
    pub(crate) fn over_tokens<T>(
        mask: &Tensor<B, 2, Int>,
        probe: &mut Probe<B>,
        run: impl FnOnce(&mut Probe<B>) -> T,
    ) -> T {
        probe.masked(mask.clone(), |probe| probe.alike(1, run))
    }

    /// The last hidden states of texts given as token ids.
    ///
    /// # Shapes
    /// - ids and mask: `[rows, tokens]`, at most `context_length` tokens
    /// - returns: `[rows, tokens, embed_dim]`
    pub fn forward(&self, ids: Tensor<B, 2, Int>, mask: Tensor<B, 2, Int>, probe: &mut Probe<B>) -> Tensor<B, 3> {
        let embeddings = Self::over_tokens(&mask, probe, |probe| self.token_embeddings(ids, probe));
        self.forward_embedded(embeddings, mask, probe)
    }

    /// The mean over the tokens, Σ mask·h / Σ mask; zero if all tokens are padding.
    ///
    /// # Shapes
    /// - hidden: `[rows, tokens, embed_dim]`
    /// - mask: `[rows, tokens]`
    /// - returns: `[rows, embed_dim]`
    pub fn mean_pooled(hidden: Tensor<B, 3>, mask: Tensor<B, 2, Int>, probe: &Probe<B>) -> Tensor<B, 2> {
        Pooling::Mean.pool(hidden, mask, probe)
    }

    /// Sentence embeddings: the mean over the tokens, normalised to length 1.
    ///
    /// # Shapes
    /// - returns: `[rows, embed_dim]`
    ///
    /// # Errors
    /// If a text is longer than `context_length`, or a token is not in the vocabulary.
    pub fn encode(&self, tokens: &Tokens, probe: &mut Probe<B>) -> Result<Tensor<B, 2>, MultimodalError> {
        self.encode_with(&SentenceHead::mean_normalised(), tokens, probe)
    }

    /// Sentence embeddings by a head of a published encoder.
    ///
    /// # Shapes
    /// - returns: `[rows, features]`
    ///
    /// # Errors
    /// Those of [`encode`](Self::encode).
    ///
    /// # Panics
    /// If a layer of the head has another width than what it is given.
    pub fn encode_with(
        &self,
        head: &SentenceHead<B>,
        tokens: &Tokens,
        probe: &mut Probe<B>,
    ) -> Result<Tensor<B, 2>, MultimodalError> {
        let [context_length, _] = self.pos_embed.weight.dims();
        let [vocab_size, _] = self.token_embed.weight.dims();
        tokens.check(context_length, vocab_size)?;
        let device = self.pos_embed.weight.device();
        let mask = tokens.mask_tensor(&device);
        let hidden = self.forward(tokens.ids_tensor(&device), mask.clone(), probe);
        Ok(head.forward(hidden, mask, probe))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::backend::{Autodiff, Flex};

    fn model<B: Backend>() -> Bert<B> {
        let config = BertConfig::new().with_vocab_size(20).with_context_length(6).with_embed_dim(8);
        config.with_depth(2).with_num_heads(2).with_mlp_dim(12).init(&Default::default()).unwrap()
    }

    fn tokens(ids: &[i64], mask: &[i64]) -> Tokens {
        Tokens::new(vec![ids.to_vec()], vec![mask.to_vec()]).unwrap()
    }

    #[test]
    fn padding_does_not_change_the_embedding() {
        let model = model::<Flex>();
        let encode = |t: Tokens| model.encode(&t, &mut Probe::clean()).unwrap();
        let short = encode(tokens(&[1, 5, 2], &[1; 3]));
        for padded in [[1, 5, 2, 0, 0], [1, 5, 2, 9, 9]] {
            let long = encode(tokens(&padded, &[1, 1, 1, 0, 0]));
            let distance: f32 = (long - short.clone()).abs().max().into_scalar();
            assert!(distance < 1e-6, "off by {distance}");
        }
        let other: f32 = (encode(tokens(&[1, 5, 2, 9], &[1; 4])) - short).abs().max().into_scalar();
        assert!(other > 1e-4, "a token that is not masked must change the embedding: {other}");
    }

    #[test]
    fn errors_name_the_tokens_and_the_setting() {
        let model = model::<Flex>();
        let message = |t: Tokens| model.encode(&t, &mut Probe::clean()).unwrap_err().to_string();
        assert!(message(tokens(&[1; 7], &[1; 7])).contains("7 tokens are more than the 6 positions"));
        assert!(message(tokens(&[20], &[1])).contains("token 20 is not in the tower's vocabulary of 20"));
        assert!(message(tokens(&[-1], &[1])).contains("token -1"));
        let error = BertConfig::new().with_num_heads(5).init::<Flex>(&Default::default()).unwrap_err();
        assert!(error.to_string().contains("num_heads = 5"), "{error}");
    }

    #[test]
    fn every_parameter_gets_a_gradient() {
        let model = model::<Autodiff<Flex>>();
        let found = model.encode(&tokens(&[1, 5, 2, 0], &[1, 1, 1, 0]), &mut Probe::clean()).unwrap();
        let weights = Tensor::arange(0..8, &Default::default()).float().reshape([1, 8]);
        let grads = (found * weights).sum().backward();
        let layer = &model.layers[0];
        for linear in [&layer.query, &layer.key, &layer.value, &layer.proj, &layer.fc1, &layer.fc2] {
            let largest = linear.weight.grad(&grads).unwrap().abs().max().into_scalar();
            assert!(largest > 0.0 && f32::is_finite(largest), "{largest}");
        }
        assert!(model.token_embed.weight.grad(&grads).is_some());
    }
}
