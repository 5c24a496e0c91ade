//! What the queries of a step showed.

/// Second moments that the allocated queries of a step measured, one entry per example.
///
/// Queries that decided the allocation (pilots) are not among them. A second moment is therefore
/// independent of the number of queries that it comes from, and unbiased.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Shown<'a> {
    /// m_j, an unbiased estimate of Tr Σ_j + ‖∇ℓ_j‖²; NaN where no query gave a finite loss.
    pub second_moments: &'a [f64],
}

impl<'a> Shown<'a> {
    /// `second_moments` has one entry per example, NaN where nothing was measured.
    #[must_use]
    pub fn new(second_moments: &'a [f64]) -> Self {
        Self { second_moments }
    }

    /// The second moments over the largest of them, with 0 where nothing was measured.
    ///
    /// An example without a measurement then has no part in the objective. `None` if nothing
    /// positive was measured.
    pub(super) fn relative(&self) -> Option<Vec<f64>> {
        let usable = |m: f64| if m.is_finite() && m > 0.0 { m } else { 0.0 };
        let top = self.second_moments.iter().fold(0.0, |top: f64, &m| top.max(usable(m)));
        (top > 0.0).then(|| self.second_moments.iter().map(|&m| usable(m) / top).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_measured_has_no_part() {
        let relative = |m: &[f64]| Shown::new(m).relative();
        assert_eq!(relative(&[2.0, f64::NAN, 4.0, f64::INFINITY, -1.0]), Some(vec![0.5, 0.0, 1.0, 0.0, 0.0]));
        assert_eq!(relative(&[f64::NAN, 0.0]), None);
        assert_eq!(relative(&[]), None);
    }
}
