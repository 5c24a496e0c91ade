//! The counts of what a step asks a device for do not grow. They are those of Mesa's software driver.
#![cfg(all(feature = "wgpu", not(feature = "cuda"), not(feature = "bf16")))]

use std::process::Command;

/// The counts of a tiny model are within 5 % of those in `launches.json`, or 15 % where steps differ. A change that lowers them, or
/// that is worth more launches, writes that file anew: `--models tiny` leaves it as `summary.json`.
#[test]
fn counts_do_not_grow() {
    let dir = tempfile::tempdir().unwrap();
    let launches = |against: &str| {
        let words = ["--models", "tiny", "--against", against, "--artifact-dir", dir.path().to_str().unwrap()];
        let output = Command::new(env!("CARGO_BIN_EXE_launches")).args(words).output().unwrap();
        (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (is_fine, said) = launches(concat!(env!("CARGO_MANIFEST_DIR"), "/launches.json"));
    assert!(is_fine, "{said}");
    // a run with fewer launches is told from this one
    let summary = dir.path().join("summary.json");
    let mut rows: serde_json::Value = serde_json::from_slice(&std::fs::read(&summary).unwrap()).unwrap();
    let few = rows[0]["launches"].as_u64().unwrap() * 9 / 10;
    rows[0]["launches"] = few.into();
    let other = dir.path().join("before.json");
    std::fs::write(&other, rows.to_string()).unwrap();
    let (is_fine, said) = launches(other.to_str().unwrap());
    assert!(!is_fine && said.contains(&format!("and {few} before")), "{said}");
}
