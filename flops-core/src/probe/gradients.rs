//! Gradients of the trained parameters while they are summed.

use std::collections::HashSet;

use burn::module::{Module, ParamId};
use burn::prelude::*;

use crate::error::Error;
use crate::ops;
use crate::parameters::{Parameter, parameters};

/// The gradient of one parameter.
#[derive(Clone)]
struct Sum<B: Backend> {
    id: ParamId,
    /// The shape it was added with; `None` for values in the order of the parameter.
    shape: Option<Vec<usize>>,
    values: Tensor<B, 1>,
}

/// Gradients per parameter, summed as they come.
///
/// They stay in the order in which the parameters were first met. Every step then hands a device
/// the same operations in the same order: one that fuses operations compiles each new order anew.
#[derive(Clone)]
pub struct Gradients<B: Backend> {
    sums: Vec<Sum<B>>,
    /// The first gradient that had another shape than an earlier one of its parameter.
    odd: Option<(ParamId, Vec<usize>)>,
}

impl<B: Backend> Default for Gradients<B> {
    fn default() -> Self {
        Self { sums: vec![], odd: None }
    }
}

impl<B: Backend> Gradients<B> {
    /// Adds to the gradient of a parameter.
    ///
    /// A gradient of another shape is not added: the estimate that it belongs to ends in
    /// [`Error::GradientShape`].
    ///
    /// # Shapes
    /// - gradient: that of the parameter
    pub fn add<const D: usize>(&mut self, id: ParamId, gradient: Tensor<B, D>) {
        let shape = gradient.dims().to_vec();
        let elements = shape.iter().product::<usize>();
        self.add_sum(Sum { id, shape: Some(shape), values: gradient.reshape([elements]) });
    }

    /// Adds a gradient that is flat, in the order of its parameter.
    pub(crate) fn add_flat(&mut self, id: ParamId, values: Tensor<B, 1>) {
        self.add_sum(Sum { id, shape: None, values });
    }

    fn add_sum(&mut self, new: Sum<B>) {
        let Some(at) = self.position(new.id) else { return self.sums.push(new) };
        let [elements] = new.values.dims();
        let sum = &self.sums[at];
        let same_shape = sum.shape.is_none() || new.shape.is_none() || sum.shape == new.shape;
        if sum.values.dims() != [elements] || !same_shape {
            self.odd.get_or_insert((new.id, new.shape.unwrap_or_else(|| vec![elements])));
            return;
        }
        // taken out, so that it can be added to in place
        let Sum { id, shape, values } = self.sums.remove(at);
        self.sums.insert(at, Sum { id, shape: shape.or(new.shape), values: values + new.values });
    }

    fn position(&self, id: ParamId) -> Option<usize> {
        self.sums.iter().position(|sum| sum.id == id)
    }

    /// The gradient of a parameter, flat; `None` where nothing was added.
    pub fn get(&self, id: ParamId) -> Option<&Tensor<B, 1>> {
        self.position(id).map(|at| &self.sums[at].values)
    }

    /// Removes and returns the gradient of a parameter.
    pub(crate) fn take(&mut self, id: ParamId) -> Option<Tensor<B, 1>> {
        self.position(id).map(|at| self.sums.remove(at).values)
    }

    /// Keeps the gradients of these parameters alone.
    pub(crate) fn retain(&mut self, ids: &HashSet<ParamId>) {
        self.sums.retain(|sum| ids.contains(&sum.id));
        self.odd = self.odd.take().filter(|(id, _)| ids.contains(id));
    }

    /// All gradients, in the order in which their parameters were first met.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Tensor<B, 1>> {
        self.sums.iter().map(|sum| &sum.values)
    }

    /// ⟨this, other⟩ over the parameters that both have; one value is read back.
    pub(crate) fn dot(&self, other: &Self) -> f64 {
        let pair = |sum: &Sum<B>| Some((sum.values.clone(), other.get(sum.id)?.clone()));
        ops::dot_to_host(self.sums.iter().filter_map(pair).filter(|(a, b)| a.dims() == b.dims()))
    }

    /// The same on another device.
    pub(crate) fn on(self, device: &B::Device) -> Self {
        let sums = self.sums.into_iter().map(|sum| Sum { values: sum.values.to_device(device), ..sum });
        Self { sums: sums.collect(), odd: self.odd }
    }

    /// All gradients times `factor`.
    pub(crate) fn scaled(self, factor: f64) -> Self {
        let sums = self.sums.into_iter().map(|sum| Sum { values: sum.values * factor, ..sum });
        Self { sums: sums.collect(), odd: self.odd }
    }

    /// Adds all gradients of `other`.
    pub(crate) fn merge(&mut self, other: Self) {
        for sum in other.sums {
            self.add_sum(sum);
        }
        self.odd = self.odd.take().or(other.odd);
    }

    /// Checks that every gradient has the shape of its parameter in `model`.
    ///
    /// # Errors
    /// [`Error::GradientShape`] names the first that has not.
    pub(crate) fn check<M: Module<B>>(&self, model: &M) -> Result<(), Error> {
        for parameter in parameters::<B, M>(model) {
            let added = self.position(parameter.id).map(|at| &self.sums[at]);
            let gradient = added.and_then(|sum| match &sum.shape {
                Some(shape) => (*shape != parameter.shape).then(|| shape.clone()),
                None => {
                    let [elements] = sum.values.dims();
                    (elements != parameter.shape.iter().product::<usize>()).then(|| vec![elements])
                }
            });
            let odd = self.odd.as_ref().filter(|(id, _)| *id == parameter.id).map(|(_, shape)| shape.clone());
            if let Some(gradient) = gradient.or(odd) {
                let Parameter { ref shape, .. } = parameter;
                return Err(Error::GradientShape { path: parameter.name(), gradient, parameter: shape.clone() });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::backend::Flex;
    use burn::module::Param;

    #[test]
    fn gradients_are_summed_in_the_order_of_their_parameters() {
        let device = Default::default();
        let of = |value: f32| Tensor::<Flex, 2>::full([1, 2], value, &device);
        let ids: Vec<ParamId> = (0..50).map(|_| ParamId::new()).collect();
        let (mut sum, mut other) = (Gradients::default(), Gradients::default());
        ids.iter().for_each(|&id| sum.add(id, of(1.0)));
        ids.iter().rev().for_each(|&id| other.add(id, of(2.0)));
        sum.merge(other);
        sum.add_flat(ids[7], of(4.0).reshape([2]));
        let sums: Vec<f32> =
            sum.clone().scaled(0.5).iter().flat_map(|g| g.to_data().iter::<f32>().collect::<Vec<_>>()).collect();
        assert_eq!(sums, (0..100).map(|i| if i / 2 == 7 { 3.5 } else { 1.5 }).collect::<Vec<_>>());
        assert_eq!(sum.sums.iter().map(|sum| sum.id).collect::<Vec<_>>(), ids);
        assert!(sum.take(ids[3]).is_some() && sum.get(ids[3]).is_none());
        assert_eq!(sum.get(ids[4]).map(|g| g.dims()), Some([2]));
    }

    #[derive(Module, Debug)]
    struct Table<B: Backend> {
        weight: Param<Tensor<B, 2>>,
    }

    fn table() -> Table<Flex> {
        Table { weight: Param::from_tensor(Tensor::zeros([5, 3], &Default::default())) }
    }

    /// Another shape is an error with the path and both shapes, whichever gradient comes first, also
    /// across merged sums, and whether the number of elements differs or not.
    #[test]
    fn a_gradient_of_another_shape_is_an_error() {
        let (table, device) = (table(), Default::default());
        let id = table.weight.id;
        let ones = |shape: [usize; 2]| Tensor::<Flex, 2>::ones(shape, &device);
        for wrong in [[3, 5], [5, 4], [1, 15]] {
            for order in [[[5, 3], wrong], [wrong, [5, 3]], [wrong, wrong]] {
                let (mut one, mut first, mut second) =
                    (Gradients::default(), Gradients::default(), Gradients::default());
                order.iter().for_each(|&shape| one.add(id, ones(shape)));
                first.add(id, ones(order[0]));
                second.add(id, ones(order[1]));
                first.merge(second);
                for gradients in [one, first.scaled(2.0)] {
                    let error = gradients.check(&table).unwrap_err();
                    let expected = Error::GradientShape {
                        path: "model.weight".into(),
                        gradient: wrong.to_vec(),
                        parameter: vec![5, 3],
                    };
                    assert_eq!(error, expected);
                    let message = error.to_string();
                    assert!(message.contains(&format!("{wrong:?}")) && message.contains("[5, 3]"), "{message}");
                }
            }
        }
        let mut flat = Gradients::default();
        flat.add_flat(id, ones([1, 14]).reshape([14]));
        assert!(matches!(flat.check(&table), Err(Error::GradientShape { gradient, .. }) if gradient == [14]));
    }

    #[test]
    fn gradients_of_the_right_shape_pass() {
        let (table, device) = (table(), Default::default());
        let mut gradients = Gradients::default();
        gradients.add(table.weight.id, Tensor::<Flex, 2>::ones([5, 3], &device));
        gradients.add_flat(table.weight.id, Tensor::ones([15], &device));
        gradients.add(table.weight.id, Tensor::<Flex, 2>::ones([5, 3], &device));
        // a parameter that is not kept does not count
        let frozen = ParamId::new();
        gradients.add(frozen, Tensor::<Flex, 2>::ones([5, 3], &device));
        gradients.add(frozen, Tensor::<Flex, 2>::ones([3, 5], &device));
        gradients.retain(&HashSet::from([table.weight.id]));
        assert_eq!(gradients.check(&table), Ok(()));
        assert_eq!(gradients.get(table.weight.id).unwrap().to_data().iter::<f32>().sum::<f32>(), 45.0);
    }
}
