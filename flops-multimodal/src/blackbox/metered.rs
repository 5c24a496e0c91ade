//! A hard cap on queries, and a journal of their answers.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use super::error::BlackBoxError;
use super::info::Info;
use super::interface::{BlackBox, Meter};
use super::journal::{Journal, RecordKind};
use super::query::{Key, Query, query_keys};

/// What counts as a spent query.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Charge {
    /// Every row of every attempt, retries included, unless the connection was refused: the most
    /// that an endpoint can charge.
    #[default]
    PerAttempt,
    /// Every row that is answered. It suits endpoints that charge an `Idempotency-Key` once, and
    /// black boxes in this process.
    ///
    /// Rows that an endpoint has charged, but whose answers did not arrive before the run failed or
    /// was killed, are not counted. A resumed run that sends them again, with the same key, pays
    /// nothing more for them. A run that sends other rows instead can be charged more than the cap.
    /// If that matters, count per attempt.
    PerAnswer,
}

/// A [`BlackBox`] that spends at most `cap` queries and, if it has a journal, never pays for a
/// query twice.
///
/// A call whose queries exceed the cap sends none of them. A row that occurs twice in a call is
/// sent once.
///
/// After its first error a `Metered` stays failed. Each later call returns that error and sends
/// nothing, so that a training step cannot use a part of its queries. Answers that arrived before
/// the error are kept. To continue, open the journal again: queries that it has answered are free,
/// and the count continues from its charges.
///
/// # Holding back
///
/// A part of the cap can be [held back](Self::hold_back), for instance for a last evaluation. Calls
/// and retries that would need it are refused with [`BlackBoxError::HeldBack`]. That error alone
/// passes: [`release`](Self::release) frees what was held back, and queries are sent again.
///
/// # Resuming
///
/// An answer is on disk before [`scores`](BlackBox::scores) returns, and before the same thread
/// sends its next batch. With [`Charge::PerAttempt`] each attempt is on disk before it is sent.
/// After a run was killed, at most the requests in flight are sent again. They are split into the
/// same batches, so they have the same keys.
pub struct Metered<X> {
    inner: X,
    cap: u64,
    charge: Charge,
    state: Mutex<State>,
}

/// Counts and journal, shared by all calls.
#[derive(Default)]
struct State {
    spent: u64,
    /// Queries that running calls may still spend.
    reserved: u64,
    /// Queries that no call may spend.
    held: u64,
    from_journal: u64,
    journal: Option<Journal>,
    failed: Option<BlackBoxError>,
}

impl<X: BlackBox> Metered<X> {
    /// `inner` with a cap of `cap` queries, charged [per attempt](Charge::PerAttempt), without a
    /// journal.
    #[must_use]
    pub fn new(inner: X, cap: u64) -> Self {
        Self { inner, cap, charge: Charge::default(), state: Mutex::default() }
    }

    /// Sets how queries are charged. The charges in a journal stay as they are.
    #[must_use]
    pub fn with_charge(self, charge: Charge) -> Self {
        Self { charge, ..self }
    }

    /// Appends answers to the journal at `path`, and answers from it; creates the file if it does
    /// not exist.
    ///
    /// The journal's charges count against the cap. All answers are held in memory.
    ///
    /// # Errors
    /// - If the file cannot be read or written, or another run has it open.
    /// - If it is damaged elsewhere than at its end.
    /// - If it belongs to a black box with other classes or sizes.
    pub fn with_journal(self, path: impl AsRef<Path>) -> Result<Self, BlackBoxError> {
        let journal = Journal::open(path.as_ref(), self.inner.info())?;
        let mut state = self.state();
        state.spent = state.spent.saturating_add(journal.spent());
        state.journal = Some(journal);
        drop(state);
        Ok(self)
    }

    /// Queries spent so far, by this run and by earlier runs with the same journal.
    pub fn spent(&self) -> u64 {
        self.state().spent
    }

    /// Holds back `queries` of the cap, instead of those that were held back before.
    ///
    /// Queries that the journal answers are free, and stay so.
    pub fn hold_back(&self, queries: u64) {
        self.state().held = queries;
    }

    /// Frees what was held back. If a call was refused for it, queries are sent again.
    pub fn release(&self) {
        let mut state = self.state();
        state.held = 0;
        if matches!(state.failed, Some(BlackBoxError::HeldBack { .. })) {
            state.failed = None;
        }
    }

    /// Queries that may still be spent, without those held back.
    pub fn remaining(&self) -> u64 {
        let state = self.state();
        self.cap.saturating_sub(state.spent + state.reserved).saturating_sub(state.held)
    }

    /// Queries of this run that the journal answered, at no cost.
    pub fn answered_from_journal(&self) -> u64 {
        self.state().from_journal
    }

    /// The cap on queries.
    pub fn cap(&self) -> u64 {
        self.cap
    }

    /// The first error, which every later call returns.
    pub fn failure(&self) -> Option<BlackBoxError> {
        self.state().failed.clone()
    }

    /// The black box inside. Queries sent to it directly are not counted.
    pub fn inner(&self) -> &X {
        &self.inner
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reserves `rows` more queries of the cap.
    fn reserve(&self, state: &mut State, rows: u64) -> Result<(), BlackBoxError> {
        let (cap, spent, held) = (self.cap, state.spent + state.reserved, state.held);
        let left = cap.saturating_sub(spent);
        if rows > left.saturating_sub(held) {
            return Err(match held {
                0 => BlackBoxError::CapReached { cap, spent, requested: rows },
                held => BlackBoxError::HeldBack { cap, spent, held, requested: rows },
            });
        }
        state.reserved += rows;
        Ok(())
    }

    /// Stores `error` if it is the first, and returns it.
    fn fail(&self, error: BlackBoxError) -> BlackBoxError {
        self.state().failed.get_or_insert_with(|| error.clone());
        error
    }

    /// Answers from the journal, and sends each remaining key once.
    fn answer(&self, queries: &[Query]) -> Result<Vec<Vec<f32>>, BlackBoxError> {
        self.info().check_queries(queries)?;
        let keys = query_keys(queries);
        let mut answers: HashMap<Key, Vec<f32>> = HashMap::new();
        let (mut unanswered, mut rows) = (Vec::new(), Vec::new());
        let call = {
            let mut state = self.state();
            if let Some(error) = &state.failed {
                return Err(error.clone());
            }
            let mut seen = HashMap::new();
            let mut found = 0;
            for (&key, query) in keys.iter().zip(queries) {
                if let Some(scores) = state.journal.as_ref().and_then(|journal| journal.answer(key)) {
                    answers.entry(key).or_insert_with(|| scores.to_vec());
                    found += 1;
                } else if seen.insert(key, ()).is_none() {
                    unanswered.push(query.clone());
                    rows.push(key);
                }
            }
            self.reserve(&mut state, rows.len() as u64)?;
            state.from_journal += found;
            let progress = Progress { reserved: rows.len() as u64, answers: vec![None; rows.len()] };
            Call { metered: self, keys: &rows, progress: Mutex::new(progress) }
        };
        if !unanswered.is_empty() {
            let answered = self.inner.scores_metered(&unanswered, &call).and_then(|scores| {
                self.info().check_scores(unanswered.len(), &scores)?;
                call.answered(0, &scores)
            });
            if let Err(error) = answered {
                // fail before the call returns its reservation, so that no other call can spend it
                return Err(self.fail(error));
            }
        }
        let received = std::mem::take(&mut call.progress().answers);
        answers.extend(rows.iter().copied().zip(received.into_iter().flatten()));
        // the journal or the black box has answered each key
        Ok(keys.iter().filter_map(|key| answers.get(key).cloned()).collect())
    }
}

impl<X: BlackBox> BlackBox for Metered<X> {
    fn info(&self) -> &Info {
        self.inner.info()
    }

    fn scores(&self, queries: &[Query]) -> Result<Vec<Vec<f32>>, BlackBoxError> {
        self.answer(queries).map_err(|error| self.fail(error))
    }
}

/// The queries that one call has to send. Its lock is taken after the lock of the state.
struct Call<'a, X: BlackBox> {
    metered: &'a Metered<X>,
    keys: &'a [Key],
    progress: Mutex<Progress>,
}

/// The reservation and the answers of a call.
struct Progress {
    reserved: u64,
    answers: Vec<Option<Vec<f32>>>,
}

impl<X: BlackBox> Call<'_, X> {
    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Moves up to `rows` queries from reserved to spent.
    fn spend(&self, state: &mut State, rows: u64) {
        let mut progress = self.progress();
        let rows = rows.min(progress.reserved);
        progress.reserved -= rows;
        state.reserved -= rows;
        state.spent += rows;
    }
}

impl<X: BlackBox> Meter for Call<'_, X> {
    fn attempt(&self, rows: usize) -> Result<(), BlackBoxError> {
        let mut state = self.metered.state();
        if let Some(error) = &state.failed {
            return Err(error.clone());
        }
        if self.metered.charge == Charge::PerAnswer {
            return Ok(());
        }
        // first attempts are reserved; retries need a further reservation
        let rows = rows as u64;
        let more = rows.saturating_sub(self.progress().reserved);
        self.metered.reserve(&mut state, more)?;
        self.progress().reserved += more;
        self.spend(&mut state, rows);
        state.journal.as_mut().map_or(Ok(()), |journal| journal.append_count(RecordKind::Attempt, rows))
    }

    fn unsent(&self, rows: usize) -> Result<(), BlackBoxError> {
        if self.metered.charge == Charge::PerAnswer {
            return Ok(());
        }
        let mut state = self.metered.state();
        let rows = (rows as u64).min(state.spent);
        if let Some(journal) = &mut state.journal {
            journal.append_count(RecordKind::Unsent, rows)?;
        }
        state.spent -= rows;
        state.reserved += rows;
        self.progress().reserved += rows;
        Ok(())
    }

    fn answered(&self, first: usize, scores: &[Vec<f32>]) -> Result<(), BlackBoxError> {
        self.metered.info().check_scores(scores.len(), scores)?;
        let mut state = self.metered.state();
        let fresh: Vec<(usize, &Vec<f32>)> = {
            let progress = self.progress();
            let rows = scores.iter().enumerate().map(|(row, scores)| (first + row, scores));
            // an answer that was reported before stays as it is
            rows.filter(|&(row, _)| progress.answers.get(row).is_some_and(Option::is_none)).collect()
        };
        if fresh.is_empty() {
            return Ok(());
        }
        let kind = match self.metered.charge {
            Charge::PerAnswer => RecordKind::Charged,
            Charge::PerAttempt => RecordKind::Paid,
        };
        if kind == RecordKind::Charged {
            self.spend(&mut state, fresh.len() as u64);
        }
        if let Some(journal) = &mut state.journal {
            let rows: Vec<(Key, &[f32])> = fresh.iter().map(|&(row, scores)| (self.keys[row], &scores[..])).collect();
            journal.append_answers(kind, &rows)?;
        }
        let mut progress = self.progress();
        fresh.into_iter().for_each(|(row, scores)| progress.answers[row] = Some(scores.clone()));
        Ok(())
    }
}

/// Returns the rest of the reservation. A panic of the black box counts as its failure.
impl<X: BlackBox> Drop for Call<'_, X> {
    fn drop(&mut self) {
        let mut state = self.metered.state();
        if std::thread::panicking() {
            state.failed.get_or_insert_with(|| BlackBoxError::Failed("it panicked".into()));
        }
        state.reserved -= std::mem::take(&mut self.progress().reserved).min(state.reserved);
    }
}

#[cfg(test)]
mod tests;
