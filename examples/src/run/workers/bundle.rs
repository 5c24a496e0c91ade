//! A checkpoint as one piece: for workers that join a run late.
//!
//! A bundle holds `config.json`, `metrics.csv` and the checkpoint of one epoch. It begins with a
//! line of its own; each file follows as the lengths of its name and its content, the name and the
//! content.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use flops_core::train::recorder::EXTENSION;

use super::super::artifacts::{Artifacts, PARTS, Settings, difference};
use super::super::history;

/// How a bundle begins.
const HEAD: &[u8] = b"flops checkpoint 1\n";
/// Where files are prepared before they replace those of the folder.
const STAGE: &str = ".joining";
/// The settings of the run.
const CONFIG: &str = "config.json";

/// Returns the checkpoint of an epoch, with the settings and the metrics of its run.
///
/// # Errors
/// Where a file cannot be read.
pub fn pack(artifacts: &Artifacts, epoch: usize) -> Result<Vec<u8>> {
    let mut bytes = HEAD.to_vec();
    for name in names(epoch) {
        let path = artifacts.path(&name);
        let content = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        bytes.extend((name.len() as u64).to_le_bytes());
        bytes.extend((content.len() as u64).to_le_bytes());
        bytes.extend(name.as_bytes());
        bytes.extend(content);
    }
    Ok(bytes)
}

/// The files of a bundle, in order.
fn names(epoch: usize) -> Vec<String> {
    let parts = PARTS.iter().map(|part| format!("checkpoint/{part}-{epoch}.{EXTENSION}"));
    [CONFIG.to_string(), history::FILE.to_string()].into_iter().chain(parts).collect()
}

/// Writes the files of a bundle into a folder, in place of the run that is in it, and returns the
/// epoch of the checkpoint. Where anything is wrong, the folder stays as it is.
///
/// # Errors
/// Where the bytes are no bundle, a file is not whole, the settings are not those of the bundle's
/// run, except for those in `free`, and where files cannot be written.
pub fn install(artifacts: &Artifacts, bytes: &[u8], settings: &Settings, free: &[&str]) -> Result<usize> {
    let (epoch, files) = unpack(bytes).context("the checkpoint of the run is damaged or of another version")?;
    let stage = artifacts.path(STAGE);
    let failed = || format!("cannot write the checkpoint of the run to {}", artifacts.dir().display());
    remove(&stage).with_context(failed)?;
    fs::create_dir_all(stage.join("checkpoint")).with_context(failed)?;
    for (name, content) in &files {
        fs::write(stage.join(name), content).with_context(failed)?;
    }
    let staged = Artifacts::read_only(&stage);
    let checked = staged.verify(epoch).context("the checkpoint of the run is damaged");
    let checked = checked.and_then(|()| match difference(settings, &staged.settings()?, free) {
        Some((name, now, then)) => {
            bail!("cannot join: {name} is {now}, and {then} in the run of the other workers; start all workers alike")
        }
        None => Ok(()),
    });
    if let Err(why) = checked {
        let _ = remove(&stage);
        return Err(why);
    }
    // a folder without settings cannot be resumed: they are written last
    remove(&artifacts.path(CONFIG)).with_context(failed)?;
    artifacts.clear()?;
    for name in ["checkpoint", history::FILE, CONFIG] {
        fs::rename(stage.join(name), artifacts.path(name)).with_context(failed)?;
    }
    remove(&stage).with_context(failed)?;
    Ok(epoch)
}

/// Removes a file or a folder, if there is one. A link is removed, and not what it names.
fn remove(path: &Path) -> std::io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(_) => Ok(()),
    }
}

/// The epoch of a bundle, and its files by name.
type Unpacked<'a> = (usize, Vec<(String, &'a [u8])>);

/// The epoch and the files of a bundle. All names are known ones, and nothing is left over.
fn unpack(bytes: &[u8]) -> Result<Unpacked<'_>> {
    let Some(mut rest) = bytes.strip_prefix(HEAD) else { bail!("it does not begin as one") };
    let mut files = vec![];
    while !rest.is_empty() {
        ensure!(files.len() < PARTS.len() + 2, "it has too many files");
        let lengths = [take(&mut rest, 8)?, take(&mut rest, 8)?];
        let [name, content] = lengths.map(|bytes| bytes.iter().rev().fold(0, |all, &byte| all << 8 | u64::from(byte)));
        ensure!(name < 100, "a name of {name} bytes");
        let name = str::from_utf8(take(&mut rest, name)?)?.to_string();
        files.push((name, take(&mut rest, content)?));
    }
    let epoch = files.get(2).and_then(|(name, _)| {
        let number = name.strip_prefix("checkpoint/model-")?.strip_suffix(EXTENSION)?.strip_suffix('.')?;
        number.parse().ok()
    });
    let Some(epoch) = epoch else { bail!("it has no model") };
    ensure!(files.iter().map(|(name, _)| name).eq(&names(epoch)), "its files are not those of epoch {epoch}");
    Ok((epoch, files))
}

/// Takes bytes from the front.
fn take<'a>(rest: &mut &'a [u8], count: u64) -> Result<&'a [u8]> {
    let all = *rest;
    let split = usize::try_from(count).ok().and_then(|count| all.split_at_checked(count));
    let (front, back) = split.with_context(|| format!("{count} bytes are missing"))?;
    *rest = back;
    Ok(front)
}

#[cfg(test)]
mod tests {
    use burn::record::Recorder;
    use flops_core::train::recorder::AtomicRecorder;
    use serde_json::json;

    use super::super::super::history::{History, Row, Split};
    use super::*;
    use crate::backend::B;

    fn settings(lr: f64) -> Settings {
        json!({"lr": lr, "threads": 1}).as_object().cloned().unwrap()
    }

    /// A folder with the checkpoint of an epoch.
    fn run(epoch: usize) -> (tempfile::TempDir, Artifacts) {
        let dir = tempfile::tempdir().unwrap();
        let artifacts = Artifacts::open(dir.path()).unwrap();
        artifacts.start(&settings(0.1)).unwrap();
        fs::create_dir(artifacts.path("checkpoint")).unwrap();
        for part in PARTS {
            Recorder::<B>::save_item(&AtomicRecorder::default(), epoch, artifacts.checkpoint(part, epoch)).unwrap();
        }
        let mut history = History::default();
        history.push(Row::new(Split::Test, epoch, 1.0, 0.5));
        history.write(&artifacts).unwrap();
        (dir, artifacts)
    }

    #[test]
    fn a_bundle_takes_the_place_of_an_earlier_run() {
        let (_from, from) = run(3);
        let (_to, to) = run(7);
        let bytes = pack(&from, 3).unwrap();
        // results of an earlier run would not belong to this one
        for name in ["adapters.safetensors", "summary.json"] {
            fs::write(to.path(name), "of another run").unwrap();
        }
        assert_eq!(install(&to, &bytes, &settings(0.1), &[]).unwrap(), 3);
        assert_eq!(to.checkpoints(), [3]);
        for name in names(3) {
            assert!(fs::read(from.path(&name)).unwrap() == fs::read(to.path(&name)).unwrap(), "{name}");
        }
        assert!(!to.path(STAGE).exists());
        assert!(!to.path("adapters.safetensors").exists() && !to.path("summary.json").exists());
    }

    #[test]
    fn what_is_no_bundle_of_the_run_changes_nothing() {
        let (_from, from) = run(3);
        let (_to, to) = run(7);
        let whole = pack(&from, 3).unwrap();
        let refused = |bytes: &[u8], settings: &Settings| {
            let why = format!("{:#}", install(&to, bytes, settings, &["threads"]).unwrap_err());
            assert_eq!(to.checkpoints(), [7]);
            assert!(!to.path(STAGE).exists(), "{why}");
            why
        };
        assert!(refused(&whole, &settings(0.2)).contains("lr is 0.2"));
        for length in 0..whole.len() {
            refused(&whole[..length], &settings(0.1));
        }
        // a bit of a checkpoint, which its checksum shows
        let mut flipped = whole.clone();
        *flipped.last_mut().unwrap() ^= 1;
        assert!(refused(&flipped, &settings(0.1)).contains("damaged"));
        // a file outside the folder, and one more
        let text = |from: &str, to: &str| {
            let at = whole.windows(from.len()).position(|part| part == from.as_bytes()).unwrap();
            [&whole[..at], to.as_bytes(), &whole[at + from.len()..]].concat()
        };
        assert!(refused(&text("checkpoint/optim", "../../../../opti"), &settings(0.1)).contains("epoch 3"));
        let model = whole.windows(8).position(|part| part == b"config.j").unwrap() - 16;
        refused(&[&whole, &whole[model..]].concat(), &settings(0.1));
        let mut long = whole.clone();
        long[HEAD.len() + 8..HEAD.len() + 16].fill(0xff);
        assert!(refused(&long, &settings(0.1)).contains("missing"));
    }
}
