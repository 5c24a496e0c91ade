//! What the workers of a run did.

use flops_core::executor::ExecutorError;
use flops_distributed::{SumMode, WorkerStats};
use flops_report::print_table;
use serde::Serialize;

use super::super::format::thousands;

/// What the workers of a run did, as `summary.json` has it under `workers`.
#[derive(Clone, Debug, Serialize)]
pub struct Tally {
    /// What carried the results: `hub`, `nats` or `mpi`.
    pub executor: &'static str,
    /// How sums were to be run.
    pub sums: SumMode,
    /// Parts that a batch is cut into.
    pub leaves: usize,
    /// Workers that joined, each time that they did.
    pub joins: u64,
    /// Workers that were lost.
    pub losses: u64,
    /// Workers that were started again.
    pub restarts: u64,
    /// What each worker did, as far as it is known here: with NATS and MPI this one alone.
    pub each: Vec<Work>,
}

/// What a worker did, over all of its lives.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Work {
    /// Its number or name.
    pub worker: String,
    /// How often it was started.
    pub starts: u64,
    /// Jobs that ran there.
    pub jobs: u64,
    /// Jobs whose results came from other workers.
    pub jobs_taken: u64,
    /// Leaves that it took over from workers that were lost or late.
    pub takeovers: u64,
    /// Bytes sent.
    pub bytes_sent: u64,
    /// Bytes received.
    pub bytes_received: u64,
    /// Seconds in which its jobs ran.
    pub seconds_run: f64,
    /// Seconds in which it waited for other workers.
    pub seconds_waited: f64,
    /// Messages that it refused.
    pub refused: u64,
}

impl Work {
    /// Nothing so far.
    pub fn of(worker: impl Into<String>) -> Self {
        Self { worker: worker.into(), ..Self::default() }
    }

    /// Adds a life of the worker.
    pub fn add(&mut self, stats: &WorkerStats) {
        self.starts += 1;
        self.jobs += stats.jobs_run;
        self.jobs_taken += stats.jobs_taken;
        self.takeovers += stats.takeovers;
        self.bytes_sent += stats.bytes_sent;
        self.bytes_received += stats.bytes_received;
        self.seconds_run += stats.seconds_run;
        self.seconds_waited += stats.seconds_waited;
        self.refused += stats.refused;
    }
}

impl Tally {
    /// Prints the table of the workers.
    pub fn print(&self) {
        let mb = |bytes: u64| format!("{:.1}", bytes as f64 / 1e6);
        let row = |work: &Work| {
            vec![
                work.worker.clone(),
                thousands(work.jobs),
                mb(work.bytes_sent),
                mb(work.bytes_received),
                format!("{:.1}", work.seconds_waited),
            ]
        };
        let rows: Vec<Vec<String>> = self.each.iter().map(row).collect();
        let Self { joins, losses, restarts, .. } = self;
        println!("\nworkers over {}: {joins} joined, {losses} lost, {restarts} started again", self.executor);
        print_table(&["worker", "jobs", "MB sent", "MB received", "seconds waited"], &rows);
    }
}

/// Returns whether a worker that ends with this error may be started again.
pub fn may_be_started_again(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        let inner = cause.downcast_ref::<flops_core::Error>().and_then(|error| match error {
            flops_core::Error::Executor(error) => Some(error),
            _ => None,
        });
        let found = inner.or_else(|| cause.downcast_ref::<ExecutorError>());
        matches!(found, Some(ExecutorError::Lost { .. } | ExecutorError::Diverged { .. }))
    })
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    #[test]
    fn a_worker_that_lost_the_others_may_be_started_again() {
        let lost = ExecutorError::Lost { what: "the hub".into() };
        let wrapped = Err::<(), _>(flops_core::Error::from(lost)).context("training stopped").unwrap_err();
        assert!(may_be_started_again(&wrapped));
        let (what, here, there) = ("sigma".to_string(), "1".to_string(), "2".to_string());
        let other = ExecutorError::Mismatch { what, here, there };
        assert!(!may_be_started_again(&anyhow::Error::from(flops_core::Error::from(other))));
    }
}
