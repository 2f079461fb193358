//! State as bytes: what checkpoints hold.
//!
//! ```text
//! part  = header (magic, version, kind, counts, name, crc) block*
//! block = head (group, flags, rows, length, crc) payload
//! keyed payload = (page, slot, 1, hash, lengths, key, value | page, slot, 0)*
//! ```
//!
//! Keyed state is stored in layers: all rows of one snapshot, then the changes of those after it. A
//! row is named by its place (page and slot), so a change of later layers replaces what stood there.
//!
//! Every length, count and byte is covered by a CRC-32: what is torn or flipped is
//! [`ErrorKind::Corrupt`], never a panic and never a wrong row. The version is the first thing read;
//! a newer binary keeps reading older ones.

use std::collections::{BTreeMap, HashMap};
use std::io::{Cursor, Write};
use std::ops::Range;
use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::ipc::reader::StreamReader;
use arrow::ipc::writer::StreamWriter;
use bytes::Bytes;

use super::batch::HeldBatch;
use super::blob::{Blob, Front};
use super::frozen::StateRow;
use super::snapshot::{Slot, Snapshot, SnapshotGroup, SnapshotPage};
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
#[derive(Debug)]
pub struct Part {
    pub name: String,
    pub data: PartData,
}

#[derive(Debug)]
pub enum PartData {
    /// Rows by key; restored by key group.
    Keyed(Snapshot),
    /// Rows without a key; restored batch by batch onto the workers in turn. A batch that is the same
    /// allocation as in an earlier checkpoint is not stored again.
    Batches(Vec<Arc<HeldBatch>>),
    /// A few bytes; every worker is given those of all.
    Meta(Vec<u8>),
}

/// A part that was read over: its checksums are right, its rows stay where they lie until they are
/// wanted.
#[derive(Debug, Clone)]
pub struct StoredPart {
    pub name: String,
    pub data: StoredData,
}

#[derive(Debug, Clone)]
pub enum StoredData {
    /// Layers, oldest first, each of one block per key group.
    Keyed(Vec<Vec<Block>>),
    /// Arrow IPC streams of one batch each.
    Batches(Vec<Block>),
    Meta(Bytes),
}

/// A block of a stored part.
#[derive(Debug, Clone)]
pub struct Block {
    blob: Arc<dyn Blob>,
    /// Where its payload begins.
    at: u64,
    head: Head,
}

impl Block {
    fn payload(&self) -> Result<Bytes> {
        self.blob.read(self.at, self.head.length as usize)
    }

    /// The batch of a block of [`StoredData::Batches`].
    pub fn read_batch(&self) -> Result<RecordBatch> {
        let payload = Cursor::new(self.payload()?);
        let mut reader = StreamReader::try_new(payload, None)
            .map_err(|e| corrupt("holds an unreadable batch").detail(e.to_string()))?;
        match reader.next() {
            Some(Ok(batch)) => Ok(batch),
            Some(Err(e)) => Err(corrupt("holds an unreadable batch").detail(e.to_string())),
            None => Err(corrupt("holds an empty batch")),
        }
    }
}

impl StoredPart {
    /// Hands the rows of each of the `owned` groups to `take`. The part must be keyed.
    pub fn each_group(
        &self,
        chained: bool,
        owned: &Range<u16>,
        mut take: impl FnMut(Vec<StateRow<'_>>),
    ) -> Result<()> {
        let StoredData::Keyed(layers) = &self.data else {
            return Err(corrupt("holds no keyed rows").detail(format!("part: {}", self.name)));
        };
        let mut groups = BTreeMap::<u16, Vec<&Block>>::new();
        for block in layers.iter().flatten() {
            if block.head.flags & CHAINED != u16::from(chained) {
                return Err(corrupt("holds rows of another kind"));
            }
            if owned.contains(&block.head.group) {
                groups.entry(block.head.group).or_default().push(block);
            }
        }
        for (group, blocks) in groups {
            let payloads: Vec<Bytes> = blocks.iter().map(|b| b.payload()).collect::<Result<_>>()?;
            let layers = blocks.iter().zip(&payloads);
            let layers: Vec<(Head, &[u8])> = layers.map(|(b, bytes)| (b.head, &**bytes)).collect();
            let rows = merged(&layers)?;
            if rows
                .iter()
                .any(|(hash, _, _)| u16::from(key_group(*hash)) != group)
            {
                return Err(corrupt("holds rows of another group"));
            }
            take(rows);
        }
        Ok(())
    }

    /// Puts a later chunk of the same part on top.
    pub fn push(&mut self, later: Self) -> Result<()> {
        match (&mut self.data, later.data) {
            (StoredData::Keyed(layers), StoredData::Keyed(more)) => layers.extend(more),
            (StoredData::Batches(blocks), StoredData::Batches(more)) => blocks.extend(more),
            (StoredData::Meta(bytes), StoredData::Meta(newer)) => *bytes = newer,
            _ => return Err(corrupt("changes its kind").detail(format!("part: {}", self.name))),
        }
        Ok(())
    }
}

/// Writes a part in full. The writer's errors are returned; nothing else can fail.
pub fn write_part(part: &Part, out: &mut impl Write) -> Result<()> {
    match &part.data {
        PartData::Keyed(snapshot) => write_keyed(&part.name, snapshot, false, out),
        PartData::Batches(batches) => write_batches(&part.name, batches, out),
        PartData::Meta(bytes) => write_meta(&part.name, bytes, out),
    }
}

/// Writes all rows of a snapshot, or only what has changed since the one before.
pub fn write_keyed(
    name: &str,
    snapshot: &Snapshot,
    changes_only: bool,
    out: &mut impl Write,
) -> Result<()> {
    let has = |group: &&SnapshotGroup| group.pages.iter().any(|page| page.has(changes_only));
    let blocks = snapshot.groups.iter().filter(has).count();
    write_head(name, 0, blocks, out)?;
    let flags = if snapshot.chained { CHAINED } else { 0 };
    let mut block = Vec::new();
    for group in snapshot.groups.iter().filter(has) {
        block.clear();
        let start = begin_block(&mut block);
        let mut rows = 0;
        for (number, held) in (0..).zip(&group.pages) {
            if held.has(changes_only) {
                let page = held.page.load()?;
                rows += match changes_only {
                    true => write_slots(held.changed(&page, number), &mut block),
                    false => write_slots(SnapshotPage::all(&page, number), &mut block),
                };
            }
        }
        end_block(&mut block, start, u16::from(group.group), flags, rows);
        out.write_all(&block)?;
    }
    Ok(())
}

/// Writes batches, one block each.
pub fn write_batches(name: &str, batches: &[Arc<HeldBatch>], out: &mut impl Write) -> Result<()> {
    write_head(name, 1, batches.len(), out)?;
    let mut block = Vec::new();
    for batch in batches {
        block.clear();
        write_batch(&batch.load()?, &mut block)?;
        out.write_all(&block)?;
    }
    Ok(())
}

/// Writes a few bytes as a part.
pub fn write_meta(name: &str, bytes: &[u8], out: &mut impl Write) -> Result<()> {
    write_head(name, 2, 1, out)?;
    let mut block = Vec::new();
    begin_block(&mut block);
    block.extend_from_slice(bytes);
    end_block(&mut block, 0, 0, 0, 0);
    Ok(out.write_all(&block)?)
}

fn write_head(name: &str, kind: u16, blocks: usize, out: &mut impl Write) -> Result<()> {
    let mut head = Vec::with_capacity(PART_HEAD + name.len() + 4);
    head.extend_from_slice(&MAGIC);
    head.extend_from_slice(&VERSION.to_le_bytes());
    head.extend_from_slice(&kind.to_le_bytes());
    head.extend_from_slice(&HASH_VERSION.to_le_bytes());
    head.extend_from_slice(&(blocks as u32).to_le_bytes());
    head.extend_from_slice(&(name.len() as u32).to_le_bytes());
    head.extend_from_slice(name.as_bytes());
    head.extend_from_slice(&crc32fast::hash(&head).to_le_bytes());
    Ok(out.write_all(&head)?)
}

/// Appends rows with their places; how many there were.
fn write_slots<'a>(slots: impl Iterator<Item = Slot<'a>>, out: &mut Vec<u8>) -> u64 {
    let mut count = 0;
    for (page, slot, row) in slots {
        count += 1;
        out.extend_from_slice(&page.to_le_bytes());
        out.extend_from_slice(&(slot as u16).to_le_bytes());
        out.extend_from_slice(&u16::from(row.is_some()).to_le_bytes());
        if let Some((hash, key, value)) = row {
            out.extend_from_slice(&hash.to_le_bytes());
            out.extend_from_slice(&(key.len() as u32).to_le_bytes());
            out.extend_from_slice(&(value.len() as u32).to_le_bytes());
            out.extend_from_slice(key);
            out.extend_from_slice(value);
        }
    }
    count
}

/// Reads one part from the front of `bytes`; gives it and its length.
pub fn read_part(bytes: &Bytes) -> Result<(StoredPart, usize)> {
    let blob: Arc<dyn Blob> = Arc::new(bytes.clone());
    let (part, length) = read_part_of(&blob, 0, bytes.len() as u64)?;
    Ok((part, length as usize))
}

/// Reads over one part between two places of a blob, verifying every byte; gives it and its length.
pub fn read_part_of(blob: &Arc<dyn Blob>, at: u64, end: u64) -> Result<(StoredPart, u64)> {
    let mut front = Front::new(blob, at, end);
    let head = front.peek(PART_HEAD)?;
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
    let head = front.peek(name_end + 4)?;
    if crc32fast::hash(&head[..name_end]) != u32::from_le_bytes(array(&head[name_end..])) {
        return Err(corrupt("has a damaged header"));
    }
    if hash_version != HASH_VERSION {
        return Err(Error::unsupported(format!(
            "keys hashed by version {hash_version}"
        )));
    }
    let name = std::str::from_utf8(&head[PART_HEAD..name_end])
        .map_err(|_| corrupt("has a damaged header"))?
        .to_string();
    front.skip(name_end + 4);
    let mut read = Vec::with_capacity(blocks.min(4096));
    for _ in 0..blocks {
        let head = Head::read(&front.peek(BLOCK_HEAD)?)?;
        let length = usize::try_from(head.length).ok();
        let length = length.and_then(|length| length.checked_add(BLOCK_HEAD));
        let block = front.peek(length.ok_or_else(|| corrupt("is cut short"))?)?;
        if crc_of(&block) != u32::from_le_bytes(array(&block[20..24])) {
            return Err(corrupt("fails its checksum"));
        }
        read.push(Block {
            blob: Arc::clone(blob),
            at: front.at + BLOCK_HEAD as u64,
            head,
        });
        front.skip(block.len());
    }
    let data = match (kind, read.len()) {
        (0, _) => StoredData::Keyed(vec![read]),
        (1, _) => StoredData::Batches(read),
        (2, 1) => StoredData::Meta(read[0].payload()?),
        _ => return Err(corrupt("is of an unknown kind")),
    };
    Ok((StoredPart { name, data }, front.at - at))
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

#[derive(Debug, Clone, Copy)]
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
}

/// The rows of a group once all its layers are applied.
fn merged<'a>(blocks: &[(Head, &'a [u8])]) -> Result<Vec<StateRow<'a>>> {
    if let [(head, payload)] = blocks {
        let mut rows = Vec::with_capacity((head.rows as usize).min(payload.len() / 16));
        each_slot(head, payload, |_, row| rows.extend(row))?;
        return Ok(rows);
    }
    let mut rows = HashMap::new();
    for (head, payload) in blocks {
        each_slot(head, payload, |place, row| {
            match row {
                Some(row) => rows.insert(place, row),
                None => rows.remove(&place),
            };
        })?;
    }
    Ok(rows.into_values().collect())
}

/// Hands over each place of a block and the row that is there.
fn each_slot<'a>(
    head: &Head,
    mut payload: &'a [u8],
    mut take: impl FnMut(u64, Option<StateRow<'a>>),
) -> Result<()> {
    let short = || corrupt("is cut short");
    let mut count = 0;
    while !payload.is_empty() {
        let (place, rest) = payload.split_at_checked(8).ok_or_else(short)?;
        let there = u16::from_le_bytes(array(&place[6..]));
        let place = u64::from_le_bytes(array(place)) & 0xffff_ffff_ffff;
        payload = rest;
        count += 1;
        if there == 0 {
            take(place, None);
            continue;
        }
        let (lengths, rest) = payload.split_at_checked(16).ok_or_else(short)?;
        let hash = u64::from_le_bytes(array(&lengths[..8]));
        let key = u32::from_le_bytes(array(&lengths[8..12])) as usize;
        let value = u32::from_le_bytes(array(&lengths[12..16])) as usize;
        let (key, rest) = rest.split_at_checked(key).ok_or_else(short)?;
        let (value, rest) = rest.split_at_checked(value).ok_or_else(short)?;
        if head.flags & CHAINED != 0 && value.len() < 8 {
            return Err(short());
        }
        take(place, Some((hash, key, value)));
        payload = rest;
    }
    if count != head.rows {
        return Err(corrupt("holds another number of rows than it says"));
    }
    Ok(())
}

fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    bytes.try_into().expect("the slice was cut to this length")
}

fn corrupt(what: &str) -> Error {
    Error::new(ErrorKind::Corrupt, format!("stored state {what}"))
}
