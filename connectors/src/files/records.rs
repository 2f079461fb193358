//! One file of records, JSON lines or CSV, from an offset on.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use millrace_dataflow::error::{Error, ErrorKind, Result};
use millrace_dataflow::source::{Digest, Rejected};
use millrace_interchange::format::{Decoded, Decoder, Layout};
use millrace_interchange::frame::{Frame, Framing, RECORD_MAX, trim_line};
use millrace_interchange::{csv, json};

use super::{FileFormat, open_file};

/// Read at once.
const BLOCK: usize = 1 << 20;
/// What is kept of a record that has no end.
const REJECTED_MAX: usize = 64 << 10;

pub(super) struct RecordFile {
    pieces: Pieces,
    decoder: Box<dyn Decoder>,
    /// Records used up.
    offset: u64,
}

/// A file cut into records.
struct Pieces {
    path: PathBuf,
    file: File,
    framing: Framing,
    /// Bytes of the file; those before `from` are used up.
    buffer: Vec<u8>,
    from: usize,
    ended: bool,
    /// Within a line that was too long, up to its end.
    skipping: bool,
}

/// Some consecutive records.
pub(super) struct Records {
    pub(super) decoded: Decoded,
    pub(super) rejected: Vec<Rejected>,
    pub(super) bytes: u64,
    pub(super) digest: u64,
}

/// The next piece of a file.
enum Piece {
    /// A record, at this place of the buffer.
    Record(std::ops::Range<usize>),
    TooLong(std::ops::Range<usize>),
    End,
}

impl RecordFile {
    pub(super) fn open(
        path: &Path,
        layout: &Layout,
        format: FileFormat,
        skip: u64,
    ) -> Result<Self> {
        let mut pieces = Pieces {
            path: path.to_path_buf(),
            file: open_file(path)?,
            framing: format.framing(),
            buffer: Vec::new(),
            from: 0,
            ended: false,
            skipping: false,
        };
        let decoder = match format {
            FileFormat::Csv(options) if options.header => {
                let header = match pieces.next()? {
                    Piece::Record(place) => &pieces.buffer[place],
                    _ => &[],
                };
                let header = header.strip_prefix(b"\xef\xbb\xbf").unwrap_or(header);
                csv::decoder(layout, options, Some(trim_line(header)))?
            }
            FileFormat::Csv(options) => csv::decoder(layout, options, None)?,
            _ => json::decoder(layout)?,
        };
        let mut this = Self {
            pieces,
            decoder,
            offset: 0,
        };
        while this.offset < skip {
            if let Piece::End = this.pieces.next()? {
                return Err(Error::new(
                    ErrorKind::Corrupt,
                    format!("file \"{}\" has become shorter", path.display()),
                )
                .detail(format!(
                    "it holds {} records, {skip} were read before",
                    this.offset
                ))
                .hint("a source over files reads each file once; new data belongs in new files"));
            }
            this.offset += 1;
        }
        Ok(this)
    }

    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    /// Up to `most` records; `None` at the end of the file.
    pub(super) fn next_records(&mut self, split: &str, most: u64) -> Result<Option<Records>> {
        let mut rejected = Vec::new();
        let mut bytes = 0;
        let mut digest = Digest::default();
        let begin = self.offset;
        while self.offset - begin < most && bytes < 16 * BLOCK as u64 {
            let (place, too_long) = match self.pieces.next()? {
                Piece::Record(place) => (place, false),
                Piece::TooLong(place) => (place, true),
                Piece::End => break,
            };
            bytes += place.len() as u64 + 1;
            let record = trim_line(&self.pieces.buffer[place]);
            // How much of one that is too long is at hand depends on the blocks that were read.
            let known = if too_long { REJECTED_MAX } else { usize::MAX };
            digest.add(self.offset, &record[..record.len().min(known)]);
            let (record, reason) = if too_long {
                let kept = &record[..record.len().min(REJECTED_MAX)];
                (
                    kept,
                    Some(format!("record is longer than {} MiB", RECORD_MAX >> 20)),
                )
            } else {
                (
                    record,
                    self.decoder.push(record).err().map(|reject| reject.0),
                )
            };
            if let Some(reason) = reason {
                let (split, offset, bytes) = (split.to_string(), self.offset, record.to_vec());
                rejected.push(Rejected {
                    split,
                    offset,
                    bytes,
                    reason,
                });
            }
            self.offset += 1;
        }
        if self.offset == begin {
            return Ok(None);
        }
        Ok(Some(Records {
            decoded: self.decoder.finish()?,
            rejected,
            bytes,
            digest: digest.take(split),
        }))
    }
}

impl Pieces {
    /// Finds the next piece, reading as needed. Blank lines are no records.
    fn next(&mut self) -> Result<Piece> {
        loop {
            if self.skipping {
                self.skip_line()?;
            }
            let from = self.from;
            let (length, used, too_long) = match self.framing.next(&self.buffer[from..], self.ended)
            {
                Frame::Record { length, used } => (length, used, false),
                Frame::TooLong { used } => (used, used, true),
                Frame::More if self.ended => return Ok(Piece::End),
                Frame::More => {
                    self.read()?;
                    continue;
                }
            };
            self.from += used;
            let place = from..from + length;
            if too_long {
                self.skipping = self.buffer[self.from - 1] != b'\n';
                return Ok(Piece::TooLong(place));
            }
            if !trim_line(&self.buffer[place.clone()]).is_empty() {
                return Ok(Piece::Record(place));
            }
        }
    }

    /// Leaves out the rest of a line.
    fn skip_line(&mut self) -> Result<()> {
        while self.skipping {
            match self.buffer[self.from..].iter().position(|b| *b == b'\n') {
                Some(end) => {
                    self.from += end + 1;
                    self.skipping = false;
                }
                None => {
                    self.from = self.buffer.len();
                    self.skipping = !self.ended;
                    if self.skipping {
                        self.read()?;
                    }
                }
            }
        }
        Ok(())
    }

    fn read(&mut self) -> Result<()> {
        self.buffer.drain(..self.from);
        self.from = 0;
        let mut block = (&mut self.file).take(BLOCK as u64);
        let read = block.read_to_end(&mut self.buffer).map_err(|e| {
            Error::unavailable(format!(
                "file \"{}\" cannot be read: {e}",
                self.path.display()
            ))
        })?;
        self.ended = read == 0;
        Ok(())
    }
}
