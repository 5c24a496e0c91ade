//! Counts what a device is asked for, by what wgpu logs.

use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Result, anyhow};
use log::{LevelFilter, Log, Metadata, Record};

/// What a device was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    /// Kernels launched.
    pub launches: u64,
    /// Command buffers submitted.
    pub submits: u64,
    /// Buffers read back.
    pub reads: u64,
    /// Bytes of them.
    pub bytes: u64,
    /// Waits for all that was submitted.
    pub syncs: u64,
}

/// One count after another, in the order of the fields.
type Totals = [AtomicU64; 5];

struct Counter(Totals);

static COUNTER: Counter = Counter([const { AtomicU64::new(0) }; 5]);

impl Log for Counter {
    fn enabled(&self, metadata: &Metadata) -> bool {
        metadata.target().starts_with("wgpu_core")
    }

    fn log(&self, record: &Record) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let said = record.args().to_string();
        let add = |index: usize, count: u64| {
            self.0[index].fetch_add(count, Ordering::Relaxed);
        };
        if said.starts_with("ComputePass::dispatch") {
            add(0, 1);
        } else if said == "Queue::submit" {
            add(1, 1);
        } else if said.starts_with("Queue::on_submitted_work_done ") {
            add(4, 1);
        } else if let Some(bytes) = read_bytes(&said) {
            add(2, 1);
            add(3, bytes);
        }
    }

    fn flush(&self) {}
}

/// The bytes that are read, where a line tells of a read.
fn read_bytes(said: &str) -> Option<u64> {
    let rest = said.strip_prefix("Buffer::map_async ").filter(|rest| rest.contains("Read"))?;
    let size = rest.split("size Some(").nth(1).and_then(|rest| rest.split(')').next());
    Some(size.and_then(|size| size.parse().ok()).unwrap_or(0))
}

/// Begins to count.
///
/// # Errors
/// Where something else has the log.
pub fn install() -> Result<()> {
    log::set_logger(&COUNTER).map_err(|why| anyhow!("the log of wgpu cannot be read: {why}"))?;
    log::set_max_level(LevelFilter::Trace);
    Ok(())
}

/// What is asked for while `work` runs, which must wait for the device in the end.
pub fn counted(work: impl FnOnce()) -> Counts {
    let now = || [0, 1, 2, 3, 4].map(|index: usize| COUNTER.0[index].load(Ordering::Relaxed));
    let before = now();
    work();
    let after = now();
    let [launches, submits, reads, bytes, syncs] = [0, 1, 2, 3, 4].map(|index: usize| after[index] - before[index]);
    Counts { launches, submits, reads, bytes, syncs }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_are_told_from_writes_and_have_their_bytes() {
        let line = |op: &str| {
            format!("Buffer::map_async Id(3,1) offset 0 size Some(256) op: BufferMapOperation {{ host: {op} }}")
        };
        assert_eq!(read_bytes(&line("Read")), Some(256));
        assert_eq!(read_bytes(&line("Write")), None);
        assert_eq!(read_bytes("Buffer::unmap Id(3,1)"), None);
    }
}
