//! Runs the built examples as a user does.
//!
//! `cargo test` builds the examples before their tests; `cargo test --test examples` alone does not.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

mod clip_align;
mod evaluate;
mod experiments;
mod prompt_tuning;
mod vit_cifar;

/// The built example of that name, beside this test's own folder.
fn example(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let profile = test.parent().and_then(Path::parent).unwrap();
    let path = profile.join("examples").join(format!("{name}{}", std::env::consts::EXE_SUFFIX));
    assert!(path.exists(), "{} is not built; run cargo test without --test", path.display());
    path
}

/// Runs an example in `dir`.
fn run(name: &str, dir: &Path, args: &[&str]) -> Output {
    Command::new(example(name)).args(args).current_dir(dir).output().unwrap()
}

/// Standard output of a run that has to succeed.
fn succeed(name: &str, dir: &Path, args: &[&str]) -> String {
    let output = run(name, dir, args);
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{name} {args:?} failed:\n{out}{err}");
    out.into_owned()
}

/// The error of a run that has to fail: exit code 1, one line, no panic.
fn fail(name: &str, dir: &Path, args: &[&str]) -> String {
    let output = run(name, dir, args);
    let err = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{name} {args:?}: {err}");
    assert_eq!(err.lines().count(), 1, "{name} {args:?} says more than one line:\n{err}");
    assert!(err.starts_with("error: ") && !err.contains("panicked"), "{err}");
    err
}
