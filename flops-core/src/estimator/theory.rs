//! The paper's theory on a problem whose covariances are known in closed form.
//!
//! One linear layer of D outputs and a loss linear in them, ℓ_j = t_jᵀ(x_jW + b): the gradient is x_j t_jᵀ and t_j, a query's estimate of it
//! x_j(cε)ᵀ and cε with c = t_jᵀε, whatever σ. For Gaussian ε, E‖cε‖² = (D + 2)‖t_j‖², so Tr Σ_j = (‖x_j‖² + 1)(D + 1)‖t_j‖².

use burn::module::AutodiffModule;

use super::*;
use crate::allocator::proxy;
use crate::budget::QueryBudget;
use crate::testing::{AB, B};

const D: usize = 3;

#[derive(Module, Debug)]
struct Linear<B: Backend> {
    fc: burn::nn::Linear<B>,
}

impl<B: Backend> ForwardModel<B> for Linear<B> {
    type Input = Tensor<B, 2>;
    type Target = Tensor<B, 2>;
    type Output = Tensor<B, 2>;
    fn forward(&self, x: Tensor<B, 2>, probe: &mut Probe<B>) -> Tensor<B, 2> {
        probe.linear(&self.fc, x)
    }
    fn losses(&self, y: Tensor<B, 2>, t: Tensor<B, 2>) -> Tensor<B, 1> {
        (y * t).sum_dim(1).squeeze_dim(1)
    }
}

/// √(Tr Σ_j) stand as 1 : 2 : 3 : 6, so that 24 queries, 6 for each of 4 data, are dealt out optimally in whole numbers.
const ROOTS: [f64; 4] = [1.0, 2.0, 3.0, 6.0];
const BATCH: f64 = 4.0;
const QUERIES: f64 = 6.0;

/// Theorem 2: by the proxy, equal allocation costs more than the optimal one by Σ_{j<k} (√Tr Σ_j − √Tr Σ_k)²/(B A₀), and the variance of the
/// estimate, which is J/B², by that over B²: the gap is B³A₀ times what is saved. (Its bound on the loss, η²L/2 times the
/// variance, is therefore η²L/2B³A₀ times the gap for the mean over a batch, and η²L/2BA₀ times it for the sum, as the paper has it.)
///
/// Measured from n = 8,000 estimates of each allocation: the relative standard error of each variance is about 2 %, and that of the saving, 31 of 48
/// parts, about 5 %; 20 % are 4 of them.
#[test]
fn theorem_2_is_the_variance_that_optimal_allocation_saves() {
    let device = Default::default();
    let with_graph = Linear::<AB> { fc: burn::nn::LinearConfig::new(2, D).init(&device) };
    let trained = trained_parameters(&with_graph);
    let model = with_graph.valid();
    // ‖x_j‖² = 2, ‖t_j‖ = root_j
    let targets: Vec<f32> = ROOTS.iter().flat_map(|&r| [0.6 * r as f32, 0.0, 0.8 * r as f32]).collect();
    let batch = Batch {
        ids: (0..4).collect(),
        input: Tensor::<B, 2>::ones([4, 2], &device),
        target: Tensor::<B, 2>::from_data(TensorData::new(targets, [4, D]), &device),
    };
    let traces = ROOTS.map(|r| 3.0 * (D as f64 + 1.0) * r * r);
    let estimator = Estimator {
        noise: NoiseLaw::Gaussian,
        placement: Placement::Joint,
        sigma: 1.0,
        seed: 8,
        ..Estimator::new(Space::Activation)
    };
    let clean = estimator.clean(&model, &batch, &trained).unwrap();
    let budget = QueryBudget::new(QUERIES as usize, 1).unwrap();
    let optimal = Allocation::neyman(&ROOTS, &budget).unwrap();
    assert_eq!(optimal.counts(), [2, 4, 6, 12]);

    let mut measured = vec![];
    for allocation in [Allocation::uniform(4, &budget), optimal] {
        let n = 8000;
        // the gradients are x_j t_jᵀ and t_j, averaged over the batch
        let truth: f64 = ROOTS.iter().sum::<f64>() / BATCH;
        let expected = [0.6 * truth, 0.0, 0.8 * truth];
        let variance = (0..n).map(|step| {
            let e = estimator.estimate(&model, &batch, &trained, &clean, &allocation, step).unwrap();
            let values = |t: Tensor<B, 1>| t.into_data().iter::<f64>().collect::<Vec<_>>();
            let weight = values(e.gradient(&model.fc.weight).unwrap().flatten(0, 1));
            let bias = values(e.gradient(model.fc.bias.as_ref().unwrap()).unwrap());
            weight.iter().chain(&bias).enumerate().map(|(i, g)| (g - expected[i % D]).powi(2)).sum::<f64>()
        });
        let variance = variance.sum::<f64>() / n as f64;
        let known = proxy(&traces, &allocation) / (BATCH * BATCH);
        assert!((variance / known - 1.0).abs() < 0.1, "{allocation:?}: {variance}, known {known}");
        measured.push(variance);
    }
    let mut gap = 0.0;
    for j in 0..4 {
        gap += (0..j).map(|k| (traces[j].sqrt() - traces[k].sqrt()).powi(2)).sum::<f64>();
    }
    let known = (proxy(&traces, &Allocation::uniform(4, &budget))
        - proxy(&traces, &Allocation::neyman(&ROOTS, &budget).unwrap()))
        / (BATCH * BATCH);
    assert!((BATCH.powi(3) * QUERIES * known / gap - 1.0).abs() < 1e-12, "{known} {gap}");
    let saved = measured[0] - measured[1];
    assert!((BATCH.powi(3) * QUERIES * saved / gap - 1.0).abs() < 0.2, "{saved} {gap}");
}

/// The lower bound's proxy: of all ways to deal out the budget, J is least at the closed form, and J/B² is the variance.
#[test]
fn the_proxy_is_least_at_the_closed_form() {
    let traces = ROOTS.map(|r| r * r);
    let j = |counts: [f64; 4]| traces.iter().zip(counts).map(|(v, a)| v / a).sum::<f64>();
    let least = j([2.0, 4.0, 6.0, 12.0]);
    assert!((least - ROOTS.iter().sum::<f64>().powi(2) / (BATCH * QUERIES)).abs() < 1e-12);
    for a in 1..22 {
        for b in 1..(23 - a) {
            for c in 1..(24 - a - b) {
                let counts = [a, b, c, 24 - a - b - c].map(f64::from);
                assert!(j(counts) >= least - 1e-12, "{counts:?}");
            }
        }
    }
}
