//! The error signals of a batch, and the few directions that they are seen along.

use std::sync::Arc;

use burn::prelude::*;
use serde::{Deserialize, Serialize};

use super::shared;
use crate::linalg::{dot, eigen};
use crate::ops;

/// Largest number of signals that gradients are predicted from.
pub(super) const MAX_SIGNALS: usize = 32;

/// Weight of the past in the principal directions, per step.
const KEEP: f64 = 0.95;

/// The principal directions of the error signals where there are more than 32 of them.
///
/// Row k of the sketch is √λ_k times direction k: sketchᵀ·sketch is the running sum of r rᵀ, up to
/// what the directions left out (Liberty 2013, arXiv 1206.0594, without its shrinking).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Basis {
    /// Number of signals of the model, C.
    pub full: usize,
    /// Orthonormal rows, `[k, C]`; clones share them.
    #[serde(with = "shared")]
    pub directions: Arc<Vec<f32>>,
    /// λ_k.
    weights: Vec<f64>,
}

impl Basis {
    /// The number of directions, k.
    pub fn len(&self) -> usize {
        self.weights.len()
    }

    /// The directions of `past` and of the signals of a batch together.
    ///
    /// The batch is taken in blocks, so that the cost grows with its size and not with its cube.
    ///
    /// # Shapes
    /// - signals: `[batch, full]`
    pub fn updated(past: Option<&Self>, signals: &[f64], full: usize) -> Self {
        let mut basis = past.filter(|past| past.full == full).cloned();
        for (i, block) in signals.chunks(MAX_SIGNALS * full).enumerate() {
            basis = Some(Self::joined(basis.as_ref(), if i == 0 { KEEP } else { 1.0 }, block, full));
        }
        basis.unwrap_or(Self { full, directions: Arc::default(), weights: vec![] })
    }

    /// The directions of `past`, times `keep`, and of a block of signals together.
    fn joined(past: Option<&Self>, keep: f64, signals: &[f64], full: usize) -> Self {
        let mut rows: Vec<Vec<f64>> = vec![];
        if let Some(past) = past {
            for (direction, weight) in past.directions.chunks_exact(full).zip(&past.weights) {
                let scale = (keep * weight).sqrt();
                rows.push(direction.iter().map(|&d| scale * f64::from(d)).collect());
            }
        }
        rows.extend(signals.chunks_exact(full).map(<[f64]>::to_vec));
        let n = rows.len();
        let mut gram = vec![0.0; n * n];
        for i in 0..n {
            for j in 0..=i {
                gram[i * n + j] = dot(&rows[i], &rows[j]);
                gram[j * n + i] = gram[i * n + j];
            }
        }
        let (values, vectors) = eigen(gram, n);
        let (mut directions, mut weights) = (Vec::<f32>::new(), vec![]);
        let floor = 1e-9 * values.first().copied().unwrap_or(0.0);
        for (value, vector) in values.iter().zip(vectors.chunks_exact(n.max(1))).take(MAX_SIGNALS) {
            if *value <= floor || *value <= f64::MIN_POSITIVE {
                break;
            }
            let mut direction = vec![0.0; full];
            for (row, v) in rows.iter().zip(vector) {
                direction.iter_mut().zip(row).for_each(|(d, r)| *d += v * r);
            }
            directions.extend(direction.iter().map(|d| (d / value.sqrt()) as f32));
            weights.push(*value);
        }
        Self { full, directions: Arc::new(directions), weights }
    }

    /// ⟨new direction k, old direction l⟩, `[k, l]`: what weights along the old become along the new.
    pub fn rotation(&self, old: &Self) -> Vec<f32> {
        self.directions.chunks_exact(self.full).flat_map(|new| old.along(new)).collect()
    }

    /// A row of values along the directions, `[k]`.
    pub fn along(&self, row: &[f32]) -> Vec<f32> {
        self.directions.chunks_exact(self.full).map(|direction| ops::dot(direction, row) as f32).collect()
    }

    /// The same on the device of `x`.
    ///
    /// # Shapes
    /// - x: `[rows, full]`
    /// - returns: `[rows, k]`
    pub fn project<B: Backend>(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        let device = x.device();
        let directions: Tensor<B, 2> = ops::from_host(self.directions.to_vec(), [self.len(), self.full], &device);
        x.cast(ops::accum_dtype::<B>()).matmul(directions.transpose())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::backend::Flex;

    /// Signals in a plane of 40 dimensions are found in it, whatever their number.
    #[test]
    fn signals_of_low_rank_lose_nothing() {
        let full = 40;
        let plane = |i: usize| (((i * 7) as f64).sin(), ((i * 3) as f64).cos());
        let batch = |step: usize| -> Vec<f64> {
            (0..50)
                .flat_map(|j| {
                    let (a, b) = (((step * 50 + j) as f64).sin(), ((step * 50 + 3 * j) as f64).cos());
                    (0..full).map(move |i| a * plane(i).0 + b * plane(i).1)
                })
                .collect()
        };
        let mut basis = None;
        for step in 0..3 {
            basis = Some(Basis::updated(basis.as_ref(), &batch(step), full));
        }
        let basis = basis.unwrap();
        assert_eq!(basis.len(), 2);
        let values: Vec<f32> = batch(9).iter().map(|&v| v as f32).collect();
        let x = Tensor::<Flex, 2>::from_data(TensorData::new(values.clone(), [50, full]), &Default::default());
        let projected = basis.project(x).powi_scalar(2).sum().into_scalar();
        let all: f32 = values.iter().map(|v| v * v).sum();
        assert!((projected / all - 1.0).abs() < 1e-5, "{projected} of {all}");
        let same = basis.rotation(&basis);
        for (i, value) in same.iter().enumerate() {
            assert!((value - if i % 3 == 0 { 1.0 } else { 0.0 }).abs() < 1e-5, "{same:?}");
        }
    }

    /// Of 60 orthogonal signals of different sizes the 32 largest are kept.
    #[test]
    fn the_largest_directions_are_kept() {
        let full = 60;
        let signals: Vec<f64> =
            (0..full * full).map(|i| if i % full == i / full { 1.0 + (i % full) as f64 } else { 0.0 }).collect();
        let basis = Basis::updated(None, &signals, full);
        assert_eq!(basis.len(), MAX_SIGNALS);
        for (k, direction) in basis.directions.chunks(full).enumerate() {
            assert!((direction[full - 1 - k].abs() - 1.0).abs() < 1e-5, "direction {k}");
        }
    }
}
