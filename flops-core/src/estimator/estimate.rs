//! A gradient estimate: its gradients, what it tells of its variance, what it cost.

use std::time::Duration;

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::prelude::*;

use super::query_weights::LossChanges;
use crate::allocator::Allocation;
use crate::control_variate::Observation;
#[cfg(doc)]
use crate::noise::Placement;
use crate::ops;
use crate::probe::Gradients;
use crate::site_tracker::{self, SiteMoment};

/// Rows and time of a pass.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct PassCost {
    /// Rows sent through the model.
    pub rows: u64,
    /// Wall-clock time.
    ///
    /// An update of weight noise on a device reads nothing back: there it is the time of handing
    /// out the work.
    pub elapsed: Duration,
    /// Rows of the largest forward pass among them.
    pub largest: u64,
}

impl PassCost {
    fn and(self, other: Self) -> Self {
        Self {
            rows: self.rows + other.rows,
            elapsed: self.elapsed + other.elapsed,
            largest: self.largest.max(other.largest),
        }
    }
}

/// A gradient estimate and what it tells of its own variance.
#[non_exhaustive]
pub struct Estimate<B: Backend> {
    pub(crate) gradients: Gradients<B>,
    /// Estimate of E‖ĝ_jq‖² for each example j: the second moment of a single-query estimate.
    ///
    /// With a control variate, it is the second moment of what the control variate leaves. It
    /// exceeds Tr Σ_j by ‖E ĝ_j‖², a part of about 1/(D + 2) in D perturbed dimensions.
    ///
    /// The squared coefficient and the squared score norm are taken for independent. That is exact
    /// for signs on one token, and an approximation otherwise (`docs/method.md`, *What is
    /// measured*). NaN where no query of the example survived.
    pub second_moments: Vec<f64>,
    /// What the queries on each site show of its second moment, in the order of the sites.
    ///
    /// Empty, unless a direction falls on one site alone ([`Placement::Single`] and
    /// [`Placement::CostWeighted`]).
    pub site_moments: Vec<SiteMoment>,
    /// What the queries show of the control variate, where the clean pass had a prediction
    /// (activation space).
    pub observed: Option<Observation>,
    /// Queries of each example that gave a finite loss.
    pub survived: Vec<usize>,
    /// Queries that did not, and were dropped with their weight.
    pub dropped: u64,
    /// How much the queries changed the loss.
    pub changes: LossChanges,
    /// For a combination of two estimates: the queries of each example in the first, and its
    /// weight.
    pub(super) mixed: Option<(usize, f64)>,
    /// Standard deviation of the batch's mean loss over the shared directions; 0 for fewer than
    /// two.
    pub(super) loss_spread: f64,
    /// Cost of the queries.
    pub queries: PassCost,
    /// Cost of the update: clean rows recorded, gradients formed.
    pub update: PassCost,
}

impl<B: Backend> Estimate<B> {
    /// The gradient of a parameter; `None` where it is frozen or was not reached.
    pub fn gradient<const D: usize>(&self, param: &Param<Tensor<B, D>>) -> Option<Tensor<B, D>> {
        self.gradients.get(param.id).map(|g| g.clone().reshape(param.dims()))
    }

    /// ‖ĝ‖², over all parameters.
    pub fn squared_norm(&self) -> f64 {
        ops::dot_to_host(self.gradients.iter().map(|g| (g.clone(), g.clone())))
    }

    /// ĝ·σ/spread, the spread that of the losses; ĝ itself where they do not differ.
    pub(crate) fn normalise(&mut self, sigma: f64) {
        if self.loss_spread > 0.0 {
            self.gradients = std::mem::take(&mut self.gradients).scaled(sigma / self.loss_spread);
        }
    }

    /// weight·ĝ + (1 − weight)·ĝ′: two estimates of independent noise as one.
    ///
    /// It is unbiased where the weight was fixed before either was drawn. The first has the same
    /// number of queries for each example. An example that lost all queries of one of them has the
    /// other's weight alone.
    pub(crate) fn combine(self, other: Self, weight: f64) -> Self {
        let queries =
            self.second_moments.iter().zip(&other.second_moments).zip(self.survived.iter().zip(&other.survived));
        let second_moments = queries.map(|((&a, &b), (&n, &m))| match (n, m) {
            (0, _) => b,
            (_, 0) => a,
            _ => (n as f64 * a + m as f64 * b) / (n + m) as f64,
        });
        let second_moments = second_moments.collect();
        let first = (self.queries.rows as usize).checked_div(self.survived.len()).unwrap_or(0);
        let mut gradients = self.gradients.scaled(weight);
        gradients.merge(other.gradients.scaled(1.0 - weight));
        let mut site_moments = self.site_moments;
        site_tracker::merge(&mut site_moments, other.site_moments);
        let observed = match (self.observed, other.observed) {
            (Some(mut a), Some(mut b)) => {
                // the variance of the combination, as the mean of two that are merged
                a.sites.iter_mut().for_each(|site| site.weigh_variance(2.0 * weight.powi(2)));
                b.sites.iter_mut().for_each(|site| site.weigh_variance(2.0 * (1.0 - weight).powi(2)));
                a.merge(b);
                Some(a)
            }
            (a, b) => a.or(b),
        };
        Self {
            gradients,
            second_moments,
            site_moments,
            observed,
            survived: self.survived.iter().zip(other.survived).map(|(a, b)| a + b).collect(),
            dropped: self.dropped + other.dropped,
            changes: self.changes.and(other.changes),
            mixed: Some((first, weight)),
            loss_spread: other.loss_spread,
            queries: self.queries.and(other.queries),
            update: self.update.and(other.update),
        }
    }

    /// B² times the variance of this estimate, Σ_j v_j/A_j.
    ///
    /// For a combination with P pilots it is Σ_j v_j (w²/P + (1 − w)²/(A_j − P)).
    pub(crate) fn variance_objective(&self, variances: &[f64], allocation: &Allocation) -> f64 {
        let share = |a: usize| match self.mixed {
            Some((first, w)) => w * w / first as f64 + (1.0 - w).powi(2) / (a - first) as f64,
            None => 1.0 / a as f64,
        };
        variances.iter().zip(allocation.counts()).map(|(v, &a)| v * share(a)).sum()
    }

    /// The gradients as Burn's optimizers take them, under the ids of `model`'s parameters.
    pub fn into_params<M: Module<B>>(self, model: &M) -> GradientsParams {
        struct Register<'a, B: Backend>(&'a mut Gradients<B>, GradientsParams);
        impl<B: Backend> ModuleVisitor<B> for Register<'_, B> {
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
                if let Some(g) = self.0.take(param.id) {
                    let value = param.val();
                    self.1.register::<B, D>(param.id, g.reshape(value.dims()).cast(value.dtype()));
                }
            }
        }
        let mut gradients = self.gradients;
        let mut register = Register(&mut gradients, GradientsParams::new());
        model.visit(&mut register);
        register.1
    }
}

#[cfg(test)]
mod tests {
    use burn::module::ParamId;

    use super::*;
    use crate::testing::B;

    /// An estimate of `rows` queries, whose gradient is the number of its queries.
    fn estimate(second_moments: &[f64], survived: &[usize], rows: u64) -> Estimate<B> {
        let mut gradients = Gradients::default();
        gradients.add_flat(ParamId::from(1), Tensor::from_floats([rows as f32], &Default::default()));
        let cost = |rows| PassCost { rows, elapsed: Duration::from_secs(rows), largest: rows };
        Estimate {
            gradients,
            second_moments: second_moments.to_vec(),
            site_moments: vec![],
            observed: None,
            survived: survived.to_vec(),
            dropped: rows,
            changes: LossChanges::default(),
            mixed: None,
            loss_spread: 0.0,
            queries: cost(rows),
            update: cost(2 * rows),
        }
    }

    fn gradient(estimate: &Estimate<B>) -> f64 {
        estimate.gradients.get(ParamId::from(1)).unwrap().clone().into_scalar().into()
    }

    /// Two pilots for each of three examples, and three queries on average. One example lost all
    /// queries of the rest, another all its pilots.
    #[test]
    fn two_estimates_are_combined_by_their_weight_and_their_queries() {
        let (pilot, rest) =
            (estimate(&[4.0, 7.0, f64::NAN], &[2, 2, 0], 6), estimate(&[10.0, f64::NAN, 5.0], &[3, 0, 4], 9));
        let both = pilot.combine(rest, 0.25);
        assert_eq!(both.second_moments, [(2.0 * 4.0 + 3.0 * 10.0) / 5.0, 7.0, 5.0]);
        assert_eq!((both.survived.clone(), both.dropped), (vec![5, 2, 4], 15));
        assert_eq!(gradient(&both), 0.25 * 6.0 + 0.75 * 9.0);
        let cost = |cost: PassCost| (cost.rows, cost.elapsed.as_secs(), cost.largest);
        assert_eq!((cost(both.queries), cost(both.update)), ((15, 15, 9), (30, 30, 18)));
        // w²/P + (1 − w)²/(A_j − P), with P = 2
        let share = |rest: f64| 0.0625 / 2.0 + 0.5625 / rest;
        let variance = both.variance_objective(&[8.0, 16.0, 32.0], &Allocation::of(&[5, 4, 6]));
        assert_eq!(variance, 8.0 * share(3.0) + 16.0 * share(2.0) + 32.0 * share(4.0));
    }

    #[test]
    fn the_variance_of_an_estimate_falls_with_the_queries_of_each_example() {
        let alone = estimate(&[1.0; 3], &[1; 3], 3);
        assert_eq!(alone.variance_objective(&[8.0, 16.0, 9.0], &Allocation::of(&[2, 4, 3])), 4.0 + 4.0 + 3.0);
    }

    #[test]
    fn a_gradient_is_not_normalised_where_the_losses_do_not_differ() {
        for (loss_spread, expected) in [(0.0, 6.0), (4.0, 0.75)] {
            let mut estimate = Estimate { loss_spread, ..estimate(&[1.0], &[6], 6) };
            estimate.normalise(0.5);
            assert_eq!(gradient(&estimate), expected, "spread {loss_spread}");
        }
    }
}
