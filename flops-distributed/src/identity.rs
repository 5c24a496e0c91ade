//! What all workers of a run must have in common: as bytes, and how they differ.

use flops_executor::RunIdentity;

use crate::wire::{push, take_text, take_u64};

/// The bytes of an identity.
pub(crate) fn bytes(run: &RunIdentity) -> Vec<u8> {
    let mut bytes = [run.step.to_le_bytes(), run.weights.to_le_bytes()].concat();
    push(&mut bytes, run.version.as_bytes());
    for part in run.settings.iter().flat_map(|(name, value)| [name, value]) {
        push(&mut bytes, part.as_bytes());
    }
    bytes
}

/// The identity that bytes are of; nothing where they are of none.
pub(crate) fn read(mut bytes: &[u8]) -> Option<RunIdentity> {
    let (step, weights) = (take_u64(&mut bytes)?, take_u64(&mut bytes)?);
    let version = take_text(&mut bytes)?;
    let mut settings = vec![];
    while !bytes.is_empty() {
        settings.push((take_text(&mut bytes)?, take_text(&mut bytes)?));
    }
    let mut run = RunIdentity::new(settings, (step, weights));
    run.version = version;
    Some(run)
}

/// The first thing in which two workers differ: what, its value here and there. Weights of different
/// steps are not compared.
pub(crate) fn difference(here: &RunIdentity, there: &RunIdentity) -> Option<(String, String, String)> {
    if here.version != there.version {
        return Some(("the version of FLOPS".into(), here.version.clone(), there.version.clone()));
    }
    let value = |run: &RunIdentity, name: &str| {
        let found = run.settings.iter().find(|(of, _)| of == name);
        found.map_or_else(|| "not set".into(), |(_, value)| value.clone())
    };
    for (name, _) in here.settings.iter().chain(&there.settings) {
        let (here, there) = (value(here, name), value(there, name));
        if here != there {
            return Some((name.clone(), here, there));
        }
    }
    let differ = here.step == there.step && here.weights != there.weights;
    let hash = |run: &RunIdentity| format!("{:016x}", run.weights);
    differ.then(|| ("the hash of the first weights".into(), hash(here), hash(there)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(sigma: &str, at: (u64, u64)) -> RunIdentity {
        RunIdentity::new(vec![("space".into(), "weights".into()), ("sigma".into(), sigma.into())], at)
    }

    #[test]
    fn an_identity_is_read_as_it_was_written() {
        let one = run("0.1", (3, 9));
        let bytes = bytes(&one);
        assert_eq!(read(&bytes).as_ref(), Some(&one));
        assert!((0..bytes.len()).all(|len| read(&bytes[..len]).as_ref() != Some(&one)));
    }

    #[test]
    fn the_first_difference_is_named() {
        let here = run("0.1", (3, 9));
        assert_eq!(difference(&here, &run("0.1", (3, 9))), None);
        // weights of other steps are not comparable
        assert_eq!(difference(&here, &run("0.1", (4, 8))), None);
        let (what, value, _) = difference(&here, &run("0.1", (3, 8))).unwrap();
        assert!(what.contains("weights") && value.ends_with('9'));
        assert_eq!(difference(&here, &run("0.2", (3, 9))), Some(("sigma".into(), "0.1".into(), "0.2".into())));
        let mut more = run("0.1", (3, 9));
        more.settings.push(("rank".into(), "4".into()));
        assert_eq!(difference(&here, &more), Some(("rank".into(), "not set".into(), "4".into())));
        let mut other = here.clone();
        other.version = "0.0.1".into();
        assert_eq!(difference(&here, &other).unwrap().0, "the version of FLOPS");
    }
}
