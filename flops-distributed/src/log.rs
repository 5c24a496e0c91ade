//! The log of a run: what all workers see, in one order.

use std::fmt::{self, Debug, Display, Formatter};
use std::time::Duration;

use flops_executor::ExecutorError;
use flops_executor::{Round, RoundPhase};

use crate::{DistributedError, Traffic};

/// A log that all workers of a run write and read.
///
/// # Contract
/// An entry is written once: the first writer of a [`Key`] wins, and later ones are told so. All
/// workers see the entries in one order, their own among them. What a worker wrote before another
/// entry of its own comes before that entry. Entries may be as large as a gradient; an engine with
/// smaller messages cuts them.
///
/// Where an engine knows that a worker is gone, it writes [`Key::Left`]; no worker writes it for another.
///
/// No call waits forever: what cannot be reached is waited for with a limit, and then is
/// [`ExecutorError::Lost`].
pub trait Log: Debug + Send + Sync {
    /// The name of this worker: of no other connection of the run, before or after, and as
    /// [`checked_name`] wants it.
    fn worker(&self) -> &str;

    /// Writes an entry unless there is one, and says whether this one is the first.
    ///
    /// # Errors
    /// Where the log cannot be reached, and where the [round](Key::round) of the key
    /// [was trimmed](Self::trim).
    fn put(&self, key: &Key, bytes: &[u8]) -> Result<bool, ExecutorError>;

    /// Writes an entry unless there is one, and does not wait. The log tells which one was the first.
    ///
    /// # Errors
    /// Those of [`put`](Self::put); of an entry that is still on its way, a later call has them.
    fn send(&self, key: &Key, bytes: Vec<u8>) -> Result<(), ExecutorError> {
        self.put(key, &bytes).map(|_| ())
    }

    /// Whether [sent](Self::send) entries are still being written: long ones take their time. The default
    /// is for a log whose `send` returns when they are.
    fn is_writing(&self) -> bool {
        false
    }

    /// The next entry, or nothing where none comes within a time. A new connection gets the whole log
    /// from its start.
    ///
    /// # Errors
    /// Where the log cannot be reached.
    fn next(&self, timeout: Duration) -> Result<Option<Entry>, ExecutorError>;

    /// Forgets the entries of all steps before one: new connections do not get them, and older ones
    /// still do. Entries without a [step](Key::step) stay.
    ///
    /// # Errors
    /// Where the log cannot be reached.
    fn trim(&self, step: u64) -> Result<(), ExecutorError>;

    /// Stores the checkpoint before a step, in place of one of an earlier step. One of a later step
    /// stays.
    ///
    /// # Errors
    /// Where the log cannot be reached, or the checkpoint is too large for it.
    fn put_checkpoint(&self, step: u64, bytes: &[u8]) -> Result<(), ExecutorError>;

    /// The latest whole checkpoint and its step.
    ///
    /// # Errors
    /// Where the log cannot be reached.
    fn checkpoint(&self) -> Result<Option<(u64, Vec<u8>)>, ExecutorError>;

    /// The bytes sent and received so far.
    fn traffic(&self) -> Traffic;
}

/// An entry of a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// What it is.
    pub key: Key,
    /// What it says.
    pub bytes: Vec<u8>,
}

/// What names a round among all rounds of a run: a retry of a step with other data has another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RoundKey {
    /// Number of the step.
    pub step: u64,
    /// Steps before this one that wait for the same update.
    pub further: u64,
    /// What the jobs do.
    pub phase: RoundPhase,
    /// A hash of what they depend on.
    pub digest: u64,
}

impl From<&Round> for RoundKey {
    fn from(round: &Round) -> Self {
        Self { step: round.step, further: round.further, phase: round.phase, digest: round.digest }
    }
}

/// What an entry is. As text it is a subject of NATS, without the prefix of the run.
///
/// Keys of a step have the step as their second token, and at least three: all of step 7 match
/// `*.7.>`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Key {
    /// What all workers must have in common.
    Identity,
    /// A worker takes part from here on.
    Joined(String),
    /// A worker is gone. Its results may still come.
    Left(String),
    /// The hash of the weights before a step.
    Weights(u64),
    /// A worker makes the checkpoint before a step.
    Checkpoint(u64),
    /// How a round that is a sum is run.
    Mode(RoundKey),
    /// A worker takes a leaf, from a round on to the end of the step.
    Claim {
        /// The first round of the step that has as many leaves.
        round: RoundKey,
        /// The leaf.
        leaf: usize,
        /// How many took it before.
        generation: u32,
    },
    /// What a range of jobs gave.
    Result {
        /// The round.
        round: RoundKey,
        /// The first job.
        start: usize,
        /// The job after the last.
        end: usize,
        /// How many results of this range were refused before.
        generation: u32,
    },
    /// A job failed.
    Failure {
        /// The round.
        round: RoundKey,
        /// The job.
        job: usize,
    },
    /// A worker has run a whole round by itself.
    Done(RoundKey),
}

impl Key {
    /// The step that an entry belongs to, if to one.
    pub fn step(&self) -> Option<u64> {
        match self {
            Self::Identity | Self::Joined(_) | Self::Left(_) => None,
            Self::Weights(step) | Self::Checkpoint(step) => Some(*step),
            _ => self.round().map(|round| round.step),
        }
    }

    /// The round that an entry belongs to, if to one.
    pub fn round(&self) -> Option<RoundKey> {
        match self {
            Self::Mode(round) | Self::Done(round) => Some(*round),
            Self::Claim { round, .. } | Self::Result { round, .. } | Self::Failure { round, .. } => Some(*round),
            _ => None,
        }
    }

    /// Reads what [`Display`] writes; nothing where the text is of no key.
    pub fn parse(text: &str) -> Option<Self> {
        let tokens: Vec<&str> = text.split('.').collect();
        let key = match tokens[..] {
            ["identity"] => Self::Identity,
            ["joined", worker] => Self::Joined(checked_name("worker", worker).ok()?),
            ["left", worker] => Self::Left(checked_name("worker", worker).ok()?),
            ["weights", step, "hash"] => Self::Weights(step.parse().ok()?),
            ["checkpoint", step, "taken"] => Self::Checkpoint(step.parse().ok()?),
            [kind, step, further, phase, digest, ref rest @ ..] => {
                let phase = RoundPhase::ALL.into_iter().find(|known| known.name() == phase)?;
                let (step, further) = (step.parse().ok()?, further.parse().ok()?);
                let round = RoundKey { step, further, phase, digest: u64::from_str_radix(digest, 16).ok()? };
                match (kind, rest) {
                    ("mode", []) => Self::Mode(round),
                    ("done", []) => Self::Done(round),
                    ("failure", [job]) => Self::Failure { round, job: job.parse().ok()? },
                    ("claim", [leaf, generation]) => {
                        Self::Claim { round, leaf: leaf.parse().ok()?, generation: generation.parse().ok()? }
                    }
                    ("result", [start, end, generation]) => {
                        let (start, end) = (start.parse().ok()?, end.parse().ok()?);
                        Self::Result { round, start, end, generation: generation.parse().ok()? }
                    }
                    _ => return None,
                }
            }
            _ => return None,
        };
        // one text for each key, so that the first writer is the only one
        (key.to_string() == text).then_some(key)
    }
}

impl Display for RoundKey {
    fn fmt(&self, f: &mut Formatter) -> fmt::Result {
        write!(f, "{}.{}.{}.{:016x}", self.step, self.further, self.phase.name(), self.digest)
    }
}

impl Display for Key {
    fn fmt(&self, f: &mut Formatter) -> fmt::Result {
        match self {
            Self::Identity => write!(f, "identity"),
            Self::Joined(worker) => write!(f, "joined.{worker}"),
            Self::Left(worker) => write!(f, "left.{worker}"),
            Self::Weights(step) => write!(f, "weights.{step}.hash"),
            Self::Checkpoint(step) => write!(f, "checkpoint.{step}.taken"),
            Self::Mode(round) => write!(f, "mode.{round}"),
            Self::Claim { round, leaf, generation } => write!(f, "claim.{round}.{leaf}.{generation}"),
            Self::Result { round, start, end, generation } => write!(f, "result.{round}.{start}.{end}.{generation}"),
            Self::Failure { round, job } => write!(f, "failure.{round}.{job}"),
            Self::Done(round) => write!(f, "done.{round}"),
        }
    }
}

/// Returns the name of a run or a worker, if it can be one.
///
/// # Errors
/// Where it is empty, longer than 64 bytes, or has other characters than letters, digits, `-` and `_`.
pub fn checked_name(what: &'static str, name: &str) -> Result<String, DistributedError> {
    let known = |letter: u8| letter.is_ascii_alphanumeric() || letter == b'-' || letter == b'_';
    if (1..=64).contains(&name.len()) && name.bytes().all(known) {
        return Ok(name.into());
    }
    let remedy = "give 1 to 64 letters, digits, `-` or `_`".into();
    Err(DistributedError::Setting { what, value: name.chars().take(80).collect(), remedy })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_read_as_they_are_written() {
        let round = RoundKey { step: 7, further: 1, phase: RoundPhase::PilotUpdate, digest: 0xab };
        let keys = [
            Key::Identity,
            Key::Joined("a-1".into()),
            Key::Left("a_2".into()),
            Key::Weights(7),
            Key::Checkpoint(7),
            Key::Mode(round),
            Key::Claim { round, leaf: 3, generation: 1 },
            Key::Result { round, start: 2, end: 4, generation: 0 },
            Key::Failure { round, job: 5 },
            Key::Done(round),
        ];
        for key in keys {
            let text = key.to_string();
            assert_eq!(Key::parse(&text).as_ref(), Some(&key));
            let of_step = text.split('.').nth(1) == Some("7") && text.split('.').count() > 2;
            assert!(of_step == (key.step() == Some(7)), "{text}");
        }
        let digest = "00000000000000ab";
        for text in [
            "",
            "identity.",
            "joined",
            "joined.a b",
            "left.*",
            "weights.07.hash",
            "weights.+7.hash",
            "mode.7.1.none.ab",
            "mode.7.1.clean.ab",
            &format!("claim.7.1.clean.{digest}.1"),
            &format!("done.7.1.clean.{digest}.1"),
        ] {
            assert_eq!(Key::parse(text), None, "{text}");
        }
    }

    #[test]
    fn names_are_checked() {
        assert_eq!(checked_name("run", "vit-b_2").unwrap(), "vit-b_2");
        for name in ["", "a.b", "a b", "*", ">", "é", &"a".repeat(65)] {
            let message = checked_name("the name of the run", name).unwrap_err().to_string();
            assert!(message.contains("the name of the run is") && message.contains("64 letters"), "{message}");
        }
    }
}
