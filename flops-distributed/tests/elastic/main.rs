//! Workers over a log in memory: N of them give the bits of one.

#[path = "../common/mod.rs"]
mod common;
#[path = "../fake/mod.rs"]
mod fake;
mod log;
#[path = "../common/memory.rs"]
mod memory;
mod runs;

use std::thread;
use std::time::Duration;

use common::Net;
use flops_distributed::{Elastic, ElasticOptions, WorkerStats};
use flops_executor::{ExecutorError, JobFailure, Round};
use memory::Memory;

const STEPS: u64 = 6;

fn options(min_workers: usize) -> ElasticOptions {
    let mut options = ElasticOptions::default();
    (options.min_workers, options.patience) = (min_workers, Duration::from_millis(40));
    options.limit = Duration::from_secs(5);
    options
}

/// A failure that may pass.
fn failure(why: &str) -> JobFailure {
    JobFailure { why: why.into(), may_pass: true }
}

/// Trains with several workers at once; `hook` gets the worker's index and the number of the job.
fn together(
    log: &Memory,
    workers: usize,
    options: &ElasticOptions,
    hook: impl Fn(usize, usize, &Round, usize) -> Result<(), JobFailure> + Sync,
) -> Vec<(Result<Net, ExecutorError>, WorkerStats)> {
    thread::scope(|scope| {
        let work = |index: usize| {
            let (hook, log) = (&hook, log.connect());
            let run = move || {
                let elastic = Elastic::new(log, options.clone());
                let mut count = 0;
                let net = Net::default().train(&elastic, STEPS, &mut |round, job| {
                    count += 1;
                    hook(index, count - 1, round, job)
                });
                (net, elastic.stats())
            };
            scope.spawn(run)
        };
        let all: Vec<_> = (0..workers).map(work).collect();
        let ended = |worker: thread::ScopedJoinHandle<'_, _>| match worker.join() {
            Ok(ended) => Some(ended),
            Err(why) if why.downcast_ref() == Some(&"dead") => None,
            Err(why) => std::panic::resume_unwind(why),
        };
        all.into_iter().filter_map(ended).collect()
    })
}
