//! What can go wrong, each kind with the offending value and the remedy.

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
    /// A batch without data.
    #[error("the batch holds 0 data; drop empty batches before the training step")]
    EmptyBatch,
    /// A per-datum value that is not a usable number.
    #[error("{name}[{index}] = {value}; {remedy}")]
    Value {
        /// What the value is: `losses`, `variances`, …
        name: &'static str,
        /// Position in the batch.
        index: usize,
        /// The value.
        value: f64,
        /// What to do about it.
        remedy: &'static str,
    },
    /// Per-datum inputs that do not belong to one batch.
    #[error("{name} has {got} entries where {expected} are expected; pass one entry per datum of the batch")]
    Length {
        /// What has the wrong length.
        name: &'static str,
        /// Its length.
        got: usize,
        /// The length expected.
        expected: usize,
    },
    /// A name that stands for nothing.
    #[error("unknown {what} '{name}'; choose one of {choices}")]
    Unknown {
        /// What was asked for: `allocator`, …
        what: &'static str,
        /// The name given.
        name: String,
        /// The names there are.
        choices: &'static str,
    },
    /// Activation noise without a place to fall on.
    #[error(
        "{missed} of {trained} trained parameters belong to no layer called through the probe: activation noise cannot reach them; call their layers as probe.linear(&layer, x), freeze them, or use the weights space"
    )]
    NotSites {
        /// Trained parameters out of reach.
        missed: usize,
        /// All trained parameters.
        trained: usize,
    },
    /// A part of the model that is out of its hands has failed.
    #[error("the model cannot answer: {why}")]
    Model {
        /// What the model [says](crate::ForwardModel::failure) of it.
        why: String,
    },
    /// A parameter whose gradient is known in closed form is called through the probe as well.
    #[error(
        "{count} parameters have exact gradients and are called through the probe; call their layers without it, so that no query perturbs them"
    )]
    ExactSites {
        /// How many.
        count: usize,
    },
    /// Nothing to estimate a gradient for.
    #[error("the model has no trained parameter; leave some of them unfrozen")]
    NothingTrained,
    /// Data whose loss is not a number before anything is perturbed.
    #[error(
        "the unperturbed loss of {count} data of the batch is not finite (data ids {ids}); look for NaN or infinite values in their inputs and targets"
    )]
    NonFiniteData {
        /// How many.
        count: usize,
        /// The first of their ids.
        ids: String,
    },
    /// Step after step without a usable loss.
    #[error(
        "no finite loss in {steps} steps in a row: training has diverged (sigma = {sigma}, lr = {lr}); lower lr, or sigma, and resume from the last checkpoint"
    )]
    Diverged {
        /// Steps without a finite loss.
        steps: usize,
        /// The smoothing scale.
        sigma: f64,
        /// The learning rate of the last update.
        lr: f64,
    },
}
