//! Finds the parameters of a model that can be quantized, and quantizes them.

use std::sync::Arc;

use burn::module::{Module, ModuleVisitor, Param};
use burn::prelude::*;
use burn::tensor::DType;

use super::codes::Codes;
use super::report::{Kept, ParameterReport, QuantizeReport};
use super::scheme::{Grid, QuantizeConfig, TrainedWeights};
use super::weight::{Weight, unit_scales};
use crate::error::Error;
use crate::parameters::matrix_sides;

/// The weights of a model by these settings, and what becomes of each parameter.
///
/// # Errors
/// [`Error::QuantScheme`] for a scheme that cannot be kept.
pub(super) fn find_weights<B: Backend, M: Module<B>>(
    config: &QuantizeConfig,
    model: &M,
) -> Result<(Vec<Weight<B>>, QuantizeReport), Error> {
    let (grid, report) = (Grid::of(&config.scheme)?, QuantizeReport::default());
    // parameters are initialised lazily: each must have its values before it is looked at
    let _ = model.num_params();
    let mut find = Find::<B> { config, grid, path: vec![], weights: vec![], report, failed: None };
    model.visit(&mut find);
    find.failed.map_or(Ok((find.weights, find.report)), Err)
}

/// Finds and quantizes parameters.
struct Find<'a, B: Backend> {
    config: &'a QuantizeConfig,
    grid: Grid,
    path: Vec<String>,
    weights: Vec<Weight<B>>,
    report: QuantizeReport,
    failed: Option<Error>,
}

impl<B: Backend> Find<'_, B> {
    /// Why a parameter stays a float, as far as its shape and flag tell.
    fn keeps(&self, shape: &[usize], trained: bool) -> Option<Kept> {
        let last = shape.last().copied().unwrap_or(0);
        if matrix_sides(shape, 1).is_none() {
            Some(Kept::Vector)
        } else if trained && self.config.trained == TrainedWeights::Float {
            Some(Kept::Trained)
        } else if self.grid.block.is_some_and(|block| !last.is_multiple_of(block)) {
            Some(Kept::Indivisible)
        } else {
            None
        }
    }
}

impl<B: Backend> ModuleVisitor<B> for Find<'_, B> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        let (value, trained) = (param.val(), param.is_require_grad());
        let (shape, dtype) = (value.dims(), value.dtype());
        let position = self.report.parameters.len();
        let mut kept = self.keeps(&shape, trained);
        if matches!(dtype, DType::QFloat(_)) {
            kept = Some(Kept::Quantized);
        }
        if kept.is_none() {
            let device = value.device();
            let values: Vec<f32> = value.into_data().iter::<f32>().collect();
            if values.iter().all(|value| value.is_finite()) {
                match Codes::quantize(&values, &shape, (self.config.scheme, dtype)) {
                    Ok(codes) if trained && codes.has_zero_block() => kept = Some(Kept::Zeros),
                    Ok(codes) => {
                        let scales = trained && self.config.trained == TrainedWeights::Scales;
                        self.weights.push(Weight {
                            position,
                            path: self.path.clone(),
                            trained: trained && !scales,
                            scales: scales.then(|| unit_scales(&codes, &device)),
                            codes: Arc::new(codes),
                            residual: None,
                        });
                    }
                    Err(error) => self.failed = Some(error),
                }
            } else {
                kept = Some(Kept::NotFinite);
            }
        }
        let path = self.path.join(".");
        self.report.parameters.push(ParameterReport { path, shape: shape.to_vec(), trained, kept });
    }
}
