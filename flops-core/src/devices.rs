//! The devices of one process as workers.

use burn::prelude::*;
use burn::tensor::backend::DeviceOps;
use flops_executor::{Executor, ExecutorError, JobFailure, Jobs, Round};

use crate::error::Error;

/// An executor that runs the jobs of a step on several devices of this process.
///
/// Each device has a copy of the model for every round, and takes the next job when it is free. Results come
/// back to the first device, which is the model's: it sums, and holds the optimizer. Results are summed in the
/// order of the jobs, so that they do not depend on the number of devices of one kind.
///
/// Set the [leaves](crate::Estimator::leaves) to the number of devices or more, where a batch fits into one
/// pass: no pass holds examples of two leaves.
///
/// # Example
/// ```
/// use std::sync::Arc;
/// use burn::backend::Flex;
/// use flops_core::Devices;
///
/// // on a GPU: [CudaDevice::new(0), CudaDevice::new(1)]
/// let devices = Devices::new::<Flex>(&[Default::default(), Default::default()])?;
/// # fn run<B: burn::prelude::Backend, M: burn::module::Module<B>, A: burn::module::Module<B>>(
/// #     learner: flops_core::ForwardLearner<B, M, A>, devices: Devices,
/// # ) {
/// let learner = learner.with_executor(Arc::new(devices));
/// # }
/// # Ok::<(), flops_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Devices(Vec<(u16, u16)>);

impl Devices {
    /// An executor on these devices; the first is the model's.
    ///
    /// # Errors
    /// [`Error::Setting`] for no device.
    pub fn new<B: Backend>(devices: &[B::Device]) -> Result<Self, Error> {
        if devices.is_empty() {
            let remedy = "name at least one, that of the model".to_string();
            return Err(Error::Setting { name: "devices", value: 0.0, remedy });
        }
        let ids = devices.iter().map(|device| device.id());
        Ok(Self(ids.map(|id| (id.type_id, id.index_id)).collect()))
    }
}

impl Executor for Devices {
    fn run(&self, round: &Round, jobs: &mut dyn Jobs) -> Result<(), ExecutorError> {
        let failed = |failure: JobFailure| ExecutorError::job("this process", failure);
        jobs.run(0..round.jobs).map_err(failed)
    }

    fn is_local(&self) -> bool {
        true
    }

    fn devices(&self) -> Vec<(u16, u16)> {
        self.0.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::B;

    #[test]
    fn no_device_is_an_error() {
        assert!(Devices::new::<B>(&[]).unwrap_err().to_string().contains("devices"));
        assert_eq!(Devices::new::<B>(&[Default::default(); 2]).unwrap().devices().len(), 2);
    }
}
