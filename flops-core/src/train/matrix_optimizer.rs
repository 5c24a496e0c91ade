//! One optimizer for matrices, another one for all other parameters.

use burn::module::AutodiffModule;
use burn::optim::SimpleOptimizer;
use burn::optim::adaptor::OptimizerAdaptor;
use burn::prelude::*;
use burn::tensor::backend::AutodiffBackend;

use crate::parameters::matrix_sides;

/// An optimizer that updates matrices by `matrices`, and all other parameters by `others`.
///
/// For Muon (Jordan et al. 2024), which is for matrices alone. A matrix is a parameter of two axes or
/// more whose first axis and whose other axes, taken together, are longer than 1. `matrices` sees it
/// with two axes: a convolution as `[outputs, inputs·height·width]`. Vectors, such as biases, norms
/// and class tokens, go to `others`. Each parameter has the state of one of the two.
///
/// # Example
/// Muon with updates of AdamW's size, so that both can share a learning rate:
/// ```
/// use burn::backend::{Autodiff, Flex};
/// use burn::nn::{Linear, LinearConfig};
/// use burn::optim::{AdamWConfig, AdjustLrFn, GradientsParams, MuonConfig, Optimizer};
/// use flops_core::train::matrix_optimizer::MatrixOptimizer;
///
/// type B = Autodiff<Flex>;
/// let model: Linear<B> = LinearConfig::new(2, 3).init(&Default::default());
/// let muon = MuonConfig::new().with_adjust_lr_fn(AdjustLrFn::MatchRmsAdamW).build();
/// let adamw = AdamWConfig::new().init::<B, Linear<B>>().optim().clone();
/// let mut optimizer = MatrixOptimizer::new(muon, adamw).init::<B, Linear<B>>();
/// let loss = model.weight.val().sum();
/// let grads = GradientsParams::from_grads(loss.backward(), &model);
/// let model = optimizer.step(1e-3, model, grads);
/// # let _ = model;
/// ```
#[derive(Clone, Debug)]
pub struct MatrixOptimizer<M, O> {
    /// The optimizer of matrices.
    pub matrices: M,
    /// The optimizer of all other parameters.
    pub others: O,
}

impl<M, O> MatrixOptimizer<M, O> {
    /// Puts the two together.
    #[must_use]
    pub fn new(matrices: M, others: O) -> Self {
        Self { matrices, others }
    }

    /// The optimizer of a module.
    pub fn init<B: AutodiffBackend, T: AutodiffModule<B>>(self) -> OptimizerAdaptor<Self, T, B>
    where
        M: SimpleOptimizer<B::InnerBackend>,
        O: SimpleOptimizer<B::InnerBackend>,
    {
        OptimizerAdaptor::from(self)
    }
}

impl<B: Backend, M: SimpleOptimizer<B>, O: SimpleOptimizer<B>> SimpleOptimizer<B> for MatrixOptimizer<M, O> {
    /// The state of a matrix, or that of another parameter.
    type State<const D: usize> = (Option<M::State<2>>, Option<O::State<D>>);

    fn step<const D: usize>(
        &self,
        lr: f64,
        tensor: Tensor<B, D>,
        grad: Tensor<B, D>,
        state: Option<Self::State<D>>,
    ) -> (Tensor<B, D>, Option<Self::State<D>>) {
        let (shape, (of_matrix, of_other)) = (tensor.dims(), state.unwrap_or_default());
        if matrix_sides(&shape, 1).is_none() {
            let (tensor, state) = self.others.step(lr, tensor, grad, of_other);
            return (tensor, Some((None, state)));
        }
        let flat = [shape[0], shape[1..].iter().product()];
        let (matrix, state) = self.matrices.step::<2>(lr, tensor.reshape(flat), grad.reshape(flat), of_matrix);
        (matrix.reshape(shape), Some((state, None)))
    }

    fn to_device<const D: usize>((matrix, other): Self::State<D>, device: &B::Device) -> Self::State<D> {
        (matrix.map(|state| M::to_device(state, device)), other.map(|state| O::to_device(state, device)))
    }
}

#[cfg(all(test, feature = "train"))]
mod tests {
    use super::*;

    use burn::module::{Module, ModuleVisitor, Param};
    use burn::optim::{AdamW, AdamWConfig, AdjustLrFn, GradientsParams, Muon, MuonConfig, Optimizer, Sgd, SgdConfig};
    use burn::record::{DefaultRecorder, Recorder};

    use crate::testing::{AB, B, Zoo, weights, zoo};

    type Rules = MatrixOptimizer<Muon<B>, AdamW>;

    fn optimizer() -> OptimizerAdaptor<Rules, Zoo<AB>, AB> {
        let muon = MuonConfig::new().with_adjust_lr_fn(AdjustLrFn::MatchRmsAdamW).build();
        MatrixOptimizer::new(muon, AdamWConfig::new().init::<AB, Zoo<AB>>().optim().clone()).init()
    }

    /// The gradients of Σ w³/3, which differ from value to value.
    fn gradients(model: &Zoo<AB>) -> GradientsParams {
        struct Sum(Option<Tensor<AB, 1>>);
        impl ModuleVisitor<AB> for Sum {
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<AB, D>>) {
                let term = param.val().powi_scalar(3).sum() / 3.0;
                self.0 = Some(self.0.take().map_or(term.clone(), |sum| sum + term));
            }
        }
        let mut sum = Sum(None);
        model.visit(&mut sum);
        GradientsParams::from_grads(sum.0.unwrap().backward(), model)
    }

    fn steps<O: Optimizer<Zoo<AB>, AB>>(mut model: Zoo<AB>, optimizer: &mut O, steps: usize) -> Zoo<AB> {
        for _ in 0..steps {
            let grads = gradients(&model);
            model = optimizer.step(0.01, model, grads);
        }
        model
    }

    /// Each parameter ends where one of the two alone leaves it: the vectors at AdamW's values, the
    /// linear layers and the table at Muon's.
    #[test]
    fn each_parameter_has_the_steps_of_its_own_optimizer() {
        let adamw = steps(zoo(1), &mut AdamWConfig::new().init(), 3);
        let both = steps(zoo(1), &mut optimizer(), 3);
        let same = |a: Tensor<AB, 1>, b: Tensor<AB, 1>| a.into_data() == b.into_data();
        assert!(same(both.norm.gamma.val(), adamw.norm.gamma.val()));
        assert!(same(both.cls.val().flatten(0, 2), adamw.cls.val().flatten(0, 2)));
        for (both, adamw) in [(&both.mix, &adamw.mix), (&both.head, &adamw.head)] {
            assert!(same(both.bias.as_ref().unwrap().val(), adamw.bias.as_ref().unwrap().val()));
            assert!(!same(both.weight.val().flatten(0, 1), adamw.weight.val().flatten(0, 1)));
        }
        let muon = MuonConfig::new().with_adjust_lr_fn(AdjustLrFn::MatchRmsAdamW).build::<B>();
        let (mut table, mut state) = (zoo(1).table.weight.val().inner(), None);
        for _ in 0..3 {
            let grad = table.clone().powi_scalar(2);
            (table, state) = muon.step(0.01, table, grad, state);
        }
        let (got, expected) = (both.table.weight.val().inner(), table);
        assert!((got - expected).abs().max().into_scalar() < 1e-6);
    }

    /// A convolution is a matrix from patches to channels: Muon's first step has singular values near
    /// the learning rate times 0.2·√6.
    #[test]
    fn a_convolution_is_a_matrix() {
        let (before, after) = (zoo(1), steps(zoo(1), &mut optimizer(), 1));
        let step = (before.conv.weight.val() - after.conv.weight.val()).inner().reshape([3, 6]);
        let gram = step.clone().matmul(step.transpose()) / (0.01f64 * 0.2).powi(2) / 6.0;
        let gram = gram.into_data().to_vec::<f32>().unwrap();
        // Newton and Schulz's five iterations leave singular values between 0.6 and 1.3
        assert!((0..3).all(|i| (0.4..1.7).contains(&gram[4 * i])), "{gram:?}");
        assert!((0..9).filter(|k| k % 4 != 0).all(|k| gram[k].abs() < 0.4), "{gram:?}");
    }

    #[test]
    fn a_resumed_optimizer_goes_on_with_the_same_bits() {
        let mut first = optimizer();
        let half = steps(zoo(1), &mut first, 2);
        let folder = tempfile::tempdir().unwrap();
        let (recorder, path) = (DefaultRecorder::new(), folder.path().join("optimizer"));
        Recorder::<AB>::record(&recorder, first.to_record(), path.clone()).unwrap();
        let record = Recorder::<AB>::load(&recorder, path, &Default::default()).unwrap();
        let mut resumed = optimizer().load_record(record);
        let go_on =
            |optimizer: &mut OptimizerAdaptor<Rules, Zoo<AB>, AB>| weights(&steps(half.clone(), optimizer, 2).valid());
        let (resumed, uninterrupted) = (go_on(&mut resumed), go_on(&mut first));
        assert_eq!(resumed, uninterrupted);
        assert_ne!(go_on(&mut optimizer()), uninterrupted, "the state matters");
    }

    /// With one optimizer for both, the split changes nothing.
    #[test]
    fn two_equal_optimizers_are_one() {
        let sgd = || SgdConfig::new().init::<AB, Zoo<AB>>();
        let mut both: OptimizerAdaptor<MatrixOptimizer<Sgd<B>, Sgd<B>>, _, _> =
            MatrixOptimizer::new(sgd().optim().clone(), sgd().optim().clone()).init();
        assert_eq!(weights(&steps(zoo(1), &mut both, 2).valid()), weights(&steps(zoo(1), &mut sgd(), 2).valid()));
    }
}
