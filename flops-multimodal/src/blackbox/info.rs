//! What a black box takes and returns, and the checks of queries and scores against it.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::error::BlackBoxError;
use super::query::{Key, Query, address};

/// The most classes of a black box.
const MAX_CLASSES: usize = 1 << 18;
/// The most channels of an image.
const MAX_CHANNELS: usize = 1 << 12;
/// The most values of an image, 256 MiB in single precision.
const MAX_IMAGE: usize = 1 << 26;
/// The most values of a context, 64 MiB in single precision.
const MAX_CONTEXT: usize = 1 << 24;

/// What a black box takes and returns.
///
/// A server may send one, so its sizes are bounded: 262,144 classes, 4,096 channels, 2²⁶ values of
/// an image and 2²⁴ of a context. Larger ones are refused, before anything is allocated by them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Info {
    /// Names of the classes, in the order of the scores.
    pub classes: Vec<String>,
    /// Shape of an image: channels, height, width.
    pub image: [usize; 3],
    /// The largest number of tokens in a context, and their width; `None` if the black box takes no
    /// context.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context: Option<[usize; 2]>,
}

impl Info {
    /// A black box with these classes for images of shape `[channels, height, width]`. It takes no
    /// context.
    ///
    /// # Errors
    /// If there is no class, or a size is 0 or above its bound.
    pub fn new(classes: impl IntoIterator<Item = impl Into<String>>, image: [usize; 3]) -> Result<Self, BlackBoxError> {
        Self { classes: classes.into_iter().map(Into::into).collect(), image, context: None }.checked()
    }

    /// The same black box, which takes contexts of 1 to `tokens` tokens of width `dim`.
    ///
    /// # Errors
    /// If a size is 0 or above its bound.
    pub fn with_context(self, tokens: usize, dim: usize) -> Result<Self, BlackBoxError> {
        Self { context: Some([tokens, dim]), ..self }.checked()
    }

    /// Returns `self` if its sizes are valid.
    ///
    /// # Errors
    /// If there is no class, or a size is 0 or above its bound.
    pub fn checked(self) -> Result<Self, BlackBoxError> {
        let fail = |name, value, remedy| Err(BlackBoxError::Info { name, value, remedy });
        let within = |sizes: &[usize], most: usize| {
            let product = sizes.iter().try_fold(1usize, |product, &size| product.checked_mul(size));
            product.is_some_and(|values| (1..=most).contains(&values))
        };
        if !(1..=MAX_CLASSES).contains(&self.classes.len()) {
            return fail("classes", self.classes.len().to_string(), "there must be 1 to 262144");
        }
        if !within(&self.image, MAX_IMAGE) || self.image[0] > MAX_CHANNELS {
            let remedy = "give channels (1 to 4096), height and width, of at most 67108864 values together";
            return fail("image", format!("{:?}", self.image), remedy);
        }
        match self.context {
            Some(context) if !within(&context, MAX_CONTEXT) => {
                let remedy = "give the most tokens and their width, of at most 16777216 values together, or no context";
                fail("context", format!("{context:?}"), remedy)
            }
            _ => Ok(self),
        }
    }

    /// Number of values in an image.
    pub fn image_len(&self) -> usize {
        self.image.iter().product()
    }

    /// A key of the classes and sizes, the same on every platform.
    pub(crate) fn fingerprint(&self) -> Key {
        let mut hash = Sha256::new_with_prefix(b"flops box\0");
        let sizes = self.image.iter().chain(self.context.iter().flatten());
        hash.update([u8::from(self.context.is_some())]);
        sizes.for_each(|&size| hash.update((size as u64).to_le_bytes()));
        for class in &self.classes {
            hash.update((class.len() as u64).to_le_bytes());
            hash.update(class);
        }
        Key::from_hash(hash)
    }

    /// Checks queries before they are sent.
    ///
    /// # Errors
    /// If an image or a context has the wrong length, a pixel lies outside [0, 1], or a value of a
    /// context is not finite.
    pub fn check_queries(&self, queries: &[Query]) -> Result<(), BlackBoxError> {
        // rows often share an image: check each image once
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
            let remedy = "flatten an image of the shape that the black box's info gives";
            return Err(BlackBoxError::QueryLength { row, what: "image", got, expected, remedy });
        }
        match image.iter().position(|value| !(0.0..=1.0).contains(value)) {
            Some(index) => Err(BlackBoxError::QueryValue {
                row,
                what: "image",
                index,
                value: image[index],
                remedy: "give pixels in [0, 1] without normalisation; the black box normalises them itself",
            }),
            None => Ok(()),
        }
    }

    fn check_context(&self, row: usize, context: &[f32]) -> Result<(), BlackBoxError> {
        let fail = |expected, remedy| {
            Err(BlackBoxError::QueryLength { row, what: "context", got: context.len(), expected, remedy })
        };
        let Some([tokens, dim]) = self.context else {
            return fail("none".into(), "this black box takes no context; leave it out");
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
