//! What a message of a log holds: an entry, or where the parts of a large one are.

use crate::wire;

/// What names a message: its writer, and a number that the writer gives.
pub(super) type Id = [u8; 16];

/// Bytes of a message beside those of an entry.
pub(super) const HEAD: usize = 17;

/// What a message holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Envelope<'a> {
    /// An entry.
    Whole(Id, &'a [u8]),
    /// The parts of an entry, which were written before.
    Parts(Id, Parts),
    /// Nothing that a worker writes.
    Foreign(&'a [u8]),
}

/// The parts of a large entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Parts {
    /// Bytes of the entry.
    pub bytes: u64,
    /// The number of its parts.
    pub count: u64,
    /// The checksum of the entry.
    pub checksum: u64,
}

impl<'a> Envelope<'a> {
    pub fn read(message: &'a [u8]) -> Self {
        Self::known(message).unwrap_or(Self::Foreign(message))
    }

    fn known(message: &'a [u8]) -> Option<Self> {
        let (&kind, rest) = message.split_first()?;
        let (id, mut rest) = rest.split_first_chunk()?;
        match kind {
            b'E' => Some(Self::Whole(*id, rest)),
            b'P' => {
                let (bytes, count) = (wire::take_u64(&mut rest)?, wire::take_u64(&mut rest)?);
                let parts = Parts { bytes, count, checksum: wire::take_u64(&mut rest)? };
                // a part has a byte at least
                (rest.is_empty() && count <= bytes).then_some(Self::Parts(*id, parts))
            }
            _ => None,
        }
    }

    pub fn write(self) -> Vec<u8> {
        match self {
            Self::Whole(id, bytes) => [b"E", &id[..], bytes].concat(),
            Self::Parts(id, Parts { bytes, count, checksum }) => {
                let numbers = [bytes, count, checksum].map(u64::to_le_bytes);
                [b"P", &id[..], numbers.as_flattened()].concat()
            }
            Self::Foreign(message) => message.into(),
        }
    }

    /// What names the message, if a worker wrote it.
    pub fn id(self) -> Option<Id> {
        match self {
            Self::Whole(id, _) | Self::Parts(id, _) => Some(id),
            Self::Foreign(_) => None,
        }
    }
}

/// An id as part of a subject.
pub(super) fn hex(id: &Id) -> String {
    format!("{:032x}", u128::from_be_bytes(*id))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_read_as_they_are_written_and_others_are_foreign() {
        let id = [7; 16];
        let parts = Envelope::Parts(id, Parts { bytes: 1 << 40, count: 9, checksum: 3 });
        for envelope in [Envelope::Whole(id, b"entry"), Envelope::Whole(id, b""), parts] {
            let message = envelope.write();
            assert_eq!(Envelope::read(&message), envelope);
            assert_eq!(envelope.id(), Some(id));
        }
        let whole = Envelope::Whole(id, b"").write();
        assert_eq!(whole.len(), HEAD);
        let parts = parts.write();
        for foreign in [&b""[..], b"x", &whole[..HEAD - 1], &parts[..parts.len() - 1], &[&parts[..], b"x"].concat()] {
            assert_eq!(Envelope::read(foreign), Envelope::Foreign(foreign));
        }
        // more parts than bytes
        let absurd = Envelope::Parts(id, Parts { bytes: 3, count: u64::MAX, checksum: 0 }).write();
        assert_eq!(Envelope::read(&absurd).id(), None);
        assert_eq!(hex(&id), "07".repeat(16));
    }
}
