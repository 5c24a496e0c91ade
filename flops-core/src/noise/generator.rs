//! The generators of a stream on the host.

use rand::SeedableRng;
use rand_xoshiro::Xoshiro256PlusPlus;

use super::gaussian::Gaussian;

/// What the laws draw from: words, and Gaussian values.
pub(super) struct Generator {
    pub rng: Xoshiro256PlusPlus,
    pub gaussian: Gaussian,
}

impl Generator {
    pub fn new(seed: u64) -> Self {
        Self { rng: Xoshiro256PlusPlus::seed_from_u64(seed), gaussian: Gaussian::new(seed) }
    }
}
