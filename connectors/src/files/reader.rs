//! Reads the files of a source one after another.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use millrace_dataflow::error::{Error, ErrorKind, Result};
use millrace_dataflow::source::{Chunk, Offsets, Polled, Reader, Rejected};
use millrace_interchange::format::Layout;
use millrace_interchange::parquet::{self, ParquetRows};

use super::FileFormat;
use super::records::RecordFile;

/// Most records of a chunk.
const CHUNK_RECORDS: u64 = 16_384;

pub(super) struct FilesReader {
    splits: Vec<Split>,
    format: FileFormat,
    layout: Layout,
}

/// One file and how far it is read.
struct Split {
    path: PathBuf,
    name: Arc<str>,
    offset: u64,
    ended: bool,
    open: Option<OpenFile>,
}

enum OpenFile {
    Records(Box<RecordFile>),
    Parquet(Box<ParquetRows>),
}

impl FilesReader {
    pub(super) fn new(
        files: &[PathBuf],
        format: FileFormat,
        layout: Layout,
        start: &Offsets,
    ) -> Result<Self> {
        let split = |path: &PathBuf| {
            let name: Arc<str> = path.to_string_lossy().into();
            let offset = start.0.get(name.as_ref()).copied().unwrap_or(0);
            Split {
                path: path.clone(),
                name,
                offset,
                ended: false,
                open: None,
            }
        };
        let reader = Self {
            splits: files.iter().map(split).collect(),
            format,
            layout,
        };
        reader.check_names(start)?;
        Ok(reader)
    }

    /// Every split that offsets speak of is among the files.
    fn check_names(&self, offsets: &Offsets) -> Result<()> {
        let known = |name: &String| self.splits.iter().any(|s| s.name.as_ref() == name);
        match offsets.0.keys().find(|name| !known(name)) {
            None => Ok(()),
            Some(gone) => Err(Error::new(
                ErrorKind::NotFound,
                format!("file \"{gone}\" was read before and is gone"),
            )
            .hint("put it back, or drop the source and create it again over what is there")),
        }
    }
}

impl Reader for FilesReader {
    fn poll(&mut self, limit: Option<&Offsets>, _wait: Duration) -> Result<Polled> {
        if let Some(limit) = limit {
            self.check_names(limit)?;
        }
        for split in &mut self.splits {
            let stop = match limit {
                None => u64::MAX,
                Some(limit) => limit.0.get(split.name.as_ref()).copied().unwrap_or(0),
            };
            if split.ended && limit.is_some() && stop > split.offset {
                return Err(shorter(&split.path, split.offset, stop));
            }
            if split.ended || split.offset >= stop {
                continue;
            }
            match split.next_chunk(self.format, &self.layout, stop - split.offset)? {
                Some(chunk) => return Ok(Polled::Chunk(chunk)),
                None if limit.is_some() => return Err(shorter(&split.path, split.offset, stop)),
                None => {}
            }
        }
        Ok(if limit.is_some() {
            Polled::AtLimit
        } else {
            Polled::End
        })
    }
}

impl Split {
    /// Up to `most` records, and no more than a chunk holds; `None` at the end of the file.
    fn next_chunk(
        &mut self,
        format: FileFormat,
        layout: &Layout,
        most: u64,
    ) -> Result<Option<Chunk>> {
        let most = most.min(CHUNK_RECORDS);
        let chunk = match format {
            FileFormat::Parquet => self.next_rows(layout, most)?,
            _ => self.next_records(format, layout, most)?,
        };
        if chunk.is_none() {
            self.ended = true;
            self.open = None;
        }
        Ok(chunk)
    }

    fn next_records(
        &mut self,
        format: FileFormat,
        layout: &Layout,
        most: u64,
    ) -> Result<Option<Chunk>> {
        let mut file = match self.open.take() {
            Some(OpenFile::Records(file)) => file,
            _ => Box::new(RecordFile::open(&self.path, layout, format, self.offset)?),
        };
        let records = file.next_records(&self.name, most)?;
        let begin = std::mem::replace(&mut self.offset, file.offset());
        self.open = Some(OpenFile::Records(file));
        Ok(records.map(|records| Chunk {
            split: Arc::clone(&self.name),
            begin,
            end: self.offset,
            batch: records.decoded.batch,
            diffs: records.decoded.diffs,
            rejected: records.rejected,
            bytes: records.bytes,
            digest: Some(records.digest),
            remaining: None,
        }))
    }

    fn next_rows(&mut self, layout: &Layout, most: u64) -> Result<Option<Chunk>> {
        // A batch of the open reader could pass the limit: a shorter one comes from a reader of its
        // own, which is not kept.
        let kept = match self.open.take() {
            Some(OpenFile::Parquet(rows)) if most == CHUNK_RECORDS => Some(rows),
            _ => None,
        };
        let mut rows = match kept {
            Some(rows) => rows,
            None => Box::new(parquet::open(
                &self.path,
                layout,
                self.offset,
                most as usize,
            )?),
        };
        if self.offset > rows.total {
            return Err(shorter(&self.path, rows.total, self.offset));
        }
        let Some(chunk) = rows.next_chunk()? else {
            return Ok(None);
        };
        let begin = self.offset;
        self.offset += chunk.rows as u64;
        let remaining = rows.total.saturating_sub(self.offset);
        if most == CHUNK_RECORDS {
            self.open = Some(OpenFile::Parquet(rows));
        }
        let reject = |(row, bytes): (usize, Vec<u8>)| Rejected {
            split: self.name.to_string(),
            offset: begin + row as u64,
            bytes,
            reason: format!(
                "column \"{}\": expected \"+\" or \"-\"",
                layout.changelog.as_deref().unwrap_or_default()
            ),
        };
        Ok(Some(Chunk {
            split: Arc::clone(&self.name),
            begin,
            end: self.offset,
            bytes: chunk.decoded.batch.get_array_memory_size() as u64,
            batch: chunk.decoded.batch,
            diffs: chunk.decoded.diffs,
            rejected: chunk.rejected.into_iter().map(reject).collect(),
            // Columns are read apart from each other: there is no record to take a digest of.
            digest: None,
            remaining: Some(remaining),
        }))
    }
}

fn shorter(path: &std::path::Path, holds: u64, wanted: u64) -> Error {
    Error::new(
        ErrorKind::Corrupt,
        format!("file \"{}\" has become shorter", path.display()),
    )
    .detail(format!(
        "it holds {holds} records, {wanted} were read before"
    ))
    .hint("a source over files reads each file once; new data belongs in new files")
}
