//! Frames between the processes of a data plane: a head as JSON, and blobs.
//!
//! ```text
//! u32 length of the head │ u32 number of blobs │ u64 length of each blob │ head │ blobs
//! ```
//!
//! What is small and has many shapes is the head; rows are blobs. Numbers are little-endian. A reader
//! believes no length: memory is taken as bytes arrive.

use std::io::{self, Read, Write};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// No head is larger, so a larger length means that the other end speaks something else.
const MAX_HEAD: u32 = 256 << 20;
/// Of one frame.
const MAX_BLOBS: u32 = 1 << 20;
/// Of one blob.
const MAX_BLOB: u64 = 16 << 30;

fn wrong(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_string())
}

/// Writes one frame; the caller flushes.
pub fn write_frame(
    out: &mut impl Write,
    head: &impl Serialize,
    blobs: &[Vec<u8>],
) -> io::Result<()> {
    let head = serde_json::to_vec(head)?;
    let length = u32::try_from(head.len()).ok().filter(|l| *l <= MAX_HEAD);
    let count = u32::try_from(blobs.len()).ok().filter(|c| *c <= MAX_BLOBS);
    let (Some(length), Some(count)) = (length, count) else {
        return Err(wrong("a frame is too large"));
    };
    out.write_all(&length.to_le_bytes())?;
    out.write_all(&count.to_le_bytes())?;
    for blob in blobs {
        out.write_all(&(blob.len() as u64).to_le_bytes())?;
    }
    out.write_all(&head)?;
    for blob in blobs {
        out.write_all(blob)?;
    }
    Ok(())
}

/// Reads one frame. The end of the stream before it or inside of it is `UnexpectedEof`.
pub fn read_frame<T: DeserializeOwned>(input: &mut impl Read) -> io::Result<(T, Vec<Vec<u8>>)> {
    let length = read_u32(input)?;
    let count = read_u32(input)?;
    if length > MAX_HEAD || count > MAX_BLOBS {
        return Err(wrong("not a frame of this protocol"));
    }
    let mut lengths = Vec::new();
    for _ in 0..count {
        let mut bytes = [0; 8];
        input.read_exact(&mut bytes)?;
        let length = u64::from_le_bytes(bytes);
        if length > MAX_BLOB {
            return Err(wrong("not a frame of this protocol"));
        }
        lengths.push(length);
    }
    let head = read_bytes(input, u64::from(length))?;
    let head = serde_json::from_slice(&head)?;
    let mut blobs = Vec::with_capacity(lengths.len());
    for length in lengths {
        blobs.push(read_bytes(input, length)?);
    }
    Ok((head, blobs))
}

fn read_u32(input: &mut impl Read) -> io::Result<u32> {
    let mut bytes = [0; 4];
    input.read_exact(&mut bytes)?;
    Ok(u32::from_le_bytes(bytes))
}

fn read_bytes(input: &mut impl Read, length: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    input.by_ref().take(length).read_to_end(&mut bytes)?;
    if bytes.len() as u64 != length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    type Head = Vec<(String, i64)>;

    fn sample() -> (Head, Vec<Vec<u8>>) {
        let head = vec![("a".to_string(), i64::MIN), ("ü\"\n".to_string(), i64::MAX)];
        (head, vec![Vec::new(), vec![0, 255, 7], vec![1; 70_000]])
    }

    #[test]
    fn frames_follow_each_other() {
        let (head, blobs) = sample();
        let mut bytes = Vec::new();
        write_frame(&mut bytes, &head, &blobs).expect("memory takes everything");
        write_frame(&mut bytes, &Head::new(), &[]).expect("memory takes everything");
        let mut input = bytes.as_slice();
        let first: (Head, _) = read_frame(&mut input).expect("a frame");
        assert_eq!(first, (head, blobs));
        let second: (Head, _) = read_frame(&mut input).expect("a frame");
        assert_eq!(second, (Head::new(), Vec::new()));
        assert!(input.is_empty());
    }

    #[test]
    fn a_frame_that_was_cut_is_no_frame() {
        let (head, blobs) = sample();
        let mut bytes = Vec::new();
        write_frame(&mut bytes, &head, &blobs).expect("memory takes everything");
        for length in (0..80).chain([bytes.len() - 1]) {
            let cut: io::Result<(Head, _)> = read_frame(&mut &bytes[..length]);
            let error = cut.expect_err("something is missing");
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{length}");
        }
    }

    #[test]
    fn lengths_are_not_believed() {
        // Another protocol on this port.
        let other: io::Result<(Head, _)> = read_frame(&mut &b"GET / HTTP/1.1\r\n\r\n"[..]);
        assert_eq!(
            other.expect_err("not ours").kind(),
            io::ErrorKind::InvalidData
        );
        // A head of 200 MB is announced, a few bytes come.
        let mut bytes = (200_u32 << 20).to_le_bytes().to_vec();
        bytes.extend_from_slice(&[0; 12]);
        let short: io::Result<(Head, _)> = read_frame(&mut bytes.as_slice());
        assert_eq!(short.expect_err("cut").kind(), io::ErrorKind::UnexpectedEof);
    }
}
