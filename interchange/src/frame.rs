//! Finds records in a stream of bytes.
//!
//! # Contract
//!
//! * Every byte belongs to one record or to a separator; blank lines are separators.
//! * A record is never longer than [`RECORD_MAX`]: what has no end by then is cut there and handed
//!   out as too long, so that one missing quote or newline cannot take the memory or the whole file.

/// Longest record.
pub const RECORD_MAX: usize = 16 << 20;

/// How records are told apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// One record per line, as in JSON lines.
    Lines,
    /// RFC 4180: a quoted field may hold line breaks.
    Csv { delimiter: u8 },
}

/// The front of a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Frame {
    /// A record of `length` bytes; the next one begins `used` bytes on.
    Record { length: usize, used: usize },
    /// A record that has no end within [`RECORD_MAX`]; reading goes on `used` bytes on.
    TooLong { used: usize },
    /// No complete record: read more, or, at the end of input, stop.
    More,
}

impl Framing {
    /// The record at the front of `buffer`; `end` says that no more bytes follow.
    pub fn next(&self, buffer: &[u8], end: bool) -> Frame {
        let stop = match self {
            Self::Lines => find(buffer, b'\n'),
            Self::Csv { delimiter } => csv_end(buffer, *delimiter),
        };
        match stop {
            Some(length) if length <= RECORD_MAX => Frame::Record {
                length,
                used: length + 1,
            },
            Some(_) => Frame::TooLong {
                used: first_line(buffer),
            },
            None if buffer.len() > RECORD_MAX => Frame::TooLong {
                used: first_line(buffer),
            },
            None if end && !buffer.is_empty() => {
                // A quote without an end: give up its first line only.
                let length = match self {
                    Self::Lines => buffer.len(),
                    Self::Csv { .. } => find(buffer, b'\n').unwrap_or(buffer.len()),
                };
                Frame::Record {
                    length,
                    used: (length + 1).min(buffer.len()),
                }
            }
            None => Frame::More,
        }
    }
}

/// Where to go on after a record without an end.
fn first_line(buffer: &[u8]) -> usize {
    find(buffer, b'\n').map_or(buffer.len(), |newline| newline + 1)
}

/// The line break that ends a CSV record. A quote opens a field only at its beginning.
fn csv_end(buffer: &[u8], delimiter: u8) -> Option<usize> {
    let mut field_start = true;
    let mut at = 0;
    while at < buffer.len() {
        let byte = buffer[at];
        if byte == b'"' && field_start {
            at += 1 + find(&buffer[at + 1..], b'"')?;
            // A doubled quote opens the field again.
            while buffer.get(at + 1) == Some(&b'"') {
                at += 2 + find(buffer.get(at + 2..)?, b'"')?;
            }
            field_start = false;
        } else if byte == b'\n' {
            return Some(at);
        } else {
            field_start = byte == delimiter;
        }
        at += 1;
    }
    None
}

/// The first place of `byte`, eight bytes at a time.
pub(crate) fn find(text: &[u8], byte: u8) -> Option<usize> {
    const ONES: u64 = 0x0101_0101_0101_0101;
    const HIGH: u64 = 0x8080_8080_8080_8080;
    let wanted = ONES * u64::from(byte);
    let mut at = 0;
    while let Some(chunk) = text[at..].first_chunk::<8>() {
        let word = u64::from_le_bytes(*chunk) ^ wanted;
        // The lowest high bit set is that of the first zero byte.
        let hits = word.wrapping_sub(ONES) & !word & HIGH;
        if hits != 0 {
            return Some(at + hits.trailing_zeros() as usize / 8);
        }
        at += 8;
    }
    text[at..]
        .iter()
        .position(|b| *b == byte)
        .map(|tail| at + tail)
}

/// A record without the carriage return that may end it.
pub fn trim_line(record: &[u8]) -> &[u8] {
    record.strip_suffix(b"\r").unwrap_or(record)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frames(framing: Framing, mut text: &[u8]) -> Vec<String> {
        let mut records = Vec::new();
        loop {
            match framing.next(text, true) {
                Frame::Record { length, used } => {
                    records.push(String::from_utf8_lossy(trim_line(&text[..length])).into_owned());
                    text = &text[used..];
                }
                Frame::TooLong { used } => {
                    records.push(format!("too long: {used}"));
                    text = &text[used..];
                }
                Frame::More => return records,
            }
        }
    }

    #[test]
    fn records_and_their_ends() {
        assert_eq!(frames(Framing::Lines, b"a\r\nb\n\nc"), ["a", "b", "", "c"]);
        let csv = Framing::Csv { delimiter: b',' };
        assert_eq!(
            frames(
                csv,
                b"1,\"two\nlines, \"\"quoted\"\"\",3\r\n\"\"\n4,it\"s,\n"
            ),
            ["1,\"two\nlines, \"\"quoted\"\"\",3", "\"\"", "4,it\"s,"]
        );
        // An open quote costs its line, not the file.
        assert_eq!(
            frames(csv, b"1,\"open\n2,x\n3,y"),
            ["1,\"open", "2,x", "3,y"]
        );
        assert_eq!(Framing::Lines.next(b"abc", false), Frame::More);
        let long = [vec![b'x'; RECORD_MAX + 1], b"\nnext\n".to_vec()].concat();
        assert_eq!(
            frames(Framing::Lines, &long),
            ["too long: 16777218", "next"]
        );
    }
}
