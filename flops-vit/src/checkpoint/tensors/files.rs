//! Reads the tensors of files and folders.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use burn_store::pytorch::{PytorchError, PytorchReader};
use burn_store::{ModuleStore, SafetensorsStore, TensorSnapshot};
use serde::Deserialize;

use crate::checkpoint::file::{check_intact, json, read};
use crate::checkpoint::table::called;
use crate::error::{CheckpointError, VitError};

/// Names of the files that may hold a model's weights, in the order in which they are tried.
pub(in crate::checkpoint) const WEIGHTS: [&str; 4] =
    ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"];

/// `*.index.json`: the shard of each tensor.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// Returns the shards that an index names.
pub(in crate::checkpoint) fn shards(index: &Path) -> Result<BTreeSet<String>, CheckpointError> {
    let shards: BTreeSet<String> = json::<Index>(index)?.weight_map.into_values().collect();
    match shards.iter().find(|name| Path::new(name).file_name() != Some(name.as_ref())) {
        Some(name) => Err(CheckpointError::Json(format!("'{name}' is no file name"))),
        None if shards.is_empty() => Err(CheckpointError::Json("it names no shard".into())),
        None => Ok(shards),
    }
}

/// Reads the weights of a folder: the name of their file, and its tensors.
///
/// # Errors
/// [`VitError::Checkpoint`] where there is no such file, or it cannot be read.
pub fn of_folder(dir: &Path) -> Result<(&'static str, Vec<TensorSnapshot>), VitError> {
    let named = |path: &Path, why| VitError::Checkpoint { path: path.display().to_string(), why };
    let name = WEIGHTS.into_iter().find(|name| dir.join(name).exists());
    let name = name.ok_or_else(|| named(dir, CheckpointError::NoWeights { looked_for: WEIGHTS.join(", ") }))?;
    let found = of_file(&dir.join(name)).map_err(|why| named(&dir.join(name), why))?;
    Ok((name, found))
}

/// Reads the tensors of a file, whose extension tells its format.
///
/// It is an index with its shards (`.json`), PyTorch's (`.bin`, `.pth`, `.pt`), or else
/// safetensors.
pub(in crate::checkpoint) fn of_file(path: &Path) -> Result<Vec<TensorSnapshot>, CheckpointError> {
    let extension = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
    match extension.as_str() {
        "json" => {
            let mut all = vec![];
            for shard in shards(path)? {
                let found = of_file(&path.with_file_name(&shard));
                all.extend(found.map_err(|why| CheckpointError::Shard { name: shard, why: Box::new(why) })?);
            }
            Ok(all)
        }
        "bin" | "pth" | "pt" => of_pytorch(path),
        _ => of_safetensors(read(path)?),
    }
}

/// Reads the tensors of a file in PyTorch's format, or of the state dict in it.
fn of_pytorch(path: &Path) -> Result<Vec<TensorSnapshot>, CheckpointError> {
    if std::fs::metadata(path).map_err(CheckpointError::Read)?.len() == 0 {
        return Err(CheckpointError::Empty);
    }
    // training scripts save the weights beside other things, under one of these keys
    let nested = ["state_dict", "model", "model_state_dict"];
    let fail = |e: PytorchError| CheckpointError::Pytorch(e.to_string());
    let whole = PytorchReader::new(path).map_err(fail)?;
    let inside = |key: &&&str| whole.keys().iter().any(|name| name.starts_with(&format!("{key}.")));
    let file = match nested.iter().find(inside) {
        Some(key) => PytorchReader::with_top_level_key(path, key).map_err(fail)?,
        None => whole,
    };
    let mut tensors: Vec<(String, TensorSnapshot)> = file.into_tensors().into_iter().collect();
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    // the reader may have split the names in another way
    Ok(tensors.into_iter().map(|(name, tensor)| called(tensor, &name)).collect())
}

/// Reads the tensors of a safetensors file; their values are read later.
///
/// # Errors
/// [`CheckpointError::Empty`] or [`CheckpointError::Malformed`].
pub fn of_safetensors(bytes: Vec<u8>) -> Result<Vec<TensorSnapshot>, CheckpointError> {
    check_intact(&bytes)?;
    let mut store = SafetensorsStore::from_bytes(Some(bytes));
    let tensors = store.get_all_snapshots().map_err(|e| CheckpointError::Malformed(e.to_string()))?;
    Ok(tensors.values().cloned().collect())
}
