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
}
