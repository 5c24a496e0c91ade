//! The artifact folder of a run.
//!
//! | file | content |
//! |---|---|
//! | `config.json` | the settings of the run, written before it starts; a resumed run must have the same |
//! | `checkpoint/` | model, optimizer and schedule of the last two epochs, with checksums |
//! | `metrics.csv` | one row per training step, one per test epoch: [`Row`](super::history::Row) |
//! | `summary.json` | every value of the final table |
//! | `curves.svg` | accuracy and loss against queries |
//! | `model.safetensors` | the trained model, adapters merged |
//! | `adapters.safetensors` | adapters and head alone, from a run with scope `lora:R` |
//! | `prompt.safetensors` | the tuned prompt of a black box |
//! | `workers/` | folders and output of the workers of a run that is shared, but for the first's |
//! | `.lock` | the run that writes into the folder; see [`lock`](super::lock) |
//!
//! Every file is [written atomically](write_atomic).

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use flops_core::train::files::{check_writable, write_atomic};
use flops_core::train::recorder::{AtomicRecorder, EXTENSION, VerifyError};
use serde_json::{Map, Value};

use super::lock::{FolderLock, Holders};

/// The parts of a checkpoint.
pub(super) const PARTS: [&str; 3] = ["model", "optim", "scheduler"];

/// Settings of a run, by name.
pub type Settings = Map<String, Value>;

/// Inserts the entries of `more` into `object`.
pub fn merge(object: &mut Value, more: Value) {
    if let (Value::Object(object), Value::Object(more)) = (object, more) {
        object.extend(more);
    }
}

/// Returns the first setting, of those not in `free`, in which a run differs from an earlier one: its
/// name, its value now and then.
pub(super) fn difference(now: &Settings, then: &Settings, free: &[&str]) -> Option<(String, Value, Value)> {
    let names = now.keys().chain(then.keys().filter(|name| !now.contains_key(*name)));
    let value = |of: &Settings, name: &str| of.get(name).unwrap_or(&Value::Null).clone();
    let both = names.filter(|name| !free.contains(&name.as_str()));
    both.map(|name| (name.clone(), value(now, name), value(then, name))).find(|(_, now, then)| now != then)
}

/// The artifact folder of a run. The run holds it until the last clone of this value is dropped, or
/// the process ends.
#[derive(Clone, Debug)]
pub struct Artifacts {
    dir: PathBuf,
    /// Absent from a folder that is only read.
    _lock: Option<Arc<FolderLock>>,
}

impl Artifacts {
    /// Creates the folder if it does not exist, checks that it can be written to, and locks it: no
    /// other run may use it.
    ///
    /// # Errors
    /// Where it cannot be written to, or another run uses it.
    pub fn open(dir: &Path) -> Result<Self> {
        Self::locked(dir, Holders::One)
    }

    /// [`open`](Self::open), for processes that write files of their own into one folder.
    ///
    /// # Errors
    /// Where it cannot be written to, or a run uses it that does not share it.
    pub fn open_shared(dir: &Path) -> Result<Self> {
        Self::locked(dir, Holders::Many)
    }

    /// The folder as it is, to read from: it is neither created nor locked.
    #[must_use]
    pub fn read_only(dir: &Path) -> Self {
        Self { dir: dir.to_path_buf(), _lock: None }
    }

    fn locked(dir: &Path, holders: Holders) -> Result<Self> {
        let failed =
            || format!("the artifact folder {} cannot be written; choose another with --artifact-dir", dir.display());
        fs::create_dir_all(dir).and_then(|()| check_writable(dir)).with_context(failed)?;
        let lock = FolderLock::take(dir, holders)?;
        if holders == Holders::One {
            remove_partial(&[dir, &dir.join("checkpoint")]);
        }
        Ok(Self { dir: dir.to_path_buf(), _lock: Some(Arc::new(lock)) })
    }

    /// A folder in this one, under the same lock. It is created if it does not exist.
    ///
    /// # Errors
    /// Where it cannot be created.
    pub fn folder(&self, name: &str) -> Result<Self> {
        let dir = self.path(name);
        fs::create_dir_all(&dir).with_context(|| format!("cannot create the folder {}", dir.display()))?;
        Ok(Self { dir, ..self.clone() })
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
        self.clear()?;
        self.write_json("config.json", settings)
    }

    /// Removes the results of an earlier run; its settings stay.
    ///
    /// # Errors
    /// Where a file cannot be removed.
    pub(super) fn clear(&self) -> Result<()> {
        let failed = || format!("cannot remove the earlier run from {}", self.dir.display());
        let checkpoints = self.path("checkpoint");
        if checkpoints.exists() {
            fs::remove_dir_all(&checkpoints).with_context(failed)?;
        }
        // adapters and prompts of an earlier run would not belong to the new one
        for name in ["summary.json", "metrics.csv", "adapters.safetensors", "prompt.safetensors"] {
            let path = self.path(name);
            if path.exists() {
                fs::remove_file(path).with_context(failed)?;
            }
        }
        Ok(())
    }

    /// Returns the settings of the run in this folder.
    ///
    /// # Errors
    /// Where there is no run, or its settings are damaged.
    pub fn settings(&self) -> Result<Settings> {
        let path = self.path("config.json");
        if !path.exists() {
            bail!(
                "there is no run to resume in {}; leave --resume out, or name its --artifact-dir",
                self.dir.display()
            );
        }
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("{} is damaged; start a new run", path.display()))
    }

    /// Checks that a run with `settings` may continue the run in this folder.
    ///
    /// # Errors
    /// Where there is no run, or one with another value of a setting. The settings named in `free`
    /// may differ.
    pub fn check_resumable(&self, settings: &Settings, free: &[&str]) -> Result<()> {
        let remedy = "give the same value, or start a new run in another --artifact-dir";
        let Some((name, now, then)) = difference(settings, &self.settings()?, free) else { return Ok(()) };
        bail!("cannot resume: {name} is {now}, the run in {} has {then}; {remedy}", self.dir.display())
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
            .filter(|&epoch| PARTS.iter().all(|part| self.checkpoint(part, epoch).with_extension(EXTENSION).exists()))
            .collect();
        epochs.sort_unstable_by(|a, b| b.cmp(a));
        epochs
    }

    /// Checks that the files of a checkpoint are those that were written.
    ///
    /// # Errors
    /// For the first file that cannot be read, or has another checksum or none.
    pub fn verify(&self, epoch: usize) -> Result<(), VerifyError> {
        PARTS.iter().try_for_each(|part| AtomicRecorder::verify(&self.checkpoint(part, epoch)))
    }
}

/// Removes what a process that was killed left of a file: [`write_atomic`] begins the names of its
/// temporary files so.
fn remove_partial(folders: &[&Path]) {
    let entries = folders.iter().filter_map(|folder| fs::read_dir(folder).ok()).flatten().flatten();
    for entry in entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(".partial-")) {
        // one that stays does no harm
        let _ = fs::remove_file(entry.path());
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
    fn a_folder_belongs_to_one_run_and_can_be_read_by_all() {
        let dir = tempfile::tempdir().unwrap();
        let artifacts = Artifacts::open(dir.path()).unwrap();
        let again = || Artifacts::open(dir.path()).map(drop).map_err(|e| format!("{e:#}"));
        assert!(again().unwrap_err().contains("in use by process"));
        assert!(Artifacts::open_shared(dir.path()).is_err());
        artifacts.start(&settings(0.1, 1)).unwrap();
        assert_eq!(Artifacts::read_only(dir.path()).settings().unwrap(), settings(0.1, 1));
        // what was made from it holds the folder, too
        let inner = artifacts.folder("runs").unwrap();
        drop(artifacts);
        assert!(again().is_err());
        drop(inner);
        assert_eq!(again(), Ok(()));
        let shared = [(); 2].map(|()| Artifacts::open_shared(dir.path()).unwrap());
        assert!(again().unwrap_err().contains("share"));
        drop(shared);
        assert!(!dir.path().join("none").exists());
        assert!(Artifacts::read_only(&dir.path().join("none")).settings().is_err());
        assert!(!dir.path().join("none").exists());
    }

    #[test]
    fn what_a_killed_process_left_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let left = [dir.path().join(".partial-AbC"), dir.path().join("checkpoint/.partial-d")];
        fs::create_dir(dir.path().join("checkpoint")).unwrap();
        for path in left.iter().chain([&dir.path().join("notes.partial-")]) {
            fs::write(path, "half").unwrap();
        }
        // other processes may be writing
        drop(Artifacts::open_shared(dir.path()).unwrap());
        assert!(left.iter().all(|path| path.exists()));
        drop(Artifacts::open(dir.path()).unwrap());
        assert!(left.iter().all(|path| !path.exists()));
        assert!(dir.path().join("notes.partial-").exists());
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
