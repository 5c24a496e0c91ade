//! What all diagrams have in common: their font, their ink and their error.

use std::fmt::Display;

use anyhow::anyhow;
use plotters::style::RGBColor;

pub const INK: RGBColor = RGBColor(60, 60, 60);
pub const FONT: &str = "sans-serif";

/// Turns an error of plotters, which may borrow the picture, into one that owns its text.
pub fn failed(error: impl Display) -> anyhow::Error {
    anyhow!("the picture cannot be drawn: {error}")
}
