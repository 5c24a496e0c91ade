//! How the examples and the benches report: progress lines, tables, diagrams as SVG, and errors.
//!
//! A crate that prints has `#[macro_use] extern crate flops_report` at its root: its `println!` says
//! no more where nobody reads it, and the program goes on.

// first, so that the macros are in scope below
#[macro_use]
pub mod output;

pub mod plot;
pub mod program;
mod progress;
mod table;

pub use progress::Progress;
pub use table::{markdown_table, print_table};
