//! Pictures as SVG: curves and heat maps, and contact sheets of images.

pub mod answers;
pub mod contact_sheet;

pub use flops_report::plot::{Heat, Panel, Series, heat_maps, panels};
