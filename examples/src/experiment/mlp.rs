//! A small network on synthetic data, for which every quantity of the method is known or cheap.

use burn::module::{AutodiffModule, Param};
use burn::nn::{Initializer, Linear, LinearConfig};
use burn::prelude::*;
use burn::tensor::Distribution;
use burn::tensor::activation::{log_softmax, relu};
use flops_core::{Batch, ForwardModel, Probe};
use rand::SeedableRng;
use rand::rngs::StdRng;

use crate::backend::{AB, B, Device};

/// The loss of the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Loss {
    /// Cross-entropy, which is smooth.
    #[default]
    CrossEntropy,
    /// 1 for a wrong class, 0 for the right one: a function without a useful gradient.
    ZeroOne,
    /// The squared error of a regression whose targets have heavy-tailed noise, close to Cauchy's
    /// law.
    HeavyTailed,
}

impl Loss {
    /// All losses.
    pub const ALL: [Self; 3] = [Self::CrossEntropy, Self::ZeroOne, Self::HeavyTailed];

    /// Returns the name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::CrossEntropy => "smooth",
            Self::ZeroOne => "non-smooth",
            Self::HeavyTailed => "heavy-tailed",
        }
    }
}

/// The numbers of inputs, hidden units and outputs of the network.
pub const SIZES: [usize; 3] = [16, 32, 4];

/// Two linear layers with a ReLU between them. Both are sites.
#[derive(Module, Debug)]
pub struct Mlp<B: Backend> {
    /// The first layer.
    pub hidden: Linear<B>,
    /// The second layer.
    pub output: Linear<B>,
    #[module(skip)]
    loss: Loss,
}

impl Mlp<AB> {
    /// Creates a network with random weights.
    pub fn new(loss: Loss, seed: u64, device: &Device) -> Self {
        let layer = |sizes, seed| he_linear(sizes, seed, device);
        let [inputs, hidden, outputs] = SIZES;
        Self { hidden: layer([inputs, hidden], 2 * seed), output: layer([hidden, outputs], 2 * seed + 1), loss }
    }
}

/// Creates a linear layer with N(0, 2/fan-in) weights drawn from `seed` and zero biases (He et al.
/// 2015, arXiv 1502.01852).
pub fn he_linear([inputs, outputs]: [usize; 2], seed: u64, device: &Device) -> Linear<AB> {
    let mut layer = LinearConfig::new(inputs, outputs).with_initializer(Initializer::Zeros).init::<AB>(device);
    layer.weight = he_weights(layer.weight, inputs, seed);
    layer
}

/// Returns the parameter with N(0, 2/fan-in) values drawn from `seed`.
pub fn he_weights<const D: usize>(parameter: Param<Tensor<AB, D>>, fan_in: usize, seed: u64) -> Param<Tensor<AB, D>> {
    let law = Distribution::Normal(0.0, (2.0 / fan_in as f64).sqrt());
    parameter.map(|old| {
        let values = TensorData::random::<f32, _, _>(old.shape(), law, &mut StdRng::seed_from_u64(seed));
        Tensor::from_data(values, &old.device()).set_require_grad(old.is_require_grad())
    })
}

impl<B: Backend> ForwardModel<B> for Mlp<B> {
    type Input = Tensor<B, 2>;
    /// One column per output: one-hot classes, or values.
    type Target = Tensor<B, 2>;
    type Output = Tensor<B, 2>;

    fn forward(&self, x: Tensor<B, 2>, probe: &mut Probe<B>) -> Tensor<B, 2> {
        probe.embed(&x);
        let h = relu(probe.linear(&self.hidden, x));
        probe.linear(&self.output, h)
    }

    fn losses(&self, y: Tensor<B, 2>, target: Tensor<B, 2>) -> Tensor<B, 1> {
        match self.loss {
            Loss::CrossEntropy => (log_softmax(y, 1) * target).sum_dim(1).neg().squeeze_dim(1),
            Loss::ZeroOne => y.argmax(1).not_equal(target.argmax(1)).float().squeeze_dim(1),
            Loss::HeavyTailed => (y - target).powi_scalar(2).sum_dim(1).squeeze_dim(1),
        }
    }
}

/// A batch for the network.
pub type MlpBatch<B> = Batch<Tensor<B, 2>, Tensor<B, 2>>;

/// Draws `n` examples of uneven difficulty: inputs of very different lengths, a random teacher, and
/// noise in the targets.
pub fn synthetic(n: usize, loss: Loss, seed: u64, device: &Device) -> MlpBatch<B> {
    let [inputs, _, outputs] = SIZES;
    let mut rng = StdRng::seed_from_u64(seed);
    let mut draw = |law: Distribution, shape: [usize; 2]| {
        Tensor::<B, 2>::from_data(TensorData::random::<f32, _, _>(shape, law, &mut rng), device)
    };
    let normal = Distribution::Normal(0.0, 1.0);
    let length = draw(normal, [n, 1]).mul_scalar(0.7).exp();
    let x = draw(normal, [n, inputs]) * length;
    let teacher = draw(normal, [inputs, outputs]).mul_scalar(1.0 / (inputs as f64).sqrt());
    let clean = x.clone().matmul(teacher);
    let target = match loss {
        Loss::HeavyTailed => {
            // A ratio of normals has Cauchy's law, whose square has no mean. The denominator is
            // bounded away from 0, so that the mean exists.
            let (top, bottom) = (draw(normal, [n, outputs]), draw(normal, [n, outputs]));
            clean + (top / bottom.abs().clamp_min(1e-2)).mul_scalar(0.2)
        }
        _ => {
            let noisy = clean + draw(normal, [n, outputs]).mul_scalar(0.3);
            noisy.argmax(1).reshape([n]).one_hot::<2>(outputs).float()
        }
    };
    Batch { ids: (0..n as u64).collect(), input: x, target }
}

/// Returns the rows of a batch at `index`.
pub fn rows(batch: &MlpBatch<B>, index: &[usize]) -> MlpBatch<B> {
    use flops_core::Rows;
    Batch {
        ids: index.iter().map(|&i| batch.ids[i]).collect(),
        input: batch.input.rows(index),
        target: batch.target.rows(index),
    }
}

/// The exact quantities of an example, known without any query.
#[derive(Clone, Debug)]
pub struct ExactDatum {
    /// ‖∂ℓ_j/∂y_s‖², the squared gradient at the output of each layer.
    pub squared_output_grads: [f64; 2],
    /// ‖x_s‖² + 1, the squared input of each layer with its bias.
    pub squared_inputs: [f64; 2],
    /// The gradient of ℓ_j with respect to all parameters.
    pub gradient: Vec<f64>,
}

impl ExactDatum {
    /// Returns Tr Σ_j of a one-sided query of signs in the limit of small σ. The query falls on
    /// either layer with probability ½.
    ///
    /// The estimate of a query on layer s is 2x_s(gᵀε)εᵀ. For signs, E‖(gᵀε)ε‖² = d_s‖g_s‖².
    pub fn trace(&self) -> f64 {
        let (d, e, g) = ([SIZES[1] as f64, SIZES[2] as f64], self.squared_inputs, self.squared_output_grads);
        (0..2).map(|s| 2.0 * e[s] * d[s] * g[s] - e[s] * g[s]).sum()
    }
}

/// Returns the exact quantities of every example of a batch, by autodiff.
pub fn exact_data(model: &Mlp<AB>, batch: &MlpBatch<B>) -> Vec<ExactDatum> {
    let n = batch.ids.len();
    let of = |t: Tensor<B, 2>| -> Vec<f64> { t.into_data().iter::<f64>().collect() };
    let plain = model.valid();
    let h = relu(plain.hidden.forward(batch.input.clone()));
    let squares = |t: Tensor<B, 2>| of(t.powi_scalar(2).sum_dim(1));
    let (x2, h2) = (squares(batch.input.clone()), squares(h));
    (0..n)
        .map(|j| {
            let one = rows(batch, &[j]);
            let output = model.forward(Tensor::from_inner(one.input), &mut Probe::clean());
            let grads = model.losses(output, Tensor::from_inner(one.target)).sum().backward();
            let mut gradient = vec![];
            let mut squared_output_grads = [0.0; 2];
            for (s, layer) in [&model.hidden, &model.output].into_iter().enumerate() {
                let bias = layer.bias.as_ref().and_then(|b| b.val().grad(&grads));
                let bias: Vec<f64> = bias.map_or(vec![], |b| b.into_data().iter::<f64>().collect());
                squared_output_grads[s] = bias.iter().map(|g| g * g).sum();
                gradient.extend(layer.weight.val().grad(&grads).map_or(vec![], of));
                gradient.extend(bias);
            }
            ExactDatum { squared_output_grads, squared_inputs: [x2[j] + 1.0, h2[j] + 1.0], gradient }
        })
        .collect()
}
