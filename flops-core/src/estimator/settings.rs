//! The settings of an estimate.

use burn::module::Module;
use burn::prelude::*;
use serde::{Deserialize, Serialize};

use super::space::Space;
use crate::error::Error;
use crate::noise::{NoiseLaw, Placement, Sampling};
use crate::parallel::is_on_gpu;

/// A perturbation space, a noise law, and the limits a machine sets.
///
/// # Example
/// A gradient by hand, for research; training uses [`ForwardLearner`](crate::ForwardLearner).
/// ```
/// # use burn::{backend::{Autodiff, Flex}, module::AutodiffModule, nn, prelude::*};
/// # use flops_core::prelude::*;
/// # use flops_core::estimator::{Estimator, trained_parameters};
/// # #[derive(Module, Debug)]
/// # struct Model<B: Backend> { fc: nn::Linear<B> }
/// # impl<B: Backend> ForwardModel<B> for Model<B> {
/// #     type Input = Tensor<B, 2>; type Target = Tensor<B, 1, Int>; type Output = Tensor<B, 2>;
/// #     fn forward(&self, x: Tensor<B, 2>, probe: &mut Probe<B>) -> Tensor<B, 2> {
/// #         probe.linear(&self.fc, x)
/// #     }
/// #     fn losses(&self, y: Tensor<B, 2>, t: Tensor<B, 1, Int>) -> Tensor<B, 1> {
/// #         cross_entropy(y, t)
/// #     }
/// # }
/// # let device = Default::default();
/// # let with_graph = Model::<Autodiff<Flex>> { fc: nn::LinearConfig::new(4, 3).init(&device) };
/// let trained = trained_parameters(&with_graph);
/// let model = with_graph.valid();
/// let (input, target) = (Tensor::ones([2, 4], &device), Tensor::zeros([2], &device));
/// let batch = Batch { ids: vec![0, 1], input, target };
/// let estimator = Estimator::new(Space::activation());
/// let clean = estimator.clean(&model, &batch, &trained)?;
/// let step = 0; // keys the noise
/// let estimate = clean.estimate(&Allocation::uniform(2, &QueryBudget::new(20, 1)?), step)?;
/// assert_eq!(estimate.gradient(&model.fc.weight).unwrap().dims(), [4, 3]);
/// # Ok::<(), flops_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Estimator {
    /// Where the noise falls.
    pub space: Space,
    /// Law of the noise.
    pub noise: NoiseLaw,
    /// One-sided or antithetic.
    pub sampling: Sampling,
    /// Smoothing scale σ > 0: standard deviation of the perturbation, in units of what is
    /// perturbed.
    pub sigma: f64,
    /// Seed of the noise.
    pub seed: u64,
    /// Rows of a forward pass at most, at least 2: it bounds the memory.
    ///
    /// On a CPU a pass has fewer rows where the outputs of its layers would not fit the cache.
    pub max_rows: usize,
    /// Threads that evaluate chunks of queries, at least 1. The result does not depend on it. A browser
    /// has one, whatever it says.
    pub threads: usize,
    /// Leaves, the contiguous parts that the examples of a batch are cut into: a power of two up to
    /// 1,024, at least the number of workers of an [executor](crate::Executor), otherwise 1.
    ///
    /// No pass holds examples of two leaves, and sums follow the binary tree over the leaves. So they
    /// change the rounding of a result, and nothing else changes it: not the number of workers, nor of
    /// threads.
    #[serde(default = "one")]
    pub leaves: usize,
}

impl Estimator {
    /// Rademacher signs, one-sided, σ = 10⁻², 256 rows, one thread.
    ///
    /// One-sided sampling was picked by measurement (`docs/results.md`). Signs, Gaussian and uniform noise
    /// showed no difference there, and signs are the cheapest to draw.
    #[must_use]
    pub fn new(space: Space) -> Self {
        Self {
            space,
            noise: NoiseLaw::Rademacher,
            sampling: Sampling::OneSided,
            sigma: 1e-2,
            seed: 0,
            max_rows: 256,
            threads: 1,
            leaves: 1,
        }
    }

    /// Whether the settings are usable.
    ///
    /// # Errors
    /// [`Error::Setting`], naming the setting at fault.
    pub fn validate(&self) -> Result<(), Error> {
        let fail = |name, value: f64, remedy: &str| Err(Error::Setting { name, value, remedy: remedy.into() });
        if !(self.sigma.is_finite() && self.sigma > 0.0) {
            return fail("sigma", self.sigma, "use a positive number, such as 0.01");
        }
        if self.max_rows < 2 {
            return fail("max_rows", self.max_rows as f64, "use at least 2, the rows of an antithetic pair");
        }
        if self.threads == 0 {
            return fail("threads", 0.0, "use at least 1");
        }
        if !(self.leaves.is_power_of_two() && self.leaves <= 1024) {
            return fail("leaves", self.leaves as f64, "use a power of two from 1 to 1024");
        }
        if matches!(self.space, Space::LowRank { rank: 0, .. }) {
            return fail("rank", 0.0, "use at least 1");
        }
        self.space.subspace().validate()
    }

    /// E s² of a perturbed coordinate.
    pub(super) fn score_second_moment(&self) -> f64 {
        // products of entries have no usable score: noise of low rank is taken as it is
        if matches!(self.space, Space::LowRank { .. }) { 1.0 } else { self.noise.score_second_moment() }
    }

    /// Rows of a pass over the examples themselves: all of `max_rows` on a GPU, a fraction on a
    /// CPU.
    ///
    /// On a CPU the chunks of a batch go to several threads.
    pub(crate) fn clean_rows<B: Backend, M: Module<B>>(&self, model: &M) -> usize {
        if is_on_gpu::<B, M>(model) { self.max_rows } else { (self.max_rows / 8).max(8).min(self.max_rows) }
    }

    /// Whether a direction falls on one site alone.
    pub(super) fn is_single_site(&self) -> bool {
        self.space.placement().is_some_and(Placement::is_single_site)
    }
}

/// The leaves of settings that were written without any.
fn one() -> usize {
    1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::estimator::Subspace;

    /// Noise of low rank is taken as it is, whatever the law of its entries.
    #[test]
    fn the_second_moment_of_the_score_is_that_of_the_law_outside_of_low_rank() {
        let of = |space| Estimator { noise: NoiseLaw::Laplace, ..Estimator::new(space) }.score_second_moment();
        assert_eq!(Space::ALL.map(of), [2.0, 2.0, 1.0]);
    }

    #[test]
    fn errors_name_the_setting() {
        let weights = || Estimator::new(Space::weights());
        let in_subspace = |subspace| Estimator::new(Space::weights().with_subspace(subspace).unwrap());
        for (estimator, name) in [
            (Estimator { sigma: 0.0, ..weights() }, "sigma"),
            (Estimator { sigma: f64::NAN, ..weights() }, "sigma"),
            (Estimator { sigma: -1.0, ..weights() }, "sigma"),
            (Estimator { max_rows: 1, ..weights() }, "max_rows"),
            (Estimator { threads: 0, ..weights() }, "threads"),
            (Estimator { leaves: 0, ..weights() }, "leaves"),
            (Estimator { leaves: 6, ..weights() }, "leaves"),
            (Estimator { leaves: 2048, ..weights() }, "leaves"),
            (Estimator::new(Space::low_rank(0)), "rank"),
            (in_subspace(Subspace::Random { rank: 0, period: 1 }), "rank of the subspace"),
            (in_subspace(Subspace::Orthonormal { rank: 1, period: 0 }), "period of the subspace"),
        ] {
            assert!(estimator.validate().unwrap_err().to_string().contains(name));
        }
    }
}
