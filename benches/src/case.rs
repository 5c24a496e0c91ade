//! A training step that is measured.

use std::fmt::{self, Display};
use std::str::FromStr;

use burn::module::AutodiffModule;
use burn::optim::adaptor::OptimizerAdaptor;
use burn::optim::{Adam, AdamConfig, Optimizer};
use burn::prelude::*;
use burn::train::TrainStep;
use flops_backend::{AB, B};
use flops_core::allocator::{AllocatorKind, AnyAllocator};
use flops_core::{
    BackpropLearner, ControlVariate, ForwardConfig, ForwardLearner, GradientEstimate, NoiseLaw, Placement, QueryBudget,
    Sampling, Space,
};
use flops_vit::{Scope, Sites, ViT, ViTConfig};

use crate::THREADS;
use crate::models::{images, model};

/// A training step that is measured. Its text is its fields, separated by spaces.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Case {
    /// The parameters that are trained.
    pub scope: Scope,
    /// What activation noise falls on.
    pub sites: Sites,
    /// Where the noise is added; `None` for a step of backpropagation.
    pub space: Option<Space>,
    /// The law of the noise.
    pub law: NoiseLaw,
    /// One-sided or antithetic.
    pub sampling: Sampling,
    /// Images in a step, at least 1.
    pub batch: usize,
    /// Queries per image, at least 1.
    pub queries: usize,
    /// The most rows in a pass.
    pub max_rows: usize,
    /// Whether the frozen prefix is kept from step to step.
    pub kept: bool,
}

impl Case {
    /// Creates a forward-only step with 64 images and 20 queries for each. Every query adds fresh
    /// signs to all that is trained.
    pub fn new(scope: Scope, space: Space) -> Self {
        Self {
            scope,
            sites: Sites::Linear,
            space: Some(space.with_placement(Placement::Joint).unwrap_or(space)),
            law: NoiseLaw::Rademacher,
            sampling: Sampling::OneSided,
            batch: 64,
            queries: 20,
            max_rows: 256,
            kept: false,
        }
    }

    /// Creates a step of backpropagation.
    pub fn backprop(scope: Scope, batch: usize) -> Self {
        Self { space: None, batch, queries: 1, ..Self::new(scope, Space::activation()) }
    }

    /// Returns the same step with its noise on these layers. Weight noise has no placement.
    pub fn with_placement(self, placement: Placement) -> Self {
        let space = self.space.map(|space| space.with_placement(placement).unwrap_or(space));
        Self { space, ..self }
    }

    /// Returns the same step with activation noise on one site a query, what it is used for, and
    /// with or without a prediction.
    pub fn with_estimate(self, estimate: GradientEstimate, control_variate: ControlVariate) -> Self {
        let placement = Placement::Single;
        Self { space: Some(Space::Activation { placement, control_variate, estimate }), ..self }
    }

    /// Returns whether the step predicts its gradients, which it learns in its first steps.
    pub fn predicts(&self) -> bool {
        self.space.and_then(Space::control_variate) == Some(ControlVariate::Prediction)
    }

    /// Returns the rows that the queries evaluate; for backpropagation, the rows of the batch.
    pub fn rows(&self) -> usize {
        self.batch * self.queries
    }

    /// Returns a function that takes the step, again and again on the same images.
    ///
    /// # Panics
    /// If the settings are invalid.
    pub fn stepper(&self, config: &ViTConfig) -> Box<dyn FnMut()> {
        let model = model(config, self.scope).with_sites(self.sites);
        let kept = if self.kept { self.batch } else { 0 };
        match self.space {
            None => {
                let learner = BackpropLearner::new(model).with_prefix_cache(kept);
                repeated(learner, images(self.batch, config.img_size))
            }
            Some(space) => {
                // As in the recipes: images share the directions of weight noise, and an uneven
                // allocation would make passes of few rows.
                let kind = if !space.is_independent() { AllocatorKind::Uniform } else { AllocatorKind::Neyman };
                let learner = self.learner(model, space, kind).expect("a valid configuration");
                repeated(learner, images(self.batch, config.img_size))
            }
        }
    }

    fn learner(&self, model: ViT<AB>, space: Space, kind: AllocatorKind) -> Result<Forward, flops_core::Error> {
        let config = ForwardConfig::new(QueryBudget::new(self.queries, 1)?)
            .with_space(space)
            .with_noise(self.law)
            .with_sampling(self.sampling)
            .with_sigma(1e-3)
            .with_max_rows(self.max_rows)
            .with_threads(THREADS)
            .with_prefix_cache(if self.kept { self.batch } else { 0 });
        ForwardLearner::new(model, AnyAllocator::new(kind, &Default::default())?, config)
    }
}

type Forward = ForwardLearner<AB, ViT<AB>, AnyAllocator<AB>>;

/// Returns a function that takes one training step after another with Adam, updates included.
fn repeated<L>(learner: L, batch: L::Input) -> Box<dyn FnMut()>
where
    L: TrainStep<Input: Clone> + AutodiffModule<AB> + 'static,
{
    let mut optimizer: OptimizerAdaptor<Adam, L, AB> = AdamConfig::new().init();
    let mut learner = Some(learner);
    let device = Default::default();
    Box::new(move || {
        learner = learner.take().map(|learner| step(learner, &mut optimizer, batch.clone()));
        B::sync(&device).expect("the device answers");
    })
}

fn step<L, O>(learner: L, optimizer: &mut O, batch: L::Input) -> L
where
    L: TrainStep + AutodiffModule<AB>,
    O: Optimizer<L, AB>,
{
    let output = learner.step(batch);
    learner.optimize::<AB, _>(optimizer, 1e-4, output.grads)
}

impl Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let placement = self.space.and_then(Space::placement).map_or("-", Placement::name);
        let control_variate = self.space.and_then(Space::control_variate).map_or("-", ControlVariate::name);
        let estimate =
            if control_variate == "-" { "-" } else { self.space.map_or("-", |space| space.estimate().name()) };
        let space = self.space.map_or("backprop".to_string(), |space| space.to_string());
        let Self { scope, sites, law, sampling, batch, queries, max_rows, kept, .. } = self;
        write!(f, "{scope} {sites} {space} {law} {sampling} {placement} {control_variate} {estimate} ")?;
        write!(f, "{batch} {queries} {max_rows} {kept}")
    }
}

impl FromStr for Case {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        fn parse<T: FromStr<Err: Display>>(word: &str) -> Result<T, String> {
            word.parse().map_err(|e| format!("'{word}': {e}"))
        }
        /// Applies a setting, unless its word is a dash.
        fn set<T: FromStr<Err: Display>>(
            space: Space,
            word: &str,
            with: fn(Space, T) -> Result<Space, flops_core::Error>,
        ) -> Result<Space, String> {
            if word == "-" { Ok(space) } else { with(space, parse(word)?).map_err(|e| e.to_string()) }
        }
        let words: Vec<&str> = text.split_whitespace().collect();
        let [scope, sites, space, law, sampling, placement, control_variate, estimate, batch, queries, max_rows, kept] =
            words[..]
        else {
            return Err(format!("'{text}' does not have twelve words"));
        };
        let placed = |space: &str| {
            let space = set(parse(space)?, placement, Space::with_placement)?;
            let space = set(space, control_variate, Space::with_control_variate)?;
            set(space, estimate, Space::with_estimate)
        };
        Ok(Self {
            scope: parse(scope)?,
            sites: parse(sites)?,
            space: if space == "backprop" { None } else { Some(placed(space)?) },
            law: parse(law)?,
            sampling: parse(sampling)?,
            batch: parse(batch)?,
            queries: parse(queries)?,
            max_rows: parse(max_rows)?,
            kept: parse(kept)?,
        })
    }
}
