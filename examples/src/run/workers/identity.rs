//! What all workers of a run must have in common, besides what the learner compares.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use flops_core::executor::{Executor, ExecutorError, Jobs, Round, RunIdentity};
use serde_json::Value;

use super::super::artifacts::Settings;

/// Settings by name, and other properties.
pub type Properties = Vec<(String, String)>;

/// Returns the settings as flags, except for those that are `free`: where workers may differ.
pub fn flags(settings: &Settings, free: &[&str]) -> Properties {
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_string);
    let flag = |(name, value): (&String, &Value)| (format!("--{}", name.replace('_', "-")), text(value));
    settings.iter().filter(|(name, _)| !free.contains(&name.as_str())).map(flag).collect()
}

/// Returns a hash of byte strings, the same on all machines.
///
/// It is FNV-1a's step with a rotation, over words of eight bytes and the length of each string. It finds
/// other data, and keeps nobody from making some.
pub fn hash<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> u64 {
    const PRIME: u64 = 0x0100_0000_01b3;
    let mut hash = 0xcbf2_9ce4_8422_2325;
    let mut add = |value: u64| hash = (hash ^ value).wrapping_mul(PRIME).rotate_left(23);
    for part in parts {
        add(part.len() as u64);
        for chunk in part.chunks(8) {
            add(chunk.iter().fold(0, |all, &byte| all << 8 | u64::from(byte)));
        }
    }
    hash
}

/// An executor that also compares the properties of the program, and notes the step.
#[derive(Debug)]
pub struct SharedRun {
    inner: Arc<dyn Executor>,
    properties: Properties,
    step: Arc<AtomicU64>,
}

impl SharedRun {
    /// Wraps an executor. The number of the latest step is written to `step`.
    pub fn new(inner: Arc<dyn Executor>, properties: Properties, step: Arc<AtomicU64>) -> Self {
        Self { inner, properties, step }
    }
}

impl Executor for SharedRun {
    fn run(&self, round: &Round, jobs: &mut dyn Jobs) -> Result<(), ExecutorError> {
        self.step.fetch_max(round.step, Ordering::Relaxed);
        self.inner.run(round, jobs)
    }

    fn is_local(&self) -> bool {
        self.inner.is_local()
    }

    fn devices(&self) -> Vec<(u16, u16)> {
        self.inner.devices()
    }

    fn begin(&self, run: &RunIdentity) -> Result<(), ExecutorError> {
        let mut run = run.clone();
        // first, so that an error names a flag
        run.settings.splice(0..0, self.properties.iter().cloned());
        self.inner.begin(&run)
    }

    fn verify(&self, step: u64, weights: u64) -> Result<(), ExecutorError> {
        self.inner.verify(step, weights)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn flags_are_named_as_on_the_command_line() {
        let settings = json!({"batch_size": 16, "scope": "full", "threads": 2, "limit": null});
        let flags = flags(settings.as_object().unwrap(), &["threads"]);
        let text: Vec<String> = flags.iter().map(|(name, value)| format!("{name} {value}")).collect();
        assert_eq!(text, ["--batch-size 16", "--limit null", "--scope full"]);
    }

    #[test]
    fn a_hash_tells_bytes_and_borders_apart() {
        let all = [
            hash([&b"abcdefghi"[..]]),
            hash([&b"abcdefgh"[..]]),
            hash([&b"abcdefgh"[..], b"i"]),
            hash([&b"abcdefgh\0"[..]]),
            hash([&b"ihgfedcba"[..]]),
        ];
        for (i, a) in all.iter().enumerate() {
            assert!(all[..i].iter().all(|b| a != b), "{all:?}");
        }
    }
}
