//! The remap log: which offsets and watermarks belong to which tick.
//!
//! # Protocol
//!
//! * A [`Binding`] is appended when its tick is minted and is durable (fsync) before anything of the
//!   tick is shown: a read, a commit, a checkpoint wait for [`RemapLog::durable`].
//! * Bindings are written by a thread of their own, many per fsync (group commit), while workers
//!   already compute.
//! * After a crash the bindings above the checkpoint are replayed: same offsets, same tick, same
//!   watermarks, so the same contents; the count and a digest of the records say whether they are. A
//!   torn tail is the part nobody was shown, and is cut off.
//!
//! What is decided is in [`log`], a state machine without I/O, and in [`record`], which knows the bytes;
//! [`files`] performs it. A segment is named after its incarnation and the first tick it may hold; a
//! checkpoint starts a new one and drops those that lie wholly below the oldest checkpoint kept.
//!
//! # Incarnations
//!
//! A server that was stopped and wakes after another one has taken over goes on appending until it
//! notices. Each incarnation has segments of its own: the first is put up before the older ones are
//! read, and says then ([`Takeover`]) what the last tick was that this incarnation found. Nothing that an
//! older incarnation wrote above it counts, and it tells nobody about it: having synced a binding, it
//! looks for a newer segment first.

mod files;
pub mod log;
pub mod record;

use std::collections::BTreeMap;

pub use files::RemapLog;

use crate::plan::RelationId;
use crate::tick::Hold;
use crate::time::{Tick, Watermark};

/// What one source contributed to a tick.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SourceBinding {
    /// Splits that moved: next offset, and the split's own watermark.
    pub splits: BTreeMap<String, (u64, Watermark)>,
    /// Splits met for the first time: where reading of them began.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub starts: BTreeMap<String, u64>,
    /// The source's watermark as of this tick.
    pub watermark: Watermark,
    /// Rows bound, and rejected records; verified on replay.
    pub rows: u64,
    pub rejected: u64,
    /// Digest of the records, if the connector has one (see [`crate::source::Chunk::digest`]); verified
    /// on replay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<u64>,
    /// A bounded source has ended.
    pub ended: bool,
}

/// A tick and what belongs to it.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Binding {
    pub tick: Tick,
    pub incarnation: u64,
    /// Sources that moved in this tick.
    pub sources: BTreeMap<RelationId, SourceBinding>,
    /// Relations that are held in this tick.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub held: BTreeMap<RelationId, Hold>,
}

/// The first record of a segment: an incarnation and the last tick it found of those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Takeover {
    pub incarnation: u64,
    pub found: Tick,
    /// Of the segment's format ([`record::VERSION`]).
    #[serde(default)]
    pub version: u32,
}

#[cfg(test)]
mod tests;
