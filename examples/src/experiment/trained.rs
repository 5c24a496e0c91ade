//! How much a model trains.

use burn::module::{Module, ModuleVisitor, Param};
use burn::prelude::*;

use crate::backend::AB;

/// Returns the number of trained values.
pub fn trained_values(model: &impl Module<AB>) -> usize {
    struct Count(usize);
    impl ModuleVisitor<AB> for Count {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<AB, D>>) {
            self.0 += if param.is_require_grad() { param.shape().num_elements() } else { 0 };
        }
    }
    let mut count = Count(0);
    model.visit(&mut count);
    count.0
}
