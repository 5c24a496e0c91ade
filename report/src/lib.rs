//! How the examples and the benches report: progress lines, tables, diagrams as SVG, and errors.

pub mod plot;
pub mod program;
mod progress;
mod table;

pub use progress::Progress;
pub use table::{markdown_table, print_table};
