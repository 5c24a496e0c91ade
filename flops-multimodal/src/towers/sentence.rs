//! What follows a text tower in a sentence encoder, as in sentence-transformers (Reimers & Gurevych
//! 2019, arXiv 1908.10084): pooling of the tokens, then layers on the sentence embedding.

use burn::nn::{LayerNorm, Linear};
use burn::prelude::*;
use burn::tensor::activation::relu;
use flops_core::Probe;
use flops_core::ops::gelu;
use serde::{Deserialize, Serialize};

use super::layers::normalise;

/// How the hidden states of a text's tokens become one vector. h are the states of the tokens that
/// are no padding, n is their number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Pooling {
    /// The state of the first token.
    Cls,
    /// The largest value of each coordinate.
    Max,
    /// Σ h / n.
    Mean,
    /// Σ h / √n.
    MeanSqrtLen,
    /// Σ i·hᵢ / Σ i, where i counts the tokens from 1.
    WeightedMean,
    /// The state of the last token.
    LastToken,
}

impl Pooling {
    /// Pools the hidden states. A row of padding alone gives zeros; for [`Max`](Self::Max) minus
    /// infinity, and for [`Cls`](Self::Cls) the state of the first place, as in
    /// sentence-transformers.
    ///
    /// # Shapes
    /// - hidden: `[rows, tokens, embed_dim]`
    /// - mask: `[rows, tokens]`, 1 at a token and 0 at padding
    /// - returns: `[rows, embed_dim]`
    pub fn pool<B: Backend>(self, hidden: Tensor<B, 3>, mask: Tensor<B, 2, Int>, probe: &Probe<B>) -> Tensor<B, 2> {
        if self == Self::Max {
            let [hidden, mask] = probe.align([hidden, mask.float().unsqueeze_dim(2)]);
            let padding = mask.equal_elem(0.0).expand(hidden.dims());
            return hidden.mask_fill(padding, f32::NEG_INFINITY).max_dim(1).squeeze_dim(1);
        }
        let [hidden, weights] = probe.align([hidden, self.weights(mask).unsqueeze_dim(2)]);
        (hidden * weights).sum_dim(1).squeeze_dim(1)
    }

    /// The weight of each token in a sum over the tokens, `[rows, tokens]`.
    fn weights<B: Backend>(self, mask: Tensor<B, 2, Int>) -> Tensor<B, 2> {
        let [_, tokens] = mask.dims();
        let place = Tensor::<B, 1, Int>::arange(0..tokens as i64, &mask.device()).reshape([1, tokens]);
        // 1 at the largest score, which no two places share unless all of a row's are 0
        let largest = |score: Tensor<B, 2, Int>| {
            let best = score.clone().max_dim(1).expand(score.dims());
            score.equal(best).int()
        };
        // padding scores 0, and the very first place always a little
        let first = || {
            let before = place.clone().neg() + tokens as i64;
            largest(mask.clone() * before * 2 + place.clone().equal_elem(0).int())
        };
        let sum = |weights: Tensor<B, 2>| weights.sum_dim(1).clamp_min(1e-9);
        match self {
            Self::Cls => first().float(),
            Self::LastToken => (largest(mask.clone() * (place + 1)) * mask).float(),
            Self::MeanSqrtLen => mask.clone().float() / sum(mask.float()).sqrt(),
            Self::WeightedMean => {
                let padding_in_front = (first() * place.clone()).sum_dim(1);
                let weights = (mask * (place + 1 - padding_in_front)).float();
                weights.clone() / sum(weights)
            }
            _ => mask.clone().float() / sum(mask.float()),
        }
    }
}

/// The activation function of a [`Dense`] layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
#[serde(rename_all = "snake_case")]
pub enum DenseActivation {
    /// x.
    Identity,
    /// tanh x.
    Tanh,
    /// max(0, x).
    Relu,
    /// x·Φ(x), with the exact distribution function Φ of the standard normal.
    Gelu,
}

/// A linear layer on the sentence embedding, and an activation function.
#[derive(Module, Debug)]
pub struct Dense<B: Backend> {
    /// The layer, `[in_features, out_features]`.
    pub linear: Linear<B>,
    /// Its activation function.
    #[module(skip)]
    pub activation: DenseActivation,
}

impl<B: Backend> Dense<B> {
    fn forward(&self, x: Tensor<B, 2>, probe: &mut Probe<B>) -> Tensor<B, 2> {
        let x = probe.linear(&self.linear, x);
        match self.activation {
            DenseActivation::Identity => x,
            DenseActivation::Tanh => x.tanh(),
            DenseActivation::Relu => relu(x),
            DenseActivation::Gelu => gelu(x),
        }
    }
}

/// A layer behind the pooling.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum HeadLayer<B: Backend> {
    /// A linear layer with its activation function.
    Dense(Dense<B>),
    /// A layer normalisation.
    LayerNorm(LayerNorm<B>),
    /// Division by the Euclidean length.
    Normalize,
}

/// From the hidden states of a text's tokens to its embedding: pooling, then layers.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct SentenceHead<B: Backend> {
    /// How tokens are pooled. What several ways give is concatenated in this order.
    pub pooling: Vec<Pooling>,
    /// The layers behind the pooling, first to last.
    pub layers: Vec<HeadLayer<B>>,
    /// How many coordinates of the embedding are kept, the first ones; `None` for all.
    pub truncate_dim: Option<usize>,
}

impl<B: Backend> SentenceHead<B> {
    /// A head that pools by `pooling` alone.
    pub fn new(pooling: Pooling) -> Self {
        Self { pooling: vec![pooling], layers: vec![], truncate_dim: None }
    }

    /// The mean of the tokens, normalised to length 1.
    pub fn mean_normalised() -> Self {
        Self { layers: vec![HeadLayer::Normalize], ..Self::new(Pooling::Mean) }
    }

    /// The embeddings of texts.
    ///
    /// # Shapes
    /// - hidden: `[rows, tokens, embed_dim]`
    /// - mask: `[rows, tokens]`, 1 at a token and 0 at padding
    /// - returns: `[rows, features]`
    pub fn forward(&self, hidden: Tensor<B, 3>, mask: Tensor<B, 2, Int>, probe: &mut Probe<B>) -> Tensor<B, 2> {
        let pooled = self.pooling.iter().map(|pooling| pooling.pool(hidden.clone(), mask.clone(), probe));
        let pooled = Tensor::cat(pooled.collect(), 1);
        let x = self.layers.iter().fold(pooled, |x, layer| match layer {
            HeadLayer::Dense(dense) => dense.forward(x, probe),
            HeadLayer::LayerNorm(norm) => probe.layer_norm(norm, x),
            HeadLayer::Normalize => normalise(x),
        });
        match self.truncate_dim {
            Some(kept) if kept < x.dims()[1] => x.narrow(1, 0, kept),
            _ => x,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::backend::Flex;
    use burn::nn::{LayerNormConfig, LinearConfig};

    type Rows = Vec<Vec<f32>>;

    /// Three texts of width 2: one of four tokens, one with padding behind, one with padding around.
    const STATES: [[[f32; 2]; 4]; 3] = [
        [[1.0, -4.0], [2.0, 3.0], [-3.0, 0.5], [0.25, 7.0]],
        [[-1.0, 2.0], [5.0, -6.0], [9.0, 9.0], [8.0, 8.0]],
        [[9.0, 9.0], [-2.0, -1.0], [-4.0, 3.0], [8.0, 8.0]],
    ];
    const MASK: [[i32; 4]; 3] = [[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 0]];

    fn pooled(head: &SentenceHead<Flex>) -> Rows {
        let device = Default::default();
        let (hidden, mask) = (Tensor::from_floats(STATES, &device), Tensor::from_ints(MASK, &device));
        let out = head.forward(hidden, mask, &mut Probe::clean());
        let width = out.dims()[1];
        let all: Vec<f32> = out.into_data().to_vec().unwrap();
        all.chunks(width).map(<[f32]>::to_vec).collect()
    }

    /// The states of the tokens of a text, without padding.
    fn states(row: usize) -> Vec<[f32; 2]> {
        (0..4).filter(|i| MASK[row][*i] == 1).map(|i| STATES[row][i]).collect()
    }

    fn assert_close(found: &Rows, expected: &Rows, what: &str) {
        for (found, expected) in found.iter().flatten().zip(expected.iter().flatten()) {
            assert!((found - expected).abs() < 1e-5, "{what}: {found}, expected {expected}");
        }
        assert_eq!(found.len(), expected.len(), "{what}");
    }

    /// The formulas of `Pooling._forward_padded` in sentence-transformers 6.2.0, written as sums over
    /// the tokens.
    #[test]
    fn pooling_matches_the_formulas_of_sentence_transformers() {
        let sum = |row: usize, weight: &dyn Fn(usize) -> f32| -> Vec<f32> {
            let states = states(row);
            (0..2).map(|c| states.iter().enumerate().map(|(i, h)| weight(i) * h[c]).sum()).collect()
        };
        let n = |row: usize| states(row).len() as f32;
        let rows = |f: &dyn Fn(usize) -> Vec<f32>| -> Rows { (0..3).map(f).collect() };
        let weighted = |row| {
            let total = n(row) * (n(row) + 1.0) / 2.0;
            sum(row, &|i| (i + 1) as f32 / total)
        };
        let max = |row| (0..2).map(|c| states(row).iter().map(|h| h[c]).fold(f32::MIN, f32::max)).collect();
        for (pooling, expected) in [
            (Pooling::Cls, rows(&|row| states(row)[0].to_vec())),
            (Pooling::LastToken, rows(&|row| states(row).last().unwrap().to_vec())),
            (Pooling::Max, rows(&max)),
            (Pooling::Mean, rows(&|row| sum(row, &|_| 1.0 / n(row)))),
            (Pooling::MeanSqrtLen, rows(&|row| sum(row, &|_| 1.0 / n(row).sqrt()))),
            (Pooling::WeightedMean, rows(&weighted)),
        ] {
            assert_close(&pooled(&SentenceHead::new(pooling)), &expected, &format!("{pooling:?}"));
        }
    }

    /// `Pooling.forward` concatenates the modes, `encode` keeps the first `truncate_dim` coordinates.
    #[test]
    fn several_ways_are_concatenated_and_truncated() {
        let both = SentenceHead { pooling: vec![Pooling::Cls, Pooling::Max], ..SentenceHead::new(Pooling::Cls) };
        let expected =
            pooled(&SentenceHead::new(Pooling::Cls)).into_iter().zip(pooled(&SentenceHead::new(Pooling::Max)));
        let expected: Rows = expected.map(|(a, b)| [a, b].concat()).collect();
        assert_close(&pooled(&both), &expected, "both");
        let three = SentenceHead { truncate_dim: Some(3), ..both.clone() };
        assert_close(&pooled(&three), &expected.iter().map(|row| row[..3].to_vec()).collect(), "three");
        assert_close(&pooled(&SentenceHead { truncate_dim: Some(9), ..both }), &expected, "more than there are");
    }

    /// `activation_function(linear(x))`, `torch.nn.LayerNorm` with ε = 1e-5, `F.normalize(p=2)`.
    #[test]
    fn layers_match_pytorchs_formulas() {
        let device = Default::default();
        let mut linear: Linear<Flex> = LinearConfig::new(2, 2).init(&device);
        linear.weight = linear.weight.map(|_| Tensor::from_floats([[0.5, -1.0], [0.25, 0.125]], &device));
        linear.bias = linear.bias.map(|bias| bias.map(|_| Tensor::from_floats([0.1, -0.2], &device)));
        let cls = pooled(&SentenceHead::new(Pooling::Cls));
        let after = |layer| pooled(&SentenceHead { layers: vec![layer], ..SentenceHead::new(Pooling::Cls) });
        let each = |f: &dyn Fn(f32, f32) -> [f32; 2]| -> Rows { cls.iter().map(|x| f(x[0], x[1]).to_vec()).collect() };
        let product = |a: f32, b: f32| [0.5 * a + 0.25 * b + 0.1, -a + 0.125 * b - 0.2];
        type Function = fn(f32) -> f32;
        let functions: [(DenseActivation, Function); 3] = [
            (DenseActivation::Identity, |x| x),
            (DenseActivation::Tanh, f32::tanh),
            (DenseActivation::Relu, |x| x.max(0.0)),
        ];
        for (activation, f) in functions {
            let dense = HeadLayer::Dense(Dense { linear: linear.clone(), activation });
            assert_close(&after(dense), &each(&|a, b| product(a, b).map(f)), &format!("{activation:?}"));
        }
        // x·Φ(x) at the linear layer's outputs -1.9, 3.8, 2.1 and -1.7, far from the form with tanh
        let gelu = Dense { linear, activation: DenseActivation::Gelu };
        let gelu = gelu.forward(Tensor::from_floats([[-4.0, 0.0], [2.0, 4.0]], &device), &mut Probe::clean());
        let expected = [-0.054_561_5, 3.799_725, 2.062_484_7, -0.075_761_3];
        let found: Vec<f32> = gelu.into_data().to_vec().unwrap();
        assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 2e-5), "{found:?}, expected {expected:?}");
        let normed = each(&|a, b| {
            let (mean, half) = ((a + b) / 2.0, (a - b) / 2.0);
            [a, b].map(|x| (x - mean) / (half * half + 1e-5).sqrt())
        });
        let norm = LayerNormConfig::new(2).with_epsilon(1e-5).init(&device);
        assert_close(&after(HeadLayer::LayerNorm(norm)), &normed, "layer norm");
        let unit = each(&|a, b| [a, b].map(|x| x / (a * a + b * b).sqrt()));
        assert_close(&after(HeadLayer::Normalize), &unit, "normalize");
    }
}
