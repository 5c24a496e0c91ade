//! How many queries a step may spend, how they are dealt out, and what was spent.
//!
//! An [`Allocation`] meets its budget by construction: Σ_j A_j = B·A₀ and every A_j ≥ A_min, in integers.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::Error;

/// Queries per datum, on average (A₀) and at least (A_min).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
            return fail("queries_per_datum", queries_per_datum, format!("at most {} are supported", Self::MAX_PER_DATUM));
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
