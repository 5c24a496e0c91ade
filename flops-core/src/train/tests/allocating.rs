//! Tests of what a step and its update ask of an allocator.

use std::sync::{Arc, Mutex};

use burn::module::AutodiffModule;
use burn::nn::{Linear, LinearConfig};
use burn::optim::SgdConfig;
use burn::prelude::*;
use burn::train::{Interrupter, TrainStep};
use rand::rngs::StdRng;

use crate::allocator::{
    Allocation, Allocator, AnyAllocator, BernoulliAllocatorConfig, DatumFeatures, GaussianAllocatorConfig, MeanModel,
    Neyman, QueryBudget, Shown, Uniform,
};
use crate::batch::Batch;
use crate::error::Error;
use crate::losses::cross_entropy;
use crate::model::ForwardModel;
use crate::probe::Probe;
use crate::testing::{AB, B, weights, zoo, zoo_batch};
use crate::train::*;
use crate::variance::VarianceSource;

/// Neyman allocation that keeps what it was shown.
#[derive(Module, Clone, Debug, Default)]
struct Witness {
    #[module(skip)]
    seen: Arc<Mutex<Vec<Vec<f64>>>>,
}

impl<P: Backend> Allocator<P> for Witness {
    type Update = ();

    fn allocate(
        &self,
        features: &DatumFeatures<'_>,
        budget: &QueryBudget,
        rng: &mut StdRng,
    ) -> Result<(Allocation, ()), Error> {
        assert!(features.embeddings.is_none() && features.extra.is_none(), "nothing was asked for");
        Allocator::<P>::allocate(&Neyman, features, budget, rng)
    }

    fn apply(self, (): (), shown: &Shown<'_>) -> Self {
        self.seen.lock().unwrap().push(shown.second_moments.to_vec());
        self
    }

    fn name(&self) -> &'static str {
        "witness"
    }
}

/// Pilots decided the allocation: only what the rest of the queries measured is shown.
#[test]
fn an_allocator_is_shown_what_the_allocated_queries_measured() {
    for variance in [VarianceSource::Running, VarianceSource::Pilot(2)] {
        let config = ForwardConfig::new(QueryBudget::new(6, 1).unwrap()).with_seed(3).with_variance(variance);
        let mut learner = ForwardLearner::<AB, _, _>::new(zoo(1), Witness::default(), config).unwrap();
        let (seen, mut optimizer) = (learner.allocator.seen.clone(), SgdConfig::new().init());
        for step in 0..3 {
            let output = TrainStep::step(&learner, zoo_batch::<B>(5, step));
            assert_eq!(seen.lock().unwrap().len(), step as usize, "the update shows it, not the step");
            learner = learner.optimize::<AB, _>(&mut optimizer, 0.1, output.grads);
        }
        let measured = |r: &StepReport| r.data.iter().map(|d| d.second_moment).collect::<Vec<_>>();
        let reports: Vec<Vec<f64>> = learner.monitor().take_reports().iter().map(measured).collect();
        assert_eq!(reports.len(), 3);
        assert_eq!(*seen.lock().unwrap(), reports);
    }
}

/// λ changes with the update, never in a step.
#[test]
fn a_step_leaves_lambda_and_its_update_moves_it() {
    let allocator = AnyAllocator::<AB>::from_name("gaussian-paper", &Default::default()).unwrap();
    let config = ForwardConfig::new(QueryBudget::new(6, 1).unwrap()).with_seed(3);
    let learner = ForwardLearner::<AB, _, _>::new(zoo(1), allocator, config).unwrap();
    let lambda = |a: &AnyAllocator<AB>| weights(&a.valid());
    let start = lambda(&learner.allocator);
    let output = TrainStep::step(&learner, zoo_batch::<B>(5, 0));
    assert_eq!(lambda(&learner.allocator), start);
    let learner = learner.optimize::<AB, _>(&mut SgdConfig::new().init(), 0.1, output.grads);
    assert_ne!(lambda(&learner.allocator), start);
}

/// A model whose embeddings and features are NaN: whoever looks at them fails.
#[derive(Module, Debug)]
struct Shy<B: Backend> {
    fc: Linear<B>,
}

impl<B: Backend> ForwardModel<B> for Shy<B> {
    type Input = Tensor<B, 2>;
    type Target = Tensor<B, 1, Int>;
    type Output = Tensor<B, 2>;

    fn forward(&self, x: Tensor<B, 2>, probe: &mut Probe<B>) -> Tensor<B, 2> {
        probe.embed(&x.clone().mul_scalar(f32::NAN));
        probe.linear(&self.fc, x)
    }

    fn losses(&self, y: Tensor<B, 2>, t: Tensor<B, 1, Int>) -> Tensor<B, 1> {
        cross_entropy(y, t)
    }

    fn allocation_features(&self, y: &Tensor<B, 2>, _: &Tensor<B, 1, Int>) -> Option<Tensor<B, 2>> {
        Some(y.clone().mul_scalar(f32::NAN))
    }
}

#[test]
fn only_what_the_allocator_looks_at_is_read_back() {
    let device = Default::default();
    let failure = |allocator: AnyAllocator<AB>| {
        let model = Shy::<AB> { fc: LinearConfig::new(3, 2).init(&device) };
        let config = ForwardConfig::new(QueryBudget::new(4, 1).unwrap()).with_seed(3);
        let learner = ForwardLearner::<AB, _, _>::new(model, allocator, config).unwrap();
        learner.monitor().stop_with(Interrupter::new());
        let (input, target) = (Tensor::<B, 2>::ones([2, 3], &device), Tensor::<B, 1, Int>::zeros([2], &device));
        let _ = TrainStep::step(&learner, Batch { ids: vec![0, 1], input, target });
        learner.monitor().error().map(|e| e.to_string()).unwrap_or_default()
    };
    let features = MeanModel::Features(2);
    let bernoulli = BernoulliAllocatorConfig::new();
    let gaussian = GaussianAllocatorConfig::new();
    assert_eq!(failure(AnyAllocator::Uniform(Uniform)), "");
    assert_eq!(failure(AnyAllocator::Neyman(Neyman)), "");
    assert_eq!(failure(AnyAllocator::Bernoulli(bernoulli.init(&device).unwrap())), "");
    let by_features = bernoulli.with_mean(features).init(&device).unwrap();
    assert!(failure(AnyAllocator::Bernoulli(by_features)).contains("allocation features[0] = NaN"));
    assert!(failure(AnyAllocator::Gaussian(gaussian.init(&device).unwrap())).contains("embeddings[0] = NaN"));
}
