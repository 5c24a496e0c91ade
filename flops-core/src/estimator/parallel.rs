//! Jobs on several threads, their results taken in order: the sum does not depend on the number of threads.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use burn::module::Module;
use burn::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::error::Error;
use crate::ops;

/// The pool that one of several callers runs in, so that what is parallel inside a pass (matrix products of Burn's CPU backends) keeps to the
/// caller's share of the cores: callers that all split their products over all cores wait for one another. Pools are kept for later passes.
struct Share(Option<ThreadPool>);

static IDLE: Mutex<Vec<ThreadPool>> = Mutex::new(Vec::new());

impl Share {
    /// One of `callers` equal parts of the cores, of one core at least. That some callers may have nothing to do changes nothing: there are pools of
    /// one size for each number of callers that a program uses.
    fn of(callers: usize) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        let threads = (cores / callers).max(1);
        let mut idle = IDLE.lock().unwrap_or_else(|e| e.into_inner());
        let kept = idle.iter().position(|pool| pool.current_num_threads() == threads).map(|i| idle.swap_remove(i));
        // without threads to spare the caller works by itself
        Self(kept.or_else(|| ThreadPoolBuilder::new().num_threads(threads).build().ok()))
    }

    fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        match &self.0 {
            Some(pool) => pool.install(work),
            None => work(),
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        IDLE.lock().unwrap_or_else(|e| e.into_inner()).extend(self.0.take());
    }
}

/// Whether a model's tensors lie on a [device](ops::is_device).
pub(super) fn on_device<B: Backend, M: Module<B>>(model: &M) -> bool {
    model.devices().first().is_some_and(ops::is_device::<B>)
}

/// Callers of the passes of a model: as many as `threads` says, but one for a device: several would each have a queue and memory of their own there.
pub(crate) fn callers<B: Backend, M: Module<B>>(model: &M, threads: usize) -> usize {
    if on_device::<B, M>(model) { 1 } else { threads }
}

/// Runs jobs `0..jobs`, each with the context of its thread, and folds the results in the order of the jobs.
///
/// Contexts are cloned here, on the caller's thread: modules can be sent to other threads, but not shared.
pub(crate) fn in_order<C: Clone + Send, T: Send>(
    jobs: usize,
    threads: usize,
    context: C,
    work: impl Fn(&C, usize) -> Result<T, Error> + Sync,
    mut take: impl FnMut(usize, T) + Send,
) -> Result<(), Error> {
    let callers = threads.min(jobs);
    if callers <= 1 {
        for job in 0..jobs {
            take(job, work(&context, job)?);
        }
        return Ok(());
    }
    struct Waiting<T, F> {
        next: usize,
        done: BTreeMap<usize, T>,
        take: F,
    }
    let queue = AtomicUsize::new(0);
    let waiting = Mutex::new(Waiting { next: 0, done: BTreeMap::new(), take: &mut take });
    let contexts: Vec<C> = (0..callers).map(|_| context.clone()).collect();
    std::thread::scope(|scope| {
        let workers: Vec<_> = contexts
            .into_iter()
            .map(|context| {
                let (queue, waiting, work) = (&queue, &waiting, &work);
                let share = Share::of(threads);
                let calls = move || -> Result<(), Error> {
                    loop {
                        let job = queue.fetch_add(1, Ordering::Relaxed);
                        if job >= jobs {
                            return Ok(());
                        }
                        let result = work(&context, job).inspect_err(|_| queue.store(jobs, Ordering::Relaxed))?;
                        let mut waiting = waiting.lock().unwrap_or_else(|e| e.into_inner());
                        waiting.done.insert(job, result);
                        loop {
                            let next = waiting.next;
                            let Some(result) = waiting.done.remove(&next) else { break };
                            (waiting.take)(next, result);
                            waiting.next += 1;
                        }
                    }
                };
                scope.spawn(move || share.run(calls))
            })
            .collect();
        let mut outcome = Ok(());
        for worker in workers {
            match worker.join() {
                Ok(result) => outcome = outcome.and(result),
                // the user's forward pass panicked: that is theirs to see
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        outcome
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_come_in_order() {
        for threads in [1, 2, 5] {
            let mut seen = vec![];
            in_order(20, threads, (), |_, i| Ok(i * i), |i, r| seen.push((i, r))).unwrap();
            assert_eq!(seen, (0..20).map(|i| (i, i * i)).collect::<Vec<_>>());
        }
    }

    #[test]
    fn an_error_ends_the_run() {
        for threads in [1, 3] {
            let result =
                in_order(9, threads, (), |_, i| if i == 4 { Err(Error::EmptyBatch) } else { Ok(i) }, |_, _| {});
            assert_eq!(result, Err(Error::EmptyBatch));
        }
    }
}
