//! A hard cap on queries, and a journal of the answers that were paid for.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use super::journal::{Journal, Kind};
use super::{BlackBox, BlackBoxError, Info, Key, Meter, Query, keys};

/// What counts as a query spent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Charge {
    /// Every row of every attempt, retries included, unless the connection was refused: what an endpoint can charge at most.
    #[default]
    PerAttempt,
    /// Every row that has its answer. For endpoints that honour the `Idempotency-Key` of a retry, and for boxes in this process.
    ///
    /// Rows that an endpoint charged for, and whose answer never came before the run failed or was killed, are not counted. They
    /// cost nothing more when the resumed run asks them again, under the same key; a run that asks others instead can be charged
    /// for more than the cap. Where that matters, count per attempt.
    PerAnswer,
}

/// A [`BlackBox`] that is asked at most `cap` queries, and never the same one twice where it has a journal.
///
/// A call whose queries do not fit under the cap sends none of them. A row that a call has twice is asked once.
///
/// After its first error a `Metered` stays failed: each later call returns that error and sends nothing, so that a training step
/// cannot go on half-way. Answers that came before the error are kept. Open the journal again to go on: a run that asks the same
/// questions gets the answers it had, for nothing, and its count goes on where it was.
///
/// # Resuming
///
/// An answer is on the disk before [`scores`](BlackBox::scores) returns, and before the next batch of that thread is sent. With
/// [`Charge::PerAttempt`] each attempt is on the disk before it is sent. Of a run that was killed, at most the requests in flight
/// are asked again; they are cut into the same batches, and so carry the same keys.
pub struct Metered<X> {
    inner: X,
    cap: u64,
    charge: Charge,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    spent: u64,
    /// Queries of calls under way that may still be spent.
    reserved: u64,
    from_journal: u64,
    journal: Option<Journal>,
    failed: Option<BlackBoxError>,
}

impl<X: BlackBox> Metered<X> {
    /// `inner`, asked at most `cap` queries, charged [`PerAttempt`](Charge::PerAttempt), without a journal.
    pub fn new(inner: X, cap: u64) -> Self {
        Self { inner, cap, charge: Charge::default(), state: Mutex::default() }
    }

    /// Counts queries in this way. What a journal holds stays counted as it was.
    pub fn with_charge(self, charge: Charge) -> Self {
        Self { charge, ..self }
    }

    /// Keeps answers in the file at `path`, which is made unless it exists, and answers from it. What it has spent counts against
    /// the cap. All answers are held in memory.
    ///
    /// # Errors
    /// When the file cannot be read or written, is in use by another run, is damaged other than at its end, or holds the answers of
    /// a box with other classes or sizes.
    pub fn with_journal(self, path: impl AsRef<Path>) -> Result<Self, BlackBoxError> {
        let journal = Journal::open(path.as_ref(), self.inner.info())?;
        let mut state = self.state();
        state.spent = state.spent.saturating_add(journal.spent());
        state.journal = Some(journal);
        drop(state);
        Ok(self)
    }

    /// Queries spent so far, in this run and in those before it that wrote to the journal.
    pub fn spent(&self) -> u64 {
        self.state().spent
    }

    /// Queries that may still be asked.
    pub fn remaining(&self) -> u64 {
        let state = self.state();
        self.cap.saturating_sub(state.spent + state.reserved)
    }

    /// Queries of this run that cost nothing because the journal had their answers.
    pub fn answered_from_journal(&self) -> u64 {
        self.state().from_journal
    }

    /// The cap on queries.
    pub fn cap(&self) -> u64 {
        self.cap
    }

    /// The error that every further call returns, once there was one.
    pub fn failure(&self) -> Option<BlackBoxError> {
        self.state().failed.clone()
    }

    /// The box inside. What is asked of it directly is not counted.
    pub fn inner(&self) -> &X {
        &self.inner
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes `rows` queries more from the cap.
    fn reserve(&self, state: &mut State, rows: u64) -> Result<(), BlackBoxError> {
        let spent = state.spent + state.reserved;
        if rows > self.cap.saturating_sub(spent) {
            return Err(BlackBoxError::CapReached { cap: self.cap, spent, asked: rows });
        }
        state.reserved += rows;
        Ok(())
    }

    /// Stays failed with the first error, and returns this one.
    fn fail(&self, error: BlackBoxError) -> BlackBoxError {
        self.state().failed.get_or_insert_with(|| error.clone());
        error
    }

    fn ask(&self, queries: &[Query]) -> Result<Vec<Vec<f32>>, BlackBoxError> {
        self.info().check_queries(queries)?;
        let all = keys(queries);
        let mut answers: HashMap<Key, Vec<f32>> = HashMap::new();
        let (mut asked, mut rows) = (Vec::new(), Vec::new());
        let call = {
            let mut state = self.state();
            if let Some(error) = &state.failed {
                return Err(error.clone());
            }
            let mut seen = HashMap::new();
            let mut kept = 0;
            for (&key, query) in all.iter().zip(queries) {
                if let Some(scores) = state.journal.as_ref().and_then(|journal| journal.answer(key)) {
                    answers.entry(key).or_insert_with(|| scores.to_vec());
                    kept += 1;
                } else if seen.insert(key, ()).is_none() {
                    asked.push(query.clone());
                    rows.push(key);
                }
            }
            self.reserve(&mut state, rows.len() as u64)?;
            state.from_journal += kept;
            let open = Open { reserved: rows.len() as u64, answers: vec![None; rows.len()] };
            Call { metered: self, keys: &rows, open: Mutex::new(open) }
        };
        if !asked.is_empty() {
            let answered = self.inner.scores_metered(&asked, &call).and_then(|scores| {
                self.info().check_scores(asked.len(), &scores)?;
                call.answered(0, &scores)
            });
            if let Err(error) = answered {
                // before the call gives back what it did not spend: no other may spend that
                return Err(self.fail(error));
            }
        }
        let asked = std::mem::take(&mut call.open().answers);
        answers.extend(rows.iter().copied().zip(asked.into_iter().flatten()));
        // each key is in the journal or was answered just now
        Ok(all.iter().filter_map(|key| answers.get(key).cloned()).collect())
    }
}

impl<X: BlackBox> BlackBox for Metered<X> {
    fn info(&self) -> &Info {
        self.inner.info()
    }

    fn scores(&self, queries: &[Query]) -> Result<Vec<Vec<f32>>, BlackBoxError> {
        self.ask(queries).map_err(|error| self.fail(error))
    }
}

/// The queries of one call that have to be asked. Its locks are taken after that of the state.
struct Call<'a, X: BlackBox> {
    metered: &'a Metered<X>,
    keys: &'a [Key],
    open: Mutex<Open>,
}

struct Open {
    reserved: u64,
    answers: Vec<Option<Vec<f32>>>,
}

impl<X: BlackBox> Call<'_, X> {
    fn open(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Turns reserved queries into spent ones.
    fn spend(&self, state: &mut State, rows: u64) {
        let mut open = self.open();
        let rows = rows.min(open.reserved);
        open.reserved -= rows;
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
        // the first attempts have their reservation, retries need more
        let rows = rows as u64;
        let more = rows.saturating_sub(self.open().reserved);
        self.metered.reserve(&mut state, more)?;
        self.open().reserved += more;
        self.spend(&mut state, rows);
        state.journal.as_mut().map_or(Ok(()), |journal| journal.note(Kind::Attempt, rows))
    }

    fn unsent(&self, rows: usize) -> Result<(), BlackBoxError> {
        if self.metered.charge == Charge::PerAnswer {
            return Ok(());
        }
        let mut state = self.metered.state();
        let rows = (rows as u64).min(state.spent);
        if let Some(journal) = &mut state.journal {
            journal.note(Kind::Unsent, rows)?;
        }
        state.spent -= rows;
        state.reserved += rows;
        self.open().reserved += rows;
        Ok(())
    }

    fn answered(&self, first: usize, scores: &[Vec<f32>]) -> Result<(), BlackBoxError> {
        self.metered.info().check_scores(scores.len(), scores)?;
        let mut state = self.metered.state();
        let fresh: Vec<(usize, &Vec<f32>)> = {
            let open = self.open();
            let rows = scores.iter().enumerate().map(|(row, scores)| (first + row, scores));
            // what was handed over before is kept as it was
            rows.filter(|&(row, _)| open.answers.get(row).is_some_and(Option::is_none)).collect()
        };
        if fresh.is_empty() {
            return Ok(());
        }
        let kind = match self.metered.charge {
            Charge::PerAnswer => Kind::Charged,
            Charge::PerAttempt => Kind::Paid,
        };
        if kind == Kind::Charged {
            self.spend(&mut state, fresh.len() as u64);
        }
        if let Some(journal) = &mut state.journal {
            let rows: Vec<(Key, &[f32])> = fresh.iter().map(|&(row, scores)| (self.keys[row], &scores[..])).collect();
            journal.keep(kind, &rows)?;
        }
        let mut open = self.open();
        fresh.into_iter().for_each(|(row, scores)| open.answers[row] = Some(scores.clone()));
        Ok(())
    }
}

/// What a call did not spend goes back. A panic of the box counts as its failure.
impl<X: BlackBox> Drop for Call<'_, X> {
    fn drop(&mut self) {
        let mut state = self.metered.state();
        if std::thread::panicking() {
            state.failed.get_or_insert_with(|| BlackBoxError::Failed("it panicked".into()));
        }
        state.reserved -= std::mem::take(&mut self.open().reserved).min(state.reserved);
    }
}

#[cfg(test)]
mod tests;
