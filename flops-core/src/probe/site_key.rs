//! Which site of a model a site is, from step to step.

use burn::module::ParamId;
use serde::{Deserialize, Serialize};

use super::layout::Layout;

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

/// What the tracing pass sees of a site.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TracedSite {
    /// Which site it is.
    pub key: SiteKey,
    /// Rows of the output; 1 where it does not depend on the input.
    pub rows: usize,
    /// Values of a row of the output.
    pub coordinates: usize,
    /// How they lie.
    pub(crate) layout: Layout,
}

impl TracedSite {
    /// Coordinates of a row, where tokens that are [alike](super::Probe::alike) count once.
    pub fn shared_coordinates(&self) -> usize {
        self.layout.shared()
    }
}

#[cfg(test)]
impl TracedSite {
    /// A site of the layer with this parameter, called once.
    pub(crate) fn fake(parameter: u64, coordinates: usize) -> Self {
        let layout = Layout::new(&[1, coordinates], None, false);
        Self { key: SiteKey { parameter, call: 0 }, rows: 1, coordinates, layout }
    }
}
