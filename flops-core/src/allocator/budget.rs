//! How many queries a step may spend.

use serde::{Deserialize, Serialize};

use crate::error::Error;

/// Queries per example: A₀ on average, and A_min at least.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueryBudget {
    queries_per_datum: usize,
    min_per_datum: usize,
}

impl QueryBudget {
    /// The largest A₀ accepted, so that the sums over a batch are exact in `f64`.
    pub const MAX_PER_DATUM: usize = 1 << 24;

    /// A budget of `queries_per_datum` (A₀) queries per example on average and `min_per_datum`
    /// (A_min) at least.
    ///
    /// # Errors
    /// Unless 1 ≤ A_min ≤ A₀ ≤ [`Self::MAX_PER_DATUM`].
    pub fn new(queries_per_datum: usize, min_per_datum: usize) -> Result<Self, Error> {
        let fail = |name, value, remedy: String| Err(Error::Budget { name, value, remedy });
        if queries_per_datum == 0 {
            return fail("queries_per_datum", 0, "give every example at least 1 query".into());
        }
        if queries_per_datum > Self::MAX_PER_DATUM {
            return fail(
                "queries_per_datum",
                queries_per_datum,
                format!("at most {} are supported", Self::MAX_PER_DATUM),
            );
        }
        if min_per_datum == 0 {
            return fail("min_per_datum", 0, "use at least 1: an example without a query biases the gradient".into());
        }
        if min_per_datum > queries_per_datum {
            let remedy = format!("lower it to queries_per_datum = {queries_per_datum} or less");
            return fail("min_per_datum", min_per_datum, remedy);
        }
        Ok(Self { queries_per_datum, min_per_datum })
    }

    /// A₀, the mean number of queries per example.
    pub fn queries_per_datum(&self) -> usize {
        self.queries_per_datum
    }

    /// A_min, the least number of queries per example.
    pub fn min_per_datum(&self) -> usize {
        self.min_per_datum
    }

    /// The number of queries that cost as much as A₀ whole passes, rounded down.
    ///
    /// A query costs the fraction `cost` of a pass, 0 < `cost` ≤ 1.
    pub(crate) fn at_cost(&self, cost: f64) -> Self {
        let queries = (self.queries_per_datum as f64 / cost.clamp(1e-3, 1.0) + 1e-9) as usize;
        Self { queries_per_datum: queries.min(Self::MAX_PER_DATUM), ..*self }
    }

    /// The budget that is left once each example has spent `pilots` queries on estimating its
    /// variance.
    ///
    /// The pilots count towards A_min.
    ///
    /// # Errors
    /// Unless 1 ≤ `pilots` < A₀.
    pub fn after_pilots(&self, pilots: usize) -> Result<Self, Error> {
        if pilots == 0 || pilots >= self.queries_per_datum {
            let remedy = format!("use 1 to {}, fewer than queries_per_datum", self.queries_per_datum.saturating_sub(1));
            return Err(Error::Budget { name: "pilot queries", value: pilots, remedy });
        }
        Self::new(self.queries_per_datum - pilots, self.min_per_datum.saturating_sub(pilots).max(1))
    }

    /// B·A₀, the queries of a batch of `batch_size` examples.
    pub fn total(&self, batch_size: usize) -> usize {
        batch_size * self.queries_per_datum
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A budget counts whole passes: queries that cost a part of one are more, up to a thousandfold.
    #[test]
    fn cheap_queries_are_more() {
        let at_cost = |queries, cost| QueryBudget::new(queries, 1).unwrap().at_cost(cost).queries_per_datum();
        assert_eq!([1.0, 0.5, 0.1, 2.0, 0.0].map(|cost| at_cost(3, cost)), [3, 6, 30, 3, 3000]);
        assert_eq!(at_cost(QueryBudget::MAX_PER_DATUM, 0.5), QueryBudget::MAX_PER_DATUM);
    }

    #[test]
    fn pilots_leave_the_rest_of_the_budget() {
        let budget = QueryBudget::new(5, 3).unwrap();
        let rest = |pilots| budget.after_pilots(pilots).map(|b| (b.queries_per_datum(), b.min_per_datum()));
        assert_eq!([1, 2, 4].map(|pilots| rest(pilots).unwrap()), [(4, 2), (3, 1), (1, 1)]);
        for pilots in [0, 5, 6] {
            assert!(rest(pilots).unwrap_err().to_string().contains("use 1 to 4"), "{pilots}");
        }
    }

    #[test]
    fn errors_name_the_setting() {
        let message = |queries, min| QueryBudget::new(queries, min).unwrap_err().to_string();
        assert!(message(0, 1).contains("queries_per_datum = 0"));
        assert!(message(4, 0).contains("min_per_datum = 0"));
        assert!(message(4, 5).contains("min_per_datum = 5; lower it"));
        assert!(QueryBudget::new(usize::MAX, 1).is_err());
    }
}
