//! Gradient estimates apart from training: one step without its update, and the error of a
//! gradient.

use anyhow::{Context, Result};
use burn::module::{AutodiffModule, Module, ModuleVisitor, Param};
use burn::optim::{GradientsParams, SgdConfig};
use burn::prelude::*;
use burn::train::TrainStep;
use flops_core::StepReport;
use flops_core::allocator::Allocator;
use flops_vit::data::ImageBatch;

use super::classifier::Classifier;
use super::testbed::Learner;
use crate::backend::{AB, B};

/// Estimates the gradient on a batch without updating θ.
///
/// # Errors
/// If the step fails.
pub fn estimate<M, A>(learner: &Learner<A, M>, batch: ImageBatch<B>) -> Result<(GradientsParams, StepReport)>
where
    M: Classifier,
    A: AutodiffModule<AB> + Allocator<AB>,
    A::InnerModule: Allocator<B, Update = A::Update>,
{
    let output = TrainStep::step(learner, batch);
    let monitor = learner.monitor();
    if let Some(error) = monitor.error() {
        return Err(error.into());
    }
    let report = monitor.take_reports().pop().context("no loss of the batch is finite; lower the learning rate")?;
    Ok((output.grads, report))
}

/// Updates what the learner itself learns from an estimate, and keeps θ.
pub fn observe<M, A>(learner: Learner<A, M>, grads: GradientsParams) -> Learner<A, M>
where
    M: Classifier,
    A: AutodiffModule<AB> + Allocator<AB>,
    A::InnerModule: Allocator<B, Update = A::Update>,
{
    learner.optimize::<AB, _>(&mut SgdConfig::new().init(), 0.0, grads)
}

/// Returns ‖a − b‖² and ‖b‖² over the trained parameters of `model`. A missing gradient is zero.
pub fn squared_distance(model: &impl Module<AB>, a: &GradientsParams, b: &GradientsParams) -> (f64, f64) {
    let products = Products::of(model, a, b);
    (products.squared_distance, products.squared_norms[1])
}

/// Returns the cosine of two gradients over the trained parameters of `model`; `None` if one of
/// them is zero, or a value is not finite. A missing gradient is zero.
pub fn cosine(model: &impl Module<AB>, a: &GradientsParams, b: &GradientsParams) -> Option<f64> {
    let Products { product, squared_norms: [a, b], .. } = Products::of(model, a, b);
    Some(product / (a * b).sqrt()).filter(|cosine| cosine.is_finite())
}

/// Products of two gradients.
struct Products<'a> {
    a: &'a GradientsParams,
    b: &'a GradientsParams,
    product: f64,
    squared_distance: f64,
    squared_norms: [f64; 2],
}

impl<'a> Products<'a> {
    fn of(model: &impl Module<AB>, a: &'a GradientsParams, b: &'a GradientsParams) -> Self {
        let mut products = Self { a, b, product: 0.0, squared_distance: 0.0, squared_norms: [0.0; 2] };
        model.visit(&mut products);
        products
    }
}

impl ModuleVisitor<AB> for Products<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<AB, D>>) {
        let values = |g: &GradientsParams| g.get::<B, D>(param.id).map(|g| g.into_data().iter::<f64>().collect());
        let (a, b): (Option<Vec<f64>>, Option<Vec<f64>>) = (values(self.a), values(self.b));
        let n = a.as_ref().or(b.as_ref()).map_or(0, Vec::len);
        let (a, b) = (a.unwrap_or_else(|| vec![0.0; n]), b.unwrap_or_else(|| vec![0.0; n]));
        self.squared_distance += a.iter().zip(&b).map(|(a, b)| (a - b).powi(2)).sum::<f64>();
        self.product += a.iter().zip(&b).map(|(a, b)| a * b).sum::<f64>();
        for (norm, values) in self.squared_norms.iter_mut().zip([a, b]) {
            *norm += values.iter().map(|v| v * v).sum::<f64>();
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::nn::{Linear, LinearConfig};

    use super::*;

    #[test]
    fn products_are_taken_over_all_parameters() {
        let device = Default::default();
        let model: Linear<AB> = LinearConfig::new(1, 2).init(&device);
        let gradient = |weight: [f32; 2], bias: Option<[f32; 2]>| {
            let mut gradient = GradientsParams::new();
            gradient.register(model.weight.id, Tensor::<B, 2>::from_floats([weight], &device));
            if let (Some(bias), Some(param)) = (bias, &model.bias) {
                gradient.register(param.id, Tensor::<B, 1>::from_floats(bias, &device));
            }
            gradient
        };
        let (a, b) = (gradient([1.0, 2.0], Some([2.0, 0.0])), gradient([2.0, 1.0], None));
        assert_eq!(squared_distance(&model, &a, &b), (6.0, 5.0));
        assert_eq!(cosine(&model, &a, &b), Some(4.0 / 45f64.sqrt()));
        assert_eq!(cosine(&model, &a, &GradientsParams::new()), None);
    }
}
