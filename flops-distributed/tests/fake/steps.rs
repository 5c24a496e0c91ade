//! Steps of rounds of all kinds, for the tests that need an engine.

use flops_executor::{Executor, ExecutorError, Round, RoundPhase};

use crate::fake::{self, Fake, Hook};

pub fn round(step: u64, phase: RoundPhase, jobs: usize) -> Round {
    Round::new((step, 0), phase, step ^ 0xD16E57 ^ (jobs as u64) << 32, jobs)
}

/// A hash of what a round gave. None where a job is not done.
pub fn hash(fake: &mut Fake) -> Option<u64> {
    let jobs = fake.round.jobs;
    Some(fake::hash(&fake.results(0..jobs)?.concat()))
}

/// Rounds of some steps with sums of a length, and a hash of what they gave.
pub fn steps(executor: &dyn Executor, steps: u64, len: usize, hook: Hook) -> Result<u64, ExecutorError> {
    let mut all = 0;
    for step in 0..steps {
        for (phase, jobs) in [
            (RoundPhase::Clean, 8),
            (RoundPhase::SiteCheck, 1),
            (RoundPhase::Pilot, 16),
            (RoundPhase::PilotUpdate, 16),
            (RoundPhase::Query, 8),
            (RoundPhase::Update, 8),
            (RoundPhase::Query, 2),
            (RoundPhase::Update, 2),
            (RoundPhase::Update, 1),
        ] {
            let round = round(step, phase, jobs);
            let mut fake = Fake { hook: Some(&mut *hook), ..Fake::new(round, len) };
            executor.run(&round, &mut fake)?;
            all = fake::mix(all ^ hash(&mut fake).expect("all jobs are done"));
        }
        executor.verify(step, all)?;
    }
    Ok(all)
}

/// A test ends where a program is missing that it needs, and fails where none may be missing.
pub fn skip(program: &str) {
    let is_required = std::env::var_os("FLOPS_REQUIRE_ENGINES").is_some();
    assert!(!is_required, "{program} is not installed, and FLOPS_REQUIRE_ENGINES is set");
    eprintln!("skipped: {program} is not installed");
}
