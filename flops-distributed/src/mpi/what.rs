//! What a rank is about to do, and how ranks that differ are told apart.

use std::fmt;

use flops_executor::{Round, RoundPhase};

/// What a rank is about to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum What {
    Begin,
    Broadcast,
    Leave,
    Round(Round),
    Verify(u64),
    Unknown,
}

impl What {
    pub(super) fn words(self) -> [u64; 5] {
        match self {
            Self::Unknown => [0; 5],
            Self::Begin => [1, 0, 0, 0, 0],
            Self::Broadcast => [2, 0, 0, 0, 0],
            Self::Leave => [3, 0, 0, 0, 0],
            Self::Verify(step) => [4, step, 0, 0, 0],
            Self::Round(round) => {
                let phase = RoundPhase::ALL.iter().position(|&phase| phase == round.phase).unwrap_or_default();
                [5 + phase as u64, round.step, round.further, round.digest, round.jobs as u64]
            }
        }
    }

    pub(super) fn of(&[kind, step, further, digest, jobs]: &[u64; 5]) -> Self {
        let phase = kind.checked_sub(5).and_then(|phase| RoundPhase::ALL.get(usize::try_from(phase).ok()?));
        match (kind, phase) {
            (1, _) => Self::Begin,
            (2, _) => Self::Broadcast,
            (3, _) => Self::Leave,
            (4, _) => Self::Verify(step),
            (_, Some(&phase)) => Self::Round(Round::new((step, further), phase, digest, jobs as usize)),
            _ => Self::Unknown,
        }
    }
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Begin => f.write_str("the beginning"),
            Self::Broadcast => f.write_str("a broadcast"),
            Self::Leave => f.write_str("the end"),
            Self::Verify(step) => write!(f, "the comparison before step {step}"),
            Self::Round(Round { step, further, phase, digest, jobs, .. }) => {
                write!(f, "step {step}+{further}, phase {}, {jobs} jobs, digest {digest:016x}", phase.name())
            }
            Self::Unknown => f.write_str("something unknown"),
        }
    }
}

/// The first rank whose value is not that of most ranks, or of the lowest among equals.
pub(super) fn odd_one(values: &[u64]) -> Option<usize> {
    let votes = |value: &u64| values.iter().filter(|other| *other == value).count();
    // the last of the largest, so ranks are passed backwards
    let most = values.iter().rev().max_by_key(|value| votes(value))?;
    values.iter().position(|value| value != most)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_rank_does_is_read_as_it_was_written() {
        for phase in RoundPhase::ALL {
            let round = What::Round(Round::new((7, 1), phase, u64::MAX, 64));
            assert_eq!(What::of(&round.words()), round);
        }
        for what in [What::Begin, What::Broadcast, What::Leave, What::Verify(300)] {
            assert_eq!(What::of(&what.words()), what);
        }
        for words in [[0; 5], [99, 0, 0, 0, 0], [u64::MAX; 5]] {
            assert_eq!(What::of(&words), What::Unknown);
        }
    }

    #[test]
    fn the_rank_that_differs_from_most_is_named() {
        assert_eq!(odd_one(&[5, 5, 5]), None);
        assert_eq!(odd_one(&[5, 5, 6]), Some(2));
        assert_eq!(odd_one(&[6, 5, 5]), Some(0));
        // of two, rank 0 sets the measure
        assert_eq!(odd_one(&[5, 6]), Some(1));
    }
}
