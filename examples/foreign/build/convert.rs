//! The call of burn-onnx, with its panics as errors of one line.

use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::path::Path;

use crate::operators;
use burn_onnx::{LoadStrategy, ModelGen};

/// Writes the code of `model` and its weights, `<name>.rs` and `<name>.bpk`, into the folder `out`.
///
/// Returns a warning where weights have become constants, which nothing trains.
///
/// # Errors
/// A line that names the file, what is wrong with it and what to do.
pub fn convert(model: &Path, out: &Path) -> Result<Option<String>, String> {
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
    })?;
    let code = out.join(model.with_extension("rs").file_name().unwrap_or_default());
    let code = std::fs::read_to_string(&code).map_err(|error| format!("{}: {error}", code.display()))?;
    Ok(frozen(&input, &code))
}

/// Constants of two axes or more in generated code: they are weights, as a rule.
fn frozen(input: &str, code: &str) -> Option<String> {
    let field = |line: &str| {
        let (name, kind) = line.trim().split_once(": burn::module::Param<Tensor<B, ")?;
        let matrix = !kind.starts_with("1>") && kind.ends_with(">>,");
        (name.starts_with("constant") && matrix).then(|| name.to_string())
    };
    let names: Vec<String> = code.lines().filter_map(field).collect();
    (!names.is_empty()).then(|| {
        format!(
            "{input}: {} became constants, which nothing trains; export Gemm with alpha, beta and transB = 1, or \
             MatMul by an initializer, or call set_require_grad(true) on those fields",
            names.join(", ")
        )
    })
}

/// A panic of burn-onnx as a line with a remedy.
fn explained(input: &str, panic: &str) -> String {
    let line = panic.split_whitespace().collect::<Vec<_>>().join(" ");
    let remedy = "export the network without them, or call it as a black box, as the program `forest` does";
    if let Some((_, operators)) = line.split_once("Unsupported ONNX operation(s):") {
        format!("{input}: burn-onnx cannot import the operators {}; {remedy}", operators.trim())
    } else if line.contains("Unknown node type") {
        let operators = std::fs::read(input).map(|bytes| operators::foreign(&bytes)).unwrap_or_default().join(", ");
        format!("{input}: burn-onnx cannot import the operators {operators}; {remedy}")
    } else {
        format!("{input}: burn-onnx cannot import it ({line}); export it again as ONNX of opset 16 or later")
    }
}
