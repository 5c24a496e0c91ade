//! What a step reports, and the burn-train metrics that read it.

use burn::prelude::*;
use burn::train::metric::{AccuracyInput, Adaptor, LossInput};
use burn::train::{ClassificationOutput, ItemLazy};

/// What a step hands to the metrics.
pub struct StepOutput<B: Backend> {
    /// Clean loss of each datum, `[batch]`.
    pub losses: Tensor<B, 1>,
    /// Logits `[batch, classes]` and labels `[batch]`, where the model [has them](crate::ForwardModel::classification).
    pub classification: Option<(Tensor<B, 2>, Tensor<B, 1, Int>)>,
}

impl<B: Backend> ItemLazy for StepOutput<B> {
    type ItemSync = StepOutput<burn::backend::Flex>;

    fn sync(self) -> Self::ItemSync {
        let device = Default::default();
        StepOutput {
            losses: Tensor::from_data(self.losses.into_data().convert::<f32>(), &device),
            classification: self.classification.map(|(logits, labels)| {
                (
                    Tensor::from_data(logits.into_data().convert::<f32>(), &device),
                    Tensor::from_data(labels.into_data().convert::<i32>(), &device),
                )
            }),
        }
    }
}

impl<B: Backend> Adaptor<LossInput<B>> for StepOutput<B> {
    fn adapt(&self) -> LossInput<B> {
        LossInput::new(self.losses.clone())
    }
}

impl<B: Backend> Adaptor<AccuracyInput<B>> for StepOutput<B> {
    /// # Panics
    /// Where the model does not [classify](crate::ForwardModel::classification): leave the accuracy metric out.
    fn adapt(&self) -> AccuracyInput<B> {
        match &self.classification {
            Some((logits, labels)) => {
                ClassificationOutput::new(self.losses.clone(), logits.clone(), labels.clone()).adapt()
            }
            None => panic!("the accuracy metric needs ForwardModel::classification, which this model does not implement"),
        }
    }
}
