//! Adapters on the blocks of a ViT: put in, counted and merged.

use burn::prelude::*;
use flops_core::lora::{common_rank, merge};
use rand::SeedableRng;
use rand::rngs::StdRng;

use super::Lora;
use crate::block::{Attention, Block};
use crate::error::VitError;
use crate::model::ViT;

impl<B: Backend> Attention<B> {
    fn with_lora(mut self, mut lora: impl FnMut() -> Lora<B>) -> Self {
        self.query_lora = Some(lora());
        self.value_lora = Some(lora());
        self
    }

    fn merged(mut self) -> Self {
        merge(&mut self.query, &mut self.query_lora);
        merge(&mut self.value, &mut self.value_lora);
        self
    }
}

impl<B: Backend> ViT<B> {
    /// Puts new [adapters](Lora) of `rank` on the query and value projections of every block.
    ///
    /// The logits stay unchanged. The adapters are drawn from `seed` alone. They replace any that
    /// the model has, and what those learned is lost; to keep it, call [`merged`](Self::merged)
    /// first. [`Scope::Lora`](crate::Scope::Lora) of the same rank trains the adapters.
    ///
    /// # Errors
    /// [`VitError::LoraRank`] where `rank` is 0 or more than `embed_dim`.
    ///
    /// # Example
    /// ```
    /// use burn::backend::Flex;
    /// use flops_vit::{Scope, ViTConfig};
    ///
    /// let device = Default::default();
    /// let model = ViTConfig::vit_micro_patch4_32().with_depth(2).init::<Flex>(&device)?;
    /// let model = model.with_lora(4, 0)?.with_scope(Scope::Lora(4))?;
    /// assert_eq!(model.lora_rank(), Some(4));
    /// assert_eq!(model.merged().lora_rank(), None);
    /// # Ok::<(), flops_vit::VitError>(())
    /// ```
    pub fn with_lora(self, rank: usize, seed: u64) -> Result<Self, VitError> {
        let (d, device) = (self.check_rank(rank)?, self.head.weight.device());
        // a stream apart from the one that draws a new head from the same seed
        let mut key = [0; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        key[8..12].copy_from_slice(b"lora");
        let mut rng = StdRng::from_seed(key);
        Ok(self.with_adapters(|| Lora::new([d; 2], rank, &mut rng, &device)))
    }

    /// Puts adapters with lazy parameters on every block, to be filled from a file.
    pub(crate) fn with_lazy_lora(self, rank: usize) -> Result<Self, VitError> {
        let (d, device) = (self.check_rank(rank)?, self.head.weight.device());
        Ok(self.with_adapters(|| Lora::lazy([d; 2], rank, &device)))
    }

    fn with_adapters(mut self, mut lora: impl FnMut() -> Lora<B>) -> Self {
        for block in std::mem::take(&mut self.blocks) {
            let attn = block.attn.with_lora(&mut lora);
            self.blocks.push(Block { attn, ..block });
        }
        self
    }

    /// Returns `embed_dim`, where adapters of that rank fit it.
    fn check_rank(&self, rank: usize) -> Result<usize, VitError> {
        let [embed_dim, _] = self.head.weight.dims();
        if (1..=embed_dim).contains(&rank) { Ok(embed_dim) } else { Err(VitError::LoraRank { rank, embed_dim }) }
    }

    /// Returns the rank of the adapters.
    ///
    /// It is `None` where a query or value projection has no adapter, or where ranks differ.
    pub fn lora_rank(&self) -> Option<usize> {
        common_rank(self.adapters())
    }

    /// Returns whether the model has any adapter.
    pub(crate) fn has_adapters(&self) -> bool {
        self.adapters().any(|lora| lora.is_some())
    }

    fn adapters(&self) -> impl Iterator<Item = Option<&Lora<B>>> {
        self.blocks.iter().flat_map(|block| [block.attn.query_lora.as_ref(), block.attn.value_lora.as_ref()])
    }

    /// Adds B·A to the query and value weights and removes the adapters.
    ///
    /// The logits stay the same up to rounding, at the cost of a model without adapters. Parameters
    /// that were trainable stay so. A model without adapters is returned as it is.
    #[must_use]
    pub fn merged(mut self) -> Self {
        for block in std::mem::take(&mut self.blocks) {
            self.blocks.push(Block { attn: block.attn.merged(), ..block });
        }
        self
    }
}
