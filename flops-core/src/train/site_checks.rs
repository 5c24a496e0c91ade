//! Which sets of trained parameters have passed the check of their sites.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};

use burn::module::ParamId;

use crate::error::Error;

/// The trained parameters of the last step whose sites were checked, shared by clones of a learner.
///
/// It belongs to the process: a resumed run, whose code may be another, is checked again. Nothing
/// that a step computes depends on it.
#[derive(Clone, Debug, Default)]
pub(super) struct SiteChecks(Arc<Mutex<Arc<HashSet<ParamId>>>>);

impl SiteChecks {
    /// Runs `check`, unless these trained parameters have passed it. Other workers wait for it.
    pub fn once(
        &self,
        trained: &Arc<HashSet<ParamId>>,
        check: impl FnOnce() -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut passed = self.0.lock().unwrap_or_else(|e| e.into_inner());
        if *passed != *trained {
            check()?;
            *passed = trained.clone();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_is_checked_until_it_passes_and_again_after_a_change() {
        let (checks, calls) = (SiteChecks::default(), std::cell::Cell::new(0));
        let set = |n: u64| Arc::new((0..n).map(ParamId::from).collect::<HashSet<_>>());
        let run = |n, result: Result<(), Error>| {
            checks.clone().once(&set(n), || {
                calls.set(calls.get() + 1);
                result
            })
        };
        assert_eq!(run(2, Err(Error::NothingTrained)), Err(Error::NothingTrained));
        assert_eq!((run(2, Ok(())), calls.get()), (Ok(()), 2));
        assert_eq!((run(2, Err(Error::NothingTrained)), calls.get()), (Ok(()), 2));
        assert_eq!((run(3, Ok(())), calls.get()), (Ok(()), 3));
        assert_eq!((run(2, Ok(())), calls.get()), (Ok(()), 4));
    }
}
