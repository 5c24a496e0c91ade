//! The covariance of the Gaussian allocator: an RBF of cosine distances, exact or of low rank.
//!
//! C_ij = exp(−d_ij/2γ²) + jitter·[i = j]. The exact form is factorised, C = L Lᵀ. The low-rank one is the Nyström approximation from a
//! few data of the batch, the landmarks, with the diagonal put right: C ≈ F Fᵀ + D, where F Fᵀ = R W⁻¹ Rᵀ, R the RBF between data and
//! landmarks and W that among the landmarks, and D the diagonal matrix that makes C_ii exact. It is positive definite whatever the landmarks,
//! and C itself where they are all the data.

use super::Embeddings;
use crate::linalg::{cholesky, dot, solve};

/// Added to the diagonal: keeps the covariance positive definite when data repeat in a batch, and gives
/// every datum noise of its own, which the projection does not undo.
pub(super) const JITTER: f64 = 0.1;
/// Keeps W positive definite when landmarks repeat.
const LANDMARK_JITTER: f64 = 1e-6;

/// Cosine distances within a batch: all, or those to the landmarks.
pub(super) enum Distances {
    /// Row-major `[n, n]`, lower triangle.
    Exact { n: usize, all: Vec<f64> },
    /// To the landmarks `[n, rank]`, among the landmarks `[rank, rank]`.
    LowRank { n: usize, rank: usize, to: Vec<f64>, among: Vec<f64> },
}

impl Distances {
    /// Exact ones for at most `exact_up_to` data, otherwise those to `landmarks` data spread evenly over the batch.
    ///
    /// A zero embedding is at distance 1 from all others. Without embeddings all data are at distance 1 from each other: one landmark beside
    /// them, at distance 1 from all and from itself, is exact then.
    pub fn new(n: usize, embeddings: Option<&Embeddings<'_>>, exact_up_to: usize, landmarks: usize) -> Self {
        let units: Option<Vec<Vec<f64>>> = embeddings.map(|e| e.rows().map(unit).collect());
        let distance = |a: &[f64], b: &[f64]| (1.0 - dot(a, b)).max(0.0);
        match units {
            Some(units) if n <= exact_up_to => {
                let mut all = vec![0.0; n * n];
                for i in 0..n {
                    for j in 0..i {
                        all[i * n + j] = distance(&units[i], &units[j]);
                    }
                }
                Self::Exact { n, all }
            }
            None if n <= exact_up_to => Self::Exact { n, all: vec![1.0; n * n] },
            Some(units) => {
                let rank = landmarks.min(n);
                let chosen: Vec<usize> = (0..rank).map(|l| l * n / rank).collect();
                let to_all = |u: &Vec<f64>| chosen.iter().map(|&l| distance(u, &units[l])).collect::<Vec<_>>();
                let mut to: Vec<f64> = units.iter().flat_map(to_all).collect();
                // a datum is at distance 0 from itself, a zero embedding too
                chosen.iter().enumerate().for_each(|(l, &i)| to[i * rank + l] = 0.0);
                let among = chosen.iter().flat_map(|&i| to[i * rank..(i + 1) * rank].to_vec()).collect();
                Self::LowRank { n, rank, to, among }
            }
            None => Self::LowRank { n, rank: 1, to: vec![1.0; n], among: vec![1.0] },
        }
    }
}

fn unit(row: &[f32]) -> Vec<f64> {
    let row: Vec<f64> = row.iter().map(|&v| v as f64).collect();
    let norm = dot(&row, &row).sqrt().max(f64::MIN_POSITIVE);
    row.into_iter().map(|v| v / norm).collect()
}

/// C and ∂C/∂log γ for one γ.
pub(super) enum Kernel {
    Exact {
        n: usize,
        /// Lower triangle of L, row-major `[n, n]`.
        factor: Vec<f64>,
        /// ∂C/∂log γ, row-major `[n, n]`.
        slope: Vec<f64>,
    },
    LowRank(Box<LowRank>),
}

pub(super) struct LowRank {
    n: usize,
    rank: usize,
    /// F, row-major `[n, rank]`.
    factor: Vec<f64>,
    /// D.
    diagonal: Vec<f64>,
    /// W⁻¹ Rᵀ, by data, row-major `[n, rank]`.
    weights: Vec<f64>,
    /// ∂R and ∂W by log γ.
    slope: Vec<f64>,
    landmark_slope: Vec<f64>,
    /// ∂D by log γ.
    diagonal_slope: Vec<f64>,
    /// Cholesky factor of I + Fᵀ D⁻¹ F, `[rank, rank]`.
    capacity: Vec<f64>,
}

impl Kernel {
    pub fn new(distances: &Distances, log_gamma: f64) -> Self {
        let precision = (-2.0 * log_gamma).exp();
        let rbf = |d: f64| {
            let c = (-0.5 * d * precision).exp();
            (c, c * d * precision)
        };
        match distances {
            Distances::Exact { n, all } => {
                let n = *n;
                let mut factor: Vec<f64> = vec![0.0; n * n];
                let mut slope = vec![0.0; n * n];
                for i in 0..n {
                    factor[i * n + i] = 1.0 + JITTER;
                    for j in 0..i {
                        (factor[i * n + j], slope[i * n + j]) = rbf(all[i * n + j]);
                        slope[j * n + i] = slope[i * n + j];
                    }
                }
                // positive in exact arithmetic, being at least the jitter
                cholesky(&mut factor, n, 0.1 * JITTER);
                Self::Exact { n, factor, slope }
            }
            Distances::LowRank { n, rank, to, among } => {
                let (n, rank) = (*n, *rank);
                let (r, slope): (Vec<f64>, Vec<f64>) = to.iter().map(|&d| rbf(d)).unzip();
                let (mut w, landmark_slope): (Vec<f64>, Vec<f64>) = among.iter().map(|&d| rbf(d)).unzip();
                w.iter_mut().step_by(rank + 1).for_each(|w| *w += LANDMARK_JITTER);
                cholesky(&mut w, rank, 0.1 * LANDMARK_JITTER);
                let mut factor = r.clone();
                let (mut diagonal, mut diagonal_slope) = (Vec::with_capacity(n), Vec::with_capacity(n));
                let mut weights = r;
                let mut capacity = vec![0.0; rank * rank];
                let mut product = vec![0.0; rank];
                for i in 0..n {
                    let row = i * rank..(i + 1) * rank;
                    let f = &mut factor[row.clone()];
                    for k in 0..rank {
                        let l = &w[k * rank..k * rank + k + 1];
                        f[k] = (f[k] - dot(&l[..k], &f[..k])) / l[k];
                    }
                    let h = &mut weights[row.clone()];
                    solve(&w, h);
                    for k in 0..rank {
                        product[k] = dot(&landmark_slope[k * rank..(k + 1) * rank], h);
                    }
                    let rest = 1.0 + JITTER - dot(f, f);
                    // rounding, and the landmarks' jitter, may leave less than the jitter
                    let clipped = rest < 0.5 * JITTER;
                    let d = if clipped { 0.5 * JITTER } else { rest };
                    let change = dot(h, &product) - 2.0 * dot(&slope[row], h);
                    diagonal.push(d);
                    diagonal_slope.push(if clipped { 0.0 } else { change });
                    for k in 0..rank {
                        let scale = f[k] / d;
                        capacity[k * rank..k * rank + k + 1].iter_mut().zip(&*f).for_each(|(c, f)| *c += scale * f);
                    }
                }
                capacity.iter_mut().step_by(rank + 1).for_each(|c| *c += 1.0);
                cholesky(&mut capacity, rank, 0.5);
                let low =
                    LowRank { n, rank, factor, diagonal, weights, slope, landmark_slope, diagonal_slope, capacity };
                Self::LowRank(Box::new(low))
            }
        }
    }

    /// Standard normals behind a draw.
    pub fn dim(&self) -> usize {
        match self {
            Self::Exact { n, .. } => *n,
            Self::LowRank(k) => k.n + k.rank,
        }
    }

    /// x = C^½ z, of covariance C.
    pub fn colour(&self, z: &[f64]) -> Vec<f64> {
        match self {
            Self::Exact { n, factor, .. } => (0..*n).map(|i| dot(&factor[i * n..i * n + i + 1], &z[..i + 1])).collect(),
            Self::LowRank(k) => {
                let (common, own) = z.split_at(k.rank);
                let rows = k.factor.chunks_exact(k.rank).zip(&k.diagonal).zip(own);
                rows.map(|((f, d), z)| dot(f, common) + d.sqrt() * z).collect()
            }
        }
    }

    /// (x, y) with x = C^½ z and y = C⁻¹ x.
    pub fn whiten(&self, z: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let x = self.colour(z);
        match self {
            Self::Exact { n, factor, .. } => {
                // y = L⁻ᵀ z
                let mut y = z.to_vec();
                for i in (0..*n).rev() {
                    let row = &factor[i * n..i * n + i + 1];
                    y[i] /= row[i];
                    let (head, tail) = y.split_at_mut(i);
                    head.iter_mut().zip(row).for_each(|(h, l)| *h -= l * tail[0]);
                }
                (x, y)
            }
            Self::LowRank(k) => {
                let scaled: Vec<f64> = x.iter().zip(&k.diagonal).map(|(x, d)| x / d).collect();
                let mut common = k.pull(&k.factor, &scaled);
                solve(&k.capacity, &mut common);
                let rows = k.factor.chunks_exact(k.rank).zip(&k.diagonal).zip(scaled);
                let y = rows.map(|((f, d), s)| s - dot(f, &common) / d).collect();
                (x, y)
            }
        }
    }

    /// yᵀ ∂C/∂log γ y.
    pub fn curvature(&self, y: &[f64]) -> f64 {
        match self {
            Self::Exact { n, slope, .. } => (0..*n).map(|i| y[i] * dot(&slope[i * n..(i + 1) * n], y)).sum(),
            Self::LowRank(k) => {
                let weights = k.pull(&k.weights, y);
                let along = dot(&k.pull(&k.slope, y), &weights);
                let rows = k.landmark_slope.chunks_exact(k.rank).zip(&weights);
                let across: f64 = rows.map(|(row, w)| w * dot(row, &weights)).sum();
                let own: f64 = y.iter().zip(&k.diagonal_slope).map(|(y, d)| y * y * d).sum();
                2.0 * along - across + own
            }
        }
    }
}

impl LowRank {
    /// Σ_i v_i row_i of a matrix `[n, rank]`.
    fn pull(&self, matrix: &[f64], v: &[f64]) -> Vec<f64> {
        let mut out = vec![0.0; self.rank];
        for (row, v) in matrix.chunks_exact(self.rank).zip(v) {
            out.iter_mut().zip(row).for_each(|(o, m)| *o += v * m);
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::super::gaussian::standard_normal;
    use super::*;

    /// `n` embeddings around four directions, the last two alike, the first zero.
    fn embeddings(n: usize) -> Vec<f32> {
        let noise = standard_normal(n * 8, &mut StdRng::seed_from_u64(7));
        let mut e: Vec<f32> =
            (0..n * 8).map(|k| 0.3 * noise[k] as f32 + if k % 8 == (k / 8) % 4 { 3.0 } else { 0.0 }).collect();
        e[..8].fill(0.0);
        e.copy_within((n - 2) * 8..(n - 1) * 8, (n - 1) * 8);
        e
    }

    /// C, from products with unit vectors: y = C⁻¹x says C·y = x.
    fn covariance(kernel: &Kernel, n: usize) -> Vec<f64> {
        let rank = kernel.dim() - n;
        let rows: Vec<Vec<f64>> = (0..n + rank)
            .map(|k| {
                let mut z = vec![0.0; n + rank];
                z[k] = 1.0;
                kernel.colour(&z)
            })
            .collect();
        (0..n * n).map(|ij| rows.iter().map(|row| row[ij / n] * row[ij % n]).sum()).collect()
    }

    #[test]
    fn the_factor_gives_back_the_covariance() {
        let values = embeddings(10);
        let distances = Distances::new(10, Some(&Embeddings::new(&values, 8).unwrap()), 1024, 64);
        let c = covariance(&Kernel::new(&distances, 0.5f64.ln()), 10);
        let Distances::Exact { all, .. } = &distances else { panic!("ten data are few") };
        assert!((all[10] - 1.0).abs() < 1e-12, "a zero embedding is at distance 1");
        for i in 0..10 {
            for j in 0..=i {
                let want = if i == j { 1.0 + JITTER } else { (-2.0 * all[i * 10 + j]).exp() };
                assert!((c[i * 10 + j] - want).abs() < 1e-12, "{i} {j}: {} {want}", c[i * 10 + j]);
            }
        }
    }

    #[test]
    fn low_rank_is_exact_where_all_data_are_landmarks_and_close_with_few() {
        let (n, values) = (60, embeddings(60));
        let given = Embeddings::new(&values, 8).unwrap();
        for (embeddings, landmarks, tolerance) in [(None, 5, 2e-6), (Some(&given), 60, 2e-5), (Some(&given), 20, 0.12)]
        {
            let exact = Kernel::new(&Distances::new(n, embeddings, n, landmarks), 0.6f64.ln());
            let low = Kernel::new(&Distances::new(n, embeddings, 0, landmarks), 0.6f64.ln());
            assert!(matches!(low, Kernel::LowRank(_)));
            let (a, b) = (covariance(&exact, n), covariance(&low, n));
            let off = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
            assert!(off < tolerance, "{landmarks}: {off}");
            assert!((0..n).all(|i| (b[i * n + i] - 1.0 - JITTER).abs() < 1e-3));
        }
    }

    /// y = C⁻¹x and the curvature, of both forms, against C and its difference quotient.
    #[test]
    fn products_agree_with_the_covariance() {
        let (n, values) = (24, embeddings(24));
        let given = Embeddings::new(&values, 8).unwrap();
        for embeddings in [None, Some(&given)] {
            for exact_up_to in [0, n] {
                let distances = Distances::new(n, embeddings, exact_up_to, 9);
                let at = |log_gamma: f64| covariance(&Kernel::new(&distances, log_gamma), n);
                let (kernel, h) = (Kernel::new(&distances, 0.5f64.ln()), 1e-5);
                let (low, c, high) = (at(0.5f64.ln() - h), at(0.5f64.ln()), at(0.5f64.ln() + h));
                let z = standard_normal(kernel.dim(), &mut StdRng::seed_from_u64(1));
                let (x, y) = kernel.whiten(&z);
                for i in 0..n {
                    assert!((dot(&c[i * n..(i + 1) * n], &y) - x[i]).abs() < 1e-8, "{exact_up_to} {i}");
                }
                let quadratic = |m: &[f64]| -> f64 { (0..n).map(|i| y[i] * dot(&m[i * n..(i + 1) * n], &y)).sum() };
                let numeric = (quadratic(&high) - quadratic(&low)) / (2.0 * h);
                let got = kernel.curvature(&y);
                assert!((numeric - got).abs() < 1e-4 * (1.0 + got.abs()), "{exact_up_to}: {numeric} {got}");
            }
        }
    }
}
