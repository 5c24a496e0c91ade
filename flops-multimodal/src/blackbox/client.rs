//! Queries of a black box from rows of tensors, for models that are trained in front of it.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use burn::prelude::*;

use super::error::BlackBoxError;
use super::info::Info;
use super::interface::BlackBox;
use super::query::Query;

/// Sends rows of tensors to a [`BlackBox`] and returns its scores as a tensor.
///
/// The first error is kept. After it nothing is sent, until it is
/// [forgotten](Self::forget_failure).
#[derive(Clone)]
pub struct BlackBoxClient {
    black_box: Arc<dyn BlackBox>,
    failure: Arc<Mutex<Option<BlackBoxError>>>,
}

impl fmt::Debug for BlackBoxClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlackBoxClient").field("info", self.info()).field("failure", &self.failure()).finish()
    }
}

impl BlackBoxClient {
    /// A client of `black_box`. Wrap the black box in [`Metered`](crate::blackbox::Metered) first
    /// to cap its queries.
    #[must_use]
    pub fn new(black_box: Arc<dyn BlackBox>) -> Self {
        Self { black_box, failure: Arc::default() }
    }

    /// What the black box takes and returns.
    pub fn info(&self) -> &Info {
        self.black_box.info()
    }

    /// The first error, after which nothing is sent.
    pub fn failure(&self) -> Option<BlackBoxError> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Forgets the first error, so that queries are sent again. All clones forget it.
    ///
    /// It suits an error that has passed, such as queries that were [held
    /// back](crate::blackbox::Metered::hold_back).
    pub fn forget_failure(&self) {
        *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Scores of these rows; all of them are NaN if the black box fails now or has failed before.
    ///
    /// # Shapes
    /// - images: `[rows, channels, height, width]`, contexts: `[rows, tokens, dim]`
    /// - returns: `[rows, classes]`
    pub fn scores<B: Backend>(&self, images: Tensor<B, 4>, contexts: Option<Tensor<B, 3>>) -> Tensor<B, 2> {
        let (rows, classes, device) = (images.dims()[0], self.info().classes.len(), images.device());
        let scores = match self.failure() {
            Some(_) => vec![f32::NAN; rows * classes],
            None => self.send(to_host(images), contexts.map(to_host)).unwrap_or_else(|error| {
                self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                vec![f32::NAN; rows * classes]
            }),
        };
        Tensor::from_data(TensorData::new(scores, [rows, classes]), &device)
    }

    fn send(&self, images: Vec<Vec<f32>>, contexts: Option<Vec<Vec<f32>>>) -> Result<Vec<f32>, BlackBoxError> {
        // equal images become one allocation, so that each is hashed, checked and sent once
        let mut shared = HashMap::<Vec<u32>, Arc<[f32]>>::new();
        let mut queries: Vec<Query> = images
            .into_iter()
            .map(|image| {
                let bits = image.iter().map(|x| x.to_bits()).collect();
                Query::new(shared.entry(bits).or_insert_with(|| image.into()).clone())
            })
            .collect();
        if let Some(contexts) = contexts {
            queries = queries.into_iter().zip(contexts).map(|(query, context)| query.with_context(context)).collect();
        }
        let scores = self.black_box.scores(&queries)?;
        // users implement the trait too: a malformed answer must not become a loss
        self.info().check_scores(queries.len(), &scores)?;
        Ok(scores.into_iter().flatten().collect())
    }
}

/// The rows of a tensor, flattened, on the host.
fn to_host<B: Backend, const D: usize>(x: Tensor<B, D>) -> Vec<Vec<f32>> {
    let width: usize = x.dims()[1..].iter().product();
    let all: Vec<f32> = x.into_data().iter::<f32>().collect();
    all.chunks(width.max(1)).map(<[f32]>::to_vec).collect()
}
