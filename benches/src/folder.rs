//! The folder of a measurement's files.

use std::fmt::{self, Display, Formatter};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use flops_core::train::files::{check_writable, write_atomic};

/// A folder that files are written into.
pub struct Folder(PathBuf);

impl Folder {
    /// Creates the folder if needed, and checks that it can be written.
    ///
    /// # Errors
    /// If that fails.
    pub fn open(dir: &Path) -> Result<Self> {
        let failed = || format!("the folder {} cannot be written; choose another with --artifact-dir", dir.display());
        fs::create_dir_all(dir).and_then(|()| check_writable(dir)).with_context(failed)?;
        Ok(Self(dir.to_path_buf()))
    }

    /// Writes a file, whole or not at all.
    ///
    /// # Errors
    /// If that fails.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        Ok(write_atomic(&self.0.join(name), bytes)?)
    }
}

impl Display for Folder {
    fn fmt(&self, f: &mut Formatter) -> fmt::Result {
        self.0.display().fmt(f)
    }
}
