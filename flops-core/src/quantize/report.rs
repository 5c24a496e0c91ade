//! What was quantized, what was not and why, and what it takes.

use std::fmt;

/// A parameter that was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ParameterReport {
    /// Names of fields from the model down, with points between them.
    pub path: String,
    /// The shape.
    pub shape: Vec<usize>,
    /// Whether it is trained.
    pub trained: bool,
    /// Why it stays a float; `None` for one that was quantized.
    pub kept: Option<Kept>,
}

/// Why a parameter stays a float.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kept {
    /// It is trained, and [trained weights](super::TrainedWeights) stay floats.
    Trained,
    /// It is no matrix: a bias, a norm, a class token or positions. Few bytes, and much harm.
    Vector,
    /// The blocks of the scheme do not divide its last axis.
    Indivisible,
    /// It is trained, and all values of a block are zero, as in the second matrix of a new LoRA. Such a
    /// block has no grid that an update could move on.
    Zeros,
    /// Its values are not finite.
    NotFinite,
    /// It has been quantized before.
    Quantized,
}

impl fmt::Display for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Trained => "trained",
            Self::Vector => "no matrix",
            Self::Indivisible => "last axis not divisible by the block",
            Self::Zeros => "trained, and a block of zeros has no grid",
            Self::NotFinite => "values not finite",
            Self::Quantized => "quantized before",
        })
    }
}

/// What [`quantize`](super::QuantizeConfig::quantize) did, a line for each float parameter of the model
/// in its order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct QuantizeReport {
    /// The parameters.
    pub parameters: Vec<ParameterReport>,
}

impl QuantizeReport {
    /// Those that were quantized.
    pub fn quantized(&self) -> impl Iterator<Item = &ParameterReport> {
        self.parameters.iter().filter(|p| p.kept.is_none())
    }

    /// Those that stay floats for this reason.
    pub fn kept(&self, why: Kept) -> impl Iterator<Item = &ParameterReport> {
        self.parameters.iter().filter(move |p| p.kept == Some(why))
    }
}

impl fmt::Display for QuantizeReport {
    /// `20 parameters quantized; floats: 14 (trained), 30 (no matrix)`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} parameters quantized", self.quantized().count())?;
        let reasons = [Kept::Trained, Kept::Vector, Kept::Indivisible, Kept::Zeros, Kept::NotFinite, Kept::Quantized];
        let counts = reasons.map(|why| (self.kept(why).count(), why)).into_iter().filter(|(count, _)| *count > 0);
        let counts: Vec<String> = counts.map(|(count, why)| format!("{count} ({why})")).collect();
        if counts.is_empty() { Ok(()) } else { write!(f, "; floats: {}", counts.join(", ")) }
    }
}

/// Bytes of a model's parameters between two steps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct WeightBytes {
    /// What all of them would take as floats.
    pub as_floats: usize,
    /// Quantized parameters, packed, with their scales.
    pub quantized: usize,
    /// Parameters that are floats.
    pub floats: usize,
    /// What [error feedback](super::Rounding::ErrorFeedback) keeps.
    pub residuals: usize,
}

impl WeightBytes {
    /// All that is held.
    #[must_use]
    pub fn held(&self) -> usize {
        self.quantized + self.floats + self.residuals
    }
}
