//! Builds the page: compiles the crate to WebAssembly, makes its JavaScript, and writes one HTML file.
//!
//! The file holds everything, the module compressed: a page that is opened from a disk may fetch
//! nothing.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail, ensure};
use base64::prelude::{BASE64_STANDARD, Engine};
use flate2::Compression;
use flate2::write::GzEncoder;
use wasm_bindgen_cli_support::Bindgen;

const TARGET: &str = "wasm32-unknown-unknown";

fn main() -> ExitCode {
    match build() {
        Ok(page) => {
            println!("open {}", page.display());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Builds the page and returns where it is.
fn build() -> Result<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the bundler has no folder above it")?;
    let target = match std::env::var_os("CARGO_TARGET_DIR") {
        Some(target) => std::path::absolute(target)?,
        None => folder.join("target"),
    };
    compile(folder, &target)?;
    let (glue, module) = bind(&target.join(TARGET).join("release/flops_web.wasm"))?;
    let mut page = read(folder, "index.html")?;
    for (mark, part) in [
        ("/* style.css */", read(folder, "style.css")?),
        ("/* page.js */", read(folder, "page.js")?),
        ("/* glue */", glue),
        ("<!-- module -->", BASE64_STANDARD.encode(gzip(&module)?)),
    ] {
        ensure!(page.matches(mark).count() == 1, "page/index.html must have the mark {mark} once");
        // a script in HTML ends at the first of these
        ensure!(!part.contains("</script"), "the part for {mark} must not end a script");
        page = page.replace(mark, &part);
    }
    let path = target.join("index.html");
    std::fs::write(&path, &page).with_context(|| format!("cannot write {}", path.display()))?;
    println!("{} kB of module, {} kB of page", module.len() / 1000, page.len() / 1000);
    Ok(path)
}

/// Compiles the crate to WebAssembly, with the vector instructions that browsers have.
fn compile(folder: &Path, target: &Path) -> Result<()> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
    cargo.current_dir(folder).args(["build", "--release", "--lib", "--package", "flops-web", "--target", TARGET]);
    cargo.arg("--config").arg(format!("target.{TARGET}.rustflags = ['-Ctarget-feature=+simd128']"));
    cargo.arg("--target-dir").arg(target);
    if !cargo.status().context("cannot run cargo")?.success() {
        bail!("the page did not compile; where {TARGET} is missing, run 'rustup target add {TARGET}'");
    }
    Ok(())
}

/// What JavaScript calls the module by, and the module that goes with it.
fn bind(module: &Path) -> Result<(String, Vec<u8>)> {
    let mut bindgen = Bindgen::new();
    bindgen.input_path(module).no_modules(true)?.typescript(false).omit_default_module_path(true);
    bindgen.remove_name_section(true).remove_producers_section(true);
    let mut output = bindgen.generate_output().with_context(|| format!("cannot bind {}", module.display()))?;
    Ok((output.js().to_string(), output.wasm_mut().emit_wasm()))
}

fn gzip(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut encoder = GzEncoder::new(vec![], Compression::best());
    encoder.write_all(bytes)?;
    Ok(encoder.finish()?)
}

fn read(folder: &Path, name: &str) -> Result<String> {
    let path = folder.join("page").join(name);
    std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
}
