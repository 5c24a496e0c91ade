//! The outputs of a pass's sites, kept so that a later pass can have them instead of its own.

use burn::module::ParamId;
use burn::prelude::*;

use super::layout::Layout;
use super::site_key::{SiteKey, TracedSite};

/// Outputs of the sites of a pass, in order.
#[derive(Clone)]
pub(crate) struct SiteOutputs<B: Backend> {
    /// What a tracing pass would see of them.
    pub sites: Vec<TracedSite>,
    /// Flattened.
    outputs: Vec<Tensor<B, 1>>,
    /// The first site whose gradients belong to another output, by its first parameter, and how far
    /// that is off.
    pub mismatch: Option<(Option<ParamId>, f64)>,
}

impl<B: Backend> Default for SiteOutputs<B> {
    fn default() -> Self {
        Self { sites: vec![], outputs: vec![], mismatch: None }
    }
}

impl<B: Backend> SiteOutputs<B> {
    /// Keeps the output of the next site, and notes its [mismatch](super::Site::mismatch).
    pub fn keep<const D: usize>(&mut self, parameters: &[ParamId], output: &Tensor<B, D>, mismatch: Option<f64>) {
        let mismatch = mismatch.map(|difference| (parameters.first().copied(), difference));
        self.mismatch = self.mismatch.or(mismatch);
        let shape = output.dims();
        let key = SiteKey::next(parameters, &self.sites);
        let layout = Layout::new(&shape, None, false);
        self.sites.push(TracedSite { key, rows: shape[0], coordinates: layout.len(), layout });
        self.outputs.push(output.clone().reshape([shape.iter().product::<usize>()]));
    }

    /// What was kept of site `index`, in place of `output`; that itself where nothing like it was.
    pub fn pin<const D: usize>(&self, index: usize, output: Tensor<B, D>) -> Tensor<B, D> {
        let shape = output.dims();
        match self.outputs.get(index) {
            Some(kept) if kept.dims() == [shape.iter().product::<usize>()] => kept.clone().reshape(shape),
            _ => output,
        }
    }
}
