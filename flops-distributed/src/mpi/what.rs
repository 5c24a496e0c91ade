//! What a rank is about to do, and how ranks that differ are told apart.

use std::fmt;

use flops_executor::{Round, RoundPhase, RunIdentity};

use crate::wire;

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

/// The bytes of an identity.
pub(super) fn identity_bytes(run: &RunIdentity) -> Vec<u8> {
    let mut bytes = [run.weights.to_le_bytes(), run.step.to_le_bytes()].concat();
    wire::push(&mut bytes, run.version.as_bytes());
    for part in run.settings.iter().flat_map(|(name, value)| [name, value]) {
        wire::push(&mut bytes, part.as_bytes());
    }
    bytes
}

pub(super) fn read_identity(mut bytes: &[u8]) -> Option<RunIdentity> {
    let (weights, step) = (wire::take_u64(&mut bytes)?, wire::take_u64(&mut bytes)?);
    let version = wire::take_text(&mut bytes)?;
    let mut settings = vec![];
    while !bytes.is_empty() {
        settings.push((wire::take_text(&mut bytes)?, wire::take_text(&mut bytes)?));
    }
    let mut run = RunIdentity::new(settings, (step, weights));
    run.version = version;
    Some(run)
}

/// What differs between two identities, and both values.
pub(super) fn difference(here: &RunIdentity, there: &RunIdentity) -> (String, String, String) {
    if here.version != there.version {
        return ("the version of flops-core".into(), here.version.clone(), there.version.clone());
    }
    let value = |run: &RunIdentity, name: &str| {
        let found = run.settings.iter().find(|(other, _)| other == name);
        found.map_or_else(|| "not set".into(), |(_, value)| value.clone())
    };
    for (name, _) in here.settings.iter().chain(&there.settings) {
        let (mine, theirs) = (value(here, name), value(there, name));
        if mine != theirs {
            return (format!("the setting {name}"), mine, theirs);
        }
    }
    if here.step != there.step {
        return ("the first step".into(), here.step.to_string(), there.step.to_string());
    }
    if here.weights != there.weights {
        let hash = |run: &RunIdentity| format!("{:016x}", run.weights);
        return ("the hash of the weights".into(), hash(here), hash(there));
    }
    let names = |run: &RunIdentity| run.settings.iter().map(|(name, _)| &name[..]).collect::<Vec<_>>().join(", ");
    ("the order of the settings".into(), names(here), names(there))
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
    fn an_identity_is_read_as_it_was_written_and_what_differs_is_named() {
        let run = |sigma: &str, step, weights| {
            let settings = [("space", "weights"), ("sigma", sigma)].map(|(name, value)| (name.into(), value.into()));
            RunIdentity::new(settings.into(), (step, weights))
        };
        let one = run("0.1", 3, 9);
        let bytes = identity_bytes(&one);
        assert_eq!(read_identity(&bytes).as_ref(), Some(&one));
        assert!((0..bytes.len()).all(|len| read_identity(&bytes[..len]).as_ref() != Some(&one)));
        let named = |other: &RunIdentity| difference(&one, other);
        assert_eq!(named(&run("0.2", 3, 9)), ("the setting sigma".into(), "0.1".into(), "0.2".into()));
        assert_eq!(named(&run("0.1", 4, 9)), ("the first step".into(), "3".into(), "4".into()));
        assert_eq!(named(&run("0.1", 3, 8)).0, "the hash of the weights");
        let mut short = run("0.1", 3, 9);
        short.settings.pop();
        assert_eq!(named(&short), ("the setting sigma".into(), "0.1".into(), "not set".into()));
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
