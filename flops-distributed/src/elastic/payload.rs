//! What entries say: results, failures and the identity of a run.

use flops_executor::{JobFailure, RunIdentity};

use crate::wire::{push, sealed, take_text, take_u64, unsealed};

/// The result of a range of jobs, with the worker that ran them.
pub(super) fn result(worker: &str, packed: &[u8]) -> Vec<u8> {
    let mut bytes = vec![];
    push(&mut bytes, worker.as_bytes());
    bytes.extend(packed);
    sealed(&bytes)
}

pub(super) fn read_result(bytes: &[u8]) -> Option<(String, &[u8])> {
    let mut bytes = unsealed(bytes)?;
    Some((take_text(&mut bytes)?, bytes))
}

/// The failure of a job, with the worker that ran it.
pub(super) fn failure(worker: &str, failure: &JobFailure) -> Vec<u8> {
    let mut bytes = vec![failure.may_pass.into()];
    push(&mut bytes, worker.as_bytes());
    push(&mut bytes, failure.why.as_bytes());
    sealed(&bytes)
}

pub(super) fn read_failure(bytes: &[u8]) -> Option<(String, JobFailure)> {
    let (may_pass, mut bytes) = unsealed(bytes)?.split_first()?;
    let (worker, why) = (take_text(&mut bytes)?, take_text(&mut bytes)?);
    Some((worker, JobFailure { why, may_pass: *may_pass != 0 }))
}

/// What all workers must have in common; the weights and their step come first.
pub(super) fn identity(run: &RunIdentity) -> Vec<u8> {
    let mut bytes = [run.step.to_le_bytes(), run.weights.to_le_bytes()].concat();
    push(&mut bytes, run.version.as_bytes());
    for (name, value) in &run.settings {
        push(&mut bytes, name.as_bytes());
        push(&mut bytes, value.as_bytes());
    }
    sealed(&bytes)
}

pub(super) fn read_identity(bytes: &[u8]) -> Option<RunIdentity> {
    let mut bytes = unsealed(bytes)?;
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

/// The first thing in which a worker differs from the run: what, its value here and there.
pub(super) fn difference(here: &RunIdentity, there: &RunIdentity) -> Option<(String, String, String)> {
    if here.version != there.version {
        return Some(("the version of flops-core".into(), here.version.clone(), there.version.clone()));
    }
    let value = |run: &RunIdentity, name: &str| {
        let found = run.settings.iter().find(|(of, _)| of == name);
        found.map_or("not set".into(), |(_, value)| value.clone())
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
    fn payloads_are_read_as_they_are_written() {
        let identity_bytes = identity(&run("0.1", (3, 9)));
        assert_eq!(read_identity(&identity_bytes), Some(run("0.1", (3, 9))));
        let result_bytes = result("a-1", b"packed");
        assert_eq!(read_result(&result_bytes), Some(("a-1".into(), &b"packed"[..])));
        let why = JobFailure { why: "no memory".into(), may_pass: true };
        let failure_bytes = failure("a-1", &why);
        assert_eq!(read_failure(&failure_bytes), Some(("a-1".into(), why)));
        for bytes in [identity_bytes, result_bytes, failure_bytes] {
            for at in 0..bytes.len() {
                let cut = &bytes[..at];
                assert!(read_identity(cut).is_none() && read_result(cut).is_none() && read_failure(cut).is_none());
            }
        }
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
    }
}
