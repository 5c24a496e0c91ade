//! Prompts of a black box, learned from its scores alone: prior black box ϕ₁ → target φ(·;θ) → later black box ϕ₂ → loss.
//!
//! A [`BlackBox`] takes images, some also a soft context, and gives scores; what happens in between nobody here can see. Trained is what it is
//! given: the context ([`TextPrompt`], after CoOp, Zhou et al. 2022, arXiv 2109.01134), or a small network that repaints the image
//! ([`VisualPrompt`], after BlackVIP, Oh et al. 2023, arXiv 2303.14773). Each row of a forward pass is one query of the box at most, the clean pass
//! included.
//!
//! # Example
//! ```
//! use std::sync::Arc;
//!
//! use burn::backend::{Autodiff, Flex};
//! use burn::prelude::*;
//! use burn::train::TrainStep;
//! use flops_core::allocator::GaussianAllocatorConfig;
//! use flops_core::{Batch, ForwardConfig, ForwardLearner, QueryBudget};
//! use flops_multimodal::blackbox::{FromFn, Info, Metered, Query};
//! use flops_multimodal::{Asked, TextPrompt};
//!
//! // anything that answers: here a closure, whose score for a dog is the sum of the context
//! let info = Info::new(["cat", "dog"], [3, 2, 2])?.with_context(1, 2)?;
//! let ask = |queries: &[Query]| -> Result<Vec<Vec<f32>>, String> {
//!     Ok(queries.iter().map(|q| vec![0.0, q.context.iter().flat_map(|c| c.iter()).sum()]).collect())
//! };
//! let asked = Asked::new(Arc::new(Metered::new(FromFn::new(info, ask)?, 100)));
//!
//! let device = Default::default();
//! let prompt = TextPrompt::<Autodiff<Flex>>::new(asked, &device)?;
//! let config = ForwardConfig::new(QueryBudget::new(8, 1)?);
//! let learner = ForwardLearner::new(prompt, GaussianAllocatorConfig::new().init(&device)?, config)?;
//! let images = Tensor::<Flex, 4>::ones([2, 3, 2, 2], &device);
//! let dogs = Tensor::<Flex, 1, Int>::from_ints([1, 1], &device);
//! let output = learner.step(Batch { ids: vec![0, 1], input: images, target: dogs });
//! // the two coordinates of the context, each to be raised
//! let gradient = output.grads.get::<Flex, 3>(learner.model.context.id).ok_or("the step failed")?;
//! assert!(gradient.into_data().iter::<f32>().all(|g| g < 0.0));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use burn::module::Param;
use burn::nn::Initializer;
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::prelude::*;
use burn::tensor::activation::{relu, sigmoid};
use flops_core::{ForwardModel, Probe, cross_entropy};

use crate::blackbox::{BlackBox, BlackBoxError, Info, Query};
use crate::error::MultimodalError;

/// A black box as prompts ask it: rows of tensors in, scores out; the first failure stays, and nothing is sent after it.
#[derive(Clone)]
pub struct Asked {
    black_box: Arc<dyn BlackBox>,
    failure: Arc<Mutex<Option<BlackBoxError>>>,
}

impl std::fmt::Debug for Asked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Asked").field("info", self.info()).field("failure", &self.failure()).finish()
    }
}

impl Asked {
    /// Asks that box; wrap it in [`Metered`](crate::blackbox::Metered) first, so that its queries have a cap.
    pub fn new(black_box: Arc<dyn BlackBox>) -> Self {
        Self { black_box, failure: Arc::default() }
    }

    /// What the box takes and gives.
    pub fn info(&self) -> &Info {
        self.black_box.info()
    }

    /// Why it answers no more.
    pub fn failure(&self) -> Option<BlackBoxError> {
        self.failure.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }

    /// Scores of these rows; NaN for all of them where the box has failed, now or before.
    ///
    /// # Shapes
    /// - images: `[rows, channels, height, width]`, contexts: `[rows, tokens, dim]`
    /// - returns: `[rows, classes]`
    pub fn scores<B: Backend>(&self, images: Tensor<B, 4>, contexts: Option<Tensor<B, 3>>) -> Tensor<B, 2> {
        let (rows, classes, device) = (images.dims()[0], self.info().classes.len(), images.device());
        let scores = match self.failure() {
            Some(_) => vec![f32::NAN; rows * classes],
            None => self.ask(host(images), contexts.map(host)).unwrap_or_else(|error| {
                self.failure.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(error);
                vec![f32::NAN; rows * classes]
            }),
        };
        Tensor::from_data(TensorData::new(scores, [rows, classes]), &device)
    }

    fn ask(&self, images: Vec<Vec<f32>>, contexts: Option<Vec<Vec<f32>>>) -> Result<Vec<f32>, BlackBoxError> {
        // the queries of a datum share its image: so may the box's work on it
        let mut known = HashMap::<Vec<u32>, Arc<[f32]>>::new();
        let mut queries: Vec<Query> = images
            .into_iter()
            .map(|image| {
                let bits = image.iter().map(|x| x.to_bits()).collect();
                Query::new(known.entry(bits).or_insert_with(|| image.into()).clone())
            })
            .collect();
        if let Some(contexts) = contexts {
            queries = queries.into_iter().zip(contexts).map(|(query, context)| query.with_context(context)).collect();
        }
        let scores = self.black_box.scores(&queries)?;
        // whoever wrote the box: a wrong answer is an error, never a loss
        self.info().check_scores(queries.len(), &scores)?;
        Ok(scores.into_iter().flatten().collect())
    }
}

/// The rows of a tensor on the host.
fn host<B: Backend, const D: usize>(x: Tensor<B, D>) -> Vec<Vec<f32>> {
    let width: usize = x.dims()[1..].iter().product();
    let all: Vec<f32> = x.into_data().iter::<f32>().collect();
    all.chunks(width.max(1)).map(<[f32]>::to_vec).collect()
}

/// A soft context in front of the class names, for a box that takes one: `[1, tokens, dim]` of it are all that is trained.
///
/// With activation noise every query of every image has a context of its own, so allocation pays.
#[derive(Module, Debug)]
pub struct TextPrompt<B: Backend> {
    /// The context, `[1, tokens, dim]`.
    pub context: Param<Tensor<B, 3>>,
    #[module(skip)]
    asked: Asked,
}

impl<B: Backend> TextPrompt<B> {
    /// A context that starts at zero: what it means is the box's to say, and most boxes add it to, or put it in place of, words of their own.
    ///
    /// # Errors
    /// [`MultimodalError::Setting`] where the box takes no context.
    pub fn new(asked: Asked, device: &B::Device) -> Result<Self, MultimodalError> {
        let Some([tokens, dim]) = asked.info().context else {
            let remedy = "the black box takes no context: use a visual prompt";
            return Err(MultimodalError::Setting { name: "prompt", value: "text".into(), remedy });
        };
        Ok(Self { context: Param::from_tensor(Tensor::zeros([1, tokens, dim], device)), asked })
    }
}

impl<B: Backend> ForwardModel<B> for TextPrompt<B> {
    /// Images in [0, 1], `[rows, channels, height, width]`.
    type Input = Tensor<B, 4>;
    type Target = Tensor<B, 1, Int>;
    type Output = Tensor<B, 2>;

    fn forward(&self, images: Tensor<B, 4>, probe: &mut Probe<B>) -> Tensor<B, 2> {
        let context = probe.param(&self.context);
        let [rows, tokens, dim] = context.dims();
        let [images, context] = probe.align([images, context.reshape([rows, tokens, dim, 1])]);
        let (rows, given) = (images.dims()[0], context.dims()[0]);
        // clean, the one context is everybody's
        let context = context.reshape([given, tokens, dim]).expand([rows, tokens, dim]);
        self.asked.scores(images, Some(context))
    }

    fn losses(&self, scores: Tensor<B, 2>, labels: Tensor<B, 1, Int>) -> Tensor<B, 1> {
        cross_entropy(scores, labels)
    }

    fn classification(
        &self,
        scores: &Tensor<B, 2>,
        labels: &Tensor<B, 1, Int>,
    ) -> Option<(Tensor<B, 2>, Tensor<B, 1, Int>)> {
        Some((scores.clone(), labels.clone()))
    }

    fn failure(&self) -> Option<String> {
        self.asked.failure().map(|e| e.to_string())
    }
}

/// A small network that repaints images before the box sees them: x′ = sigmoid(logit(x) + g(2x − 1)), g two 1×1 convolutions with ReLU.
///
/// Whatever g is, x′ is an image, and short of saturation a change of g changes it. g is zero at the start, so that training begins at what
/// the box does by itself, but for values nearer than 1/100 to black or white. Its few weights are best perturbed themselves, by noise of
/// [low rank](flops_core::Space::LowRank) for every query of every image or [shared](flops_core::Space::Weights) by a pass.
#[derive(Module, Debug)]
pub struct VisualPrompt<B: Backend> {
    /// Channels to hidden ones.
    pub conv1: Conv2d<B>,
    /// Hidden channels back to the image's; zero at the start.
    pub conv2: Conv2d<B>,
    #[module(skip)]
    asked: Asked,
}

impl<B: Backend> VisualPrompt<B> {
    /// A network with `hidden` channels between, at least 1.
    ///
    /// # Errors
    /// [`MultimodalError::Config`] where `hidden` is 0.
    pub fn new(asked: Asked, hidden: usize, device: &B::Device) -> Result<Self, MultimodalError> {
        if hidden == 0 {
            return Err(MultimodalError::Config { field: "hidden", value: hidden, remedy: "use at least 1 channel" });
        }
        let channels = asked.info().image[0];
        let conv1 = Conv2dConfig::new([channels, hidden], [1, 1]).init(device);
        let zero = Initializer::Zeros;
        let mut conv2 = Conv2dConfig::new([hidden, channels], [1, 1]).with_initializer(zero.clone()).init(device);
        conv2.bias = Some(zero.init([channels], device));
        let prompt = Self { conv1, conv2, asked };
        // parameters are made on first use; made now, so that clones are the same model
        let _ = prompt.num_params();
        Ok(prompt)
    }

    /// What the box is shown, `[rows, channels, height, width]`, in [0, 1].
    pub fn repaint(&self, images: Tensor<B, 4>, probe: &mut Probe<B>) -> Tensor<B, 4> {
        let hidden = relu(probe.conv2d(&self.conv1, images.clone().mul_scalar(2.0).sub_scalar(1.0)));
        let change = probe.conv2d(&self.conv2, hidden);
        let x = images.clamp(0.01, 0.99);
        let logit = x.clone().log() - x.neg().add_scalar(1.0).log();
        sigmoid(probe.add(logit, change))
    }
}

impl<B: Backend> ForwardModel<B> for VisualPrompt<B> {
    /// Images in [0, 1], `[rows, channels, height, width]`.
    type Input = Tensor<B, 4>;
    type Target = Tensor<B, 1, Int>;
    type Output = Tensor<B, 2>;

    fn forward(&self, images: Tensor<B, 4>, probe: &mut Probe<B>) -> Tensor<B, 2> {
        let images = self.repaint(images, probe);
        self.asked.scores(images, None)
    }

    fn losses(&self, scores: Tensor<B, 2>, labels: Tensor<B, 1, Int>) -> Tensor<B, 1> {
        cross_entropy(scores, labels)
    }

    fn classification(
        &self,
        scores: &Tensor<B, 2>,
        labels: &Tensor<B, 1, Int>,
    ) -> Option<(Tensor<B, 2>, Tensor<B, 1, Int>)> {
        Some((scores.clone(), labels.clone()))
    }

    fn failure(&self) -> Option<String> {
        self.asked.failure().map(|e| e.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::backend::{Autodiff, Flex};
    use burn::optim::AdamConfig;
    use burn::train::TrainStep;
    use flops_core::allocator::GaussianAllocatorConfig;
    use flops_core::{Batch, Error, ForwardConfig, ForwardLearner, QueryBudget, Space};

    use crate::blackbox::{FromFn, Metered};

    type AB = Autodiff<Flex>;

    fn info() -> Info {
        Info::new(["dark", "bright"], [3, 2, 2]).unwrap().with_context(1, 2).unwrap()
    }

    fn asked(answer: impl Fn(&Query) -> f32 + Send + Sync + 'static, cap: u64) -> Asked {
        let ask = move |queries: &[Query]| -> Result<Vec<Vec<f32>>, String> {
            Ok(queries.iter().map(|q| vec![0.0, answer(q)]).collect())
        };
        Asked::new(Arc::new(Metered::new(FromFn::new(info(), ask).unwrap(), cap)))
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

    /// A box that likes bright images: the prompt learns to brighten them.
    #[test]
    fn a_visual_prompt_repaints_towards_what_the_box_likes() {
        let device = Default::default();
        let asked = asked(|q| 8.0 * (q.image.iter().sum::<f32>() / 12.0 - 0.7), 10_000);
        let model = VisualPrompt::<AB>::new(asked, 4, &device).unwrap();
        let images = batch().input;
        let unchanged = model.clone().repaint(Tensor::from_inner(images.clone()), &mut Probe::clean()).inner();
        let distance = (unchanged - images.clone()).abs().max().into_scalar();
        assert!(distance < 1e-5, "the prompt does not start at the image: {distance}");
        let allocator = GaussianAllocatorConfig::new().init(&device).unwrap();
        let mut learner = ForwardLearner::new(model, allocator, config(Space::LowRank(1))).unwrap();
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
    fn a_box_that_fails_ends_the_run_and_moves_nothing() {
        let device = Default::default();
        let boxes: [(Asked, &str); 2] =
            [(asked(|_| f32::NAN, 10_000), "NaN"), (asked(|q| q.image[0], 10), "cap of 10")];
        for (asked, says) in boxes {
            let model = TextPrompt::<AB>::new(asked, &device).unwrap();
            let allocator = GaussianAllocatorConfig::new().init(&device).unwrap();
            let learner = ForwardLearner::new(model, allocator, config(Space::Activation)).unwrap();
            let output = learner.step(batch());
            assert!(output.grads.is_empty(), "a gradient was learned from nothing");
            match learner.monitor().error() {
                Some(Error::Model { why }) => assert!(why.contains(says), "{why}"),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn prompts_that_cannot_be_are_refused() {
        let device = Default::default();
        let plain = Info::new(["a", "b"], [3, 2, 2]).unwrap();
        let ask = |queries: &[Query]| -> Result<Vec<Vec<f32>>, String> { Ok(vec![vec![0.0; 2]; queries.len()]) };
        let asked = Asked::new(Arc::new(FromFn::new(plain, ask).unwrap()));
        assert!(TextPrompt::<Flex>::new(asked.clone(), &device).unwrap_err().to_string().contains("visual"));
        assert!(VisualPrompt::<Flex>::new(asked, 0, &device).unwrap_err().to_string().contains("hidden = 0"));
    }
}
