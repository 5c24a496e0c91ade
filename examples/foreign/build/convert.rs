//! The call of burn-onnx, with its panics as errors of one line.

use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::path::Path;

use burn_onnx::{LoadStrategy, ModelGen};

/// Writes the code of `model` and its weights, `<name>.rs` and `<name>.bpk`, into the folder `out`.
///
/// # Errors
/// A line that names the file, what is wrong with it and what to do.
pub fn convert(model: &Path, out: &Path) -> Result<(), String> {
    let text = |path: &Path| path.to_str().map(String::from).ok_or(format!("{}: use a path in UTF-8", path.display()));
    let (input, folder) = (text(model)?, text(out)?);
    if !model.is_file() {
        return Err(format!("{input}: there is no such file; name an ONNX file"));
    }
    // not `new`, which logs every step of the import
    let mut import = ModelGen::default();
    import.input(&input).out_dir(&folder).load_strategy(LoadStrategy::Embedded);
    let hook = take_hook();
    set_hook(Box::new(|_| {}));
    let outcome = catch_unwind(AssertUnwindSafe(|| import.run_from_cli()));
    set_hook(hook);
    outcome.map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        explained(&input, text.unwrap_or("no reason given"))
    })
}

/// A panic of burn-onnx as a line with a remedy.
fn explained(input: &str, panic: &str) -> String {
    let line = panic.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.split_once("Unsupported ONNX operation(s):") {
        Some((_, operators)) => format!(
            "{input}: burn-onnx cannot import the operators {}; export the network without them, or call it \
             as a black box, as the program `forest` does",
            operators.trim()
        ),
        None => format!("{input}: burn-onnx cannot import it ({line}); export it again as ONNX of opset 16 or later"),
    }
}
