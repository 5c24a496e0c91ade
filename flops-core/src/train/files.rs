//! Files that are complete or absent.

use std::fs::Permissions;
use std::io::{Error, ErrorKind, Result, Write};
use std::path::Path;

/// Writes a file atomically: `path` holds either the old file or all of `bytes`, never a part.
///
/// The bytes go to a new file of a random name in the same folder, are flushed to the disk, and the
/// file is renamed. A link in the folder is never followed, and two writers do not meet.
///
/// # Errors
/// Where the file cannot be written. The message names the path and the kind is the system's. The
/// old file stays, and no other file is left behind.
///
/// # Example
/// ```
/// use flops_core::train::files::write_atomic;
///
/// let folder = tempfile::tempdir()?;
/// let path = folder.path().join("file.txt");
/// write_atomic(&path, b"all of it")?;
/// assert_eq!(std::fs::read(&path)?, b"all of it");
/// # Ok::<(), std::io::Error>(())
/// ```
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let written = match path.file_name() {
        Some(_) => write_beside(path, bytes),
        None => Err(ErrorKind::InvalidFilename.into()),
    };
    written.map_err(|error| {
        let place = path.display();
        Error::new(error.kind(), format!("cannot write {place}; free disk space or choose another folder: {error}"))
    })
}

fn write_beside(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = temporary(path.parent().unwrap_or(Path::new("")))?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    // a file that is not renamed is removed when it is dropped
    file.persist(path).map(drop).map_err(|error| error.error)
}

/// Checks that files can be made in a folder.
///
/// # Errors
/// Where the folder is missing, is none, or may not be written to.
pub fn check_writable(folder: &Path) -> Result<()> {
    temporary(folder)?.close()
}

/// A new file of a random name in that folder, with the permissions of any other new file.
fn temporary(folder: &Path) -> Result<tempfile::NamedTempFile> {
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    let mut builder = tempfile::Builder::new();
    builder.prefix(".partial-");
    if let Some(permissions) = permissions() {
        builder.permissions(permissions);
    }
    builder.tempfile_in(folder)
}

/// What a new file may be used for, before the umask takes its part.
#[cfg(unix)]
fn permissions() -> Option<Permissions> {
    Some(std::os::unix::fs::PermissionsExt::from_mode(0o666))
}

#[cfg(not(unix))]
fn permissions() -> Option<Permissions> {
    None
}

#[cfg(test)]
mod tests {
    use std::fs;

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

    #[test]
    fn a_folder_that_takes_no_file_is_told_and_a_trial_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        check_writable(dir.path()).unwrap();
        assert!(names(dir.path()).is_empty());
        assert!(check_writable(&dir.path().join("absent")).is_err());
    }

    /// The name used to be the file's with `.partial`, and a link of that name was written through.
    #[cfg(unix)]
    #[test]
    fn links_are_replaced_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let [path, partial, victim] = ["file", "file.partial", "victim"].map(|name| dir.path().join(name));
        fs::write(&victim, "untouched").unwrap();
        for link in [&path, &partial] {
            std::os::unix::fs::symlink(&victim, link).unwrap();
        }
        write_atomic(&path, b"text").unwrap();
        assert_eq!(fs::read_to_string(&victim).unwrap(), "untouched");
        assert!(fs::symlink_metadata(&path).unwrap().is_file());
        assert_eq!(fs::read_to_string(&path).unwrap(), "text");
    }

    /// A temporary file is its owner's alone; what it becomes is as readable as any other file.
    #[cfg(unix)]
    #[test]
    fn permissions_are_those_of_any_new_file() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let [ours, plain] = ["ours", "plain"].map(|name| dir.path().join(name));
        write_atomic(&ours, b"text").unwrap();
        fs::write(&plain, "text").unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode(&ours), mode(&plain));
    }
}
