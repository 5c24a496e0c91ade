//! Entries of the log on disk, so that a run does not grow in memory.

use std::env;
use std::fs::{File, OpenOptions, remove_file};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use crate::random;

/// Entries that are shorter stay in memory.
const MIN_BYTES: usize = 4 << 10;
/// A file that has grown to this size takes no more entries. It is gone with the last of its entries.
const MAX_FILE: u64 = 256 << 20;

/// The bytes of an entry, in memory or on disk. Clones share them.
#[derive(Clone)]
pub(super) enum Body {
    Memory(Arc<Vec<u8>>),
    Disk { file: Arc<SpillFile>, at: u64, len: usize },
}

impl Default for Body {
    fn default() -> Self {
        Self::Memory(Arc::default())
    }
}

impl Body {
    pub(super) fn new(bytes: Vec<u8>) -> Self {
        Self::Memory(Arc::new(bytes))
    }

    /// Its bytes in memory.
    pub(super) fn in_memory(&self) -> usize {
        match self {
            Self::Memory(bytes) => bytes.len(),
            Self::Disk { .. } => 0,
        }
    }

    /// The bytes, without a copy where nobody shares them.
    ///
    /// # Errors
    /// Where the file cannot be read.
    pub(super) fn into_bytes(self) -> io::Result<Vec<u8>> {
        let bytes = self.bytes()?;
        drop(self);
        Ok(Arc::try_unwrap(bytes).unwrap_or_else(|shared| shared.to_vec()))
    }

    /// The bytes.
    ///
    /// # Errors
    /// Where the file cannot be read.
    pub(super) fn bytes(&self) -> io::Result<Arc<Vec<u8>>> {
        match self {
            Self::Memory(bytes) => Ok(bytes.clone()),
            Self::Disk { file, at, len } => file.read(*at, *len).map(Arc::new),
        }
    }
}

/// A temporary file that only this process can open.
pub(super) struct SpillFile {
    file: Mutex<File>,
    path: PathBuf,
}

impl SpillFile {
    fn create() -> io::Result<Self> {
        let name = random::hex(&random::bytes::<16>().map_err(io::Error::other)?);
        let path = env::temp_dir().join(format!("flops-hub-{name}"));
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let file = options.open(&path)?;
        // without a name it is gone however the process ends; where that cannot be, when it is dropped
        let _ = remove_file(&path);
        Ok(Self { file: Mutex::new(file), path })
    }

    fn read(&self, at: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.seek(SeekFrom::Start(at))?;
        let mut bytes = vec![0; len];
        file.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn write(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.seek(SeekFrom::Start(at))?;
        file.write_all(bytes)
    }
}

impl Drop for SpillFile {
    fn drop(&mut self) {
        let _ = remove_file(&self.path);
    }
}

/// The file that entries are written to.
#[derive(Default)]
pub(super) struct Spill {
    current: Option<Arc<SpillFile>>,
    used: u64,
}

impl Spill {
    /// A body with the same bytes on disk; in memory where it is short, or where the disk is full.
    pub(super) fn put(&mut self, body: &Body) -> Body {
        match body {
            Body::Memory(bytes) if bytes.len() >= MIN_BYTES => self.write(bytes).unwrap_or_else(|why| {
                ::log::warn!("an entry of the log stays in memory, since it cannot be written to disk: {why}");
                body.clone()
            }),
            _ => body.clone(),
        }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<Body> {
        if self.used >= MAX_FILE {
            self.current = None;
        }
        let file = match &self.current {
            Some(file) => file.clone(),
            None => {
                self.used = 0;
                self.current.insert(Arc::new(SpillFile::create()?)).clone()
            }
        };
        let at = self.used;
        file.write(at, bytes)?;
        self.used += bytes.len() as u64;
        Ok(Body::Disk { file, at, len: bytes.len() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_entries_come_back_from_disk_and_leave_nothing() {
        let mut spill = Spill::default();
        let body = |len: usize, value: u8| Body::new(vec![value; len]);
        assert!(matches!(spill.put(&body(10, 1)), Body::Memory(_)));
        let kept: Vec<Body> = (0..5).map(|i| spill.put(&body(MIN_BYTES + i, i as u8))).collect();
        for (i, body) in kept.iter().enumerate() {
            assert!(matches!(body, Body::Disk { .. }));
            assert_eq!(*body.bytes().unwrap(), vec![i as u8; MIN_BYTES + i]);
        }
        let path = spill.current.as_ref().unwrap().path.clone();
        #[cfg(unix)]
        assert!(!path.exists());
        // a full file takes no more, and goes with its last entry
        spill.used = MAX_FILE;
        let next = spill.put(&body(MIN_BYTES, 9));
        assert_ne!(spill.current.as_ref().unwrap().path, path);
        let Body::Disk { file, .. } = &kept[0] else { unreachable!() };
        let file = Arc::downgrade(file);
        drop(kept);
        assert!(file.upgrade().is_none() && next.bytes().unwrap()[0] == 9);
    }
}
