//! What can go wrong with a black box, each kind with the offending value and the remedy.

use std::path::PathBuf;

/// The errors of black boxes.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum BlackBoxError {
    /// A setting outside its range.
    #[error("invalid setting: {name} = {value}; {remedy}")]
    Setting {
        /// The setting at fault.
        name: &'static str,
        /// Its value.
        value: String,
        /// What to do about it.
        remedy: &'static str,
    },
    /// A description of a box that contradicts itself.
    #[error("the black box describes itself as {name} = {value}; {remedy}")]
    Info {
        /// The field at fault.
        name: &'static str,
        /// Its value.
        value: String,
        /// What to do about it.
        remedy: &'static str,
    },
    /// A query the box cannot take. Nothing was sent.
    #[error("query {row}: {what} has {got} values where {expected} are expected; {remedy}")]
    QueryLength {
        /// Position of the query.
        row: usize,
        /// `image` or `context`.
        what: &'static str,
        /// Its length.
        got: usize,
        /// The lengths the box takes.
        expected: String,
        /// What to do about it.
        remedy: &'static str,
    },
    /// A query with a value outside its range. Nothing was sent.
    #[error("query {row}: {what}[{index}] = {value}; {remedy}")]
    QueryValue {
        /// Position of the query.
        row: usize,
        /// `image` or `context`.
        what: &'static str,
        /// Position in it.
        index: usize,
        /// The value.
        value: f32,
        /// What to do about it.
        remedy: &'static str,
    },
    /// An answer with too many or too few rows.
    #[error("the black box gave {got} rows of scores for {expected} queries; it must give one row per query, in order")]
    Rows {
        /// The rows of the answer.
        got: usize,
        /// The queries asked.
        expected: usize,
    },
    /// A row with too many or too few scores.
    #[error("the black box gave {got} scores in row {row} where it has {expected} classes; it must score every class")]
    Classes {
        /// Position of the row in what was asked at once.
        row: usize,
        /// Its scores.
        got: usize,
        /// The classes of the box.
        expected: usize,
    },
    /// A score that is NaN or infinite.
    #[error("the black box gave the score {value} in row {row} for class {class}; it must give finite numbers")]
    Score {
        /// Position of the row in what was asked at once.
        row: usize,
        /// Position of the class.
        class: usize,
        /// The score.
        value: f32,
    },
    /// What a closure, or a forward pass in process, reported.
    #[error("the black box failed: {0}")]
    Failed(String),
    /// An `https://` address without the feature that it needs.
    #[error("{url} needs TLS; build flops-multimodal with the feature 'tls', or give an http:// address")]
    Tls {
        /// The address.
        url: String,
    },
    /// The server was not reached, or the connection broke.
    #[error("{url}: {why}; check that the server is up")]
    Transport {
        /// The address.
        url: String,
        /// What happened.
        why: String,
        /// Whether not one byte of the request can have reached the server.
        unsent: bool,
    },
    /// The answer was not complete in time.
    #[error("{url}: no complete answer within {seconds} s; raise the timeout, or lower the batch size")]
    Timeout {
        /// The address.
        url: String,
        /// The time it had, in seconds.
        seconds: f64,
    },
    /// The server answered with an error.
    #[error("{url}: HTTP {status}: {message}")]
    Status {
        /// The address.
        url: String,
        /// The HTTP status.
        status: u16,
        /// The first 200 characters of what the server said.
        message: String,
    },
    /// The answer is no JSON of the right form. JSON has no NaN: a server that writes one ends here.
    #[error("{url}: the answer cannot be understood ({why}); it begins with '{begin}'")]
    Body {
        /// The address.
        url: String,
        /// What is wrong with it.
        why: String,
        /// Its first characters.
        begin: String,
    },
    /// The answer is larger than any right one.
    #[error("{url}: the answer is longer than {limit} bytes; it is no answer to the request")]
    TooLong {
        /// The address.
        url: String,
        /// The limit, in bytes.
        limit: u64,
    },
    /// The last of several attempts failed as well.
    #[error("gave up after {attempts} attempts, the last failed so: {last}")]
    GaveUp {
        /// The attempts made.
        attempts: u32,
        /// How the last one failed.
        last: Box<BlackBoxError>,
    },
    /// The queries do not fit under the cap. They were not sent.
    #[error(
        "{asked} more queries do not fit under the cap of {cap}, of which {spent} are spent or under way; raise it, or stop here"
    )]
    CapReached {
        /// The cap.
        cap: u64,
        /// Queries counted, those under way included.
        spent: u64,
        /// Queries that were to be sent.
        asked: u64,
    },
    /// A wire message that does not fit the box.
    #[error("{what}: {why}")]
    Wire {
        /// The part of the message.
        what: String,
        /// What is wrong with it.
        why: String,
    },
    /// The journal cannot be used.
    #[error("journal {}: {why}", path.display())]
    Journal {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: JournalError,
    },
}

/// What is wrong with a journal.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum JournalError {
    /// The file cannot be read or written.
    #[error("{0}; check the path, and that the disk is not full")]
    Io(String),
    /// Another run has it open.
    #[error("another run has it open; wait for that one, or give this one a journal of its own")]
    Locked,
    /// The file is something else.
    #[error("it is no journal of answers; give another path")]
    Foreign,
    /// The file was written by another version of this crate.
    #[error("it has version {got}, this crate reads version {expected}; give another path")]
    Version {
        /// The version of the file.
        got: u32,
        /// The version of this crate.
        expected: u32,
    },
    /// The answers are those of another box.
    #[error(
        "it holds the answers of another black box ({got} classes, fingerprint {got_fingerprint}, where this one has {expected} and {expected_fingerprint}); give another path"
    )]
    OtherBox {
        /// Classes of the box in the file.
        got: u32,
        /// Fingerprint of the box in the file.
        got_fingerprint: String,
        /// Classes of this box.
        expected: u32,
        /// Fingerprint of this box.
        expected_fingerprint: String,
    },
    /// A record in the middle of the file is damaged.
    #[error("the record at byte {offset} is damaged, and others follow it; restore the file from a copy")]
    Damaged {
        /// Where the record begins.
        offset: u64,
    },
}
