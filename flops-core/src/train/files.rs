//! Files that are complete or absent.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{Error, ErrorKind, Result, Write};
use std::path::Path;

/// Writes a file atomically: `path` holds either the old file or all of `bytes`, never a part.
///
/// The bytes go to `<name>.partial` in the same folder, are flushed to the disk, and the file is
/// renamed.
///
/// # Errors
/// Where the file cannot be written. The message names the path and the kind is the system's. The
/// old file stays, and no `.partial` file is left behind.
///
/// # Example
/// ```
/// use flops_core::train::files::write_atomic;
///
/// let path = std::env::temp_dir().join(format!("flops-doc-{}.txt", std::process::id()));
/// write_atomic(&path, b"all of it")?;
/// assert_eq!(std::fs::read(&path)?, b"all of it");
/// # std::fs::remove_file(path)?;
/// # Ok::<(), std::io::Error>(())
/// ```
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let name = path.file_name().map(OsString::from);
    let written = name.ok_or_else(|| Error::from(ErrorKind::InvalidFilename)).and_then(|mut name| {
        name.push(".partial");
        let partial = path.with_file_name(name);
        let written = write_synced(&partial, bytes).and_then(|()| fs::rename(&partial, path));
        if written.is_err() {
            // the first error is the one worth reporting
            let _ = fs::remove_file(&partial);
        }
        written
    });
    written.map_err(|error| {
        let place = path.display();
        Error::new(error.kind(), format!("cannot write {place}; free disk space or choose another folder: {error}"))
    })
}

fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn a_second_write_replaces_the_first() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        for text in ["first", "second"] {
            write_atomic(&path, text.as_bytes()).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
        assert_eq!(names(dir.path()), ["file"]);
    }

    #[test]
    fn a_failed_write_names_the_path_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        // a folder cannot be replaced by a file
        let taken = dir.path().join("taken");
        fs::create_dir(&taken).unwrap();
        for path in [taken.clone(), dir.path().join("absent/file"), dir.path().join("..")] {
            let error = write_atomic(&path, b"text").unwrap_err().to_string();
            assert!(error.contains(&path.display().to_string()), "{error}");
        }
        assert!(taken.is_dir());
        assert_eq!(names(dir.path()), ["taken"]);
    }
}
