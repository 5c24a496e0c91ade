//! Linear algebra on the host for the allocators and the control variate, in f64 and in a fixed
//! order.

/// Replaces the lower triangle of a positive definite matrix, row-major `[n, n]`, by its Cholesky
/// factor L.
///
/// A squared pivot below `floor` is set to `floor`. Rounding may leave such a pivot.
pub(crate) fn cholesky(matrix: &mut [f64], n: usize, floor: f64) {
    for i in 0..n {
        let (above, rest) = matrix.split_at_mut(i * n);
        let row = &mut rest[..n];
        for j in 0..i {
            let other = &above[j * n..j * n + j + 1];
            row[j] = (row[j] - dot(&row[..j], &other[..j])) / other[j];
        }
        row[i] = (row[i] - dot(&row[..i], &row[..i])).max(floor).sqrt();
    }
}

/// Solves L·x = b in place, with L from [`cholesky`].
pub(crate) fn solve_lower(factor: &[f64], b: &mut [f64]) {
    let n = b.len();
    for i in 0..n {
        let row = &factor[i * n..i * n + i + 1];
        b[i] = (b[i] - dot(&row[..i], &b[..i])) / row[i];
    }
}

/// Solves L·Lᵀ·x = b in place, with L from [`cholesky`].
pub(crate) fn solve(factor: &[f64], b: &mut [f64]) {
    let n = b.len();
    solve_lower(factor, b);
    for i in (0..n).rev() {
        let sum: f64 = (i + 1..n).map(|k| factor[k * n + i] * b[k]).sum();
        b[i] = (b[i] - sum) / factor[i * n + i];
    }
}

/// Eigenvalues of a symmetric matrix, row-major `[n, n]`, from the largest on, and the eigenvectors
/// as rows in the same order; by cyclic Jacobi rotations.
pub(crate) fn eigen(mut matrix: Vec<f64>, n: usize) -> (Vec<f64>, Vec<f64>) {
    let mut vectors: Vec<f64> = (0..n * n).map(|i| f64::from(u8::from(i % (n + 1) == 0))).collect();
    let total: f64 = matrix.iter().map(|v| v * v).sum();
    for _ in 0..30 {
        let off: f64 = (0..n * n).filter(|i| i % (n + 1) != 0).map(|i| matrix[i] * matrix[i]).sum();
        if off <= 1e-24 * total {
            break;
        }
        for p in 0..n {
            for q in p + 1..n {
                let apq = matrix[p * n + q];
                if apq == 0.0 {
                    continue;
                }
                let theta = (matrix[q * n + q] - matrix[p * n + p]) / (2.0 * apq);
                let t = theta.signum() / (theta.abs() + (theta * theta + 1.0).sqrt());
                let t = if theta == 0.0 { 1.0 } else { t };
                let c = 1.0 / (t * t + 1.0).sqrt();
                let s = t * c;
                for k in 0..n {
                    let (a, b) = (matrix[k * n + p], matrix[k * n + q]);
                    (matrix[k * n + p], matrix[k * n + q]) = (c * a - s * b, s * a + c * b);
                }
                for k in 0..n {
                    let (a, b) = (matrix[p * n + k], matrix[q * n + k]);
                    (matrix[p * n + k], matrix[q * n + k]) = (c * a - s * b, s * a + c * b);
                    let (a, b) = (vectors[p * n + k], vectors[q * n + k]);
                    (vectors[p * n + k], vectors[q * n + k]) = (c * a - s * b, s * a + c * b);
                }
            }
        }
    }
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&a, &b| matrix[b * n + b].total_cmp(&matrix[a * n + a]));
    let values = order.iter().map(|&i| matrix[i * n + i]).collect();
    (values, order.iter().flat_map(|&i| vectors[i * n..(i + 1) * n].to_vec()).collect())
}

/// Makes `columns` of `n` values each, one after the other, orthonormal (modified Gram and Schmidt).
///
/// They must be linearly independent. Signs are kept: random normal columns end uniformly
/// distributed.
pub(crate) fn orthonormalise(columns: &mut [f64], n: usize) {
    for k in 0..columns.len() / n {
        let (done, rest) = columns.split_at_mut(k * n);
        let column = &mut rest[..n];
        for other in done.chunks(n) {
            let along = dot(other, column);
            column.iter_mut().zip(other).for_each(|(c, o)| *c -= along * o);
        }
        let norm = dot(column, column).sqrt();
        column.iter_mut().for_each(|c| *c /= norm);
    }
}

/// Σ a_i b_i in eight partial sums, which the compiler can keep in vector registers.
pub(crate) fn dot(a: &[f64], b: &[f64]) -> f64 {
    let (a_chunks, b_chunks) = (a.chunks_exact(8), b.chunks_exact(8));
    let tail: f64 = a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(x, y)| x * y).sum();
    let mut sums = [0.0; 8];
    for (x, y) in a_chunks.zip(b_chunks) {
        for k in 0..8 {
            sums[k] += x[k] * y[k];
        }
    }
    tail + sums.iter().sum::<f64>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn solves_a_positive_definite_system() {
        let matrix = [4.0, 2.0, 0.4, 2.0, 5.0, 1.0, 0.4, 1.0, 3.0];
        let x = [1.0, -2.0, 0.5];
        let mut b: Vec<f64> = matrix.chunks(3).map(|row| dot(row, &x)).collect();
        let mut factor = matrix;
        cholesky(&mut factor, 3, 1e-12);
        solve(&factor, &mut b);
        assert!(b.iter().zip(x).all(|(got, x)| (got - x).abs() < 1e-12), "{b:?}");
    }

    /// A = Σ λ_k v_k v_kᵀ, v_k orthonormal, λ falling.
    #[test]
    fn eigenvectors_rebuild_their_matrix() {
        for n in [1, 2, 5, 20] {
            let entry = |i: usize, j: usize| ((i * j + 1) as f64).sin() + ((i + j) as f64).cos();
            let matrix: Vec<f64> = (0..n * n).map(|k| entry(k / n, k % n)).collect();
            let (values, vectors) = eigen(matrix.clone(), n);
            assert!(values.is_sorted_by(|a, b| a >= b), "{values:?}");
            for i in 0..n {
                for j in 0..n {
                    let (a, b) = (&vectors[i * n..(i + 1) * n], &vectors[j * n..(j + 1) * n]);
                    assert!((dot(a, b) - f64::from(u8::from(i == j))).abs() < 1e-9, "n = {n}, {i}, {j}");
                    let sum: f64 = (0..n).map(|k| values[k] * vectors[k * n + i] * vectors[k * n + j]).sum();
                    assert!((sum - matrix[i * n + j]).abs() < 1e-9, "n = {n}, {i}, {j}");
                }
            }
        }
    }
}
