//! Loops of a user's own, which call `estimate`, `update` and `evaluate` and get errors back.

use burn::module::AutodiffModule;
use burn::optim::{GradientsParams, SgdConfig};
use burn::train::{InferenceStep, TrainStep};

use super::{config, learner, points, watchful};
use crate::batch::Batch;
use crate::error::Error;
use crate::testing::{AB, B, weights, zoo_batch};

/// Weights, cost, reports and evaluation are those of burn-train's calls, bit for bit.
#[test]
fn a_plain_loop_is_what_burn_train_does() {
    let (mut own, mut driven) = (learner(config()), learner(config()));
    let optimizer = || SgdConfig::new().init();
    for i in 0..4 {
        let step = own.estimate(&zoo_batch::<B>(5, i)).unwrap();
        own = own.update(&mut optimizer(), 0.05, step.grads).unwrap();
        let output = TrainStep::step(&driven, zoo_batch::<B>(5, i));
        driven = driven.optimize::<AB, _>(&mut optimizer(), 0.05, output.grads);
        step.output.losses.into_data().assert_eq(&output.item.losses.into_data(), true);
    }
    assert_eq!(weights(&own.model.valid()), weights(&driven.model.valid()));
    assert_eq!(own.state().step, 4);
    assert_eq!(own.monitor().ledger().total().queries, driven.monitor().ledger().total().queries);
    assert_eq!(own.monitor().take_reports().len(), 4);
    let evaluated = own.valid().evaluate(zoo_batch::<B>(5, 0)).unwrap();
    let expected = InferenceStep::step(&driven.valid(), zoo_batch::<B>(5, 0));
    evaluated.losses.into_data().assert_eq(&expected.losses.into_data(), true);
}

/// An error is returned and recorded where it occurs, and once: nothing panics later.
#[test]
fn errors_are_returned_where_they_occur() {
    let learner = watchful();
    let uneven = || Batch { ids: vec![1, 2, 3], ..points([1.0, 2.0]) };
    let error = learner.estimate(&uneven()).err().unwrap();
    assert!(!error.may_pass(), "{error}");
    assert_eq!(learner.monitor().error(), Some(error));
    assert!(learner.valid().evaluate(uneven()).is_err());
    // the failed step has no gradients, and the next one trains
    let learner = learner.update(&mut SgdConfig::new().init(), 0.1, GradientsParams::new()).unwrap();
    assert_eq!(weights(&learner.model.valid()), [1.0; 3]);
    let step = learner.estimate(&points([1.0, 2.0])).unwrap();
    let learner = learner.update(&mut SgdConfig::new().init(), 0.1, step.grads).unwrap();
    assert_ne!(weights(&learner.model.valid()), [1.0; 3]);
}

/// An update tells what burn-train's would stop or panic for.
#[test]
fn updates_return_divergence_and_foreign_updates() {
    let mut learner = watchful();
    *learner.model.poison.lock().unwrap() = f32::NAN;
    let mut failed = 0;
    let error = loop {
        let step = learner.estimate(&points([1.0, 2.0])).unwrap();
        assert!(step.grads.is_empty());
        failed += 1;
        match learner.update(&mut SgdConfig::new().init(), 0.1, step.grads) {
            Ok(next) => learner = next,
            Err(error) => break error,
        }
    };
    assert_eq!(failed, 3);
    assert!(matches!(error, Error::Diverged { .. }), "{error}");

    let learner = watchful();
    let step = learner.estimate(&points([1.0, 2.0])).unwrap();
    learner.pending.for_each(|pending| pending.update = Some(Box::new("foreign")));
    let error = learner.update(&mut SgdConfig::new().init(), 0.1, step.grads).err();
    assert_eq!(error, Some(Error::ForeignUpdate { allocator: "uniform" }));
}
