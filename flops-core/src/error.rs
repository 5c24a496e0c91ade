//! The errors of this crate. Each names the offending value and the remedy.

/// The errors of this crate.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The query budget cannot be met.
    #[error("invalid query budget: {name} = {value}; {remedy}")]
    Budget {
        /// The setting at fault.
        name: &'static str,
        /// Its value.
        value: usize,
        /// What to do about it.
        remedy: String,
    },
    /// A setting lies outside its range.
    #[error("invalid setting: {name} = {value}; {remedy}")]
    Setting {
        /// The setting at fault.
        name: &'static str,
        /// Its value.
        value: f64,
        /// What to do about it.
        remedy: String,
    },
    /// A batch without examples.
    #[error("the batch holds 0 examples; drop empty batches before the training step")]
    EmptyBatch,
    /// A value of one example that cannot be used.
    #[error("{name}[{index}] = {value}; {remedy}")]
    Value {
        /// The kind of value: `losses`, `variances`, …
        name: &'static str,
        /// Position in the batch.
        index: usize,
        /// The value.
        value: f64,
        /// What to do about it.
        remedy: &'static str,
    },
    /// Inputs of another length than the batch.
    #[error("{name} has {got} entries where {expected} are expected; pass one entry per example of the batch")]
    Length {
        /// The input.
        name: &'static str,
        /// Its length.
        got: usize,
        /// The expected length.
        expected: usize,
    },
    /// An unknown name.
    #[error("unknown {what} '{name}'; choose one of {choices}")]
    Unknown {
        /// The kind of thing: `allocator`, …
        what: &'static str,
        /// The name given.
        name: String,
        /// The known names.
        choices: &'static str,
    },
    /// Trained parameters that noise on layers (activation and low-rank space) cannot reach.
    #[error(
        "{missed} of {trained} trained parameters belong to no layer called through the probe ({paths}), \
         and the activation and low-rank spaces perturb only those; call their layers as \
         probe.linear(&layer, x) or the like, other modules (a convolution with groups is one) by the macro \
         site!, freeze them, or use the weight space"
    )]
    NotSites {
        /// The paths of the first of them.
        paths: String,
        /// The number of trained parameters out of reach.
        missed: usize,
        /// The number of all trained parameters.
        trained: usize,
    },
    /// A layer under a token mask that does not say how its squared score norm is spread over the
    /// tokens.
    #[error(
        "a site under a token mask gives its squared score norm in {got} parts where {expected} tokens are \
         masked; give squares of shape [rows, tokens], or a whole number of parts for each token \
         (SquaredScoreNorm::of_inputs on an input [rows, tokens, …] does), or call the layer inside \
         probe.unmasked"
    )]
    NormByToken {
        /// Parts of the norm.
        got: usize,
        /// Tokens of the mask.
        expected: usize,
    },
    /// A part that the model depends on, such as a remote service, has failed.
    #[error("the model cannot answer: {why}")]
    Model {
        /// The [reason](crate::ForwardModel::failure) that the model gives.
        why: String,
    },
    /// Parameters with a gradient in closed form that are called through the probe as well.
    #[error(
        "{count} parameters have exact gradients and are called through the probe ({paths}); call their \
         layers without it, so that no query perturbs them"
    )]
    ExactSites {
        /// The paths of the first of them.
        paths: String,
        /// The number of such parameters.
        count: usize,
    },
    /// Trained parameters that also act on the losses outside the layers called through the probe.
    #[error(
        "the losses depend on trained parameters outside the layers called through the probe, and that part \
         of the gradient would be lost: {paths}; call every use through the probe (probe.tied_linear for an \
         output that shares the weight of an embedding), move a weight penalty to the optimizer's weight \
         decay, or use the weight space"
    )]
    ActsOutsideSites {
        /// The paths of the first of them.
        paths: String,
    },
    /// A module whose gradients belong to another output than the one of the passes.
    #[error(
        "the module of {path} gives another output under autodiff, which differs by {difference:.1e} of its size, \
         and its gradients would be wrong; set dropout inside it to 0 and call probe.dropout around it, call \
         batch normalisation as probe.batch_norm outside it, and let both functions of probe.module be the same"
    )]
    ModuleDiffers {
        /// The path of the module's first parameter.
        path: String,
        /// Root mean square of the difference, relative to that of the output.
        difference: f64,
    },
    /// A gradient of another shape than its parameter.
    #[error(
        "a gradient of {path} has the shape {gradient:?}, and the parameter has {parameter:?}; add every \
         gradient in the shape of its parameter, in Site::backward and WeightNoise::add_gradients \
         (transpose it where the layer's weight is stored transposed), and exact gradients with as many elements"
    )]
    GradientShape {
        /// The path of the parameter.
        path: String,
        /// The shape of the gradient.
        gradient: Vec<usize>,
        /// The shape of the parameter.
        parameter: Vec<usize>,
    },
    /// A bare parameter that is not stored with one row.
    #[error(
        "{path} is a bare parameter of shape {shape:?}, and its first axis must be 1, the row that all \
         examples share; store it as [1, …], such as [1, tokens, d], and join it to the rows by probe.add \
         or probe.cat"
    )]
    BareParameter {
        /// The path of the parameter.
        path: String,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// A tensor whose first axis is not the rows of the pass.
    #[error(
        "{what} has the shape {shape:?} in a pass of {rows} rows; the first axis must be the rows, or 1 for \
         what does not depend on the input: reshape it to [rows, tokens, …] before the call, with tokens on \
         an axis of their own"
    )]
    RowAxis {
        /// The tensor: the output of a layer, by the path of its parameter, or an argument of the
        /// probe's methods.
        what: String,
        /// Its shape.
        shape: Vec<usize>,
        /// Rows of the pass.
        rows: usize,
    },
    /// A layer whose output changes its shape with the number of rows.
    #[error(
        "the output of the layer of {path} has {few} values a row in a pass of {few_rows} rows, and {many} \
         in one of {many_rows}: its first axis is not the rows; reshape the input of the layer to [rows, \
         tokens, …], and give bare parameters a first axis of 1"
    )]
    RowShape {
        /// The path of the layer's parameter.
        path: String,
        /// Rows of the smaller pass.
        few_rows: usize,
        /// Values of a row in it.
        few: usize,
        /// Rows of the larger pass.
        many_rows: usize,
        /// Values of a row in it.
        many: usize,
    },
    /// Layers that are called in some passes, and not in others.
    #[error(
        "the layers called through the probe differ between two passes of one step, from that of {path} on: \
         {few} calls that get noise in one, {many} in the other; call the same layers in the same order \
         whatever the rows, and multiply what a row does not use by 0 (run an episode that ends early to its \
         last step, and mask the steps behind its end), or use the weight space, where calls do not count"
    )]
    SitesVary {
        /// The path of the parameter of the first layer that differs.
        path: String,
        /// Sites of the pass with fewer of them.
        few: usize,
        /// Sites of the other pass.
        many: usize,
    },
    /// A layer that is called several times in a pass, with activation noise on all sites at once.
    #[error(
        "the layer of {path} is called {calls} times in a pass, and the joint placement perturbs all calls at \
         once: the inputs of later calls then depend on the noise of earlier ones, and the gradient would be \
         formed from the clean inputs; use the single placement, whose inputs are the clean ones, or the \
         weight or low-rank space, which need no inputs (a rollout wants one of these two)"
    )]
    RepeatedCalls {
        /// The path of the layer's parameter.
        path: String,
        /// Calls of the layer in a pass.
        calls: usize,
    },
    /// A pass that returns another number of rows than it was given.
    #[error(
        "{what} of the model: {got} rows where the pass has {rows}; a pass has one row per example, and \
         then one per query where it is perturbed: keep rows on the first axis, and join tensors by \
         probe.align, probe.add or probe.cat"
    )]
    RowCount {
        /// What has the wrong number: output, losses, …
        what: &'static str,
        /// Its rows.
        got: usize,
        /// Rows of the pass.
        rows: usize,
    },
    /// An allocator that gives examples unequal numbers of queries, although they share their
    /// noise.
    #[error(
        "the '{allocator}' allocator cannot be used with weight noise: the examples of a pass share that \
         noise, so unequal numbers of queries gain nothing; use the uniform allocator, or the activation or \
         low-rank space"
    )]
    SharedNoise {
        /// The name of the allocator.
        allocator: &'static str,
    },
    /// A setting that the perturbation space does not use.
    #[error("{setting} = {value} has no effect in the {space} space; leave it out, or use the {spaces} space")]
    UnusedSetting {
        /// The setting.
        setting: &'static str,
        /// Its value.
        value: String,
        /// The space.
        space: String,
        /// The spaces that use the setting.
        spaces: &'static str,
    },
    /// A parameter group without parameters.
    #[error("no parameter lies below '{path}'; name the fields from the optimised module down, such as model.head")]
    EmptyParamGroup {
        /// The path of the group.
        path: String,
    },
    /// A model without a trained parameter.
    #[error("the model has no trained parameter; unfreeze some of its parameters (Param::set_require_grad)")]
    NothingTrained,
    /// A scheme in which weights cannot be kept.
    #[error(
        "weights cannot be kept in the scheme {scheme}: use integers of 2, 4 or 8 bits (Q8S, Q4S, Q2S, or with F), \
         scales in f32, one for a parameter or for a block along its last axis, such as WeightScheme::Int8"
    )]
    QuantScheme {
        /// The scheme.
        scheme: String,
    },
    /// A model without a parameter that could be quantized.
    #[error(
        "no parameter of the model can be quantized ({report}); freeze matrices with no_grad, or choose a scheme \
         whose blocks divide their last axes, such as int8-tensor"
    )]
    NothingQuantized {
        /// What was found.
        report: String,
    },
    /// A record of another quantized model.
    #[error(
        "the record does not fit the quantized model: {why}; quantize the model with the settings of the saved one"
    )]
    QuantizedRecord {
        /// How they differ.
        why: String,
    },
    /// An estimate that follows a prediction, of a model that gives nothing to predict from.
    #[error(
        "a {estimate} estimate follows a prediction from the model's error signals, and the model has none; \
         implement ForwardModel::classification or ForwardModel::error_signals, or use an unbiased estimate"
    )]
    NoSignals {
        /// The [estimate](crate::GradientEstimate).
        estimate: &'static str,
    },
    /// Examples whose unperturbed loss is not finite, though training has not diverged.
    #[error(
        "the unperturbed loss is not finite for {count} of the examples of the batch (ids {ids}); look for NaN or \
         infinite values in their inputs and targets, for labels that are no class, or in the initial parameters \
         if every example is named"
    )]
    NonFiniteData {
        /// The number of such examples.
        count: usize,
        /// The first of their ids.
        ids: String,
    },
    /// Losses that were finite and no longer are, or many steps in a row without a finite loss.
    #[error(
        "training has diverged: {evidence} (sigma = {sigma}, lr = {lr}); lower lr, or sigma, and resume \
         from the last checkpoint"
    )]
    Diverged {
        /// What shows it.
        evidence: String,
        /// The smoothing scale; 0 in backpropagation.
        sigma: f64,
        /// The learning rate of the last update.
        lr: f64,
    },
    /// Training by burn-train's multi-device strategy.
    #[error(
        "burn-train's multi-device strategy adds up the updates of its devices, which no seed makes repeatable, \
         and keeps what one of them learned; train with ExecutionStrategy::SingleDevice, and give the learner an \
         executor by ForwardLearner::with_executor: Devices for the devices of this machine, or one of \
         flops-distributed"
    )]
    MultiDevice,
    /// A job of a step panicked on a worker that others depend on.
    #[error("a job of the step panicked: {why}; the run can be resumed from its last checkpoint")]
    JobPanicked {
        /// What the panic says.
        why: String,
    },
    /// Other workers fail, or differ from this one.
    #[error(transparent)]
    Executor(#[from] crate::executor::ExecutorError),
    /// The allocator's update has another type than the allocator takes.
    #[error(
        "the update of allocator '{allocator}' has a foreign type and is lost; let `Allocator::Update` be \
         one type on both backends"
    )]
    ForeignUpdate {
        /// Name of the allocator.
        allocator: &'static str,
    },
}

impl Error {
    /// Whether a later step may succeed where this one failed.
    ///
    /// A batch may be broken, a remote part may answer again, a loss may become finite. All other
    /// errors are of the configuration, the model or the form of the batches: they never pass.
    pub fn may_pass(&self) -> bool {
        match self {
            Self::EmptyBatch
            | Self::NonFiniteData { .. }
            | Self::Diverged { .. }
            | Self::Model { .. }
            | Self::Value { .. } => true,
            Self::Executor(error) => error.may_pass(),
            _ => false,
        }
    }
}
