//! State as bytes: what checkpoints hold.
//!
//! ```text
//! part  = header (magic, version, kind, counts, name, crc) block*
//! block = head (group, flags, rows, length, crc) payload
//! ```
//!
//! Every length, count and byte is covered by a CRC-32: what is torn or flipped is
//! [`ErrorKind::Corrupt`], never a panic and never a wrong row. The version is the first thing read;
//! a newer binary keeps reading older ones.

use std::io::{Cursor, Write};
use std::ops::Range;

use arrow::array::RecordBatch;
use arrow::ipc::reader::StreamReader;
use arrow::ipc::writer::StreamWriter;
use bytes::Bytes;

use super::frozen::{Frozen, StateRow};
use crate::error::{Error, ErrorKind, Result};
use crate::key::{HASH_VERSION, key_group};

const MAGIC: [u8; 4] = *b"MRST";
const VERSION: u16 = 1;
/// magic, version, kind, hash version, blocks, name length
const PART_HEAD: usize = 4 + 2 + 2 + 4 + 4 + 4;
/// group, flags, rows, length, crc
const BLOCK_HEAD: usize = 2 + 2 + 8 + 8 + 4;
const CHAINED: u16 = 1;

/// A named piece of frozen state.
#[derive(Debug, Clone)]
pub struct Part {
    pub name: String,
    pub data: PartData,
}

#[derive(Debug, Clone)]
pub enum PartData {
    /// Rows by key; restored by key group.
    Keyed(Frozen),
    /// Rows without a key; restored batch by batch onto the workers in turn.
    Batches(Vec<RecordBatch>),
    /// A few bytes; every worker is given those of all.
    Meta(Vec<u8>),
}

/// A part read back; its checksums are right.
#[derive(Debug, Clone)]
pub struct StoredPart {
    pub name: String,
    pub data: StoredData,
}

#[derive(Debug, Clone)]
pub enum StoredData {
    /// One block per key group, for [`read_group`].
    Keyed(Vec<Bytes>),
    /// Arrow IPC streams of one batch each.
    Batches(Vec<Bytes>),
    Meta(Bytes),
}

impl StoredPart {
    /// Hands the rows of each of the `owned` groups to `take`. The part must be keyed.
    pub fn each_group(
        &self,
        chained: bool,
        owned: &Range<u16>,
        mut take: impl FnMut(Vec<StateRow<'_>>),
    ) -> Result<()> {
        let StoredData::Keyed(blocks) = &self.data else {
            return Err(corrupt("holds no keyed rows").detail(format!("part: {}", self.name)));
        };
        for block in blocks {
            let head = Head::read(block)?;
            if head.flags & CHAINED != u16::from(chained) {
                return Err(corrupt("holds rows of another kind"));
            }
            if owned.contains(&head.group) {
                take(rows_of(&head, &block[BLOCK_HEAD..])?);
            }
        }
        Ok(())
    }

    /// The batch of a block of [`StoredData::Batches`].
    pub fn read_batch(block: &Bytes) -> Result<RecordBatch> {
        let payload = Cursor::new(block.slice(BLOCK_HEAD..));
        let mut reader = StreamReader::try_new(payload, None)
            .map_err(|e| corrupt("holds an unreadable batch").detail(e.to_string()))?;
        match reader.next() {
            Some(Ok(batch)) => Ok(batch),
            Some(Err(e)) => Err(corrupt("holds an unreadable batch").detail(e.to_string())),
            None => Err(corrupt("holds an empty batch")),
        }
    }
}

/// Writes a part. The writer's errors are returned; nothing else can fail.
pub fn write_part(part: &Part, out: &mut impl Write) -> Result<()> {
    let (kind, blocks) = match &part.data {
        PartData::Keyed(frozen) => (0u16, frozen.groups().count()),
        PartData::Batches(batches) => (1, batches.len()),
        PartData::Meta(_) => (2, 1),
    };
    let mut head = Vec::with_capacity(PART_HEAD + part.name.len() + 4);
    head.extend_from_slice(&MAGIC);
    head.extend_from_slice(&VERSION.to_le_bytes());
    head.extend_from_slice(&kind.to_le_bytes());
    head.extend_from_slice(&HASH_VERSION.to_le_bytes());
    head.extend_from_slice(&(blocks as u32).to_le_bytes());
    head.extend_from_slice(&(part.name.len() as u32).to_le_bytes());
    head.extend_from_slice(part.name.as_bytes());
    head.extend_from_slice(&crc32fast::hash(&head).to_le_bytes());
    out.write_all(&head)?;
    let mut block = Vec::new();
    match &part.data {
        PartData::Keyed(frozen) => {
            for group in frozen.groups() {
                block.clear();
                write_group(frozen, group, &mut block);
                out.write_all(&block)?;
            }
        }
        PartData::Batches(batches) => {
            for batch in batches {
                block.clear();
                write_batch(batch, &mut block)?;
                out.write_all(&block)?;
            }
        }
        PartData::Meta(bytes) => {
            begin_block(&mut block);
            block.extend_from_slice(bytes);
            end_block(&mut block, 0, 0, 0, 0);
            out.write_all(&block)?;
        }
    }
    Ok(())
}

/// Reads one part from the front of `bytes`; gives it and its length.
pub fn read_part(bytes: &Bytes) -> Result<(StoredPart, usize)> {
    let head = bytes
        .get(..PART_HEAD)
        .ok_or_else(|| corrupt("is cut short"))?;
    if head[..4] != MAGIC {
        return Err(corrupt("does not begin with its mark"));
    }
    let version = u16::from_le_bytes(array(&head[4..6]));
    if version != VERSION {
        return Err(
            Error::unsupported(format!("state of version {version} cannot be read"))
                .hint("it was written by a newer release; use that one"),
        );
    }
    let kind = u16::from_le_bytes(array(&head[6..8]));
    let hash_version = u32::from_le_bytes(array(&head[8..12]));
    let blocks = u32::from_le_bytes(array(&head[12..16])) as usize;
    let name_end = PART_HEAD + u32::from_le_bytes(array(&head[16..20])) as usize;
    let crc = bytes
        .get(name_end..name_end + 4)
        .ok_or_else(|| corrupt("is cut short"))?;
    if crc32fast::hash(&bytes[..name_end]) != u32::from_le_bytes(array(crc)) {
        return Err(corrupt("has a damaged header"));
    }
    if hash_version != HASH_VERSION {
        return Err(Error::unsupported(format!(
            "keys hashed by version {hash_version}"
        )));
    }
    let name = std::str::from_utf8(&bytes[PART_HEAD..name_end])
        .map_err(|_| corrupt("has a damaged header"))?
        .to_string();
    let mut at = name_end + 4;
    let mut read = Vec::with_capacity(blocks.min(4096));
    for _ in 0..blocks {
        let length = Head::check(&bytes[at..])?;
        read.push(bytes.slice(at..at + length));
        at += length;
    }
    let data = match (kind, read.len()) {
        (0, _) => StoredData::Keyed(read),
        (1, _) => StoredData::Batches(read),
        (2, 1) => StoredData::Meta(read[0].slice(BLOCK_HEAD..)),
        _ => return Err(corrupt("is of an unknown kind")),
    };
    Ok((StoredPart { name, data }, at))
}

/// Appends the rows of one key group as a block.
pub fn write_group(frozen: &Frozen, group: u8, out: &mut Vec<u8>) {
    let start = begin_block(out);
    for (hash, key, value) in frozen.group_rows(group) {
        out.extend_from_slice(&hash.to_le_bytes());
        out.extend_from_slice(&(key.len() as u32).to_le_bytes());
        out.extend_from_slice(&(value.len() as u32).to_le_bytes());
        out.extend_from_slice(key);
        out.extend_from_slice(value);
    }
    let flags = if frozen.is_chained() { CHAINED } else { 0 };
    end_block(out, start, u16::from(group), flags, frozen.group_len(group));
}

/// Reads a block of [`write_group`] from the front of `bytes`: group, rows and length.
pub fn read_group(bytes: &[u8]) -> Result<(u8, Vec<StateRow<'_>>, usize)> {
    let length = Head::check(bytes)?;
    let head = Head::read(bytes)?;
    let rows = rows_of(&head, &bytes[BLOCK_HEAD..length])?;
    let group = u8::try_from(head.group).map_err(|_| corrupt("names an unknown group"))?;
    if rows.iter().any(|(hash, _, _)| key_group(*hash) != group) {
        return Err(corrupt("holds rows of another group"));
    }
    Ok((group, rows, length))
}

fn write_batch(batch: &RecordBatch, out: &mut Vec<u8>) -> Result<()> {
    let start = begin_block(out);
    let failed = |e| Error::internal(format!("a batch cannot be written: {e}"));
    let mut writer = StreamWriter::try_new(&mut *out, &batch.schema()).map_err(failed)?;
    writer.write(batch).map_err(failed)?;
    writer.finish().map_err(failed)?;
    drop(writer);
    end_block(out, start, 0, 0, batch.num_rows() as u64);
    Ok(())
}

/// Leaves room for the head; gives the position of the block.
fn begin_block(out: &mut Vec<u8>) -> usize {
    let start = out.len();
    out.resize(start + BLOCK_HEAD, 0);
    start
}

/// Fills in the head that [`begin_block`] left out. The CRC covers the head and the payload.
fn end_block(out: &mut [u8], start: usize, group: u16, flags: u16, rows: u64) {
    let block = &mut out[start..];
    let length = (block.len() - BLOCK_HEAD) as u64;
    block[..2].copy_from_slice(&group.to_le_bytes());
    block[2..4].copy_from_slice(&flags.to_le_bytes());
    block[4..12].copy_from_slice(&rows.to_le_bytes());
    block[12..20].copy_from_slice(&length.to_le_bytes());
    let crc = crc_of(block);
    block[20..24].copy_from_slice(&crc.to_le_bytes());
}

fn crc_of(block: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&block[..20]);
    crc.update(&block[BLOCK_HEAD..]);
    crc.finalize()
}

struct Head {
    group: u16,
    flags: u16,
    rows: u64,
    length: u64,
}

impl Head {
    fn read(bytes: &[u8]) -> Result<Self> {
        let head = bytes
            .get(..BLOCK_HEAD)
            .ok_or_else(|| corrupt("is cut short"))?;
        Ok(Self {
            group: u16::from_le_bytes(array(&head[..2])),
            flags: u16::from_le_bytes(array(&head[2..4])),
            rows: u64::from_le_bytes(array(&head[4..12])),
            length: u64::from_le_bytes(array(&head[12..20])),
        })
    }

    /// Length of the block at the front of `bytes`, its checksum verified.
    fn check(bytes: &[u8]) -> Result<usize> {
        let head = Self::read(bytes)?;
        let end = usize::try_from(head.length)
            .ok()
            .and_then(|l| l.checked_add(BLOCK_HEAD));
        let block = end
            .and_then(|end| bytes.get(..end))
            .ok_or_else(|| corrupt("is cut short"))?;
        if crc_of(block) != u32::from_le_bytes(array(&block[20..24])) {
            return Err(corrupt("fails its checksum"));
        }
        Ok(block.len())
    }
}

fn rows_of<'a>(head: &Head, mut payload: &'a [u8]) -> Result<Vec<StateRow<'a>>> {
    let mut rows = Vec::with_capacity((head.rows as usize).min(payload.len() / 16));
    while !payload.is_empty() {
        let short = || corrupt("is cut short");
        let (lengths, rest) = payload.split_at_checked(16).ok_or_else(short)?;
        let hash = u64::from_le_bytes(array(&lengths[..8]));
        let key = u32::from_le_bytes(array(&lengths[8..12])) as usize;
        let value = u32::from_le_bytes(array(&lengths[12..16])) as usize;
        let (key, rest) = rest.split_at_checked(key).ok_or_else(short)?;
        let (value, rest) = rest.split_at_checked(value).ok_or_else(short)?;
        if head.flags & CHAINED != 0 && value.len() < 8 {
            return Err(short());
        }
        rows.push((hash, key, value));
        payload = rest;
    }
    if rows.len() as u64 != head.rows {
        return Err(corrupt("holds another number of rows than it says"));
    }
    Ok(rows)
}

fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    bytes.try_into().expect("the slice was cut to this length")
}

fn corrupt(what: &str) -> Error {
    Error::new(ErrorKind::Corrupt, format!("stored state {what}"))
}
