use std::path::Path;

use super::{HEADER, Journal, RecordKind};
use crate::blackbox::query::query_keys;
use crate::blackbox::testing::{info, queries, truth};
use crate::blackbox::{BlackBoxError, Info, JournalError, Key, Query};

fn open(path: &Path) -> Result<Journal, JournalError> {
    Journal::open(path, &info()).map_err(|error| match error {
        BlackBoxError::Journal { why, .. } => why,
        error => panic!("{error}"),
    })
}

/// Appends the answers to queries `first..first + count`.
fn append(journal: &mut Journal, kind: RecordKind, first: usize, count: usize) {
    let queries = &queries(first + count)[first..];
    let scores: Vec<Vec<f32>> = queries.iter().map(truth).collect();
    let rows: Vec<(Key, &[f32])> =
        query_keys(queries).into_iter().zip(scores.iter().map(|scores| &scores[..])).collect();
    journal.append_answers(kind, &rows).unwrap();
}

/// How many of the first `count` queries have an answer; each must be the right one.
fn answered(journal: &Journal, count: usize) -> usize {
    let answered = |query: &Query| journal.answer(query.key()).map(|scores| assert_eq!(scores, truth(query)));
    queries(count).iter().filter_map(answered).count()
}

#[test]
fn answers_and_charges_survive_reopening() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.journal");
    let mut journal = open(&path).unwrap();
    append(&mut journal, RecordKind::Charged, 0, 3);
    journal.append_count(RecordKind::Attempt, 5).unwrap();
    journal.append_count(RecordKind::Unsent, 2).unwrap();
    append(&mut journal, RecordKind::Paid, 3, 4);
    assert_eq!(open(&path).err(), Some(JournalError::Locked));
    assert_eq!(answered(&journal, 10), 7);
    drop(journal);
    let journal = open(&path).unwrap();
    // 3 charged as answers, 5 − 2 as attempts
    assert_eq!((answered(&journal, 10), journal.spent()), (7, 6));
}

#[test]
fn a_record_torn_at_any_byte_is_dropped_and_appending_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.journal");
    let mut journal = open(&path).unwrap();
    let empty = std::fs::read(&path).unwrap().len();
    append(&mut journal, RecordKind::Charged, 0, 2);
    let whole = std::fs::read(&path).unwrap().len();
    append(&mut journal, RecordKind::Charged, 2, 3);
    drop(journal);
    let bytes = std::fs::read(&path).unwrap();
    assert_eq!((empty, whole, bytes.len()), (HEADER, HEADER + 24 + 2 * 24, HEADER + 48 + 5 * 24));
    for length in 0..bytes.len() {
        std::fs::write(&path, &bytes[..length]).unwrap();
        let mut journal = open(&path).unwrap();
        let rows = if length < whole { 0 } else { 2 };
        assert_eq!((answered(&journal, 9), journal.spent()), (rows, rows as u64), "{length} bytes");
        append(&mut journal, RecordKind::Charged, 5, 4);
        drop(journal);
        assert_eq!(answered(&open(&path).unwrap(), 9), rows + 4, "{length} bytes");
    }
    // after a power cut a file may end in zeros
    for zeros in [1, 15, 16, 17, 500] {
        std::fs::write(&path, [&bytes[..], &vec![0; zeros]].concat()).unwrap();
        assert_eq!(answered(&open(&path).unwrap(), 9), 5, "{zeros} zeros");
        assert_eq!(std::fs::read(&path).unwrap(), bytes);
    }
}

#[test]
fn damage_in_the_middle_is_an_error_never_a_wrong_answer() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.journal");
    let mut journal = open(&path).unwrap();
    append(&mut journal, RecordKind::Charged, 0, 2);
    append(&mut journal, RecordKind::Charged, 2, 1);
    drop(journal);
    let bytes = std::fs::read(&path).unwrap();
    for at in 0..bytes.len() {
        let mut damaged = bytes.clone();
        damaged[at] ^= 0x10;
        std::fs::write(&path, &damaged).unwrap();
        let last = HEADER + 24 + 2 * 24;
        match open(&path) {
            // the payload of the last record cannot be told from a torn one
            Ok(journal) => assert_eq!((at >= last + 16, answered(&journal, 9)), (true, 2), "byte {at}"),
            Err(JournalError::Damaged { offset }) => {
                let record = [0, HEADER, last].into_iter().rfind(|&begin| begin <= at).unwrap();
                assert_eq!(offset, record as u64, "byte {at}");
            }
            Err(why) => assert!(why == JournalError::Foreign && at < 8, "byte {at}: {why}"),
        }
        assert!(std::fs::read(&path).unwrap().len() >= last, "byte {at}");
    }
}

#[test]
fn other_files_are_errors_and_stay_unchanged() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.journal");
    for text in ["notes", "notes that are longer than the header of a journal"] {
        std::fs::write(&path, text).unwrap();
        assert_eq!(open(&path).err(), Some(JournalError::Foreign));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
    }
    std::fs::remove_file(&path).unwrap();
    let other = Info::new(["cat", "dog", "owl"], [1, 2, 2]).unwrap();
    drop(Journal::open(&path, &other).unwrap());
    let why = open(&path).err().unwrap();
    assert!(matches!(why, JournalError::OtherBlackBox { got: 3, expected: 2, .. }), "{why}");
    let mut newer = std::fs::read(&path).unwrap();
    newer[8] = 2;
    let checksum = super::checksum(&newer[..32]);
    newer[32..].copy_from_slice(&checksum);
    std::fs::write(&path, newer).unwrap();
    assert_eq!(open(&path).err(), Some(JournalError::Version { got: 2, expected: 1 }));
    assert!(matches!(open(&folder.path().join("no/such/folder")), Err(JournalError::Io(_))));
    assert!(matches!(open(folder.path()), Err(JournalError::Io(_))));
}
