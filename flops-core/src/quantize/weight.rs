//! The quantized parameters of a model, and the mappers that put tensors in their places.

use std::sync::Arc;

use burn::module::{ModuleMapper, Param, ParamId};
use burn::prelude::*;

use super::codes::{Codes, RoundKey};
use super::scheme::{Rounding, Unpack};

/// A quantized parameter. Its place in the model has a tensor that is made from it.
#[derive(Clone, Debug)]
pub(super) struct Weight<B: Backend> {
    /// Its number among the float parameters of the model.
    pub position: usize,
    /// Names of fields from the model down.
    pub path: Vec<String>,
    pub codes: Arc<Codes>,
    /// Whether its integers are trained.
    pub trained: bool,
    /// Trained factors of its scales.
    pub scales: Option<Param<Tensor<B, 1>>>,
    /// What error feedback keeps.
    pub residual: Option<Arc<Vec<f32>>>,
}

impl<B: Backend> Weight<B> {
    /// The values as floats, times the trained factors of their scales.
    fn float<const D: usize>(&self, device: &B::Device) -> Tensor<B, D> {
        let Some(scales) = &self.scales else { return self.codes.float(device) };
        let blocks = self.codes.num_scales();
        let block = self.codes.len().div_ceil(blocks.max(1));
        let flat: Tensor<B, D> = self.codes.float(device);
        let factors = scales.val().detach().reshape([blocks, 1]).cast(self.codes.dtype());
        (flat.reshape([blocks, block]) * factors).reshape(Shape::from(self.codes.shape().to_vec()))
    }

    /// A tensor of the parameter's shape that holds one number: NaN, with a checksum of the weight in
    /// its payload.
    ///
    /// What compares the parameters of two workers sees whether their weights differ. What computes
    /// with it sees NaN.
    fn placeholder<const D: usize>(&self, device: &B::Device) -> Tensor<B, D> {
        let nan = f32::from_bits(0x7fc0_0000 | (self.codes.checksum() as u32 & 0x003f_ffff));
        let one: Tensor<B, D> = Tensor::from_data(TensorData::new(vec![nan], [1; D]), (device, self.codes.dtype()));
        one.expand(Shape::from(self.codes.shape().to_vec()))
    }

    /// What error feedback keeps, for a change.
    fn take_residual(&mut self) -> Option<Vec<f32>> {
        self.residual.take().map(Arc::unwrap_or_clone)
    }
}

/// What the place of a weight has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// What it has.
    Unchanged,
    /// Something of the shape that holds one number.
    Placeholder,
    /// Floats.
    Float,
    /// A quantized tensor of Burn.
    Packed,
    /// A single zero, as records have it.
    Empty,
}

impl Form {
    /// The form in a model without a graph.
    pub fn in_passes<B: Backend>(weight: &Weight<B>, unpack: Unpack) -> Self {
        let is_plain = !weight.trained && weight.scales.is_none() && weight.codes.fills_words();
        if is_plain && unpack == Unpack::EachPass { Self::Packed } else { Self::Float }
    }
}

/// Goes through the float parameters of a model and finds the weights among them.
pub(super) struct Places {
    position: usize,
    next: usize,
}

impl Places {
    pub fn new() -> Self {
        Self { position: 0, next: 0 }
    }

    /// The number of the weight whose place comes next, if it is one.
    fn step<B: Backend>(&mut self, weights: &[Weight<B>]) -> Option<usize> {
        let found = weights.get(self.next).is_some_and(|weight| weight.position == self.position);
        self.position += 1;
        self.next += usize::from(found);
        found.then(|| self.next - 1)
    }
}

/// Puts tensors in the places of weights.
pub(super) struct Fill<'a, B: Backend, F> {
    pub weights: &'a [Weight<B>],
    /// The form of each.
    pub form: F,
    pub places: Places,
}

impl<'a, B: Backend, F: Fn(&Weight<B>) -> Form> Fill<'a, B, F> {
    pub fn new(weights: &'a [Weight<B>], form: F) -> Self {
        Self { weights, form, places: Places::new() }
    }
}

impl<B: Backend, F: Fn(&Weight<B>) -> Form> ModuleMapper<B> for Fill<'_, B, F> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let Some(index) = self.places.step(self.weights) else { return param };
        let weight = &self.weights[index];
        let form = (self.form)(weight);
        if form == Form::Unchanged {
            return param;
        }
        let (id, old, mapper) = param.consume();
        let device = old.device();
        let value = match form {
            Form::Unchanged => old,
            Form::Placeholder => weight.placeholder(&device),
            Form::Float => weight.float(&device),
            Form::Packed => weight.codes.quantized(&device),
            Form::Empty => Tensor::zeros([1; D], (&device, weight.codes.dtype())),
        };
        // a model without a graph has no such flag, and a quantized tensor never has
        let value = if weight.trained && B::ad_enabled(&device) { value.detach().require_grad() } else { value };
        Param::from_mapped_value(id, value, mapper)
    }
}

/// Takes what another mapper left in the places of weights, and leaves placeholders there.
pub(super) struct Absorb<'a, B: Backend> {
    pub weights: &'a mut [Weight<B>],
    /// Whether the place of each had floats.
    pub exposed: &'a [bool],
    pub rounding: (Rounding, u64, u64),
    pub places: Places,
}

impl<B: Backend> ModuleMapper<B> for Absorb<'_, B> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let Some(index) = self.places.step(self.weights) else { return param };
        let weight = &mut self.weights[index];
        // a mapper may have frozen it, or the other way round
        weight.trained = param.is_require_grad();
        if !self.exposed[index] {
            return param;
        }
        let (id, value, mapper) = param.consume();
        let device = value.device();
        let values: Vec<f32> = value.into_data().iter::<f32>().collect();
        let (rounding, seed, update) = self.rounding;
        let mut residual = weight.take_residual();
        let key = RoundKey { rounding, seed, update, position: weight.position };
        Arc::make_mut(&mut weight.codes).round(&values, &mut residual, key);
        weight.residual = residual.map(Arc::new);
        let value = weight.placeholder(&device).detach().set_require_grad(weight.trained);
        Param::from_mapped_value(id, value, mapper)
    }
}

/// The factors of a weight's scales, all 1.
pub(super) fn unit_scales<B: Backend>(codes: &Codes, device: &B::Device) -> Param<Tensor<B, 1>> {
    let ones = Tensor::ones([codes.num_scales()], device);
    Param::initialized(ParamId::new(), ones.require_grad())
}
