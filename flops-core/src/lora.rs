//! Low-rank adapters on linear layers (LoRA; Hu et al. 2021, arXiv 2106.09685).
//!
//! y = Wx + b + B(Ax), where A maps the inputs to the rank and B maps to the outputs. W and b stay
//! frozen; A and B are trained. The paper's factor α/r is 1 here: α is the rank.
//!
//! A is drawn from N(0, 1/inputs) and B is zero, so a new adapter leaves the output unchanged.
//!
//! # The first step
//! While B is zero, A has no effect on the loss. Its gradient is zero, in backpropagation as in the
//! mean of forward-only estimates. Noise on A's output alone leaves the loss unchanged, up to
//! rounding. So the first step moves B and what else is trained, and A follows from the second step
//! on. Queries that the first step spends on A are wasted.

use burn::module::Param;
use burn::nn::{Initializer, Linear};
use burn::prelude::*;
use burn::tensor::Distribution;
use rand::rngs::StdRng;

use crate::probe::Probe;

/// An adapter: two linear layers without biases, each a site of its own.
///
/// [`Probe::linear_with_lora`] calls a layer with its adapter. The caller freezes the layer.
///
/// # Example
/// ```
/// use burn::backend::Flex;
/// use burn::{nn, prelude::*};
/// use flops_core::random::keyed_rng;
/// use flops_core::{Probe, lora::Lora};
///
/// /// A model whose frozen layer has an adapter.
/// #[derive(Module, Debug)]
/// struct Net<B: Backend> {
///     hidden: nn::Linear<B>,
///     hidden_lora: Option<Lora<B>>,
/// }
///
/// let device = Default::default();
/// let hidden: nn::Linear<Flex> = nn::LinearConfig::new(8, 6).init(&device);
/// let x = Tensor::<Flex, 2>::ones([3, 8], &device);
/// let before = hidden.forward(x.clone());
/// let lora = Lora::new([8, 6], 2, &mut keyed_rng([7, 0, 0, 0]), &device);
/// let net = Net { hidden: hidden.no_grad(), hidden_lora: Some(lora) };
/// let y = Probe::clean().linear_with_lora(&net.hidden, net.hidden_lora.as_ref(), x);
/// assert_eq!(y.into_data(), before.into_data()); // a new adapter changes nothing
/// ```
#[derive(Module, Debug)]
pub struct Lora<B: Backend> {
    /// A, `[inputs, rank]`.
    pub down: Linear<B>,
    /// B, `[rank, outputs]`; zero at the start.
    pub up: Linear<B>,
}

impl<B: Backend> Lora<B> {
    /// A new adapter: A from N(0, 1/inputs), B zero.
    ///
    /// # Shapes
    /// - `rank`: from 1 to the smaller of `inputs` and `outputs`
    ///
    /// # Panics
    /// If the rank is 0 or larger than that.
    pub fn new([inputs, outputs]: [usize; 2], rank: usize, rng: &mut StdRng, device: &B::Device) -> Self {
        check_rank([inputs, outputs], rank);
        let law = Distribution::Normal(0.0, (inputs as f64).sqrt().recip());
        let down = Tensor::from_data(TensorData::random::<f32, _, _>([inputs, rank], law, rng), device);
        let layer = |weight| Linear { weight: Param::from_tensor(weight), bias: None };
        Self { down: layer(down), up: layer(Tensor::zeros([rank, outputs], device)) }
    }

    /// An adapter with lazy parameters of zeros, to be filled from a file.
    ///
    /// # Panics
    /// If the rank is 0 or larger than `inputs` or `outputs`.
    pub fn lazy([inputs, outputs]: [usize; 2], rank: usize, device: &B::Device) -> Self {
        check_rank([inputs, outputs], rank);
        let layer = |shape: [usize; 2]| Linear { weight: Initializer::Zeros.init(shape, device), bias: None };
        Self { down: layer([inputs, rank]), up: layer([rank, outputs]) }
    }

    /// The rank: the width between the two layers.
    pub fn rank(&self) -> usize {
        // the shape is known before a lazy parameter is made
        self.down.weight.lazy_shape()[1]
    }

    /// Adds B·A to the weight of `layer`, which stays trained or frozen as it was.
    #[must_use]
    fn merged_into(self, mut layer: Linear<B>) -> Linear<B> {
        let change = self.down.weight.val().matmul(self.up.weight.val()).detach();
        layer.weight = layer.weight.map(|weight| {
            let trained = weight.is_require_grad();
            // a sum is no leaf of a graph, and only leaves are trained
            (weight.detach() + change).detach().set_require_grad(trained)
        });
        layer
    }
}

/// Adds the adapter to the weight of its layer, where it has one, and removes it.
pub fn merge<B: Backend>(layer: &mut Linear<B>, lora: &mut Option<Lora<B>>) {
    if let Some(lora) = lora.take() {
        *layer = lora.merged_into(layer.clone());
    }
}

/// The rank that all `adapters` have; `None` without any, where one is missing, or where ranks differ.
pub fn common_rank<'a, B: Backend>(adapters: impl IntoIterator<Item = Option<&'a Lora<B>>>) -> Option<usize> {
    let mut ranks = adapters.into_iter().map(|lora| lora.map(Lora::rank));
    let first = ranks.next()??;
    ranks.all(|rank| rank == Some(first)).then_some(first)
}

fn check_rank([inputs, outputs]: [usize; 2], rank: usize) {
    let most = inputs.min(outputs);
    assert!((1..=most).contains(&rank), "rank {rank} of an adapter from {inputs} to {outputs}: use 1 to {most}");
}

impl<B: Backend> Probe<B> {
    /// The output of `layer`, plus that of its [adapter](Lora) where it has one.
    ///
    /// # Shapes
    /// - x: `[rows, …, inputs]`
    /// - returns: `[rows, …, outputs]`
    pub fn linear_with_lora<const D: usize>(
        &mut self,
        layer: &Linear<B>,
        lora: Option<&Lora<B>>,
        x: Tensor<B, D>,
    ) -> Tensor<B, D> {
        let Some(lora) = lora else { return self.linear(layer, x) };
        let y = self.linear(layer, x.clone());
        let x = self.linear(&lora.down, x);
        let change = self.linear(&lora.up, x);
        self.add(y, change)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::keyed_rng;
    use crate::testing::{AB, B};
    use burn::nn::LinearConfig;

    fn lora(rank: usize) -> Lora<B> {
        Lora::new([6, 4], rank, &mut keyed_rng([1, 0, 0, 0]), &Default::default())
    }

    /// The layer is not square, and the adapter is no longer new.
    #[test]
    fn merging_gives_the_output_with_the_adapter() {
        let device = Default::default();
        let layer: Linear<AB> = LinearConfig::new(6, 4).init(&device);
        let new = Lora::<AB>::new([6, 4], 2, &mut keyed_rng([1, 0, 0, 0]), &device);
        let values: Vec<f32> = (0..8).map(|i| (i as f32).sin()).collect();
        let up = Tensor::from_data(TensorData::new(values, [2, 4]), &device);
        let lora = Lora { up: Linear { weight: Param::from_tensor(up), bias: None }, ..new };
        let x = Tensor::<AB, 1, Int>::arange(0..30, &device).float().reshape([1, 5, 6]);
        let adapted = Probe::clean().linear_with_lora(&layer, Some(&lora), x.clone());
        let plain = Probe::clean().linear_with_lora(&layer, None, x.clone());
        for layer in [layer.clone(), layer.no_grad()] {
            let trained = layer.weight.is_require_grad();
            let (mut merged, mut adapter) = (layer, Some(lora.clone()));
            merge(&mut merged, &mut adapter);
            assert!(adapter.is_none());
            assert_eq!(merged.weight.is_require_grad(), trained);
            let apart = |y: Tensor<AB, 3>| (y - adapted.clone()).abs().max().into_scalar();
            assert!(apart(merged.forward(x.clone())) < 1e-4);
            assert!(apart(plain.clone()) > 0.5);
        }
    }

    #[test]
    fn ranks_are_common_where_all_are_there_and_alike() {
        let (two, three) = (lora(2), lora(3));
        assert_eq!(common_rank([Some(&two), Some(&two)]), Some(2));
        for differ in [vec![], vec![None], vec![Some(&two), None], vec![Some(&two), Some(&three)]] {
            assert_eq!(common_rank(differ), None);
        }
    }

    #[test]
    fn adapters_have_their_rank_and_their_scale() {
        assert_eq!((lora(2).rank(), Lora::<B>::lazy([6, 4], 3, &Default::default()).rank()), (2, 3));
        // 40,000 values: a variance off by 5·√(2/40,000) has probability 6·10⁻⁷
        let wide = Lora::<B>::new([200, 200], 200, &mut keyed_rng([2, 0, 0, 0]), &Default::default());
        let square = wide.down.weight.val().powi_scalar(2).mean().into_scalar();
        assert!((square * 200.0 - 1.0).abs() < 0.036, "{square}");
        assert_eq!(wide.up.weight.val().abs().max().into_scalar(), 0.0);
    }

    #[test]
    #[should_panic(expected = "rank 5 of an adapter from 6 to 4: use 1 to 4")]
    fn a_rank_that_does_not_fit_is_named() {
        lora(5);
    }
}
