//! What a module at a site takes besides its parameters.

use burn::backend::Autodiff;
use burn::prelude::*;

use crate::batch::Rows;
use crate::lift::Lift;

/// The input of a [module](super::Probe::module) at a site: tensors, none of which is
/// differentiated.
///
/// Implemented for tensors of any rank and kind, options, tuples of up to four, and `()`. The first
/// axis of every tensor is its rows, or 1 for what does not depend on the example.
pub trait ModuleInput<B: Backend>: Lift<Autodiff<B>> {
    /// Calls `visit` with the shape of every tensor.
    fn shapes(&self, visit: &mut dyn FnMut(&[usize]));

    /// Returns rows `index[0], index[1], …` of every tensor that has `rows` of them; others stay as
    /// they are.
    fn gather(self, rows: usize, index: &[usize]) -> Self;
}

macro_rules! input_of_tensors {
    ($([$($kind:ty)?])+) => {$(
        impl<B: Backend, const D: usize> ModuleInput<B> for Tensor<B, D $(, $kind)?> {
            fn shapes(&self, visit: &mut dyn FnMut(&[usize])) {
                visit(&self.dims());
            }

            fn gather(self, rows: usize, index: &[usize]) -> Self {
                if self.dims()[0] == rows { self.rows(index) } else { self }
            }
        }
    )+};
}
input_of_tensors!([][Int][Bool]);

impl<B: Backend> ModuleInput<B> for () {
    fn shapes(&self, _: &mut dyn FnMut(&[usize])) {}

    fn gather(self, _: usize, _: &[usize]) {}
}

impl<B: Backend, I: ModuleInput<B>> ModuleInput<B> for Option<I> {
    fn shapes(&self, visit: &mut dyn FnMut(&[usize])) {
        if let Some(input) = self {
            input.shapes(visit);
        }
    }

    fn gather(self, rows: usize, index: &[usize]) -> Self {
        self.map(|input| input.gather(rows, index))
    }
}

macro_rules! input_of_tuples {
    ($($part:ident),+) => {
        #[allow(non_snake_case)]
        impl<Back: Backend, $($part: ModuleInput<Back>),+> ModuleInput<Back> for ($($part,)+) {
            fn shapes(&self, visit: &mut dyn FnMut(&[usize])) {
                let ($($part,)+) = self;
                $($part.shapes(visit);)+
            }

            fn gather(self, rows: usize, index: &[usize]) -> Self {
                let ($($part,)+) = self;
                ($($part.gather(rows, index),)+)
            }
        }
    };
}
input_of_tuples!(A, B);
input_of_tuples!(A, B, C);
input_of_tuples!(A, B, C, D);

#[cfg(test)]
mod tests {
    use super::*;
    use burn::backend::Flex;

    /// Every part is seen, and gathered where it has the number of rows that is asked for.
    #[test]
    fn every_part_is_seen_and_gathered() {
        let device = Default::default();
        let x = Tensor::<Flex, 2>::from_floats([[1.0], [2.0]], &device);
        let mask = Tensor::<Flex, 2, Bool>::from_data([[true], [false]], &device);
        let shared = Tensor::<Flex, 3, Int>::from_ints([[[7, 8]]], &device);
        let input = (x, Some(mask), (None::<Tensor<Flex, 1>>, ()), shared);
        let mut shapes = vec![];
        input.shapes(&mut |shape| shapes.push(shape.to_vec()));
        assert_eq!(shapes, [vec![2, 1], vec![2, 1], vec![1, 1, 2]]);
        let (x, mask, (none, ()), shared) = Lift::<Autodiff<Flex>>::lift(input.gather(2, &[1, 0, 1]));
        assert_eq!(x.inner().into_data().to_vec::<f32>().unwrap(), [2.0, 1.0, 2.0]);
        assert_eq!(mask.unwrap().inner().into_data().iter::<bool>().collect::<Vec<_>>(), [false, true, false]);
        assert!(none.is_none());
        assert_eq!(shared.inner().dims(), [1, 1, 2]);
    }
}
