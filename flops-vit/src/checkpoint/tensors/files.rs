//! Reads the tensors of files and folders.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use burn_store::{ModuleStore, SafetensorsStore, TensorSnapshot};
use serde::Deserialize;

use crate::checkpoint::file::{Format, check_intact, json, read};
use crate::checkpoint::pytorch;
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

/// Reads the tensors of a file: an index with its shards (`.json`), PyTorch's, or safetensors.
///
/// What training scripts put in front of every name is left out.
pub(in crate::checkpoint) fn of_file(path: &Path) -> Result<Vec<TensorSnapshot>, CheckpointError> {
    if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("json")) {
        return of_shards(path).map(unwrapped);
    }
    let tensors = match Format::of(path)? {
        Format::Pytorch => pytorch::read(path)?,
        Format::Safetensors => of_safetensors(read(path)?)?,
    };
    Ok(unwrapped(tensors))
}

/// Reads the tensors of the shards that an index names.
fn of_shards(index: &Path) -> Result<Vec<TensorSnapshot>, CheckpointError> {
    let (mut all, mut shard_of) = (vec![], BTreeMap::new());
    for name in shards(index)? {
        let path = index.with_file_name(&name);
        let in_shard = |why| CheckpointError::Shard { name: name.clone(), why: Box::new(why) };
        // an index is no shard, its own least of all
        let found = match path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("json")) {
            true => Err(CheckpointError::Json("a shard is no index".into())),
            false => of_file(&path),
        };
        for tensor in found.map_err(in_shard)? {
            if let Some(other) = shard_of.insert(tensor.full_path(), name.clone()) {
                let tensor = tensor.full_path();
                return Err(CheckpointError::Json(format!("'{tensor}' is in two shards, {other} and {name}")));
            }
            all.push(tensor);
        }
    }
    Ok(all)
}

/// What wrappers of modules put in front of every name: data parallelism, `torch.compile`, and
/// trainers with the model as an attribute.
const WRAPPERS: [&str; 3] = ["module.", "_orig_mod.", "model."];

/// Leaves out the names of wrappers, where all tensors have them.
pub(in crate::checkpoint) fn unwrapped(mut tensors: Vec<TensorSnapshot>) -> Vec<TensorSnapshot> {
    let shared = |tensors: &[TensorSnapshot]| {
        WRAPPERS.into_iter().find(|wrapper| {
            !tensors.is_empty()
                && tensors
                    .iter()
                    .all(|tensor| tensor.full_path().len() > wrapper.len() && tensor.full_path().starts_with(wrapper))
        })
    };
    while let Some(wrapper) = shared(&tensors) {
        let bare = |tensor: TensorSnapshot| {
            let name = tensor.full_path();
            called(tensor, &name[wrapper.len()..])
        };
        tensors = tensors.into_iter().map(bare).collect();
    }
    tensors
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
