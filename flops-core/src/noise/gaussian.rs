//! Gaussian values on the host, many at a time.
//!
//! Value pairs come from the Box–Muller transform of two hashes of a counter, r = √(−2 ln u) and the
//! angle 2πv. There is no rejection, and no state but the counter, so the loops run in vector
//! registers. Logarithm, sine and cosine are polynomials of this file. They use sums and products
//! alone, so values have the same bits on every processor. u and v have 24 bits: no value is beyond
//! 5.9.

use super::hash::{halves, hash_of};
use crate::random::derive_seed;

/// Pairs of a block: cosines first, then sines.
const PAIRS: usize = 16;
/// Values of a block.
const BLOCK: usize = 2 * PAIRS;
/// Blocks whose pairs a 32-bit counter numbers.
const SEGMENT: u64 = (1 << 32) / PAIRS as u64;
/// 2⁻²⁴.
const CELL: f32 = 1.0 / (1u32 << 24) as f32;

/// The Gaussian values of a stream, in order.
pub(super) struct Gaussian {
    seed: u64,
    /// Number of the next value.
    next: u64,
}

impl Gaussian {
    pub fn new(seed: u64) -> Self {
        Self { seed, next: 0 }
    }

    /// Calls `f` with each value of `out` and a draw.
    #[inline(always)]
    pub fn for_each(&mut self, out: &mut [f32], f: impl Fn(&mut f32, f32)) {
        let begun = (self.next % BLOCK as u64) as usize;
        let (head, rest) = out.split_at_mut(out.len().min((BLOCK - begun) % BLOCK));
        if !head.is_empty() {
            let values = self.block();
            head.iter_mut().zip(&values[begun..]).for_each(|(v, e)| f(v, *e));
            self.next += head.len() as u64;
        }
        let (blocks, tail) = rest.as_chunks_mut::<BLOCK>();
        for block in blocks {
            let values = self.block();
            block.iter_mut().zip(&values).for_each(|(v, e)| f(v, *e));
            self.next += BLOCK as u64;
        }
        if !tail.is_empty() {
            let values = self.block();
            tail.iter_mut().zip(&values).for_each(|(v, e)| f(v, *e));
            self.next += tail.len() as u64;
        }
    }

    /// The block that the next value lies in.
    #[inline(always)]
    fn block(&self) -> [f32; BLOCK] {
        let block = self.next / BLOCK as u64;
        let [low, high] = halves(derive_seed(&[self.seed, block / SEGMENT]));
        let first = (block % SEGMENT * PAIRS as u64) as u32;
        let mut values = [0f32; BLOCK];
        let (cosines, sines) = values.split_at_mut(PAIRS);
        for (lane, (c, s)) in cosines.iter_mut().zip(sines).enumerate() {
            let i = first + lane as u32;
            let r = minus_two_ln(hash_of(i, [low, high])).sqrt();
            let (cosine, sine) = circle(hash_of(i, [high, low]));
            (*c, *s) = (r * cosine, r * sine);
        }
        values
    }
}

/// −2 ln u, where u is the centre of the cell of (0, 1) that the top 24 bits of a hash name, rounded to
/// f32; the last one rounds to 1.
///
/// With u = 2^e·(1 + x), 1 + x in [√½, √2), it is the polynomial of Cephes' `logf` (Moshier 1989). Its
/// relative error is below 10⁻⁷.
#[inline(always)]
fn minus_two_ln(hash: u32) -> f32 {
    /// √½
    const SPLIT: u32 = 0x3f35_04f3;
    let bits = (((hash >> 8) as f32 + 0.5) * CELL).to_bits();
    let e = (bits.wrapping_sub(SPLIT) as i32) >> 23;
    let x = f32::from_bits(bits.wrapping_sub((e << 23) as u32)) - 1.0;
    let coefficients = [
        7.037_683_6e-2,
        -1.151_461e-1,
        1.167_699_84e-1,
        -1.242_014_1e-1,
        1.424_932_3e-1,
        -1.666_805_7e-1,
        2.000_071_5e-1,
        -2.499_999_4e-1,
        3.333_333e-1,
    ];
    let square = x * x;
    let cubic = coefficients.into_iter().fold(0.0, |sum, c: f32| sum * x + c) * x * square;
    // ln 2 in two parts, the first of them exact
    let e = e as f32;
    -2.0 * (x + (cubic - 0.5 * square + e * -2.121_944_4e-4) + e * 0.693_359_4)
}

/// Cosine and sine of 2πv, where v is the centre of the cell that the top 24 bits of a hash name.
///
/// The angle is a number of quarter turns, and a rest of at most an eighth of a turn. For the rest the
/// polynomials are those of Cephes' `sinf` and `cosf`. Their error is below 1.1·10⁻⁷.
#[inline(always)]
fn circle(hash: u32) -> (f32, f32) {
    const QUARTER: u32 = 1 << 22;
    let v = hash >> 8;
    let quarters = (v + QUARTER / 2) / QUARTER;
    let rest = v.wrapping_sub(quarters * QUARTER) as i32;
    let a = (rest as f32 + 0.5) * (std::f32::consts::FRAC_PI_2 / QUARTER as f32);
    let z = a * a;
    let sine = a + a * z * (-1.666_665_5e-1 + z * (8.332_161e-3 + z * -1.951_529_6e-4));
    let cosine = 1.0 - 0.5 * z + z * z * (4.166_664_6e-2 + z * (-1.388_731_6e-3 + z * 2.443_315_7e-5));
    // a quarter turn makes (c, s) into (−s, c)
    let odd = (quarters & 1).wrapping_neg();
    let (c, s) = (cosine.to_bits(), sine.to_bits());
    let (first, second) = ((c & !odd) | (s & odd), (s & !odd) | (c & odd));
    let flip = |bits: u32, quarters: u32| f32::from_bits(bits ^ ((quarters & 2) << 30));
    (flip(first, quarters + 1), flip(second, quarters))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draw(seed: u64, n: usize) -> Vec<f32> {
        let mut out = vec![0f32; n];
        Gaussian::new(seed).for_each(&mut out, |v, e| *v = e);
        out
    }

    /// Over every 64th cell, against double precision.
    #[test]
    fn logarithm_and_circle_match_double_precision() {
        for cell in (0..1u32 << 24).step_by(64).chain([(1 << 24) - 1]) {
            let hash = cell << 8;
            // the argument is rounded to f32, as the polynomial's is
            let u = f64::from((cell as f32 + 0.5) * CELL);
            let exact = -2.0 * u.ln();
            assert!((f64::from(minus_two_ln(hash)) - exact).abs() <= 1e-7 * exact.abs() + 1e-13, "{cell}");
            let angle = std::f64::consts::TAU * (f64::from(cell) + 0.5) / f64::from(1u32 << 24);
            let (c, s) = circle(hash);
            assert!(
                (f64::from(c) - angle.cos()).abs() < 1.1e-7 && (f64::from(s) - angle.sin()).abs() < 1.1e-7,
                "{cell}"
            );
        }
        assert!((minus_two_ln(0).sqrt() - 5.887).abs() < 1e-3);
    }

    /// Pieces of any lengths are the values of the whole.
    #[test]
    fn pieces_do_not_change_values() {
        let whole = draw(3, 500);
        let mut stream = Gaussian::new(3);
        let mut pieces = vec![0f32; 500];
        let mut rest = pieces.as_mut_slice();
        for length in [1, 2, 31, 32, 33, 70, 64, 5, 262] {
            let (piece, behind) = rest.split_at_mut(length);
            stream.for_each(piece, |v, e| *v = e);
            rest = behind;
        }
        assert!(rest.is_empty());
        assert_eq!(pieces, whole);
        assert_ne!(draw(4, 500), whole);
    }

    /// Behind 2³² pairs a stream goes on with other values.
    #[test]
    fn a_long_stream_does_not_repeat() {
        let at = |next| {
            let mut out = [0f32; 2 * BLOCK];
            Gaussian { seed: 3, next }.for_each(&mut out, |v, e| *v = e);
            out
        };
        let end = SEGMENT * BLOCK as u64;
        let (start, across) = (at(0), at(end - BLOCK as u64));
        assert_eq!(at(end)[..BLOCK], across[BLOCK..]);
        assert_ne!(across[BLOCK..], start[..BLOCK]);
    }

    /// n = 2²⁰ values of each of 20 streams.
    ///
    /// The moments 1 to 4, and mean products of values and of squares at lags within a block and
    /// beyond, and with the previous stream. Each is within 5.5 standard errors: there are 20·22 of
    /// them, so the rate of false failures is 2·10⁻⁵.
    #[test]
    fn values_are_independent_and_normal() {
        let n = 1 << 20;
        let root = f64::from(n as u32).sqrt();
        let mut last = draw(1000, n);
        for seed in 0..20 {
            let here = draw(seed, n);
            let mean = |of: &dyn Fn(f64) -> f64| here.iter().map(|v| of(f64::from(*v))).sum::<f64>() / n as f64;
            let small = |mean: f64, deviation: f64, what: &str| {
                assert!((mean * root / deviation).abs() < 5.5, "{what} of stream {seed}: {mean}");
            };
            // variances of x, x², x³ and x⁴ are 1, 2, 15 and 96
            small(mean(&|x| x), 1.0, "the mean");
            small(mean(&|x| x * x - 1.0), 2f64.sqrt(), "the variance");
            small(mean(&|x| x.powi(3)), 15f64.sqrt(), "the third moment");
            small(mean(&|x| x.powi(4) - 3.0), 96f64.sqrt(), "the fourth moment");
            let products = |other: &[f32], what: &str| {
                let pairs = || here.iter().zip(other).map(|(a, b)| (f64::from(*a), f64::from(*b)));
                small(pairs().map(|(a, b)| a * b).sum::<f64>() / n as f64, 1.0, what);
                let squares = pairs().map(|(a, b)| (a * a - 1.0) * (b * b - 1.0)).sum::<f64>() / n as f64;
                small(squares, 2.0, what);
            };
            for lag in [1, 2, 15, 16, 17, 32, 64, 4096] {
                products(&here[lag..], &format!("lag {lag}"));
            }
            products(&last, "the previous stream");
            last = here;
        }
    }
}
