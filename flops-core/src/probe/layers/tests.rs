//! The contract of a layer, over the built-in ones and one of a user's own. Everything is exact up
//! to rounding.

use std::collections::HashSet;
use std::sync::Arc;

use burn::module::{AutodiffModule, Module, ModuleMapper, Param, ParamId, RunningState};
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::{
    BatchNorm, BatchNormConfig, Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig, Linear, LinearConfig,
    PaddingConfig2d,
};
use burn::prelude::*;

use crate::estimator::trained_parameters;
use crate::lift::Lift;
use crate::model::ForwardModel;
use crate::probe::{Gradients, Probe, Site, SquaredScoreNorm, check_site};
use crate::testing::{AB, B};

/// A model of one layer, whose output is flattened to `[rows, coordinates]`.
macro_rules! model_of {
    ($name:ident, $layer:ty, $input:ty, |$this:ident, $x:ident, $probe:ident| $call:expr) => {
        #[derive(Module, Debug)]
        struct $name<B: Backend> {
            layer: $layer,
        }

        impl<B: Backend> ForwardModel<B> for $name<B> {
            type Input = $input;
            type Target = ();
            type Output = Tensor<B, 2>;

            fn forward(&self, $x: Self::Input, $probe: &mut Probe<B>) -> Tensor<B, 2> {
                let $this = &self.layer;
                let y = $call;
                let rows = y.dims()[0];
                let coordinates = y.shape().num_elements() / rows;
                y.reshape([rows, coordinates])
            }

            fn losses(&self, y: Tensor<B, 2>, (): ()) -> Tensor<B, 1> {
                y.sum_dim(1).squeeze_dim(1)
            }
        }
    };
}

mod modules;

model_of!(LinearModel, Linear<B>, Tensor<B, 3>, |layer, x, probe| probe.linear(layer, x));
model_of!(LayerNormModel, LayerNorm<B>, Tensor<B, 3>, |layer, x, probe| probe.layer_norm(layer, x));
model_of!(BatchNorm1dModel, BatchNorm<B>, Tensor<B, 3>, |layer, x, probe| probe.batch_norm(layer, x));
model_of!(BatchNormModel, BatchNorm<B>, Tensor<B, 2>, |layer, x, probe| probe.batch_norm(layer, x));
model_of!(Conv2dModel, Conv2d<B>, Tensor<B, 4>, |layer, x, probe| probe.conv2d(layer, x));
model_of!(EmbeddingModel, Embedding<B>, Tensor<B, 2, Int>, |layer, ids, probe| probe.embedding(layer, ids));
model_of!(TiedModel, Param<Tensor<B, 2>>, Tensor<B, 3>, |layer, x, probe| probe.tied_linear(layer, x));
model_of!(ParamModel, Param<Tensor<B, 2>>, Tensor<B, 2>, |layer, x, probe| {
    let p = probe.param(layer);
    probe.add(x, p)
});
model_of!(TokensModel, Param<Tensor<B, 3>>, Tensor<B, 3>, |layer, x, probe| {
    let p = probe.param(layer);
    probe.add(x, p)
});
model_of!(PromptedModel, Prompted<B>, Tensor<B, 3>, |layer, x, probe| layer.forward(x, probe));
model_of!(ScaleModel, Scale<B>, Tensor<B, 2>, |layer, x, probe| layer.forward(x, probe));

/// Layers whose input is a bare parameter: their output has one row for all.
#[derive(Module, Debug)]
struct Prompted<B: Backend> {
    prompt: Param<Tensor<B, 3>>,
    linear: Option<Linear<B>>,
    norm: Option<LayerNorm<B>>,
}

impl<B: Backend> Prompted<B> {
    fn forward(&self, x: Tensor<B, 3>, probe: &mut Probe<B>) -> Tensor<B, 3> {
        let mut h = probe.param(&self.prompt);
        if let Some(linear) = &self.linear {
            h = probe.linear(linear, h);
        }
        if let Some(norm) = &self.norm {
            h = probe.layer_norm(norm, h);
        }
        probe.add(x, h)
    }
}

/// A layer of a user's own, y = γ ⊙ x, that says no more than it must.
#[derive(Module, Debug)]
struct Scale<B: Backend> {
    gamma: Param<Tensor<B, 1>>,
}

impl<B: Backend> Scale<B> {
    fn forward(&self, x: Tensor<B, 2>, probe: &mut Probe<B>) -> Tensor<B, 2> {
        let y = x.clone() * self.gamma.val().unsqueeze();
        probe.site(&[self.gamma.id], y, |_| ScaleSite { x, gamma: self.gamma.id })
    }
}

struct ScaleSite<B: Backend> {
    x: Tensor<B, 2>,
    gamma: ParamId,
}

impl<B: Backend> Site<B> for ScaleSite<B> {
    fn backward(&self, g: Tensor<B, 2>, gradients: &mut Gradients<B>) {
        let [_, d] = g.dims();
        gradients.add(self.gamma, (self.x.clone() * g).sum_dim(0).reshape([d]));
    }

    fn squared_score_norm(&self) -> SquaredScoreNorm<B> {
        SquaredScoreNorm::of_inputs(self.x.clone(), 1.0)
    }
}

/// Values of a shape, without a pattern.
fn values<B: Backend, const D: usize>(shape: [usize; D], salt: f32) -> Tensor<B, D> {
    let n = shape.iter().product::<usize>();
    let values: Vec<f32> = (0..n).map(|i| (1.3 * (i * i % 97) as f32 + salt).sin()).collect();
    Tensor::from_data(TensorData::new(values, shape), &Default::default())
}

/// Every parameter set to values without a pattern.
struct Fill(f32);

impl<B: Backend> ModuleMapper<B> for Fill {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        self.0 += 1.0;
        let salt = self.0;
        param.map(|p| values::<B, D>(p.dims(), salt).set_require_grad(p.is_require_grad()))
    }
}

/// [`check_site`] on a model whose parameters have no pattern.
fn contract<M>(model: M, input: <M::InnerModule as ForwardModel<B>>::Input)
where
    M: ForwardModel<AB, Output = Tensor<AB, 2>> + AutodiffModule<AB>,
    M::InnerModule: ForwardModel<B, Output = Tensor<B, 2>>,
    <M::InnerModule as ForwardModel<B>>::Input: Lift<AB, Lifted = M::Input>,
{
    check_site::<AB, M>(&model.map(&mut Fill(0.0)), input);
}

const ROWS: usize = 3;

#[test]
fn linear() {
    let layer = LinearConfig::new(4, 3).init(&Default::default());
    contract(LinearModel::<AB> { layer }, values([ROWS, 2, 4], 0.5));
}

#[test]
fn tied_linear() {
    let layer = Param::from_tensor(Tensor::<AB, 2>::zeros([3, 4], &Default::default()).require_grad());
    contract(TiedModel { layer }, values([ROWS, 2, 4], 0.5));
}

#[test]
fn layer_norm() {
    let layer = LayerNormConfig::new(5).init(&Default::default());
    contract(LayerNormModel::<AB> { layer }, values([ROWS, 2, 5], 0.5));
}

/// A batch normalisation whose parameters and running statistics have no pattern.
fn batch_norm_layer(channels: usize) -> BatchNorm<AB> {
    let mut layer =
        BatchNormConfig::new(channels).with_epsilon(1e-3).init::<AB>(&Default::default()).map(&mut Fill(0.0));
    layer.running_mean = RunningState::new(values([channels], 0.3));
    layer.running_var = RunningState::new(values([channels], 0.7).powi_scalar(2) + 0.2);
    layer
}

#[test]
fn batch_norm() {
    let layer = batch_norm_layer(4);
    check_site(&BatchNormModel::<AB> { layer }, values([ROWS, 4], 0.5));
    let layer = batch_norm_layer(2);
    check_site(&BatchNorm1dModel::<AB> { layer }, values([ROWS, 2, 5], 0.5));
}

/// It is Burn's inference on every backend, and changes no running statistics.
#[test]
fn batch_norm_uses_its_running_statistics() {
    let (layer, x) = (batch_norm_layer(2), || values::<B, 4>([ROWS, 2, 3, 4], 0.5));
    let expected = layer.valid().forward(x()).into_data();
    let probed = |probe: &mut Probe<B>| probe.batch_norm(&layer.valid(), x()).into_data();
    assert_eq!(probed(&mut Probe::clean()), expected);
    let trained = trained_parameters(&layer);
    assert_eq!(trained, Arc::new(HashSet::from([layer.gamma.id, layer.beta.id])));
    let with_graph = |probe: &mut Probe<AB>| probe.batch_norm(&layer, values([ROWS, 2, 3, 4], 0.5)).into_data();
    assert_eq!(with_graph(&mut Probe::clean()), expected);
    assert_eq!(with_graph(&mut Probe::trace(trained, None, false)), expected);
    let statistics = [layer.running_mean.value_sync(), layer.running_var.value_sync()].map(|s| s.into_data());
    let before = [values::<B, 1>([2], 0.3), values::<B, 1>([2], 0.7).powi_scalar(2) + 0.2].map(|s| s.into_data());
    assert_eq!(statistics, before);
}

#[test]
fn conv2d() {
    for padding in [PaddingConfig2d::Valid, PaddingConfig2d::Same, PaddingConfig2d::Explicit(1, 0, 1, 1)] {
        for (stride, dilation) in [([1, 1], [1, 1]), ([2, 1], [1, 1]), ([1, 1], [1, 2])] {
            if padding == PaddingConfig2d::Same && stride != [1, 1] {
                continue; // Burn refuses it
            }
            let config = Conv2dConfig::new([2, 3], [3, 2]).with_stride(stride).with_dilation(dilation);
            let layer = config.with_padding(padding.clone()).init(&Default::default());
            contract(Conv2dModel::<AB> { layer }, values([ROWS, 2, 5, 4], 0.5));
        }
    }
}

#[test]
fn embedding() {
    fn ids<B: Backend>() -> Tensor<B, 2, Int> {
        // an id twice in a row, and one in two rows
        Tensor::from_data(TensorData::new(vec![0, 2, 2, 1, 3, 0, 1, 2, 3], [ROWS, 3]), &Default::default())
    }
    let layer = EmbeddingConfig::new(4, 2).init(&Default::default());
    contract(EmbeddingModel::<AB> { layer }, ids());
}

#[test]
fn param() {
    let layer = Param::from_tensor(Tensor::<AB, 2>::zeros([1, 4], &Default::default()).require_grad());
    contract(ParamModel { layer }, values([ROWS, 4], 0.5));
}

#[test]
fn a_param_with_tokens() {
    let layer = Param::from_tensor(Tensor::<AB, 3>::zeros([1, 2, 3], &Default::default()).require_grad());
    contract(TokensModel { layer }, values([ROWS, 2, 3], 0.5));
}

#[test]
fn a_layer_with_one_row_for_all() {
    let device = Default::default();
    let prompt = || Param::from_tensor(Tensor::<AB, 3>::zeros([1, 2, 3], &device)).no_grad();
    let linear = Some(LinearConfig::new(3, 3).init(&device));
    let norm = Some(LayerNormConfig::new(3).init(&device));
    for layer in [Prompted { prompt: prompt(), linear, norm: None }, Prompted { prompt: prompt(), linear: None, norm }]
    {
        contract(PromptedModel::<AB> { layer }, values([ROWS, 2, 3], 0.5));
    }
}

/// A layer whose derivative is off by a factor.
#[derive(Module, Debug)]
struct Wrong<B: Backend> {
    scale: Scale<B>,
}

impl<B: Backend> Wrong<B> {
    fn forward(&self, x: Tensor<B, 2>, probe: &mut Probe<B>) -> Tensor<B, 2> {
        let y = x.clone() * self.scale.gamma.val().unsqueeze();
        probe.site(&[self.scale.gamma.id], y, |_| ScaleSite { x: x * 2.0, gamma: self.scale.gamma.id })
    }
}

model_of!(WrongModel, Wrong<B>, Tensor<B, 2>, |layer, x, probe| layer.forward(x, probe));

#[test]
#[should_panic(expected = "gradient")]
fn a_wrong_derivative_is_found() {
    let gamma = Param::from_tensor(Tensor::<AB, 1>::zeros([4], &Default::default()).require_grad());
    let layer = Wrong { scale: Scale { gamma } };
    contract(WrongModel { layer }, values([ROWS, 4], 0.5));
}

#[test]
fn a_layer_of_a_user() {
    let gamma = Param::from_tensor(Tensor::<AB, 1>::zeros([4], &Default::default()).require_grad());
    contract(ScaleModel { layer: Scale { gamma } }, values([ROWS, 4], 0.5));
}

/// A layer on tokens whose squared score norm is one number a row: it cannot follow a mask.
#[derive(Module, Debug)]
struct Unsplit<B: Backend> {
    gamma: Param<Tensor<B, 1>>,
    /// Whether it says that its second axis is no tokens.
    opts_out: bool,
}

impl<B: Backend> Unsplit<B> {
    fn forward(&self, x: Tensor<B, 3>, probe: &mut Probe<B>) -> Tensor<B, 3> {
        let y = x.clone() * self.gamma.val().unsqueeze();
        let site = |_: &HashSet<ParamId>| UnsplitSite { x, gamma: self.gamma.id };
        if self.opts_out {
            return probe.unmasked(|probe| probe.site(&[self.gamma.id], y, site));
        }
        probe.site(&[self.gamma.id], y, site)
    }
}

struct UnsplitSite<B: Backend> {
    x: Tensor<B, 3>,
    gamma: ParamId,
}

impl<B: Backend> Site<B> for UnsplitSite<B> {
    fn backward(&self, g: Tensor<B, 2>, gradients: &mut Gradients<B>) {
        let d = self.x.dims()[2];
        gradients.add(self.gamma, (self.x.clone() * g.reshape(self.x.dims())).sum_dim(1).sum_dim(0).reshape([d]));
    }

    fn squared_score_norm(&self) -> SquaredScoreNorm<B> {
        let [rows, tokens, d] = self.x.dims();
        SquaredScoreNorm::of_inputs(self.x.clone().reshape([rows, tokens * d]), 1.0)
    }
}

model_of!(UnsplitModel, Unsplit<B>, Tensor<B, 3>, |layer, x, probe| layer.forward(x, probe));

fn unsplit(opts_out: bool) {
    let gamma = Param::from_tensor(Tensor::<AB, 1>::zeros([4], &Default::default()).require_grad());
    contract(UnsplitModel { layer: Unsplit { gamma, opts_out } }, values([ROWS, 2, 4], 0.5));
}

#[test]
#[should_panic(expected = "NormByToken")]
fn a_norm_that_no_mask_can_split_is_found() {
    unsplit(false);
}

#[test]
fn a_layer_may_leave_the_mask() {
    unsplit(true);
}
