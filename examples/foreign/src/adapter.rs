//! A linear layer in front of a black box.

use std::sync::Arc;

use burn::module::Param;
use burn::nn::Linear;
use burn::prelude::*;
use flops_core::{ForwardModel, Probe, zero_one};

use crate::classifier::Classifier;
use crate::table::Table;

/// Least probability that a loss sees: a forest gives 0 to what none of its trees has seen.
const LEAST: f64 = 1e-3;

/// Corrects rows, and lets the classifier answer.
///
/// The layer works in units of the features' standard deviations. The noise of queries falls on its
/// output, so that they call nothing but the classifier.
#[derive(Module, Debug)]
pub struct Adapter<B: Backend> {
    layer: Linear<B>,
    /// Mean and standard deviation of the features; constants.
    mean: Param<Tensor<B, 2>>,
    scale: Param<Tensor<B, 2>>,
    #[module(skip)]
    classifier: Arc<Classifier>,
    /// Whether the classifier tells its answer alone, right or wrong.
    answers_only: bool,
}

impl<B: Backend> Adapter<B> {
    /// Creates an adapter that changes nothing.
    pub fn new(classifier: Arc<Classifier>, train: &Table, answers_only: bool, device: &B::Device) -> Self {
        let features = train.features;
        let (mean, scale) = train.moments();
        let constant = |values: Vec<f32>| {
            let row = Tensor::from_data(TensorData::new(values, [1, features]), device);
            Param::from_tensor(row).set_require_grad(false)
        };
        let layer = Linear {
            weight: Param::from_tensor(Tensor::eye(features, device)),
            bias: Some(Param::from_tensor(Tensor::zeros([features], device))),
        };
        Self { layer, mean: constant(mean), scale: constant(scale), classifier, answers_only }
    }
}

impl<B: Backend> Adapter<B> {
    /// The adapter as lines of CSV: a row of numbers x becomes x·A + b. The rows of A come first, b last.
    pub fn csv(&self) -> String {
        let (mean, scale, [features, _]) = (self.mean.val(), self.scale.val(), self.layer.weight.dims());
        let matrix = self.layer.weight.val() / scale.clone().transpose() * scale.clone();
        let bias = self.layer.bias.as_ref().map(|bias| bias.val().unsqueeze::<2>() * scale);
        let moved = mean.clone() - mean.matmul(matrix.clone());
        let offset = bias.map_or_else(|| moved.clone(), |bias| bias + moved.clone());
        let values: Vec<f32> = Tensor::cat(vec![matrix, offset], 0).into_data().iter().collect();
        let line = |row: &[f32]| row.iter().map(f32::to_string).collect::<Vec<_>>().join(",") + "\n";
        values.chunks(features).map(line).collect()
    }
}

impl<B: Backend> ForwardModel<B> for Adapter<B> {
    /// Features `[rows, features]`.
    type Input = Tensor<B, 2>;
    /// Labels `[rows]`.
    type Target = Tensor<B, 1, Int>;
    /// The classifier's probabilities `[rows, classes]`.
    type Output = Tensor<B, 2>;

    fn forward(&self, x: Tensor<B, 2>, probe: &mut Probe<B>) -> Tensor<B, 2> {
        let (mean, scale) = (self.mean.val(), self.scale.val());
        let adapted = probe.linear(&self.layer, (x - mean.clone()) / scale.clone());
        self.classifier.ask(adapted * scale + mean)
    }

    fn losses(&self, probabilities: Tensor<B, 2>, labels: Tensor<B, 1, Int>) -> Tensor<B, 1> {
        if self.answers_only {
            return zero_one(probabilities, labels);
        }
        let rows = labels.dims()[0];
        probabilities.gather(1, labels.reshape([rows, 1])).reshape([rows]).clamp_min(LEAST).log().neg()
    }

    /// Logarithms of probabilities are logits.
    fn classification(
        &self,
        probabilities: &Tensor<B, 2>,
        labels: &Tensor<B, 1, Int>,
    ) -> Option<(Tensor<B, 2>, Tensor<B, 1, Int>)> {
        (!self.answers_only).then(|| (probabilities.clone().clamp_min(LEAST).log(), labels.clone()))
    }

    fn failure(&self) -> Option<String> {
        self.classifier.failure()
    }
}
