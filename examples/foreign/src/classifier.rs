//! A classifier in an ONNX file, run by tract. Nothing of it is visible but its answers.

use std::fmt;
use std::io::Cursor;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, anyhow, bail, ensure};
use burn::tensor::{Tensor, TensorData, backend::Backend};
use tract_onnx::pb::{AttributeProto, NodeProto};
use tract_onnx::prelude::{
    DatumExt, Framework, InferenceModelExt, IntoRunnable, IntoTensor, TValue, TVec, ToDim, TypedRunnableModel,
    tract_ndarray, tvec,
};
use tract_onnx::tract_hir::infer::Factoid;

const FOREST: &[u8] = include_bytes!("../models/forest.onnx");
/// The remedy for most that can be wrong with a file.
const EXPORT: &str = "use a classifier exported by skl2onnx's to_onnx(…, options={id(model): {'zipmap': False}})";
/// Rows of the pass that tells whether answers are probabilities.
const TRIED_ROWS: usize = 3;

fn broken(name: &str, why: impl fmt::Display) -> anyhow::Error {
    anyhow!("{name}: this is no ONNX file that tract can run ({why}); {EXPORT}")
}

/// Leaves out what a forest's leaves add 0 to.
///
/// tract 0.23 walks through the entries of all leaves to reach those of one, and skl2onnx writes an
/// entry for each class: without the zeros a forest of digits is five times as fast.
fn drop_zeros(node: &mut NodeProto) {
    let entries = |name: &str| node.attribute.iter().find(|attribute| attribute.name == name);
    let (Some(weights), Some(trees)) = (entries("class_weights"), entries("class_treeids")) else { return };
    let (weights, trees) = (&weights.floats, &trees.ints);
    // a tree without entries would be an error
    let keeps = |i: usize| weights[i] != 0.0 || i == 0 || trees.get(i) != trees.get(i - 1);
    let kept: Vec<usize> = (0..weights.len()).filter(|&i| keeps(i)).collect();
    for attribute in node.attribute.iter_mut().filter(|attribute| attribute.name.starts_with("class_")) {
        let AttributeProto { ints, floats, .. } = attribute;
        *ints = kept.iter().filter_map(|&i| ints.get(i).copied()).collect();
        *floats = kept.iter().filter_map(|&i| floats.get(i).copied()).collect();
    }
}

/// Refuses classes that are not numbered from 0: a label is the column of its probability.
fn check_labels(nodes: &[NodeProto], name: &str) -> Result<()> {
    let attributes = nodes.iter().flat_map(|node| &node.attribute);
    for labels in attributes.filter(|it| it.name.starts_with("classlabels_int")).map(|it| &it.ints) {
        let counted = labels.iter().zip(0..).all(|(&label, column)| label == column);
        ensure!(counted, "{name}: its classes are {labels:?}; train and export it with classes that count from 0");
    }
    Ok(())
}

/// A black box: rows of numbers go in, the probability of each class comes out.
pub struct Classifier {
    plan: Arc<TypedRunnableModel>,
    /// Which output has the probabilities.
    output: usize,
    /// Numbers of a row.
    pub features: usize,
    /// Classes.
    pub classes: usize,
    rows: AtomicU64,
    failure: Mutex<Option<String>>,
}

impl fmt::Debug for Classifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Classifier").field("features", &self.features).field("classes", &self.classes).finish()
    }
}

impl Classifier {
    /// The embedded random forest, which knows the digits of the first camera.
    pub fn embedded() -> Result<Self> {
        Self::new(FOREST, "the embedded forest")
    }

    /// Reads an ONNX file.
    pub fn read(file: &Path) -> Result<Self> {
        let name = file.display().to_string();
        let bytes = std::fs::read(file).with_context(|| format!("{name}: cannot be read; name an ONNX file"))?;
        Self::new(&bytes, &name)
    }

    /// Takes the bytes of an ONNX file; errors call it `name`.
    pub fn new(bytes: &[u8], name: &str) -> Result<Self> {
        // tract indexes into what a file says of itself, and a panic is no line for a user
        let hook = take_hook();
        set_hook(Box::new(|_| {}));
        let build = catch_unwind(AssertUnwindSafe(|| Self::build(bytes, name)));
        set_hook(hook);
        build.unwrap_or_else(|_| Err(broken(name, "tract gave up on it")))
    }

    fn build(bytes: &[u8], name: &str) -> Result<Self> {
        let onnx = tract_onnx::onnx();
        let mut proto = onnx.proto_model_for_read(&mut Cursor::new(bytes)).map_err(|error| broken(name, error))?;
        let nodes = proto.graph.as_mut().map(|graph| &mut graph.node).filter(|nodes| !nodes.is_empty());
        let nodes = nodes.ok_or_else(|| broken(name, "it has no graph"))?;
        check_labels(nodes, name)?;
        nodes.iter_mut().filter(|node| node.op_type == "TreeEnsembleClassifier").for_each(drop_zeros);
        let mut model = onnx.model_for_proto_model(&proto).map_err(|error| broken(name, error.root_cause()))?;
        let mut names = model.nodes().iter().map(|node| node.op.name().into_owned());
        if let Some(operator) = names.find_map(|name| Some(name.strip_prefix("Unimplemented(")?.replace(')', ""))) {
            bail!("{name}: tract cannot run the operator {operator}; {EXPORT}");
        }
        ensure!(
            model.inputs.len() == 1,
            "{name}: {} inputs; use a model with one, rows of numbers",
            model.inputs.len()
        );
        let fact = model.input_fact(0)?;
        let shape: Vec<_> = fact.shape.dims().map(|dim| dim.concretize().and_then(|dim| dim.to_i64().ok())).collect();
        let [_, Some(features)] = shape[..] else {
            bail!("{name}: its input has the shape {:?}; use a model of rows of numbers, [None, features]", fact.shape)
        };
        let features = features as usize;
        let rows = model.symbols.sym("rows");
        model.set_input_fact(0, f32::fact([rows.to_dim(), features.to_dim()]).into())?;
        let plan = model.into_optimized().and_then(|model| model.into_runnable());
        let plan = plan.map_err(|error| broken(name, format!("{error:#}")))?;
        let mut classifier =
            Self { plan, output: 0, features, classes: 0, rows: AtomicU64::new(0), failure: Mutex::default() };
        classifier.find_probabilities(name)?;
        Ok(classifier)
    }

    /// Finds the output whose rows are probabilities, by asking.
    fn find_probabilities(&mut self, name: &str) -> Result<()> {
        let values: Vec<f32> = (0..TRIED_ROWS * self.features).map(|i| (i % 7) as f32 / 7.0).collect();
        let answers = self.run(&values, TRIED_ROWS).map_err(|error| broken(name, format!("{error:#}")))?;
        for (output, answer) in answers.iter().enumerate() {
            let Ok(view) = answer.to_plain_array_view::<f32>() else { continue };
            let &[TRIED_ROWS, classes] = view.shape() else { continue };
            let sums_to_one = view.rows().into_iter().all(|row| (row.sum() - 1.0).abs() < 1e-3);
            if classes > 1 && sums_to_one && view.iter().all(|p| (-1e-6..=1.0 + 1e-3).contains(p)) {
                (self.output, self.classes) = (output, classes);
                return Ok(());
            }
        }
        bail!("{name}: no output has probabilities, [rows, classes] with rows that sum to 1; {EXPORT}")
    }

    fn run(&self, values: &[f32], rows: usize) -> Result<TVec<TValue>> {
        let input = tract_ndarray::ArrayView2::from_shape((rows, self.features), values)?.to_owned();
        self.plan.run(tvec!(input.into_tensor().into()))
    }

    /// The probabilities of all classes for `rows` rows, one after another.
    pub fn probabilities(&self, values: &[f32], rows: usize) -> Result<Vec<f32>> {
        self.rows.fetch_add(rows as u64, Relaxed);
        let answers = self.run(values, rows)?;
        let view = answers[self.output].to_plain_array_view::<f32>()?;
        Ok(view.iter().copied().collect())
    }

    /// [`probabilities`](Self::probabilities) of a tensor's rows, all in one call.
    ///
    /// NaN after a failure, which [`failure`](Self::failure) tells.
    pub fn ask<B: Backend>(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        let (device, [rows, _]) = (x.device(), x.dims());
        let values: Vec<f32> = x.into_data().iter().collect();
        let asked = catch_unwind(AssertUnwindSafe(|| self.probabilities(&values, rows)));
        let asked = asked.unwrap_or_else(|_| Err(anyhow!("tract gave up on {rows} rows")));
        let answer = asked.unwrap_or_else(|error| {
            *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(format!("{error:#}"));
            vec![f32::NAN; rows * self.classes]
        });
        Tensor::from_data(TensorData::new(answer, [rows, self.classes]), &device)
    }

    /// Rows that it was asked about so far.
    pub fn rows(&self) -> u64 {
        self.rows.load(Relaxed)
    }

    /// Why it could not answer, if so.
    pub fn failure(&self) -> Option<String> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
