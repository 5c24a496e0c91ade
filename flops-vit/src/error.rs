//! What can go wrong with a model.

/// The errors of models, scopes and checkpoints.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VitError {
    /// A preset that does not exist.
    #[error("unknown preset '{name}'; choose one of {}", crate::config::PRESETS.join(", "))]
    UnknownPreset {
        /// The name given.
        name: String,
    },
    /// Sizes that do not fit together.
    #[error("invalid ViT configuration: {field} = {value}; {remedy}")]
    Config {
        /// The size at fault.
        field: &'static str,
        /// Its value.
        value: usize,
        /// What to do about it.
        remedy: &'static str,
    },
    /// A checkpoint that cannot be loaded.
    #[error("cannot load {path}: {why}")]
    Checkpoint {
        /// The file.
        path: String,
        /// What is wrong with it.
        why: String,
    },
    /// A checkpoint that cannot be written.
    #[error("cannot write {}: {why}; choose a folder that can be written", path.display())]
    Save {
        /// The file.
        path: std::path::PathBuf,
        /// What went wrong.
        why: String,
    },
}
