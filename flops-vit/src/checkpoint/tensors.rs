//! Files of tensors, safetensors and PyTorch's, whole or in shards, and how any module takes its parameters from them and gives them back.
//!
//! What a model of another library needs beside a configuration is a table of names: read its tensors ([`of_folder`], [`of_safetensors`]), give
//! them our names ([`to_ours`], [`called`]), and [`fill`] a module; [`to_pytorch`] writes it back.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::rc::Rc;

use burn::prelude::*;
use burn::tensor::DType;
use burn_store::pytorch::PytorchReader;
use burn_store::{
    ApplyError, ApplyResult, BurnToPyTorchAdapter, ModuleAdapter, ModuleSnapshot, ModuleStore, PyTorchToBurnAdapter,
    SafetensorsStore,
};
use safetensors::tensor::{Dtype, TensorView};
use safetensors::{SafeTensorError, SafeTensors};
use serde::Deserialize;
use serde::de::DeserializeOwned;

pub use super::names::{Table, called, to_ours, to_theirs};
use crate::error::{CheckpointError, VitError};
pub use burn_store::TensorSnapshot;

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
///
/// # Errors
/// [`CheckpointError::Read`] or [`CheckpointError::Json`].
pub fn json<T: DeserializeOwned>(path: &Path) -> Result<T, CheckpointError> {
    serde_json::from_slice(&read(path)?).map_err(|e| CheckpointError::Json(e.to_string()))
}

/// A whole file.
///
/// # Errors
/// [`CheckpointError::Read`].
pub fn read(path: &Path) -> Result<Vec<u8>, CheckpointError> {
    std::fs::read(path).map_err(CheckpointError::Read)
}

/// The name of the file that holds the weights of a folder, and its tensors.
///
/// # Errors
/// [`VitError::Checkpoint`] where there is none, or it cannot be read.
pub fn of_folder(dir: &Path) -> Result<(&'static str, Vec<TensorSnapshot>), VitError> {
    let named = |path: &Path, why| VitError::Checkpoint { path: path.display().to_string(), why };
    let name = WEIGHTS.into_iter().find(|name| dir.join(name).exists());
    let name = name.ok_or_else(|| named(dir, CheckpointError::NoWeights { looked_for: WEIGHTS.join(", ") }))?;
    let found = of_file(&dir.join(name)).map_err(|why| named(&dir.join(name), why))?;
    Ok((name, found))
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
///
/// # Errors
/// [`CheckpointError::Empty`] or [`CheckpointError::Malformed`].
pub fn of_safetensors(bytes: Vec<u8>) -> Result<Vec<TensorSnapshot>, CheckpointError> {
    check_intact(&bytes)?;
    let mut store = SafetensorsStore::from_bytes(Some(bytes));
    let tensors = store.get_all_snapshots().map_err(|e| CheckpointError::Malformed(e.to_string()))?;
    Ok(tensors.values().cloned().collect())
}

/// A tensor's numbers in f32.
///
/// # Errors
/// [`CheckpointError::DType`] where they are no floating-point numbers, [`CheckpointError::Malformed`] where they cannot be read.
pub fn values(tensor: &TensorSnapshot) -> Result<TensorData, CheckpointError> {
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

/// The tensor of another shape with the same numbers in it; as it is, where their count is another, so that [`fill`] tells the shapes.
///
/// # Errors
/// As [`values`].
pub fn reshaped(tensor: TensorSnapshot, shape: &[usize]) -> Result<TensorSnapshot, CheckpointError> {
    let data = values(&tensor)?;
    if data.num_elements() != shape.iter().product::<usize>() {
        return Ok(tensor);
    }
    let data: Vec<f32> = data.to_vec().map_err(|e| CheckpointError::Malformed(format!("{e:?}")))?;
    Ok(called(of_values(data, shape.to_vec()), &tensor.full_path()))
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

/// The module with every parameter taken from `tensors`, which are named as in the module and laid out as PyTorch's; other precisions become f32.
///
/// A module whose parameters are not made yet makes none that is not taken.
///
/// # Errors
/// Where parameters are missing, tensors are not the module's, shapes differ (all are listed), or a weight is not finite.
pub fn fill<B: Backend, M: Module<B>>(module: M, tensors: Vec<TensorSnapshot>) -> Result<M, CheckpointError> {
    apply(module, tensors, PyTorchToBurnAdapter)
}

/// The same for any layout.
pub(super) fn apply<B: Backend, M: Module<B>>(
    mut module: M,
    tensors: Vec<TensorSnapshot>,
    layout: impl ModuleAdapter + 'static,
) -> Result<M, CheckpointError> {
    if let Some(tensor) = tensors.iter().find(|t| !t.dtype.is_float()) {
        return Err(CheckpointError::DType { name: tensor.full_path(), dtype: format!("{:?}", tensor.dtype) });
    }
    // sizes are compared before anything is allocated, however large the configuration says the module is
    let result = module.apply(tensors, None, Some(Box::new(ToFull.chain(layout))), false);
    refuse(result)?;
    check_finite(&module.collect(None, None, false))?;
    Ok(module)
}

/// The module as a safetensors file of PyTorch's layout, in f16 where `half` says so; `theirs` gives each parameter its name.
///
/// # Errors
/// What went wrong, in words: a parameter without a name, or one that is not finite (or is too large for f16).
pub fn to_pytorch<B: Backend, M: Module<B>>(
    module: &M,
    half: bool,
    theirs: impl Fn(&str) -> Option<String>,
) -> Result<Vec<u8>, String> {
    let ours = module.collect(None, None, false);
    check_finite(&ours).map_err(|e| e.to_string())?;
    let mut tensors = vec![];
    // the adapter turns linear layers, and has names of its own for some parameters
    for (named, tensor) in ours.iter().zip(module.collect(None, Some(Box::new(BurnToPyTorchAdapter)), false)) {
        let ours = named.full_path();
        let name = theirs(&ours).ok_or_else(|| format!("{ours} has no name in transformers"))?;
        let data = values(&tensor).map_err(|e| e.to_string())?;
        let bytes: Vec<u8> = match half {
            false => data.iter::<f32>().flat_map(f32::to_le_bytes).collect(),
            true => {
                let halves: Vec<half::f16> = data.iter::<f32>().map(half::f16::from_f32).collect();
                if halves.iter().any(|x| !x.is_finite()) {
                    return Err(format!("{ours} has values too large for f16; save in full precision"));
                }
                halves.into_iter().flat_map(half::f16::to_le_bytes).collect()
            }
        };
        tensors.push((name, data.shape.to_vec(), bytes));
    }
    let dtype = if half { Dtype::F16 } else { Dtype::F32 };
    let views = tensors.iter().map(|(name, shape, bytes)| Ok((name, TensorView::new(dtype, shape.clone(), bytes)?)));
    let views: Result<Vec<_>, SafeTensorError> = views.collect();
    // transformers asks for this key
    let metadata = [("format".to_string(), "pt".to_string())].into();
    views.and_then(|v| safetensors::serialize(v, Some(metadata))).map_err(|e| e.to_string())
}

/// What a file and a model do not agree in.
pub(super) fn refuse(result: ApplyResult) -> Result<(), CheckpointError> {
    if !result.missing.is_empty() {
        return Err(CheckpointError::Missing(result.missing.into_iter().map(|(name, _)| name).collect()));
    }
    if !result.errors.is_empty() {
        return Err(CheckpointError::Shapes(result.errors.iter().map(describe).collect()));
    }
    if !result.unused.is_empty() {
        return Err(CheckpointError::Unexpected(result.unused));
    }
    Ok(())
}

fn describe(error: &ApplyError) -> String {
    match error {
        ApplyError::ShapeMismatch { path, expected, found } => {
            format!("{path} is {:?}, expected {:?}", found.as_slice(), expected.as_slice())
        }
        other => other.to_string(),
    }
}

/// Whether all numbers are.
pub(super) fn check_finite(tensors: &[TensorSnapshot]) -> Result<(), CheckpointError> {
    for tensor in tensors {
        let data = tensor.to_data().map_err(|e| CheckpointError::Malformed(e.to_string()))?;
        if data.iter::<f32>().any(|x| !x.is_finite()) {
            return Err(CheckpointError::NonFinite { name: tensor.full_path() });
        }
    }
    Ok(())
}
