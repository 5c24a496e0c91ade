//! Gradients of the trained parameters while they are summed.

use std::collections::HashSet;

use burn::module::ParamId;
use burn::prelude::*;

/// Gradients per parameter, flat, summed as they come.
///
/// They stay in the order in which the parameters were first met. Every step then hands a device
/// the same operations in the same order: one that fuses operations compiles each new order anew.
#[derive(Clone)]
pub struct Gradients<B: Backend>(Vec<(ParamId, Tensor<B, 1>)>);

impl<B: Backend> Default for Gradients<B> {
    fn default() -> Self {
        Self(vec![])
    }
}

impl<B: Backend> Gradients<B> {
    /// Adds to the gradient of a parameter.
    ///
    /// # Shapes
    /// - gradient: as many elements as the parameter, in its order; the shape itself does not
    ///   matter
    ///
    /// # Panics
    /// If an earlier gradient of the parameter has another number of elements.
    pub fn add<const D: usize>(&mut self, id: ParamId, gradient: Tensor<B, D>) {
        let elements = gradient.shape().num_elements();
        let gradient = gradient.reshape([elements]);
        match self.position(id) {
            Some(at) => {
                // taken out, so that it can be added to in place
                let (_, sum) = self.0.remove(at);
                assert_eq!(sum.dims(), [elements], "gradients of one parameter have as many elements as it has");
                self.0.insert(at, (id, sum + gradient));
            }
            None => self.0.push((id, gradient)),
        }
    }

    fn position(&self, id: ParamId) -> Option<usize> {
        self.0.iter().position(|(found, _)| *found == id)
    }

    /// The gradient of a parameter, flat; `None` where nothing was added.
    pub fn get(&self, id: ParamId) -> Option<&Tensor<B, 1>> {
        self.position(id).map(|at| &self.0[at].1)
    }

    /// Removes and returns the gradient of a parameter.
    pub(crate) fn take(&mut self, id: ParamId) -> Option<Tensor<B, 1>> {
        self.position(id).map(|at| self.0.remove(at).1)
    }

    /// Keeps the gradients of these parameters alone.
    pub(crate) fn retain(&mut self, ids: &HashSet<ParamId>) {
        self.0.retain(|(id, _)| ids.contains(id));
    }

    /// All gradients, in the order in which their parameters were first met.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Tensor<B, 1>> {
        self.0.iter().map(|(_, gradient)| gradient)
    }

    /// All gradients times `factor`.
    pub(crate) fn scaled(self, factor: f64) -> Self {
        Self(self.0.into_iter().map(|(id, gradient)| (id, gradient * factor)).collect())
    }

    /// Adds all gradients of `other`.
    pub(crate) fn merge(&mut self, other: Self) {
        for (id, gradient) in other.0 {
            self.add(id, gradient);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::backend::Flex;

    #[test]
    fn gradients_are_summed_in_the_order_of_their_parameters() {
        let device = Default::default();
        let of = |value: f32| Tensor::<Flex, 2>::full([1, 2], value, &device);
        let ids: Vec<ParamId> = (0..50).map(|_| ParamId::new()).collect();
        let (mut sum, mut other) = (Gradients::default(), Gradients::default());
        ids.iter().for_each(|&id| sum.add(id, of(1.0)));
        ids.iter().rev().for_each(|&id| other.add(id, of(2.0)));
        sum.merge(other);
        sum.add(ids[7], of(4.0));
        let sums: Vec<f32> =
            sum.clone().scaled(0.5).iter().flat_map(|g| g.to_data().iter::<f32>().collect::<Vec<_>>()).collect();
        assert_eq!(sums, (0..100).map(|i| if i / 2 == 7 { 3.5 } else { 1.5 }).collect::<Vec<_>>());
        assert_eq!(sum.0.iter().map(|(id, _)| *id).collect::<Vec<_>>(), ids);
        assert!(sum.take(ids[3]).is_some() && sum.get(ids[3]).is_none());
        assert_eq!(sum.get(ids[4]).map(|g| g.dims()), Some([2]));
    }
}
