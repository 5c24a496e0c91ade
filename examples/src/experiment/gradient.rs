//! Gradient estimates apart from training: one step without its update, and the error of a
//! gradient.

use anyhow::{Context, Result};
use burn::module::{AutodiffModule, ModuleVisitor, Param};
use burn::optim::{GradientsParams, SgdConfig};
use burn::prelude::*;
use burn::train::TrainStep;
use flops_core::StepReport;
use flops_core::allocator::Allocator;
use flops_vit::ViT;
use flops_vit::data::ImageBatch;

use super::testbed::Learner;
use crate::backend::{AB, B};

/// Estimates the gradient on a batch without updating θ.
///
/// # Errors
/// If the step fails.
pub fn estimate<A>(learner: &Learner<A>, batch: ImageBatch<B>) -> Result<(GradientsParams, StepReport)>
where
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
pub fn observe<A>(learner: Learner<A>, grads: GradientsParams) -> Learner<A>
where
    A: AutodiffModule<AB> + Allocator<AB>,
    A::InnerModule: Allocator<B, Update = A::Update>,
{
    learner.optimize::<AB, _>(&mut SgdConfig::new().init(), 0.0, grads)
}

/// Returns ‖a − b‖² and ‖b‖² over the trained parameters of `model`. A missing gradient is zero.
pub fn squared_distance(model: &ViT<AB>, a: &GradientsParams, b: &GradientsParams) -> (f64, f64) {
    let mut distance = Distance { a, b, squared_distance: 0.0, squared_norm: 0.0 };
    model.visit(&mut distance);
    (distance.squared_distance, distance.squared_norm)
}

struct Distance<'a> {
    a: &'a GradientsParams,
    b: &'a GradientsParams,
    squared_distance: f64,
    squared_norm: f64,
}

impl ModuleVisitor<AB> for Distance<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<AB, D>>) {
        let values = |g: &GradientsParams| g.get::<B, D>(param.id).map(|g| g.into_data().iter::<f64>().collect());
        let (a, b): (Option<Vec<f64>>, Option<Vec<f64>>) = (values(self.a), values(self.b));
        let n = a.as_ref().or(b.as_ref()).map_or(0, Vec::len);
        let (a, b) = (a.unwrap_or_else(|| vec![0.0; n]), b.unwrap_or_else(|| vec![0.0; n]));
        self.squared_distance += a.iter().zip(&b).map(|(a, b)| (a - b).powi(2)).sum::<f64>();
        self.squared_norm += b.iter().map(|b| b * b).sum::<f64>();
    }
}
