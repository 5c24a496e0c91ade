//! Weight noise in a subspace: what an estimate is within a period, and over periods.

use std::collections::HashMap;

use burn::prelude::*;

use super::tests::{subspaces, unbiased};
use super::weight_noise::Lift;
use super::*;
use crate::allocator::{Allocation, AllocatorKind};
use crate::noise::script::for_all;
use crate::noise::{NoiseLaw, Sampling, basis_seed, forced, orthonormal_basis, random_basis};
use crate::testing::pair::{Case, Pair, assert_close, case, pair};
use crate::testing::{B, flat};

const SEED: u64 = 7;
const RANDOM: Subspace = Subspace::Random { rank: 1, period: 3 };
const ORTHONORMAL: Subspace = Subspace::Orthonormal { rank: 1, period: 3 };

fn estimator(subspace: Subspace) -> Estimator {
    let space = Space::weights().with_subspace(subspace).unwrap();
    Estimator { sigma: 0.5, seed: SEED, ..Estimator::new(space) }
}

fn vector(clean: &CleanPass<'_, B, Pair<B>>, estimate: &Estimate<B>) -> Vec<f64> {
    flat(clean.model, &mut |id, _| estimate.gradients.get(id).map(|g| g.to_data().iter::<f64>().collect()))
}

fn clean<'a>(estimator: &'a Estimator, case: &'a Case) -> CleanPass<'a, B, Pair<B>> {
    estimator.clean(&case.model, &case.batch, &case.trained).unwrap()
}

/// The basis of the first layer, a column, in the period of `step`.
fn basis(subspace: Subspace, step: u64, inputs: usize) -> Vec<f64> {
    let seed = basis_seed(SEED, step / 3, 0);
    let basis = match subspace {
        Subspace::Orthonormal { .. } => orthonormal_basis(seed, [inputs, 1]),
        _ => random_basis(NoiseLaw::Rademacher, seed, [inputs, 1]),
    };
    basis.into_iter().map(f64::from).collect()
}

/// BBᵀG for the matrix of the first layer, `[inputs, 2]`, and the gradient of the second as it is.
fn projected(basis: &[f64], gradient: &[f64]) -> Vec<f64> {
    let inputs = basis.len();
    let along = |output: usize| (0..inputs).map(|i| basis[i] * gradient[2 * i + output]).sum::<f64>();
    let first = (0..2 * inputs).map(|k| basis[k / 2] * along(k % 2));
    first.chain(gradient[2 * inputs..].iter().copied()).collect()
}

/// Within a period E ĝ = BBᵀg/R, exactly, over all signs of U and unequal counts. For an orthonormal
/// basis that is d/R times the projection of g. Over all signs of a random basis it is g.
///
/// The second layer is a vector, and has its whole gradient in every period.
#[test]
fn the_mean_is_the_projection_in_a_period_and_the_gradient_over_all() {
    let case = case(&pair(2, false), &[0, 1]);
    for subspace in [RANDOM, ORTHONORMAL] {
        for (sampling, counts) in [(Sampling::OneSided, [2, 1]), (Sampling::Antithetic, [3, 2])] {
            let (name, step) = (format!("{subspace} {sampling}"), 4);
            let estimator = Estimator { sampling, ..estimator(subspace) };
            let (clean, allocation) = (clean(&estimator, &case), Allocation::of(&counts));
            // by the signs of the basis: the probability, and the sum of the estimates
            let mut means: HashMap<Vec<u64>, (Vec<f64>, f64, Vec<f64>)> = HashMap::new();
            let work = || (basis(subspace, step, 2), vector(&clean, &clean.estimate(&allocation, step).unwrap()));
            for_all(work, |probability, (basis, gradient)| {
                let bits = basis.iter().map(|b| b.to_bits()).collect();
                let (_, total, sums) = means.entry(bits).or_insert((basis, 0.0, vec![0.0; gradient.len()]));
                *total += probability;
                sums.iter_mut().zip(gradient).for_each(|(sum, g)| *sum += probability * g);
            });
            assert_eq!(means.len(), if subspace == RANDOM { 4 } else { 1 }, "{name}");
            let mut over_all = vec![0.0; case.gradient.len()];
            for (basis, total, sums) in means.values() {
                over_all.iter_mut().zip(sums).for_each(|(all, sum)| *all += sum);
                let mean: Vec<f64> = sums.iter().map(|sum| sum / total).collect();
                let expected = projected(basis, &case.gradient);
                assert_close(&mean, &expected, &format!("{name}, basis {basis:?}"));
                let other = expected.iter().zip(&case.gradient).any(|(e, g)| (e - g).abs() > 0.1);
                assert!(other, "{name}: the projection is not the gradient: {expected:?}");
            }
            if subspace == RANDOM {
                assert_close(&over_all, &case.gradient, &name);
            }
        }
    }
}

/// Every law, all layers of a model, host and device: 16 cases each, with another subspace in every
/// step.
///
/// Sample size, tolerances and false-failure rate are those of
/// `unbiased_for_every_space_law_sampling_and_allocator`.
#[test]
fn estimates_are_unbiased_over_subspaces() {
    let cases = || unbiased(&subspaces(), |kind, _| kind == AllocatorKind::Gaussian);
    assert_eq!((cases(), forced::on(cases)), (16, 16));
}

/// One query's gradient of a matrix is a column B times a row U. The column is that of the period,
/// whatever the batch and the seed of the queries; the row is another one in each step.
#[test]
fn a_subspace_is_kept_for_its_period() {
    let cases = [case(&pair(3, false), &[0]), case(&pair(3, false), &[2])];
    for subspace in [RANDOM, ORTHONORMAL] {
        let estimator = Estimator { noise: NoiseLaw::Gaussian, ..estimator(subspace) };
        let of = |case: &Case, seed: u64, step: u64| {
            let clean = clean(&estimator, case);
            let g = vector(&clean, &clean.estimate_with_seed(seed, &Allocation::of(&[1]), step).unwrap());
            let column = [g[2] / g[0], g[4] / g[0]];
            assert!((g[3] / g[1] - column[0]).abs() < 1e-4 * column[0].abs(), "rank 1: {g:?}");
            (column, g[1] / g[0])
        };
        let near = |a: [f64; 2], b: [f64; 2]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-4 * b.abs());
        let (columns, rows): (Vec<_>, Vec<_>) = (0..9).map(|step| of(&cases[0], SEED, step)).unzip();
        for (a, b) in (0..9).flat_map(|a| (0..a).map(move |b| (a, b))) {
            assert_eq!(near(columns[a], columns[b]), a / 3 == b / 3, "{subspace}: steps {a} and {b}: {columns:?}");
            assert!((rows[a] - rows[b]).abs() > 1e-4 * rows[b].abs(), "{subspace}: steps {a} and {b}: {rows:?}");
        }
        let (other_batch, other_seed) = (of(&cases[1], SEED, 4), of(&cases[0], 99, 4));
        assert!(near(other_batch.0, columns[4]) && near(other_seed.0, columns[4]), "{subspace}");
        assert!(other_batch.1 != rows[4] && other_seed.1 != rows[4], "{subspace}");
    }
}

/// The squared norm of a query's noise is the number of parameters, whatever the rank: m_j is ‖ĝ‖² of
/// a single query, exactly for signs.
#[test]
fn second_moments_are_those_of_single_queries_in_a_subspace() {
    let case = case(&pair(3, true), &[2]);
    for subspace in [RANDOM, ORTHONORMAL, Subspace::Orthonormal { rank: 1, period: 1 }] {
        for sampling in [Sampling::OneSided, Sampling::Antithetic] {
            let estimator = Estimator { sampling, ..estimator(subspace) };
            let (clean, queries) = (clean(&estimator, &case), sampling.group());
            for step in 0..20 {
                let estimate = clean.estimate(&Allocation::of(&[queries]), step).unwrap();
                let square = queries as f64 * vector(&clean, &estimate).iter().map(|g| g * g).sum::<f64>();
                assert_close(&estimate.second_moments, &[square], &format!("{subspace} {sampling}"));
            }
        }
    }
}

/// A rank that no matrix exceeds leaves full noise, to the bit.
#[test]
fn a_rank_that_no_matrix_exceeds_is_full_noise() {
    let case = case(&pair(3, true), &[0, 1]);
    let gradients = |subspace| {
        let estimator = estimator(subspace);
        let clean = clean(&estimator, &case);
        vector(&clean, &clean.estimate(&Allocation::of(&[2, 2]), 5).unwrap())
    };
    let full = gradients(Subspace::Full);
    assert_eq!(gradients(Subspace::Random { rank: 2, period: 1 }), full);
    assert_eq!(gradients(Subspace::Orthonormal { rank: 2, period: 1 }), full);
    assert_ne!(gradients(Subspace::Orthonormal { rank: 1, period: 1 }), full);
}

/// B `[3, 2]` times U `[2, 2]`: by inputs and outputs, or by outputs and inputs.
#[test]
fn drawn_values_are_lifted_into_the_layout_of_their_parameter() {
    let device = Default::default();
    let basis = Tensor::<B, 2>::from_floats([[1.0, 0.0], [2.0, 1.0], [0.0, -1.0]], &device);
    let lifted = |inputs_first| {
        let lift = Lift::LowRank { basis: basis.clone(), outputs: 2, inputs_first };
        assert_eq!((lift.drawn(), lift.len()), (4, 6));
        lift.apply(Tensor::from_floats([3.0, 4.0, 5.0, 6.0], &device)).into_data().to_vec::<f32>().unwrap()
    };
    assert_eq!(lifted(true), [3.0, 4.0, 11.0, 14.0, -5.0, -6.0]);
    assert_eq!(lifted(false), [3.0, 11.0, -5.0, 4.0, 14.0, -6.0]);
}
