//! The caches of frozen prefixes that a learner owns.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;

use burn::module::ParamId;

use crate::batch::{Batch, Rows};
use crate::probe::{Passes, PrefixCache, Stages};

/// Two caches of frozen prefixes: one for training, one for evaluation.
///
/// They are apart because both know examples by id, and the ids of the two data sets may be equal.
#[derive(Clone, Debug, Default)]
pub(super) struct PrefixCaches {
    /// Prefixes of training examples.
    pub training: Arc<PrefixCache>,
    /// Prefixes of evaluated examples.
    pub evaluation: Arc<PrefixCache>,
}

impl PrefixCaches {
    /// Empty caches for this many examples each.
    pub fn new(training: usize, evaluation: usize) -> Self {
        Self { training: Arc::new(PrefixCache::new(training)), evaluation: Arc::new(PrefixCache::new(evaluation)) }
    }

    /// The passes of at most `max_rows` rows of some examples of a training batch, from cached prefixes
    /// where there are any.
    pub fn passes<I: Rows, T>(
        &self,
        (batch, examples): (&Batch<I, T>, Range<usize>),
        trained: &Arc<HashSet<ParamId>>,
        max_rows: usize,
    ) -> Passes {
        let cached = self.training.get(&batch.ids[examples.clone()], &batch.input.row_shape(), trained);
        Passes::new(examples.len(), cached, max_rows)
    }

    /// Stores the prefixes that the clean passes of some leaves of a training batch left.
    ///
    /// A prefix ends in front of the first dropout, whose masks differ from step to step.
    ///
    /// Nothing is stored where `reaches_all` is false. A trained parameter that no call through the
    /// probe reaches may act in any stage, so no stage is frozen for certain. An evaluation does
    /// not know which parameters are trained, so its cache is told here.
    pub fn update<'s, I: Rows, T>(
        &self,
        batch: &Batch<I, T>,
        trained: &Arc<HashSet<ParamId>>,
        leaves: impl IntoIterator<Item = (Range<usize>, &'s Stages)>,
        reaches_all: bool,
    ) {
        // also where nothing is frozen or nothing is stored: what the caches hold will be stale
        let known = if reaches_all { trained.clone() } else { Arc::default() };
        self.training.reset_if_changed(known.clone());
        for (examples, stages) in leaves {
            self.training.insert(&batch.ids[examples], &batch.input.row_shape(), trained, &stages.lasting());
        }
        self.evaluation.reset_if_changed(known);
    }
}
