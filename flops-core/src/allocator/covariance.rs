//! The covariance of the Gaussian allocator: an RBF of cosine distances, exact or of low rank.
//!
//! C_ij = exp(−d_ij/2γ²) + jitter·[i = j].
//!
//! The exact form is factorised, C = L Lᵀ. The low-rank form is the Nyström approximation from a
//! few examples of the batch, the landmarks, with an exact diagonal:
//!
//! C ≈ F Fᵀ + D, with F Fᵀ = R W⁻¹ Rᵀ.
//!
//! R is the RBF between examples and landmarks, and W is the RBF among the landmarks. D is the
//! diagonal matrix that makes every C_ii exact. The approximation is positive definite for every
//! choice of landmarks. It equals C if all examples are landmarks.

use super::features::Embeddings;
use crate::linalg::{cholesky, dot, solve, solve_lower};

/// Added to the diagonal.
///
/// It keeps the covariance positive definite when examples repeat in a batch. It also gives every
/// example noise of its own, which the projection does not undo.
pub(super) const JITTER: f64 = 0.1;
/// Keeps W positive definite when landmarks repeat.
const LANDMARK_JITTER: f64 = 1e-6;

/// Cosine distances within a batch: all of them, or those to the landmarks.
#[derive(Debug)]
pub(super) enum Distances {
    /// The lower triangle, row-major `[n, n]`.
    Exact { n: usize, all: Vec<f64> },
    /// Distances to the landmarks, `[n, rank]`, and among them, `[rank, rank]`.
    LowRank { n: usize, rank: usize, to: Vec<f64>, among: Vec<f64> },
}

impl Distances {
    /// All distances for at most `exact_up_to` examples, otherwise those to the landmarks.
    ///
    /// The landmarks are `landmarks` examples, spread evenly over the batch. A zero embedding is at
    /// distance 1 from all others. Without embeddings every two examples are at distance 1. A
    /// single landmark is then exact, at distance 1 from all examples and from itself.
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
                // every example is at distance 0 from itself, even with a zero embedding
                chosen.iter().enumerate().for_each(|(l, &i)| to[i * rank + l] = 0.0);
                let among = chosen.iter().flat_map(|&i| to[i * rank..(i + 1) * rank].to_vec()).collect();
                Self::LowRank { n, rank, to, among }
            }
            None => Self::LowRank { n, rank: 1, to: vec![1.0; n], among: vec![1.0] },
        }
    }
}

/// A row scaled to norm 1; zeros stay zeros.
fn unit(row: &[f32]) -> Vec<f64> {
    let row: Vec<f64> = row.iter().map(|&v| v as f64).collect();
    let norm = dot(&row, &row).sqrt().max(f64::MIN_POSITIVE);
    row.into_iter().map(|v| v / norm).collect()
}

/// C and ∂C/∂log γ for one γ.
pub(super) enum Covariance {
    Exact(Exact),
    LowRank(Box<LowRank>),
}

/// The exact form.
pub(super) struct Exact {
    n: usize,
    /// Lower triangle of L, row-major `[n, n]`.
    factor: Vec<f64>,
    /// ∂C/∂log γ, row-major `[n, n]`.
    slope: Vec<f64>,
}

/// The Nyström approximation.
pub(super) struct LowRank {
    n: usize,
    rank: usize,
    /// F, row-major `[n, rank]`.
    factor: Vec<f64>,
    /// D, `[n]`.
    diagonal: Vec<f64>,
    /// R W⁻¹, row-major `[n, rank]`.
    weights: Vec<f64>,
    /// ∂R/∂log γ, row-major `[n, rank]`.
    slope: Vec<f64>,
    /// ∂W/∂log γ, row-major `[rank, rank]`.
    landmark_slope: Vec<f64>,
    /// ∂D/∂log γ, `[n]`.
    diagonal_slope: Vec<f64>,
    /// Cholesky factor of I + Fᵀ D⁻¹ F, `[rank, rank]`.
    capacity: Vec<f64>,
}

/// The RBF of distances and its derivative by log γ.
struct Rbf {
    /// 1/γ².
    precision: f64,
}

impl Rbf {
    /// The RBF and its derivative at the distance `d`.
    fn at(&self, d: f64) -> (f64, f64) {
        let c = (-0.5 * d * self.precision).exp();
        (c, c * d * self.precision)
    }
}

impl Exact {
    fn new(n: usize, distances: &[f64], rbf: &Rbf) -> Self {
        let mut factor: Vec<f64> = vec![0.0; n * n];
        let mut slope = vec![0.0; n * n];
        for i in 0..n {
            factor[i * n + i] = 1.0 + JITTER;
            for j in 0..i {
                (factor[i * n + j], slope[i * n + j]) = rbf.at(distances[i * n + j]);
                slope[j * n + i] = slope[i * n + j];
            }
        }
        // in exact arithmetic every squared pivot is at least the jitter
        cholesky(&mut factor, n, 0.1 * JITTER);
        Self { n, factor, slope }
    }
}

impl LowRank {
    /// From distances to the landmarks, `[n, rank]`, and among them, `[rank, rank]`.
    fn new(n: usize, rank: usize, to: &[f64], among: &[f64], rbf: &Rbf) -> Self {
        let (r, slope): (Vec<f64>, Vec<f64>) = to.iter().map(|&d| rbf.at(d)).unzip();
        let (mut w, landmark_slope): (Vec<f64>, Vec<f64>) = among.iter().map(|&d| rbf.at(d)).unzip();
        w.iter_mut().step_by(rank + 1).for_each(|w| *w += LANDMARK_JITTER);
        cholesky(&mut w, rank, 0.1 * LANDMARK_JITTER);
        let (diagonal, diagonal_slope) = (Vec::with_capacity(n), Vec::with_capacity(n));
        let (factor, weights, capacity) = (r.clone(), r, vec![0.0; rank * rank]);
        let mut this = Self { n, rank, factor, diagonal, weights, slope, landmark_slope, diagonal_slope, capacity };
        let mut product = vec![0.0; rank];
        for i in 0..n {
            this.complete_row(i, &w, &mut product);
        }
        this.capacity.iter_mut().step_by(rank + 1).for_each(|c| *c += 1.0);
        cholesky(&mut this.capacity, rank, 0.5);
        this
    }

    /// Turns row i of R into rows of F and R W⁻¹, and adds its part to D, ∂D and Fᵀ D⁻¹ F.
    ///
    /// `w` is the Cholesky factor of W, and `product` is scratch, `[rank]`.
    fn complete_row(&mut self, i: usize, w: &[f64], product: &mut [f64]) {
        let rank = self.rank;
        let row = i * rank..(i + 1) * rank;
        let f = &mut self.factor[row.clone()];
        solve_lower(w, f);
        let h = &mut self.weights[row.clone()];
        solve(w, h);
        for (p, slope) in product.iter_mut().zip(self.landmark_slope.chunks_exact(rank)) {
            *p = dot(slope, h);
        }
        let rest = 1.0 + JITTER - dot(f, f);
        // rounding and the landmarks' jitter may leave less than the jitter
        let clipped = rest < 0.5 * JITTER;
        let d = if clipped { 0.5 * JITTER } else { rest };
        let change = dot(h, product) - 2.0 * dot(&self.slope[row], h);
        self.diagonal.push(d);
        self.diagonal_slope.push(if clipped { 0.0 } else { change });
        for k in 0..rank {
            let scale = f[k] / d;
            self.capacity[k * rank..k * rank + k + 1].iter_mut().zip(&*f).for_each(|(c, f)| *c += scale * f);
        }
    }

    /// Σ_i v_i row_i of a matrix `[n, rank]`.
    fn transpose_mul(&self, matrix: &[f64], v: &[f64]) -> Vec<f64> {
        let mut out = vec![0.0; self.rank];
        for (row, v) in matrix.chunks_exact(self.rank).zip(v) {
            out.iter_mut().zip(row).for_each(|(o, m)| *o += v * m);
        }
        out
    }
}

impl Covariance {
    /// The covariance at γ = exp(`log_gamma`).
    pub fn new(distances: &Distances, log_gamma: f64) -> Self {
        let rbf = Rbf { precision: (-2.0 * log_gamma).exp() };
        match distances {
            Distances::Exact { n, all } => Self::Exact(Exact::new(*n, all, &rbf)),
            Distances::LowRank { n, rank, to, among } => {
                Self::LowRank(Box::new(LowRank::new(*n, *rank, to, among, &rbf)))
            }
        }
    }

    /// The number of standard normals behind a draw.
    pub fn dim(&self) -> usize {
        match self {
            Self::Exact(k) => k.n,
            Self::LowRank(k) => k.n + k.rank,
        }
    }

    /// x = C^½ z, which has covariance C for standard normal z.
    pub fn colour(&self, z: &[f64]) -> Vec<f64> {
        match self {
            Self::Exact(Exact { n, factor, .. }) => {
                (0..*n).map(|i| dot(&factor[i * n..i * n + i + 1], &z[..i + 1])).collect()
            }
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
            Self::Exact(Exact { n, factor, .. }) => {
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
                let mut common = k.transpose_mul(&k.factor, &scaled);
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
            Self::Exact(Exact { n, slope, .. }) => (0..*n).map(|i| y[i] * dot(&slope[i * n..(i + 1) * n], y)).sum(),
            Self::LowRank(k) => {
                let weights = k.transpose_mul(&k.weights, y);
                let along = dot(&k.transpose_mul(&k.slope, y), &weights);
                let rows = k.landmark_slope.chunks_exact(k.rank).zip(&weights);
                let across: f64 = rows.map(|(row, w)| w * dot(row, &weights)).sum();
                let own: f64 = y.iter().zip(&k.diagonal_slope).map(|(y, d)| y * y * d).sum();
                2.0 * along - across + own
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::super::gaussian::standard_normal;
    use super::*;

    /// `n` embeddings around four directions. The last two are alike, and the first is zero.
    fn embeddings(n: usize) -> Vec<f32> {
        let noise = standard_normal(n * 8, &mut StdRng::seed_from_u64(7));
        let mut e: Vec<f32> =
            (0..n * 8).map(|k| 0.3 * noise[k] as f32 + if k % 8 == (k / 8) % 4 { 3.0 } else { 0.0 }).collect();
        e[..8].fill(0.0);
        e.copy_within((n - 2) * 8..(n - 1) * 8, (n - 1) * 8);
        e
    }

    /// C, from its products with unit vectors.
    fn dense(covariance: &Covariance, n: usize) -> Vec<f64> {
        let rank = covariance.dim() - n;
        let rows: Vec<Vec<f64>> = (0..n + rank)
            .map(|k| {
                let mut z = vec![0.0; n + rank];
                z[k] = 1.0;
                covariance.colour(&z)
            })
            .collect();
        (0..n * n).map(|ij| rows.iter().map(|row| row[ij / n] * row[ij % n]).sum()).collect()
    }

    /// One minus the cosine, whatever the lengths of the embeddings.
    #[test]
    fn distances_are_those_of_directions() {
        let values = [1.0, 0.0, 0.0, 3.0, 2.0, 2.0, -5.0, 0.0];
        let given = Embeddings::new(&values, 2).unwrap();
        let Distances::Exact { all, .. } = Distances::new(4, Some(&given), 4, 1) else { panic!("four are few") };
        let half = 1.0 - 0.5f64.sqrt();
        let expected = [0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, half, half, 0.0, 0.0, 2.0, 1.0, 2.0 - half, 0.0];
        assert!(all.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-12), "{all:?}");
        // the landmarks are examples 0 and 2
        let Distances::LowRank { to, among, .. } = Distances::new(4, Some(&given), 3, 2) else { panic!("of rank 2") };
        let expected = [0.0, half, 1.0, half, half, 0.0, 2.0, 2.0 - half];
        assert!(to.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-12), "{to:?}");
        assert!(among.iter().zip([0.0, half, half, 0.0]).all(|(a, b)| (a - b).abs() < 1e-12), "{among:?}");
    }

    #[test]
    fn the_factor_reproduces_the_covariance() {
        let values = embeddings(10);
        let distances = Distances::new(10, Some(&Embeddings::new(&values, 8).unwrap()), 1024, 64);
        let c = dense(&Covariance::new(&distances, 0.5f64.ln()), 10);
        let Distances::Exact { all, .. } = &distances else { panic!("ten examples are few") };
        assert!((all[10] - 1.0).abs() < 1e-12, "a zero embedding is at distance 1");
        for i in 0..10 {
            for j in 0..=i {
                let want = if i == j { 1.0 + JITTER } else { (-2.0 * all[i * 10 + j]).exp() };
                assert!((c[i * 10 + j] - want).abs() < 1e-12, "{i} {j}: {} {want}", c[i * 10 + j]);
            }
        }
    }

    #[test]
    fn low_rank_is_exact_if_all_examples_are_landmarks_and_close_with_few() {
        let (n, values) = (60, embeddings(60));
        let given = Embeddings::new(&values, 8).unwrap();
        for (embeddings, landmarks, tolerance) in [(None, 5, 2e-6), (Some(&given), 60, 2e-5), (Some(&given), 20, 0.12)]
        {
            let exact = Covariance::new(&Distances::new(n, embeddings, n, landmarks), 0.6f64.ln());
            let low = Covariance::new(&Distances::new(n, embeddings, 0, landmarks), 0.6f64.ln());
            assert!(matches!(low, Covariance::LowRank(_)));
            let (a, b) = (dense(&exact, n), dense(&low, n));
            let off = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
            assert!(off < tolerance, "{landmarks}: {off}");
            assert!((0..n).all(|i| (b[i * n + i] - 1.0 - JITTER).abs() < 1e-3));
        }
    }

    /// Compares y = C⁻¹x and the curvature of both forms with C and its difference quotient.
    #[test]
    fn products_agree_with_the_covariance() {
        let (n, values) = (24, embeddings(24));
        let given = Embeddings::new(&values, 8).unwrap();
        for embeddings in [None, Some(&given)] {
            for exact_up_to in [0, n] {
                let distances = Distances::new(n, embeddings, exact_up_to, 9);
                let at = |log_gamma: f64| dense(&Covariance::new(&distances, log_gamma), n);
                let (covariance, h) = (Covariance::new(&distances, 0.5f64.ln()), 1e-5);
                let (low, c, high) = (at(0.5f64.ln() - h), at(0.5f64.ln()), at(0.5f64.ln() + h));
                let z = standard_normal(covariance.dim(), &mut StdRng::seed_from_u64(1));
                let (x, y) = covariance.whiten(&z);
                for i in 0..n {
                    assert!((dot(&c[i * n..(i + 1) * n], &y) - x[i]).abs() < 1e-8, "{exact_up_to} {i}");
                }
                let quadratic = |m: &[f64]| -> f64 { (0..n).map(|i| y[i] * dot(&m[i * n..(i + 1) * n], &y)).sum() };
                let numeric = (quadratic(&high) - quadratic(&low)) / (2.0 * h);
                let got = covariance.curvature(&y);
                assert!((numeric - got).abs() < 1e-4 * (1.0 + got.abs()), "{exact_up_to}: {numeric} {got}");
            }
        }
    }
}
