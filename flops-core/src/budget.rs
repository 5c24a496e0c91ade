//! How many queries a step may spend, how they are dealt out, and what was spent.
//!
//! An [`Allocation`] meets its budget by construction: Σ_j A_j = B·A₀ and every A_j ≥ A_min, in integers.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::Error;

/// Queries per datum, on average (A₀) and at least (A_min).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueryBudget {
    queries_per_datum: usize,
    min_per_datum: usize,
}

impl QueryBudget {
    /// The largest A₀ accepted, so that the sums over a batch are exact in `f64`.
    pub const MAX_PER_DATUM: usize = 1 << 24;

    /// A budget of `queries_per_datum` (A₀) per datum on average, of which each gets at least `min_per_datum` (A_min).
    ///
    /// # Errors
    /// Unless 1 ≤ A_min ≤ A₀ ≤ [`Self::MAX_PER_DATUM`].
    pub fn new(queries_per_datum: usize, min_per_datum: usize) -> Result<Self, Error> {
        let fail = |name, value, remedy: String| Err(Error::Budget { name, value, remedy });
        if queries_per_datum == 0 {
            return fail("queries_per_datum", 0, "give every datum at least 1 query".into());
        }
        if queries_per_datum > Self::MAX_PER_DATUM {
            return fail(
                "queries_per_datum",
                queries_per_datum,
                format!("at most {} are supported", Self::MAX_PER_DATUM),
            );
        }
        if min_per_datum == 0 {
            return fail("min_per_datum", 0, "use at least 1: a datum without a query biases the gradient".into());
        }
        if min_per_datum > queries_per_datum {
            let remedy = format!("lower it to queries_per_datum = {queries_per_datum} or less");
            return fail("min_per_datum", min_per_datum, remedy);
        }
        Ok(Self { queries_per_datum, min_per_datum })
    }

    /// A₀.
    pub fn queries_per_datum(&self) -> usize {
        self.queries_per_datum
    }

    /// A_min.
    pub fn min_per_datum(&self) -> usize {
        self.min_per_datum
    }

    /// As many queries as A₀ whole passes are worth when a query takes the part `cost` of one, 0 < `cost` ≤ 1, rounded down.
    pub(crate) fn at_cost(&self, cost: f64) -> Self {
        let queries = (self.queries_per_datum as f64 / cost.clamp(1e-3, 1.0) + 1e-9) as usize;
        Self { queries_per_datum: queries.min(Self::MAX_PER_DATUM), ..*self }
    }

    /// What is left for the allocation when `pilots` queries of each datum have been spent on estimating its variance; they count towards A_min.
    ///
    /// # Errors
    /// If nothing would be left.
    pub fn after_pilots(&self, pilots: usize) -> Result<Self, Error> {
        if pilots == 0 || pilots >= self.queries_per_datum {
            let remedy = format!("use 1 to {}, fewer than queries_per_datum", self.queries_per_datum.saturating_sub(1));
            return Err(Error::Budget { name: "pilot queries", value: pilots, remedy });
        }
        Self::new(self.queries_per_datum - pilots, self.min_per_datum.saturating_sub(pilots).max(1))
    }

    /// B·A₀, what a batch of `batch_size` data spends.
    pub fn total(&self, batch_size: usize) -> usize {
        batch_size * self.queries_per_datum
    }
}

/// The queries given to each datum of a batch: A_j ≥ A_min, Σ_j A_j = B·A₀.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Allocation {
    counts: Vec<usize>,
}

impl Allocation {
    /// A_j = A₀ for every datum.
    pub fn uniform(batch_size: usize, budget: &QueryBudget) -> Self {
        Self { counts: vec![budget.queries_per_datum; batch_size] }
    }

    /// The allocation nearest to `raw`, one real number of queries per datum.
    ///
    /// Euclidean projection onto {a_j ≥ A_min, Σ a_j = B·A₀}, that is max(raw_j − τ, A_min) for one τ, then
    /// largest-remainder rounding; equal remainders go to the larger raw entry, then to the earlier datum.
    /// A larger raw entry never gets fewer queries. A constant added to all entries changes nothing.
    ///
    /// # Errors
    /// If an entry is not finite.
    pub fn project(raw: &[f64], budget: &QueryBudget) -> Result<Self, Error> {
        if let Some(index) = raw.iter().position(|r| !r.is_finite()) {
            let remedy = "the raw allocation must be finite";
            return Err(Error::Value { name: "raw", index, value: raw[index], remedy });
        }
        let (n, floor) = (raw.len(), budget.min_per_datum);
        let spare = n * (budget.queries_per_datum - floor);
        // Measured from the largest entry, anything below −spare gets nothing: no overflow, whatever the input.
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
        // `order` is stable under this sort: ties keep the larger raw entry, then the earlier datum, first.
        order.sort_by(|&i, &j| remainder(j).total_cmp(&remainder(i)));
        let mut given: usize = counts.iter().sum();
        for &j in order.iter().cycle().take(2 * n) {
            if given >= spare {
                break;
            }
            counts[j] += 1;
            given += 1;
        }
        // Only floating-point error can have dealt out too much.
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

    /// The integer allocation of least variance Σ_j w_j² / A_j; `weights` w_j = √(Tr Σ_j).
    ///
    /// Starts from the real solution A_j = max(A_min, c·w_j), rounded down, and moves single queries to where they
    /// help most. The objective is separable and convex, so when no single move helps the minimum is reached.
    /// Weights all zero give the uniform allocation. O(B log B).
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
        let (total, floor) = (budget.total(weights.len()), budget.min_per_datum);
        let counts = water_fill(&weights, total, floor);
        Ok(Self { counts: exchange(counts, &variances, total, floor) })
    }

    /// As many more queries for each datum.
    pub(crate) fn with_more(mut self, queries: usize) -> Self {
        self.counts.iter_mut().for_each(|count| *count += queries);
        self
    }

    /// A_j, one entry per datum.
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

/// max(floor, c·w_j) rounded down, with c such that the real numbers sum to `total`.
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

/// A datum's value for the next move, valid while it has `count` queries. Larger value first, then earlier datum.
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

/// Adds, removes, then swaps single queries until `counts` sums to `total` and no swap lowers Σ v_j / A_j.
fn exchange(mut counts: Vec<usize>, variances: &[f64], total: usize, floor: usize) -> Vec<usize> {
    // What the query after the `a`-th of datum j is worth: v/a − v/(a+1).
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

/// The phases of a training step that evaluate the model or change it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// The unperturbed forward: losses, embeddings, output.
    Clean,
    /// Queries spent on estimating variances before the allocation.
    Pilot,
    /// The allocated queries.
    Query,
    /// Forming the gradients and updating the parameters.
    Update,
}

impl Phase {
    /// All phases, in the order of a step.
    pub const ALL: [Self; 4] = [Self::Clean, Self::Pilot, Self::Query, Self::Update];
}

/// What one phase has cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    /// Queries: forward evaluations of one datum under one perturbation.
    pub queries: u64,
    /// Rows sent through the model.
    pub row_forwards: u64,
    /// Wall-clock seconds.
    pub seconds: f64,
}

impl Cost {
    fn add(&mut self, other: Cost) {
        self.queries += other.queries;
        self.row_forwards += other.row_forwards;
        self.seconds += other.seconds;
    }
}

/// What training has cost so far, by [`Phase`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Ledger {
    costs: [Cost; 4],
}

impl Ledger {
    /// Books a cost.
    pub fn add(&mut self, phase: Phase, queries: u64, row_forwards: u64, elapsed: Duration) {
        self.costs[phase as usize].add(Cost { queries, row_forwards, seconds: elapsed.as_secs_f64() });
    }

    /// What `phase` has cost.
    pub fn of(&self, phase: Phase) -> Cost {
        self.costs[phase as usize]
    }

    /// What all phases have cost together.
    pub fn total(&self) -> Cost {
        let mut total = Cost::default();
        self.costs.iter().for_each(|c| total.add(*c));
        total
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

    // Properties, exact: no tolerance, no false failures.
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
            // A constant added to all entries changes nothing.
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
            // Relative 1e-12: the order of summation.
            prop_assert!(cost(&variances, a.counts()) <= least * (1.0 + 1e-12), "{:?} {}", a, least);
            prop_assert!(ordered(&weights, a.counts()));
        }
    }

    #[test]
    fn known_allocations() {
        assert_eq!(Allocation::uniform(3, &budget(5, 2)).counts(), [5, 5, 5]);
        assert_eq!(Allocation::project(&[4.0, 1.0, 1.0], &budget(2, 1)).unwrap().counts(), [4, 1, 1]);
        // τ = 0.5 leaves 1.5, 1.5, 3: the remainder goes to the earlier of the two.
        assert_eq!(Allocation::project(&[2.0, 2.0, 3.5], &budget(2, 1)).unwrap().counts(), [2, 1, 3]);
        assert_eq!(Allocation::neyman(&[1.0, 3.0], &budget(4, 1)).unwrap().counts(), [2, 6]);
        assert_eq!(Allocation::neyman(&[0.0, 0.0, 9.0], &budget(7, 3)).unwrap().counts(), [3, 3, 15]);
        assert_eq!(Allocation::neyman(&[0.0; 3], &budget(7, 3)).unwrap().counts(), [7, 7, 7]);
    }

    #[test]
    fn neyman_on_a_large_batch() {
        // The greedy deal from A_min upwards, one query at a time, is optimal: the same cost to rounding error.
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
    fn unusable_input_is_named() {
        let message = |e: Error| e.to_string();
        assert!(message(QueryBudget::new(0, 1).unwrap_err()).contains("queries_per_datum = 0"));
        assert!(message(QueryBudget::new(4, 0).unwrap_err()).contains("min_per_datum = 0"));
        assert!(message(QueryBudget::new(4, 5).unwrap_err()).contains("min_per_datum = 5; lower it"));
        assert!(QueryBudget::new(usize::MAX, 1).is_err());
        assert!(message(Allocation::project(&[1.0, f64::NAN], &budget(2, 1)).unwrap_err()).contains("raw[1] = NaN"));
        assert!(message(Allocation::neyman(&[-1.0], &budget(2, 1)).unwrap_err()).contains("weights[0] = -1"));
    }

    #[test]
    fn the_ledger_adds_up() {
        let mut ledger = Ledger::default();
        ledger.add(Phase::Query, 20, 40, Duration::from_millis(500));
        ledger.add(Phase::Query, 1, 2, Duration::from_millis(250));
        ledger.add(Phase::Clean, 0, 7, Duration::from_millis(250));
        assert_eq!(ledger.of(Phase::Query), Cost { queries: 21, row_forwards: 42, seconds: 0.75 });
        assert_eq!(ledger.total(), Cost { queries: 21, row_forwards: 49, seconds: 1.0 });
        let json = serde_json::to_string(&ledger).unwrap();
        assert_eq!(serde_json::from_str::<Ledger>(&json).unwrap(), ledger);
    }
}
