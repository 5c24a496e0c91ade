//! A little network whose sums depend on their order.

use flops_executor::{Executor, ExecutorError, Round, RoundPhase};

use crate::fake::{self, Fake, Hook};

/// Leaves of a step.
pub const LEAVES: usize = 8;
const WIDTH: usize = 5;

/// A network in training.
#[derive(Clone, Debug, PartialEq)]
pub struct Net {
    pub step: u64,
    pub weights: Vec<f32>,
    /// Steps that failed and were passed over.
    pub passed: Vec<u64>,
}

impl Default for Net {
    fn default() -> Self {
        Self { step: 0, weights: (0..WIDTH).map(|i| 0.1 + i as f32).collect(), passed: vec![] }
    }
}

impl Net {
    pub fn hash(&self) -> u64 {
        fake::hash(&self.weights)
    }

    pub fn to_bytes(&self) -> Vec<u8> {
        self.weights.iter().flat_map(|weight| weight.to_le_bytes()).collect()
    }

    pub fn from_checkpoint((step, bytes): (u64, Vec<u8>)) -> Self {
        let weights = bytes.chunks(4).map(|value| f32::from_le_bytes(value.try_into().unwrap())).collect();
        Self { step, weights, passed: vec![] }
    }

    pub fn begin(&self, executor: &dyn Executor) -> Result<(), ExecutorError> {
        executor.begin(&fake::identity("0.1", (self.step, self.hash())))
    }

    /// One step. A failure that may pass is passed over.
    pub fn step(&mut self, executor: &dyn Executor, mut hook: Hook) -> Result<(), ExecutorError> {
        if self.step.is_multiple_of(4) {
            executor.verify(self.step, self.hash())?;
        }
        match self.gradient(executor, &mut hook) {
            Ok(gradient) => {
                for (weight, slope) in self.weights.iter_mut().zip(gradient) {
                    *weight -= 0.01 * slope;
                }
            }
            Err(why) if why.may_pass() => self.passed.push(self.step),
            Err(why) => return Err(why),
        }
        self.step += 1;
        Ok(())
    }

    fn gradient(&self, executor: &dyn Executor, hook: &mut Hook) -> Result<Vec<f32>, ExecutorError> {
        let mut before = self.weights.clone();
        for (phase, jobs) in [
            (RoundPhase::Clean, LEAVES),
            (RoundPhase::Repeat, 1),
            (RoundPhase::Query, LEAVES),
            (RoundPhase::Update, LEAVES),
        ] {
            let round = Round::new((self.step, 0), phase, fake::hash(&before), jobs);
            let value = |job: usize| -> Vec<f32> {
                let of = |(i, weight): (usize, &f32)| (weight * 1.7 + i as f32).sin() * 10f32.powi(job as i32 % 5 - 2);
                before.iter().enumerate().map(of).collect()
            };
            let mut fake = Fake { value: Some(&value), hook: Some(&mut **hook), ..Fake::new(round, WIDTH) };
            executor.run(&round, &mut fake)?;
            let all = fake.results(0..jobs).expect("all jobs");
            before = if round.is_sum() {
                all.concat()
            } else {
                all.iter().fold(before.clone(), |a, b| a.iter().zip(b).map(|(a, b)| a * 0.5 + b).collect())
            };
        }
        Ok(before)
    }

    /// Steps up to a step.
    pub fn train(mut self, executor: &dyn Executor, steps: u64, hook: Hook) -> Result<Self, ExecutorError> {
        self.begin(executor)?;
        while self.step < steps {
            self.step(executor, hook)?;
        }
        Ok(self)
    }
}

/// What one process gives.
pub fn reference(steps: u64) -> Net {
    Net::default().train(&flops_executor::Threads, steps, &mut |_, _| Ok(())).unwrap()
}
