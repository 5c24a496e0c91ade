//! The artifact folder of a run.
//!
//! | file | content |
//! |---|---|
//! | `config.json` | the settings of the run, written before it starts; a resumed run has to agree with it |
//! | `checkpoint/` | model, optimizer and schedule after each of the last two epochs |
//! | `metrics.csv` | one row per training step, one per test epoch: [`Row`](crate::history::Row) |
//! | `summary.json` | every figure of the final table |
//! | `curves.svg` | accuracy and loss against queries |
//! | `model.safetensors` | the trained model, adapters merged |
//! | `adapters.safetensors` | of a run with scope `lora:R`: adapters and head alone |
//!
//! Files are written beside their place and renamed, so that none is ever half there.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value};

use crate::recorder::EXTENSION;

/// Settings by name.
pub type Settings = Map<String, Value>;

/// Puts the entries of `more` into `object`.
pub fn merge(object: &mut Value, more: Value) {
    if let (Value::Object(object), Value::Object(more)) = (object, more) {
        object.extend(more);
    }
}

/// Writes a file beside its place and renames it.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let partial = path.with_file_name(format!(".{name}.partial"));
    let write = || {
        let mut file = fs::File::create(&partial)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&partial, path)
    };
    write().with_context(|| format!("cannot write {}; free disk space or choose another folder", path.display()))
}

/// A folder that can be written.
#[derive(Clone, Debug)]
pub struct Artifacts {
    dir: PathBuf,
}

impl Artifacts {
    /// Creates the folder where it does not exist, and tries to write into it.
    ///
    /// # Errors
    /// Where that fails.
    pub fn open(dir: &Path) -> Result<Self> {
        let failed =
            || format!("the artifact folder {} cannot be written; choose another with --artifact-dir", dir.display());
        fs::create_dir_all(dir).with_context(failed)?;
        let trial = dir.join(".trial");
        fs::write(&trial, []).and_then(|()| fs::remove_file(&trial)).with_context(failed)?;
        Ok(Self { dir: dir.to_path_buf() })
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A file of the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Writes a file, whole or not at all.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        write_atomic(&self.path(name), bytes)
    }

    /// Writes a JSON file.
    pub fn write_json(&self, name: &str, value: &impl serde::Serialize) -> Result<()> {
        let mut text = serde_json::to_string_pretty(value)?;
        text.push('\n');
        self.write(name, text.as_bytes())
    }

    /// Writes rows as a CSV file, their fields as its columns.
    pub fn write_csv(&self, name: &str, rows: &[impl serde::Serialize]) -> Result<()> {
        let mut writer = csv::Writer::from_writer(Vec::new());
        for row in rows {
            writer.serialize(row)?;
        }
        self.write(name, &writer.into_inner()?)
    }

    /// Starts a new run: what an earlier run of this folder would be resumed from is removed, and `settings` are written.
    pub fn start(&self, settings: &Settings) -> Result<()> {
        let failed = || format!("cannot remove the earlier run from {}", self.dir.display());
        let checkpoints = self.path("checkpoint");
        if checkpoints.exists() {
            fs::remove_dir_all(&checkpoints).with_context(failed)?;
        }
        // adapters of an earlier run would not belong to the new model
        for name in ["summary.json", "metrics.csv", "adapters.safetensors"] {
            let path = self.path(name);
            if path.exists() {
                fs::remove_file(path).with_context(failed)?;
            }
        }
        self.write_json("config.json", settings)
    }

    /// Checks that a run with `settings` may go on where the run of this folder stopped.
    ///
    /// # Errors
    /// Where there is no run, or one with another value of a setting; `free` settings may differ.
    pub fn check_resumable(&self, settings: &Settings, free: &[&str]) -> Result<()> {
        let path = self.path("config.json");
        if !path.exists() {
            bail!(
                "there is no run to resume in {}; leave --resume out, or name its --artifact-dir",
                self.dir.display()
            );
        }
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let earlier: Settings =
            serde_json::from_str(&text).with_context(|| format!("{} is damaged; start a new run", path.display()))?;
        let names = settings.keys().chain(earlier.keys().filter(|name| !settings.contains_key(*name)));
        for name in names.filter(|name| !free.contains(&name.as_str())) {
            let (now, then) = (settings.get(name).unwrap_or(&Value::Null), earlier.get(name).unwrap_or(&Value::Null));
            if now != then {
                bail!(
                    "cannot resume: {name} is {now}, the run in {} has {then}; give the same value, or start a new run in \
                     another --artifact-dir",
                    self.dir.display()
                );
            }
        }
        Ok(())
    }

    /// The place of a checkpoint part (`model`, `optim`, `scheduler`), without its extension.
    pub fn checkpoint(&self, part: &str, epoch: usize) -> PathBuf {
        self.path("checkpoint").join(format!("{part}-{epoch}"))
    }

    /// The epochs whose checkpoint is complete, last first.
    pub fn checkpoints(&self) -> Vec<usize> {
        let names = fs::read_dir(self.path("checkpoint")).into_iter().flatten().flatten();
        let mut epochs: Vec<usize> = names
            .filter_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                name.strip_prefix("model-")?.strip_suffix(EXTENSION)?.strip_suffix('.')?.parse().ok()
            })
            .filter(|&epoch| {
                ["optim", "scheduler"]
                    .iter()
                    .all(|part| self.checkpoint(part, epoch).with_extension(EXTENSION).exists())
            })
            .collect();
        epochs.sort_unstable_by(|a, b| b.cmp(a));
        epochs
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn settings(lr: f64, threads: usize) -> Settings {
        json!({"lr": lr, "threads": threads}).as_object().cloned().unwrap()
    }

    #[test]
    fn only_the_same_run_can_be_resumed() {
        let dir = tempfile::tempdir().unwrap();
        let artifacts = Artifacts::open(&dir.path().join("run")).unwrap();
        let check = |settings: &Settings| artifacts.check_resumable(settings, &["threads"]).map_err(|e| e.to_string());
        assert!(check(&settings(0.1, 1)).unwrap_err().contains("no run to resume"));
        artifacts.start(&settings(0.1, 1)).unwrap();
        assert_eq!(check(&settings(0.1, 2)), Ok(()));
        assert!(check(&settings(0.2, 1)).unwrap_err().contains("lr is 0.2"));
        fs::write(artifacts.path("config.json"), "{").unwrap();
        assert!(check(&settings(0.1, 1)).unwrap_err().contains("damaged"));
    }

    #[test]
    fn an_incomplete_checkpoint_does_not_count() {
        let dir = tempfile::tempdir().unwrap();
        let artifacts = Artifacts::open(dir.path()).unwrap();
        fs::create_dir(artifacts.path("checkpoint")).unwrap();
        for name in [
            "model-2.mpk",
            "optim-2.mpk",
            "scheduler-2.mpk",
            "model-10.mpk",
            "optim-10.mpk",
            "scheduler-10.mpk",
            "model-11.mpk",
            "optim-11.mpk",
        ] {
            fs::write(artifacts.path("checkpoint").join(name), []).unwrap();
        }
        assert_eq!(artifacts.checkpoints(), [10, 2]);
        artifacts.start(&settings(0.1, 1)).unwrap();
        assert_eq!(artifacts.checkpoints(), [0; 0]);
    }

    #[test]
    fn a_place_that_cannot_be_a_folder_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, []).unwrap();
        let message = format!("{:#}", Artifacts::open(&file.join("run")).unwrap_err());
        assert!(message.contains("cannot be written") && message.contains("--artifact-dir"), "{message}");
    }
}
