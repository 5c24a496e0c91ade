//! Queries, and the keys that identify them on every platform and in every run.

use std::collections::HashMap;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::error::BlackBoxError;

/// One row of a request: one query of the budget.
#[derive(Clone, Debug, PartialEq)]
pub struct Query {
    /// Pixels in [0, 1], `[channels, height, width]` flattened. Rows that share the allocation are
    /// hashed, checked and sent once.
    pub image: Arc<[f32]>,
    /// A soft prompt, `[tokens, dim]` flattened.
    pub context: Option<Arc<[f32]>>,
}

impl Query {
    /// A query of this image, without a context.
    #[must_use]
    pub fn new(image: impl Into<Arc<[f32]>>) -> Self {
        Self { image: image.into(), context: None }
    }

    /// The same image with this context.
    #[must_use]
    pub fn with_context(self, context: impl Into<Arc<[f32]>>) -> Self {
        Self { context: Some(context.into()), ..self }
    }

    /// The key of the query: the same bits have the same key on every platform and in every run.
    ///
    /// A server that charges by key charges each row once, however the rows are split into
    /// requests.
    pub fn key(&self) -> Key {
        query_keys(std::slice::from_ref(self))[0]
    }
}

/// The first 128 bits of SHA-256, which identify a query, a request or a black box.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key(pub(crate) [u8; 16]);

impl Key {
    /// The first 128 bits of a hash.
    pub(crate) fn from_hash(hash: Sha256) -> Self {
        let mut key = [0; 16];
        key.copy_from_slice(&hash.finalize()[..16]);
        Self(key)
    }

    /// The key of a request for these rows, in this order.
    pub(crate) fn of_request(rows: &[Key]) -> Self {
        let mut hash = Sha256::new_with_prefix(b"flops request\0");
        rows.iter().for_each(|row| hash.update(row.0));
        Self::from_hash(hash)
    }
}

/// Writes 32 hexadecimal digits.
impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Reads what [`Display`](fmt::Display) writes.
impl FromStr for Key {
    type Err = BlackBoxError;

    fn from_str(text: &str) -> Result<Self, BlackBoxError> {
        let digits = text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        let key = digits.then(|| u128::from_str_radix(text, 16).ok()).flatten();
        let wrong = || BlackBoxError::Wire { what: "key".into(), why: "give 32 hexadecimal digits".into() };
        key.map(|key| Self(key.to_be_bytes())).ok_or_else(wrong)
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The keys of queries. An image that rows share is hashed once.
pub(crate) fn query_keys(queries: &[Query]) -> Vec<Key> {
    let digest = |prefix: &[u8], values: &[f32]| {
        let mut hash = Sha256::new_with_prefix(prefix);
        hash.update(le_bytes(values));
        hash.finalize()
    };
    let mut images = HashMap::new();
    let key = |query: &Query| {
        let mut hash = Sha256::new_with_prefix(b"flops query\0");
        hash.update(images.entry(address(&query.image)).or_insert_with(|| digest(b"image\0", &query.image)));
        if let Some(context) = &query.context {
            hash.update(digest(b"context\0", context));
        }
        Key::from_hash(hash)
    };
    queries.iter().map(key).collect()
}

/// Address and length, which identify an allocation while it lives.
pub(crate) fn address(values: &Arc<[f32]>) -> (usize, usize) {
    (values.as_ptr() as usize, values.len())
}

/// `values` as little-endian bytes.
pub(crate) fn le_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}
