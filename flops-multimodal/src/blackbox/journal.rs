//! The file that keeps every answer.
//!
//! After a header of 40 bytes come records, appended and never changed. A record begins with its kind and its rows, two `u32`, and
//! 8 bytes of SHA-256 over those; one with answers goes on with the key (16 bytes) and the scores of each row, and 8 bytes of
//! SHA-256 over them. All numbers are little-endian. The answers of a batch are one record, so that after a crash a batch is there
//! as a whole or not at all: what is asked again is then cut into the same batches as before.

use std::collections::HashMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::{BlackBoxError, Info, JournalError, Key};

const MAGIC: &[u8; 8] = b"FLOPSBBJ";
const VERSION: u32 = 1;
const HEADER: usize = 40;

/// What a record says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Answers that are charged for by being here.
    Charged = 1,
    /// Answers that were charged for as attempts.
    Paid = 2,
    /// Rows about to be sent, charged for.
    Attempt = 3,
    /// Rows of an attempt that did not reach the box, to be taken off again.
    Unsent = 4,
}

pub(crate) struct Journal {
    path: PathBuf,
    file: File,
    answers: HashMap<Key, Box<[f32]>>,
    spent: u64,
}

impl Journal {
    /// Opens the journal of the box `info`, or starts one.
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

    /// What the records charge for.
    pub(crate) fn spent(&self) -> u64 {
        self.spent
    }

    /// The answer to a query that was asked before.
    pub(crate) fn answer(&self, key: Key) -> Option<&[f32]> {
        self.answers.get(&key).map(|scores| &**scores)
    }

    /// Notes rows that have no answers (yet).
    pub(crate) fn note(&mut self, kind: Kind, rows: u64) -> Result<(), BlackBoxError> {
        self.write(&begin(kind, self.count(rows)?))
    }

    /// Keeps answers, and returns once they are on the disk.
    pub(crate) fn keep(&mut self, kind: Kind, rows: &[(Key, &[f32])]) -> Result<(), BlackBoxError> {
        let mut record = begin(kind, self.count(rows.len() as u64)?).to_vec();
        for (key, scores) in rows {
            record.extend(key.0);
            record.extend(super::protocol::bytes(scores));
        }
        let check = check(&record[16..]);
        record.extend(check);
        self.write(&record)?;
        for &(key, scores) in rows {
            self.answers.entry(key).or_insert_with(|| scores.into());
        }
        Ok(())
    }

    /// Lets every further write fail.
    #[cfg(test)]
    pub(crate) fn forbid_writing(&mut self) {
        self.file = File::open(&self.path).unwrap();
    }

    fn count(&self, rows: u64) -> Result<u32, BlackBoxError> {
        u32::try_from(rows).map_err(|_| self.fail(JournalError::Io(format!("{rows} rows are too many for a record"))))
    }

    fn write(&mut self, record: &[u8]) -> Result<(), BlackBoxError> {
        let written = self.file.write_all(record).and_then(|()| self.file.sync_data());
        written.map_err(|why| self.fail(io(why)))
    }

    fn fail(&self, why: JournalError) -> BlackBoxError {
        BlackBoxError::Journal { path: self.path.clone(), why }
    }

    fn load(&mut self, info: &Info) -> Result<(), JournalError> {
        let end = self.file.metadata().map_err(io)?.len();
        let header = header(info);
        let mut found = Vec::new();
        (&self.file).take(HEADER as u64).read_to_end(&mut found).map_err(io)?;
        if found.len() < HEADER {
            // a run that was killed at its first breath leaves a part of it
            return if header.starts_with(&found) { self.start(&header) } else { Err(JournalError::Foreign) };
        }
        compare(&found, &header)?;
        let whole = self.records(end, info.classes.len())?;
        self.file.set_len(whole).map_err(io)?;
        self.file.seek(SeekFrom::Start(whole)).map_err(io)?;
        Ok(())
    }

    fn start(&mut self, header: &[u8]) -> Result<(), JournalError> {
        self.file.set_len(0).map_err(io)?;
        self.file.seek(SeekFrom::Start(0)).map_err(io)?;
        self.file.write_all(header).and_then(|()| self.file.sync_all()).map_err(io)?;
        // the entry in the folder as well, where the platform can
        if let Some(folder) = self.path.parent() {
            let _ = File::open(folder).and_then(|folder| folder.sync_all());
        }
        Ok(())
    }

    /// Reads the records up to `end`, and returns where the last whole one ends.
    fn records(&mut self, end: u64, classes: usize) -> Result<u64, JournalError> {
        let mut reader = BufReader::with_capacity(1 << 16, &self.file);
        let row = 16 + 4 * classes as u64;
        let mut at = HEADER as u64;
        while end - at >= 16 {
            let mut head = [0; 16];
            reader.read_exact(&mut head).map_err(io)?;
            let rows = word(&head, 4);
            let kind = [Kind::Charged, Kind::Paid, Kind::Attempt, Kind::Unsent].into_iter().find(|&kind| {
                // the check covers the kind
                head == begin(kind, rows)
            });
            let Some(kind) = kind else {
                // a file grown by a crash before it was filled ends in zeros
                let zeros = head.iter().all(|&byte| byte == 0)
                    && reader.by_ref().bytes().all(|byte| byte.is_ok_and(|byte| byte == 0));
                return if zeros { Ok(at) } else { Err(JournalError::Damaged { offset: at }) };
            };
            let mut next = at + 16;
            if matches!(kind, Kind::Charged | Kind::Paid) {
                let length = u64::from(rows).saturating_mul(row).saturating_add(8);
                if length > end - next {
                    return Ok(at);
                }
                let mut payload = vec![0; length as usize];
                reader.read_exact(&mut payload).map_err(io)?;
                next += length;
                let (payload, sum) = payload.split_at(payload.len() - 8);
                if check(payload) != sum {
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
                Kind::Charged | Kind::Attempt => self.spent = self.spent.saturating_add(rows.into()),
                Kind::Unsent => self.spent = self.spent.saturating_sub(rows.into()),
                Kind::Paid => {}
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
fn check(bytes: &[u8]) -> [u8; 8] {
    let digest = Sha256::digest(bytes);
    std::array::from_fn(|at| digest[at])
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|byte| bytes[at + byte]))
}

/// The first 16 bytes of a record.
fn begin(kind: Kind, rows: u32) -> [u8; 16] {
    let mut head = [0; 16];
    head[..4].copy_from_slice(&(kind as u32).to_le_bytes());
    head[4..8].copy_from_slice(&rows.to_le_bytes());
    let check = check(&head[..8]);
    head[8..].copy_from_slice(&check);
    head
}

fn header(info: &Info) -> Vec<u8> {
    let mut header = MAGIC.to_vec();
    header.extend(VERSION.to_le_bytes());
    header.extend((info.classes.len() as u32).to_le_bytes());
    header.extend(info.fingerprint().0);
    let check = check(&header);
    header.extend(check);
    header
}

fn compare(found: &[u8], header: &[u8]) -> Result<(), JournalError> {
    if found[..8] != MAGIC[..] {
        return Err(JournalError::Foreign);
    }
    if check(&found[..32]) != found[32..40] {
        return Err(JournalError::Damaged { offset: 0 });
    }
    if word(found, 8) != VERSION {
        return Err(JournalError::Version { got: word(found, 8), expected: VERSION });
    }
    if found != header {
        let fingerprint = |bytes: &[u8]| Key(std::array::from_fn(|at| bytes[16 + at])).to_string();
        return Err(JournalError::OtherBox {
            got: word(found, 12),
            got_fingerprint: fingerprint(found),
            expected: word(header, 12),
            expected_fingerprint: fingerprint(header),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests;
