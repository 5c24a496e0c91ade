//! What entries say: results and failures.

use flops_executor::JobFailure;

use crate::wire::{push, sealed, take_text, unsealed};

/// The result of a range of jobs, with the worker that ran them.
pub(super) fn result(worker: &str, packed: &[u8]) -> Vec<u8> {
    let mut head = vec![];
    push(&mut head, worker.as_bytes());
    sealed(&[&head, packed])
}

/// What tells a result from others of its range: its checksum.
pub(super) fn seal(bytes: &[u8]) -> Option<&[u8; 8]> {
    bytes.first_chunk()
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
    sealed(&[&bytes])
}

pub(super) fn read_failure(bytes: &[u8]) -> Option<(String, JobFailure)> {
    let (may_pass, mut bytes) = unsealed(bytes)?.split_first()?;
    let (worker, why) = (take_text(&mut bytes)?, take_text(&mut bytes)?);
    Some((worker, JobFailure { why, may_pass: *may_pass != 0 }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn payloads_are_read_as_they_are_written() {
        let result_bytes = result("a-1", b"packed");
        assert_eq!(read_result(&result_bytes), Some(("a-1".into(), &b"packed"[..])));
        let why = JobFailure { why: "no memory".into(), may_pass: true };
        let failure_bytes = failure("a-1", &why);
        assert_eq!(read_failure(&failure_bytes), Some(("a-1".into(), why)));
        for bytes in [result_bytes, failure_bytes] {
            for at in 0..bytes.len() {
                let cut = &bytes[..at];
                assert!(read_result(cut).is_none() && read_failure(cut).is_none());
            }
        }
    }
}
