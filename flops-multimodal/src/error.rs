//! What can go wrong, each kind with the offending value and the remedy.

/// The errors of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MultimodalError {
    /// Sizes that cannot be.
    #[error("invalid configuration: {field} = {value}; {remedy}")]
    Config {
        /// The setting at fault.
        field: &'static str,
        /// Its value.
        value: String,
        /// What to do about it.
        remedy: String,
    },
}
