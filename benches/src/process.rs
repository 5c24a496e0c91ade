//! Processes of their own, in which peak memory is measured.

use std::process::Command;

/// The environment variable that holds the task of a process whose memory is measured.
pub const TASK: &str = "FLOPS_BENCH_TASK";

/// Returns the peak memory of this process in MiB, or NaN if the system does not tell.
pub fn peak_memory() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).and_then(|l| l.split_whitespace().next());
    peak.and_then(|kib| kib.parse::<f64>().ok()).unwrap_or(f64::NAN) / 1024.0
}

/// Runs this program with `task` in a process of its own. Returns what it prints, or nothing if it
/// fails.
///
/// With `returning`, freed memory goes back to the system at once (glibc). The peak is then the
/// most memory in use at one time. Otherwise glibc keeps freed blocks in an arena for each thread.
pub fn in_a_process(task: &str, returning: bool) -> String {
    let output = std::env::current_exe().and_then(|exe| {
        let mut command = Command::new(exe);
        if returning {
            command.env("MALLOC_MMAP_THRESHOLD_", "262144");
        }
        command.env(TASK, task).output()
    });
    output.ok().and_then(|o| String::from_utf8(o.stdout).ok()).unwrap_or_default()
}
