//! What a user implements: a forward pass and a loss for each example.

use burn::module::ParamId;
use burn::prelude::*;
use burn::tensor::DType;

use crate::batch::Rows;
use crate::losses::one_hot;
use crate::probe::Probe;

/// A model that can be trained from forward passes alone.
///
/// There are two levels, and one trait for both:
///
/// 1. **Without the probe.** `forward` ignores the probe. The
///    [`Weights`](crate::estimator::Space::Weights) space trains any such module.
/// 2. **Through the probe.** Layers are called as `probe.linear(&self.fc, x)` instead of
///    `self.fc.forward(x)`. They become *sites*: the
///    [`Activation`](crate::estimator::Space::Activation) space adds noise to their outputs. Parts
///    of the pass wrapped in [`probe.stage`](Probe::stage) are reused: queries start at the first
///    trained stage instead of the input.
///
/// Example i of the input is row i of the output, and no row may influence another. Batch
/// normalisation by statistics of the batch breaks this. The first axis of every tensor is its rows
/// (see [`Probe`](Probe#rows)). [`probe.batch_norm`](Probe::batch_norm)
/// goes by running statistics instead. Call dropout as [`probe.dropout`](Probe::dropout), and layers
/// on padded tokens inside [`probe.masked`](Probe::masked).
///
/// # Example
/// ```
/// use burn::{nn, prelude::*, tensor::activation::relu};
/// use flops_core::{ForwardModel, Probe, cross_entropy};
///
/// #[derive(Module, Debug)]
/// struct Mlp<B: Backend> {
///     hidden: nn::Linear<B>,
///     output: nn::Linear<B>,
/// }
///
/// impl<B: Backend> ForwardModel<B> for Mlp<B> {
///     type Input = Tensor<B, 2>;
///     type Target = Tensor<B, 1, Int>;
///     type Output = Tensor<B, 2>;
///
///     fn forward(&self, x: Tensor<B, 2>, probe: &mut Probe<B>) -> Tensor<B, 2> {
///         let h = relu(probe.linear(&self.hidden, x));
///         probe.linear(&self.output, h)
///     }
///
///     fn losses(&self, logits: Tensor<B, 2>, target: Tensor<B, 1, Int>) -> Tensor<B, 1> {
///         cross_entropy(logits, target)
///     }
/// }
/// ```
pub trait ForwardModel<B: Backend>: Module<B> {
    /// Inputs of the forward pass, one row per example.
    type Input: Rows;
    /// Targets that the loss compares the outputs with, one row per example.
    type Target: Rows;
    /// Outputs of the forward pass, one row per example.
    type Output: Rows;

    /// Runs the forward pass. `input` must be consumed before or inside the first stage.
    fn forward(&self, input: Self::Input, probe: &mut Probe<B>) -> Self::Output;

    /// Returns one loss per example. It need not be differentiable, or even continuous.
    ///
    /// # Shapes
    /// - returns: `[rows]`
    fn losses(&self, output: Self::Output, target: Self::Target) -> Tensor<B, 1>;

    /// Returns logits and labels for classification metrics; `None` for other models.
    ///
    /// # Shapes
    /// - returns: logits `[rows, classes]` and labels `[rows]`
    fn classification(
        &self,
        output: &Self::Output,
        target: &Self::Target,
    ) -> Option<(Tensor<B, 2>, Tensor<B, 1, Int>)> {
        let _ = (output, target);
        None
    }

    /// For losses that couple examples (contrastive): per-row targets that already hold the other
    /// rows' outputs.
    ///
    /// `None`, the default, is right where the loss of an example depends on its own output alone.
    ///
    /// A query perturbs one example j. With the returned targets, [`losses`](Self::losses) of row j
    /// must be ℓ_j + B·(L′ − L). Here ℓ_j is the example's part of the clean loss, and the mean of
    /// all ℓ_j is the batch loss L. L′ is the batch loss with the output of example j alone
    /// replaced. To first order, the gradient is then that of the batch loss. The example's own
    /// terms alone would give a biased gradient: it also appears in the terms of others.
    fn couple(&self, output: &Self::Output, target: &Self::Target) -> Option<Self::Target> {
        let _ = (output, target);
        None
    }

    /// Returns gradients of the mean loss that are known in closed form, flat, by parameter.
    ///
    /// Each has as many elements as its parameter, in its order. They belong to parameters behind
    /// everything that is perturbed. No query perturbs these: call
    /// their layers without the probe. `target` is what [`couple`](Self::couple) returned, if
    /// anything.
    fn exact_gradients(&self, output: &Self::Output, target: &Self::Target) -> Vec<(ParamId, Tensor<B, 1>)> {
        let _ = (output, target);
        Vec::new()
    }

    /// Key by which the [variance tracker](crate::variance) groups examples: the loss, unless
    /// overridden.
    ///
    /// It should order the examples by the expected variance of their gradient estimates. Its order
    /// alone counts, upwards or downwards: unit, zero and sign are free. `None` selects the loss,
    /// which suits classifiers.
    ///
    /// # Shapes
    /// - returns: `[rows]`
    fn variance_covariate(&self, output: &Self::Output, target: &Self::Target) -> Option<Tensor<B, 1>> {
        let _ = (output, target);
        None
    }

    /// Returns why the model cannot answer, where a part of it outside the process has failed.
    ///
    /// Such a part is a remote service, for example. It is called after every pass of a step and of
    /// an evaluation. A failed step is abandoned: nothing is learned from it.
    fn failure(&self) -> Option<String> {
        None
    }

    /// Whether a learner leaves out the [check of sites](crate::estimator::CleanPass::check_sites) of
    /// its first step; `false`, unless overridden.
    ///
    /// The check sends up to 8 examples through the model twice. Return `true` where each row costs
    /// money, as behind a remote service, or where a trained parameter acts outside its sites on
    /// purpose, as a constant.
    fn skips_site_check(&self) -> bool {
        false
    }

    /// Features from which an allocator predicts how hard an example's gradient is to estimate.
    ///
    /// Only [`MeanModel::Features`](crate::allocator::MeanModel::Features) uses them. The default
    /// is `None`.
    ///
    /// # Shapes
    /// - returns: `[rows, features]`
    fn allocation_features(&self, output: &Self::Output, target: &Self::Target) -> Option<Tensor<B, 2>> {
        let _ = (output, target);
        None
    }

    /// Error signals of the output, from which the [control variate](crate::control_variate)
    /// predicts gradients.
    ///
    /// Any values known before the queries keep the estimate unbiased; better ones lower the
    /// variance more. The default is softmax(logits) − onehot(label) for classifiers. For a
    /// regression, output − target is a good choice. `None` means no control variate.
    ///
    /// # Shapes
    /// - returns: `[rows, signals]`
    fn error_signals(&self, output: &Self::Output, target: &Self::Target) -> Option<Tensor<B, 2>> {
        let (logits, labels) = self.classification(output, target)?;
        let [_, classes] = logits.dims();
        if classes < 2 {
            return None;
        }
        let probabilities = burn::tensor::activation::softmax(logits.cast(DType::F32), 1);
        Some(probabilities - one_hot(labels, classes))
    }

    /// The outputs o of which the [error signals](Self::error_signals) are the derivatives ∂ℓ/∂o.
    ///
    /// The control variate learns from how queries move them: as many equations a query as there
    /// are outputs, instead of one. The default is the logits of a classifier. A model that
    /// overrides the error signals overrides this too. `None` means that only losses are visible,
    /// as does another number of outputs than of signals.
    ///
    /// # Shapes
    /// - returns: `[rows, signals]`
    fn signal_outputs(&self, output: &Self::Output, target: &Self::Target) -> Option<Tensor<B, 2>> {
        self.classification(output, target).map(|(logits, _)| logits)
    }
}
