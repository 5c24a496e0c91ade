//! What the importers of HuggingFace folders share.

use std::path::Path;

use flops_vit::checkpoint::tensors::{Table, TensorSnapshot, called, to_ours};
use flops_vit::error::CheckpointError;

use crate::error::MultimodalError;
use crate::tokenizer::TextTokenizer;
use crate::towers::Activation;

/// Name of the configuration file.
pub(super) const CONFIG: &str = "config.json";
/// Name of the tokenizer file.
pub(super) const TOKENIZER: &str = "tokenizer.json";
/// Name of the weights file that is written.
pub(super) const WEIGHTS: &str = "model.safetensors";
/// HuggingFace's names of activation functions.
pub(super) const ACTIVATIONS: [(&str, Activation); 2] =
    [("gelu", Activation::Gelu), ("quick_gelu", Activation::QuickGelu)];

/// The error of a file in a folder.
pub(super) fn error_in(dir: &Path, name: &str, why: CheckpointError) -> MultimodalError {
    MultimodalError::Checkpoint { path: dir.join(name).display().to_string(), why }
}

/// The tokenizer of a folder, if it has one.
pub(super) fn tokenizer(dir: &Path) -> Result<Option<TextTokenizer>, MultimodalError> {
    let path = dir.join(TOKENIZER);
    path.exists().then(|| TextTokenizer::from_file(&path)).transpose()
}

/// Checks that the value of a setting is supported.
pub(super) fn check_supported(field: &'static str, value: &str, supported: &[&str]) -> Result<(), CheckpointError> {
    match supported.contains(&value) {
        true => Ok(()),
        false => Err(CheckpointError::Unsupported { field, value: value.into(), supported: supported.join(" or ") }),
    }
}

/// The activation function with HuggingFace's name `name`.
pub(super) fn activation(name: &str) -> Result<Activation, CheckpointError> {
    check_supported("hidden_act", name, &ACTIVATIONS.map(|(name, _)| name))?;
    Ok(ACTIVATIONS.into_iter().find_map(|(known, a)| (known == name).then_some(a)).unwrap_or_default())
}

/// Checks, before memory is allocated, that a model has no more layers than its file has tensors.
pub(super) fn check_depth(depth: usize, tensors: &[TensorSnapshot]) -> Result<(), CheckpointError> {
    if depth > tensors.len() {
        let why = format!("num_hidden_layers = {depth}, but the weights are {} tensors", tensors.len());
        return Err(CheckpointError::Json(why));
    }
    Ok(())
}

/// Renames tensors from HuggingFace's names to ours. A tensor that is not in the table keeps its
/// name.
pub(super) fn renamed(table: Table, tensors: Vec<(String, TensorSnapshot)>) -> Vec<TensorSnapshot> {
    let ours = |name: String| to_ours(table, &name).unwrap_or(name);
    tensors.into_iter().map(|(name, tensor)| called(tensor, &ours(name))).collect()
}
