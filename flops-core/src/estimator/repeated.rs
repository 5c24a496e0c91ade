//! Layers that are called again within a pass: recurrences, episodes, shared layers.

use burn::module::{AutodiffModule, Module, Param};
use burn::nn::Linear;
use burn::prelude::*;

use super::*;
use crate::allocator::Allocation;
use crate::batch::Batch;
use crate::error::Error;
use crate::model::ForwardModel;
use crate::noise::script::{for_all, mean};
use crate::noise::{Placement, Sampling};
use crate::probe::Probe;
use crate::testing::pair::{PairBatch, assert_close, pair_batch};
use crate::testing::{AB, B, flat, true_gradient};

const SIGMA: f64 = 0.5;

fn linear<B: Backend, const I: usize, const O: usize>(weight: [[f32; O]; I]) -> Linear<B> {
    let weight = Tensor::<B, 2>::from_floats(weight, &Default::default());
    Linear { weight: Param::from_tensor(weight), bias: None }
}

fn estimator(space: Space) -> Estimator {
    Estimator { sigma: SIGMA, seed: 7, ..Estimator::new(space) }
}

fn vector<M: Module<B>>(model: &M, estimate: &Estimate<B>) -> Vec<f64> {
    flat(model, &mut |id, _| estimate.gradients.get(id).map(|g| g.to_data().iter::<f64>().collect()))
}

/// y = x₁S + x₂S + x₂H with a quadratic loss. The second call of S lies behind a stage, and so does H.
#[derive(Module, Debug)]
struct Twice<B: Backend> {
    shared: Linear<B>,
    head: Linear<B>,
}

impl<B: Backend> ForwardModel<B> for Twice<B> {
    type Input = (Tensor<B, 2>, Tensor<B, 2>);
    type Target = (Tensor<B, 2>, Tensor<B, 1>, Tensor<B, 1>);
    type Output = Tensor<B, 2>;

    fn forward(&self, input: Self::Input, probe: &mut Probe<B>) -> Tensor<B, 2> {
        let state = probe.stage(input, |(left, right), probe| (probe.linear(&self.shared, left), right));
        probe.stage(state, |(left, right), probe| {
            let again = probe.linear(&self.shared, right.clone());
            let head = probe.linear(&self.head, right);
            let both = probe.add(left, again);
            probe.add(both, head)
        })
    }

    fn losses(&self, y: Tensor<B, 2>, (t, a, k): Self::Target) -> Tensor<B, 1> {
        (y - t).powi_scalar(2).sum_dim(1).squeeze_dim::<1>(1) * a * 0.5 + k
    }
}

fn twice() -> Twice<AB> {
    Twice { shared: linear([[0.6, -0.4]]), head: linear([[0.3, 0.8]]) }
}

/// A layer that is called twice is one site in the low-rank space, its gradient that of both calls. A
/// query on the other layer begins between the calls.
#[test]
fn the_mean_is_the_gradient_of_all_calls() {
    let with_graph = twice();
    let (model, trained) = (with_graph.valid(), trained_parameters(&with_graph));
    let low_rank = |rank, placement| Space::low_rank(rank).with_placement(placement).unwrap();
    for (space, ids) in [
        (low_rank(1, Placement::Joint), &[2][..]),
        (low_rank(1, Placement::Single), &[0, 1]),
        (low_rank(1, Placement::CostWeighted), &[1]),
        (low_rank(2, Placement::Single), &[2]),
        (Space::activation(), &[0, 1]),
        (Space::weights(), &[0, 1]),
    ] {
        let gradient = true_gradient(&with_graph, pair_batch::<AB>(ids, 1));
        let batch: PairBatch<B> = pair_batch(ids, 1);
        for sampling in [Sampling::OneSided, Sampling::Antithetic] {
            let estimator = Estimator { sampling, ..estimator(space) };
            let mut clean = estimator.clean(&model, &batch, &trained).unwrap();
            clean.check_sites().unwrap();
            match space {
                Space::LowRank { .. } => {
                    assert_eq!(clean.sites().len(), 2);
                    clean.set_site_probabilities(vec![0.3, 0.7]).unwrap();
                }
                Space::Activation { .. } => assert_eq!(clean.sites().len(), 3),
                Space::Weights { .. } => {}
            }
            let allocation = Allocation::of(&vec![sampling.group(); ids.len()]);
            let mean = mean(|| vector(&model, &clean.estimate(&allocation, 3).unwrap()));
            assert_close(&mean, &gradient, &format!("{space:?} {sampling}"));
        }
    }
}

/// h ← tanh(hW) three times, then ℓ = Σ(h − t)².
#[derive(Module, Debug)]
struct Recurrence<B: Backend> {
    cell: Linear<B>,
}

impl<B: Backend> ForwardModel<B> for Recurrence<B> {
    type Input = Tensor<B, 2>;
    type Target = Tensor<B, 2>;
    type Output = Tensor<B, 2>;

    fn forward(&self, mut h: Tensor<B, 2>, probe: &mut Probe<B>) -> Tensor<B, 2> {
        for _ in 0..3 {
            h = probe.linear(&self.cell, h).tanh();
        }
        h
    }

    fn losses(&self, h: Tensor<B, 2>, t: Tensor<B, 2>) -> Tensor<B, 1> {
        (h - t).powi_scalar(2).sum_dim(1).squeeze_dim(1)
    }
}

fn loss_at(model: &Recurrence<B>, batch: &Batch<Tensor<B, 2>, Tensor<B, 2>>, step: &[f64]) -> f64 {
    let device = Default::default();
    let step: Vec<f32> = step.iter().map(|&v| v as f32).collect();
    let moved = model.cell.weight.val() + Tensor::from_data(TensorData::new(step, [2, 2]), &device);
    let moved = Recurrence { cell: Linear { weight: Param::from_tensor(moved), bias: None } };
    let output = moved.forward(batch.input.clone(), &mut Probe::clean());
    moved.losses(output, batch.target.clone()).into_scalar().elem()
}

/// A query of low rank through a recurrence is a step of its weight: ĝ = c·E with σc = ℓ(W + σE) − ℓ(W),
/// for every E. Its squared norm is that of the weight, whatever the number of calls.
#[test]
fn a_query_moves_the_weight_and_not_its_calls() {
    let with_graph = Recurrence::<AB> { cell: linear([[0.7, -0.3], [0.2, 0.9]]) };
    let (model, trained) = (with_graph.valid(), trained_parameters(&with_graph));
    let device = Default::default();
    let input = Tensor::<B, 2>::from_floats([[0.8, -0.5]], &device);
    let batch = Batch { ids: vec![4], input, target: Tensor::from_floats([[0.1, 0.6]], &device) };
    for placement in [Placement::Joint, Placement::Single] {
        let estimator = estimator(Space::low_rank(1).with_placement(placement).unwrap());
        let clean = estimator.clean(&model, &batch, &trained).unwrap();
        clean.check_sites().unwrap();
        assert_eq!(clean.sites().len(), 1);
        let start = loss_at(&model, &batch, &[0.0; 4]);
        for_all(
            || clean.estimate(&Allocation::of(&[1]), 3).unwrap(),
            |_, estimate| {
                let g = vector(&model, &estimate);
                let c = g[0].abs();
                assert!(c > 1e-3 && g.iter().all(|g| (g.abs() - c).abs() < 1e-5), "{g:?}");
                // c and E are known up to a common sign
                let signed = [1.0, -1.0].map(|sign| {
                    let step: Vec<f64> = g.iter().map(|g| sign * SIGMA * g / c).collect();
                    loss_at(&model, &batch, &step) - start - sign * SIGMA * c
                });
                assert!(signed.iter().any(|error| error.abs() < 1e-5), "{signed:?}");
                assert_close(&estimate.second_moments, &[4.0 * c * c], "four coordinates");
            },
        );
    }
}

/// y₁ = xw, x₂ = sign y₁, y₂ = x₂w and ℓ = x₂y₂, which is w: an action between the calls of a layer.
#[derive(Module, Debug)]
struct Jump<B: Backend> {
    policy: Linear<B>,
}

impl<B: Backend> ForwardModel<B> for Jump<B> {
    type Input = Tensor<B, 2>;
    type Target = ();
    type Output = (Tensor<B, 2>, Tensor<B, 2>);

    fn forward(&self, x: Tensor<B, 2>, probe: &mut Probe<B>) -> Self::Output {
        let action = probe.linear(&self.policy, x).sign();
        let y = probe.linear(&self.policy, action.clone());
        let [action, y] = probe.align([action, y]);
        (action, y)
    }

    fn losses(&self, (action, y): Self::Output, (): ()) -> Tensor<B, 1> {
        (action * y).squeeze_dim(1)
    }
}

/// With one call perturbed at a time the inputs of that call are the clean ones, also behind an action:
/// the mean is dℓ/dw = 1, where the clean inputs with all calls perturbed would give
/// E[sign(w + σε)]·sign(w). That is refused.
#[test]
fn inputs_of_a_single_call_are_the_clean_ones() {
    let with_graph = Jump::<AB> { policy: linear([[0.1]]) };
    let (model, trained) = (with_graph.valid(), trained_parameters(&with_graph));
    let batch = Batch { ids: vec![4], input: Tensor::<B, 2>::ones([1, 1], &Default::default()), target: () };
    for space in [Space::activation(), Space::low_rank(1), Space::weights()] {
        let estimator = estimator(space);
        let mut clean = estimator.clean(&model, &batch, &trained).unwrap();
        if clean.sites().len() == 2 {
            clean.set_site_probabilities(vec![0.3, 0.7]).unwrap();
        }
        let mean = mean(|| vector(&model, &clean.estimate(&Allocation::of(&[2]), 3).unwrap()));
        assert_close(&mean, &[1.0], &space.to_string());
    }
    let joint = estimator(Space::activation().with_placement(Placement::Joint).unwrap());
    let refused = joint.clean(&model, &batch, &trained).err().unwrap();
    assert_eq!(refused, Error::RepeatedCalls { path: "model.policy.weight".into(), calls: 2 });
    let message = refused.to_string();
    assert!(
        ["policy.weight", "2 times", "single placement", "weight or low-rank space"]
            .iter()
            .all(|w| message.contains(w))
    );
    assert!(!refused.may_pass());
}

/// x ← xw up to four times, until a row is above 1.5.
#[derive(Module, Debug)]
struct Episode<B: Backend> {
    policy: Linear<B>,
}

impl<B: Backend> ForwardModel<B> for Episode<B> {
    type Input = Tensor<B, 2>;
    type Target = ();
    type Output = Tensor<B, 2>;

    fn forward(&self, mut x: Tensor<B, 2>, probe: &mut Probe<B>) -> Tensor<B, 2> {
        for _ in 0..4 {
            x = probe.linear(&self.policy, x);
            if x.clone().max().into_scalar().elem::<f64>() > 1.5 {
                break;
            }
        }
        x
    }

    fn losses(&self, x: Tensor<B, 2>, (): ()) -> Tensor<B, 1> {
        x.squeeze_dim(1)
    }
}

/// A query that ends early has fewer calls. That is an error where every call is a site, and nothing to
/// noise on weights, which is the same for all calls.
#[test]
fn an_episode_that_ends_early_is_an_error_or_no_matter() {
    let with_graph = Episode::<AB> { policy: linear([[1.0]]) };
    let (model, trained) = (with_graph.valid(), trained_parameters(&with_graph));
    let batch = Batch { ids: vec![4], input: Tensor::<B, 2>::ones([1, 1], &Default::default()), target: () };
    for space in Space::ALL {
        let estimator = Estimator { sigma: 1.0, ..estimator(space) };
        let clean = estimator.clean(&model, &batch, &trained).unwrap();
        let (sites, each_call) = (clean.sites().len(), matches!(space, Space::Activation { .. }));
        assert_eq!(sites, if matches!(space, Space::LowRank { .. }) { 1 } else { 4 }, "{space}");
        for_all(
            || clean.estimate(&Allocation::of(&[1]), 3),
            |_, estimate| match estimate {
                // w is 0 or 2: x is 0 in the end, or 2 after one call; (ℓ − 1)/σ·ε is 1 in both cases
                Ok(estimate) if !each_call => assert_close(&vector(&model, &estimate), &[1.0], &space.to_string()),
                // the clean pass ends at 1; what makes it 2 at the last call ends no call early
                Ok(estimate) => assert!(vector(&model, &estimate)[0].is_finite()),
                Err(error) => {
                    let Error::SitesVary { path, few, many } = &error else { panic!("{error}") };
                    assert!(path == "model.policy.weight" && *few < 4 && *many == 4, "{error}");
                    assert!(error.to_string().contains("mask the steps behind its end"), "{error}");
                    assert!(each_call && !error.may_pass());
                }
            },
        );
        let fails = mean(|| vec![f64::from(u8::from(clean.estimate(&Allocation::of(&[1]), 3).is_err()))]);
        // noise above 0 at one of the first three of four calls
        assert_eq!(fails, [if each_call { 3.0 / 8.0 } else { 0.0 }], "{space}");
    }
}
