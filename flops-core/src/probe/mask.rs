//! Which tokens of each row are real, and what that does to noise and gradients.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use burn::prelude::*;

use super::layer::SquaredScoreNorm;
use super::rows::QueryRows;
use crate::error::Error;
use crate::ops;

/// A token mask: 1 at a real token, 0 at padding.
///
/// Sites whose output is `[rows, tokens, …]`, with as many tokens, follow it.
#[derive(Clone, Debug)]
pub(crate) struct TokenMask<B: Backend> {
    /// `[rows, tokens]`, or `[1, tokens]` for all rows; in the precision of noise.
    values: Tensor<B, 2>,
    /// The same on the host, once it is asked for. Clones share it.
    host: Arc<OnceLock<Vec<bool>>>,
}

impl<B: Backend> TokenMask<B> {
    /// A mask whose tokens are real where `mask` is not 0.
    pub fn new(mask: Tensor<B, 2, Int>) -> Self {
        let values = mask.not_equal_elem(0).float().cast(ops::accum_dtype::<B>());
        Self { values, host: Arc::default() }
    }

    /// The same mask on another device.
    pub fn on(self, device: &B::Device) -> Self {
        Self { values: self.values.to_device(device), host: self.host }
    }

    /// The mask with one row per query.
    pub fn repeat(self, rows: &QueryRows) -> Self {
        Self { values: rows.repeat(self.values), host: Arc::default() }
    }

    fn tokens(&self) -> usize {
        self.values.dims()[1]
    }

    /// Whether an output of this shape has the tokens of the mask, as its second of three or more
    /// axes.
    pub fn covers(&self, shape: &[usize]) -> bool {
        shape.len() >= 3 && shape[1] == self.tokens()
    }

    /// `x`, 0 at the coordinates of masked tokens.
    ///
    /// # Shapes
    /// - x: `[rows, coordinates]`; the result has the same shape
    pub fn apply(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        let ([rows, coordinates], [given, tokens]) = (x.dims(), self.values.dims());
        let x: Tensor<B, 3> = x.reshape([rows, tokens, coordinates / tokens.max(1)]);
        (x * self.values.clone().reshape([given, tokens, 1])).reshape([rows, coordinates])
    }

    /// The mask on the host, `[rows, tokens]` or `[1, tokens]`; a device is waited for once.
    fn on_host(&self) -> &[bool] {
        self.host.get_or_init(|| self.values.to_data().iter::<f32>().map(|v| v != 0.0).collect())
    }

    /// The mask of `rows` rows on the host, `[rows, tokens]`.
    pub fn of_rows(&self, rows: usize) -> Vec<bool> {
        let host = self.on_host();
        if self.values.dims()[0] == 1 { host.repeat(rows) } else { host.to_vec() }
    }

    /// The coordinates of real tokens among `len` coordinates of a row, counted from `start` on.
    ///
    /// They come as runs of neighbours. A row has `coordinates` of them in all, token by token.
    pub fn real_runs(&self, row: usize, coordinates: usize, start: usize, len: usize) -> Vec<Range<usize>> {
        let tokens = self.tokens();
        let width = coordinates / tokens.max(1);
        let row = if self.values.dims()[0] == 1 { 0 } else { row };
        let (of_row, mut runs) = (&self.on_host()[row * tokens..(row + 1) * tokens], Vec::<Range<usize>>::new());
        let (first, behind) = (start / width.max(1), (start + len).div_ceil(width.max(1)).min(tokens));
        for (token, _) in of_row.iter().enumerate().take(behind).skip(first).filter(|(_, real)| **real) {
            // within the block, counted from its first coordinate
            let from = (token * width).max(start);
            let to = ((token + 1) * width).min(start + len);
            match runs.last_mut() {
                _ if from >= to => {}
                Some(last) if last.end == from - start => last.end = to - start,
                _ => runs.push(from - start..to - start),
            }
        }
        runs
    }

    /// The norm of each row, summed over its real tokens alone.
    ///
    /// What does not depend on the row falls on all tokens alike.
    ///
    /// # Shapes
    /// - squares of the norm: `[rows or 1, tokens · parts]`, token by token; those of the result
    ///   `[rows or 1, 1]`
    ///
    /// # Errors
    /// [`Error::NormByToken`], where the norm does not say how it is spread over the tokens.
    pub fn norm(&self, norm: SquaredScoreNorm<B>) -> Result<SquaredScoreNorm<B>, Error> {
        let tokens = self.tokens();
        let constant = norm.constant / tokens.max(1) as f64;
        let by_token = match norm.squares {
            Some(squares) => {
                let [rows, parts] = squares.dims();
                if parts == 0 || !parts.is_multiple_of(tokens) {
                    return Err(Error::NormByToken { got: parts, expected: tokens });
                }
                // further axes of an output lie within its tokens
                let parts: Tensor<B, 3> = squares.reshape([rows, tokens, parts / tokens]);
                parts.sum_dim(2).reshape([rows, tokens]) * norm.factor + constant
            }
            None => self.values.ones_like() * constant,
        };
        let squares = (by_token * self.values.clone()).sum_dim(1);
        Ok(SquaredScoreNorm { squares: Some(squares), factor: 1.0, constant: 0.0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::backend::Flex;

    /// Outputs of four axes give several parts a token.
    #[test]
    fn a_norm_is_summed_over_the_parts_of_real_tokens() {
        let device = Default::default();
        let mask = TokenMask::<Flex>::new(Tensor::from_ints([[1, 0], [1, 1]], &device));
        let squares = Tensor::from_floats([[1.0, 2.0, 4.0, 8.0], [1.0, 2.0, 4.0, 8.0]], &device);
        let norm = mask.norm(SquaredScoreNorm { squares: Some(squares), factor: 10.0, constant: 6.0 }).unwrap();
        assert_eq!(norm.squares.unwrap().into_data().to_vec::<f32>().unwrap(), [33.0, 156.0]);
        for parts in [3, 0] {
            let squares = Some(Tensor::zeros([2, parts], &device));
            let error = mask.norm(SquaredScoreNorm { squares, factor: 1.0, constant: 0.0 }).map(drop).unwrap_err();
            assert_eq!(error, Error::NormByToken { got: parts, expected: 2 });
        }
    }

    #[test]
    fn runs_are_the_coordinates_of_real_tokens_in_any_block() {
        let mask = TokenMask::<Flex>::new(Tensor::from_ints([[1, 1, 0, 1], [0, 0, 0, 0]], &Default::default()));
        let real = [0, 1, 2, 3, 6, 7]; // of two coordinates a token
        for (start, len) in [(0, 8), (0, 3), (3, 5), (1, 6), (4, 2), (8, 0)] {
            let runs = mask.real_runs(0, 8, start, len);
            let found: Vec<usize> = runs.iter().flat_map(|r| r.clone().map(|i| start + i)).collect();
            let expected: Vec<usize> = real.iter().copied().filter(|i| (start..start + len).contains(i)).collect();
            assert_eq!(found, expected, "{len} coordinates from {start} on");
            assert!(mask.real_runs(1, 8, start, len).is_empty());
        }
        assert_eq!(mask.real_runs(0, 8, 0, 8), [0..4, 6..8], "neighbours are one run");
    }
}
