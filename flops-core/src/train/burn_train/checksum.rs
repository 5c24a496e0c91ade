//! Checksums at the end of files, so that a file that was damaged is not taken for a whole one.
//!
//! The content is followed by 8 bytes that mark the checksum, and by SHA-256 over the content.
//! MessagePack says where it ends, so Burn's own recorders read the content and ignore the rest.

use sha2::{Digest, Sha256};

const MARK: &[u8; 8] = b"flopsSHA";
/// Bytes of the mark and the checksum.
const LENGTH: usize = MARK.len() + 32;

/// What is wrong with the end of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChecksumError {
    /// There is no checksum.
    #[error("it has no checksum at its end: it was cut short, or another program or version wrote it")]
    Absent,
    /// The content is not that of the checksum.
    #[error("its checksum does not match: it is damaged")]
    Mismatch,
}

/// Appends the checksum of `content`.
pub(super) fn append(content: &mut Vec<u8>) {
    let checksum = Sha256::digest(&content);
    content.extend(MARK);
    content.extend(checksum);
}

/// Returns the content in front of its checksum.
///
/// # Errors
/// If there is no checksum, or it does not match.
pub(super) fn checked(bytes: &[u8]) -> Result<&[u8], ChecksumError> {
    let at = bytes.len().checked_sub(LENGTH).ok_or(ChecksumError::Absent)?;
    let (content, end) = bytes.split_at(at);
    let checksum = end.strip_prefix(MARK).ok_or(ChecksumError::Absent)?;
    if Sha256::digest(content)[..] != *checksum {
        return Err(ChecksumError::Mismatch);
    }
    Ok(content)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flipped_bit_and_every_cut_is_found() {
        let mut whole = b"content".to_vec();
        append(&mut whole);
        assert_eq!(checked(&whole), Ok(&b"content"[..]));
        for bit in 0..8 * whole.len() {
            let mut damaged = whole.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(checked(&damaged).is_err(), "bit {bit}");
        }
        for length in 0..whole.len() {
            assert!(checked(&whole[..length]).is_err(), "{length} bytes");
        }
        assert_eq!(checked(b"content"), Err(ChecksumError::Absent));
    }

    /// FIPS 180-4's example: SHA-256 of "abc".
    #[test]
    fn the_checksum_is_sha_256() {
        let mut whole = b"abc".to_vec();
        append(&mut whole);
        let hex: String = whole[3 + MARK.len()..].iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }
}
