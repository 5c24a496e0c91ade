//! Advice from made-up reports: each signature alone, and none for a healthy run.

use super::*;
use crate::allocator::AllocationReport;
use crate::estimator::LossChanges;

fn healthy(step: u64) -> StepReport {
    let allocation = AllocationReport {
        cv: 1.0,
        floor: 0.5,
        relative_variance: 0.6,
        neyman_relative_variance: 0.55,
        min: 1,
        max: 60,
    };
    StepReport {
        step,
        // falls by half in 100 steps, and scatters from batch to batch
        loss: 2.0 * (-0.007 * step as f64).exp() * (1.0 + 0.1 * scatter(step)),
        batch_size: 64,
        queries: 1280,
        queries_total: 1280 * (step + 1),
        dropped: 0,
        squared_norm: 1.0,
        variance: 0.5,
        rows: 256,
        memory: Some(1 << 30),
        sigma: 0.01,
        changes: LossChanges { finite: 1280, queries: 1280, unmoved: 10, unresolved: 0, mean_square: 1e-4 },
        loss_noise: step.is_multiple_of(1000).then_some(0.0),
        allocation,
        sites: vec![],
        data: vec![],
    }
}

/// A value in [−1, 1] without a pattern over the steps.
fn scatter(step: u64) -> f64 {
    crate::random::derive_seed(&[step]) as f64 / u64::MAX as f64 * 2.0 - 1.0
}

/// The advice given in 1,000 steps.
fn told(change: impl Fn(&mut StepReport)) -> Vec<Advice> {
    let mut diagnostics = Diagnostics::new(Bounds { rows: Some(256), memory: Some(2 << 30) });
    (0..1000)
        .flat_map(|step| {
            let mut report = healthy(step);
            change(&mut report);
            diagnostics.observe(&report)
        })
        .collect()
}

#[track_caller]
fn only(signature: Signature, words: &[&str], change: impl Fn(&mut StepReport)) {
    let told = told(change);
    assert_eq!(told.iter().map(|a| a.signature).collect::<Vec<_>>(), [signature], "{told:?}");
    for word in words {
        assert!(told[0].message.contains(word), "{word} in {:?}", told[0].message);
    }
    assert!(!told[0].message.contains('\n'));
}

#[test]
fn a_healthy_run_gets_no_advice() {
    assert_eq!(told(|_| {}), []);
    // a loss that has fallen and scatters there is done, not slow
    assert_eq!(told(|r| r.loss = r.loss.max(0.02 * (1.0 + 0.1 * scatter(r.step)))), []);
}

/// A fall of a tenth in 600 steps is progress, although batches scatter by more.
#[test]
fn a_slow_fall_is_not_standing_still() {
    assert_eq!(told(|r| r.loss = 2.0 * (-0.0002 * r.step as f64).exp() * (1.0 + 0.5 * scatter(r.step))), []);
}

#[test]
fn high_variance_despite_enough_queries() {
    only(Signature::HighVariance, &["97 % of the estimate is noise", "20 queries", "fewer layers"], |r| {
        r.variance = 0.97
    });
    only(Signature::HighVariance, &["the allocation is poor", "1.50 of uniform's"], |r| {
        r.variance = 0.97;
        r.allocation.relative_variance = 1.5;
    });
    // in the weight space the variance is not known
    assert_eq!(told(|r| r.variance = f64::NAN), []);
    // with two queries per example noise is expected
    assert_eq!(
        told(|r| {
            r.variance = 0.97;
            r.queries = 128;
        }),
        []
    );
}

#[test]
fn an_oscillating_loss() {
    only(Signature::OscillatingLoss, &["up and down", "lower lr"], |r| {
        r.loss *= 1.0 + 0.5 * (r.step as f64 * std::f64::consts::TAU / 60.0).sin();
    });
    // scatter alone is no oscillation, however large
    assert_eq!(told(|r| r.loss *= 1.0 + 0.5 * scatter(r.step + 9000)), []);
}

#[test]
fn slow_convergence_under_an_optimal_allocation() {
    only(Signature::SlowConvergence, &["stands at 2.0", "raise lr"], |r| r.loss = 2.0 + 0.2 * scatter(r.step));
    // under a poor allocation slow convergence is expected
    assert_eq!(
        told(|r| {
            r.loss = 2.0 + 0.2 * scatter(r.step);
            r.allocation.relative_variance = 1.0;
        }),
        []
    );
}

/// The remedy follows the cause: steps, a large constant, or a small σ.
#[test]
fn queries_that_do_not_move_the_loss() {
    let still = |r: &mut StepReport| r.changes.unmoved = 1200;
    only(Signature::UnmovedLoss, &["94 %", "the loss has steps", "raise sigma (try 0.1 to 0.5)"], still);
    only(Signature::UnmovedLoss, &["the loss has steps", "raise sigma further", "smoother"], |r| {
        still(r);
        r.sigma = 0.2;
    });
    only(Signature::UnmovedLoss, &["loss of 1.000e6", "subtract a constant"], |r| {
        still(r);
        r.loss = 1e6;
    });
    only(Signature::UnmovedLoss, &["sigma = 0.000000001 is too small"], |r| {
        still(r);
        r.sigma = 1e-9;
    });
    only(Signature::UnmovedLoss, &["less than single precision can tell", "too small"], |r| {
        (r.changes.unmoved, r.changes.unresolved) = (1080, 100);
    });
    // a part of the queries may stay without effect
    assert_eq!(told(|r| r.changes.unmoved = 1100), []);
    // a loss that is zero nearly everywhere has nowhere to fall
    assert_eq!(told(|r| (r.changes.queries, r.changes.unmoved) = (0, 0)), []);
}

#[test]
fn noise_of_the_loss_itself() {
    only(Signature::NoisyLoss, &["scatter by 5.000e-3", "50 %", "raise sigma (0.01)"], |r| {
        r.loss_noise = r.loss_noise.map(|_| 5e-3);
    });
    assert_eq!(told(|r| r.loss_noise = r.loss_noise.map(|_| 2e-3)), [], "8 % of what is measured");
}

#[test]
fn a_loss_that_rises_by_orders_of_magnitude() {
    let words = ["risen from", "lower lr"];
    only(Signature::ExplodingLoss, &words, |r| r.loss = if r.step < 500 { r.loss } else { 100.0 });
    // a loss that falls below 0 has not risen
    assert_eq!(told(|r| r.loss = if r.step < 500 { r.loss } else { -100.0 }), []);
    // tenfold is much, and still no divergence
    assert_eq!(told(|r| r.loss *= if (500..510).contains(&r.step) { 10.0 } else { 1.0 }), []);
}

#[test]
fn batches_of_one_are_told_once() {
    let told = |allocates, single: fn(u64) -> bool| {
        let mut diagnostics = Diagnostics::new(Bounds::default()).with_allocation(allocates);
        let step = |step| StepReport { batch_size: if single(step) { 1 } else { 64 }, queries: 20, ..healthy(step) };
        (0..6000).flat_map(|i| diagnostics.observe(&step(i))).map(|a| (a.signature, a.step)).collect::<Vec<_>>()
    };
    assert_eq!(told(true, |_| true).first(), Some(&(Signature::SingleExamples, 19)));
    let times = |told: Vec<_>| told.iter().filter(|(signature, _)| *signature == Signature::SingleExamples).count();
    assert_eq!(times(told(true, |step| step % 100 > 30)), 1);
    // a uniform allocator has nothing to divide anyway, and the last batch of an epoch may be one
    assert_eq!(times(told(false, |_| true)), 0);
    assert_eq!(times(told(true, |step| step % 10 == 9)), 0);
}

/// A loss at fault is not answered by "raise lr" or by fewer layers.
#[test]
fn a_loss_at_fault_gets_no_other_advice() {
    only(Signature::UnmovedLoss, &["the loss has steps"], |r| {
        r.loss = 2.0 + 0.2 * scatter(r.step);
        r.changes.unmoved = 1280;
    });
    only(Signature::NoisyLoss, &["scatter"], |r| {
        r.variance = 0.97;
        r.loss_noise = r.loss_noise.map(|_| 1.0);
    });
}

#[test]
fn rows_and_memory_over_their_bounds() {
    only(Signature::OverBound, &["300 rows, 256 are allowed"], |r| r.rows = if r.step == 7 { 300 } else { 256 });
    only(Signature::OverBound, &["3072 MiB, 2048 are allowed"], |r| r.memory = Some(3 << 30));
    assert_eq!(told(|r| r.memory = None), []);
}

#[test]
fn advice_is_not_repeated_at_every_look() {
    let mut diagnostics = Diagnostics::new(Bounds::default());
    let mut steps = vec![];
    for step in 0..5000 {
        let report = StepReport { loss: 2.0 + 0.2 * scatter(step), ..healthy(step) };
        steps.extend(diagnostics.observe(&report).into_iter().map(|a| a.step));
    }
    assert_eq!(steps.len(), 3, "{steps:?}");
    assert!(steps.windows(2).all(|s| s[1] - s[0] >= AGAIN));
}
