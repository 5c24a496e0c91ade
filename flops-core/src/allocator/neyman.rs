//! Neyman allocation, the closed form.

use burn::module::Module;
use burn::prelude::Backend;
use rand::rngs::StdRng;

use super::allocation::Allocation;
use super::budget::QueryBudget;
use super::features::DatumFeatures;
use super::shown::Shown;
use super::traits::Allocator;
use crate::error::Error;

/// A_j ∝ √(Tr Σ_j), which minimises Σ_j Tr Σ_j / A_j, exact in integers: [`Allocation::neyman`].
///
/// It is as good as its estimates of Tr Σ_j. With exact ones the gradient's variance is 1/(1 + CV²)
/// of the uniform allocation's, up to rounding and A_min. CV is the coefficient of variation of
/// √(Tr Σ_j).
///
/// Paper: Neyman, J. (1934). On the two different aspects of the representative method. *J. R.
/// Stat. Soc.* 97(4).
#[derive(Module, Clone, Debug, Default)]
pub struct Neyman;

impl<B: Backend> Allocator<B> for Neyman {
    type Update = ();

    fn allocate(
        &self,
        features: &DatumFeatures<'_>,
        budget: &QueryBudget,
        _: &mut StdRng,
    ) -> Result<(Allocation, ()), Error> {
        features.validate()?;
        let weights: Vec<f64> = features.variances.iter().map(|v| v.sqrt()).collect();
        Ok((Allocation::neyman(&weights, budget)?, ()))
    }

    fn apply(self, (): (), _: &Shown<'_>) -> Self {
        self
    }

    fn name(&self) -> &'static str {
        "neyman"
    }
}
