//! Elastic runs: workers that come and go, and a log that all of them read.

mod payload;
mod round;
mod state;
mod worker;

use std::time::{Duration, Instant};

use flops_executor::{Executor, ExecutorError, Jobs, Round, RunIdentity};

use crate::wire::{sealed, unsealed};
use crate::{Key, RoundKey, identity};
use round::Turn;
pub use worker::{Elastic, ElasticOptions};

impl Executor for Elastic {
    fn run(&self, round: &Round, jobs: &mut dyn Jobs) -> Result<(), ExecutorError> {
        let mut state = self.lock();
        self.pump(&mut state, Duration::ZERO)?;
        let outcome = match state.enter(round) {
            // as where a step is repeated with the same data: its entries are gone
            Some(Ok(())) => jobs.run(0..round.jobs).map_err(|why| self.cannot_follow(why)),
            Some(failed) => failed,
            None => {
                let outcome = Turn::new(self, &mut state, round, jobs).run()?;
                state.leave(RoundKey::from(round), outcome.clone());
                outcome
            }
        };
        self.counts().rounds += 1;
        outcome
    }

    fn begin(&self, run: &RunIdentity) -> Result<(), ExecutorError> {
        let mut state = self.lock();
        state.start_at(run.step);
        let mut run = run.clone();
        run.settings.push(("the sum mode".into(), self.options.sum_mode.to_string()));
        let there = self.agree(&mut state, &Key::Identity, &sealed(&[&identity::bytes(&run)]))?;
        let Some(there) = unsealed(&there).and_then(identity::read) else {
            return Err(ExecutorError::Unsupported {
                what: "the identity of the run, as the log has it, cannot be read".into(),
                remedy: "start all workers from the same version, or give the run another name".into(),
            });
        };
        if let Some((what, here, there)) = identity::difference(&run, &there) {
            return Err(ExecutorError::Mismatch { what, here, there });
        }
        self.log.put(&Key::Joined(self.worker().into()), &[])?;
        let until = Instant::now() + self.options.limit;
        self.wait_for(&mut state, "the entry of this worker", |state| {
            let enough = state.joined() >= self.options.min_workers || Instant::now() >= until;
            (state.has(self.worker()) && enough).then_some(())
        })
    }

    fn verify(&self, step: u64, weights: u64) -> Result<(), ExecutorError> {
        let there = self.agree(&mut self.lock(), &Key::Weights(step), &weights.to_le_bytes())?;
        match <[u8; 8]>::try_from(&there[..]) {
            Ok(there) if u64::from_le_bytes(there) == weights => Ok(()),
            Ok(_) => Err(ExecutorError::Diverged { worker: self.worker().into(), step }),
            // of no worker: nothing to compare with
            Err(_) => {
                self.counts().refused += 1;
                Ok(())
            }
        }
    }
}
