//! The number of threads.

/// Returns the number of threads that evaluate queries: `given`, otherwise one per core, at most 8.
pub fn threads(given: Option<usize>) -> usize {
    given.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from).min(8))
}
