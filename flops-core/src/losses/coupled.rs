//! Targets of a loss that couples the examples of a batch.

use burn::prelude::*;
use burn::tensor::DType;
use flops_derive::{Lift, Rows};

/// The labels of a batch; [coupled](crate::ForwardModel::couple), with what the loss of a row needs to
/// know of the other rows.
///
/// It is the target of a model that optimises a metric of the whole batch, such as
/// [`macro_f1`](super::macro_f1) or [`roc_auc`](super::roc_auc).
#[derive(Clone, Debug, Rows, Lift)]
pub struct BatchTarget<B: Backend> {
    /// The label of each row, `[rows]`.
    pub labels: Tensor<B, 1, Int>,
    pub(super) coupled: Option<Coupled<B>>,
}

/// What a clean pass leaves for the queries of its batch.
#[derive(Clone, Debug, Rows, Lift)]
pub(super) struct Coupled<B: Backend> {
    /// What belongs to each row: its own part of the loss less what it adds to that of the batch, and
    /// whatever else the loss needs, `[rows, n]`.
    pub rows: Tensor<B, 2>,
    /// Statistics of the batch, the same for all rows.
    #[rows(shared)]
    pub batch: Tensor<B, 2>,
    /// Examples of the batch.
    #[rows(skip)]
    pub examples: usize,
}

impl<B: Backend> BatchTarget<B> {
    /// The target of examples with these labels.
    ///
    /// # Shapes
    /// - labels: `[rows]`
    #[must_use]
    pub fn new(labels: Tensor<B, 1, Int>) -> Self {
        Self { labels, coupled: None }
    }
}

impl<B: Backend> Coupled<B> {
    /// A column of the rows, `[rows]`.
    pub fn column(&self, index: usize) -> Tensor<B, 1> {
        self.rows.clone().narrow(1, index, 1).squeeze_dim(1)
    }

    /// A row of the statistics, `[1, n]`.
    pub fn statistic(&self, index: usize) -> Tensor<B, 2> {
        self.batch.clone().narrow(0, index, 1)
    }
}

/// The classes `index` of `classes` as rows with a 1, `[rows, classes]`, in f32; zeros where it is no
/// class.
pub(crate) fn one_hot<B: Backend>(index: Tensor<B, 1, Int>, classes: usize) -> Tensor<B, 2> {
    let [rows] = index.dims();
    let all = Tensor::<B, 1, Int>::arange(0..classes as i64, &index.device()).reshape([1, classes]);
    let index = index.reshape([rows, 1]).expand([rows, classes]);
    index.equal(all.expand([rows, classes])).float().cast(DType::F32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::Rows as _;
    use crate::losses::{couple_macro_f1, macro_f1};
    use crate::testing::B;

    /// Rows in another order, cut and joined again, have the losses that they had.
    #[test]
    fn rows_keep_what_they_know_of_their_batch() {
        let device = Default::default();
        let logits = Tensor::<B, 2>::from_floats([[1.0, 0.0], [0.2, 0.9], [0.6, 0.1], [0.0, 2.0]], &device);
        let labels = Tensor::from_ints([0, 0, 1, 1], &device);
        let target = couple_macro_f1(&logits, &BatchTarget::new(labels));
        let all: Vec<f32> = macro_f1(logits.clone(), target.clone()).into_data().to_vec().unwrap();
        let order = [3, 1, 1, 0];
        let target = BatchTarget::cat(vec![target.rows(&order[..1]), target.rows(&order[1..])]);
        assert_eq!((target.check_rows(4), target.check_rows(3)), (Ok(()), Err(4)));
        let some: Vec<f32> = macro_f1(logits.rows(&order), target).into_data().to_vec().unwrap();
        assert_eq!(some, order.map(|i| all[i]));
    }
}
