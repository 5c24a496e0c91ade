//! Whole runs over a server.

use std::env;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use flops_distributed::{Elastic, ElasticOptions, NatsLog, NatsOptions, SumMode};
use flops_executor::{Executor, ExecutorError, RoundPhase, Threads};

use crate::fake;
use crate::server::Server;
use crate::steps::steps;

pub fn elastic(log: NatsLog, workers: usize, sum_mode: SumMode) -> Elastic {
    let (patience, limit) = (Duration::from_millis(800), Duration::from_secs(20));
    let elastic = Elastic::new(log, ElasticOptions { min_workers: workers, patience, limit, sum_mode });
    elastic.begin(&fake::identity("0.1", (0, 7))).unwrap();
    elastic
}

/// Steps whose jobs take their time. A worker may abort in one of them.
pub fn work(executor: &dyn Executor, count: u64, len: usize, aborts: Option<u64>) -> Result<u64, ExecutorError> {
    steps(executor, count, len, &mut |round, _| {
        thread::sleep(Duration::from_micros(300));
        if aborts == Some(round.step) && round.phase == RoundPhase::Query {
            std::process::abort();
        }
        Ok(())
    })
}

#[test]
fn workers_give_the_bits_of_one_while_the_server_comes_and_goes() {
    for (workers, sum_mode, values, dies) in [
        (1, SumMode::Gradients, 1000, false),
        (2, SumMode::Gradients, 400_000, false),
        (3, SumMode::Gradients, 1000, true),
        (2, SumMode::Scalars, 1000, true),
        (2, SumMode::Auto, 1000, false),
    ] {
        let Some(mut server) = Server::with_jetstream() else { return };
        let count = if values > 1000 { 4 } else { 40 };
        let alone = work(&Threads, count, values, None).unwrap();
        let logs: Vec<NatsLog> = (0..workers).map(|_| server.log()).collect();
        let hashes: Vec<u64> = thread::scope(|scope| {
            let run = |log| move || work(&elastic(log, workers, sum_mode), count, values, None).unwrap();
            let running: Vec<_> = logs.into_iter().map(|log| scope.spawn(run(log))).collect();
            for _ in 0..if dies { 2 } else { 0 } {
                thread::sleep(Duration::from_millis(150));
                server.kill();
                thread::sleep(Duration::from_millis(250));
                server.up();
            }
            running.into_iter().map(|worker| worker.join().unwrap()).collect()
        });
        assert_eq!(hashes, vec![alone; workers], "{workers} {sum_mode}");
        // one that comes after the end reads everything
        let late = elastic(server.log(), 1, sum_mode);
        assert_eq!(work(&late, count, values, None).unwrap(), alone);
        let stats = late.stats();
        assert!(stats.rounds_taken > 0 && (sum_mode != SumMode::Gradients || stats.jobs_run == 0), "{stats:?}");
    }
}

/// The server of a worker that the next test starts as a process.
const SERVER: &str = "FLOPS_TEST_SERVER";

#[test]
#[ignore = "started by the other tests"]
fn worker_process() {
    let Ok(server) = env::var(SERVER) else {
        println!("nothing to do: the other tests start this one");
        return;
    };
    let log = NatsLog::connect(&NatsOptions::new([server], "run-1"), "child").unwrap();
    work(&elastic(log, 2, SumMode::Gradients), 60, 1000, Some(20)).unwrap();
}

#[test]
fn a_process_that_aborts_changes_nothing() {
    let Some(server) = Server::with_jetstream() else { return };
    let mut command = Command::new(env::current_exe().unwrap());
    command.args(["--exact", "runs::worker_process", "--ignored", "--nocapture"]).env(SERVER, server.url());
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let elastic = elastic(server.log(), 2, SumMode::Gradients);
    let hash = work(&elastic, 60, 1000, None).unwrap();
    assert!(!child.wait().unwrap().success());
    assert_eq!(hash, work(&Threads, 60, 1000, None).unwrap());
    let stats = elastic.stats();
    assert!(stats.takeovers > 0 && stats.jobs_taken > 0, "{stats:?}");
}
