//! What a user implements: a forward pass and a loss per datum.

use burn::module::ParamId;
use burn::prelude::*;

use crate::batch::{Batch, Rows};
use crate::estimator::{callers, in_order};
use crate::probe::{Prefix, PrefixCache, Probe, Stages};

/// A model that can be trained from forward passes alone.
///
/// Two levels, one trait:
///
/// 1. **As it stands.** `forward` ignores the probe. The [`Weights`](crate::estimator::Space::Weights) space then trains any module.
/// 2. **Through the probe.** Layers are called as `probe.linear(&self.fc, x)` instead of `self.fc.forward(x)`: they become *sites*,
///    on whose outputs the [`Activation`](crate::estimator::Space::Activation) space puts noise. Wrapping parts of the pass in
///    [`probe.stage`](Probe::stage) lets queries start from the first stage that is trained, instead of from the input.
///
/// Rows stay rows: datum i of the input is row i of the output, and no row influences another (batch normalisation in
/// training mode would break the estimate of any method that evaluates data separately).
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
    /// What the model sees, one row per datum.
    type Input: Rows;
    /// What the loss compares the output with, one row per datum.
    type Target: Rows;
    /// What the model says, one row per datum.
    type Output: Rows;

    /// The forward pass. `input` must be consumed before or inside the first stage.
    fn forward(&self, input: Self::Input, probe: &mut Probe<B>) -> Self::Output;

    /// One loss per datum. It need not be differentiable, or even continuous.
    ///
    /// # Shapes
    /// - returns: `[rows]`
    fn losses(&self, output: Self::Output, target: Self::Target) -> Tensor<B, 1>;

    /// Logits `[rows, classes]` and labels `[rows]`, for the metrics of classifiers; `None` for other models.
    fn classification(
        &self,
        output: &Self::Output,
        target: &Self::Target,
    ) -> Option<(Tensor<B, 2>, Tensor<B, 1, Int>)> {
        let _ = (output, target);
        None
    }

    /// The targets of a batch whose data meet in the loss, as a contrastive one's do, once all that the model said of it is known; `None`, as
    /// it is for most losses, where the loss of a datum looks at its own output alone.
    ///
    /// A query perturbs one datum. Its target, a row of what is returned, is to hold what the others said, so that
    /// [`losses`](Self::losses) of a row is ℓ_j + B·(L′ − L): the datum's part of the clean loss, their mean being the batch's loss L, and
    /// what the batch's loss changes by when this datum's output alone is replaced. Its gradient is then, to first order, that of the
    /// batch's loss; the datum's own terms without those of the others that it appears in would be biased.
    fn couple(&self, output: &Self::Output, target: &Self::Target) -> Option<Self::Target> {
        let _ = (output, target);
        None
    }

    /// Gradients of the mean loss that are known in closed form, each flat beside its parameter's name: those of parameters that act behind
    /// the last black box. No query perturbs them: call their layers without the probe. `target` is what [`couple`](Self::couple) returned, where it did.
    fn exact_gradients(&self, output: &Self::Output, target: &Self::Target) -> Vec<(ParamId, Tensor<B, 1>)> {
        let _ = (output, target);
        Vec::new()
    }

    /// How hard the gradient of each datum may be expected to be to estimate, `[rows]`, in any unit that lies between 10⁻⁶ and 100, beyond which
    /// it is cut: what the [running estimates](crate::variance) of the variances are kept by. `None` where the loss tells it, as it does for classifiers.
    fn difficulty(&self, output: &Self::Output, target: &Self::Target) -> Option<Tensor<B, 1>> {
        let _ = (output, target);
        None
    }

    /// Why the model cannot answer, where a part of it that is out of its hands, a remote service, has failed. It is asked after every pass of a
    /// step and of an evaluation: the step is then given up, and nothing is learned from it.
    fn failure(&self) -> Option<String> {
        None
    }

    /// Numbers from which an allocator with [`MeanModel::Features`](crate::allocator::MeanModel::Features) is to tell how hard a datum's
    /// gradient is to estimate, `[rows, features]`; `None` where the loss is to tell alone.
    fn allocation_features(&self, output: &Self::Output, target: &Self::Target) -> Option<Tensor<B, 2>> {
        let _ = (output, target);
        None
    }

    /// What the gradients of a datum may be [predicted](crate::feedback) from: the error of its output, `[rows, signals]`.
    ///
    /// Any numbers known before the queries are right, better ones lower the variance more. Of a classifier they are
    /// softmax(logits) − onehot(label); a regression's would be output − target. Without any there is no control variate.
    fn error_signals(&self, output: &Self::Output, target: &Self::Target) -> Option<Tensor<B, 2>> {
        let (logits, labels) = self.classification(output, target)?;
        let [_, classes] = logits.dims();
        if classes < 2 {
            return None;
        }
        let probabilities = burn::tensor::activation::softmax(logits.cast(burn::tensor::DType::F32), 1);
        Some(probabilities - labels.one_hot::<2>(classes).float().cast(burn::tensor::DType::F32))
    }
}

/// Plain inference on the `rows` rows of `input`, at most `max_rows` of them at a time, by `threads` callers.
///
/// On a CPU several callers are faster than one whose matrix products are parallel; a device that CubeCL drives has one, whatever `threads` says. The result
/// does not depend on it.
///
/// # Panics
/// Where `rows` or `max_rows` is 0.
pub fn infer<B: Backend, M: ForwardModel<B>>(
    model: &M,
    input: &M::Input,
    rows: usize,
    max_rows: usize,
    threads: usize,
) -> M::Output {
    passes(model, (input, rows), (max_rows, threads), None, |_| Probe::clean(), drop)
}

/// The passes of [`infer`], in order: `probe` makes the probe of each from its rows of `prefix`, `seen` takes it afterwards.
fn passes<B: Backend, M: ForwardModel<B>>(
    model: &M,
    (input, rows): (&M::Input, usize),
    (max_rows, threads): (usize, usize),
    prefix: Option<Prefix>,
    probe: impl Fn(Option<Prefix>) -> Probe<B> + Sync,
    mut seen: impl FnMut(Probe<B>) + Send,
) -> M::Output {
    assert!(rows > 0 && max_rows > 0, "{rows} rows, at most {max_rows} at a time: both must be at least 1");
    let width = even(rows, max_rows);
    let mut outputs = Vec::with_capacity(rows.div_ceil(width));
    let context = (model.clone(), input.clone(), prefix);
    let work = |(model, input, prefix): &(M, M::Input, Option<Prefix>), job: usize| {
        let index: Vec<usize> = (job * width..rows.min((job + 1) * width)).collect();
        let mut probe = probe(prefix.as_ref().map(|p| p.rows(&index)));
        let output = model.forward(input.rows(&index), &mut probe);
        Ok((output, probe))
    };
    in_order(rows.div_ceil(width), callers(model, threads), context, work, |_, (output, probe)| {
        outputs.push(output);
        seen(probe);
    })
    .expect("a plain pass gives no error");
    M::Output::cat(outputs)
}

/// Rows of a pass where `rows` are to be split into passes of at most `max_rows`: equal ones, since a matrix product of a row or two may round
/// differently, and costs nearly as much as a whole one.
pub(crate) fn even(rows: usize, max_rows: usize) -> usize {
    rows.div_ceil(rows.div_ceil(max_rows).max(1)).max(1)
}

/// [`infer`] on a batch that is evaluated again and again, as after every epoch: from the frozen prefixes that `cache` has of it, or keeping them.
pub(crate) fn infer_again<B: Backend, M: ForwardModel<B>>(
    model: &M,
    batch: &Batch<M::Input, M::Target>,
    max_rows: usize,
    threads: usize,
    cache: &PrefixCache,
) -> M::Output {
    let (n, trained) = (batch.ids.len(), cache.trained());
    let prefix = cache.get(&batch.ids, &trained);
    if trained.is_empty() || prefix.is_none() && !cache.has_room(n) {
        return infer(model, &batch.input, n, max_rows, threads);
    }
    let known = prefix.is_some();
    let mut stages = vec![];
    let survey = |prefix| Probe::survey(trained.clone(), prefix, false);
    let output = passes(model, (&batch.input, n), (max_rows, threads), prefix, survey, |probe| {
        stages.push(probe.surveyed().stages);
    });
    if !known {
        cache.keep(&batch.ids, &trained, &Stages::cat(stages, None).frozen());
    }
    output
}

/// Cross-entropy of each datum, in f32 whatever the precision of the logits.
///
/// # Shapes
/// - logits: `[rows, classes]`
/// - target: `[rows]`, each in `0..classes`
/// - returns: `[rows]`
pub fn cross_entropy<B: Backend>(logits: Tensor<B, 2>, target: Tensor<B, 1, Int>) -> Tensor<B, 1> {
    let rows = logits.dims()[0];
    let logits = logits.cast(burn::tensor::DType::F32);
    burn::tensor::activation::log_softmax(logits, 1).gather(1, target.reshape([rows, 1])).neg().reshape([rows])
}

/// 0-1 loss of each datum: 1 where the largest logit is not the label's. It has no gradient, and needs none here.
///
/// # Shapes
/// - logits: `[rows, classes]`
/// - target: `[rows]`
/// - returns: `[rows]`
pub fn zero_one<B: Backend>(logits: Tensor<B, 2>, target: Tensor<B, 1, Int>) -> Tensor<B, 1> {
    let rows = logits.dims()[0];
    logits.argmax(1).reshape([rows]).not_equal(target).float().cast(burn::tensor::DType::F32)
}
