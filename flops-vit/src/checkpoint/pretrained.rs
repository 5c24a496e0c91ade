//! A model together with its card.

use burn::module::AutodiffModule;
use burn::prelude::*;
use burn::tensor::backend::AutodiffBackend;

use super::card::Card;
use crate::error::VitError;
use crate::model::ViT;
use crate::scope::Scope;

/// A model and the [`Card`] that describes it, changed together.
///
/// # Example
/// The shipped model at another image size, with a head for two classes, prepared for training:
/// ```
/// use burn::backend::Flex;
/// use flops_vit::{Scope, checkpoint};
///
/// let pretrained = checkpoint::pretrained::<Flex>(&Default::default())?
///     .with_img_size(48)?
///     .with_new_head(vec!["cat".into(), "dog".into()], 0)
///     .with_scope(Scope::ClsTail)?;
/// assert_eq!(pretrained.card.config.num_classes, 2);
/// assert_eq!(pretrained.card.config.img_size, 48);
/// # Ok::<(), flops_vit::VitError>(())
/// ```
#[derive(Clone, Debug)]
pub struct Pretrained<B: Backend> {
    /// The model, its weights in f32.
    pub model: ViT<B>,
    /// Its configuration, how its inputs are prepared, and its classes.
    pub card: Card,
}

impl<B: Backend> Pretrained<B> {
    /// Replaces the head by a new one for `classes`, drawn from `seed` alone; the card names them.
    ///
    /// See [`ViT::with_new_head`] for the initial weights.
    #[must_use]
    pub fn with_new_head(self, classes: Vec<String>, seed: u64) -> Self {
        let Self { model, mut card } = self;
        card.config.num_classes = classes.len();
        card.classes = classes;
        Self { model: model.with_new_head(card.config.num_classes, seed), card }
    }

    /// Sets the image size, in pixels: positional embeddings are interpolated, and the card
    /// follows.
    ///
    /// # Errors
    /// As [`ViT::with_img_size`].
    pub fn with_img_size(self, img_size: usize) -> Result<Self, VitError> {
        let Self { model, mut card } = self;
        card.config.img_size = img_size;
        Ok(Self { model: model.with_img_size(img_size)?, card })
    }

    /// Puts new adapters of `rank` on every block, see [`ViT::with_lora`].
    ///
    /// # Errors
    /// As [`ViT::with_lora`].
    pub fn with_lora(self, rank: usize, seed: u64) -> Result<Self, VitError> {
        Ok(Self { model: self.model.with_lora(rank, seed)?, card: self.card })
    }

    /// Makes the parameters of `scope` trainable and freezes all others, see [`ViT::with_scope`].
    ///
    /// # Errors
    /// As [`ViT::with_scope`].
    pub fn with_scope(self, scope: Scope) -> Result<Self, VitError> {
        Ok(Self { model: self.model.with_scope(scope)?, card: self.card })
    }
}

impl<B: AutodiffBackend> Pretrained<B> {
    /// The same model on the backend without automatic differentiation.
    pub fn valid(&self) -> Pretrained<B::InnerBackend> {
        Pretrained { model: self.model.valid(), card: self.card.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{card, model};
    use super::*;
    use burn::backend::{Autodiff, Flex};

    #[test]
    fn the_card_follows_the_model() {
        let pretrained = Pretrained { model: model(), card: card() };
        let changed = pretrained.clone().with_new_head(vec!["a".into(), "b".into()], 7).with_img_size(12).unwrap();
        changed.card.fits(&changed.model).unwrap();
        assert_eq!(changed.card.classes, ["a", "b"]);
        assert_eq!((changed.card.config.num_classes, changed.card.config.img_size), (2, 12));
        let direct = model().with_new_head(2, 7);
        assert_eq!(changed.model.head.weight.to_data(), direct.head.weight.to_data());
        let error = pretrained.with_img_size(10).unwrap_err().to_string();
        assert!(error.contains("img_size = 10"), "{error}");
    }

    #[test]
    fn the_inner_model_has_the_same_weights_and_card() {
        let model = card().config.init::<Autodiff<Flex>>(&Default::default()).unwrap();
        let pretrained = Pretrained { model, card: card() }.with_scope(Scope::Head).unwrap();
        let inner: Pretrained<Flex> = pretrained.valid();
        assert_eq!(inner.card, card());
        assert_eq!(inner.model.head.weight.to_data(), pretrained.model.head.weight.to_data());
    }
}
