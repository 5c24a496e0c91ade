//! Counts what a device is asked for, by what wgpu logs.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, anyhow};
use burn_cubecl::cubecl::config::{CubeClRuntimeConfig, RuntimeConfig};
use log::{LevelFilter, Log, Metadata, Record};
use serde_json::json;

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

struct Counter {
    totals: Totals,
    /// The names of the kernels that CubeCL ran, in order.
    kernels: Mutex<Vec<String>>,
}

static COUNTER: Counter = Counter { totals: [const { AtomicU64::new(0) }; 5], kernels: Mutex::new(vec![]) };

impl Log for Counter {
    fn enabled(&self, metadata: &Metadata) -> bool {
        metadata.target().starts_with("wgpu_core") || metadata.target().starts_with("cubecl")
    }

    fn log(&self, record: &Record) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let said = record.args().to_string();
        let add = |index: usize, count: u64| {
            self.totals[index].fetch_add(count, Ordering::Relaxed);
        };
        if let Some(kernel) = kernel(&said) {
            self.kernels.lock().unwrap_or_else(PoisonError::into_inner).push(kernel);
        }
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

/// The name of a kernel, where a line tells that it runs: its first two words, without numbers of sizes.
fn kernel(said: &str) -> Option<String> {
    let words = said.strip_prefix("Executing ")?.split(" | ").filter(|word| !word.ends_with("Runtime"));
    Some(words.take(2).collect::<Vec<_>>().join(" "))
}

/// The bytes that are read, where a line tells of a read.
fn read_bytes(said: &str) -> Option<u64> {
    let rest = said.strip_prefix("Buffer::map_async ").filter(|rest| rest.contains("Read"))?;
    let size = rest.split("size Some(").nth(1).and_then(|rest| rest.split(')').next());
    Some(size.and_then(|size| size.parse().ok()).unwrap_or(0))
}

/// Begins to count. Nothing may have used a device before.
///
/// # Errors
/// Where something else has the log.
pub fn install() -> Result<()> {
    let config = json!({ "profiling": { "logger": { "level": "minimal", "log": "info" } } });
    let config: CubeClRuntimeConfig = serde_json::from_value(config).context("CubeCL takes other settings")?;
    CubeClRuntimeConfig::set(config);
    log::set_logger(&COUNTER).map_err(|why| anyhow!("the log of wgpu cannot be read: {why}"))?;
    log::set_max_level(LevelFilter::Trace);
    Ok(())
}

/// Takes the names of the kernels that ran since the last call, in order.
pub fn take_kernels() -> Vec<String> {
    std::mem::take(&mut COUNTER.kernels.lock().unwrap_or_else(PoisonError::into_inner))
}

/// What is asked for while `work` runs, which must wait for the device in the end.
pub fn counted(work: impl FnOnce()) -> Counts {
    let now = || [0, 1, 2, 3, 4].map(|index: usize| COUNTER.totals[index].load(Ordering::Relaxed));
    let before = now();
    take_kernels();
    work();
    let after = now();
    let [launches, submits, reads, bytes, syncs] = [0, 1, 2, 3, 4].map(|index: usize| after[index] - before[index]);
    Counts { launches, submits, reads, bytes, syncs }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_told_by_name() {
        let said = "Executing MatmulEntry | TensorArgs | DynamicScalar | WgpuRuntime";
        assert_eq!(kernel(said).as_deref(), Some("MatmulEntry TensorArgs"));
        assert_eq!(kernel("Executing ElemwiseFuse | WgpuRuntime").as_deref(), Some("ElemwiseFuse"));
        assert_eq!(kernel("Queue::submit"), None);
    }

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
