//! [Adapters](flops_core::lora) on the layers of a [`Bert`]: put in, counted and merged.

use burn::prelude::*;
use flops_core::lora::{Lora, common_rank, merge};
use flops_core::random::keyed_rng;

use super::bert::Bert;
use crate::error::MultimodalError;

/// Key that separates the random numbers of adapters from those of a head of the same seed.
const LORA: u64 = u64::from_le_bytes(*b"adapters");

impl<B: Backend> Bert<B> {
    /// Puts new [adapters](Lora) of `rank` on the query and value projections of every layer.
    ///
    /// The outputs stay unchanged. The adapters are drawn from `seed` alone. They replace any that
    /// the model has; to keep what those learned, call [`merged`](Self::merged) first.
    ///
    /// # Errors
    /// [`MultimodalError::Config`] where `rank` is 0 or more than the width.
    pub fn with_lora(mut self, rank: usize, seed: u64) -> Result<Self, MultimodalError> {
        let ([_, width], device) = (self.token_embed.weight.dims(), self.token_embed.weight.device());
        if !(1..=width).contains(&rank) {
            return Err(MultimodalError::Config {
                field: "rank",
                value: rank,
                remedy: "use a rank from 1 to the width of the model",
            });
        }
        let mut rng = keyed_rng([seed, LORA, 0, 0]);
        let mut lora = || Some(Lora::new([width; 2], rank, &mut rng, &device));
        for layer in &mut self.layers {
            (layer.query_lora, layer.value_lora) = (lora(), lora());
        }
        Ok(self)
    }

    /// Returns the rank of the adapters; `None` where a layer lacks one, or where ranks differ.
    pub fn lora_rank(&self) -> Option<usize> {
        common_rank(self.adapters())
    }

    /// Returns whether the model has any adapter.
    pub(crate) fn has_adapters(&self) -> bool {
        self.adapters().any(|lora| lora.is_some())
    }

    fn adapters(&self) -> impl Iterator<Item = Option<&Lora<B>>> {
        self.layers.iter().flat_map(|layer| [layer.query_lora.as_ref(), layer.value_lora.as_ref()])
    }

    /// Adds the adapters to the query and value weights and removes them.
    ///
    /// The outputs stay the same up to rounding. A model without adapters is returned as it is.
    #[must_use]
    pub fn merged(mut self) -> Self {
        for layer in &mut self.layers {
            merge(&mut layer.query, &mut layer.query_lora);
            merge(&mut layer.value, &mut layer.value_lora);
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use burn::backend::Flex;
    use burn::module::Param;

    use super::*;
    use crate::towers::BertConfig;
    use flops_core::Probe;
    use flops_vit::Sites;

    fn model() -> Bert<Flex> {
        let config = BertConfig::new().with_vocab_size(20).with_context_length(6).with_embed_dim(8);
        config.with_depth(2).with_num_heads(2).with_mlp_dim(12).init(&Default::default()).unwrap()
    }

    fn states(model: &Bert<Flex>) -> Tensor<Flex, 3> {
        let ids = Tensor::from_ints([[1, 5, 2], [3, 2, 0]], &Default::default());
        let mask = Tensor::from_ints([[1, 1, 1], [1, 1, 0]], &Default::default());
        model.forward(ids, mask, &mut Probe::clean())
    }

    fn apart(a: &Tensor<Flex, 3>, b: &Tensor<Flex, 3>) -> f32 {
        (a.clone() - b.clone()).abs().max().into_scalar()
    }

    /// Both kinds of sites call the adapters.
    #[test]
    fn adapters_change_nothing_at_first_and_merge_to_the_same_outputs() {
        let plain = model();
        let before = states(&plain);
        let mut tuned = plain.clone().with_lora(2, 7).unwrap();
        assert_eq!((plain.lora_rank(), tuned.lora_rank()), (None, Some(2)));
        assert_eq!(states(&tuned).into_data(), before.to_data());
        for layer in &mut tuned.layers {
            for lora in [&mut layer.query_lora, &mut layer.value_lora].into_iter().flatten() {
                let up = lora.up.weight.val();
                let waves = Tensor::arange(0..16, &up.device()).float().sin().reshape([2, 8]);
                lora.up.weight = Param::from_tensor(up + waves);
            }
        }
        let after = states(&tuned);
        assert!(apart(&after, &before) > 0.05);
        assert!(apart(&states(&tuned.clone().with_sites(Sites::Branch)), &after) < 1e-5);
        let merged = tuned.clone().merged();
        assert!(!merged.has_adapters() && apart(&states(&merged), &after) < 1e-5);
        // another seed draws other adapters, a missing one is noticed
        let down = |seed| plain.clone().with_lora(2, seed).unwrap().layers[0].query_lora.clone().unwrap().down;
        assert_ne!(down(7).weight.val().into_data(), down(8).weight.val().into_data());
        tuned.layers[1].value_lora = None;
        assert_eq!(tuned.lora_rank(), None);
    }

    #[test]
    fn ranks_that_do_not_fit_are_named() {
        for rank in [0, 9, usize::MAX] {
            let error = model().with_lora(rank, 0).unwrap_err().to_string();
            assert!(error.contains(&format!("rank = {rank}")), "{error}");
        }
    }
}
