//! From the losses of the queries to their weights and second moments; the same for every space.

use super::settings::Estimator;
use crate::noise::NoiseSource;

/// How much the queries of a step changed the loss of their examples.
///
/// Every query with a finite loss counts for the square. The counts leave out examples whose clean
/// loss is exactly zero, for there a loss that cannot fall further is no fault.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct LossChanges {
    /// Queries with a finite loss.
    pub finite: u64,
    /// Those of examples whose clean loss is not zero.
    pub queries: u64,
    /// Of these, how many left the loss exactly as it was.
    pub unmoved: u64,
    /// Of these, how many moved it by at most 4 units in the last place of single precision.
    pub unresolved: u64,
    /// Mean of (ℓ_jq − ℓ_j)² over all queries with a finite loss; 0 without any.
    pub mean_square: f64,
}

/// Units in the last place up to which a change is rounding rather than signal.
const ROUNDING: f64 = 4.0;

impl LossChanges {
    /// Counts the changes from the `clean` losses to those of the queries.
    pub(super) fn of(losses: &[Vec<f64>], clean: &[f64]) -> Self {
        let mut out = Self::default();
        for (queried, &clean) in losses.iter().zip(clean) {
            let resolution = ROUNDING * f32::EPSILON as f64 * clean.abs();
            for change in queried.iter().map(|l| (l - clean).abs()).filter(|change| change.is_finite()) {
                out.finite += 1;
                out.mean_square += change * change;
                if clean != 0.0 {
                    out.queries += 1;
                    out.unmoved += u64::from(change == 0.0);
                    out.unresolved += u64::from(change > 0.0 && change <= resolution);
                }
            }
        }
        out.mean_square /= out.finite.max(1) as f64;
        out
    }

    /// The changes of pilots and of allocated queries together.
    pub(super) fn and(self, other: Self) -> Self {
        let (n, m) = (self.finite as f64, other.finite as f64);
        Self {
            finite: self.finite + other.finite,
            queries: self.queries + other.queries,
            unmoved: self.unmoved + other.unmoved,
            unresolved: self.unresolved + other.unresolved,
            mean_square: (n * self.mean_square + m * other.mean_square) / (n + m).max(1.0),
        }
    }
}

/// The queries that share a direction, and their squared coefficient.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Direction {
    pub index: u64,
    /// c²; of a pair twice the squared half-difference for each of its two queries.
    pub square: f64,
    pub queries: u64,
}

/// Weights of the queries of each example, and what follows from their losses.
pub(super) struct WeightedQueries {
    /// c_jq/(B·A_j), zero where dropped.
    pub weights: Vec<Vec<f64>>,
    /// The surviving directions of each example.
    pub directions: Vec<Vec<Direction>>,
    /// Queries of each example that gave a finite loss.
    pub survived: Vec<usize>,
    /// Queries that did not.
    pub dropped: u64,
}

impl Estimator {
    /// c_jq/(B·A_j) from the losses.
    ///
    /// A direction with a non-finite loss goes whole, and A_j becomes the surviving count.
    pub(super) fn query_weights(&self, losses: &[Vec<f64>], clean: &[f64]) -> WeightedQueries {
        let batch = losses.len() as f64;
        let group = self.sampling.group();
        let mut out = WeightedQueries { weights: vec![], directions: vec![], survived: vec![], dropped: 0 };
        for (queried, &clean) in losses.iter().zip(clean) {
            let mut c: Vec<f64> = queried.iter().map(|l| (l - clean) / self.sigma).collect();
            let (mut survived, mut directions) = (0usize, vec![]);
            for (index, direction) in c.chunks_mut(group).enumerate() {
                let queries = direction.len() as u64;
                if direction.iter().any(|c| !c.is_finite()) {
                    out.dropped += queries;
                    direction.fill(0.0);
                    continue;
                }
                survived += direction.len();
                let square = match &*direction {
                    // two queries, each of twice the pair's own second moment ((c₊ − c₋)/2)²
                    [plus, minus] => (*plus - *minus).powi(2),
                    one => one.iter().map(|c| c * c).sum(),
                };
                directions.push(Direction { index: index as u64, square, queries });
            }
            let scale = if survived > 0 { 1.0 / (batch * survived as f64) } else { 0.0 };
            c.iter_mut().for_each(|c| *c *= scale);
            out.weights.push(c);
            out.directions.push(directions);
            out.survived.push(survived);
        }
        out
    }

    /// Second moments of single-query estimates of each example, and (Σ c²·E_s·E s², queries) of
    /// each site.
    pub(super) fn second_moments(
        &self,
        noise: &NoiseSource,
        weighted: &WeightedQueries,
        squared_score_norms: &[Vec<f64>],
    ) -> (Vec<f64>, Vec<(f64, u64)>) {
        let s2 = self.score_second_moment();
        let single = noise.sites.is_some();
        let mut sites = vec![(0.0, 0); squared_score_norms.first().filter(|_| single).map_or(0, Vec::len)];
        let examples = weighted.directions.iter().zip(squared_score_norms).zip(&weighted.survived).enumerate();
        let moments = examples.map(|(j, ((directions, norms), &survived))| {
            let mut sum = 0.0;
            for &Direction { index, square, queries } in directions {
                let Some((site, fall)) = noise.landing(j as u64, index) else {
                    sum += s2 * square * norms.iter().sum::<f64>();
                    continue;
                };
                // noise in a span has as many times fewer coordinates
                let part = fall.span.map_or(1.0, |span| span.dim() as f64 / span.len() as f64);
                let moment = s2 * square * norms[site] * part;
                sites[site].0 += moment;
                sites[site].1 += queries;
                sum += moment * fall.weight.powi(2);
            }
            sum / survived as f64
        });
        let moments = moments.collect();
        (moments, sites)
    }
}

/// Standard deviation over queries of the mean change of loss, ℓ_jq − ℓ_j, of the examples that
/// have the query.
pub(super) fn loss_spread(losses: &[Vec<f64>], clean: &[f64]) -> f64 {
    let queries = losses.iter().map(Vec::len).max().unwrap_or(0);
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    let changes = |q: usize| {
        let changes = losses.iter().zip(clean).filter_map(move |(l, clean)| l.get(q).map(|l| l - clean));
        changes.filter(|change| change.is_finite()).collect::<Vec<_>>()
    };
    let means: Vec<f64> = (0..queries).map(|q| mean(&changes(q))).filter(|m| m.is_finite()).collect();
    if means.len() < 2 {
        return 0.0;
    }
    let centre = mean(&means);
    (means.iter().map(|m| (m - centre).powi(2)).sum::<f64>() / (means.len() - 1) as f64).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::estimator::Space;
    use crate::noise::Sampling;

    #[test]
    fn lost_queries_are_dropped_with_their_weight() {
        let estimator = Estimator { sampling: Sampling::Antithetic, sigma: 0.5, ..Estimator::new(Space::activation()) };
        let nan = f64::NAN;
        let losses = [vec![2.0, 1.0, nan, 3.0, 1.5], vec![nan, nan], vec![f64::INFINITY]];
        let w = estimator.query_weights(&losses, &[1.0, 1.0, 1.0]);
        // example 0: the pair (NaN, 3) goes whole; three queries survive: c = 2, 0 and the odd 1,
        // each over B·A_j = 3·3
        assert_eq!(w.weights[0], [2.0 / 9.0, 0.0, 0.0, 0.0, 1.0 / 9.0]);
        assert_eq!((w.survived.clone(), w.dropped), (vec![3, 0, 0], 2 + 2 + 1));
        let direction = |index, square, queries| Direction { index, square, queries };
        assert_eq!(w.directions[0], [direction(0, 4.0, 2), direction(2, 1.0, 1)]);
        assert_eq!(w.weights[1], [0.0, 0.0]);
        assert!(w.directions[1].is_empty());
    }

    /// ε = 2⁻²³: a change of 4 units of the loss's own last place is rounding, one of 5 is not.
    #[test]
    fn changes_that_single_precision_cannot_show_are_counted() {
        let ulp = f32::EPSILON as f64;
        let losses = [vec![2.0, 2.0 + 8.0 * ulp, 2.0 + 10.0 * ulp, f64::NAN], vec![0.0, 3.0], vec![-1.0, -1.0 - ulp]];
        let changes = LossChanges::of(&losses, &[2.0, 0.0, -1.0]);
        assert_eq!((changes.finite, changes.queries, changes.unmoved, changes.unresolved), (7, 5, 2, 2));
        // seven finite queries; the example whose loss is zero is in the square alone
        let square = (64.0 + 100.0 + 1.0) * ulp * ulp + 9.0;
        assert!((changes.mean_square - square / 7.0).abs() < 1e-15);
        // seven queries with squares of `square` in all, and three of 2 each
        let other = LossChanges { finite: 3, queries: 5, unmoved: 1, unresolved: 4, mean_square: 2.0 };
        let both = changes.and(other);
        assert_eq!((both.finite, both.queries, both.unmoved, both.unresolved), (10, 10, 3, 6));
        assert!((both.mean_square - (square + 6.0) / 10.0).abs() < 1e-15);
        assert_eq!(LossChanges::of(&[vec![f64::NAN]], &[1.0]), LossChanges::default());
    }

    /// FZOO's step: the gradient over the spread of the losses, so that its length does not depend
    /// on their scale.
    #[test]
    fn the_loss_spread_is_taken_over_directions() {
        assert_eq!(loss_spread(&[vec![1.0, 3.0, 5.0], vec![3.0, 5.0, 7.0]], &[0.0, 2.0]), 2.0);
        // examples that have fewer queries change nothing but their number
        assert_eq!(loss_spread(&[vec![1.0, 3.0], vec![7.0, 9.0], vec![5.0]], &[0.0, 6.0, 4.0]), 2f64.sqrt());
        assert_eq!(loss_spread(&[vec![1.0, f64::NAN], vec![3.0]], &[0.0, 0.0]), 0.0);
    }
}
