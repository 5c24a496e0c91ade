//! A site of a recorded pass.

use burn::prelude::*;

use super::gradients::Gradients;
use super::layer::{Site, SquaredScoreNorm};
use super::layout::Layout;
use super::mask::TokenMask;
use crate::error::Error;

/// A site of a recorded pass.
pub(crate) struct Recorded<B: Backend> {
    pub site: Box<dyn Site<B>>,
    /// Rows of the output: 1 where it does not depend on the input.
    pub rows: usize,
    /// Perturbed coordinates of a row.
    pub coordinates: usize,
    /// The second axis of an output of three or more.
    pub tokens: Option<usize>,
    /// The token mask that the output follows, a row for each recorded example or one for all.
    pub mask: Option<TokenMask<B>>,
    /// How its coordinates lie.
    pub layout: Layout,
    pub device: B::Device,
}

impl<B: Backend> Recorded<B> {
    /// Adds the gradients of Σ ⟨g, y⟩ over the real tokens.
    ///
    /// Examples that share a single row of the output share its derivative: their g are summed
    /// first.
    ///
    /// # Shapes
    /// - g: `[examples, coordinates]`
    pub fn backward(&self, g: Tensor<B, 2>, gradients: &mut Gradients<B>) {
        let g = match &self.mask {
            Some(mask) => mask.apply(g),
            None => g,
        };
        let g = if self.rows == 1 && g.dims()[0] > 1 { g.sum_dim(0) } else { g };
        self.site.backward(g, gradients);
    }

    /// The squared score norms of `examples` examples, over their real tokens.
    ///
    /// # Shapes
    /// - squares of the norm: `[examples, 1]`
    ///
    /// # Errors
    /// [`Error::Length`], where the site gives another number of them than it has rows.
    /// [`Error::NormByToken`], where it does not give them by token, and a mask asks for that.
    pub fn squared_score_norm(&self, examples: usize) -> Result<SquaredScoreNorm<B>, Error> {
        let mut norm = self.site.squared_score_norm();
        if let Some(got) = norm.squares.as_ref().map(|squares| squares.dims()[0])
            && got != self.rows
        {
            return Err(Error::Length { name: "squared score norms of a site", got, expected: self.rows });
        }
        if let Some(mask) = &self.mask {
            norm = mask.norm(norm)?;
        }
        norm.squares = norm.squares.map(|squares| {
            let squares = squares.sum_dim(1);
            if squares.dims()[0] == 1 { squares.expand([examples, 1]) } else { squares }
        });
        Ok(norm)
    }
}
