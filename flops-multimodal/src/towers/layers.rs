//! The encoder layer of all towers, and the functions that they share.

use burn::nn::{Embedding, EmbeddingConfig, Initializer, LayerNorm, LayerNormConfig, Linear};
use burn::prelude::*;
use burn::tensor::activation::sigmoid;
use flops_core::lora::Lora;
use flops_core::ops::{attention, gelu};
use flops_core::{Probe, site};
use flops_vit::Sites;
use flops_vit::model::linear;
use serde::{Deserialize, Serialize};

use crate::error::MultimodalError;

/// Added to the attention scores of hidden tokens: e⁻¹⁰⁰⁰⁰ is zero in every precision, and f16
/// holds 10,000.
const HIDDEN: f64 = -1e4;

/// The activation function of an MLP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// x·Φ(x), with the exact distribution function Φ of the standard normal.
    #[default]
    Gelu,
    /// x·σ(1.702 x), which OpenAI's CLIP uses.
    QuickGelu,
}

impl Activation {
    /// Applies the function to each element.
    pub fn forward<B: Backend, const D: usize>(self, x: Tensor<B, D>) -> Tensor<B, D> {
        match self {
            Self::Gelu => gelu(x),
            Self::QuickGelu => x.clone() * sigmoid(x.mul_scalar(1.702)),
        }
    }
}

/// Where an encoder layer normalises.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
#[serde(rename_all = "snake_case")]
pub enum NormOrder {
    /// In front of attention and MLP, as in CLIP: x + f(norm(x)).
    Pre,
    /// After the residual connection, as in BERT: norm(x + f(x)).
    Post,
}

/// The bias of attention scores that hides padding and, if `causal`, all later tokens.
///
/// # Shapes
/// - mask: `[rows, tokens]`, 1 at a token and 0 at padding
/// - returns: `[rows, 1, tokens, tokens]` if `causal`, else `[rows, 1, 1, tokens]`
pub fn attention_bias<B: Backend>(mask: Tensor<B, 2, Int>, causal: bool) -> Tensor<B, 4> {
    let [rows, tokens] = mask.dims();
    let device = mask.device();
    let padding = mask.equal_elem(0).reshape([rows, 1, 1, tokens]);
    let hidden = if causal {
        let shape = [rows, 1, tokens, tokens];
        let later = Tensor::<B, 2, Bool>::tril_mask([tokens, tokens], 0, &device).reshape([1, 1, tokens, tokens]);
        padding.expand(shape).bool_or(later.expand(shape))
    } else {
        padding
    };
    hidden.float().mul_scalar(HIDDEN)
}

/// Sizes of an encoder layer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LayerSizes {
    pub embed_dim: usize,
    pub num_heads: usize,
    pub mlp_dim: usize,
    pub layer_norm_eps: f64,
    pub activation: Activation,
    pub order: NormOrder,
}

/// A transformer encoder layer: self-attention, then an MLP, each with a residual connection.
#[derive(Module, Debug)]
pub struct EncoderLayer<B: Backend> {
    /// Queries, `[embed_dim, embed_dim]`.
    pub query: Linear<B>,
    /// The adapter of the queries.
    pub query_lora: Option<Lora<B>>,
    /// Keys, `[embed_dim, embed_dim]`.
    pub key: Linear<B>,
    /// Values, `[embed_dim, embed_dim]`.
    pub value: Linear<B>,
    /// The adapter of the values.
    pub value_lora: Option<Lora<B>>,
    /// Output projection of the attention, `[embed_dim, embed_dim]`.
    pub proj: Linear<B>,
    /// Normalisation of the attention.
    pub norm1: LayerNorm<B>,
    /// First layer of the MLP, `[embed_dim, mlp_dim]`.
    pub fc1: Linear<B>,
    /// Second layer of the MLP, `[mlp_dim, embed_dim]`.
    pub fc2: Linear<B>,
    /// Normalisation of the MLP.
    pub norm2: LayerNorm<B>,
    /// Number of heads.
    pub num_heads: usize,
    /// Activation function of the MLP.
    #[module(skip)]
    pub activation: Activation,
    /// Where the layer normalises.
    #[module(skip)]
    pub order: NormOrder,
    /// What its sites are: its layers, or what its residual branches add to the stream.
    #[module(skip)]
    pub sites: Sites,
}

impl<B: Backend> EncoderLayer<B> {
    pub(crate) fn new(sizes: &LayerSizes, device: &B::Device) -> Self {
        let (d, hidden) = (sizes.embed_dim, sizes.mlp_dim);
        let square = || linear(d, d, true, device);
        Self {
            query: square(),
            query_lora: None,
            key: square(),
            value: square(),
            value_lora: None,
            proj: square(),
            norm1: norm(d, sizes.layer_norm_eps, device),
            fc1: linear(d, hidden, true, device),
            fc2: linear(hidden, d, true, device),
            norm2: norm(d, sizes.layer_norm_eps, device),
            num_heads: sizes.num_heads,
            activation: sizes.activation,
            order: sizes.order,
            sites: Sites::Linear,
        }
    }

    /// Applies the layer; `bias` is added to the attention scores, see [`attention_bias`].
    ///
    /// # Shapes
    /// - x: `[rows, tokens, embed_dim]`; the result has the same shape
    /// - bias: `[1 or rows, 1, 1 or tokens, tokens]`
    pub fn forward(&self, x: Tensor<B, 3>, bias: Option<&Tensor<B, 4>>, probe: &mut Probe<B>) -> Tensor<B, 3> {
        match (self.order, self.sites) {
            (NormOrder::Pre, Sites::Branch) => {
                let branch = AttentionBranch::new(self, Some(self.norm1.clone()));
                let h = branch.site(x.clone(), bias, probe);
                let x = probe.add(x, h);
                let h = MlpBranch::new(self, Some(self.norm2.clone())).site(x.clone(), probe);
                probe.add(x, h)
            }
            (NormOrder::Post, Sites::Branch) => {
                let h = AttentionBranch::new(self, None).site(x.clone(), bias, probe);
                let x = probe.layer_norm(&self.norm1, probe.add(x, h));
                let h = MlpBranch::new(self, None).site(x.clone(), probe);
                probe.layer_norm(&self.norm2, probe.add(x, h))
            }
            (NormOrder::Pre, _) => {
                let h = probe.layer_norm(&self.norm1, x.clone());
                let h = self.attend(h, bias, probe);
                let x = probe.add(x, h);
                let h = probe.layer_norm(&self.norm2, x.clone());
                let h = self.mlp(h, probe);
                probe.add(x, h)
            }
            (NormOrder::Post, _) => {
                let h = self.attend(x.clone(), bias, probe);
                let x = probe.layer_norm(&self.norm1, probe.add(x, h));
                let h = self.mlp(x.clone(), probe);
                probe.layer_norm(&self.norm2, probe.add(x, h))
            }
        }
    }

    fn attend(&self, x: Tensor<B, 3>, bias: Option<&Tensor<B, 4>>, probe: &mut Probe<B>) -> Tensor<B, 3> {
        let adapters = [self.query_lora.as_ref(), self.value_lora.as_ref()];
        attend([&self.query, &self.key, &self.value, &self.proj], adapters, self.num_heads, (x, bias), probe)
    }

    fn mlp(&self, x: Tensor<B, 3>, probe: &mut Probe<B>) -> Tensor<B, 3> {
        let h = self.activation.forward(probe.linear(&self.fc1, x));
        probe.linear(&self.fc2, h)
    }
}

// The residual branches as modules, each one site. They share the parameters of the layer: parameters
// are reference-counted, nothing is copied.

/// What attention adds to the stream.
#[derive(Module, Debug)]
struct AttentionBranch<B: Backend> {
    /// The norm in front; `None` where the layer normalises afterwards.
    norm: Option<LayerNorm<B>>,
    query: Linear<B>,
    query_lora: Option<Lora<B>>,
    key: Linear<B>,
    value: Linear<B>,
    value_lora: Option<Lora<B>>,
    proj: Linear<B>,
    num_heads: usize,
}

impl<B: Backend> AttentionBranch<B> {
    fn new(layer: &EncoderLayer<B>, norm: Option<LayerNorm<B>>) -> Self {
        Self {
            norm,
            query: layer.query.clone(),
            query_lora: layer.query_lora.clone(),
            key: layer.key.clone(),
            value: layer.value.clone(),
            value_lora: layer.value_lora.clone(),
            proj: layer.proj.clone(),
            num_heads: layer.num_heads,
        }
    }

    /// The branch as a site. Its input holds `bias`, so a query repeats the rows of both alike.
    fn site(&self, x: Tensor<B, 3>, bias: Option<&Tensor<B, 4>>, probe: &mut Probe<B>) -> Tensor<B, 3> {
        site!(probe, self, (x, bias.cloned()), |branch, (x, bias)| branch.forward(x, bias))
    }

    fn forward(&self, x: Tensor<B, 3>, bias: Option<Tensor<B, 4>>) -> Tensor<B, 3> {
        let probe = &mut Probe::clean();
        let x = match &self.norm {
            Some(norm) => probe.layer_norm(norm, x),
            None => x,
        };
        let adapters = [self.query_lora.as_ref(), self.value_lora.as_ref()];
        attend([&self.query, &self.key, &self.value, &self.proj], adapters, self.num_heads, (x, bias.as_ref()), probe)
    }
}

/// What the MLP adds to the stream.
#[derive(Module, Debug)]
struct MlpBranch<B: Backend> {
    /// The norm in front; `None` where the layer normalises afterwards.
    norm: Option<LayerNorm<B>>,
    fc1: Linear<B>,
    fc2: Linear<B>,
    #[module(skip)]
    activation: Activation,
}

impl<B: Backend> MlpBranch<B> {
    fn new(layer: &EncoderLayer<B>, norm: Option<LayerNorm<B>>) -> Self {
        Self { norm, fc1: layer.fc1.clone(), fc2: layer.fc2.clone(), activation: layer.activation }
    }

    /// The branch as a site.
    fn site(&self, x: Tensor<B, 3>, probe: &mut Probe<B>) -> Tensor<B, 3> {
        site!(probe, self, x, |branch, x| branch.forward(x))
    }

    fn forward(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        let probe = &mut Probe::clean();
        let x = match &self.norm {
            Some(norm) => probe.layer_norm(norm, x),
            None => x,
        };
        let h = self.activation.forward(probe.linear(&self.fc1, x));
        probe.linear(&self.fc2, h)
    }
}

/// Self-attention by the layers of queries, keys, values and outputs, and the adapters of queries and
/// values.
fn attend<B: Backend>(
    [query, key, value, proj]: [&Linear<B>; 4],
    [query_lora, value_lora]: [Option<&Lora<B>>; 2],
    num_heads: usize,
    (x, bias): (Tensor<B, 3>, Option<&Tensor<B, 4>>),
    probe: &mut Probe<B>,
) -> Tensor<B, 3> {
    let q = probe.linear_with_lora(query, query_lora, x.clone());
    let k = probe.linear(key, x.clone());
    let v = probe.linear_with_lora(value, value_lora, x);
    let (k, v, bias) = match bias {
        Some(bias) => {
            let [rows, _, tokens, context] = bias.dims();
            let [k, v, bias] = probe.align([k, v, bias.clone().reshape([rows, tokens, context])]);
            (k, v, Some(bias.unsqueeze_dim(1)))
        }
        None => {
            let [k, v] = probe.align([k, v]);
            (k, v, None)
        }
    };
    let a = probe.share_context(q, k.dims()[0], |q| {
        let bias = bias.map(|bias| repeat_for_queries(bias, q.dims()[1]));
        attention(q, k, v, num_heads, bias)
    });
    probe.linear(proj, a)
}

/// Chooses the sites of all `layers`.
pub(crate) fn set_sites<B: Backend>(layers: &mut [EncoderLayer<B>], sites: Sites) {
    layers.iter_mut().for_each(|layer| layer.sites = sites);
}

/// Repeats the bias for `tokens` attention queries: forward queries that share the keys of a row
/// repeat its tokens.
fn repeat_for_queries<B: Backend>(bias: Tensor<B, 4>, tokens: usize) -> Tensor<B, 4> {
    let times = tokens / bias.dims()[2].max(1);
    if times == 1 { bias } else { bias.repeat_dim(2, times) }
}

/// A layer normalisation, initialised on first use.
pub(crate) fn norm<B: Backend>(d: usize, eps: f64, device: &B::Device) -> LayerNorm<B> {
    LayerNormConfig::new(d).with_epsilon(eps).init(device)
}

/// A table of `rows` vectors from N(0, 0.02²), initialised on first use.
pub(crate) fn table<B: Backend>(rows: usize, d: usize, device: &B::Device) -> Embedding<B> {
    EmbeddingConfig::new(rows, d).with_initializer(Initializer::Normal { mean: 0.0, std: 0.02 }).init(device)
}

/// The embeddings of the first `tokens` positions, for each of `rows` rows.
///
/// # Shapes
/// - returns: `[rows, tokens, d]`
pub(crate) fn positions<B: Backend>(
    table: &Embedding<B>,
    [rows, tokens]: [usize; 2],
    probe: &mut Probe<B>,
) -> Tensor<B, 3> {
    let ids = Tensor::<B, 1, Int>::arange(0..tokens as i64, &table.weight.device());
    probe.embedding(table, ids.reshape([1, tokens]).repeat_dim(0, rows))
}

/// Rows divided by their Euclidean length, x / max(‖x‖, 10⁻¹²).
///
/// # Shapes
/// - x: `[rows, dim]`; the result has the same shape
pub fn normalise<B: Backend>(x: Tensor<B, 2>) -> Tensor<B, 2> {
    let length = x.clone().powi_scalar(2).sum_dim(1).clamp_min(1e-24).sqrt();
    x / length
}

/// The largest size: products of a few sizes within it do not overflow.
const MAX_SIZE: usize = 1 << 20;

/// The largest number of layers.
const MAX_DEPTH: usize = 1 << 14;

/// Checks that all `sizes` are positive and not absurd, and that `heads` divides `dim`.
pub(crate) fn check_sizes(sizes: &[(&'static str, usize)], dim: usize, heads: usize) -> Result<(), MultimodalError> {
    let fail = |field, value, remedy| Err(MultimodalError::Config { field, value, remedy });
    if let Some((field, value)) = sizes.iter().find(|(_, value)| *value == 0) {
        return fail(field, *value, "it must be at least 1");
    }
    if let Some((field, value)) = sizes.iter().find(|(field, value)| *field == "depth" && *value > MAX_DEPTH) {
        return fail(field, *value, "use at most 16,384");
    }
    if let Some((field, value)) = sizes.iter().find(|(_, value)| *value > MAX_SIZE) {
        return fail(field, *value, "use at most 1,048,576");
    }
    if heads == 0 || !dim.is_multiple_of(heads) {
        return fail("num_heads", heads, "use a divisor of embed_dim");
    }
    Ok(())
}

/// Checks the ε of layer normalisations.
pub(crate) fn check_eps(eps: f64) -> Result<(), MultimodalError> {
    if eps > 0.0 && eps < 1.0 {
        return Ok(());
    }
    let remedy = "use a number above 0 and below 1";
    Err(MultimodalError::Setting { name: "layer_norm_eps", value: eps.to_string(), remedy })
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::backend::Flex;

    #[test]
    fn activations_match_pytorch() {
        // torch.nn.functional.gelu(x), x * torch.sigmoid(1.702 * x) at -1, 0.5, 2
        let x = Tensor::<Flex, 1>::from_floats([-1.0, 0.5, 2.0], &Default::default());
        for (activation, expected) in [
            (Activation::Gelu, [-0.158_655_26, 0.345_731_23, 1.954_499_7]),
            (Activation::QuickGelu, [-0.154_202_3, 0.350_390_3, 1.935_656_6]),
        ] {
            let found: Vec<f32> = activation.forward(x.clone()).into_data().to_vec().unwrap();
            for (a, b) in found.iter().zip(expected) {
                assert!((a - b).abs() < 1e-4, "{activation:?}: {a}, expected {b}");
            }
        }
    }

    #[test]
    fn the_bias_hides_padding_and_later_tokens() {
        let mask = Tensor::<Flex, 2, Int>::from_ints([[1, 0, 1]], &Default::default());
        let visible = |causal| -> Vec<bool> {
            let bias = attention_bias(mask.clone(), causal);
            bias.into_data().iter::<f32>().map(|x| x == 0.0).collect()
        };
        assert_eq!(visible(false), [true, false, true]);
        assert_eq!(visible(true), [true, false, false, true, false, false, true, false, true]);
    }

    #[test]
    fn a_row_of_padding_gives_finite_values() {
        let device = Default::default();
        for order in [NormOrder::Pre, NormOrder::Post] {
            let sizes = LayerSizes {
                embed_dim: 8,
                num_heads: 2,
                mlp_dim: 16,
                layer_norm_eps: 1e-5,
                activation: Activation::Gelu,
                order,
            };
            let layer = EncoderLayer::<Flex>::new(&sizes, &device);
            let bias = attention_bias(Tensor::zeros([1, 3], &device), true);
            let y = layer.forward(Tensor::ones([1, 3, 8], &device), Some(&bias), &mut Probe::clean());
            assert!(y.into_data().iter::<f32>().all(f32::is_finite));
        }
    }
}
