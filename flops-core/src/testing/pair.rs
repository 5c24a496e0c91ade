//! Two layers side by side with a quadratic loss, few enough coordinates for all patterns of signs.
//!
//! The outputs of the layers are added, so the loss is quadratic in all noise at once. Estimates
//! then have no smoothing bias: their mean over all patterns is the gradient, up to rounding.

use std::collections::HashSet;
use std::sync::Arc;

use burn::module::{AutodiffModule, Module, ModuleMapper, Param, ParamId};
use burn::nn::{Linear, LinearConfig};
use burn::prelude::*;

use super::{AB, B, true_gradient};
use crate::batch::Batch;
use crate::estimator::trained_parameters;
use crate::model::ForwardModel;
use crate::probe::Probe;

/// y = x₁W₁ + (x₂W₂)·(1, 1) and ℓ_j = a_j‖y − t_j‖²/2 + k_j: three coordinates at two sites.
///
/// The second site lies behind a stage, so that a query on it costs less than a pass.
#[derive(Module, Debug)]
pub struct Pair<B: Backend> {
    pub first: Linear<B>,
    pub second: Linear<B>,
}

impl<B: Backend> ForwardModel<B> for Pair<B> {
    type Input = (Tensor<B, 2>, Tensor<B, 2>);
    /// t, a, and k.
    type Target = (Tensor<B, 2>, Tensor<B, 1>, Tensor<B, 1>);
    type Output = Tensor<B, 2>;

    fn forward(&self, input: Self::Input, probe: &mut Probe<B>) -> Tensor<B, 2> {
        let state = probe.stage(input, |(left, right), probe| (probe.linear(&self.first, left), right));
        probe.stage(state, |(left, right), probe| {
            let right = probe.linear(&self.second, right).repeat_dim(1, 2);
            probe.add(left, right)
        })
    }

    fn losses(&self, y: Tensor<B, 2>, (t, a, k): Self::Target) -> Tensor<B, 1> {
        (y - t).powi_scalar(2).sum_dim(1).squeeze_dim::<1>(1) * a * 0.5 + k
    }
}

/// A model with `inputs` inputs to each layer, with or without biases.
pub fn pair(inputs: usize, bias: bool) -> Pair<AB> {
    let layer = |outputs| LinearConfig::new(inputs, outputs).with_bias(bias).init(&Default::default());
    Pair { first: layer(2), second: layer(1) }.map(&mut Waves(0))
}

/// Sets the elements of the parameters, in turn, to points of a wave; holds how many are set.
struct Waves(usize);

impl<B: Backend> ModuleMapper<B> for Waves {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        param.map(|p| {
            let n = p.shape().num_elements();
            let values: Vec<f32> = (self.0..self.0 + n).map(|i| 0.8 * (1.3 * i as f32 + 0.5).sin()).collect();
            self.0 += n;
            let data = TensorData::new(values, p.shape());
            Tensor::from_data(data, &p.device()).set_require_grad(p.is_require_grad())
        })
    }
}

pub type PairBatch<B> = Batch<<Pair<B> as ForwardModel<B>>::Input, <Pair<B> as ForwardModel<B>>::Target>;

/// The examples with these ids. An example is the same in every batch.
pub fn pair_batch<B: Backend>(ids: &[u64], inputs: usize) -> PairBatch<B> {
    let (n, device) = (ids.len(), Default::default());
    let values = |salt: f64, len: usize| -> Vec<f32> {
        ids.iter()
            .flat_map(|&id| (0..len).map(move |i| (id as f64 * 0.9 + i as f64 * 1.7 + salt).sin() as f32))
            .collect()
    };
    let matrix = |salt, len| Tensor::<B, 2>::from_data(TensorData::new(values(salt, len), [n, len]), &device);
    let vector = |values: Vec<f32>| Tensor::<B, 1>::from_data(TensorData::new(values, [n]), &device);
    let weights = ids.iter().map(|&id| [1.0, 0.4, 2.0, 0.7][id as usize % 4]).collect();
    Batch {
        ids: ids.to_vec(),
        input: (matrix(0.3, inputs), matrix(2.1, inputs)),
        target: (matrix(1.1, 2) * 2.0, vector(weights), vector(vec![0.0; n])),
    }
}

/// A model, a batch and the gradient of its mean loss.
pub struct Case {
    pub model: Pair<B>,
    pub trained: Arc<HashSet<ParamId>>,
    pub batch: PairBatch<B>,
    pub gradient: Vec<f64>,
}

/// The examples `ids` of a model from [`pair`].
pub fn case(model: &Pair<AB>, ids: &[u64]) -> Case {
    let inputs = model.first.weight.dims()[0];
    Case {
        model: model.valid(),
        trained: trained_parameters(model),
        batch: pair_batch(ids, inputs),
        gradient: true_gradient(model, pair_batch(ids, inputs)),
    }
}

/// Checks that two lists agree up to rounding.
pub fn assert_close(got: &[f64], expected: &[f64], what: &str) {
    let scale = expected.iter().map(|e| e.abs()).fold(0.0, f64::max);
    assert_eq!(got.len(), expected.len(), "{what}");
    for (i, (g, e)) in got.iter().zip(expected).enumerate() {
        assert!((g - e).abs() <= 2e-5 * scale, "{what}: value {i} is {g}, not {e}");
    }
}
