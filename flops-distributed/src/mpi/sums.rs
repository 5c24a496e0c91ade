//! Whether sums are exchanged, or added by every rank.

use std::time::Duration;

use flops_executor::RoundPhase;

use super::link::Status;
use super::what::What;
use crate::SumMode;
use crate::cost::SumCost;

/// Shared rounds that are measured before [`SumMode::Auto`] decides, after a first one that is not.
const MEASURED: u32 = 3;

/// Which sums are exchanged, as rank 0 announces it, and what it measured.
#[derive(Debug)]
pub(super) struct Sums {
    mode: SumMode,
    /// Whether every rank adds all of them: for pilots and for queries.
    whole: [bool; 2],
    measured: [Measured; 2],
}

/// Seconds of the quickest shared rounds.
#[derive(Clone, Copy, Debug, Default)]
struct Measured {
    rounds: u32,
    leaf: f64,
    exchange: f64,
    decision: Option<bool>,
}

impl Sums {
    pub(super) fn new(mode: SumMode) -> Self {
        Self { mode, whole: [false; 2], measured: [Measured::default(); 2] }
    }

    fn at(phase: RoundPhase) -> usize {
        usize::from(phase == RoundPhase::Update)
    }

    pub(super) fn are_shared(&self, phase: RoundPhase) -> bool {
        !self.whole[Self::at(phase)]
    }

    /// What this rank would have all do from the next round on.
    pub(super) fn announcement(&self) -> u64 {
        let whole = |at: usize| match self.mode {
            SumMode::Scalars => true,
            SumMode::Gradients => false,
            SumMode::Auto => self.measured[at].decision.unwrap_or(false),
        };
        u64::from(whole(0)) | u64::from(whole(1)) << 1
    }

    /// Takes what rank 0 announced, as all ranks do after the same exchange.
    pub(super) fn announced(&mut self, statuses: &[Status]) {
        let is_about_sums = |status: &&Status| matches!(What::of(&status.what), What::Round(_) | What::Begin);
        if let Some(first) = statuses.first().filter(is_about_sums) {
            self.whole = [first.value & 1 != 0, first.value & 2 != 0];
        }
    }

    /// Notes the seconds of a shared round: of the jobs here, and of the exchange.
    pub(super) fn measured(&mut self, phase: RoundPhase, (ran, exchange): (f64, f64), (here, leaves): (usize, usize)) {
        let measured = &mut self.measured[Self::at(phase)];
        measured.rounds = measured.rounds.saturating_add(1);
        if here == 0 || measured.rounds == 1 {
            return;
        }
        let leaf = ran / here as f64;
        let quickest = |old: f64, new: f64| if measured.rounds == 2 { new } else { old.min(new) };
        (measured.leaf, measured.exchange) = (quickest(measured.leaf, leaf), quickest(measured.exchange, exchange));
        if measured.rounds == MEASURED + 1 {
            let cost = SumCost { leaf: seconds(measured.leaf), exchange: seconds(measured.exchange) };
            measured.decision = Some(cost.mode(leaves, leaves.div_ceil(here), 1) == SumMode::Scalars);
        }
    }
}

/// A time from seconds that were measured.
fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_that_cost_more_to_send_than_to_add_are_added_by_every_rank() {
        for (exchange, whole) in [(0.1, false), (10.0, true)] {
            let mut sums = Sums::new(SumMode::Auto);
            for _ in 0..=MEASURED {
                assert_eq!(sums.announcement(), 0);
                sums.measured(RoundPhase::Update, (4.0, exchange), (4, 8));
            }
            assert_eq!(sums.announcement(), if whole { 2 } else { 0 });
            let what = What::Begin.words();
            sums.announced(&[Status { what, value: 2, ..Status::default() }, Status { what, ..Status::default() }]);
            assert!(sums.are_shared(RoundPhase::PilotUpdate) && !sums.are_shared(RoundPhase::Update));
        }
    }
}
