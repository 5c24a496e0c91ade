//! Noise that is confined to a few directions of a site.
//!
//! Guided evolution strategies (Maheswaranathan et al. 2019, arXiv 1806.10230) search where
//! gradients are expected to lie. With an orthonormal basis u_1 … u_k and independent z, ε = Σ z_i
//! u_i has E[(gᵀε)ε] = Σ (u_iᵀg)u_i: the part of g in the span, with the noise of k coordinates.

use std::sync::Arc;

use crate::linalg::eigen;
use crate::ops;

/// Squared length, against the longest, below which a direction is left out.
const LEAST: f64 = 1e-6;

/// An orthonormal basis of the directions that noise is confined to; clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Span {
    /// `[dim, len]`.
    basis: Arc<Vec<f32>>,
    len: usize,
}

impl Span {
    /// The span of some rows; `None` where they are all 0.
    ///
    /// # Shapes
    /// - rows: `[any, len]`
    pub fn of(rows: &[f32], len: usize) -> Option<Self> {
        let n = rows.len().checked_div(len)?;
        let row = |i: usize| &rows[i * len..(i + 1) * len];
        let mut gram = vec![0.0; n * n];
        for i in 0..n {
            for j in 0..=i {
                gram[i * n + j] = ops::dot(row(i), row(j));
                gram[j * n + i] = gram[i * n + j];
            }
        }
        let (values, vectors) = eigen(gram, n);
        let floor = (LEAST * values.first().copied().unwrap_or(0.0)).max(f64::MIN_POSITIVE);
        let mut basis = vec![];
        for (value, vector) in values.iter().zip(vectors.chunks_exact(n.max(1))).take_while(|(v, _)| **v > floor) {
            let mut direction = vec![0f64; len];
            for (i, v) in vector.iter().enumerate() {
                direction.iter_mut().zip(row(i)).for_each(|(d, r)| *d += v * f64::from(*r));
            }
            basis.extend(direction.iter().map(|d| (d / value.sqrt()) as f32));
        }
        (!basis.is_empty()).then(|| Self { basis: Arc::new(basis), len })
    }

    /// Its dimension.
    pub fn dim(&self) -> usize {
        self.basis.len() / self.len
    }

    /// Coordinates of a row.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Σ z_i u_i.
    pub fn combine(&self, z: &[f32], out: &mut [f32]) {
        out.fill(0.0);
        for (z, u) in z.iter().zip(self.basis.chunks_exact(self.len)) {
            out.iter_mut().zip(u).for_each(|(o, u)| *o += z * u);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three rows of rank two: the basis is orthonormal, and holds each row.
    #[test]
    fn a_basis_is_orthonormal_and_holds_the_rows() {
        let rows = [1.0, 2.0, 0.0, -1.0, 0.5, 0.0, 3.0, 1.0, 1.5, 2.0, 3.0, 0.0];
        let span = Span::of(&rows, 4).unwrap();
        assert_eq!((span.dim(), span.len()), (2, 4));
        for (i, u) in span.basis.chunks(4).enumerate() {
            for (j, v) in span.basis.chunks(4).enumerate() {
                assert!((ops::dot(u, v) - f64::from(u8::from(i == j))).abs() < 1e-6);
            }
        }
        for row in rows.chunks(4) {
            let inside: f64 = span.basis.chunks(4).map(|u| ops::dot(u, row).powi(2)).sum();
            assert!((inside - ops::dot(row, row)).abs() < 1e-5, "{row:?}");
        }
        assert!(Span::of(&[0.0; 8], 4).is_none() && Span::of(&[], 4).is_none() && Span::of(&[], 0).is_none());
    }

    /// Over all signs z, the mean of (gᵀε)ε is the part of g in the span.
    #[test]
    fn the_mean_is_the_projection() {
        let span = Span::of(&[1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0], 4).unwrap();
        let g = [3.0, -2.0, 5.0, 1.0];
        let mut mean = [0f64; 4];
        for signs in 0..4u32 {
            let z = [0, 1].map(|i| 1.0 - 2.0 * (signs >> i & 1) as f32);
            let mut noise = [0.0; 4];
            span.combine(&z, &mut noise);
            let c = ops::dot(&g, &noise);
            mean.iter_mut().zip(noise).for_each(|(m, e)| *m += c * f64::from(e) / 4.0);
        }
        let expected = [2.0, -2.0, 0.0, 2.0];
        assert!(mean.iter().zip(expected).all(|(m, e)| (m - e).abs() < 1e-5), "{mean:?}");
    }
}
