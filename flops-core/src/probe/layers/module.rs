//! Any Burn module as one layer.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use burn::backend::Autodiff;
use burn::module::{AutodiffModule, HasAutodiffModule, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::prelude::*;
use burn::tensor::DType;
use burn::tensor::backend::AutodiffBackend;
use rand::RngExt;

use crate::ops;
use crate::probe::gradients::Gradients;
use crate::probe::layer::{Site, SquaredScoreNorm};
use crate::probe::module_input::ModuleInput;
use crate::probe::{Mode, Probe};
use crate::random::keyed_rng;

/// The module `M` of the backend `B` on `Autodiff<B>`.
pub type Lifted<B, M> = <M as HasAutodiffModule<Autodiff<B>>>::TrainModule;

/// Calls any Burn module through a probe, as [`Probe::module`](crate::Probe::module) does.
///
/// The closure is written once and compiled twice: for the backend of the model and for autodiff on
/// it. It may capture plain numbers by `move`. Tensors belong into the input.
///
/// # Example
/// ```
/// use burn::nn::attention::{MhaInput, MultiHeadAttention};
/// use burn::prelude::*;
/// use flops_core::{Probe, site};
///
/// /// Self-attention with a padding mask, as one site.
/// fn attend<B: Backend>(
///     layer: &MultiHeadAttention<B>,
///     x: Tensor<B, 3>,
///     mask: Tensor<B, 2, Bool>,
///     probe: &mut Probe<B>,
/// ) -> Tensor<B, 3> {
///     site!(probe, layer, (x, mask), |layer, (x, mask)| layer.forward(MhaInput::self_attn(x).mask_pad(mask)).context)
/// }
/// ```
#[macro_export]
macro_rules! site {
    ($probe:expr, $module:expr, $input:expr, $forward:expr $(,)?) => {
        $probe.module($module, $input, $forward, $forward)
    };
}

impl<B: Backend> Probe<B> {
    /// Any Burn module as one site: noise falls on its output and reaches all its trained
    /// parameters.
    ///
    /// An LSTM, an attention, a convolution of any kind, a residual branch or a whole block: the
    /// gradient of a query is Jᵀ(c·s(ε)), with J = ∂y/∂θ of this one module at its clean input.
    /// Autodiff forms that product in the update pass, on the clean rows alone. Nothing is
    /// differentiated across sites, and one module's graph lives at a time. All other passes run
    /// `plain`, without a graph.
    ///
    /// `plain` and `lifted` are the same forward pass on the two backends. Name a generic function
    /// twice, as in `probe.module(&self.conv, x, Conv1d::forward, Conv1d::forward)`, or write a
    /// closure once with [`site!`](crate::site).
    ///
    /// Frozen parameters inside stay frozen. A query repeats the rows of an input that has one row
    /// per example where another has one per query, as [`align`](Self::align) does. Under a
    /// [token mask](Self::masked) the second of three or more axes of y is the tokens. A module
    /// whose second axis is something else, as the channels of a convolution, is called inside
    /// [`unmasked`](Self::unmasked).
    ///
    /// # What it may not do
    /// The output of a row must depend on this row and on the parameters alone, and be the same on
    /// both backends. Dropout is not: Burn drops on autodiff backends. Set it to 0 inside and call
    /// [`dropout`](Self::dropout) around the module. Nor is batch normalisation, which has
    /// [a method of its own](Self::batch_norm). The first step of a learner checks it:
    /// [`Error::ModuleDiffers`](crate::Error::ModuleDiffers).
    ///
    /// # Squared score norm
    /// ‖J_j‖² of a row is estimated by ‖J_j u‖², with signs u that are the same in every step. One
    /// difference (y(θ + h·u) − y(θ))/h gives it, for one more plain pass. Over random signs its mean
    /// is ‖J_j‖², and its variance 2·Σ_{a≠b} (J_jᵀJ_j)²_ab. In tests on a residual branch the standard
    /// deviation of a row is 40 % at width 8, and 20 % at width 32. The step h is √ε times the size of
    /// the parameters, with ε the precision. That leaves an error of 1 % in f16 and 3 % in bf16.
    /// Gradients do not depend on any of it; allocations do.
    ///
    /// # Cost
    /// The update pass differentiates the module on the clean rows and runs it once more for the
    /// norm. Where a linear layer has a method here, that is faster: autodiff on three axes forms the
    /// gradient of a weight for each row before it sums them.
    ///
    /// [Costs](Self::record_cost) are an estimate: every parameter is taken to be multiplied once at
    /// each token, with the last axis of y as its features. That is right for linear layers and
    /// attention projections. It is too much for embeddings, which have a
    /// [method of their own](Self::embedding), and inexact for convolutions.
    ///
    /// # Shapes
    /// - input: tensors `[rows, …]`, or `[1, …]` for what does not depend on the example; `()` for a
    ///   module without an input
    /// - returns: `[rows, …]`, or `[1, …]` where all of the input is
    ///
    /// # Example
    /// A classifier of sequences, and one estimate of its gradient.
    /// ```
    /// use burn::backend::{Autodiff, Flex};
    /// use burn::module::AutodiffModule;
    /// use burn::nn::{Linear, LinearConfig, Lstm, LstmConfig};
    /// use burn::prelude::*;
    /// use flops_core::estimator::trained_parameters;
    /// use flops_core::prelude::*;
    /// use flops_core::{Estimator, site};
    ///
    /// #[derive(Module, Debug)]
    /// struct Classifier<B: Backend> {
    ///     lstm: Lstm<B>,
    ///     head: Linear<B>,
    /// }
    ///
    /// impl<B: Backend> ForwardModel<B> for Classifier<B> {
    ///     type Input = Tensor<B, 3>;
    ///     type Target = Tensor<B, 1, Int>;
    ///     type Output = Tensor<B, 2>;
    ///
    ///     fn forward(&self, x: Tensor<B, 3>, probe: &mut Probe<B>) -> Tensor<B, 2> {
    ///         let h = site!(probe, &self.lstm, x, |lstm, x| lstm.forward(x, None).0);
    ///         let last = h.dims()[1] - 1;
    ///         probe.linear(&self.head, h.narrow(1, last, 1).squeeze_dim(1))
    ///     }
    ///
    ///     fn losses(&self, logits: Tensor<B, 2>, target: Tensor<B, 1, Int>) -> Tensor<B, 1> {
    ///         cross_entropy(logits, target)
    ///     }
    /// }
    ///
    /// let device = Default::default();
    /// let model = Classifier::<Autodiff<Flex>> {
    ///     lstm: LstmConfig::new(3, 8, true).init(&device),
    ///     head: LinearConfig::new(8, 2).init(&device),
    /// };
    /// let (trained, model) = (trained_parameters(&model), model.valid());
    /// let x = Tensor::<Flex, 1, Int>::arange(0..60, &device).float().sin().reshape([4, 5, 3]);
    /// let target = Tensor::from_ints([0, 1, 1, 0], &device);
    /// let batch = Batch { ids: vec![0, 1, 2, 3], input: x, target };
    ///
    /// let estimator = Estimator::new(Space::activation());
    /// let clean = estimator.clean(&model, &batch, &trained)?;
    /// clean.check_sites()?; // a learner does this in its first step
    /// let estimate = clean.estimate(&Allocation::uniform(4, &QueryBudget::new(8, 1)?), 0)?;
    /// let gate = &model.lstm.input_gate.input_transform.weight;
    /// assert_eq!(estimate.gradient(gate).unwrap().dims(), [3, 8]);
    /// # Ok::<(), flops_core::Error>(())
    /// ```
    pub fn module<M, I, const D: usize>(
        &mut self,
        module: &M,
        input: I,
        plain: impl Fn(&M, I) -> Tensor<B, D> + Send + 'static,
        lifted: impl Fn(&Lifted<B, M>, I::Lifted) -> Tensor<Autodiff<B>, D> + Send + 'static,
    ) -> Tensor<B, D>
    where
        M: Module<B> + HasAutodiffModule<Autodiff<B>> + 'static,
        I: ModuleInput<B>,
    {
        if matches!(self.mode, Mode::Inference) {
            return plain(module, input);
        }
        let (parameters, input) = (float_parameters(module), self.align_input(input));
        let kept = (self.forms_sites() && self.is_site(&parameters)).then(|| input.clone());
        let output = plain(module, input);
        self.record_module_cost(module, &output.dims());
        let (clean, trained) = (output.clone(), self.trained.clone());
        match kept {
            // the module is cloned behind its pass: a clone of what is not initialised has other values
            Some(input) => self.site(&parameters, output, |_| ModuleSite {
                module: module.clone(),
                input,
                output: clean,
                plain,
                lifted,
                trained,
            }),
            None => self.site(&parameters, output, |_| InQuery),
        }
    }

    /// Notes an estimate of the multiply-adds in the pass that asks for them: every parameter once
    /// at each token.
    fn record_module_cost<M: Module<B>>(&mut self, module: &M, shape: &[usize]) {
        if let (Mode::Trace { .. }, [_, row @ ..]) = (&self.mode, shape) {
            let width = row.iter().product::<usize>();
            let tokens = width / row.last().copied().unwrap_or(1).max(1);
            self.record_cost(module.num_params() * tokens, width);
        }
    }
}

/// The ids of all float parameters, trained or not, in the order of the fields.
fn float_parameters<B: Backend, M: Module<B>>(module: &M) -> Vec<ParamId> {
    struct Collect(Vec<ParamId>);
    impl<B: Backend> ModuleVisitor<B> for Collect {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            self.0.push(param.id);
        }
    }
    let mut collect = Collect(vec![]);
    module.visit(&mut collect);
    collect.0
}

/// What a query asks of a module: noise falls on its output. Nothing is kept.
struct InQuery;

impl<B: Backend> Site<B> for InQuery {
    fn backward(&self, _: Tensor<B, 2>, _: &mut Gradients<B>) {}

    fn squared_score_norm(&self) -> SquaredScoreNorm<B> {
        SquaredScoreNorm::constant(0.0)
    }
}

/// A module with its clean input and output, and its forward pass on both backends.
struct ModuleSite<B: Backend, M, I, P, L, const D: usize> {
    module: M,
    input: I,
    output: Tensor<B, D>,
    plain: P,
    lifted: L,
    /// All trained parameters of the model.
    trained: Arc<HashSet<ParamId>>,
}

impl<B, M, I, P, L, const D: usize> Site<B> for ModuleSite<B, M, I, P, L, D>
where
    B: Backend,
    M: Module<B> + HasAutodiffModule<Autodiff<B>> + 'static,
    I: ModuleInput<B>,
    P: Fn(&M, I) -> Tensor<B, D> + Send + 'static,
    L: Fn(&Lifted<B, M>, I::Lifted) -> Tensor<Autodiff<B>, D> + Send + 'static,
{
    fn backward(&self, g: Tensor<B, 2>, gradients: &mut Gradients<B>) {
        let (module, y) = self.run_lifted(&self.trained);
        let (g, scale) = in_precision(g.reshape(y.dims()), y.dtype());
        // a root that is always there: autodiff refuses an output that depends on nothing trained
        let root = Tensor::<Autodiff<B>, 1>::zeros([1], &y.device()).cast(y.dtype()).require_grad();
        let found = ((y * Tensor::from_inner(g)).sum() + root).backward();
        module.visit(&mut Collect { found: &found, trained: &self.trained, scale, gradients });
    }

    /// ‖J_j u‖² for the signs u, by one difference.
    fn squared_score_norm(&self) -> SquaredScoreNorm<B> {
        let (accum, h) = (ops::accum_dtype::<B>(), self.step());
        let moved = self.module.clone().map(&mut Move { signs: Signs::new(&self.trained), step: h.clone() });
        let y = (self.plain)(&moved, self.input.clone());
        let change = y.cast(accum) - self.output.clone().cast(accum);
        SquaredScoreNorm::of_inputs(change / h.reshape([1; D]), 1.0)
    }

    fn is_constant(&self) -> bool {
        let mut constant = true;
        self.input.shapes(&mut |_| constant = false);
        constant
    }

    fn norm_direction(&self) -> Option<Gradients<B>> {
        let mut direction = Gradients::default();
        self.module.visit(&mut Direction { signs: Signs::new(&self.trained), direction: &mut direction });
        Some(direction)
    }

    fn mismatch(&self) -> Option<f64> {
        let (_, y) = self.run_lifted(&HashSet::new());
        let (y, output) = (y.inner(), &self.output);
        if y.dims() != output.dims() {
            return Some(f64::INFINITY);
        }
        let accum = ops::accum_dtype::<B>();
        let norm = |x: Tensor<B, D>| x.powi_scalar(2).mean().sqrt().into_scalar().elem::<f64>();
        let expected = output.clone().cast(accum);
        let (size, difference) = (norm(expected.clone()), norm(y.cast(accum) - expected));
        // an output that is no number cannot be compared
        let fits = difference <= tolerance(output.dtype()) * size || !size.is_finite();
        (!fits).then(|| difference / size)
    }
}

impl<B, M, I, P, L, const D: usize> ModuleSite<B, M, I, P, L, D>
where
    B: Backend,
    M: Module<B> + HasAutodiffModule<Autodiff<B>>,
    I: ModuleInput<B>,
    L: Fn(&Lifted<B, M>, I::Lifted) -> Tensor<Autodiff<B>, D>,
{
    /// The module on autodiff with these parameters as leaves of its graph, and its output there.
    fn run_lifted(&self, leaves: &HashSet<ParamId>) -> (Lifted<B, M>, Tensor<Autodiff<B>, D>) {
        let module = self.module.clone().map(&mut Dequantize);
        let module = Lifted::<B, M>::from_inner(module).map(&mut Leaves(leaves));
        let y = (self.lifted)(&module, self.input.clone().lift());
        (module, y)
    }

    /// The step of the difference, `[1]`: √ε times the root mean square of all parameters.
    fn step(&self) -> Tensor<B, 1> {
        let accum = ops::accum_dtype::<B>();
        let mut size = Size { squares: None, elements: 0, precision: precision(self.output.dtype()) };
        self.module.visit(&mut size);
        let squares = size.squares.unwrap_or_else(|| Tensor::<B, 1>::zeros([1], &self.output.device()).cast(accum));
        let rms = (squares / size.elements.max(1) as f64).sqrt();
        let rms = rms.clone().mask_fill(rms.equal_elem(0.0), 1.0);
        rms * size.precision.sqrt()
    }
}

/// Half the distance from 1 to the next number of a precision.
fn precision(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => f64::EPSILON / 2.0,
        DType::F16 => 2f64.powi(-11),
        DType::BF16 => 2f64.powi(-8),
        _ => f64::from(f32::EPSILON) / 2.0,
    }
}

/// The relative difference that rounding may make between the two backends, which do not compute
/// all functions alike.
fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 1e-6,
        DType::F16 => 1e-2,
        DType::BF16 => 5e-2,
        _ => 1e-3,
    }
}

/// What the largest entry of an output gradient is brought to in 16 bits.
///
/// Small gradients would be 0 there otherwise, and sums over many tokens have room above.
const LARGEST: f64 = 1.0 / 16.0;

/// `g` in the precision of an output, and what it was divided by.
fn in_precision<B: Backend, const D: usize>(g: Tensor<B, D>, dtype: DType) -> (Tensor<B, D>, Option<Tensor<B, 1>>) {
    if !matches!(dtype, DType::F16 | DType::BF16) {
        return (g.cast(dtype), None);
    }
    let scale = g.clone().abs().max() / LARGEST;
    let scale = scale.clone().mask_fill(scale.equal_elem(0.0), 1.0);
    ((g / scale.clone().reshape([1; D])).cast(dtype), Some(scale))
}

/// `x` as floats: autodiff computes nothing with quantized tensors.
fn dequantized<B: Backend, const D: usize>(x: Tensor<B, D>) -> Tensor<B, D> {
    if matches!(x.dtype(), DType::QFloat(_)) { x.dequantize() } else { x }
}

struct Dequantize;

impl<B: Backend> ModuleMapper<B> for Dequantize {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        param.map(dequantized)
    }
}

/// Makes leaves of the graph of some parameters, and constants of the others.
struct Leaves<'a>(&'a HashSet<ParamId>);

impl<B: Backend> ModuleMapper<B> for Leaves<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let is_leaf = self.0.contains(&param.id);
        param.set_require_grad(is_leaf)
    }
}

/// Adds the gradients of trained parameters to those of the step.
struct Collect<'a, B: Backend> {
    found: &'a <Autodiff<B> as AutodiffBackend>::Gradients,
    trained: &'a HashSet<ParamId>,
    /// What the output gradient was divided by.
    scale: Option<Tensor<B, 1>>,
    gradients: &'a mut Gradients<B>,
}

impl<B: Backend> ModuleVisitor<Autodiff<B>> for Collect<'_, B> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<Autodiff<B>, D>>) {
        if !self.trained.contains(&param.id) {
            return;
        }
        if let Some(gradient) = param.val().grad(self.found) {
            let gradient = gradient.cast(ops::accum_dtype::<B>());
            let gradient = match &self.scale {
                Some(scale) => gradient * scale.clone().reshape([1; D]),
                None => gradient,
            };
            self.gradients.add(param.id, gradient);
        }
    }
}

/// Σ θ² over all parameters, how many there are, and the coarsest precision.
struct Size<B: Backend> {
    squares: Option<Tensor<B, 1>>,
    elements: usize,
    precision: f64,
}

impl<B: Backend> ModuleVisitor<B> for Size<B> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        let value = dequantized(param.val());
        self.precision = self.precision.max(precision(value.dtype()));
        let value = value.cast(ops::accum_dtype::<B>());
        let (first, elements) = (value.dims()[0], value.shape().num_elements());
        // row by row: sums of millions of values may depend on the number of threads
        let flat: Tensor<B, 2> = value.reshape([first, elements / first.max(1)]);
        let squares = flat.powi_scalar(2).sum_dim(1).sum_dim(0).reshape([1]);
        self.elements += elements;
        self.squares = Some(match self.squares.take() {
            Some(sum) => sum + squares,
            None => squares,
        });
    }
}

/// Separates these signs from all other random numbers.
const SIGNS: u64 = u64::from_le_bytes(*b"modsigns");

/// Signs of the trained parameters, the same in every step and process.
///
/// They are keyed by the position of a parameter in its module, since ids are random. A parameter
/// that is met twice has the same signs both times.
struct Signs<'a> {
    trained: &'a HashSet<ParamId>,
    positions: HashMap<ParamId, u64>,
}

impl<'a> Signs<'a> {
    fn new(trained: &'a HashSet<ParamId>) -> Self {
        Self { trained, positions: HashMap::new() }
    }

    /// The signs of the next parameter; `None` where it is frozen.
    fn next<B: Backend, const D: usize>(&mut self, param: &Param<Tensor<B, D>>) -> Option<Tensor<B, D>> {
        let next = self.positions.len() as u64;
        let position = *self.positions.entry(param.id).or_insert(next);
        if !self.trained.contains(&param.id) {
            return None;
        }
        let value = param.val();
        let (mut rng, elements) = (keyed_rng([SIGNS, position, 0, 0]), value.shape().num_elements());
        let mut signs = Vec::with_capacity(elements.next_multiple_of(64));
        while signs.len() < elements {
            let bits = rng.random::<u64>();
            signs.extend((0..64).map(|i| if bits >> i & 1 == 1 { 1f32 } else { -1.0 }));
        }
        signs.truncate(elements);
        Some(ops::from_host(signs, value.dims(), &value.device()))
    }
}

/// θ + h·u.
struct Move<'a, B: Backend> {
    signs: Signs<'a>,
    /// h, `[1]`.
    step: Tensor<B, 1>,
}

impl<B: Backend> ModuleMapper<B> for Move<'_, B> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        match self.signs.next(&param) {
            Some(signs) => param.map(|value| ops::add_rounded(value, signs * self.step.clone().reshape([1; D]))),
            None => param,
        }
    }
}

/// u by parameter.
struct Direction<'a, B: Backend> {
    signs: Signs<'a>,
    direction: &'a mut Gradients<B>,
}

impl<B: Backend> ModuleVisitor<B> for Direction<'_, B> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        if let Some(signs) = self.signs.next(param)
            && self.direction.get(param.id).is_none()
        {
            self.direction.add(param.id, signs);
        }
    }
}

#[cfg(all(test, feature = "train"))]
mod tests;
