//! Trains the network, step by step, as the page asks for it.

use burn::backend::{Autodiff, Flex};
use burn::module::{AutodiffModule, Module};
use burn::optim::adaptor::OptimizerAdaptor;
use burn::optim::{Adam, AdamConfig};
use burn::prelude::*;
use burn::tensor::activation::softmax;
use flops_core::allocator::Neyman;
use flops_core::random::keyed_rng;
use flops_core::{Batch, Error, ForwardConfig, ForwardLearner, QueryBudget, infer};
use rand::seq::SliceRandom;

use crate::digits::{self, CLASSES, Digit, PIXELS};
use crate::network::Network;

type Learner = ForwardLearner<Autodiff<Flex>, Network<Autodiff<Flex>>, Neyman>;

/// Digits of a step.
pub const BATCH: usize = 32;
/// Queries of a digit and step, on average.
pub const QUERIES: usize = 8;
/// Times that each digit is trained on, slightly changed each time.
pub const EPOCHS: usize = 60;
/// Adam's learning rate at the start; it falls to 0 as a cosine.
const LR: f64 = 1e-2;
/// Separates the order of the digits from other uses of the seed.
const SHUFFLE: u64 = u64::from_le_bytes(*b"shuffle\0");
/// Separates the changes of the digits from other uses of the seed.
const CHANGE: u64 = u64::from_le_bytes(*b"change\0\0");

/// A network in training.
pub struct Trainer {
    learner: Learner,
    optimizer: OptimizerAdaptor<Adam, Learner, Autodiff<Flex>>,
    train: Vec<Digit>,
    test: Vec<Digit>,
    seed: u64,
    /// The digits of this epoch that are left, by place.
    left: Vec<usize>,
}

impl Trainer {
    /// Creates a network with random weights; everything follows from `seed`.
    ///
    /// # Errors
    /// Never with these settings; see [`ForwardLearner::new`].
    pub fn new(seed: u64) -> Result<Self, Error> {
        let config = ForwardConfig::new(QueryBudget::new(QUERIES, 1)?).with_seed(seed);
        let learner = ForwardLearner::new(Network::new(seed, &Default::default()), Neyman, config)?;
        let (train, test) = digits::load();
        Ok(Self { learner, optimizer: AdamConfig::new().init(), train, test, seed, left: vec![] })
    }

    /// Steps that a training has.
    pub fn steps_in_all(&self) -> u64 {
        (EPOCHS * self.train.len().div_ceil(BATCH)) as u64
    }

    /// Trains on a batch; returns its mean loss before that.
    ///
    /// # Errors
    /// See [`ForwardLearner::estimate`] and [`ForwardLearner::update`].
    pub fn step(&mut self) -> Result<f64, Error> {
        let batch = self.next_batch();
        let step = self.learner.estimate(&batch)?;
        let loss = step.output.losses.mean().into_scalar().elem();
        let done = self.steps() as f64 / self.steps_in_all() as f64;
        let lr = LR * (1.0 + (std::f64::consts::PI * done.min(1.0)).cos()) / 2.0;
        self.learner = self.learner.clone().update(&mut self.optimizer, lr, step.grads)?;
        Ok(loss)
    }

    /// The next batch of the epoch, or the first of the next one; an epoch's order is a function of the
    /// seed and the epoch.
    fn next_batch(&mut self) -> Batch<Tensor<Flex, 2>, Tensor<Flex, 1, Int>> {
        if self.left.is_empty() {
            let epoch = self.steps() / self.train.len().div_ceil(BATCH) as u64;
            self.left = (0..self.train.len()).collect();
            self.left.shuffle(&mut keyed_rng([SHUFFLE, self.seed, epoch, 0]));
        }
        let places = self.left.split_off(self.left.len().saturating_sub(BATCH));
        let digits: Vec<&Digit> = places.iter().map(|&place| &self.train[place]).collect();
        let labels: Vec<i32> = digits.iter().map(|digit| digit.label as i32).collect();
        let key = |digit: &Digit| keyed_rng([CHANGE, self.seed, self.steps(), digit.id]);
        let changed: Vec<_> = digits.iter().map(|digit| digit.changed(&mut key(digit))).collect();
        Batch {
            ids: digits.iter().map(|digit| digit.id).collect(),
            input: pixels(changed.iter()),
            target: Tensor::from_data(TensorData::new(labels, [digits.len()]), &Default::default()),
        }
    }

    /// Steps so far.
    pub fn steps(&self) -> u64 {
        self.learner.state().step
    }

    /// Queries so far.
    pub fn queries(&self) -> u64 {
        self.learner.state().ledger.total().queries
    }

    /// Parameters of the network.
    pub fn parameters(&self) -> usize {
        self.learner.model.num_params()
    }

    /// The digits that are not trained on.
    pub fn test(&self) -> &[Digit] {
        &self.test
    }

    /// The share of test digits that the network classifies correctly.
    pub fn accuracy(&self) -> f64 {
        let answers = self.probabilities(&self.test.iter().map(|digit| digit.pixels).collect::<Vec<_>>());
        let right = answers.iter().zip(&self.test).filter(|(answer, digit)| best(answer) == digit.label);
        right.count() as f64 / self.test.len() as f64
    }

    /// The probability of each class, for each image.
    pub fn probabilities(&self, images: &[[f32; PIXELS]]) -> Vec<[f32; CLASSES]> {
        let logits = infer(&self.learner.model.valid(), &pixels(images.iter()), images.len(), 128, 1);
        let values: Vec<f32> = softmax(logits, 1).into_data().iter().collect();
        values.chunks_exact(CLASSES).map(|row| std::array::from_fn(|class| row[class])).collect()
    }
}

/// The likeliest class.
pub fn best(probabilities: &[f32; CLASSES]) -> usize {
    (0..CLASSES).max_by(|&a, &b| probabilities[a].total_cmp(&probabilities[b])).unwrap_or(0)
}

/// Images as rows.
fn pixels<'a>(images: impl ExactSizeIterator<Item = &'a [f32; PIXELS]>) -> Tensor<Flex, 2> {
    let rows = images.len();
    let values: Vec<f32> = images.flatten().copied().collect();
    Tensor::from_data(TensorData::new(values, [rows, PIXELS]), &Default::default())
}
