//! Neyman allocation, the closed form.

use burn::module::Module;
use burn::prelude::Backend;
use rand::rngs::StdRng;

use super::{Allocator, DatumFeatures};
use crate::budget::{Allocation, QueryBudget};
use crate::error::Error;

/// A_j ∝ √(Tr Σ_j), the minimiser of Σ_j Tr Σ_j / A_j, exact in integers; see [`Allocation::neyman`].
///
/// It is as good as the estimates of Tr Σ_j it is given; with exact ones it lowers the variance of the gradient to
/// 1/(1 + CV²) of equal allocation's, CV the coefficient of variation of √(Tr Σ_j), up to rounding and A_min.
///
/// Neyman, J. (1934). On the two different aspects of the representative method. *J. R. Stat. Soc.* 97(4).
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

    fn apply(self, (): ()) -> Self {
        self
    }

    fn name(&self) -> &'static str {
        "neyman"
    }
}
