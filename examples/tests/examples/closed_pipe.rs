//! A program whose reader goes away says no more, and goes on.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

/// `program | head -1`: the macros of the standard library would panic at the second line.
#[cfg(unix)]
#[test]
fn a_closed_pipe_ends_a_program_quietly() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("text");
    let closed = || {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        writer
    };
    let program = || Command::new(crate::example("text_pretrain"));
    let args = ["--steps", "1", "--batch-size", "8", "--embed-dim", "16", "--depth", "1", "--out"];
    let output = program().args(args).arg(&folder).stdout(closed()).stderr(Stdio::piped()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!((output.status.code(), said.as_ref()), (Some(141), ""));
    // an error that nobody reads ends the program, too
    let status = program().args(["--steps", "0"]).stderr(closed()).status().unwrap();
    assert_eq!(status.code(), Some(141));
}

/// What prints by the macros of the standard library panics there.
#[test]
fn every_program_prints_by_the_macros_that_stand_a_closed_pipe() {
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    let mut roots = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs")];
    for entry in fs::read_dir(examples).unwrap() {
        let path = entry.unwrap().path();
        roots.push(if path.is_dir() { path.join("main.rs") } else { path });
    }
    assert!(roots.len() > 10);
    for root in roots {
        let text = fs::read_to_string(&root).unwrap();
        assert!(text.contains("#[macro_use]\nextern crate flops_report;"), "{}", root.display());
    }
}
