//! LayerScale (Touvron et al. 2021, arXiv 2103.17239): a factor for each output of a branch.
//!
//! γ·(Wx + b) = (γW)x + γb, so the factors go into the layer in front of them.

use std::collections::BTreeMap;

use burn_store::TensorSnapshot;

use super::super::table::called;
use super::super::tensors::{of_values, values};
use crate::error::CheckpointError;

/// The layer that a factor belongs to, by its name.
fn layer(name: &str) -> Option<String> {
    let of = |suffix: &str, layer: &str| name.strip_suffix(suffix).map(|block| format!("{block}.{layer}"));
    of(".ls1.gamma", "attn.proj").or_else(|| of(".ls2.gamma", "mlp.fc2"))
}

/// Returns whether there are such factors.
pub(super) fn is_there(tensors: &[TensorSnapshot]) -> bool {
    tensors.iter().any(|tensor| layer(&tensor.full_path()).is_some())
}

/// Multiplies the factors into the layers in front of them.
///
/// # Errors
/// Where a factor has another number of values than its layer has outputs.
pub(super) fn multiplied(tensors: Vec<TensorSnapshot>) -> Result<Vec<TensorSnapshot>, CheckpointError> {
    let floats = |tensor: &TensorSnapshot| -> Result<Vec<f32>, CheckpointError> {
        values(tensor)?.to_vec().map_err(|e| CheckpointError::Malformed(format!("{e:?}")))
    };
    let mut factors = BTreeMap::new();
    let mut others = vec![];
    for tensor in tensors {
        match layer(&tensor.full_path()) {
            Some(layer) => drop(factors.insert(layer, floats(&tensor)?)),
            None => others.push(tensor),
        }
    }
    for tensor in &mut others {
        let name = tensor.full_path();
        let layer = name.strip_suffix(".weight").or_else(|| name.strip_suffix(".bias"));
        let Some(gamma) = layer.and_then(|layer| factors.get(layer)) else { continue };
        let shape = tensor.shape.to_vec();
        let outputs = shape.first().copied().unwrap_or_default();
        if gamma.len() != outputs {
            let why = format!("the LayerScale of {name} has {} values, expected {outputs}", gamma.len());
            return Err(CheckpointError::Shapes(vec![why]));
        }
        let mut scaled = floats(tensor)?;
        let width = scaled.len() / outputs.max(1);
        for (row, gamma) in scaled.chunks_mut(width.max(1)).zip(gamma) {
            row.iter_mut().for_each(|value| *value *= gamma);
        }
        *tensor = called(of_values(scaled, shape), &name);
    }
    Ok(others)
}
