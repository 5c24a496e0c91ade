//! How much variance an allocation saves.

use super::allocation::Allocation;
use super::budget::QueryBudget;
use super::features::validate_variances;
use super::objective::variance_objective;
use crate::error::Error;

/// How much variance an allocation saves over the uniform one, and how much could be saved.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct AllocationReport {
    /// Coefficient of variation of √(Tr Σ_j) over the batch, CV.
    pub cv: f64,
    /// The floor 1/(1 + CV²): no allocation gets below this relative variance.
    pub floor: f64,
    /// J of this allocation, relative to the uniform one's.
    pub relative_variance: f64,
    /// The least J of an integer allocation, relative to the uniform one's.
    pub neyman_relative_variance: f64,
    /// The smallest A_j.
    pub min: usize,
    /// The largest A_j.
    pub max: usize,
}

impl AllocationReport {
    /// Measures `allocation` by `variances`, estimates of Tr Σ_j. If they are all zero, nothing can
    /// be saved.
    ///
    /// # Errors
    /// - If `variances` and the allocation differ in length.
    /// - If a variance is negative or not finite.
    pub fn new(variances: &[f64], allocation: &Allocation, budget: &QueryBudget) -> Result<Self, Error> {
        validate_variances(variances, allocation.counts().len())?;
        Self::of(variances, variance_objective(variances, allocation), allocation, budget)
    }

    /// The same for an estimate whose variance is `spent`/B².
    pub(crate) fn of(
        variances: &[f64],
        spent: f64,
        allocation: &Allocation,
        budget: &QueryBudget,
    ) -> Result<Self, Error> {
        let n = allocation.counts().len();
        validate_variances(variances, n)?;
        let weights: Vec<f64> = variances.iter().map(|v| v.sqrt()).collect();
        let uniform = variance_objective(variances, &Allocation::uniform(n, budget));
        let (first, second): (f64, f64) = (weights.iter().sum(), variances.iter().sum());
        let (min, max) = (allocation.min(), allocation.max());
        if uniform == 0.0 {
            let (relative_variance, neyman_relative_variance) = (1.0, 1.0);
            return Ok(Self { cv: 0.0, floor: 1.0, relative_variance, neyman_relative_variance, min, max });
        }
        let floor = (first * first / (n as f64 * second)).min(1.0);
        Ok(Self {
            cv: (1.0 / floor - 1.0).sqrt(),
            floor,
            relative_variance: spent / uniform,
            neyman_relative_variance: variance_objective(variances, &Allocation::neyman(&weights, budget)?) / uniform,
            min,
            max,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_can_be_saved_where_variances_are_equal() {
        let allocation = Allocation::project(&[1.0, 3.0], &QueryBudget::new(2, 1).unwrap()).unwrap();
        let report = |v: &[f64]| AllocationReport::new(v, &allocation, &QueryBudget::new(2, 1).unwrap());
        let zero = report(&[0.0, 0.0]).unwrap();
        assert_eq!((zero.cv, zero.floor, zero.relative_variance), (0.0, 1.0, 1.0));
        // J = 1/1 + 1/3 against 1/2 + 1/2
        let equal = report(&[1.0, 1.0]).unwrap();
        assert!((equal.relative_variance - 4.0 / 3.0).abs() < 1e-12);
        assert!(equal.cv == 0.0 && equal.neyman_relative_variance == 1.0);
        assert!(report(&[1.0]).is_err() && report(&[1.0, f64::INFINITY]).is_err());
    }
}
