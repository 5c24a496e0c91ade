//! What a checkpoint holds of a quantized model.

use std::sync::Arc;

use burn::module::{Param, ParamId};
use burn::prelude::*;
use burn::record::{PrecisionSettings, Record};
use burn::tensor::{DType, TensorData};
use serde::{Deserialize, Serialize};

use super::codes::Codes;
use super::weight::Weight;

/// Record of a [`Quantized`](super::Quantized) model: the record of the model, and beside it the
/// quantized weights.
///
/// The weights are integers and scales, bit for bit, whatever the precision of the recorder. Their
/// places in the model's own record have a single zero.
#[derive(Clone, Debug)]
pub struct QuantizedRecord<R> {
    pub(super) model: R,
    pub(super) weights: Vec<WeightRecord>,
    pub(super) updates: u64,
}

/// [`QuantizedRecord`] as it is written.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct QuantizedItem<I> {
    model: I,
    weights: Vec<WeightRecord>,
    updates: u64,
}

/// A weight as it is written.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct WeightRecord {
    position: usize,
    path: Vec<String>,
    codes: TensorData,
    dtype: DType,
    /// Id and values of the trained factors of the scales.
    scales: Option<(u64, TensorData)>,
    residual: Option<TensorData>,
}

impl WeightRecord {
    pub fn of<B: Backend>(weight: &Weight<B>) -> Self {
        let floats = |values: Vec<f32>| {
            let len = values.len();
            TensorData::new(values, [len])
        };
        let of_scales =
            |scales: &Param<Tensor<B, 1>>| (scales.id.val(), floats(scales.val().into_data().iter::<f32>().collect()));
        Self {
            position: weight.position,
            path: weight.path.clone(),
            codes: weight.codes.to_data(),
            dtype: weight.codes.dtype(),
            scales: weight.scales.as_ref().map(of_scales),
            residual: weight.residual.as_ref().map(|residual| floats(residual.to_vec())),
        }
    }

    /// The weight in the place of `old`.
    ///
    /// # Errors
    /// How the two differ.
    pub fn into_weight<B: Backend>(self, old: Weight<B>, device: &B::Device) -> Result<Weight<B>, String> {
        let (place, name) = ((self.position, &self.path), self.path.join("."));
        if place != (old.position, &old.path) {
            return Err(format!("it has {name} where the model has {}", old.path.join(".")));
        }
        let codes = Codes::from_data(&self.codes, self.dtype).map_err(|why| format!("{name} is damaged: {why}"))?;
        if codes.shape() != old.codes.shape() || codes.scheme() != old.codes.scheme() {
            let [got, expected] = [&codes, &*old.codes]
                .map(|c| format!("{:?} in {:?} by {:?}", c.shape(), c.scheme().value, c.scheme().level));
            return Err(format!("{name} is {got} where the model has {expected}"));
        }
        let values = |data: TensorData, expected: usize| {
            let values: Vec<f32> = data.iter::<f32>().collect();
            if values.len() == expected {
                Ok(values)
            } else {
                Err(format!("{name} has {} values where {expected} are expected", values.len()))
            }
        };
        let scales = match (self.scales, &old.scales) {
            (Some((id, data)), Some(old)) => {
                let len = codes.num_scales();
                let factors = Tensor::from_data(TensorData::new(values(data, len)?, [len]), device);
                let factors = factors.set_require_grad(old.is_require_grad());
                Some(Param::initialized(ParamId::from(id), factors))
            }
            (None, None) => None,
            (found, _) => {
                let [got, expected] = if found.is_some() { ["trained", "fixed"] } else { ["fixed", "trained"] };
                return Err(format!("the scales of {name} are {got} where those of the model are {expected}"));
            }
        };
        let residual = self.residual.map(|data| values(data, codes.len())).transpose()?;
        Ok(Weight { codes: Arc::new(codes), scales, residual: residual.map(Arc::new), ..old })
    }
}

impl<B: Backend, R: Record<B>> Record<B> for QuantizedRecord<R> {
    type Item<S: PrecisionSettings> = QuantizedItem<R::Item<S>>;

    fn into_item<S: PrecisionSettings>(self) -> Self::Item<S> {
        let Self { model, weights, updates } = self;
        QuantizedItem { model: model.into_item(), weights, updates }
    }

    fn from_item<S: PrecisionSettings>(item: Self::Item<S>, device: &B::Device) -> Self {
        let QuantizedItem { model, weights, updates } = item;
        Self { model: R::from_item(model, device), weights, updates }
    }
}
