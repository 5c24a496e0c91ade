//! The mean of a learned allocator, linear in the features of each example.

use serde::{Deserialize, Serialize};

use super::features::DatumFeatures;
use crate::error::Error;
use crate::linalg::dot;

/// The features in which a learned allocator's mean is linear, with coefficients β.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum MeanModel {
    /// β₀ + β₁φ_j, with φ the losses standardised within the batch.
    ///
    /// This is the paper's reparameterisation: two coefficients for every batch size.
    #[default]
    Loss,
    /// β₀ + β₁φ_j + β₂ψ_j, with ψ_j = √v_j/mean(√v) − 1 and v_j the estimates of Tr Σ_j.
    ///
    /// The optimal allocation is proportional to the square roots.
    Variance,
    /// One mean for each rank of the loss within the batch, smallest loss first: the full
    /// parameterisation.
    ///
    /// The number of coefficients is given, at least 2. Give the batch size for a mean of each
    /// rank. A batch of another size interpolates linearly between them.
    Ranks(usize),
    /// β₀ + βᵀf_j, with f_j the user's own [features](super::DatumFeatures::extra), this many per
    /// example.
    Features(usize),
}

impl MeanModel {
    /// The number of coefficients.
    pub fn coefficients(self) -> usize {
        match self {
            Self::Loss => 2,
            Self::Variance => 3,
            Self::Ranks(ranks) => ranks,
            Self::Features(dim) => 1 + dim,
        }
    }

    /// Whether the mean is linear in the user's own features.
    pub(super) fn needs_features(self) -> bool {
        matches!(self, Self::Features(_))
    }

    /// Coefficients that give every example the mean `level`, with `variance` as the coefficient of
    /// ψ.
    ///
    /// # Errors
    /// If there are fewer than 2 ranks, or no features.
    pub(super) fn start(self, level: f64, variance: f64) -> Result<Vec<f64>, Error> {
        let fail =
            |name, value: usize, remedy: &str| Err(Error::Setting { name, value: value as f64, remedy: remedy.into() });
        match self {
            Self::Ranks(ranks) if ranks < 2 => fail("ranks", ranks, "use at least 2 ranks, such as the batch size"),
            Self::Features(0) => fail("features", 0, "give each example at least 1 feature"),
            Self::Ranks(ranks) => Ok(vec![level; ranks]),
            Self::Variance => Ok(vec![level, 0.0, variance]),
            Self::Loss | Self::Features(_) => {
                let mut beta = vec![0.0; self.coefficients()];
                beta[0] = level;
                Ok(beta)
            }
        }
    }

    /// Checks that β, which a record may have replaced, has the coefficients of this mean.
    pub(super) fn check(self, coefficients: usize) -> Result<(), Error> {
        match coefficients == self.coefficients() {
            true => Ok(()),
            false => {
                Err(Error::Length { name: "the allocator's β", got: coefficients, expected: self.coefficients() })
            }
        }
    }

    /// The design matrix X of a batch, with the means Xβ.
    ///
    /// # Errors
    /// If the user's features are missing or of another size.
    pub(super) fn design(self, features: &DatumFeatures<'_>) -> Result<Design, Error> {
        let n = features.losses.len();
        let mut design = Design { coefficients: self.coefficients(), ends: Vec::with_capacity(n), entries: vec![] };
        match self {
            Self::Loss => {
                for phi in standardise(features.losses) {
                    design.push(&[(0, 1.0), (1, phi)]);
                }
            }
            Self::Variance => {
                let top = features.variances.iter().copied().fold(0.0, f64::max).max(f64::MIN_POSITIVE);
                let roots: Vec<f64> = features.variances.iter().map(|v| (v / top).sqrt()).collect();
                let mean = roots.iter().sum::<f64>() / n as f64;
                for (phi, root) in standardise(features.losses).into_iter().zip(roots) {
                    let psi = if mean > 0.0 { root / mean - 1.0 } else { 0.0 };
                    design.push(&[(0, 1.0), (1, phi), (2, psi)]);
                }
            }
            Self::Ranks(ranks) => design.push_ranks(features.losses, ranks),
            Self::Features(dim) => design.push_features(features, dim)?,
        }
        Ok(design)
    }
}

/// The matrix X of μ = Xβ, stored by rows without zeros.
#[derive(Debug)]
pub(super) struct Design {
    coefficients: usize,
    ends: Vec<usize>,
    entries: Vec<(usize, f64)>,
}

impl Design {
    /// The number of coefficients.
    pub fn coefficients(&self) -> usize {
        self.coefficients
    }

    fn push(&mut self, row: &[(usize, f64)]) {
        self.entries.extend_from_slice(row);
        self.ends.push(self.entries.len());
    }

    /// A row for the rank of each loss, between the two nearest of `ranks` coefficients.
    fn push_ranks(&mut self, losses: &[f64], ranks: usize) {
        let n = losses.len();
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by(|&i, &j| losses[i].total_cmp(&losses[j]).then(i.cmp(&j)));
        let mut place = vec![0.0; n];
        for (rank, &j) in order.iter().enumerate() {
            place[j] = rank as f64 * (ranks - 1) as f64 / n.saturating_sub(1).max(1) as f64;
        }
        for at in place {
            let below = (at as usize).min(ranks - 2);
            let part = at - below as f64;
            self.push(&[(below, 1.0 - part), (below + 1, part)]);
        }
    }

    /// A row for the user's features of each example.
    fn push_features(&mut self, features: &DatumFeatures<'_>, dim: usize) -> Result<(), Error> {
        let Some(given) = &features.extra else {
            return Err(Error::Length { name: "allocation features", got: 0, expected: features.losses.len() });
        };
        for row in given.rows() {
            if row.len() != dim {
                let name = "allocation features of an example";
                return Err(Error::Length { name, got: row.len(), expected: dim });
            }
            let row = row.iter().enumerate().map(|(k, &f)| (k + 1, f64::from(f)));
            self.push(&std::iter::once((0, 1.0)).chain(row).collect::<Vec<_>>());
        }
        Ok(())
    }

    /// The number of examples.
    pub fn batch_size(&self) -> usize {
        self.ends.len()
    }

    fn rows(&self) -> impl Iterator<Item = &[(usize, f64)]> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        starts.zip(&self.ends).map(|(start, &end)| &self.entries[start..end])
    }

    /// Xβ.
    pub fn mean(&self, beta: &[f64]) -> Vec<f64> {
        self.rows().map(|row| row.iter().map(|&(k, x)| x * beta[k]).sum()).collect()
    }

    /// Xᵀv.
    pub fn transpose_mul(&self, v: &[f64]) -> Vec<f64> {
        let mut out = vec![0.0; self.coefficients];
        for (row, v) in self.rows().zip(v) {
            row.iter().for_each(|&(k, x)| out[k] += x * v);
        }
        out
    }
}

/// (losses − mean) / standard deviation, or zeros if all losses are equal.
pub(super) fn standardise(losses: &[f64]) -> Vec<f64> {
    let n = losses.len() as f64;
    let scale = losses.iter().fold(0.0, |m: f64, l| m.max(l.abs())).max(f64::MIN_POSITIVE);
    let mean = losses.iter().map(|l| l / scale).sum::<f64>() / n;
    let centred: Vec<f64> = losses.iter().map(|l| l / scale - mean).collect();
    let spread = (dot(&centred, &centred) / n).sqrt();
    if spread <= 1e-12 {
        return vec![0.0; losses.len()];
    }
    centred.into_iter().map(|c| c / spread).collect()
}

#[cfg(test)]
mod tests {
    use super::super::features::Embeddings;
    use super::*;

    fn features(losses: &[f64]) -> DatumFeatures<'_> {
        DatumFeatures { losses, variances: &[1.0; 5], ..Default::default() }
    }

    #[test]
    fn losses_are_standardised() {
        let phi = standardise(&[1.0, 2.0, 3.0]);
        assert!((phi[2] - 1.5f64.sqrt()).abs() < 1e-12 && phi[1].abs() < 1e-12 && (phi[0] + phi[2]).abs() < 1e-12);
        assert_eq!(standardise(&[7.0; 3]), [0.0; 3]);
        let extreme = standardise(&[f64::MAX, f64::MIN, 0.0]);
        assert!(extreme.iter().all(|p| p.is_finite()));
    }

    #[test]
    fn the_default_mean_starts_at_the_neyman_allocation() {
        let given = DatumFeatures { losses: &[1.0; 3], variances: &[1.0, 4.0, 9.0], ..Default::default() };
        let beta = MeanModel::Variance.start(1.0, 1.0).unwrap();
        let mean = MeanModel::Variance.design(&given).unwrap().mean(&beta);
        assert!(mean.iter().zip([0.5, 1.0, 1.5]).all(|(a, b)| (a - b).abs() < 1e-12), "{mean:?}");
        let nothing = DatumFeatures { variances: &[0.0; 3], ..given };
        assert_eq!(MeanModel::Variance.design(&nothing).unwrap().mean(&beta), [1.0; 3]);
    }

    #[test]
    fn ranks_follow_the_order_of_the_losses() {
        let losses = [5.0, 1.0, 3.0, 2.0, 4.0];
        let beta = [10.0, 20.0, 30.0, 40.0, 70.0];
        let design = MeanModel::Ranks(5).design(&features(&losses)).unwrap();
        assert_eq!(design.mean(&beta), [70.0, 10.0, 30.0, 20.0, 40.0]);
        // five examples interpolate between three coefficients
        let design = MeanModel::Ranks(3).design(&features(&losses)).unwrap();
        assert_eq!(design.mean(&[0.0, 10.0, 40.0]), [40.0, 0.0, 10.0, 5.0, 25.0]);
        assert_eq!(design.transpose_mul(&[1.0; 5]), [1.5, 2.0, 1.5]);
        assert_eq!(MeanModel::Ranks(4).design(&features(&losses[..1])).unwrap().mean(&[7.0, 8.0, 9.0, 10.0]), [7.0]);
    }

    #[test]
    fn the_mean_is_linear_in_the_user_features() {
        let losses = [1.0, 2.0];
        let values = [1.0, 0.0, 0.5, 2.0];
        let extra = Some(Embeddings::new(&values, 2).unwrap());
        let given = DatumFeatures { losses: &losses, variances: &[1.0; 2], extra, ..Default::default() };
        assert_eq!(MeanModel::Features(2).design(&given).unwrap().mean(&[1.0, 2.0, 3.0]), [3.0, 8.0]);
        let message = |r: Result<Design, Error>| r.err().unwrap().to_string();
        assert!(message(MeanModel::Features(3).design(&given)).contains("2 entries where 3"));
        assert!(message(MeanModel::Features(2).design(&features(&losses))).contains("allocation features"));
        let counts = [MeanModel::Loss, MeanModel::Variance, MeanModel::Ranks(2), MeanModel::Features(2)];
        assert_eq!(counts.map(MeanModel::coefficients), [2, 3, 2, 3]);
        assert_eq!(MeanModel::Ranks(2).start(1.0, 0.0).unwrap(), [1.0, 1.0]);
        assert!(MeanModel::Features(0).start(1.0, 0.0).is_err() && MeanModel::Ranks(1).start(1.0, 0.0).is_err());
    }
}
