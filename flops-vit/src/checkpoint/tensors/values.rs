//! Values of tensors: read, reshaped, split and checked.

use burn::prelude::*;
use burn::tensor::DType;
use burn_store::TensorSnapshot;

use crate::checkpoint::table::called;
use crate::error::CheckpointError;

/// Reads a tensor's values in f32.
///
/// # Errors
/// [`CheckpointError::DType`] where they are not floating-point, [`CheckpointError::Malformed`]
/// where they cannot be read.
pub fn values(tensor: &TensorSnapshot) -> Result<TensorData, CheckpointError> {
    match tensor.dtype.is_float() {
        true => Ok(tensor.to_data().map_err(|e| CheckpointError::Malformed(e.to_string()))?.convert_dtype(DType::F32)),
        false => Err(CheckpointError::DType { name: tensor.full_path(), dtype: format!("{:?}", tensor.dtype) }),
    }
}

/// Splits a tensor into `parts` parts with equally many rows.
pub(in crate::checkpoint) fn split_rows(
    tensor: &TensorSnapshot,
    parts: usize,
) -> Result<Vec<TensorSnapshot>, CheckpointError> {
    let data = values(tensor)?;
    let mut shape = data.shape.to_vec();
    if data.num_elements() == 0 || !shape.first().is_some_and(|rows| rows.is_multiple_of(parts)) {
        let why = format!("{} is {shape:?}, expected rows in {parts} equal parts", tensor.full_path());
        return Err(CheckpointError::Shapes(vec![why]));
    }
    shape[0] /= parts;
    let all: Vec<f32> = data.to_vec().map_err(|e| CheckpointError::Malformed(format!("{e:?}")))?;
    Ok(all.chunks_exact(all.len() / parts).map(|part| of_values(part.to_vec(), shape.clone())).collect())
}

/// Gives a tensor another shape with as many elements.
///
/// A tensor with another number of elements is returned as it is: [`fill`](super::fill) then
/// reports the shapes.
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

/// Makes a tensor without a name.
pub(in crate::checkpoint) fn of_values(values: Vec<f32>, shape: Vec<usize>) -> TensorSnapshot {
    TensorSnapshot::from_data(TensorData::new(values, shape), vec![], vec![], Default::default())
}

/// Checks that all values are finite.
pub(in crate::checkpoint) fn check_finite(tensors: &[TensorSnapshot]) -> Result<(), CheckpointError> {
    for tensor in tensors {
        let data = tensor.to_data().map_err(|e| CheckpointError::Malformed(e.to_string()))?;
        if data.iter::<f32>().any(|x| !x.is_finite()) {
            return Err(CheckpointError::NonFinite { name: tensor.full_path() });
        }
    }
    Ok(())
}
