//! A network that burn-onnx made of `models/network.onnx`, and what one writes to train it.

// `Model`, with its weights: normalisation of the pixels, two linear layers, a ReLU between them
include!(concat!(env!("OUT_DIR"), "/network.rs"));

use burn::module::{ModuleVisitor, Param};
use burn::tensor::activation::relu;
use flops_core::{ForwardModel, Probe, cross_entropy};

impl<B: Backend> Model<B> {
    /// Mean and scale of the pixels, which nothing trains: burn-onnx calls them by numbers.
    pub fn constants(&self) -> [Tensor<B, 1>; 2] {
        [self.constant1.val(), self.constant2.val()]
    }
}

// ---- weight noise: the generated code as it is ---------------------------------------------------

impl<B: Backend> ForwardModel<B> for Model<B> {
    type Input = Tensor<B, 2>;
    type Target = Tensor<B, 1, Int>;
    type Output = Tensor<B, 2>;

    fn forward(&self, pixels: Tensor<B, 2>, _: &mut Probe<B>) -> Tensor<B, 2> {
        self.forward(pixels)
    }

    fn losses(&self, logits: Tensor<B, 2>, labels: Tensor<B, 1, Int>) -> Tensor<B, 1> {
        cross_entropy(logits, labels)
    }
}

// ---- activation noise: the same fields, the layers through the probe -----------------------------

/// The imported network with a forward pass that calls its layers through the probe.
#[derive(Module, Debug)]
pub struct Probed<B: Backend> {
    /// The network.
    pub network: Model<B>,
}

impl<B: Backend> ForwardModel<B> for Probed<B> {
    type Input = Tensor<B, 2>;
    type Target = Tensor<B, 1, Int>;
    type Output = Tensor<B, 2>;

    fn forward(&self, pixels: Tensor<B, 2>, probe: &mut Probe<B>) -> Tensor<B, 2> {
        let Model { linear1, linear2, .. } = &self.network;
        let [mean, scale] = self.network.constants();
        let normalised = (pixels - mean.unsqueeze()) / scale.unsqueeze();
        let hidden = relu(probe.linear(linear1, normalised));
        probe.linear(linear2, hidden)
    }

    fn losses(&self, logits: Tensor<B, 2>, labels: Tensor<B, 1, Int>) -> Tensor<B, 1> {
        cross_entropy(logits, labels)
    }

    fn classification(
        &self,
        logits: &Tensor<B, 2>,
        labels: &Tensor<B, 1, Int>,
    ) -> Option<(Tensor<B, 2>, Tensor<B, 1, Int>)> {
        Some((logits.clone(), labels.clone()))
    }
}

// ---- what is trained -----------------------------------------------------------------------------

/// A parameter of a module: its path, its number of values, and whether it is trained.
pub type Parameter = (String, usize, bool);

/// The parameters of a module on a backend with gradients.
///
/// Look at them after an import: burn-onnx makes layers of what it recognises, and constants, which
/// nothing trains, of all other weights.
pub fn parameters<B: Backend, M: Module<B>>(module: &M) -> Vec<Parameter> {
    #[derive(Default)]
    struct Collect(Vec<String>, Vec<Parameter>);
    impl<B: Backend> ModuleVisitor<B> for Collect {
        fn enter_module(&mut self, name: &str, _: &str) {
            self.0.push(name.into());
        }

        fn exit_module(&mut self, _: &str, _: &str) {
            self.0.pop();
        }

        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            self.1.push((self.0.join("."), param.shape().num_elements(), param.is_require_grad()));
        }
    }
    let mut collect = Collect::default();
    module.visit(&mut collect);
    collect.1
}
