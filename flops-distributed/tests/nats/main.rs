//! Logs on NATS servers that these tests start.
#![cfg(feature = "nats")]

mod connection;
#[path = "../fake/mod.rs"]
mod fake;
mod log;
mod runs;
mod server;
#[path = "../fake/steps.rs"]
mod steps;

use std::time::Duration;

use flops_distributed::{Entry, Key, Log, RoundKey};
use flops_executor::RoundPhase;

fn round(step: u64) -> RoundKey {
    RoundKey { step, further: 0, phase: RoundPhase::Update, digest: 0xD16E57 }
}

fn result(step: u64, job: usize) -> Key {
    Key::Result { round: round(step), start: job, end: job + 1, generation: 0 }
}

fn claim(step: u64, leaf: usize) -> Key {
    Key::Claim { round: round(step), leaf, generation: 0 }
}

/// Bytes that are not alike anywhere.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    (0..len as u64).map(|at| (fake::mix(seed << 32 | at) >> 56) as u8).collect()
}

/// The next entries, which must come.
fn entries(log: &dyn Log, count: usize) -> Vec<Entry> {
    let next = |_| log.next(Duration::from_secs(10)).unwrap().expect("an entry");
    (0..count).map(next).collect()
}

fn nothing(log: &dyn Log) -> bool {
    log.next(Duration::from_millis(150)).unwrap().is_none()
}
