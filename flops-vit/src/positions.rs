//! Interpolation of positional embeddings.

/// Interpolates positional embeddings from `from` × `from` to `to` × `to` patches.
///
/// Embeddings of the first `prefix` tokens stay. The result is that of timm's
/// `resample_abs_pos_embed`: `torch.nn.functional.interpolate(mode="bicubic", antialias=True)`, the
/// bicubic with a = −1/2 whose support widens where the grid shrinks.
///
/// # Shapes
/// - values: `[prefix + from², d]`
/// - returns: `[prefix + to², d]`
pub(crate) fn resampled(values: &[f32], prefix: usize, d: usize, from: usize, to: usize) -> Vec<f32> {
    let (kept, grid) = values.split_at(prefix * d);
    let weights = weights(from, to);
    // rows first, then columns: [from, from, d] → [from, to, d] → [to, to, d]
    let mut wide = vec![0.0; from * to * d];
    for y in 0..from {
        for (x, (first, row)) in weights.iter().enumerate() {
            add(&mut wide[(y * to + x) * d..][..d], row, |k| &grid[(y * from + first + k) * d..][..d]);
        }
    }
    let mut all = vec![0.0; to * to * d];
    for (y, (first, row)) in weights.iter().enumerate() {
        for x in 0..to {
            add(&mut all[(y * to + x) * d..][..d], row, |k| &wide[((first + k) * to + x) * d..][..d]);
        }
    }
    [kept, &all].concat()
}

/// Adds Σ_k weight_k · values(k).
fn add<'a>(out: &mut [f32], weights: &[f32], values: impl Fn(usize) -> &'a [f32]) {
    for (k, weight) in weights.iter().enumerate() {
        out.iter_mut().zip(values(k)).for_each(|(o, v)| *o += weight * v);
    }
}

/// Returns for each of `to` points the first source point of its support and the weights from
/// there.
///
/// The weights of a point sum to 1.
fn weights(from: usize, to: usize) -> Vec<(usize, Vec<f32>)> {
    let scale = from as f64 / to as f64;
    let stretch = scale.max(1.0);
    (0..to)
        .map(|place| {
            let centre = (place as f64 + 0.5) * scale;
            let first = (centre - 2.0 * stretch + 0.5).max(0.0) as usize;
            let end = ((centre + 2.0 * stretch + 0.5) as usize).min(from);
            let raw: Vec<f64> = (first..end).map(|k| bicubic((k as f64 + 0.5 - centre) / stretch)).collect();
            let sum: f64 = raw.iter().sum();
            (first, raw.iter().map(|w| (w / sum) as f32).collect())
        })
        .collect()
}

/// Keys' cubic convolution kernel with a = −1/2.
fn bicubic(x: f64) -> f64 {
    const A: f64 = -0.5;
    let x = x.abs();
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn same_grid_and_constant_embeddings_are_unchanged() {
        let values: Vec<f32> = (0..(1 + 9) * 2).map(|v| v as f32).collect();
        assert_eq!(resampled(&values, 1, 2, 3, 3), values);
        for to in [1, 2, 5, 14] {
            let out = resampled(&[7.0; 9], 0, 1, 3, to);
            assert!(out.len() == to * to && out.iter().all(|v| (v - 7.0).abs() < 1e-5), "{to}: {out:?}");
        }
    }

    #[test]
    fn prefix_stays_and_rows_are_not_swapped_with_columns() {
        // a ramp along x, equal in every row; the result is one too
        let values: Vec<f32> = [100.0, 200.0].into_iter().chain((0..16).map(|i| (i % 4) as f32)).collect();
        let out = resampled(&values, 2, 1, 4, 8);
        assert_eq!(out[..2], [100.0, 200.0]);
        let grid = &out[2..];
        assert!((0..64).all(|i| (grid[i] - grid[i % 8]).abs() < 1e-5), "{grid:?}");
        assert!(grid[..8].windows(2).all(|w| w[0] < w[1]));
    }
}
