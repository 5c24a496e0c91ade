//! Batches whose rows can be gathered, so that some examples can be evaluated more often than
//! others.

use std::sync::Arc;

use burn::prelude::*;
use burn::tensor::backend::{AutodiffBackend, DeviceId};
use burn::tensor::{BasicOps, TensorData, TensorKind};

use crate::error::Error;
use crate::lift::Lift;

/// Something with one row per example, whose rows can be gathered in any order and number.
///
/// Implemented for tensors (rows along the first axis), vectors, options, `Arc`s, tuples of up to eight
/// and `()`. An option has all its rows or none of them. A struct of those derives it. A field that all
/// rows share is marked `#[rows(shared)]`, or `#[rows(skip)]` where it stays the same on another
/// device; what a model takes or gives does not travel then ([`TRAVELS`](Self::TRAVELS)).
///
/// # Example
/// ```
/// use burn::prelude::*;
/// use flops_core::{Lift, Rows};
///
/// /// The input of a model: each example has a picture and the words under it.
/// #[derive(Clone, Debug, Rows, Lift)]
/// struct Post<B: Backend> {
///     image: Tensor<B, 4>,
///     words: Tensor<B, 2, Int>,
///     padding: Option<Tensor<B, 2, Bool>>,
/// }
///
/// # type B = burn::backend::Flex;
/// # let device = Default::default();
/// let posts = Post::<B> {
///     image: Tensor::zeros([3, 1, 8, 8], &device),
///     words: Tensor::from_ints([[1, 2], [3, 4], [5, 6]], &device),
///     padding: None,
/// };
/// let words: Vec<i64> = posts.rows(&[2, 2]).words.into_data().iter().collect();
/// assert_eq!(words, [5, 6, 5, 6]);
/// assert_eq!(posts.check_rows(4), Err(3));
/// ```
pub trait Rows: Clone + Send + 'static {
    /// Returns rows `index[0], index[1], …`, in that order; an index may occur more than once.
    ///
    /// # Panics
    /// Where an index is out of range.
    fn rows(&self, index: &[usize]) -> Self;

    /// Concatenates the rows of all parts.
    ///
    /// # Panics
    /// Where `parts` is empty.
    fn cat(parts: Vec<Self>) -> Self;

    /// Sizes of a row, which tell rows of different padding apart.
    ///
    /// A cached prefix is used for inputs of the sizes that it was computed from, and rows of
    /// different sizes are never concatenated. A tensor gives its axes but the first, and a tuple
    /// gives those of its parts. The default says that all rows are alike: a type that holds
    /// tensors should give theirs.
    fn row_shape(&self) -> Vec<usize> {
        vec![]
    }

    /// Checks that there are `rows` rows, in every part.
    ///
    /// A type of several parts asks each of them: `self.images.check_rows(rows)?;` and so on. What
    /// has no rows, as `()`, fits any number.
    ///
    /// # Errors
    /// The number of rows found.
    fn check_rows(&self, rows: usize) -> Result<(), usize>;

    /// Whether rows can be sent to other processes, by [`to_host`](Self::to_host).
    ///
    /// A model whose output cannot has the whole clean pass on every worker of an
    /// [executor](crate::Executor). Tensors and tuples of them can; the default is false.
    const TRAVELS: bool = false;

    /// Appends the values of all rows, part by part. The default appends nothing.
    fn to_host(&self, _values: &mut Vec<TensorData>) {}

    /// Rows of the form and on the device of these, with values from [`to_host`](Self::to_host).
    ///
    /// It takes what it needs from the front. `None` where the values have another form.
    fn with_values(&self, _values: &mut std::vec::IntoIter<TensorData>) -> Option<Self> {
        None
    }

    /// The same rows on another device of the same backend. The default leaves them where they are.
    #[must_use]
    fn to_device_of(self, _device: DeviceId) -> Self {
        self
    }
}

/// Whether two numbers of rows agree; otherwise the one that was found.
fn same(got: usize, rows: usize) -> Result<(), usize> {
    if got == rows { Ok(()) } else { Err(got) }
}

impl<B: Backend, const D: usize, K> Rows for Tensor<B, D, K>
where
    K: TensorKind<B> + BasicOps<B> + 'static,
    Tensor<B, D, K>: Send + 'static,
{
    fn rows(&self, index: &[usize]) -> Self {
        let n = self.dims()[0];
        if index.len() == n && index.iter().enumerate().all(|(i, &j)| i == j) {
            return self.clone();
        }
        // a single row is copied: a view would keep all rows in memory
        let contiguous = index.windows(2).all(|w| w[1] == w[0] + 1);
        if contiguous && index.len() > 1 {
            return self.clone().narrow(0, index[0], index.len());
        }
        let data: Vec<i32> = index.iter().map(|&i| i as i32).collect();
        let index = Tensor::<B, 1, Int>::from_data(TensorData::new(data, [index.len()]), &self.device());
        self.clone().select(0, index)
    }

    fn cat(mut parts: Vec<Self>) -> Self {
        if parts.len() == 1 { parts.remove(0) } else { Tensor::cat(parts, 0) }
    }

    fn row_shape(&self) -> Vec<usize> {
        self.dims()[1..].to_vec()
    }

    fn check_rows(&self, rows: usize) -> Result<(), usize> {
        same(self.dims()[0], rows)
    }

    const TRAVELS: bool = true;

    fn to_host(&self, values: &mut Vec<TensorData>) {
        values.push(self.to_data());
    }

    fn with_values(&self, values: &mut std::vec::IntoIter<TensorData>) -> Option<Self> {
        let data = values.next().filter(|data| data.shape.len() == D && data.dtype == self.dtype())?;
        Some(Tensor::from_data(data, (&self.device(), self.dtype())))
    }

    fn to_device_of(self, device: DeviceId) -> Self {
        self.to_device(&B::Device::from_id(device))
    }
}

impl Rows for () {
    const TRAVELS: bool = true;
    fn with_values(&self, _: &mut std::vec::IntoIter<TensorData>) -> Option<Self> {
        Some(())
    }
    fn rows(&self, _: &[usize]) -> Self {}
    fn cat(_: Vec<Self>) -> Self {}
    fn check_rows(&self, _: usize) -> Result<(), usize> {
        Ok(())
    }
}

macro_rules! rows_for_tuples {
    ($($name:ident $part:ident),+) => {
        impl<$($name: Rows),+> Rows for ($($name,)+) {
            fn rows(&self, index: &[usize]) -> Self {
                #[allow(non_snake_case)]
                let ($($name,)+) = self;
                ($($name.rows(index),)+)
            }

            fn cat(parts: Vec<Self>) -> Self {
                $(let mut $part = Vec::with_capacity(parts.len());)+
                for row in parts {
                    #[allow(non_snake_case)]
                    let ($($name,)+) = row;
                    $($part.push($name);)+
                }
                ($($name::cat($part),)+)
            }

            fn row_shape(&self) -> Vec<usize> {
                #[allow(non_snake_case)]
                let ($($name,)+) = self;
                [$($name.row_shape()),+].concat()
            }

            fn check_rows(&self, rows: usize) -> Result<(), usize> {
                #[allow(non_snake_case)]
                let ($($name,)+) = self;
                $($name.check_rows(rows)?;)+
                Ok(())
            }

            const TRAVELS: bool = $($name::TRAVELS &&)+ true;

            fn to_host(&self, values: &mut Vec<TensorData>) {
                #[allow(non_snake_case)]
                let ($($name,)+) = self;
                $($name.to_host(values);)+
            }

            fn with_values(&self, values: &mut std::vec::IntoIter<TensorData>) -> Option<Self> {
                #[allow(non_snake_case)]
                let ($($name,)+) = self;
                Some(($($name.with_values(values)?,)+))
            }

            fn to_device_of(self, device: DeviceId) -> Self {
                #[allow(non_snake_case)]
                let ($($name,)+) = self;
                ($($name.to_device_of(device),)+)
            }
        }
    };
}
rows_for_tuples!(A a, B b);
rows_for_tuples!(A a, B b, C c);
rows_for_tuples!(A a, B b, C c, D d);
rows_for_tuples!(A a, B b, C c, D d, E e);
rows_for_tuples!(A a, B b, C c, D d, E e, F f);
rows_for_tuples!(A a, B b, C c, D d, E e, F f, G g);
rows_for_tuples!(A a, B b, C c, D d, E e, F f, G g, H h);

impl<R: Rows> Rows for Option<R> {
    fn rows(&self, index: &[usize]) -> Self {
        self.as_ref().map(|rows| rows.rows(index))
    }

    fn cat(parts: Vec<Self>) -> Self {
        let (all, some) = (parts.len(), parts.into_iter().flatten().collect::<Vec<R>>());
        assert!(
            some.is_empty() || some.len() == all,
            "{} of {all} parts have rows; give all of them or none",
            some.len()
        );
        if some.is_empty() { None } else { Some(R::cat(some)) }
    }

    // what has rows is told apart from what has none
    fn row_shape(&self) -> Vec<usize> {
        self.as_ref().map_or(vec![0], |rows| [vec![1], rows.row_shape()].concat())
    }

    fn check_rows(&self, rows: usize) -> Result<(), usize> {
        self.as_ref().map_or(Ok(()), |part| part.check_rows(rows))
    }

    const TRAVELS: bool = R::TRAVELS;

    fn to_host(&self, values: &mut Vec<TensorData>) {
        self.iter().for_each(|rows| rows.to_host(values));
    }

    fn with_values(&self, values: &mut std::vec::IntoIter<TensorData>) -> Option<Self> {
        match self {
            Some(rows) => rows.with_values(values).map(Some),
            None => Some(None),
        }
    }

    fn to_device_of(self, device: DeviceId) -> Self {
        self.map(|rows| rows.to_device_of(device))
    }
}

impl<R: Rows + Sync> Rows for Arc<R> {
    fn rows(&self, index: &[usize]) -> Self {
        Arc::new(R::rows(self, index))
    }

    fn cat(parts: Vec<Self>) -> Self {
        Arc::new(R::cat(parts.into_iter().map(Arc::unwrap_or_clone).collect()))
    }

    fn row_shape(&self) -> Vec<usize> {
        R::row_shape(self)
    }

    fn check_rows(&self, rows: usize) -> Result<(), usize> {
        R::check_rows(self, rows)
    }

    const TRAVELS: bool = R::TRAVELS;

    fn to_host(&self, values: &mut Vec<TensorData>) {
        R::to_host(self, values);
    }

    fn with_values(&self, values: &mut std::vec::IntoIter<TensorData>) -> Option<Self> {
        R::with_values(self, values).map(Arc::new)
    }

    fn to_device_of(self, device: DeviceId) -> Self {
        Arc::new(Arc::unwrap_or_clone(self).to_device_of(device))
    }
}

impl<T: Clone + Send + 'static> Rows for Vec<T> {
    fn rows(&self, index: &[usize]) -> Self {
        index.iter().map(|&i| self[i].clone()).collect()
    }

    fn cat(parts: Vec<Self>) -> Self {
        parts.concat()
    }

    fn check_rows(&self, rows: usize) -> Result<(), usize> {
        same(self.len(), rows)
    }
}

/// The examples of one training step.
///
/// `ids` identify examples across epochs: running statistics and cached prefixes are stored by id.
#[derive(Clone, Debug)]
pub struct Batch<I, T> {
    /// One identifier per example, unique in the data set.
    pub ids: Vec<u64>,
    /// Inputs of the model, one row per example.
    pub input: I,
    /// Targets that the loss compares the outputs with, one row per example.
    pub target: T,
}

impl<I, T> Batch<I, T> {
    /// Returns the same batch on a backend with automatic differentiation.
    pub fn lift<B: AutodiffBackend>(self) -> Batch<I::Lifted, T::Lifted>
    where
        I: Lift<B>,
        T: Lift<B>,
    {
        Batch { ids: self.ids, input: self.input.lift(), target: self.target.lift() }
    }
}

impl<I: Rows, T: Rows> Batch<I, T> {
    /// Checks that there are examples, and an input and a target for each.
    ///
    /// # Errors
    /// [`Error::EmptyBatch`] or [`Error::Length`]. Where input and target agree, the ids are at fault.
    pub fn check(&self) -> Result<(), Error> {
        let ids = self.ids.len();
        if ids == 0 {
            return Err(Error::EmptyBatch);
        }
        let length = |name, got, expected| Err(Error::Length { name, got, expected });
        match (self.input.check_rows(ids), self.target.check_rows(ids)) {
            (Ok(()), Ok(())) => Ok(()),
            (Err(input), Err(target)) if input == target => length("the list of ids of the batch", ids, input),
            (Err(input), _) => length("the input of the batch", input, ids),
            (_, Err(target)) => length("the target of the batch", target, ids),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::backend::{Autodiff, Flex};

    fn rows(n: usize) -> Tensor<Flex, 2> {
        Tensor::zeros([n, 3], &Default::default())
    }

    /// An option is gathered, joined, sent and lifted as what it holds; where it holds nothing, nothing is.
    #[test]
    fn an_option_has_all_rows_or_none() {
        let values =
            |rows: &Option<Tensor<Flex, 2>>| rows.as_ref().map(|r| r.to_data().iter::<f32>().collect::<Vec<_>>());
        let some = Some(Tensor::<Flex, 2>::from_floats([[1.0], [2.0]], &Default::default()));
        let both = Option::cat(vec![some.rows(&[1, 1]), some.clone()]);
        assert_eq!(values(&both), Some(vec![2.0, 2.0, 1.0, 2.0]));
        assert_eq!((some.check_rows(2), some.check_rows(3), some.row_shape()), (Ok(()), Err(2), vec![1, 1]));
        let mut sent = vec![];
        some.to_host(&mut sent);
        assert_eq!(values(&some.rows(&[0, 0]).with_values(&mut sent.into_iter()).unwrap()), values(&some));
        let lifted: Option<Tensor<Autodiff<Flex>, 2>> = Lift::<Autodiff<Flex>>::lift(some.clone());
        assert_eq!(values(&lifted.map(Tensor::inner)), values(&some));

        let none = None::<Tensor<Flex, 2>>;
        assert!(Option::cat(vec![none.rows(&[0, 4]), none.clone()]).is_none());
        assert_eq!((none.check_rows(7), none.row_shape()), (Ok(()), vec![0]));
        none.to_host(&mut vec![]);
        assert!(none.with_values(&mut vec![].into_iter()).unwrap().is_none());
    }

    /// What a struct derives is what a tuple of its fields does; what is shared comes along once.
    #[test]
    fn derived_rows_are_those_of_the_fields() {
        #[derive(Clone, Debug, flops_derive::Rows, flops_derive::Lift)]
        struct Post<B: Backend, const D: usize, T: Clone + Send + 'static> {
            image: Tensor<B, D>,
            marks: Option<Tensor<B, 2, Int>>,
            names: Vec<T>,
        }
        #[derive(Clone, Debug, flops_derive::Rows, flops_derive::Lift)]
        struct Scaled<Back>(Tensor<Back, 2>, #[rows(shared)] Tensor<Back, 1>, #[rows(skip)] std::sync::Arc<Vec<usize>>)
        where
            Back: Backend + std::fmt::Debug;

        let device = Default::default();
        let ints = |rows: [i32; 3]| Tensor::<Flex, 2, Int>::from_ints([[rows[0]], [rows[1]], [rows[2]]], &device);
        let floats = |rows: Tensor<Flex, 2>| rows.into_data().iter::<f32>().collect::<Vec<_>>();
        let image = Tensor::<Flex, 2>::from_floats([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], &device);
        let post = Post { image: image.clone(), marks: Some(ints([7, 8, 9])), names: vec!["a", "b", "c"] };

        let both = Rows::cat(vec![post.rows(&[2]), post.rows(&[0, 2])]);
        assert_eq!(floats(both.image.clone()), [5.0, 6.0, 1.0, 2.0, 5.0, 6.0]);
        assert_eq!(both.marks.as_ref().unwrap().to_data().iter::<i64>().collect::<Vec<_>>(), [9, 7, 9]);
        assert_eq!(
            (both.names.clone(), both.row_shape(), both.check_rows(3)),
            (vec!["c", "a", "c"], vec![2, 1, 1], Ok(()))
        );
        assert_eq!(Post { names: vec!["a"], ..post.clone() }.check_rows(3), Err(1));
        // a vector of anything cannot be sent
        const { assert!(!Post::<Flex, 2, &str>::TRAVELS && <(Tensor<Flex, 2>, Option<Tensor<Flex, 1>>)>::TRAVELS) };
        let lifted: Post<Autodiff<Flex>, 2, &str> =
            post.clone().to_device_of(burn::tensor::backend::Device::to_id(&device)).lift();
        assert_eq!((floats(lifted.image.inner()), lifted.names), (floats(image.clone()), post.names));

        let scaled = |scale: f32| Scaled(image.clone(), Tensor::from_floats([scale], &device), vec![4].into());
        let joined = Scaled::cat(vec![scaled(2.0).rows(&[1]), scaled(3.0).rows(&[0])]);
        assert_eq!(floats(joined.0.clone()), [3.0, 4.0, 1.0, 2.0]);
        assert_eq!(joined.1.to_data().iter::<f32>().collect::<Vec<_>>(), [2.0]);
        assert_eq!((joined.2.to_vec(), joined.check_rows(2), joined.row_shape()), (vec![4], Ok(()), vec![2]));
        // a scale would not be sent along
        const { assert!(!Scaled::<Flex>::TRAVELS) };
        let lifted: Scaled<Autodiff<Flex>> = joined.lift();
        assert_eq!(lifted.1.inner().into_scalar(), 2.0);
    }

    /// What is behind an `Arc` has its rows.
    #[test]
    fn shared_rows_are_rows() {
        let device = Default::default();
        let some = Arc::new(Tensor::<Flex, 2>::from_floats([[1.0], [2.0]], &device));
        let both = Arc::cat(vec![some.rows(&[1]), some.clone()]);
        assert_eq!(both.to_data().iter::<f32>().collect::<Vec<_>>(), [2.0, 1.0, 2.0]);
        assert_eq!((some.check_rows(2), some.check_rows(3), some.row_shape()), (Ok(()), Err(2), vec![1]));
        let moved = some.clone().to_device_of(burn::tensor::backend::Device::to_id(&device));
        let mut sent = vec![];
        moved.to_host(&mut sent);
        let back = both.rows(&[0, 0]).with_values(&mut sent.into_iter()).unwrap();
        assert_eq!(back.to_data(), some.to_data());
    }

    /// A struct of tensors alone is sent to other processes.
    #[test]
    fn derived_rows_travel() {
        #[derive(Clone, Debug, flops_derive::Rows)]
        struct Pair<B: Backend> {
            a: Tensor<B, 2>,
            b: (Tensor<B, 1, Int>, Option<Tensor<B, 2>>),
        }
        const { assert!(Pair::<Flex>::TRAVELS) };
        let labels = Tensor::from_ints([3, 4], &Default::default());
        let pair = Pair { a: rows(2) + 2.0, b: (labels, None) };
        let mut sent = vec![];
        pair.to_host(&mut sent);
        assert_eq!(sent.len(), 2);
        let other = Pair { a: rows(2), ..pair.rows(&[0, 0]) }.with_values(&mut sent.clone().into_iter()).unwrap();
        assert_eq!(other.a.to_data().iter::<f32>().collect::<Vec<_>>(), [2.0; 6]);
        assert_eq!(other.b.0.to_data().iter::<i64>().collect::<Vec<_>>(), [3, 4]);
        sent.swap(0, 1);
        assert!(pair.with_values(&mut sent.into_iter()).is_none());
    }

    /// Every part of inputs and targets is looked at.
    #[test]
    fn ids_inputs_and_targets_have_one_row_for_each_example() {
        let check = |ids: u64, input: (Tensor<Flex, 2>, Vec<u8>), target: ((), Tensor<Flex, 2>)| {
            Batch { ids: (0..ids).collect(), input, target }.check()
        };
        assert_eq!(check(2, (rows(2), vec![0; 2]), ((), rows(2))), Ok(()));
        assert_eq!(check(0, (rows(0), vec![]), ((), rows(0))), Err(Error::EmptyBatch));
        for (ids, a, b, target, part, got) in [
            (3, 2, 2, 3, "input", 2),
            (8, 5, 8, 8, "input", 5),
            (8, 8, 1, 8, "input", 1),
            (8, 8, 8, 5, "target", 5),
            (2, 2, 2, 0, "target", 0),
        ] {
            let error = check(ids, (rows(a), vec![0; b]), ((), rows(target))).unwrap_err();
            let expected = ids as usize;
            assert!(matches!(error, Error::Length { got: g, expected: e, .. } if g == got && e == expected), "{error}");
            assert!(error.to_string().starts_with(&format!("the {part} of the batch has {got} entries")), "{error}");
        }
        let error = check(3, (rows(2), vec![0; 2]), ((), rows(2))).unwrap_err();
        assert_eq!(error, Error::Length { name: "the list of ids of the batch", got: 3, expected: 2 });
    }
}
