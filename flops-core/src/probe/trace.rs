//! The row contract: what a tracing pass checks of the tensors that it sees.
//!
//! Every tensor has one row per example on its first axis, or a single row where it does not depend
//! on the input. A query then has one row per example or one per query.

use std::sync::OnceLock;

use burn::module::ParamId;

/// A tensor that breaks the row contract.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum RowFault {
    /// The output of a layer, named by its first parameter.
    Site { parameter: Option<ParamId>, shape: Vec<usize> },
    /// A bare parameter whose first axis is not 1.
    Param { parameter: ParamId, shape: Vec<usize> },
    /// A tensor handed to a method of the probe.
    Joined { method: &'static str, shape: Vec<usize> },
    /// The output of a stage, or a part of it, with this many rows.
    Stage { got: usize },
}

/// Looks at the tensors of a pass and keeps the first that breaks the contract.
pub(super) struct RowCheck {
    /// Rows of the pass.
    rows: usize,
    /// Whether sites and joined tensors are looked at, and not the outputs of stages alone.
    sites: bool,
    fault: OnceLock<RowFault>,
}

impl RowCheck {
    pub fn new(rows: usize, sites: bool) -> Self {
        Self { rows, sites, fault: OnceLock::new() }
    }

    fn note(&self, fault: RowFault) {
        let _ = self.fault.set(fault); // only the first is kept
    }

    fn fits(&self, shape: &[usize]) -> bool {
        !self.sites || shape.first().is_some_and(|&rows| rows == self.rows || rows == 1)
    }

    pub fn site(&self, parameters: &[ParamId], shape: &[usize]) {
        if !self.fits(shape) {
            self.note(RowFault::Site { parameter: parameters.first().copied(), shape: shape.to_vec() });
        }
    }

    pub fn param(&self, parameter: ParamId, shape: &[usize]) {
        if self.sites && shape.first() != Some(&1) {
            self.note(RowFault::Param { parameter, shape: shape.to_vec() });
        }
    }

    /// Whether the argument of a method fits.
    pub fn joined(&self, method: &'static str, shape: &[usize]) -> bool {
        let fits = self.fits(shape);
        if !fits {
            self.note(RowFault::Joined { method, shape: shape.to_vec() });
        }
        fits
    }

    /// Whether the output of a stage has a row for each of the pass.
    pub fn stage(&self, found: Result<(), usize>) -> bool {
        if let Err(got) = found {
            self.note(RowFault::Stage { got });
        }
        found.is_ok()
    }

    pub fn fault(&self) -> Option<RowFault> {
        self.fault.get().cloned()
    }

    pub fn rows(&self) -> usize {
        self.rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_fault_is_kept_and_one_row_fits_all() {
        let check = RowCheck::new(4, true);
        let id = ParamId::new();
        check.site(&[id], &[4, 2]);
        check.site(&[id], &[1, 2]);
        check.param(id, &[1, 5, 2]);
        assert!(check.joined("add", &[4]) && !RowCheck::new(4, true).joined("add", &[3]));
        assert!(check.stage(Ok(())));
        assert_eq!(check.fault(), None);
        check.site(&[id], &[8, 2]);
        check.param(id, &[4, 2]);
        assert_eq!(check.fault(), Some(RowFault::Site { parameter: Some(id), shape: vec![8, 2] }));
        let check = RowCheck::new(4, true);
        check.param(id, &[4, 2]); // as many tokens as rows, by accident
        assert_eq!(check.fault(), Some(RowFault::Param { parameter: id, shape: vec![4, 2] }));
    }

    /// Noise on the parameters themselves does not care for the rows of a layer's output.
    #[test]
    fn weight_noise_looks_at_stages_alone() {
        let check = RowCheck::new(4, false);
        check.site(&[ParamId::new()], &[8, 2]);
        assert!(check.joined("cat", &[3, 2]));
        check.param(ParamId::new(), &[5, 2]);
        assert_eq!(check.fault(), None);
        assert!(!check.stage(Err(8)));
        assert_eq!(check.fault(), Some(RowFault::Stage { got: 8 }));
    }
}
