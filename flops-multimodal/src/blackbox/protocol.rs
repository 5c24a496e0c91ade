//! The JSON messages of a black box over HTTP, for the client here and for servers.
//!
//! | request | answer |
//! |---|---|
//! | `GET /v1/info` | [`Info`] |
//! | `POST /v1/scores` with a [`ScoreRequest`] | [`ScoreResponse`] |
//! | `GET /v1/count` | [`CountResponse`], if the server counts queries |
//!
//! Vectors are sent as base64 of little-endian `f32`, which keeps every bit. Each `POST` has an
//! [`IDEMPOTENCY_KEY`] header of 32 hexadecimal digits. They depend on the rows alone, so a retry
//! has the same key, and so have the same rows in a later run. A server that stores its answers by
//! this key, or by [`Query::key`] of each row, charges a retried request once.
//!
//! A server answers an invalid request with status 400 and a message as plain text
//! ([`ScoreRequest::queries`] gives the reason). To ask for a retry it answers with 429 or 503, and
//! with `Retry-After` in seconds if it names a wait.
//!
//! ```
//! use flops_multimodal::blackbox::{Info, Query, protocol::ScoreRequest};
//!
//! let info = Info::new(["cat", "dog"], [1, 2, 2])?.with_context(4, 1)?;
//! let queries = [Query::new(vec![0.0, 0.1, 0.2, 0.3]).with_context(vec![-1.5])];
//! let request = ScoreRequest::new(&queries);
//! assert_eq!(request.queries(&info)?, queries);
//! # Ok::<(), flops_multimodal::blackbox::BlackBoxError>(())
//! ```

use std::collections::HashMap;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};

use super::error::BlackBoxError;
use super::info::Info;
use super::query::{Query, address, le_bytes};

/// Name of the header that holds the key of a request.
pub const IDEMPOTENCY_KEY: &str = "Idempotency-Key";

/// A batch of queries on the wire.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScoreRequest {
    /// Images, each base64 of little-endian `f32`, `[channels, height, width]` flattened.
    pub images: Vec<String>,
    /// For each row, the position of its image in `images`. If it is absent, row i has image i.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_of: Option<Vec<usize>>,
    /// For each row its context, base64 of little-endian `f32`, `[tokens, dim]` flattened; empty
    /// for a row without one. It is absent if no row has a context.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub contexts: Option<Vec<String>>,
}

/// The scores of a batch on the wire.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScoreResponse {
    /// One row per query, one score per class.
    pub scores: Vec<Vec<f32>>,
}

/// The number of queries that a server has charged, on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CountResponse {
    /// Queries charged.
    pub queries: u64,
}

impl ScoreRequest {
    /// The request for these queries. An image that rows share is sent once.
    #[must_use]
    pub fn new(queries: &[Query]) -> Self {
        let (mut images, mut at) = (Vec::new(), HashMap::new());
        let image_of: Vec<usize> = queries
            .iter()
            .map(|query| {
                *at.entry(address(&query.image)).or_insert_with(|| {
                    images.push(encode(&query.image));
                    images.len() - 1
                })
            })
            .collect();
        let context = |query: &Query| query.context.as_deref().map(encode).unwrap_or_default();
        Self {
            image_of: (images.len() < queries.len()).then_some(image_of),
            images,
            contexts: queries
                .iter()
                .any(|query| query.context.is_some())
                .then(|| queries.iter().map(context).collect()),
        }
    }

    /// Number of queries in the request.
    pub fn rows(&self) -> usize {
        self.image_of.as_ref().map_or(self.images.len(), Vec::len)
    }

    /// The queries of the request, checked against `info`.
    ///
    /// # Errors
    /// If a vector is not base64 of `f32`, a length does not match another or `info`, or a value
    /// lies outside its range.
    pub fn queries(&self, info: &Info) -> Result<Vec<Query>, BlackBoxError> {
        let wire = |what: String, why: String| BlackBoxError::Wire { what, why };
        let rows = self.rows();
        if let Some(contexts) = self.contexts.as_ref().filter(|contexts| contexts.len() != rows) {
            let why = format!("{} entries for {rows} rows; give one per row, empty if it has none", contexts.len());
            return Err(wire("contexts".into(), why));
        }
        let vector = |what: &str, index: usize, text: &str| {
            let values = decode(text).map_err(|why| wire(format!("{what}[{index}]"), why))?;
            Ok::<Arc<[f32]>, BlackBoxError>(values.into())
        };
        let images: Vec<_> = self
            .images
            .iter()
            .enumerate()
            .map(|(index, text)| vector("images", index, text))
            .collect::<Result<_, _>>()?;
        let query = |row: usize| {
            let at = self.image_of.as_ref().map_or(row, |image_of| image_of[row]);
            let Some(image) = images.get(at).cloned() else {
                return Err(wire(format!("image_of[{row}]"), format!("{at} but there are {} images", images.len())));
            };
            let context = self.contexts.as_ref().map_or("", |contexts| &contexts[row]);
            let context = if context.is_empty() { None } else { Some(vector("contexts", row, context)?) };
            Ok(Query { image, context })
        };
        let queries: Vec<Query> = (0..rows).map(query).collect::<Result<_, _>>()?;
        info.check_queries(&queries)?;
        Ok(queries)
    }
}

/// Base64 of `values` as little-endian bytes.
pub fn encode(values: &[f32]) -> String {
    STANDARD.encode(le_bytes(values))
}

/// The values that [`encode`] turned into `text`.
///
/// # Errors
/// If `text` is not base64, or not a whole number of `f32`; the error is the reason as text.
pub fn decode(text: &str) -> Result<Vec<f32>, String> {
    let bytes = STANDARD.decode(text).map_err(|why| format!("not base64 ({why})"))?;
    let (values, rest) = bytes.as_chunks::<4>();
    if !rest.is_empty() {
        return Err(format!("{} bytes are not a whole number of f32", bytes.len()));
    }
    Ok(values.iter().map(|&value| f32::from_le_bytes(value)).collect())
}
