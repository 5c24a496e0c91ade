//! Random numbers that are functions of a key alone.

use rand::SeedableRng;
use rand::rngs::StdRng;

/// Returns a generator that is a function of its key alone.
///
/// What was drawn elsewhere, and on which thread, does not matter.
///
/// # Example
/// ```
/// use flops_core::random::keyed_rng;
/// use rand::RngExt;
///
/// let draw = |key| keyed_rng(key).random::<u64>();
/// assert_eq!(draw([7, 0, 0, 0]), draw([7, 0, 0, 0]));
/// assert_ne!(draw([7, 0, 0, 0]), draw([7, 1, 0, 0]));
/// ```
pub fn keyed_rng(key: [u64; 4]) -> StdRng {
    let mut seed = [0u8; 32];
    for (bytes, word) in seed.chunks_exact_mut(8).zip(key) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    StdRng::from_seed(seed)
}

/// Derives a seed from several numbers; a change of any one gives an unrelated seed.
///
/// The finaliser of SplitMix64 (Steele, Lea and Flood 2014), chained over `parts`.
pub fn derive_seed(parts: &[u64]) -> u64 {
    parts.iter().fold(0x9e37_79b9_7f4a_7c15, |h, &p| {
        let mut z = (h ^ p).wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    })
}
