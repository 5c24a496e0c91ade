//! The layer that all towers are made of.

use burn::nn::{Embedding, EmbeddingConfig, Initializer, LayerNorm, LayerNormConfig, Linear};
use burn::prelude::*;
use burn::tensor::activation::sigmoid;
use flops_core::Probe;
use flops_core::ops::{attention, gelu};
use flops_vit::model::linear;
use serde::{Deserialize, Serialize};

/// What an attention score loses where it must not look: e⁻¹⁰⁰⁰⁰ is zero in every precision, and 10,000 is a number in f16.
const HIDDEN: f64 = -1e4;

/// The function between the two layers of an MLP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// x·Φ(x), with the exact normal distribution function Φ.
    #[default]
    Gelu,
    /// x·σ(1.702 x), as OpenAI's CLIP has it.
    QuickGelu,
}

impl Activation {
    /// The function of each element.
    pub fn forward<B: Backend, const D: usize>(self, x: Tensor<B, D>) -> Tensor<B, D> {
        match self {
            Self::Gelu => gelu(x),
            Self::QuickGelu => x.clone() * sigmoid(x.mul_scalar(1.702)),
        }
    }
}

/// Where a layer normalises.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NormOrder {
    /// In front of attention and MLP, as CLIP: x + f(norm(x)).
    Pre,
    /// Behind the sum, as BERT: norm(x + f(x)).
    Post,
}

/// What is added to attention scores so that padding is not looked at, and, where `causal`, nothing behind a token.
///
/// # Shapes
/// - mask: `[rows, tokens]`, 1 at a token and 0 at padding
/// - returns: `[rows, 1, tokens, tokens]` where `causal`, else `[rows, 1, 1, tokens]`
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

/// Sizes of a layer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LayerSizes {
    pub embed_dim: usize,
    pub num_heads: usize,
    pub mlp_dim: usize,
    pub layer_norm_eps: f64,
    pub activation: Activation,
    pub order: NormOrder,
}

/// A layer of a transformer encoder: self-attention, then an MLP, each with a residual connection.
#[derive(Module, Debug)]
pub struct EncoderLayer<B: Backend> {
    /// Queries, `[embed_dim, embed_dim]`.
    pub query: Linear<B>,
    /// Keys, `[embed_dim, embed_dim]`.
    pub key: Linear<B>,
    /// Values, `[embed_dim, embed_dim]`.
    pub value: Linear<B>,
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
    /// The function between the layers of the MLP.
    #[module(skip)]
    pub activation: Activation,
    /// Where it normalises.
    #[module(skip)]
    pub order: NormOrder,
}

impl<B: Backend> EncoderLayer<B> {
    pub(crate) fn new(sizes: &LayerSizes, device: &B::Device) -> Self {
        let (d, hidden) = (sizes.embed_dim, sizes.mlp_dim);
        let square = || linear(d, d, true, device);
        Self {
            query: square(),
            key: square(),
            value: square(),
            proj: square(),
            norm1: norm(d, sizes.layer_norm_eps, device),
            fc1: linear(d, hidden, true, device),
            fc2: linear(hidden, d, true, device),
            norm2: norm(d, sizes.layer_norm_eps, device),
            num_heads: sizes.num_heads,
            activation: sizes.activation,
            order: sizes.order,
        }
    }

    /// The layer for all tokens; `bias` is added to the attention scores, see [`attention_bias`].
    ///
    /// # Shapes
    /// - x: `[rows, tokens, embed_dim]`, and so the result
    /// - bias: `[1 or rows, 1, 1 or tokens, tokens]`
    pub fn forward(&self, x: Tensor<B, 3>, bias: Option<&Tensor<B, 4>>, probe: &mut Probe<B>) -> Tensor<B, 3> {
        match self.order {
            NormOrder::Pre => {
                let h = probe.layer_norm(&self.norm1, x.clone());
                let h = self.attend(h, bias, probe);
                let x = probe.add(x, h);
                let h = probe.layer_norm(&self.norm2, x.clone());
                let h = self.mlp(h, probe);
                probe.add(x, h)
            }
            NormOrder::Post => {
                let h = self.attend(x.clone(), bias, probe);
                let x = probe.layer_norm(&self.norm1, probe.add(x, h));
                let h = self.mlp(x.clone(), probe);
                probe.layer_norm(&self.norm2, probe.add(x, h))
            }
        }
    }

    fn attend(&self, x: Tensor<B, 3>, bias: Option<&Tensor<B, 4>>, probe: &mut Probe<B>) -> Tensor<B, 3> {
        let q = probe.linear(&self.query, x.clone());
        let k = probe.linear(&self.key, x.clone());
        let v = probe.linear(&self.value, x);
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
            let bias = bias.map(|bias| for_queries(bias, q.dims()[1]));
            attention(q, k, v, self.num_heads, bias)
        });
        probe.linear(&self.proj, a)
    }

    fn mlp(&self, x: Tensor<B, 3>, probe: &mut Probe<B>) -> Tensor<B, 3> {
        let h = self.activation.forward(probe.linear(&self.fc1, x));
        probe.linear(&self.fc2, h)
    }
}

/// The bias with a row for each of `tokens` queries; where forward queries share a row's keys, its tokens come several times over.
fn for_queries<B: Backend>(bias: Tensor<B, 4>, tokens: usize) -> Tensor<B, 4> {
    let times = tokens / bias.dims()[2].max(1);
    if times == 1 { bias } else { bias.repeat_dim(2, times) }
}

/// A layer normalisation, not made until it is looked at.
pub(crate) fn norm<B: Backend>(d: usize, eps: f64, device: &B::Device) -> LayerNorm<B> {
    LayerNormConfig::new(d).with_epsilon(eps).init(device)
}

/// A table of `rows` vectors drawn from N(0, 0.02²), not until it is looked at.
pub(crate) fn table<B: Backend>(rows: usize, d: usize, device: &B::Device) -> Embedding<B> {
    EmbeddingConfig::new(rows, d).with_initializer(Initializer::Normal { mean: 0.0, std: 0.02 }).init(device)
}

/// The first `tokens` rows of a table of positions, for each of `rows` rows.
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

#[cfg(test)]
mod tests {
    use super::*;
    use burn::backend::Flex;

    #[test]
    fn activations_are_those_of_pytorch() {
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
    fn a_bias_hides_padding_and_what_comes_later() {
        let mask = Tensor::<Flex, 2, Int>::from_ints([[1, 0, 1]], &Default::default());
        let seen = |causal| -> Vec<bool> {
            let bias = attention_bias(mask.clone(), causal);
            bias.into_data().iter::<f32>().map(|x| x == 0.0).collect()
        };
        assert_eq!(seen(false), [true, false, true]);
        assert_eq!(seen(true), [true, false, false, true, false, false, true, false, true]);
    }

    #[test]
    fn a_row_of_padding_alone_gives_numbers() {
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
