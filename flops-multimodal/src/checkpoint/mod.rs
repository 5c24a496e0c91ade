//! Towers from the folders that HuggingFace's hub has, and a sentence encoder back into one.
//!
//! A folder holds `config.json`, the weights (`model.safetensors`, `pytorch_model.bin`, or either in shards with an index) and, for texts,
//! `tokenizer.json`. Weights in f16 and bf16 become f32. A file that does not fit is an error that lists the parameters at fault.

pub mod alignment;
pub mod bert;
pub mod clip;

use std::path::Path;

use flops_vit::checkpoint::tensors::{Table, TensorSnapshot, called, to_ours};
use flops_vit::error::CheckpointError;

use crate::error::MultimodalError;
use crate::tokenizer::TextTokenizer;
use crate::towers::Activation;

/// `config.json` of a folder.
const CONFIG: &str = "config.json";
/// The description of a tokenizer in a folder.
const TOKENIZER: &str = "tokenizer.json";

/// The error of a file in a folder.
fn in_file(dir: &Path, name: &str, why: CheckpointError) -> MultimodalError {
    MultimodalError::Checkpoint { path: dir.join(name).display().to_string(), why }
}

/// The tokenizer of a folder, where there is one.
fn tokenizer(dir: &Path) -> Result<Option<TextTokenizer>, MultimodalError> {
    let path = dir.join(TOKENIZER);
    path.exists().then(|| TextTokenizer::from_file(&path)).transpose()
}

/// Whether a setting is one that can be loaded.
fn only(field: &'static str, value: &str, supported: &[&str]) -> Result<(), CheckpointError> {
    match supported.contains(&value) {
        true => Ok(()),
        false => Err(CheckpointError::Unsupported { field, value: value.into(), supported: supported.join(" or ") }),
    }
}

/// HuggingFace's names of activations.
const ACTIVATIONS: [(&str, Activation); 2] = [("gelu", Activation::Gelu), ("quick_gelu", Activation::QuickGelu)];

fn activation(name: &str) -> Result<Activation, CheckpointError> {
    only("hidden_act", name, &ACTIVATIONS.map(|(name, _)| name))?;
    Ok(ACTIVATIONS.into_iter().find_map(|(known, a)| (known == name).then_some(a)).unwrap_or_default())
}

/// A model cannot have more layers than its file has tensors: told before memory is set aside for them.
fn check_depth(depth: usize, tensors: &[TensorSnapshot]) -> Result<(), CheckpointError> {
    if depth > tensors.len() {
        let why = format!("num_hidden_layers = {depth}, but the weights are {} tensors", tensors.len());
        return Err(CheckpointError::Json(why));
    }
    Ok(())
}

/// Their tensors under our names; one that has no name of ours keeps its own.
fn renamed(table: Table, tensors: Vec<(String, TensorSnapshot)>) -> Vec<TensorSnapshot> {
    let ours = |name: String| to_ours(table, &name).unwrap_or(name);
    tensors.into_iter().map(|(name, tensor)| called(tensor, &ours(name))).collect()
}
