//! Subscriptions: the contents of a relation at a tick, then every change, in order.
//!
//! # Contract
//!
//! * Contents and changes add up: contents at tick T plus the changes up to any later tick are the
//!   relation at that tick.
//! * A tick is handed out once, whole, and only when it is durable: what was seen is never taken back
//!   by a crash.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::Engine;
use super::minter::Request;
use crate::delta::Delta;
use crate::error::{Error, ErrorKind, Result};
use crate::follow::{Event, Follower, Load};
use crate::plan::RelationId;
use crate::tick::ReadMark;
use crate::time::Tick;

/// See the module.
#[derive(Debug)]
pub struct Subscription {
    /// The tick of the contents.
    pub tick: Tick,
    pub contents: Vec<RecordBatch>,
    engine: Engine,
    events: UnboundedReceiver<(usize, Event)>,
    load: Arc<Load>,
    /// What the subscriber knows of the relation's columns.
    columns: SchemaRef,
    /// By worker: nothing below follows.
    upto: Vec<Tick>,
    pending: BTreeMap<Tick, Vec<Delta>>,
}

impl Engine {
    /// Begins to follow a relation (a view, `$errors`, `$late`, `$rejected`), of which `columns` are
    /// shown: a view may get more of them.
    pub async fn subscribe(&self, id: RelationId, columns: SchemaRef) -> Result<Subscription> {
        let (follow, events) = unbounded_channel();
        let load = Arc::new(Load::default());
        let follower = Follower::new(follow, Arc::clone(&load));
        let read = self.read_with(&[id], Some(follower)).await?;
        let tick = read.tick;
        let shown = Arc::clone(&columns);
        let contents = tokio::task::spawn_blocking(move || {
            let batches = read.batches(id)?.into_iter();
            let batches = batches.map(|batch| first_columns(&shown, batch));
            batches.collect::<Result<_>>()
        });
        let contents = contents
            .await
            .map_err(|e| Error::internal(e.to_string()))??;
        Ok(Subscription {
            tick,
            contents,
            engine: self.clone(),
            events,
            load,
            columns,
            upto: vec![0; self.inner.config.workers],
            pending: BTreeMap::new(),
        })
    }
}

impl Subscription {
    /// The changes of the next tick that has any; `None` when the relation was dropped or the engine
    /// has stopped. An insertion and a retraction of equal rows may both be among them.
    pub async fn next(&mut self) -> Result<Option<(Tick, Vec<Delta>)>> {
        loop {
            let complete = self.upto.iter().min().copied().unwrap_or(0);
            if let Some(first) = self.pending.first_entry()
                && *first.key() < complete
            {
                let (tick, deltas) = first.remove_entry();
                self.engine.wait_durable(tick).await?;
                let shown = |delta: Delta| {
                    let batch = first_columns(&self.columns, delta.batch)?;
                    Ok(Delta::new(batch, delta.diffs))
                };
                let deltas = deltas.into_iter().map(shown).collect::<Result<_>>()?;
                return Ok(Some((tick, deltas)));
            }
            let event = self.events.recv().await;
            if self.load.is_overrun() {
                return Err(Error::new(
                    ErrorKind::Unavailable,
                    "the subscriber reads more slowly than the relation changes",
                )
                .code("53400")
                .hint("subscribe again; the contents come first"));
            }
            let Some((worker, event)) = event else {
                return Ok(None);
            };
            self.load.took(&event);
            match event {
                Event::Changes(tick, deltas) if tick > self.tick => {
                    self.pending.entry(tick).or_default().extend(deltas);
                }
                Event::Changes(..) => {}
                Event::Closed => return Ok(None),
                Event::Upto(tick) => self.upto[worker] = self.upto[worker].max(tick),
            }
        }
    }
}

/// The columns that a subscriber knows. A view that is replaced while nothing depends on it may have
/// others.
fn first_columns(columns: &SchemaRef, batch: RecordBatch) -> Result<RecordBatch> {
    let schema = batch.schema_ref();
    let known = columns.fields().len();
    let same = schema.fields().len() >= known
        && (columns.fields().iter().zip(schema.fields()))
            .all(|(known, is)| known.name() == is.name() && known.data_type() == is.data_type());
    if !same {
        return Err(Error::new(
            ErrorKind::Conflict,
            "the columns of the relation have changed",
        )
        .hint("subscribe again; the contents come first"));
    }
    if schema.fields().len() == known {
        return Ok(batch);
    }
    let first: Vec<usize> = (0..known).collect();
    batch
        .project(&first)
        .map_err(|e| Error::internal(e.to_string()))
}

/// A read that also leaves a follower behind.
pub(super) fn mark(
    ids: &[RelationId],
    answer: tokio::sync::mpsc::UnboundedSender<crate::tick::ReadAnswer>,
    follow: Option<Follower>,
) -> Request {
    Request::Read(ReadMark {
        relations: ids.into(),
        answer,
        follow,
    })
}
