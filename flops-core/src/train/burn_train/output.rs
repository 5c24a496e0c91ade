//! The output of a step as burn-train hands it to the metrics.

use burn::prelude::*;
use burn::train::metric::{AccuracyInput, Adaptor, LossInput};
use burn::train::{ClassificationOutput, ItemLazy};

use crate::train::output::StepOutput;

impl<B: Backend> StepOutput<B> {
    /// The output of a step that failed on a batch of `rows` examples: every loss is NaN.
    pub(in crate::train) fn failed(rows: usize) -> Self {
        let losses = TensorData::new(vec![f32::NAN; rows.max(1)], [rows.max(1)]);
        Self { losses: Tensor::from_data(losses, &Default::default()), classification: None, stats: None }
    }
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
            stats: self.stats,
        }
    }
}

impl<B: Backend> Adaptor<LossInput<B>> for StepOutput<B> {
    fn adapt(&self) -> LossInput<B> {
        LossInput::new(self.losses.clone())
    }
}

impl<B: Backend> Adaptor<AccuracyInput<B>> for StepOutput<B> {
    /// Logits and labels for the accuracy.
    ///
    /// Every row counts as wrong if the step failed or the model does not
    /// [classify](crate::ForwardModel::classification).
    fn adapt(&self) -> AccuracyInput<B> {
        let rows = self.losses.dims()[0];
        let device = self.losses.device();
        let (logits, labels) = self
            .classification
            .clone()
            .unwrap_or_else(|| (Tensor::zeros([rows, 2], &device), Tensor::ones([rows], &device)));
        ClassificationOutput::new(self.losses.clone(), logits, labels).adapt()
    }
}
