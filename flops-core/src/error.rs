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
        "{missed} of {trained} trained parameters belong to no layer called through the probe, and the activation and low-rank spaces perturb only those; call their layers as probe.linear(&layer, x) or the like, make other kinds of layers (a convolution with groups is one) sites by Probe::site, freeze them, or use the weight space"
    )]
    NotSites {
        /// The number of trained parameters out of reach.
        missed: usize,
        /// The number of all trained parameters.
        trained: usize,
    },
    /// A layer under a token mask that does not say how its squared score norm is spread over the
    /// tokens.
    #[error(
        "a site under a token mask gives its squared score norm in {got} parts where {expected} tokens are masked; give squares of shape [rows, tokens] (SquaredScoreNorm::of_inputs on an input [rows, tokens, …] does), or call the layer inside probe.unmasked"
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
        "{count} parameters have exact gradients and are called through the probe; call their layers without it, so that no query perturbs them"
    )]
    ExactSites {
        /// The number of such parameters.
        count: usize,
    },
    /// An allocator that gives examples unequal numbers of queries, although they share their
    /// noise.
    #[error(
        "the '{allocator}' allocator cannot be used with weight noise: the examples of a pass share that noise, so unequal numbers of queries gain nothing; use the uniform allocator, or the activation or low-rank space"
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
    #[error("the model has no trained parameter; leave some of them unfrozen")]
    NothingTrained,
    /// Examples whose unperturbed loss is not finite.
    #[error(
        "the unperturbed loss of {count} examples of the batch is not finite (ids {ids}); look for NaN or infinite values in their inputs and targets"
    )]
    NonFiniteData {
        /// The number of such examples.
        count: usize,
        /// The first of their ids.
        ids: String,
    },
    /// Many steps in a row without a finite loss.
    #[error(
        "no finite loss in {steps} steps in a row: training has diverged (sigma = {sigma}, lr = {lr}); lower lr, or sigma, and resume from the last checkpoint"
    )]
    Diverged {
        /// The number of steps.
        steps: usize,
        /// The smoothing scale.
        sigma: f64,
        /// The learning rate of the last update.
        lr: f64,
    },
    /// The allocator's update has another type than the allocator takes.
    #[error(
        "the update of allocator '{allocator}' has a foreign type and is lost; let `Allocator::Update` be one type on both backends"
    )]
    ForeignUpdate {
        /// Name of the allocator.
        allocator: &'static str,
    },
}
