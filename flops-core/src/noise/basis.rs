//! Bases of the subspaces that weight noise lies in.

use super::law::NoiseLaw;
use super::stream::Stream;
use crate::linalg::orthonormalise;
use crate::random::derive_seed;

/// Separates the bases from the noise of the same seed.
const BASIS: u64 = u64::from_le_bytes(*b"subspace");

/// The seed of a parameter's basis in a period.
///
/// `seed` is that of the run, without the salt of a batch: the basis outlives the batch.
pub(crate) fn basis_seed(seed: u64, period: u64, site: usize) -> u64 {
    derive_seed(&[seed, BASIS, period, site as u64])
}

/// Independent entries of the law, `[inputs, rank]`.
pub(crate) fn random_basis(law: NoiseLaw, seed: u64, [inputs, rank]: [usize; 2]) -> Vec<f32> {
    let mut values = vec![0f32; inputs * rank];
    Stream::new(seed).fill(law, 1.0, &mut values);
    values
}

/// √inputs times orthonormal columns, `[inputs, rank]`; `rank` is below `inputs`.
///
/// Columns of normal values span a uniformly distributed subspace. Whatever the noise's law, these
/// are normal, for signs may be linearly dependent.
pub(crate) fn orthonormal_basis(seed: u64, [inputs, rank]: [usize; 2]) -> Vec<f32> {
    let mut normal = vec![0f32; inputs * rank];
    NoiseLaw::Gaussian.sample(seed, &mut normal);
    let mut columns: Vec<f64> = normal.into_iter().map(f64::from).collect();
    orthonormalise(&mut columns, inputs);
    let scale = (inputs as f64).sqrt();
    (0..inputs).flat_map(|i| columns.chunks(inputs).map(move |c| (scale * c[i]) as f32)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// BᵀB = d·I, to single precision, also where there are nearly as many columns as rows.
    #[test]
    fn columns_are_orthogonal_and_of_one_length() {
        for [inputs, rank] in [[2, 1], [7, 3], [65, 64], [300, 64]] {
            let basis = orthonormal_basis(basis_seed(1, 2, 3), [inputs, rank]);
            for a in 0..rank {
                for b in 0..rank {
                    let product: f64 =
                        (0..inputs).map(|i| f64::from(basis[i * rank + a]) * f64::from(basis[i * rank + b])).sum();
                    let expected = if a == b { inputs as f64 } else { 0.0 };
                    assert!(
                        (product - expected).abs() < 1e-5 * inputs as f64,
                        "{inputs} × {rank}: {a}, {b}: {product}"
                    );
                }
            }
        }
    }

    /// E[BBᵀ]/R = I over seeds, which is what makes estimates unbiased over periods.
    ///
    /// n = 20,000 bases of 5 × 2. An entry of BBᵀ/R lies in an interval of length 2.5. By Hoeffding's
    /// inequality any of the 25 means is off by more than 0.05 with a probability below 10⁻⁵.
    #[test]
    fn subspaces_are_uniform_over_seeds() {
        let (n, [inputs, rank]) = (20_000, [5, 2]);
        let mut mean = [0.0; 25];
        for period in 0..n {
            let basis = orthonormal_basis(basis_seed(4, period, 0), [inputs, rank]);
            for (k, mean) in mean.iter_mut().enumerate() {
                let rows = [k / inputs, k % inputs].map(|i| &basis[i * rank..(i + 1) * rank]);
                let product: f32 = rows[0].iter().zip(rows[1]).map(|(a, b)| a * b).sum();
                *mean += f64::from(product) / (rank as f64 * n as f64);
            }
        }
        for (k, mean) in mean.iter().enumerate() {
            let expected = f64::from(u8::from(k % (inputs + 1) == 0));
            assert!((mean - expected).abs() < 0.05, "entry {k}: {mean}");
        }
    }

    #[test]
    fn seed_period_and_parameter_each_give_another_basis() {
        let basis = |seed, period, site| random_basis(NoiseLaw::Gaussian, basis_seed(seed, period, site), [4, 2]);
        let reference = basis(1, 2, 3);
        assert_eq!(basis(1, 2, 3), reference);
        for other in [basis(0, 2, 3), basis(1, 3, 3), basis(1, 2, 4)] {
            assert_ne!(other, reference);
        }
    }
}
