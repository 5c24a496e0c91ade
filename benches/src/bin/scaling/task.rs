//! What a worker is started for, and the learner that it trains.

use std::fmt::{self, Display};
use std::net::SocketAddr;
use std::str::FromStr;
use std::sync::Arc;

use anyhow::{Error, Result, anyhow, bail};
use burn::module::ModuleVisitor;
use burn::module::{AutodiffModule, Module, Param};
use burn::optim::adaptor::OptimizerAdaptor;
use burn::optim::{Adam, AdamConfig};
use burn::prelude::*;
use burn::train::TrainStep;
use flops_backend::{AB, B};
use flops_benches::{images, micro, model};
use flops_core::allocator::AnyAllocator;
use flops_core::{ControlVariate, Executor, ForwardConfig, ForwardLearner, Placement, QueryBudget, Recipe, Space};
use flops_distributed::SumMode;
use flops_vit::data::ImageBatch;
use flops_vit::{Scope, ViT};
use serde::{Deserialize, Serialize};

/// What connects workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Engine {
    /// Nothing: one process.
    Single,
    /// A hub in this program.
    Hub,
    /// A NATS server.
    Nats,
    /// MPI.
    Mpi,
}

impl Engine {
    /// Those that connect workers.
    pub const ALL: [Self; 3] = [Self::Hub, Self::Nats, Self::Mpi];

    /// The name, as on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Single => "single",
            Self::Hub => "hub",
            Self::Nats => "nats",
            Self::Mpi => "mpi",
        }
    }

    /// Whether this program was built with it.
    ///
    /// # Errors
    /// If not; the text says how to.
    pub fn check(self) -> Result<()> {
        let built = match self {
            Self::Single | Self::Hub => true,
            Self::Nats => cfg!(feature = "nats"),
            Self::Mpi => cfg!(feature = "mpi"),
        };
        if !built {
            bail!("--engines {self}: this program was built without it; build with --features {self}");
        }
        Ok(())
    }
}

impl Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Engine {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let known = Self::ALL.into_iter().find(|engine| engine.name() == name);
        known.ok_or_else(|| anyhow!("'{name}' is no engine; use hub, nats or mpi"))
    }
}

/// What the noise falls on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Noise {
    /// The weights, as in MeZO.
    Weights,
    /// The activations, as the defaults have it.
    Activations,
}

impl Noise {
    /// The name, as on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Weights => "weights",
            Self::Activations => "activations",
        }
    }
}

impl Display for Noise {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Noise {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let known = [Self::Weights, Self::Activations].into_iter().find(|noise| noise.name() == name);
        known.ok_or_else(|| anyhow!("'{name}' is no place for noise; use weights or activations"))
    }
}

/// The steps that are measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Steps {
    /// The name of the scope.
    pub scope: String,
    /// What the noise falls on.
    pub noise: Noise,
    /// Images in a step.
    pub batch: usize,
    /// Queries per image.
    pub queries: usize,
    /// Leaves of a batch.
    pub leaves: usize,
    /// Whether frozen prefixes are kept.
    pub kept: bool,
}

/// What a worker is started for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Task {
    /// The steps.
    pub steps: Steps,
    /// What connects it with others.
    pub engine: Engine,
    /// How sums are run.
    pub sums: SumMode,
    /// Workers in all.
    pub workers: usize,
    /// Where the program listens that started it.
    pub control: SocketAddr,
    /// The address of a NATS server.
    pub server: String,
    /// The name of the run there.
    pub run: String,
}

type Learner = ForwardLearner<AB, ViT<AB>, AnyAllocator<AB>>;

/// Takes one training step after another on the same images, with Adam.
pub struct Stepper {
    learner: Option<Learner>,
    optimizer: OptimizerAdaptor<Adam, Learner, AB>,
    batch: ImageBatch<B>,
}

impl Stepper {
    /// A learner on one thread whose jobs `executor` runs. All processes start with the same
    /// weights.
    ///
    /// # Errors
    /// If a setting cannot be used.
    pub fn new(steps: &Steps, executor: Arc<dyn Executor>) -> Result<Self> {
        let scope: Scope = steps.scope.parse()?;
        AB::seed(&Default::default(), 1);
        let recommended = flops_vit::Noise::new(scope);
        let budget = QueryBudget::new(steps.queries, 1)?;
        let (recipe, model, config) = match steps.noise {
            Noise::Weights => (Recipe::Mezo, model(&micro(6), scope), Recipe::Mezo.config(budget)),
            Noise::Activations => {
                let space = Space::Activation {
                    placement: Placement::Single,
                    control_variate: ControlVariate::Prediction,
                    estimate: recommended.estimate,
                };
                let config = ForwardConfig::new(budget).with_space(space).with_sigma(recommended.sigma);
                (Recipe::Default, model(&micro(6), scope).with_sites(recommended.sites), config)
            }
        };
        let kept = if steps.kept { steps.batch } else { 0 };
        let config = config.with_threads(1).with_leaves(steps.leaves).with_prefix_cache(kept);
        let allocator = AnyAllocator::new(recipe.allocator(), &Default::default())?;
        let learner = ForwardLearner::new(model, allocator, config)?.with_executor(executor);
        let batch = images(steps.batch, micro(6).img_size);
        Ok(Self { learner: Some(learner), optimizer: AdamConfig::new().init(), batch })
    }

    /// Takes a step, its update included.
    ///
    /// # Errors
    /// If it fails, here or on another worker.
    pub fn step(&mut self) -> Result<()> {
        let Some(learner) = self.learner.take() else { bail!("an earlier step failed") };
        let monitor = learner.monitor();
        let output = TrainStep::step(&learner, self.batch.clone());
        if let Some(error) = monitor.error() {
            bail!("a step failed: {error}");
        }
        self.learner = Some(learner.optimize::<AB, _>(&mut self.optimizer, 1e-4, output.grads));
        Ok(())
    }

    /// Steps that were taken.
    pub fn taken(&self) -> u64 {
        self.learner.as_ref().map_or(0, |learner| learner.state().step)
    }

    /// Values that are trained.
    pub fn trained(&self) -> usize {
        let Some(learner) = &self.learner else { return 0 };
        let trained = flops_core::estimator::trained_parameters(&learner.model);
        let mut count = Count { trained: &trained, values: 0 };
        learner.model.valid().visit(&mut count);
        count.values
    }

    /// A hash of all weights (FNV-1a).
    pub fn hash(&self) -> u64 {
        let mut hash = Hash(0xCBF2_9CE4_8422_2325);
        if let Some(learner) = &self.learner {
            learner.model.valid().visit(&mut hash);
        }
        hash.0
    }
}

struct Count<'a> {
    trained: &'a std::collections::HashSet<burn::module::ParamId>,
    values: usize,
}

impl ModuleVisitor<B> for Count<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        if self.trained.contains(&param.id) {
            self.values += param.val().shape().num_elements();
        }
    }
}

struct Hash(u64);

impl ModuleVisitor<B> for Hash {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        for byte in param.val().into_data().as_bytes() {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01B3);
        }
    }
}
