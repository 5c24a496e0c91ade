//! Data sets of the programs, beside those of the libraries.

pub mod pairs;
pub mod shots;
pub mod texts;
pub mod wine;
