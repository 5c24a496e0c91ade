//! The contract over Burn's modules as sites: gradients are exact, norms are exact along their signs.

use burn::nn::attention::{MhaInput, MultiHeadAttention, MultiHeadAttentionConfig};
use burn::nn::conv::{Conv1d, Conv1dConfig, ConvTranspose2d, ConvTranspose2dConfig};
use burn::nn::transformer::{TransformerEncoderConfig, TransformerEncoderLayer};
use burn::nn::{
    BiLstm, BiLstmConfig, GroupNorm, GroupNormConfig, Gru, GruConfig, Lstm, LstmConfig, PRelu, PReluConfig,
    PaddingConfig1d, RmsNorm, RmsNormConfig,
};

use super::*;
use crate::site;

type Padded<B> = (Tensor<B, 3>, Tensor<B, 2, Bool>);

model_of!(Recurrent, Lstm<B>, Tensor<B, 3>, |layer, x, probe| site!(probe, layer, x, |lstm, x| lstm.forward(x, None).0));
model_of!(BothWays, BiLstm<B>, Tensor<B, 3>, |layer, x, probe| site!(probe, layer, x, |lstm, x| lstm.forward(x, None).0));
model_of!(Gated, Gru<B>, Tensor<B, 3>, |layer, x, probe| site!(probe, layer, x, |gru, x| gru.forward(x, None)));
model_of!(Attention, MultiHeadAttention<B>, Padded<B>, |layer, input, probe| {
    site!(probe, layer, input, |layer, (x, mask)| layer.forward(MhaInput::self_attn(x).mask_pad(mask)).context)
});
model_of!(Encoder, TransformerEncoderLayer<B>, Padded<B>, |layer, input, probe| {
    site!(probe, layer, input, |layer, (x, mask)| layer.forward(x, Some(mask), None))
});
model_of!(Conv1dModel, Conv1d<B>, Tensor<B, 3>, |layer, x, probe| {
    probe.module(layer, x, Conv1d::forward, Conv1d::forward)
});
model_of!(Transposed, ConvTranspose2d<B>, Tensor<B, 4>, |layer, x, probe| {
    probe.module(layer, x, ConvTranspose2d::forward, ConvTranspose2d::forward)
});
model_of!(Grouped, Conv2d<B>, Tensor<B, 4>, |layer, x, probe| {
    probe.module(layer, x, Conv2d::forward, Conv2d::forward)
});
model_of!(GroupNormModel, GroupNorm<B>, Tensor<B, 3>, |layer, x, probe| {
    probe.module(layer, x, GroupNorm::forward, GroupNorm::forward)
});
model_of!(RmsNormModel, RmsNorm<B>, Tensor<B, 3>, |layer, x, probe| {
    probe.module(layer, x, RmsNorm::forward, RmsNorm::forward)
});
model_of!(PReluModel, PRelu<B>, Tensor<B, 3>, |layer, x, probe| {
    probe.module(layer, x, PRelu::forward, PRelu::forward)
});
model_of!(Table, Embedding<B>, Tensor<B, 2, Int>, |layer, ids, probe| {
    probe.module(layer, ids, Embedding::forward, Embedding::forward)
});
model_of!(Residual, Branch<B>, Tensor<B, 3>, |layer, x, probe| {
    site!(probe, layer, x, |branch, x| x.clone() + branch.forward(x))
});
model_of!(Generated, Generator<B>, Tensor<B, 3>, |layer, x, probe| {
    let prompt = site!(probe, layer, (), |layer, ()| layer.forward());
    probe.add(x, prompt)
});
model_of!(OneTable, Tied<B>, Tensor<B, 3>, |layer, x, probe| {
    site!(probe, layer, x, |layer, x| layer.forward(x))
});

/// A pre-norm branch: norm, wide layer, narrow layer.
#[derive(Module, Debug)]
struct Branch<B: Backend> {
    norm: LayerNorm<B>,
    wide: Linear<B>,
    narrow: Linear<B>,
}

impl<B: Backend> Branch<B> {
    fn forward(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        self.narrow.forward(crate::ops::gelu(self.wide.forward(self.norm.forward(x))))
    }
}

/// A prompt made by a layer: a module without an input.
#[derive(Module, Debug)]
struct Generator<B: Backend> {
    seed: Param<Tensor<B, 3>>,
    linear: Linear<B>,
}

impl<B: Backend> Generator<B> {
    fn forward(&self) -> Tensor<B, 3> {
        self.linear.forward(self.seed.val()).tanh()
    }
}

/// One parameter in two places.
#[derive(Module, Debug)]
struct Tied<B: Backend> {
    into: Param<Tensor<B, 2>>,
    back: Param<Tensor<B, 2>>,
}

impl<B: Backend> Tied<B> {
    fn forward(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        x.matmul(self.into.val().unsqueeze()).tanh().matmul(self.back.val().transpose().unsqueeze())
    }
}

const TOKENS: usize = 3;

/// Some tokens, the last of some rows being padding.
fn padded<B: Backend>(d: usize) -> Padded<B> {
    let mask = (0..ROWS * TOKENS).map(|i| i % TOKENS == TOKENS - 1 && i / TOKENS != 1).collect();
    let mask: Vec<bool> = mask;
    (values([ROWS, TOKENS, d], 0.5), Tensor::from_data(TensorData::new(mask, [ROWS, TOKENS]), &Default::default()))
}

#[test]
fn recurrent_layers() {
    let (x, device) = (|| values([ROWS, TOKENS, 2], 0.5), Default::default());
    contract(Recurrent::<AB> { layer: LstmConfig::new(2, 3, true).init(&device) }, x());
    let layer = BiLstmConfig::new(2, 2, true).init(&device);
    contract(BothWays::<AB> { layer }, x());
    contract(Gated::<AB> { layer: GruConfig::new(2, 3, true).init(&device) }, x());
}

#[test]
fn attention_with_a_padding_mask() {
    let layer = MultiHeadAttentionConfig::new(4, 2).with_dropout(0.0).init(&Default::default());
    contract(Attention::<AB> { layer }, padded(4));
}

#[test]
fn a_transformer_block() {
    for norm_first in [true, false] {
        let config = TransformerEncoderConfig::new(4, 6, 2, 1).with_dropout(0.0).with_norm_first(norm_first);
        let layer = TransformerEncoderLayer::new(&config, &Default::default());
        contract(Encoder::<AB> { layer }, padded(4));
    }
}

#[test]
fn convolutions() {
    let device = Default::default();
    let layer = Conv1dConfig::new(2, 3, 3).with_padding(PaddingConfig1d::Same).init(&device);
    contract(Conv1dModel::<AB> { layer }, values([ROWS, 2, 4], 0.5));
    let layer = ConvTranspose2dConfig::new([2, 2], [2, 2]).with_stride([2, 2]).init(&device);
    contract(Transposed::<AB> { layer }, values([ROWS, 2, 2, 2], 0.5));
    let layer = Conv2dConfig::new([4, 2], [2, 2]).with_groups(2).init(&device);
    contract(Grouped::<AB> { layer }, values([ROWS, 4, 3, 3], 0.5));
}

#[test]
fn norms_and_activations() {
    let device = Default::default();
    let layer = GroupNormConfig::new(2, 4).init(&device);
    contract(GroupNormModel::<AB> { layer }, values([ROWS, 4, 3], 0.5));
    let layer = RmsNormConfig::new(4).init(&device);
    contract(RmsNormModel::<AB> { layer }, values([ROWS, 2, 4], 0.5));
    let layer = PReluConfig::new().with_num_parameters(2).init(&device);
    contract(PReluModel::<AB> { layer }, values([ROWS, 2, 4], 0.5));
}

#[test]
fn a_table_as_a_module() {
    fn ids<B: Backend>() -> Tensor<B, 2, Int> {
        Tensor::from_data(TensorData::new(vec![0, 2, 2, 1, 3, 0, 1, 2, 3], [ROWS, 3]), &Default::default())
    }
    let layer = EmbeddingConfig::new(4, 2).init(&Default::default());
    contract(Table::<AB> { layer }, ids());
}

#[test]
fn a_residual_branch() {
    let device = Default::default();
    let layer = Branch {
        norm: LayerNormConfig::new(3).init(&device),
        wide: LinearConfig::new(3, 6).init(&device),
        narrow: LinearConfig::new(6, 3).init(&device),
    };
    contract(Residual::<AB> { layer }, values([ROWS, TOKENS, 3], 0.5));
}

#[test]
fn a_module_without_an_input() {
    let device = Default::default();
    let seed = Param::from_tensor(Tensor::<AB, 3>::zeros([1, TOKENS, 2], &device).require_grad());
    let layer = Generator { seed, linear: LinearConfig::new(2, 3).init(&device) };
    contract(Generated::<AB> { layer }, values([ROWS, TOKENS, 3], 0.5));
}

#[test]
fn a_parameter_in_two_places() {
    let into = Param::from_tensor(values::<AB, 2>([2, 3], 0.2).require_grad());
    let layer = Tied { back: into.clone(), into };
    check_site(&OneTable::<AB> { layer }, values([ROWS, TOKENS, 2], 0.5));
}
