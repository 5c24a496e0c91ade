//! The hash of a counter: value i of the stream that two words name, in native arithmetic.
//!
//! Devices compute the same in Burn's operations and in their kernel (`counter`, `cubecl`).

/// Factor of the index, 2³²/golden ratio: it spreads the indices of a stream over all 32 bits.
pub(super) const INDEX_FACTOR: u32 = 0x9e37_79b9;

/// The two words of a stream's id.
pub(super) fn halves(id: u64) -> [u32; 2] {
    [id as u32, (id >> 32) as u32]
}

/// Hashes the index `i` with three rounds x ← x(2x + 1) modulo 2³².
///
/// The round is the quadratic permutation of the RC6 cipher (Rivest et al. 1998). It is the
/// non-linear part of a hash that does without exclusive or. Between rounds, the upper half of the
/// bits is added to the lower half: a product carries every bit into those above it. After the
/// first round, the second word of the id is added. The top bits of the result mix best.
#[inline(always)]
pub(super) fn hash_of(i: u32, [low, high]: [u32; 2]) -> u32 {
    let round = |x: u32| x.wrapping_mul(x.wrapping_mul(2).wrapping_add(1));
    let fold = |x: u32| x.wrapping_add(x >> 16);
    let x = round(i.wrapping_mul(INDEX_FACTOR).wrapping_add(low));
    round(fold(round(fold(x).wrapping_add(high))))
}
