//! The traits of a black box and of the meter that counts its queries.

use std::sync::Arc;

use super::error::BlackBoxError;
use super::info::Info;
use super::query::Query;

/// A model that only answers queries.
///
/// Implement [`info`](Self::info) and [`scores`](Self::scores). Override
/// [`scores_metered`](Self::scores_metered) if one call sends several requests.
pub trait BlackBox: Send + Sync {
    /// What the black box takes and returns.
    fn info(&self) -> &Info;

    /// The scores of `queries`: one row per query in their order, one score per class, higher for
    /// the likelier class.
    ///
    /// # Errors
    /// If the black box does not answer, or its answer lacks a finite score for some class of some
    /// query.
    fn scores(&self, queries: &[Query]) -> Result<Vec<Vec<f32>>, BlackBoxError>;

    /// [`scores`](Self::scores), which reports each attempt before it is made and each answer once
    /// it has arrived.
    ///
    /// The default reports one attempt and one answer. An implementation that sends parts, or sends
    /// a part again, must report each of them to `meter`.
    ///
    /// # Errors
    /// Those of [`scores`](Self::scores), and those of `meter`, which are returned at once.
    fn scores_metered(&self, queries: &[Query], meter: &dyn Meter) -> Result<Vec<Vec<f32>>, BlackBoxError> {
        meter.attempt(queries.len())?;
        let scores = self.scores(queries)?;
        self.info().check_scores(queries.len(), &scores)?;
        meter.answered(0, &scores)?;
        Ok(scores)
    }
}

/// Counts the queries that a [`BlackBox`] sends, and keeps their answers.
pub trait Meter: Sync {
    /// Called before `rows` queries are sent, for every attempt.
    ///
    /// # Errors
    /// If they must not be sent. The black box then stops and returns this error.
    fn attempt(&self, rows: usize) -> Result<(), BlackBoxError>;

    /// Called if no byte of the last attempt can have reached the black box: its `rows` queries do
    /// not count.
    ///
    /// # Errors
    /// If this cannot be recorded.
    fn unsent(&self, rows: usize) -> Result<(), BlackBoxError>;

    /// Called with the checked scores of the queries from `first` on, as soon as they have arrived.
    ///
    /// # Errors
    /// If they cannot be stored.
    fn answered(&self, first: usize, scores: &[Vec<f32>]) -> Result<(), BlackBoxError>;
}

/// A [`Meter`] that counts nothing and keeps nothing.
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

macro_rules! impl_for_pointers {
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

impl_for_pointers!(&X, Box<X>, Arc<X>);
