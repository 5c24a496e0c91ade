//! λ of a learned allocator, as the parameters of a module hold it.

use burn::module::Param;
use burn::prelude::{Backend, Tensor};

use crate::ops;

/// The values of a parameter, on the host.
pub(super) fn values<B: Backend>(param: &Param<Tensor<B, 1>>) -> Vec<f64> {
    param.val().into_data().iter::<f64>().collect()
}

/// The same parameter with other values.
pub(super) fn set_values<B: Backend>(param: Param<Tensor<B, 1>>, values: &[f64]) -> Param<Tensor<B, 1>> {
    let values: Vec<f32> = values.iter().map(|&v| v as f32).collect();
    param.map(|old| {
        let new = ops::from_host(values, [old.dims()[0]], &old.device());
        new.set_require_grad(old.is_require_grad())
    })
}
