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
}
