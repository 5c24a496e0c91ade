//! Which site of a model a site is, in a pass and from step to step.

use std::any::TypeId;

use burn::module::ParamId;
use serde::{Deserialize, Serialize};

use super::layout::Layout;
use crate::random::derive_seed;

/// Names a site by its layer: the first parameter of the layer, and the number of its call in a pass.
///
/// What is learned about a site is kept under this key. The running index of a site changes with
/// the set of trained parameters; the key does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SiteKey {
    /// The layer's first parameter, trained or not.
    parameter: u64,
    /// Earlier sites of the pass with this parameter.
    call: u32,
}

impl SiteKey {
    /// The layer's first parameter, by the value of its id.
    pub(crate) fn parameter(self) -> u64 {
        self.parameter
    }

    /// The key of a site of `parameters` behind the sites `earlier`.
    pub(super) fn next(parameters: &[ParamId], earlier: &[TracedSite]) -> Self {
        let parameter = parameters.first().map_or(0, ParamId::val);
        let call = earlier.iter().filter(|site| site.key.parameter == parameter).count() as u32;
        Self { parameter, call }
    }
}

/// A layer in the passes of a step: what makes its sites, and its parameters.
///
/// A linear layer and an output that is tied to its weight are two layers: they see the weight as
/// different matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LayerId {
    kind: TypeId,
    parameters: u64,
}

impl LayerId {
    /// Whether both have the same parameters. A site may be of another type in another kind of pass.
    pub(super) fn has_parameters_of(self, other: Self) -> bool {
        self.parameters == other.parameters
    }

    /// The layer of these parameters whose sites are of type `S`.
    pub(super) fn of<S: 'static>(parameters: &[ParamId]) -> Self {
        let ids: Vec<u64> = parameters.iter().map(ParamId::val).collect();
        Self { kind: TypeId::of::<S>(), parameters: derive_seed(&ids) }
    }
}

/// What the tracing pass sees of a site.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TracedSite {
    /// Which site it is.
    pub key: SiteKey,
    /// The layer that was called.
    pub(crate) layer: LayerId,
    /// Whether all calls of the layer are this site: noise of low rank on weights falls on the layer,
    /// not on a call.
    pub(crate) is_layer: bool,
    /// Rows of the output; 1 where it does not depend on the input.
    pub rows: usize,
    /// Values of a row of the output.
    pub coordinates: usize,
    /// How they lie.
    pub(crate) layout: Layout,
}

impl TracedSite {
    /// The next site of a pass behind the sites `earlier`, which stands for one call.
    pub(super) fn next(
        (parameters, layer): (&[ParamId], LayerId),
        earlier: &[TracedSite],
        (rows, layout): (usize, Layout),
    ) -> Self {
        let key = SiteKey::next(parameters, earlier);
        Self { key, layer, is_layer: false, rows, coordinates: layout.len(), layout }
    }

    /// Coordinates of a row, where tokens that are [alike](super::Probe::alike) count once.
    pub fn shared_coordinates(&self) -> usize {
        self.layout.shared()
    }
}

/// The site of a call among the sites of its pass, by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Call {
    /// A site that was not called before.
    First(usize),
    /// The site of an earlier call.
    Again(usize),
}

impl Call {
    /// The site of the next call of `layer`, after `called` sites of which `sites` are known.
    pub fn next(layer: LayerId, sites: &[TracedSite], called: usize) -> Self {
        match sites.iter().position(|site| site.is_layer && site.layer == layer) {
            Some(index) if index < called => Self::Again(index),
            _ => Self::First(called),
        }
    }
}

#[cfg(test)]
impl TracedSite {
    /// A site of the layer with this parameter, called once.
    pub(crate) fn fake(parameter: u64, coordinates: usize) -> Self {
        let id = ParamId::from(parameter);
        let layout = Layout::new(&[1, coordinates], None, false);
        Self::next((&[id], LayerId::of::<()>(&[id])), &[], (1, layout))
    }
}
