//! The lock of an artifact folder: one run writes into it, and no other.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::Write;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, ensure};
use serde::{Deserialize, Serialize};

/// The file that is locked. It stays in the folder; what counts is who holds it.
const FILE: &str = ".lock";

/// A lock that the system holds for this process. It ends with this value, or with the process,
/// however that ends.
#[derive(Debug)]
pub struct FolderLock {
    _file: File,
}

/// Who may hold a lock at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holders {
    /// One run alone.
    One,
    /// Any number of processes that share the folder, and no run that wants it alone.
    Many,
}

/// The run that holds a lock, as the file tells others.
#[derive(Debug, Serialize, Deserialize)]
struct Run {
    /// The id of the process.
    process: u32,
    /// The program.
    program: String,
    /// When the run started, in seconds since 1970.
    started: u64,
}

impl Run {
    fn this() -> Self {
        let program = std::env::current_exe().ok().and_then(|path| Some(path.file_stem()?.to_str()?.to_string()));
        Self { process: std::process::id(), program: program.unwrap_or_default(), started: now() }
    }
}

impl FolderLock {
    /// Locks a folder, which must exist.
    ///
    /// # Errors
    /// If another run holds it; the message names that run. If the folder takes no file.
    pub fn take(folder: &Path, holders: Holders) -> Result<Self> {
        let path = folder.join(FILE);
        // a link would be followed, and what it names overwritten
        let link = fs::symlink_metadata(&path).is_ok_and(|found| !found.is_file());
        ensure!(!link, "{} is not a file; remove it, or choose another folder with --artifact-dir", path.display());
        let failed = || {
            let folder = folder.display();
            format!("the artifact folder {folder} cannot be written; choose another with --artifact-dir")
        };
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        let mut file = file.with_context(failed)?;
        let locked = if holders == Holders::One { file.try_lock() } else { file.try_lock_shared() };
        match locked {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(refusal(folder, &path)),
            // as on some network file systems
            Err(TryLockError::Error(why)) => {
                println!("warning: {} cannot be locked ({why}); let no other run use it", folder.display());
            }
        }
        if holders == Holders::One {
            let run = serde_json::to_string(&Run::this())?;
            file.set_len(0).and_then(|()| file.write_all(run.as_bytes())).with_context(failed)?;
        }
        Ok(Self { _file: file })
    }
}

/// The error of a folder that is in use.
fn refusal(folder: &Path, path: &Path) -> anyhow::Error {
    let shared = File::open(path).is_ok_and(|file| file.try_lock_shared().is_ok());
    let run = fs::read(path).ok().and_then(|text| serde_json::from_slice::<Run>(&text).ok()).filter(|_| !shared);
    let holder = match run {
        Some(Run { process, program, started }) => {
            let age = Duration::from_secs(now().saturating_sub(started));
            format!("process {process} ({program}), which started {age:?} ago")
        }
        None if shared => "processes that share it".into(),
        None => "another process".into(),
    };
    anyhow!(
        "the artifact folder {} is in use by {holder}; wait for its end, or choose another with --artifact-dir",
        folder.display()
    )
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(folder: &Path, holders: Holders) -> String {
        FolderLock::take(folder, holders).unwrap_err().to_string()
    }

    #[test]
    fn one_run_holds_a_folder_and_others_are_told_which() {
        let dir = tempfile::tempdir().unwrap();
        let lock = FolderLock::take(dir.path(), Holders::One).unwrap();
        for holders in [Holders::One, Holders::Many] {
            let message = refused(dir.path(), holders);
            let process = format!("process {} (", std::process::id());
            assert!(message.contains(&dir.path().display().to_string()) && message.contains(&process), "{message}");
        }
        drop(lock);
        // the file stays, the lock does not
        assert!(dir.path().join(FILE).exists());
        FolderLock::take(dir.path(), Holders::One).unwrap();
    }

    #[test]
    fn processes_that_share_a_folder_keep_others_out() {
        let dir = tempfile::tempdir().unwrap();
        drop(FolderLock::take(dir.path(), Holders::One).unwrap());
        let shared = [(); 3].map(|()| FolderLock::take(dir.path(), Holders::Many).unwrap());
        // the file still names the run before
        assert!(refused(dir.path(), Holders::One).contains("processes that share it"));
        drop(shared);
        FolderLock::take(dir.path(), Holders::One).unwrap();
    }

    #[cfg(unix)]
    #[test]
    fn a_link_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let victim = dir.path().join("victim");
        fs::write(&victim, "untouched").unwrap();
        std::os::unix::fs::symlink(&victim, dir.path().join(FILE)).unwrap();
        assert!(refused(dir.path(), Holders::One).contains("not a file"));
        assert_eq!(fs::read_to_string(&victim).unwrap(), "untouched");
    }
}
