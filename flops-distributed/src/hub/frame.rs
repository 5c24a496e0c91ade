//! Frames: what goes over a connection of the hub.

use std::io::{self, ErrorKind, Read, Write};

use crate::wire::checksum;

/// Version of the frames.
const VERSION: u8 = 1;
/// Version, kind, lengths of head and body, checksum.
const HEADER: usize = 1 + 1 + 2 + 8 + 8;
/// The longest head: a key, a name or a reason.
const MAX_HEAD: usize = 512;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    /// To the hub, first: the name as head, the token as body.
    Hello,
    /// To the hub: a key and its bytes.
    Put,
    /// To the hub: entries before a step may go.
    Trim,
    /// To the hub: a step and the checkpoint before it. From the hub: the same, or an empty head.
    Checkpoint,
    /// To the hub: which is the latest checkpoint?
    GetCheckpoint,
    /// To the hub: the worker leaves as planned.
    Bye,
    /// From the hub: the name that the worker has from now on.
    Welcome,
    /// From the hub: an entry of the log.
    Entry,
    /// From the hub: the entry is the first.
    First,
    /// From the hub: there is one already; or a request was carried out.
    Done,
    /// From the hub: no, with the reason as head.
    Refused,
}

impl Kind {
    const ALL: [Self; 11] = [
        Self::Hello,
        Self::Put,
        Self::Trim,
        Self::Checkpoint,
        Self::GetCheckpoint,
        Self::Bye,
        Self::Welcome,
        Self::Entry,
        Self::First,
        Self::Done,
        Self::Refused,
    ];
}

/// A frame that was read.
#[derive(Debug)]
pub(super) struct Frame {
    pub(super) kind: Kind,
    pub(super) head: String,
    pub(super) body: Vec<u8>,
}

impl Frame {
    /// The bytes that it took.
    pub(super) fn len(&self) -> u64 {
        (HEADER + self.head.len() + self.body.len()) as u64
    }
}

/// Writes a frame and returns its length.
pub(super) fn write(to: &mut impl Write, kind: Kind, head: &str, body: &[u8]) -> io::Result<u64> {
    let mut header = vec![VERSION, kind as u8];
    header.extend((head.len() as u16).to_le_bytes());
    header.extend((body.len() as u64).to_le_bytes());
    let sum = sum(&header, head.as_bytes(), body);
    header.extend(sum.to_le_bytes());
    header.extend(head.as_bytes());
    to.write_all(&header)?;
    to.write_all(body)?;
    Ok((header.len() + body.len()) as u64)
}

/// Reads a frame with a body of at most `max` bytes. Memory grows with what arrives, and not with what
/// is announced.
pub(super) fn read(from: &mut impl Read, max: u64) -> io::Result<Frame> {
    let hostile = |why: String| io::Error::new(ErrorKind::InvalidData, why);
    let mut header = [0; HEADER];
    from.read_exact(&mut header)?;
    let [version, kind, ref lengths @ ..] = header;
    if version != VERSION {
        return Err(hostile(format!("frames of version {version}, not {VERSION}")));
    }
    let kind = *Kind::ALL.get(usize::from(kind)).ok_or_else(|| hostile(format!("a frame of kind {kind}")))?;
    let head_len = usize::from(u16::from_le_bytes([lengths[0], lengths[1]]));
    let number = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| lengths[at + i]));
    let (len, told) = (number(2), number(10));
    if head_len > MAX_HEAD || len > max {
        return Err(hostile(format!("a frame of {head_len} and {len} bytes")));
    }
    let mut head = vec![0; head_len];
    from.read_exact(&mut head)?;
    let mut body = vec![];
    if from.take(len).read_to_end(&mut body)? as u64 != len {
        return Err(ErrorKind::UnexpectedEof.into());
    }
    if sum(&header[..HEADER - 8], &head, &body) != told {
        return Err(hostile("a damaged frame".into()));
    }
    let head = String::from_utf8(head).map_err(|_| hostile("a head that is no text".into()))?;
    Ok(Frame { kind, head, body })
}

fn sum(header: &[u8], head: &[u8], body: &[u8]) -> u64 {
    checksum(&[header, head, &checksum(body).to_le_bytes()].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_read_as_they_are_written() {
        for (index, kind) in Kind::ALL.into_iter().enumerate() {
            assert_eq!(kind as usize, index);
            let mut bytes = vec![];
            let len = write(&mut bytes, kind, "head", &[1, 2, 3]).unwrap();
            let frame = read(&mut &bytes[..], 3).unwrap();
            assert_eq!((frame.kind, frame.head.as_str(), &frame.body[..]), (kind, "head", &[1, 2, 3][..]));
            assert_eq!((frame.len(), bytes.len() as u64), (len, len));
        }
    }

    #[test]
    fn a_frame_that_is_cut_damaged_or_too_long_is_an_error() {
        let mut bytes = vec![];
        write(&mut bytes, Kind::Put, "a key", &[7; 20]).unwrap();
        assert!(read(&mut &bytes[..], 19).unwrap_err().to_string().contains("20 bytes"));
        for at in 0..bytes.len() {
            assert!(read(&mut &bytes[..at], 20).is_err());
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x40;
            assert!(read(&mut &damaged[..], u64::MAX).is_err(), "byte {at}");
        }
    }
}
