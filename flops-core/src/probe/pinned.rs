//! The outputs of a pass's sites, kept so that a later pass can have them instead of its own.

use burn::module::ParamId;
use burn::prelude::*;

use super::layer::Site;
use super::layout::Layout;
use super::site_key::{Call, LayerId, TracedSite};

/// Outputs of the sites of a pass, in order.
#[derive(Clone)]
pub(crate) struct SiteOutputs<B: Backend> {
    /// What a tracing pass would see of them: a site for each output, or, by layer, for several.
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
    /// Keeps the output of the next call, and notes the [mismatch](super::Site::mismatch) of its site.
    ///
    /// - is_layer: whether all calls of the layer are one site
    pub fn keep<const D: usize>(
        &mut self,
        (parameters, layer, is_layer): (&[ParamId], LayerId, bool),
        output: &Tensor<B, D>,
        site: &dyn Site<B>,
    ) {
        let mismatch = site.mismatch().map(|difference| (parameters.first().copied(), difference));
        self.mismatch = self.mismatch.or(mismatch);
        let shape = output.dims();
        if let Call::First(_) = Call::next(layer, &self.sites, self.sites.len()) {
            let layout = Layout::new(&shape, None, false);
            let site = TracedSite::next((parameters, layer), &self.sites, (shape[0], layout));
            self.sites.push(TracedSite { is_layer, ..site });
        }
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
