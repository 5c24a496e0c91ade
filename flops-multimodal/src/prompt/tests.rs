use std::sync::Arc;

use burn::backend::{Autodiff, Flex};
use burn::optim::AdamConfig;
use burn::prelude::*;
use burn::train::TrainStep;
use flops_core::allocator::Neyman;
use flops_core::{Batch, Error, ForwardConfig, ForwardLearner, Probe, QueryBudget, Space};

use super::{TextPrompt, VisualPrompt};
use crate::blackbox::{BlackBoxClient, FromFn, Info, Metered, Query};

type AB = Autodiff<Flex>;

fn info() -> Info {
    Info::new(["dark", "bright"], [3, 2, 2]).unwrap().with_context(1, 2).unwrap()
}

/// A client of a black box that scores "dark" 0 and "bright" by `score`, with a cap on its queries.
fn client(score: impl Fn(&Query) -> f32 + Send + Sync + 'static, cap: u64) -> BlackBoxClient {
    let scores = move |queries: &[Query]| -> Result<Vec<Vec<f32>>, String> {
        Ok(queries.iter().map(|q| vec![0.0, score(q)]).collect())
    };
    BlackBoxClient::new(Arc::new(Metered::new(FromFn::new(info(), scores).unwrap(), cap)))
}

fn batch() -> Batch<Tensor<Flex, 4>, Tensor<Flex, 1, Int>> {
    let device = Default::default();
    let values: Vec<f32> = (0..48).map(|i| 0.2 + 0.01 * i as f32).collect();
    Batch {
        ids: (0..4).collect(),
        input: Tensor::from_data(TensorData::new(values, [4, 3, 2, 2]), &device),
        target: Tensor::from_ints([1, 1, 1, 1], &device),
    }
}

fn config(space: Space) -> ForwardConfig {
    ForwardConfig::new(QueryBudget::new(4, 1).unwrap()).with_space(space)
}

/// The black box scores bright images higher, so the prompt learns to brighten them.
#[test]
fn a_visual_prompt_learns_to_raise_the_score() {
    let device = Default::default();
    let client = client(|q| 8.0 * (q.image.iter().sum::<f32>() / 12.0 - 0.7), 10_000);
    let model = VisualPrompt::<AB>::new(client, 4, &device).unwrap();
    let images = batch().input;
    let unchanged = model.clone().repaint(Tensor::from_inner(images.clone()), &mut Probe::clean()).inner();
    let distance = (unchanged - images.clone()).abs().max().into_scalar();
    assert!(distance < 1e-5, "the prompt does not start at the image: {distance}");
    let mut learner = ForwardLearner::new(model, Neyman, config(Space::low_rank(1))).unwrap();
    let mut optimizer = AdamConfig::new().init();
    for _ in 0..40 {
        let output = learner.step(batch());
        learner = learner.optimize::<AB, _>(&mut optimizer, 5e-2, output.grads);
    }
    assert!(learner.monitor().error().is_none());
    let painted = learner.model.repaint(Tensor::from_inner(images.clone()), &mut Probe::clean()).inner();
    let brighter: f32 = (painted - images).mean().into_scalar();
    assert!(brighter > 0.1, "brighter by {brighter} only");
}

#[test]
fn a_failing_black_box_ends_the_run_without_a_gradient() {
    let device = Default::default();
    let clients: [(BlackBoxClient, &str); 2] =
        [(client(|_| f32::NAN, 10_000), "NaN"), (client(|q| q.image[0], 10), "cap of 10")];
    for (client, message) in clients {
        let model = TextPrompt::<AB>::new(client, &device).unwrap();
        let learner = ForwardLearner::new(model, Neyman, config(Space::activation())).unwrap();
        let output = learner.step(batch());
        assert!(output.grads.is_empty(), "a failed step returned a gradient");
        match learner.monitor().error() {
            Some(Error::Model { why }) => assert!(why.contains(message), "{why}"),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn invalid_prompts_are_refused() {
    let device = Default::default();
    let plain = Info::new(["a", "b"], [3, 2, 2]).unwrap();
    let scores = |queries: &[Query]| -> Result<Vec<Vec<f32>>, String> { Ok(vec![vec![0.0; 2]; queries.len()]) };
    let client = BlackBoxClient::new(Arc::new(FromFn::new(plain, scores).unwrap()));
    assert!(TextPrompt::<Flex>::new(client.clone(), &device).unwrap_err().to_string().contains("visual"));
    assert!(VisualPrompt::<Flex>::new(client, 0, &device).unwrap_err().to_string().contains("hidden = 0"));
}
