//! Values on a backend with automatic differentiation: batches for backpropagation, inputs of modules.

use burn::prelude::*;
use burn::tensor::backend::AutodiffBackend;

/// What has a form on a backend with automatic differentiation: the same values, as constants of a graph.
///
/// Implemented for tensors of any rank and kind, vectors of what holds no tensors, options, tuples of up to
/// eight and `()`. A struct of those that is generic over a backend derives it, as it does
/// [`Rows`](crate::Rows).
pub trait Lift<B: AutodiffBackend>: Clone + Send + 'static {
    /// The same on `B`.
    type Lifted;

    /// Returns the same values on `B`.
    fn lift(self) -> Self::Lifted;
}

macro_rules! lift_of_tensors {
    ($([$($kind:ty)?])+) => {$(
        impl<B: AutodiffBackend, const D: usize> Lift<B> for Tensor<B::InnerBackend, D $(, $kind)?> {
            type Lifted = Tensor<B, D $(, $kind)?>;

            fn lift(self) -> Self::Lifted {
                Tensor::from_inner(self)
            }
        }
    )+};
}
lift_of_tensors!([][Int][Bool]);

impl<B: AutodiffBackend> Lift<B> for () {
    type Lifted = ();

    fn lift(self) {}
}

impl<B: AutodiffBackend, T: Clone + Send + 'static> Lift<B> for Vec<T> {
    type Lifted = Self;

    fn lift(self) -> Self {
        self
    }
}

impl<B: AutodiffBackend, T: Lift<B>> Lift<B> for Option<T> {
    type Lifted = Option<T::Lifted>;

    fn lift(self) -> Self::Lifted {
        self.map(T::lift)
    }
}

macro_rules! lift_of_tuples {
    ($($part:ident),+) => {
        #[allow(non_snake_case)]
        impl<Back: AutodiffBackend, $($part: Lift<Back>),+> Lift<Back> for ($($part,)+) {
            type Lifted = ($($part::Lifted,)+);

            fn lift(self) -> Self::Lifted {
                let ($($part,)+) = self;
                ($($part.lift(),)+)
            }
        }
    };
}
lift_of_tuples!(A, B);
lift_of_tuples!(A, B, C);
lift_of_tuples!(A, B, C, D);
lift_of_tuples!(A, B, C, D, E);
lift_of_tuples!(A, B, C, D, E, F);
lift_of_tuples!(A, B, C, D, E, F, G);
lift_of_tuples!(A, B, C, D, E, F, G, H);
