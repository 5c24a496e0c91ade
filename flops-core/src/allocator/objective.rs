//! J(A), the objective that allocators minimise.

use super::allocation::Allocation;

/// J(A) = Σ_j Tr Σ_j / A_j, which is B² times the variance of the gradient estimate.
///
/// # Panics
/// If `variances` and `allocation` differ in length.
pub fn variance_objective(variances: &[f64], allocation: &Allocation) -> f64 {
    assert_eq!(variances.len(), allocation.counts().len(), "one variance per example of the allocation");
    variances.iter().zip(allocation.counts()).map(|(v, &a)| v / a as f64).sum()
}
