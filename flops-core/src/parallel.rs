//! Jobs on several threads whose results are folded in the order of the jobs.
//!
//! Sums therefore do not depend on the number of threads.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use burn::module::Module;
use burn::prelude::*;
use burn::tensor::backend::DeviceId;
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::error::Error;
use crate::ops;

/// Whether this system starts threads; a browser starts none, and jobs run one after another.
const HAS_THREADS: bool = !cfg!(all(target_family = "wasm", target_os = "unknown"));

/// A worker's share of the CPU cores.
///
/// Burn's CPU backends split matrix products over all threads of the current pool. Each worker runs
/// in a pool of its own, so that workers do not wait for one another. Idle pools are reused.
struct CorePool(Option<ThreadPool>);

static IDLE: Mutex<Vec<ThreadPool>> = Mutex::new(Vec::new());

impl CorePool {
    /// Returns one of `workers` equal shares of the cores, at least one core.
    ///
    /// Pool size depends only on the worker count, so pools are reused.
    fn one_of(workers: usize) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        let threads = (cores / workers).max(1);
        let mut idle = IDLE.lock().unwrap_or_else(|e| e.into_inner());
        let reused = idle.iter().position(|pool| pool.current_num_threads() == threads).map(|i| idle.swap_remove(i));
        // where no pool can be built, the worker uses the global one
        Self(reused.or_else(|| ThreadPoolBuilder::new().num_threads(threads).build().ok()))
    }

    fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        match &self.0 {
            Some(pool) => pool.install(work),
            None => work(),
        }
    }
}

impl Drop for CorePool {
    fn drop(&mut self) {
        IDLE.lock().unwrap_or_else(|e| e.into_inner()).extend(self.0.take());
    }
}

/// Whether a model's tensors lie on a [GPU](ops::is_gpu).
pub(crate) fn is_on_gpu<B: Backend, M: Module<B>>(model: &M) -> bool {
    model.devices().first().is_some_and(ops::is_gpu::<B>)
}

/// Number of threads that run passes of a model: `threads` on a CPU, one on a GPU or in a browser.
///
/// On a GPU each thread would have a queue and memory of its own.
pub(crate) fn num_workers<B: Backend, M: Module<B>>(model: &M, threads: usize) -> usize {
    if is_on_gpu::<B, M>(model) || !HAS_THREADS { 1 } else { threads }
}

/// Rows of each pass where `rows` are split into the fewest passes of at most `max_rows`.
///
/// Passes are nearly equal. A matrix product of a row or two may round differently, and costs
/// nearly as much as a whole one.
pub(crate) fn balanced_chunk(rows: usize, max_rows: usize) -> usize {
    rows.div_ceil(rows.div_ceil(max_rows).max(1)).max(1)
}

/// Runs jobs `0..jobs` on up to `threads` threads and hands the results to `take` in job order.
///
/// The context is cloned for each thread, on the caller's thread: modules can be sent to other
/// threads, but not shared.
///
/// # Errors
/// Returns an error of a failed job. No further job is started then.
///
/// # Panics
/// Where a job panics.
pub(crate) fn run_ordered<C: Clone + Send, T: Send>(
    jobs: usize,
    threads: usize,
    context: C,
    work: impl Fn(&C, usize) -> Result<T, Error> + Sync,
    mut take: impl FnMut(usize, T) + Send,
) -> Result<(), Error> {
    let workers = threads.min(jobs);
    if workers <= 1 || !HAS_THREADS {
        for job in 0..jobs {
            take(job, work(&context, job)?);
        }
        return Ok(());
    }
    let contexts: Vec<C> = (0..workers).map(|_| context.clone()).collect();
    run_on(contexts, (jobs, threads), work, take)
}

/// The devices and threads of this process that run jobs.
#[derive(Clone, Debug)]
pub(crate) struct Places {
    /// Threads, where there is one device.
    pub threads: usize,
    /// Devices that each run jobs; empty for that of the model.
    pub devices: Vec<DeviceId>,
}

/// [`run_ordered`] on several devices, one job at a time on each.
///
/// `out` brings the context to a device, and `back` a result to that of the model, the first.
///
/// # Errors
/// As [`run_ordered`].
///
/// # Panics
/// As [`run_ordered`].
pub(crate) fn run_placed<C: Clone + Send, T: Send>(
    jobs: usize,
    places: &Places,
    context: C,
    (out, back): (impl Fn(C, DeviceId) -> C, impl Fn(T, DeviceId) -> T + Sync),
    work: impl Fn(&C, usize) -> Result<T, Error> + Sync,
    take: impl FnMut(usize, T) + Send,
) -> Result<(), Error> {
    let (Some(&home), true) = (places.devices.first(), places.devices.len() > 1 && HAS_THREADS) else {
        return run_ordered(jobs, places.threads, context, work, take);
    };
    let used = &places.devices[..places.devices.len().min(jobs)];
    let contexts = used.iter().map(|&device| out(context.clone(), device)).collect();
    run_on(contexts, (jobs, places.devices.len()), |context, job| Ok(back(work(context, job)?, home)), take)
}

/// Runs jobs on a thread for each context; `threads` share the cores.
fn run_on<C: Send, T: Send>(
    contexts: Vec<C>,
    (jobs, threads): (usize, usize),
    work: impl Fn(&C, usize) -> Result<T, Error> + Sync,
    mut take: impl FnMut(usize, T) + Send,
) -> Result<(), Error> {
    struct Waiting<T, F> {
        next: usize,
        done: BTreeMap<usize, T>,
        take: F,
    }
    let queue = AtomicUsize::new(0);
    let waiting = Mutex::new(Waiting { next: 0, done: BTreeMap::new(), take: &mut take });
    std::thread::scope(|scope| {
        let workers: Vec<_> = contexts
            .into_iter()
            .map(|context| {
                let (queue, waiting, work) = (&queue, &waiting, &work);
                let cores = CorePool::one_of(threads);
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
                scope.spawn(move || cores.run(calls))
            })
            .collect();
        let mut outcome = Ok(());
        for worker in workers {
            match worker.join() {
                Ok(result) => outcome = outcome.and(result),
                // the user's forward pass panicked: pass it on
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
            run_ordered(20, threads, (), |_, i| Ok(i * i), |i, r| seen.push((i, r))).unwrap();
            assert_eq!(seen, (0..20).map(|i| (i, i * i)).collect::<Vec<_>>());
        }
    }

    #[test]
    fn an_error_ends_the_run() {
        for threads in [1, 3] {
            let result =
                run_ordered(9, threads, (), |_, i| if i == 4 { Err(Error::EmptyBatch) } else { Ok(i) }, |_, _| {});
            assert_eq!(result, Err(Error::EmptyBatch));
        }
    }
}
