//! Turns `models/network.onnx` into Rust code, which `src/imported.rs` includes.

mod convert;
mod operators;

use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let (model, out) = (Path::new("models/network.onnx"), std::env::var("OUT_DIR").unwrap_or_default());
    println!("cargo::rerun-if-changed=build");
    println!("cargo::rerun-if-changed={}", model.display());
    match convert::convert(model, Path::new(&out)) {
        Ok(warning) => {
            warning.iter().for_each(|warning| println!("cargo::warning={warning}"));
            ExitCode::SUCCESS
        }
        Err(why) => {
            println!("cargo::error={why}");
            ExitCode::FAILURE
        }
    }
}
