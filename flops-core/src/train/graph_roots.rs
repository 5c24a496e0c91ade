//! Frees what burn-autodiff keeps of parameters that an update has replaced.
//!
//! burn-autodiff registers every tensor that requires a gradient as the root of a graph, about 1 kB
//! each. It frees the roots of dropped tensors at the end of a backward pass alone. Training from
//! forward passes has none, and every update makes a new tensor of every trained parameter.

use burn::backend::{Autodiff, Flex};
use burn::prelude::*;

/// Updates from one cleaning to the next. A cleaning visits all roots, those in use included.
const EVERY: u64 = 16;

/// Frees the roots of dropped tensors after every 16th update.
///
/// The backward pass of a single number on the CPU does it: burn-autodiff has one register of roots
/// for all backends.
pub(super) fn free_graph_roots(updates: u64) {
    if updates.is_multiple_of(EVERY) {
        Tensor::<Autodiff<Flex>, 1>::zeros([1], &Default::default()).require_grad().backward();
    }
}

#[cfg(all(test, feature = "train"))]
mod tests {
    use burn::nn::LinearConfig;
    use burn::optim::SgdConfig;
    use burn::train::TrainStep;

    use crate::allocator::{Neyman, QueryBudget};
    use crate::batch::Batch;
    use crate::model::ForwardModel;
    use crate::probe::Probe;
    use crate::testing::{AB, B};
    use crate::train::{ForwardConfig, ForwardLearner, resident_memory};
    use burn::prelude::*;

    /// Tells the test's own process from the one that measures.
    const TASK: &str = "FLOPS_MEASURE_MEMORY";

    /// Ten layers, so that a root that is kept shows.
    #[derive(Module, Debug)]
    struct Deep<B: Backend> {
        layers: Vec<burn::nn::Linear<B>>,
    }

    impl<B: Backend> ForwardModel<B> for Deep<B> {
        type Input = Tensor<B, 2>;
        type Target = ();
        type Output = Tensor<B, 2>;
        fn forward(&self, x: Tensor<B, 2>, probe: &mut Probe<B>) -> Tensor<B, 2> {
            self.layers.iter().fold(x, |x, layer| probe.linear(layer, x))
        }
        fn losses(&self, y: Tensor<B, 2>, (): ()) -> Tensor<B, 1> {
            y.powi_scalar(2).sum_dim(1).squeeze_dim(1)
        }
    }

    /// Bytes by which 1,000 steps raise the memory, when 1,100 have filled what is bounded.
    fn growth() -> u64 {
        let device = Default::default();
        let layers = (0..10).map(|_| LinearConfig::new(2, 2).init(&device)).collect();
        let config = ForwardConfig::new(QueryBudget::new(1, 1).unwrap());
        let mut learner = ForwardLearner::new(Deep::<AB> { layers }, Neyman, config).unwrap();
        let mut optimizer = SgdConfig::new().init();
        let mut step = |learner: ForwardLearner<AB, Deep<AB>, Neyman>| {
            let batch = Batch { ids: vec![1, 2], input: Tensor::<B, 2>::ones([2, 2], &device), target: () };
            let output = TrainStep::step(&learner, batch);
            learner.clone().optimize::<AB, _>(&mut optimizer, 1e-4, output.grads)
        };
        for _ in 0..1100 {
            learner = step(learner);
        }
        let before = resident_memory().unwrap();
        for _ in 0..1000 {
            learner = step(learner);
        }
        resident_memory().unwrap().saturating_sub(before)
    }

    /// 20 parameters of about 1 kB for each step would be 20 MB; nothing but the allocator's
    /// scatter is left.
    ///
    /// A process of its own measures, for other tests allocate as well.
    #[test]
    fn memory_does_not_grow_with_the_steps() {
        if resident_memory().is_none() {
            return;
        }
        if std::env::var(TASK).is_ok() {
            println!("grown by {} bytes.", growth());
            return;
        }
        let mut command = std::process::Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "train::graph_roots::tests::memory_does_not_grow_with_the_steps", "--nocapture"]);
        let output = command.env(TASK, "1").output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        let grown = said.split_once("grown by ").and_then(|(_, rest)| rest.split_once(" bytes."));
        let grown: u64 = grown.unwrap_or_else(|| panic!("{said}")).0.parse().unwrap();
        assert!(grown < 2 << 20, "{grown} bytes in 1,000 steps");
    }
}
