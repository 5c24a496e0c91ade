//! The queries that each example of a batch gets.
//!
//! An [`Allocation`] meets its budget by construction: Σ_j A_j = B·A₀ and every A_j ≥ A_min, in
//! integers.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

use super::budget::QueryBudget;
use crate::error::Error;

/// The queries of each example of a batch: A_j ≥ A_min, Σ_j A_j = B·A₀.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Allocation {
    counts: Vec<usize>,
}

impl Allocation {
    /// A_j = A₀ for every example.
    pub fn uniform(batch_size: usize, budget: &QueryBudget) -> Self {
        Self { counts: vec![budget.queries_per_datum(); batch_size] }
    }

    /// The allocation nearest to `raw`, one real number of queries per example.
    ///
    /// `raw` is projected onto {a_j ≥ A_min, Σ a_j = B·A₀}, which gives max(raw_j − τ, A_min) for
    /// one τ. The result is rounded by largest remainders. Among equal remainders the larger raw
    /// entry comes first, then the earlier example. A larger raw entry never gets fewer queries. A
    /// constant added to all entries changes nothing.
    ///
    /// # Errors
    /// If an entry is not finite.
    pub fn project(raw: &[f64], budget: &QueryBudget) -> Result<Self, Error> {
        if let Some(index) = raw.iter().position(|r| !r.is_finite()) {
            let remedy = "the raw allocation must be finite";
            return Err(Error::Value { name: "raw", index, value: raw[index], remedy });
        }
        let (n, floor) = (raw.len(), budget.min_per_datum());
        let spare = n * (budget.queries_per_datum() - floor);
        // Heights are measured from the largest entry. A height below −spare gets nothing, so it
        // may be cut there: nothing overflows.
        let top = raw.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let height: Vec<f64> = raw.iter().map(|r| (r - top).max(-(spare as f64) - 1.0)).collect();
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by(|&i, &j| raw[j].total_cmp(&raw[i]).then(i.cmp(&j)));
        let (mut sum, mut tau) = (0.0, 0.0);
        for (k, &j) in order.iter().enumerate() {
            sum += height[j];
            let candidate = (sum - spare as f64) / (k + 1) as f64;
            if height[j] <= candidate {
                break;
            }
            tau = candidate;
        }
        let share: Vec<f64> = height.iter().map(|h| (h - tau).max(0.0)).collect();
        let mut counts: Vec<usize> = share.iter().map(|s| *s as usize).collect();
        let remainder = |j: usize| share[j] - share[j].floor();
        // The sort is stable: among ties the larger raw entry stays first, then the earlier
        // example.
        order.sort_by(|&i, &j| remainder(j).total_cmp(&remainder(i)));
        let mut given: usize = counts.iter().sum();
        for &j in order.iter().cycle().take(2 * n) {
            if given >= spare {
                break;
            }
            counts[j] += 1;
            given += 1;
        }
        // Floating-point error may have allocated a few too many.
        for &j in order.iter().rev() {
            if given > spare && counts[j] > 0 {
                counts[j] -= 1;
                given -= 1;
            }
        }
        debug_assert_eq!(given, spare);
        counts.iter_mut().for_each(|c| *c += floor);
        Ok(Self { counts })
    }

    /// The integer allocation that minimises Σ_j w_j² / A_j, for `weights` w_j = √(Tr Σ_j).
    ///
    /// The search starts from the real solution A_j = max(A_min, c·w_j), rounded down, and moves
    /// single queries to where they help most. The objective is separable and convex, so the
    /// minimum is reached when no single move helps. If all weights are zero, the allocation is
    /// uniform. The cost is O(B log B).
    ///
    /// # Errors
    /// If a weight is negative or not finite.
    pub fn neyman(weights: &[f64], budget: &QueryBudget) -> Result<Self, Error> {
        if let Some(index) = weights.iter().position(|w| !(w.is_finite() && *w >= 0.0)) {
            let remedy = "weights are standard deviations: finite and not negative";
            return Err(Error::Value { name: "weights", index, value: weights[index], remedy });
        }
        let top = weights.iter().copied().fold(0.0, f64::max);
        if top == 0.0 {
            return Ok(Self::uniform(weights.len(), budget));
        }
        let weights: Vec<f64> = weights.iter().map(|w| w / top).collect();
        let variances: Vec<f64> = weights.iter().map(|w| w * w).collect();
        let (total, floor) = (budget.total(weights.len()), budget.min_per_datum());
        let counts = water_fill(&weights, total, floor);
        Ok(Self { counts: exchange(counts, &variances, total, floor) })
    }

    /// The allocation of these counts.
    #[cfg(test)]
    pub(crate) fn of(counts: &[usize]) -> Self {
        Self { counts: counts.to_vec() }
    }

    /// The allocation with `queries` more for each example.
    pub(crate) fn with_more(mut self, queries: usize) -> Self {
        self.counts.iter_mut().for_each(|count| *count += queries);
        self
    }

    /// A_j, one entry per example.
    pub fn counts(&self) -> &[usize] {
        &self.counts
    }

    /// Σ_j A_j = B·A₀.
    pub fn total(&self) -> usize {
        self.counts.iter().sum()
    }

    /// The smallest A_j, 0 for an empty batch.
    pub fn min(&self) -> usize {
        self.counts.iter().copied().min().unwrap_or(0)
    }

    /// The largest A_j, 0 for an empty batch.
    pub fn max(&self) -> usize {
        self.counts.iter().copied().max().unwrap_or(0)
    }
}

/// max(floor, c·w_j) rounded down, with c such that the values sum to `total` before rounding.
fn water_fill(weights: &[f64], total: usize, floor: usize) -> Vec<usize> {
    let n = weights.len();
    let mut sorted = weights.to_vec();
    sorted.sort_by(|a, b| a.total_cmp(b));
    let mut above: f64 = sorted.iter().sum();
    let mut scale = total as f64 / above;
    for (below, w) in sorted.iter().enumerate() {
        scale = (total - below * floor) as f64 / above;
        if scale * w >= floor as f64 || below + 1 == n {
            break;
        }
        above -= w;
    }
    weights.iter().map(|w| ((scale * w) as usize).clamp(floor, total)).collect()
}

/// The value of moving a query of one example, valid while that example has `count` queries.
///
/// The larger value comes first, then the earlier example.
struct Candidate {
    value: f64,
    datum: usize,
    count: usize,
}

impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> Ordering {
        self.value.total_cmp(&other.value).then(other.datum.cmp(&self.datum))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Candidate {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Candidate {}

/// Adds or removes queries until `counts` sums to `total`, then moves single ones until none lowers
/// Σ v_j / A_j.
fn exchange(mut counts: Vec<usize>, variances: &[f64], total: usize, floor: usize) -> Vec<usize> {
    // Example j's gain from one query more than `a`: v/a − v/(a+1).
    let worth = |j: usize, a: usize| variances[j] / (a as f64 * (a + 1) as f64);
    let gain = |j: usize, a: usize| Candidate { value: worth(j, a), datum: j, count: a };
    let loss = |j: usize, a: usize| Reverse(Candidate { value: worth(j, a - 1), datum: j, count: a });
    let mut gains: BinaryHeap<_> = counts.iter().enumerate().map(|(j, &a)| gain(j, a)).collect();
    let mut losses: BinaryHeap<_> =
        counts.iter().enumerate().filter(|&(_, &a)| a > floor).map(|(j, &a)| loss(j, a)).collect();
    let mut sum: usize = counts.iter().sum();
    loop {
        while gains.peek().is_some_and(|c| counts[c.datum] != c.count) {
            gains.pop();
        }
        while losses.peek().is_some_and(|Reverse(c)| counts[c.datum] != c.count) {
            losses.pop();
        }
        let best = gains.peek().map(|c| (c.value, c.datum));
        let worst = losses.peek().map(|Reverse(c)| (c.value, c.datum));
        let (up, down) = match (best, worst) {
            (Some((_, up)), _) if sum < total => (Some(up), None),
            (_, Some((_, down))) if sum > total => (None, Some(down)),
            (Some((gained, up)), Some((lost, down))) if gained > lost => (Some(up), Some(down)),
            _ => return counts,
        };
        if let Some(j) = down {
            counts[j] -= 1;
            sum -= 1;
        }
        if let Some(j) = up {
            counts[j] += 1;
            sum += 1;
        }
        for j in [up, down].into_iter().flatten() {
            gains.push(gain(j, counts[j]));
            if counts[j] > floor {
                losses.push(loss(j, counts[j]));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn budget(queries: usize, min: usize) -> QueryBudget {
        QueryBudget::new(queries, min).unwrap()
    }

    fn cost(variances: &[f64], counts: &[usize]) -> f64 {
        variances.iter().zip(counts).map(|(v, &a)| v / a as f64).sum()
    }

    /// The least cost over every allocation of `total` queries.
    fn brute_force(variances: &[f64], total: usize, floor: usize) -> f64 {
        let [v, rest @ ..] = variances else { return if total == 0 { 0.0 } else { f64::INFINITY } };
        (floor..=total).map(|a| v / a as f64 + brute_force(rest, total - a, floor)).fold(f64::INFINITY, f64::min)
    }

    /// 1 ≤ A_min ≤ A₀.
    fn budgets() -> impl Strategy<Value = QueryBudget> {
        (1usize..40).prop_flat_map(|q| (Just(q), 1..=q)).prop_map(|(q, min)| budget(q, min))
    }

    fn extreme() -> impl Strategy<Value = f64> {
        prop_oneof![8 => -50.0..100.0, 1 => Just(0.0), 1 => -1e308..1e308, 1 => -1e-300..1e-300, 1 => Just(f64::MAX), 1 => Just(f64::MIN)]
    }

    fn ordered(keys: &[f64], counts: &[usize]) -> bool {
        let mut order: Vec<usize> = (0..keys.len()).collect();
        order.sort_by(|&i, &j| keys[i].total_cmp(&keys[j]));
        order.windows(2).all(|w| keys[w[0]] == keys[w[1]] || counts[w[0]] <= counts[w[1]])
    }

    // These properties are exact: there is no tolerance, and no false failure.
    proptest! {
        #[test]
        fn a_projection_meets_the_budget(raw in prop::collection::vec(extreme(), 0..150), budget in budgets()) {
            let a = Allocation::project(&raw, &budget).unwrap();
            prop_assert_eq!(a.total(), budget.total(raw.len()));
            prop_assert!(raw.is_empty() || a.min() >= budget.min_per_datum());
            prop_assert!(ordered(&raw, a.counts()));
        }

        #[test]
        fn a_feasible_integer_vector_projects_onto_itself(extra in prop::collection::vec(0usize..9, 1..40), shift in -100i32..100) {
            let n = extra.len();
            let mut counts: Vec<usize> = extra.iter().map(|e| e + 1).collect();
            let queries = counts.iter().sum::<usize>().div_ceil(n);
            counts[0] += queries * n - counts.iter().sum::<usize>();
            // a constant added to all entries changes nothing
            let raw: Vec<f64> = counts.iter().map(|&a| a as f64 + shift as f64).collect();
            let a = Allocation::project(&raw, &budget(queries, 1)).unwrap();
            prop_assert_eq!(a.counts(), &counts[..]);
        }

        #[test]
        fn neyman_meets_the_budget(weights in prop::collection::vec(extreme(), 0..150), budget in budgets()) {
            let weights: Vec<f64> = weights.iter().map(|w| w.abs()).collect();
            let a = Allocation::neyman(&weights, &budget).unwrap();
            prop_assert_eq!(a.total(), budget.total(weights.len()));
            prop_assert!(weights.is_empty() || a.min() >= budget.min_per_datum());
        }

        #[test]
        fn neyman_is_the_integer_minimum(
            weights in prop::collection::vec(prop_oneof![4 => 0.0..10.0, 1 => Just(0.0), 1 => Just(1.0)], 1..5),
            (queries, min) in (1usize..5).prop_flat_map(|q| (Just(q), 1..=q)),
        ) {
            let variances: Vec<f64> = weights.iter().map(|w| w * w).collect();
            let a = Allocation::neyman(&weights, &budget(queries, min)).unwrap();
            let least = brute_force(&variances, queries * weights.len(), min);
            // relative 1e-12 for the order of summation
            prop_assert!(cost(&variances, a.counts()) <= least * (1.0 + 1e-12), "{:?} {}", a, least);
            prop_assert!(ordered(&weights, a.counts()));
        }
    }

    #[test]
    fn known_allocations() {
        assert_eq!(Allocation::uniform(3, &budget(5, 2)).counts(), [5, 5, 5]);
        assert_eq!(Allocation::project(&[4.0, 1.0, 1.0], &budget(2, 1)).unwrap().counts(), [4, 1, 1]);
        // τ = 0.5 leaves 1.5, 1.5 and 3. The remainders are equal, so the earlier example gets the
        // query.
        assert_eq!(Allocation::project(&[2.0, 2.0, 3.5], &budget(2, 1)).unwrap().counts(), [2, 1, 3]);
        // shares of 2.6, 1.5 and 1.9 beside the minimum: the largest remainders are 0.9 and 0.6
        assert_eq!(Allocation::project(&[3.6, 2.5, 2.9], &budget(3, 1)).unwrap().counts(), [4, 2, 3]);
        for unit in [1.0, 1e200, 1e-200] {
            assert_eq!(Allocation::neyman(&[unit, 3.0 * unit], &budget(4, 1)).unwrap().counts(), [2, 6], "{unit}");
        }
        // here the shares rounded down, and filled up to the total, are [2, 12, 1]: a query moves
        assert_eq!(Allocation::neyman(&[1.0, 8.0, 1.0], &budget(5, 1)).unwrap().counts(), [2, 11, 2]);
        assert_eq!(Allocation::neyman(&[0.0, 0.0, 9.0], &budget(7, 3)).unwrap().counts(), [3, 3, 15]);
        assert_eq!(Allocation::neyman(&[0.0; 3], &budget(7, 3)).unwrap().counts(), [7, 7, 7]);
    }

    #[test]
    fn neyman_on_a_large_batch() {
        // Adding one query at a time from A_min upwards, always the best one, is optimal. The costs
        // are equal up to rounding.
        let weights: Vec<f64> = (0..500).map(|j| 0.05 * (j as f64 * 0.7).sin().exp() * (1 + j % 17) as f64).collect();
        let variances: Vec<f64> = weights.iter().map(|w| w * w).collect();
        let mut greedy = vec![1usize; 500];
        for _ in 0..500 * 3 {
            let worth = |j: usize| variances[j] / (greedy[j] * (greedy[j] + 1)) as f64;
            let best = (0..500).max_by(|&i, &j| worth(i).total_cmp(&worth(j))).unwrap();
            greedy[best] += 1;
        }
        let a = Allocation::neyman(&weights, &budget(4, 1)).unwrap();
        assert!((cost(&variances, a.counts()) / cost(&variances, &greedy) - 1.0).abs() < 1e-12);
    }

    #[test]
    fn errors_name_the_value() {
        let message = |e: Error| e.to_string();
        assert!(message(Allocation::project(&[1.0, f64::NAN], &budget(2, 1)).unwrap_err()).contains("raw[1] = NaN"));
        assert!(message(Allocation::neyman(&[-1.0], &budget(2, 1)).unwrap_err()).contains("weights[0] = -1"));
    }
}
