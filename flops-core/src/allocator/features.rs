//! What an allocator knows of the examples of a batch.

use crate::error::Error;

/// Embeddings of a batch, row-major `[batch_size, dim]`.
#[derive(Clone, Copy, Debug)]
pub struct Embeddings<'a> {
    values: &'a [f32],
    dim: usize,
}

impl<'a> Embeddings<'a> {
    /// `values` is row-major `[batch_size, dim]`.
    ///
    /// # Errors
    /// If `dim` is zero or does not divide the number of values.
    pub fn new(values: &'a [f32], dim: usize) -> Result<Self, Error> {
        if dim == 0 || !values.len().is_multiple_of(dim) {
            let expected = values.len().checked_div(dim).unwrap_or(0) * dim;
            return Err(Error::Length { name: "embeddings", got: values.len(), expected });
        }
        Ok(Self { values, dim })
    }

    /// One embedding per example.
    pub fn rows(&self) -> impl ExactSizeIterator<Item = &'a [f32]> {
        self.values.chunks_exact(self.dim)
    }
}

/// The features that an allocator looks at beside losses and variances; none by default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// [`DatumFeatures::embeddings`].
    pub embeddings: bool,
    /// [`DatumFeatures::extra`].
    pub extra: bool,
}

/// What an allocator may look at, one entry per example of the batch.
#[derive(Clone, Copy, Debug, Default)]
pub struct DatumFeatures<'a> {
    /// Losses at the unperturbed parameters.
    pub losses: &'a [f64],
    /// Estimates of Tr Σ_j.
    pub variances: &'a [f64],
    /// Embeddings, if the model gives any and the allocator [needs](super::Allocator::needs) them.
    pub embeddings: Option<Embeddings<'a>>,
    /// The user's own features, for [`MeanModel::Features`](super::MeanModel::Features). Also only
    /// where they are needed.
    pub extra: Option<Embeddings<'a>>,
}

impl DatumFeatures<'_> {
    /// Checks that the batch is not empty and that every example has usable entries.
    ///
    /// # Errors
    /// - If the batch is empty or lengths differ.
    /// - If a loss, an embedding or a feature is not finite.
    /// - If a variance is negative or not finite.
    pub fn validate(&self) -> Result<(), Error> {
        let n = self.losses.len();
        if n == 0 {
            return Err(Error::EmptyBatch);
        }
        if let Some(index) = self.losses.iter().position(|l| !l.is_finite()) {
            let remedy = "check the example for NaN, or lower lr";
            return Err(Error::Value { name: "losses", index, value: self.losses[index], remedy });
        }
        validate_variances(self.variances, n)?;
        for (name, given) in [("embeddings", &self.embeddings), ("allocation features", &self.extra)] {
            let Some(given) = given else { continue };
            if given.rows().len() != n {
                return Err(Error::Length { name, got: given.rows().len(), expected: n });
            }
            if let Some(at) = given.values.iter().position(|v| !v.is_finite()) {
                let (index, value) = (at / given.dim, given.values[at] as f64);
                let remedy = "check the example for NaN, or allocate without them";
                return Err(Error::Value { name, index, value, remedy });
            }
        }
        Ok(())
    }
}

/// Checks that there are `expected` variances, finite and not negative.
pub(super) fn validate_variances(variances: &[f64], expected: usize) -> Result<(), Error> {
    if variances.len() != expected {
        return Err(Error::Length { name: "variances", got: variances.len(), expected });
    }
    match variances.iter().position(|v| !(v.is_finite() && *v >= 0.0)) {
        Some(index) => Err(Error::Value {
            name: "variances",
            index,
            value: variances[index],
            remedy: "estimates of Tr Σ must be finite and not negative",
        }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn embeddings_are_checked() {
        assert!(Embeddings::new(&[1.0; 7], 2).is_err());
        assert!(Embeddings::new(&[], 0).is_err());
        let check = |values: &[f32]| {
            let embeddings = Some(Embeddings::new(values, 2).unwrap());
            DatumFeatures { losses: &[1.0, 2.0], variances: &[1.0, 1.0], embeddings, ..Default::default() }.validate()
        };
        assert!(check(&[1.0; 4]).is_ok());
        assert_eq!(check(&[1.0; 6]), Err(Error::Length { name: "embeddings", got: 3, expected: 2 }));
        assert!(check(&[1.0, f32::NAN, 1.0, 1.0]).unwrap_err().to_string().contains("embeddings[0] = NaN"));
        assert!(check(&[1.0, 1.0, f32::NAN, 1.0]).unwrap_err().to_string().contains("embeddings[1] = NaN"));
    }
}
