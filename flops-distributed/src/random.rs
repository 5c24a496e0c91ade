//! Random bytes for tokens and names. Nothing that a run computes depends on them.

use std::io;

use crate::DistributedError;

/// Bytes from the system.
///
/// # Errors
/// Where it gives none.
pub(crate) fn bytes<const N: usize>() -> Result<[u8; N], DistributedError> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|why| DistributedError::Io {
        what: "the system gives no random bytes".into(),
        why: io::Error::other(why.to_string()),
    })?;
    Ok(bytes)
}

/// Bytes in hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
