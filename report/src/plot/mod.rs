//! Diagrams as SVG: curves of several methods, and heat maps.

mod axis;
mod curves;
mod heat_map;
mod style;

pub use curves::{Panel, Series, panels};
pub use heat_map::{Heat, heat_maps};
