//! The artifact folder of a run.
//!
//! | file | content |
//! |---|---|
//! | `config.json` | the settings of the run, written before it starts; a resumed run must have the same |
//! | `checkpoint/` | model, optimizer and schedule after each of the last two epochs |
//! | `metrics.csv` | one row per training step, one per test epoch: [`Row`](super::history::Row) |
//! | `summary.json` | every value of the final table |
//! | `curves.svg` | accuracy and loss against queries |
//! | `model.safetensors` | the trained model, adapters merged |
//! | `adapters.safetensors` | adapters and head alone, from a run with scope `lora:R` |
//!
//! Every file is [written atomically](write_atomic).

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use flops_core::train::files::write_atomic;
use flops_core::train::recorder::EXTENSION;
use serde_json::{Map, Value};

/// Settings of a run, by name.
pub type Settings = Map<String, Value>;

/// Inserts the entries of `more` into `object`.
pub fn merge(object: &mut Value, more: Value) {
    if let (Value::Object(object), Value::Object(more)) = (object, more) {
        object.extend(more);
    }
}

/// The artifact folder of a run; it can be written to.
#[derive(Clone, Debug)]
pub struct Artifacts {
    dir: PathBuf,
}

impl Artifacts {
    /// Creates the folder if it does not exist, and checks that it can be written to.
    ///
    /// # Errors
    /// Where it cannot.
    pub fn open(dir: &Path) -> Result<Self> {
        let failed =
            || format!("the artifact folder {} cannot be written; choose another with --artifact-dir", dir.display());
        fs::create_dir_all(dir).with_context(failed)?;
        let trial = dir.join(".trial");
        fs::write(&trial, []).and_then(|()| fs::remove_file(&trial)).with_context(failed)?;
        Ok(Self { dir: dir.to_path_buf() })
    }

    /// Returns the path of the folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Returns the path of a file in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Writes a file, completely or not at all.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        Ok(write_atomic(&self.path(name), bytes)?)
    }

    /// Writes a JSON file.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub fn write_json(&self, name: &str, value: &impl serde::Serialize) -> Result<()> {
        let mut text = serde_json::to_string_pretty(value)?;
        text.push('\n');
        self.write(name, text.as_bytes())
    }

    /// Writes a CSV file with one line per row and one column per field.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub fn write_csv(&self, name: &str, rows: &[impl serde::Serialize]) -> Result<()> {
        let mut writer = csv::Writer::from_writer(Vec::new());
        for row in rows {
            writer.serialize(row)?;
        }
        self.write(name, &writer.into_inner()?)
    }

    /// Starts a new run: removes the results of an earlier run, and writes `settings`.
    ///
    /// # Errors
    /// Where a file cannot be removed or written.
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

    /// Checks that a run with `settings` may continue the run in this folder.
    ///
    /// # Errors
    /// Where there is no run, or one with another value of a setting. The settings named in `free`
    /// may differ.
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
                    "cannot resume: {name} is {now}, the run in {} has {then}; give the same value, or \
                     start a new run in another --artifact-dir",
                    self.dir.display()
                );
            }
        }
        Ok(())
    }

    /// Returns the path of a part of a checkpoint (`model`, `optim`, `scheduler`), without its
    /// extension.
    pub fn checkpoint(&self, part: &str, epoch: usize) -> PathBuf {
        self.path("checkpoint").join(format!("{part}-{epoch}"))
    }

    /// Returns the epochs whose checkpoint is complete, the last one first.
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
    fn only_a_run_with_the_same_settings_can_be_resumed() {
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
    fn incomplete_checkpoints_are_ignored() {
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
    fn a_path_below_a_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, []).unwrap();
        let message = format!("{:#}", Artifacts::open(&file.join("run")).unwrap_err());
        assert!(message.contains("cannot be written") && message.contains("--artifact-dir"), "{message}");
    }

    #[test]
    fn a_failed_write_names_the_path_and_a_remedy_once() {
        let dir = tempfile::tempdir().unwrap();
        let artifacts = Artifacts::open(dir.path()).unwrap();
        fs::create_dir(artifacts.path("taken")).unwrap();
        let message = format!("{:#}", artifacts.write("taken", b"text").unwrap_err());
        for once in [artifacts.path("taken").to_str().unwrap(), "cannot write", "choose"] {
            assert_eq!(message.matches(once).count(), 1, "'{once}' in: {message}");
        }
    }
}
