//! `--optimizer`: how a run updates its parameters.

use burn::module::AutodiffModule;
use burn::optim::adaptor::OptimizerAdaptor;
use burn::optim::decay::WeightDecayConfig;
use burn::optim::{AdamW, AdamWConfig, AdjustLrFn, Muon, MuonConfig};
use clap::ValueEnum;
use flops_core::Recipe;
use flops_core::train::matrix_optimizer::MatrixOptimizer;
use flops_core::train::param_groups::ParamGroup;

use crate::backend::{AB, B};

/// AdamW of a learner `L`.
pub type RunAdamW<L> = OptimizerAdaptor<AdamW, L, AB>;
/// Muon on the matrices of a learner `L`, and AdamW on all else.
pub type RunMuon<L> = OptimizerAdaptor<MatrixOptimizer<Muon<B>, AdamW>, L, AB>;

/// An optimizer of all parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OptimizerKind {
    /// AdamW.
    #[value(name = "adamw")]
    AdamW,
    /// Burn's Muon on matrices, AdamW on vectors.
    #[value(name = "muon")]
    Muon,
}

impl OptimizerKind {
    /// Returns the optimizer of a method: Muon for ZO-Muon, AdamW for all others.
    pub fn of(recipe: Recipe) -> Self {
        if recipe == Recipe::ZoMuon { Self::Muon } else { Self::AdamW }
    }

    /// Returns the name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::AdamW => "adamw",
            Self::Muon => "muon",
        }
    }
}

/// Returns the parts of a learner's ViT with a learning rate of their own, as multiples of the rate.
pub fn groups(head: f64, embeddings: f64) -> Vec<ParamGroup> {
    let embeddings = ["cls_token", "dist_token", "pos_embed"]
        .iter()
        .fold(ParamGroup::new("model.patch_embed", embeddings), |group, name| group.and(&format!("model.{name}")));
    vec![ParamGroup::new("model.head", head), embeddings]
}

/// Creates AdamW.
pub fn adamw<L: AutodiffModule<AB>>(weight_decay: f32, beta_2: f32) -> RunAdamW<L> {
    AdamWConfig::new().with_weight_decay(weight_decay).with_beta_2(beta_2).init()
}

/// Creates Muon for matrices, its updates of AdamW's size, so that both share a learning rate.
pub fn muon<L: AutodiffModule<AB>>(weight_decay: f32, beta_2: f32) -> RunMuon<L> {
    let muon = MuonConfig::new()
        .with_weight_decay(Some(WeightDecayConfig::new(weight_decay)))
        .with_adjust_lr_fn(AdjustLrFn::MatchRmsAdamW)
        .build();
    MatrixOptimizer::new(muon, adamw::<L>(weight_decay, beta_2).optim().clone()).init()
}
