//! What a worker did and saw, in numbers.

use serde::{Deserialize, Serialize};

/// What a worker did and saw since it started, for a summary or a monitor.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct WorkerStats {
    /// Name or rank of the worker.
    pub worker: String,
    /// Rounds that ended, well or not.
    pub rounds: u64,
    /// Jobs that ran here.
    pub jobs_run: u64,
    /// Jobs whose results came from other workers.
    pub jobs_taken: u64,
    /// Rounds in which every job came from other workers, as in the replay of a worker that joins late.
    pub rounds_taken: u64,
    /// Sums that this worker added whole, without an exchange.
    pub sums_alone: u64,
    /// Sums whose parts were exchanged.
    pub sums_shared: u64,
    /// Bytes sent to the log or to other workers.
    pub bytes_sent: u64,
    /// Bytes received.
    pub bytes_received: u64,
    /// Seconds in which jobs ran here.
    pub seconds_run: f64,
    /// Seconds spent in waiting for other workers.
    pub seconds_waited: f64,
    /// Messages that were refused: not parseable, of a wrong size, damaged.
    pub refused: u64,
    /// Workers that joined, this one among them.
    pub joins: u64,
    /// Workers that left or were lost.
    pub losses: u64,
    /// Leaves taken over here from workers that were lost or late.
    pub takeovers: u64,
}

/// Bytes that went through a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes sent.
    pub sent: u64,
    /// Bytes received.
    pub received: u64,
    /// Messages that came through it and are no entries: they are not handed on.
    pub refused: u64,
}
