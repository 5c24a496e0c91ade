//! How weights are quantized, and what happens to those that are trained.

use burn::tensor::quantization::{QuantLevel, QuantMode, QuantParam, QuantScheme, QuantStore, QuantValue};
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::names::named_enum;

/// Values that share a scale in the schemes of [`WeightScheme`] with blocks.
const BLOCK: u8 = 32;

/// The schemes that have a name; any other is a [`QuantScheme`] of Burn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum WeightScheme {
    /// 8 bits, −127 to 127; a scale for each 32 values along the last axis.
    Int8,
    /// 4 bits, −7 to 7; a scale for each 32 values along the last axis.
    Int4,
    /// 8 bits, −127 to 127; one scale for each parameter.
    Int8Tensor,
    /// 4 bits, −7 to 7; one scale for each parameter.
    Int4Tensor,
}

named_enum! {
    WeightScheme: "weight scheme" {
        Int8 => "int8",
        Int4 => "int4",
        Int8Tensor => "int8-tensor",
        Int4Tensor => "int4-tensor",
    }
}

impl WeightScheme {
    /// The scheme in Burn's words.
    #[must_use]
    pub fn scheme(self) -> QuantScheme {
        let (value, level) = match self {
            Self::Int8 => (QuantValue::Q8S, QuantLevel::block([BLOCK])),
            Self::Int4 => (QuantValue::Q4S, QuantLevel::block([BLOCK])),
            Self::Int8Tensor => (QuantValue::Q8S, QuantLevel::Tensor),
            Self::Int4Tensor => (QuantValue::Q4S, QuantLevel::Tensor),
        };
        QuantScheme::default().with_value(value).with_level(level)
    }
}

impl From<WeightScheme> for QuantScheme {
    fn from(scheme: WeightScheme) -> Self {
        scheme.scheme()
    }
}

/// What becomes of the matrices that are trained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum TrainedWeights {
    /// They stay floats.
    #[default]
    Float,
    /// They are quantized, and every update is [rounded](Rounding) to their grid.
    Grid,
    /// They are quantized, and their scales are trained in their place (QZO, arXiv 2505.13430).
    ///
    /// A trained scale is a factor of the one that quantization found, so it begins at 1 and σ is
    /// relative. Only [weight noise](crate::Space::Weights) reaches it.
    Scales,
}

named_enum! {
    TrainedWeights: "form of trained weights" { Float => "float", Grid => "grid", Scales => "scales" }
}

/// How an update is brought to the grid of a trained weight.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Rounding {
    /// To the nearest value. Updates below half a step of the grid are lost: **biased**.
    Nearest,
    /// Up or down, so that the mean is the updated value: unbiased inside the grid.
    #[default]
    Stochastic,
    /// To the nearest value, and what is lost is added to the next update.
    ///
    /// A step is biased, the sum of all is not: it is off by what is still kept. That is a float for
    /// each trained value.
    ErrorFeedback,
}

named_enum! {
    Rounding: "rounding" { Nearest => "nearest", Stochastic => "stochastic", ErrorFeedback => "error-feedback" }
}

/// When frozen weights become floats.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Unpack {
    /// Once for a step, and once for an evaluation.
    ///
    /// The floats live as long as the step does. This is the fastest, and exact for every layer.
    #[default]
    EachStep,
    /// In every pass, by Burn, a layer at a time.
    ///
    /// A step holds no float copy of the frozen weights, but of those whose last axis does not fill
    /// whole words of 32 bits. On Burn's CPU backends a pass of few rows
    /// takes several times as long, because each unpacks the whole weight. Where a scale belongs to a
    /// block, Burn rounds a transposed weight once more: [`Probe::tied_linear`](crate::Probe::tied_linear)
    /// unpacks it first.
    EachPass,
}

named_enum! { Unpack: "time of unpacking" { EachStep => "each-step", EachPass => "each-pass" } }

/// Settings of a [`Quantized`](super::Quantized) model.
///
/// ```
/// use flops_core::quantize::{QuantizeConfig, Rounding, TrainedWeights, WeightScheme};
///
/// let config = QuantizeConfig::new(WeightScheme::Int4)
///     .with_trained(TrainedWeights::Grid)
///     .with_rounding(Rounding::Stochastic)
///     .with_seed(7);
/// assert_eq!("int4".parse(), Ok(WeightScheme::Int4));
/// # let _ = config;
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct QuantizeConfig {
    /// Bits, and what shares a scale. How values are stored is not taken from it: they are packed.
    pub scheme: QuantScheme,
    /// What becomes of the matrices that are trained.
    pub trained: TrainedWeights,
    /// How updates are rounded.
    pub rounding: Rounding,
    /// When frozen weights become floats.
    pub unpack: Unpack,
    /// Seed of stochastic rounding.
    pub seed: u64,
}

impl QuantizeConfig {
    /// Frozen weights by a scheme; trained ones stay floats.
    #[must_use]
    pub fn new(scheme: impl Into<QuantScheme>) -> Self {
        Self {
            scheme: scheme.into(),
            trained: TrainedWeights::default(),
            rounding: Rounding::default(),
            unpack: Unpack::default(),
            seed: 0,
        }
    }

    /// Sets what becomes of the matrices that are trained.
    #[must_use]
    pub fn with_trained(mut self, trained: TrainedWeights) -> Self {
        self.trained = trained;
        self
    }

    /// Sets how updates are rounded.
    #[must_use]
    pub fn with_rounding(mut self, rounding: Rounding) -> Self {
        self.rounding = rounding;
        self
    }

    /// Sets when frozen weights become floats.
    #[must_use]
    pub fn with_unpack(mut self, unpack: Unpack) -> Self {
        self.unpack = unpack;
        self
    }

    /// Sets the seed of stochastic rounding.
    #[must_use]
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }
}

/// The integers of a scheme, and how many values share a scale.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Grid {
    /// The least and the largest integer.
    pub range: (f32, f32),
    /// Bits of an integer.
    pub bits: usize,
    /// Values of a scale; `None` for all of a parameter.
    pub block: Option<usize>,
}

impl Grid {
    /// # Errors
    /// [`Error::QuantScheme`] for floats of few bits, blocks of several axes, and scales that are not f32.
    pub fn of(scheme: &QuantScheme) -> Result<Self, Error> {
        let bits = match scheme.value {
            QuantValue::Q8F | QuantValue::Q8S => Some(8),
            QuantValue::Q4F | QuantValue::Q4S => Some(4),
            QuantValue::Q2F | QuantValue::Q2S => Some(2),
            QuantValue::E4M3 | QuantValue::E5M2 | QuantValue::E2M1 => None,
        };
        let block = match scheme.level {
            QuantLevel::Tensor => Some(None),
            QuantLevel::Block(size) => {
                let (last, others) = size.as_slice().split_last().unwrap_or((&0, &[]));
                (*last > 0 && others.iter().all(|&side| side == 1)).then_some(Some(usize::from(*last)))
            }
        };
        match (bits, block, scheme.param, scheme.mode) {
            (Some(bits), Some(block), QuantParam::F32, QuantMode::Symmetric) => {
                Ok(Self { range: scheme.value.range(), bits, block })
            }
            _ => Err(Error::QuantScheme { scheme: format!("{scheme:?}") }),
        }
    }

    /// Values of a scale in a parameter of `len` values.
    pub fn values_of_a_scale(&self, len: usize) -> usize {
        self.block.unwrap_or(len).max(1)
    }
}

/// The scheme as it is stored: integers packed into words, as Burn's GPU backends have them.
pub(super) fn packed(scheme: QuantScheme) -> QuantScheme {
    scheme.with_store(QuantStore::PackedU32(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schemes_have_names_and_grids() {
        for scheme in WeightScheme::ALL {
            assert_eq!(scheme.to_string().parse(), Ok(scheme));
            let grid = Grid::of(&scheme.scheme()).unwrap();
            assert_eq!(grid.block.is_none(), scheme.name().ends_with("tensor"));
            assert_eq!(grid.range, if grid.bits == 8 { (-127.0, 127.0) } else { (-7.0, 7.0) });
        }
        let unknown = "int3".parse::<WeightScheme>().unwrap_err().to_string();
        assert_eq!(unknown, "unknown weight scheme 'int3'; choose one of int8, int4, int8-tensor, int4-tensor");
    }

    #[test]
    fn schemes_that_cannot_be_kept_are_named() {
        let int8 = WeightScheme::Int8.scheme();
        let float = int8.with_value(QuantValue::E4M3);
        let half_scales = int8.with_param(QuantParam::F16);
        let square = int8.with_level(QuantLevel::block([2, 32]));
        for scheme in [float, half_scales, square] {
            let error = Grid::of(&scheme).unwrap_err().to_string();
            assert!(error.contains(&format!("{scheme:?}")) && error.contains("WeightScheme"), "{error}");
        }
        assert_eq!(Grid::of(&int8.with_level(QuantLevel::block([1, 16]))).unwrap().block, Some(16));
    }
}
