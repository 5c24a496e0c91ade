//! Bytes of messages: lengths, numbers, text and checksums.

/// A hash that tells damage. It is no protection against one who makes messages on purpose.
pub(crate) fn checksum(bytes: &[u8]) -> u64 {
    let mix = |hash: u64, word: u64| (hash ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    let words = bytes.chunks_exact(8);
    let mut last = [0; 8];
    last[..words.remainder().len()].copy_from_slice(words.remainder());
    let hash =
        words.fold(bytes.len() as u64, |hash, word| mix(hash, u64::from_le_bytes(word.try_into().unwrap_or(last))));
    let hash = mix(hash, u64::from_le_bytes(last));
    (hash ^ hash >> 32).wrapping_mul(0xd6e8_feb8_6659_fd93)
}

/// Appends a part whose length is told.
pub(crate) fn push(to: &mut Vec<u8>, part: &[u8]) {
    to.extend((part.len() as u64).to_le_bytes());
    to.extend(part);
}

/// Takes a number from the front.
pub(crate) fn take_u64(from: &mut &[u8]) -> Option<u64> {
    let (number, rest) = from.split_first_chunk()?;
    *from = rest;
    Some(u64::from_le_bytes(*number))
}

/// Takes a part whose length is told.
pub(crate) fn take<'a>(from: &mut &'a [u8]) -> Option<&'a [u8]> {
    let len = usize::try_from(take_u64(from)?).ok()?;
    let (part, rest) = from.split_at_checked(len)?;
    *from = rest;
    Some(part)
}

/// Takes text whose length is told.
pub(crate) fn take_text(from: &mut &[u8]) -> Option<String> {
    String::from_utf8(take(from)?.to_vec()).ok()
}

/// The bytes of some parts, before which their checksum stands.
pub(crate) fn sealed(parts: &[&[u8]]) -> Vec<u8> {
    let mut whole = [&[&[0; 8][..]], parts].concat().concat();
    let (sum, bytes) = whole.split_at_mut(8);
    sum.copy_from_slice(&checksum(bytes).to_le_bytes());
    whole
}

/// The bytes after a checksum, if they are what it says.
pub(crate) fn unsealed(mut whole: &[u8]) -> Option<&[u8]> {
    let sum = take_u64(&mut whole)?;
    (sum == checksum(whole)).then_some(whole)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_read_as_they_are_written() {
        let mut bytes = vec![];
        push(&mut bytes, b"part");
        push(&mut bytes, b"");
        for len in 0..bytes.len() {
            let mut short = &bytes[..len];
            assert!(take(&mut short).is_none() || take(&mut short).is_none());
        }
        let mut all = &bytes[..];
        assert_eq!((take_text(&mut all).as_deref(), take(&mut all), all), (Some("part"), Some(&b""[..]), &b""[..]));
        let mut huge = &[0xff; 16][..];
        assert_eq!(take(&mut huge), None);
    }

    #[test]
    fn damage_is_told() {
        for len in [0, 1, 7, 8, 9, 64, 65] {
            let whole = sealed(&[&vec![0; len / 2], &vec![0; len - len / 2]]);
            assert_eq!(unsealed(&whole), Some(&vec![0; len][..]));
            for at in 0..whole.len() {
                let mut damaged = whole.clone();
                damaged[at] ^= 1;
                assert_eq!(unsealed(&damaged), None);
            }
            assert_eq!(unsealed(&whole[..whole.len() - 1]), None);
            assert_eq!(unsealed(&[&whole[..], &[0]].concat()), None);
        }
    }
}
