//! Uniform allocation.

use burn::module::Module;
use burn::prelude::Backend;
use rand::rngs::StdRng;

use super::allocation::Allocation;
use super::budget::QueryBudget;
use super::features::DatumFeatures;
use super::shown::Shown;
use super::traits::Allocator;
use crate::error::Error;

/// A_j = A₀, the baseline of every other allocator.
#[derive(Module, Clone, Debug, Default)]
pub struct Uniform;

impl<B: Backend> Allocator<B> for Uniform {
    type Update = ();

    fn allocate(
        &self,
        features: &DatumFeatures<'_>,
        budget: &QueryBudget,
        _: &mut StdRng,
    ) -> Result<(Allocation, ()), Error> {
        features.validate()?;
        Ok((Allocation::uniform(features.losses.len(), budget), ()))
    }

    fn apply(self, (): (), _: &Shown<'_>) -> Self {
        self
    }

    fn name(&self) -> &'static str {
        "uniform"
    }

    fn is_uniform(&self) -> bool {
        true
    }
}
