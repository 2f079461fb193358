//! Ways out: what a sink promises to the engine.
//!
//! # Protocol
//!
//! One [`Writer`] per worker receives complete ticks in order. At marked ticks the engine calls
//! `close`: the writer closes its open files and returns *committables*, which enter the checkpoint.
//! One [`Committer`] per sink publishes the committables of `[lower, upper)` together, exactly once:
//! the destination itself says how far it is (`frontier`), and what lies below is dropped on replay.
//!
//! A writer that fails with anything but `Unavailable` is not called again: its rows are those of the
//! ticks since the last `close`, and only a restart has them once more.

use std::sync::{Arc, Mutex};

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use async_trait::async_trait;

use crate::delta::Diffs;
use crate::error::{Error, Result};
use crate::ingest::lock;
use crate::time::Tick;

/// What a writer has prepared and nobody has published yet, as opaque bytes of the sink's own form.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct Committable {
    /// Ticks in `[lower, upper)` are covered.
    pub lower: Tick,
    pub upper: Tick,
    pub rows: u64,
    pub bytes: u64,
    pub payload: Vec<u8>,
}

/// A configured way out.
#[async_trait]
pub trait Sink: Send + Sync + std::fmt::Debug {
    /// Accepts retractions.
    fn accepts_retractions(&self) -> bool;
    /// A writer for one worker. `incarnation` is part of every file name.
    async fn writer(&self, worker: usize, incarnation: u64) -> Result<Box<dyn Writer>>;
    async fn committer(&self, incarnation: u64) -> Result<Box<dyn Committer>>;
}

/// What somebody waits for, shared with those who show it.
#[derive(Debug, Clone, Default)]
pub struct Trouble(Arc<Mutex<Option<Error>>>);

impl Trouble {
    pub fn set(&self, error: Option<Error>) {
        *lock(&self.0) = error;
    }
    pub fn get(&self) -> Option<Error> {
        lock(&self.0).clone()
    }
}

/// Writes the rows of one worker; runs on a task of its own, not on the worker.
#[async_trait]
pub trait Writer: Send {
    /// Where it says what it waits for, in the middle of a call.
    fn trouble(&self) -> Trouble {
        Trouble::default()
    }
    async fn write(&mut self, tick: Tick, batch: &RecordBatch, diffs: &Diffs) -> Result<()>;
    /// Closes what is open; the rows written since the last close, as files. May be empty.
    async fn close(&mut self, lower: Tick, upper: Tick) -> Result<Vec<Committable>>;
}

/// Publishes what writers prepared.
#[async_trait]
pub trait Committer: Send {
    /// The tick up to which the destination holds everything of this sink (exclusive), read from the
    /// destination itself; `None` if nothing was ever committed. Fences older incarnations.
    async fn frontier(&mut self) -> Result<Option<Tick>>;
    /// Publishes all committables, which cover `[lower, upper)`, in one step. Returns once the
    /// outcome is known: `Ok` means the destination holds everything below `upper`, and gives the
    /// frontier that it says so itself; where there was nothing to publish that may lie below. An
    /// error of kind `Unavailable` may be retried with the same arguments; any other stops the sink.
    async fn commit(
        &mut self,
        lower: Tick,
        upper: Tick,
        committables: &[Committable],
    ) -> Result<Tick>;
}

/// Columns a sink receives.
pub fn assert_same_columns(expected: &SchemaRef, batch: &RecordBatch) {
    debug_assert_eq!(expected.fields().len(), batch.num_columns());
}
