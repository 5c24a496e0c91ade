//! A pre-norm transformer block whose layers are called through the probe.

use burn::nn::{LayerNorm, LayerNormConfig, Linear};
use burn::prelude::*;
use flops_core::Probe;
use flops_core::ops::attention;

use crate::config::{Activation, ViTConfig};
use crate::layers::linear;
use crate::lora::Lora;

/// Multi-head self-attention with separate query, key and value layers.
#[derive(Module, Debug)]
pub struct Attention<B: Backend> {
    /// Queries, `[embed_dim, embed_dim]`.
    pub query: Linear<B>,
    /// Keys, `[embed_dim, embed_dim]`.
    pub key: Linear<B>,
    /// Values, `[embed_dim, embed_dim]`.
    pub value: Linear<B>,
    /// Output projection, `[embed_dim, embed_dim]`.
    pub proj: Linear<B>,
    /// Adapter of the query projection.
    pub query_lora: Option<Lora<B>>,
    /// Adapter of the value projection.
    pub value_lora: Option<Lora<B>>,
    /// Number of heads.
    pub num_heads: usize,
}

impl<B: Backend> Attention<B> {
    fn new(config: &ViTConfig, device: &B::Device) -> Self {
        let d = config.embed_dim;
        let qkv = || linear(d, d, config.qkv_bias, device);
        Self {
            query: qkv(),
            key: qkv(),
            value: qkv(),
            proj: linear(d, d, true, device),
            query_lora: None,
            value_lora: None,
            num_heads: config.num_heads,
        }
    }

    /// Attention of the queries `q` over keys and values, without the output projection.
    ///
    /// # Shapes
    /// - q: `[rows, tokens, d]`, k and v: `[context_rows, context_tokens, d]`
    /// - returns: `[rows, tokens, d]`
    pub(crate) fn attend(&self, q: Tensor<B, 3>, k: Tensor<B, 3>, v: Tensor<B, 3>, probe: &Probe<B>) -> Tensor<B, 3> {
        let [k, v] = probe.align([k, v]);
        let context = k.dims()[0];
        probe.share_context(q, context, |q| attention(q, k, v, self.num_heads, None))
    }
}

/// A transformer block: x + attention(norm1(x)), then x + mlp(norm2(x)).
#[derive(Module, Debug)]
pub struct Block<B: Backend> {
    /// Normalisation before the attention.
    pub norm1: LayerNorm<B>,
    /// Self-attention.
    pub attn: Attention<B>,
    /// Normalisation before the MLP.
    pub norm2: LayerNorm<B>,
    /// First layer of the MLP.
    pub fc1: Linear<B>,
    /// Second layer of the MLP.
    pub fc2: Linear<B>,
    /// The activation between them.
    #[module(skip)]
    pub activation: Activation,
}

/// Inputs of the class-token path: `(x, norm1(x))` at the first tokens, keys and values of all.
pub(crate) type ClassTokenState<B> = (Tensor<B, 3>, Tensor<B, 3>, Tensor<B, 3>, Tensor<B, 3>);

impl<B: Backend> Block<B> {
    pub(crate) fn new(config: &ViTConfig, device: &B::Device) -> Self {
        let (d, hidden) = (config.embed_dim, config.mlp_dim());
        let norm = LayerNormConfig::new(d).with_epsilon(config.layer_norm_eps);
        Self {
            norm1: norm.init(device),
            attn: Attention::new(config, device),
            norm2: norm.init(device),
            fc1: linear(d, hidden, true, device),
            fc2: linear(hidden, d, true, device),
            activation: config.activation,
        }
    }

    /// Applies the block to all tokens.
    ///
    /// # Shapes
    /// - x: `[rows, tokens, embed_dim]`, and so the result
    pub fn forward(&self, x: Tensor<B, 3>, probe: &mut Probe<B>) -> Tensor<B, 3> {
        let h = probe.layer_norm(&self.norm1, x.clone());
        let q = probe.linear_with_lora(&self.attn.query, self.attn.query_lora.as_ref(), h.clone());
        let k = probe.linear(&self.attn.key, h.clone());
        let v = probe.linear_with_lora(&self.attn.value, self.attn.value_lora.as_ref(), h);
        let a = self.attn.attend(q, k, v, probe);
        let (x, h) = self.project((x, a), probe);
        let h = self.activation.forward(probe.linear(&self.fc1, h));
        let h = probe.linear(&self.fc2, h);
        probe.add(x, h)
    }

    /// Computes what the first `seen` tokens need from all tokens: keys and values.
    ///
    /// These are the tokens that have a head: the class token, and the distillation token.
    pub(crate) fn keys_values(&self, x: Tensor<B, 3>, seen: usize, probe: &mut Probe<B>) -> ClassTokenState<B> {
        let h = probe.layer_norm(&self.norm1, x.clone());
        let k = probe.linear(&self.attn.key, h.clone());
        let v = probe.linear_with_lora(&self.attn.value, self.attn.value_lora.as_ref(), h.clone());
        (x.narrow(1, 0, seen), h.narrow(1, 0, seen), k, v)
    }

    /// Applies the rest of the block to the first `seen` tokens only.
    ///
    /// Each layer is a stage of its own, since a query on a layer starts there.
    ///
    /// # Shapes
    /// - returns: `[rows, seen, embed_dim]`
    pub(crate) fn class_token(&self, state: ClassTokenState<B>, probe: &mut Probe<B>) -> Tensor<B, 3> {
        let state = probe.stage(state, |(x, h, k, v), probe| {
            let q = probe.linear_with_lora(&self.attn.query, self.attn.query_lora.as_ref(), h);
            (x, self.attn.attend(q, k, v, probe))
        });
        let state = probe.stage(state, |state, probe| self.project(state, probe));
        let state = probe.stage(state, |(x, h), probe| (x, self.activation.forward(probe.linear(&self.fc1, h))));
        probe.stage(state, |(x, h), probe| {
            let h = probe.linear(&self.fc2, h);
            probe.add(x, h)
        })
    }

    /// Returns x + proj(a) and its normalisation, the input of the MLP.
    fn project(&self, (x, a): (Tensor<B, 3>, Tensor<B, 3>), probe: &mut Probe<B>) -> (Tensor<B, 3>, Tensor<B, 3>) {
        let a = probe.linear(&self.attn.proj, a);
        let x = probe.add(x, a);
        let h = probe.layer_norm(&self.norm2, x.clone());
        (x, h)
    }
}
