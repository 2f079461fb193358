//! The durable catalog: what was created, who may write, which checkpoint counts.
//!
//! # Contract
//!
//! * Every write names the incarnation of its writer and happens in one transaction that refuses an
//!   older one: a server that was replaced can change nothing any more and learns it (`57P01`).
//! * Ids are never reused, not even after a failed statement: state and files carry them.
//! * Statements are kept as text; the columns beside it are what cannot be derived from it (ids) or
//!   what tells whether deriving it again still gives the same plan (fingerprint).

use std::collections::BTreeMap;

use millrace_dataflow::cluster::Definition;
use millrace_dataflow::error::{Error, Result};
use millrace_dataflow::plan::RelationId;

mod meta;
pub mod migrations;
mod replacements;
mod sqlite;

pub use sqlite::SqliteCatalog;

/// What an object is.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
pub enum Kind {
    Source,
    /// A logical view: text that is inlined where it is used.
    View,
    MaterializedView,
    Sink,
}

impl Kind {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::View => "view",
            Self::MaterializedView => "materialized view",
            Self::Sink => "sink",
        }
    }

    /// Reads what [`Self::as_str`] wrote.
    pub fn parse(text: &str) -> Result<Self> {
        [Self::Source, Self::View, Self::MaterializedView, Self::Sink]
            .into_iter()
            .find(|kind| kind.as_str() == text)
            .ok_or_else(|| {
                Error::new(
                    millrace_dataflow::error::ErrorKind::Corrupt,
                    format!("the catalog holds an object of unknown kind \"{text}\""),
                )
                .hint("it was probably written by a newer version")
            })
    }
}

/// One created object, as stored, and as worker processes are told of it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Object {
    pub id: RelationId,
    pub kind: Kind,
    /// As users say it; `lake.ns.t` for a view that is published under that name.
    pub name: String,
    /// The statement, complete in itself.
    pub text: String,
    /// `…$rejected` of a source.
    pub rejected: Option<RelationId>,
    /// `…$errors` of a view or source.
    pub errors: Option<RelationId>,
    /// `…$late` of a view.
    pub late: Option<RelationId>,
    /// The sink of a view published as `lake.ns.t`.
    pub companion: Option<RelationId>,
    /// Names of the objects it reads.
    pub depends_on: Vec<String>,
    /// Of the lowered plan; a different one after a restart means that stored state does not fit.
    pub fingerprint: String,
    pub created_ms: u64,
    /// What computes a materialized view: another id than its own once it was replaced.
    pub dataflow: RelationId,
    /// Views it reads that were replaced since it was made, as it knew them.
    pub seen: BTreeMap<String, Seen>,
}

/// A view as its readers know it. A replacement keeps these columns; the readers are planned again from
/// their text, and must find what they were made for.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Seen {
    /// The first ones of those there are.
    pub columns: usize,
    pub append_only: bool,
    pub event_time: Vec<Option<i64>>,
}

/// A new definition of a materialized view that is being prepared. It counts as soon as a checkpoint
/// holds its dataflow and no longer the old one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replacement {
    pub object: RelationId,
    pub dataflow: RelationId,
    pub text: String,
    pub depends_on: Vec<String>,
    pub fingerprint: String,
    /// The view before, for its readers.
    pub before: Seen,
}

impl Object {
    /// For worker processes.
    pub fn definition(&self) -> Definition {
        let bytes = serde_json::to_vec(self);
        bytes.expect("numbers and texts become JSON").into()
    }
    /// Every id the engine knows this object by.
    pub fn ids(&self) -> Vec<RelationId> {
        [
            Some(self.id),
            self.rejected,
            self.errors,
            self.late,
            self.companion,
        ]
        .into_iter()
        .flatten()
        .collect()
    }
}
