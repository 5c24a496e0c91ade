//! A model with quantized weights, as a module of Burn.

use std::sync::Arc;

use burn::module::{
    AutodiffModule, Content, Devices, Module, ModuleDisplay, ModuleDisplayDefault, ModuleMapper, ModuleVisitor, Param,
    ParamId,
};
use burn::prelude::*;
use burn::tensor::backend::AutodiffBackend;

use super::find::find_weights;
use super::record::{QuantizedRecord, WeightRecord};
use super::report::{QuantizeReport, WeightBytes};
use super::scheme::QuantizeConfig;
use super::weight::{Absorb, Fill, Form, Places, Weight};
use crate::error::Error;
use crate::model::ForwardModel;
use crate::probe::Probe;

/// A model whose frozen matrices are integers with scales, and its trained ones too where the
/// [configuration](QuantizeConfig) says so.
///
/// Burn's autodiff backend can hold a quantized tensor and do nothing with it: it panics where the
/// model is forked to a device, loaded from a record, or called. Nor does a quantized tensor require a
/// gradient. So this module keeps integers and scales beside the model, on the host. What the model
/// has in their places depends on its backend:
///
/// - **Autodiff**, the form that burn-train holds: a tensor of the right shape that holds one number,
///   NaN. Parameters keep their ids, and trained ones their flag.
/// - **Any other**, the form of a step or an evaluation: floats or quantized tensors of Burn
///   ([`Unpack`](super::Unpack)). [`AutodiffModule::valid`] makes it.
///
/// [`Module::map`], which optimizers call, sees trained weights as floats on an autodiff backend. It
/// [rounds](super::Rounding) what comes back to the grid, and keeps that alone: there is no float copy
/// between two updates. During an update the trained weights exist as floats, and so they do in a
/// step. The moments of an optimizer such as Adam are floats at all times.
///
/// Records hold integers and scales bit for bit, at any precision, and load on every backend.
/// [`dequantized`](Self::dequantized) gives the model itself, for formats that know no quantized
/// weights.
#[derive(Clone, Debug)]
pub struct Quantized<B: Backend, M> {
    model: M,
    weights: Vec<Weight<B>>,
    config: Arc<QuantizeConfig>,
    report: Arc<QuantizeReport>,
    /// Maps that may have changed trained weights.
    updates: u64,
}

impl QuantizeConfig {
    /// Quantizes a model: its frozen matrices, and its trained ones as [`trained`](Self::trained) says.
    ///
    /// A matrix has two axes or more, of which the first, and the others taken together, are longer than
    /// one. Whatever stays a float is in the [report](Quantized::report), with the reason. Parameters that
    /// are trained before are trained after, or their scales are.
    ///
    /// On a backend without autodiff no parameter is marked as trained: all matrices are quantized.
    ///
    /// # Errors
    /// [`Error::QuantScheme`] for a scheme that cannot be kept, [`Error::NothingQuantized`] where no
    /// parameter can be quantized.
    pub fn quantize<B: Backend, M: Module<B>>(&self, model: M) -> Result<Quantized<B, M>, Error> {
        let (weights, report) = find_weights(self, &model)?;
        if weights.is_empty() {
            return Err(Error::NothingQuantized { report: report.to_string() });
        }
        let report = Arc::new(report);
        Ok(Quantized { model, weights, config: Arc::new(self.clone()), report, updates: 0 }.filled())
    }
}

impl<B: Backend, M: Module<B>> Quantized<B, M> {
    /// What was quantized, what was not, and why.
    pub fn report(&self) -> &QuantizeReport {
        &self.report
    }

    /// The settings.
    pub fn config(&self) -> &QuantizeConfig {
        &self.config
    }

    /// Bytes of the parameters between two steps.
    ///
    /// Of a model on a backend without autodiff it is what a record takes: such a model has tensors besides.
    pub fn weight_bytes(&self) -> WeightBytes {
        struct Count<'a, B: Backend> {
            weights: &'a [Weight<B>],
            next: usize,
            position: usize,
            bytes: WeightBytes,
        }
        impl<B: Backend> ModuleVisitor<B> for Count<'_, B> {
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
                let weight = self.weights.get(self.next).filter(|weight| weight.position == self.position);
                self.position += 1;
                if let Some(weight) = weight {
                    self.next += 1;
                    self.bytes.as_floats += weight.codes.len() * weight.codes.dtype().size();
                    self.bytes.quantized += weight.codes.bytes();
                    self.bytes.floats += weight.scales.as_ref().map_or(0, |_| 4 * weight.codes.num_scales());
                    self.bytes.residuals += weight.residual.as_ref().map_or(0, |residual| 4 * residual.len());
                } else {
                    let value = param.val();
                    let bytes = value.shape().num_elements() * value.dtype().size();
                    self.bytes.as_floats += bytes;
                    self.bytes.floats += bytes;
                }
            }
        }
        let mut count = Count { weights: &self.weights, next: 0, position: 0, bytes: WeightBytes::default() };
        self.model.visit(&mut count);
        count.bytes
    }

    /// The model with floats in all places, trained parameters marked as they were before they were
    /// quantized.
    ///
    /// It is for formats that know no quantized weights, such as safetensors, and for backpropagation.
    pub fn dequantized(&self) -> M {
        let mut weights = self.weights.clone();
        weights.iter_mut().for_each(|weight| weight.trained |= weight.scales.is_some());
        self.model.clone().map(&mut Fill::new(&weights, |_| Form::Float))
    }

    /// The same model with the trained factors multiplied into the scales, which are then fixed.
    #[must_use]
    pub fn with_fixed_scales(mut self) -> Self {
        for weight in &mut self.weights {
            if let Some(scales) = weight.scales.take() {
                let factors: Vec<f32> = scales.val().into_data().iter::<f32>().collect();
                Arc::make_mut(&mut weight.codes).scale_by(&factors);
            }
        }
        self.filled()
    }

    /// Loads a record.
    ///
    /// # Errors
    /// [`Error::QuantizedRecord`] where its weights are in other places, or of another shape or scheme.
    pub fn try_load_record(self, record: QuantizedRecord<M::Record>) -> Result<Self, Error> {
        let fail = |why: String| Error::QuantizedRecord { why };
        let (got, expected) = (record.weights.len(), self.weights.len());
        if got != expected {
            return Err(fail(format!("it has {got} quantized weights where the model has {expected}")));
        }
        let device = self.devices().first().cloned().unwrap_or_default();
        let pairs = record.weights.into_iter().zip(self.weights);
        let weights: Result<Vec<_>, String> = pairs.map(|(record, old)| record.into_weight(old, &device)).collect();
        let (weights, model) = (weights.map_err(fail)?, self.model.load_record(record.model));
        Ok(Self { model, weights, updates: record.updates, ..self }.filled())
    }

    /// The model with what this backend has in the places of weights.
    #[cfg(test)]
    pub(super) fn inner(&self) -> &M {
        &self.model
    }

    /// Puts into all places what this backend has there.
    fn filled(self) -> Self {
        let (has_placeholders, unpack) = (has_placeholders::<B>(), self.config.unpack);
        let form =
            |weight: &Weight<B>| if has_placeholders { Form::Placeholder } else { Form::in_passes(weight, unpack) };
        let model = self.model.map(&mut Fill::new(&self.weights, form));
        Self { model, ..self }
    }

    /// Maps trained factors of scales.
    fn map_scales(&mut self, mapper: &mut impl ModuleMapper<B>) {
        for weight in &mut self.weights {
            if let Some(scales) = weight.scales.take() {
                let names = || weight.path.iter().map(String::as_str).chain(["scales"]);
                names().for_each(|name| mapper.enter_module(name, "Quantized"));
                weight.scales = Some(mapper.map_float(scales));
                names().rev().for_each(|name| mapper.exit_module(name, "Quantized"));
            }
        }
    }

    /// The scales by `change`.
    fn change_scales(&mut self, change: impl Fn(Param<Tensor<B, 1>>) -> Param<Tensor<B, 1>>) {
        self.weights.iter_mut().for_each(|weight| weight.scales = weight.scales.take().map(&change));
    }
}

impl<B: Backend, M: Module<B>> Module<B> for Quantized<B, M> {
    type Record = QuantizedRecord<M::Record>;

    fn collect_devices(&self, devices: Devices<B>) -> Devices<B> {
        self.model.collect_devices(devices)
    }

    fn fork(mut self, device: &B::Device) -> Self {
        self.change_scales(|scales| scales.fork(device));
        Self { model: self.model.fork(device), ..self }
    }

    fn to_device(mut self, device: &B::Device) -> Self {
        self.change_scales(|scales| scales.to_device(device));
        Self { model: self.model.to_device(device), ..self }
    }

    fn visit<V: ModuleVisitor<B>>(&self, visitor: &mut V) {
        self.model.visit(visitor);
        for (weight, scales) in self.weights.iter().filter_map(|weight| weight.scales.as_ref().map(|s| (weight, s))) {
            let names = || weight.path.iter().map(String::as_str).chain(["scales"]);
            names().for_each(|name| visitor.enter_module(name, "Quantized"));
            visitor.visit_float(scales);
            names().rev().for_each(|name| visitor.exit_module(name, "Quantized"));
        }
    }

    fn map<V: ModuleMapper<B>>(mut self, mapper: &mut V) -> Self {
        if !has_placeholders::<B>() {
            self.model = self.model.map(mapper);
            if self.weights.iter().all(|weight| weight.scales.is_none()) {
                return self;
            }
            self.map_scales(mapper);
            let form = |weight: &Weight<B>| if weight.scales.is_some() { Form::Float } else { Form::Unchanged };
            let model = self.model.map(&mut Fill::new(&self.weights, form));
            return Self { model, ..self };
        }
        let exposed: Vec<bool> = self.weights.iter().map(|weight| weight.trained).collect();
        let form = |weight: &Weight<B>| if weight.trained { Form::Float } else { Form::Unchanged };
        let model = self.model.map(&mut Fill::new(&self.weights, form)).map(mapper);
        let (weights, QuantizeConfig { rounding, seed, .. }) = (&mut self.weights, &*self.config);
        let rounding = (*rounding, *seed, self.updates);
        self.model = model.map(&mut Absorb { weights, exposed: &exposed, rounding, places: Places::new() });
        self.updates += 1;
        self.map_scales(mapper);
        self
    }

    fn load_record(self, record: Self::Record) -> Self {
        self.try_load_record(record).unwrap_or_else(|error| panic!("{error}"))
    }

    fn into_record(self) -> Self::Record {
        let weights = self.weights.iter().map(WeightRecord::of).collect();
        let model = self.model.map(&mut Fill::new(&self.weights, |_| Form::Empty));
        QuantizedRecord { model: model.into_record(), weights, updates: self.updates }
    }
}

impl<B: AutodiffBackend, M: AutodiffModule<B>> AutodiffModule<B> for Quantized<B, M> {
    type InnerModule = Quantized<B::InnerBackend, M::InnerModule>;

    fn valid(&self) -> Self::InnerModule {
        let weights = self.weights.iter().map(|weight| with_scales(weight, weight.scales.as_ref().map(|s| s.valid())));
        let (config, report) = (self.config.clone(), self.report.clone());
        Quantized { model: self.model.valid(), weights: weights.collect(), config, report, updates: self.updates }
            .filled()
    }

    /// Integers and scales come from the module. Tensors in their places do not count.
    fn from_inner(module: Self::InnerModule) -> Self {
        let weights = module.weights.iter();
        let weights = weights.map(|weight| with_scales(weight, weight.scales.clone().map(AutodiffModule::from_inner)));
        let (weights, config, report) = (weights.collect(), module.config.clone(), module.report.clone());
        let empty = module.model.map(&mut Fill::new(&module.weights, |_| Form::Empty));
        Self { model: M::from_inner(empty), weights, config, report, updates: module.updates }.filled()
    }
}

/// Whether a model on this backend has placeholders: on a backend of autodiff.
fn has_placeholders<B: Backend>() -> bool {
    B::ad_enabled(&B::Device::default())
}

/// The same weight on another backend.
fn with_scales<B: Backend, B2: Backend>(weight: &Weight<B>, scales: Option<Param<Tensor<B2, 1>>>) -> Weight<B2> {
    let Weight { position, path, codes, trained, residual, .. } = weight.clone();
    Weight { position, path, codes, trained, scales, residual }
}

impl<B: Backend, M: Module<B> + ModuleDisplay> ModuleDisplayDefault for Quantized<B, M> {
    fn content(&self, content: Content) -> Option<Content> {
        content.add("model", &self.model).add_formatted(&self.report).optional()
    }
}

impl<B: Backend, M: Module<B> + ModuleDisplay> ModuleDisplay for Quantized<B, M> {}

impl<B: Backend, M: ForwardModel<B>> ForwardModel<B> for Quantized<B, M> {
    type Input = M::Input;
    type Target = M::Target;
    type Output = M::Output;

    /// # Panics
    /// On a backend of autodiff: quantized weights have no backward pass.
    fn forward(&self, input: M::Input, probe: &mut Probe<B>) -> M::Output {
        assert!(
            !has_placeholders::<B>(),
            "quantized weights have no backward pass: train the model with ForwardLearner, or evaluate `valid()`; \
             `dequantized()` gives a model that backpropagation can train"
        );
        self.model.forward(input, probe)
    }

    fn losses(&self, output: M::Output, target: M::Target) -> Tensor<B, 1> {
        self.model.losses(output, target)
    }

    fn classification(&self, output: &M::Output, target: &M::Target) -> Option<(Tensor<B, 2>, Tensor<B, 1, Int>)> {
        self.model.classification(output, target)
    }

    fn couple(&self, output: &M::Output, target: &M::Target) -> Option<M::Target> {
        self.model.couple(output, target)
    }

    fn exact_gradients(&self, output: &M::Output, target: &M::Target) -> Vec<(ParamId, Tensor<B, 1>)> {
        self.model.exact_gradients(output, target)
    }

    fn variance_covariate(&self, output: &M::Output, target: &M::Target) -> Option<Tensor<B, 1>> {
        self.model.variance_covariate(output, target)
    }

    fn failure(&self) -> Option<String> {
        self.model.failure()
    }

    fn skips_site_check(&self) -> bool {
        self.model.skips_site_check()
    }

    fn allocation_features(&self, output: &M::Output, target: &M::Target) -> Option<Tensor<B, 2>> {
        self.model.allocation_features(output, target)
    }

    fn error_signals(&self, output: &M::Output, target: &M::Target) -> Option<Tensor<B, 2>> {
        self.model.error_signals(output, target)
    }

    fn signal_outputs(&self, output: &M::Output, target: &M::Target) -> Option<Tensor<B, 2>> {
        self.model.signal_outputs(output, target)
    }
}
