//! The journal: a file that keeps every answer.
//!
//! A header of 40 bytes is followed by records, which are appended and never changed. A record
//! begins with 16 bytes: its kind and its number of rows, two `u32`, and 8 bytes of SHA-256 over
//! them. A record with answers continues with the key (16 bytes) and the scores of each row, and 8
//! bytes of SHA-256 over these. All values are little-endian.
//!
//! The answers of a batch are one record, so after a crash the journal holds all of them or none.
//! The queries without an answer are then split into the same batches as before.

use std::collections::HashMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::error::{BlackBoxError, JournalError};
use super::info::Info;
use super::query::{Key, le_bytes};

const MAGIC: &[u8; 8] = b"FLOPSBBJ";
const VERSION: u32 = 1;
const HEADER: usize = 40;

/// The kind of a record, and how it is charged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RecordKind {
    /// Answers, charged by this record.
    Charged = 1,
    /// Answers that an [`Attempt`](Self::Attempt) has charged.
    Paid = 2,
    /// Rows about to be sent, charged by this record.
    Attempt = 3,
    /// Rows of an attempt that did not reach the black box; their charge is taken back.
    Unsent = 4,
}

/// An open journal: the file, its answers and its charges.
pub(crate) struct Journal {
    path: PathBuf,
    file: File,
    answers: HashMap<Key, Box<[f32]>>,
    spent: u64,
}

impl Journal {
    /// Opens the journal of a black box with this `info`, or creates one.
    pub(crate) fn open(path: &Path, info: &Info) -> Result<Self, BlackBoxError> {
        let fail = |why| BlackBoxError::Journal { path: path.to_path_buf(), why };
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
        let file = file.map_err(|why| fail(io(why)))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(fail(JournalError::Locked)),
            Err(TryLockError::Error(why)) => return Err(fail(io(why))),
        }
        let mut journal = Self { path: path.to_path_buf(), file, answers: HashMap::new(), spent: 0 };
        journal.load(info).map_err(fail)?;
        Ok(journal)
    }

    /// The queries that the records charge.
    pub(crate) fn spent(&self) -> u64 {
        self.spent
    }

    /// The answer to a query, if the journal has it.
    pub(crate) fn answer(&self, key: Key) -> Option<&[f32]> {
        self.answers.get(&key).map(|scores| &**scores)
    }

    /// Appends a record of `rows` rows without answers, and returns once it is on disk.
    pub(crate) fn append_count(&mut self, kind: RecordKind, rows: u64) -> Result<(), BlackBoxError> {
        self.append(&record_head(kind, self.row_count(rows)?))
    }

    /// Appends a record of answers, and returns once it is on disk.
    pub(crate) fn append_answers(&mut self, kind: RecordKind, rows: &[(Key, &[f32])]) -> Result<(), BlackBoxError> {
        let mut record = record_head(kind, self.row_count(rows.len() as u64)?).to_vec();
        for (key, scores) in rows {
            record.extend(key.0);
            record.extend(le_bytes(scores));
        }
        let checksum = checksum(&record[16..]);
        record.extend(checksum);
        self.append(&record)?;
        for &(key, scores) in rows {
            self.answers.entry(key).or_insert_with(|| scores.into());
        }
        Ok(())
    }

    /// Makes every further write fail.
    #[cfg(test)]
    pub(crate) fn forbid_writing(&mut self) {
        self.file = File::open(&self.path).unwrap();
    }

    fn row_count(&self, rows: u64) -> Result<u32, BlackBoxError> {
        u32::try_from(rows).map_err(|_| self.fail(JournalError::Io(format!("{rows} rows are too many for a record"))))
    }

    fn append(&mut self, record: &[u8]) -> Result<(), BlackBoxError> {
        let written = self.file.write_all(record).and_then(|()| self.file.sync_data());
        written.map_err(|why| self.fail(io(why)))
    }

    fn fail(&self, why: JournalError) -> BlackBoxError {
        BlackBoxError::Journal { path: self.path.clone(), why }
    }

    /// Checks the header, loads the records, and drops a torn record at the end.
    fn load(&mut self, info: &Info) -> Result<(), JournalError> {
        let end = self.file.metadata().map_err(io)?.len();
        let header = header(info);
        let mut found = Vec::new();
        (&self.file).take(HEADER as u64).read_to_end(&mut found).map_err(io)?;
        if found.len() < HEADER {
            // a run that was killed while it created the file leaves a part of the header
            return if header.starts_with(&found) { self.create(&header) } else { Err(JournalError::Foreign) };
        }
        check_header(&found, &header)?;
        let valid = self.load_records(end, info.classes.len())?;
        self.file.set_len(valid).map_err(io)?;
        self.file.seek(SeekFrom::Start(valid)).map_err(io)?;
        Ok(())
    }

    fn create(&mut self, header: &[u8]) -> Result<(), JournalError> {
        self.file.set_len(0).map_err(io)?;
        self.file.seek(SeekFrom::Start(0)).map_err(io)?;
        self.file.write_all(header).and_then(|()| self.file.sync_all()).map_err(io)?;
        // sync the entry in the folder too, if the platform can
        if let Some(folder) = self.path.parent() {
            let _ = File::open(folder).and_then(|folder| folder.sync_all());
        }
        Ok(())
    }

    /// Loads the records up to `end`, and returns the offset behind the last complete one.
    fn load_records(&mut self, end: u64, classes: usize) -> Result<u64, JournalError> {
        let mut reader = BufReader::with_capacity(1 << 16, &self.file);
        let row = 16 + 4 * classes as u64;
        let mut at = HEADER as u64;
        while end - at >= 16 {
            let mut head = [0; 16];
            reader.read_exact(&mut head).map_err(io)?;
            let rows = read_u32(&head, 4);
            let kind = [RecordKind::Charged, RecordKind::Paid, RecordKind::Attempt, RecordKind::Unsent]
                .into_iter()
                .find(|&kind| {
                    // the checksum covers the kind
                    head == record_head(kind, rows)
                });
            let Some(kind) = kind else {
                // a crash can leave zeros at the end: the file has grown, but its content was not
                // written
                let zeros = head.iter().all(|&byte| byte == 0)
                    && reader.by_ref().bytes().all(|byte| byte.is_ok_and(|byte| byte == 0));
                return if zeros { Ok(at) } else { Err(JournalError::Damaged { offset: at }) };
            };
            let mut next = at + 16;
            if matches!(kind, RecordKind::Charged | RecordKind::Paid) {
                let length = u64::from(rows).saturating_mul(row).saturating_add(8);
                if length > end - next {
                    return Ok(at);
                }
                let mut payload = vec![0; length as usize];
                reader.read_exact(&mut payload).map_err(io)?;
                next += length;
                let (payload, stored) = payload.split_at(payload.len() - 8);
                if checksum(payload) != stored {
                    return if next == end { Ok(at) } else { Err(JournalError::Damaged { offset: at }) };
                }
                for row in payload.chunks_exact(row as usize) {
                    let (key, scores) = row.split_at(16);
                    let scores = scores.as_chunks::<4>().0.iter().map(|&score| f32::from_le_bytes(score)).collect();
                    let key = Key(std::array::from_fn(|at| key[at]));
                    self.answers.entry(key).or_insert(scores);
                }
            }
            match kind {
                RecordKind::Charged | RecordKind::Attempt => self.spent = self.spent.saturating_add(rows.into()),
                RecordKind::Unsent => self.spent = self.spent.saturating_sub(rows.into()),
                RecordKind::Paid => {}
            }
            at = next;
        }
        Ok(at)
    }
}

fn io(why: std::io::Error) -> JournalError {
    JournalError::Io(why.to_string())
}

/// The first 8 bytes of SHA-256.
fn checksum(bytes: &[u8]) -> [u8; 8] {
    let digest = Sha256::digest(bytes);
    std::array::from_fn(|at| digest[at])
}

/// The little-endian `u32` at byte `at`.
fn read_u32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|byte| bytes[at + byte]))
}

/// The first 16 bytes of a record.
fn record_head(kind: RecordKind, rows: u32) -> [u8; 16] {
    let mut head = [0; 16];
    head[..4].copy_from_slice(&(kind as u32).to_le_bytes());
    head[4..8].copy_from_slice(&rows.to_le_bytes());
    let checksum = checksum(&head[..8]);
    head[8..].copy_from_slice(&checksum);
    head
}

/// The header of the journal of a black box: magic, version, classes, fingerprint, checksum.
fn header(info: &Info) -> Vec<u8> {
    let mut header = MAGIC.to_vec();
    header.extend(VERSION.to_le_bytes());
    header.extend((info.classes.len() as u32).to_le_bytes());
    header.extend(info.fingerprint().0);
    let checksum = checksum(&header);
    header.extend(checksum);
    header
}

/// Checks the header of a file against the `header` that is expected.
fn check_header(found: &[u8], header: &[u8]) -> Result<(), JournalError> {
    if found[..8] != MAGIC[..] {
        return Err(JournalError::Foreign);
    }
    if checksum(&found[..32]) != found[32..40] {
        return Err(JournalError::Damaged { offset: 0 });
    }
    if read_u32(found, 8) != VERSION {
        return Err(JournalError::Version { got: read_u32(found, 8), expected: VERSION });
    }
    if found != header {
        let fingerprint = |bytes: &[u8]| Key(std::array::from_fn(|at| bytes[16 + at])).to_string();
        return Err(JournalError::OtherBlackBox {
            got: read_u32(found, 12),
            got_fingerprint: fingerprint(found),
            expected: read_u32(header, 12),
            expected_fingerprint: fingerprint(header),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests;
