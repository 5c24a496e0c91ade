//! Black boxes: models that only answer queries. Images go in, scores come out; there are no
//! weights and no gradients.
//!
//! [`BlackBox`] is the trait. Its implementations are a closure ([`FromFn`]), a Burn model in this
//! process ([`InProcess`]) and an HTTP endpoint ([`HttpBlackBox`]). [`Metered`] wraps any of them.
//! It enforces a hard cap on the queries and keeps every answer in a journal, so that an
//! interrupted run resumes without paying twice. [`BlackBoxClient`] lets a model send rows of
//! tensors.
//!
//! Each implementation here checks its answers: one row per query, one score per class, all finite.
//! An answer that fails the check is an error, never a score. An estimator therefore sees either
//! the black box's own scores or an error.
//!
//! ```
//! use flops_multimodal::blackbox::{BlackBox, FromFn, Info, Metered, Query};
//!
//! let info = Info::new(["dark", "bright"], [1, 1, 2])?;
//! let black_box = FromFn::new(info, |queries: &[Query]| {
//!     Ok::<_, String>(queries.iter().map(|q| vec![1.0 - q.image[0], q.image[0]]).collect())
//! })?;
//! let metered = Metered::new(black_box, 2);
//! assert_eq!(metered.scores(&[Query::new(vec![0.25, 1.0])])?, [[0.75, 0.25]]);
//! assert_eq!((metered.spent(), metered.remaining()), (1, 1));
//! # Ok::<(), flops_multimodal::blackbox::BlackBoxError>(())
//! ```

mod client;
mod error;
mod http;
mod info;
mod interface;
mod journal;
mod local;
mod metered;
pub mod protocol;
mod query;
#[cfg(test)]
mod testing;

pub use client::BlackBoxClient;
pub use error::{BlackBoxError, JournalError};
pub use http::{HttpBlackBox, HttpConfig};
pub use info::Info;
pub use interface::{BlackBox, Meter};
pub use local::{FromFn, InProcess};
pub use metered::{Charge, Metered};
pub use query::{Key, Query};

#[cfg(test)]
mod tests;
