//! Which parameters of a ViT are trained.
//!
//! The variance of a forward-only gradient grows with the number of perturbed coordinates. A small
//! scope therefore often trains faster.

use std::fmt;
use std::str::FromStr;

use burn::prelude::*;
use flops_core::parameters::train_where;

use crate::config::Pool;
use crate::error::VitError;
use crate::model::ViT;
use crate::sites::Sites;

/// The scopes as text, for error messages.
const CHOICES: [&str; 6] =
    ["head", "cls_tail", "bias_norm", "last:K (K blocks, at least 1)", "lora:R (rank R, at least 1)", "full"];

/// Which parameters are trained; the others are frozen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Scope {
    /// `head`: the classifier only.
    Head,
    /// `cls_tail`: the path of the class token from the last block on.
    ///
    /// It trains query, output projection, second norm and MLP of that block, the final norm and
    /// the head. Keys, values and first norm of the block stay frozen, so the other tokens need no
    /// noise. Of the scopes that change the features it perturbs the fewest coordinates.
    ClsTail,
    /// `bias_norm`: every bias and every layer normalisation, and the head.
    BiasNorm,
    /// `last:K`: the last K blocks, the final norm and the head.
    Last(usize),
    /// `lora:R`: the [adapters](crate::lora) of rank R on the queries and values of every block,
    /// and the head.
    ///
    /// The other scopes freeze adapters, except `full`.
    Lora(usize),
    /// `full`: everything.
    Full,
}

impl Scope {
    /// Returns whether the parameter at `path` is trained in a model of `depth` blocks.
    pub(crate) fn trains(self, path: &[impl AsRef<str>], depth: usize) -> bool {
        let path: Vec<&str> = path.iter().map(AsRef::as_ref).collect();
        match (self, path.as_slice()) {
            (Self::Full, _) | (_, ["head" | "head_dist", ..]) => true,
            (_, ["blocks", _, "attn", "query_lora" | "value_lora", ..]) => matches!(self, Self::Lora(_)),
            (Self::Head | Self::Lora(_), _) => false,
            (Self::BiasNorm, [.., parameter]) => matches!(*parameter, "bias" | "gamma" | "beta"),
            (Self::ClsTail | Self::Last(_), ["norm", ..]) => true,
            (Self::ClsTail, ["blocks", index, layer @ ..]) => {
                is_last(index, 1, depth)
                    && matches!(layer, ["attn", "query" | "proj", ..] | ["norm2" | "fc1" | "fc2", ..])
            }
            (Self::Last(blocks), ["blocks", index, ..]) => is_last(index, blocks, depth),
            _ => false,
        }
    }
}

/// Returns whether `index` is one of the last `blocks` of `depth`.
fn is_last(index: &str, blocks: usize, depth: usize) -> bool {
    index.parse::<usize>().is_ok_and(|index| index + blocks >= depth)
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Head => f.write_str("head"),
            Self::ClsTail => f.write_str("cls_tail"),
            Self::BiasNorm => f.write_str("bias_norm"),
            Self::Last(blocks) => write!(f, "last:{blocks}"),
            Self::Lora(rank) => write!(f, "lora:{rank}"),
            Self::Full => f.write_str("full"),
        }
    }
}

impl FromStr for Scope {
    type Err = VitError;

    fn from_str(text: &str) -> Result<Self, VitError> {
        match text {
            "head" => Ok(Self::Head),
            "cls_tail" => Ok(Self::ClsTail),
            "bias_norm" => Ok(Self::BiasNorm),
            "full" => Ok(Self::Full),
            _ => match text.split_once(':').map(|(name, number)| (name, number.parse())) {
                Some(("last", Ok(blocks))) if blocks > 0 => Ok(Self::Last(blocks)),
                Some(("lora", Ok(rank))) if rank > 0 => Ok(Self::Lora(rank)),
                _ => Err(VitError::UnknownScope { name: text.into(), choices: &CHOICES }),
            },
        }
    }
}

impl<B: Backend> ViT<B> {
    /// Chooses what the sites are; parameters and outputs stay the same.
    #[must_use]
    pub fn with_sites(self, sites: Sites) -> Self {
        Self { sites, ..self }
    }

    /// Makes the parameters of `scope` trainable and freezes all others, whatever they were before.
    ///
    /// On an autodiff backend `is_require_grad` of a parameter tells whether it is trained. A
    /// backend without automatic differentiation has no such flag.
    ///
    /// # Errors
    /// - [`VitError::ScopeDepth`]: `last:K` with no block, or with more than the model has.
    /// - [`VitError::ScopeToken`]: `cls_tail` for a model that classifies by its pooled patch
    ///   tokens.
    /// - [`VitError::NoAdapters`]: `lora:R` for a model without adapters of rank R, which
    ///   [`with_lora`](Self::with_lora) puts in.
    pub fn with_scope(self, scope: Scope) -> Result<Self, VitError> {
        let depth = self.blocks.len();
        if let Scope::Last(blocks) = scope
            && !(1..=depth).contains(&blocks)
        {
            return Err(VitError::ScopeDepth { blocks, depth, choices: &CHOICES });
        }
        if scope == Scope::ClsTail && self.pool != Pool::Token {
            return Err(VitError::ScopeToken);
        }
        let found = self.lora_rank();
        if let Scope::Lora(rank) = scope
            && found != Some(rank)
        {
            return Err(VitError::NoAdapters { rank, found });
        }
        Ok(train_where(self, |path| scope.trains(path, depth)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ViTConfig;
    use burn::backend::{Autodiff, Flex};
    use burn::module::{AutodiffModule, ModuleMapper, Param, Quantizer};
    use burn::tensor::quantization::{Calibration, QuantStore};
    use flops_core::parameters::{parameters, trained_values};
    use flops_core::quantize::{WeightScheme, quantize_frozen};

    type AB = Autodiff<Flex>;

    /// Names of the trainable parameters, and the number of their values.
    fn trained_of(model: &impl Module<AB>) -> (Vec<String>, usize) {
        let names = parameters(model).into_iter().filter(|p| p.trained).map(|p| p.path.join("."));
        (names.collect(), trained_values(model))
    }

    fn model() -> ViT<AB> {
        let config =
            ViTConfig::new().with_img_size(8).with_patch_size(4).with_embed_dim(8).with_depth(3).with_num_heads(2);
        config.with_mlp_ratio(2.0).with_num_classes(5).init(&Default::default()).unwrap()
    }

    fn trained(scope: &str) -> (Vec<String>, usize) {
        trained_of(&model().with_scope(scope.parse().unwrap()).unwrap())
    }

    fn layers(names: &[&str], parameters: [&str; 2]) -> Vec<String> {
        names.iter().flat_map(|n| parameters.map(|p| format!("{n}.{p}"))).collect()
    }

    fn assert_same(mut found: Vec<String>, mut expected: Vec<String>) {
        found.sort();
        expected.sort();
        assert_eq!(found, expected);
    }

    const LINEAR: [&str; 2] = ["weight", "bias"];
    const NORM: [&str; 2] = ["gamma", "beta"];

    #[test]
    fn head_trains_the_classifier() {
        let (names, params) = trained("head");
        assert_eq!(names, ["head.weight", "head.bias"]);
        assert_eq!(params, 8 * 5 + 5);
    }

    #[test]
    fn cls_tail_trains_the_class_token_path() {
        let (names, params) = trained("cls_tail");
        let linear = ["blocks.2.attn.query", "blocks.2.attn.proj", "blocks.2.fc1", "blocks.2.fc2", "head"];
        assert_same(names, [layers(&linear, LINEAR), layers(&["blocks.2.norm2", "norm"], NORM)].concat());
        assert_eq!(params, 2 * (64 + 8) + (128 + 16) + (128 + 8) + 2 * 16 + 45);
    }

    #[test]
    fn bias_norm_trains_biases_and_norms() {
        let (names, params) = trained("bias_norm");
        let mut expected = layers(&["head"], LINEAR);
        expected.extend(["patch_embed.bias", "norm.gamma", "norm.beta"].map(String::from));
        for block in 0..3 {
            expected.extend(layers(&["norm1", "norm2"], NORM).iter().map(|n| format!("blocks.{block}.{n}")));
            let linear = ["attn.query", "attn.key", "attn.value", "attn.proj", "fc1", "fc2"];
            expected.extend(linear.map(|n| format!("blocks.{block}.{n}.bias")));
        }
        assert_same(names, expected);
        assert_eq!(params, 8 + 3 * (2 * 16 + 4 * 8 + 16 + 8) + 16 + 45);
    }

    #[test]
    fn last_trains_the_last_blocks() {
        let block = 2 * 16 + 4 * 72 + 144 + 136;
        for (scope, blocks) in [("last:1", 1), ("last:2", 2), ("last:3", 3)] {
            let (names, params) = trained(scope);
            assert_eq!(names.len(), blocks * 16 + 4);
            assert!(
                names.iter().all(|n| !n.starts_with("patch_embed") && !n.ends_with("token") && !n.ends_with("embed"))
            );
            assert!(names.contains(&format!("blocks.{}.attn.key.weight", 3 - blocks)));
            assert_eq!(params, blocks * block + 16 + 45);
        }
    }

    #[test]
    fn full_trains_everything() {
        let (names, params) = trained("full");
        assert_eq!(names.len(), 4 + 3 * 16 + 4);
        assert_eq!(params, Module::num_params(&model()));
    }

    /// Burn's quantizer on all matrices leaves the 9 trained vectors of 14 parameters.
    #[test]
    fn quantizing_leaves_the_scope_as_it_is() {
        struct Matrices(Quantizer);
        impl<B: Backend> ModuleMapper<B> for Matrices {
            fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
                if D > 1 { self.0.map_float(param) } else { param }
            }
        }
        let tail = model().with_scope(Scope::ClsTail).unwrap();
        let before = trained_of(&tail).0;
        assert_eq!(before.len(), 14);
        let scheme = WeightScheme::Int8Tensor.scheme().with_store(QuantStore::Native);
        let mut burn = Matrices(Quantizer { calibration: Calibration::MinMax, scheme });
        let lost = ViT::<AB>::from_inner(tail.valid().map(&mut burn));
        assert_eq!(trained_of(&lost).0.len(), 9);
        let kept = quantize_frozen(tail, scheme).unwrap();
        assert_eq!(trained_of(&kept).0, before);
    }

    const ADAPTERS: [&str; 4] =
        ["query_lora.down.weight", "query_lora.up.weight", "value_lora.down.weight", "value_lora.up.weight"];

    #[test]
    fn lora_trains_adapters_and_head() {
        let model = model().with_lora(2, 0).unwrap().with_scope("lora:2".parse().unwrap()).unwrap();
        let (names, params) = trained_of(&model);
        let mut expected = layers(&["head"], LINEAR);
        for block in 0..3 {
            expected.extend(ADAPTERS.map(|n| format!("blocks.{block}.attn.{n}")));
        }
        assert_same(names, expected);
        assert_eq!(params, 3 * 4 * 2 * 8 + 45);
    }

    #[test]
    fn other_scopes_freeze_adapters_and_full_trains_them() {
        for scope in ["head", "cls_tail", "bias_norm", "last:1", "last:3", "full"] {
            let (mut names, mut params) = trained(scope);
            let model = model().with_lora(2, 0).unwrap().with_scope(scope.parse().unwrap()).unwrap();
            let (found, of_found) = trained_of(&model);
            if scope == "full" {
                names.extend((0..3).flat_map(|block| ADAPTERS.map(|n| format!("blocks.{block}.attn.{n}"))));
                params += 3 * 4 * 2 * 8;
            }
            assert_same(found, names);
            assert_eq!(of_found, params, "{scope}");
        }
    }

    #[test]
    fn lora_without_its_adapters_is_an_error() {
        let none = model().with_scope(Scope::Lora(4)).unwrap_err();
        assert!(matches!(none, VitError::NoAdapters { rank: 4, found: None }));
        assert!(none.to_string().contains("has none") && none.to_string().contains("with_lora(4, seed)"), "{none}");
        let other = model().with_lora(2, 0).unwrap().with_scope(Scope::Lora(4)).unwrap_err().to_string();
        assert!(other.contains("some of rank 2"), "{other}");
        let mut partly = model().with_lora(2, 0).unwrap();
        partly.blocks[1].attn.value_lora = None;
        assert!(partly.with_scope(Scope::Lora(2)).is_err());
    }

    #[test]
    fn with_scope_replaces_the_previous_scope() {
        let model = model().with_scope(Scope::Head).unwrap().with_scope(Scope::Full).unwrap();
        assert_eq!(trained_of(&model).0.len(), 56);
    }

    #[test]
    fn scopes_round_trip_through_text_and_errors_name_them() {
        for scope in [Scope::Head, Scope::ClsTail, Scope::BiasNorm, Scope::Last(4), Scope::Lora(4), Scope::Full] {
            assert_eq!(scope.to_string().parse::<Scope>().unwrap(), scope);
        }
        for text in
            ["tail", "", "last", "last:", "last:0", "last:-1", "last:two", "lora", "lora:0", "lora:-1", "lora:2:2"]
        {
            let error = text.parse::<Scope>().unwrap_err();
            assert!(matches!(error, VitError::UnknownScope { .. }));
            assert!(error.to_string().contains(&CHOICES.join(", ")), "{error}");
            assert!(error.to_string().contains(text), "{error}");
        }
        let averaged = ViTConfig::vit_micro_patch4_32().with_pool(Pool::Avg).init::<AB>(&Default::default()).unwrap();
        assert!(averaged.with_scope(Scope::ClsTail).unwrap_err().to_string().contains("last:1"));
        for blocks in [0, 4] {
            let error = model().with_scope(Scope::Last(blocks)).unwrap_err();
            assert!(matches!(error, VitError::ScopeDepth { depth: 3, .. }));
            assert!(error.to_string().contains("1 to 3"), "{error}");
        }
    }
}
