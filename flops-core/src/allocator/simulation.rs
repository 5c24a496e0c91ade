//! What learning gains over the closed form, in simulations.

use burn::backend::Flex;
use rand::SeedableRng;
use rand::rngs::StdRng;

use super::gaussian::standard_normal;
use super::*;
use crate::testing::skewed_losses;
use crate::variance::VarianceTracker;

/// Second moments of `counts` queries each, whose coefficients are normal: v_j·χ²_A/A.
fn measure(variances: &[f64], counts: &[usize], rng: &mut StdRng) -> Vec<f64> {
    let mean = |&a: &usize| standard_normal(a, rng).iter().map(|z| z * z).sum::<f64>() / a as f64;
    counts.iter().map(mean).zip(variances).map(|(m, v)| m * v).collect()
}

fn allocator(kind: AllocatorKind) -> AnyAllocator<Flex> {
    AnyAllocator::new(kind, &Default::default()).unwrap()
}

/// A predictor that is off by a factor of two for half of the examples, those of high loss.
///
/// Of 64 examples 32 have high loss and √Tr Σ = 1, predicted as 2. Of the others 16 have 5 and 16
/// have 15, predicted right. With s the true roots and t the predicted ones, relative to uniform,
///
/// - Neyman on the predictions leaves (Σ s²/t)(Σ t)/(64 Σ s²) = 336·384/(64·4032) = 0.500,
/// - the optimum is (Σ s)²/(64 Σ s²) = 352²/(64·4032) = 0.480. It is linear in φ and ψ.
///
/// The seed is fixed: a failure means a change.
#[test]
fn learning_corrects_a_predictor_that_is_off_by_two_for_half_of_the_examples() {
    let roots: Vec<f64> = (0..64).map(|j| if j < 32 { 1.0 } else { 5.0 + 10.0 * (j % 2) as f64 }).collect();
    let losses: Vec<f64> = (0..64).map(|j| if j < 32 { 2.0 } else { 1.0 }).collect();
    let variances: Vec<f64> = roots.iter().map(|s| s * s).collect();
    let predicted: Vec<f64> = (0..64).map(|j| variances[j] * if j < 32 { 4.0 } else { 1.0 }).collect();
    // Neyman's 18, 45 and 135 queries are whole numbers
    let budget = QueryBudget::new(54, 1).unwrap();
    let features = DatumFeatures { losses: &losses, variances: &predicted, ..Default::default() };
    let uniform = variance_objective(&variances, &Allocation::uniform(64, &budget));
    let relative = |kind, steps| {
        let (mut allocator, mut rng) = (allocator(kind), StdRng::seed_from_u64(1));
        let mut sum = 0.0;
        for step in 0..steps {
            let (allocation, update) = allocator.allocate(&features, &budget, &mut rng).unwrap();
            if step >= steps / 2 {
                sum += variance_objective(&variances, &allocation) / uniform;
            }
            let moments = measure(&variances, allocation.counts(), &mut rng);
            allocator = allocator.apply(update, &Shown::new(&moments));
        }
        sum / (steps - steps / 2) as f64
    };
    let (neyman, learned) = (relative(AllocatorKind::Neyman, 2), relative(AllocatorKind::Gaussian, 200));
    assert!((neyman - 0.5).abs() < 1e-12, "{neyman}");
    assert!((0.480..0.482).contains(&learned), "{learned}");
}

/// How far the examples' own part of the variance spreads, and how many queries they get.
const CASES: [(f64, usize); 4] = [(0.3, 20), (0.3, 4), (1.0, 20), (1.0, 4)];

/// With the errors that the running estimate really makes, learning gains nothing over Neyman.
///
/// 256 examples lose a hundredth of their loss at each visit, for 24 epochs of 8 batches. The root
/// of Tr Σ is the loss to the power of 0.7 times e^(spread·z), z normal and fixed for an example:
/// the estimate has to learn it. Both allocators see the noise of the same generator. The seed is
/// fixed: a failure means a change.
#[test]
fn with_running_estimates_learning_gains_nothing_over_neyman() {
    for (spread, queries) in CASES {
        let start = skewed_losses(256, 7);
        let own = standard_normal(256, &mut StdRng::seed_from_u64(8));
        let budget = QueryBudget::new(queries, 1).unwrap();
        let spent = |kind| {
            let (mut allocator, mut rng) = (allocator(kind), StdRng::seed_from_u64(9));
            let (mut tracker, mut relative, mut known) = (VarianceTracker::default(), 0.0, 0.0);
            for step in 0..24 * 8 {
                let index: Vec<usize> = (0..32).map(|j| (step * 32 + j * 7 + step / 8) % 256).collect();
                let losses: Vec<f64> = index.iter().map(|&i| start[i] * 0.99f64.powi(step as i32 / 8)).collect();
                let root = |(&i, l): (&usize, &f64)| l.powf(0.7) * (spread * own[i]).exp();
                let variances: Vec<f64> = index.iter().zip(&losses).map(root).map(|s| s * s).collect();
                let ids: Vec<u64> = index.iter().map(|&i| i as u64).collect();
                let predicted = tracker.predict(&ids, &losses);
                let features = DatumFeatures { losses: &losses, variances: &predicted, ..Default::default() };
                let (allocation, update) = allocator.allocate(&features, &budget, &mut rng).unwrap();
                let report = AllocationReport::new(&variances, &allocation, &budget).unwrap();
                (relative, known) = (relative + report.relative_variance, known + report.neyman_relative_variance);
                let moments = measure(&variances, allocation.counts(), &mut rng);
                tracker.observe(&ids, &losses, &moments, allocation.counts());
                allocator = allocator.apply(update, &Shown::new(&moments));
            }
            (relative / 192.0, known / 192.0)
        };
        let [neyman, learned] = [AllocatorKind::Neyman, AllocatorKind::Gaussian].map(spent);
        let paper = spent(AllocatorKind::GaussianPaper);
        assert!((0.99..1.03).contains(&(learned.0 / neyman.0)), "{spread}, {queries}: {learned:?} {neyman:?}");
        assert!(paper.0 > 1.05 * neyman.0, "{spread}, {queries}: {paper:?} {neyman:?}");
    }
}
