//! Tensor files: safetensors and PyTorch's, whole or in shards.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::rc::Rc;

use burn::tensor::{DType, TensorData};
use burn_store::pytorch::PytorchReader;
use burn_store::{ModuleAdapter, SafetensorsStore, TensorSnapshot};
use safetensors::SafeTensors;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::CheckpointError;
use burn_store::ModuleStore;

/// The files a model's weights may be in, in the order in which they are looked for.
pub(super) const WEIGHTS: [&str; 4] =
    ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"];

/// `*.index.json`: which shard has which tensor.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// The shards that an index names.
pub(super) fn shards(index: &Path) -> Result<BTreeSet<String>, CheckpointError> {
    let shards: BTreeSet<String> = json::<Index>(index)?.weight_map.into_values().collect();
    match shards.iter().find(|name| Path::new(name).file_name() != Some(name.as_ref())) {
        Some(name) => Err(CheckpointError::Json(format!("'{name}' is no file name"))),
        None if shards.is_empty() => Err(CheckpointError::Json("it names no shard".into())),
        None => Ok(shards),
    }
}

/// A JSON file.
pub(super) fn json<T: DeserializeOwned>(path: &Path) -> Result<T, CheckpointError> {
    serde_json::from_slice(&read(path)?).map_err(|e| CheckpointError::Json(e.to_string()))
}

pub(super) fn read(path: &Path) -> Result<Vec<u8>, CheckpointError> {
    std::fs::read(path).map_err(CheckpointError::Read)
}

/// The tensors of a file: an index with its shards, PyTorch's (`.bin`, `.pth`, `.pt`), or else safetensors.
pub(super) fn of_file(path: &Path) -> Result<Vec<TensorSnapshot>, CheckpointError> {
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

/// The tensors of PyTorch's file, or of the state dict in it.
fn of_pytorch(path: &Path) -> Result<Vec<TensorSnapshot>, CheckpointError> {
    if std::fs::metadata(path).map_err(CheckpointError::Read)?.len() == 0 {
        return Err(CheckpointError::Empty);
    }
    // training scripts keep the weights beside other things; what is nested comes with its key in front
    let nested = ["state_dict", "model", "model_state_dict"];
    let fail = |e: burn_store::pytorch::PytorchError| CheckpointError::Pytorch(e.to_string());
    let whole = PytorchReader::new(path).map_err(fail)?;
    let inside = |key: &&&str| whole.keys().iter().any(|name| name.starts_with(&format!("{key}.")));
    let file = match nested.iter().find(inside) {
        Some(key) => PytorchReader::with_top_level_key(path, key).map_err(fail)?,
        None => whole,
    };
    let mut tensors: Vec<(String, TensorSnapshot)> = file.into_tensors().into_iter().collect();
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    // keys are flat names here, whatever the reader made of the dots in them
    let named = tensors.into_iter().map(|(name, mut tensor)| {
        tensor.path_stack = Some(name.split('.').map(String::from).collect());
        tensor
    });
    Ok(named.collect())
}

pub(super) fn check_intact(bytes: &[u8]) -> Result<(), CheckpointError> {
    if bytes.is_empty() {
        return Err(CheckpointError::Empty);
    }
    SafeTensors::deserialize(bytes).map(|_| ()).map_err(|e| CheckpointError::Malformed(e.to_string()))
}

/// The tensors of a safetensors file, not yet read.
pub(super) fn of_safetensors(bytes: Vec<u8>) -> Result<Vec<TensorSnapshot>, CheckpointError> {
    check_intact(&bytes)?;
    let mut store = SafetensorsStore::from_bytes(Some(bytes));
    let tensors = store.get_all_snapshots().map_err(|e| CheckpointError::Malformed(e.to_string()))?;
    Ok(tensors.values().cloned().collect())
}

/// A tensor's numbers in f32.
pub(super) fn values(tensor: &TensorSnapshot) -> Result<TensorData, CheckpointError> {
    match tensor.dtype.is_float() {
        true => Ok(tensor.to_data().map_err(|e| CheckpointError::Malformed(e.to_string()))?.convert_dtype(DType::F32)),
        false => Err(CheckpointError::DType { name: tensor.full_path(), dtype: format!("{:?}", tensor.dtype) }),
    }
}

/// The tensor in `parts` parts of equally many rows.
pub(super) fn split_rows(tensor: &TensorSnapshot, parts: usize) -> Result<Vec<TensorSnapshot>, CheckpointError> {
    let data = values(tensor)?;
    let mut shape = data.shape.to_vec();
    if !shape.first().is_some_and(|rows| *rows > 0 && rows.is_multiple_of(parts)) {
        let why = format!("{} is {shape:?}, expected rows in {parts} equal parts", tensor.full_path());
        return Err(CheckpointError::Shapes(vec![why]));
    }
    shape[0] /= parts;
    let all: Vec<f32> = data.to_vec().map_err(|e| CheckpointError::Malformed(format!("{e:?}")))?;
    Ok(all.chunks_exact(all.len() / parts).map(|part| of_values(part.to_vec(), shape.clone())).collect())
}

/// A tensor without a name.
pub(super) fn of_values(values: Vec<f32>, shape: Vec<usize>) -> TensorSnapshot {
    TensorSnapshot::from_data(TensorData::new(values, shape), vec![], vec![], Default::default())
}

/// Tensors of other precisions become f32 when they are loaded, whatever layer they belong to.
#[derive(Clone)]
pub(super) struct ToFull;

impl ModuleAdapter for ToFull {
    fn adapt(&self, snapshot: &TensorSnapshot) -> TensorSnapshot {
        if snapshot.dtype == DType::F32 {
            return snapshot.clone();
        }
        let data = snapshot.clone_data_fn();
        TensorSnapshot::from_closure(
            Rc::new(move || Ok(data()?.convert_dtype(DType::F32))),
            DType::F32,
            snapshot.shape.clone(),
            snapshot.path_stack.clone().unwrap_or_default(),
            snapshot.container_stack.clone().unwrap_or_default(),
            snapshot.tensor_id.unwrap_or_default(),
        )
    }

    fn clone_box(&self) -> Box<dyn ModuleAdapter> {
        Box::new(self.clone())
    }
}
