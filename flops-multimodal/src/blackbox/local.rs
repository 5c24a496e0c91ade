//! Black boxes in this process: a closure, and a Burn model.

use std::fmt::Display;
use std::sync::{Mutex, PoisonError};

use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorData};

use super::error::BlackBoxError;
use super::info::Info;
use super::interface::{BlackBox, Meter, Unmetered};
use super::query::Query;

/// A closure as a [`BlackBox`].
///
/// Queries are checked before the closure sees them, and so is its answer.
pub struct FromFn<F> {
    info: Info,
    scores: F,
}

impl<F, E> FromFn<F>
where
    F: Fn(&[Query]) -> Result<Vec<Vec<f32>>, E> + Send + Sync,
    E: Display,
{
    /// A black box that answers queries with `scores`: one row per query, one finite score per
    /// class.
    ///
    /// # Errors
    /// If `info` is invalid.
    pub fn new(info: Info, scores: F) -> Result<Self, BlackBoxError> {
        Ok(Self { info: info.checked()?, scores })
    }
}

impl<F, E> BlackBox for FromFn<F>
where
    F: Fn(&[Query]) -> Result<Vec<Vec<f32>>, E> + Send + Sync,
    E: Display,
{
    fn info(&self) -> &Info {
        &self.info
    }

    fn scores(&self, queries: &[Query]) -> Result<Vec<Vec<f32>>, BlackBoxError> {
        self.info.check_queries(queries)?;
        if queries.is_empty() {
            return Ok(Vec::new());
        }
        let scores = (self.scores)(queries).map_err(|why| BlackBoxError::Failed(why.to_string()))?;
        self.info.check_scores(queries.len(), &scores)?;
        Ok(scores)
    }
}

/// A Burn model in this process as a [`BlackBox`].
///
/// ```
/// use burn::backend::Flex;
/// use burn::tensor::Tensor;
/// use flops_multimodal::blackbox::{BlackBox, InProcess, Info, Query};
///
/// let info = Info::new(["mean", "none"], [1, 2, 2])?;
/// let forward = |images: Tensor<Flex, 4>, _contexts: Option<Tensor<Flex, 3>>| {
///     let mean = images.flatten::<2>(1, 3).mean_dim(1);
///     Tensor::cat(vec![mean.clone(), mean.zeros_like()], 1)
/// };
/// let model = InProcess::new(info, forward, 64, &Default::default())?;
/// assert_eq!(model.scores(&[Query::new(vec![0.0, 0.5, 0.5, 1.0])])?, [[0.5, 0.0]]);
/// # Ok::<(), flops_multimodal::blackbox::BlackBoxError>(())
/// ```
pub struct InProcess<B: Backend, F> {
    info: Info,
    // Burn modules are Send, not Sync; a device runs one forward pass at a time anyway
    forward: Mutex<F>,
    max_rows: usize,
    device: B::Device,
}

impl<B, F> InProcess<B, F>
where
    B: Backend,
    F: Fn(Tensor<B, 4>, Option<Tensor<B, 3>>) -> Tensor<B, 2> + Send,
{
    /// A black box that runs `forward`, on at most `max_rows` rows at a time (at least 1).
    ///
    /// The contexts are `None` for rows without one.
    ///
    /// # Shapes
    /// - `forward` takes images `[rows, channels, height, width]`, in [0, 1], and contexts `[rows,
    ///   tokens, dim]`
    /// - `forward` returns scores `[rows, classes]`
    ///
    /// # Errors
    /// If `info` is invalid, or `max_rows` is 0.
    pub fn new(info: Info, forward: F, max_rows: usize, device: &B::Device) -> Result<Self, BlackBoxError> {
        if max_rows == 0 {
            let (name, value, remedy) = ("max_rows", "0".into(), "give 1 or more");
            return Err(BlackBoxError::Setting { name, value, remedy });
        }
        Ok(Self { info: info.checked()?, forward: Mutex::new(forward), max_rows, device: device.clone() })
    }

    /// One forward pass, over rows whose contexts all have the same length.
    fn pass(&self, queries: &[Query]) -> Result<Vec<Vec<f32>>, BlackBoxError> {
        let rows = queries.len();
        let [channels, height, width] = self.info.image;
        let images: Vec<f32> = queries.iter().flat_map(|query| query.image.iter().copied()).collect();
        let images = Tensor::from_data(TensorData::new(images, [rows, channels, height, width]), &self.device);
        let contexts: Vec<f32> =
            queries.iter().filter_map(|query| query.context.as_deref()).flatten().copied().collect();
        let contexts = self.info.context.filter(|_| !contexts.is_empty()).map(|[_, dim]| {
            let tokens = contexts.len() / rows / dim;
            Tensor::from_data(TensorData::new(contexts, [rows, tokens, dim]), &self.device)
        });
        // a forward pass only reads, so an earlier panic left nothing in a broken state
        let forward = self.forward.lock().unwrap_or_else(PoisonError::into_inner);
        let scores = forward(images, contexts);
        drop(forward);
        let [got, classes] = scores.dims();
        if got != rows {
            return Err(BlackBoxError::Rows { got, expected: rows });
        }
        if classes != self.info.classes.len() {
            return Err(BlackBoxError::Classes { row: 0, got: classes, expected: self.info.classes.len() });
        }
        let scores: Vec<f32> = scores.into_data().iter::<f32>().collect();
        let scores: Vec<Vec<f32>> = scores.chunks(classes).map(<[f32]>::to_vec).collect();
        self.info.check_scores(rows, &scores)?;
        Ok(scores)
    }
}

impl<B, F> BlackBox for InProcess<B, F>
where
    B: Backend,
    F: Fn(Tensor<B, 4>, Option<Tensor<B, 3>>) -> Tensor<B, 2> + Send,
{
    fn info(&self) -> &Info {
        &self.info
    }

    fn scores(&self, queries: &[Query]) -> Result<Vec<Vec<f32>>, BlackBoxError> {
        self.scores_metered(queries, &Unmetered)
    }

    fn scores_metered(&self, queries: &[Query], meter: &dyn Meter) -> Result<Vec<Vec<f32>>, BlackBoxError> {
        self.info.check_queries(queries)?;
        let length = |query: &Query| query.context.as_ref().map(|context| context.len());
        let mut all = Vec::with_capacity(queries.len());
        for same_length in queries.chunk_by(|left, right| length(left) == length(right)) {
            for chunk in same_length.chunks(self.max_rows) {
                meter.attempt(chunk.len())?;
                let scores = self.pass(chunk)?;
                meter.answered(all.len(), &scores)?;
                all.extend(scores);
            }
        }
        Ok(all)
    }
}
