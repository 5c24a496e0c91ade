//! Programs to copy for a model of one's own.

use std::fs;
use std::path::Path;

use crate::{fail, succeed};

#[test]
fn custom_model() {
    let dir = tempfile::tempdir().unwrap();
    let out = succeed("custom_model", dir.path(), &["--epochs", "8", "--queries", "8"]);
    let rows: Vec<Vec<f64>> = out
        .lines()
        .filter(|line| line.contains("noise"))
        .map(|line| line[34..].split_whitespace().map(|n| n.trim_end_matches('%').parse().unwrap()).collect())
        .collect();
    assert_eq!(rows.len(), 3, "{out}");
    for row in &rows {
        // 8 epochs of 512 points, with the queries that were asked for
        assert_eq!(row[2], 8.0 * 512.0 * 8.0, "{out}");
        assert!((0.0..=100.0).contains(&row[1]), "{out}");
    }
    // before training all three are the same network
    assert!(rows.iter().all(|row| row[0] == rows[0][0]) && rows[1][1] > 55.0, "{out}");
}

/// Losses of the batches of an epoch, as burn-train writes them.
fn losses(dir: &Path, split: &str, epoch: usize) -> String {
    fs::read_to_string(dir.join(format!("artifacts/learner/{split}/epoch-{epoch}/Loss.log"))).unwrap()
}

/// A run that goes on from a checkpoint has the bits of one that never stopped.
#[test]
fn learner() {
    let [whole, cut, back] = [(); 3].map(|()| tempfile::tempdir().unwrap());
    succeed("learner", whole.path(), &["--epochs", "3"]);
    let alike = |epoch: usize| {
        for (split, batches) in [("train", 23), ("valid", 3)] {
            let losses = losses(whole.path(), split, epoch);
            assert_eq!(losses.lines().count(), batches, "{losses}");
            assert_eq!(losses, self::losses(cut.path(), split, epoch), "{split}, epoch {epoch}");
        }
    };
    succeed("learner", cut.path(), &["--epochs", "1"]);
    alike(1);
    succeed("learner", cut.path(), &["--epochs", "3", "--resume", "1"]);
    alike(3);
    assert_ne!(losses(whole.path(), "valid", 1), losses(whole.path(), "valid", 3));
    assert!(whole.path().join("artifacts/learner/model.mpk").exists());

    let out = succeed("learner", back.path(), &["--epochs", "3", "--backprop"]);
    let accuracy = out.lines().find(|line| line.contains("Valid") && line.contains("Accuracy")).unwrap();
    let best: f64 = accuracy.split('|').nth(5).unwrap().trim().parse().unwrap();
    assert!(best > 90.0, "{out}");

    let none = fail("learner", back.path(), &["--epochs", "9", "--resume", "8"]);
    assert!(none.contains("there is no artifacts/learner/checkpoint/model-8.mpk"), "{none}");
    assert!(fail("learner", back.path(), &["--epochs", "3", "--resume", "3"]).contains("less than the 3 epochs"));
    assert!(fail("learner", back.path(), &["--epochs", "0"]).contains("--epochs 0"));
}
