//! Which sets of trained parameters have passed the check of their sites.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};

use burn::module::ParamId;

use crate::error::Error;

/// The trained parameters of the last step whose sites were checked, shared by clones of a learner.
///
/// It belongs to the process: a resumed run, whose code may be another, is checked again. Nothing
/// that a step computes depends on it.
#[derive(Clone, Debug, Default)]
pub(super) struct SiteChecks(Arc<Mutex<Arc<HashSet<ParamId>>>>);

impl SiteChecks {
    /// Runs `check`, unless these trained parameters have passed it. Other workers wait for it.
    pub fn once(
        &self,
        trained: &Arc<HashSet<ParamId>>,
        check: impl FnOnce() -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut passed = self.0.lock().unwrap_or_else(|e| e.into_inner());
        if *passed != *trained {
            check()?;
            *passed = trained.clone();
        }
        Ok(())
    }
}

#[cfg(all(test, feature = "train"))]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use burn::nn::{Initializer, Linear, LinearConfig};
    use burn::optim::SgdConfig;
    use burn::prelude::*;
    use burn::train::{InferenceStep, Interrupter, TrainStep};

    use super::*;
    use crate::allocator::{QueryBudget, Uniform};
    use crate::batch::Batch;
    use crate::estimator::Space;
    use crate::model::ForwardModel;
    use crate::probe::Probe;
    use crate::testing::{AB, B};
    use crate::train::{ForwardConfig, ForwardLearner};

    /// A regression with a weight penalty in its losses, which counts its passes.
    #[derive(Module, Debug)]
    struct Penalised<B: Backend> {
        fc: Linear<B>,
        penalty: f64,
        skips: bool,
        #[module(skip)]
        passes: Arc<AtomicUsize>,
    }

    impl<B: Backend> ForwardModel<B> for Penalised<B> {
        type Input = Tensor<B, 2>;
        type Target = ();
        type Output = Tensor<B, 2>;

        fn forward(&self, x: Tensor<B, 2>, probe: &mut Probe<B>) -> Tensor<B, 2> {
            self.passes.fetch_add(1, Ordering::Relaxed);
            probe.linear(&self.fc, x)
        }

        fn losses(&self, y: Tensor<B, 2>, (): ()) -> Tensor<B, 1> {
            let losses = y.powi_scalar(2).sum_dim(1).squeeze_dim(1);
            if self.penalty == 0.0 {
                return losses;
            }
            losses + self.fc.weight.val().powi_scalar(2).sum().mul_scalar(self.penalty)
        }

        fn skips_site_check(&self) -> bool {
            self.skips
        }
    }

    fn learner(penalty: f64, skips: bool, space: Space) -> ForwardLearner<AB, Penalised<AB>, Uniform> {
        let fc =
            LinearConfig::new(3, 2).with_initializer(Initializer::Constant { value: 0.5 }).init(&Default::default());
        let config = ForwardConfig::new(QueryBudget::new(2, 1).unwrap()).with_space(space);
        let model = Penalised { fc, penalty, skips, passes: Arc::default() };
        let learner = ForwardLearner::new(model, Uniform, config).unwrap();
        learner.monitor().stop_with(Interrupter::new());
        learner
    }

    fn batch(ids: u64, rows: usize) -> Batch<Tensor<B, 2>, ()> {
        let x = Tensor::<B, 1, Int>::arange(0..3 * rows as i64, &Default::default()).float();
        Batch { ids: (0..ids).collect(), input: x.sin().reshape([rows, 3]), target: () }
    }

    /// The first step fails and names the parameter, in the spaces of sites alone.
    #[test]
    fn a_weight_penalty_in_the_losses_stops_the_first_step() {
        for space in Space::ALL {
            for skips in [false, true] {
                let learner = learner(1e-4, skips, space);
                let output = TrainStep::step(&learner, batch(4, 4));
                let fails = space.is_independent() && !skips;
                let paths = "model.fc.weight".to_string();
                assert_eq!(learner.monitor().error(), fails.then_some(Error::ActsOutsideSites { paths }), "{space}");
                assert_eq!(output.grads.len(), if fails { 0 } else { 2 });
            }
        }
    }

    /// The check costs two passes, once, and changes nothing that a step gives.
    #[test]
    fn the_check_runs_once_and_changes_nothing() {
        let run = |skips| {
            let mut learner = learner(0.0, skips, Space::activation());
            let (mut optimizer, mut passes) = (SgdConfig::new().init(), vec![]);
            for _ in 0..3 {
                let before = learner.model.passes.load(Ordering::Relaxed);
                let output = TrainStep::step(&learner, batch(4, 4));
                passes.push(learner.model.passes.load(Ordering::Relaxed) - before);
                learner = learner.optimize::<AB, _>(&mut optimizer, 0.01, output.grads);
            }
            assert_eq!(learner.monitor().error(), None);
            let rows: Vec<u64> = learner.monitor().take_reports().iter().map(|r| r.queries_total).collect();
            (passes, rows, learner.model.fc.weight.val().into_data())
        };
        let (with, without) = (run(false), run(true));
        assert_eq!((with.0[0], &with.0[1..]), (without.0[0] + 2, &without.0[1..]));
        assert_eq!((with.1, with.2), (without.1, without.2));
    }

    /// Training and evaluation name a batch whose parts differ in length.
    #[test]
    fn a_batch_of_unequal_parts_is_an_error() {
        let expected = || Some(Error::Length { name: "the input of the batch", got: 5, expected: 8 });
        let learner = learner(0.0, false, Space::weights());
        assert_eq!(TrainStep::step(&learner, batch(8, 5)).grads.len(), 0);
        assert_eq!(learner.monitor().error(), expected());
        let learner = self::learner(0.0, false, Space::activation());
        let valid = burn::module::AutodiffModule::valid(&learner);
        assert_eq!(InferenceStep::step(&valid, batch(8, 5)).losses.dims(), [8]);
        assert_eq!(learner.monitor().error(), expected());
    }

    #[test]
    fn a_set_is_checked_until_it_passes_and_again_after_a_change() {
        let (checks, calls) = (SiteChecks::default(), std::cell::Cell::new(0));
        let set = |n: u64| Arc::new((0..n).map(ParamId::from).collect::<HashSet<_>>());
        let run = |n, result: Result<(), Error>| {
            checks.clone().once(&set(n), || {
                calls.set(calls.get() + 1);
                result
            })
        };
        assert_eq!(run(2, Err(Error::NothingTrained)), Err(Error::NothingTrained));
        assert_eq!((run(2, Ok(())), calls.get()), (Ok(()), 2));
        assert_eq!((run(2, Err(Error::NothingTrained)), calls.get()), (Ok(()), 2));
        assert_eq!((run(3, Ok(())), calls.get()), (Ok(()), 3));
        assert_eq!((run(2, Ok(())), calls.get()), (Ok(()), 4));
    }
}
