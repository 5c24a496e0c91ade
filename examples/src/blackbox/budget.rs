//! How the cap on queries is divided between evaluations, steps and requests that are sent again.

/// The queries of a run that evaluates, trains and evaluates again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// The most queries of the run.
    pub cap: u64,
    /// Queries of an evaluation.
    pub evaluation: u64,
    /// The most queries of a step.
    pub step: u64,
    /// Whether a request that is sent again may be charged again.
    pub charged_again: bool,
}

impl Budget {
    /// Returns the queries that no step is planned for: a tenth of the cap, where requests that are
    /// sent again may be charged again, otherwise none. It takes nothing from the first step.
    pub fn reserve(&self) -> u64 {
        let first = self.evaluation.saturating_mul(2).saturating_add(self.step);
        if self.charged_again { (self.cap / 10).min(self.cap.saturating_sub(first)) } else { 0 }
    }

    /// Returns the steps that the cap pays for, besides two evaluations and the reserve.
    pub fn steps(&self) -> u64 {
        let kept = self.evaluation.saturating_mul(2).saturating_add(self.reserve());
        self.cap.saturating_sub(kept) / self.step.max(1)
    }

    /// Returns the queries that training leaves to the last evaluation: its own, and half of the
    /// reserve.
    pub fn held_back(&self) -> u64 {
        self.evaluation.saturating_add(self.reserve() / 2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_and_evaluations_and_the_reserve_fit_into_the_cap() {
        for charged_again in [false, true] {
            for (cap, evaluation, step) in [(20_000, 320, 160), (184, 12, 20), (400, 12, 20), (24, 12, 1), (0, 1, 1)] {
                let budget = Budget { cap, evaluation, step, charged_again };
                let planned = 2 * evaluation + budget.steps() * step + budget.reserve();
                assert!(budget.steps() == 0 || planned <= cap && planned + step > cap, "{budget:?}");
                // a run without failures never meets what is held back
                let before_the_last = evaluation + budget.steps() * step;
                assert!(budget.steps() == 0 || before_the_last + budget.held_back() <= cap, "{budget:?}");
            }
        }
    }

    #[test]
    fn queries_that_are_charged_once_need_no_reserve() {
        let budget = Budget { cap: 20_000, evaluation: 320, step: 160, charged_again: false };
        assert_eq!((budget.steps(), budget.reserve(), budget.held_back()), (121, 0, 320));
        let budget = Budget { charged_again: true, ..budget };
        assert_eq!((budget.steps(), budget.reserve(), budget.held_back()), (108, 2000, 1320));
        // a cap for one step has no reserve, and room for that step
        let small = Budget { cap: 44, evaluation: 12, step: 20, charged_again: true };
        assert_eq!((small.steps(), small.reserve(), small.held_back()), (1, 0, 12));
        let absurd = Budget { cap: u64::MAX, evaluation: u64::MAX, step: u64::MAX, charged_again: true };
        assert_eq!((absurd.steps(), absurd.held_back()), (0, u64::MAX));
    }
}
