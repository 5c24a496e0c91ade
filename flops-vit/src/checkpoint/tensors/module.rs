//! Fills modules with tensors, and writes them.

use std::rc::Rc;

use burn::prelude::*;
use burn::tensor::DType;
use burn_store::{
    ApplyError, ApplyResult, BurnToPyTorchAdapter, ModuleAdapter, ModuleSnapshot, PyTorchToBurnAdapter, TensorSnapshot,
};
use safetensors::SafeTensorError;
use safetensors::tensor::{Dtype, TensorView};

use super::values::{check_finite, values};
use crate::error::CheckpointError;

/// Converts tensors of all layers to f32 when they are loaded.
#[derive(Clone)]
pub(in crate::checkpoint) struct ToFull;

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

/// Fills a module with `tensors`, which have the module's names and PyTorch's layout.
///
/// Other precisions become f32. Lazy parameters are not drawn first.
///
/// # Errors
/// Where parameters are missing, tensors are unknown, shapes differ (all are listed), or a weight
/// is not finite.
pub fn fill<B: Backend, M: Module<B>>(module: M, tensors: Vec<TensorSnapshot>) -> Result<M, CheckpointError> {
    apply(module, tensors, PyTorchToBurnAdapter)
}

/// Fills a module with tensors of any layout.
pub(in crate::checkpoint) fn apply<B: Backend, M: Module<B>>(
    mut module: M,
    tensors: Vec<TensorSnapshot>,
    layout: impl ModuleAdapter + 'static,
) -> Result<M, CheckpointError> {
    if let Some(tensor) = tensors.iter().find(|t| !t.dtype.is_float()) {
        return Err(CheckpointError::DType { name: tensor.full_path(), dtype: format!("{:?}", tensor.dtype) });
    }
    // shapes are compared before anything is allocated, however large the configured module is
    let result = module.apply(tensors, None, Some(Box::new(ToFull.chain(layout))), false);
    refuse(result)?;
    check_finite(&module.collect(None, None, false))?;
    Ok(module)
}

/// Writes a module as a safetensors file of PyTorch's layout, in f16 where `half` is set.
///
/// `theirs` names each parameter.
///
/// # Errors
/// A message where a parameter has no name, is not finite, or is too large for f16.
pub fn to_pytorch<B: Backend, M: Module<B>>(
    module: &M,
    half: bool,
    theirs: impl Fn(&str) -> Option<String>,
) -> Result<Vec<u8>, String> {
    let ours = module.collect(None, None, false);
    check_finite(&ours).map_err(|e| e.to_string())?;
    let mut tensors = vec![];
    // the adapter transposes linear layers, and renames some parameters
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
    // transformers requires this key
    let metadata = [("format".to_string(), "pt".to_string())].into();
    views.and_then(|v| safetensors::serialize(v, Some(metadata))).map_err(|e| e.to_string())
}

/// Turns differences between a file and a model into an error.
pub(in crate::checkpoint) fn refuse(result: ApplyResult) -> Result<(), CheckpointError> {
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
