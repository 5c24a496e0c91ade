//! The command line.

use std::path::PathBuf;

use clap::Parser;
use flops_backend::ON_HOST;
use flops_benches::INFERENCE_ROWS;

/// Measures what a forward-only step costs.
#[derive(Clone, Debug, Parser)]
pub struct Args {
    /// Folder for table.csv, summary.json and cost.svg
    #[arg(long, default_value = "artifacts/table")]
    pub artifact_dir: PathBuf,
    /// The model: vit_micro_patch4_32, vit_base_patch16_224, …
    #[arg(long, default_value = "vit_micro_patch4_32")]
    pub model: String,
    /// Images in a step whose rate is measured
    #[arg(long, default_value_t = 64)]
    pub batch: usize,
    /// Queries per image in such a step
    #[arg(long, default_value_t = 20)]
    pub queries: usize,
    /// The most rows in a pass
    #[arg(long, default_value_t = 256)]
    pub max_rows: usize,
    /// Rows in a pass of plain inference [default: 32 on the CPU, --max-rows on a device]
    #[arg(long)]
    inference_rows: Option<usize>,
    /// How often each is measured
    #[arg(long, default_value_t = 5)]
    pub rounds: usize,
    /// Measure the rates alone: no scopes, laws, dependence on batch, queries and depth, or memory
    #[arg(long)]
    pub rates_only: bool,
    /// The rates to measure: weights, activation, single, single_unpredicted, branch_unpredicted,
    /// branch_shrunk, last3, cls_tail, cls_tail_kept, backprop [default: all]
    #[arg(long, value_delimiter = ',')]
    pub only: Vec<String>,
    /// The Python that has PyTorch; without PyTorch its figures are left out
    #[arg(long, default_value = "python3")]
    pub python: String,
    /// PyTorch's device, such as cuda [default: cpu]
    #[arg(long)]
    pub torch_device: Option<String>,
    /// PyTorch's type of values: float32 or bfloat16
    #[arg(long, default_value = "float32")]
    pub torch_dtype: String,
    /// Rows in a pass of PyTorch's inference and queries [default: 64 on the CPU, --max-rows on a
    /// device]
    #[arg(long)]
    torch_rows: Option<usize>,
}

impl Args {
    /// Returns the rows in a pass of plain inference.
    pub fn inference_rows(&self) -> usize {
        self.inference_rows.unwrap_or(if ON_HOST { INFERENCE_ROWS } else { self.max_rows })
    }

    /// Returns the rows in a pass of PyTorch.
    pub fn torch_rows(&self) -> usize {
        self.torch_rows.unwrap_or(if ON_HOST { 64 } else { self.max_rows })
    }
}
