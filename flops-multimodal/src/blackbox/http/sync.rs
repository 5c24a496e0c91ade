//! What the threads of an HTTP client share: the limit on requests in flight, and the error that
//! ends a call.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::blackbox::error::BlackBoxError;

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A semaphore: how many more requests may be in flight.
pub(super) struct Slots {
    free: Mutex<usize>,
    changed: Condvar,
}

/// A slot of [`Slots`], given back when dropped.
pub(super) struct Slot<'a>(&'a Slots);

impl Slots {
    pub(super) fn new(count: usize) -> Self {
        Self { free: Mutex::new(count), changed: Condvar::new() }
    }

    /// Waits for a free slot.
    pub(super) fn take(&self) -> Slot<'_> {
        let free = lock(&self.free);
        *self.changed.wait_while(free, |free| *free == 0).unwrap_or_else(PoisonError::into_inner) -= 1;
        Slot(self)
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        *lock(&self.0.free) += 1;
        self.0.changed.notify_one();
    }
}

/// The first error of a call, which ends the work of all its threads.
#[derive(Default)]
pub(super) struct Stop {
    error: Mutex<Option<BlackBoxError>>,
    changed: Condvar,
}

impl Stop {
    /// Stops the call, with this error if it is the first.
    pub(super) fn fail(&self, error: BlackBoxError) {
        lock(&self.error).get_or_insert(error);
        self.changed.notify_all();
    }

    /// The error of the call, if it has stopped.
    pub(super) fn check(&self) -> Result<(), BlackBoxError> {
        lock(&self.error).clone().map_or(Ok(()), Err)
    }

    /// Waits for `time`, or until the call stops.
    pub(super) fn sleep(&self, time: Duration) -> Result<(), BlackBoxError> {
        let error = lock(&self.error);
        let waited = self.changed.wait_timeout_while(error, time, |error| error.is_none());
        let (error, _) = waited.unwrap_or_else(PoisonError::into_inner);
        error.clone().map_or(Ok(()), Err)
    }
}
