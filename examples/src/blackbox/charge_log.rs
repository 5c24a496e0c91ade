//! The charge log: which queries the server has charged.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;

use anyhow::{Context, Result, anyhow, ensure};
use flops_multimodal::blackbox::{Key, Query};

/// The most queries of a log; their keys take less than 300 MiB of memory.
const MOST: usize = 7_000_000;
/// The most bytes of a line: a key and the end of the line, and one more to tell that it is longer.
const LINE: u64 = 34;

/// The keys of the charged queries, one line each.
///
/// A query is charged once, however often it is asked, because its key depends on its content
/// alone.
pub(super) struct ChargeLog {
    file: Option<File>,
    charged: HashSet<Key>,
    most: usize,
}

/// Why queries were not charged.
#[derive(Debug)]
pub(super) enum ChargeError {
    /// The log takes no more.
    Full,
    /// It cannot be written.
    Io(std::io::Error),
}

impl std::fmt::Display for ChargeError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Full => write!(f, "the charge log takes no more queries; start a server with another --charge-log"),
            Self::Io(why) => write!(f, "the charge log cannot be written: {why}"),
        }
    }
}

impl ChargeLog {
    /// Opens the log in a file, or one in memory without a path. An incomplete last line is
    /// dropped.
    ///
    /// # Errors
    /// Where the file cannot be used, holds a line that is not a key, or more keys than fit.
    pub(super) fn open(path: Option<&Path>) -> Result<Self> {
        let Some(path) = path else { return Ok(Self { file: None, charged: HashSet::new(), most: MOST }) };
        let failed = || format!("the charge log {} cannot be used; choose another with --charge-log", path.display());
        let mut charged = HashSet::new();
        if path.exists() {
            let mut complete = 0;
            let mut lines = BufReader::new(File::open(path).with_context(failed)?);
            let mut line = String::new();
            while lines.by_ref().take(LINE).read_line(&mut line).with_context(failed)? > 0 {
                let text = match line.strip_suffix('\n') {
                    Some(text) => text,
                    None if (line.len() as u64) < LINE - 1 => break,
                    None => &line,
                };
                let key: Key = text.parse().map_err(|_| anyhow!("{}: '{text}' is not a key", failed()))?;
                complete += line.len() as u64;
                charged.insert(key);
                ensure!(charged.len() <= MOST, "{}: it holds more than {MOST} queries", failed());
                line.clear();
            }
            OpenOptions::new().write(true).open(path).and_then(|f| f.set_len(complete)).with_context(failed)?;
        }
        let file = OpenOptions::new().create(true).append(true).open(path).with_context(failed)?;
        Ok(Self { file: Some(file), charged, most: MOST })
    }

    /// Returns how many queries were charged.
    pub(super) fn count(&self) -> u64 {
        self.charged.len() as u64
    }

    /// Charges the queries that were not charged before. They are on the disk before this returns.
    ///
    /// # Errors
    /// Where the log is full or cannot be written. Nothing is charged then.
    pub(super) fn charge(&mut self, queries: &[Query]) -> Result<(), ChargeError> {
        let keys = queries.iter().map(Query::key);
        let new: HashSet<Key> = keys.filter(|key| !self.charged.contains(key)).collect();
        if self.charged.len() + new.len() > self.most {
            return Err(ChargeError::Full);
        }
        if let Some(file) = self.file.as_mut().filter(|_| !new.is_empty()) {
            let lines: String = new.iter().map(|key| format!("{key}\n")).collect();
            let length = file.metadata().map_err(ChargeError::Io)?.len();
            if let Err(error) = file.write_all(lines.as_bytes()).and_then(|()| file.sync_data()) {
                // nothing is charged that is not in the log, and no line is incomplete
                let _ = file.set_len(length);
                return Err(ChargeError::Io(error));
            }
        }
        self.charged.extend(new);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_is_charged_once_and_the_log_survives_a_kill() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("charges");
        let queries: Vec<Query> = (0..3).map(|i| Query::new(vec![i as f32])).collect();
        let mut log = ChargeLog::open(Some(&path)).unwrap();
        log.charge(&queries[..2]).unwrap();
        log.charge(&queries).unwrap();
        assert_eq!(log.charged.len(), 3);
        drop(log);
        // killed in the middle of a line
        let mut text = std::fs::read_to_string(&path).unwrap();
        text.truncate(text.len() - 5);
        std::fs::write(&path, text).unwrap();
        let mut log = ChargeLog::open(Some(&path)).unwrap();
        assert_eq!(log.charged.len(), 2);
        log.charge(&queries).unwrap();
        assert_eq!(ChargeLog::open(Some(&path)).unwrap().charged.len(), 3);
        for text in ["not a key\n", &"7".repeat(33), &"a".repeat(1 << 20)] {
            std::fs::write(&path, text).unwrap();
            assert!(ChargeLog::open(Some(&path)).is_err());
        }
    }

    #[test]
    fn a_full_log_charges_nothing_more() {
        let queries: Vec<Query> = (0..3).map(|i| Query::new(vec![i as f32])).collect();
        let mut log = ChargeLog { most: 2, ..ChargeLog::open(None).unwrap() };
        log.charge(&queries[..1]).unwrap();
        assert!(matches!(log.charge(&queries), Err(ChargeError::Full)));
        assert_eq!(log.count(), 1);
        log.charge(&queries[..2]).unwrap();
        // what is charged already costs nothing
        log.charge(&queries[..2]).unwrap();
    }
}
