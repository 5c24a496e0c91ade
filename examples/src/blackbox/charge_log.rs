//! The charge log: which queries the server has charged.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use flops_multimodal::blackbox::Query;

/// The keys of the charged queries, one line each.
///
/// A query is charged once, however often it is asked, because its key depends on its content
/// alone.
pub(super) struct ChargeLog {
    file: Option<File>,
    charged: HashSet<String>,
}

impl ChargeLog {
    /// Opens the log in a file, or one in memory without a path. An incomplete last line is
    /// dropped.
    ///
    /// # Errors
    /// Where the file cannot be used, or holds a line that is not a key.
    pub(super) fn open(path: Option<&Path>) -> Result<Self> {
        let Some(path) = path else { return Ok(Self { file: None, charged: HashSet::new() }) };
        let failed = || format!("the charge log {} cannot be used; choose another with --charge-log", path.display());
        let mut charged = HashSet::new();
        if path.exists() {
            let mut complete = 0;
            let mut lines = BufReader::new(File::open(path).with_context(failed)?);
            let mut line = String::new();
            while lines.read_line(&mut line).with_context(failed)? > 0 {
                let Some(key) = line.strip_suffix('\n') else { break };
                ensure!(
                    key.len() == 32 && key.bytes().all(|b| b.is_ascii_hexdigit()),
                    "{}: '{key}' is not a key",
                    failed()
                );
                complete += line.len() as u64;
                charged.insert(key.to_string());
                line.clear();
            }
            OpenOptions::new().write(true).open(path).and_then(|f| f.set_len(complete)).with_context(failed)?;
        }
        let file = OpenOptions::new().create(true).append(true).open(path).with_context(failed)?;
        Ok(Self { file: Some(file), charged })
    }

    /// Returns how many queries were charged.
    pub(super) fn count(&self) -> u64 {
        self.charged.len() as u64
    }

    /// Charges the queries that were not charged before. They are on the disk before this returns.
    ///
    /// # Errors
    /// Where the file cannot be written. Nothing is charged then.
    pub(super) fn charge(&mut self, queries: &[Query]) -> std::io::Result<()> {
        let keys = queries.iter().map(|query| query.key().to_string());
        let new: HashSet<String> = keys.filter(|key| !self.charged.contains(key)).collect();
        if let Some(file) = self.file.as_mut().filter(|_| !new.is_empty()) {
            let lines: String = new.iter().flat_map(|key| [key, "\n"]).collect();
            let length = file.metadata()?.len();
            if let Err(error) = file.write_all(lines.as_bytes()).and_then(|()| file.sync_data()) {
                // nothing is charged that is not in the log, and no line is incomplete
                let _ = file.set_len(length);
                return Err(error);
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
        std::fs::write(&path, "not a key\n").unwrap();
        assert!(ChargeLog::open(Some(&path)).is_err());
    }
}
