//! The parameters of a module: their paths, which are trained, and choosing those by path.

use std::collections::HashSet;
use std::sync::Arc;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::prelude::*;

/// Paths that an error lists at most.
const LISTED_PATHS: usize = 5;

/// A float parameter of a module.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Parameter {
    /// Its id.
    pub id: ParamId,
    /// Names of fields from the module down.
    pub path: Vec<String>,
    /// Its sizes.
    pub shape: Vec<usize>,
    /// Whether it requires a gradient, which it does on a backend with autodiff alone.
    pub trained: bool,
}

impl Parameter {
    /// The path as a learner has it, whose model is its field `model`: `model.blocks.0.fc1.weight`.
    ///
    /// A [`ParamGroup`](crate::train::param_groups::ParamGroup) takes paths of this form.
    pub fn name(&self) -> String {
        std::iter::once("model").chain(self.path.iter().map(String::as_str)).collect::<Vec<_>>().join(".")
    }

    /// The number of its values.
    pub fn values(&self) -> usize {
        self.shape.iter().product()
    }
}

/// `[inputs, outputs]` of a parameter's matrix, and whether its inputs come first.
///
/// Two axes are inputs and outputs, as in Burn's `Linear`. Of more axes the first one has the
/// outputs, and all others are inputs, as in a convolution. `None` for a vector, or where a side is
/// at most `least`.
pub(crate) fn matrix_sides(shape: &[usize], least: usize) -> Option<([usize; 2], bool)> {
    let (&first, rest) = shape.split_first()?;
    let others = if rest.is_empty() { return None } else { rest.iter().product() };
    let inputs_first = rest.len() == 1;
    let sides = if inputs_first { [first, others] } else { [others, first] };
    sides.iter().all(|&side| side > least).then_some((sides, inputs_first))
}

/// The float parameters of a module, in the order of its fields.
///
/// What imports or scopes leave frozen shows here: forward-only training learns nothing there.
///
/// # Example
/// ```
/// use burn::backend::{Autodiff, Flex};
/// use burn::nn::LinearConfig;
/// use flops_core::parameters::{parameters, train_where, trained_values};
///
/// let layer = LinearConfig::new(3, 2).init::<Autodiff<Flex>>(&Default::default());
/// let layer = train_where(layer, |path| path == ["bias"]);
/// let [weight, bias] = &parameters(&layer)[..] else { panic!("a weight and a bias") };
/// assert_eq!((weight.trained, bias.trained, weight.values()), (false, true, 6));
/// assert_eq!(trained_values(&layer), 2);
/// ```
pub fn parameters<B: Backend, M: Module<B>>(module: &M) -> Vec<Parameter> {
    #[derive(Default)]
    struct Collect {
        path: Vec<String>,
        found: Vec<Parameter>,
    }
    impl<B: Backend> ModuleVisitor<B> for Collect {
        fn enter_module(&mut self, name: &str, _: &str) {
            self.path.push(name.into());
        }

        fn exit_module(&mut self, _: &str, _: &str) {
            self.path.pop();
        }

        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            self.found.push(Parameter {
                id: param.id,
                path: self.path.clone(),
                shape: param.lazy_shape().to_vec(),
                trained: param.is_require_grad(),
            });
        }
    }
    let mut collect = Collect::default();
    module.visit(&mut collect);
    collect.found
}

/// The number of trained values of a module.
pub fn trained_values<B: Backend, M: Module<B>>(module: &M) -> usize {
    parameters(module).iter().filter(|parameter| parameter.trained).map(Parameter::values).sum()
}

/// Makes the float parameters trainable whose path `trains` takes, and freezes all others, whatever they
/// were before.
///
/// A path has the names of fields from the module down, as in [`Parameter::path`]. On a backend without
/// autodiff nothing can be trained, and this changes nothing.
pub fn train_where<B: Backend, M: Module<B>>(module: M, trains: impl FnMut(&[String]) -> bool) -> M {
    struct Mark<F> {
        path: Vec<String>,
        trains: F,
    }
    impl<B: Backend, F: FnMut(&[String]) -> bool> ModuleMapper<B> for Mark<F> {
        fn enter_module(&mut self, name: &str, _: &str) {
            self.path.push(name.into());
        }

        fn exit_module(&mut self, _: &str, _: &str) {
            self.path.pop();
        }

        fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
            let trained = (self.trains)(&self.path);
            param.set_require_grad(trained)
        }
    }
    module.map(&mut Mark { path: vec![], trains })
}

/// Ids of the trained parameters: those that require a gradient in a module of an autodiff backend.
///
/// Ask the module that burn-train holds, not its `valid()` one, where no parameter requires a
/// gradient.
pub fn trained_parameters<B: Backend, M: Module<B>>(module: &M) -> Arc<HashSet<ParamId>> {
    struct Collect(HashSet<ParamId>);
    impl<B: Backend> ModuleVisitor<B> for Collect {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            if param.is_require_grad() {
                self.0.insert(param.id);
            }
        }
    }
    let mut collect = Collect(HashSet::new());
    module.visit(&mut collect);
    Arc::new(collect.0)
}

/// The paths of a model's parameters that `takes` picks: the first few, and how many more there are.
pub(crate) fn paths<B: Backend, M: Module<B>>(model: &M, takes: impl Fn(ParamId) -> bool) -> String {
    let mut seen = HashSet::new();
    let found: Vec<String> =
        parameters::<B, M>(model).into_iter().filter(|p| takes(p.id) && seen.insert(p.id)).map(|p| p.name()).collect();
    let mut list = found.iter().take(LISTED_PATHS).map(String::as_str).collect::<Vec<_>>().join(", ");
    match found.len().saturating_sub(LISTED_PATHS) {
        _ if found.is_empty() => list += "a parameter outside the model",
        0 => {}
        more => list += &format!(" and {more} more"),
    }
    list
}

/// The path of one parameter.
pub(crate) fn path<B: Backend, M: Module<B>>(model: &M, id: Option<ParamId>) -> String {
    paths::<B, M>(model, |found| Some(found) == id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{plain, zoo};

    #[test]
    fn parameters_have_the_paths_of_a_learner() {
        let zoo = plain(&zoo(1));
        let of_mix = [zoo.mix.weight.id, zoo.mix.bias.as_ref().unwrap().id];
        assert_eq!(paths(&zoo, |id| of_mix.contains(&id)), "model.mix.weight, model.mix.bias");
        assert_eq!(path(&zoo, Some(zoo.cls.id)), "model.cls");
        assert_eq!(path(&zoo, Some(ParamId::new())), "a parameter outside the model");
        assert_eq!(path(&zoo, None), "a parameter outside the model");
        let all = paths(&zoo, |_| true);
        assert!(all.starts_with("model.conv.weight, model.conv.bias, model.table.weight, "), "{all}");
        assert!(all.ends_with(&format!(" and {} more", parameters(&zoo).len() - 5)), "{all}");
        assert_eq!(parameters(&zoo)[2].shape, [4, 3]);
    }

    #[test]
    fn matrices_have_two_sides() {
        assert_eq!(matrix_sides(&[5, 3], 2), Some(([5, 3], true)));
        assert_eq!(matrix_sides(&[4, 3, 2, 2], 2), Some(([12, 4], false)));
        // vectors, a class token, and sides that are no larger than asked for
        for (shape, least) in [(&[][..], 1), (&[7], 1), (&[1, 1, 7], 1), (&[5, 3], 3), (&[3, 5], 3), (&[0, 5], 1)] {
            assert_eq!(matrix_sides(shape, least), None, "{shape:?}");
        }
    }
}
