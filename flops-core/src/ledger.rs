//! What training has cost, phase by phase.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The phases of a training step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Phase {
    /// The unperturbed pass: losses, embeddings, output.
    Clean,
    /// Queries that estimate variances before the allocation.
    Pilot,
    /// The allocated queries.
    Query,
    /// Forming the gradients and updating the parameters.
    Update,
}

impl Phase {
    /// All phases, in the order of a step.
    pub const ALL: [Self; 4] = [Self::Clean, Self::Pilot, Self::Query, Self::Update];
}

/// The cost of one phase.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Cost {
    /// Queries. Each evaluates one example under one perturbation.
    pub queries: u64,
    /// Rows sent through the model.
    pub row_forwards: u64,
    /// Wall-clock seconds.
    pub seconds: f64,
}

impl Cost {
    fn add(&mut self, other: Cost) {
        self.queries += other.queries;
        self.row_forwards += other.row_forwards;
        self.seconds += other.seconds;
    }
}

/// The cost of training so far, by [`Phase`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Ledger {
    costs: [Cost; 4],
}

impl Ledger {
    /// Adds a cost to a phase.
    pub fn add(&mut self, phase: Phase, queries: u64, row_forwards: u64, elapsed: Duration) {
        self.costs[phase as usize].add(Cost { queries, row_forwards, seconds: elapsed.as_secs_f64() });
    }

    /// Adds the costs of another ledger, phase by phase.
    pub fn merge(&mut self, other: &Self) {
        self.costs.iter_mut().zip(other.costs).for_each(|(cost, other)| cost.add(other));
    }

    /// The cost of `phase`.
    pub fn of(&self, phase: Phase) -> Cost {
        self.costs[phase as usize]
    }

    /// The cost of all phases together.
    pub fn total(&self) -> Cost {
        let mut total = Cost::default();
        self.costs.iter().for_each(|c| total.add(*c));
        total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ledger_adds_up() {
        let mut ledger = Ledger::default();
        ledger.add(Phase::Query, 20, 40, Duration::from_millis(500));
        ledger.add(Phase::Query, 1, 2, Duration::from_millis(250));
        ledger.add(Phase::Clean, 0, 7, Duration::from_millis(250));
        assert_eq!(ledger.of(Phase::Query), Cost { queries: 21, row_forwards: 42, seconds: 0.75 });
        assert_eq!(ledger.total(), Cost { queries: 21, row_forwards: 49, seconds: 1.0 });
        let mut both = ledger.clone();
        both.merge(&ledger);
        assert_eq!(both.of(Phase::Query), Cost { queries: 42, row_forwards: 84, seconds: 1.5 });
        assert_eq!((both.of(Phase::Clean).row_forwards, both.total().seconds), (14, 2.0));
        let json = serde_json::to_string(&ledger).unwrap();
        assert_eq!(serde_json::from_str::<Ledger>(&json).unwrap(), ledger);
    }
}
