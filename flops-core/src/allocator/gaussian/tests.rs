use burn::backend::Flex;
use rand::{SeedableRng, seq::SliceRandom};

use super::*;
use crate::allocator::features::Embeddings;
use crate::allocator::objective::variance_objective;
use crate::testing::{skewed_losses, train_allocator};

const N: usize = 64;

fn queries(per_datum: usize) -> QueryBudget {
    QueryBudget::new(per_datum, 1).unwrap()
}

fn allocator(config: GaussianAllocatorConfig) -> GaussianAllocator<Flex> {
    config.init(&Default::default()).unwrap()
}

/// Skewed losses, as training leaves them, and embeddings around four directions.
fn batch(seed: u64) -> (Vec<f64>, Vec<f32>) {
    let noise = standard_normal(N * 8, &mut StdRng::seed_from_u64(seed + 1000));
    let embeddings = (0..N * 8).map(|k| noise[k] as f32 + if k % 8 == (k / 8) % 4 { 3.0 } else { 0.0 }).collect();
    (skewed_losses(N, seed), embeddings)
}

fn explained_by(losses: &[f64]) -> Vec<f64> {
    losses.iter().map(|l| (0.1 + l) * (0.1 + l)).collect()
}

/// J of the integer Neyman allocation.
fn neyman(variances: &[f64], budget: &QueryBudget) -> f64 {
    let weights: Vec<f64> = variances.iter().map(|v| v.sqrt()).collect();
    variance_objective(variances, &Allocation::neyman(&weights, budget).unwrap())
}

fn uniform(variances: &[f64], budget: &QueryBudget) -> f64 {
    variance_objective(variances, &Allocation::uniform(N, budget))
}

/// ln P(a|λ) up to a constant, from the definition of a multivariate normal. Its covariance is
/// read off the draws.
fn log_density(lambda: &[f64], design: &Design, distances: &Distances, a: &[f64]) -> f64 {
    let n = a.len();
    let g = Gaussian::new(lambda, design, |log_gamma| Covariance::new(distances, log_gamma));
    let mut covariance = vec![0.0; n * n];
    for k in 0..g.covariance.dim() {
        let mut z = vec![0.0; g.covariance.dim()];
        z[k] = 1.0;
        let x = g.covariance.colour(&z);
        (0..n * n).for_each(|ij| covariance[ij] += g.sigma * g.sigma * x[ij / n] * x[ij % n]);
    }
    crate::linalg::cholesky(&mut covariance, n, 1e-12);
    let rest: Vec<f64> = a.iter().zip(&g.mean).map(|(a, m)| a - m).collect();
    let mut solved = rest.clone();
    crate::linalg::solve(&covariance, &mut solved);
    let log_det: f64 = (0..n).map(|i| 2.0 * covariance[i * n + i].ln()).sum();
    -0.5 * (log_det + dot(&rest, &solved))
}

#[test]
fn the_score_agrees_with_finite_differences() {
    let (losses, embeddings) = batch(1);
    let n = 12;
    let embeddings = Embeddings::new(&embeddings[..n * 8], 8).unwrap();
    let features = DatumFeatures { losses: &losses[..n], variances: &losses[..n], ..Default::default() };
    let mut rng = StdRng::seed_from_u64(2);
    for (embeddings, exact_up_to, mean) in [
        (Some(&embeddings), 1024, MeanModel::Loss),
        (Some(&embeddings), 0, MeanModel::Ranks(4)),
        (None, 1024, MeanModel::Ranks(12)),
        (None, 0, MeanModel::Loss),
    ] {
        let design = mean.design(&features).unwrap();
        let distances = Distances::new(n, embeddings, exact_up_to, 5);
        let mut lambda: Vec<f64> = (0..mean.coefficients()).map(|k| 0.9 - 0.5 * (k % 2) as f64).collect();
        lambda.extend([0.2f64.ln(), 0.6f64.ln()]);
        let g = Gaussian::new(&lambda, &design, |log_gamma| Covariance::new(&distances, log_gamma));
        let draws = [g.draw(&mut rng), g.draw(&mut rng)];
        let numeric = |z: &[f64], i: usize| {
            let (a, h) = (g.raw(z), 1e-5);
            let at = |step: f64| {
                let mut lambda = lambda.clone();
                lambda[i] += step;
                log_density(&lambda, &design, &distances, &a)
            };
            (at(h) - at(-h)) / (2.0 * h)
        };
        for i in 0..lambda.len() {
            // the constant that `score` leaves out is the derivative of the density at a = μ
            let constant = numeric(&vec![0.0; g.covariance.dim()], i);
            for z in &draws {
                let (analytic, numeric) = (g.score(z)[i] + constant, numeric(z, i));
                // central differences of step 1e-5 have a relative error of about 1e-6; the
                // seed is fixed
                assert!((analytic - numeric).abs() < 2e-5 * (1.0 + numeric.abs()), "{i}: {analytic} {numeric}");
            }
        }
    }
}

// The next five take E[J] from 100 draws, with a standard error below 1 %. The seeds are fixed,
// so a failure means a change.

/// The paper's form, with one draw: J(λ) falls by likelihood-ratio updates to within 5 % of the
/// closed-form optimum.
#[test]
fn the_likelihood_ratio_reaches_the_closed_form_optimum() {
    for seed in 0..6 {
        let (losses, embeddings) = batch(seed);
        let variances = explained_by(&losses);
        let embeddings = (seed % 2 == 0).then(|| Embeddings::new(&embeddings, 8).unwrap());
        let features = DatumFeatures { losses: &losses, variances: &variances, embeddings, ..Default::default() };
        let (budget, best) = (queries(20), neyman(&variances, &queries(20)));
        let paper = || allocator(GaussianAllocatorConfig::paper());
        let [start, early, end] = [0, 40, 400].map(|steps| train_allocator(paper(), &features, &budget, seed, steps));
        assert!(start > early && early >= 0.98 * end, "seed {seed}: {start} {early} {end}");
        assert!(start > 1.2 * best, "seed {seed}: there must be something to gain: {start} against {best}");
        assert!(end <= 1.05 * best, "seed {seed}: {end} against {best}");
    }
}

#[test]
fn the_mean_stays_near_uniform_if_losses_explain_nothing() {
    for seed in 0..6 {
        let (losses, embeddings) = batch(seed);
        let mut shuffled = explained_by(&losses);
        shuffled.shuffle(&mut StdRng::seed_from_u64(seed + 100));
        let embeddings = (seed % 2 == 0).then(|| Embeddings::new(&embeddings, 8).unwrap());
        for variances in [shuffled, vec![2.0; N]] {
            let features = DatumFeatures { losses: &losses, variances: &variances, embeddings, ..Default::default() };
            let equal = uniform(&variances, &queries(20));
            for steps in [0, 20, 300] {
                let start = allocator(GaussianAllocatorConfig::new().with_mean(MeanModel::Loss));
                let j = train_allocator(start, &features, &queries(20), seed, steps);
                assert!(j <= 1.05 * equal, "seed {seed}, {steps} steps: {j} against {equal}");
            }
        }
    }
}

#[test]
fn every_mean_learns_with_four_queries() {
    let losses = skewed_losses(N, 2);
    let variances = explained_by(&losses);
    let values: Vec<f32> = losses.iter().flat_map(|&l| [l as f32, (l * l) as f32]).collect();
    let extra = Some(Embeddings::new(&values, 2).unwrap());
    let budget = queries(4);
    for mean in [MeanModel::Loss, MeanModel::Variance, MeanModel::Ranks(N), MeanModel::Features(2)] {
        let j = |variances: &[f64]| {
            let features = DatumFeatures { losses: &losses, variances, extra, ..Default::default() };
            train_allocator(allocator(GaussianAllocatorConfig::new().with_mean(mean)), &features, &budget, 2, 300)
        };
        let (explained, best) = (j(&variances), neyman(&variances, &budget));
        assert!(explained <= 1.15 * best, "{mean:?}: {explained} against {best}");
        let (flat, equal) = (j(&[1.0; N]), uniform(&[1.0; N], &budget));
        assert!(flat <= 1.06 * equal, "{mean:?}: {flat} against {equal}");
    }
}

/// If losses say nothing, the estimated variances in the mean still do: J is within 3 % of the
/// Neyman allocation's from the first step on.
#[test]
fn the_default_mean_starts_at_the_neyman_allocation_and_stays() {
    for (seed, per_datum) in [(0, 20), (1, 4)] {
        let losses = skewed_losses(N, seed);
        let mut variances = explained_by(&losses);
        variances.shuffle(&mut StdRng::seed_from_u64(seed + 100));
        let features = DatumFeatures { losses: &losses, variances: &variances, ..Default::default() };
        let (budget, best) = (queries(per_datum), neyman(&variances, &queries(per_datum)));
        for steps in [0, 300] {
            let start = allocator(GaussianAllocatorConfig::new());
            let j = train_allocator(start, &features, &budget, seed, steps);
            assert!(j <= 1.03 * best, "{per_datum} queries, {steps} steps: {j} against {best}");
        }
    }
}

#[test]
fn the_low_rank_covariance_learns_like_the_exact_one() {
    let (losses, embeddings) = batch(3);
    let variances = explained_by(&losses);
    let embeddings = Some(Embeddings::new(&embeddings, 8).unwrap());
    let features = DatumFeatures { losses: &losses, variances: &variances, embeddings, ..Default::default() };
    let [exact, low] = [1024, 0].map(|exact_up_to| {
        let start = allocator(GaussianAllocatorConfig::new().with_exact_up_to(exact_up_to).with_landmarks(16));
        train_allocator(start, &features, &queries(20), 1, 200)
    });
    assert!((low / exact - 1.0).abs() < 0.03, "{low} against {exact}");
}

#[test]
fn equally_good_samples_leave_lambda_unchanged() {
    let features = DatumFeatures { losses: &[1.0, 2.0], variances: &[0.0, 0.0], ..Default::default() };
    let start = allocator(GaussianAllocatorConfig::new());
    let (_, update) = start.allocate(&features, &queries(20), &mut StdRng::seed_from_u64(0)).unwrap();
    assert_eq!(start.clone().apply(update, &Shown::new(&[0.0, 0.0])).lambda(), start.lambda());
}

/// A step's queries are allocated by the λ of earlier steps. What they show changes the next.
#[test]
fn measurements_change_the_next_allocation_and_not_their_own() {
    let (losses, _) = batch(4);
    let features = DatumFeatures { losses: &losses, variances: &[1.0; N], ..Default::default() };
    let (budget, rng) = (queries(20), || StdRng::seed_from_u64(1));
    for draws in [false, true] {
        let config = GaussianAllocatorConfig::new().with_mean(MeanModel::Loss).with_draws(draws);
        let start = allocator(config);
        let (allocation, update) = start.allocate(&features, &budget, &mut rng()).unwrap();
        let design = MeanModel::Loss.design(&features).unwrap();
        let mean = nearest(&design.mean(&start.lambda()[..2]), &budget).unwrap();
        assert_eq!(allocation == mean, !draws);
        let after = |moments: &[f64]| start.clone().apply(update.clone(), &Shown::new(moments));
        let falling: Vec<f64> = losses.iter().map(|l| 1.0 / (0.1 + l)).collect();
        let (up, down) = (after(&losses), after(&falling));
        // more for large losses, or more for small ones: β₁ moves to where the measurements point
        assert!(up.lambda()[1] > start.lambda()[1] && down.lambda()[1] < start.lambda()[1]);
        assert_eq!(after(&[f64::NAN; N]).lambda(), start.lambda(), "nothing was measured");
        assert_eq!(after(&[1.0; 3]).lambda(), start.lambda(), "another batch");
        assert_eq!(start.allocate(&features, &budget, &mut rng()).unwrap().0, allocation);
        let next = up.allocate(&features, &budget, &mut rng()).unwrap().0;
        if !draws {
            let mean = nearest(&design.mean(&up.lambda()[..2]), &budget).unwrap();
            assert!(next == mean && next != allocation);
        }
    }
}

/// However far Adam would go, λ ends within its bounds.
#[test]
fn lambda_stays_within_its_bounds() {
    let (losses, _) = batch(5);
    let variances = explained_by(&losses);
    let features = DatumFeatures { losses: &losses, variances: &variances, ..Default::default() };
    let mut now = allocator(GaussianAllocatorConfig::new().with_lr(1.0));
    for step in 0..40 {
        let update = now.allocate(&features, &queries(20), &mut StdRng::seed_from_u64(step)).unwrap().1;
        now = now.apply(update, &Shown::new(if step % 2 == 0 { &variances } else { &losses }));
        let lambda = now.lambda();
        let near = |x: f64, (low, high): (f64, f64)| x >= low - 1e-6 && x <= high + 1e-6;
        assert!(near(lambda[0], BETA0) && near(lambda[1], BETA) && near(lambda[2], BETA), "{lambda:?}");
        // A₀·σ is at least one query
        assert!(near(lambda[3].exp(), (0.05, SIGMA.1)) && near(lambda[4].exp(), GAMMA), "{lambda:?}");
    }
}

/// σ has a floor of one query, in units of A₀; β₀ has bounds of its own, unless it is a rank's.
#[test]
fn bounds_are_those_of_each_coefficient() {
    let clamped = |mean, lambda: [f64; 5], per_datum| {
        let mut lambda = lambda;
        GaussianAllocatorConfig::new().with_mean(mean).clamp(&mut lambda, &queries(per_datum));
        lambda
    };
    let (low, high, variance) = ([-9.0; 5], [9.0; 5], MeanModel::Variance);
    let floors = [(20, 0.05f64), (1, 0.5), (5000, 1e-3)];
    for (per_datum, floor) in floors {
        assert_eq!(clamped(variance, low, per_datum), [0.0, -4.0, -4.0, floor.ln(), 0.1f64.ln()]);
    }
    assert_eq!(clamped(variance, high, 20), [2.0, 4.0, 4.0, 0.5f64.ln(), 0.0]);
    assert_eq!(clamped(MeanModel::Ranks(3), low, 20)[..3], [-4.0; 3]);
    assert_eq!(clamped(MeanModel::Ranks(3), high, 20)[..3], [4.0; 3]);
    let inside = [1.0, 0.5, -0.5, 0.1f64.ln(), 0.3f64.ln()];
    assert_eq!(clamped(variance, inside, 20), inside);
}

/// β₀ has no effect: the projection removes what all examples share.
#[test]
fn beta_0_changes_no_allocation() {
    let (losses, embeddings) = batch(6);
    let embeddings = Embeddings::new(&embeddings, 8).ok();
    let features = DatumFeatures { losses: &losses, variances: &losses, embeddings, ..Default::default() };
    let design = MeanModel::Variance.design(&features).unwrap();
    let distances = Distances::new(N, embeddings.as_ref(), 1024, 64);
    // multiples of 1/4 and a budget of 4 are exact in binary: equality is to the bit
    let counts = |beta_0: f64, draws: bool| {
        let lambda = [beta_0, 0.0, 0.0, 0.25f64.ln(), 0.5f64.ln()];
        let law = Gaussian::new(&lambda, &design, |log_gamma| Covariance::new(&distances, log_gamma));
        law.allocate(draws, &queries(4), &mut StdRng::seed_from_u64(7)).unwrap()
    };
    for draws in [false, true] {
        for beta_0 in [0.0, 0.5, 2.0] {
            assert_eq!(counts(beta_0, draws), counts(1.0, draws));
        }
    }
    assert_ne!(counts(1.0, true), counts(1.0, false));
}

#[test]
fn errors_name_the_setting() {
    let fail = |c: GaussianAllocatorConfig| c.init::<Flex>(&Default::default()).unwrap_err().to_string();
    let config = GaussianAllocatorConfig::new;
    assert!(fail(config().with_sigma(-0.1)).contains("sigma = -0.1"));
    assert!(fail(config().with_sigma_floor(0.0)).contains("sigma_floor = 0"));
    assert!(fail(config().with_samples(1)).contains("samples = 1"));
    assert!(fail(config().with_lr(f64::NAN)).contains("lr = NaN"));
    assert!(fail(config().with_gamma(99.0)).contains("gamma = 99"));
    assert!(fail(config().with_landmarks(0)).contains("landmarks = 0"));
}
