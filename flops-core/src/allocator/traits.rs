//! What every allocator does.

use std::fmt::Debug;

use burn::module::{Module, ModuleDisplay};
use burn::prelude::Backend;
use rand::rngs::StdRng;

use super::allocation::Allocation;
use super::budget::QueryBudget;
use super::features::DatumFeatures;
use crate::error::Error;

/// Allocates a batch's queries, and may learn to do it better.
///
/// A training step sees `&self`. What [`allocate`](Self::allocate) learns therefore comes back as
/// an update, which [`apply`](Self::apply) puts into the module after the step. An allocator is a
/// [`Module`], so a checkpoint of the model holds it too.
pub trait Allocator<B: Backend>: Module<B> + ModuleDisplay {
    /// What `allocate` learns and `apply` puts into the module.
    type Update: Clone + Send + Debug + 'static;

    /// Allocates a batch's queries: Σ_j A_j = B·A₀, every A_j ≥ A_min.
    ///
    /// # Errors
    /// If the features are unusable, see [`DatumFeatures::validate`].
    fn allocate(
        &self,
        features: &DatumFeatures<'_>,
        budget: &QueryBudget,
        rng: &mut StdRng,
    ) -> Result<(Allocation, Self::Update), Error>;

    /// The allocator with an update put in.
    #[must_use]
    fn apply(self, update: Self::Update) -> Self;

    /// The name in settings, records and errors.
    fn name(&self) -> &'static str;

    /// Whether every example of every batch gets the same number of queries.
    ///
    /// Weight noise is shared by the examples of a pass, so unequal numbers gain nothing there.
    /// Only allocators that return `true` go with it; for others see [`Error::SharedNoise`].
    fn is_uniform(&self) -> bool {
        false
    }
}
