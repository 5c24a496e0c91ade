//! Models that can only be asked: a batch of queries goes in, scores come out. No weights, no gradient.
//!
//! [`BlackBox`] is the seam. Behind it stand a closure ([`FromFn`]), a Burn model in this process ([`InProcess`]), or an HTTP
//! endpoint ([`HttpBlackBox`]). [`Metered`] around any of them holds a hard cap on the queries, and keeps every answer in a
//! journal, so that an interrupted run resumes without asking again.
//!
//! Every path checks what comes back: one row per query, one score per class, all finite. What fails the check is an error, never
//! a score. An estimator downstream therefore sees either the numbers of the box or an error.
//!
//! ```
//! use flops_multimodal::blackbox::{BlackBox, FromFn, Info, Metered, Query};
//!
//! let info = Info::new(["dark", "bright"], [1, 1, 2])?;
//! let box_ = FromFn::new(info, |queries: &[Query]| {
//!     Ok::<_, String>(queries.iter().map(|q| vec![1.0 - q.image[0], q.image[0]]).collect())
//! })?;
//! let metered = Metered::new(box_, 2);
//! assert_eq!(metered.scores(&[Query::new(vec![0.25, 1.0])])?, [[0.75, 0.25]]);
//! assert_eq!((metered.spent(), metered.remaining()), (1, 1));
//! # Ok::<(), flops_multimodal::blackbox::BlackBoxError>(())
//! ```

mod error;
mod http;
mod journal;
mod local;
mod metered;
pub mod protocol;
#[cfg(test)]
mod testing;

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

pub use error::{BlackBoxError, JournalError};
pub use http::{HttpBlackBox, HttpConfig};
pub use local::{FromFn, InProcess};
pub use metered::{Charge, Metered};

/// What a black box takes and gives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Info {
    /// Names of the classes, in the order of the scores.
    pub classes: Vec<String>,
    /// Shape of an image: channels, height, width.
    pub image: [usize; 3],
    /// The most tokens of a context, and their width; none where the box takes no context.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context: Option<[usize; 2]>,
}

impl Info {
    /// A box of these classes for images of shape `[channels, height, width]`, which takes no context.
    ///
    /// # Errors
    /// When there is no class, or a size is 0 or too large to count.
    pub fn new(classes: impl IntoIterator<Item = impl Into<String>>, image: [usize; 3]) -> Result<Self, BlackBoxError> {
        Self { classes: classes.into_iter().map(Into::into).collect(), image, context: None }.checked()
    }

    /// The same box, which takes contexts of 1 to `tokens` tokens of width `dim`.
    ///
    /// # Errors
    /// When a size is 0 or too large to count.
    pub fn with_context(self, tokens: usize, dim: usize) -> Result<Self, BlackBoxError> {
        Self { context: Some([tokens, dim]), ..self }.checked()
    }

    /// The box itself, if its sizes make sense.
    ///
    /// # Errors
    /// When there is no class, or a size is 0 or too large to count.
    pub fn checked(self) -> Result<Self, BlackBoxError> {
        let fail = |name, value, remedy| Err(BlackBoxError::Info { name, value, remedy });
        // the byte length in base64 must be countable
        let countable = |sizes: &[usize]| {
            let product = sizes.iter().try_fold(1usize, |product, &size| product.checked_mul(size));
            product.is_some_and(|values| values > 0 && values <= usize::MAX / 64)
        };
        if self.classes.is_empty() || u32::try_from(self.classes.len()).is_err() {
            return fail("classes", self.classes.len().to_string(), "there must be at least 1");
        }
        if !countable(&self.image) {
            return fail("image", format!("{:?}", self.image), "give the number of channels, the height and the width");
        }
        match self.context {
            Some(context) if !countable(&context) => {
                fail("context", format!("{context:?}"), "give the most tokens and their width, or no context at all")
            }
            _ => Ok(self),
        }
    }

    /// Values of an image.
    pub fn image_len(&self) -> usize {
        self.image.iter().product()
    }

    /// 128 bits that are the same for the same box on every platform.
    pub(crate) fn fingerprint(&self) -> Key {
        let mut hash = Sha256::new_with_prefix(b"flops box\0");
        let sizes = self.image.iter().chain(self.context.iter().flatten());
        hash.update([u8::from(self.context.is_some())]);
        sizes.for_each(|&size| hash.update((size as u64).to_le_bytes()));
        for class in &self.classes {
            hash.update((class.len() as u64).to_le_bytes());
            hash.update(class);
        }
        Key::of(hash)
    }

    /// Checks queries before they are sent.
    ///
    /// # Errors
    /// When an image or a context has the wrong length, a value of an image lies outside [0, 1], or a value of a context is not
    /// finite.
    pub fn check_queries(&self, queries: &[Query]) -> Result<(), BlackBoxError> {
        // rows often share an image: look at each once
        let mut seen = HashMap::new();
        for (row, query) in queries.iter().enumerate() {
            if seen.insert(address(&query.image), ()).is_none() {
                self.check_image(row, &query.image)?;
            }
            if let Some(context) = &query.context {
                self.check_context(row, context)?;
            }
        }
        Ok(())
    }

    fn check_image(&self, row: usize, image: &[f32]) -> Result<(), BlackBoxError> {
        if image.len() != self.image_len() {
            let (got, expected) = (image.len(), self.image_len().to_string());
            let remedy = "flatten an image of the shape that the box's info gives";
            return Err(BlackBoxError::QueryLength { row, what: "image", got, expected, remedy });
        }
        match image.iter().position(|value| !(0.0..=1.0).contains(value)) {
            Some(index) => Err(BlackBoxError::QueryValue {
                row,
                what: "image",
                index,
                value: image[index],
                remedy: "give pixels in [0, 1], without normalisation: that is the box's own affair",
            }),
            None => Ok(()),
        }
    }

    fn check_context(&self, row: usize, context: &[f32]) -> Result<(), BlackBoxError> {
        let fail = |expected, remedy| {
            Err(BlackBoxError::QueryLength { row, what: "context", got: context.len(), expected, remedy })
        };
        let Some([tokens, dim]) = self.context else {
            return fail("none".into(), "this box takes no context; leave it out");
        };
        if context.is_empty() || !context.len().is_multiple_of(dim) || context.len() / dim > tokens {
            return fail(format!("{dim} × 1 to {tokens}"), "flatten whole tokens, or leave the context out");
        }
        match context.iter().position(|value| !value.is_finite()) {
            Some(index) => Err(BlackBoxError::QueryValue {
                row,
                what: "context",
                index,
                value: context[index],
                remedy: "the prompt has diverged; lower lr or sigma",
            }),
            None => Ok(()),
        }
    }

    /// Checks the scores of `rows` queries.
    ///
    /// # Errors
    /// Unless there is one row per query, with one finite score per class.
    pub fn check_scores(&self, rows: usize, scores: &[Vec<f32>]) -> Result<(), BlackBoxError> {
        if scores.len() != rows {
            return Err(BlackBoxError::Rows { got: scores.len(), expected: rows });
        }
        for (row, scores) in scores.iter().enumerate() {
            if scores.len() != self.classes.len() {
                return Err(BlackBoxError::Classes { row, got: scores.len(), expected: self.classes.len() });
            }
            if let Some(class) = scores.iter().position(|score| !score.is_finite()) {
                return Err(BlackBoxError::Score { row, class, value: scores[class] });
            }
        }
        Ok(())
    }
}

/// One row of a request. Each row asked is one query of the budget.
#[derive(Clone, Debug, PartialEq)]
pub struct Query {
    /// Pixels in [0, 1], `[channels, height, width]` flattened. Rows that share the allocation share the work on it.
    pub image: Arc<[f32]>,
    /// A soft prompt, `[tokens, dim]` flattened.
    pub context: Option<Arc<[f32]>>,
}

impl Query {
    /// A query of this image, without a context.
    pub fn new(image: impl Into<Arc<[f32]>>) -> Self {
        Self { image: image.into(), context: None }
    }

    /// The same image with this context.
    pub fn with_context(self, context: impl Into<Arc<[f32]>>) -> Self {
        Self { context: Some(context.into()), ..self }
    }

    /// The key of the query: the same for the same bits on every platform, in every run.
    ///
    /// A server that charges by key charges a row once, however requests are cut into batches.
    pub fn key(&self) -> Key {
        keys(std::slice::from_ref(self))[0]
    }
}

/// 128 bits of SHA-256 that stand for a query, a request or a box.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key(pub(crate) [u8; 16]);

impl Key {
    fn of(hash: Sha256) -> Self {
        let mut key = [0; 16];
        key.copy_from_slice(&hash.finalize()[..16]);
        Self(key)
    }

    /// The key of a request for these rows, in this order.
    pub(crate) fn of_rows(rows: &[Key]) -> Self {
        let mut hash = Sha256::new_with_prefix(b"flops request\0");
        rows.iter().for_each(|row| hash.update(row.0));
        Self::of(hash)
    }
}

/// 32 hexadecimal digits.
impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The keys of queries. An image that rows share is hashed once.
pub(crate) fn keys(queries: &[Query]) -> Vec<Key> {
    let digest = |what: &[u8], values: &[f32]| {
        let mut hash = Sha256::new_with_prefix(what);
        hash.update(protocol::bytes(values));
        hash.finalize()
    };
    let mut images = HashMap::new();
    let key = |query: &Query| {
        let mut hash = Sha256::new_with_prefix(b"flops query\0");
        hash.update(images.entry(address(&query.image)).or_insert_with(|| digest(b"image\0", &query.image)));
        if let Some(context) = &query.context {
            hash.update(digest(b"context\0", context));
        }
        Key::of(hash)
    };
    queries.iter().map(key).collect()
}

/// What tells allocations apart while they live.
pub(crate) fn address(values: &Arc<[f32]>) -> (usize, usize) {
    (values.as_ptr() as usize, values.len())
}

/// A model that can only be asked.
///
/// Implement [`info`](Self::info) and [`scores`](Self::scores). The rest is for boxes that ask in several parts.
pub trait BlackBox: Send + Sync {
    /// What the box takes and gives.
    fn info(&self) -> &Info;

    /// The scores of `queries`: one row per query in their order, one score per class, higher for the likelier class.
    ///
    /// # Errors
    /// When the box cannot be asked, or its answer is no finite score for every class of every query.
    fn scores(&self, queries: &[Query]) -> Result<Vec<Vec<f32>>, BlackBoxError>;

    /// [`scores`](Self::scores), with a report of every attempt before it is made and of every answer once it is there.
    ///
    /// A box that asks in parts, or more than once, must report each part to `meter`; one that does not has nothing to do here.
    ///
    /// # Errors
    /// Those of [`scores`](Self::scores), and those of `meter`, which are handed on at once.
    fn scores_metered(&self, queries: &[Query], meter: &dyn Meter) -> Result<Vec<Vec<f32>>, BlackBoxError> {
        meter.attempt(queries.len())?;
        let scores = self.scores(queries)?;
        self.info().check_scores(queries.len(), &scores)?;
        meter.answered(0, &scores)?;
        Ok(scores)
    }
}

/// Who counts what a [`BlackBox`] asks, and keeps what it is told.
pub trait Meter: Sync {
    /// Called before `rows` queries are sent, for every attempt.
    ///
    /// # Errors
    /// When they must not be sent. The box then stops, and hands the error on.
    fn attempt(&self, rows: usize) -> Result<(), BlackBoxError>;

    /// Called when of the last attempt not one byte can have reached the box: its `rows` queries count for nothing.
    ///
    /// # Errors
    /// When this cannot be written down.
    fn unsent(&self, rows: usize) -> Result<(), BlackBoxError>;

    /// Called with the checked scores of the queries from `first` on, as soon as they are there.
    ///
    /// # Errors
    /// When they cannot be kept.
    fn answered(&self, first: usize, scores: &[Vec<f32>]) -> Result<(), BlackBoxError>;
}

/// Counts nothing, keeps nothing.
pub(crate) struct Unmetered;

impl Meter for Unmetered {
    fn attempt(&self, _: usize) -> Result<(), BlackBoxError> {
        Ok(())
    }

    fn unsent(&self, _: usize) -> Result<(), BlackBoxError> {
        Ok(())
    }

    fn answered(&self, _: usize, _: &[Vec<f32>]) -> Result<(), BlackBoxError> {
        Ok(())
    }
}

macro_rules! behind {
    ($($pointer:ty),*) => {$(
        impl<X: BlackBox + ?Sized> BlackBox for $pointer {
            fn info(&self) -> &Info {
                (**self).info()
            }

            fn scores(&self, queries: &[Query]) -> Result<Vec<Vec<f32>>, BlackBoxError> {
                (**self).scores(queries)
            }

            fn scores_metered(&self, queries: &[Query], meter: &dyn Meter) -> Result<Vec<Vec<f32>>, BlackBoxError> {
                (**self).scores_metered(queries, meter)
            }
        }
    )*};
}

behind!(&X, Box<X>, Arc<X>);

#[cfg(test)]
mod tests;
