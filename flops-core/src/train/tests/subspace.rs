//! Weight noise in a subspace, as a learner goes from step to step.

use burn::optim::GradientsParams;

use super::*;
use crate::estimator::Subspace;
use crate::recipe::Recipe;

const SUBSPACES: [Subspace; 2] =
    [Subspace::Random { rank: 2, period: 3 }, Subspace::Orthonormal { rank: 2, period: 3 }];

fn learner(config: ForwardConfig) -> Learner<Uniform> {
    ForwardLearner::new(zoo(1), Uniform, config).unwrap()
}

fn config_in(subspace: Subspace) -> ForwardConfig {
    config().with_space(Space::weights().with_subspace(subspace).unwrap())
}

/// Five steps into periods of three, through Burn's recorder: nothing of a subspace is stored.
#[test]
fn a_run_resumed_within_a_period_ends_on_the_same_bits() {
    let device = Default::default();
    for subspace in SUBSPACES {
        let mut optimizer = AdamConfig::new().init();
        let half = train(learner(config_in(subspace)), &mut optimizer, 0..5);
        let folder = tempfile::tempdir().unwrap();
        let recorder = DefaultRecorder::new();
        Recorder::<AB>::record(&recorder, half.clone().into_record(), folder.path().join("model")).unwrap();
        Recorder::<AB>::record(&recorder, optimizer.to_record(), folder.path().join("optimizer")).unwrap();
        let uninterrupted = weights(&train(half, &mut optimizer, 5..8).model.valid());

        let resumed = |config, path: &str| {
            let record = Recorder::<AB>::load(&recorder, folder.path().join(path), &device).unwrap();
            let resumed = learner(config).load_record(record);
            let record = Recorder::<AB>::load(&recorder, folder.path().join("optimizer"), &device).unwrap();
            let mut optimizer = AdamConfig::new().init().load_record(record);
            weights(&train(resumed, &mut optimizer, 5..8).model.valid())
        };
        assert_eq!(resumed(config_in(subspace), "model"), uninterrupted, "{subspace}");
        assert_eq!(resumed(config_in(subspace).with_threads(3), "model"), uninterrupted, "{subspace}, threads");
        assert_ne!(resumed(config_in(subspace).with_seed(4), "model"), uninterrupted, "{subspace}, seed");
    }
}

/// The span of the gradients of a matrix has the rank of the subspace, over accumulated steps and the
/// steps of a period, and a larger one over two periods.
#[test]
fn gradients_of_a_period_span_the_subspace() {
    for subspace in SUBSPACES {
        let mut learner = learner(config_in(subspace));
        let mut ranks = vec![];
        let mut gram = [0f64; 9];
        for step in 0..4 {
            let mut grads = GradientsParams::new();
            for accumulated in 0..2 {
                let output = TrainStep::step(&learner, zoo_batch::<B>(5, 2 * step + accumulated));
                let g = output.grads.get::<B, 2>(learner.model.mix.weight.id).unwrap();
                let square = g.clone().matmul(g.transpose()).into_data();
                gram.iter_mut().zip(square.iter::<f64>()).for_each(|(sum, v)| *sum += v);
                grads = output.grads;
            }
            learner = learner.optimize::<AB, _>(&mut SgdConfig::new().init(), 0.0, grads);
            let (values, _) = crate::linalg::eigen(gram.to_vec(), 3);
            ranks.push(values.iter().filter(|&&v| v > 1e-6 * values[0]).count());
        }
        assert_eq!(ranks, [2, 2, 2, 3], "{subspace}");
    }
}

/// LOZO and ZO-Muon lower the loss of a model with every kind of layer, with as much rank as it has
/// room for.
#[test]
fn recipes_with_a_subspace_train() {
    for (recipe, subspace) in [Recipe::Lozo, Recipe::ZoMuon].into_iter().zip(SUBSPACES) {
        let config = recipe.config(QueryBudget::new(16, 1).unwrap()).with_seed(3);
        assert_eq!(std::mem::discriminant(&config.estimator.space.subspace()), std::mem::discriminant(&subspace));
        let space = config.estimator.space.with_subspace(subspace).unwrap();
        let before = learner(config.with_space(space));
        let start = mean_loss(&before);
        let after = mean_loss(&train(before, &mut AdamConfig::new().init(), 0..40));
        assert!(after < 0.8 * start, "{recipe}: {after} after {start}");
    }
}
