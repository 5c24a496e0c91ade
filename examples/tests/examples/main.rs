//! Runs the built programs as a user does.
//!
//! `cargo test` builds the examples before their tests; `cargo test --test examples` alone does
//! not.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

mod clip_align;
mod closed_pipe;
mod documents;
mod evaluate;
mod experiments;
mod flaky_server;
mod fuzz;
mod imports;
mod own_models;
mod prompt_tuning;
mod shared_runs;
mod vit_cifar;

/// Returns the path of a built program, in the folder beside this test's.
fn example(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let profile = test.parent().and_then(Path::parent).unwrap();
    let path = profile.join("examples").join(format!("{name}{}", std::env::consts::EXE_SUFFIX));
    assert!(path.exists(), "{} is not built; run cargo test without --test", path.display());
    path
}

/// Runs a program in `dir`.
fn run(name: &str, dir: &Path, args: &[&str]) -> Output {
    Command::new(example(name)).args(args).current_dir(dir).output().unwrap()
}

/// Runs a program that must succeed; returns its standard output.
fn succeed(name: &str, dir: &Path, args: &[&str]) -> String {
    let output = run(name, dir, args);
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{name} {args:?} failed:\n{out}{err}");
    out.into_owned()
}

/// Runs a program that must fail, with exit code 1 and one line of error, without a panic; returns
/// that line.
fn fail(name: &str, dir: &Path, args: &[&str]) -> String {
    let output = run(name, dir, args);
    let err = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{name} {args:?}: {err}");
    assert_eq!(err.lines().count(), 1, "{name} {args:?} says more than one line:\n{err}");
    assert!(err.starts_with("error: ") && !err.contains("panicked"), "{err}");
    err
}
