//! An allocator that knows the variances.

use std::sync::{Arc, Mutex, PoisonError};

use burn::prelude::*;
use flops_core::allocator::{Allocator, DatumFeatures, Neyman, Shown};
use flops_core::{Allocation, Error, QueryBudget};
use rand::rngs::StdRng;

/// Integer Neyman allocation by the true variances of the batch, if it was told them. Otherwise it
/// uses the learner's own estimates.
///
/// It is also an example of a user's own allocator.
#[derive(Module, Clone, Debug, Default)]
pub struct OracleAllocator {
    #[module(skip)]
    variances: Variances,
}

type Variances = Arc<Mutex<Option<Vec<f64>>>>;

impl OracleAllocator {
    /// Tells the allocator Tr Σ_j of the next batch.
    pub fn tell(&self, variances: Vec<f64>) {
        *self.variances.lock().unwrap_or_else(PoisonError::into_inner) = Some(variances);
    }
}

impl<P: Backend> Allocator<P> for OracleAllocator {
    type Update = ();

    fn allocate(
        &self,
        features: &DatumFeatures<'_>,
        budget: &QueryBudget,
        rng: &mut StdRng,
    ) -> Result<(Allocation, ()), Error> {
        let told = self.variances.lock().unwrap_or_else(PoisonError::into_inner).take();
        let variances = told.as_deref().unwrap_or(features.variances);
        Allocator::<P>::allocate(&Neyman, &DatumFeatures { variances, ..*features }, budget, rng)
    }

    fn apply(self, (): (), _: &Shown<'_>) -> Self {
        self
    }

    fn name(&self) -> &'static str {
        "oracle"
    }
}
