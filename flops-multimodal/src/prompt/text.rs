//! A soft context, trained in front of a black box that takes one.

use burn::module::Param;
use burn::prelude::*;
use flops_core::{ForwardModel, Probe, cross_entropy};

use crate::blackbox::BlackBoxClient;
use crate::error::MultimodalError;

/// A soft context in front of the class names, for a black box that takes one.
///
/// Its only trained parameter is `context`, `[1, tokens, dim]` (CoOp, Zhou et al. 2022, arXiv
/// 2109.01134). With activation noise each query of each image has a context of its own, so
/// allocation pays.
#[derive(Module, Debug)]
pub struct TextPrompt<B: Backend> {
    /// The context, `[1, tokens, dim]`.
    pub context: Param<Tensor<B, 3>>,
    #[module(skip)]
    client: BlackBoxClient,
}

impl<B: Backend> TextPrompt<B> {
    /// A context of zeros. The black box defines its meaning: most add it to word embeddings of
    /// their own, or replace them by it.
    ///
    /// # Errors
    /// [`MultimodalError::Setting`] if the black box takes no context.
    pub fn new(client: BlackBoxClient, device: &B::Device) -> Result<Self, MultimodalError> {
        let Some([tokens, dim]) = client.info().context else {
            let remedy = "the black box takes no context: use a visual prompt";
            return Err(MultimodalError::Setting { name: "prompt", value: "text".into(), remedy });
        };
        Ok(Self { context: Param::from_tensor(Tensor::zeros([1, tokens, dim], device)), client })
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
        // a clean pass has one context for all rows
        let context = context.reshape([given, tokens, dim]).expand([rows, tokens, dim]);
        self.client.scores(images, Some(context))
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
        self.client.failure().map(|e| e.to_string())
    }

    /// A black box may charge for every query.
    fn skips_site_check(&self) -> bool {
        true
    }
}
