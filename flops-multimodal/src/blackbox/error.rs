//! Errors of black boxes, each with the value at fault and the remedy.

use std::path::PathBuf;

/// An error of a black box.
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
    /// An invalid description of a black box.
    #[error("the black box describes itself as {name} = {value}; {remedy}")]
    Info {
        /// The field at fault.
        name: &'static str,
        /// Its value.
        value: String,
        /// What to do about it.
        remedy: &'static str,
    },
    /// A query with the wrong number of values. Nothing was sent.
    #[error("query {row}: {what} has {got} values where {expected} are expected; {remedy}")]
    QueryLength {
        /// Position of the query.
        row: usize,
        /// `image` or `context`.
        what: &'static str,
        /// Its number of values.
        got: usize,
        /// The lengths that the black box takes.
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
        /// Position of the value.
        index: usize,
        /// The value.
        value: f32,
        /// What to do about it.
        remedy: &'static str,
    },
    /// An answer with too many or too few rows.
    #[error(
        "the black box returned {got} rows of scores for {expected} queries; it must return one row per query, in order"
    )]
    Rows {
        /// The rows of the answer.
        got: usize,
        /// The number of queries.
        expected: usize,
    },
    /// A row with too many or too few scores.
    #[error("the black box returned {got} scores in row {row} but has {expected} classes; it must score every class")]
    Classes {
        /// Position of the row among the queries sent together.
        row: usize,
        /// Its scores.
        got: usize,
        /// The classes of the black box.
        expected: usize,
    },
    /// A score that is NaN or infinite.
    #[error("the black box returned the score {value} in row {row} for class {class}; scores must be finite")]
    Score {
        /// Position of the row among the queries sent together.
        row: usize,
        /// Position of the class.
        class: usize,
        /// The score.
        value: f32,
    },
    /// An error that a closure, or a forward pass in this process, reported.
    #[error("the black box failed: {0}")]
    Failed(String),
    /// An `https://` address in a build without TLS.
    #[error("{url} needs TLS; build flops-multimodal with the feature 'tls', or give an http:// address")]
    Tls {
        /// The address.
        url: String,
    },
    /// The server was not reached, or the connection broke off.
    #[error("{url}: {why}; check that the server is up")]
    Transport {
        /// The address.
        url: String,
        /// What happened.
        why: String,
        /// Whether it is certain that no byte of the request reached the server.
        unsent: bool,
    },
    /// The answer did not arrive completely in time.
    #[error("{url}: no complete answer within {seconds} s; raise the timeout, or lower the batch size")]
    Timeout {
        /// The address.
        url: String,
        /// The time limit, in seconds.
        seconds: f64,
    },
    /// The server answered with an error.
    #[error("{url}: HTTP {status}: {message}")]
    Status {
        /// The address.
        url: String,
        /// The HTTP status.
        status: u16,
        /// The first 200 characters of the body.
        message: String,
    },
    /// The server answered with a success other than 200, such as 206 for a part of an answer.
    #[error("{url}: HTTP {status} is not a complete answer; only 200 is one")]
    NotComplete {
        /// The address.
        url: String,
        /// The HTTP status.
        status: u16,
    },
    /// The answer is not valid JSON of the expected form. JSON has no NaN, so a server that writes
    /// one causes this error.
    #[error("{url}: the answer cannot be parsed ({why}); it begins with '{begin}'")]
    Body {
        /// The address.
        url: String,
        /// What is wrong with it.
        why: String,
        /// Its first characters.
        begin: String,
    },
    /// The answer is larger than any valid answer.
    #[error("{url}: the answer is longer than {limit} bytes, so it cannot be valid")]
    TooLong {
        /// The address.
        url: String,
        /// The limit, in bytes.
        limit: u64,
    },
    /// All attempts failed.
    #[error("gave up after {attempts} attempts; the last error: {last}")]
    GaveUp {
        /// The attempts made.
        attempts: u32,
        /// The error of the last one.
        last: Box<BlackBoxError>,
    },
    /// The queries exceed the cap. They were not sent.
    #[error(
        "{requested} more queries would exceed the cap of {cap}, of which {spent} are spent or in flight; \
         raise it, or stop here"
    )]
    CapReached {
        /// The cap.
        cap: u64,
        /// Queries spent or in flight.
        spent: u64,
        /// Queries that were to be sent.
        requested: u64,
    },
    /// The queries would need what is held back of the cap. They were not sent.
    #[error(
        "{requested} more queries would exceed the cap of {cap}: {spent} are spent or in flight, and {held} are \
         held back; raise it, or stop here"
    )]
    HeldBack {
        /// The cap.
        cap: u64,
        /// Queries spent or in flight.
        spent: u64,
        /// Queries that are held back.
        held: u64,
        /// Queries that were to be sent.
        requested: u64,
    },
    /// A request that does not fit the black box.
    #[error("{what}: {why}")]
    Wire {
        /// The part of the request.
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
    /// Another run has the file open.
    #[error("another run has it open; wait for that run to end, or give this one another path")]
    Locked,
    /// The file is not a journal.
    #[error("it is not a journal of answers; give another path")]
    Foreign,
    /// The file was written by another version of this crate.
    #[error("it has version {got}, this crate reads version {expected}; give another path")]
    Version {
        /// The version of the file.
        got: u32,
        /// The version of this crate.
        expected: u32,
    },
    /// The answers are those of another black box.
    #[error(
        "it holds the answers of another black box ({got} classes, fingerprint {got_fingerprint}; this one \
         has {expected} and {expected_fingerprint}); give another path"
    )]
    OtherBlackBox {
        /// Classes of the black box in the file.
        got: u32,
        /// Fingerprint of the black box in the file.
        got_fingerprint: String,
        /// Classes of this black box.
        expected: u32,
        /// Fingerprint of this black box.
        expected_fingerprint: String,
    },
    /// A record in the middle of the file is damaged.
    #[error("the record at byte {offset} is damaged and is not the last; restore the file from a copy")]
    Damaged {
        /// Offset of the record in the file, in bytes.
        offset: u64,
    },
}
