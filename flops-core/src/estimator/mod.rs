//! From losses of perturbed passes to gradients: ĝ = (1/B) Σ_j (1/A_j) Σ_q c_jq s(ε_jq) ∂.
//!
//! An estimate walks in three passes:
//!
//! 1. The *clean* pass gives the losses ℓ_j, and keeps the state in front of the first trained
//!    stage.
//! 2. The *query* pass evaluates each example under its A_j perturbations. Only the coefficients
//!    c_jq = (ℓ_jq − ℓ_j)/σ are kept.
//! 3. The *update* pass draws the same noise again and sums c·s(ε) over the queries of each
//!    example. One product with the clean input per example follows, instead of one per query.
//!
//! Memory is that of `max_rows` rows, whatever the budget.
//!
//! The weight of a query, what is dropped and the variance of an example are the same for every
//! space (`query_weights`). Where the noise falls, and how gradients follow, has a file per space.

mod activation;
mod clean;
mod clean_leaf;
mod clean_passes;
mod context;
#[cfg(test)]
mod dropping;
mod estimate;
mod evaluate;
#[cfg(test)]
mod exact;
mod leaf_sum;
mod leaves;
mod low_rank;
mod packing;
#[cfg(test)]
mod padding;
mod per_query;
mod query_weights;
#[cfg(test)]
mod repeated;
mod rounds;
mod rows;
mod settings;
mod site_check;
mod space;
mod subspace;
#[cfg(test)]
mod subspaces;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod theory;
mod weight_noise;
mod weights;

pub use crate::parameters::trained_parameters;
pub use clean::CleanPass;
pub(crate) use clean_leaf::CleanMemory;
pub(crate) use clean_passes::CutPasses;
pub use estimate::{Estimate, PassCost};
pub use query_weights::LossChanges;
pub(crate) use rounds::{Codec, Rounds};
pub use settings::Estimator;
pub use space::{Normalisation, Space};
pub use subspace::Subspace;
