//! What every allocator does.

use std::fmt::Debug;

use burn::module::{Module, ModuleDisplay};
use burn::prelude::Backend;
use rand::rngs::StdRng;

use super::allocation::Allocation;
use super::budget::QueryBudget;
use super::features::{DatumFeatures, Needs};
use super::shown::Shown;
use crate::error::Error;

/// Allocates a batch's queries, and may learn to do it better.
///
/// A training step sees `&self`. What is needed to learn from it therefore comes back from
/// [`allocate`](Self::allocate) as an update. After the step [`apply`](Self::apply) learns from it
/// and from what the step's queries showed. An allocator is a [`Module`], so a checkpoint of the
/// model holds it too.
pub trait Allocator<B: Backend>: Module<B> + ModuleDisplay {
    /// What `apply` needs of a batch beside the measurements.
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

    /// The allocator after a step: it learns from the measurements on that step's batch.
    ///
    /// The result depends on nothing else, so that a run resumes to the bit. With several batches
    /// before one update of the model, each is applied in turn.
    #[must_use]
    fn apply(self, update: Self::Update, shown: &Shown<'_>) -> Self;

    /// The features that `allocate` looks at beside losses and variances.
    ///
    /// The others are `None`: they are not read back from the device.
    fn needs(&self) -> Needs {
        Needs::default()
    }

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
