//! The JSON that a black box speaks over HTTP, for the client here and for servers.
//!
//! | request | answer |
//! |---|---|
//! | `GET /v1/info` | [`Info`] |
//! | `POST /v1/scores` with a [`ScoreRequest`] | [`ScoreResponse`] |
//! | `GET /v1/count` | [`CountResponse`], for servers that count |
//!
//! Vectors travel as base64 of little-endian `f32`, which keeps every bit. Each `POST` has an [`IDEMPOTENCY_KEY`] header with 32
//! hexadecimal digits that depend on the rows alone: the same for every retry, and for the same rows in a later run. A server that
//! keeps its answers under it, or under [`Query::key`] of each row, charges once for what is asked again after a broken connection.
//!
//! A server answers 400 with a message as plain text to a request that it cannot take ([`ScoreRequest::queries`] says why), and
//! 429 or 503, with `Retry-After` in seconds where it likes, to one that should come again.
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

use super::{BlackBoxError, Info, Query, address};

/// Name of the header with the key of a request.
pub const IDEMPOTENCY_KEY: &str = "Idempotency-Key";

/// A batch of queries on the wire.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScoreRequest {
    /// Images, each base64 of little-endian `f32`, `[channels, height, width]` flattened.
    pub images: Vec<String>,
    /// For each row, the position of its image in `images`. Where it is left out, each row has the image at its own position.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_of: Option<Vec<usize>>,
    /// For each row its context, base64 of little-endian `f32`, `[tokens, dim]` flattened; empty for a row without one. Left out
    /// where no row has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub contexts: Option<Vec<String>>,
}

/// The scores of a batch on the wire.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScoreResponse {
    /// One row per query, one score per class.
    pub scores: Vec<Vec<f32>>,
}

/// How many queries a server has answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CountResponse {
    /// Queries charged for.
    pub queries: u64,
}

impl ScoreRequest {
    /// The request for these queries. An image that rows share is sent once.
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

    /// Queries in the request.
    pub fn rows(&self) -> usize {
        self.image_of.as_ref().map_or(self.images.len(), Vec::len)
    }

    /// The queries of the request, checked against what the box takes.
    ///
    /// # Errors
    /// When a vector is no base64 of `f32`, lengths do not fit each other or `info`, or a value lies outside its range.
    pub fn queries(&self, info: &Info) -> Result<Vec<Query>, BlackBoxError> {
        let wire = |what: String, why: String| BlackBoxError::Wire { what, why };
        let rows = self.rows();
        if let Some(contexts) = self.contexts.as_ref().filter(|contexts| contexts.len() != rows) {
            let why = format!("{} entries for {rows} rows; give one per row, empty where it has none", contexts.len());
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
                return Err(wire(format!("image_of[{row}]"), format!("{at} where there are {} images", images.len())));
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
    STANDARD.encode(bytes(values))
}

/// What [`encode`] was given.
///
/// # Errors
/// When `text` is no base64, or its length no multiple of 4 bytes, with the reason as text.
pub fn decode(text: &str) -> Result<Vec<f32>, String> {
    let bytes = STANDARD.decode(text).map_err(|why| format!("no base64 ({why})"))?;
    let (values, rest) = bytes.as_chunks::<4>();
    if !rest.is_empty() {
        return Err(format!("{} bytes are no whole number of f32", bytes.len()));
    }
    Ok(values.iter().map(|&value| f32::from_le_bytes(value)).collect())
}

/// `values` as little-endian bytes.
pub(crate) fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}
