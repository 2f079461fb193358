//! Ways in: what a connector promises to the engine.
//!
//! # Contract
//!
//! * A source is a fixed set of *splits* (more may be found while running), each an ordered sequence
//!   of records with growing `u64` offsets. Reading a split again from an offset yields the same
//!   records: that is what makes a tick repeatable.
//! * A reader runs on a thread of its own and may block up to the given wait. It never skips
//!   silently: what cannot be read any more (past retention, file gone) is an error.
//! * A record that does not decode becomes a [`Rejected`], in the same chunk; the rest goes on.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;

use crate::error::Result;

/// Next offset to read, by split. A split that is absent starts at its beginning (as the source's
/// options define it, e.g. `start = 'earliest'`).
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Offsets(pub BTreeMap<String, u64>);

/// Undecodable input, kept with its bytes and provenance.
#[derive(Debug, Clone)]
pub struct Rejected {
    pub split: String,
    pub offset: u64,
    pub bytes: Vec<u8>,
    /// Why, in words, without the value.
    pub reason: String,
}

/// Consecutive records of one split.
#[derive(Debug)]
pub struct Chunk {
    pub split: Arc<str>,
    /// Offset of the first record: where the chunk before it ended, or where reading began.
    pub begin: u64,
    /// Offset after the last record: where reading would go on.
    pub end: u64,
    /// Decoded physical columns, in the source's schema (see [`Source::schema`]). May have no rows.
    pub batch: RecordBatch,
    /// One per row when the source is a changelog: +1 or -1. `None`: all +1.
    pub diffs: Option<Vec<i64>>,
    pub rejected: Vec<Rejected>,
    /// Bytes read from outside for this chunk.
    pub bytes: u64,
    /// [`Digest`] of the records, decoded or rejected; `None` where there are no raw records to have one
    /// of. What was bound must have the same when it is replayed.
    pub digest: Option<u64>,
    /// Records known to be behind this chunk and not read yet, if the source can tell (lag).
    pub remaining: Option<u64>,
}

/// A sum over records that tells whether the same ones were read again, however polls have cut them
/// into chunks and whichever columns were wanted.
#[derive(Debug, Clone, Copy, Default)]
pub struct Digest(u64);

impl Digest {
    /// Counts a record in: its offset and its bytes as the source has them.
    pub fn add(&mut self, offset: u64, bytes: &[u8]) {
        let body = u64::from(crc32fast::hash(bytes)) << 32 | (bytes.len() as u64 & 0xffff_ffff);
        let mut z = offset.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ body;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        self.0 = self.0.wrapping_add(z ^ (z >> 31));
    }

    /// The sum so far, which begins anew; as records of this split.
    pub fn take(&mut self, split: &str) -> u64 {
        let sum = std::mem::take(&mut self.0);
        // Odd, so that sums of parts stay sums.
        sum.wrapping_mul(u64::from(crc32fast::hash(split.as_bytes())) << 1 | 1)
    }
}

/// Answer of [`Reader::poll`].
#[derive(Debug)]
pub enum Polled {
    Chunk(Chunk),
    /// Nothing new within the wait.
    Idle,
    /// Every split of this reader has reached the limit given to `poll`.
    AtLimit,
    /// A bounded source has no more records.
    End,
}

/// Reads some splits of a source, on a thread of its own.
pub trait Reader: Send {
    /// Next records. With a `limit`, returns no record at or past the limit of its split (a split
    /// absent from the limit yields nothing) and `AtLimit` once all have reached it; the records
    /// beyond stay readable by later calls. Transient trouble (broker away) is `Unavailable` and the
    /// caller polls again after a pause; any other error stops the source.
    fn poll(&mut self, limit: Option<&Offsets>, wait: Duration) -> Result<Polled>;
}

/// A configured way in. Cheap to hold; `open` may be called several times (history, replay, live).
pub trait Source: Send + Sync + std::fmt::Debug {
    /// Physical columns the readers yield for a `projection` given to [`Source::open`] (indices into
    /// this schema).
    fn schema(&self) -> SchemaRef;
    /// Opens readers that together cover all splits, each beginning at `start`. Only the columns of
    /// `projection` are materialised, in that order; all declared columns are type-checked.
    fn open(&self, start: &Offsets, projection: &[usize]) -> Result<Vec<Box<dyn Reader>>>;
    /// Ends by itself: its windows close at the end.
    fn bounded(&self) -> bool;
    /// History begins where the source was first read (`start = 'latest'`), not with the oldest record
    /// that can be had.
    fn begins_where_first_read(&self) -> bool {
        false
    }
    /// Every diff is +1.
    fn append_only(&self) -> bool;
    /// Whether the rows seen so far say how far event time has come. False for files, whose order says
    /// nothing: their watermark is silent until the end.
    fn watermark_while_running(&self) -> bool {
        true
    }
    /// Whether a row far ahead of the clock may move the watermark (true for bounded and generator
    /// sources, whose event time has nothing to do with the clock).
    fn any_event_time(&self) -> bool {
        self.bounded()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(split: &str, records: &[(u64, &[u8])]) -> u64 {
        let mut digest = Digest::default();
        for (offset, bytes) in records {
            digest.add(*offset, bytes);
        }
        digest.take(split)
    }

    #[test]
    fn a_digest_knows_records_not_chunks() {
        let records: &[(u64, &[u8])] = &[(0, b"a"), (1, b"b"), (2, b""), (3, b"a")];
        let whole = sum("0", records);
        for cut in 0..=records.len() {
            let (left, right) = records.split_at(cut);
            assert_eq!(sum("0", left).wrapping_add(sum("0", right)), whole);
        }
        assert_ne!(sum("1", records), whole, "another split");
        for i in 0..records.len() {
            let mut other = records.to_vec();
            other[i].1 = b"c";
            assert_ne!(sum("0", &other), whole, "another record {i}");
        }
        // The same two records the other way round are not the same.
        assert_ne!(sum("0", &[(0, b"b"), (1, b"a")]), sum("0", &records[..2]));
    }
}
