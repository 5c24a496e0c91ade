//! Every reader on damaged files: a result or one line of error, in bounded time and memory, and
//! never a panic.
//!
//! Each test takes whole files, changes them and reads them, for a second. What is read is used
//! once, so that what cannot be used is refused by the reader. `FLOPS_FUZZ_SECONDS` sets the time
//! of each reader, `FLOPS_FUZZ_SEED` the first seed:
//!
//! ```text
//! FLOPS_FUZZ_SECONDS=240 cargo test --release -p flops-examples --test examples fuzz:: -- \
//!     --test-threads 1 --nocapture
//! ```

mod mutation;
mod readers;
mod seeds;

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The least number of inputs, however short the time is.
const LEAST: u64 = 30;
/// The longest time that one input may take, in seconds. It is far above what any takes.
const SLOWEST: u64 = 20;
/// The most memory that the process may have taken, in MiB.
const MOST_MEMORY: u64 = 2048;

/// Files by their names.
type Files = Vec<(String, Vec<u8>)>;

/// Reads what lies in a folder, and uses it.
type Read<'a> = &'a dyn Fn(&Path) -> Result<(), String>;

/// Returns a whole number from the environment.
fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text}: give a number")))
}

/// Changes the files and reads them, until the time is over.
fn fuzz(name: &str, files: &Files, read: Read<'_>) {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    };
    files.iter().for_each(|(name, bytes)| write(name, bytes));
    read(dir.path()).unwrap_or_else(|why| panic!("{name}: the whole files are refused: {why}"));

    let started = Instant::now();
    let (time, first) = (Duration::from_secs(setting("FLOPS_FUZZ_SECONDS", 1)), setting("FLOPS_FUZZ_SEED", 0));
    let others: Vec<&[u8]> = files.iter().map(|(_, bytes)| bytes.as_slice()).collect();
    let (mut inputs, mut refused, mut slowest) = (0, 0, Duration::ZERO);
    while started.elapsed() < time || inputs < LEAST {
        let seed = first + inputs;
        // one file in each input
        let (changed, whole) = &files[seed as usize % files.len()];
        write(changed, &mutation::damaged(changed, whole, &others, seed));
        let begun = Instant::now();
        let result = catch_unwind(AssertUnwindSafe(|| read(dir.path())));
        let keep = |why: &str| -> ! {
            let kept = keep(name, seed, dir.path());
            panic!("{name}, seed {seed}, {changed}: {why}; the files are in {}", kept.display())
        };
        match result {
            Ok(Ok(())) => {}
            Ok(Err(why)) if why.trim().is_empty() || why.lines().count() != 1 => keep(&format!("error '{why}'")),
            Ok(Err(_)) => refused += 1,
            Err(_) => keep("the reader panicked"),
        }
        slowest = slowest.max(begun.elapsed());
        if slowest.as_secs() >= SLOWEST {
            keep(&format!("it took {slowest:.1?}"));
        }
        write(changed, whole);
        inputs += 1;
    }
    let peak = peak_memory();
    let memory = peak.map_or("unknown".into(), |mib| format!("{mib} MiB"));
    println!(
        "{name}: {inputs} inputs, {refused} refused, slowest {} ms, peak of the process {memory}",
        slowest.as_millis()
    );
    assert!(refused > 0, "{name}: nothing is refused");
    assert!(peak.is_none_or(|mib| mib < MOST_MEMORY), "{name}: the process took {memory}");
}

/// Copies the files of an input that failed, and returns their folder.
fn keep(name: &str, seed: u64, dir: &Path) -> PathBuf {
    let to = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("fuzz-{name}-{seed}"));
    let _ = fs::remove_dir_all(&to);
    copy(dir, &to);
    to
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() {
            copy(&path, &target);
        } else {
            fs::copy(&path, target).unwrap();
        }
    }
}

/// Returns the most memory that the process has taken so far, in MiB; `None` where the system does
/// not say.
fn peak_memory() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()? / 1024)
}
