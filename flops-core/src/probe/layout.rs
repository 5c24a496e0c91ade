//! How the coordinates of a site's output lie, and which of its tokens are alike.

use burn::prelude::*;

use crate::ops;

/// The coordinates of a row of a site: `[outer, tokens, inner]`, of which tokens from `apart` on are
/// alike.
///
/// Tokens that are alike are one *group*; each of the others is a group of its own. A site has
/// outer · groups · inner *shared coordinates*.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    outer: usize,
    tokens: usize,
    apart: usize,
    inner: usize,
}

impl Layout {
    /// The layout of an output of this shape; `alike` is the number of tokens that stay apart.
    ///
    /// Of three axes the second is the tokens, `[rows, tokens, d]`. Of four the last two are,
    /// `[rows, channels, height, width]`, unless a token mask covers the second.
    pub fn new(shape: &[usize], alike: Option<usize>, masked: bool) -> Self {
        let all: usize = shape.get(1..).map_or(1, |axes| axes.iter().product());
        if masked {
            let tokens = shape[1];
            let apart = alike.map_or(tokens, |apart| apart.min(tokens));
            return Self { outer: 1, tokens, apart, inner: all / tokens.max(1) };
        }
        match (alike, shape) {
            (Some(apart), &[_, tokens, inner]) if apart < tokens => Self { outer: 1, tokens, apart, inner },
            (Some(apart), &[_, outer, height, width]) if apart < height * width => {
                Self { outer, tokens: height * width, apart, inner: 1 }
            }
            (None, &[_, tokens, inner]) => Self { outer: 1, tokens, apart: tokens, inner },
            _ => Self { outer: 1, tokens: 1, apart: 1, inner: all },
        }
    }

    /// Perturbed coordinates of a row.
    pub fn len(&self) -> usize {
        self.outer * self.tokens * self.inner
    }

    /// Groups of tokens.
    pub fn groups(&self) -> usize {
        self.apart + usize::from(self.apart < self.tokens)
    }

    /// Shared coordinates of a row.
    pub fn shared(&self) -> usize {
        self.outer * self.groups() * self.inner
    }

    /// Whether there are fewer shared coordinates than coordinates.
    pub fn is_shared(&self) -> bool {
        self.apart + 1 < self.tokens
    }

    /// The tokens of each group; with a mask, those that are real.
    pub fn counts(&self, mask: Option<&[bool]>) -> Vec<f32> {
        let mut counts = vec![0.0; self.groups()];
        for token in 0..self.tokens {
            if mask.is_none_or(|mask| mask[token]) {
                counts[token.min(self.apart)] += 1.0;
            }
        }
        counts
    }

    /// Calls `visit` with the range of each token's coordinates, the range of its shared ones, and
    /// its number.
    fn for_each(&self, mut visit: impl FnMut(usize, usize, usize)) {
        let groups = self.groups();
        for outer in 0..self.outer {
            for token in 0..self.tokens {
                let group = token.min(self.apart);
                visit((outer * self.tokens + token) * self.inner, (outer * groups + group) * self.inner, token);
            }
        }
    }

    /// Adds the shared values to those of every token of their group, but for masked tokens.
    pub fn add_shared(&self, shared: &[f32], mask: Option<&[bool]>, values: &mut [f32]) {
        let inner = self.inner;
        self.for_each(|at, from, token| {
            if mask.is_none_or(|mask| mask[token]) {
                values[at..at + inner].iter_mut().zip(&shared[from..from + inner]).for_each(|(v, s)| *v += s);
            }
        });
    }

    /// Sums the values of the tokens of each group, but for masked tokens, into `sums`.
    pub fn sum_groups(&self, values: &[f32], mask: Option<&[bool]>, sums: &mut [f32]) {
        let inner = self.inner;
        self.for_each(|at, to, token| {
            if mask.is_none_or(|mask| mask[token]) {
                sums[to..to + inner].iter_mut().zip(&values[at..at + inner]).for_each(|(s, v)| *s += v);
            }
        });
    }

    /// Divides the shared values by the tokens of their group; those of an empty group become 0.
    pub fn divide(&self, counts: &[f32], shared: &mut [f32]) {
        let inner = self.inner.max(1);
        for (i, values) in shared.chunks_exact_mut(inner).enumerate() {
            let count = counts[i % counts.len().max(1)];
            let factor = if count > 0.0 { 1.0 / count } else { 0.0 };
            values.iter_mut().for_each(|v| *v *= factor);
        }
    }

    /// [`divide`](Self::divide), of values of one's own.
    pub fn divided(&self, counts: &[f32], mut shared: Vec<f32>) -> Vec<f32> {
        self.divide(counts, &mut shared);
        shared
    }

    /// Shared values, repeated for every token of their group.
    ///
    /// # Shapes
    /// - shared: `[rows, shared]`
    /// - returns: `[rows, coordinates]`
    pub fn expand<B: Backend>(&self, shared: Vec<f32>, rows: usize, device: &B::Device) -> Tensor<B, 2> {
        if ops::is_host::<B>(device) || !self.is_shared() {
            let mut values = vec![0f32; rows * self.len()];
            let each = values.chunks_exact_mut(self.len().max(1)).zip(shared.chunks_exact(self.shared().max(1)));
            each.for_each(|(values, shared)| self.add_shared(shared, None, values));
            return ops::from_host(values, [rows, self.len()], device);
        }
        let [outer, apart, inner] = [self.outer, self.apart, self.inner];
        let shared: Tensor<B, 4> = ops::from_host(shared, [rows, outer, self.groups(), inner], device);
        let alike = shared.clone().narrow(2, apart, 1).expand([rows, outer, self.tokens - apart, inner]);
        let parts = if apart > 0 { vec![shared.narrow(2, 0, apart), alike] } else { vec![alike] };
        Tensor::cat(parts, 2).reshape([rows, self.len()])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::backend::Flex;

    /// A class token and three patches of two values.
    const TOKENS: [usize; 3] = [9, 4, 2];

    #[test]
    fn tokens_that_are_alike_share_their_coordinates() {
        let alike = Layout::new(&TOKENS, Some(1), false);
        assert_eq!((alike.len(), alike.shared(), alike.groups(), alike.is_shared()), (8, 4, 2, true));
        let mut values = vec![0.0; 8];
        alike.add_shared(&[1.0, 2.0, 3.0, 4.0], Some(&[true, true, false, true]), &mut values);
        assert_eq!(values, [1.0, 2.0, 3.0, 4.0, 0.0, 0.0, 3.0, 4.0]);
        let mut sums = vec![0.0; 4];
        alike.sum_groups(&values, None, &mut sums);
        assert_eq!(sums, [1.0, 2.0, 6.0, 8.0]);
        alike.divide(&alike.counts(Some(&[true, true, false, true])), &mut sums);
        assert_eq!(sums, [1.0, 2.0, 3.0, 4.0]);
        alike.divide(&[0.0, 1.0], &mut sums);
        assert_eq!(sums, [0.0, 0.0, 3.0, 4.0], "an empty group");
    }

    #[test]
    fn pixels_of_a_channel_are_alike() {
        let pixels = Layout::new(&[1, 2, 1, 3], Some(0), false);
        assert_eq!((pixels.len(), pixels.shared()), (6, 2));
        let mut values = vec![0.0; 6];
        pixels.add_shared(&[1.0, 2.0], None, &mut values);
        assert_eq!(values, [1.0, 1.0, 1.0, 2.0, 2.0, 2.0]);
        let mut sums = vec![0.0; 2];
        pixels.sum_groups(&values, None, &mut sums);
        assert_eq!(sums, [3.0, 6.0]);
    }

    /// Nothing is shared without a declaration, with no more than one token that is alike, or with
    /// more tokens apart than there are.
    #[test]
    fn other_outputs_share_nothing() {
        for (shape, alike) in
            [(&TOKENS[..], None), (&TOKENS, Some(3)), (&TOKENS, Some(4)), (&[2, 8][..], Some(0)), (&[2, 2, 2, 2], None)]
        {
            let layout = Layout::new(shape, alike, false);
            assert_eq!((layout.len(), layout.shared(), layout.is_shared()), (8, 8, false), "{shape:?}, {alike:?}");
        }
    }

    /// The host's own loop and the operations of other backends agree.
    #[test]
    fn shared_values_are_expanded_alike_on_every_backend() {
        for (shape, alike) in [([2, 5, 3].to_vec(), 2), ([2, 4, 2].to_vec(), 0), ([2, 3, 2, 2].to_vec(), 1)] {
            let layout = Layout::new(&shape, Some(alike), false);
            let shared: Vec<f32> = (0..2 * layout.shared()).map(|i| i as f32).collect();
            let host = layout.expand::<Flex>(shared.clone(), 2, &Default::default()).into_data();
            let mut expected = vec![0.0; 2 * layout.len()];
            for (values, shared) in expected.chunks_mut(layout.len()).zip(shared.chunks(layout.shared())) {
                layout.add_shared(shared, None, values);
            }
            assert_eq!(host.to_vec::<f32>().unwrap(), expected);
        }
    }
}
