//! Workers on the threads of a test, which exchange their jobs through a board.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use crate::executor::{Executor, ExecutorError, JobFailure, Jobs, Round, RoundPhase, nodes, share};

/// Results by round and range.
type Entries = HashMap<(String, Range<usize>), Result<Vec<u8>, JobFailure>>;

/// What has been written; the first failure of a round ends it for all.
#[derive(Debug, Default)]
pub struct Board {
    entries: Mutex<Entries>,
    changed: Condvar,
}

/// Who runs which jobs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Deal {
    /// Every worker its contiguous share, in all rounds.
    Shares,
    /// Single jobs, of which each phase gives worker 0 others: what a leaf left stays elsewhere.
    Rotating,
    /// All jobs worker 0.
    First,
    /// The same jobs on every worker, and the results of others on top.
    All,
}

/// One of the workers.
#[derive(Clone, Debug)]
pub struct Worker {
    pub board: Arc<Board>,
    pub rank: usize,
    pub workers: usize,
    pub deal: Deal,
}

impl Worker {
    /// The ranges that a worker runs and writes.
    fn ranges(&self, rank: usize, round: &Round) -> Vec<Range<usize>> {
        let of_share = share(round.jobs, rank, self.workers);
        match self.deal {
            Deal::Shares if round.is_sum() => nodes(of_share, round.jobs),
            Deal::Shares if of_share.is_empty() => vec![],
            Deal::Shares => vec![of_share],
            Deal::Rotating => {
                let turn = RoundPhase::ALL.iter().position(|phase| *phase == round.phase).unwrap();
                let mine = |job: &usize| (job + turn) % self.workers == rank;
                (0..round.jobs).rev().filter(mine).map(|job| job..job + 1).collect()
            }
            Deal::First if rank > 0 => vec![],
            Deal::First | Deal::All => nodes(0..round.jobs, round.jobs),
        }
    }
}

impl Executor for Worker {
    fn run(&self, round: &Round, jobs: &mut dyn Jobs) -> Result<(), ExecutorError> {
        let key = format!("{round:?}");
        for range in self.ranges(self.rank, round) {
            let bytes = jobs.run(range.clone()).and_then(|()| jobs.pack(range.clone()));
            self.board.entries.lock().unwrap().insert((key.clone(), range), bytes);
            self.board.changed.notify_all();
        }
        for rank in 0..self.workers {
            for range in self.ranges(rank, round) {
                let mut entries = self.board.entries.lock().unwrap();
                let bytes = loop {
                    match entries.get(&(key.clone(), range.clone())) {
                        Some(Ok(bytes)) => break bytes.clone(),
                        Some(Err(failure)) => return Err(ExecutorError::job(rank.to_string(), failure.clone())),
                        None => {}
                    }
                    let (held, wait) = self.board.changed.wait_timeout(entries, Duration::from_secs(20)).unwrap();
                    assert!(!wait.timed_out(), "worker {} waits for {range:?} of {key}", self.rank);
                    entries = held;
                };
                drop(entries);
                assert!(bytes.len() <= jobs.max_bytes(range.clone()), "{key}: {} bytes", bytes.len());
                // what is cut short or too long is refused, and changes nothing
                if !jobs.has(range.clone()) && !bytes.is_empty() && round.phase != RoundPhase::Clean {
                    assert!(jobs.unpack(range.clone(), &bytes[1..]).is_err());
                    assert!(jobs.unpack(range.clone(), &[&bytes[..], &[0]].concat()).is_err());
                    assert!(!jobs.has(range.clone()));
                }
                jobs.unpack(range.clone(), &bytes).map_err(|failure| ExecutorError::job(rank.to_string(), failure))?;
                assert!(jobs.has(range));
            }
        }
        Ok(())
    }
}

/// Runs `work` on each of so many workers, on threads of their own, and returns what each of them gives.
pub fn on_workers<T: Send>(workers: usize, deal: Deal, work: impl Fn(Worker) -> T + Sync) -> Vec<T> {
    let board = Arc::new(Board::default());
    std::thread::scope(|scope| {
        let start = |rank| {
            let (worker, work) = (Worker { board: board.clone(), rank, workers, deal }, &work);
            scope.spawn(move || work(worker))
        };
        let threads: Vec<_> = (0..workers).map(start).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}
